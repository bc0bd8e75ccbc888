//! The container's control group: where it is, and what it limits.

use std::os::fd::AsFd as _;
use std::path::{Component, Path, PathBuf};

use executor::oci;
use sys::cgroup::{Cgroup, DeviceRule, Hierarchy};
use sys::process;
use sys::rustix::io::Errno;
use sys::rustix::process::Pid;

use crate::context::Context;
use crate::error::Error;
use crate::systemd::{self, Holder, Unit};

pub(crate) const MOUNT: &str = "/sys/fs/cgroup";

/// The control group of a container.
#[derive(Debug)]
pub(crate) struct Group {
    pub(crate) cgroup: Cgroup,
    pub(crate) origin: Origin,
    /// systemd's unit that it belongs to.
    pub(crate) unit: Option<Unit>,
    /// What stands in for its first process until that is there.
    pub(crate) holder: Option<Holder>,
}

/// Who made a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// It was made for the container: so was all that is below it.
    Container,
    /// It was there. What is below it now may be somebody else's, and so is the group itself.
    Other,
}

impl Origin {
    /// The processes of a container in its group.
    pub(crate) fn processes(self, group: &Cgroup) -> Vec<Pid> {
        match self {
            Self::Container => group.processes_below(),
            Self::Other => group.processes(),
        }
    }

    /// Ends them.
    pub(crate) fn kill(self, group: &Cgroup) -> Result<(), Error> {
        if self == Self::Container {
            return Ok(group.kill()?);
        }
        for pidfd in group.processes().into_iter().filter_map(|pid| process::pidfd_open(pid).ok()) {
            match process::send_signal(pidfd.as_fd(), 9) {
                Err(error) if error.errno == Errno::SRCH => {}
                other => other?,
            }
        }
        Ok(())
    }
}

/// Makes the control group of `spec` with its limits. None for a user who may not make one and has said so.
pub(crate) fn make(context: &Context, id: &str, spec: &oci::Spec) -> Result<Option<Group>, Error> {
    if context.systemd {
        return systemd::make(context, id, spec).map(Some);
    }
    let path = spec.linux.as_ref().map(|linux| linux.cgroups_path.as_str()).unwrap_or_default();
    let cgroup = place(id, path)?;
    let origin = if cgroup.exists() { Origin::Other } else { Origin::Container };
    if origin == Origin::Other {
        check_unused(&cgroup)?;
    }
    match fill(&cgroup, spec, context) {
        Ok(()) => Ok(Some(Group { cgroup, origin, unit: None, holder: None })),
        Err(Error::System(error)) if context.rootless && is_forbidden(error.errno) => Ok(None),
        Err(error) => {
            if origin == Origin::Container {
                let _ = cgroup.delete(); // The first error says more.
            }
            Err(error)
        }
    }
}

fn is_forbidden(errno: Errno) -> bool {
    matches!(errno, Errno::ACCESS | Errno::PERM | Errno::ROFS)
}

/// An absolute path begins where the hierarchies do; one that is not, and that of a container without one, beside the group
/// that this process is in (version 2, where groups with processes have no others below them) or below it.
fn place(id: &str, path: &str) -> Result<Cgroup, Error> {
    let whole = || Hierarchy::whole(Path::new(MOUNT));
    let inner = if path.is_empty() { PathBuf::from(id) } else { clean(path) };
    if path.starts_with('/') {
        return Ok(whole()?.group(inner));
    }
    let here = Hierarchy::detect()?;
    if !here.is_unified() {
        return Ok(here.group(inner));
    }
    let own = std::fs::read_to_string("/proc/self/cgroup").map_err(Error::file("read", "/proc/self/cgroup"))?;
    let own = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    Ok(whole()?.group(Path::new(own).parent().unwrap_or(Path::new("/")).join(inner)))
}

/// A path without `.` and `..`, which lead nowhere above its beginning.
pub(crate) fn clean(path: &str) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            _ => {}
        }
    }
    clean
}

fn fill(cgroup: &Cgroup, spec: &oci::Spec, context: &Context) -> Result<(), Error> {
    let resources = spec.linux.as_ref().and_then(|linux| linux.resources.clone()).unwrap_or_default();
    let (limits, rules) = (executor::limits(&resources)?, executor::device_rules(&resources)?);
    let is_unified = Hierarchy::whole(Path::new(MOUNT))?.is_unified();
    if let Some(name) = resources.unified.keys().next().filter(|_| !is_unified) {
        return Err(Error::Invalid(format!("linux.resources.unified: {name} needs control groups of version 2")));
    }
    cgroup.create()?;
    cgroup.set(&limits)?;
    allow_devices(cgroup, &rules, context)
}

/// Whether each file of version 2 is one of the group's own, and each size one or no limit.
pub(crate) fn check_resources(resources: Option<&oci::Resources>) -> Result<(), Error> {
    let Some(resources) = resources else { return Ok(()) };
    let is_elsewhere = |name: &&String| name.is_empty() || name.contains('/') || name.starts_with('.');
    if let Some(name) = resources.unified.keys().find(is_elsewhere) {
        return Err(Error::Invalid(format!("linux.resources.unified: {name:?} is no name of a control group's file")));
    }
    let memory = resources.memory.clone().unwrap_or_default();
    let sizes = [("limit", memory.limit), ("reservation", memory.reservation), ("swap", memory.swap)];
    match sizes.into_iter().find_map(|(name, size)| size.filter(|size| *size < -1).map(|size| (name, size))) {
        Some((name, size)) => {
            Err(Error::Invalid(format!("linux.resources.memory.{name}: {size} is no size; -1 is no limit")))
        }
        None => Ok(()),
    }
}

