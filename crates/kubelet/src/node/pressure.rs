//! What the node is short of: signals as upstream's eviction manager knows them, against their thresholds. Pure, but for
//! [`Observations::measure`].
//!
//! ```text
//! not crossed ─► crossed (condition holds) ─► crossed for the grace period (relief is wanted)
//!      ▲                                                    │
//!      └── above threshold + minimum reclaim ◄──────────────┘        the condition outlasts it by the transition period
//! ```

use std::path::Path;
use std::time::Duration;

use sys::cgroup::Cgroup;

use super::disks::Places;
use super::machine::kilobytes;
use crate::disk::Disk;

/// What can run short. In the order in which relief is sought: upstream, too, takes memory first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Signal {
    /// `memory.available`, bytes.
    Memory,
    /// `allocatableMemory.available`, bytes: below the limit of all pods together.
    AllocatableMemory,
    /// `nodefs.available`, bytes.
    NodeDisk,
    /// `nodefs.inodesFree`.
    NodeInodes,
    /// `imagefs.available`, bytes.
    ImageDisk,
    /// `imagefs.inodesFree`.
    ImageInodes,
    /// `containerfs.available`, bytes.
    ContainerDisk,
    /// `containerfs.inodesFree`.
    ContainerInodes,
    /// `pid.available`.
    Pids,
}

impl Signal {
    /// All of them.
    pub const ALL: [Self; 9] = [
        Self::Memory,
        Self::AllocatableMemory,
        Self::NodeDisk,
        Self::NodeInodes,
        Self::ImageDisk,
        Self::ImageInodes,
        Self::ContainerDisk,
        Self::ContainerInodes,
        Self::Pids,
    ];

    /// As the configuration spells it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory.available",
            Self::AllocatableMemory => "allocatableMemory.available",
            Self::NodeDisk => "nodefs.available",
            Self::NodeInodes => "nodefs.inodesFree",
            Self::ImageDisk => "imagefs.available",
            Self::ImageInodes => "imagefs.inodesFree",
            Self::ContainerDisk => "containerfs.available",
            Self::ContainerInodes => "containerfs.inodesFree",
            Self::Pids => "pid.available",
        }
    }

    /// The signal of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|signal| signal.name() == name)
    }

    /// What is short when it is crossed, as messages call it.
    pub const fn resource(self) -> Resource {
        match self {
            Self::Memory | Self::AllocatableMemory => Resource::Memory,
            Self::NodeDisk | Self::ImageDisk | Self::ContainerDisk => Resource::Disk,
            Self::NodeInodes | Self::ImageInodes | Self::ContainerInodes => Resource::Inodes,
            Self::Pids => Resource::Pids,
        }
    }
}

/// What a signal is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    /// Bytes of memory.
    Memory,
    /// Bytes of a disk.
    Disk,
    /// Files of a disk.
    Inodes,
    /// Processes and threads.
    Pids,
}

impl Resource {
    /// Upstream's name for it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::Disk => "ephemeral-storage",
            Self::Inodes => "inodes",
            Self::Pids => "pids",
        }
    }
}

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
pub struct Observations([Option<Room>; Signal::ALL.len()]);

impl Observations {
    /// What is left of that.
    pub fn get(&self, signal: Signal) -> Option<Room> {
        self.0[signal as usize]
    }

    /// Takes in a measurement.
    pub fn set(&mut self, signal: Signal, room: Option<Room>) {
        self.0[signal as usize] = room;
    }

    /// Measures the disks of these places, with all pods in the group `pods`: some thirty system calls, whatever runs.
    pub fn measure(places: &Places, pods: &Cgroup) -> Self {
        let text = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let group = pods.stats();
        let mut all = Self::default();
        all.set(Signal::Memory, memory(&text("/proc/meminfo")));
        let limit = group.memory.limit_bytes;
        let left = limit.map(|limit| limit.saturating_sub(group.memory.working_set_bytes));
        all.set(Signal::AllocatableMemory, limit.zip(left).map(|(capacity, available)| Room { capacity, available }));
        for (place, bytes, inodes) in [
            (&places.node, Signal::NodeDisk, Signal::NodeInodes),
            (&places.images, Signal::ImageDisk, Signal::ImageInodes),
            (&places.containers, Signal::ContainerDisk, Signal::ContainerInodes),
        ] {
            let disk = disk(place);
            all.set(bytes, disk.map(|(bytes, _)| bytes));
            all.set(inodes, disk.and_then(|(_, inodes)| inodes));
        }
        // A limit on all pods together ends their starts as surely as the machine's.
        let machine = pids(&text("/proc/loadavg"), &text("/proc/sys/kernel/pid_max"));
        let own =
            group.pids.limit.map(|capacity| Room { capacity, available: capacity.saturating_sub(group.pids.count) });
        all.set(Signal::Pids, machine.into_iter().chain(own).min_by_key(|room| room.available));
        all
    }
}

