//! Chains that are always there, and the jumps that lead to them.

use super::port::Shared;
use super::{Config, Table, counters, names};

/// A rule of a built-in chain that leads to ours.
pub(super) struct Jump {
    pub(super) table: Table,
    pub(super) from: &'static str,
    pub(super) to: &'static str,
    comment: &'static str,
    only_new: bool,
}

const fn jump(table: Table, from: &'static str, to: &'static str, comment: &'static str, only_new: bool) -> Jump {
    Jump { table, from, to, comment, only_new }
}

const PORTALS: &str = "kubernetes service portals";
const EXTERNAL_PORTALS: &str = "kubernetes externally-visible service portals";
const FIREWALL: &str = "kubernetes load balancer firewall";

/// In the order in which they are put in front of a chain: the last one stands first.
const JUMPS: [Jump; 14] = [
    jump(Table::Filter, "INPUT", names::EXTERNAL_SERVICES, EXTERNAL_PORTALS, true),
    jump(Table::Filter, "FORWARD", names::EXTERNAL_SERVICES, EXTERNAL_PORTALS, true),
    jump(Table::Filter, "INPUT", names::NODE_PORTS, "kubernetes health check service ports", false),
    jump(Table::Filter, "FORWARD", names::SERVICES, PORTALS, true),
    jump(Table::Filter, "OUTPUT", names::SERVICES, PORTALS, true),
    jump(Table::Filter, "FORWARD", names::FORWARD, "kubernetes forwarding rules", false),
    jump(Table::Filter, "INPUT", names::FIREWALL, FIREWALL, true),
    jump(Table::Filter, "OUTPUT", names::FIREWALL, FIREWALL, true),
    jump(Table::Filter, "FORWARD", names::FIREWALL, FIREWALL, true),
    jump(Table::Nat, "OUTPUT", names::SERVICES, PORTALS, false),
    jump(Table::Nat, "PREROUTING", names::SERVICES, PORTALS, false),
    jump(Table::Nat, "POSTROUTING", names::POSTROUTING, "kubernetes postrouting rules", false),
    jump(Table::Filter, "INPUT", names::KUBELET_FIREWALL, "", false),
    jump(Table::Filter, "OUTPUT", names::KUBELET_FIREWALL, "", false),
];

impl Jump {
    pub(super) fn rule(&self) -> String {
        let state = if self.only_new { "-m conntrack --ctstate NEW " } else { "" };
        let comment = match self.comment {
            "" => String::new(),
            text => format!("-m comment --comment \"{text}\" "),
        };
        format!("{state}{comment}-j {}", self.to)
    }
}

/// The jumps of one table.
pub(super) fn jumps(config: &Config, table: Table, ipv6: bool) -> impl Iterator<Item = &'static Jump> {
    let guard = config.opens_loopback(ipv6);
    JUMPS.iter().filter(move |jump| jump.table == table && (guard || jump.to != names::KUBELET_FIREWALL))
}

/// Chains of a table that are always there.
pub(super) fn chains(config: &Config, table: Table, ipv6: bool) -> impl Iterator<Item = &'static str> {
    let (guard, several) = (config.opens_loopback(ipv6), config.pod_ranges(ipv6).len() > 1);
    let is_needed = move |chain: &&str| match *chain {
        names::KUBELET_FIREWALL => guard,
        names::MARK_MASQ_OUTSIDE => several,
        _ => true,
    };
    all_chains(table).iter().copied().filter(is_needed)
}

fn all_chains(table: Table) -> &'static [&'static str] {
    match table {
        Table::Filter => &[
            names::NODE_PORTS,
            names::SERVICES,
            names::EXTERNAL_SERVICES,
            names::FORWARD,
            names::FIREWALL,
            names::KUBELET_FIREWALL,
            names::CANARY,
        ],
        Table::Nat => &[
            names::NODE_PORTS,
            names::SERVICES,
            names::POSTROUTING,
            names::MARK_MASQ,
            names::MARK_MASQ_OUTSIDE,
            names::CANARY,
        ],
        Table::Mangle => &[names::CANARY],
    }
}

