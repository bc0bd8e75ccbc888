//! The table of Services.
//!
//! ```text
//! prerouting ─► inbound4 ─┬─ address . protocol . port in firewall4, and source not admitted ─► drop
//!                         ├─ not from a pod, and in outside-services4 or outside-node-ports4 ─► outside-lb4-N
//!                         └─► dispatch4
//! output ─► outbound4 ────┬─ in firewall4, and source not admitted ─► drop
//!                         └─► dispatch4 ─── in services4 or node-ports4: a number ─ verdicts4 ─► lb4-N, refuse or drop
//!
//! lb4-N:  slot = a random number below N;  address . protocol . port . slot in endpoints4 ─► dnat
//! prerouting-last, output-last: to a Service's address that nobody has taken ─► refuse
//! postrouting ─► leaving4, if the destination was translated: from a pod to itself, or from outside to an endpoint of
//!                another node ─► masquerade
//! ```
//!
//! The number of chains depends on how many *numbers of endpoints* there are, not on the number of Services. Whenever an
//! element with a verdict is added, the kernel walks everything that can be reached from each base chain, verdicts of maps
//! included: upstream's chains per Service make that quadratic. So frontends have no verdicts but numbers, under which a
//! small map has the verdicts: 10,000 Services are not walked when an endpoint comes or goes, nor is anything, unless a
//! number of endpoints comes that no Service had.
//!
//! Node ports share the map of endpoints, under the unspecified address. `outside-…` holds what differs for who comes from
//! outside the cluster (`externalTrafficPolicy: Local`). Everything exists a second time for IPv6, named 6.
//!
//! Session affinity is a map that the rules themselves write: client . address . protocol . port → number of the endpoint,
//! each element with the Service's timeout. `members4` knows the endpoints by these numbers, so an endpoint that left is
//! forgotten in the transaction that removes it, without looking for its clients. The numbers depend on nothing but the
//! endpoints: a new daemon leads known clients where the old one did. A map that is full costs affinity, not connections.
//!
//! A transaction is at once for a rule and for a set, but not for a packet: rules are those of the moment in which it came to
//! the hook, a chain that was made since is empty for it, and each lookup finds the elements of its own moment. What a packet
//! finds first must be good for what it looks up next, before and after ([`transactions`]).

mod chains;
mod elements;
mod tally;
mod transactions;

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;
use service::{Difference, Endpoint, Entry, Frontend, Network, Rules, Target};
use sys::netlink::nft::{Batch, Data, Element, Family};

use crate::key::Part;
use chains::LoadBalancer;
use elements::{Circumstances, Kind, SetName, Side, Value};
use tally::{Step, Tally};
use transactions::Held;

/// How the table is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Its name.
    pub name: String,
    /// What is known of pods, Services and this node.
    pub network: Network,
}

/// Who leads connections to endpoints.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Balancer {
    /// The rules themselves.
    Rules,
    /// IPVS ([`crate::ipvs`]), where it can: the rules keep what it does not know, which is who may connect, who is
    /// refused or dropped, what is masqueraded, and one side of an entry that makes a difference between inside and
    /// outside.
    Ipvs,
}

/// Addresses that the rules beside IPVS have to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Addresses {
    /// Those of this node on which node ports answer.
    Own,
    /// Those of Services that this node has taken for its own.
    Vips,
}

/// Whom IPVS leads connections to.
pub(crate) fn left_to_ipvs(entry: &Entry) -> &[Endpoint] {
    let side = elements::ipvs_side(entry);
    side.and_then(|side| elements::target(entry, side)).map_or(&[], Target::endpoints)
}

/// The table: what the rules written so far need. A batch is made for the table as the one before left it: after one that
/// could not be committed only a replacement helps.
#[derive(Debug)]
pub struct ServiceTable {
    config: Config,
    balancer: Balancer,
    load_balancers: Tally<LoadBalancer>,
    sources: Tally<Arc<[IpNet]>>,
    /// Chains of sources are numbered.
    numbers: HashMap<Arc<[IpNet]>, u32>,
    next_number: u32,
    /// Endpoints on this node.
    hairpins: Tally<IpAddr>,
    /// What nothing leads to any more.
    held: Held,
}

/// What the table of that name consists of before it is replaced.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Remains {
    /// Names of its sets and maps.
    pub sets: Vec<String>,
    /// Names of its chains.
    pub chains: Vec<String>,
}

/// Elements by set.
type Elements = BTreeMap<SetName, Vec<(Part, Value)>>;

