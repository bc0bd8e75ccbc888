//! Flows of UDP: a client that keeps sending from one port is one connection for the kernel, and goes on to the endpoint
//! that it got first, even if that has left. So the flow goes with the endpoint, and only with its own.

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use service::{Change, Difference, Endpoint, Frontend, Protocol, Rules};
use sys::netlink::conntrack::{Flow, Tuple};

/// Frontends whose flows are to be looked at, and where these may lead.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Suspects {
    allowed: HashMap<Frontend, HashSet<(IpAddr, u16)>>,
}

/// UDP frontends for which an endpoint has left, or which are new: clients may have been sending before they were there.
pub(crate) fn suspicious(difference: &Difference) -> impl Iterator<Item = Frontend> {
    let udp = difference.changes.iter().filter(|change| change.frontend.protocol == Protocol::Udp);
    udp.filter(|change| !only_more(change)).map(|change| change.frontend)
}

fn only_more(change: &Change) -> bool {
    let (Some(old), Some(new)) = (&change.old, &change.new) else { return false };
    let new: HashSet<&Endpoint> = new.endpoints().collect();
    let mut old = old.endpoints().peekable();
    old.peek().is_some() && old.all(|endpoint| new.contains(endpoint))
}

/// All UDP frontends.
pub(crate) fn all(rules: &Rules) -> impl Iterator<Item = Frontend> {
    rules.iter().map(|(frontend, _)| *frontend).filter(|frontend| frontend.protocol == Protocol::Udp)
}

impl Suspects {
    /// What holds for the frontends now.
    pub(crate) fn new<'f>(frontends: impl IntoIterator<Item = &'f Frontend>, rules: &Rules) -> Suspects {
        let endpoints = |frontend: &Frontend| {
            let entry = rules.get(frontend);
            let endpoints = entry.iter().flat_map(|entry| entry.endpoints());
            endpoints.map(|endpoint| (endpoint.address, endpoint.port)).collect()
        };
        Suspects { allowed: frontends.into_iter().map(|frontend| (*frontend, endpoints(frontend))).collect() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.allowed.is_empty()
    }

    pub(crate) fn concern(&self, ipv6: bool) -> bool {
        self.allowed.keys().any(|frontend| frontend.address.is_ipv6() == ipv6)
    }

    pub(crate) fn has_node_ports(&self) -> bool {
        self.allowed.keys().any(Frontend::is_node_port)
    }

    /// Whether a flow leads where it must not. `own` are the addresses of this node.
    pub(crate) fn is_stale(&self, flow: &Flow, own: &HashSet<IpAddr>) -> bool {
        self.is_stale_tuple(&flow.original, &flow.reply, flow.destination_translated, own)
    }

    fn is_stale_tuple(&self, original: &Tuple, reply: &Tuple, translated: bool, own: &HashSet<IpAddr>) -> bool {
        if original.protocol != Protocol::Udp.number() {
            return false;
        }
        let at = |address| Frontend { address, protocol: Protocol::Udp, port: original.destination_port };
        // What merely passes through to that port of another machine is nobody's node port.
        let to_this_node = translated || own.contains(&original.destination);
        let node_port = || self.allowed.get(&at(any(original.destination))).filter(|_| to_this_node);
        let allowed = self.allowed.get(&at(original.destination)).or_else(node_port);
        // The answers' source is the endpoint, or the frontend itself if the flow is older than the rule.
        allowed.is_some_and(|allowed| !allowed.contains(&(reply.source, reply.source_port)))
    }
}

/// Whom a flow to one of these frontends leads to.
pub(crate) fn endpoint(frontends: &HashSet<Frontend>, flow: &Flow) -> Option<(Protocol, SocketAddr)> {
    let Flow { original, reply, .. } = flow;
    let all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let protocol = all.into_iter().find(|protocol| protocol.number() == original.protocol)?;
    let is_ours = |address| frontends.contains(&Frontend { address, protocol, port: original.destination_port });
    // What merely passes through to that port of another machine is nobody's node port.
    let endpoint = SocketAddr::new(reply.source, reply.source_port);
    let is_changed = endpoint != SocketAddr::new(original.destination, original.destination_port);
    let is_led = is_ours(original.destination) || is_changed && is_ours(any(original.destination));
    is_led.then_some((protocol, endpoint))
}

/// The address that stands for those of this node.
fn any(like: IpAddr) -> IpAddr {
    if like.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tuple(protocol: u8, from: (&str, u16), to: (&str, u16)) -> Tuple {
        Tuple {
            source: from.0.parse().unwrap(),
            destination: to.0.parse().unwrap(),
            protocol,
            source_port: from.1,
            destination_port: to.1,
        }
    }

    /// UDP frontends that all lead to one endpoint.
    fn suspects(frontends: &[(&str, u16)], endpoint: (&str, u16)) -> Suspects {
        let one = |(address, port): &(&str, u16)| {
            let frontend = Frontend { address: address.parse().unwrap(), protocol: Protocol::Udp, port: *port };
            (frontend, HashSet::from([(endpoint.0.parse().unwrap(), endpoint.1)]))
        };
        Suspects { allowed: frontends.iter().map(one).collect() }
    }

    #[track_caller]
    fn check(protocol: u8, to: (&str, u16), answers_from: (&str, u16), expect: bool) {
        let suspects = suspects(&[("10.96.0.1", 53), ("0.0.0.0", 30053)], ("10.0.0.1", 53));
        let own = HashSet::from(["192.0.2.1".parse().unwrap()]);
        let client = ("10.0.0.9", 4000);
        let (original, reply) = (tuple(protocol, client, to), tuple(protocol, answers_from, client));
        let translated = to != answers_from;
        assert_eq!(suspects.is_stale_tuple(&original, &reply, translated, &own), expect);
    }

    #[test]
    fn only_flows_to_frontends_that_lead_elsewhere_are_stale() {
        check(17, ("10.96.0.1", 53), ("10.0.0.1", 53), false);
        check(17, ("10.96.0.1", 53), ("10.0.0.2", 53), true);
        check(17, ("10.96.0.1", 53), ("10.96.0.1", 53), true);
        check(17, ("10.96.0.1", 54), ("10.0.0.2", 53), false);
        check(6, ("10.96.0.1", 53), ("10.0.0.2", 53), false);
        check(17, ("192.0.2.1", 30053), ("10.0.0.1", 53), false);
        check(17, ("192.0.2.1", 30053), ("10.0.0.2", 53), true);
        check(17, ("192.0.2.1", 30053), ("192.0.2.1", 30053), true);
        check(17, ("198.51.100.1", 30053), ("198.51.100.1", 30053), false);
    }
}
