//! Services in IPVS: which virtual services and servers, and which addresses this node takes for its own.
//!
//! ```text
//! difference of rules ─► Steps ─┬─ bind addresses, make services and servers   (before the rules of nftables)
//! addresses of this node ─►     └─ remove servers, services and addresses      (after them)
//! ```
//!
//! A frontend with endpoints is a virtual service; a node port is one for each address of this node. Everything else
//! that Services ask for is done by rules beside IPVS ([`crate::services::Balancer::Ipvs`]): who is refused or dropped,
//! who may connect, what is masqueraded, and one side of a frontend that leads to other endpoints from outside than from
//! inside. Upstream does that by iptables and a dozen ipsets; a table of nftables holds the same sets, is changed in one
//! transaction, and needs no other program.
//!
//! IPVS sees packets for this host only, so the addresses of Services are put on a dummy interface of their own, unless
//! another interface has them. That takes all of an address, so it is not done with `externalIPs`: whoever may write
//! Services chooses them, and a host may be there that has other ports (CVE-2020-8554). Rules lead these.
//!
//! A server that leaves gets weight 0 first and goes when its connections have ended, and so does its service: TCP
//! connections outlive the rules as they do in the other modes. UDP has no end to wait for.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Bound;

use ipnet::IpNet;
use service::{Change, Difference, Entry, Frontend, Kind, Protocol, Rules};
use sys::netlink::ipvs::{Command, HASH_PORT, PERSISTENT, Server, ServerStatus, Settings, Virtual};

use crate::services::left_to_ipvs;

/// All servers are alike.
const WEIGHT: u32 = 1;
/// Servers that are waited for at a time: a budget. One more is removed with its connections.
const DRAINING_MAX: usize = 1 << 14;

/// How services are made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Name of the scheduler.
    pub scheduler: String,
    /// Virtual services with these addresses are somebody else's, unless a Service has the address.
    pub excluded: Vec<IpNet>,
}

/// What the kernel has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Observed {
    /// Virtual services and their servers.
    pub services: Vec<(Virtual, Settings, Vec<ServerStatus>)>,
    /// Addresses on the interface of Services.
    pub bound: BTreeSet<IpAddr>,
    /// Addresses of this node on which node ports answer.
    pub own: BTreeSet<IpAddr>,
}

/// What is to be done, in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Steps {
    /// Addresses to be put on the interface.
    pub bind: Vec<IpAddr>,
    /// Services and servers that come or change.
    pub make: Vec<Command>,
    /// Servers and services that go, after the rules no longer lead to them.
    pub unmake: Vec<Command>,
    /// Addresses to be taken from the interface.
    pub unbind: Vec<IpAddr>,
    /// Servers that were removed with connections, because too many are waited for.
    pub cut: usize,
}

impl Steps {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        *self == Steps::default()
    }
}

/// Addresses that the rules beside IPVS learn or forget.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Turnover {
    /// New ones.
    pub come: Vec<IpAddr>,
    /// Those that have left.
    pub gone: Vec<IpAddr>,
}

/// What is wanted, and what has been written. Steps are made for the kernel as the ones before left it: after some that
/// failed only a replacement helps.
#[derive(Debug)]
pub struct VirtualTable {
    config: Config,
    /// Frontends with an address.
    explicit: BTreeMap<Frontend, Entry>,
    node_ports: BTreeMap<Frontend, Entry>,
    own: BTreeSet<IpAddr>,
    bound: BTreeSet<IpAddr>,
    present: BTreeMap<Frontend, Present>,
    draining: BTreeSet<(Frontend, Server)>,
}

/// A virtual service in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Present {
    settings: Settings,
    /// With their weights.
    servers: BTreeMap<Server, u32>,
}

impl VirtualTable {
    /// Nothing is wanted, nothing has been written.
    pub fn new(config: Config) -> VirtualTable {
        VirtualTable {
            config,
            explicit: BTreeMap::new(),
            node_ports: BTreeMap::new(),
            own: BTreeSet::new(),
            bound: BTreeSet::new(),
            present: BTreeMap::new(),
            draining: BTreeSet::new(),
        }
    }

