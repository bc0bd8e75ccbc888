//! Chains and their rules.
//!
//! Registers: a key begins at 0; with a client in front of the frontend it serves for affinity, and with a slot or a number
//! behind the frontend for its endpoint. Each rule loads what it reads: kernels refuse rules that read what others loaded.

use ipnet::IpNet;
use service::{Local, Network};
use sys::netlink::nft::{Base, Batch, Cmp, Ct, DynsetOp, Expr, From, Hook, Meta, Reg, Verdict};

use super::elements::{Kind, SetName, Side};
use super::{Balancer, Config};
use crate::key::{self, Ip, V4, V6};

const PREROUTING: &str = "prerouting";
const OUTPUT: &str = "output";
const POSTROUTING: &str = "postrouting";
/// What may have been led to an endpoint, on its way out.
const LEAVING: &str = "leaving";
const PREROUTING_LAST: &str = "prerouting-last";
const OUTPUT_LAST: &str = "output-last";
/// Beside IPVS only.
const REDIRECTS: &str = "redirects";
/// The kind of a route to an address of this host (`linux/rtnetlink.h`).
const RTN_LOCAL: &[u8] = &2u32.to_ne_bytes();

/// A connection of which this is the first packet (`NF_CT_STATE_BIT(IP_CT_NEW)`).
const STATE_NEW: &[u8] = &8u32.to_ne_bytes();

/// Refuses at once.
pub(super) const REFUSE: &str = "refuse";
/// The priorities that nft calls `dstnat` and `srcnat`.
const DSTNAT: i32 = -100;
const SRCNAT: i32 = 100;
/// After everybody's translations of destinations: the kernel comes here with what none of them took.
const DSTNAT_LAST: i32 = DSTNAT + 10;
const TCP: u8 = 6;
/// Protocols, and the type of their messages that tell a shorter way (`linux/icmp.h`, RFC 4861).
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const ICMP_REDIRECT: u8 = 5;
const NDISC_REDIRECT: u8 = 137;

/// Chains with session affinity have this bit in their numbers ...
pub(super) const AFFINITY_BIT: u32 = 31;
/// ... and its length in seconds from this bit on, before it the number of endpoints.
pub(super) const AFFINITY_SHIFT: u32 = 14;

/// A chain that leads to one of `count` endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LoadBalancer {
    pub(super) ipv6: bool,
    pub(super) node_port: bool,
    pub(super) side: Side,
    pub(super) count: u32,
    pub(super) affinity_s: Option<u32>,
}

/// Registers of a key and of what belongs to it.
#[derive(Debug, Clone, Copy)]
struct Layout {
    ip: Ip,
    /// Where the frontend begins: after the client, if it is part of the key.
    frontend: u8,
}

impl Layout {
    fn protocol(self) -> Reg {
        Reg(self.frontend + self.ip.words())
    }

    fn port(self) -> Reg {
        Reg(self.protocol().0 + 1)
    }

    /// Slot, or number of the endpoint.
    fn number(self) -> Reg {
        Reg(self.port().0 + 1)
    }

    /// What a map gave.
    fn found(self) -> Reg {
        Reg(self.number().0 + 1)
    }

    /// Port of the endpoint that a map gave.
    fn found_port(self) -> Reg {
        Reg(self.found().0 + self.ip.words())
    }

    /// Looks up the frontend with what is behind it.
    fn find(self, set: &str) -> Expr<'_> {
        Expr::Map { set, sreg: Reg(self.frontend), dreg: self.found() }
    }

    /// Moves the number that a map gave behind the frontend.
    fn move_number(self) -> [Expr<'static>; 4] {
        through_mark(self.found(), self.number(), self.found_port())
    }

    /// Loads the frontend that a packet goes to.
    fn load_frontend(self, node_port: bool) -> [Expr<'static>; 3] {
        let address = Reg(self.frontend);
        let address = if node_port {
            Expr::Load { dreg: address, value: self.ip.unspecified() }
        } else {
            self.ip.destination(address)
        };
        [address, key::protocol(self.protocol()), key::destination_port(self.port())]
    }

    fn dnat(self) -> Expr<'static> {
        Expr::Dnat { family: self.ip.family, address: self.found(), port: self.found_port() }
    }
}

