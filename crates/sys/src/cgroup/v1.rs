//! Version 1: a tree for each controller (kernel documents admin-guide/cgroup-v1).

use std::ffi::OsStr;
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{Mode, OFlags, openat};

use super::stats::add_io_v1;
use super::{
    Cgroup, CpuStats, DeviceRule, IoLimitKind, IoStats, Keyed, Limits, MemoryStats, PidStats, Stats, keyed, kill_each,
    number, refused, tree, write,
};
use crate::error::{Context as _, Error, Result};

/// Value of `memory.limit_in_bytes` that means no limit: the largest multiple of a page.
const NO_LIMIT: u64 = 0x7fff_ffff_ffff_f000;

/// The directory of each controller's tree that this process is in.
pub(super) fn roots(mount: &Path, own: &str) -> Result<Vec<(String, PathBuf)>> {
    let mut roots = Vec::new();
    for line in own.lines() {
        let mut parts = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (parts.next(), parts.next(), parts.next()) else { continue };
        let name = controllers.strip_prefix("name=").unwrap_or(controllers);
        let base = mount.join(name);
        if controllers.is_empty() || !base.is_dir() {
            continue;
        }
        let path = path.trim_start_matches('/');
        // Inside a container the tree may be mounted from our own group on; then the path does not exist below it.
        let root = if !path.is_empty() && base.join(path).is_dir() { base.join(path) } else { base };
        roots.push((controllers.to_owned(), root));
    }
    if roots.is_empty() {
        let subject = format!("control groups below {}", mount.display());
        return Err(Error { call: "find", subject, errno: rustix::io::Errno::NOENT });
    }
    Ok(roots)
}

/// With the tree of version 2 that a service manager has beside those of version 1 to see which of its groups are empty (it
/// calls that hybrid), if the group `path` is there: a unit whose processes are not ends.
pub(super) fn with_unified(roots: &[(String, PathBuf)], path: &Path) -> Vec<(String, PathBuf)> {
    let managers = roots.iter().find(|(names, _)| names == "name=systemd").and_then(|(_, root)| root.parent());
    let unified = managers.map(|mount| mount.join("unified")).filter(|root| root.join(path).is_dir());
    roots.iter().cloned().chain(unified.map(|root| (String::new(), root))).collect()
}

/// The groups in version 2's tree beside these that have the place of one of them. Other runtimes make them, with those above (a pod's),
/// which they leave.
pub(super) fn beside(roots: &[(String, PathBuf)], path: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> =
        roots.iter().filter_map(|(names, root)| place_beside(names, &root.join(path))).collect();
    all.sort();
    all.dedup();
    all.retain(|dir| dir.join("cgroup.controllers").is_file());
    all
}

/// Where the group `dir` of a tree of version 1 has its place in `unified`, which is mounted next to that tree.
fn place_beside(names: &str, dir: &Path) -> Option<PathBuf> {
    let name = OsStr::new(names.strip_prefix("name=").unwrap_or(names));
    let tree = dir.ancestors().filter(|above| above.file_name() == Some(name)).last()?;
    let place = dir.strip_prefix(tree).ok().filter(|place| place.components().next().is_some())?;
    Some(tree.parent()?.join("unified").join(place))
}

pub(super) fn has_controller(roots: &[(String, PathBuf)], name: &str) -> bool {
    let name = if name == "io" { "blkio" } else { name };
    root_of(roots, name).is_some()
}

pub(super) fn root_of<'a>(roots: &'a [(String, PathBuf)], name: &str) -> Option<&'a Path> {
    roots.iter().find(|(controllers, _)| controllers.split(',').any(|one| one == name)).map(|(_, root)| root.as_path())
}

/// Directories of a group; controllers that are mounted together have one.
pub(super) fn directories(roots: &[(String, PathBuf)], path: &Path) -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = roots.iter().map(|(_, root)| root.join(path)).collect();
    all.sort();
    all.dedup();
    all
}

/// The file by which a process enters the group at `dir`. A thread that moves itself alone does not wait for a grace period of RCU,
/// as the whole process does that is moved by `cgroup.procs` (kernel commit 9a3284fad42f): 0.1 ms in the place of 5 to 11 for nine
/// trees. Version 2's tree has no such file.
pub(super) fn entry(dir: &Path) -> PathBuf {
    let tasks = dir.join("tasks");
    if tasks.exists() { tasks } else { dir.join("cgroup.procs") }
}

/// Makes a group and its parents in each tree.
pub(super) fn create(roots: &[(String, PathBuf)], path: &Path) -> Result<()> {
    for dir in directories(roots, path) {
        fs::create_dir_all(&dir).during("mkdir", dir.display())?;
    }
    root_of(roots, "cpuset").map_or(Ok(()), |root| inherit_cpuset(&root.join(path)))
}