    /// Leads from what the kernel has to these rules.
    pub fn replace(&mut self, rules: &Rules, observed: Observed) -> Steps {
        *self = VirtualTable::new(self.config.clone());
        (self.own, self.bound) = (observed.own, observed.bound);
        for (frontend, entry) in rules.iter() {
            self.want(*frontend, Some(entry.clone()));
        }
        for (service, settings, servers) in observed.services {
            self.remember(service, settings, &servers);
        }
        let mut places: BTreeSet<Frontend> = self.explicit.keys().chain(self.present.keys()).copied().collect();
        places.extend(self.node_ports.keys().flat_map(|port| self.at_own_addresses(port)));
        let bound = self.bound.clone();
        self.reconcile_all(&places, bound)
    }

    /// Leads from the rules that were written last to others.
    pub fn update(&mut self, difference: &Difference) -> Steps {
        for Change { frontend, new, .. } in &difference.changes {
            self.want(*frontend, new.clone());
        }
        let places = difference.changes.iter().flat_map(|change| self.places(&change.frontend)).collect();
        self.reconcile_all(&places, [])
    }

    /// Leads from the addresses of this node that were known to these.
    pub fn set_own(&mut self, own: BTreeSet<IpAddr>) -> (Steps, Turnover) {
        let turnover = Turnover {
            come: own.difference(&self.own).copied().collect(),
            gone: self.own.difference(&own).copied().collect(),
        };
        self.own = own;
        let changed = turnover.come.iter().chain(&turnover.gone).copied();
        let at = |address: IpAddr| {
            let of_family = self.node_ports.keys().filter(move |port| port.address.is_ipv6() == address.is_ipv6());
            of_family.map(move |port| Frontend { address, ..*port })
        };
        let places = changed.clone().flat_map(at).collect();
        (self.reconcile_all(&places, changed), turnover)
    }

    /// Services with servers that are waited for.
    pub fn draining(&self) -> BTreeSet<Virtual> {
        self.draining.iter().map(|(frontend, _)| virtual_service(frontend)).collect()
    }

    /// Removes the servers of a service that have been waited for and have no connections left.
    pub fn settle(&mut self, service: &Virtual, servers: &[ServerStatus]) -> Steps {
        let mut steps = Steps::default();
        let Some(frontend) = frontend(service) else { return steps };
        let busy = |server: &Server| {
            let status = servers.iter().find(|status| status.server == *server);
            status.is_some_and(|status| status.active + status.inactive > 0)
        };
        let waited: Vec<Server> =
            self.draining.iter().filter(|(at, _)| *at == frontend).map(|(_, server)| *server).collect();
        for server in waited.into_iter().filter(|server| !busy(server)) {
            self.drop_server(&frontend, server, &mut steps);
        }
        self.drop_if_empty(&frontend, &mut steps);
        self.bind_or_unbind(frontend.address, &mut steps);
        steps
    }

    /// What removes all that the kernel has, but for what is somebody else's.
    pub fn remove(&self, observed: &Observed) -> Vec<Command> {
        let services = observed.services.iter().map(|(service, ..)| *service);
        services.filter(|service| !self.is_excluded(service.address)).map(Command::DeleteService).collect()
    }

    /// Addresses of Services on the interface.
    pub fn bound(&self) -> &BTreeSet<IpAddr> {
        &self.bound
    }

    /// Addresses of this node on which node ports answer.
    pub fn own(&self) -> &BTreeSet<IpAddr> {
        &self.own
    }

    /// The services that have been written, from the one after `last` on.
    pub fn services_after(&self, last: Option<&Virtual>) -> impl Iterator<Item = Virtual> {
        let after = last.and_then(frontend).map_or(Bound::Unbounded, Bound::Excluded);
        self.present.range((after, Bound::Unbounded)).map(|(frontend, _)| virtual_service(frontend))
    }

