//! What a table has: by that it is noticed when somebody removes a part of it, adds one, or puts another in its place.

use std::collections::BTreeMap;

use netfilter::Batch;
use netfilter::services::ServiceTable;
use sys::netlink::nft::ElementSum;
use sys::netlink::{self, Socket};

/// What the batches written so far make of the table.
#[derive(Debug, Default)]
pub(super) struct Contents {
    /// Elements of the sets and maps that only we write.
    elements: BTreeMap<String, ElementSum>,
    /// How often each chain is used at least: once by each of its rules, and by who leads there.
    uses: BTreeMap<String, u32>,
}

impl Contents {
    /// Nothing, in these sets.
    pub(super) fn new(sets: Vec<String>) -> Self {
        Self { elements: sets.into_iter().map(|set| (set, ElementSum::default())).collect(), uses: BTreeMap::new() }
    }

    /// Takes in a transaction.
    pub(super) fn add(&mut self, batch: &Batch) {
        for (set, more) in batch.elements() {
            if let Some(sum) = self.elements.get_mut(set) {
                *sum += *more;
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

    /// Whether the kernel's table has the same.
    pub(super) fn are_in(&self, netfilter: &mut Socket, table: &str) -> netlink::Result<bool> {
        let there = netfilter.uses(ServiceTable::FAMILY, table)?;
        if self.uses.iter().any(|(chain, uses)| there.get(chain).is_none_or(|there| there < uses)) {
            return Ok(false);
        }
        // Asking how many there are costs less than reading them.
        let counts = netfilter.set_counts(ServiceTable::FAMILY, table)?;
        let count = |set: &str| counts.get(set).map_or(Some(0), |count| *count);
        let differs =
            |(set, sum): &(&String, &ElementSum)| count(set).is_some_and(|count| i64::from(count) != sum.count);
        if self.elements.iter().any(|element| differs(&element)) {
            return Ok(false);
        }
        for (set, sum) in self.elements.iter().filter(|(set, _)| count(set) != Some(0)) {
            if netfilter.element_sum(ServiceTable::FAMILY, table, set)? != *sum {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
