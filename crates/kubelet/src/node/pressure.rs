//! What the node is short of: signals as upstream's eviction manager knows them, against their hard thresholds.

use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use sys::rustix;

use super::machine::kilobytes;

/// How long a pressure lasts at least after it was last seen (`evictionPressureTransitionPeriod`).
pub const TRANSITION: Duration = Duration::from_secs(300);

/// What there is and what is left of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Room {
    /// All of it.
    pub capacity: u64,
    /// What is left.
    pub available: u64,
}

/// The signals, measured at one time; what cannot be measured is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Signals {
    /// `memory.available`, bytes.
    pub memory: Option<Room>,
    /// `nodefs.available`, bytes.
    pub node_disk: Option<Room>,
    /// `nodefs.inodesFree`.
    pub node_inodes: Option<Room>,
    /// `imagefs.available`, bytes.
    pub image_disk: Option<Room>,
    /// `imagefs.inodesFree`.
    pub image_inodes: Option<Room>,
    /// `pid.available`.
    pub pids: Option<Room>,
}

impl Signals {
    /// Measures, with the kubelet's files below `root` and images below `images`.
    pub fn measure(root: &Path, images: &Path) -> Self {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let (node, image) = (disk(root), disk(images));
        Self {
            memory: Self::memory(),
            node_disk: node.map(|(disk, _)| disk),
            node_inodes: node.and_then(|(_, inodes)| inodes),
            image_disk: image.map(|(disk, _)| disk),
            image_inodes: image.and_then(|(_, inodes)| inodes),
            pids: pids(&text("/proc/loadavg"), &text("/proc/sys/kernel/pid_max")),
        }
    }
}

impl Signals {
    /// `memory.available` alone.
    pub fn memory() -> Option<Room> {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let bytes = |name: &str| kilobytes(&meminfo, name) * 1024;
        let (capacity, available) = (bytes("MemTotal"), bytes("MemAvailable"));
        (capacity > 0).then_some(Room { capacity, available })
    }
}

/// Bytes and inodes of a file system; some have no number of inodes.
fn disk(path: &Path) -> Option<(Room, Option<Room>)> {
    let there: PathBuf = path.ancestors().find(|path| path.exists())?.to_owned();
    let facts = rustix::fs::statvfs(&there).ok()?;
    let bytes = Room { capacity: facts.f_blocks * facts.f_frsize, available: facts.f_bavail * facts.f_frsize };
    let inodes = (facts.f_files > 0).then_some(Room { capacity: facts.f_files, available: facts.f_favail });
    Some((bytes, inodes))
}

/// Of the fourth field of proc_loadavg(5), `running/all`, and the highest process id.
fn pids(loadavg: &str, max: &str) -> Option<Room> {
    let all: u64 = loadavg.split_whitespace().nth(3)?.split_once('/')?.1.parse().ok()?;
    let capacity: u64 = max.trim().parse().ok()?;
    Some(Room { capacity, available: capacity.saturating_sub(all) })
}

/// The least that has to be left of something.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Threshold {
    /// So many.
    Amount(u64),
    /// A share of the capacity, 0 to 1.
    Share(f64),
}

impl Threshold {
    /// As many as that is of `capacity`.
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share")]
    pub fn of(self, capacity: u64) -> u64 {
        match self {
            Self::Amount(amount) => amount,
            Self::Share(share) => (capacity as f64 * share) as u64,
        }
    }

    fn is_crossed(self, room: Option<Room>) -> bool {
        room.is_some_and(|room| room.available < self.of(room.capacity))
    }
}

/// Hard thresholds (`evictionHard`); none is never crossed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Thresholds {
    /// `memory.available`
    pub memory: Option<Threshold>,
    /// `nodefs.available`
    pub node_disk: Option<Threshold>,
    /// `nodefs.inodesFree`
    pub node_inodes: Option<Threshold>,
    /// `imagefs.available`
    pub image_disk: Option<Threshold>,
    /// `imagefs.inodesFree`
    pub image_inodes: Option<Threshold>,
    /// `pid.available`
    pub pids: Option<Threshold>,
}

impl Thresholds {
    /// Nothing is kept free.
    pub const NONE: Self =
        Self { memory: None, node_disk: None, node_inodes: None, image_disk: None, image_inodes: None, pids: None };
}

