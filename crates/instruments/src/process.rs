//! The daemon as a process, under the names that all Prometheus clients use.

use std::fs;

use crate::Text;

/// Of proc_pid_stat(5): a tick is a hundredth of a second on every machine that Linux runs on.
const TICKS_PER_SECOND: u64 = 100;

/// What the kernel knows of this process.
#[derive(Debug, Default, PartialEq, Eq)]
struct Process {
    cpu_ticks: u64,
    start_ticks: u64,
    virtual_bytes: u64,
}

impl Process {
    /// proc_pid_stat(5). The name in parentheses may hold anything.
    fn parse(stat: &str) -> Option<Self> {
        let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        // The first one here is the third of the manual page.
        let number = |place: usize| fields.get(place - 3)?.parse::<u64>().ok();
        Some(Self { cpu_ticks: number(14)? + number(15)?, start_ticks: number(22)?, virtual_bytes: number(23)? })
    }
}

/// What the kernel knows of this process.
#[expect(clippy::cast_precision_loss, reason = "times for people and dashboards")]
pub fn write(text: &mut Text) {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let process = Process::parse(&read("/proc/self/stat")).unwrap_or_default();
    let seconds = |ticks: u64| ticks as f64 / TICKS_PER_SECOND as f64;
    let resident = resident_kilobytes(&read("/proc/self/status")) * 1024;
    text.single(
        "process_cpu_seconds_total",
        "counter",
        "Total user and system CPU time spent in seconds.",
        seconds(process.cpu_ticks),
    );
    text.single("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", resident);
    text.single("process_virtual_memory_bytes", "gauge", "Virtual memory size in bytes.", process.virtual_bytes);
    let booted = booted(&read("/proc/stat"));
    text.single(
        "process_start_time_seconds",
        "gauge",
        "Start time of the process since unix epoch in seconds.",
        booted as f64 + seconds(process.start_ticks),
    );
    let open = fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count().saturating_sub(1));
    text.single("process_open_fds", "gauge", "Number of open file descriptors.", open);
    let limit = sys::rustix::process::getrlimit(sys::rustix::process::Resource::Nofile).current;
    text.single("process_max_fds", "gauge", "Maximum number of open file descriptors.", limit.unwrap_or(u64::MAX));
}

/// When this process began, seconds since 1970.
pub fn started_s() -> u64 {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let process = Process::parse(&read("/proc/self/stat")).unwrap_or_default();
    booted(&read("/proc/stat")) + process.start_ticks / TICKS_PER_SECOND
}

/// Of proc_pid_status(5).
fn resident_kilobytes(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Seconds since 1970.
fn booted(stat: &str) -> u64 {
    stat.lines().find_map(|line| line.strip_prefix("btime ")?.trim().parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_may_hold_anything() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 150 50 5 6 20 0 3 0 1234 8192 99 184467";
        let expect = Process { cpu_ticks: 200, start_ticks: 1234, virtual_bytes: 8192 };
        assert_eq!(Process::parse(stat), Some(expect));
        assert_eq!(resident_kilobytes("Name:\ta\nVmRSS:\t    1234 kB\n"), 1234);
        assert_eq!(booted("cpu 1\nbtime 1700000000\n"), 1_700_000_000);
    }
}
