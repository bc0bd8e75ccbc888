//! Which of a node's files share a disk: what is removed from one gives nothing back to another.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::pressure::{Resource, Signal, Threshold, Thresholds};

/// Where a node keeps what.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    /// The kubelet's own files, volumes and logs: `nodefs`.
    pub node: PathBuf,
    /// Images: `imagefs`. Empty where the runtime does not tell.
    pub images: PathBuf,
    /// What containers write into their root file systems: `containerfs`.
    pub containers: PathBuf,
}

/// What is on a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Files {
    /// Logs and volumes.
    Node,
    /// Images.
    Images,
    /// What containers write into their root file systems.
    Written,
}

/// Which of them are on one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disks {
    node: Option<u64>,
    images: Option<u64>,
    written: Option<u64>,
}

impl Places {
    /// The disks as they are mounted now. What is not there yet counts as its parent.
    pub fn disks(&self) -> Disks {
        let device = |path: &Path| {
            let existing = path.ancestors().find(|path| path.exists())?;
            Some(std::fs::metadata(existing).ok()?.dev())
        };
        Disks { node: device(&self.node), images: device(&self.images), written: device(&self.containers) }
    }
}

impl Disks {
    /// Everything on one.
    pub const ONE: Self = Self { node: None, images: None, written: None };

    fn of(self, files: Files) -> Option<u64> {
        match files {
            Files::Node => self.node,
            Files::Images => self.images,
            Files::Written => self.written,
        }
    }

    /// Whether these are on one disk.
    pub fn share(self, one: Files, other: Files) -> bool {
        self.of(one) == self.of(other)
    }

    /// Whether these files are on the disk that a signal is about. None are for memory and process ids.
    pub fn hold(self, signal: Signal, files: Files) -> bool {
        let about = match signal {
            Signal::NodeDisk | Signal::NodeInodes => Files::Node,
            Signal::ImageDisk | Signal::ImageInodes => Files::Images,
            Signal::ContainerDisk | Signal::ContainerInodes => Files::Written,
            Signal::Memory | Signal::AllocatableMemory | Signal::Pids => return false,
        };
        self.share(about, files)
    }

    /// The thresholds with those of what containers write, which nobody writes down: they are the disk's that it is on, and
    /// those of the node on a disk of its own.
    pub fn completed(self, thresholds: &Thresholds) -> Thresholds {
        let has_own = !self.share(Files::Written, Files::Node) && !self.share(Files::Written, Files::Images);
        let of_node = thresholds.0.iter().filter(|one| matches!(one.signal, Signal::NodeDisk | Signal::NodeInodes));
        let added = of_node.filter(|_| has_own).map(|one| {
            let is_disk = one.signal.resource() == Resource::Disk;
            Threshold { signal: if is_disk { Signal::ContainerDisk } else { Signal::ContainerInodes }, ..*one }
        });
        Thresholds(thresholds.0.iter().copied().chain(added).collect())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::node::pressure::Level;

    /// Images and containers on one disk, beside the node's.
    pub(crate) const DEDICATED: Disks = Disks { node: Some(1), images: Some(2), written: Some(2) };
    /// Images alone on another disk.
    pub(crate) const SPLIT: Disks = Disks { node: Some(1), images: Some(2), written: Some(1) };

    #[test]
    fn what_shares_a_disk() {
        let places = Places { node: "/not/there".into(), images: "/proc/self".into(), containers: "/x/y".into() };
        let disks = places.disks();
        assert!(disks.share(Files::Node, Files::Written) && !disks.share(Files::Node, Files::Images));
        assert!(!Places { images: PathBuf::new(), ..places }.disks().share(Files::Node, Files::Images), "nobody knows");
    }

    #[test]
    fn a_signal_is_about_what_is_on_its_disk() {
        let on = |disks: Disks, signal| {
            [Files::Node, Files::Images, Files::Written].map(|files| u8::from(disks.hold(signal, files)))
        };
        for signal in [Signal::NodeDisk, Signal::ImageInodes, Signal::ContainerDisk] {
            assert_eq!(on(Disks::ONE, signal), [1, 1, 1]);
        }
        assert_eq!(on(DEDICATED, Signal::NodeInodes), [1, 0, 0]);
        assert_eq!(on(DEDICATED, Signal::ImageDisk), [0, 1, 1]);
        assert_eq!(on(SPLIT, Signal::NodeDisk), [1, 0, 1]);
        assert_eq!((on(SPLIT, Signal::ImageDisk), on(SPLIT, Signal::ContainerInodes)), ([0, 1, 0], [1, 0, 1]));
        assert_eq!(on(Disks::ONE, Signal::Memory), [0, 0, 0]);
    }

    #[test]
    fn a_disk_of_containers_alone_has_the_nodes_thresholds() {
        let hard = |signal| Threshold::hard(signal, Level::Share(0.1));
        let written = Thresholds(vec![hard(Signal::NodeInodes), hard(Signal::ImageDisk)]);
        for disks in [Disks::ONE, DEDICATED, SPLIT] {
            assert_eq!(disks.completed(&written), written);
        }
        let alone = Disks { written: Some(3), ..SPLIT };
        assert_eq!(alone.completed(&written).0[2..], [hard(Signal::ContainerInodes)]);
    }
}
