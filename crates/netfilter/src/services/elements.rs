//! Sets, maps and their elements.

use std::collections::HashSet;
use std::net::IpAddr;

use service::{Endpoint, Entry, Frontend, Target};
use sys::netlink::nft::{Batch, Data, Set, Type, Verdict};

use super::Balancer;
use super::chains::{self, LoadBalancer};
use crate::key::{Ip, Part};

/// Clients that are remembered, in each address family: a budget, not a promise.
const AFFINITY_MAX: u32 = 1 << 17;

/// The longest session affinity, in seconds: the API admits no more than a day.
const AFFINITY_S_MAX: u32 = 86_400;
/// The most endpoints that new connections to a frontend are spread over, as far as their count fits into a chain's number
/// ([`LoadBalancer::number`]).
const SLOTS_MAX: u32 = (1 << chains::AFFINITY_BIT) - 1;
/// The same with session affinity.
const SLOTS_WITH_AFFINITY_MAX: u32 = (1 << chains::AFFINITY_SHIFT) - 1;

/// For whom an endpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Side {
    /// Pods and this node, and everybody where nothing else is said.
    Inside,
    /// Who comes from outside the cluster.
    Outside,
}

impl Side {
    pub(super) const BOTH: [Side; 2] = [Side::Inside, Side::Outside];

    pub(super) fn prefix(self) -> &'static str {
        match self {
            Side::Inside => "",
            Side::Outside => "outside-",
        }
    }
}

/// What a set holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    /// Frontend → number of what becomes of who connects.
    Services(Side),
    /// Protocol . port → the same.
    NodePorts(Side),
    /// The number → verdict.
    Verdicts { side: Side, node_port: bool },
    /// Frontend . slot → endpoint.
    Endpoints(Side),
    /// Frontend . slot → number of the endpoint, of those with affinity.
    Numbers(Side),
    /// Frontend . number → endpoint, of those with affinity.
    Members(Side),
    /// Client . frontend → number; written by the rules.
    Affinity(Side),
    /// Frontend → chain of sources.
    Firewall,
    /// Frontends with endpoints on other nodes.
    Masquerade,
    /// The same, of those that are masqueraded on the way there whoever connects: the pods that are known as such may be
    /// those of other nodes, and what an endpoint answers to them would go past this node.
    MasqueradeAway,
    /// Frontends that are masqueraded whoever connects to whichever endpoint.
    MasqueradeAll,
    /// Endpoint . endpoint, of those on this node.
    Hairpins,
    /// Addresses of this node on which node ports answer; beside IPVS only.
    Own,
    /// Addresses of Services that this node has taken for its own; beside IPVS only.
    Vips,
}

/// A set of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct SetName {
    pub(super) kind: Kind,
    pub(super) ipv6: bool,
}

/// The value of an element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    None,
    /// A number, or address and port of an endpoint.
    Bytes(Part),
    Goto(String),
    Jump(String),
    Drop,
    /// It goes on, to IPVS.
    Accept,
}

impl SetName {
    pub(super) fn all(balancer: Balancer) -> impl Iterator<Item = SetName> {
        let of_sides = Side::BOTH.into_iter().flat_map(|side| {
            let kinds =
                [Kind::Services, Kind::NodePorts, Kind::Endpoints, Kind::Numbers, Kind::Members, Kind::Affinity];
            let verdicts = [false, true].map(|node_port| Kind::Verdicts { side, node_port });
            kinds.map(|kind| kind(side)).into_iter().chain(verdicts)
        });
        let beside_ipvs = [Kind::Own, Kind::Vips].into_iter().filter(move |_| balancer == Balancer::Ipvs);
        let masquerade = [Kind::Masquerade, Kind::MasqueradeAway, Kind::MasqueradeAll];
        let kinds = of_sides.chain([Kind::Firewall]).chain(masquerade).chain([Kind::Hairpins]).chain(beside_ipvs);
        kinds.flat_map(|kind| [false, true].map(|ipv6| SetName { kind, ipv6 }))
    }

