//! What the operator's settings say about the node itself.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, UdpSocket};

use k8s_openapi::api::core::v1::NodeStatus;
use k8s_openapi::jiff::Timestamp;
use kubelet::facts::NodeFacts;
use kubelet::node::describe::{self, NodeConfig, Observed};
use kubelet::node::features::{self, Abilities};
use kubelet::node::machine::Machine;
use kubelet::node::pressure::{Pressures, Thresholds};

/// How many pods a node takes by default (upstream's `maxPods`).
pub(super) const PODS_MAX: u32 = 110;

/// The version of Kubernetes whose kubelet this is.
pub(super) const KUBELET_VERSION: &str = concat!("v1.37.2+orlop.", env!("CARGO_PKG_VERSION"));
pub(super) const RUNTIME_VERSION: &str = concat!("orlop://", env!("CARGO_PKG_VERSION"));

/// The node's address: that of the route to other machines; without one, `fallback`. Sends nothing.
pub(crate) fn address(fallback: Option<IpAddr>) -> Option<IpAddr> {
    // 192.0.2.0/24 is reserved for documentation (RFC 5737): nobody has a special route to it.
    let routed = UdpSocket::bind(("0.0.0.0", 0)).and_then(|socket| {
        socket.connect(("192.0.2.1", 9))?;
        socket.local_addr()
    });
    routed.ok().map(|address| address.ip()).or(fallback)
}

/// The node of `orlop up`: its pods may use the whole machine.
pub(super) fn alone(name: &str, address: Option<IpAddr>) -> NodeConfig {
    NodeConfig {
        name: name.to_owned(),
        hostname: name.to_owned(),
        addresses: address.into_iter().collect(),
        cloud: None,
        port: None,
        labels: BTreeMap::new(),
        taints: Vec::new(),
        unschedulable: false,
        provider_id: None,
        pods_max: PODS_MAX,
        images_max: None,
        reserved: BTreeMap::new(),
        thresholds: Thresholds::NONE,
        runtime_version: RUNTIME_VERSION.to_owned(),
        kubelet_version: KUBELET_VERSION.to_owned(),
        features: features::declared(&Abilities::default()),
    }
}

/// What pods may learn of the node.
pub(super) fn facts(config: &NodeConfig, machine: &Machine) -> NodeFacts {
    let memory = machine.capacity.get("memory").map_or(0, |amount| amount.units());
    NodeFacts {
        name: config.name.clone(),
        ips: config.addresses.iter().map(ToString::to_string).collect(),
        memory_bytes: u64::try_from(memory).unwrap_or(0),
        allocatable: describe::allocatable(config, machine),
    }
}

/// The alone node's status: it is ready.
pub(super) fn status(config: &NodeConfig, machine: &Machine) -> NodeStatus {
    let observed = Observed {
        now: Timestamp::now(),
        pressures: Pressures::default(),
        not_ready: None,
        volumes_in_use: BTreeSet::new(),
        images: Vec::new(),
        handlers: Vec::new(),
        supplemental_groups_policy: true,
        devices: BTreeMap::new(),
    };
    describe::status(config, machine, &observed, None)
}
