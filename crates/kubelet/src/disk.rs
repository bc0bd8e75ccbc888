//! How full a file system is, as statvfs(3) tells. The numbers are those of whoever serves it, so no sum of them is trusted.

use std::path::Path;

use sys::rustix;

/// A file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Disk {
    /// All of it, bytes.
    pub(crate) capacity: u64,
    /// What users can have of it, bytes.
    pub(crate) available: u64,
    /// What is free, also for root alone, bytes.
    pub(crate) free: u64,
    /// Inodes; 0 where it has no number of them.
    pub(crate) inodes: u64,
    /// Inodes that users can have.
    pub(crate) inodes_available: u64,
    /// Free inodes.
    pub(crate) inodes_free: u64,
}

impl Disk {
    /// The one that holds `path`.
    pub(crate) fn of(path: &Path) -> Option<Self> {
        let facts = rustix::fs::statvfs(path).ok()?;
        let bytes = |blocks: u64| blocks.saturating_mul(facts.f_frsize);
        Some(Self {
            capacity: bytes(facts.f_blocks),
            available: bytes(facts.f_bavail),
            free: bytes(facts.f_bfree),
            inodes: facts.f_files,
            inodes_available: facts.f_favail,
            inodes_free: facts.f_ffree,
        })
    }

    /// The one that holds `path`, or that will when it is made.
    pub(crate) fn to_hold(path: &Path) -> Option<Self> {
        Self::of(path.ancestors().find(|path| path.exists())?)
    }

    /// What is used, bytes.
    pub(crate) fn used(self) -> u64 {
        self.capacity.saturating_sub(self.free)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine() {
        let (root, later) = (Disk::of(Path::new("/")).unwrap(), Disk::to_hold(Path::new("/not/there/yet")).unwrap());
        assert!(root.capacity > 0 && root.available <= root.free && root.used() <= root.capacity);
        assert_eq!(root.capacity, later.capacity);
        assert_eq!(Disk::of(Path::new("/not/there/yet")), None);
    }
}
