//! The bundle's configuration, and what has to be said of it before anything is made.

use std::path::{Path, PathBuf};

use executor::oci::{self, NamespaceKind, Spec};
use serde::de::DeserializeOwned;

use crate::cgroups;
use crate::error::Error;

/// Name of the configuration in a bundle.
pub(crate) const CONFIG: &str = "config.json";

/// A bundle: its directory and what is written there.
#[derive(Debug)]
pub(crate) struct Bundle {
    /// Absolute.
    pub(crate) dir: PathBuf,
    /// The root file system, absolute.
    pub(crate) rootfs: PathBuf,
    pub(crate) spec: Spec,
}

impl Bundle {
    /// Reads and checks it.
    pub(crate) fn open(dir: &Path) -> Result<Self, Error> {
        let dir = dir.canonicalize().map_err(Error::file("open", dir))?;
        let mut spec = read(&dir)?;
        check(&spec)?;
        spec.mounts.iter_mut().for_each(|mount| settle(mount, &dir));
        let root = spec.root.as_ref().ok_or_else(|| Error::Invalid("root is missing".to_owned()))?;
        let rootfs = dir.join(&root.path);
        if !rootfs.is_dir() {
            let missing = std::io::Error::from_raw_os_error(2);
            return Err(Error::during("invalid rootfs")(Error::file("stat", rootfs)(missing)));
        }
        Ok(Self { dir, rootfs, spec })
    }
}

/// The configuration of a bundle.
pub(crate) fn read(dir: &Path) -> Result<Spec, Error> {
    let path = dir.join(CONFIG);
    let bytes = std::fs::read(&path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::Invalid(format!("JSON specification file {} not found", path.display())),
        _ => Error::file("read", &path)(error),
    })?;
    parse(&bytes).map_err(Error::json(path))
}

/// JSON of other programs. Those in Go write `null` for a list that has nothing in it, which is looked for only when there is
/// something wrong: it takes as long as everything else.
pub(crate) fn parse<T: DeserializeOwned>(bytes: &[u8]) -> serde_json::Result<T> {
    serde_json::from_slice(bytes).or_else(|error| {
        let mut value: serde_json::Value = serde_json::from_slice(bytes)?;
        remove_nulls(&mut value);
        serde_json::from_value(value).map_err(|_| error)
    })
}

fn remove_nulls(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Object(fields) => {
            fields.retain(|_, value| !value.is_null());
            fields.values_mut().for_each(remove_nulls);
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(remove_nulls),
        _ => {}
    }
}

/// What the executor cannot see: it plans for one that has been checked, or would make other things of it.
fn check(spec: &Spec) -> Result<(), Error> {
    let invalid = |text: &str| Err(Error::Invalid(text.to_owned()));
    check_version(&spec.oci_version)?;
    let Some(linux) = &spec.linux else { return invalid("linux is missing: this runtime runs Linux containers alone") };
    let has = |kind| linux.namespaces.iter().any(|one| one.kind == kind);
    for (at, one) in linux.namespaces.iter().enumerate() {
        if linux.namespaces[..at].iter().any(|other| other.kind == one.kind) {
            return Err(Error::Invalid(format!("malformed spec file: duplicated ns {:?}", one.kind)));
        }
    }
    let maps = !linux.uid_mappings.is_empty() || !linux.gid_mappings.is_empty();
    let joined = |kind| linux.namespaces.iter().any(|one| one.kind == kind && !one.path.is_empty());
    if has(NamespaceKind::User) && !joined(NamespaceKind::User) && linux.uid_mappings.is_empty() {
        return invalid("user namespaces enabled, but no namespace path to join nor mappings to apply specified");
    }
    if maps && !has(NamespaceKind::User) {
        return invalid("user namespace mappings specified, but user namespace isn't enabled in the config");
    }
    if !has(NamespaceKind::Mount) && (!linux.masked_paths.is_empty() || !linux.readonly_paths.is_empty()) {
        return invalid("unable to restrict sys entries without a private MNT namespace");
    }
    cgroups::check_resources(linux.resources.as_ref())?;
    if linux.intel_rdt.is_some() {
        return invalid("intelRdt is not supported; remove it");
    }
    if !linux.net_devices.is_empty() {
        return invalid("netDevices are not supported; move them by a hook");
    }
    if linux.memory_policy.is_some() {
        return invalid("memoryPolicy is not supported; remove it");
    }
    if !(spec.hostname.is_empty() && spec.domainname.is_empty()) && is_hosts(linux, NamespaceKind::Uts, "uts") {
        return invalid("hostname and domainname are not possible in the host's UTS namespace");
    }
    check_sysctls(linux)
}

