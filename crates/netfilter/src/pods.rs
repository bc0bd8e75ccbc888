//! The table of the pods' network: masquerading and host ports.
//!
//! ```text
//! guard:              from another interface, to or from 127.0.0.0/8 ─► drop
//! prerouting, output: to an address of this host ─► port in ip_ports? ─► dnat to the pod
//!                     to 127.0.0.0/8 but 127.0.0.1 ─► as it is
//!                     port in ports? ─► dnat to the pod
//! postrouting:        pod to itself ─► masquerade          (else it would take the packet for its own and drop it)
//!                     127.0.0.0/8 to pod ─► masquerade     (nobody else has a way back to there)
//!                     pod to another node's pod ─► as it is
//!                     pod to outside the subnet ─► masquerade
//! ```
//!
//! Host ports answer on 127.0.0.1, too; at other loopback addresses are programs of the host, such as its resolver. That
//! needs `route_localnet` on the pods' interface, which alone would open the host's loopback to the pods (CVE-2020-8558):
//! the guard drops what no translation has led there, and what claims to come from there. IPv6 has no such setting, so
//! nothing can be led away from `::1`.

use std::net::IpAddr;

use sys::netlink::nft::{Base, Batch, Cmp, Data, Element, Expr, Family, Hook, Meta, Reg, Set, Type, Verdict};

use crate::key::{self, Ip, Part};

/// The chain that keeps the host's loopback to itself.
pub const GUARD: &str = "guard";
const PREROUTING: &str = "prerouting";
const OUTPUT: &str = "output";
const POSTROUTING: &str = "postrouting";
const PORTS: &str = "host-ports";
/// The priority of `raw`, before connection tracking: answers have not been led back to the loopback yet.
const RAW: i32 = -300;
/// Before the priority of `dstnat` (-100), so that a Service's node port of the same number does not win.
const BEFORE_DSTNAT: i32 = -105;
/// The priority of `srcnat`.
const SRCNAT: i32 = 100;

/// A host port that leads to a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forward {
    /// IP protocol number.
    pub protocol: u8,
    /// Address of the host; `None`: every one of the pod's family.
    pub host: Option<IpAddr>,
    /// Port of the host.
    pub host_port: u16,
    /// The pod.
    pub pod: IpAddr,
    /// Port of the pod.
    pub pod_port: u16,
}

impl Forward {
    fn ports_set(&self) -> String {
        let ip = Ip::of(self.pod);
        if self.host.is_some() { ip_ports(ip) } else { ports(ip) }
    }

    fn key(&self) -> Part {
        let host = self.host.map_or_else(Part::new, |host| Part::new().address(host));
        host.protocol(self.protocol).port(self.host_port)
    }

    fn target(&self) -> Part {
        Part::new().address(self.pod).port(self.pod_port)
    }

    fn loops(&self) -> Part {
        Part::new().address(self.pod).address(self.pod)
    }
}

fn ports(ip: Ip) -> String {
    format!("ports{}", ip.suffix)
}

fn ip_ports(ip: Ip) -> String {
    format!("ip-ports{}", ip.suffix)
}

fn loops(ip: Ip) -> String {
    format!("loops{}", ip.suffix)
}

/// The table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodTable {
    /// Its name.
    pub name: String,
    /// Pod subnets: address and prefix length, at most one of each family.
    pub subnets: Vec<(IpAddr, u8)>,
    /// Where the pods of all nodes are: what a pod sends there keeps its address.
    pub cluster: Vec<(IpAddr, u8)>,
}

impl PodTable {
    /// The family of the table.
    pub const FAMILY: Family = Family::Inet;

    /// Makes the table with these host ports, whatever there was before.
    pub fn replace(&self, forwards: &[Forward]) -> Batch {
        let mut batch = self.remove_table();
        batch.add_table();
        batch.add_chain(GUARD, Some(Base { kind: "filter", hook: Hook::Prerouting, priority: RAW }));
        for address in [key::V4.source(Reg(0)), key::V4.destination(Reg(0))] {
            add_guard_rule(&mut batch, address);
        }
        for (chain, hook) in [(PREROUTING, Hook::Prerouting), (OUTPUT, Hook::Output)] {
            batch.add_chain(chain, Some(Base { kind: "nat", hook, priority: BEFORE_DSTNAT }));
        }
        batch.add_chain(POSTROUTING, Some(Base { kind: "nat", hook: Hook::Postrouting, priority: SRCNAT }));
        batch.add_chain(PORTS, None);
        for chain in [PREROUTING, OUTPUT] {
            add_local_rule(&mut batch, chain);
        }
        for (address, prefix) in &self.subnets {
            let ip = Ip::of(*address);
            add_sets(&mut batch, ip);
            add_port_rules(&mut batch, ip);
            add_loop_rule(&mut batch, ip);
            add_loopback_rule(&mut batch, ip, *address, *prefix);
            for (range, prefix) in self.cluster.iter().filter(|(range, _)| range.is_ipv4() == address.is_ipv4()) {
                add_cluster_rule(&mut batch, ip, *range, *prefix);
            }
            add_masquerade_rule(&mut batch, ip, *address, *prefix);
        }
        add_forwards(&mut batch, forwards);
        batch
    }