/// Moves what a map gave. It goes through the packet's mark, which is as before afterwards: the program `nft` aborts on
/// listing a rule that uses a map's value as part of a key (seen with 1.0.6).
fn through_mark(found: Reg, to: Reg, saved: Reg) -> [Expr<'static>; 4] {
    [
        Expr::Meta { dreg: saved, key: Meta::Mark },
        Expr::SetMeta { key: Meta::Mark, sreg: found },
        Expr::Meta { dreg: to, key: Meta::Mark },
        Expr::SetMeta { key: Meta::Mark, sreg: saved },
    ]
}

impl LoadBalancer {
    /// Under which `verdicts` has it. It says all that makes a difference between chains of a map, so it is the same in each
    /// daemon's table: a packet that finds it before a replacement of the table finds the same chain after it.
    pub(super) fn number(&self) -> u32 {
        self.affinity_s.map_or(0, |seconds| 1 << AFFINITY_BIT | seconds << AFFINITY_SHIFT) | self.count
    }

    pub(super) fn name(&self) -> String {
        let LoadBalancer { side, node_port, count, affinity_s, .. } = self;
        let kind = if *node_port { "node-port" } else { "lb" };
        let affinity = affinity_s.map(|seconds| format!("-affinity-{seconds}")).unwrap_or_default();
        format!("{}{kind}{}-{count}{affinity}", side.prefix(), Ip::v6(self.ipv6).suffix)
    }

    fn set(&self, kind: fn(Side) -> Kind) -> String {
        SetName { kind: kind(self.side), ipv6: self.ipv6 }.name()
    }

    pub(super) fn add(&self, batch: &mut Batch) {
        let name = self.name();
        batch.add_chain(&name, None);
        if let Some(seconds) = self.affinity_s {
            self.add_affinity_rules(batch, &name, seconds);
        }
        let layout = Layout { ip: Ip::v6(self.ipv6), frontend: 0 };
        let endpoints = self.set(Kind::Endpoints);
        let mut rule = layout.load_frontend(self.node_port).to_vec();
        rule.extend([self.draw(layout), layout.find(&endpoints), layout.dnat()]);
        batch.add_rule(&name, &rule);
    }

    /// Draws a slot.
    fn draw(&self, layout: Layout) -> Expr<'static> {
        Expr::Random { dreg: layout.number(), modulus: self.count }
    }

    fn add_affinity_rules(&self, batch: &mut Batch, name: &str, seconds: u32) {
        let ip = Ip::v6(self.ipv6);
        let layout = Layout { ip, frontend: ip.words() };
        let [affinity, numbers, members] = [Kind::Affinity, Kind::Numbers, Kind::Members].map(|kind| self.set(kind));
        let load = || {
            let mut rule = vec![ip.source(Reg(0))];
            rule.extend(layout.load_frontend(self.node_port));
            rule
        };
        let timeout_ms = u64::from(seconds) * 1000;
        let write = |op| Expr::Dynset { set: &affinity, op, key: Reg(0), data: Some(layout.number()), timeout_ms };
        // The client is known, and so is its endpoint still.
        let mut rule = load();
        rule.push(Expr::Map { set: &affinity, sreg: Reg(0), dreg: layout.found() });
        rule.extend(layout.move_number());
        rule.extend([layout.find(&members), write(DynsetOp::Update), layout.dnat()]);
        batch.add_rule(name, &rule);
        // If it was known, its endpoint has left: `Update` would not change an element that is there.
        let mut rule = load();
        rule.extend([Expr::Load { dreg: layout.number(), value: &[0; 4] }, write(DynsetOp::Delete)]);
        batch.add_rule(name, &rule);
        let mut rule = load();
        rule.extend([self.draw(layout), layout.find(&numbers)]);
        rule.extend(layout.move_number());
        rule.extend([write(DynsetOp::Update), layout.find(&members), layout.dnat()]);
        batch.add_rule(name, &rule);
    }
}

/// Name of a chain of sources.
pub(super) fn sources_name(number: u32) -> String {
    format!("sources-{number}")
}

