//! Control groups, version 1 and 2 behind one type: the only place that knows the difference.
//!
//! A [`Hierarchy`] is where this process may make groups; a [`Cgroup`] is one group by its path below that place, as
//! `kubepods/burstable/pod…/…`. On version 1 a group is a directory in each controller's own tree.

mod details;
mod oom;
mod stats;
mod tree;
mod unit;
mod v1;
mod v2;

use std::fs;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;

use crate::error::{Context as _, Error, Result};

pub use details::{CPUSET_VALUES, Charge, Cpuset, Details, IoEntry, Processors};
pub use oom::OomWatch;
pub use stats::{CpuStats, IoStats, MemoryStats, PidStats, Pressure, Stats};
pub use unit::{UnitProperty, UnitValue};

/// The version of the control group interface, with what it needs.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Version {
    /// The directory of each controller's tree for this process, by controller.
    V1(Vec<(String, PathBuf)>),
    /// The one directory below which groups are made.
    V2(PathBuf),
}

/// Where this process may make groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    version: Version,
}

/// Limits of a group; what is absent stays as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Limits {
    /// CPU time in relation to siblings, 2 to 262144 (version 1's unit).
    pub cpu_shares: Option<u64>,
    /// CPU time in microseconds for each period; negative is unlimited.
    pub cpu_quota_us: Option<i64>,
    /// Length of a period in microseconds.
    pub cpu_period_us: Option<u64>,
    /// CPUs, as `0-3,7`.
    pub cpuset_cpus: Option<String>,
    /// Memory nodes, as `0`.
    pub cpuset_mems: Option<String>,
    /// Memory in bytes; negative is unlimited.
    pub memory_bytes: Option<i64>,
    /// Memory and swap together in bytes; negative is unlimited.
    pub memory_swap_bytes: Option<i64>,
    /// Memory that is kept from reclaim, in bytes (version 2 only).
    pub memory_min_bytes: Option<u64>,
    /// Processes and threads; negative is unlimited.
    pub pids: Option<i64>,
    /// Huge pages in bytes, by page size as `2MB`.
    pub hugepages: Vec<(String, u64)>,
    /// Memory in bytes that the group is left with under pressure; negative is unlimited.
    pub memory_reservation_bytes: Option<i64>,
    /// 0 to 100 (version 1 only).
    pub swappiness: Option<u64>,
    /// Processes wait for memory instead of being killed (version 1 only).
    pub oom_killer_disabled: Option<bool>,
    /// Microseconds of CPU time that may be saved up.
    pub cpu_burst_us: Option<u64>,
    /// 1 runs only when nobody else wants to.
    pub cpu_idle: Option<i64>,
    /// Microseconds of real-time CPU time for each period, and that (version 1 only).
    pub cpu_realtime_us: (Option<i64>, Option<u64>),
    /// Input and output in relation to siblings, 10 to 1000 (version 1's unit).
    pub io_weight: Option<u16>,
    /// The same for single devices (major and minor number).
    pub io_weights: Vec<((u32, u32), u16)>,
    /// Limits of input and output for devices.
    pub io_limits: Vec<IoLimit>,
    /// Class of the group's packets (version 1 only).
    pub network_class: Option<u32>,
    /// Priority of the group's packets by interface (version 1 only).
    pub network_priorities: Vec<(String, u32)>,
    /// Handles and objects of RDMA devices.
    pub rdma: Vec<(String, Option<u32>, Option<u32>)>,
    /// Memory below what is in use is refused (`EBUSY`) instead of killing, also by version 2.
    pub checks_usage: bool,
    /// Files of version 2 and their values, as they are.
    pub unified: Vec<(String, String)>,
}

/// A limit of input or output for a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IoLimit {
    /// What is limited.
    pub kind: IoLimitKind,
    /// The device.
    pub device: (u32, u32),
    /// How many a second; 0 is unlimited.
    pub rate: u64,
}

/// What an [`IoLimit`] limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum IoLimitKind {
    ReadBytes,
    WriteBytes,
    Reads,
    Writes,
}

/// One group.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    hierarchy: Hierarchy,
    path: PathBuf,
}

/// How a process enters a group.
#[derive(Debug)]
pub enum Entry {
    /// Version 2: begin in this directory (`CLONE_INTO_CGROUP`).
    Directory(OwnedFd),
    /// Version 1: a process with one thread writes 0 into each of these before exec.
    Files(Vec<OwnedFd>),
}

