//! Names and labels: those that upstream's kube-proxy 1.37 registers in each of its modes (`pkg/proxy/metrics`), and why some
//! are not told here.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

const NFTABLES: &[Mode] = &[Mode::Nftables];
const IPTABLES: &[Mode] = &[Mode::Iptables];
/// Those with iptables, of which upstream's IPVS is one.
const RESTORE: &[Mode] = &[Mode::Iptables, Mode::Ipvs];
/// Those with syncs of both extents.
const EXTENTS: &[Mode] = &[Mode::Nftables, Mode::Iptables];
/// All that there are upstream.
const ALL: &[Mode] = &[Mode::Nftables, Mode::Iptables, Mode::Ipvs];

/// Name, labels and modes.
const OF_UPSTREAM: &[(&str, &[&str], &[Mode])] = &[
    ("conntrack_reconciler_deleted_entries_total", &["ip_family"], ALL),
    ("conntrack_reconciler_sync_duration_seconds", &["ip_family"], ALL),
    ("iptables_ct_state_invalid_dropped_packets_total", &[], IPTABLES),
    ("iptables_localhost_nodeports_accepted_packets_total", &[], IPTABLES),
    ("network_programming_duration_seconds", &["ip_family"], ALL),
    ("nftables_localhost_nodeport_listener_creation_failures_total", &["ip_family"], NFTABLES),
    ("nftables_localhost_nodeport_listeners", &["ip_family"], NFTABLES),
    ("nftables_localhost_nodeport_rejected_packets_total", &["ip_family", "protocol"], NFTABLES),
    ("proxy_healthz_total", &["code"], ALL),
    ("proxy_livez_total", &["code"], ALL),
    ("sync_full_proxy_rules_duration_seconds", &["ip_family"], EXTENTS),
    ("sync_partial_proxy_rules_duration_seconds", &["ip_family"], EXTENTS),
    ("sync_proxy_rules_duration_seconds", &["ip_family"], ALL),
    ("sync_proxy_rules_endpoint_changes_pending", &[], ALL),
    ("sync_proxy_rules_endpoint_changes_total", &[], ALL),
    ("sync_proxy_rules_iptables_last", &["ip_family", "table"], IPTABLES),
    ("sync_proxy_rules_iptables_partial_restore_failures_total", &["ip_family"], IPTABLES),
    ("sync_proxy_rules_iptables_restore_failures_total", &["ip_family"], RESTORE),
    ("sync_proxy_rules_iptables_total", &["ip_family", "table"], IPTABLES),
    ("sync_proxy_rules_last_queued_timestamp_seconds", &["ip_family"], ALL),
    ("sync_proxy_rules_last_timestamp_seconds", &["ip_family"], ALL),
    ("sync_proxy_rules_nftables_cleanup_failures_total", &["ip_family"], NFTABLES),
    ("sync_proxy_rules_nftables_sync_failures_total", &["ip_family"], NFTABLES),
    ("sync_proxy_rules_no_local_endpoints_total", &["ip_family", "traffic_policy"], ALL),
    ("sync_proxy_rules_service_changes_pending", &[], ALL),
    ("sync_proxy_rules_service_changes_total", &[], ALL),
    ("sync_proxy_rules_winkernel_lb_create_failures_total", &["error", "ip_family", "lb_type"], ALL),
    ("sync_proxy_rules_winkernel_lb_delete_failures_total", &["error", "ip_family", "lb_type"], ALL),
    ("sync_proxy_rules_winkernel_lb_update_failures_total", &["error", "ip_family", "lb_type"], ALL),
];

/// Beginnings of the names that are not told, and why.
const NOT_TOLD: &[(&str, &str)] = &[
    (
        "nftables_localhost_nodeport_",
        "an alpha feature of Kubernetes (KubeProxyNFTablesLocalhostNodePorts): with nftables node ports do not answer on \
         loopback addresses",
    ),
    ("sync_proxy_rules_winkernel_", "they are Windows'"),
];

/// Families that a proxy tells of which has done everything, with their labels.
fn told(mode: Mode) -> BTreeMap<String, BTreeSet<String>> {
    let metrics = Metrics::new(mode);
    let took = Duration::from_millis(1);
    for extent in [Extent::All, Extent::Difference] {
        metrics.synced(extent, [Some(took); 2]);
        metrics.failed(extent);
    }
    metrics.programmed(false, took);
    metrics.flows_checked(took, [1, 0]);
    metrics.healthz(200);
    metrics.livez(503);
    let of_iptables = Tallies {
        rules: vec![("nat", false, RuleCounts::default())],
        invalid_dropped: Some(0),
        loopback_accepted: Some(0),
        ..Tallies::default()
    };
    let tallies = if mode == Mode::Iptables { of_iptables } else { Tallies::default() };
    let mut text = Text::default();
    metrics.write(&mut text, &tallies);
    let mut families: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut family = String::new();
    for line in text.out.lines() {
        if let Some(named) = line.strip_prefix("# TYPE kubeproxy_") {
            family = named.split(' ').next().unwrap_or_default().to_owned();
            families.insert(family.clone(), BTreeSet::new());
        } else if let Some((_, rest)) = line.split_once('{') {
            let names = rest.split(',').filter_map(|label| label.split_once("=\"")).map(|(name, _)| name);
            let labels = families.get_mut(&family).expect("a family comes before its samples");
            labels.extend(names.filter(|name| *name != "le").map(str::to_owned));
        }
    }
    families
}

#[test]
fn every_metric_of_upstream_is_told_or_not_for_a_reason() {
    for mode in ALL {
        let told = told(*mode);
        for (name, labels, _) in OF_UPSTREAM.iter().filter(|(.., modes)| modes.contains(mode)) {
            let excused = NOT_TOLD.iter().find(|(beginning, _)| name.starts_with(beginning));
            let found = told.get(*name);
            assert!(found.is_some() != excused.is_some(), "{mode}: {name} is told: {found:?}, is not: {excused:?}");
            if let Some(found) = found {
                assert_eq!(found.iter().collect::<Vec<_>>(), *labels, "{mode}: {name}");
            }
        }
        for name in told.keys() {
            assert!(OF_UPSTREAM.iter().any(|(known, ..)| known == name), "{mode}: {name} is no metric of upstream's");
        }
    }
    for (beginning, why) in NOT_TOLD {
        assert!(OF_UPSTREAM.iter().any(|(name, ..)| name.starts_with(beginning)) && !why.is_empty(), "{beginning}");
    }
}