fn memory(meminfo: &str) -> Option<Room> {
    let bytes = |name: &str| kilobytes(meminfo, name) * 1024;
    let (capacity, available) = (bytes("MemTotal"), bytes("MemAvailable"));
    (capacity > 0).then_some(Room { capacity, available })
}

/// Bytes and inodes of a file system; some have no number of inodes.
fn disk(path: &Path) -> Option<(Room, Option<Room>)> {
    let disk = Disk::to_hold(path)?;
    let bytes = Room { capacity: disk.capacity, available: disk.available };
    let inodes = (disk.inodes > 0).then_some(Room { capacity: disk.inodes, available: disk.inodes_available });
    Some((bytes, inodes))
}

/// Of the fourth field of proc_loadavg(5), `running/all`, and the highest process id.
fn pids(loadavg: &str, max: &str) -> Option<Room> {
    let all: u64 = loadavg.split_whitespace().nth(3)?.split_once('/')?.1.parse().ok()?;
    let capacity: u64 = max.trim().parse().ok()?;
    Some(Room { capacity, available: capacity.saturating_sub(all) })
}

/// So much of something.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Level {
    /// So many.
    Amount(u64),
    /// A share of the capacity, 0 to 1.
    Share(f64),
}

impl Level {
    /// As many as that is of `capacity`.
    #[expect(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a share")]
    pub fn of(self, capacity: u64) -> u64 {
        match self {
            Self::Amount(amount) => amount,
            Self::Share(share) => (capacity as f64 * share) as u64,
        }
    }
}

/// The least that has to be left of something.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Threshold {
    /// What is looked at.
    pub signal: Signal,
    /// The least.
    pub level: Level,
    /// How long less may be left; zero is a hard threshold.
    pub grace: Duration,
    /// How much more than the least is wanted once something is done about it (`evictionMinimumReclaim`).
    pub reclaim: Option<Level>,
}

impl Threshold {
    /// One without a grace period.
    pub const fn hard(signal: Signal, level: Level) -> Self {
        Self { signal, level, grace: Duration::ZERO, reclaim: None }
    }

    /// Whether pods get no time of their own.
    pub fn is_hard(&self) -> bool {
        self.grace.is_zero()
    }

    /// Whether less is left than the least, and `and` more.
    fn is_crossed(&self, observed: &Observations, and: Option<Level>) -> bool {
        observed.get(self.signal).is_some_and(|room| {
            let more = and.map_or(0, |level| level.of(room.capacity));
            room.available < self.level.of(room.capacity).saturating_add(more)
        })
    }
}

/// All thresholds, hard and soft.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Thresholds(pub Vec<Threshold>);

impl Thresholds {
    /// Nothing is kept free.
    pub const NONE: Self = Self(Vec::new());

    /// Upstream's hard thresholds where the operator says nothing.
    pub fn upstream() -> Self {
        let hard = |signal, level| Threshold::hard(signal, level);
        Self(vec![
            hard(Signal::Memory, Level::Amount(100 << 20)),
            hard(Signal::NodeDisk, Level::Share(0.10)),
            hard(Signal::NodeInodes, Level::Share(0.05)),
            hard(Signal::ImageDisk, Level::Share(0.15)),
            hard(Signal::ImageInodes, Level::Share(0.05)),
        ])
    }

    /// The hard threshold of a signal.
    pub fn hard(&self, signal: Signal) -> Option<Level> {
        self.0.iter().find(|one| one.signal == signal && one.is_hard()).map(|one| one.level)
    }
}

/// What eviction goes by.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Below these, something is done.
    pub thresholds: Thresholds,
    /// How long a condition holds at least after it was last seen (`evictionPressureTransitionPeriod`).
    pub transition: Duration,
    /// The most time that a pod gets at a soft threshold, seconds (`evictionMaxPodGracePeriod`).
    pub pod_grace_max_s: i64,
    /// Whether limits of what pods keep on the node's disks are enforced (`localStorageCapacityIsolation`).
    pub local_storage: bool,
}

impl Policy {
    /// Of a node that keeps nothing free: pods have their own limits only.
    pub const LIMITS: Self =
        Self { thresholds: Thresholds::NONE, transition: Duration::ZERO, pod_grace_max_s: 0, local_storage: true };
}