/// Adds a chain that lets only these sources go on.
pub(super) fn add_sources(batch: &mut Batch, number: u32, sources: &[IpNet]) {
    let name = sources_name(number);
    batch.add_chain(&name, None);
    for range in sources {
        add_cidr_rule(batch, &name, *range, Ip::source, Verdict::Return);
    }
    batch.add_rule(&name, &[Expr::Verdict(Verdict::Drop)]);
}

/// See [`super::ServiceTable::fixed_chains`].
pub(super) fn fixed() -> Vec<String> {
    let of_families =
        ["inbound", "outbound", "dispatch", LEAVING].into_iter().flat_map(|name| [V4, V6].map(|ip| (name, ip.suffix)));
    let alone = [PREROUTING, OUTPUT, POSTROUTING, PREROUTING_LAST, OUTPUT_LAST, REFUSE];
    alone.map(str::to_owned).into_iter().chain(of_families.map(|(name, suffix)| format!("{name}{suffix}"))).collect()
}

/// The chains that are always there.
pub(super) fn add_base(batch: &mut Batch, config: &Config, balancer: Balancer) {
    batch.add_chain(PREROUTING, Some(Base { kind: "nat", hook: Hook::Prerouting, priority: DSTNAT }));
    batch.add_chain(OUTPUT, Some(Base { kind: "nat", hook: Hook::Output, priority: DSTNAT }));
    batch.add_chain(POSTROUTING, Some(Base { kind: "nat", hook: Hook::Postrouting, priority: SRCNAT }));
    batch.add_chain(REFUSE, None);
    let protocol = key::protocol(Reg(0));
    let is_tcp = Expr::Compare { sreg: Reg(0), op: Cmp::Eq, value: &[TCP] };
    batch.add_rule(REFUSE, &[protocol, is_tcp, Expr::Reject { tcp: true }]);
    batch.add_rule(REFUSE, &[Expr::Reject { tcp: false }]);
    for ip in [V4, V6] {
        add_paths(batch, ip, &config.network, balancer);
        add_masquerade_rules(batch, ip, &config.network, balancer);
    }
    add_refusals(batch, &config.network);
    if balancer == Balancer::Ipvs {
        add_redirect_rules(batch);
    }
}

/// Refuses what goes to an address of the Services' ranges that no Service has: neither ours, nor one that is left to
/// another proxy (label `service.kubernetes.io/service-proxy-name`).
fn add_refusals(batch: &mut Batch, network: &Network) {
    for (chain, hook) in [(PREROUTING_LAST, Hook::Prerouting), (OUTPUT_LAST, Hook::Output)] {
        batch.add_chain(chain, Some(Base { kind: "nat", hook, priority: DSTNAT_LAST }));
        for range in &network.service_cidrs {
            add_refusal(batch, chain, *range);
        }
    }
}

/// Keeps this host from telling its endpoints a shorter way to their clients. IPVS puts back the service's address after
/// the kernel has found that an answer leaves where it came from, so the endpoint would be told, and answer past IPVS.
fn add_redirect_rules(batch: &mut Batch) {
    const FILTER: i32 = 0;
    batch.add_chain(REDIRECTS, Some(Base { kind: "filter", hook: Hook::Output, priority: FILTER }));
    for (ip, protocol, kind) in [(V4, ICMP, ICMP_REDIRECT), (V6, ICMPV6, NDISC_REDIRECT)] {
        let [family, is_family] = ip.is_family();
        let hairpins = set_name(Kind::Hairpins, ip);
        batch.add_rule(
            REDIRECTS,
            &[
                family,
                is_family,
                key::protocol(Reg(0)),
                Expr::Compare { sreg: Reg(0), op: Cmp::Eq, value: &[protocol] },
                Expr::Payload { dreg: Reg(0), from: From::Transport, offset: 0, len: 1 },
                Expr::Compare { sreg: Reg(0), op: Cmp::Eq, value: &[kind] },
                ip.destination(Reg(0)),
                ip.destination(Reg(ip.words())),
                Expr::Lookup { set: &hairpins, sreg: Reg(0), invert: false },
                Expr::Verdict(Verdict::Drop),
            ],
        );
    }
}

