//! The order in which a change comes into the table.
//!
//! A packet looks up one set after the other, and between two lookups a transaction may be committed. So a change takes up to
//! four, each of which leaves packets that have begun before it a way that was right before it or is right after it:
//!
//! ```text
//! chains      they are filled when one is led there
//!   ▼
//! firewall    who may not connect is known before there is a way
//!   ▼
//! outside     who comes from outside finds a way of his own before the one of pods
//!   ▼
//! the rest    numbers, endpoints, masquerading
//!   ▼         with the next change, or at the next look:
//! held        what nothing leads to any more: chains, slots behind the last one. Who read a number before finds his endpoint
//! ```
//!
//! Nearly always it is the last one alone: a chain comes with a number of endpoints that no Service had, the others with
//! `loadBalancerSourceRanges` and `externalTrafficPolicy: Local`. A frontend that passes from one Service to another with
//! other sources is nobody's in between ([`steps`]): who may connect to the one must not come to the other's endpoints.
//!
//! Without that a packet that has read that a frontend has three endpoints may find no chain for three, or nobody in the
//! third slot: it is refused although the Service has two. And one that found no firewall before its Service came, or the
//! new chain of sources that is empty for it, may be led to an endpoint that its source must not reach. To another Service's
//! endpoint it never comes: numbers are counts, and slots and members have their frontend in the key.
//!
//! This counts on a packet not to be between two lookups for longer than a transaction takes. A replacement of the whole
//! table is one transaction ([`super::ServiceTable::replace`]): there, at the start of a daemon, the above may happen to a
//! packet for what differs from the table before.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ipnet::IpNet;
use service::{Change, Difference, Entry};
use sys::netlink::nft::{Batch, Element};

use super::chains::{self, LoadBalancer};
use super::elements::{Kind, SetName, Side, Value};
use super::{Elements, ServiceTable, Step, add_elements, list_hairpins, list_verdicts};
use crate::key::Part;

/// What one transaction does, in this order.
#[derive(Debug, Default)]
pub(super) struct Transaction {
    /// What is replaced is among it.
    gone: Elements,
    load_balancers: Vec<LoadBalancer>,
    /// With the numbers of their chains.
    sources: Vec<(u32, Arc<[IpNet]>)>,
    come: Elements,
    /// Nothing leads to these any more.
    gone_chains: Vec<String>,
}

/// What stays for packets on their way, though nothing leads there any more.
#[derive(Debug, Default)]
pub(super) struct Held {
    elements: BTreeMap<(SetName, Part), Value>,
    chains: BTreeSet<LoadBalancer>,
}

impl Held {
    pub(super) fn is_empty(&self) -> bool {
        self.elements.is_empty() && self.chains.is_empty()
    }

    /// What is there still need not come.
    fn spare(&mut self, chains: &mut Vec<LoadBalancer>, come: &mut Elements) {
        chains.retain(|chain| !self.chains.remove(chain));
        come.retain(|set, elements| {
            elements.retain(|(key, value)| {
                let at = (*set, *key);
                let is_there = self.elements.get(&at) == Some(value);
                if is_there {
                    self.elements.remove(&at);
                }
                !is_there
            });
            !elements.is_empty()
        });
    }

    fn hold(&mut self, elements: Elements) {
        let elements = elements.into_iter().flat_map(|(set, elements)| elements.into_iter().map(move |one| (set, one)));
        self.elements.extend(elements.map(|(set, (key, value))| ((set, key), value)));
    }
}

impl Transaction {
    pub(super) fn write(self, mut batch: Batch) -> Batch {
        for (set, elements) in &self.gone {
            let elements = elements.iter().map(|(key, value)| Element { key: key.as_slice(), data: value.data() });
            batch.delete_pairs(&set.name(), elements);
        }
        self.load_balancers.iter().for_each(|chain| chain.add(&mut batch));
        self.sources.iter().for_each(|(number, sources)| chains::add_sources(&mut batch, *number, sources));
        add_elements(&mut batch, &self.come);
        self.gone_chains.iter().for_each(|name| batch.delete_chain(name));
        batch
    }
}

/// What becomes of the elements of a change.
#[derive(Debug, Default)]
struct Turnover {
    gone: Elements,
    /// They go later.
    held: Elements,
    come: Elements,
}

/// The differences into which one is split: a frontend that passes to a Service with other sources goes before it comes.
pub(super) fn steps(difference: &Difference) -> Vec<Cow<'_, Difference>> {
    let passes = |change: &Change| {
        let both = change.old.as_ref().zip(change.new.as_ref());
        both.is_some_and(|(old, new)| old.sources != new.sources && old.port.service != new.port.service)
    };
    if !difference.changes.iter().any(passes) {
        return vec![Cow::Borrowed(difference)];
    }
    let (mut first, mut then) = (Difference::default(), difference.clone());
    for change in then.changes.iter_mut().filter(|change| passes(change)) {
        first.changes.push(Change { new: None, ..change.clone() });
        change.old = None;
    }
    vec![Cow::Owned(first), Cow::Owned(then)]
}