    /// Adds the host ports of a pod.
    pub fn add(&self, forwards: &[Forward]) -> Batch {
        let mut batch = Batch::new(Self::FAMILY, &self.name);
        add_forwards(&mut batch, forwards);
        batch
    }

    /// Removes the host ports of a pod; they must be there.
    pub fn remove(&self, forwards: &[Forward]) -> Batch {
        let mut batch = Batch::new(Self::FAMILY, &self.name);
        for forward in forwards {
            batch.delete_elements(&forward.ports_set(), [forward.key().as_slice()]);
        }
        for (ip, pair) in distinct_loops(forwards) {
            batch.delete_elements(&loops(ip), [pair.as_slice()]);
        }
        batch
    }

    /// Removes the table if it is there.
    pub fn remove_table(&self) -> Batch {
        let mut batch = Batch::new(Self::FAMILY, &self.name);
        batch.add_table();
        batch.delete_table();
        batch
    }
}

/// Drops what comes from another interface and has a loopback address.
fn add_guard_rule(batch: &mut Batch, address: Expr<'_>) {
    const LOOPBACK: &[u8] = b"lo\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
    let ip = key::V4;
    let [family, is_family] = ip.is_family();
    let (loopback, mask) = ip.loopback;
    batch.add_rule(
        GUARD,
        &[
            family,
            is_family,
            Expr::Meta { dreg: Reg(0), key: Meta::IifName },
            Expr::Compare { sreg: Reg(0), op: Cmp::Neq, value: LOOPBACK },
            address,
            Expr::Mask { sreg: Reg(0), dreg: Reg(0), mask },
            Expr::Compare { sreg: Reg(0), op: Cmp::Eq, value: loopback },
            Expr::Verdict(Verdict::Drop),
        ],
    );
}

fn add_local_rule(batch: &mut Batch, chain: &str) {
    const RTN_LOCAL: &[u8] = &2u32.to_ne_bytes();
    batch.add_rule(
        chain,
        &[
            Expr::FibType { dreg: Reg(0), destination: true },
            Expr::Compare { sreg: Reg(0), op: Cmp::Eq, value: RTN_LOCAL },
            Expr::Verdict(Verdict::Goto(PORTS)),
        ],
    );
}

fn add_sets(batch: &mut Batch, ip: Ip) {
    let target = [ip.address, Type::InetService];
    let port = [Type::InetProto, Type::InetService];
    batch.add_set(&Set { name: &ports(ip), key: &port, data: &target, dynamic: None });
    let with_address = [ip.address, Type::InetProto, Type::InetService];
    batch.add_set(&Set { name: &ip_ports(ip), key: &with_address, data: &target, dynamic: None });
    batch.add_set(&Set { name: &loops(ip), key: &[ip.address, ip.address], data: &[], dynamic: None });
}

/// Registers: the destination in 0–3, protocol in 4, port in 5, the pod from 8.
fn add_port_rules(batch: &mut Batch, ip: Ip) {
    let address = Reg(4 - ip.words());
    let (ports, ip_ports) = (ports(ip), ip_ports(ip));
    let (target, port) = (Reg(8), Reg(8 + ip.words()));
    let (loopback, mask) = ip.loopback;
    for (set, key) in [(&ip_ports, address), (&ports, Reg(4))] {
        if *set == ports && !ip.is_v6() {
            add_resolver_rule(batch);
        }
        let mut expressions = ip.is_family().to_vec();
        if ip.is_v6() {
            expressions.extend([
                ip.destination(target),
                Expr::Mask { sreg: target, dreg: target, mask },
                Expr::Compare { sreg: target, op: Cmp::Neq, value: loopback },
            ]);
        }
        expressions.extend([
            ip.destination(address),
            key::protocol(Reg(4)),
            key::destination_port(Reg(5)),
            Expr::Map { set, sreg: key, dreg: target },
            Expr::Dnat { family: ip.family, address: target, port },
        ]);
        batch.add_rule(PORTS, &expressions);
    }
}

