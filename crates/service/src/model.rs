//! The model: objects go in, rules and their differences come out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;

use crate::claims::{Claimant, Claims, Released};
use crate::explain::{Explanation, Outcome};
use crate::facts::{Fault, Holder, NodeFacts, Problem, ServiceFacts, SliceFacts};
use crate::names::Interner;
use crate::plan::{Places, explain, plan};
use crate::{Change, Difference, Entry, Frontend, Name, Rules};

/// What is known of Services, EndpointSlices and this node, and the rules that follow.
///
/// Setting and removing objects is cheap and changes no rules; [`Model::update`] brings them up to date for all objects that
/// have changed, and costs as much as these.
#[derive(Debug)]
pub struct Model {
    node_name: String,
    node: NodeFacts,
    external_ips: bool,
    names: Interner,
    services: HashMap<Name, State>,
    /// Which Service a slice stands behind.
    slices: HashMap<Name, Name>,
    holders: HashMap<Holder, u32>,
    claims: Claims,
    rules: Rules,
    dirty: BTreeSet<Name>,
    /// Those with a health-check node port: few of many.
    checked: BTreeSet<Name>,
    /// Those with faults: few of many.
    faulty: BTreeSet<Name>,
}

/// One Service, or the slices of one that is not there.
#[derive(Debug, Default)]
struct State {
    facts: Option<ServiceFacts>,
    /// By name; nearly always one.
    slices: Vec<(Arc<str>, SliceFacts)>,
    places: Places,
    claimant: Option<Claimant>,
    /// In order.
    claimed: Vec<Frontend>,
}

/// A node port on which load balancers ask whether this node has endpoints of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// The Service.
    pub service: Name,
    /// The port.
    pub port: u16,
    /// How many endpoints on this node are ready.
    pub local_endpoints: usize,
}

impl Model {
    /// Nothing is known yet.
    pub fn new(node_name: &str) -> Model {
        Model {
            node_name: node_name.to_owned(),
            node: NodeFacts::default(),
            external_ips: true,
            names: Interner::default(),
            services: HashMap::new(),
            slices: HashMap::new(),
            holders: HashMap::new(),
            claims: Claims::default(),
            rules: Rules::default(),
            dirty: BTreeSet::new(),
            checked: BTreeSet::new(),
            faulty: BTreeSet::new(),
        }
    }

    /// The same model, for a node that serves no `externalIPs`: who may write Services can take any address by them.
    pub fn without_external_ips(self) -> Model {
        Model { external_ips: false, ..self }
    }

    /// Notes zone and addresses of this node.
    pub fn set_node(&mut self, node: &Node) {
        let facts = NodeFacts::of(node);
        if self.node != facts {
            self.node = facts;
            self.dirty.extend(self.services.keys().cloned());
        }
    }

    /// Notes a Service, new or changed.
    pub fn set_service(&mut self, service: &Service) {
        let name = self.name_of(service.metadata.namespace.as_deref(), service.metadata.name.as_deref());
        let mut facts = ServiceFacts::of(service, &mut self.names);
        if let Some(facts) = facts.as_mut().filter(|_| !self.external_ips) {
            facts.external_ips.clear();
        }
        self.put_service(name, facts);
    }

    /// Forgets a Service.
    pub fn remove_service(&mut self, namespace: &str, name: &str) {
        let name = self.names.name(namespace, name);
        self.put_service(name, None);
    }

    fn put_service(&mut self, name: Name, facts: Option<ServiceFacts>) {
        if self.services.get(&name).and_then(|state| state.facts.as_ref()) != facts.as_ref() {
            let is_checked = facts.as_ref().is_some_and(|facts| facts.health_check_port.is_some());
            let is_faulty = facts.as_ref().is_some_and(|facts| !facts.faults.is_empty());
            for (few, is_one) in [(&mut self.checked, is_checked), (&mut self.faulty, is_faulty)] {
                if is_one {
                    few.insert(name.clone())
                } else {
                    few.remove(&name)
                };
            }
            self.services.entry(name.clone()).or_default().facts = facts;
            self.dirty.insert(name);
        }
    }

