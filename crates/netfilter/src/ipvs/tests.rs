use std::collections::HashMap;
use std::sync::Arc;

use fuzz::Dice;
use service::{Endpoint, Kind, Name, ServicePort, Target};

use super::*;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn at(address: &str, protocol: Protocol, port: u16) -> Frontend {
    Frontend { address: ip(address), protocol, port }
}

fn endpoints(addresses: &[&str]) -> Target {
    let endpoint = |address: &&str| Endpoint { address: ip(address), port: 8080, local: true };
    let all: Arc<[Endpoint]> = addresses.iter().map(endpoint).collect();
    if all.is_empty() { Target::Refuse } else { Target::Endpoints(all) }
}

fn entry(addresses: &[&str]) -> Entry {
    let service = Name { namespace: "default".into(), name: "web".into() };
    Entry {
        port: Arc::new(ServicePort { service, name: "".into(), health_check_port: None }),
        kind: Kind::ClusterIp,
        inside: endpoints(addresses),
        inside_local: false,
        outside: None,
        affinity_s: None,
        sources: None,
    }
}

fn rules(entries: &[(Frontend, Entry)]) -> Rules {
    let mut rules = Rules::default();
    let change =
        |(frontend, entry): &(Frontend, Entry)| Change { frontend: *frontend, old: None, new: Some(entry.clone()) };
    rules.apply(Difference { changes: entries.iter().map(change).collect() });
    rules
}

/// A kernel that refuses what the real one does, and packets as they would be led.
#[derive(Debug, Default, Clone, PartialEq)]
struct Kernel {
    services: BTreeMap<Virtual, (Settings, BTreeMap<Server, u32>)>,
    bound: BTreeSet<IpAddr>,
    own: BTreeSet<IpAddr>,
    busy: HashMap<Server, u32>,
}

impl Kernel {
    fn with_own(own: &[&str]) -> Kernel {
        Kernel { own: own.iter().map(|address| ip(address)).collect(), ..Kernel::default() }
    }

    fn carry_out(&mut self, steps: Steps) {
        for address in steps.bind {
            assert!(self.bound.insert(address), "{address} is bound");
        }
        steps.make.into_iter().chain(steps.unmake).for_each(|command| self.command(command));
        for address in steps.unbind {
            assert!(self.bound.remove(&address), "{address} is not bound");
        }
    }

    fn command(&mut self, command: Command) {
        let named = format!("{command:?}");
        let done = match command {
            Command::AddService(service, settings) => {
                self.services.insert(service, (settings, BTreeMap::new())).is_none()
            }
            Command::SetService(service, settings) => {
                self.services.get_mut(&service).map(|one| one.0 = settings).is_some()
            }
            Command::DeleteService(service) => self.services.remove(&service).is_some(),
            Command::AddServer(service, server, weight) => self.servers(&service).insert(server, weight).is_none(),
            Command::SetServer(service, server, weight) => self.servers(&service).insert(server, weight).is_some(),
            Command::DeleteServer(service, server) => self.servers(&service).remove(&server).is_some(),
            Command::Flush => false,
        };
        assert!(done, "refused: {named}");
    }

    fn servers(&mut self, service: &Virtual) -> &mut BTreeMap<Server, u32> {
        &mut self.services.get_mut(service).unwrap().1
    }

    fn status(&self, service: &Virtual) -> Vec<ServerStatus> {
        let servers = self.services.get(service).into_iter().flat_map(|(_, servers)| servers);
        let status = |(server, weight): (&Server, &u32)| ServerStatus {
            server: *server,
            weight: *weight,
            active: self.busy.get(server).copied().unwrap_or(0),
            inactive: 0,
            persistent: 0,
        };
        servers.map(status).collect()
    }

    fn observed(&self) -> Observed {
        let services = self.services.iter();
        let services = services.map(|(service, (settings, _))| (*service, settings.clone(), self.status(service)));
        Observed { services: services.collect(), bound: self.bound.clone(), own: self.own.clone() }
    }

