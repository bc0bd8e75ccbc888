//! Whether somebody else has removed rules, asked of the kernel directly: a listing of ten thousand Services takes seconds.

use std::collections::BTreeMap;
use std::io;

use netfilter::iptables::{CANARY, Table};
use sys::netlink::{Socket, nft};
use sys::xtables::Xtables;

use super::programs::{Family, Kind};
use crate::{RulesError, StartError};

/// What is asked, and what the answer was after the last write.
#[derive(Debug)]
pub(super) enum Watch {
    /// How often chains are used: by their own rules, and by rules that jump to them. `iptables -X` removes a chain, `-F`
    /// removes what uses it.
    Nft { netfilter: Socket, families: &'static [Family], known: Uses },
    /// How many rules tables have. More of them may be anybody's; fewer, and somebody has removed some.
    Legacy { sockets: Vec<Xtables>, known: BTreeMap<(usize, Table), u32> },
}

/// By family, table and chain.
type Uses = BTreeMap<(bool, Table, &'static str), Option<u32>>;

/// Chains that others must not touch.
const CHAINS: [(Table, &str); 6] = [
    (Table::Mangle, CANARY),
    (Table::Filter, CANARY),
    (Table::Nat, CANARY),
    (Table::Nat, "KUBE-SERVICES"),
    (Table::Nat, "KUBE-POSTROUTING"),
    (Table::Filter, "KUBE-SERVICES"),
];

impl Watch {
    /// Opens sockets in the calling thread's namespace.
    pub(super) fn new(kind: Kind, families: &'static [Family]) -> Result<Watch, StartError> {
        match kind {
            Kind::Nft => {
                let netfilter = Socket::netfilter().map_err(StartError::NoNftables)?;
                Ok(Watch::Nft { netfilter, families, known: Uses::new() })
            }
            Kind::Legacy => {
                let sockets = families.iter().map(|family| Xtables::open(family.is_ipv6()));
                let sockets = sockets.collect::<io::Result<_>>().map_err(StartError::Namespace)?;
                Ok(Watch::Legacy { sockets, known: BTreeMap::new() })
            }
        }
    }

    /// Takes what is there now for what is to be there.
    pub(super) fn remember(&mut self) -> Result<(), RulesError> {
        match self {
            Watch::Nft { netfilter, families, known } => {
                let now = uses(netfilter, families)?;
                // What went between the write and this look is missed the next time.
                *known = if now.values().all(Option::is_some) { now } else { Uses::new() };
            }
            Watch::Legacy { sockets, known } => *known = usage(sockets)?,
        }
        Ok(())
    }

    /// Whether nothing says that something is missing.
    pub(super) fn is_untouched(&mut self) -> Result<bool, RulesError> {
        match self {
            Watch::Nft { netfilter, families, known } => Ok(uses(netfilter, families)? == *known),
            Watch::Legacy { sockets, known } => {
                let now = usage(sockets)?;
                Ok(known.iter().all(|(table, count)| now.get(table).is_some_and(|now| now >= count)))
            }
        }
    }
}

fn uses(netfilter: &mut Socket, families: &[Family]) -> Result<Uses, RulesError> {
    let mut uses = Uses::new();
    for family in families {
        let of_nft = if family.is_ipv6() { nft::Family::Ipv6 } else { nft::Family::Ipv4 };
        for (table, chain) in CHAINS {
            let count = netfilter.chain_uses(of_nft, table.name(), chain)?;
            uses.insert((family.is_ipv6(), table, chain), count);
        }
    }
    Ok(uses)
}

fn usage(sockets: &[Xtables]) -> Result<BTreeMap<(usize, Table), u32>, RulesError> {
    let mut counts = BTreeMap::new();
    for (at, socket) in sockets.iter().enumerate() {
        for table in Table::ALL {
            let usage = socket.usage(table.name()).map_err(RulesError::Tables)?;
            counts.insert((at, table), usage.entries);
        }
    }
    Ok(counts)
}