/// What packets to frontends go through.
fn add_paths(batch: &mut Batch, ip: Ip, network: &Network, balancer: Balancer) {
    let [inbound, outbound, dispatch] = ["inbound", "outbound", "dispatch"].map(|name| format!("{name}{}", ip.suffix));
    for name in [&inbound, &outbound, &dispatch] {
        batch.add_chain(name, None);
    }
    for (hook, path) in [(PREROUTING, &inbound), (OUTPUT, &outbound)] {
        let [family, is_family] = ip.is_family();
        batch.add_rule(hook, &[family, is_family, Expr::Verdict(Verdict::Goto(path))]);
        add_firewall_rule(batch, path, ip);
    }
    let pods = Pods::of(network, ip);
    let from_outside = pods.unless_from();
    let node_ports = node_port_conditions(ip, network, balancer);
    add_service_rule(batch, &inbound, &from_outside, ip, Side::Outside);
    add_node_port_rules(batch, &inbound, &from_outside, ip, Side::Outside, &node_ports);
    for path in [&inbound, &outbound] {
        batch.add_rule(path, &[Expr::Verdict(Verdict::Goto(&dispatch))]);
    }
    add_service_rule(batch, &dispatch, &[], ip, Side::Inside);
    if balancer == Balancer::Ipvs {
        add_vip_refusal(batch, &dispatch, ip);
    }
    add_node_port_rules(batch, &dispatch, &[], ip, Side::Inside, &node_ports);
}

fn of_family(ranges: &[IpNet], ip: Ip) -> impl Iterator<Item = IpNet> {
    ranges.iter().copied().filter(move |range| range.addr().is_ipv6() == ip.is_v6())
}

/// By what packets of pods are known, in the kernel's words.
enum Pods {
    /// Networks and the masks that keep them.
    Sources(Ip, Vec<(Vec<u8>, Vec<u8>)>),
    /// The beginning of an interface's name, or all of it.
    Interface(Vec<u8>),
}

/// Bytes of an interface's name, with the zeros behind it.
const NAME_BYTES: usize = 16;

impl Pods {
    fn of(network: &Network, ip: Ip) -> Pods {
        match &network.local {
            Local::Sources(ranges) => Pods::Sources(ip, of_family(ranges, ip).map(|range| masked(ip, range)).collect()),
            Local::Bridge(name) => {
                let mut name = name.as_bytes().to_vec();
                name.resize(NAME_BYTES, 0);
                Pods::Interface(name)
            }
            Local::InterfacePrefix(prefix) => Pods::Interface(prefix.as_bytes().to_vec()),
        }
    }

    /// Goes on unless the packet is a pod's.
    fn unless_from(&self) -> Vec<Expr<'_>> {
        match self {
            Pods::Sources(ip, networks) => {
                let tests = networks.iter().flat_map(|(network, mask)| {
                    [
                        ip.source(Reg(0)),
                        Expr::Mask { sreg: Reg(0), dreg: Reg(0), mask },
                        Expr::Compare { sreg: Reg(0), op: Cmp::Neq, value: network },
                    ]
                });
                tests.collect()
            }
            // What this host sends has no such interface.
            Pods::Interface(name) => vec![
                Expr::Meta { dreg: Reg(0), key: Meta::IifName },
                Expr::Compare { sreg: Reg(0), op: Cmp::Neq, value: name },
            ],
        }
    }
}

/// A network and the mask that keeps it.
fn masked(ip: Ip, range: IpNet) -> (Vec<u8>, Vec<u8>) {
    ip.network(range.addr(), range.prefix_len())
}

/// Goes through the sources of the frontend.
fn add_firewall_rule(batch: &mut Batch, chain: &str, ip: Ip) {
    let set = set_name(Kind::Firewall, ip);
    let mut rule = Layout { ip, frontend: 0 }.load_frontend(false).to_vec();
    rule.push(Expr::Vmap { set: &set, sreg: Reg(0) });
    batch.add_rule(chain, &rule);
}

