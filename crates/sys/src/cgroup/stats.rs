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
    /// Of what is charged, pages of files.
    pub cache_bytes: u64,
    /// Of these, pages that processes have mapped.
    pub mapped_file_bytes: u64,
    /// Pages of files that were used lately.
    pub active_file_bytes: u64,
    /// Pages of files that can be dropped first.
    pub inactive_file_bytes: u64,
    /// The kernel's own memory for the group.
    pub kernel_bytes: u64,
    /// The most that was ever charged, where the kernel knows it.
    pub peak_bytes: Option<u64>,
    /// How often the limit was hit.
    pub limit_hits: u64,
}

/// What a group has read from and written to a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct IoStats {
    /// Major number of the device.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Reads.
    pub reads: u64,
    /// Writes.
    pub writes: u64,
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
    /// Of the whole machine: `cpu`, `memory` or `io`. None where the kernel does not measure it.
    pub fn of_machine(what: &str) -> Option<Self> {
        Self::read(&Path::new("/proc/pressure").join(what))
    }

    /// Reads a pressure file.
    pub(super) fn read(file: &Path) -> Option<Self> {
        let text = fs::read_to_string(file).ok()?;
        let line = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).and_then(parse_line);
        Some(Self { some: line("some ")?, full: line("full ").unwrap_or_default() })
    }
}

/// The devices of `io.stat`, version 2: `8:0 rbytes=1 wbytes=2 rios=3 wios=4 …`.
pub(super) fn io_v2(dir: &Path) -> Vec<IoStats> {
    fs::read_to_string(dir.join("io.stat")).unwrap_or_default().lines().filter_map(parse_io_v2).collect()
}

fn parse_io_v2(line: &str) -> Option<IoStats> {
    let (device, rest) = line.split_once(' ')?;
    let (major, minor) = device.split_once(':')?;
    let field = |name: &str| {
        let value = rest.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
        value.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    Some(IoStats {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        read_bytes: field("rbytes"),
        write_bytes: field("wbytes"),
        reads: field("rios"),
        writes: field("wios"),
    })
}

/// Adds the lines of a file of `blkio`, version 1, to the devices: `8:0 Read 1`.
pub(super) fn add_io_v1(text: &str, devices: &mut Vec<IoStats>, put: fn(&mut IoStats, bool, u64)) {
    for line in text.lines() {
        let mut words = line.split(' ');
        let number = |text: &str| text.parse::<u32>().ok();
        let device = words.next().and_then(|device| device.split_once(':'));
        let Some((Some(major), Some(minor))) = device.map(|(major, minor)| (number(major), number(minor))) else {
            continue;
        };
        let writes = match words.next() {
            Some("Read") => false,
            Some("Write") => true,
            _ => continue,
        };
        let Some(value) = words.next().and_then(|value| value.parse().ok()) else { continue };
        let at = devices.iter().position(|one| (one.major, one.minor) == (major, minor)).unwrap_or_else(|| {
            devices.push(IoStats { major, minor, ..IoStats::default() });
            devices.len() - 1
        });
        put(&mut devices[at], writes, value);
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
    fn io_of_both_versions() {
        let two = parse_io_v2("8:16 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6");
        let expect = IoStats { major: 8, minor: 16, read_bytes: 1, write_bytes: 2, reads: 3, writes: 4 };
        assert_eq!(two, Some(expect));
        let mut one = Vec::new();
        let bytes = "8:16 Read 1\n8:16 Write 2\n8:16 Sync 9\n7:0 Read 7\nTotal 3\n";
        add_io_v1(bytes, &mut one, |io, writes, value| {
            *(if writes { &mut io.write_bytes } else { &mut io.read_bytes }) = value
        });
        add_io_v1("8:16 Read 3\n8:16 Write 4\n", &mut one, |io, writes, value| {
            *(if writes { &mut io.writes } else { &mut io.reads }) = value;
        });
        assert_eq!(one, [expect, IoStats { major: 7, read_bytes: 7, ..IoStats::default() }]);
    }

    #[test]
    fn pressure_lines() {
        let parsed = parse_line("avg10=1.50 avg60=0.25 avg300=0.00 total=12345");
        assert_eq!(parsed, Some(([1.5, 0.25, 0.0], 12345)));
        assert_eq!(parse_line("avg10=x"), None);
    }
}