impl ServiceTable {
    pub(super) fn plan(&mut self, difference: &Difference) -> [Transaction; 4] {
        for Change { frontend, old, new } in &difference.changes {
            old.iter().for_each(|entry| self.count(frontend, entry, Step::Less));
            new.iter().for_each(|entry| self.count(frontend, entry, Step::More));
        }
        let (mut load_balancers, sources, hairpins) =
            (self.load_balancers.take(), self.sources.take(), self.hairpins.take());
        self.number(&sources.come);
        let mut elements =
            Turnover { gone: list_hairpins(hairpins.gone), held: Elements::new(), come: list_hairpins(hairpins.come) };
        difference.changes.iter().for_each(|change| self.compare(change, &mut elements));
        let mut old = std::mem::take(&mut self.held);
        old.spare(&mut load_balancers.come, &mut elements.come);
        self.held.hold(std::mem::take(&mut elements.held));
        self.held.chains.extend(load_balancers.gone);
        // What was held for those on their way when the last change came goes now.
        let Held { elements: held, chains: held_chains } = old;
        held.into_iter().for_each(|((set, key), value)| elements.gone.entry(set).or_default().push((key, value)));
        list_verdicts(&held_chains, &mut elements.gone);
        let firewall = split(&mut elements, |kind| kind == Kind::Firewall);
        let outside = split(&mut elements, is_for_outside);
        let unused = sources.gone.iter().filter_map(|sources| self.numbers.remove(sources)).map(chains::sources_name);
        let gone_chains = held_chains.iter().map(LoadBalancer::name).chain(unused).collect();
        let rest = Transaction { gone: elements.gone, come: elements.come, gone_chains, ..Default::default() };
        let mut verdicts = Elements::new();
        list_verdicts(&load_balancers.come, &mut verdicts);
        let chains = Transaction {
            load_balancers: load_balancers.come,
            sources: self.numbered(sources.come),
            come: verdicts,
            ..Default::default()
        };
        [chains, firewall, outside, rest]
    }

    fn compare(&self, change: &Change, elements: &mut Turnover) {
        let list = |entry: &Option<Entry>| {
            let mut elements = BTreeMap::new();
            if let Some(entry) = entry {
                self.list(&change.frontend, entry, |set, key, value| {
                    elements.insert((set, key), value);
                });
            }
            elements
        };
        let (mut old, new) = (list(&change.old), list(&change.new));
        for (at, value) in new {
            match old.remove(&at) {
                Some(old) if old == value => continue,
                Some(old) => elements.gone.entry(at.0).or_default().push((at.1, old)),
                None => {}
            }
            elements.come.entry(at.0).or_default().push((at.1, value));
        }
        // Nobody is to be led any more where nobody serves.
        let stays = change.new.is_some();
        for ((set, key), value) in old {
            let elements = if stays && is_found_later(set) { &mut elements.held } else { &mut elements.gone };
            elements.entry(set).or_default().push((key, value));
        }
    }
}

/// Whether packets come to a set by what they found in another, and what stays there for a while does no harm to others.
/// Clients remember members by themselves: those that are gone must be forgotten at once, and who finds none takes a slot.
/// And the address of an endpoint on this node may be that of one on another a moment later.
fn is_found_later(set: SetName) -> bool {
    match set.kind {
        Kind::Endpoints(_)
        | Kind::Numbers(_)
        | Kind::Verdicts { .. }
        | Kind::Masquerade
        | Kind::MasqueradeAway
        | Kind::MasqueradeAll => true,
        Kind::Services(_)
        | Kind::NodePorts(_)
        | Kind::Members(_)
        | Kind::Affinity(_)
        | Kind::Firewall
        | Kind::Hairpins
        | Kind::Own
        | Kind::Vips => false,
    }
}

fn is_for_outside(kind: Kind) -> bool {
    let outside = Side::Outside;
    [Kind::Services(outside), Kind::NodePorts(outside), Kind::Endpoints(outside)].contains(&kind)
        || [Kind::Numbers(outside), Kind::Members(outside)].contains(&kind)
}

/// Takes out what comes into sets of some kinds, with what it replaces.
fn split(elements: &mut Turnover, is_first: impl Fn(Kind) -> bool) -> Transaction {
    let mut first = Transaction::default();
    let (come, rest) = std::mem::take(&mut elements.come).into_iter().partition(|(set, _)| is_first(set.kind));
    (first.come, elements.come) = (come, rest);
    for (set, new) in &first.come {
        let Some(old) = elements.gone.get_mut(set) else { continue };
        let keys: BTreeSet<&Part> = new.iter().map(|(key, _)| key).collect();
        let (replaced, others) = std::mem::take(old).into_iter().partition(|(key, _)| keys.contains(key));
        first.gone.insert(*set, replaced);
        *old = others;
    }
    first
}

#[cfg(test)]
mod tests;