/// Takes the verdict of the frontend.
fn add_service_rule(batch: &mut Batch, chain: &str, before: &[Expr<'_>], ip: Ip, side: Side) {
    let layout = Layout { ip, frontend: 0 };
    let verdict = VerdictOf::new(Kind::Services(side), Kind::Verdicts { side, node_port: false }, ip);
    let mut rule = before.to_vec();
    rule.extend(layout.load_frontend(false));
    rule.extend(verdict.take(layout.number()));
    batch.add_rule(chain, &rule);
}

/// The way from a key to a verdict: a map gives the number under which another has it.
struct VerdictOf {
    numbers: String,
    verdicts: String,
}

impl VerdictOf {
    fn new(numbers: Kind, verdicts: Kind, ip: Ip) -> VerdictOf {
        VerdictOf { numbers: set_name(numbers, ip), verdicts: set_name(verdicts, ip) }
    }

    /// Takes the verdict of the key that begins in the first register; this one and the next are free.
    fn take(&self, free: Reg) -> [Expr<'_>; 6] {
        let [saved, set, get, restored] = through_mark(free, free, Reg(free.0 + 1));
        let find = Expr::Map { set: &self.numbers, sreg: Reg(0), dreg: free };
        [find, saved, set, get, restored, Expr::Vmap { set: &self.verdicts, sreg: free }]
    }
}

/// On which addresses node ports answer: one of these conditions holds.
enum NodePortAddresses {
    /// All of this host's but loopback ones, as far as they are in one of these networks, if there are any.
    OfHost(Vec<(Vec<u8>, Vec<u8>)>),
    /// Those in a set.
    In(String),
}

fn node_port_conditions(ip: Ip, network: &Network, balancer: Balancer) -> NodePortAddresses {
    match balancer {
        Balancer::Rules => {
            let limits = network.node_ports.limits(ip.is_v6());
            NodePortAddresses::OfHost(limits.into_iter().map(|range| masked(ip, range)).collect())
        }
        Balancer::Ipvs => NodePortAddresses::In(set_name(Kind::Own, ip)),
    }
}

impl NodePortAddresses {
    fn conditions(&self, ip: Ip) -> Vec<Vec<Expr<'_>>> {
        match self {
            NodePortAddresses::OfHost(networks) if networks.is_empty() => vec![to_this_node(ip).to_vec()],
            NodePortAddresses::OfHost(networks) => {
                let within = networks.iter().map(|(network, mask)| {
                    let mut condition = to_this_node(ip).to_vec();
                    condition.extend([
                        ip.destination(Reg(0)),
                        Expr::Mask { sreg: Reg(0), dreg: Reg(0), mask },
                        Expr::Compare { sreg: Reg(0), op: Cmp::Eq, value: network },
                    ]);
                    condition
                });
                within.collect()
            }
            NodePortAddresses::In(set) => vec![is_in(set, ip.destination(Reg(0))).to_vec()],
        }
    }
}

/// Takes the verdict of the node port. Node ports do not answer on the loopback addresses, as host ports do not.
fn add_node_port_rules(
    batch: &mut Batch,
    chain: &str,
    before: &[Expr<'_>],
    ip: Ip,
    side: Side,
    addresses: &NodePortAddresses,
) {
    let verdict = VerdictOf::new(Kind::NodePorts(side), Kind::Verdicts { side, node_port: true }, ip);
    for condition in addresses.conditions(ip) {
        let mut rule = before.to_vec();
        rule.extend(condition);
        rule.extend([key::protocol(Reg(0)), key::destination_port(Reg(1))]);
        rule.extend(verdict.take(Reg(2)));
        batch.add_rule(chain, &rule);
    }
}

/// Goes on if the packet is for an address of this host, but a loopback one.
fn to_this_node(ip: Ip) -> [Expr<'static>; 5] {
    let (loopback, mask) = ip.loopback;
    [
        Expr::FibType { dreg: Reg(0), destination: true },
        Expr::Compare { sreg: Reg(0), op: Cmp::Eq, value: RTN_LOCAL },
        ip.destination(Reg(0)),
        Expr::Mask { sreg: Reg(0), dreg: Reg(0), mask },
        Expr::Compare { sreg: Reg(0), op: Cmp::Neq, value: loopback },
    ]
}

fn set_name(kind: Kind, ip: Ip) -> String {
    SetName { kind, ipv6: ip.is_v6() }.name()
}

/// Goes on if an address, loaded so, is in a set.
fn is_in<'s>(set: &'s str, address: Expr<'s>) -> [Expr<'s>; 2] {
    [address, Expr::Lookup { set, sreg: Reg(0), invert: false }]
}

