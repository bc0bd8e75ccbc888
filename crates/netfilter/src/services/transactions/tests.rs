//! Packets that are between two lookups while a transaction is committed.

use std::net::IpAddr;

use proptest::prelude::*;
use service::{Endpoint, Frontend, Name, Network, Protocol, Rules, ServicePort, Target, diff};

use super::super::{Balancer, Config, elements};
use super::*;

/// What a chain does.
#[derive(Debug, Clone, PartialEq)]
enum Chain {
    Lead(LoadBalancer),
    Admit(Arc<[IpNet]>),
}

/// The kernel's table.
#[derive(Debug, Clone, Default, PartialEq)]
struct Table {
    elements: BTreeMap<(SetName, Part), Value>,
    chains: BTreeMap<String, Chain>,
}

impl Table {
    fn empty() -> Table {
        let mut table = Table::default();
        elements::fixed_verdicts(Balancer::Rules, |set, key, value| {
            table.elements.insert((set, key), value);
        });
        table
    }

    /// As the kernel does it: what is not there cannot be deleted, what is there cannot be added.
    fn carry_out(&self, transaction: &Transaction) -> Table {
        let mut next = self.clone();
        for (set, elements) in &transaction.gone {
            for (key, value) in elements {
                assert_eq!(next.elements.remove(&(*set, *key)).as_ref(), Some(value), "{set:?} {key:?}");
            }
        }
        for chain in &transaction.load_balancers {
            assert_eq!(next.chains.insert(chain.name(), Chain::Lead(*chain)), None);
        }
        for (number, sources) in &transaction.sources {
            assert_eq!(next.chains.insert(chains::sources_name(*number), Chain::Admit(sources.clone())), None);
        }
        for (set, elements) in &transaction.come {
            for (key, value) in elements {
                assert_eq!(next.elements.insert((*set, *key), value.clone()), None, "{set:?} {key:?}");
            }
        }
        for name in &transaction.gone_chains {
            assert!(next.chains.remove(name).is_some(), "{name}");
        }
        let led = next.elements.values().filter_map(|value| match value {
            Value::Goto(name) | Value::Jump(name) if name != chains::REFUSE => Some(name),
            _ => None,
        });
        led.for_each(|name| assert!(next.chains.contains_key(name), "{name}"));
        next
    }

    fn find(&self, kind: Kind, key: Part) -> Option<&Value> {
        self.elements.get(&(SetName { kind, ipv6: false }, key))
    }
}

/// What becomes of a packet.
#[derive(Debug, Clone, PartialEq)]
enum Outcome {
    Led(Part),
    Refused,
    Dropped,
    NotOurs,
}

/// The first packet of a connection.
#[derive(Debug, Clone, Copy)]
struct Packet {
    frontend: Frontend,
    client: IpAddr,
    from: Side,
    /// What is drawn.
    draw: u32,
}

/// One that makes its first lookups in one table, and the others in the next.
struct Walk<'t> {
    before: &'t Table,
    after: &'t Table,
    first: usize,
    made: usize,
}

impl<'t> Walk<'t> {
    fn find(&mut self, kind: Kind, key: Part) -> Option<&'t Value> {
        let table = if self.made < self.first { self.before } else { self.after };
        self.made += 1;
        table.find(kind, key)
    }

    /// Chains are as they were when it began.
    fn chain(&self, name: &str) -> Option<&'t Chain> {
        let began = if self.first == 0 { self.after } else { self.before };
        began.chains.get(name)
    }

    /// The way of [`super::super::chains`].
    fn outcome(&mut self, packet: Packet) -> Outcome {
        let key = elements::key(&packet.frontend);
        if let Some(Value::Jump(name)) = self.find(Kind::Firewall, key)
            && let Some(Chain::Admit(sources)) = self.chain(name)
            && !sources.iter().any(|range| range.contains(&packet.client))
        {
            return Outcome::Dropped;
        }
        let sides: &[Side] =
            if packet.from == Side::Outside { &[Side::Outside, Side::Inside] } else { &[Side::Inside] };
        let found = sides.iter().find_map(|side| self.find(Kind::Services(*side), key).map(|number| (*side, number)));
        let Some((side, Value::Bytes(number))) = found else { return Outcome::NotOurs };
        match self.find(Kind::Verdicts { side, node_port: false }, *number) {
            Some(Value::Drop) => Outcome::Dropped,
            Some(Value::Goto(name)) if name == chains::REFUSE => Outcome::Refused,
            Some(Value::Goto(name)) => match self.chain(name) {
                Some(Chain::Lead(chain)) => self.lead(*chain, key, packet),
                _ => Outcome::NotOurs,
            },
            _ => Outcome::NotOurs,
        }
    }

    fn lead(&mut self, chain: LoadBalancer, key: Part, packet: Packet) -> Outcome {
        let slot = key.number(packet.draw % chain.count);
        let member = chain.affinity_s.and_then(|_| {
            let Some(Value::Bytes(number)) = self.find(Kind::Numbers(chain.side), slot) else { return None };
            self.find(Kind::Members(chain.side), key.then(number.as_slice()))
        });
        match member.or_else(|| self.find(Kind::Endpoints(chain.side), slot)) {
            Some(Value::Bytes(place)) => Outcome::Led(*place),
            _ => Outcome::NotOurs,
        }
    }
}