impl ServiceTable {
    /// The family of the table.
    pub const FAMILY: Family = Family::Inet;
    /// The maps of all frontends; [`frontend`] reads their keys.
    pub const FRONTENDS: [&'static str; 4] = ["services4", "services6", "node-ports4", "node-ports6"];

    /// A table of which nothing has been written, and whose rules lead to endpoints themselves.
    pub fn new(config: Config) -> ServiceTable {
        Self::with_balancer(config, Balancer::Rules)
    }

    /// A table of which nothing has been written.
    pub fn with_balancer(config: Config, balancer: Balancer) -> ServiceTable {
        ServiceTable {
            config,
            balancer,
            load_balancers: Tally::default(),
            sources: Tally::default(),
            numbers: HashMap::new(),
            next_number: 0,
            hairpins: Tally::default(),
            held: Held::default(),
        }
    }

    /// Chains that are there whatever the rules are, and whose rules and ways to them do not change with them.
    pub fn fixed_chains() -> Vec<String> {
        chains::fixed()
    }

    /// Sets and maps whose elements nobody writes but the batches made here.
    pub fn fixed_sets(&self) -> Vec<String> {
        SetName::all(self.balancer).filter(|set| !set.is_dynamic()).map(SetName::name).collect()
    }

    /// What holds from the next replacement on.
    pub fn set_network(&mut self, network: &Network) {
        self.config.network.clone_from(network);
    }

    /// Makes the table with these rules in place of what it consists of; `remains` must be complete. Clients keep the
    /// endpoints that affinity gave them.
    ///
    /// Sets and chains that are there under the name that they should have are emptied and filled, not made anew: a packet
    /// on its way through the old rules looks elements up as they are at that moment, and finds those of the new rules in
    /// the same set, but nothing any more in a set that is gone.
    pub fn replace(&mut self, rules: &Rules, remains: &Remains) -> Batch {
        let mut batch = self.batch();
        batch.add_table();
        batch.flush_rules();
        for name in &remains.sets {
            match SetName::all(self.balancer).find(|set| set.name() == *name) {
                Some(set) if set.is_dynamic() => {}
                Some(_) => batch.flush_set(name),
                None => batch.delete_set(name),
            }
        }
        self.fill(&mut batch, rules);
        let unused: Vec<&String> = remains.chains.iter().filter(|name| !batch.chains().contains_key(*name)).collect();
        unused.into_iter().for_each(|name| batch.delete_chain(name));
        batch
    }

    /// As [`ServiceTable::replace`], whatever there was before; nothing of it stays.
    pub fn replace_all(&mut self, rules: &Rules) -> Batch {
        let mut batch = self.remove();
        batch.add_table();
        self.fill(&mut batch, rules);
        batch
    }

    /// Removes the table if it is there.
    pub fn remove(&self) -> Batch {
        let mut batch = self.batch();
        batch.add_table();
        batch.delete_table();
        batch
    }

    /// A transaction that changes nothing, and fails if the kernel lacks something that rules need.
    pub fn probe(&self) -> Batch {
        let config = Config { name: format!("{}-probe", self.config.name), ..self.config.clone() };
        let mut probe = ServiceTable::with_balancer(config, self.balancer);
        let mut batch = probe.batch();
        batch.add_table();
        probe.fill(&mut batch, &Rules::default());
        for ipv6 in [false, true] {
            let chain = LoadBalancer { ipv6, node_port: false, side: Side::Inside, count: 1, affinity_s: Some(1) };
            chain.add(&mut batch);
        }
        batch.delete_table();
        batch
    }

    /// Carries out a difference from the rules that were written last, by transactions one after the other, of which the last
    /// one may have nothing to do.
    pub fn update(&mut self, difference: &Difference) -> Vec<Batch> {
        let mut transactions = Vec::new();
        for step in transactions::steps(difference) {
            transactions.extend(self.plan(&step));
        }
        let last = transactions.pop();
        let mut batches: Vec<Batch> = transactions.into_iter().map(|one| one.write(self.batch())).collect();
        batches.retain(|batch| !batch.is_empty());
        batches.extend(last.map(|one| one.write(self.batch())));
        batches
    }

    /// Whether something is held that nothing leads to any more. The next update removes it, be it one without a difference.
    pub fn is_holding(&self) -> bool {
        !self.held.is_empty()
    }

    /// Adds a change of the addresses that rules beside IPVS know to a batch.
    pub fn change_addresses(batch: &mut Batch, set: Addresses, gone: &[IpAddr], come: &[IpAddr]) {
        let kind = match set {
            Addresses::Own => Kind::Own,
            Addresses::Vips => Kind::Vips,
        };
        for ipv6 in [false, true] {
            let name = SetName { kind, ipv6 }.name();
            let keys = |addresses: &[IpAddr]| -> Vec<Part> {
                let of_family = addresses.iter().filter(|address| address.is_ipv6() == ipv6);
                of_family.map(|address| Part::new().address(*address)).collect()
            };
            batch.delete_elements(&name, keys(gone).iter().map(Part::as_slice));
            let come = keys(come);
            batch.add_elements(&name, come.iter().map(|key| Element { key: key.as_slice(), data: Data::None }));
        }
    }

    fn batch(&self) -> Batch {
        Batch::new(Self::FAMILY, &self.config.name)
    }

    /// Fills a table without rules, and without elements but those of affinity.
    fn fill(&mut self, batch: &mut Batch, rules: &Rules) {
        *self = ServiceTable::with_balancer(self.config.clone(), self.balancer);
        rules.iter().for_each(|(frontend, entry)| self.count(frontend, entry, Step::More));
        let (load_balancers, sources, hairpins) =
            (self.load_balancers.take(), self.sources.take(), self.hairpins.take());
        self.number(&sources.come);
        SetName::all(self.balancer).for_each(|set| set.add(batch));
        chains::add_base(batch, &self.config, self.balancer);
        load_balancers.come.iter().for_each(|chain| chain.add(batch));
        self.numbered(sources.come).iter().for_each(|(number, sources)| chains::add_sources(batch, *number, sources));
        let mut elements = list_hairpins(hairpins.come);
        list_verdicts(&load_balancers.come, &mut elements);
        elements::fixed_verdicts(self.balancer, |set, key, value| elements.entry(set).or_default().push((key, value)));
        for (frontend, entry) in rules.iter() {
            self.list(frontend, entry, |set, key, value| elements.entry(set).or_default().push((key, value)));
        }
        add_elements(batch, &elements);
    }

    fn count(&mut self, frontend: &Frontend, entry: &Entry, step: Step) {
        for side in Side::BOTH {
            if self.left(entry) != Some(side)
                && let Some(chain) = elements::load_balancer(frontend, entry, side)
            {
                self.load_balancers.count(chain, step);
            }
        }
        if let Some(sources) = &entry.sources {
            self.sources.count(sources.clone(), step);
        }
        for endpoint in entry.endpoints().filter(|endpoint| endpoint.local) {
            self.hairpins.count(endpoint.address, step);
        }
    }

    fn number(&mut self, sources: &[Arc<[IpNet]>]) {
        for sources in sources {
            self.numbers.insert(sources.clone(), self.next_number);
            self.next_number += 1;
        }
    }

    /// With their numbers.
    fn numbered(&self, sources: Vec<Arc<[IpNet]>>) -> Vec<(u32, Arc<[IpNet]>)> {
        let number = |sources| self.numbers.get(&sources).map(|number| (*number, sources));
        sources.into_iter().filter_map(number).collect()
    }

    fn list(&self, frontend: &Frontend, entry: &Entry, visit: impl FnMut(SetName, Part, Value)) {
        let source = entry.sources.as_ref().and_then(|sources| self.numbers.get(sources)).copied();
        let network = &self.config.network;
        let circumstances = Circumstances {
            source,
            pods_known: network.local.is_known(frontend.address.is_ipv6()),
            masquerade_all: network.masquerade_all,
            left: self.left(entry),
        };
        elements::list(frontend, entry, circumstances, visit);
    }

    /// The side of an entry that others serve.
    fn left(&self, entry: &Entry) -> Option<Side> {
        if self.balancer == Balancer::Ipvs { elements::ipvs_side(entry) } else { None }
    }
}

fn list_hairpins(addresses: Vec<IpAddr>) -> Elements {
    let mut elements = Elements::new();
    for (set, key) in addresses.into_iter().map(elements::hairpin) {
        elements.entry(set).or_default().push((key, Value::None));
    }
    elements
}

fn list_verdicts<'c>(chains: impl IntoIterator<Item = &'c LoadBalancer>, elements: &mut Elements) {
    for (set, key, value) in chains.into_iter().map(elements::verdict) {
        elements.entry(set).or_default().push((key, value));
    }
}

fn add_elements(batch: &mut Batch, elements: &Elements) {
    for (set, elements) in elements {
        let elements = elements.iter().map(|(key, value)| Element { key: key.as_slice(), data: value.data() });
        batch.add_elements(&set.name(), elements);
    }
}

/// Address, protocol number and port that a key in one of [`ServiceTable::FRONTENDS`] stands for.
pub fn frontend(map: &str, key: &[u8]) -> Option<(IpAddr, u8, u16)> {
    let (address, rest) = key.split_at_checked(key.len().checked_sub(8)?)?;
    let address = match address.len() {
        0 if map.ends_with('4') => Ipv4Addr::UNSPECIFIED.into(),
        0 => Ipv6Addr::UNSPECIFIED.into(),
        4 => IpAddr::from(<[u8; 4]>::try_from(address).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(address).ok()?),
    };
    Some((address, rest[0], u16::from_be_bytes([rest[4], rest[5]])))
}
