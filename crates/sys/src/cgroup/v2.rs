//! Version 2: one tree (kernel document admin-guide/cgroup-v2).

use std::fs;
use std::io::ErrorKind;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    CpuStats, DeviceRule, IoLimitKind, Keyed, Limits, MemoryStats, PidStats, Pressure, Stats, keyed, kill_each, number,
    write,
};
use crate::error::{Context as _, Error, Result};

/// Controllers that a node hands down.
const CONTROLLERS: &[&str] = &["cpu", "cpuset", "memory", "pids", "io", "hugetlb", "rdma", "misc"];

/// Groups are made beside this process's own group's parent tree: at the root of what is mounted, since a group with
/// processes cannot hand controllers down ("no internal processes").
pub(super) fn root(mount: &Path, own: &str) -> PathBuf {
    let path = own.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/").trim_start_matches('/');
    let own = mount.join(path);
    // A service manager that delegates a subtree gives us a group of our own whose parent hands controllers down.
    let parent = own.parent().filter(|parent| parent.starts_with(mount) && !path.is_empty());
    parent.filter(|parent| is_delegated(parent)).unwrap_or(mount).to_owned()
}

fn is_delegated(dir: &Path) -> bool {
    let name = dir.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.ends_with(".orlop") || rustix::fs::getxattr(dir, "user.delegate", &mut [0; 8][..]).is_ok()
}

pub(super) fn has_controller(root: &Path, name: &str) -> bool {
    let text = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    text.split_whitespace().any(|one| one == name)
}

/// Makes every directory on the way and hands the controllers down to it.
pub(super) fn create(root: &Path, path: &Path) -> Result<()> {
    let mut dir = root.to_owned();
    for part in path.components() {
        hand_down(&dir)?;
        dir.push(part);
        match fs::create_dir(&dir) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                return Err(error).during("mkdir", dir.display());
            }
            _ => {}
        }
    }
    Ok(())
}

/// Hands controllers down to a group that is there, as far as that is allowed: a user has the tree of his own service manager.
pub(super) fn hand_down_to(root: &Path, path: &Path) {
    let mut dir = root.to_owned();
    for part in path.components() {
        let _ = hand_down(&dir); // Whoever needs the controller hears that it is not there.
        dir.push(part);
    }
}

fn hand_down(dir: &Path) -> Result<()> {
    let has = fs::read_to_string(dir.join("cgroup.controllers")).unwrap_or_default();
    let given = fs::read_to_string(dir.join("cgroup.subtree_control")).unwrap_or_default();
    for name in CONTROLLERS {
        let present = |text: &str| text.split_whitespace().any(|one| one == *name);
        if present(&has) && !present(&given) {
            write(&dir.join("cgroup.subtree_control"), &format!("+{name}"))?;
        }
    }
    Ok(())
}

pub(super) fn set(dir: &Path, limits: &Limits) -> Result<()> {
    let set = |name: &str, value: Option<String>| value.map_or(Ok(()), |value| write(&dir.join(name), &value));
    let max = |value: i64| if value < 0 { "max".to_owned() } else { value.to_string() };
    set("cpu.weight", limits.cpu_shares.filter(|shares| *shares > 0).map(|shares| weight(shares).to_string()))?;
    if limits.cpu_quota_us.is_some() || limits.cpu_period_us.is_some() {
        set("cpu.max", Some(cpu_max(dir, limits)))?;
    }
    set("cpuset.cpus", limits.cpuset_cpus.clone().filter(|cpus| !cpus.is_empty()))?;
    set("cpuset.mems", limits.cpuset_mems.clone().filter(|mems| !mems.is_empty()))?;
    if limits.checks_usage {
        check_usage(dir, limits)?;
    }
    set("memory.max", limits.memory_bytes.map(max))?;
    set("memory.min", limits.memory_min_bytes.map(|bytes| bytes.to_string()))?;
    if dir.join("memory.swap.max").exists() {
        set("memory.swap.max", limits.memory_swap_bytes.map(|both| max(swap_only(both, limits.memory_bytes))))?;
    }
    set("pids.max", limits.pids.map(max))?;
    for (size, bytes) in &limits.hugepages {
        set(&format!("hugetlb.{size}.max"), Some(bytes.to_string()))?;
        // With this, who maps too many is told so, and not killed when it touches them.
        let reserved = format!("hugetlb.{size}.rsvd.max");
        if dir.join(&reserved).exists() {
            set(&reserved, Some(bytes.to_string()))?;
        }
    }
    set("memory.low", limits.memory_reservation_bytes.map(max))?;
    set("cpu.max.burst", limits.cpu_burst_us.map(|burst| burst.to_string()))?;
    set("cpu.idle", limits.cpu_idle.map(|idle| idle.to_string()))?;
    set_io(dir, limits)?;
    limits.rdma.iter().try_for_each(|device| write(&dir.join("rdma.max"), &super::rdma_line(device)))?;
    limits.unified.iter().try_for_each(|(name, value)| write(&dir.join(name), value))
}

