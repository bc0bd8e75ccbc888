//! Services: addresses and node ports that nobody else has.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Service, ServiceSpec};

use super::common::name;
use super::{Change, Plan};
use crate::manifests::Kind;

/// Upstream's `--service-node-port-range`.
const NODE_PORTS: std::ops::RangeInclusive<i32> = 30_000..=32_767;
/// Addresses at the begin of the range that are kept for well-known services, as upstream keeps them.
const RESERVED: u32 = 16;

/// A range of IPv4 addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The network's address.
    pub network: Ipv4Addr,
    /// The length of its prefix.
    pub prefix: u8,
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl Range {
    fn size(self) -> u32 {
        1 << (32 - u32::from(self.prefix.clamp(8, 30)))
    }

    fn address(self, index: u32) -> Ipv4Addr {
        Ipv4Addr::from(u32::from(self.network) + index)
    }
}

/// What a change gives to services that lack something.
pub(crate) fn reconcile(services: &[Arc<Service>], range: Range) -> Plan {
    let mut plan = Plan::default();
    let specs = || services.iter().filter_map(|service| service.spec.as_ref());
    let mut addresses: BTreeSet<String> = specs().filter_map(|spec| spec.cluster_ip.clone()).collect();
    let ports = specs().flat_map(|spec| spec.ports.iter().flatten());
    let mut node_ports: BTreeSet<i32> = ports.filter_map(|port| port.node_port).collect();
    for service in services {
        let Some(spec) = &service.spec else { continue };
        let mut new = spec.clone();
        give_address(service, &mut new, range, &mut addresses);
        give_node_ports(&mut new, &mut node_ports);
        if new != *spec {
            plan.push(Change::Replace(Service { spec: Some(new), ..Service::clone(service) }.into_any()));
        }
    }
    plan
}

fn give_address(service: &Service, spec: &mut ServiceSpec, range: Range, taken: &mut BTreeSet<String>) {
    let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
    if kind == "ExternalName" {
        return;
    }
    if spec.cluster_ip.as_ref().is_none_or(String::is_empty) {
        // The same name gets the same address as long as it is free: a restart without state changes little.
        let seed = name(&service.metadata).bytes().fold(5381_u32, |hash, byte| hash.wrapping_mul(33) ^ u32::from(byte));
        let room = range.size().saturating_sub(RESERVED + 1).max(1);
        let mut tries = (0..room).map(|step| range.address(RESERVED + (seed.wrapping_add(step)) % room).to_string());
        let Some(free) = tries.find(|address| !taken.contains(address)) else { return };
        taken.insert(free.clone());
        spec.cluster_ip = Some(free);
    }
    if let Some(address) = spec.cluster_ip.clone() {
        spec.cluster_ips.get_or_insert_with(|| vec![address]);
    }
    spec.ip_families.get_or_insert_with(|| vec!["IPv4".into()]);
    spec.ip_family_policy.get_or_insert_with(|| "SingleStack".into());
}

fn give_node_ports(spec: &mut ServiceSpec, taken: &mut BTreeSet<i32>) {
    if !matches!(spec.type_.as_deref(), Some("NodePort" | "LoadBalancer")) {
        return;
    }
    for port in spec.ports.iter_mut().flatten().filter(|port| port.node_port.unwrap_or(0) == 0) {
        let free = NODE_PORTS.clone().find(|port| !taken.contains(port));
        taken.extend(free);
        port.node_port = free;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::common::tests::object;
    use super::*;
    use crate::manifests::AnyObject;

    const RANGE: Range = Range { network: Ipv4Addr::new(10, 96, 0, 0), prefix: 16 };

    fn service(name: &str, spec: serde_json::Value) -> Arc<Service> {
        Arc::new(object(json!({"metadata": {"name": name}, "spec": spec})))
    }

    fn replaced(plan: Plan) -> Vec<ServiceSpec> {
        let spec = |change| match change {
            Change::Replace(AnyObject::Service(service)) => service.spec.unwrap(),
            other => panic!("{other:?}"),
        };
        plan.changes.into_iter().map(spec).collect()
    }

    #[test]
    fn everybody_gets_something_of_his_own() {
        let services = [
            service("a", json!({"ports": [{"port": 80}]})),
            service("a", json!({"ports": [{"port": 80}]})),
            service("n", json!({"type": "NodePort", "ports": [{"port": 80}, {"port": 81, "nodePort": 30000}]})),
            service(
                "h",
                json!({"clusterIP": "None", "clusterIPs": ["None"], "ipFamilies": ["IPv4"], "ipFamilyPolicy": "SingleStack"}),
            ),
            service("e", json!({"type": "ExternalName", "externalName": "x.example"})),
        ];
        let specs = replaced(reconcile(&services, RANGE));
        assert_eq!(specs.len(), 3);
        assert_ne!(specs[0].cluster_ip, specs[1].cluster_ip);
        assert!(specs[0].cluster_ip.as_ref().unwrap().starts_with("10.96."));
        assert_eq!(specs[2].ports.as_ref().unwrap()[0].node_port, Some(30_001));
    }
}
