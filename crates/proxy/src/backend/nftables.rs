//! nftables: a table of our own, one transaction each.

mod contents;
#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use netfilter::Batch;
use netfilter::services::{self, Balancer, Remains, ServiceTable};
use service::{Difference, Frontend, Network, Protocol, Rules};
use sys::netlink::nft::Family;
use sys::netlink::{self, Socket};
use sys::rustix::io::Errno;

use self::contents::Contents;
use super::Backend;
use crate::{Config, Owned, RulesError, StartError};

/// The table of upstream's kube-proxy, in the families `ip` and `ip6` (kubernetes: `pkg/proxy/nftables`).
const UPSTREAMS_TABLE: &str = "kube-proxy";

/// Counting takes no more than this part of the time: a kernel before 6.16 has to list what is counted.
const COUNTING_SHARE: u32 = 100;

/// A socket in the host's network namespace, and what has been written there.
#[derive(Debug)]
pub(super) struct Nftables {
    name: String,
    netfilter: Socket,
    table: ServiceTable,
    /// Of nftables, when everything was seen to be there.
    generation: u32,
    /// How often the fixed chains were used after the last replacement: by their rules and by those that lead to them.
    uses: Vec<(String, u32)>,
    contents: Contents,
    /// When contents may be counted next.
    next_count: Instant,
}

impl Nftables {
    /// Opens the socket in the calling thread's namespace and checks that the kernel has all that rules need.
    pub(super) fn open(config: &Config) -> Result<Nftables, StartError> {
        Self::open_with(config, Balancer::Rules)
    }

    /// As [`Nftables::open`], for rules that leave connections to another.
    pub(super) fn open_with(config: &Config, balancer: Balancer) -> Result<Nftables, StartError> {
        let table = services::Config { name: config.table.clone(), network: Network::default() };
        let mut nftables = Nftables {
            name: config.table.clone(),
            netfilter: Socket::netfilter().map_err(StartError::NoNftables)?,
            table: ServiceTable::with_balancer(table, balancer),
            generation: 0,
            uses: Vec::new(),
            contents: Contents::default(),
            next_count: Instant::now(),
        };
        nftables.netfilter.tables(ServiceTable::FAMILY).map_err(StartError::NoNftables)?;
        nftables.netfilter.commit(nftables.table.probe()).map_err(|error| match error.errno {
            Errno::PERM => StartError::NotPermitted(error),
            // A type of expression, chain or set that is not there.
            Errno::NOENT | Errno::OPNOTSUPP => StartError::Unsupported(error),
            _ => StartError::Kernel(error),
        })?;
        Ok(nftables)
    }

    /// As [`Backend::replace`], with more in the same transaction.
    pub(super) fn replace_with(
        &mut self,
        rules: &Rules,
        network: &Network,
        more: impl Fn(&mut Batch),
    ) -> Result<(), RulesError> {
        self.table.set_network(network);
        // If ours is the only transaction from here on, there is nothing to look for before the next.
        self.generation = self.netfilter.generation()?;
        let remains = Remains {
            sets: self.netfilter.sets(ServiceTable::FAMILY, &self.name)?,
            chains: self.netfilter.chains(ServiceTable::FAMILY, &self.name)?,
        };
        let mut batch = self.table.replace(rules, &remains);
        more(&mut batch);
        match self.commit_all(batch) {
            Err(error) if is_of_layout(error.errno) => {
                tracing::warn!(table = self.name, %error, "the table is made anew from nothing: session affinity begins anew");
                let mut batch = self.table.replace_all(rules);
                more(&mut batch);
                self.commit_all(batch)?;
            }
            other => other?,
        }
        self.know_own_commit();
        self.uses = self.count_uses()?;
        Ok(())
    }

    /// Carries out a transaction after which the table has nothing but what is in it.
    fn commit_all(&mut self, batch: Batch) -> netlink::Result<()> {
        self.contents = Contents::new(self.table.fixed_sets());
        self.contents.add(&batch);
        self.netfilter.commit(batch)
    }

    /// How often the fixed chains that are there are used.
    fn count_uses(&mut self) -> Result<Vec<(String, u32)>, RulesError> {
        let mut counts = Vec::new();
        for chain in ServiceTable::fixed_chains() {
            let uses = self.netfilter.chain_uses(ServiceTable::FAMILY, &self.name, &chain)?;
            counts.extend(uses.map(|uses| (chain, uses)));
        }
        Ok(counts)
    }

    /// As [`Backend::update`], with more in the same transaction.
    pub(super) fn update_with(
        &mut self,
        difference: &Difference,
        more: impl FnOnce(&mut Batch),
    ) -> Result<(), RulesError> {
        // Maps whose rules somebody has flushed would take the change.
        if !self.has_rules()? {
            return Err(RulesError::Removed);
        }
        let mut batches = self.table.update(difference);
        if let Some(last) = batches.last_mut() {
            more(last);
        }
        for batch in batches {
            self.contents.add(&batch);
            self.netfilter.commit(batch)?;
            self.know_own_commit();
        }
        Ok(())
    }