impl Default for Thresholds {
    /// Upstream's defaults.
    fn default() -> Self {
        Self {
            memory: Some(Threshold::Amount(100 << 20)),
            node_disk: Some(Threshold::Share(0.10)),
            node_inodes: Some(Threshold::Share(0.05)),
            image_disk: Some(Threshold::Share(0.15)),
            image_inodes: Some(Threshold::Share(0.05)),
            pids: None,
        }
    }
}

/// What the node was seen to be short of, and when last.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressures {
    memory: Option<Timestamp>,
    disk: Option<Timestamp>,
    pids: Option<Timestamp>,
}

impl Pressures {
    /// After `signals` were measured at `now`.
    #[must_use]
    pub fn after(self, signals: &Signals, thresholds: &Thresholds, now: Timestamp) -> Self {
        let crossed =
            |threshold: Option<Threshold>, room| threshold.is_some_and(|threshold| threshold.is_crossed(room));
        let disk = crossed(thresholds.node_disk, signals.node_disk)
            || crossed(thresholds.node_inodes, signals.node_inodes)
            || crossed(thresholds.image_disk, signals.image_disk)
            || crossed(thresholds.image_inodes, signals.image_inodes);
        let seen = |now_crossed: bool, before: Option<Timestamp>| if now_crossed { Some(now) } else { before };
        Self {
            memory: seen(crossed(thresholds.memory, signals.memory), self.memory),
            disk: seen(disk, self.disk),
            pids: seen(crossed(thresholds.pids, signals.pids), self.pids),
        }
    }

    /// Whether memory is short, or was within the transition period.
    pub fn memory(self, now: Timestamp) -> bool {
        lasts(self.memory, now)
    }

    /// Whether a disk is short.
    pub fn disk(self, now: Timestamp) -> bool {
        lasts(self.disk, now)
    }

    /// Whether process ids are short.
    pub fn pids(self, now: Timestamp) -> bool {
        lasts(self.pids, now)
    }
}

fn lasts(seen: Option<Timestamp>, now: Timestamp) -> bool {
    seen.is_some_and(|seen| now.duration_since(seen).unsigned_abs() < TRANSITION)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn this_machine() {
        let signals = Signals::measure(Path::new("/var/lib/not/there"), Path::new("/"));
        let memory = signals.memory.unwrap();
        assert!(memory.available > 0 && memory.available <= memory.capacity);
        assert!(signals.node_disk.unwrap().capacity > 0 && signals.pids.unwrap().available > 0);
    }

    #[test]
    fn a_pressure_lasts_for_the_transition_period() {
        let short = Signals { memory: Some(Room { capacity: 1 << 30, available: 99 << 20 }), ..Signals::default() };
        let enough = Signals { memory: Some(Room { capacity: 1 << 30, available: 101 << 20 }), ..Signals::default() };
        let thresholds = Thresholds::default();
        let pressures = Pressures::default().after(&enough, &thresholds, at(0));
        assert!(!pressures.memory(at(0)));
        let pressures = pressures.after(&short, &thresholds, at(10));
        assert!(pressures.memory(at(10)) && !pressures.disk(at(10)) && !pressures.pids(at(10)));
        let pressures = pressures.after(&enough, &thresholds, at(20));
        assert!(pressures.memory(at(309)) && !pressures.memory(at(310)));
    }

    #[test]
    fn any_disk_makes_disk_pressure() {
        let room = |available| Some(Room { capacity: 100, available });
        for signals in [
            Signals { node_disk: room(9), ..Signals::default() },
            Signals { node_inodes: room(4), ..Signals::default() },
            Signals { image_disk: room(14), ..Signals::default() },
            Signals { image_inodes: room(4), ..Signals::default() },
        ] {
            assert!(Pressures::default().after(&signals, &Thresholds::default(), at(1)).disk(at(1)), "{signals:?}");
        }
        let signals = Signals { node_disk: room(10), image_disk: room(15), ..Signals::default() };
        assert!(!Pressures::default().after(&signals, &Thresholds::default(), at(1)).disk(at(1)));
    }

    #[test]
    fn process_ids_are_counted_with_their_threads() {
        assert_eq!(pids("0.1 0.2 0.3 2/345 6789\n", "32768\n"), Some(Room { capacity: 32768, available: 32423 }));
        assert_eq!(pids("", "32768"), None);
    }
}
