//! Flows that lead to where nobody is any more, in the kernel's connection tracking: the same for all modes.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

use service::{Frontend, Protocol};
use sys::netlink::{self, Socket};

use crate::flows::{self, Suspects};

/// Sockets in the host's network namespace.
#[derive(Debug)]
pub(crate) struct Conntrack {
    netfilter: Socket,
    route: Socket,
}

impl Conntrack {
    /// Opens the sockets in the calling thread's namespace.
    pub(crate) fn open() -> netlink::Result<Conntrack> {
        Ok(Conntrack { netfilter: Socket::netfilter()?, route: Socket::route()? })
    }

    /// Deletes flows to frontends whose endpoint is none any more; returns how many of IPv4 and of IPv6.
    pub(crate) fn delete_stale(&mut self, suspects: &Suspects) -> netlink::Result<[u64; 2]> {
        let mut deleted = [0; 2];
        for ipv6 in [false, true].into_iter().filter(|ipv6| suspects.concern(*ipv6)) {
            let own: HashSet<IpAddr> = match suspects.has_node_ports() {
                true => self.route.addresses()?.into_iter().map(|(_, address, _)| address).collect(),
                false => HashSet::new(),
            };
            let stale = self.netfilter.flows(ipv6, |flow| suspects.is_stale(flow, &own))?;
            for flow in stale {
                self.netfilter.delete_flow(&flow)?;
                deleted[usize::from(ipv6)] += 1;
            }
        }
        Ok(deleted)
    }

    /// Connections to these frontends by the endpoint that they lead to.
    pub(crate) fn count(
        &mut self,
        frontends: &HashSet<Frontend>,
    ) -> netlink::Result<HashMap<(Protocol, SocketAddr), usize>> {
        let mut counts = HashMap::new();
        for ipv6 in [false, true] {
            if frontends.iter().any(|frontend| frontend.address.is_ipv6() == ipv6) {
                let flows = self.netfilter.flows(ipv6, |flow| flows::endpoint(frontends, flow).is_some())?;
                let led = flows.iter().filter_map(|flow| flows::endpoint(frontends, flow));
                led.for_each(|endpoint| *counts.entry(endpoint).or_default() += 1);
            }
        }
        Ok(counts)
    }
}