    /// Whether the fixed chains are there with their rules: `nft delete table` removes the chains, `nft flush table` what is
    /// in them. Asked before each change.
    fn has_rules(&mut self) -> Result<bool, RulesError> {
        Ok(self.netfilter.generation()? == self.generation || self.count_uses()? == self.uses)
    }

    /// Whether everything is there, as far as counting tells. What somebody has done since it was counted last, he may have
    /// done to this table.
    fn is_whole(&mut self) -> Result<bool, RulesError> {
        let generation = self.netfilter.generation()?;
        if generation == self.generation {
            return Ok(true);
        }
        if self.count_uses()? != self.uses {
            return Ok(false);
        }
        let begun = Instant::now();
        if begun < self.next_count {
            return Ok(true); // A later look counts.
        }
        let is_whole = self.contents.are_in(&mut self.netfilter, &self.name)?;
        self.next_count = Instant::now() + begun.elapsed().min(Duration::from_secs(1)) * COUNTING_SHARE;
        if is_whole {
            self.generation = generation;
        }
        Ok(is_whole)
    }

    /// If ours was the only transaction since the last look, there is no need to count before the next.
    fn know_own_commit(&mut self) {
        // Without an answer the next look counts.
        if let Ok(generation) = self.netfilter.generation()
            && generation == self.generation.wrapping_add(1)
        {
            self.generation = generation;
        }
    }
}

impl Backend for Nftables {
    fn place(&self) -> String {
        format!("table {}", self.name)
    }

    fn replace(&mut self, rules: &Rules, network: &Network) -> Result<(), RulesError> {
        self.replace_with(rules, network, |_| ())
    }

    fn update(&mut self, difference: &Difference) -> Result<(), RulesError> {
        self.update_with(difference, |_| ())
    }

    fn is_there(&mut self) -> Result<bool, RulesError> {
        if !self.is_whole()? {
            return Ok(false);
        }
        if !self.table.is_holding() {
            return Ok(true);
        }
        // No packet is on its way to that any more.
        let removed = self.update_with(&Difference::default(), |_| ());
        if let Err(error) = &removed {
            tracing::warn!(%error, "what no rule leads to could not be removed");
        }
        Ok(removed.is_ok())
    }

    fn udp_frontends(&mut self) -> Result<Vec<Frontend>, RulesError> {
        let mut frontends = Vec::new();
        for map in ServiceTable::FRONTENDS {
            let elements = self.netfilter.elements(ServiceTable::FAMILY, &self.name, map)?;
            frontends.extend(elements.iter().filter_map(|(key, _)| udp_frontend(map, key)));
        }
        Ok(frontends)
    }

    fn remove(&mut self) -> Result<(), RulesError> {
        Ok(self.netfilter.commit(self.table.remove())?)
    }

    fn owned(&mut self) -> Result<Vec<Owned>, RulesError> {
        let tables = self.netfilter.tables(ServiceTable::FAMILY)?;
        let ours = tables.into_iter().filter(|name| name.starts_with(&self.name));
        let owner = |name: &str| (name == self.name).then(|| "services".to_owned());
        Ok(ours.map(|name| Owned { kind: "table", owner: owner(&name), name }).collect())
    }
}

/// Whether a refusal says that what is there does not fit to what is to be there. Others pass, or would come again.
fn is_of_layout(errno: Errno) -> bool {
    matches!(errno, Errno::EXIST | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOENT | Errno::BUSY)
}

/// Removes a table of this name, if there is one.
pub(super) fn remove_leftovers(name: &str) -> Result<(), RulesError> {
    remove_table(ServiceTable::FAMILY, name)
}

/// Removes what upstream's kube-proxy has left in its mode `nftables`, if it has.
pub(super) fn remove_upstreams() -> Result<(), RulesError> {
    [Family::Ipv4, Family::Ipv6].into_iter().try_for_each(|family| remove_table(family, UPSTREAMS_TABLE))
}

fn remove_table(family: Family, name: &str) -> Result<(), RulesError> {
    // A kernel without nftables has none.
    let Ok(mut netfilter) = Socket::netfilter() else { return Ok(()) };
    if !netfilter.tables(family).is_ok_and(|tables| tables.iter().any(|table| table == name)) {
        return Ok(());
    }
    let mut batch = Batch::new(family, name);
    batch.delete_table();
    Ok(netfilter.commit(batch)?)
}

fn udp_frontend(map: &str, key: &[u8]) -> Option<Frontend> {
    let (address, protocol, port) = services::frontend(map, key)?;
    (protocol == Protocol::Udp.number()).then_some(Frontend { address, protocol: Protocol::Udp, port })
}
