//! Metrics of CRI (`ListMetricDescriptors`, `ListPodSandboxMetrics`): what cAdvisor would say of containers, under its
//! names. Values are whole numbers, as CRI has them.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use cri::v1;
use cri::v1::MetricType;
use sys::cgroup;

use super::open::Open;

/// Who a metric is about: the values of the labels that all have.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Subject {
    /// Name of the pod.
    pub(crate) pod: String,
    /// Its namespace.
    pub(crate) namespace: String,
    /// Name of the container; empty for what belongs to the whole pod.
    pub(crate) container: String,
    /// Id of the container, or of the sandbox.
    pub(crate) id: String,
    /// Name of the container's image.
    pub(crate) image: String,
}

/// What is known of a container.
#[derive(Debug, Clone, Default)]
pub(super) struct Known {
    /// Its control group's counters.
    pub(super) stats: cgroup::Stats,
    /// What it read and wrote, by device.
    pub(super) io: Vec<cgroup::IoStats>,
    /// How many processes it has.
    pub(super) processes: u64,
    /// What these have open; of containers only, and only if that is not too much to count.
    pub(super) open: Option<Open>,
    /// How many files its first process may have open.
    pub(super) files_max: Option<u64>,
    /// When it was started, in nanoseconds since 1970.
    pub(super) started_at: i64,
    /// The resources that it was given.
    pub(super) resources: v1::LinuxContainerResources,
    /// What it has written to its root.
    pub(super) written: Option<image::Usage>,
    /// The file system that its root is on.
    pub(super) filesystem: Option<Filesystem>,
}

/// Size of a file system.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Filesystem {
    pub(super) bytes: u64,
    pub(super) inodes: u64,
    pub(super) inodes_free: u64,
}

/// A family of metrics: all of a name.
struct Family {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    /// Labels beside the common ones.
    labels: &'static [&'static str],
    /// Values of these labels, with what is measured.
    values: fn(&Known) -> Vec<Sample>,
}

type Sample = (Vec<String>, Amount);

/// A number as the kernel counts it, and how many of these are one of the metric's unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Amount {
    value: u64,
    per: u64,
}

impl Amount {
    /// As CRI has it.
    fn whole(self) -> u64 {
        self.value / self.per
    }
}

/// As Prometheus has it.
impl std::fmt::Display for Amount {
    #[expect(clippy::cast_precision_loss, reason = "a part of a second is as good as the next")]
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.per == 1 { self.value.fmt(f) } else { (self.value as f64 / self.per as f64).fmt(f) }
    }
}

/// The labels that all have, in this order.
const LABELS: [&str; 5] = ["pod", "namespace", "container", "id", "image"];
const SECOND: u64 = 1_000_000_000;
/// Of a second in microseconds.
const SECOND_US: u64 = 1_000_000;

fn one(value: u64) -> Vec<Sample> {
    part(value, 1)
}

/// So many parts, of which `per` are a whole.
fn part(value: u64, per: u64) -> Vec<Sample> {
    vec![(Vec::new(), Amount { value, per })]
}

fn maybe(value: Option<u64>) -> Vec<Sample> {
    value.into_iter().flat_map(one).collect()
}

/// A number of the request; what was not asked for has no sample.
fn asked(value: i64) -> Vec<Sample> {
    maybe(u64::try_from(value).ok().filter(|value| *value > 0))
}

fn by_device(known: &Known, value: fn(&cgroup::IoStats) -> u64) -> Vec<Sample> {
    known.io.iter().map(|io| (vec![device(io)], Amount { value: value(io), per: 1 })).collect()
}

/// A device by its numbers, which need no look into `/sys`.
fn device(io: &cgroup::IoStats) -> String {
    format!("{}:{}", io.major, io.minor)
}

fn waiting(pressure: Option<&cgroup::Pressure>) -> Vec<Sample> {
    pressure.into_iter().flat_map(|pressure| part(pressure.some.1, SECOND_US)).collect()
}