impl Entry {
    /// Whether a process can begin in the group. Otherwise it has to be moved there, which takes the kernel an RCU grace
    /// period: some milliseconds.
    pub fn at_birth(&self) -> bool {
        matches!(self, Self::Directory(_))
    }

    /// Where a process of this group is below it: a container that has divided its group may have no processes in the group
    /// itself any more, nor may others put any there. None on version 1, which knows no such rule, and where the process is
    /// elsewhere.
    ///
    /// # Errors
    /// `ESRCH` when the process has ended.
    pub fn below(&self, process: BorrowedFd<'_>) -> Result<Option<Self>> {
        let Self::Directory(group) = self else { return Ok(None) };
        Ok(tree::find(group.as_fd(), crate::process::id(process)?)?.map(Self::Directory))
    }
}

impl Hierarchy {
    /// What is mounted at `/sys/fs/cgroup`, below the groups that this process is in.
    ///
    /// # Errors
    /// No usable hierarchy; the message names what was looked for.
    pub fn detect() -> Result<Self> {
        Self::at(Path::new("/sys/fs/cgroup"), Path::new("/proc/self/cgroup"))
    }

    /// As [`Hierarchy::detect`], with both places given.
    ///
    /// # Errors
    /// As [`Hierarchy::detect`].
    pub fn at(mount: &Path, own: &Path) -> Result<Self> {
        let own = fs::read_to_string(own).during("read", own.display())?;
        let version = if mount.join("cgroup.controllers").exists() {
            Version::V2(v2::root(mount, &own))
        } else {
            Version::V1(v1::roots(mount, &own)?)
        };
        Ok(Self { version })
    }

    /// What is mounted at `mount` (`/sys/fs/cgroup`) as a whole: for paths that somebody else has chosen.
    ///
    /// # Errors
    /// As [`Hierarchy::detect`].
    pub fn whole(mount: &Path) -> Result<Self> {
        if mount.join("cgroup.controllers").exists() {
            return Ok(Self { version: Version::V2(mount.to_owned()) });
        }
        let own = fs::read_to_string("/proc/self/cgroup").during("read", "/proc/self/cgroup")?;
        let hierarchies = own.lines().filter_map(|line| line.rsplit_once(':').map(|(hierarchy, _)| hierarchy));
        let roots: String = hierarchies.map(|hierarchy| format!("{hierarchy}:/\n")).collect();
        Ok(Self { version: Version::V1(v1::roots(mount, &roots)?) })
    }

    /// The group that a service manager has put a process in.
    ///
    /// # Errors
    /// `ESRCH` when the process has ended, `ENOENT` where it is in no group of a service manager.
    pub fn managed_group_of(&self, pid: Pid) -> Result<Cgroup> {
        let path = format!("/proc/{}/cgroup", pid.as_raw_nonzero());
        let groups = fs::read_to_string(&path).during("read", &path)?;
        let mark = if self.is_unified() { "0::" } else { ":name=systemd:" };
        let place = groups.lines().find_map(|line| line.split_once(mark).map(|(_, place)| place));
        let missing = || Error { call: "find", subject: format!("{mark} in {path}"), errno: rustix::io::Errno::NOENT };
        let group = self.group(place.ok_or_else(missing)?);
        Ok(match &self.version {
            Version::V1(roots) => {
                Self { version: Version::V1(v1::with_unified(roots, &group.path)) }.group(&group.path)
            }
            Version::V2(_) => group,
        })
    }

    /// Whether this is version 2.
    pub fn is_unified(&self) -> bool {
        matches!(self.version, Version::V2(_))
    }

    /// Whether a controller can be used, by its name in version 2 (`cpu`, `memory`, `pids`, `cpuset`, `io`, `hugetlb`).
    pub fn has_controller(&self, name: &str) -> bool {
        match &self.version {
            Version::V1(roots) => v1::has_controller(roots, name),
            Version::V2(root) => v2::has_controller(root, name),
        }
    }

    /// The group at `path`, which need not exist.
    pub fn group(&self, path: impl AsRef<Path>) -> Cgroup {
        let path = path.as_ref();
        Cgroup { hierarchy: self.clone(), path: path.strip_prefix("/").unwrap_or(path).to_owned() }
    }

