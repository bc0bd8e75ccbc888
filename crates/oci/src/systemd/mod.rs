//! Control groups that systemd makes: a transient scope for each container, as runc makes them (`--systemd-cgroup`).
//!
//! A scope has a process from its beginning. When it is made there is none of the container's: a holder stands in for it,
//! a process of this program that does nothing, until the container's own has begun in the group.

mod annotations;

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use dbus::Value;
use executor::oci;
use serde::{Deserialize, Serialize};
use sys::cgroup::{Cgroup, Hierarchy, Limits};
use sys::process::{self, Child, Clone};
use sys::rustix::process::Pid;

use crate::cgroups::{self, Group, MOUNT, Origin};
use crate::context::Context;
use crate::error::Error;
pub(crate) use ::systemd::SystemdError;
use ::systemd::{Manager, Property, Whose, property};

/// A unit of systemd.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Unit {
    name: String,
    /// It belongs to the systemd of a user.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    of_user: bool,
}

impl Unit {
    /// Whether processes are put into its group by systemd: a user may not move those that are outside of his systemd's tree, as
    /// those of a login are.
    pub(crate) fn takes_in(&self) -> bool {
        self.of_user
    }

    fn manager(&self) -> Result<Manager, SystemdError> {
        Manager::connect(if self.of_user { Whose::User } else { Whose::System })
    }

    /// Puts a process into its group, or the one `below` it.
    pub(crate) fn attach(&self, below: &Path, pid: Pid) -> Result<(), Error> {
        let pid = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or(0);
        let below = Path::new("/").join(below);
        Ok(self.manager()?.attach(&self.name, &below.to_string_lossy(), pid)?)
    }

    /// Tells it of other limits.
    pub(crate) fn set(&self, limits: &Limits) -> Result<(), Error> {
        let mut manager = self.manager()?;
        let properties = Hierarchy::whole(Path::new(MOUNT))?.unit_properties(limits, manager.version)?;
        Ok(manager.change(&self.name, properties.into_iter().map(property).collect())?)
    }

    /// Ends it, whose processes have ended.
    pub(crate) fn end(&self) -> Result<(), Error> {
        match self.manager() {
            // It has gone with its last process.
            Err(SystemdError::Away(_) | SystemdError::NoSession) => Ok(()),
            other => Ok(other?.end(&self.name)?),
        }
    }
}

/// Where a unit is to be, by `cgroupsPath`: `slice:prefix:name`.
#[derive(Debug, PartialEq, Eq)]
struct Wanted {
    slice: String,
    unit: String,
    name: String,
}

impl Wanted {
    fn of(path: &str, id: &str, whose: Whose) -> Result<Self, Error> {
        let parts: Vec<&str> = if path.is_empty() { vec!["", "runc", id] } else { path.split(':').collect() };
        let [slice, prefix, name] = parts[..] else {
            let text = "expected cgroupsPath to be of format \"slice:prefix:name\" for systemd cgroups";
            return Err(Error::Invalid(format!("{text}, got {path:?} instead")));
        };
        if name.ends_with(".slice") {
            return Err(Error::Invalid(format!("cgroupsPath {path:?}: a container cannot be a slice")));
        }
        let otherwise = match whose {
            Whose::System => "system.slice",
            Whose::User => "user.slice",
        };
        let slice = if slice.is_empty() { otherwise } else { slice };
        Ok(Self { slice: slice.to_owned(), unit: format!("{prefix}-{name}.scope"), name: name.to_owned() })
    }
}