/// A new cpuset is empty and takes no process until it names CPUs and memory nodes.
fn inherit_cpuset(dir: &Path) -> Result<()> {
    for name in ["cpuset.cpus", "cpuset.mems"] {
        let mut above: Vec<&Path> = dir.ancestors().take_while(|dir| dir.join(name).exists()).collect();
        above.reverse();
        for pair in above.windows(2) {
            let own = fs::read_to_string(pair[1].join(name)).unwrap_or_default();
            if own.trim().is_empty() {
                let parent = fs::read_to_string(pair[0].join(name)).during("read", pair[0].display())?;
                write(&pair[1].join(name), parent.trim())?;
            }
        }
    }
    Ok(())
}

pub(super) fn set(roots: &[(String, PathBuf)], path: &Path, limits: &Limits) -> Result<()> {
    let file = |controller: &str, name: &str| -> PathBuf {
        root_of(roots, controller)
            .map_or_else(|| PathBuf::from(format!("(no controller {controller})")), |root| root.join(path).join(name))
    };
    let set = |controller: &str, name: &str, value: Option<String>| {
        value.map_or(Ok(()), |value| write(&file(controller, name), &value))
    };
    set("cpu", "cpu.shares", limits.cpu_shares.map(|shares| shares.to_string()))?;
    // The period first: a quota is checked against it.
    set(
        "cpu",
        "cpu.cfs_period_us",
        limits.cpu_period_us.filter(|period| *period > 0).map(|period| period.to_string()),
    )?;
    set("cpu", "cpu.cfs_quota_us", limits.cpu_quota_us.map(|quota| quota.max(-1).to_string()))?;
    set("cpuset", "cpuset.cpus", limits.cpuset_cpus.clone().filter(|cpus| !cpus.is_empty()))?;
    set("cpuset", "cpuset.mems", limits.cpuset_mems.clone().filter(|mems| !mems.is_empty()))?;
    set_memory(&file("memory", ""), limits)?;
    set("pids", "pids.max", limits.pids.map(|pids| if pids < 0 { "max".to_owned() } else { pids.to_string() }))?;
    for (size, bytes) in &limits.hugepages {
        set("hugetlb", &format!("hugetlb.{size}.limit_in_bytes"), Some(bytes.to_string()))?;
        // With this, who maps too many is told so, and not killed when it touches them. It came with Linux 5.7.
        let reserved = format!("hugetlb.{size}.rsvd.limit_in_bytes");
        if file("hugetlb", &reserved).exists() {
            set("hugetlb", &reserved, Some(bytes.to_string()))?;
        }
    }
    set("memory", "memory.soft_limit_in_bytes", limits.memory_reservation_bytes.map(|bytes| bytes.to_string()))?;
    set("memory", "memory.swappiness", limits.swappiness.map(|value| value.to_string()))?;
    let killer = limits.oom_killer_disabled.filter(|disabled| *disabled);
    set("memory", "memory.oom_control", killer.map(|_| "1".to_owned()))?;
    set("cpu", "cpu.cfs_burst_us", limits.cpu_burst_us.map(|burst| burst.to_string()))?;
    set("cpu", "cpu.idle", limits.cpu_idle.map(|idle| idle.to_string()))?;
    let (runtime, period) = limits.cpu_realtime_us;
    set("cpu", "cpu.rt_period_us", period.map(|period| period.to_string()))?;
    set("cpu", "cpu.rt_runtime_us", runtime.map(|runtime| runtime.to_string()))?;
    set_io(&file("blkio", ""), limits)?;
    set("net_cls", "net_cls.classid", limits.network_class.map(|class| class.to_string()))?;
    for (interface, priority) in &limits.network_priorities {
        set("net_prio", "net_prio.ifpriomap", Some(format!("{interface} {priority}")))?;
    }
    limits.rdma.iter().try_for_each(|device| set("rdma", "rdma.max", Some(super::rdma_line(device))))
}

fn set_io(dir: &Path, limits: &Limits) -> Result<()> {
    if let Some(weight) = limits.io_weight {
        let plain = dir.join("blkio.weight");
        write(&if plain.exists() { plain } else { dir.join("blkio.bfq.weight") }, &weight.to_string())?;
    }
    for ((major, minor), weight) in &limits.io_weights {
        let plain = dir.join("blkio.weight_device");
        let file = if plain.exists() { plain } else { dir.join("blkio.bfq.weight_device") };
        write(&file, &format!("{major}:{minor} {weight}"))?;
    }
    limits.io_limits.iter().try_for_each(|limit| {
        let name = match limit.kind {
            IoLimitKind::ReadBytes => "blkio.throttle.read_bps_device",
            IoLimitKind::WriteBytes => "blkio.throttle.write_bps_device",
            IoLimitKind::Reads => "blkio.throttle.read_iops_device",
            IoLimitKind::Writes => "blkio.throttle.write_iops_device",
        };
        let (major, minor) = limit.device;
        write(&dir.join(name), &format!("{major}:{minor} {}", limit.rate))
    })
}

