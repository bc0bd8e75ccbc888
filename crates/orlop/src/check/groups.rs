//! Control groups: which version, which controllers, and whether they may be written.

use std::path::{Path, PathBuf};

use rustix::fs::Access;
use sys::cgroup::Hierarchy;

use super::Finding;

const WHAT: &str = "control groups";

/// What a node limits pods by, by the names of version 2.
const CONTROLLERS: &[&str] = &["cpu", "cpuset", "memory", "pids"];

/// What stands in a controller's stead on version 1 and is part of version 2 itself: without it containers could open
/// every device, and not be stopped as a whole.
const ONLY_VERSION_1: &[&str] = &["devices", "freezer"];

/// What was seen.
struct Facts {
    unified: bool,
    absent: Vec<&'static str>,
    /// Directories in which no groups can be made.
    read_only: Vec<PathBuf>,
}

pub(super) fn findings() -> Vec<Finding> {
    let hierarchy = match Hierarchy::detect() {
        Ok(hierarchy) => hierarchy,
        Err(error) => {
            let remedy = "mount them at /sys/fs/cgroup (`mount -t cgroup2 cgroup /sys/fs/cgroup`)";
            return vec![Finding::missing(WHAT, error.to_string(), remedy)];
        }
    };
    let unified = hierarchy.is_unified();
    let wanted = CONTROLLERS.iter().chain(if unified { &[] } else { ONLY_VERSION_1 });
    let mut absent: Vec<&str> = wanted.copied().filter(|name| !hierarchy.has_controller(name)).collect();
    absent.sort_unstable();
    let writable = |dir: &PathBuf| rustix::fs::access(dir, Access::WRITE_OK).is_ok();
    let read_only = hierarchy.directories(Path::new("")).into_iter().filter(|dir| !writable(dir)).collect();
    judge(&Facts { unified, absent, read_only })
}

fn judge(facts: &Facts) -> Vec<Finding> {
    let version = if facts.unified { "version 2" } else { "version 1" };
    let mut findings = vec![if !facts.absent.is_empty() {
        Finding::missing(
            WHAT,
            format!("{version}, without {}", facts.absent.join(", ")),
            "boot a kernel that has these controllers, and without cgroup_disable= for them",
        )
    } else if let Some(dir) = facts.read_only.first() {
        Finding::missing(
            WHAT,
            format!("{} cannot be written", dir.display()),
            "run as root, with /sys/fs/cgroup mounted for reading and writing (`mount -o remount,rw /sys/fs/cgroup`)",
        )
    } else {
        Finding::ok(WHAT, version)
    }];
    if !facts.unified {
        findings.push(Finding::limited(
            "control groups' version",
            "version 1",
            "boot with systemd.unified_cgroup_hierarchy=1 for memory.high, pressure figures and group OOM kills",
        ));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict::{self, Limited, Missing, Ok};

    fn check(unified: bool, absent: &[&'static str], read_only: &[&str], expect: &[Verdict]) {
        let facts =
            Facts { unified, absent: absent.to_vec(), read_only: read_only.iter().map(PathBuf::from).collect() };
        let verdicts: Vec<Verdict> = judge(&facts).iter().map(|finding| finding.verdict).collect();
        assert_eq!(verdicts, expect, "{absent:?} {read_only:?}");
    }

    #[test]
    fn controllers_have_to_be_there_and_writable() {
        check(true, &[], &[], &[Ok]);
        check(true, &["memory"], &[], &[Missing]);
        check(true, &[], &["/sys/fs/cgroup"], &[Missing]);
        check(false, &[], &[], &[Ok, Limited]);
        check(false, &["devices"], &[], &[Missing, Limited]);
    }
}