fn stalled(pressure: Option<&cgroup::Pressure>) -> Vec<Sample> {
    pressure.into_iter().flat_map(|pressure| part(pressure.full.1, SECOND_US)).collect()
}

macro_rules! families {
    ($($kind:ident $name:literal [$($label:literal),*] $help:literal => $values:expr;)*) => {
        [$(Family { name: $name, help: $help, kind: MetricType::$kind, labels: &[$($label),*], values: $values }),*]
    };
}

const FAMILIES: &[Family] = &families! {
    Counter "container_cpu_usage_seconds_total" [] "Processor time used." => |k| part(k.stats.cpu.usage_ns, SECOND);
    Counter "container_cpu_user_seconds_total" [] "Processor time used in user mode."
        => |k| part(k.stats.cpu.user_ns, SECOND);
    Counter "container_cpu_system_seconds_total" [] "Processor time used in the kernel."
        => |k| part(k.stats.cpu.system_ns, SECOND);
    Counter "container_cpu_cfs_periods_total" [] "Periods in which there was something to run."
        => |k| one(k.stats.cpu.periods);
    Counter "container_cpu_cfs_throttled_periods_total" [] "Periods in which the quota was reached."
        => |k| one(k.stats.cpu.throttled_periods);
    Counter "container_cpu_cfs_throttled_seconds_total" [] "Time held back at the quota."
        => |k| part(k.stats.cpu.throttled_ns, SECOND);
    Gauge "container_memory_cache" [] "Bytes of files in memory." => |k| one(k.stats.memory.cache_bytes);
    Gauge "container_memory_rss" [] "Bytes of anonymous memory." => |k| one(k.stats.memory.rss_bytes);
    Gauge "container_memory_kernel_usage" [] "Bytes of the kernel for the container."
        => |k| one(k.stats.memory.kernel_bytes);
    Gauge "container_memory_mapped_file" [] "Bytes of files that are mapped."
        => |k| one(k.stats.memory.mapped_file_bytes);
    Gauge "container_memory_swap" [] "Bytes in swap." => |k| one(k.stats.memory.swap_bytes);
    Counter "container_memory_failcnt" [] "How often the memory limit was hit." => |k| one(k.stats.memory.limit_hits);
    Gauge "container_memory_usage_bytes" [] "Bytes of memory in all." => |k| one(k.stats.memory.usage_bytes);
    Gauge "container_memory_max_usage_bytes" [] "The most bytes of memory there ever were."
        => |k| maybe(k.stats.memory.peak_bytes);
    Gauge "container_memory_working_set_bytes" [] "Bytes of memory that cannot be dropped at once."
        => |k| one(k.stats.memory.working_set_bytes);
    Gauge "container_memory_total_active_file_bytes" [] "Bytes of files used lately."
        => |k| one(k.stats.memory.active_file_bytes);
    Gauge "container_memory_total_inactive_file_bytes" [] "Bytes of files that can be dropped first."
        => |k| one(k.stats.memory.inactive_file_bytes);
    Counter "container_memory_failures_total" ["failure_type", "scope"] "Page faults." => page_faults;
    Counter "container_oom_events_total" [] "Processes killed for want of memory." => |k| one(k.stats.memory.oom_kills);
    Gauge "container_fs_usage_bytes" [] "Bytes written to the root file system that are still there."
        => |k| maybe(k.written.map(|usage| usage.bytes));
    Gauge "container_fs_limit_bytes" [] "Bytes that the file system below the root holds."
        => |k| maybe(k.filesystem.map(|fs| fs.bytes));
    Gauge "container_fs_inodes_total" [] "Inodes that the file system below the root holds."
        => |k| maybe(k.filesystem.map(|fs| fs.inodes));
    Gauge "container_fs_inodes_free" [] "Inodes that are free in it."
        => |k| maybe(k.filesystem.map(|fs| fs.inodes_free));
    Counter "container_fs_reads_bytes_total" ["device"] "Bytes read." => |k| by_device(k, |io| io.read_bytes);
    Counter "container_fs_reads_total" ["device"] "Reads." => |k| by_device(k, |io| io.reads);
    Counter "container_fs_writes_bytes_total" ["device"] "Bytes written." => |k| by_device(k, |io| io.write_bytes);
    Counter "container_fs_writes_total" ["device"] "Writes." => |k| by_device(k, |io| io.writes);
    Counter "container_blkio_device_usage_total" ["device", "major", "minor", "operation"] "Bytes read and written."
        => device_usage;
    Gauge "container_processes" [] "Processes." => |k| one(k.processes);
    Gauge "container_threads" [] "Threads." => |k| one(k.stats.pids.count);
    Gauge "container_threads_max" [] "How many threads there may be; 0 means any number."
        => |k| one(k.stats.pids.limit.unwrap_or(0));
    Gauge "container_file_descriptors" [] "Files that the processes have open, up to 10000."
        => |k| maybe(k.open.map(|open| open.files));
    Gauge "container_sockets" [] "Sockets that the processes have open, of up to 10000 files." => |k| maybe(k.open.map(|open| open.sockets));
    Gauge "container_ulimits_soft" ["ulimit"] "Soft limits of the first process." => ulimits;
    Gauge "container_last_seen" [] "When this was looked at." => |_| one(now());
    Gauge "container_start_time_seconds" [] "When the container was started."
        => |k| asked(k.started_at / 1_000_000_000);
    Gauge "container_spec_cpu_period" [] "Period of the quota in microseconds." => |k| asked(k.resources.cpu_period);
    Gauge "container_spec_cpu_quota" [] "Quota in microseconds a period." => |k| asked(k.resources.cpu_quota);
    Gauge "container_spec_cpu_shares" [] "Processor time in relation to others." => |k| asked(k.resources.cpu_shares);
    Gauge "container_spec_memory_limit_bytes" [] "Memory limit." => |k| asked(k.resources.memory_limit_in_bytes);
    Gauge "container_spec_memory_reservation_limit_bytes" [] "Memory that is kept for it."
        => |k| maybe(k.resources.unified.get("memory.low").and_then(|low| low.parse().ok()));
    Gauge "container_spec_memory_swap_limit_bytes" [] "Limit of memory and swap."
        => |k| asked(k.resources.memory_swap_limit_in_bytes);
    Counter "container_pressure_cpu_waiting_seconds_total" [] "Time in which some task waited for a processor."
        => |k| waiting(k.stats.cpu_pressure.as_ref());
    Counter "container_pressure_cpu_stalled_seconds_total" [] "Time in which all tasks waited for a processor."
        => |k| stalled(k.stats.cpu_pressure.as_ref());
    Counter "container_pressure_memory_waiting_seconds_total" [] "Time in which some task waited for memory."
        => |k| waiting(k.stats.memory_pressure.as_ref());
    Counter "container_pressure_memory_stalled_seconds_total" [] "Time in which all tasks waited for memory."
        => |k| stalled(k.stats.memory_pressure.as_ref());
    Counter "container_pressure_io_waiting_seconds_total" [] "Time in which some task waited for input or output."
        => |k| waiting(k.stats.io_pressure.as_ref());
    Counter "container_pressure_io_stalled_seconds_total" [] "Time in which all tasks waited for input or output."
        => |k| stalled(k.stats.io_pressure.as_ref());
};