    /// Notes an EndpointSlice, new or changed.
    pub fn set_slice(&mut self, slice: &EndpointSlice) {
        let name = self.name_of(slice.metadata.namespace.as_deref(), slice.metadata.name.as_deref());
        let facts = SliceFacts::of(slice, &self.node_name, &mut self.names);
        self.put_slice(name, facts);
    }

    /// Forgets an EndpointSlice.
    pub fn remove_slice(&mut self, namespace: &str, name: &str) {
        let name = self.names.name(namespace, name);
        self.put_slice(name, None);
    }

    fn put_slice(&mut self, name: Name, facts: Option<SliceFacts>) {
        let old = self.slices.remove(&name).and_then(|service| {
            let slice = self.services.get_mut(&service)?.remove_slice(&name.name)?;
            self.dirty.insert(service);
            Some(slice)
        });
        for holder in old.iter().flat_map(SliceFacts::holders) {
            self.count_holder(holder, false);
        }
        let Some(facts) = facts else { return };
        for holder in facts.holders() {
            self.count_holder(holder, true);
        }
        let service = facts.service.clone();
        self.services.entry(service.clone()).or_default().add_slice(name.name.clone(), facts);
        self.dirty.insert(service.clone());
        self.slices.insert(name, service);
    }

    fn count_holder(&mut self, holder: Holder, more: bool) {
        let count = self.holders.entry(holder.clone()).or_default();
        *count = if more { *count + 1 } else { count.saturating_sub(1) };
        if *count == 0 {
            self.holders.remove(&holder);
        }
    }

    fn name_of(&mut self, namespace: Option<&str>, name: Option<&str>) -> Name {
        self.names.name(namespace.unwrap_or(""), name.unwrap_or(""))
    }

    /// Whether a slice says that this pod of this node takes connections and does not end. Endpoints that name no pod
    /// count by their addresses.
    pub fn serves(&self, pod_uid: &str, addresses: &[IpAddr]) -> bool {
        self.holders.contains_key(&Holder::Pod(pod_uid.into()))
            || addresses.iter().any(|address| self.holders.contains_key(&Holder::Address(*address)))
    }

    /// The rules as of the last [`Model::update`].
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Brings the rules up to date; returns what that changed.
    pub fn update(&mut self) -> Difference {
        let mut before = BTreeMap::new();
        while let Some(name) = self.dirty.pop_first() {
            self.refresh(&name, &mut before);
        }
        let changes = before.into_iter().filter_map(|(frontend, old)| {
            let new = self.rules.get(&frontend).cloned();
            (old != new).then_some(Change { frontend, old, new })
        });
        Difference { changes: changes.collect() }
    }

    /// One Service. `before` keeps what held for a frontend when the update began.
    fn refresh(&mut self, name: &Name, before: &mut BTreeMap<Frontend, Option<Entry>>) {
        let Some(state) = self.services.get_mut(name) else { return };
        let entries = state.plan(name, &self.node);
        let (claims, dirty, rules) = (&mut self.claims, &mut self.dirty, &mut self.rules);
        let mut set = |frontend: Frontend, entry: Option<Entry>| {
            let old = rules.set(frontend, entry);
            before.entry(frontend).or_insert(old);
        };
        let claimant = state.facts.as_ref().map(|facts| Claimant { created_s: facts.created_s, name: name.clone() });
        let is_wanted = |frontend: &Frontend| entries.binary_search_by_key(frontend, |(wanted, _)| *wanted).is_ok();
        let same = claimant == state.claimant;
        for frontend in state.claimed.iter().filter(|frontend| !(same && is_wanted(frontend))) {
            let Some(was) = &state.claimant else { continue };
            if let Released::Frontend(next) = claims.release(*frontend, was) {
                set(*frontend, None);
                dirty.extend(next);
            }
        }
        let held = if same { std::mem::take(&mut state.claimed) } else { Vec::new() };
        state.claimed = entries.iter().map(|(frontend, _)| *frontend).collect();
        for (frontend, entry) in entries {
            if let Some(claimant) = claimant.as_ref().filter(|_| held.binary_search(&frontend).is_err()) {
                dirty.extend(claims.claim(frontend, claimant));
            }
            if claims.owner(&frontend) == Some(name) {
                set(frontend, Some(entry));
            }
        }
        state.claimant = claimant;
        if state.facts.is_none() && state.slices.is_empty() {
            self.services.remove(name);
        }
    }