/// What the node is short of, as its conditions say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressures {
    /// `MemoryPressure`
    pub memory: bool,
    /// `DiskPressure`
    pub disk: bool,
    /// `PIDPressure`
    pub pids: bool,
}

impl Pressures {
    /// The conditions that hold, by name.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let all = [(self.memory, "MemoryPressure"), (self.disk, "DiskPressure"), (self.pids, "PIDPressure")];
        all.into_iter().filter_map(|(holds, name)| holds.then_some(name))
    }
}

/// Thresholds over time. `now` is the time since any beginning, by a clock that nobody sets.
#[derive(Debug, Clone)]
pub struct Watcher {
    thresholds: Vec<Watched>,
    transition: Duration,
    /// When memory, disk and process ids were last seen to be short.
    short: [Option<Duration>; 3],
}

#[derive(Debug, Clone)]
struct Watched {
    threshold: Threshold,
    /// Since when it is crossed, or not yet reached again by the minimum reclaim.
    since: Option<Duration>,
    /// Relief was wanted at the last look.
    wants: bool,
}

impl Watcher {
    /// Nothing has been seen yet.
    pub fn new(policy: &Policy) -> Self {
        let mut thresholds: Vec<Watched> =
            policy.thresholds.0.iter().map(|&threshold| Watched { threshold, since: None, wants: false }).collect();
        thresholds.sort_by_key(|one| (one.threshold.signal as usize, one.threshold.grace));
        Self { thresholds, transition: policy.transition, short: [None; 3] }
    }

    /// Takes in a measurement.
    pub fn look(&mut self, observed: &Observations, now: Duration) {
        for one in &mut self.thresholds {
            let reclaim = one.threshold.reclaim.filter(|_| one.wants);
            one.since = match one.threshold.is_crossed(observed, reclaim) {
                true => one.since.or(Some(now)),
                false => None,
            };
            one.wants = one.since.is_some_and(|since| now.saturating_sub(since) >= one.threshold.grace);
            if one.since.is_some() {
                self.short[condition(one.threshold.signal)] = Some(now);
            }
        }
    }

    /// The threshold that something has to be done about first.
    pub fn wanted(&self) -> Option<Threshold> {
        self.thresholds.iter().find(|one| one.wants).map(|one| one.threshold)
    }

    /// Whether nothing is short any more, counting what is to be reclaimed in one go.
    pub fn is_relieved(&self, observed: &Observations) -> bool {
        self.thresholds.iter().all(|one| !one.threshold.is_crossed(observed, one.threshold.reclaim))
    }

    /// What the node is short of, or was within the transition period.
    pub fn pressures(&self, now: Duration) -> Pressures {
        let lasts = |short: Option<Duration>| short.is_some_and(|seen| now.saturating_sub(seen) < self.transition);
        let [memory, disk, pids] = self.short.map(lasts);
        Pressures { memory, disk, pids }
    }

    /// Whether something that processes take fast comes near to its threshold: less than twice that is left.
    pub fn is_near(&self, observed: &Observations) -> bool {
        let fast = self.thresholds.iter().map(|one| one.threshold);
        let mut fast = fast.filter(|one| matches!(one.signal.resource(), Resource::Memory | Resource::Pids));
        fast.any(|one| one.is_crossed(observed, Some(one.level)))
    }
}