    /// Whether these are the servers of a service as they have been written.
    pub fn has_servers(&self, service: &Virtual, servers: &[ServerStatus]) -> bool {
        let there: BTreeMap<Server, u32> = servers.iter().map(|status| (status.server, status.weight)).collect();
        let present = frontend(service).and_then(|frontend| self.present.get(&frontend));
        present.is_some_and(|present| present.servers == there)
    }

    /// Whether a service has been written.
    pub fn is_known(&self, service: &Virtual) -> bool {
        frontend(service).is_some_and(|frontend| self.present.contains_key(&frontend))
    }

    /// Whether a service is nobody else's business.
    pub fn is_ours(&self, service: &Virtual) -> bool {
        self.is_known(service) || !self.is_excluded(service.address)
    }

    fn want(&mut self, frontend: Frontend, entry: Option<Entry>) {
        let entry = entry.filter(needs_address);
        let entries = if frontend.is_node_port() { &mut self.node_ports } else { &mut self.explicit };
        match entry {
            Some(entry) => entries.insert(frontend, entry),
            None => entries.remove(&frontend),
        };
    }

    fn remember(&mut self, service: Virtual, settings: Settings, servers: &[ServerStatus]) {
        let Some(frontend) = frontend(&service) else { return };
        if self.is_excluded(service.address) && !self.explicit.contains_key(&frontend) {
            return;
        }
        let weights = servers.iter().map(|status| (status.server, status.weight)).collect();
        self.present.insert(frontend, Present { settings, servers: weights });
    }

    fn is_excluded(&self, address: IpAddr) -> bool {
        self.config.excluded.iter().any(|range| range.contains(&address))
    }

    /// Where a frontend is a virtual service.
    fn places(&self, frontend: &Frontend) -> Vec<Frontend> {
        if frontend.is_node_port() { self.at_own_addresses(frontend).collect() } else { vec![*frontend] }
    }

    fn at_own_addresses(&self, port: &Frontend) -> impl Iterator<Item = Frontend> {
        let of_family = self.own.iter().filter(|own| own.is_ipv6() == port.address.is_ipv6());
        of_family.map(|address| Frontend { address: *address, ..*port })
    }

    /// What holds at a place: a Service's own address counts before a node port.
    fn entry(&self, place: &Frontend) -> Option<&Entry> {
        let node_port = || {
            let any = if place.address.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            self.node_ports.get(&Frontend { address: any, ..*place }).filter(|_| self.own.contains(&place.address))
        };
        self.explicit.get(place).or_else(node_port)
    }

    /// Brings virtual services, their addresses and other addresses to what is wanted. Each place once: what goes is
    /// done after what comes.
    fn reconcile_all(&mut self, places: &BTreeSet<Frontend>, others: impl IntoIterator<Item = IpAddr>) -> Steps {
        let mut steps = Steps::default();
        places.iter().for_each(|place| self.reconcile(place, &mut steps));
        let addresses: BTreeSet<IpAddr> = places.iter().map(|place| place.address).chain(others).collect();
        addresses.iter().for_each(|address| self.bind_or_unbind(*address, &mut steps));
        steps
    }

    /// Brings one virtual service to what is wanted.
    fn reconcile(&mut self, place: &Frontend, steps: &mut Steps) {
        let wanted = self.entry(place).map(|entry| (self.settings(entry), servers(entry)));
        let servers = wanted.as_ref().map(|(_, servers)| servers.clone()).unwrap_or_default();
        if let Some((settings, _)) = wanted.filter(|(_, servers)| !servers.is_empty()) {
            self.make(place, settings, &servers, steps);
        }
        self.retire(place, &servers, steps);
        self.drop_if_empty(place, steps);
    }

    fn settings(&self, entry: &Entry) -> Settings {
        // Upstream asks for the port in "mh", too: without it all connections of a client go to one server.
        let hash_port = if self.config.scheduler == "mh" { HASH_PORT } else { 0 };
        let persistent = if entry.affinity_s.is_some() { PERSISTENT } else { 0 };
        Settings {
            scheduler: self.config.scheduler.clone(),
            flags: hash_port | persistent,
            timeout_s: entry.affinity_s.unwrap_or(0),
        }
    }

