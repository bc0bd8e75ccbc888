//! That processes of a group were killed for want of memory, as it happens.

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::{Keyed, v1::root_of, write};
use crate::error::{Context as _, Error, Result};

/// Longer than the kernel takes to tell that a group has gone whose files have: a grace period of RCU and a work queue.
const END_OF_GROUP: Timespec = Timespec { tv_sec: 1, tv_nsec: 0 };

/// Tells of want of memory in a group.
#[derive(Debug)]
pub struct OomWatch {
    way: Way,
}

#[derive(Debug)]
enum Way {
    /// The kernel counts up the descriptor, also when the group goes: then the file by which it was asked to is not there.
    Counter { counter: OwnedFd, control: PathBuf },
    /// The file changes, and says how many were killed.
    Events { file: File, path: PathBuf, kills: u64 },
}

impl OomWatch {
    /// A group of version 1 (kernel document admin-guide/cgroup-v1/memory, "OOM Control").
    pub(super) fn v1(roots: &[(String, PathBuf)], path: &Path) -> Result<Self> {
        let missing = || Error { call: "find", subject: "controller memory".to_owned(), errno: Errno::NOENT };
        let dir = root_of(roots, "memory").ok_or_else(missing)?.join(path);
        let (name, control) = (dir.join("memory.oom_control"), dir.join("cgroup.event_control"));
        let counter = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).during("eventfd", "")?;
        let file = File::open(&name).during("open", name.display())?;
        write(&control, &format!("{} {}", counter.as_raw_fd(), file.as_raw_fd()))?;
        Ok(Self { way: Way::Counter { counter, control } })
    }

    /// A group of version 2.
    pub(super) fn v2(dir: &Path) -> Result<Self> {
        let path = dir.join("memory.events");
        let mut file = File::open(&path).during("open", path.display())?;
        let kills = read_kills(&mut file, &path)?;
        Ok(Self { way: Way::Events { file, path, kills } })
    }

    /// For `poll`: ready when [`Self::take`] may have something to tell.
    pub fn ready(&self) -> PollFd<'_> {
        match &self.way {
            Way::Counter { counter, .. } => PollFd::new(counter, PollFlags::IN),
            Way::Events { file, .. } => PollFd::new(file, PollFlags::PRI),
        }
    }

    /// Whether it has run out of memory since this was asked last.
    ///
    /// # Errors
    /// `ENODEV` when the group is gone.
    pub fn take(&mut self) -> Result<bool> {
        match &mut self.way {
            Way::Counter { counter, control } => take_counted(counter, control),
            Way::Events { file, path, kills } => {
                let now = read_kills(file, path)?;
                Ok(std::mem::replace(kills, now) < now)
            }
        }
    }
}

fn take_counted(counter: &OwnedFd, control: &Path) -> Result<bool> {
    let mut count = [0; 8];
    match rustix::io::read(counter, &mut count) {
        Err(Errno::AGAIN) => return Ok(false),
        other => other.during("read", "eventfd")?,
    };
    if control.exists() || u64::from_ne_bytes(count) > 1 {
        return Ok(true);
    }
    // It may be the end of the group that was counted. That comes some time after the group's files have gone: if it comes
    // now, it was not.
    match poll(&mut [PollFd::new(counter, PollFlags::IN)], Some(&END_OF_GROUP)) {
        Ok(1..) => Ok(true),
        _ => Err(Errno::NODEV).during("read", control.display()),
    }
}

/// Reading it lets `poll` wait for the next change.
fn read_kills(file: &mut File, path: &Path) -> Result<u64> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_string(&mut text)).during("read", path.display())?;
    Ok(Keyed(text).get("oom_kill").unwrap_or(0))
}