fn page_faults(known: &Known) -> Vec<Sample> {
    let memory = &known.stats.memory;
    let sample = |kind: &str, value| (vec![kind.to_owned(), "container".to_owned()], Amount { value, per: 1 });
    vec![sample("pgfault", memory.page_faults), sample("pgmajfault", memory.major_page_faults)]
}

/// By cAdvisor's name for the one that it tells.
fn ulimits(known: &Known) -> Vec<Sample> {
    known.files_max.into_iter().map(|value| (vec!["max_open_files".to_owned()], Amount { value, per: 1 })).collect()
}

fn device_usage(known: &Known) -> Vec<Sample> {
    let of = |io: &cgroup::IoStats, operation: &str, value| {
        let labels = vec![device(io), io.major.to_string(), io.minor.to_string(), operation.to_owned()];
        (labels, Amount { value, per: 1 })
    };
    known.io.iter().flat_map(|io| [of(io, "Read", io.read_bytes), of(io, "Write", io.write_bytes)]).collect()
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A family of a pod's network: name, help, counter.
type NetworkFamily = (&'static str, &'static str, fn(&network::InterfaceStats) -> u64);

const NETWORK: [NetworkFamily; 8] = [
    ("container_network_receive_bytes_total", "Bytes received.", |i| i.rx_bytes),
    ("container_network_receive_packets_total", "Packets received.", |i| i.rx_packets),
    ("container_network_receive_packets_dropped_total", "Packets received and dropped.", |i| i.rx_dropped),
    ("container_network_receive_errors_total", "Errors while receiving.", |i| i.rx_errors),
    ("container_network_transmit_bytes_total", "Bytes sent.", |i| i.tx_bytes),
    ("container_network_transmit_packets_total", "Packets sent.", |i| i.tx_packets),
    ("container_network_transmit_packets_dropped_total", "Packets dropped instead of sent.", |i| i.tx_dropped),
    ("container_network_transmit_errors_total", "Errors while sending.", |i| i.tx_errors),
];

/// All metrics there are.
pub(crate) fn descriptors() -> Vec<v1::MetricDescriptor> {
    let descriptor = |name: &str, help: &str, labels: &[&str]| v1::MetricDescriptor {
        name: name.to_owned(),
        help: help.to_owned(),
        label_keys: LABELS.iter().chain(labels).map(|label| (*label).to_owned()).collect(),
    };
    let of_containers = FAMILIES.iter().map(|family| descriptor(family.name, family.help, family.labels));
    let of_pods = NETWORK.iter().map(|(name, help, _)| descriptor(name, help, &["interface"]));
    of_containers.chain(of_pods).collect()
}

/// A container's metrics.
pub(super) fn of_container(subject: &Subject, known: &Known, timestamp: i64) -> Vec<v1::Metric> {
    let metrics = FAMILIES.iter().flat_map(|family| {
        (family.values)(known)
            .into_iter()
            .map(|(labels, value)| metric(family.name, family.kind, subject, labels, value.whole(), timestamp))
    });
    metrics.collect()
}

/// A pod's metrics: its network.
pub(super) fn of_network(subject: &Subject, interfaces: &[network::InterfaceStats], timestamp: i64) -> Vec<v1::Metric> {
    let metrics = interfaces.iter().flat_map(|interface| {
        NETWORK.iter().map(move |(name, _, value)| {
            metric(name, MetricType::Counter, subject, vec![interface.name.clone()], value(interface), timestamp)
        })
    });
    metrics.collect()
}

/// What there is to say of one group.
#[derive(Debug, Clone, Default)]
pub(super) struct Row {
    /// Whose it is; empty but for the id where it is no container.
    pub(super) subject: Subject,
    /// The path of its control group.
    pub(super) group: String,
    pub(super) known: Known,
}

/// What there is to say of one pod's network.
#[derive(Debug, Clone, Default)]
pub(super) struct NetworkRow {
    pub(super) subject: Subject,
    pub(super) group: String,
    pub(super) interfaces: Vec<network::InterfaceStats>,
}

/// Everything in Prometheus' text form, with the labels that cAdvisor has: `id` is the group, `name` the id.
pub(super) fn text(rows: &[Row], networks: &[NetworkRow]) -> String {
    let labelled: Vec<String> = rows.iter().map(|row| common(&row.subject, &row.group)).collect();
    let mut out = String::new();
    for family in FAMILIES {
        head(&mut out, family.name, family.help, family.kind);
        for (row, labels) in rows.iter().zip(&labelled) {
            for (own, value) in (family.values)(&row.known) {
                let own = family.labels.iter().copied().zip(own.iter().map(String::as_str));
                // All processors together.
                let total = (family.name == "container_cpu_usage_seconds_total").then_some(("cpu", "total"));
                line(&mut out, family.name, labels, own.chain(total), value);
            }
        }
    }
    let labelled: Vec<String> = networks.iter().map(|row| common(&row.subject, &row.group)).collect();
    for (name, help, value) in NETWORK {
        head(&mut out, name, help, MetricType::Counter);
        for (row, labels) in networks.iter().zip(&labelled) {
            for interface in &row.interfaces {
                line(&mut out, name, labels, [("interface", interface.name.as_str())].into_iter(), value(interface));
            }
        }
    }
    out
}

fn head(out: &mut String, name: &str, help: &str, kind: MetricType) {
    let kind = if kind == MetricType::Counter { "counter" } else { "gauge" };
    // Writing to a String cannot fail, here and below.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line<'a>(
    out: &mut String,
    name: &str,
    common: &str,
    own: impl Iterator<Item = (&'a str, &'a str)>,
    value: impl std::fmt::Display,
) {
    let _ = write!(out, "{name}{{{common}");
    own.for_each(|(label, text)| {
        let _ = write!(out, ",{label}=\"{}\"", escaped(text));
    });
    let _ = writeln!(out, "}} {value}");
}

/// The labels that all have.
fn common(subject: &Subject, group: &str) -> String {
    let Subject { pod, namespace, container, id, image } = subject;
    let pairs = [
        ("container", container.as_str()),
        ("id", group),
        ("image", image),
        ("name", id),
        ("namespace", namespace),
        ("pod", pod),
    ];
    pairs.map(|(label, text)| format!("{label}=\"{}\"", escaped(text))).join(",")
}

/// Prometheus' text format, "Comments, help text, and type information".
fn escaped(text: &str) -> Cow<'_, str> {
    if !text.contains(['\\', '"', '\n']) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n"))
}