    pub(super) fn name(self) -> String {
        let (side, word) = match self.kind {
            Kind::Services(side) => (side, "services"),
            Kind::NodePorts(side) => (side, "node-ports"),
            Kind::Verdicts { side, node_port: false } => (side, "verdicts"),
            Kind::Verdicts { side, node_port: true } => (side, "node-port-verdicts"),
            Kind::Endpoints(side) => (side, "endpoints"),
            Kind::Numbers(side) => (side, "numbers"),
            Kind::Members(side) => (side, "members"),
            Kind::Affinity(side) => (side, "affinity"),
            Kind::Firewall => (Side::Inside, "firewall"),
            Kind::Masquerade => (Side::Inside, "masquerade"),
            Kind::MasqueradeAway => (Side::Inside, "masquerade-away"),
            Kind::MasqueradeAll => (Side::Inside, "masquerade-all"),
            Kind::Hairpins => (Side::Inside, "hairpins"),
            Kind::Own => (Side::Inside, "own"),
            Kind::Vips => (Side::Inside, "vips"),
        };
        format!("{}{word}{}", side.prefix(), Ip::v6(self.ipv6).suffix)
    }

    /// Whether rules write it.
    pub(super) fn is_dynamic(self) -> bool {
        matches!(self.kind, Kind::Affinity(_))
    }

    pub(super) fn add(self, batch: &mut Batch) {
        use Type::{InetProto, InetService, Mark, Verdict};
        let address = Ip::v6(self.ipv6).address;
        let (key, data): (&[Type], &[Type]) = match self.kind {
            Kind::Services(_) => (&[address, InetProto, InetService], &[Mark]),
            Kind::NodePorts(_) => (&[InetProto, InetService], &[Mark]),
            Kind::Verdicts { .. } => (&[Mark], &[Verdict]),
            Kind::Firewall => (&[address, InetProto, InetService], &[Verdict]),
            Kind::Endpoints(_) | Kind::Members(_) => {
                (&[address, InetProto, InetService, Mark], &[address, InetService])
            }
            Kind::Numbers(_) => (&[address, InetProto, InetService, Mark], &[Mark]),
            Kind::Affinity(_) => (&[address, address, InetProto, InetService], &[Mark]),
            Kind::Masquerade | Kind::MasqueradeAway | Kind::MasqueradeAll => (&[address, InetProto, InetService], &[]),
            Kind::Hairpins => (&[address, address], &[]),
            Kind::Own | Kind::Vips => (&[address], &[]),
        };
        let dynamic = self.is_dynamic().then_some(AFFINITY_MAX);
        batch.add_set(&Set { name: &self.name(), key, data, dynamic });
    }
}

impl Value {
    pub(super) fn data(&self) -> Data<'_> {
        match self {
            Value::None => Data::None,
            Value::Bytes(bytes) => Data::Value(bytes.as_slice()),
            Value::Goto(chain) => Data::Verdict(Verdict::Goto(chain)),
            Value::Jump(chain) => Data::Verdict(Verdict::Jump(chain)),
            Value::Drop => Data::Verdict(Verdict::Drop),
            Value::Accept => Data::Verdict(Verdict::Accept),
        }
    }
}

/// What becomes of who connects to a frontend, and is led no further by a chain of its own. Chains of endpoints have the
/// numbers between ([`LoadBalancer::number`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Refused,
    Dropped,
    /// Others lead the connection.
    Accepted,
}

impl Fate {
    const fn number(self) -> u32 {
        match self {
            Fate::Refused => 0,
            Fate::Dropped => u32::MAX,
            Fate::Accepted => u32::MAX - 1,
        }
    }

    fn verdict(self) -> Value {
        match self {
            Fate::Refused => Value::Goto(chains::REFUSE.to_owned()),
            Fate::Dropped => Value::Drop,
            Fate::Accepted => Value::Accept,
        }
    }
}

/// Verdicts that are there whatever the rules are.
pub(super) fn fixed_verdicts(balancer: Balancer, mut visit: impl FnMut(SetName, Part, Value)) {
    let verdicts = SetName::all(balancer).filter(|set| matches!(set.kind, Kind::Verdicts { .. }));
    for set in verdicts {
        for fate in [Fate::Refused, Fate::Dropped, Fate::Accepted] {
            visit(set, Part::new().number(fate.number()), fate.verdict());
        }
    }
}

/// The element by which a chain of endpoints is found.
pub(super) fn verdict(chain: &LoadBalancer) -> (SetName, Part, Value) {
    let kind = Kind::Verdicts { side: chain.side, node_port: chain.node_port };
    (SetName { kind, ipv6: chain.ipv6 }, Part::new().number(chain.number()), Value::Goto(chain.name()))
}

/// The key of a frontend.
pub(super) fn key(frontend: &Frontend) -> Part {
    Part::new().address(frontend.address).protocol(frontend.protocol.number()).port(frontend.port)
}

