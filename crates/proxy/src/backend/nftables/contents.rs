//! How much a table has: by that it is noticed when somebody removes a part of it, or adds one.

use std::collections::BTreeMap;

use netfilter::Batch;
use netfilter::services::ServiceTable;
use sys::netlink::{self, Socket};

/// What the batches written so far make of the table.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// Elements of the sets and maps that only we write.
    elements: BTreeMap<String, i64>,
    /// How often each chain is used at least: once by each of its rules, and by who leads there.
    uses: BTreeMap<String, u32>,
}

impl Contents {
    /// Nothing, in these sets.
    pub(super) fn new(sets: Vec<String>) -> Self {
        Self { elements: sets.into_iter().map(|set| (set, 0)).collect(), uses: BTreeMap::new() }
    }

    /// Takes in a transaction.
    pub(super) fn add(&mut self, batch: &Batch) {
        for (set, more) in batch.elements() {
            if let Some(count) = self.elements.get_mut(set) {
                *count += more;
            }
        }
        for (chain, added) in batch.chains() {
            let uses = self.uses.entry(chain.clone()).or_insert(u32::from(!added.is_base));
            *uses += added.rules;
        }
        for chain in batch.deleted_chains() {
            self.uses.remove(chain);
        }
    }

    /// Whether the kernel's table has as much.
    pub(super) fn are_in(&self, netfilter: &mut Socket, table: &str) -> netlink::Result<bool> {
        let there = netfilter.uses(ServiceTable::FAMILY, table)?;
        if self.uses.iter().any(|(chain, uses)| there.get(chain).is_none_or(|there| there < uses)) {
            return Ok(false);
        }
        let counts = netfilter.set_counts(ServiceTable::FAMILY, table)?;
        for (set, count) in &self.elements {
            let there = match counts.get(set) {
                Some(Some(there)) => i64::from(*there),
                Some(None) => count_all(netfilter, table, set)?,
                None => 0,
            };
            if there != *count {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn count_all(netfilter: &mut Socket, table: &str, set: &str) -> netlink::Result<i64> {
    let count = netfilter.count_elements(ServiceTable::FAMILY, table, set)?;
    Ok(i64::try_from(count).unwrap_or(i64::MAX))
}