    /// What is wrong with Services.
    pub fn problems(&self) -> Vec<Problem> {
        let faulty = self.faulty.iter().flat_map(|service| {
            let facts = self.services.get(service).and_then(|state| state.facts.as_ref());
            let faults = facts.into_iter().flat_map(|facts| &facts.faults);
            faults.map(|fault| Problem { service: service.clone(), fault: fault.clone() })
        });
        let losers = self.claims.losers().map(|(frontend, owner, loser)| Problem {
            service: loser.clone(),
            fault: Fault::Taken { frontend, by: owner.clone() },
        });
        let mut problems: Vec<Problem> = faulty.chain(losers).collect();
        problems.sort_unstable();
        problems
    }

    /// What load balancers may ask this node, by Service.
    pub fn health_checks(&self) -> Vec<HealthCheck> {
        let checks = self.checked.iter().filter_map(|service| {
            let state = self.services.get(service)?;
            let port = state.facts.as_ref()?.health_check_port?;
            Some(HealthCheck { service: service.clone(), port, local_endpoints: state.local_endpoints() })
        });
        checks.collect()
    }

    /// What a packet to a Service meets, as of the last [`Model::update`]; none if there is no such Service.
    pub fn explain(&self, namespace: &str, name: &str) -> Option<Explanation> {
        let service = Name { namespace: namespace.into(), name: name.into() };
        let state = self.services.get(&service)?;
        let facts = state.facts.as_ref()?;
        let frontends = state.claimed.iter().filter_map(|frontend| {
            let outcome = match self.claims.owner(frontend) {
                Some(owner) if *owner != service => Outcome::Taken(owner.clone()),
                _ => Outcome::Entry(self.rules.get(frontend)?.clone()),
            };
            Some((*frontend, outcome))
        });
        Some(Explanation {
            frontends: frontends.collect(),
            ports: explain(facts, state.slices(), &self.node),
            faults: facts.faults.clone(),
            service,
        })
    }
}

impl State {
    /// Adds a slice that is not there yet.
    fn add_slice(&mut self, name: Arc<str>, facts: SliceFacts) {
        let at = self.slices.partition_point(|(other, _)| *other < name);
        self.slices.reserve_exact(1);
        self.slices.insert(at, (name, facts));
    }

    fn remove_slice(&mut self, name: &Arc<str>) -> Option<SliceFacts> {
        let at = self.slices.binary_search_by(|(other, _)| other.cmp(name)).ok()?;
        Some(self.slices.remove(at).1)
    }

    fn slices(&self) -> impl Iterator<Item = &SliceFacts> + Clone {
        self.slices.iter().map(|(_, slice)| slice)
    }

    fn plan(&mut self, name: &Name, node: &NodeFacts) -> Vec<(Frontend, Entry)> {
        let Some(facts) = &self.facts else {
            self.places = Places::default();
            return Vec::new();
        };
        let (entries, places) = plan(name, facts, self.slices(), &self.places, node);
        self.places = places;
        entries
    }

    /// A pod has an address of each family: it counts once.
    fn local_endpoints(&self) -> usize {
        let of_family = |ipv6| {
            let endpoints = self.slices().filter(|slice| slice.ipv6 == ipv6).flat_map(|slice| slice.endpoints.iter());
            let ready = endpoints.filter(|endpoint| endpoint.local && endpoint.conditions.ready);
            ready.map(|endpoint| endpoint.address).collect::<BTreeSet<IpAddr>>().len()
        };
        of_family(false).max(of_family(true))
    }
}

#[cfg(test)]
mod histories;
#[cfg(test)]
mod tests;