/// This version tells nobody when it has come to its state, and comes there only while somebody asks.
pub(super) fn wait_until_frozen(
    roots: &[(String, PathBuf)],
    path: &Path,
    frozen: bool,
    deadline: Instant,
) -> Result<bool> {
    let file = root_of(roots, "freezer").unwrap_or(Path::new("(no freezer)")).join(path).join("freezer.state");
    let wanted = if frozen { "FROZEN" } else { "THAWED" };
    loop {
        if fs::read_to_string(&file).during("read", file.display())?.trim() == wanted {
            return Ok(true);
        }
        if Instant::now() > deadline {
            return Ok(false);
        }
        std::thread::yield_now();
    }
}

pub(super) fn is_frozen(roots: &[(String, PathBuf)], path: &Path) -> bool {
    let file = root_of(roots, "freezer").map(|root| root.join(path).join("freezer.state"));
    file.is_some_and(|file| fs::read_to_string(file).is_ok_and(|state| matches!(state.trim(), "FROZEN" | "FREEZING")))
}

/// The limit of memory may not exceed that of memory and swap: raise the latter first, lower it last.
fn set_memory(dir: &Path, limits: &Limits) -> Result<()> {
    let plain = dir.join("memory.limit_in_bytes");
    let with_swap = dir.join("memory.memsw.limit_in_bytes");
    let swap = limits.memory_swap_bytes.filter(|_| with_swap.exists());
    let raises = limits.memory_bytes.zip(number(&plain)).is_some_and(|(new, old)| new < 0 || new.unsigned_abs() > old);
    if let (true, Some(swap)) = (raises, swap) {
        write(&with_swap, &swap.to_string())?;
    }
    if let Some(bytes) = limits.memory_bytes {
        write(&plain, &bytes.to_string())?;
    }
    if let (false, Some(swap)) = (raises, swap) {
        write(&with_swap, &swap.to_string())?;
    }
    Ok(())
}

pub(super) fn freeze(roots: &[(String, PathBuf)], path: &Path, frozen: bool) -> Result<()> {
    let root = root_of(roots, "freezer").unwrap_or(Path::new("(no freezer)"));
    write(&root.join(path).join("freezer.state"), if frozen { "FROZEN" } else { "THAWED" })
}

/// Freezes, kills everything, thaws: nothing can fork between the listing and the kill.
pub(super) fn kill(group: &Cgroup, roots: &[(String, PathBuf)]) -> Result<()> {
    let Some(dir) = root_of(roots, "freezer").or_else(|| root_of(roots, "pids")).map(|root| root.join(group.path()))
    else {
        return Ok(());
    };
    if !dir.is_dir() {
        return Ok(());
    }
    // Without a freezer a fork may escape one round; the caller sees it in `processes` and asks again.
    let frozen = freeze(roots, group.path(), true).is_ok();
    let killed = kill_each(&dir);
    if frozen { thaw_each(&dir).and(killed) } else { killed }
}

/// Also those below that the container itself has frozen: what stands still does not end.
fn thaw_each(dir: &Path) -> Result<()> {
    tree::each(dir, |group| {
        if let Ok(file) = openat(group, c"freezer.state", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
            let _ = rustix::io::write(file, b"THAWED"); // as it goes, so do they
        }
    })
}

pub(super) fn allow_devices(roots: &[(String, PathBuf)], path: &Path, rules: &[DeviceRule]) -> Result<()> {
    let Some(dir) = root_of(roots, "devices").map(|root| root.join(path)) else { return Ok(()) };
    let (allow, deny) = (Control::open(dir.join("devices.allow"))?, Control::open(dir.join("devices.deny"))?);
    // A new group allows what its parent does.
    deny.write("a")?;
    for rule in rules {
        let number = |number: Option<u32>| number.map_or("*".to_owned(), |number| number.to_string());
        let text = if rule.kind == 'a' {
            "a".to_owned()
        } else {
            format!("{} {}:{} {}", rule.kind, number(rule.major), number(rule.minor), rule.access)
        };
        if rule.allow { &allow } else { &deny }.write(&text)?;
    }
    Ok(())
}

/// A control file that takes one value with each write.
struct Control {
    file: fs::File,
    path: PathBuf,
}