/// Any 1.x: what is newer adds fields.
fn check_version(version: &str) -> Result<(), Error> {
    let mut parts = version.split('.');
    let known = parts.next() == Some("1") && parts.next().is_some_and(|minor| minor.parse::<u32>().is_ok());
    if known { Ok(()) } else { Err(Error::Invalid(format!("unsupported spec version {version:?}: not of 1.x"))) }
}

/// Names of System V IPC and of POSIX message queues.
const OF_IPC: [&str; 10] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
    "kernel.shm_next_id",
    "kernel.msg_next_id",
];

/// A kernel parameter that no namespace of the container holds would be the host's.
fn check_sysctls(linux: &oci::Linux) -> Result<(), Error> {
    let has = |kind| linux.namespaces.iter().any(|one| one.kind == kind);
    for name in linux.sysctl.keys() {
        let name = name.replace('/', ".");
        if name == "kernel.hostname" {
            return Err(Error::Invalid("sysctl \"kernel.hostname\" is what the field hostname is for".to_owned()));
        }
        let (kind, of) = match name.as_str() {
            one if OF_IPC.contains(&one) || one.starts_with("fs.mqueue.") => (NamespaceKind::Ipc, "ipc"),
            one if one.starts_with("net.") => (NamespaceKind::Network, "network"),
            "kernel.domainname" => (NamespaceKind::Uts, "uts"),
            one if one.starts_with("user.") => (NamespaceKind::User, "user"),
            _ => return Err(Error::Invalid(format!("sysctl {name:?} is not in a separate kernel namespace"))),
        };
        if !has(kind) || (kind == NamespaceKind::Network && is_hosts(linux, kind, "net")) {
            return Err(Error::Invalid(format!("sysctl {name:?} not allowed in host {of} namespace")));
        }
    }
    Ok(())
}

/// Makes the mount's paths absolute: sources of the host's may be named from the bundle on.
fn settle(mount: &mut oci::Mount, bundle: &Path) {
    mount.destination = without_dots(&mount.destination);
    let is_bound = mount.kind == "bind" || mount.options.iter().any(|option| option == "bind" || option == "rbind");
    if is_bound && !mount.source.is_empty() && !mount.source.starts_with('/') {
        mount.source = bundle.join(&mount.source).display().to_string();
    }
}

/// A place in the container without `..`, which runc takes for what it means in the path itself.
fn without_dots(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!("/{}", cgroups::clean(path).display()) }
}

