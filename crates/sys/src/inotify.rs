//! inotify(7): which entries of watched directories changed.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;

use crate::error::{Context, Result};

/// An inotify instance, non-blocking: wait for readability, then [`Inotify::read`] until it gives nothing.
#[derive(Debug)]
pub struct Inotify {
    fd: OwnedFd,
}

/// Names one watched directory; the kernel gives the same number for the same inode.
pub type WatchId = i32;

/// One change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The entry `name` of the directory was made, written and closed, renamed from or to, or removed.
    Entry {
        /// The directory.
        watch: WatchId,
        /// The entry's name.
        name: std::ffi::OsString,
    },
    /// The directory itself was removed, renamed or unmounted, or its watch is gone.
    Directory {
        /// The directory.
        watch: WatchId,
    },
    /// The kernel's queue overflowed: anything may have changed.
    Overflow,
}

impl Inotify {
    /// A new instance, close-on-exec. The kernel limits them by `fs.inotify.max_user_instances` (EMFILE).
    pub fn new() -> Result<Self> {
        let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK).during("inotify_init1", "")?;
        Ok(Inotify { fd })
    }

    /// Watches a directory; follows symlinks. Limited by `fs.inotify.max_user_watches` (ENOSPC).
    pub fn add(&self, directory: &Path) -> Result<WatchId> {
        // CLOSE_WRITE, not MODIFY: a file that is still open for writing is not complete.
        let flags = WatchFlags::CLOSE_WRITE
            | WatchFlags::CREATE
            | WatchFlags::DELETE
            | WatchFlags::MOVED_FROM
            | WatchFlags::MOVED_TO
            | WatchFlags::ATTRIB
            | WatchFlags::DELETE_SELF
            | WatchFlags::MOVE_SELF
            | WatchFlags::ONLYDIR;
        inotify::add_watch(&self.fd, directory, flags).during("inotify_add_watch", directory.display())
    }

    /// Watches a directory for whatever is written in it, also to files that stay open, and for new names; follows symlinks.
    /// Limited as [`Inotify::add`].
    pub fn add_written(&self, directory: &Path) -> Result<WatchId> {
        let flags = WatchFlags::MODIFY
            | WatchFlags::CREATE
            | WatchFlags::MOVED_TO
            | WatchFlags::DELETE_SELF
            | WatchFlags::ONLYDIR;
        inotify::add_watch(&self.fd, directory, flags).during("inotify_add_watch", directory.display())
    }

    /// Ends a watch. One that the kernel has dropped already is no error.
    pub fn remove(&self, watch: WatchId) -> Result<()> {
        match inotify::remove_watch(&self.fd, watch) {
            Ok(()) | Err(Errno::INVAL) => Ok(()),
            Err(errno) => Err(errno).during("inotify_rm_watch", watch),
        }
    }

    /// The changes that wait now; empty when none does.
    pub fn read(&self) -> Result<Vec<Change>> {
        let mut all = Vec::new();
        loop {
            let some = self.read_some()?;
            if some.is_empty() {
                return Ok(all);
            }
            all.extend(some);
        }
    }

    /// Changes that wait now, as many as fit into a buffer; empty when none does. Where somebody writes all the time it comes
    /// to an end, unlike [`Inotify::read`].
    pub fn read_some(&self) -> Result<Vec<Change>> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.fd, &mut buffer);
        let mut changes = Vec::new();
        loop {
            match reader.next() {
                Ok(event) => changes.push(change(&event)),
                Err(Errno::AGAIN) => return Ok(changes),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno).during("read", "inotify"),
            }
            if reader.is_buffer_empty() {
                return Ok(changes);
            }
        }
    }
}

fn change(event: &inotify::Event<'_>) -> Change {
    use std::os::unix::ffi::OsStrExt;
    let (watch, flags) = (event.wd(), event.events());
    if flags.contains(ReadFlags::QUEUE_OVERFLOW) {
        return Change::Overflow;
    }
    match event.file_name() {
        Some(name) => Change::Entry { watch, name: std::ffi::OsStr::from_bytes(name.to_bytes()).into() },
        None => Change::Directory { watch },
    }
}

impl AsFd for Inotify {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Inotify {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renames_and_removals_are_seen() {
        let directory = std::env::temp_dir().join(format!("inotify-test-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let inotify = Inotify::new().unwrap();
        let watch = inotify.add(&directory).unwrap();
        assert!(inotify.read().unwrap().is_empty());
        std::fs::write(directory.join(".tmp"), "x").unwrap();
        std::fs::rename(directory.join(".tmp"), directory.join("a")).unwrap();
        let changes = inotify.read().unwrap();
        assert_eq!(changes.last(), Some(&Change::Entry { watch, name: "a".into() }));
        std::fs::remove_dir_all(&directory).unwrap();
        assert!(inotify.read().unwrap().contains(&Change::Directory { watch }));
        inotify.remove(watch).unwrap();
    }
}