    fn make(&mut self, place: &Frontend, settings: Settings, servers: &BTreeSet<Server>, steps: &mut Steps) {
        let service = virtual_service(place);
        let present = self.present.entry(*place).or_insert_with(|| {
            steps.make.push(Command::AddService(service, settings.clone()));
            Present { settings: settings.clone(), servers: BTreeMap::new() }
        });
        if present.settings != settings {
            steps.make.push(Command::SetService(service, settings.clone()));
            present.settings = settings;
        }
        for server in servers {
            let change = match present.servers.insert(*server, WEIGHT) {
                Some(WEIGHT) => continue,
                Some(_) => Command::SetServer(service, *server, WEIGHT),
                None => Command::AddServer(service, *server, WEIGHT),
            };
            self.draining.remove(&(*place, *server));
            steps.make.push(change);
        }
    }

    /// Lets servers that are not wanted end.
    fn retire(&mut self, place: &Frontend, wanted: &BTreeSet<Server>, steps: &mut Steps) {
        let Some(present) = self.present.get_mut(place) else { return };
        let mut ended = Vec::new();
        for (server, weight) in present.servers.iter_mut().filter(|(server, _)| !wanted.contains(server)) {
            if place.protocol != Protocol::Tcp {
                ended.push(*server);
                continue;
            }
            if *weight != 0 {
                *weight = 0;
                steps.make.push(Command::SetServer(virtual_service(place), *server, 0));
            }
            if self.draining.len() >= DRAINING_MAX && !self.draining.contains(&(*place, *server)) {
                steps.cut += 1;
                ended.push(*server);
                continue;
            }
            self.draining.insert((*place, *server));
        }
        ended.into_iter().for_each(|server| self.drop_server(place, server, steps));
    }

    fn drop_server(&mut self, place: &Frontend, server: Server, steps: &mut Steps) {
        self.draining.remove(&(*place, server));
        if let Some(present) = self.present.get_mut(place) {
            present.servers.remove(&server);
            steps.unmake.push(Command::DeleteServer(virtual_service(place), server));
        }
    }

    fn drop_if_empty(&mut self, place: &Frontend, steps: &mut Steps) {
        if self.present.get(place).is_some_and(|present| present.servers.is_empty()) {
            self.present.remove(place);
            steps.unmake.push(Command::DeleteService(virtual_service(place)));
        }
    }

    /// An address is bound as long as a Service has it, or connections to it have not ended.
    fn bind_or_unbind(&mut self, address: IpAddr, steps: &mut Steps) {
        let is_bound = self.bound.contains(&address);
        let used = has(&self.explicit, address) || is_bound && has(&self.present, address);
        match used && !self.own.contains(&address) {
            true if !is_bound => {
                self.bound.insert(address);
                steps.bind.push(address);
            }
            false if is_bound => {
                self.bound.remove(&address);
                steps.unbind.push(address);
            }
            _ => {}
        }
    }
}

/// Whether the address of an entry's frontend has to be this host's own.
pub fn needs_address(entry: &Entry) -> bool {
    entry.kind != Kind::ExternalIp
}

/// Whether something has an address.
fn has<T>(map: &BTreeMap<Frontend, T>, address: IpAddr) -> bool {
    let at = |protocol, port| Frontend { address, protocol, port };
    map.range(at(Protocol::Tcp, 0)..=at(Protocol::Sctp, u16::MAX)).next().is_some()
}

fn servers(entry: &Entry) -> BTreeSet<Server> {
    let endpoints = left_to_ipvs(entry).iter();
    endpoints.map(|endpoint| Server { address: endpoint.address, port: endpoint.port }).collect()
}

fn virtual_service(frontend: &Frontend) -> Virtual {
    Virtual { address: frontend.address, protocol: frontend.protocol.number(), port: frontend.port }
}

fn frontend(service: &Virtual) -> Option<Frontend> {
    let all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let protocol = all.into_iter().find(|protocol| protocol.number() == service.protocol)?;
    Some(Frontend { address: service.address, protocol, port: service.port })
}

#[cfg(test)]
mod tests;