    /// The directories in which a tree of groups called `name` stands, for those who look for leftovers.
    pub fn directories(&self, name: &Path) -> Vec<PathBuf> {
        self.group(name).directories()
    }
}

impl Cgroup {
    /// The group that has these directories, as [`Cgroup::places`] gave them.
    pub fn at(places: Vec<(String, PathBuf)>) -> Self {
        let version = match places.as_slice() {
            [(controllers, dir)] if controllers.is_empty() => Version::V2(dir.clone()),
            _ => Version::V1(places),
        };
        Self { hierarchy: Hierarchy { version }, path: PathBuf::new() }
    }

    /// Its directories with their controllers (none for version 2), for whoever has to find the group again from another
    /// group.
    pub fn places(&self) -> Vec<(String, PathBuf)> {
        // Components, as a path that is joined with an empty one has a slash at its end.
        let below = |root: &Path| root.join(&self.path).components().collect();
        match &self.hierarchy.version {
            Version::V1(roots) => roots.iter().map(|(names, root)| (names.clone(), below(root))).collect(),
            Version::V2(root) => vec![(String::new(), below(root))],
        }
    }

    /// Its path below the mount points of all hierarchies, beginning with a slash, as others name groups. None where this
    /// process, below whose groups it is, is in groups of different names, as version 1 allows.
    ///
    /// # Errors
    /// No usable hierarchy.
    pub fn path_for_others(&self) -> Result<Option<PathBuf>> {
        let whole = Hierarchy::whole(Path::new("/sys/fs/cgroup"))?.group("").places();
        let below = self.places().into_iter().map(|(names, dir)| {
            let root = whole.iter().find(|(known, _)| *known == names)?;
            dir.strip_prefix(&root.1).ok().map(|path| Path::new("/").join(path))
        });
        let mut paths: Vec<Option<PathBuf>> = below.collect();
        paths.dedup();
        Ok(match paths.as_mut_slice() {
            [only] => only.take(),
            _ => None,
        })
    }

    /// The processes in the group and in all groups below it.
    pub fn processes_below(&self) -> Vec<Pid> {
        let mut all = Vec::new();
        for dir in self.directories() {
            let _ = tree::each(&dir, |group| all.extend(tree::processes(group))); // what nobody may see has none
        }
        all.sort_unstable_by_key(|pid| pid.as_raw_nonzero());
        all.dedup();
        all
    }

    /// Waits until everything in the group stands still, or none has to any more.
    ///
    /// # Errors
    /// `ETIMEDOUT` after ten seconds: a process in the middle of a system call that does not end.
    pub fn wait_until_frozen(&self, frozen: bool) -> Result<()> {
        const LIMIT: Duration = Duration::from_secs(10);
        let deadline = Instant::now() + LIMIT;
        let done = match &self.hierarchy.version {
            Version::V1(roots) => v1::wait_until_frozen(roots, &self.path, frozen, deadline),
            Version::V2(root) => v2::wait_until_frozen(&root.join(&self.path), frozen, deadline),
        };
        let late =
            || Error { call: "freeze", subject: self.path.display().to_string(), errno: rustix::io::Errno::TIMEDOUT };
        if done? { Ok(()) } else { Err(late()) }
    }

    /// Whether it is stopped ([`Cgroup::freeze`]).
    pub fn is_frozen(&self) -> bool {
        match &self.hierarchy.version {
            Version::V1(roots) => v1::is_frozen(roots, &self.path),
            Version::V2(root) => number(&root.join(&self.path).join("cgroup.freeze")) == Some(1),
        }
    }

    /// Its path below the hierarchy.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The child group called `name`.
    pub fn child(&self, name: impl AsRef<Path>) -> Self {
        Self { hierarchy: self.hierarchy.clone(), path: self.path.join(name) }
    }

    /// Its directories: one on version 2, one for each controller on version 1.
    pub fn directories(&self) -> Vec<PathBuf> {
        match &self.hierarchy.version {
            Version::V1(roots) => v1::directories(roots, &self.path),
            Version::V2(root) => vec![root.join(&self.path)],
        }
    }

    /// Whether it exists.
    pub fn exists(&self) -> bool {
        self.directories().iter().any(|dir| dir.is_dir())
    }