pub(super) fn place(endpoint: &Endpoint) -> Part {
    Part::new().address(endpoint.address).port(endpoint.port)
}

/// Numbers under which clients remember endpoints, by slot: the same ones after a restart, and whoever else comes or goes,
/// but for endpoints that meet in a hash.
fn numbers(endpoints: &[Endpoint]) -> Vec<u32> {
    let mut order: Vec<usize> = (0..endpoints.len()).collect();
    order.sort_unstable_by_key(|slot| endpoints[*slot]);
    let mut taken = HashSet::new();
    let mut numbers = vec![0; endpoints.len()];
    for slot in order {
        let mut number = hash(&endpoints[slot]);
        while !taken.insert(number) {
            number = number.wrapping_add(1);
        }
        numbers[slot] = number;
    }
    numbers
}

/// FNV-1a, 32 bits.
fn hash(endpoint: &Endpoint) -> u32 {
    let step = |hash: u32, byte: &u8| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193);
    place(endpoint).as_slice().iter().fold(0x811c_9dc5, step)
}

/// The element of an endpoint on this node.
pub(super) fn hairpin(address: IpAddr) -> (SetName, Part) {
    let pair = Part::new().address(address).address(address);
    (SetName { kind: Kind::Hairpins, ipv6: address.is_ipv6() }, pair)
}

/// What holds for one side of an entry, if it makes a difference.
pub(super) fn target(entry: &Entry, side: Side) -> Option<&Target> {
    match side {
        Side::Inside => Some(&entry.inside),
        Side::Outside => entry.outside.as_ref(),
    }
}

/// The side of an entry that IPVS serves, if it serves one: it knows one list of servers for an address and port, and the
/// rest of the world is what its schedulers are for. External addresses are the rules' alone, as IPVS would need to have
/// all of the address, which may be that of a host that is really there.
pub(super) fn ipvs_side(entry: &Entry) -> Option<Side> {
    match (entry.kind, &entry.outside) {
        (service::Kind::ExternalIp, _) => None,
        (_, Some(Target::Endpoints(_))) => Some(Side::Outside),
        _ => Some(Side::Inside),
    }
}

/// The chain that serves one side of an entry, if one does.
pub(super) fn load_balancer(frontend: &Frontend, entry: &Entry, side: Side) -> Option<LoadBalancer> {
    let target = target(entry, side)?;
    let affinity_s = entry.affinity_s.map(|seconds| seconds.min(AFFINITY_S_MAX));
    let most = if affinity_s.is_some() { SLOTS_WITH_AFFINITY_MAX } else { SLOTS_MAX };
    let count = u32::try_from(target.endpoints().len()).map_or(most, |count| count.min(most));
    let (ipv6, node_port) = (frontend.address.is_ipv6(), frontend.is_node_port());
    (count > 0).then_some(LoadBalancer { ipv6, node_port, side, count, affinity_s })
}

/// What the elements of an entry depend on beside it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Circumstances {
    /// The number of its chain of sources.
    pub(super) source: Option<u32>,
    /// Whether pods can be told from who comes from outside.
    pub(super) pods_known: bool,
    /// Whether all that goes to an address of a Service is masqueraded.
    pub(super) masquerade_all: bool,
    /// Which side is served by others than the rules.
    pub(super) left: Option<Side>,
}

