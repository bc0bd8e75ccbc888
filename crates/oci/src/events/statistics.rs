//! What a container uses, in the fields of `runc events` (runc's `types/events.go`): a number that is zero is left out where
//! it is there.

use std::collections::BTreeMap;

use serde::Serialize;
use sys::cgroup::{self, CpuStats, Details, PidStats};

#[derive(Debug, Serialize)]
pub(super) struct Statistics {
    cpu: Cpu,
    cpuset: Cpuset,
    memory: Memory,
    pids: Pids,
    blkio: Blkio,
    hugetlb: BTreeMap<String, Hugepages>,
    /// There are none: `intelRdt` is refused.
    intel_rdt: Empty,
    /// Those that an older runc made for a container.
    network_interfaces: Option<Empty>,
}

impl Statistics {
    pub(super) fn of(details: &Details) -> Self {
        let totals = &details.totals;
        Self {
            cpu: Cpu::of(details),
            cpuset: Cpuset::of(&details.cpuset),
            memory: Memory::of(details),
            pids: Pids::of(totals.pids),
            blkio: Blkio::of(details),
            hugetlb: details.hugepages.iter().map(|(size, charge)| (size.clone(), Hugepages::of(charge))).collect(),
            intel_rdt: Empty {},
            network_interfaces: None,
        }
    }
}

#[derive(Debug, Serialize)]
struct Empty {}

/// Whether runc would leave it out.
fn is_empty<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

#[derive(Debug, Serialize)]
struct Cpu {
    #[serde(skip_serializing_if = "is_empty")]
    usage: CpuUsage,
    #[serde(skip_serializing_if = "is_empty")]
    throttling: Throttling,
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<Pressure>,
}

/// In nanoseconds.
#[derive(Debug, Default, PartialEq, Serialize)]
struct CpuUsage {
    #[serde(skip_serializing_if = "is_empty")]
    total: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    percpu: Vec<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    percpu_kernel: Vec<u64>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    percpu_user: Vec<u64>,
    kernel: u64,
    user: u64,
}

#[derive(Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Throttling {
    #[serde(skip_serializing_if = "is_empty")]
    periods: u64,
    #[serde(skip_serializing_if = "is_empty")]
    throttled_periods: u64,
    #[serde(skip_serializing_if = "is_empty")]
    throttled_time: u64,
}

impl Cpu {
    fn of(details: &Details) -> Self {
        let CpuStats { usage_ns, user_ns, system_ns, periods, throttled_periods, throttled_ns, .. } =
            details.totals.cpu;
        let processors = details.processors.clone();
        Self {
            usage: CpuUsage {
                total: usage_ns,
                percpu: processors.usage_ns,
                percpu_kernel: processors.system_ns,
                percpu_user: processors.user_ns,
                kernel: system_ns,
                user: user_ns,
            },
            throttling: Throttling { periods, throttled_periods, throttled_time: throttled_ns },
            psi: details.totals.cpu_pressure.map(Pressure::of),
        }
    }
}

#[derive(Debug, Serialize)]
struct Cpuset {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    cpus: Vec<u16>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    mems: Vec<u16>,
    /// There in version 2, too, where none of them is.
    #[serde(flatten)]
    values: BTreeMap<&'static str, i64>,
}