/// Chains that upstream's mode `ipvs` makes beside those of its mode `iptables` (kubernetes: `pkg/proxy/ipvs`). They are
/// never written here, only removed.
fn chains_of_ipvs(table: Table) -> &'static [&'static str] {
    match table {
        Table::Filter => &["KUBE-NODE-PORT", "KUBE-IPVS-FILTER", "KUBE-IPVS-OUT-FILTER", "KUBE-SOURCE-RANGES-FIREWALL"],
        Table::Nat => &["KUBE-NODE-PORT", "KUBE-LOAD-BALANCER"],
        Table::Mangle => &[],
    }
}

/// Whether a chain of this name is one that ports share.
pub(super) fn is_shared(table: Table, chain: &str) -> bool {
    all_chains(table).contains(&chain)
}

/// Whether a chain is one that ports share, and a proxy owns it and nobody else.
pub(super) fn is_shared_of_proxy(table: Table, chain: &str) -> bool {
    (is_shared(table, chain) && chain != names::KUBELET_FIREWALL) || chains_of_ipvs(table).contains(&chain)
}

/// Whether a proxy owns a chain, and nobody else.
pub(super) fn is_of_proxy(table: Table, chain: &str) -> bool {
    is_shared_of_proxy(table, chain) || (table == Table::Nat && names::is_of_port(chain))
}

/// Rules of the chains that are always there, in front of those of ports: chain and rest.
pub(super) fn first_rules(config: &Config, table: Table, ipv6: bool) -> Vec<(&'static str, String)> {
    match table {
        Table::Filter => first_filter_rules(config, ipv6),
        Table::Nat => first_nat_rules(config, ipv6),
        Table::Mangle => Vec::new(),
    }
}

fn first_filter_rules(config: &Config, ipv6: bool) -> Vec<(&'static str, String)> {
    let mut rules = Vec::new();
    if config.opens_loopback(ipv6) {
        // `route_localnet` opens the loopback addresses to the neighbours of this host (CVE-2020-8558).
        let rule = "! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment \"block incoming localnet connections\" \
                    -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP";
        rules.push((names::KUBELET_FIREWALL, rule.to_owned()));
    }
    if config.drop_invalid {
        // Connection tracking translates nothing back that it takes for invalid: the client would answer a segment from an
        // address that it never spoke to with a reset (kubernetes/kubernetes#74839).
        let counting = config.counting(counters::INVALID_DROPPED);
        rules.push((names::FORWARD, format!("-m conntrack --ctstate INVALID {counting}-j DROP")));
    }
    let mark = config.mark();
    let forward = "-m comment --comment \"kubernetes forwarding rules\"";
    rules.push((names::FORWARD, format!("{forward} -m mark --mark {mark}/{mark} -j ACCEPT")));
    let known =
        "-m comment --comment \"kubernetes forwarding conntrack rule\" -m conntrack --ctstate RELATED,ESTABLISHED";
    rules.push((names::FORWARD, format!("{known} -j ACCEPT")));
    rules
}

