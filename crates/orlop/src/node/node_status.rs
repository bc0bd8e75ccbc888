//! The alone node's own `Node` object: what the machine is and what pods may use of it.

use std::collections::BTreeMap;
use std::net::{IpAddr, UdpSocket};

use k8s_openapi::api::core::v1::{NodeAddress, NodeCondition, NodeStatus, NodeSystemInfo};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kubelet::facts::NodeFacts;

/// How many pods a node takes by default (upstream's `maxPods`).
const PODS_MAX: u32 = 110;

/// The node's address: that of the route to other machines; without one, `fallback`. Sends nothing.
pub(crate) fn address(fallback: Option<IpAddr>) -> Option<IpAddr> {
    // 192.0.2.0/24 is reserved for documentation (RFC 5737): nobody has a special route to it.
    let routed = UdpSocket::bind(("0.0.0.0", 0)).and_then(|socket| {
        socket.connect(("192.0.2.1", 9))?;
        socket.local_addr()
    });
    routed.ok().map(|address| address.ip()).or(fallback)
}

/// The node's status now.
pub(crate) fn status(facts: &NodeFacts) -> NodeStatus {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let ips = facts.ips.iter().map(|ip| ("InternalIP", ip.clone()));
    let addresses = ips.chain([("Hostname", facts.name.clone())]);
    let mut resources: BTreeMap<String, Quantity> =
        facts.allocatable.iter().map(|(name, amount)| (name.clone(), Quantity(amount.units().to_string()))).collect();
    resources.insert("pods".to_owned(), Quantity(PODS_MAX.to_string()));
    NodeStatus {
        addresses: Some(addresses.map(|(type_, address)| NodeAddress { type_: type_.to_owned(), address }).collect()),
        capacity: Some(resources.clone()),
        allocatable: Some(resources),
        conditions: Some(vec![ready()]),
        node_info: Some(NodeSystemInfo {
            architecture: if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" }.to_owned(),
            operating_system: "linux".to_owned(),
            os_image: os_image(&read("/etc/os-release")),
            kernel_version: read("/proc/sys/kernel/osrelease"),
            machine_id: read("/etc/machine-id"),
            boot_id: read("/proc/sys/kernel/random/boot_id"),
            container_runtime_version: format!("orlop://{}", env!("CARGO_PKG_VERSION")),
            kubelet_version: format!("v1.37.0+orlop.{}", env!("CARGO_PKG_VERSION")),
            ..NodeSystemInfo::default()
        }),
        ..NodeStatus::default()
    }
}

fn ready() -> NodeCondition {
    let now = Some(Time(jiff::Timestamp::now()));
    NodeCondition {
        type_: "Ready".to_owned(),
        status: "True".to_owned(),
        reason: Some("KubeletReady".to_owned()),
        message: Some("the node runs pods".to_owned()),
        last_heartbeat_time: now.clone(),
        last_transition_time: now,
    }
}

/// `PRETTY_NAME` of os-release(5).
fn os_image(release: &str) -> String {
    let name = release.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="));
    name.map_or_else(|| "Linux".to_owned(), |name| name.trim_matches(['"', '\'']).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_system_is_named() {
        assert_eq!(os_image("ID=x\nPRETTY_NAME=\"Debian GNU/Linux 12\"\n"), "Debian GNU/Linux 12");
        assert_eq!(os_image(""), "Linux");
    }

    #[test]
    fn the_status_names_addresses_and_resources() {
        let status = status(&NodeFacts::of_machine("n", vec!["192.0.2.7".to_owned()]));
        assert_eq!(status.addresses.unwrap()[0].address, "192.0.2.7");
        assert!(status.capacity.unwrap().contains_key("memory"));
    }
}
