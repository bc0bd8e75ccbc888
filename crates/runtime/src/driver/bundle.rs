//! What another runtime gets for a container: a directory with `config.json`.
//!
//! The configuration is the one that this runtime would use itself. Sources of mounts, the root and the pod's namespaces are
//! descriptors there; here they have paths below the bundle, where the keeper mounts them for the runtime alone.

use std::fs;
use std::path::Path;

use executor::oci::{self, NamespaceKind};
use keeper::protocol::{MOUNTS, PID, ROOTFS};
use sys::cgroup::Cgroup;

use super::{CONFIG, Driver, DriverError, STATES, put, text};
use crate::plugins;

/// `CAP_SYS_RESOURCE`, without which no process is protected more from the OOM killer than it was.
const CAP_SYS_RESOURCE: u64 = 1 << 24;
/// Older runtimes refuse a newer number; nothing in a bundle is newer than this version.
const OCI_VERSION: &str = "1.1.0";
/// By this runtimes that know of pods tell a container from the one that stands for its pod, of which there is none here.
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";

/// A bundle that was written.
#[derive(Debug)]
pub(crate) struct Bundle {
    /// The namespaces that it joins.
    pub(crate) joins: Vec<NamespaceKind>,
    /// Directories of its root that it mounts over themselves.
    pub(crate) volumes: Vec<String>,
    /// The control group from which the path of the container's counts, where that is not absolute.
    pub(crate) base: Option<Cgroup>,
}

impl Driver {
    /// Writes a container's bundle. Of the binds in `spec`, the first one's source is the first mount of the request to
    /// the keeper, and so on.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub(crate) fn put_bundle(
        &self,
        id: &str,
        mut spec: oci::Spec,
        base: Option<Cgroup>,
        capabilities: u64,
    ) -> Result<Bundle, DriverError> {
        let bundle = self.bundle(id);
        for directory in [ROOTFS, MOUNTS] {
            let path = bundle.join(directory);
            fs::create_dir_all(&path).map_err(|source| DriverError::File { path, source })?;
        }
        let joined = spec.linux.iter().flat_map(|linux| &linux.namespaces).filter(|one| !one.path.is_empty());
        let joins: Vec<NamespaceKind> = joined.map(|one| one.kind).collect();
        if joins.contains(&NamespaceKind::User) {
            // Where the runtime is what is not there by now cannot be made, as it has another view of the directories above.
            let path = self.place.join(STATES);
            fs::create_dir_all(&path).map_err(|source| DriverError::File { path, source })?;
        }
        let volumes = place_mounts(&mut spec, &bundle.join(MOUNTS));
        place_rest(&mut spec, &bundle.join(MOUNTS));
        if capabilities & CAP_SYS_RESOURCE == 0 {
            restrict_oom_score(&mut spec);
        }
        put(&bundle.join(CONFIG), &spec)?;
        let _ = fs::remove_file(bundle.join(PID)); // Of a start before this one.
        Ok(Bundle { joins, volumes, base })
    }

    /// Writes other limits into a bundle whose container was not started yet; what they do not name stays.
    ///
    /// # Errors
    /// It cannot be read or written.
    pub(crate) fn put_resources(&self, id: &str, resources: oci::Resources) -> Result<(), DriverError> {
        let path = self.bundle(id).join(CONFIG);
        let failed = |source| DriverError::File { path: path.clone(), source };
        let json = fs::read(&path).map_err(failed)?;
        let mut spec: oci::Spec = serde_json::from_slice(&json).map_err(|error| failed(error.into()))?;
        let linux = spec.linux.get_or_insert_default();
        plugins::merge(linux.resources.get_or_insert_default(), resources);
        put(&path, &spec)
    }
}

/// Writes the configuration of a container that this runtime starts itself, for its hooks; they find the root at the path that
/// it names, where it is attached until it is entered.
///
/// # Errors
/// A file that cannot be written.
pub(crate) fn put_bundle_for_hooks(bundle: &Path, spec: &mut oci::Spec) -> Result<(), DriverError> {
    let rootfs = bundle.join(ROOTFS);
    fs::create_dir_all(&rootfs).map_err(|source| DriverError::File { path: rootfs.clone(), source })?;
    if let Some(root) = &mut spec.root {
        root.path = rootfs;
    }
    put(&bundle.join(CONFIG), spec)
}

/// Gives binds their sources; what the root mounts over itself is of use only where that is read-only.
fn place_mounts(spec: &mut oci::Spec, mounts: &Path) -> Vec<String> {
    let is_readonly = spec.root.as_ref().is_some_and(|root| root.readonly);
    let (mut count, mut volumes) = (0, Vec::new());
    spec.mounts.retain_mut(|mount| {
        if !is_bind(mount) {
            return true;
        }
        let name = if mount.source.is_empty() {
            if !is_readonly {
                return false;
            }
            volumes.push(mount.destination.clone());
            format!("v{}", volumes.len() - 1)
        } else {
            count += 1;
            format!("{}", count - 1)
        };
        mount.source = text(&mounts.join(name));
        // Its owners are mapped already, which happens once to a mount.
        mount.options.retain(|option| option != "idmap" && option != "ridmap");
        (mount.uid_mappings, mount.gid_mappings) = (Vec::new(), Vec::new());
        true
    });
    volumes
}