/// Leaves the loopback addresses but 127.0.0.1 to who listens there: of port 53 it may be the host's resolver.
fn add_resolver_rule(batch: &mut Batch) {
    let ip = key::V4;
    let [family, is_family] = ip.is_family();
    let (loopback, mask) = ip.loopback;
    batch.add_rule(
        PORTS,
        &[
            family,
            is_family,
            ip.destination(Reg(0)),
            Expr::Compare { sreg: Reg(0), op: Cmp::Neq, value: &[127, 0, 0, 1] },
            Expr::Mask { sreg: Reg(0), dreg: Reg(0), mask },
            Expr::Compare { sreg: Reg(0), op: Cmp::Eq, value: loopback },
            Expr::Verdict(Verdict::Return),
        ],
    );
}

fn add_loop_rule(batch: &mut Batch, ip: Ip) {
    let [family, is_family] = ip.is_family();
    let loops = loops(ip);
    batch.add_rule(
        POSTROUTING,
        &[
            family,
            is_family,
            ip.source(Reg(0)),
            ip.destination(Reg(ip.words())),
            Expr::Lookup { set: &loops, sreg: Reg(0), invert: false },
            Expr::Masquerade,
        ],
    );
}

fn add_loopback_rule(batch: &mut Batch, ip: Ip, subnet: IpAddr, prefix: u8) {
    let [family, is_family] = ip.is_family();
    let (network, mask) = ip.network(subnet, prefix);
    let (loopback, loopback_mask) = ip.loopback;
    batch.add_rule(
        POSTROUTING,
        &[
            family,
            is_family,
            ip.source(Reg(0)),
            Expr::Mask { sreg: Reg(0), dreg: Reg(0), mask: loopback_mask },
            Expr::Compare { sreg: Reg(0), op: Cmp::Eq, value: loopback },
            ip.destination(Reg(0)),
            Expr::Mask { sreg: Reg(0), dreg: Reg(0), mask: &mask },
            Expr::Compare { sreg: Reg(0), op: Cmp::Eq, value: &network },
            Expr::Masquerade,
        ],
    );
}

/// Registers: the destination from 0.
fn add_cluster_rule(batch: &mut Batch, ip: Ip, range: IpAddr, prefix: u8) {
    let [family, is_family] = ip.is_family();
    let (network, mask) = ip.network(range, prefix);
    batch.add_rule(
        POSTROUTING,
        &[
            family,
            is_family,
            ip.destination(Reg(0)),
            Expr::Mask { sreg: Reg(0), dreg: Reg(0), mask: &mask },
            Expr::Compare { sreg: Reg(0), op: Cmp::Eq, value: &network },
            Expr::Verdict(Verdict::Accept),
        ],
    );
}

fn add_masquerade_rule(batch: &mut Batch, ip: Ip, subnet: IpAddr, prefix: u8) {
    let [family, is_family] = ip.is_family();
    let (network, mask) = ip.network(subnet, prefix);
    batch.add_rule(
        POSTROUTING,
        &[
            family,
            is_family,
            ip.source(Reg(0)),
            Expr::Mask { sreg: Reg(0), dreg: Reg(0), mask: &mask },
            Expr::Compare { sreg: Reg(0), op: Cmp::Eq, value: &network },
            ip.destination(Reg(0)),
            Expr::Mask { sreg: Reg(0), dreg: Reg(0), mask: &mask },
            Expr::Compare { sreg: Reg(0), op: Cmp::Neq, value: &network },
            Expr::Masquerade,
        ],
    );
}

fn add_forwards(batch: &mut Batch, forwards: &[Forward]) {
    for forward in forwards {
        let (key, target) = (forward.key(), forward.target());
        batch.add_elements(
            &forward.ports_set(),
            [Element { key: key.as_slice(), data: Data::Value(target.as_slice()) }],
        );
    }
    for (ip, pair) in distinct_loops(forwards) {
        batch.add_elements(&loops(ip), [Element { key: pair.as_slice(), data: Data::None }]);
    }
}

fn distinct_loops(forwards: &[Forward]) -> Vec<(Ip, Part)> {
    let mut pairs: Vec<(Ip, Part)> = Vec::new();
    for forward in forwards {
        let pair = forward.loops();
        if !pairs.iter().any(|(_, known)| *known == pair) {
            pairs.push((Ip::of(forward.pod), pair));
        }
    }
    pairs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_with_two_ports_loops_once() {
        let forward = Forward { protocol: 6, host: None, host_port: 1, pod: [10, 0, 0, 2].into(), pod_port: 2 };
        assert_eq!(distinct_loops(&[forward, Forward { host_port: 3, ..forward }]).len(), 1);
    }
}
