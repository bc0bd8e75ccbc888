//! `spec`: a configuration to begin with.

use std::path::{Path, PathBuf};

use executor::oci::Spec;

use crate::args::SpecOptions;
use crate::error::Error;
use crate::spec::CONFIG;

/// What most containers have, as runc writes it.
const TEMPLATE: &str = include_str!("template.json");

pub(crate) fn run(options: &SpecOptions) -> Result<(), Error> {
    let dir = options.bundle.clone().unwrap_or_else(|| PathBuf::from("."));
    let path = dir.join(CONFIG);
    if path.exists() {
        return Err(Error::Invalid(format!("File {CONFIG} exists. Remove it first")));
    }
    let mut spec: serde_json::Value = serde_json::from_str(TEMPLATE).map_err(Error::json("the template"))?;
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        push(&mut spec["linux"]["namespaces"], serde_json::json!({ "type": "cgroup" }));
    }
    if options.rootless {
        make_rootless(&mut spec);
    }
    // It has to be one that can be read again.
    serde_json::from_value::<Spec>(spec.clone()).map_err(Error::json("the template"))?;
    let text = serde_json::to_string_pretty(&spec).map_err(Error::json("the template"))?;
    crate::record::write_file(&path, text.as_bytes(), 0o666)
}

fn push(list: &mut serde_json::Value, item: serde_json::Value) {
    if let Some(list) = list.as_array_mut() {
        list.push(item);
    }
}

/// For a user who is not root: a user namespace with this user as its root, and of the rest what such a user may have.
fn make_rootless(spec: &mut serde_json::Value) {
    let (uid, gid) = (sys::rustix::process::geteuid().as_raw(), sys::rustix::process::getegid().as_raw());
    let linux = &mut spec["linux"];
    if let Some(namespaces) = linux["namespaces"].as_array_mut() {
        namespaces.retain(|one| one["type"] != "network");
        namespaces.push(serde_json::json!({ "type": "user" }));
    }
    linux["uidMappings"] = serde_json::json!([{ "containerID": 0, "hostID": uid, "size": 1 }]);
    linux["gidMappings"] = serde_json::json!([{ "containerID": 0, "hostID": gid, "size": 1 }]);
    if let Some(linux) = linux.as_object_mut() {
        linux.remove("resources");
    }
    let Some(mounts) = spec["mounts"].as_array_mut() else { return };
    for mount in mounts {
        if let Some(options) = mount.get_mut("options").and_then(|options| options.as_array_mut()) {
            // Groups and users that are not mapped cannot own anything.
            options.retain(|option| {
                option.as_str().is_some_and(|option| !option.starts_with("gid=") && !option.starts_with("uid="))
            });
        }
        if mount["destination"] == "/sys" {
            *mount = serde_json::json!({
                "destination": "/sys",
                "type": "none",
                "source": "/sys",
                "options": ["rbind", "nosuid", "noexec", "nodev", "ro"],
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_written_once() {
        let dir = tempfile::tempdir().unwrap();
        let options = SpecOptions { bundle: Some(dir.path().to_owned()), rootless: false };
        run(&options).unwrap();
        let spec = crate::spec::read(dir.path()).unwrap();
        assert_eq!(spec.process.unwrap().args, ["sh"]);
        assert!(run(&options).unwrap_err().to_string().contains("exists"));
    }

    #[test]
    fn without_root_there_is_a_user_namespace() {
        let mut spec: serde_json::Value = serde_json::from_str(TEMPLATE).unwrap();
        make_rootless(&mut spec);
        let spec: Spec = serde_json::from_value(spec).unwrap();
        let linux = spec.linux.unwrap();
        assert!(linux.namespaces.iter().any(|one| one.kind == executor::oci::NamespaceKind::User));
        assert_eq!(linux.uid_mappings.len(), 1);
        assert!(!spec.mounts.iter().any(|mount| mount.options.iter().any(|option| option.starts_with("gid="))));
    }
}
