//! What `iptables-save` prints, as far as it matters here.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use service::{Frontend, Protocol};

use super::base::Jump;
use super::form::Print;
use super::{Table, names};

/// What one address family's tables hold of ours.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Remains {
    /// By table and name, the built-in ones as well.
    chains: BTreeMap<(Table, String), Chain>,
    /// Table, chain and rest of each rule of a chain that is not ours but jumps to ours.
    jumps: Vec<(Table, String, String)>,
    /// UDP frontends that some rule leads somewhere.
    udp: Vec<Frontend>,
}

/// What is kept of a chain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Chain {
    /// How many it has.
    rules: usize,
    /// What they say, if it is a chain of a port.
    print: Print,
}

impl Remains {
    /// Reads all tables that the listing has.
    pub fn read(listing: &str, ipv6: bool) -> Remains {
        let mut remains = Remains::default();
        let mut table = None;
        for line in listing.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = Table::named(name);
            } else if let Some(table) = table {
                remains.read_line(table, line, ipv6);
            }
        }
        remains
    }

    fn read_line(&mut self, table: Table, line: &str, ipv6: bool) {
        if let Some(chain) = line.strip_prefix(':').and_then(|rest| rest.split(' ').next()) {
            self.chains.insert((table, chain.to_owned()), Chain::default());
            return;
        }
        let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rest| rest.split_once(' ')) else { return };
        let is_of_port = names::is_of_port(chain);
        if let Some(chain) = self.chains.get_mut(&(table, chain.to_owned())) {
            chain.rules += 1;
            if is_of_port {
                chain.print = chain.print.then(rule);
            }
        }
        if is_of_port {
            return;
        }
        if !chain.starts_with("KUBE-") {
            let ours = target(rule).is_some_and(|to| super::base::is_shared(table, to));
            if ours {
                self.jumps.push((table, chain.to_owned(), rule.to_owned()));
            }
        } else if table == Table::Nat {
            self.udp.extend(udp_frontend(rule, ipv6));
        }
    }

    /// Names of a table's chains.
    pub(super) fn chains(&self, table: Table) -> impl Iterator<Item = &str> {
        self.chains.keys().filter(move |(of, _)| *of == table).map(|(_, chain)| chain.as_str())
    }

    /// How many rules a chain has; `None`: there is no such chain.
    pub(super) fn rules(&self, table: Table, chain: &str) -> Option<usize> {
        self.chains.get(&(table, chain.to_owned())).map(|chain| chain.rules)
    }

    /// Whether a chain of a port has exactly these rules.
    pub(super) fn has(&self, chain: &str, rules: &[String]) -> bool {
        let there = self.chains.get(&(Table::Nat, chain.to_owned()));
        there.is_some_and(|there| there.rules == rules.len() && there.print == Print::of(rules))
    }

    /// Whether a rule leads from one chain to the other.
    pub(super) fn has_jump(&self, jump: &Jump) -> bool {
        self.jumps(jump.table).any(|(from, rule)| from == jump.from && target(rule) == Some(jump.to))
    }

    /// Rules of chains that are not ours which jump to ours: chain and rest.
    pub(super) fn jumps(&self, table: Table) -> impl Iterator<Item = (&str, &str)> {
        let of_table = self.jumps.iter().filter(move |(of, ..)| *of == table);
        of_table.map(|(_, chain, rule)| (chain.as_str(), rule.as_str()))
    }

    /// UDP frontends that some rule leads somewhere.
    pub fn udp_frontends(&self) -> &[Frontend] {
        &self.udp
    }

    /// Whether there is anything that only a proxy makes.
    pub fn is_of_proxy(&self) -> bool {
        self.chains.keys().any(|(table, chain)| super::base::is_of_proxy(*table, chain))
    }

    /// Whether something says that Kubernetes uses these tables: a canary of the kubelet or of a proxy.
    pub fn has_hint(&self) -> bool {
        let hint = |chain: &str| super::HINTS.contains(&chain);
        self.chains.keys().any(|(table, chain)| *table == Table::Mangle && hint(chain))
    }
}

/// Where a rule jumps to.
pub(super) fn target(rule: &str) -> Option<&str> {
    let mut words = rule.split(' ');
    words.find(|word| *word == "-j")?;
    words.next()
}

/// The frontend of a rule that leads UDP somewhere.
fn udp_frontend(rule: &str, ipv6: bool) -> Option<Frontend> {
    let after = |flag: &str| {
        let mut words = rule.split(' ');
        words.find(|word| *word == flag)?;
        words.next()
    };
    if after("-p") != Some("udp") {
        return None;
    }
    let port = after("--dport")?.parse().ok()?;
    let any: IpAddr = if ipv6 { Ipv6Addr::UNSPECIFIED.into() } else { Ipv4Addr::UNSPECIFIED.into() };
    let address = match after("-d") {
        None => any,
        Some(text) => text.parse().or_else(|_| text.parse::<IpNet>().map(|range| range.addr())).ok()?,
    };
    Some(Frontend { address, protocol: Protocol::Udp, port })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = r#"# Generated by iptables-save v1.8.9 (nf_tables)
*mangle
:PREROUTING ACCEPT [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-ABC - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A KUBE-SERVICES -d 10.96.0.10/32 -p udp -m comment --comment "d/dns:dns cluster IP" -m udp --dport 53 -j KUBE-SVC-ABC
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment "d/dns:tcp cluster IP" -m tcp --dport 53 -j KUBE-SVC-DEF
-A KUBE-NODEPORTS -p udp -m comment --comment d/dns:dns -m udp --dport 30053 -j KUBE-SVC-ABC
-A KUBE-SVC-ABC -j KUBE-SEP-X
COMMIT
"#;

    #[test]
    fn a_listing_is_read() {
        let remains = Remains::read(LISTING, false);
        assert!(remains.has_hint() && remains.is_of_proxy());
        assert_eq!(remains.rules(Table::Nat, "KUBE-SERVICES"), Some(2));
        assert_eq!(remains.rules(Table::Filter, "KUBE-SERVICES"), None);
        assert_eq!(remains.chains(Table::Nat).count(), 4);
        let jumps: Vec<_> = remains.jumps(Table::Nat).collect();
        assert_eq!(jumps, [("PREROUTING", "-m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES")]);
        let shown: Vec<String> = remains.udp_frontends().iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["10.96.0.10:53/UDP", "node port 30053/UDP"]);
        assert_eq!(Remains::read("", true), Remains::default());
    }
}