    /// Makes the group and its parents, with all controllers that are there. Making it again changes nothing.
    ///
    /// # Errors
    /// `EROFS` or `EACCES` when the tree is not ours to write.
    pub fn create(&self) -> Result<()> {
        match &self.hierarchy.version {
            Version::V1(roots) => v1::create(roots, &self.path),
            Version::V2(root) => v2::create(root, &self.path),
        }
    }

    /// Adds to a group that a service manager has made what that does not know: controllers, as far as this process may hand
    /// them down, or version 1's other trees.
    ///
    /// # Errors
    /// As [`Self::create`]; none on version 2.
    pub fn complete(&self) -> Result<()> {
        match &self.hierarchy.version {
            Version::V1(_) => self.create(),
            Version::V2(root) => {
                v2::hand_down_to(root, &self.path);
                Ok(())
            }
        }
    }

    /// Sets limits.
    ///
    /// # Errors
    /// `EINVAL` for a value that the kernel refuses, `ENOENT` for a controller that is absent; the file is named.
    pub fn set(&self, limits: &Limits) -> Result<()> {
        match &self.hierarchy.version {
            Version::V1(roots) => v1::set(roots, &self.path, limits),
            Version::V2(root) => v2::set(&root.join(&self.path), limits),
        }
    }

    /// How a process enters this group.
    ///
    /// # Errors
    /// `ENOENT` when it does not exist.
    pub fn entry(&self) -> Result<Entry> {
        match &self.hierarchy.version {
            Version::V2(root) => {
                let dir = root.join(&self.path);
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                rustix::fs::open(&dir, flags, Mode::empty()).during("open", dir.display()).map(Entry::Directory)
            }
            Version::V1(_) => {
                let files = self.directories().into_iter().map(|dir| {
                    let file = v1::entry(&dir);
                    rustix::fs::open(&file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
                        .during("open", file.display())
                });
                files.collect::<Result<_>>().map(Entry::Files)
            }
        }
    }

    /// Moves a process into the group.
    ///
    /// # Errors
    /// `ESRCH` when it has ended.
    pub fn add(&self, pid: Pid) -> Result<()> {
        for dir in self.directories() {
            write(&dir.join("cgroup.procs"), &pid.as_raw_nonzero().to_string())?;
        }
        Ok(())
    }

    /// The processes in the group itself, not in its children.
    pub fn processes(&self) -> Vec<Pid> {
        let mut all: Vec<i32> = self.directories().iter().flat_map(|dir| read_processes(dir)).collect();
        all.sort_unstable();
        all.dedup();
        all.into_iter().filter_map(Pid::from_raw).collect()
    }

    /// Whether a process is in the group or below it.
    pub fn is_populated(&self) -> bool {
        match &self.hierarchy.version {
            Version::V1(_) => !self.processes_below().is_empty(),
            Version::V2(root) => v2::is_populated(&root.join(&self.path)),
        }
    }

    /// What the group uses.
    pub fn stats(&self) -> Stats {
        match &self.hierarchy.version {
            Version::V1(roots) => v1::stats(roots, &self.path),
            Version::V2(root) => v2::stats(&root.join(&self.path)),
        }
    }

    /// What it has read from and written to each device.
    pub fn io(&self) -> Vec<IoStats> {
        match &self.hierarchy.version {
            Version::V1(roots) => v1::io(roots, &self.path),
            Version::V2(root) => stats::io_v2(&root.join(&self.path)),
        }
    }

    /// All that the kernel counts of the group.
    pub fn details(&self) -> Details {
        match &self.hierarchy.version {
            Version::V1(roots) => details::of_v1(roots, &self.path, self.stats()),
            Version::V2(root) => details::of_v2(&root.join(&self.path), self.stats()),
        }
    }

    /// Has the kernel tell of want of memory.
    ///
    /// # Errors
    /// `ENOENT` without the controller of memory.
    pub fn watch_oom(&self) -> Result<OomWatch> {
        match &self.hierarchy.version {
            Version::V1(roots) => OomWatch::v1(roots, &self.path),
            Version::V2(root) => OomWatch::v2(&root.join(&self.path)),
        }
    }

    /// How many processes the kernel has killed here for want of memory.
    pub fn oom_kills(&self) -> u64 {
        match &self.hierarchy.version {
            Version::V1(roots) => v1::oom_kills(roots, &self.path),
            Version::V2(root) => v2::oom_kills(&root.join(&self.path)),
        }
    }

    /// Stops, or lets go on, everything in the group and below.
    ///
    /// # Errors
    /// `ENOENT` without a freezer.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        match &self.hierarchy.version {
            Version::V1(roots) => v1::freeze(roots, &self.path, frozen),
            Version::V2(root) => write(&root.join(&self.path).join("cgroup.freeze"), if frozen { "1" } else { "0" }),
        }
    }

    /// Sends SIGKILL to everything in the group and below. What forks meanwhile is caught too.
    ///
    /// # Errors
    /// None when the group is gone, or goes meanwhile.
    pub fn kill(&self) -> Result<()> {
        let killed = match &self.hierarchy.version {
            Version::V2(root) => v2::kill(&root.join(&self.path)),
            Version::V1(roots) => v1::kill(self, roots),
        };
        // A file of a group that is being removed answers ENODEV (kernfs).
        killed.or_else(|error| match error.errno {
            rustix::io::Errno::NOENT | rustix::io::Errno::NODEV => Ok(()),
            _ => Err(error),
        })
    }

    /// Allows the devices of `rules` and no others.
    ///
    /// # Errors
    /// The kernel's refusal; on version 2 the program of the group cannot be replaced without CAP_BPF or CAP_SYS_ADMIN.
    pub fn allow_devices(&self, rules: &[DeviceRule]) -> Result<()> {
        match &self.hierarchy.version {
            Version::V1(roots) => v1::allow_devices(roots, &self.path, rules),
            Version::V2(root) => v2::allow_devices(&root.join(&self.path), rules),
        }
    }

    /// Removes the group and the empty groups below it, also from version 2's tree where that is mounted beside those of version 1. A
    /// group that is gone is no error.
    ///
    /// # Errors
    /// `EBUSY` while a process is in it.
    pub fn delete(&self) -> Result<()> {
        for dir in self.directories() {
            tree::remove(&dir)?;
        }
        if let Version::V1(roots) = &self.hierarchy.version {
            // Whoever has a process there goes on having it.
            v1::beside(roots, &self.path).iter().for_each(|dir| drop(tree::remove(dir)));
        }
        Ok(())
    }
}

