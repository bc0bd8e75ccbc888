//! What a group has used, file by file: all that the kernel counts, for who asks by hand. What a node asks for time and again
//! is in [`Stats`].

use std::fs;
use std::path::{Path, PathBuf};

use super::stats::io_v2;
use super::v1::root_of;
use super::{IoStats, Stats, keyed};

/// A snapshot; what the kernel does not say is zero or empty.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Details {
    /// Its sums.
    pub totals: Stats,
    /// CPU time of each processor (version 1 only).
    pub processors: Processors,
    /// The processors and memory nodes that it may use (version 1 only).
    pub cpuset: Cpuset,
    /// Memory.
    pub memory: Charge,
    /// Memory and swap together, in version 2 as the sum of the two, without a peak.
    pub memory_and_swap: Charge,
    /// The kernel's memory for it (version 1 only).
    pub kernel: Charge,
    /// Of this, buffers of TCP (version 1 only).
    pub kernel_tcp: Charge,
    /// The lines of `memory.stat`.
    pub memory_stat: Vec<(String, u64)>,
    /// What was read and written, by version 1's names of what is counted.
    pub io: Vec<(&'static str, Vec<IoEntry>)>,
    /// Huge pages, by their size as `2MB`.
    pub hugepages: Vec<(String, Charge)>,
}

/// Nanoseconds of CPU time, processor by processor.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Processors {
    /// Used.
    pub usage_ns: Vec<u64>,
    /// Of it in user mode.
    pub user_ns: Vec<u64>,
    /// Of it in the kernel.
    pub system_ns: Vec<u64>,
}

/// What a group may use, and how.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cpuset {
    /// Numbers of processors.
    pub cpus: Vec<u16>,
    /// Numbers of memory nodes.
    pub mems: Vec<u16>,
    /// The controller's other values, by the names of their files ([`CPUSET_VALUES`]).
    pub values: Vec<(&'static str, i64)>,
}

/// What is charged to a group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Charge {
    /// Now, in bytes.
    pub usage: u64,
    /// The most that it ever was.
    pub peak: u64,
    /// What it may be. No limit is the largest number in version 2, and what the file says in version 1.
    pub limit: u64,
    /// How often the limit was hit.
    pub failures: u64,
}

/// A count of a device.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct IoEntry {
    /// Major number of the device.
    pub major: u64,
    /// Minor number.
    pub minor: u64,
    /// `Read`, `Write`, `Sync` and so on; empty where it is not counted by what was done.
    pub operation: String,
    /// The count.
    pub value: u64,
}

/// Files of version 1's `cpuset` beside those of [`Cpuset::cpus`] and [`Cpuset::mems`].
pub const CPUSET_VALUES: [&str; 9] = [
    "cpu_exclusive",
    "mem_hardwall",
    "mem_exclusive",
    "memory_migrate",
    "memory_spread_page",
    "memory_spread_slab",
    "memory_pressure",
    "sched_load_balance",
    "sched_relax_domain_level",
];

/// What version 1's `blkio` counts.
const IO_COUNTS: [&str; 8] =
    ["io_service_bytes", "io_serviced", "io_queued", "io_service_time", "io_wait_time", "io_merged", "time", "sectors"];

/// Of a group of version 1.
pub(super) fn of_v1(roots: &[(String, PathBuf)], path: &Path, totals: Stats) -> Details {
    let dir = |controller: &str| root_of(roots, controller).map(|root| root.join(path));
    let memory = dir("memory");
    let charge = |name: &str| memory.as_deref().map(|dir| charge_v1(dir, name)).unwrap_or_default();
    Details {
        totals,
        processors: dir("cpuacct").as_deref().map(processors).unwrap_or_default(),
        cpuset: dir("cpuset").as_deref().map(cpuset).unwrap_or_default(),
        memory: charge("memory"),
        memory_and_swap: charge("memory.memsw"),
        kernel: charge("memory.kmem"),
        kernel_tcp: charge("memory.kmem.tcp"),
        memory_stat: memory.as_deref().map(memory_stat).unwrap_or_default(),
        io: dir("blkio").as_deref().map(io_of_v1).unwrap_or_default(),
        hugepages: dir("hugetlb").as_deref().map(hugepages_v1).unwrap_or_default(),
    }
}