impl Cpuset {
    fn of(set: &cgroup::Cpuset) -> Self {
        let mut values: BTreeMap<&'static str, i64> = cgroup::CPUSET_VALUES.iter().map(|name| (*name, 0)).collect();
        values.extend(set.values.iter().copied());
        Self { cpus: set.cpus.clone(), mems: set.mems.clone(), values }
    }
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Memory {
    #[serde(skip_serializing_if = "is_empty")]
    cache: u64,
    #[serde(skip_serializing_if = "is_empty")]
    usage: Charge,
    /// And memory.
    #[serde(skip_serializing_if = "is_empty")]
    swap: Charge,
    #[serde(skip_serializing_if = "is_empty")]
    kernel: Charge,
    #[serde(rename = "kernelTCP", skip_serializing_if = "is_empty")]
    kernel_tcp: Charge,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    raw: BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<Pressure>,
}

#[derive(Debug, Default, PartialEq, Serialize)]
struct Charge {
    limit: u64,
    #[serde(skip_serializing_if = "is_empty")]
    usage: u64,
    #[serde(skip_serializing_if = "is_empty")]
    max: u64,
    failcnt: u64,
}

impl Charge {
    fn of(charge: &cgroup::Charge) -> Self {
        Self { limit: charge.limit, usage: charge.usage, max: charge.peak, failcnt: charge.failures }
    }
}

impl Memory {
    fn of(details: &Details) -> Self {
        let raw: BTreeMap<String, u64> = details.memory_stat.iter().cloned().collect();
        Self {
            // Pages of files are `cache` in version 1, `file` in version 2.
            cache: raw.get("cache").or(raw.get("file")).copied().unwrap_or(0),
            usage: Charge::of(&details.memory),
            swap: Charge::of(&details.memory_and_swap),
            kernel: Charge::of(&details.kernel),
            kernel_tcp: Charge::of(&details.kernel_tcp),
            raw,
            psi: details.totals.memory_pressure.map(Pressure::of),
        }
    }
}

#[derive(Debug, Serialize)]
struct Pids {
    #[serde(skip_serializing_if = "is_empty")]
    current: u64,
    #[serde(skip_serializing_if = "is_empty")]
    limit: u64,
}

impl Pids {
    fn of(pids: PidStats) -> Self {
        Self { current: pids.count, limit: pids.limit.unwrap_or(0) }
    }
}

/// Each count, with `psi` beside them.
#[derive(Debug, Serialize)]
struct Blkio {
    #[serde(flatten)]
    counts: BTreeMap<&'static str, Vec<IoEntry>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<Pressure>,
}

#[derive(Debug, Serialize)]
struct IoEntry {
    #[serde(skip_serializing_if = "is_empty")]
    major: u64,
    #[serde(skip_serializing_if = "is_empty")]
    minor: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    op: String,
    #[serde(skip_serializing_if = "is_empty")]
    value: u64,
}

impl Blkio {
    fn of(details: &Details) -> Self {
        let counts = details.io.iter().filter(|(_, entries)| !entries.is_empty());
        let counts = counts
            .filter_map(|(count, entries)| Some((name_of_count(count)?, entries.iter().map(IoEntry::of).collect())));
        Self { counts: counts.collect(), psi: details.totals.io_pressure.map(Pressure::of) }
    }
}

fn name_of_count(kernel: &str) -> Option<&'static str> {
    Some(match kernel {
        "io_service_bytes" => "ioServiceBytesRecursive",
        "io_serviced" => "ioServicedRecursive",
        "io_queued" => "ioQueueRecursive",
        "io_service_time" => "ioServiceTimeRecursive",
        "io_wait_time" => "ioWaitTimeRecursive",
        "io_merged" => "ioMergedRecursive",
        "time" => "ioTimeRecursive",
        "sectors" => "sectorsRecursive",
        _ => return None,
    })
}

impl IoEntry {
    fn of(entry: &cgroup::IoEntry) -> Self {
        let cgroup::IoEntry { major, minor, operation, value } = entry.clone();
        Self { major, minor, op: operation, value }
    }
}

#[derive(Debug, Serialize)]
struct Hugepages {
    #[serde(skip_serializing_if = "is_empty")]
    usage: u64,
    #[serde(skip_serializing_if = "is_empty")]
    max: u64,
    failcnt: u64,
}

impl Hugepages {
    fn of(charge: &cgroup::Charge) -> Self {
        Self { usage: charge.usage, max: charge.peak, failcnt: charge.failures }
    }
}

/// How long somebody waited for it: shares of time in percent, and microseconds.
#[derive(Debug, Serialize)]
struct Pressure {
    #[serde(skip_serializing_if = "is_empty")]
    some: Waited,
    #[serde(skip_serializing_if = "is_empty")]
    full: Waited,
}

#[derive(Debug, Default, PartialEq, Serialize)]
struct Waited {
    avg10: f64,
    avg60: f64,
    avg300: f64,
    total: u64,
}

impl Pressure {
    fn of(pressure: cgroup::Pressure) -> Self {
        let waited = |([avg10, avg60, avg300], total): ([f64; 3], u64)| Waited { avg10, avg60, avg300, total };
        Self { some: waited(pressure.some), full: waited(pressure.full) }
    }
}