fn is_bind(mount: &oci::Mount) -> bool {
    mount.kind == "bind" || mount.options.iter().any(|option| option == "bind" || option == "rbind")
}

fn place_rest(spec: &mut oci::Spec, mounts: &Path) {
    if let Some(root) = &mut spec.root {
        root.path = ROOTFS.into();
    }
    spec.oci_version = OCI_VERSION.to_owned();
    spec.annotations.remove(CONTAINER_TYPE);
    // What a mount passes on has to pass the container's root first.
    let passes =
        |spec: &oci::Spec, option: &str| spec.mounts.iter().any(|mount| mount.options.iter().any(|o| o == option));
    let propagation = ["rshared", "rslave"].into_iter().find(|option| passes(spec, option));
    let linux = spec.linux.get_or_insert_default();
    linux.rootfs_propagation = propagation.unwrap_or_default().to_owned();
    for namespace in linux.namespaces.iter_mut().filter(|one| !one.path.is_empty()) {
        namespace.path = text(&mounts.join(executor::namespaces::file_name(namespace.kind)));
    }
}

/// As containerd's `restrict_oom_score_adj`: the daemon's own score is the least that it can give.
fn restrict_oom_score(spec: &mut oci::Spec) {
    let own = fs::read_to_string("/proc/self/oom_score_adj").ok().and_then(|text| text.trim().parse::<i32>().ok());
    if let (Some(own), Some(process)) = (own, &mut spec.process) {
        process.oom_score_adj = process.oom_score_adj.map(|wanted| wanted.max(own));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(destination: &str, source: &str, options: &[&str]) -> oci::Mount {
        oci::Mount {
            destination: destination.to_owned(),
            source: source.to_owned(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
            ..oci::Mount::default()
        }
    }

    #[test]
    fn a_bundle_names_what_the_keeper_mounts() {
        let place = tempfile::tempdir().unwrap();
        let driver = Driver { program: "/r".into(), arguments: Vec::new(), place: place.path().to_owned() };
        let namespace = |kind, path: &str| oci::Namespace { kind, path: path.to_owned() };
        let spec = oci::Spec {
            root: Some(oci::Root { path: "x".into(), readonly: true }),
            mounts: vec![
                mount("/proc", "proc", &[]),
                mount("/a", "/host/a", &["rbind", "rslave"]),
                mount("/data", "", &["rbind"]),
                mount("/b", "/host/b", &["bind", "ro"]),
            ],
            linux: Some(oci::Linux {
                cgroups_path: "pods/c".to_owned(),
                resources: Some(oci::Resources {
                    devices: vec![oci::DeviceRule::default()],
                    cpu: Some(oci::Cpu { shares: Some(512), quota: Some(1000), ..oci::Cpu::default() }),
                    pids: Some(oci::Pids { limit: Some(9) }),
                    ..oci::Resources::default()
                }),
                namespaces: vec![
                    namespace(NamespaceKind::Mount, ""),
                    namespace(NamespaceKind::Network, "/proc/1/ns/net"),
                ],
                ..oci::Linux::default()
            }),
            ..oci::Spec::default()
        };
        let bundle = driver.put_bundle("c", spec.clone(), None, u64::MAX).unwrap();
        assert_eq!((bundle.joins, bundle.volumes), (vec![NamespaceKind::Network], vec!["/data".to_owned()]));
        let memory = oci::Memory { limit: Some(7), ..oci::Memory::default() };
        let cpu = oci::Cpu { quota: Some(2000), ..oci::Cpu::default() };
        let resources = oci::Resources { memory: Some(memory), cpu: Some(cpu), ..oci::Resources::default() };
        driver.put_resources("c", resources).unwrap();
        let directory = driver.bundle("c");
        let written: oci::Spec = serde_json::from_slice(&fs::read(directory.join(CONFIG)).unwrap()).unwrap();
        let at = |name: &str| text(&directory.join(MOUNTS).join(name));
        let sources: Vec<&str> = written.mounts.iter().map(|mount| mount.source.as_str()).collect();
        assert_eq!(sources, ["proc", &at("0"), &at("v0"), &at("1")]);
        let linux = written.linux.unwrap();
        assert_eq!((linux.cgroups_path.as_str(), linux.rootfs_propagation.as_str()), ("pods/c", "rslave"));
        assert_eq!(linux.namespaces[1].path, at("net"));
        let limits = linux.resources.unwrap();
        assert_eq!((limits.devices.len(), limits.pids.and_then(|pids| pids.limit)), (1, Some(9)));
        assert_eq!(limits.cpu.map(|cpu| (cpu.shares, cpu.quota)), Some((Some(512), Some(2000))));
        assert_eq!(limits.memory.and_then(|memory| memory.limit), Some(7));
        // A root that can be written needs no mounts for its volumes.
        let spec = oci::Spec { root: Some(oci::Root::default()), ..spec };
        assert_eq!(driver.put_bundle("c", spec, None, u64::MAX).unwrap().volumes, Vec::<String>::new());
    }
}