    /// Servers with weight at an address and port of TCP.
    fn leads(&self, address: &str, port: u16) -> Vec<String> {
        let service = Virtual { address: ip(address), protocol: 6, port };
        let status = self.status(&service);
        status.iter().filter(|one| one.weight > 0).map(|one| one.server.address.to_string()).collect()
    }

    fn settle(&mut self, table: &mut VirtualTable) {
        for service in table.draining() {
            let steps = table.settle(&service, &self.status(&service));
            self.carry_out(steps);
        }
    }
}

fn table() -> VirtualTable {
    VirtualTable::new(Config { scheduler: "rr".to_owned(), excluded: vec!["172.16.0.0/16".parse().unwrap()] })
}

const WEB: &str = "10.96.0.10";

fn web() -> Frontend {
    at(WEB, Protocol::Tcp, 80)
}

fn change(table: &mut VirtualTable, kernel: &mut Kernel, from: &Rules, to: &[(Frontend, Entry)]) -> Rules {
    let to = rules(to);
    kernel.carry_out(table.update(&service::diff(from, &to)));
    to
}

#[test]
fn external_addresses_are_not_taken() {
    let (address, external) = (at("10.96.0.1", Protocol::Tcp, 80), at("192.0.2.80", Protocol::Tcp, 80));
    let of_others = Entry { kind: Kind::ExternalIp, ..entry(&["10.0.0.1"]) };
    let mut table = table();
    let mut kernel = Kernel::default();
    // As a release before this one left it.
    kernel.bound.insert(external.address);
    let both = rules(&[(address, entry(&["10.0.0.1"])), (external, of_others.clone())]);
    kernel.carry_out(table.replace(&both, kernel.observed()));
    assert_eq!(kernel.bound, BTreeSet::from([address.address]));
    assert_eq!((kernel.leads("10.96.0.1", 80).len(), kernel.leads("192.0.2.80", 80).len()), (1, 0));
    // The address of a load balancer is: no user chooses it.
    let balanced = Entry { kind: Kind::LoadBalancer, ..of_others.clone() };
    let turned = |old: &Entry, new: &Entry| Difference {
        changes: vec![Change { frontend: external, old: Some(old.clone()), new: Some(new.clone()) }],
    };
    kernel.carry_out(table.update(&turned(&of_others, &balanced)));
    assert_eq!((kernel.bound.len(), kernel.leads("192.0.2.80", 80).len()), (2, 1));
    kernel.carry_out(table.update(&turned(&balanced, &of_others)));
    kernel.settle(&mut table);
    assert_eq!((kernel.bound.len(), kernel.leads("192.0.2.80", 80).len()), (1, 0));
}

#[test]
fn frontends_become_services_and_addresses_are_bound() {
    let (mut table, mut kernel) = (table(), Kernel::with_own(&["192.0.2.1", "198.51.100.9"]));
    let sticky = Entry { affinity_s: Some(60), ..entry(&["10.0.0.1"]) };
    let wanted = rules(&[
        (web(), entry(&["10.0.0.1", "10.0.0.2"])),
        (at("fd00:96::10", Protocol::Udp, 53), entry(&["fd00::1"])),
        (at("198.51.100.9", Protocol::Tcp, 80), sticky),
        (at("0.0.0.0", Protocol::Tcp, 30080), entry(&["10.0.0.1"])),
        (at("10.96.0.11", Protocol::Tcp, 80), entry(&[])),
    ]);
    kernel.carry_out(table.replace(&wanted, kernel.observed()));
    assert_eq!(kernel.leads(WEB, 80), ["10.0.0.1", "10.0.0.2"]);
    assert_eq!(kernel.leads("192.0.2.1", 30080), ["10.0.0.1"]);
    assert_eq!(kernel.leads("198.51.100.9", 30080), ["10.0.0.1"]);
    assert_eq!(kernel.bound, BTreeSet::from([ip(WEB), ip("fd00:96::10"), ip("10.96.0.11")]), "not the node's own");
    let balancer = Virtual { address: ip("198.51.100.9"), protocol: 6, port: 80 };
    let (settings, _) = &kernel.services[&balancer];
    assert_eq!((settings.flags, settings.timeout_s), (PERSISTENT, 60));
    assert_eq!(kernel.services.len(), 5, "nobody serves the last one");
    assert!(table.replace(&wanted, kernel.observed()).is_empty(), "what is there stays");
}