/// Whether the namespace to join is the one that this process is in, by its name below `/proc/self/ns`.
fn is_hosts(linux: &oci::Linux, kind: NamespaceKind, name: &str) -> bool {
    use std::os::unix::fs::MetadataExt as _;
    let mut joined = linux.namespaces.iter().filter(|one| one.kind == kind && !one.path.is_empty());
    let identity = |path: &str| std::fs::metadata(path).map(|stat| (stat.dev(), stat.ino())).ok();
    joined.any(|one| identity(&one.path).is_some() && identity(&one.path) == identity(&format!("/proc/self/ns/{name}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(json: &str) -> Result<(), String> {
        check(&serde_json::from_str(json).unwrap()).map_err(|error| error.to_string())
    }

    #[test]
    fn places_are_what_they_mean_in_themselves() {
        for (path, expect) in [("/a/../b/.", "/b"), ("b//c", "/b/c"), ("/../..", "/"), ("", "")] {
            assert_eq!(without_dots(path), expect, "{path}");
        }
        let mount = |source: &str, option: &str| oci::Mount {
            destination: "/m".into(),
            source: source.into(),
            options: vec![option.into()],
            ..oci::Mount::default()
        };
        for (source, option, expect) in
            [("data", "rbind", "/b/data"), ("/data", "bind", "/data"), ("", "bind", ""), ("proc", "ro", "proc")]
        {
            let mut mount = mount(source, option);
            settle(&mut mount, Path::new("/b"));
            assert_eq!(mount.source, expect);
        }
    }

    #[test]
    fn null_is_nothing() {
        let spec: Spec = parse(br#"{"ociVersion":"1.0.0","mounts":null,"process":{"args":["a"],"env":null}}"#).unwrap();
        assert_eq!(spec.process.unwrap().args, ["a"]);
        assert!(parse::<Spec>(br#"{"mounts":7}"#).unwrap_err().to_string().contains("line 1"));
    }

    #[test]
    fn files_of_the_group_are_its_own_and_sizes_are_sizes() {
        let resources =
            |text: &str| checked(&format!(r#"{{ "ociVersion": "1.2.0", "linux": {{ "resources": {text} }} }}"#));
        for name in ["../cgroup.procs", "a/b", "", "."] {
            let refused = resources(&format!(r#"{{ "unified": {{ "{name}": "1" }} }}"#)).unwrap_err();
            assert!(refused.contains("is no name of a control group's file"), "{refused}");
        }
        assert!(resources(r#"{ "memory": { "swap": -5 } }"#).unwrap_err().contains("-5 is no size"));
        assert_eq!(
            resources(r#"{ "unified": { "memory.high": "1" }, "memory": { "limit": -1, "swap": -1 } }"#),
            Ok(())
        );
    }

    #[test]
    fn what_would_reach_the_host_is_refused() {
        let with = |linux: &str| checked(&format!(r#"{{"ociVersion":"1.2.0","linux":{linux}}}"#));
        assert_eq!(with(r#"{"namespaces":[{"type":"network"}],"sysctl":{"net.ipv4.ip_forward":"1"}}"#), Ok(()));
        for (linux, part) in [
            (r#"{"sysctl":{"net.ipv4.ip_forward":"1"}}"#, "host network"),
            (r#"{"sysctl":{"vm.swappiness":"1"}}"#, "separate kernel namespace"),
            (r#"{"sysctl":{"kernel/shmmax":"1"}}"#, "host ipc"),
            (
                r#"{"namespaces":[{"type":"network","path":"/proc/self/ns/net"}],"sysctl":{"net.core.somaxconn":"1"}}"#,
                "host network",
            ),
            (r#"{"namespaces":[{"type":"pid"},{"type":"pid"}]}"#, "duplicated"),
            (r#"{"namespaces":[{"type":"user"}]}"#, "mappings"),
            (r#"{"maskedPaths":["/proc/kcore"]}"#, "private MNT"),
            (r#"{"intelRdt":{"closID":"x"}}"#, "intelRdt"),
        ] {
            let error = with(linux).unwrap_err();
            assert!(error.contains(part), "{linux}: {error}");
        }
        let named = r#"{"ociVersion":"1.0.0","hostname":"x","linux":{"namespaces":[{"type":"uts","path":"/proc/self/ns/uts"}]}}"#;
        assert!(checked(named).unwrap_err().contains("the host's UTS namespace"));
        assert!(checked(r#"{"ociVersion":"2.0.0","linux":{}}"#).unwrap_err().contains("2.0.0"));
        assert!(checked(r#"{"ociVersion":"1.0.0"}"#).is_err());
    }
}
