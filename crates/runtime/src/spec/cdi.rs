//! Devices of the Container Device Interface: vendors describe in files of the host what a container gets with a device.
//!
//! Specification: <https://github.com/cncf-tags/container-device-interface/blob/main/SPEC.md>. The files are the operator's,
//! as the vendor's packages and plugins put them there; what they ask for and this runtime does not do is refused by name.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use executor::oci;
use serde::Deserialize;
use serde_json::Value;

use super::SpecError;
use super::prepare::{HostDevice, node, text};

/// Where descriptions lie; those of a later directory win.
pub(super) const DIRECTORIES: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];
/// The longest description that is read (R6).
const BYTES_MAX: u64 = 4 << 20;

/// What a container gets with its devices.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Edits {
    /// Variables, as `KEY=value`.
    pub(crate) env: Vec<String>,
    /// Devices.
    pub(crate) devices: Vec<HostDevice>,
    /// Mounts.
    pub(crate) mounts: Vec<oci::Mount>,
    /// Groups that its process is in beside those that it asked for.
    pub(crate) gids: Vec<u32>,
    /// Programs that are run in its namespaces before it begins.
    pub(crate) hooks: oci::Hooks,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Description {
    kind: String,
    #[serde(default)]
    container_edits: Written,
    #[serde(default)]
    devices: Vec<Device>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Device {
    name: String,
    #[serde(default)]
    container_edits: Written,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Written {
    env: Vec<String>,
    device_nodes: Vec<Node>,
    mounts: Vec<Mount>,
    hooks: Vec<Hook>,
    intel_rdt: Option<Value>,
    net_devices: Vec<Value>,
    #[serde(rename = "additionalGids")]
    gids: Vec<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Node {
    path: String,
    host_path: String,
    #[serde(rename = "type")]
    kind: String,
    major: Option<u32>,
    minor: Option<u32>,
    file_mode: Option<u32>,
    permissions: String,
    uid: Option<u32>,
    gid: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Hook {
    hook_name: String,
    path: PathBuf,
    args: Vec<String>,
    env: Vec<String>,
    timeout: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Mount {
    host_path: String,
    container_path: String,
    #[serde(rename = "type")]
    kind: String,
    options: Vec<String>,
}

/// What the devices with these names bring, as the descriptions in `directories` have it.
///
/// # Errors
/// A device that nobody describes; a description that asks for what cannot be.
pub(super) fn edits<'a>(names: impl Iterator<Item = &'a str>, directories: &[&Path]) -> Result<Edits, SpecError> {
    let names: Vec<&str> = names.collect();
    let mut edits = Edits::default();
    if names.is_empty() {
        return Ok(edits);
    }
    let descriptions: Vec<(PathBuf, Description)> = directories.iter().flat_map(|directory| read(directory)).collect();
    // What holds for all devices of a description comes once.
    let mut begun: BTreeSet<&Path> = BTreeSet::new();
    for name in names {
        let (path, description, device) = find(name, &descriptions)?;
        if begun.insert(path) {
            edits.add(path, &description.container_edits)?;
        }
        edits.add(path, &device.container_edits)?;
    }
    Ok(edits)
}

/// Adds what devices bring to a configuration that is made already.
///
/// # Errors
/// As [`edits`].
pub(crate) fn add_cdi(spec: &mut oci::Spec, names: &[&str]) -> Result<(), SpecError> {
    if names.is_empty() {
        return Ok(());
    }
    let edits = edits(names.iter().copied(), &DIRECTORIES.map(Path::new))?;
    let process = spec.process.get_or_insert_default();
    process.env.extend(edits.env);
    process.user.additional_gids.extend(edits.gids);
    spec.mounts.extend(edits.mounts);
    if edits.hooks != oci::Hooks::default() {
        let hooks = spec.hooks.get_or_insert_default();
        hooks.create_container.extend(edits.hooks.create_container);
        hooks.start_container.extend(edits.hooks.start_container);
    }
    let linux = spec.linux.get_or_insert_default();
    for device in edits.devices {
        let (major, minor) = (Some(device.node.major.into()), Some(device.node.minor.into()));
        let rule = oci::DeviceRule { allow: true, kind: device.node.kind.clone(), major, minor, access: device.access };
        linux.resources.get_or_insert_default().devices.push(rule);
        linux.devices.push(device.node);
    }
    Ok(())
}

fn find<'a>(
    name: &str,
    descriptions: &'a [(PathBuf, Description)],
) -> Result<(&'a Path, &'a Description, &'a Device), SpecError> {
    let invalid = |problem: &str| SpecError::invalid("cdi_devices.name", name, problem);
    let (kind, device) = name.split_once('=').ok_or_else(|| invalid("is not vendor/class=device"))?;
    let of_kind = descriptions.iter().rev().filter(|(_, description)| description.kind == kind);
    let mut found = of_kind.filter_map(|(path, description)| {
        let device = description.devices.iter().find(|one| one.name == device)?;
        Some((path.as_path(), description, device))
    });
    let found = found.next();
    found.ok_or_else(|| invalid("is described by no file in /etc/cdi or /var/run/cdi; see the vendor's tools"))
}

/// The descriptions in a directory. One that cannot be read harms only who wants its devices.
fn read(directory: &Path) -> Vec<(PathBuf, Description)> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut paths: Vec<PathBuf> =
        entries.filter(|path| path.extension().is_some_and(|kind| kind == "json" || kind == "yaml")).collect();
    paths.sort();
    let read = |path: PathBuf| match read_one(&path) {
        Ok(description) => Some((path, description)),
        Err(error) => {
            tracing::warn!(path = %path.display(), error, "a description of CDI devices is of no use");
            None
        }
    };
    paths.into_iter().filter_map(read).collect()
}

fn read_one(path: &Path) -> Result<Description, String> {
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    if !file.metadata().is_ok_and(|facts| facts.is_file()) {
        return Err("it is not a regular file".to_owned());
    }
    let mut text = String::new();
    let length = file.take(BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| error.to_string())?;
    if u64::try_from(length).map_or(true, |length| length > BYTES_MAX) {
        return Err(format!("it is longer than {BYTES_MAX} bytes"));
    }
    // JSON is YAML.
    serde_saphyr::from_str(&text).map_err(|error| error.to_string())
}

impl Edits {
    fn add(&mut self, path: &Path, written: &Written) -> Result<(), SpecError> {
        for (what, is_there) in
            [("intelRdt", written.intel_rdt.is_some()), ("netDevices", !written.net_devices.is_empty())]
        {
            if is_there {
                return Err(SpecError::Unsupported {
                    feature: format!("`{what}` of a CDI device, which {} asks for,", path.display()),
                    reason: "this runtime adds variables, devices, mounts, groups and hooks only",
                });
            }
        }
        self.env.extend(written.env.iter().cloned());
        for node in &written.device_nodes {
            self.devices.push(host_device(path, node)?);
        }
        self.mounts.extend(written.mounts.iter().map(Mount::to_oci));
        self.gids.extend(written.gids.iter().filter(|gid| **gid != 0));
        written.hooks.iter().try_for_each(|hook| self.add_hook(path, hook))
    }

    /// Those of the other stages are run outside of the container, where nothing of this runtime waits for a program.
    fn add_hook(&mut self, path: &Path, written: &Hook) -> Result<(), SpecError> {
        let stage = match written.hook_name.as_str() {
            "createContainer" => &mut self.hooks.create_container,
            "startContainer" => &mut self.hooks.start_container,
            other => {
                return Err(SpecError::Unsupported {
                    feature: format!("a hook {other:?} of a CDI device, which {} asks for,", path.display()),
                    reason: "this runtime runs hooks of the stages createContainer and startContainer",
                });
            }
        };
        let Hook { path, args, env, timeout, .. } = written;
        stage.push(oci::Hook { path: path.clone(), args: args.clone(), env: env.clone(), timeout: *timeout });
        Ok(())
    }
}

impl Mount {
    fn to_oci(&self) -> oci::Mount {
        let is_bind = self.options.iter().any(|option| option == "bind" || option == "rbind");
        // Without a kind it is a bind, whatever the options say.
        let mut options = self.options.clone();
        if !is_bind && self.kind.is_empty() {
            options.push("rbind".to_owned());
        }
        oci::Mount {
            destination: self.container_path.clone(),
            kind: if self.kind.is_empty() { "bind".to_owned() } else { self.kind.clone() },
            source: self.host_path.clone(),
            options,
            ..oci::Mount::default()
        }
    }
}

/// A device with what the description says of it; the rest is as the host's node has it.
fn host_device(path: &Path, written: &Node) -> Result<HostDevice, SpecError> {
    let malformed = |reason: &str| SpecError::Malformed { path: path.to_owned(), reason: reason.to_owned() };
    if !written.path.starts_with('/') {
        return Err(malformed("a device node is named by its absolute path"));
    }
    let access = if written.permissions.is_empty() { "rwm" } else { &written.permissions };
    if !access.bytes().all(|letter| b"rwm".contains(&letter)) {
        return Err(malformed("the permissions of a device have a letter beside r, w and m"));
    }
    let host_path = if written.host_path.is_empty() { &written.path } else { &written.host_path };
    let numbers = written.major.zip(written.minor).filter(|_| !written.kind.is_empty());
    let mut device = match numbers {
        Some((major, minor)) => oci::Device {
            path: written.path.clone(),
            // `u` is a character device of old.
            kind: if written.kind == "u" { "c".to_owned() } else { written.kind.clone() },
            major,
            minor,
            ..oci::Device::default()
        },
        None => {
            let real =
                fs::canonicalize(host_path).map_err(|error| SpecError::host("find the device", host_path, error))?;
            node(&real, Path::new(&written.path))?
                .ok_or_else(|| malformed("a device node is no device on this host"))?
        }
    };
    device.file_mode = written.file_mode.or(device.file_mode);
    device.uid = written.uid.or(device.uid);
    device.gid = written.gid.or(device.gid);
    Ok(HostDevice { host_path: text(Path::new(host_path)), node: device, access: access.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(files: &[(&str, &str)], names: &[&str]) -> Result<Edits, String> {
        let dir = tempfile::tempdir().unwrap();
        for (name, content) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let directories = [dir.path().join("etc"), dir.path().join("run")];
        edits(names.iter().copied(), &[&directories[0], &directories[1]]).map_err(|error| error.to_string())
    }

    const YAML: &str = "
cdiVersion: 0.6.0
kind: vendor.com/gpu
containerEdits:
  env: [ALL=1]
devices:
- name: zero
  containerEdits:
    env: [DEVICE=zero]
    deviceNodes:
    - {path: /dev/mine, hostPath: /dev/zero, permissions: rw, gid: 44}
    mounts:
    - {hostPath: /usr/lib/x, containerPath: /lib/x, options: [ro, nosuid, bind]}
    additionalGids: [44, 0]
- name: numbered
  containerEdits:
    deviceNodes:
    - {path: /dev/numbered, type: b, major: 7, minor: 9}
- name: hooked
  containerEdits:
    hooks: [{hookName: createContainer, path: /bin/x, args: [x, y], timeout: 5}, {hookName: startContainer, path: /y}]
- name: outside
  containerEdits:
    hooks: [{hookName: prestart, path: /bin/x}]
";

    #[test]
    fn a_device_brings_what_is_written() {
        let edits = described(&[("etc/gpu.yaml", YAML)], &["vendor.com/gpu=zero", "vendor.com/gpu=numbered"]).unwrap();
        assert_eq!(edits.env, ["ALL=1", "DEVICE=zero"]);
        let zero = &edits.devices[0];
        assert_eq!((zero.node.path.as_str(), zero.node.major, zero.node.minor), ("/dev/mine", 1, 5));
        assert_eq!((zero.access.as_str(), zero.node.gid), ("rw", Some(44)));
        let numbered = &edits.devices[1];
        assert_eq!((numbered.node.kind.as_str(), numbered.node.major, numbered.access.as_str()), ("b", 7, "rwm"));
        assert_eq!(edits.mounts[0].options, ["ro", "nosuid", "bind"]);
        assert_eq!(edits.gids, [44]);
        let hooks = described(&[("etc/gpu.yaml", YAML)], &["vendor.com/gpu=hooked"]).unwrap().hooks;
        let hook = &hooks.create_container[0];
        assert_eq!((hook.args.len(), hook.timeout, hooks.start_container.len()), (2, Some(5), 1));
    }

    #[test]
    fn what_is_not_there_or_cannot_be() {
        let of = |name: &str| described(&[("etc/gpu.yaml", YAML), ("etc/bad.json", "{")], &[name]).unwrap_err();
        assert!(of("vendor.com/gpu=none").contains("is described by no file"));
        assert!(of("vendor.com/gpu").contains("is not vendor/class=device"));
        assert!(of("vendor.com/gpu=outside").contains("a hook \"prestart\" of a CDI device"));
        assert_eq!(described(&[("etc/bad.json", "{")], &[]), Ok(Edits::default()));
    }

    #[test]
    fn later_directories_win() {
        let own = |value: &str| {
            format!(
                r#"{{"cdiVersion": "0.3.0", "kind": "v.com/c", "devices": [{{"name": "0", "containerEdits": {{"env": ["A={value}"]}}}}]}}"#
            )
        };
        let files = [("etc/a.json", own("etc")), ("run/a.json", own("run"))];
        let files: Vec<(&str, &str)> = files.iter().map(|(name, content)| (*name, content.as_str())).collect();
        assert_eq!(described(&files, &["v.com/c=0"]).unwrap().env, ["A=run"]);
    }
}
