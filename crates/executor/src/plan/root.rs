//! The container's file system tree: mounts, devices, masked and read-only paths.

use std::path::{Component, Path};

use sys::mount::attribute;

use super::mounts::{Options, propagation_of};
use super::types::*;
use super::{HostFacts, PlanError};
use crate::oci::{self, NamespaceKind};

/// Devices of every container (config-linux.md, "Default Devices"): name, major, minor.
const DEVICES: [(&str, u32, u32); 6] =
    [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
/// Symbolic links of every container's `/dev`.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

pub(super) fn root(
    spec: &oci::Spec,
    linux: &oci::Linux,
    facts: &HostFacts,
    terminal: bool,
    sources: &mut Vec<Source>,
) -> Result<RootPlan, PlanError> {
    let root = spec.root.as_ref().ok_or(PlanError::Missing("root"))?;
    let in_user_namespace =
        facts.in_user_namespace || linux.namespaces.iter().any(|one| one.kind == NamespaceKind::User);
    let mut mounts = Vec::with_capacity(spec.mounts.len());
    for mount in &spec.mounts {
        mounts.extend(mount_plans(mount, facts, sources)?);
    }
    // A kernel without SELinux takes no label, and callers have one anyway.
    let label = Some(linux.mount_label.clone()).filter(|label| facts.selinux && !label.is_empty());
    if let Some(label) = &label {
        mounts.iter_mut().for_each(|mount| set_label(mount, label));
    }
    let own_dev = mounts.iter().any(|mount| matches!(mount.what, Mounted::Devices(_)));
    let devices = if own_dev { devices(linux, in_user_namespace, sources)? } else { Vec::new() };
    if terminal && !own_dev {
        return Err(PlanError::invalid("process.terminal", "true", "needs a tmpfs of the container's own at /dev"));
    }
    let propagation = match linux.rootfs_propagation.as_str() {
        "" => None,
        word => Some(propagation_of(word).ok_or_else(|| {
            PlanError::invalid("linux.rootfsPropagation", word, "is none of private, slave, shared, unbindable")
        })?),
    };
    Ok(RootPlan {
        mounts,
        devices,
        device_links: LINKS.iter().map(|(name, to)| ((*name).to_owned(), (*to).to_owned())).collect(),
        masked_paths: absolute("linux.maskedPaths", &linux.masked_paths)?,
        readonly_paths: absolute("linux.readonlyPaths", &linux.readonly_paths)?,
        readonly: root.readonly,
        propagation,
        entry: if facts.root_is_initramfs { RootEntry::Chroot } else { RootEntry::Pivot },
        // Any directory of the host will do: pivot_root wants a mount point, and takes it away from there.
        at: root.path.to_str().filter(|path| path.starts_with('/')).unwrap_or("/proc").to_owned(),
        label,
    })
}

/// Kinds that the policy labels. The label of message queues is set when they are mounted.
const UNLABELLED: [&str; 5] = ["proc", "sysfs", "mqueue", "cgroup", "cgroup2"];

/// Gives a new file system the label that all in it is to have.
fn set_label(mount: &mut MountPlan, label: &str) {
    let (Mounted::New(filesystem) | Mounted::Devices(filesystem)) = &mut mount.what else { return };
    let has_own = filesystem.options.iter().any(|(name, _)| name == "context");
    if !has_own && !UNLABELLED.contains(&filesystem.kind.as_str()) {
        filesystem.options.push(("context".to_owned(), Some(label.to_owned())));
    }
}

fn absolute(field: &'static str, paths: &[String]) -> Result<Vec<String>, PlanError> {
    paths.iter().map(|path| checked(field, path)).collect()
}

/// A path in the container: absolute, and without `..`, which would mean different things before and after its parents
/// are mounted over.
fn checked(field: &'static str, path: &str) -> Result<String, PlanError> {
    let inside = !Path::new(path).components().any(|part| part == Component::ParentDir);
    if path.starts_with('/') && inside && !path.contains('\0') {
        return Ok(path.to_owned());
    }
    Err(PlanError::invalid(field, path, "is not an absolute path without \"..\""))
}

fn mount_plans(mount: &oci::Mount, facts: &HostFacts, sources: &mut Vec<Source>) -> Result<Vec<MountPlan>, PlanError> {
    if mount.destination.is_empty() {
        return Err(PlanError::invalid("mounts.destination", "", "is missing"));
    }
    let target = match mount.destination.strip_prefix('/') {
        Some(_) => checked("mounts.destination", &mount.destination)?,
        None => checked("mounts.destination", &format!("/{}", mount.destination))?,
    };
    let options = Options::parse(mount)?;
    if options.bind.is_none() && !(mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty()) {
        return Err(PlanError::invalid("mounts.uidMappings", &mount.destination, "is possible for a bind mount only"));
    }
    let one = |what| Ok(vec![MountPlan { target: target.clone(), what, is_file: false }]);
    match (options.bind, mount.kind.as_str()) {
        (Some(_), _) if mount.source.is_empty() => one(Mounted::Own),
        (Some(recursive), _) => {
            sources.push(source(mount, &target, recursive, options)?);
            one(Mounted::Source(index(sources.len() - 1)))
        }
        (None, "tmpfs") if target == "/dev" => one(Mounted::Devices(filesystem("tmpfs", options))),
        (None, "cgroup") => Ok(control_groups(&target, options, facts)),
        (None, "") => Err(PlanError::invalid("mounts.type", &mount.destination, "has neither a type nor \"bind\"")),
        (None, kind) => one(Mounted::New(filesystem(kind, options))),
    }
}

/// Indices go over the wire as 32 bits; a plan is far smaller.
fn index(at: usize) -> u32 {
    u32::try_from(at).unwrap_or(u32::MAX)
}

fn filesystem(kind: &str, options: Options) -> FilesystemPlan {
    let Options { set, copy_up, data, .. } = options;
    FilesystemPlan { kind: kind.to_owned(), options: data, attributes: set, copy_up }
}

/// The container's own control groups: its new namespace makes them the root of what it sees.
fn control_groups(target: &str, options: Options, facts: &HostFacts) -> Vec<MountPlan> {
    let attributes = options.set;
    let mount = |target: String, kind: &str, data: Vec<(String, Option<String>)>| MountPlan {
        target,
        what: Mounted::New(FilesystemPlan { kind: kind.to_owned(), options: data, attributes, copy_up: false }),
        is_file: false,
    };
    if facts.unified_cgroups {
        return vec![mount(target.to_owned(), "cgroup2", Vec::new())];
    }
    let cover = vec![("mode".to_owned(), Some("755".to_owned()))];
    let mut mounts = vec![mount(target.to_owned(), "tmpfs", cover)];
    if let Mounted::New(cover) = &mut mounts[0].what {
        cover.attributes &= !attribute::READ_ONLY; // The mount points have to be made in it.
    }
    for (name, options) in &facts.cgroup_hierarchies {
        let data = options.iter().map(|option| match option.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (option.clone(), None),
        });
        mounts.push(mount(format!("{target}/{name}"), "cgroup", data.collect()));
    }
    mounts
}

