//! What a group uses.

use std::fs;
use std::path::Path;

/// A snapshot; what the kernel does not say is zero or `None`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    /// CPU time.
    pub cpu: CpuStats,
    /// Memory.
    pub memory: MemoryStats,
    /// Processes and threads.
    pub pids: PidStats,
    /// Pressure of memory, where the kernel measures it.
    pub memory_pressure: Option<Pressure>,
    /// Pressure of CPU.
    pub cpu_pressure: Option<Pressure>,
    /// Pressure of input and output.
    pub io_pressure: Option<Pressure>,
}

/// CPU time of a group since it was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuStats {
    /// Used, in nanoseconds.
    pub usage_ns: u64,
    /// Of it in user mode.
    pub user_ns: u64,
    /// Of it in the kernel.
    pub system_ns: u64,
    /// Periods in which the group had something to run.
    pub periods: u64,
    /// Periods in which it was held back at its quota.
    pub throttled_periods: u64,
    /// Time it was held back, in nanoseconds.
    pub throttled_ns: u64,
    /// Its quota in thousandths of a core.
    pub limit_milli: Option<u64>,
}

/// Memory of a group in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// Charged in all.
    pub usage_bytes: u64,
    /// Charged less what could be dropped at once (inactive file pages).
    pub working_set_bytes: u64,
    /// Anonymous memory.
    pub rss_bytes: u64,
    /// Page faults.
    pub page_faults: u64,
    /// Page faults that went to disk.
    pub major_page_faults: u64,
    /// Swap used.
    pub swap_bytes: u64,
    /// The limit of swap alone.
    pub swap_limit_bytes: Option<u64>,
    /// The limit.
    pub limit_bytes: Option<u64>,
    /// Processes killed for want of memory.
    pub oom_kills: u64,
}

/// Processes and threads of a group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PidStats {
    /// Now.
    pub count: u64,
    /// The limit.
    pub limit: Option<u64>,
}

/// Pressure stall information (`/proc/pressure`, kernel document accounting/psi).
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Pressure {
    /// Some task waited: share of the last 10, 60 and 300 s in percent, and microseconds in all.
    pub some: ([f64; 3], u64),
    /// All tasks waited.
    pub full: ([f64; 3], u64),
}

impl Pressure {
    /// Reads a pressure file.
    pub(super) fn read(file: &Path) -> Option<Self> {
        let text = fs::read_to_string(file).ok()?;
        let line = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).and_then(parse_line);
        Some(Self { some: line("some ")?, full: line("full ").unwrap_or_default() })
    }
}

/// `avg10=0.00 avg60=0.00 avg300=0.00 total=0`.
fn parse_line(line: &str) -> Option<([f64; 3], u64)> {
    let field = |name: &str| line.split(' ').find_map(|word| word.strip_prefix(name));
    let average = |name: &str| field(name).and_then(|value| value.parse().ok());
    Some(([average("avg10=")?, average("avg60=")?, average("avg300=")?], field("total=")?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_lines() {
        let parsed = parse_line("avg10=1.50 avg60=0.25 avg300=0.00 total=12345");
        assert_eq!(parsed, Some(([1.5, 0.25, 0.0], 12345)));
        assert_eq!(parse_line("avg10=x"), None);
    }
}