/// Of a group of version 2.
pub(super) fn of_v2(dir: &Path, totals: Stats) -> Details {
    let memory = Charge { failures: totals.memory.limit_hits, ..charge_v2(dir, "memory") };
    let swap = charge_v2(dir, "memory.swap");
    Details {
        totals,
        memory,
        memory_and_swap: Charge {
            usage: swap.usage.saturating_add(memory.usage),
            limit: swap.limit.saturating_add(memory.limit),
            ..Charge::default()
        },
        memory_stat: memory_stat(dir),
        io: io_of_v2(&io_v2(dir)),
        hugepages: hugepages_v2(dir),
        ..Details::default()
    }
}

/// A number in a control file, the largest one for `max`.
fn value(file: PathBuf) -> Option<u64> {
    match fs::read_to_string(file).ok()?.trim() {
        "max" => Some(u64::MAX),
        text => text.parse().ok(),
    }
}

fn processors(dir: &Path) -> Processors {
    let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
    let usage_ns = read("cpuacct.usage_percpu").split_whitespace().filter_map(|text| text.parse().ok()).collect();
    let (user_ns, system_ns) = parse_usage_all(&read("cpuacct.usage_all"));
    Processors { usage_ns, user_ns, system_ns }
}

/// `cpu user system` for each processor, below a line with these words.
fn parse_usage_all(text: &str) -> (Vec<u64>, Vec<u64>) {
    let line = |line: &str| {
        let mut numbers = line.split(' ').skip(1).map(str::parse::<u64>);
        Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
    };
    text.lines().filter_map(line).unzip()
}

fn cpuset(dir: &Path) -> Cpuset {
    let read = |name: &str| fs::read_to_string(dir.join(format!("cpuset.{name}"))).unwrap_or_default();
    let number = |name: &str| read(name).trim().parse().unwrap_or(0);
    Cpuset {
        cpus: parse_list(read("cpus").trim()),
        mems: parse_list(read("mems").trim()),
        values: CPUSET_VALUES.iter().map(|name| (*name, number(name))).collect(),
    }
}

/// `0-2,5`.
fn parse_list(text: &str) -> Vec<u16> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<u16>().ok()?..=last.parse().ok()?)
    };
    text.split(',').filter_map(range).flatten().collect()
}

fn charge_v1(dir: &Path, name: &str) -> Charge {
    let value = |what: &str| value(dir.join(format!("{name}.{what}"))).unwrap_or(0);
    Charge {
        usage: value("usage_in_bytes"),
        peak: value("max_usage_in_bytes"),
        limit: value("limit_in_bytes"),
        failures: value("failcnt"),
    }
}

fn charge_v2(dir: &Path, name: &str) -> Charge {
    let value = |what: &str| value(dir.join(format!("{name}.{what}"))).unwrap_or(0);
    Charge { usage: value("current"), peak: value("peak"), limit: value("max"), failures: 0 }
}