impl Control {
    fn open(path: PathBuf) -> Result<Self> {
        let file = fs::OpenOptions::new().write(true).open(&path).during("open", path.display())?;
        Ok(Self { file, path })
    }

    fn write(&self, value: &str) -> Result<()> {
        (&self.file).write_all(value.as_bytes()).map_err(|error| refused(&self.path, value, &error))
    }
}

pub(super) fn oom_kills(roots: &[(String, PathBuf)], path: &Path) -> u64 {
    let dir = root_of(roots, "memory").map(|root| root.join(path));
    dir.and_then(|dir| keyed(&dir.join("memory.oom_control"), "oom_kill")).unwrap_or(0)
}

pub(super) fn stats(roots: &[(String, PathBuf)], path: &Path) -> Stats {
    let dir = |controller: &str| root_of(roots, controller).map_or_else(PathBuf::new, |root| root.join(path));
    let memory = MemoryStats { oom_kills: oom_kills(roots, path), ..memory(&dir("memory")) };
    let pids = dir("pids");
    Stats {
        cpu: cpu(&dir("cpu"), &dir("cpuacct")),
        memory,
        pids: PidStats {
            count: number(&pids.join("pids.current")).unwrap_or(0),
            limit: number(&pids.join("pids.max")),
        },
        ..Stats::default()
    }
}

pub(super) fn io(roots: &[(String, PathBuf)], path: &Path) -> Vec<IoStats> {
    let Some(dir) = root_of(roots, "blkio").map(|root| root.join(path)) else { return Vec::new() };
    let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
    let mut devices = Vec::new();
    add_io_v1(&read("blkio.throttle.io_service_bytes_recursive"), &mut devices, |io, writes, bytes| {
        *(if writes { &mut io.write_bytes } else { &mut io.read_bytes }) = bytes;
    });
    add_io_v1(&read("blkio.throttle.io_serviced_recursive"), &mut devices, |io, writes, count| {
        *(if writes { &mut io.writes } else { &mut io.reads }) = count;
    });
    devices
}

fn cpu(cpu: &Path, accounting: &Path) -> CpuStats {
    let stat = Keyed::read(&cpu.join("cpu.stat"));
    let stat = |key: &str| stat.get(key).unwrap_or(0);
    let quota = fs::read_to_string(cpu.join("cpu.cfs_quota_us")).ok().and_then(|text| text.trim().parse::<i64>().ok());
    let period = number(&cpu.join("cpu.cfs_period_us")).filter(|period| *period > 0);
    let limit = quota.and_then(|quota| u64::try_from(quota).ok()).zip(period);
    CpuStats {
        usage_ns: number(&accounting.join("cpuacct.usage")).unwrap_or(0),
        user_ns: number(&accounting.join("cpuacct.usage_user")).unwrap_or(0),
        system_ns: number(&accounting.join("cpuacct.usage_sys")).unwrap_or(0),
        periods: stat("nr_periods"),
        throttled_periods: stat("nr_throttled"),
        throttled_ns: stat("throttled_time"),
        limit_milli: limit.map(|(quota, period)| quota * 1000 / period),
    }
}

fn memory(dir: &Path) -> MemoryStats {
    let stat = Keyed::read(&dir.join("memory.stat"));
    let stat = |key: &str| stat.get(key).unwrap_or(0);
    let usage = number(&dir.join("memory.usage_in_bytes")).unwrap_or(0);
    let limit = |name: &str| number(&dir.join(name)).filter(|limit| *limit < NO_LIMIT);
    let limit_bytes = limit("memory.limit_in_bytes");
    // This version limits memory and swap together.
    let both = limit("memory.memsw.limit_in_bytes");
    MemoryStats {
        usage_bytes: usage,
        working_set_bytes: usage.saturating_sub(stat("total_inactive_file")),
        rss_bytes: stat("total_rss"),
        page_faults: stat("total_pgfault"),
        major_page_faults: stat("total_pgmajfault"),
        swap_bytes: stat("total_swap"),
        swap_limit_bytes: both.zip(limit_bytes).map(|(both, memory)| both.saturating_sub(memory)),
        limit_bytes,
        oom_kills: 0,
        cache_bytes: stat("total_cache"),
        mapped_file_bytes: stat("total_mapped_file"),
        active_file_bytes: stat("total_active_file"),
        inactive_file_bytes: stat("total_inactive_file"),
        kernel_bytes: number(&dir.join("memory.kmem.usage_in_bytes")).unwrap_or(0),
        peak_bytes: number(&dir.join("memory.max_usage_in_bytes")),
        limit_hits: number(&dir.join("memory.failcnt")).unwrap_or(0),
    }
}