/// Allows the devices of `rules` and no others.
pub(crate) fn allow_devices(cgroup: &Cgroup, rules: &[DeviceRule], context: &Context) -> Result<(), Error> {
    match cgroup.allow_devices(rules) {
        // Who has no devices of his own to give away has none to forbid, either.
        Err(error) if context.rootless && is_forbidden(error.errno) => Ok(()),
        other => Ok(other?),
    }
}

/// Processes of somebody else, now or later, would be limited, and killed, with the container's: a group with others below it
/// is one of a system.
fn check_unused(cgroup: &Cgroup) -> Result<(), Error> {
    if cgroup.is_frozen() {
        return Err(Error::State("container's cgroup unexpectedly frozen".to_owned()));
    }
    match cgroup.processes_below().len() {
        0 if cgroup.directories().iter().any(|dir| has_groups(dir)) => {
            Err(Error::State("container's cgroup is not empty: there are groups below it".to_owned()))
        }
        0 => Ok(()),
        count => Err(Error::State(format!("container's cgroup is not empty: {count} process(es) found"))),
    }
}

fn has_groups(dir: &Path) -> bool {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.into_iter().any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
}

/// Without a cgroup namespace of its own a container sees its group, not all, at the place of a mount of type `cgroup`: its
/// directories are mounted there, and a link stands for each controller that shares one.
pub(crate) fn show_own_group(spec: &mut oci::Spec, cgroup: Option<&Cgroup>) {
    let Some(linux) = &spec.linux else { return };
    if linux.namespaces.iter().any(|one| one.kind == oci::NamespaceKind::Cgroup) {
        return;
    }
    let places = cgroup.map(Cgroup::places).unwrap_or_default();
    spec.mounts = std::mem::take(&mut spec.mounts)
        .into_iter()
        .flat_map(|mount| if mount.kind == "cgroup" { binds(&mount, &places) } else { vec![mount] })
        .collect();
}

fn binds(mount: &oci::Mount, places: &[(String, PathBuf)]) -> Vec<oci::Mount> {
    let bind = |source: &Path, destination: String| oci::Mount {
        destination,
        kind: "bind".to_owned(),
        source: source.display().to_string(),
        options: ["bind".to_owned()].into_iter().chain(mount.options.iter().cloned()).collect(),
        ..oci::Mount::default()
    };
    match places {
        // Nothing to show; what the image has there stays.
        [] => Vec::new(),
        [(controllers, dir)] if controllers.is_empty() => vec![bind(dir, mount.destination.clone())],
        _ => {
            let options = mount.options.iter().filter(|option| *option != "ro").cloned();
            let cover = oci::Mount {
                destination: mount.destination.clone(),
                kind: "tmpfs".to_owned(),
                source: "tmpfs".to_owned(),
                // The mount points have to be made in it.
                options: options.chain(["mode=755".to_owned()]).collect(),
                ..oci::Mount::default()
            };
            let names = places.iter().map(|(controllers, dir)| {
                let name = controllers.strip_prefix("name=").unwrap_or(controllers);
                let name = if name.is_empty() { "unified" } else { name };
                bind(dir, format!("{}/{name}", mount.destination))
            });
            std::iter::once(cover).chain(names).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_do_not_lead_above_their_beginning() {
        for (path, expect) in
            [("/a/b", "a/b"), ("../../a", "a"), ("/a/../../../b/./c", "b/c"), ("a//b/", "a/b"), ("/..", "")]
        {
            assert_eq!(clean(path), Path::new(expect), "{path}");
        }
    }

    #[test]
    fn a_container_without_a_namespace_sees_its_own_group() {
        let mount = oci::Mount {
            destination: "/sys/fs/cgroup".into(),
            kind: "cgroup".into(),
            options: vec!["ro".into(), "nosuid".into()],
            ..oci::Mount::default()
        };
        let mut spec = oci::Spec { mounts: vec![mount], linux: Some(oci::Linux::default()), ..oci::Spec::default() };
        let unified = Cgroup::at(vec![(String::new(), "/sys/fs/cgroup/x".into())]);
        let mut other = spec.clone();
        show_own_group(&mut spec, Some(&unified));
        assert_eq!(spec.mounts.len(), 1);
        assert_eq!((spec.mounts[0].kind.as_str(), spec.mounts[0].source.as_str()), ("bind", "/sys/fs/cgroup/x"));
        let v1 = Cgroup::at(vec![("cpu,cpuacct".into(), "/c/x".into()), ("name=systemd".into(), "/s/x".into())]);
        show_own_group(&mut other, Some(&v1));
        let targets: Vec<&str> = other.mounts.iter().map(|mount| mount.destination.as_str()).collect();
        assert_eq!(targets, ["/sys/fs/cgroup", "/sys/fs/cgroup/cpu,cpuacct", "/sys/fs/cgroup/systemd"]);
        assert!(!other.mounts[0].options.contains(&"ro".to_owned()));
        assert_eq!(other.mounts[1].options, ["bind", "ro", "nosuid"]);
    }
}
