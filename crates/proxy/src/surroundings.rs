//! What the operator says of the network, and what the cluster adds to it while the proxy runs: upstream ends its process
//! when addresses of the Node change; here the rules are written anew.

use std::collections::BTreeMap;
use std::net::IpAddr;

use cluster::{Change, Key};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use service::{Local, Network, NodePorts};

use crate::Config;
use crate::configuration::{DetectLocal, NodePortAddress};

/// What is known so far.
#[derive(Debug)]
pub(crate) struct Surroundings {
    local: DetectLocal,
    fixed_cidrs: Vec<IpNet>,
    node_ports: Vec<NodePortAddress>,
    masquerade_all: bool,
    bind_address: Option<IpAddr>,
    /// The Node's own addresses, at most one of each family.
    node_addresses: Vec<IpAddr>,
    /// The sources that the Node has for its pods.
    node_pods: Vec<IpNet>,
    service_cidrs: BTreeMap<Key, Vec<IpNet>>,
}

impl Surroundings {
    /// What the operator says.
    pub(crate) fn new(config: &Config) -> Surroundings {
        Surroundings {
            local: config.local.clone(),
            fixed_cidrs: config.service_cidrs.clone(),
            node_ports: config.node_ports.clone(),
            masquerade_all: config.masquerade_all,
            bind_address: config.bind_address,
            node_addresses: Vec::new(),
            node_pods: Vec::new(),
            service_cidrs: BTreeMap::new(),
        }
    }

    /// What the Node says.
    pub(crate) fn set_node(&mut self, node: &Node) {
        self.node_addresses = own_addresses(node);
        let spec = node.spec.as_ref();
        let all = spec.and_then(|spec| spec.pod_cidrs.clone());
        let texts = all.or_else(|| Some(vec![spec?.pod_cidr.clone()?])).unwrap_or_default();
        self.node_pods = ranges(&texts);
    }

    /// What a ServiceCIDR says.
    pub(crate) fn set_service_cidr(&mut self, change: &Change<ServiceCIDR>) {
        let spec = change.object.as_ref().and_then(|object| object.spec.as_ref());
        match spec.and_then(|spec| spec.cidrs.as_ref()) {
            Some(texts) => self.service_cidrs.insert(change.key.clone(), ranges(texts)),
            None => self.service_cidrs.remove(&change.key),
        };
    }

    /// All of it together.
    pub(crate) fn network(&self) -> Network {
        let mut service_cidrs = self.fixed_cidrs.clone();
        service_cidrs.extend(self.service_cidrs.values().flatten());
        service_cidrs.sort_unstable();
        service_cidrs.dedup();
        Network {
            local: match &self.local {
                DetectLocal::Cluster(ranges) => Local::Sources(ranges.clone()),
                DetectLocal::Node => Local::Sources(self.node_pods.clone()),
                DetectLocal::Bridge(name) => Local::Bridge(name.clone()),
                DetectLocal::InterfacePrefix(prefix) => Local::InterfacePrefix(prefix.clone()),
            },
            service_cidrs,
            node_ports: self.node_ports(),
            masquerade_all: self.masquerade_all,
        }
    }

    fn node_ports(&self) -> NodePorts {
        let mut ranges = Vec::new();
        for address in &self.node_ports {
            match address {
                NodePortAddress::All => return NodePorts::All,
                NodePortAddress::Primary => ranges.extend(self.primary().into_iter().map(IpNet::from)),
                NodePortAddress::Range(range) => ranges.push(*range),
                // No mode leads from loopback to elsewhere but iptables, whose rules know their own.
                NodePortAddress::Localhost => {
                    ranges.extend(LOOPBACK.iter().filter_map(|text| text.parse::<IpNet>().ok()))
                }
            }
        }
        NodePorts::In(ranges)
    }