/// Version 1 refuses by itself what this one enforces by killing.
fn check_usage(dir: &Path, limits: &Limits) -> Result<()> {
    let wanted = limits.memory_bytes.and_then(|bytes| u64::try_from(bytes).ok());
    let used = number(&dir.join("memory.current")).unwrap_or(0);
    match wanted.filter(|wanted| *wanted < used) {
        None => Ok(()),
        Some(wanted) => {
            let subject = format!("{wanted} to {}, below the {used} bytes in use", dir.join("memory.max").display());
            Err(Error { call: "write", subject, errno: rustix::io::Errno::BUSY })
        }
    }
}

/// The weight goes to the scheduler BFQ where the kernel has it, in its own scale, else to the controller's cost model:
/// version 1's 10 to 1000 become 1 to 10000, as runc and crun have it.
fn set_io(dir: &Path, limits: &Limits) -> Result<()> {
    let bfq = dir.join("io.bfq.weight");
    let (file, has_bfq) = if bfq.exists() { (bfq, true) } else { (dir.join("io.weight"), false) };
    let scaled = |weight: u16| {
        let weight = u64::from(weight);
        if has_bfq { weight } else { 1 + (weight.max(10) - 10) * 9999 / 990 }
    };
    if let Some(weight) = limits.io_weight.filter(|weight| *weight > 0) {
        write(&file, &scaled(weight).to_string())?;
    }
    for ((major, minor), weight) in &limits.io_weights {
        write(&file, &format!("{major}:{minor} {}", scaled(*weight)))?;
    }
    limits.io_limits.iter().try_for_each(|limit| {
        let name = match limit.kind {
            IoLimitKind::ReadBytes => "rbps",
            IoLimitKind::WriteBytes => "wbps",
            IoLimitKind::Reads => "riops",
            IoLimitKind::Writes => "wiops",
        };
        let rate = if limit.rate == 0 { "max".to_owned() } else { limit.rate.to_string() };
        let (major, minor) = limit.device;
        write(&dir.join("io.max"), &format!("{major}:{minor} {name}={rate}"))
    })
}

/// Version 1's shares (2 to 262144, 1024 is one CPU) as version 2's weight (1 to 10000, 100 is the default), by the
/// curve that runc, crun and the kubelet agreed on in 2025 so that 1024 becomes 100.
pub(super) fn weight(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    #[expect(clippy::cast_precision_loss, reason = "below 2^18")]
    let l = (shares as f64).log2();
    let exponent = (l * l + 125.0 * l) / 612.0 - 7.0 / 34.0;
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between 1 and 10000")]
    let weight = 10f64.powf(exponent).ceil() as u64;
    weight.clamp(1, 10_000)
}

/// Version 1 limits memory and swap together, version 2 swap alone.
pub(super) fn swap_only(both: i64, memory: Option<i64>) -> i64 {
    if both < 0 { -1 } else { both.saturating_sub(memory.unwrap_or(0).max(0)).max(0) }
}

fn cpu_max(dir: &Path, limits: &Limits) -> String {
    let now = fs::read_to_string(dir.join("cpu.max")).unwrap_or_default();
    let mut now = now.split_whitespace();
    let (quota_now, period_now) = (now.next().unwrap_or("max"), now.next().unwrap_or("100000"));
    let quota = limits
        .cpu_quota_us
        .map_or(quota_now.to_owned(), |quota| if quota <= 0 { "max".to_owned() } else { quota.to_string() });
    let period =
        limits.cpu_period_us.filter(|period| *period > 0).map_or(period_now.to_owned(), |period| period.to_string());
    format!("{quota} {period}")
}

/// The kernel tells of changes of `cgroup.events` (POLLPRI).
pub(super) fn wait_until_frozen(dir: &Path, frozen: bool, deadline: Instant) -> Result<bool> {
    let path = dir.join("cgroup.events");
    let mut file = fs::File::open(&path).during("open", path.display())?;
    loop {
        let mut text = String::new();
        file.seek(SeekFrom::Start(0)).and_then(|_| file.read_to_string(&mut text)).during("read", path.display())?;
        let state = text.lines().find_map(|line| line.strip_prefix("frozen "));
        if state == Some(if frozen { "1" } else { "0" }) {
            return Ok(true);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&file, PollFlags::PRI)], limit.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).during("poll", path.display()),
        }
    }
}

/// `cgroup.kill` (Linux 5.14), else freeze and signal.
pub(super) fn kill(dir: &Path) -> Result<()> {
    if !dir.is_dir() {
        return Ok(());
    }
    let file = dir.join("cgroup.kill");
    if file.exists() {
        return write(&file, "1");
    }
    write(&dir.join("cgroup.freeze"), "1")?;
    let killed = kill_each(dir);
    write(&dir.join("cgroup.freeze"), "0").and(killed)
}

/// The kernel knows, of the groups below too.
/// A group that is not there has nobody in it; one that cannot be asked may have.
pub(super) fn is_populated(dir: &Path) -> bool {
    match fs::read_to_string(dir.join("cgroup.events")) {
        Ok(text) => text.lines().any(|line| line == "populated 1"),
        Err(error) => error.kind() != ErrorKind::NotFound && !is_gone(&error),
    }
}

