//! What the proxy counts of itself, under upstream's names.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use instruments::{Counts, Histograms, Text, labels};
use k8s_openapi::jiff::Timestamp;

use crate::health::FAMILIES;
use crate::{Mode, Refusals};

/// `ExponentialBuckets(0.001, 2, 15)`, upstream's for syncs.
const SYNCS: &[f64] =
    &[0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.256, 0.512, 1.024, 2.048, 4.096, 8.192, 16.384];
/// Upstream's for the way from the cluster's change to the node's rule, with four below: that is where ours are.
const PROGRAMMING: &[f64] = &[
    0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
    16.0, 17.0, 18.0, 19.0, 20.0, 21.0, 22.0, 23.0, 24.0, 25.0, 26.0, 27.0, 28.0, 29.0, 30.0, 31.0, 32.0, 33.0, 34.0,
    35.0, 36.0, 37.0, 38.0, 39.0, 40.0, 41.0, 42.0, 43.0, 44.0, 45.0, 46.0, 47.0, 48.0, 49.0, 50.0, 51.0, 52.0, 53.0,
    54.0, 55.0, 56.0, 57.0, 58.0, 59.0, 60.0, 65.0, 70.0, 75.0, 80.0, 85.0, 90.0, 95.0, 100.0, 105.0, 110.0, 115.0,
    120.0, 150.0, 180.0, 210.0, 240.0, 270.0, 300.0,
];

/// Everything that is counted. Shared by all who count.
#[derive(Debug)]
pub struct Metrics {
    mode: Mode,
    syncs: Histograms,
    full_syncs: Histograms,
    partial_syncs: Histograms,
    programming: Histograms,
    failures: Counts,
    partial_failures: Counts,
    healthz: Counts,
    livez: Counts,
    flow_checks: Histograms,
    flows_deleted: Counts,
    services: Changes,
    endpoints: Changes,
    /// Milliseconds since 1970; 0 is never.
    queued: AtomicU64,
    synced: AtomicU64,
}

/// Objects that came, and those of them that no sync has taken yet.
#[derive(Debug, Default)]
struct Changes {
    total: AtomicU64,
    pending: AtomicU64,
}

/// What is counted of the rules that are in force.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tallies {
    /// Ports of Services that this node must not lead anywhere.
    pub refusals: Refusals,
    /// Rules by table and address family (whether it is IPv6), of the mode `iptables`.
    pub rules: Vec<(&'static str, bool, RuleCounts)>,
    /// Packets that were dropped because connection tracking takes them for invalid; none if nobody counts.
    pub invalid_dropped: Option<u64>,
    /// Packets that node ports took on loopback addresses; none if nobody counts.
    pub loopback_accepted: Option<u64>,
}

/// How many rules a table has of ours, and how many the last sync wrote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "they are what they are called")]
pub struct RuleCounts {
    pub total: usize,
    pub written: usize,
}

impl Tallies {
    fn write(&self, text: &mut Text) {
        type Pick = fn(&RuleCounts) -> usize;
        let total: Pick = |counts| counts.total;
        let written: Pick = |counts| counts.written;
        let gauges = [
            ("total", "Total number of iptables rules owned by kube-proxy", total),
            ("last", "Number of iptables rules written by kube-proxy in last sync", written),
        ];
        for (word, help, count) in gauges.into_iter().filter(|_| !self.rules.is_empty()) {
            let name = format!("kubeproxy_sync_proxy_rules_iptables_{word}");
            text.family(&name, "gauge", help);
            for (table, ipv6, counts) in &self.rules {
                let labels = labels(&[("ip_family", FAMILIES[usize::from(*ipv6)]), ("table", table)]);
                text.sample(&name, &labels, count(counts));
            }
        }
        let counters = [
            (
                "ct_state_invalid_dropped",
                "packets dropped by iptables to work around conntrack problems",
                self.invalid_dropped,
            ),
            (
                "localhost_nodeports_accepted",
                "Number of packets accepted on nodeports of loopback interface",
                self.loopback_accepted,
            ),
        ];
        for (word, help, packets) in counters {
            if let Some(packets) = packets {
                text.single(&format!("kubeproxy_iptables_{word}_packets_total"), "counter", help, packets);
            }
        }
    }
}