/// Refuses what goes to an address of a Service on another port: IPVS needs the address to be this host's own, and the
/// host's own servers must not answer there.
fn add_vip_refusal(batch: &mut Batch, chain: &str, ip: Ip) {
    let vips = set_name(Kind::Vips, ip);
    let mut rule = is_in(&vips, ip.destination(Reg(0))).to_vec();
    // The refusal itself comes by here when this host is refused: it is its own answer, to the same address.
    rule.extend([
        Expr::Ct { dreg: Reg(0), key: Ct::State },
        Expr::Mask { sreg: Reg(0), dreg: Reg(0), mask: STATE_NEW },
        Expr::Compare { sreg: Reg(0), op: Cmp::Neq, value: &[0; 4] },
        Expr::Verdict(Verdict::Goto(REFUSE)),
    ]);
    batch.add_rule(chain, &rule);
}

/// Refuses what goes to a range, but for addresses that are this host's own: the pods' name server has one there.
fn add_refusal(batch: &mut Batch, chain: &str, range: IpNet) {
    let ip = Ip::of(range.addr());
    let [family, is_family] = ip.is_family();
    let (network, mask) = ip.network(range.addr(), range.prefix_len());
    batch.add_rule(
        chain,
        &[
            family,
            is_family,
            Expr::FibType { dreg: Reg(0), destination: true },
            Expr::Compare { sreg: Reg(0), op: Cmp::Neq, value: RTN_LOCAL },
            ip.destination(Reg(0)),
            Expr::Mask { sreg: Reg(0), dreg: Reg(0), mask: &mask },
            Expr::Compare { sreg: Reg(0), op: Cmp::Eq, value: &network },
            Expr::Verdict(Verdict::Goto(REFUSE)),
        ],
    );
}

/// A verdict for addresses of a range.
fn add_cidr_rule(
    batch: &mut Batch,
    chain: &str,
    range: IpNet,
    load: fn(Ip, Reg) -> Expr<'static>,
    verdict: Verdict<'_>,
) {
    let ip = Ip::of(range.addr());
    let (network, mask) = ip.network(range.addr(), range.prefix_len());
    batch.add_rule(
        chain,
        &[
            load(ip, Reg(0)),
            Expr::Mask { sreg: Reg(0), dreg: Reg(0), mask: &mask },
            Expr::Compare { sreg: Reg(0), op: Cmp::Eq, value: &network },
            Expr::Verdict(verdict),
        ],
    );
}