/// All elements of an entry but those of its hairpins.
pub(super) fn list(
    frontend: &Frontend,
    entry: &Entry,
    circumstances: Circumstances,
    mut visit: impl FnMut(SetName, Part, Value),
) {
    let Circumstances { source, pods_known, masquerade_all, left } = circumstances;
    let ipv6 = frontend.address.is_ipv6();
    let mut visit = |kind, key, value| visit(SetName { kind, ipv6 }, key, value);
    for side in Side::BOTH {
        let target = target(entry, side);
        let is_left = left == Some(side);
        let number = match target {
            None => continue,
            Some(Target::Refuse) => Some(Fate::Refused.number()),
            Some(Target::Drop) => Some(Fate::Dropped.number()),
            Some(Target::Endpoints(_)) if is_left => Some(Fate::Accepted.number()),
            Some(Target::Endpoints(_)) => load_balancer(frontend, entry, side).map(|chain| chain.number()),
        };
        let number = number.map(|number| Value::Bytes(Part::new().number(number)));
        match number {
            Some(number) if frontend.is_node_port() => {
                let key = Part::new().protocol(frontend.protocol.number()).port(frontend.port);
                visit(Kind::NodePorts(side), key, number);
            }
            Some(number) => visit(Kind::Services(side), key(frontend), number),
            None => {}
        }
        let endpoints = target.filter(|_| !is_left).map_or(&[][..], Target::endpoints);
        for (slot, endpoint) in (0u32..).zip(endpoints) {
            visit(Kind::Endpoints(side), key(frontend).number(slot), Value::Bytes(place(endpoint)));
        }
        if entry.affinity_s.is_some() {
            for ((slot, endpoint), number) in (0u32..).zip(endpoints).zip(numbers(endpoints)) {
                let value = Value::Bytes(Part::new().number(number));
                visit(Kind::Numbers(side), key(frontend).number(slot), value);
                visit(Kind::Members(side), key(frontend).number(number), Value::Bytes(place(endpoint)));
            }
        }
    }
    if let Some(number) = source {
        visit(Kind::Firewall, key(frontend), Value::Jump(chains::sources_name(number)));
    }
    let remote = |endpoint: &Endpoint| !endpoint.local;
    if entry.inside.endpoints().iter().any(remote) {
        // With `externalTrafficPolicy: Local` pods have a way of their own, and nobody else gets to other nodes.
        if entry.is_external() && entry.outside.is_none() {
            visit(Kind::MasqueradeAway, key(frontend), Value::None);
        } else if entry.is_external() || pods_known {
            visit(Kind::Masquerade, key(frontend), Value::None);
        }
    }
    if masquerade_all && !entry.is_external() && !entry.inside.endpoints().is_empty() {
        visit(Kind::MasqueradeAll, key(frontend), Value::None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With a verdict among them the kernel would walk all rules and maps for each change of a Service.
    #[test]
    fn frontends_have_no_verdicts() {
        let endpoint = |n: u8| Endpoint { address: [10, 0, 0, n].into(), port: 80, local: n == 1 };
        let service = service::Name { namespace: "ns".into(), name: "web".into() };
        let port = service::ServicePort { service, name: "".into(), health_check_port: None };
        let entry = Entry {
            port: std::sync::Arc::new(port),
            kind: service::Kind::NodePort,
            inside: Target::Endpoints([endpoint(1), endpoint(2)].into()),
            inside_local: false,
            outside: Some(Target::Drop),
            affinity_s: Some(10_800),
            sources: None,
        };
        let refused = Entry { inside: Target::Refuse, outside: None, affinity_s: None, ..entry.clone() };
        let circumstances = Circumstances { source: None, pods_known: true, masquerade_all: true, left: None };
        for address in [[10, 96, 0, 1], [0; 4]] {
            let frontend = Frontend { address: address.into(), protocol: service::Protocol::Tcp, port: 80 };
            for entry in [&entry, &refused] {
                let mut count = 0;
                list(&frontend, entry, circumstances, |set, _, value| {
                    assert!(matches!(value, Value::None | Value::Bytes(_)), "{set:?} {value:?}");
                    count += 1;
                });
                assert!(count > 0);
            }
        }
    }

    #[test]
    fn chains_and_fates_have_numbers_of_their_own() {
        let chain =
            |count, affinity_s| LoadBalancer { ipv6: false, node_port: false, side: Side::Inside, count, affinity_s };
        let counts = |most: u32| [1, 2, 3, most - 1, most];
        let mut numbers: Vec<u32> = counts(SLOTS_MAX).map(|count| chain(count, None).number()).to_vec();
        for seconds in [1, 2, 10_800, AFFINITY_S_MAX] {
            numbers.extend(counts(SLOTS_WITH_AFFINITY_MAX).map(|count| chain(count, Some(seconds)).number()));
        }
        numbers.extend([Fate::Refused, Fate::Dropped, Fate::Accepted].map(Fate::number));
        assert_eq!(numbers.iter().collect::<HashSet<_>>().len(), numbers.len());
    }

    #[test]
    fn numbers_belong_to_endpoints_not_to_slots() {
        let endpoint = |n: u32| Endpoint { address: IpAddr::V4((0x0a00_0000 + n).into()), port: 80, local: true };
        let all: Vec<Endpoint> = (0..1000).map(endpoint).collect();
        let known = numbers(&all);
        assert_eq!(known.iter().collect::<HashSet<_>>().len(), all.len());
        let mut moved = all.clone();
        moved.swap_remove(3);
        assert_eq!(numbers(&moved)[3], known[999]);
        assert_eq!(numbers(&[all[0], all[0]])[1], known[0].wrapping_add(1), "two that meet are told apart");
    }
}