/// How much of the rules was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    All,
    Difference,
}

impl Metrics {
    pub(crate) fn new(mode: Mode) -> Metrics {
        Metrics {
            mode,
            syncs: Histograms::new(SYNCS),
            full_syncs: Histograms::new(SYNCS),
            partial_syncs: Histograms::new(SYNCS),
            programming: Histograms::new(PROGRAMMING),
            failures: Counts::default(),
            partial_failures: Counts::default(),
            healthz: Counts::default(),
            livez: Counts::default(),
            flow_checks: Histograms::new(SYNCS),
            flows_deleted: Counts::default(),
            services: Changes::default(),
            endpoints: Changes::default(),
            queued: AtomicU64::new(0),
            synced: AtomicU64::new(0),
        }
    }

    pub(crate) fn service_changed(&self) {
        self.services.one();
    }

    pub(crate) fn endpoints_changed(&self) {
        self.endpoints.one();
    }

    /// A sync is due.
    pub(crate) fn queued(&self) {
        self.queued.store(now_ms(), Ordering::Relaxed);
    }

    /// Rules were written, in so much time for each address family; none if it had nothing to write.
    pub(crate) fn synced(&self, extent: Extent, took: [Option<Duration>; 2]) {
        let of_extent = if extent == Extent::All { &self.full_syncs } else { &self.partial_syncs };
        for (family, took) in families().zip(took) {
            if let Some(took) = took {
                self.syncs.observe(&family, took);
                of_extent.observe(&family, took);
            }
        }
    }

    /// Nothing waits to be written.
    pub(crate) fn settled(&self) {
        self.services.pending.store(0, Ordering::Relaxed);
        self.endpoints.pending.store(0, Ordering::Relaxed);
        self.synced.store(now_ms(), Ordering::Relaxed);
    }

    pub(crate) fn failed(&self, extent: Extent) {
        let counts = if extent == Extent::All { &self.failures } else { &self.partial_failures };
        families().for_each(|family| counts.add(&family));
    }

    /// From the change in the cluster until the rule.
    pub(crate) fn programmed(&self, ipv6: bool, took: Duration) {
        self.programming.observe(&family(ipv6), took);
    }

    pub(crate) fn flows_checked(&self, took: Duration, deleted: [u64; 2]) {
        for (ipv6, deleted) in [false, true].into_iter().zip(deleted) {
            self.flow_checks.observe(&family(ipv6), took);
            self.flows_deleted.add_many(&family(ipv6), deleted);
        }
    }

    pub(crate) fn healthz(&self, code: u16) {
        self.healthz.add(&labels(&[("code", &code.to_string())]));
    }

    pub(crate) fn livez(&self, code: u16) {
        self.livez.add(&labels(&[("code", &code.to_string())]));
    }

    /// All families. `tallies` are those of the rules that are in force.
    pub fn write(&self, text: &mut Text, tallies: &Tallies) {
        let refusals = tallies.refusals;
        self.write_syncs(text);
        tallies.write(text);
        self.services.write(text, "service", "Service");
        self.endpoints.write(text, "endpoint", "Endpoint");
        self.write_failures(text);
        let name = "kubeproxy_sync_proxy_rules_no_local_endpoints_total";
        text.family(name, "gauge", "Number of services with a Local traffic policy and no endpoints");
        for (policy, counts) in [("internal", refusals.internal), ("external", refusals.external)] {
            for (family, count) in FAMILIES.iter().zip(counts) {
                text.sample(name, &labels(&[("ip_family", family), ("traffic_policy", policy)]), count);
            }
        }
        self.healthz.write(text, "kubeproxy_proxy_healthz_total", "Cumulative proxy healthz HTTP status");
        self.livez.write(text, "kubeproxy_proxy_livez_total", "Cumulative proxy livez HTTP status");
        let name = "kubeproxy_conntrack_reconciler_sync_duration_seconds";
        self.flow_checks.write(text, name, "ReconcileConntrackFlowsLatency latency in seconds");
        let name = "kubeproxy_conntrack_reconciler_deleted_entries_total";
        self.flows_deleted.write(text, name, "Cumulative conntrack flows deleted by conntrack reconciler");
    }