/// Masquerades where the answer would not come back through this node otherwise.
fn add_masquerade_rules(batch: &mut Batch, ip: Ip, network: &Network, balancer: Balancer) {
    let set = |kind| set_name(kind, ip);
    let hairpins = set(Kind::Hairpins);
    let leaving = format!("{LEAVING}{}", ip.suffix);
    batch.add_chain(&leaving, None);
    let mut concerned = concerned(ip, balancer);
    concerned.push(Expr::Verdict(Verdict::Goto(&leaving)));
    batch.add_rule(POSTROUTING, &concerned);
    let to_itself = [
        ip.source(Reg(0)),
        ip.destination(Reg(ip.words())),
        Expr::Lookup { set: &hairpins, sreg: Reg(0), invert: false },
        // What this host sends to itself never leaves it.
        Expr::FibType { dreg: Reg(0), destination: false },
        Expr::Compare { sreg: Reg(0), op: Cmp::Neq, value: RTN_LOCAL },
        Expr::Masquerade,
    ];
    batch.add_rule(&leaving, &to_itself);

    let pods = Pods::of(network, ip);
    let original = Expr::Ct { dreg: Reg(0), key: ip.original_destination() };
    let own = set_name(Kind::Own, ip);
    let services: Vec<_> = of_family(&network.service_cidrs, ip).map(|range| masked(ip, range)).collect();
    for (kind, unless_from) in [(Kind::Masquerade, pods.unless_from()), (Kind::MasqueradeAway, Vec::new())] {
        let mut away = unless_from;
        away.extend([
            // Both halves the same address: whether the endpoint is on this node.
            ip.destination(Reg(0)),
            ip.destination(Reg(ip.words())),
            Expr::Lookup { set: &hairpins, sreg: Reg(0), invert: true },
        ]);
        for address in [original, Expr::Load { dreg: Reg(0), value: ip.unspecified() }] {
            let mut rule = away.clone();
            if address != original {
                match balancer {
                    Balancer::Ipvs => rule.extend(is_in(&own, original)),
                    // What went to a Service's address is none of a node port of the same number.
                    Balancer::Rules => rule.extend(services.iter().flat_map(|range| outside_of(range, original))),
                }
            }
            add_masquerade_rule(batch, &leaving, ip, &rule, address, &set(kind));
        }
    }
    if network.masquerade_all {
        add_masquerade_rule(batch, &leaving, ip, &[], original, &set(Kind::MasqueradeAll));
    }
    if balancer == Balancer::Ipvs {
        add_vip_masquerade(batch, &leaving, ip);
    }
}

/// Goes on if an address, loaded so, is not in a network.
fn outside_of<'s>((network, mask): &'s (Vec<u8>, Vec<u8>), address: Expr<'s>) -> [Expr<'s>; 3] {
    [
        address,
        Expr::Mask { sreg: Reg(0), dreg: Reg(0), mask },
        Expr::Compare { sreg: Reg(0), op: Cmp::Neq, value: network },
    ]
}

/// Masquerades what went to a frontend of this set; `address` loads the frontend's.
fn add_masquerade_rule(batch: &mut Batch, chain: &str, ip: Ip, before: &[Expr<'_>], address: Expr<'_>, set: &str) {
    let layout = Layout { ip, frontend: 0 };
    let mut rule = before.to_vec();
    rule.extend([
        address,
        key::protocol(layout.protocol()),
        Expr::Ct { dreg: layout.port(), key: Ct::OriginalProtoDst },
        Expr::Lookup { set, sreg: Reg(0), invert: false },
        Expr::Masquerade,
    ]);
    batch.add_rule(chain, &rule);
}

/// Masquerades this host's own connections to Services: the address of one is local beside IPVS, so the host takes it for
/// its own source, too, and an endpoint elsewhere would answer to itself.
fn add_vip_masquerade(batch: &mut Batch, chain: &str, ip: Ip) {
    let vips = set_name(Kind::Vips, ip);
    let mut rule = is_in(&vips, ip.source(Reg(0))).to_vec();
    rule.extend([
        Expr::FibType { dreg: Reg(0), destination: true },
        Expr::Compare { sreg: Reg(0), op: Cmp::Neq, value: RTN_LOCAL },
        Expr::Masquerade,
    ]);
    batch.add_rule(chain, &rule);
}

/// Goes on if the packet may have been led to an endpoint. IPVS leaves no trace of that which rules could read, so what
/// follows has to tell by the addresses.
fn concerned(ip: Ip, balancer: Balancer) -> Vec<Expr<'static>> {
    match balancer {
        Balancer::Rules => translated(ip).to_vec(),
        Balancer::Ipvs => ip.is_family().to_vec(),
    }
}

/// Goes on if the packet is of this family and its destination has been translated.
fn translated(ip: Ip) -> [Expr<'static>; 5] {
    const DST_NAT: &[u8] = &(1u32 << 5).to_ne_bytes();
    let [family, is_family] = ip.is_family();
    [
        family,
        is_family,
        Expr::Ct { dreg: Reg(0), key: Ct::Status },
        Expr::Mask { sreg: Reg(0), dreg: Reg(0), mask: DST_NAT },
        Expr::Compare { sreg: Reg(0), op: Cmp::Neq, value: &[0; 4] },
    ]
}