/// Makes the control group of `spec` with its limits.
pub(crate) fn make(context: &Context, id: &str, spec: &oci::Spec) -> Result<Group, Error> {
    let hierarchy = Hierarchy::whole(Path::new(MOUNT))?;
    if context.rootless && !hierarchy.is_unified() {
        let text = "a user's systemd makes no control groups of version 1: use version 2, or no --systemd-cgroup";
        return Err(Error::Invalid(text.to_owned()));
    }
    let whose = if context.rootless { Whose::User } else { Whose::System };
    let path = spec.linux.as_ref().map(|linux| linux.cgroups_path.as_str()).unwrap_or_default();
    let wanted = Wanted::of(path, id, whose)?;
    let resources = spec.linux.as_ref().and_then(|linux| linux.resources.clone()).unwrap_or_default();
    let (limits, rules) = (executor::limits(&resources)?, executor::device_rules(&resources)?);
    let own = annotations::properties(&spec.annotations)?;

    let mut manager = Manager::connect(whose)?;
    let holder = Holder::begin()?;
    let of_limits = hierarchy.unit_properties(&limits, manager.version)?;
    let of_birth = hierarchy.unit_birth_properties(&limits, manager.version);
    let of_devices = hierarchy.unit_devices(&rules, manager.version);
    let resources = of_limits.into_iter().chain(of_birth).chain(of_devices).map(property);
    let properties = birth(&wanted, holder.child.pid).into_iter().chain(own).chain(resources).collect();
    manager.begin(&wanted.unit, properties)?;
    let unit = Unit { name: wanted.unit, of_user: whose == Whose::User };
    match fill(&hierarchy, &unit, &holder, &limits, &rules, context) {
        Ok(cgroup) => Ok(Group { cgroup, origin: Origin::Container, unit: Some(unit), holder: Some(holder) }),
        Err(error) => {
            drop(holder);
            let _ = manager.end(&unit.name); // The first error says more.
            Err(error)
        }
    }
}

/// What every container's unit has.
fn birth(wanted: &Wanted, pid: Pid) -> Vec<Property> {
    let pid = u32::try_from(pid.as_raw_nonzero().get()).unwrap_or(0);
    let mut all = vec![
        ("Description".to_owned(), Value::Text(format!("orlop container {}", wanted.name))),
        ("Slice".to_owned(), wanted.slice.as_str().into()),
        // Groups below it are the container's.
        ("Delegate".to_owned(), Value::Bool(true)),
        ("PIDs".to_owned(), Value::Array("u".to_owned(), vec![Value::U32(pid)])),
    ];
    all.extend(::systemd::of_group());
    all
}

/// Finds the group that the holder has been put in, and gives it what systemd does not know.
fn fill(
    hierarchy: &Hierarchy,
    unit: &Unit,
    holder: &Holder,
    limits: &Limits,
    rules: &[sys::cgroup::DeviceRule],
    context: &Context,
) -> Result<Cgroup, Error> {
    let cgroup = hierarchy.managed_group_of(holder.child.pid)?;
    if cgroup.path().file_name() != Some(unit.name.as_ref()) {
        let (name, place) = (&unit.name, cgroup.path().display());
        return Err(Error::State(format!("systemd: unit {name} has its processes in the control group /{place}")));
    }
    cgroup.complete()?;
    cgroup.set(limits)?;
    cgroups::allow_devices(&cgroup, rules, context)?;
    Ok(cgroup)
}

/// A process that does nothing until it is dropped.
#[derive(Debug)]
pub(crate) struct Holder {
    child: Child,
    /// It ends with this, and so with whoever holds it.
    life: Option<OwnedFd>,
}

impl Holder {
    fn begin() -> Result<Self, Error> {
        let (its, life) = sys::rustix::pipe::pipe_with(sys::rustix::pipe::PipeFlags::CLOEXEC)
            .map_err(|errno| Error::file("make", "a pipe")(errno.into()))?;
        let how = Clone { keep: Some(&[its.as_fd()]), ..Clone::default() };
        let child = process::spawn(&how, || {
            // Nothing ever comes.
            let _ = sys::rustix::io::read(&its, &mut [0]);
            0
        })?;
        Ok(Self { child, life: Some(life) })
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.life.take();
        let _ = process::reap(self.child.pidfd.as_fd()); // It may have been killed with the group.
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_names_slice_and_unit() {
        let of = |path: &str, whose| Wanted::of(path, "id", whose).map(|wanted| (wanted.slice, wanted.unit));
        let pair = |slice: &str, unit: &str| (slice.to_owned(), unit.to_owned());
        assert_eq!(of("machine.slice:libpod:1a", Whose::System).unwrap(), pair("machine.slice", "libpod-1a.scope"));
        assert_eq!(of("", Whose::System).unwrap(), pair("system.slice", "runc-id.scope"));
        assert_eq!(of(":p:n", Whose::User).unwrap(), pair("user.slice", "p-n.scope"));
        for wrong in ["/a/b", "a:b", "a:b:c:d", "a.slice:b:c.slice"] {
            assert!(of(wrong, Whose::System).is_err(), "{wrong}");
        }
    }
}