fn metric(
    name: &str,
    kind: MetricType,
    subject: &Subject,
    labels: Vec<String>,
    value: u64,
    timestamp: i64,
) -> v1::Metric {
    let Subject { pod, namespace, container, id, image } = subject.clone();
    v1::Metric {
        name: name.to_owned(),
        timestamp,
        metric_type: kind.into(),
        label_values: [pod, namespace, container, id, image].into_iter().chain(labels).collect(),
        value: Some(v1::UInt64Value { value }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn everything() -> Known {
        let pressure = Some(cgroup::Pressure { some: ([0.0; 3], 3_000_000), full: ([0.0; 3], 2_000_000) });
        let mut stats = cgroup::Stats {
            cpu_pressure: pressure,
            memory_pressure: pressure,
            io_pressure: pressure,
            ..cgroup::Stats::default()
        };
        stats.cpu.usage_ns = 5 * SECOND + 1;
        stats.memory.peak_bytes = Some(9);
        stats.pids.limit = Some(100);
        Known {
            stats,
            io: vec![cgroup::IoStats { major: 8, minor: 1, read_bytes: 7, ..Default::default() }],
            processes: 2,
            open: Some(Open { files: 5, sockets: 1 }),
            files_max: Some(1024),
            started_at: 4_000_000_000,
            resources: v1::LinuxContainerResources {
                cpu_period: 1,
                cpu_quota: 1,
                cpu_shares: 1,
                memory_limit_in_bytes: 1,
                memory_swap_limit_in_bytes: 1,
                unified: HashMap::from([("memory.low".to_owned(), "1".to_owned())]),
                ..Default::default()
            },
            written: Some(image::Usage { bytes: 11, inodes: 1 }),
            filesystem: Some(Filesystem { bytes: 1, inodes: 2, inodes_free: 1 }),
        }
    }

    fn subject() -> Subject {
        Subject { pod: "p".into(), namespace: "n".into(), container: "c".into(), id: "i".into(), image: "m".into() }
    }

    #[test]
    fn every_metric_has_a_descriptor_with_its_labels() {
        let keys: HashMap<_, _> =
            descriptors().into_iter().map(|family| (family.name, family.label_keys.len())).collect();
        assert_eq!(keys.len(), FAMILIES.len() + NETWORK.len(), "no name is there twice");
        let mut all = of_container(&subject(), &everything(), 1);
        all.extend(of_network(&subject(), &[network::InterfaceStats { name: "eth0".into(), ..Default::default() }], 1));
        for metric in &all {
            assert_eq!(keys.get(&metric.name), Some(&metric.label_values.len()), "{}", metric.name);
        }
        let named: std::collections::HashSet<_> = all.iter().map(|metric| &metric.name).collect();
        assert_eq!(named.len(), keys.len(), "every descriptor has a metric where everything is known");
    }

    #[test]
    fn values_and_labels() {
        let all = of_container(&subject(), &everything(), 6);
        let find = |name: &str| all.iter().filter(|metric| metric.name == name).collect::<Vec<_>>();
        let usage = find("container_cpu_usage_seconds_total")[0];
        assert_eq!((usage.value, usage.timestamp), (Some(v1::UInt64Value { value: 5 }), 6));
        assert_eq!((usage.label_values.join(" "), usage.metric_type()), ("p n c i m".to_owned(), MetricType::Counter));
        let reads = find("container_fs_reads_bytes_total")[0];
        assert_eq!((reads.label_values[5].as_str(), reads.value.unwrap().value), ("8:1", 7));
        assert_eq!(find("container_memory_failures_total").len(), 2);
        assert_eq!(find("container_pressure_io_stalled_seconds_total")[0].value.unwrap().value, 2);
        assert_eq!(find("container_start_time_seconds")[0].value.unwrap().value, 4);
    }

    #[test]
    fn prometheus_gets_parts_of_seconds_and_the_labels_of_cadvisor() {
        let row = Row { subject: subject(), group: "/kubepods/pod1/i".into(), known: everything() };
        let interfaces = vec![network::InterfaceStats { name: "eth0".into(), rx_bytes: 3, ..Default::default() }];
        let network = NetworkRow { subject: subject(), group: "/kubepods/pod1".into(), interfaces };
        let text = text(&[row], &[network]);
        let own = r#"container="c",id="/kubepods/pod1/i",image="m",name="i",namespace="n",pod="p""#;
        for line in [
            format!("container_cpu_usage_seconds_total{{{own},cpu=\"total\"}} 5.000000001"),
            "# TYPE container_memory_working_set_bytes gauge".to_owned(),
            format!("container_fs_reads_bytes_total{{{own},device=\"8:1\"}} 7"),
        ] {
            assert!(text.lines().any(|one| one == line), "{line} is not in\n{text}");
        }
        assert!(text.contains(r#"namespace="n",pod="p",interface="eth0"} 3"#));
        assert_eq!(escaped("a\"b\\c\nd"), r#"a\"b\\c\nd"#);
    }

    #[test]
    fn what_is_not_known_has_no_metric() {
        let all = of_container(&subject(), &Known::default(), 1);
        for name in ["container_file_descriptors", "container_fs_usage_bytes", "container_spec_cpu_quota"] {
            assert!(!all.iter().any(|metric| metric.name == name), "{name}");
        }
        let threads = all.iter().find(|metric| metric.name == "container_threads_max").unwrap();
        assert_eq!(threads.value.unwrap().value, 0, "no limit is known, and has a number");
        assert!(!all.iter().any(|metric| metric.name.starts_with("container_pressure")));
    }
}
