//! Control groups, version 1 and 2 behind one type: the only place that knows the difference.
//!
//! A [`Hierarchy`] is where this process may make groups; a [`Cgroup`] is one group by its path below that place, as
//! `kubepods/burstable/pod…/…`. On version 1 a group is a directory in each controller's own tree.

mod stats;
mod v1;
mod v2;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::process::Pid;

use crate::error::{Context as _, Error, Result};

pub use stats::{CpuStats, IoStats, MemoryStats, PidStats, Pressure, Stats};

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
    /// Files of version 2 and their values, as they are.
    pub unified: Vec<(String, String)>,
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
    /// Version 1: write the process id into each of these `cgroup.procs` before exec.
    Files(Vec<OwnedFd>),
}

impl Entry {
    /// Whether a process can begin in the group. Otherwise it has to be moved there, which takes the kernel an RCU grace
    /// period: some milliseconds.
    pub fn at_birth(&self) -> bool {
        matches!(self, Self::Directory(_))
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
        if let Version::V2(root) = &self.hierarchy.version {
            return v2::create(root, &self.path);
        }
        for dir in self.directories() {
            fs::create_dir_all(&dir).during("mkdir", dir.display())?;
            v1::inherit_cpuset(&dir)?;
        }
        Ok(())
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
                    let file = dir.join("cgroup.procs");
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
        self.directories().iter().any(|dir| holds_process(dir))
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

    /// Removes the group and the empty groups below it. A group that is gone is no error.
    ///
    /// # Errors
    /// `EBUSY` while a process is in it.
    pub fn delete(&self) -> Result<()> {
        for dir in self.directories() {
            remove_tree(&dir)?;
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

fn remove_tree(dir: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(dir) else { return Ok(()) };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    match fs::remove_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).during("rmdir", dir.display()),
        _ => Ok(()),
    }
}

fn read_processes(dir: &Path) -> Vec<i32> {
    let text = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

fn holds_process(dir: &Path) -> bool {
    let below = || fs::read_dir(dir).into_iter().flatten().flatten();
    let mut groups = below().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    !read_processes(dir).is_empty() || groups.any(|entry| holds_process(&entry.path()))
}

/// Writes a control file in one call; the error names the file and the value.
fn write(file: &Path, value: &str) -> Result<()> {
    fs::write(file, value).map_err(|error| Error {
        call: "write",
        subject: format!("{value:?} to {}", file.display()),
        errno: rustix::io::Errno::from_io_error(&error).unwrap_or(rustix::io::Errno::IO),
    })
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