fn condition(signal: Signal) -> usize {
    match signal.resource() {
        Resource::Memory => 0,
        Resource::Disk | Resource::Inodes => 1,
        Resource::Pids => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn observed(signal: Signal, available: u64) -> Observations {
        let mut all = Observations::default();
        all.set(signal, Some(Room { capacity: 1000, available }));
        all
    }

    fn watcher(thresholds: Vec<Threshold>) -> Watcher {
        let thresholds = Thresholds(thresholds);
        Watcher::new(&Policy { thresholds, transition: s(300), pod_grace_max_s: 0, local_storage: true })
    }

    #[test]
    fn this_machine() {
        let group = sys::cgroup::Hierarchy::detect().unwrap().group("");
        let places = Places { node: "/var/lib/not/there".into(), images: "/".into(), containers: "/".into() };
        let all = Observations::measure(&places, &group);
        let memory = all.get(Signal::Memory).unwrap();
        assert!(memory.available > 0 && memory.available <= memory.capacity);
        assert!(all.get(Signal::NodeDisk).unwrap().capacity > 0 && all.get(Signal::Pids).unwrap().available > 0);
    }

    #[test]
    fn names_and_places_are_those_of_the_signals() {
        for (place, signal) in Signal::ALL.into_iter().enumerate() {
            assert_eq!((signal as usize, Signal::named(signal.name())), (place, Some(signal)));
        }
    }

    #[test]
    fn a_hard_threshold_wants_relief_at_once_and_its_condition_lasts() {
        let mut watcher = watcher(vec![Threshold::hard(Signal::Memory, Level::Amount(100))]);
        watcher.look(&observed(Signal::Memory, 100), s(0));
        assert_eq!((watcher.wanted(), watcher.pressures(s(0))), (None, Pressures::default()));
        watcher.look(&observed(Signal::Memory, 99), s(10));
        assert_eq!(watcher.wanted().map(|one| one.signal), Some(Signal::Memory));
        assert_eq!(watcher.pressures(s(10)), Pressures { memory: true, ..Pressures::default() });
        watcher.look(&observed(Signal::Memory, 101), s(20));
        assert_eq!(watcher.wanted(), None);
        assert!(watcher.pressures(s(309)).memory && !watcher.pressures(s(310)).memory);
    }

    #[test]
    fn a_soft_threshold_waits_for_its_grace_period() {
        let soft = Threshold { grace: s(30), ..Threshold::hard(Signal::NodeDisk, Level::Share(0.5)) };
        let mut watcher = watcher(vec![soft]);
        watcher.look(&observed(Signal::NodeDisk, 400), s(0));
        assert!(watcher.wanted().is_none() && watcher.pressures(s(0)).disk, "the condition does not wait");
        watcher.look(&observed(Signal::NodeDisk, 400), s(29));
        assert_eq!(watcher.wanted(), None);
        watcher.look(&observed(Signal::NodeDisk, 400), s(30));
        assert_eq!(watcher.wanted(), Some(soft));
        watcher.look(&observed(Signal::NodeDisk, 600), s(31));
        watcher.look(&observed(Signal::NodeDisk, 400), s(32));
        assert_eq!(watcher.wanted(), None, "it begins anew");
    }

    #[test]
    fn once_relief_is_wanted_it_has_to_be_worth_it() {
        let hard =
            Threshold { reclaim: Some(Level::Amount(50)), ..Threshold::hard(Signal::ImageInodes, Level::Amount(100)) };
        let mut watcher = watcher(vec![hard]);
        watcher.look(&observed(Signal::ImageInodes, 120), s(0));
        assert_eq!(watcher.wanted(), None);
        watcher.look(&observed(Signal::ImageInodes, 99), s(1));
        watcher.look(&observed(Signal::ImageInodes, 149), s(2));
        assert_eq!(watcher.wanted(), Some(hard));
        assert!(!watcher.is_relieved(&observed(Signal::ImageInodes, 149)));
        assert!(watcher.is_relieved(&observed(Signal::ImageInodes, 150)));
        watcher.look(&observed(Signal::ImageInodes, 150), s(3));
        assert_eq!(watcher.wanted(), None);
    }

    #[test]
    fn memory_comes_first_and_what_is_near_is_looked_at_more_often() {
        let level = Level::Amount(100);
        let mut watcher =
            watcher(vec![Threshold::hard(Signal::NodeDisk, level), Threshold::hard(Signal::Memory, level)]);
        let mut both = observed(Signal::NodeDisk, 1);
        assert!(!watcher.is_near(&both), "disks fill slowly");
        both.set(Signal::Memory, Some(Room { capacity: 1000, available: 150 }));
        assert!(watcher.is_near(&both));
        both.set(Signal::Memory, Some(Room { capacity: 1000, available: 1 }));
        watcher.look(&both, s(0));
        assert_eq!(watcher.wanted().map(|one| one.signal), Some(Signal::Memory));
        assert_eq!(watcher.pressures(s(0)).names().collect::<Vec<_>>(), ["MemoryPressure", "DiskPressure"]);
    }

    #[test]
    fn any_disk_makes_disk_pressure() {
        let crossed =
            [(Signal::NodeDisk, 99), (Signal::NodeInodes, 49), (Signal::ImageDisk, 149), (Signal::ImageInodes, 49)];
        for (signal, available) in crossed {
            let mut watcher = watcher(Thresholds::upstream().0);
            watcher.look(&observed(signal, available), s(1));
            assert!(watcher.pressures(s(1)).disk, "{signal:?}");
            watcher.look(&observed(signal, available + 1), s(2));
            assert_eq!(watcher.wanted(), None);
        }
    }

    #[test]
    fn process_ids_are_counted_with_their_threads() {
        assert_eq!(pids("0.1 0.2 0.3 2/345 6789\n", "32768\n"), Some(Room { capacity: 32768, available: 32423 }));
        assert_eq!(pids("", "32768"), None);
    }
}