/// Whether rules say this of a packet.
fn is_meant(rules: &Rules, packet: Packet, outcome: &Outcome) -> bool {
    let Some(entry) = rules.get(&packet.frontend) else { return *outcome == Outcome::NotOurs };
    let sources = entry.sources.as_ref();
    if sources.is_some_and(|sources| !sources.iter().any(|range| range.contains(&packet.client))) {
        return *outcome == Outcome::Dropped;
    }
    let target = entry.outside.as_ref().filter(|_| packet.from == Side::Outside).unwrap_or(&entry.inside);
    match (target, outcome) {
        (Target::Refuse, outcome) => *outcome == Outcome::Refused,
        (Target::Drop, outcome) => *outcome == Outcome::Dropped,
        (Target::Endpoints(all), Outcome::Led(place)) => all.iter().any(|one| elements::place(one) == *place),
        (Target::Endpoints(_), _) => false,
    }
}

/// Sources come a moment before endpoints, where both are of the same Service.
fn with_sources(old: &Rules, new: &Rules) -> Rules {
    let mut mixed = old.clone();
    let sources = old.iter().filter_map(|(frontend, old)| {
        let new = new.get(frontend).filter(|new| new.port == old.port)?;
        let entry = Entry { sources: new.sources.clone(), ..old.clone() };
        Some(Change { frontend: *frontend, old: None, new: Some(entry) })
    });
    mixed.apply(Difference { changes: sources.collect() });
    mixed
}

const CLIENTS: [[u8; 4]; 2] = [[192, 0, 2, 1], [198, 51, 100, 1]];

fn frontend(number: u8) -> Frontend {
    Frontend { address: [10, 96, 0, number].into(), protocol: Protocol::Tcp, port: 80 }
}

fn target() -> impl Strategy<Value = Target> {
    let endpoint = |n: u8| Endpoint { address: [10, 0, 0, n].into(), port: 80, local: n.is_multiple_of(2) };
    let endpoints = prop::sample::subsequence((1..6u8).collect::<Vec<_>>(), 1..5).prop_shuffle();
    prop_oneof![
        1 => Just(Target::Refuse),
        1 => Just(Target::Drop),
        6 => endpoints.prop_map(move |all| Target::Endpoints(all.into_iter().map(endpoint).collect())),
    ]
}

fn entry() -> impl Strategy<Value = Entry> {
    let ranges = ["192.0.2.0/24", "198.51.100.0/24"].map(|range| range.parse::<IpNet>().unwrap());
    let sources = prop::sample::subsequence(ranges.to_vec(), 1..2).prop_map(Arc::from);
    let affinity = prop::option::weighted(0.3, Just(10_800));
    let owner = prop_oneof![Just("web"), Just("other")];
    (owner, target(), prop::option::weighted(0.3, target()), prop::option::weighted(0.4, sources), affinity).prop_map(
        |(owner, inside, outside, sources, affinity_s)| {
            let service = Name { namespace: "ns".into(), name: owner.into() };
            let port = ServicePort { service, name: "".into(), health_check_port: None };
            let kind = service::Kind::LoadBalancer;
            Entry { port: port.into(), kind, inside, inside_local: false, outside, affinity_s, sources }
        },
    )
}