fn first_nat_rules(config: &Config, ipv6: bool) -> Vec<(&'static str, String)> {
    let mark = config.mark();
    let masquerade = "-m comment --comment \"kubernetes service traffic requiring SNAT\" -j MASQUERADE --random-fully";
    let mut rules = Vec::new();
    if config.compares {
        let comment = "-m comment --comment \"kubernetes service traffic from an endpoint to itself\"";
        let matching = format!("-m conntrack --ctstate DNAT -m bpf --bytecode \"{}\"", comparison(ipv6));
        rules.push((names::POSTROUTING, format!("{comment} {matching} -j {}", names::MARK_MASQ)));
    }
    rules.extend([
        (names::POSTROUTING, format!("-m mark ! --mark {mark}/{mark} -j RETURN")),
        // Who goes through the stack once more is not masqueraded once more.
        (names::POSTROUTING, format!("-j MARK --xor-mark {mark}")),
        (names::POSTROUTING, masquerade.to_owned()),
        (names::MARK_MASQ, format!("-j MARK --or-mark {mark}")),
    ]);
    let ranges = config.pod_ranges(ipv6);
    if ranges.len() > 1 {
        rules.extend(ranges.iter().map(|range| (names::MARK_MASQ_OUTSIDE, format!("-s {range} -j RETURN"))));
        rules.push((names::MARK_MASQ_OUTSIDE, format!("-j {}", names::MARK_MASQ)));
    }
    rules
}

/// A program (classic BPF) that matches packets whose source is their destination: how many instructions, and of each its code,
/// the jumps of a comparison, and its operand (man page of `iptables-extensions`, bpf).
fn comparison(ipv6: bool) -> String {
    const LOAD_WORD: u8 = 0x20;
    const REMEMBER: u8 = 0x07;
    const IS_REMEMBERED: u8 = 0x1d;
    const RETURN: u8 = 0x06;
    // Where in its header a packet has the addresses, and of how many words of four bytes they are.
    let (source, destination, words) = if ipv6 { (8, 24, 4) } else { (12, 16, 1) };
    let mut program = Vec::new();
    for word in 0..words {
        // To the last instruction, over those of the other words and the last but one.
        let away = 4 * (words - word - 1) + 1;
        program.push((LOAD_WORD, 0, source + 4 * word));
        program.push((REMEMBER, 0, 0));
        program.push((LOAD_WORD, 0, destination + 4 * word));
        program.push((IS_REMEMBERED, away, 0));
    }
    program.extend([(RETURN, 0, 1), (RETURN, 0, 0)]);
    let instructions = program.iter().map(|(code, away, operand)| format!(",{code} 0 {away} {operand}"));
    format!("{}{}", program.len(), instructions.collect::<String>())
}

/// Rules behind those of ports.
pub(super) fn last_rules(config: &Config, table: Table, ipv6: bool) -> Vec<(Shared, String)> {
    match table {
        Table::Nat => to_node_ports(config, ipv6).into_iter().map(|rule| (Shared::Services, rule)).collect(),
        Table::Filter => refusals(config, ipv6).map(|rule| (Shared::FilterServices, rule)).collect(),
        Table::Mangle => Vec::new(),
    }
}

fn to_node_ports(config: &Config, ipv6: bool) -> Vec<String> {
    let to = "-m comment --comment \"kubernetes service nodeports; NOTE: this must be the last rule in this chain\" \
              -m addrtype --dst-type LOCAL";
    let node_ports = names::NODE_PORTS;
    let limits = config.network.node_ports.limits(ipv6);
    if limits.is_empty() {
        let but_loopback = match (ipv6, config.opens_loopback(ipv6)) {
            (true, _) => "! -d ::1/128 ",
            (false, false) => "! -d 127.0.0.0/8 ",
            (false, true) => "",
        };
        return vec![format!("{but_loopback}{to} -j {node_ports}")];
    }
    let open = limits.into_iter().filter(|range| !range.addr().is_loopback() || config.opens_loopback(ipv6));
    open.map(|range| format!("-d {range} {to} -j {node_ports}")).collect()
}

/// An address of a Service's range that is still untranslated here belongs to no Service, or is another port of one.
fn refusals(config: &Config, ipv6: bool) -> impl Iterator<Item = String> {
    let ranges = config.network.service_cidrs.iter().filter(move |range| range.addr().is_ipv6() == ipv6);
    ranges.map(|range| {
        format!(
            "-d {range} -m comment --comment \"no service has this address and port\" -m addrtype ! --dst-type LOCAL \
             -j REJECT"
        )
    })
}