    /// The Node's own addresses, or the operator's word in its family.
    fn primary(&self) -> Vec<IpAddr> {
        let other = |address: &&IpAddr| self.bind_address.is_none_or(|bind| bind.is_ipv6() != address.is_ipv6());
        self.bind_address.iter().chain(self.node_addresses.iter().filter(other)).copied().collect()
    }
}

const LOOPBACK: [&str; 2] = ["127.0.0.0/8", "::1/128"];

fn ranges(texts: &[String]) -> Vec<IpNet> {
    texts.iter().filter_map(|text| text.parse::<IpNet>().ok()).map(|range| range.trunc()).collect()
}

/// As upstream chooses: internal addresses before external ones, the first of them and the first of the other family.
fn own_addresses(node: &Node) -> Vec<IpAddr> {
    let all: Vec<_> = node.status.iter().flat_map(|status| status.addresses.iter().flatten()).collect();
    let of = |kind: &str| -> Vec<IpAddr> {
        let of_kind = all.iter().filter(|one| one.type_ == kind);
        of_kind.filter_map(|one| one.address.parse().ok()).collect()
    };
    let ordered = [of("InternalIP"), of("ExternalIP")].concat();
    let Some(first) = ordered.first().copied() else { return Vec::new() };
    let second = ordered.into_iter().find(|address| address.is_ipv6() != first.is_ipv6());
    std::iter::once(first).chain(second).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn node() -> Node {
        let addresses = json!([
            {"type": "Hostname", "address": "n1"},
            {"type": "ExternalIP", "address": "198.51.100.1"},
            {"type": "InternalIP", "address": "192.0.2.1"},
            {"type": "InternalIP", "address": "192.0.2.2"},
            {"type": "InternalIP", "address": "fd00::1"},
        ]);
        let spec = json!({"podCIDR": "10.244.3.0/24", "podCIDRs": ["10.244.3.0/24", "fd00:3::/64"]});
        serde_json::from_value(json!({"spec": spec, "status": {"addresses": addresses}})).unwrap()
    }

    fn with(change: impl FnOnce(&mut Config)) -> Network {
        let mut config = Config::new("n1");
        change(&mut config);
        let mut surroundings = Surroundings::new(&config);
        surroundings.set_node(&node());
        surroundings.network()
    }

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_primary_addresses_are_the_nodes_unless_the_operator_says_so() {
        let primary = with(|config| config.node_ports = vec![NodePortAddress::Primary]).node_ports;
        assert_eq!(primary, NodePorts::In(nets(&["192.0.2.1/32", "fd00::1/128"])));
        let bound = with(|config| {
            config.node_ports = vec![NodePortAddress::Primary];
            config.bind_address = Some("192.0.2.9".parse().unwrap());
        });
        assert_eq!(bound.node_ports, NodePorts::In(nets(&["192.0.2.9/32", "fd00::1/128"])));
        let all = with(|config| config.node_ports = vec![NodePortAddress::Primary, NodePortAddress::All]);
        assert_eq!(all.node_ports, NodePorts::All);
    }

    #[test]
    fn pods_are_known_by_the_node() {
        let local = with(|config| config.local = DetectLocal::Node).local;
        assert_eq!(local, Local::Sources(nets(&["10.244.3.0/24", "fd00:3::/64"])));
        let local = with(|config| config.local = DetectLocal::Bridge("cni0".into())).local;
        assert_eq!(local, Local::Bridge("cni0".into()));
    }

    #[test]
    fn service_ranges_come_and_go() {
        let mut surroundings = Surroundings::new(&Config::new("n1"));
        let spec = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12", "fd00:96::/112"]}});
        let object = std::sync::Arc::new(serde_json::from_value(spec).unwrap());
        let key = Key::cluster("kubernetes");
        surroundings.set_service_cidr(&Change { key: key.clone(), object: Some(object), last: None });
        assert_eq!(surroundings.network().service_cidrs, nets(&["10.96.0.0/12", "fd00:96::/112"]));
        surroundings.set_service_cidr(&Change { key, object: None, last: None });
        assert!(surroundings.network().service_cidrs.is_empty());
    }
}
