//! What is known of the network around the rules.

use std::net::IpAddr;

use ipnet::IpNet;

/// What decides beside the rules what happens to a packet: partly the operator's, partly the cluster's word, so it may
/// change while rules are in force.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Network {
    /// How packets of pods are known.
    pub local: Local,
    /// Addresses of Services: what no Service takes is refused. Empty if unknown.
    pub service_cidrs: Vec<IpNet>,
    /// On which addresses of this node node ports answer.
    pub node_ports: NodePorts,
    /// Whether what goes to an address of a Service is masqueraded wherever it comes from.
    pub masquerade_all: bool,
}

/// How packets of pods are known, as told from those of others: they are not masqueraded on their way to Services, and for
/// them `externalTrafficPolicy` does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Local {
    /// Their source is in one of these ranges: of the whole cluster's pods, or of this node's. A family without a range is
    /// one in which nobody knows.
    Sources(Vec<IpNet>),
    /// They come from this bridge.
    Bridge(String),
    /// They come from an interface whose name begins so.
    InterfacePrefix(String),
}

impl Default for Local {
    fn default() -> Local {
        Local::Sources(Vec::new())
    }
}

impl Local {
    /// Whether pods of a family can be told from others.
    pub fn is_known(&self, ipv6: bool) -> bool {
        match self {
            Local::Sources(ranges) => ranges.iter().any(|range| range.addr().is_ipv6() == ipv6),
            Local::Bridge(_) | Local::InterfacePrefix(_) => true,
        }
    }
}

/// On which addresses of this node node ports answer; on loopback they do not, unless a mode says so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum NodePorts {
    /// All.
    #[default]
    All,
    /// Those in these ranges. In a family without a range all: upstream limits only the families that are named.
    In(Vec<IpNet>),
}

impl NodePorts {
    /// The ranges of a family; none where there is no limit.
    pub fn limits(&self, ipv6: bool) -> Vec<IpNet> {
        let NodePorts::In(ranges) = self else { return Vec::new() };
        let of_family = |range: &&IpNet| range.addr().is_ipv6() == ipv6;
        let limits: Vec<IpNet> = ranges.iter().filter(of_family).copied().collect();
        if limits.iter().any(|range| range.prefix_len() == 0) { Vec::new() } else { limits }
    }

    /// Whether node ports answer on an address of this node.
    pub fn include(&self, address: IpAddr) -> bool {
        let limits = self.limits(address.is_ipv6());
        limits.is_empty() || limits.iter().any(|range| range.contains(&address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_family_without_a_range_has_no_limit() {
        let ranges = |texts: &[&str]| NodePorts::In(texts.iter().map(|text| text.parse().unwrap()).collect());
        let check =
            |ports: NodePorts, address: &str, expect| assert_eq!(ports.include(address.parse().unwrap()), expect);
        check(NodePorts::All, "192.0.2.1", true);
        check(ranges(&["192.0.2.0/24"]), "192.0.2.1", true);
        check(ranges(&["192.0.2.0/24"]), "198.51.100.1", false);
        check(ranges(&["192.0.2.0/24"]), "fd00::1", true);
        check(ranges(&["192.0.2.0/24", "0.0.0.0/0"]), "198.51.100.1", true);
    }

    #[test]
    fn interfaces_know_both_families() {
        assert!(!Local::default().is_known(false));
        assert!(Local::Bridge("cni0".into()).is_known(true));
        assert!(Local::Sources(vec!["10.0.0.0/8".parse().unwrap()]).is_known(false));
    }
}
