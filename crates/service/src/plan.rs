//! What one Service means: its facts and the slices behind it become entries.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::choose::{Candidate, Choice, choose};
use crate::explain::PortExplanation;
use crate::facts::{NodeFacts, Port, ServiceFacts, SliceFacts, Sources};
use crate::{Endpoint, Entry, Frontend, Kind, Name, Protocol, ServicePort, Target, slots};

/// Which endpoints: of a port in an address family.
type PlaceKey = (Arc<str>, Protocol, bool);

/// The endpoints of one port and address family in their slots; shared by all frontends of the port.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Place {
    cluster: Arc<[Endpoint]>,
    local: Arc<[Endpoint]>,
}

/// The places of a Service: where the next plan finds who stood in which slot.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Places(Vec<(PlaceKey, Place)>);

impl Places {
    fn get(&self, key: &PlaceKey) -> Option<&Place> {
        let at = self.0.binary_search_by(|(one, _)| one.cmp(key)).ok()?;
        self.0.get(at).map(|(_, place)| place)
    }
}

/// Entries of a Service in the order of their frontends, and the places they share.
pub(crate) fn plan<'s>(
    service: &Name,
    facts: &ServiceFacts,
    slices: impl Iterator<Item = &'s SliceFacts> + Clone,
    old: &Places,
    node: &NodeFacts,
) -> (Vec<(Frontend, Entry)>, Places) {
    let mut entries = BTreeMap::new();
    let mut places = BTreeMap::new();
    let ports: Vec<Arc<ServicePort>> = facts.ports.iter().map(|port| service_port(service, facts, port)).collect();
    for ipv6 in [false, true] {
        let mut of_family = facts.cluster_ips.iter().filter(|address| address.is_ipv6() == ipv6);
        // A Service lives in the families of its own addresses; the others have no endpoints for it.
        let Some(first) = of_family.next() else { continue };
        for (port, service_port) in facts.ports.iter().zip(&ports) {
            let key = (port.name.clone(), port.protocol, ipv6);
            let choice = choose(candidates(slices.clone(), &key), node.zone.as_deref());
            let place = settle(&choice, old.get(&key));
            let targets = Targets::new(facts, &choice, &place);
            targets.add_entries(facts, port, service_port, *first, node, &mut entries);
            places.insert(key, place);
        }
    }
    (entries.into_iter().collect(), Places(places.into_iter().collect()))
}

fn service_port(service: &Name, facts: &ServiceFacts, port: &Port) -> Arc<ServicePort> {
    let health_check_port = facts.health_check_port;
    Arc::new(ServicePort { service: service.clone(), name: port.name.clone(), health_check_port })
}

/// Who stands behind the ports of a Service, and why some of them get nothing.
pub(crate) fn explain<'s>(
    facts: &ServiceFacts,
    slices: impl Iterator<Item = &'s SliceFacts> + Clone,
    node: &NodeFacts,
) -> Vec<PortExplanation> {
    let mut explained = Vec::new();
    for ipv6 in [false, true] {
        if !facts.cluster_ips.iter().any(|address| address.is_ipv6() == ipv6) {
            continue;
        }
        for port in &facts.ports {
            let key = (port.name.clone(), port.protocol, ipv6);
            let lacks_port = |slice: &&SliceFacts| slice.ipv6 == ipv6 && slice.port(&key.0, key.1).is_none();
            let without: usize = slices.clone().filter(lacks_port).map(|slice| slice.endpoints.len()).sum();
            let candidates = candidates(slices.clone(), &key);
            explained.push(PortExplanation::new(key, candidates, node.zone.as_deref(), without));
        }
    }
    explained
}

fn candidates<'s>(slices: impl Iterator<Item = &'s SliceFacts>, key: &PlaceKey) -> Vec<Candidate<'s>> {
    let (name, protocol, ipv6) = key;
    let mut candidates = Vec::new();
    for slice in slices.filter(|slice| slice.ipv6 == *ipv6) {
        if let Some(port) = slice.port(name, *protocol) {
            candidates.extend(slice.endpoints.iter().map(|endpoint| Candidate { endpoint, port }));
        }
    }
    candidates
}

fn settle(choice: &Choice, old: Option<&Place>) -> Place {
    let cluster = slots::keep(old.map(|old| &old.cluster), &choice.cluster);
    if choice.local == choice.cluster {
        // On a node alone the two are always one.
        return Place { local: cluster.clone(), cluster };
    }
    Place { cluster, local: slots::keep(old.map(|old| &old.local), &choice.local) }
}

/// Where connections go.
struct Targets {
    cluster: Target,
    internal: Target,
    outside: Option<Target>,
}

impl Targets {
    fn new(facts: &ServiceFacts, choice: &Choice, place: &Place) -> Targets {
        let cluster = target(&place.cluster, Target::Refuse);
        // With endpoints elsewhere only, a load balancer or another node shall be tried, which a refusal would prevent.
        let local = target(&place.local, if choice.any { Target::Drop } else { Target::Refuse });
        Targets {
            internal: if facts.internal_local { local.clone() } else { cluster.clone() },
            outside: facts.external_local.then_some(local),
            cluster,
        }
    }

    fn add_entries(
        &self,
        facts: &ServiceFacts,
        port: &Port,
        service_port: &Arc<ServicePort>,
        like: IpAddr,
        node: &NodeFacts,
        entries: &mut BTreeMap<Frontend, Entry>,
    ) {
        let of_family = |address: &&IpAddr| address.is_ipv6() == like.is_ipv6();
        let frontend = |address: &IpAddr| Frontend { address: *address, protocol: port.protocol, port: port.port };
        let internal = Entry {
            port: service_port.clone(),
            kind: Kind::ClusterIp,
            inside: self.internal.clone(),
            inside_local: facts.internal_local,
            outside: None,
            affinity_s: facts.affinity_s,
            sources: None,
        };
        let external = |kind| Entry {
            kind,
            inside: self.cluster.clone(),
            inside_local: false,
            outside: self.outside.clone(),
            ..internal.clone()
        };
        for address in facts.cluster_ips.iter().filter(of_family) {
            entries.entry(frontend(address)).or_insert_with(|| internal.clone());
        }
        if let Some(node_port) = port.node_port {
            entries
                .entry(Frontend::node_port(like, port.protocol, node_port))
                .or_insert_with(|| external(Kind::NodePort));
        }
        for address in facts.external_ips.iter().filter(of_family) {
            entries.entry(frontend(address)).or_insert_with(|| external(Kind::ExternalIp));
        }
        for address in facts.balancer_ips.iter().filter(of_family) {
            let sources = sources(facts.sources.as_ref(), *address, node);
            entries.entry(frontend(address)).or_insert_with(|| Entry { sources, ..external(Kind::LoadBalancer) });
        }
    }
}

fn target(slots: &Arc<[Endpoint]>, otherwise: Target) -> Target {
    if slots.is_empty() { otherwise } else { Target::Endpoints(slots.clone()) }
}

/// Who may connect to a load balancer's address; `None`: everybody.
fn sources(sources: Option<&Sources>, address: IpAddr, node: &NodeFacts) -> Option<Arc<[IpNet]>> {
    let mut admitted = sources?.of_family(address.is_ipv6())?;
    // Some load balancers put their address on the nodes, so that a node which connects to it comes from it.
    if node.addresses.iter().any(|own| admitted.iter().any(|range| range.contains(own))) {
        admitted.push(address.into());
    }
    Some(admitted.into())
}