/// It went while it was asked.
fn is_gone(error: &std::io::Error) -> bool {
    rustix::io::Errno::from_io_error(error) == Some(rustix::io::Errno::NODEV)
}

pub(super) fn oom_kills(dir: &Path) -> u64 {
    keyed(&dir.join("memory.events"), "oom_kill").unwrap_or(0)
}

pub(super) fn allow_devices(dir: &Path, rules: &[DeviceRule]) -> Result<()> {
    crate::device_filter::attach(dir, rules)
}

pub(super) fn stats(dir: &Path) -> Stats {
    let pressure = |name: &str| Pressure::read(&dir.join(name));
    Stats {
        cpu: cpu(dir),
        memory: memory(dir),
        pids: PidStats { count: number(&dir.join("pids.current")).unwrap_or(0), limit: number(&dir.join("pids.max")) },
        memory_pressure: pressure("memory.pressure"),
        cpu_pressure: pressure("cpu.pressure"),
        io_pressure: pressure("io.pressure"),
    }
}

fn cpu(dir: &Path) -> CpuStats {
    let stat = Keyed::read(&dir.join("cpu.stat"));
    let stat = |key: &str| stat.get(key).unwrap_or(0);
    let max = fs::read_to_string(dir.join("cpu.max")).unwrap_or_default();
    let limit = max.trim().split_once(' ').and_then(|(quota, period)| {
        let (quota, period): (u64, u64) = (quota.parse().ok()?, period.parse().ok()?);
        (quota * 1000).checked_div(period)
    });
    CpuStats {
        usage_ns: stat("usage_usec") * 1000,
        user_ns: stat("user_usec") * 1000,
        system_ns: stat("system_usec") * 1000,
        periods: stat("nr_periods"),
        throttled_periods: stat("nr_throttled"),
        throttled_ns: stat("throttled_usec") * 1000,
        limit_milli: limit,
    }
}

fn memory(dir: &Path) -> MemoryStats {
    let (stat, events) = (Keyed::read(&dir.join("memory.stat")), Keyed::read(&dir.join("memory.events")));
    let stat = |key: &str| stat.get(key).unwrap_or(0);
    let usage = number(&dir.join("memory.current")).unwrap_or(0);
    MemoryStats {
        usage_bytes: usage,
        working_set_bytes: usage.saturating_sub(stat("inactive_file")),
        rss_bytes: stat("anon"),
        page_faults: stat("pgfault"),
        major_page_faults: stat("pgmajfault"),
        swap_bytes: number(&dir.join("memory.swap.current")).unwrap_or(0),
        swap_limit_bytes: number(&dir.join("memory.swap.max")),
        limit_bytes: number(&dir.join("memory.max")),
        oom_kills: events.get("oom_kill").unwrap_or(0),
        cache_bytes: stat("file"),
        mapped_file_bytes: stat("file_mapped"),
        active_file_bytes: stat("active_file"),
        inactive_file_bytes: stat("inactive_file"),
        kernel_bytes: stat("kernel"),
        peak_bytes: number(&dir.join("memory.peak")),
        limit_hits: events.get("max").unwrap_or(0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_become_weights() {
        for (shares, expect) in [(2, 1), (1024, 100), (262_144, 10_000)] {
            assert_eq!(weight(shares), expect, "{shares} shares");
        }
    }

    #[test]
    fn devices_have_weights_of_their_own() {
        let dir = tempfile::tempdir().unwrap();
        let limits = Limits { io_weights: vec![((8, 16), 100)], ..Limits::default() };
        let written = |name: &str| fs::read_to_string(dir.path().join(name)).ok();
        set(dir.path(), &limits).unwrap();
        assert_eq!(written("io.weight").as_deref(), Some("8:16 910"));
        fs::write(dir.path().join("io.bfq.weight"), "").unwrap();
        set(dir.path(), &limits).unwrap();
        assert_eq!(written("io.bfq.weight").as_deref(), Some("8:16 100"));
    }

    #[test]
    fn a_limit_below_what_is_in_use_is_refused_where_that_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("memory.current"), "1000\n").unwrap();
        let set = |bytes, checks_usage| {
            set(dir.path(), &Limits { memory_bytes: Some(bytes), checks_usage, ..Limits::default() })
        };
        let error = set(999, true).unwrap_err();
        assert_eq!(error.errno, rustix::io::Errno::BUSY);
        assert!(error.to_string().contains("below the 1000 bytes in use"), "{error}");
        for (bytes, checks) in [(999, false), (1000, true), (-1, true)] {
            set(bytes, checks).unwrap();
        }
    }

    #[test]
    fn swap_is_what_exceeds_memory() {
        assert_eq!(swap_only(100, Some(100)), 0);
        assert_eq!(swap_only(150, Some(100)), 50);
        assert_eq!(swap_only(-1, Some(100)), -1);
    }
}