#[test]
fn a_server_goes_with_its_last_connection() {
    let (mut table, mut kernel) = (table(), Kernel::default());
    let both = [(web(), entry(&["10.0.0.1", "10.0.0.2"]))];
    let now = change(&mut table, &mut kernel, &Rules::default(), &both);
    kernel.busy.insert(Server { address: ip("10.0.0.1"), port: 8080 }, 1);
    let now = change(&mut table, &mut kernel, &now, &[(web(), entry(&["10.0.0.2"]))]);
    assert_eq!(kernel.leads(WEB, 80), ["10.0.0.2"]);
    kernel.settle(&mut table);
    assert_eq!(kernel.observed().services[0].2.len(), 2, "it is waited for");
    let now = change(&mut table, &mut kernel, &now, &both);
    assert_eq!((kernel.leads(WEB, 80).len(), table.draining().len()), (2, 0), "it is back");
    change(&mut table, &mut kernel, &now, &[]);
    kernel.settle(&mut table);
    assert_eq!((kernel.leads(WEB, 80).len(), &kernel.bound), (0, &BTreeSet::from([ip(WEB)])), "the service waits, too");
    kernel.busy.clear();
    kernel.settle(&mut table);
    assert_eq!((kernel.services.len(), kernel.bound.len()), (0, 0));
}

#[test]
fn servers_that_are_not_as_they_were_written_are_told() {
    let (mut table, mut kernel) = (table(), Kernel::default());
    let other = at("10.96.0.20", Protocol::Tcp, 80);
    let wanted = [(web(), entry(&["10.0.0.1", "10.0.0.2"])), (other, entry(&["10.0.0.3"]))];
    change(&mut table, &mut kernel, &Rules::default(), &wanted);
    let services: Vec<Virtual> = table.services_after(None).collect();
    assert_eq!(services, [virtual_service(&web()), virtual_service(&other)]);
    assert_eq!(table.services_after(Some(&services[0])).collect::<Vec<_>>(), services[1..]);
    assert_eq!(table.services_after(Some(&services[1])).count(), 0);
    let mut status = kernel.status(&services[0]);
    assert!(table.has_servers(&services[0], &status));
    status[0].weight = 0;
    assert!(!table.has_servers(&services[0], &status), "another weight");
    assert!(!table.has_servers(&services[0], &status[1..]), "one is gone");
    assert!(!table.has_servers(&services[1], &[]), "all are gone");
}

#[test]
fn udp_is_not_waited_for() {
    let (mut table, mut kernel) = (table(), Kernel::default());
    let dns = at(WEB, Protocol::Udp, 53);
    kernel.busy.insert(Server { address: ip("10.0.0.1"), port: 8080 }, 1);
    let now = change(&mut table, &mut kernel, &Rules::default(), &[(dns, entry(&["10.0.0.1"]))]);
    change(&mut table, &mut kernel, &now, &[]);
    assert_eq!(kernel, Kernel { busy: kernel.busy.clone(), ..Kernel::default() });
}

#[test]
fn what_others_made_goes_unless_it_is_excluded() {
    let (mut table, mut kernel) = (table(), Kernel::default());
    let settings = Settings { scheduler: "wlc".to_owned(), flags: 0, timeout_s: 0 };
    let foreign = |address: &str| Virtual { address: ip(address), protocol: 17, port: 53 };
    for address in ["172.16.0.1", "172.17.0.1", WEB] {
        kernel.command(Command::AddService(foreign(address), settings.clone()));
        kernel.command(Command::AddServer(foreign(address), Server { address: ip("10.9.9.9"), port: 1 }, 3));
    }
    let wanted = rules(&[(at(WEB, Protocol::Udp, 53), entry(&["10.0.0.1"]))]);
    kernel.carry_out(table.replace(&wanted, kernel.observed()));
    let left: Vec<IpAddr> = kernel.services.keys().map(|service| service.address).collect();
    assert_eq!(left, [ip(WEB), ip("172.16.0.1")]);
    let (settings, servers) = &kernel.services[&foreign(WEB)];
    assert_eq!((settings.scheduler.as_str(), servers.values().collect::<Vec<_>>()), ("rr", vec![&1]));
    let removal = table.remove(&kernel.observed());
    assert_eq!(removal, [Command::DeleteService(foreign(WEB))]);
}

