//! A container as the kernel and its record show it.

use std::fs;
use std::os::fd::OwnedFd;

use executor::oci::{self, NamespaceKind};
use sys::cgroup::Cgroup;
use sys::process;
use sys::rustix::process::Pid;

use crate::cgroups::Origin;
use crate::context::Context;
use crate::error::Error;
use crate::record::{Place, Record};

/// A container that `create` has made.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) place: Place,
    pub(crate) record: Record,
}

/// What a container does, in the words of the specification ("State" in runtime.md) and runc's `paused`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Status {
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

impl Container {
    pub(crate) fn load(context: &Context, id: &str) -> Result<Self, Error> {
        let place = Place::of(&context.root, id)?;
        let record = place.read()?;
        Ok(Self { place, record })
    }

    pub(crate) fn status(&self) -> Status {
        match self.process() {
            None => Status::Stopped,
            Some(_) if self.group().is_some_and(|group| group.is_frozen()) => Status::Paused,
            Some(_) if self.place.is_waiting() => Status::Created,
            Some(_) => Status::Running,
        }
    }

    /// The first process; nothing when it has ended, whoever may have its id now.
    pub(crate) fn process(&self) -> Option<OwnedFd> {
        let pid = Pid::from_raw(self.record.pid)?;
        // First the descriptor: whose id it was while it could be opened, it is.
        let pidfd = process::pidfd_open(pid).ok()?;
        (started_ticks(self.record.pid)? == self.record.started_ticks).then_some(pidfd)
    }

    pub(crate) fn group(&self) -> Option<Cgroup> {
        (!self.record.cgroup.is_empty()).then(|| Cgroup::at(self.record.cgroup.clone()))
    }

    /// Who made its group.
    pub(crate) fn group_origin(&self) -> Origin {
        if self.record.group_was_there { Origin::Other } else { Origin::Container }
    }

    /// Whether the kernel ends all of its processes with the first one.
    pub(crate) fn has_own_pids(&self) -> bool {
        let namespaces = self.record.spec.linux.iter().flat_map(|linux| &linux.namespaces);
        namespaces.into_iter().any(|one| one.kind == NamespaceKind::Pid && one.path.is_empty())
    }

    /// Its state for hooks, as JSON, but for what differs from stage to stage.
    pub(crate) fn state(&self) -> String {
        state_json(&self.record)
    }

    pub(crate) fn hooks(&self) -> oci::Hooks {
        self.record.spec.hooks.clone().unwrap_or_default()
    }
}

/// State of a container for hooks, without process id and status.
pub(crate) fn state_json(record: &Record) -> String {
    let mut state = serde_json::json!({
        "ociVersion": oci::VERSION,
        "id": record.id,
        "bundle": record.bundle,
    });
    if !record.spec.annotations.is_empty() {
        state["annotations"] = serde_json::json!(record.spec.annotations);
    }
    state.to_string()
}

/// When a process began; nothing for one that has ended, reaped or not.
pub(crate) fn started_ticks(pid: i32) -> Option<u64> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// Fields 3 (state) and 22 (start time) of proc_pid_stat(5). The name, field 2, may hold anything.
fn parse_stat(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start() {
        let stat = "7 (a) S 1 (b) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 9 10";
        assert_eq!(parse_stat(stat), Some(4711));
        assert_eq!(parse_stat(&stat.replace("(b) S", "(b) Z")), None);
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(started_ticks(own).is_some());
    }
}
