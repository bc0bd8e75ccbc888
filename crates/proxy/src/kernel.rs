//! The kernel's side: transactions, and flows that lead to where nobody is any more. All of it blocks for as long as the
//! kernel works.

use std::collections::HashSet;
use std::net::IpAddr;

use netfilter::services::{self, Remains, ServiceTable};
use service::{Difference, Frontend, Protocol, Rules};
use sys::netlink::{self, Socket};
use sys::rustix::io::Errno;

use crate::flows::Suspects;
use crate::{Config, Owned, StartError};

/// Listings that were disturbed are asked for again this often.
const LISTINGS_MAX: usize = 5;

/// Sockets in the host's network namespace, and what has been written there.
#[derive(Debug)]
pub(crate) struct Kernel {
    name: String,
    netfilter: Socket,
    route: Socket,
    table: ServiceTable,
    /// Of nftables, when it was looked at last.
    generation: u32,
}

impl Kernel {
    /// Opens the sockets in the calling thread's namespace and checks that the kernel has all that rules need.
    pub(crate) fn open(config: &Config) -> Result<Kernel, StartError> {
        let table = services::Config {
            name: config.table.clone(),
            pod_cidrs: config.pod_cidrs.clone(),
            service_cidrs: config.service_cidrs.clone(),
        };
        let mut kernel = Kernel {
            name: config.table.clone(),
            netfilter: Socket::netfilter().map_err(StartError::NoNftables)?,
            route: Socket::route().map_err(StartError::Kernel)?,
            table: ServiceTable::new(table),
            generation: 0,
        };
        again(|| kernel.netfilter.tables(ServiceTable::FAMILY)).map_err(StartError::NoNftables)?;
        kernel.netfilter.commit(kernel.table.probe()).map_err(|error| match error.errno {
            Errno::PERM => StartError::NotPermitted(error),
            // A type of expression, chain or set that is not there.
            Errno::NOENT | Errno::OPNOTSUPP => StartError::Unsupported(error),
            _ => StartError::Kernel(error),
        })?;
        Ok(kernel)
    }

    /// Puts these rules in place of those that are there, in one transaction.
    pub(crate) fn replace(&mut self, rules: &Rules) -> netlink::Result<()> {
        let remains = Remains {
            sets: again(|| self.netfilter.sets(ServiceTable::FAMILY, &self.name))?,
            chains: again(|| self.netfilter.chains(ServiceTable::FAMILY, &self.name))?,
        };
        let kept = self.netfilter.commit(self.table.replace(rules, &remains));
        kept.or_else(|error| {
            tracing::warn!(table = self.name, %error, "the table is made anew from nothing: session affinity begins anew");
            self.netfilter.commit(self.table.replace_all(rules))
        })
    }

    /// Carries out a difference, in one transaction.
    pub(crate) fn update(&mut self, difference: &Difference) -> netlink::Result<()> {
        self.netfilter.commit(self.table.update(difference))
    }

    /// Whether the table is still there. Cheap as long as nobody commits anything.
    pub(crate) fn is_there(&mut self) -> netlink::Result<bool> {
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

    /// UDP frontends of the rules that are there.
    pub(crate) fn udp_frontends(&mut self) -> netlink::Result<Vec<Frontend>> {
        let mut frontends = Vec::new();
        for map in ServiceTable::FRONTENDS {
            let elements = again(|| self.netfilter.elements(ServiceTable::FAMILY, &self.name, map))?;
            frontends.extend(elements.iter().filter_map(|(key, _)| udp_frontend(map, key)));
        }
        Ok(frontends)
    }

    /// Deletes flows to frontends whose endpoint is none any more.
    pub(crate) fn delete_stale_flows(&mut self, suspects: &Suspects) -> netlink::Result<usize> {
        let mut deleted = 0;
        for ipv6 in [false, true].into_iter().filter(|ipv6| suspects.concern(*ipv6)) {
            let own: HashSet<IpAddr> = match suspects.has_node_ports() {
                true => again(|| self.route.addresses())?.into_iter().map(|(_, address, _)| address).collect(),
                false => HashSet::new(),
            };
            let stale = again(|| self.netfilter.flows(ipv6, |flow| suspects.is_stale(flow, &own)))?;
            for flow in stale {
                self.netfilter.delete_flow(&flow)?;
                deleted += 1;
            }
        }
        Ok(deleted)
    }

    /// Removes the table.
    pub(crate) fn remove(&mut self) -> netlink::Result<()> {
        self.netfilter.commit(self.table.remove())
    }

    /// What of ours is there.
    pub(crate) fn owned(&mut self) -> netlink::Result<Vec<Owned>> {
        let tables = again(|| self.netfilter.tables(ServiceTable::FAMILY))?;
        let ours = tables.into_iter().filter(|name| name.starts_with(&self.name));
        let owner = |name: &str| (name == self.name).then(|| "services".to_owned());
        Ok(ours.map(|name| Owned { kind: "table", owner: owner(&name), name }).collect())
    }
}

/// Lists anew when something changed underway.
fn again<T>(mut listing: impl FnMut() -> netlink::Result<T>) -> netlink::Result<T> {
    for _ in 1..LISTINGS_MAX {
        match listing() {
            Err(error) if error.errno == Errno::INTR => {}
            other => return other,
        }
    }
    listing()
}

fn udp_frontend(map: &str, key: &[u8]) -> Option<Frontend> {
    let (address, protocol, port) = services::frontend(map, key)?;
    (protocol == Protocol::Udp.number()).then_some(Frontend { address, protocol: Protocol::Udp, port })
}