#[test]
fn node_ports_follow_the_nodes_addresses() {
    let (mut table, mut kernel) = (table(), Kernel::with_own(&["192.0.2.1"]));
    let port = at("0.0.0.0", Protocol::Tcp, 30080);
    let external = at("198.51.100.8", Protocol::Tcp, 80);
    let wanted = rules(&[(port, entry(&["10.0.0.1"])), (external, entry(&["10.0.0.1"]))]);
    kernel.carry_out(table.replace(&wanted, kernel.observed()));
    assert_eq!(kernel.bound, BTreeSet::from([external.address]));
    let own = ["192.0.2.7", "198.51.100.8", "2001:db8::1"].map(ip);
    let (steps, turnover) = table.set_own(own.into());
    kernel.carry_out(steps);
    assert_eq!((turnover.come.as_slice(), turnover.gone.as_slice()), (&own[..], &[ip("192.0.2.1")][..]));
    assert!(kernel.bound.is_empty(), "another interface has it now");
    assert_eq!(kernel.leads("192.0.2.7", 30080), ["10.0.0.1"]);
    assert_eq!(kernel.leads("192.0.2.1", 30080).len(), 0);
    kernel.settle(&mut table);
    let places: Vec<IpAddr> = kernel.services.keys().map(|service| service.address).collect();
    assert_eq!(places, [ip("192.0.2.7"), ip("198.51.100.8"), ip("198.51.100.8")]);
}

#[test]
fn who_comes_from_outside_is_served_where_that_makes_a_difference() {
    let (mut table, mut kernel) = (table(), Kernel::default());
    let local = Entry { outside: Some(endpoints(&["10.0.0.1"])), ..entry(&["10.0.0.1", "10.0.0.2"]) };
    let dropped = Entry { outside: Some(Target::Drop), ..entry(&["10.0.0.2"]) };
    let now = change(&mut table, &mut kernel, &Rules::default(), &[(web(), local)]);
    assert_eq!(kernel.leads(WEB, 80), ["10.0.0.1"]);
    change(&mut table, &mut kernel, &now, &[(web(), dropped)]);
    assert_eq!(kernel.leads(WEB, 80), ["10.0.0.2"]);
}

fn any_entries(dice: &mut Dice) -> Vec<(Frontend, Entry)> {
    let mut entries = Vec::new();
    for address in ["10.96.0.1", "10.96.0.2", "192.0.2.1", "0.0.0.0"] {
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            if !dice.one_in(3) {
                let ends = ["10.0.0.1", "10.0.0.2", "10.0.0.3"];
                let some: Vec<&str> = ends.into_iter().filter(|_| dice.one_in(2)).collect();
                let affinity_s = dice.pick(&[None, Some(60)]);
                entries.push((at(address, protocol, 80), Entry { affinity_s, ..entry(&some) }));
            }
        }
    }
    entries
}

#[test]
fn many_changes_lead_where_a_fresh_start_would() {
    let owns = [vec!["192.0.2.1"], vec!["192.0.2.1", "192.0.2.2"], vec!["192.0.2.2", "10.96.0.2"], vec![]];
    for seed in 1..=40 {
        let mut dice = Dice::new(seed);
        let (mut table, mut kernel, mut now) = (table(), Kernel::default(), Rules::default());
        for _ in 0..30 {
            now = change(&mut table, &mut kernel, &now, &any_entries(&mut dice));
            kernel.own = dice.pick(&owns).iter().map(|address| ip(address)).collect();
            let (steps, _) = table.set_own(kernel.own.clone());
            kernel.carry_out(steps);
            kernel.settle(&mut table);
            let mut fresh = Kernel { own: kernel.own.clone(), ..Kernel::default() };
            fresh.carry_out(super::tests::table().replace(&now, fresh.observed()));
            assert_eq!(kernel, fresh, "seed {seed}");
        }
    }
}
