//! Whether somebody else has removed rules, asked of the kernel directly: a listing of ten thousand Services takes seconds.

use std::collections::BTreeMap;
use std::io;
use std::time::{Duration, Instant};

use netfilter::iptables::{Least, ServiceRules, Table};
use sys::netlink::Socket;
use sys::xtables::Xtables;

use super::programs::{Family, Kind};
use crate::{RulesError, StartError};

/// Chains of ports are counted for no more than this part of the time.
const COUNTING_SHARE: u32 = 100;

/// What is asked.
#[derive(Debug)]
pub(super) enum Watch {
    /// How often chains are used. `iptables -X` removes a chain, `-F` removes what uses it.
    Nft {
        netfilter: Socket,
        families: &'static [Family],
        /// Of nftables, when everything was seen to be there.
        generation: Option<u32>,
        /// When chains of ports may be counted next.
        next_count: Instant,
    },
    /// How many rules tables have, and had after the last write. More of them may be anybody's; fewer, and somebody has
    /// removed some.
    Legacy { sockets: Vec<(Family, Xtables)>, known: BTreeMap<(bool, Table), u32> },
}

impl Watch {
    /// Opens sockets in the calling thread's namespace.
    pub(super) fn new(kind: Kind, families: &'static [Family]) -> Result<Watch, StartError> {
        match kind {
            Kind::Nft => {
                let netfilter = Socket::netfilter().map_err(StartError::NoNftables)?;
                Ok(Watch::Nft { netfilter, families, generation: None, next_count: Instant::now() })
            }
            Kind::Legacy => {
                let sockets = families.iter().map(|family| Ok((*family, Xtables::open(family.is_ipv6())?)));
                let sockets = sockets.collect::<io::Result<_>>().map_err(StartError::Namespace)?;
                Ok(Watch::Legacy { sockets, known: BTreeMap::new() })
            }
        }
    }

    /// Notes what is there after a write.
    ///
    /// # Errors
    /// Something has been removed meanwhile.
    pub(super) fn written(&mut self, rules: &ServiceRules) -> Result<(), RulesError> {
        if let Watch::Legacy { sockets, known } = self {
            *known = usage(sockets)?;
        }
        if self.stands(rules)? { Ok(()) } else { Err(RulesError::Removed) }
    }

    /// Whether nothing says that something is missing, as far as it is looked for: what nobody has touched since all was there
    /// is there.
    pub(super) fn is_untouched(&mut self, rules: &ServiceRules) -> Result<bool, RulesError> {
        let now = match self {
            Watch::Nft { netfilter, .. } => Some(netfilter.generation()?),
            Watch::Legacy { .. } => None,
        };
        if let Watch::Nft { generation, .. } = self
            && *generation == now
        {
            return Ok(true);
        }
        if !self.stands(rules)? {
            return Ok(false);
        }
        let Watch::Nft { netfilter, families, generation, next_count } = self else { return Ok(true) };
        let begun = Instant::now();
        if begun < *next_count {
            return Ok(true); // A later look counts.
        }
        let mut is_whole = true;
        for family in *families {
            is_whole &= is_used(netfilter, *family, rules)?;
        }
        *next_count = Instant::now() + begun.elapsed().min(Duration::from_secs(1)) * COUNTING_SHARE;
        if is_whole {
            *generation = now;
        }
        Ok(is_whole)
    }

    /// Whether what leads to Services is there. Asked before each change.
    pub(super) fn stands(&mut self, rules: &ServiceRules) -> Result<bool, RulesError> {
        match self {
            Watch::Nft { netfilter, families, .. } => {
                for family in *families {
                    if !has_uses(netfilter, *family, &rules.least(family.is_ipv6()))? {
                        return Ok(false);
                    }
                }
                Ok(true)
            }
            Watch::Legacy { sockets, known } => {
                let now = usage(sockets)?;
                let at = |ipv6, table| now.get(&(ipv6, table)).copied().unwrap_or(0);
                let has_least = |family: Family| {
                    let mut entries = rules.least(family.is_ipv6()).entries.into_iter();
                    entries.all(|(table, least)| {
                        usize::try_from(at(family.is_ipv6(), table)).is_ok_and(|entries| entries >= least)
                    })
                };
                Ok(sockets.iter().all(|(family, _)| has_least(*family))
                    && known.iter().all(|((ipv6, table), count)| at(*ipv6, *table) >= *count))
            }
        }
    }
}

fn has_uses(netfilter: &mut Socket, family: Family, least: &Least) -> Result<bool, RulesError> {
    for (table, chain, least) in &least.uses {
        let uses = netfilter.chain_uses(family.of_nft(), table.name(), chain)?;
        if uses.is_none_or(|uses| usize::try_from(uses).is_ok_and(|uses| uses < *least)) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether each chain has the rules that it should have.
fn is_used(netfilter: &mut Socket, family: Family, rules: &ServiceRules) -> Result<bool, RulesError> {
    let mut there = BTreeMap::new();
    for table in [Table::Filter, Table::Nat] {
        there.insert(table, netfilter.uses(family.of_nft(), table.name())?);
    }
    Ok(rules.is_used(family.is_ipv6(), |table, chain| {
        let uses = there.get(&table).and_then(|chains: &BTreeMap<String, u32>| chains.get(chain));
        uses.map_or(0, |uses| usize::try_from(*uses).unwrap_or(usize::MAX))
    }))
}

fn usage(sockets: &[(Family, Xtables)]) -> Result<BTreeMap<(bool, Table), u32>, RulesError> {
    let mut counts = BTreeMap::new();
    for (family, socket) in sockets {
        for table in Table::ALL {
            let usage = socket.usage(table.name()).map_err(RulesError::Tables)?;
            counts.insert((family.is_ipv6(), table), usage.entries);
        }
    }
    Ok(counts)
}