fn source(mount: &oci::Mount, target: &str, recursive: bool, options: Options) -> Result<Source, PlanError> {
    if !mount.source.starts_with('/') {
        return Err(PlanError::invalid("mounts.source", &mount.source, "is not an absolute path on the host"));
    }
    let id_map = match (options.id_map, mount.uid_mappings.is_empty()) {
        (None, true) => IdMap::None,
        (Some(recursive), true) => IdMap::Container { recursive },
        (recursive, false) => IdMap::Own {
            uids: mount.uid_mappings.clone(),
            gids: mount.gid_mappings.clone(),
            recursive: recursive.unwrap_or(false),
        },
    };
    Ok(Source {
        path: mount.source.clone(),
        target: target.to_owned(),
        recursive,
        set: options.set,
        clear: options.clear,
        below: options.below,
        propagation: options.propagation,
        id_map,
    })
}

fn devices(
    linux: &oci::Linux,
    in_user_namespace: bool,
    sources: &mut Vec<Source>,
) -> Result<Vec<DeviceNode>, PlanError> {
    let mut nodes: Vec<DeviceNode> = DEVICES
        .iter()
        .map(|(name, major, minor)| DeviceNode {
            path: format!("/dev/{name}"),
            kind: DeviceKind::Character,
            major: *major,
            minor: *minor,
            mode: 0o666,
            uid: 0,
            gid: 0,
        })
        .collect();
    // All devices of a host have one called ptmx among them; the container's own terminals take its place.
    let is_link = |node: &DeviceNode| LINKS.iter().any(|(name, _)| node.path.strip_prefix("/dev/") == Some(name));
    for device in &linux.devices {
        let node = device_node(device)?;
        if is_link(&node) {
            continue;
        }
        nodes.retain(|other| other.path != node.path);
        nodes.push(node);
    }
    if in_user_namespace {
        nodes.iter_mut().filter(|node| node.kind != DeviceKind::Fifo).for_each(|node| bind(node, sources));
    }
    Ok(nodes)
}

/// In a user namespace the kernel makes no device nodes: the host's appear as mounts.
fn bind(node: &mut DeviceNode, sources: &mut Vec<Source>) {
    sources.push(Source {
        path: node.path.clone(),
        target: node.path.clone(),
        recursive: false,
        set: 0,
        clear: 0,
        below: Below::default(),
        propagation: None,
        id_map: IdMap::None,
    });
    node.kind = DeviceKind::Bound(index(sources.len() - 1));
}

fn device_node(device: &oci::Device) -> Result<DeviceNode, PlanError> {
    let kind = match device.kind.as_str() {
        "c" | "u" => DeviceKind::Character,
        "b" => DeviceKind::Block,
        "p" => DeviceKind::Fifo,
        other => return Err(PlanError::invalid("linux.devices.type", other, "is none of c, u, b and p")),
    };
    let path = checked("linux.devices.path", &device.path)?;
    if !path.starts_with("/dev/") {
        return Err(PlanError::invalid("linux.devices.path", path, "is not below /dev"));
    }
    Ok(DeviceNode {
        path,
        kind,
        major: device.major,
        minor: device.minor,
        mode: device.file_mode.unwrap_or(0o666) & 0o7777,
        uid: device.uid.unwrap_or(0),
        gid: device.gid.unwrap_or(0),
    })
}