fn memory_stat(dir: &Path) -> Vec<(String, u64)> {
    let text = fs::read_to_string(dir.join("memory.stat")).unwrap_or_default();
    let line = |line: &str| {
        let (name, value) = line.split_once(' ')?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// Each count by whoever has it: the scheduler BFQ, the one before it (until Linux 5.0), or the limits of devices, which count
/// what is below a group apart since Linux 4.20.
fn io_of_v1(dir: &Path) -> Vec<(&'static str, Vec<IoEntry>)> {
    let entries = |name: &&'static str| {
        let files = [
            format!("blkio.bfq.{name}_recursive"),
            format!("blkio.{name}_recursive"),
            format!("blkio.throttle.{name}_recursive"),
            format!("blkio.throttle.{name}"),
        ];
        let read = |file: String| parse_io_v1(&fs::read_to_string(dir.join(file)).ok()?);
        Some((*name, files.into_iter().find_map(read)?))
    };
    IO_COUNTS.iter().filter_map(entries).collect()
}

/// `8:0 Read 1`, or `8:0 1`; a total at the end. Nothing without a device.
fn parse_io_v1(text: &str) -> Option<Vec<IoEntry>> {
    let entry = |line: &str| {
        let (device, rest) = line.split_once(' ')?;
        let (major, minor) = device.split_once(':')?;
        let (operation, value) = rest.split_once(' ').unwrap_or(("", rest));
        let operation = operation.to_owned();
        Some(IoEntry { major: major.parse().ok()?, minor: minor.parse().ok()?, operation, value: value.parse().ok()? })
    };
    Some(text.lines().filter_map(entry).collect()).filter(|entries: &Vec<_>| !entries.is_empty())
}

fn io_of_v2(devices: &[IoStats]) -> Vec<(&'static str, Vec<IoEntry>)> {
    let count = |count: fn(&IoStats) -> [u64; 2]| -> Vec<IoEntry> {
        let of = |device: &IoStats| {
            let (major, minor) = (device.major.into(), device.minor.into());
            let [reads, writes] = count(device);
            [("Read", reads), ("Write", writes)].map(|(operation, value)| IoEntry {
                major,
                minor,
                operation: operation.to_owned(),
                value,
            })
        };
        devices.iter().flat_map(of).collect()
    };
    vec![
        ("io_service_bytes", count(|device| [device.read_bytes, device.write_bytes])),
        ("io_serviced", count(|device| [device.reads, device.writes])),
    ]
}

/// Reservations where the kernel counts them, as they are what is limited: what is mapped, touched or not.
fn hugepages_v1(dir: &Path) -> Vec<(String, Charge)> {
    let charge = |size: String| {
        let reserved = format!("hugetlb.{size}.rsvd");
        let has_reserved = dir.join(format!("{reserved}.usage_in_bytes")).exists();
        let charge = charge_v1(dir, &if has_reserved { reserved } else { format!("hugetlb.{size}") });
        (size, charge)
    };
    sizes(dir, ".usage_in_bytes").into_iter().map(charge).collect()
}

fn hugepages_v2(dir: &Path) -> Vec<(String, Charge)> {
    let charge = |size: String| {
        let usage = |name: String| value(dir.join(name));
        let reserved = usage(format!("hugetlb.{size}.rsvd.current"));
        let usage = reserved.or_else(|| usage(format!("hugetlb.{size}.current"))).unwrap_or(0);
        let failures = keyed(&dir.join(format!("hugetlb.{size}.events")), "max").unwrap_or(0);
        (size, Charge { usage, failures, ..Charge::default() })
    };
    sizes(dir, ".current").into_iter().map(charge).collect()
}

/// The sizes of huge pages that a group has files of.
fn sizes(dir: &Path, suffix: &str) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let size = |entry: fs::DirEntry| {
        let name = entry.file_name().into_string().ok()?;
        let size = name.strip_prefix("hugetlb.")?.strip_suffix(suffix)?;
        (!size.contains('.')).then(|| size.to_owned())
    };
    entries.filter_map(size).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_have_ranges() {
        assert_eq!(parse_list("0-2,5"), [0, 1, 2, 5]);
        assert_eq!(parse_list(""), []);
        assert_eq!(parse_list("3"), [3]);
    }

    #[test]
    fn times_are_by_processor() {
        let (user, system) = parse_usage_all("cpu user system\n0 12 3\n1 0 4\n");
        assert_eq!((user, system), (vec![12, 0], vec![3, 4]));
    }

    #[test]
    fn counts_of_version_1_are_the_first_that_there_are() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("blkio.throttle.io_serviced_recursive", "Total 0\n");
        write("blkio.throttle.io_serviced", "254:0 Read 2\n254:0 Total 2\nTotal 2\n");
        write("blkio.bfq.sectors_recursive", "8:1 7\n");
        write("blkio.sectors_recursive", "8:1 9\n");
        let entry = |device: (u64, u64), operation: &str, value| IoEntry {
            major: device.0,
            minor: device.1,
            operation: operation.to_owned(),
            value,
        };
        let serviced = vec![entry((254, 0), "Read", 2), entry((254, 0), "Total", 2)];
        assert_eq!(io_of_v1(dir.path()), [("io_serviced", serviced), ("sectors", vec![entry((8, 1), "", 7)])]);
    }

    #[test]
    fn huge_pages_count_what_is_reserved() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        write("hugetlb.2MB.current", "1\n");
        write("hugetlb.2MB.rsvd.current", "2\n");
        write("hugetlb.2MB.events", "max 3\n");
        let expect = Charge { usage: 2, failures: 3, ..Charge::default() };
        assert_eq!(hugepages_v2(dir.path()), [("2MB".to_owned(), expect)]);
    }
}