fn rules() -> impl Strategy<Value = Rules> {
    prop::collection::vec(prop::option::weighted(0.8, entry()), 2).prop_map(|entries| {
        let entries = (0..).zip(entries).filter_map(|(number, entry)| Some((frontend(number), entry?)));
        let changes = entries.map(|(frontend, entry)| Change { frontend, old: None, new: Some(entry) }).collect();
        let mut rules = Rules::default();
        rules.apply(Difference { changes });
        rules
    })
}

fn packets() -> impl Iterator<Item = Packet> {
    let clients = CLIENTS.into_iter().flat_map(|client| Side::BOTH.map(|from| (IpAddr::from(client), from)));
    clients.flat_map(|(client, from)| {
        (0..2).flat_map(move |number| (0..4).map(move |draw| Packet { frontend: frontend(number), client, from, draw }))
    })
}

/// The most lookups that a packet makes.
const LOOKUPS_MAX: usize = 7;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_packet_in_the_midst_of_a_change_meets_what_was_or_what_is(history in prop::collection::vec(rules(), 1..6)) {
        let mut services = ServiceTable::new(Config { name: "services".to_owned(), network: Network::default() });
        let (mut table, mut old) = (Table::empty(), Rules::default());
        for new in &history {
            for step in steps(&diff(&old.clone(), new)) {
                let mut new = old.clone();
                new.apply(step.clone().into_owned());
                for transaction in services.plan(&step) {
                    let next = table.carry_out(&transaction);
                    for (packet, first) in packets().flat_map(|packet| (0..=LOOKUPS_MAX).map(move |first| (packet, first))) {
                        let outcome = Walk { before: &table, after: &next, first, made: 0 }.outcome(packet);
                        let expected = [&old, &with_sources(&old, &new), &new];
                        prop_assert!(
                            expected.iter().any(|rules| is_meant(rules, packet, &outcome)),
                            "{packet:?}, {first} lookups before {transaction:?}: {outcome:?}"
                        );
                    }
                    table = next;
                }
                for packet in packets() {
                    let outcome = Walk { before: &table, after: &table, first: 0, made: 0 }.outcome(packet);
                    prop_assert!(is_meant(&new, packet, &outcome), "{packet:?}: {outcome:?}");
                }
                old = new;
            }
        }
        // Nothing is held for ever.
        for transaction in services.plan(&diff(&old, &Rules::default())).into_iter().chain(services.plan(&Difference::default())) {
            table = table.carry_out(&transaction);
        }
        prop_assert!(!services.is_holding());
        prop_assert_eq!(table, Table::empty());
    }
}

#[test]
fn what_comes_back_is_still_there() {
    let endpoint = |n: u8| Endpoint { address: [10, 0, 0, n].into(), port: 80, local: true };
    let rules = |count: u8| {
        let service = Name { namespace: "ns".into(), name: "web".into() };
        let entry = Entry {
            port: ServicePort { service, name: "".into(), health_check_port: None }.into(),
            kind: service::Kind::ClusterIp,
            inside: Target::Endpoints((1..=count).map(endpoint).collect()),
            inside_local: false,
            outside: None,
            affinity_s: None,
            sources: None,
        };
        let mut rules = Rules::default();
        rules.apply(Difference { changes: vec![Change { frontend: frontend(1), old: None, new: Some(entry) }] });
        rules
    };
    let mut services = ServiceTable::new(Config { name: "services".to_owned(), network: Network::default() });
    let _ = services.plan(&diff(&Rules::default(), &rules(3)));
    let _ = services.plan(&diff(&rules(3), &rules(2)));
    let [chains, _, _, rest] = services.plan(&diff(&rules(2), &rules(3)));
    assert!(chains.load_balancers.is_empty() && chains.come.is_empty(), "{chains:?}");
    assert_eq!(
        rest.come.keys().map(|set| set.kind).collect::<Vec<_>>(),
        [Kind::Services(Side::Inside), Kind::Hairpins]
    );
    assert!(rest.gone_chains.is_empty(), "the chain of two is held now");
}
