//! What processes have open, and may have open, as `/proc` shows it.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use sys::rustix::process::Pid;

/// How many descriptors are looked at for one container: each costs a call, and a pod can have more than can be looked at between
/// two looks.
const LOOKS_MAX: u64 = 10_000;
/// How long that may take: the kernel walks over all places of a process's table, of which there may be a million for one descriptor.
const TIME_MAX: Duration = Duration::from_secs(1);

/// How many of each.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Open {
    /// Descriptors of any kind.
    pub(super) files: u64,
    /// Those of sockets.
    pub(super) sockets: u64,
}

impl Open {
    /// Counts what `processes` have open; nothing if that is too much to look at. One that has ended meanwhile has nothing.
    pub(super) fn of(processes: &[Pid], proc: &Path) -> Option<Self> {
        Self::within(processes, proc, LOOKS_MAX, TIME_MAX)
    }

    fn within(processes: &[Pid], proc: &Path, looks_max: u64, time_max: Duration) -> Option<Self> {
        let begun = Instant::now();
        let mut open = Self::default();
        for process in processes {
            if begun.elapsed() >= time_max {
                return None;
            }
            let descriptors = proc.join(process.as_raw_nonzero().to_string()).join("fd");
            for descriptor in fs::read_dir(descriptors).into_iter().flatten().flatten() {
                if open.files == looks_max {
                    return None;
                }
                open.files += 1;
                let is_socket = |target: &Path| target.as_os_str().as_encoded_bytes().starts_with(b"socket:");
                open.sockets += u64::from(fs::read_link(descriptor.path()).is_ok_and(|target| is_socket(&target)));
            }
        }
        Some(open)
    }
}

/// How many files the oldest of `processes` may have open (`RLIMIT_NOFILE`, soft).
pub(super) fn files_max(processes: &[Pid], proc: &Path) -> Option<u64> {
    let first = processes.iter().map(|process| process.as_raw_nonzero()).min()?.to_string();
    let limits = fs::read_to_string(proc.join(first).join("limits")).ok()?;
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    limit.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn the_first_process_tells_the_limit() {
        let proc = tempfile::tempdir().unwrap();
        let header = "Limit                     Soft Limit           Hard Limit           Units     \n";
        for (process, soft) in [(9, "5"), (7, "1024")] {
            let directory = proc.path().join(process.to_string());
            fs::create_dir(&directory).unwrap();
            let line = format!("Max open files            {soft:<20} 4096                 files     \n");
            fs::write(directory.join("limits"), format!("{header}{line}")).unwrap();
        }
        let processes = [9, 7].map(|number| Pid::from_raw(number).unwrap());
        assert_eq!(files_max(&processes, proc.path()), Some(1024));
        assert_eq!(files_max(&processes[..1], proc.path()), Some(5));
        assert_eq!(files_max(&[], proc.path()), None);
    }

    #[test]
    fn descriptors_of_all_processes_are_counted() {
        let proc = tempfile::tempdir().unwrap();
        for (process, number, target) in
            [(7, 0, "/dev/null"), (7, 1, "socket:[1]"), (8, 0, "socket:[1]"), (8, 3, "/socket:")]
        {
            let directory = proc.path().join(format!("{process}/fd"));
            fs::create_dir_all(&directory).unwrap();
            symlink(target, directory.join(number.to_string())).unwrap();
        }
        let processes = [7, 8, 9].map(|number| Pid::from_raw(number).unwrap());
        assert_eq!(Open::of(&processes, proc.path()), Some(Open { files: 4, sockets: 2 }));
        assert_eq!(Open::within(&processes, proc.path(), 4, Duration::MAX), Some(Open { files: 4, sockets: 2 }));
        assert_eq!(
            Open::within(&processes, proc.path(), 3, Duration::MAX),
            None,
            "the limit is for all processes together"
        );
        assert_eq!(Open::within(&processes, proc.path(), 4, Duration::ZERO), None, "as is that of time");
    }
}
