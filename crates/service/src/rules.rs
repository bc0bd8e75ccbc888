//! The rules, and the difference of two.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use crate::{Entry, Frontend, Kind, Target};

/// What this node does for Services.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rules {
    entries: BTreeMap<Frontend, Entry>,
}

/// Ports of Services with a policy of Local and no endpoint on this node, IPv4 and IPv6.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Refusals {
    /// By `internalTrafficPolicy`.
    pub internal: [u64; 2],
    /// By `externalTrafficPolicy`.
    pub external: [u64; 2],
}

/// One frontend that differs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Which.
    pub frontend: Frontend,
    /// What held for it.
    pub old: Option<Entry>,
    /// What holds for it now.
    pub new: Option<Entry>,
}

/// What leads from some rules to others: one change for each frontend that differs, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Difference {
    /// The changes.
    pub changes: Vec<Change>,
}

impl Difference {
    /// Whether nothing differs.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }
}

impl Rules {
    /// All frontends and what holds for them, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&Frontend, &Entry)> {
        self.entries.iter()
    }

    /// What holds for a frontend.
    pub fn get(&self, frontend: &Frontend) -> Option<&Entry> {
        self.entries.get(frontend)
    }

    /// How many frontends there are.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// How many ports of Services have endpoints, but none that this node may lead to.
    pub fn refusals(&self) -> Refusals {
        let mut refusals = Refusals::default();
        let mut counted = HashSet::new();
        for (frontend, entry) in &self.entries {
            let family = usize::from(frontend.address.is_ipv6());
            if entry.inside == Target::Drop && entry.kind == Kind::ClusterIp {
                refusals.internal[family] += 1;
            }
            if entry.outside == Some(Target::Drop) && counted.insert((Arc::as_ptr(&entry.port), family)) {
                refusals.external[family] += 1;
            }
        }
        refusals
    }

    /// Lets an entry, or none, hold for a frontend; returns what did.
    pub(crate) fn set(&mut self, frontend: Frontend, entry: Option<Entry>) -> Option<Entry> {
        match entry {
            Some(entry) => self.entries.insert(frontend, entry),
            None => self.entries.remove(&frontend),
        }
    }

    /// Carries out a difference that was made from these rules.
    pub fn apply(&mut self, difference: Difference) {
        for Change { frontend, new, .. } in difference.changes {
            self.set(frontend, new);
        }
    }
}

impl Difference {
    /// Whether it is about IPv4, and whether about IPv6.
    pub fn families(&self) -> [bool; 2] {
        [false, true].map(|ipv6| self.changes.iter().any(|change| change.frontend.address.is_ipv6() == ipv6))
    }
}

/// What leads from `old` to `new`.
pub fn diff(old: &Rules, new: &Rules) -> Difference {
    let (mut olds, mut news) = (old.iter().peekable(), new.iter().peekable());
    let mut changes = Vec::new();
    loop {
        let frontend = match (olds.peek(), news.peek()) {
            (None, None) => return Difference { changes },
            (Some((one, _)), None) | (None, Some((one, _))) => **one,
            (Some((a, _)), Some((b, _))) => **a.min(b),
        };
        let old = olds.next_if(|(at, _)| **at == frontend).map(|(_, entry)| entry);
        let new = news.next_if(|(at, _)| **at == frontend).map(|(_, entry)| entry);
        if old != new {
            changes.push(Change { frontend, old: old.cloned(), new: new.cloned() });
        }
    }
}