    fn write_syncs(&self, text: &mut Text) {
        let name = "kubeproxy_sync_proxy_rules_duration_seconds";
        self.syncs.write(text, name, "SyncProxyRules latency in seconds");
        let name = "kubeproxy_sync_full_proxy_rules_duration_seconds";
        self.full_syncs.write(text, name, "SyncProxyRules latency in seconds for full resyncs");
        let name = "kubeproxy_sync_partial_proxy_rules_duration_seconds";
        self.partial_syncs.write(text, name, "SyncProxyRules latency in seconds for partial resyncs");
        let name = "kubeproxy_network_programming_duration_seconds";
        self.programming.write(text, name, "In Cluster Network Programming Latency in seconds");
        let times = [
            ("last_timestamp_seconds", "The last time proxy rules were successfully synced", &self.synced),
            ("last_queued_timestamp_seconds", "The last time a sync of proxy rules was queued", &self.queued),
        ];
        for (name, help, time) in times {
            let name = format!("kubeproxy_sync_proxy_rules_{name}");
            text.family(&name, "gauge", help);
            let seconds = Duration::from_millis(time.load(Ordering::Relaxed)).as_secs_f64();
            families().for_each(|family| text.sample(&name, &family, seconds));
        }
    }

    fn write_failures(&self, text: &mut Text) {
        let backend = match self.mode.as_str() {
            "nftables" => "nftables_sync",
            _ => "iptables_restore",
        };
        let name = format!("kubeproxy_sync_proxy_rules_{backend}_failures_total");
        self.failures.write(text, &name, "Cumulative failures to write the rules of Services");
        let name = "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total";
        match backend {
            "nftables_sync" => {
                let name = "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total";
                self.partial_failures.write(text, name, "Cumulative proxy nftables cleanup failures");
            }
            _ => self.partial_failures.write(text, name, "Cumulative proxy iptables partial restore failures"),
        }
    }
}

impl Changes {
    fn one(&self) {
        self.total.fetch_add(1, Ordering::Relaxed);
        self.pending.fetch_add(1, Ordering::Relaxed);
    }

    fn write(&self, text: &mut Text, word: &str, title: &str) {
        let name = format!("kubeproxy_sync_proxy_rules_{word}_changes");
        let [pending, total] = [&self.pending, &self.total].map(|count| count.load(Ordering::Relaxed));
        text.single(&format!("{name}_pending"), "gauge", &format!("Pending proxy rules {title} changes"), pending);
        text.single(&format!("{name}_total"), "counter", &format!("Cumulative proxy rules {title} changes"), total);
    }
}

fn family(ipv6: bool) -> String {
    labels(&[("ip_family", FAMILIES[usize::from(ipv6)])])
}

fn families() -> impl Iterator<Item = String> {
    [false, true].into_iter().map(family)
}

fn now_ms() -> u64 {
    u64::try_from(Timestamp::now().as_millisecond()).unwrap_or_default()
}

#[cfg(test)]
mod names;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_of_iptables_have_upstreams_names() {
        let counts = RuleCounts { total: 7, written: 2 };
        let tallies = Tallies { rules: vec![("nat", true, counts)], invalid_dropped: Some(0), ..Tallies::default() };
        let mut text = Text::default();
        tallies.write(&mut text);
        let text = text.out;
        for line in [
            "kubeproxy_sync_proxy_rules_iptables_total{ip_family=\"IPv6\",table=\"nat\"} 7",
            "kubeproxy_sync_proxy_rules_iptables_last{ip_family=\"IPv6\",table=\"nat\"} 2",
            "kubeproxy_iptables_ct_state_invalid_dropped_packets_total 0",
        ] {
            assert!(text.lines().any(|one| one == line), "{text}");
        }
        assert!(!text.contains("localhost_nodeports"), "nobody counts them");
    }
}
