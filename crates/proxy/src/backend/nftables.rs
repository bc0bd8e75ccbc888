//! nftables: a table of our own, one transaction each.

use netfilter::Batch;
use netfilter::services::{self, Balancer, Remains, ServiceTable};
use service::{Difference, Frontend, Network, Protocol, Rules};
use sys::netlink::Socket;
use sys::rustix::io::Errno;

use super::Backend;
use crate::conntrack::again;
use crate::{Config, Owned, RulesError, StartError};

/// A socket in the host's network namespace, and what has been written there.
#[derive(Debug)]
pub(super) struct Nftables {
    name: String,
    netfilter: Socket,
    table: ServiceTable,
    /// Of nftables, when it was looked at last.
    generation: u32,
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
        };
        again(|| nftables.netfilter.tables(ServiceTable::FAMILY)).map_err(StartError::NoNftables)?;
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
        let remains = Remains {
            sets: again(|| self.netfilter.sets(ServiceTable::FAMILY, &self.name))?,
            chains: again(|| self.netfilter.chains(ServiceTable::FAMILY, &self.name))?,
        };
        let mut batch = self.table.replace(rules, &remains);
        more(&mut batch);
        let kept = self.netfilter.commit(batch);
        Ok(kept.or_else(|error| {
            tracing::warn!(table = self.name, %error, "the table is made anew from nothing: session affinity begins anew");
            let mut batch = self.table.replace_all(rules);
            more(&mut batch);
            self.netfilter.commit(batch)
        })?)
    }

    /// As [`Backend::update`], with more in the same transaction.
    pub(super) fn update_with(
        &mut self,
        difference: &Difference,
        more: impl FnOnce(&mut Batch),
    ) -> Result<(), RulesError> {
        let mut batch = self.table.update(difference);
        more(&mut batch);
        Ok(self.netfilter.commit(batch)?)
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
        let generation = self.netfilter.generation()?;
        if generation == self.generation {
            return Ok(true);
        }
        let there = !again(|| self.netfilter.chains(ServiceTable::FAMILY, &self.name))?.is_empty();
        if there {
            self.generation = generation;
        }
        Ok(there)
    }

    fn udp_frontends(&mut self) -> Result<Vec<Frontend>, RulesError> {
        let mut frontends = Vec::new();
        for map in ServiceTable::FRONTENDS {
            let elements = again(|| self.netfilter.elements(ServiceTable::FAMILY, &self.name, map))?;
            frontends.extend(elements.iter().filter_map(|(key, _)| udp_frontend(map, key)));
        }
        Ok(frontends)
    }

    fn remove(&mut self) -> Result<(), RulesError> {
        Ok(self.netfilter.commit(self.table.remove())?)
    }

    fn owned(&mut self) -> Result<Vec<Owned>, RulesError> {
        let tables = again(|| self.netfilter.tables(ServiceTable::FAMILY))?;
        let ours = tables.into_iter().filter(|name| name.starts_with(&self.name));
        let owner = |name: &str| (name == self.name).then(|| "services".to_owned());
        Ok(ours.map(|name| Owned { kind: "table", owner: owner(&name), name }).collect())
    }
}

/// Removes a table of this name, if there is one.
pub(super) fn remove_leftovers(name: &str) -> Result<(), RulesError> {
    // A kernel without nftables has none.
    let Ok(mut netfilter) = Socket::netfilter() else { return Ok(()) };
    if !netfilter.tables(ServiceTable::FAMILY).is_ok_and(|tables| tables.iter().any(|table| table == name)) {
        return Ok(());
    }
    let mut batch = Batch::new(ServiceTable::FAMILY, name);
    batch.delete_table();
    Ok(netfilter.commit(batch)?)
}

fn udp_frontend(map: &str, key: &[u8]) -> Option<Frontend> {
    let (address, protocol, port) = services::frontend(map, key)?;
    (protocol == Protocol::Udp.number()).then_some(Frontend { address, protocol: Protocol::Udp, port })
}