/// A device, or all of a kind, and what may be done with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceRule {
    /// Allowed or forbidden; later rules win.
    pub allow: bool,
    /// `a` (all), `b` or `c`.
    pub kind: char,
    /// Major number; `None` for all.
    pub major: Option<u32>,
    /// Minor number; `None` for all.
    pub minor: Option<u32>,
    /// Of `r`, `w` and `m`.
    pub access: String,
}

/// A line of `rdma.max`, which is the same in both versions.
fn rdma_line((device, handles, objects): &(String, Option<u32>, Option<u32>)) -> String {
    let part = |name: &str, value: &Option<u32>| value.map(|value| format!(" {name}={value}")).unwrap_or_default();
    format!("{device}{}{}", part("hca_handle", handles), part("hca_object", objects))
}

fn read_processes(dir: &Path) -> Vec<i32> {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// Sends SIGKILL to each process of a group and of those below.
fn kill_each(dir: &Path) -> Result<()> {
    tree::each(dir, |group| {
        for pid in tree::processes(group) {
            // It may have ended since it was listed.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    })
}

/// Writes a control file in one call; the error names the file and the value.
fn write(file: &Path, value: &str) -> Result<()> {
    fs::write(file, value).map_err(|error| refused(file, value, &error))
}

/// That a control file did not take a value.
fn refused(file: &Path, value: &str, error: &std::io::Error) -> Error {
    Error {
        call: "write",
        subject: format!("{value:?} to {}", file.display()),
        errno: rustix::io::Errno::from_io_error(error).unwrap_or(rustix::io::Errno::IO),
    }
}

/// A number in a control file; `max` and what is missing are `None`.
fn number(file: &Path) -> Option<u64> {
    fs::read_to_string(file).ok()?.trim().parse().ok()
}

/// The value of `key` in a file of `key value` lines.
fn keyed(file: &Path, key: &str) -> Option<u64> {
    Keyed::read(file).get(key)
}

/// A file of `key value` lines. Read once for all its keys: the kernel adds up its counters at each opening.
struct Keyed(String);

impl Keyed {
    /// Empty where there is no such file.
    fn read(file: &Path) -> Self {
        Self(fs::read_to_string(file).unwrap_or_default())
    }

    fn get(&self, key: &str) -> Option<u64> {
        self.0.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.trim().parse().ok())
    }
}
