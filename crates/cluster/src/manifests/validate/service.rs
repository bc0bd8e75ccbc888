//! Rules for services and endpoint slices.

use std::collections::HashSet;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{Errors, NameRule, Validate, check_labels, check_metadata, names};
use crate::manifests::path::FieldPath;

impl Validate for Service {
    fn validate(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, NameRule::ServiceLabel, errors);
        if let Some(spec) = &self.spec {
            check_spec(spec, &FieldPath::root().field("spec"), errors);
        }
    }
}

fn check_spec(spec: &ServiceSpec, path: &FieldPath, errors: &mut Errors) {
    const TYPES: [&str; 4] = ["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
    errors.one_of(&path.field("type"), spec.type_.as_deref(), &TYPES);
    errors.one_of(&path.field("sessionAffinity"), spec.session_affinity.as_deref(), &["ClientIP", "None"]);
    errors.one_of(&path.field("externalTrafficPolicy"), spec.external_traffic_policy.as_deref(), &["Cluster", "Local"]);
    errors.one_of(&path.field("internalTrafficPolicy"), spec.internal_traffic_policy.as_deref(), &["Cluster", "Local"]);
    check_labels(spec.selector.iter().flatten(), &path.field("selector"), errors);
    let headless = spec.cluster_ip.as_deref() == Some("None");
    let external = spec.type_.as_deref() == Some("ExternalName");
    check_cluster_ip(spec, path, errors);
    if external {
        match spec.external_name.as_deref().unwrap_or("").trim_end_matches('.') {
            "" => errors.required(&path.field("externalName"), ""),
            name => errors.each_fault(&path.field("externalName"), name, names::dns_subdomain(name)),
        }
    }
    let ports = spec.ports.as_deref().unwrap_or_default();
    if ports.is_empty() && !headless && !external {
        errors.required(&path.field("ports"), "");
    }
    check_ports(ports, path, errors);
    let node_ports = matches!(spec.type_.as_deref(), Some("NodePort" | "LoadBalancer"));
    for (index, port) in ports.iter().enumerate().filter(|_| !node_ports) {
        if port.node_port.unwrap_or(0) != 0 {
            let detail = "may not be used when `type` is 'ClusterIP'";
            errors.forbidden(&path.field("ports").index(index).field("nodePort"), detail);
        }
    }
    for (index, ip) in spec.external_ips.iter().flatten().enumerate() {
        check_ip(ip, &path.field("externalIPs").index(index), errors);
    }
}

fn check_cluster_ip(spec: &ServiceSpec, path: &FieldPath, errors: &mut Errors) {
    let Some(ip) = spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty()) else { return };
    let path = path.field("clusterIP");
    if spec.type_.as_deref() == Some("ExternalName") {
        errors.forbidden(&path, "may not be set for ExternalName services");
    } else if ip == "None" {
        if spec.type_.as_deref() != Some("ClusterIP") {
            errors.invalid(&path, ip, "may not be set to 'None' for LoadBalancer or NodePort services");
        }
    } else {
        check_ip(ip, &path, errors);
    }
}

fn check_ip(ip: &str, path: &FieldPath, errors: &mut Errors) {
    if ip.parse::<IpAddr>().is_err() {
        errors.invalid(path, ip, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)");
    }
}

fn check_ports(ports: &[ServicePort], path: &FieldPath, errors: &mut Errors) {
    let (mut seen_names, mut seen_ports, mut seen_node_ports) = (HashSet::new(), HashSet::new(), HashSet::new());
    for (index, port) in ports.iter().enumerate() {
        let path = path.field("ports").index(index);
        match port.name.as_deref().unwrap_or("") {
            "" if ports.len() > 1 => errors.required(&path.field("name"), ""),
            "" => {}
            name => {
                errors.each_fault(&path.field("name"), name, names::dns_label(name));
                if !seen_names.insert(name) {
                    errors.duplicate(&path.field("name"), name);
                }
            }
        }
        errors.in_range(&path.field("port"), port.port.into(), 1, 65535);
        errors.one_of(&path.field("protocol"), port.protocol.as_deref(), &["SCTP", "TCP", "UDP"]);
        match &port.target_port {
            Some(IntOrString::Int(number)) => errors.in_range(&path.field("targetPort"), (*number).into(), 1, 65535),
            Some(IntOrString::String(name)) => {
                errors.each_fault(&path.field("targetPort"), name, names::port_name(name))
            }
            None => {}
        }
        if !seen_ports.insert((port.protocol.as_deref(), port.port)) {
            errors.duplicate(&path, format!("{}/{}", port.port, port.protocol.as_deref().unwrap_or("TCP")));
        }
        let node_port = port.node_port.filter(|port| *port != 0);
        if node_port.is_some_and(|node_port| !seen_node_ports.insert((port.protocol.as_deref(), node_port))) {
            errors.duplicate(&path.field("nodePort"), node_port);
        }
    }
}

impl Validate for EndpointSlice {
    fn validate(&self, errors: &mut Errors) {
        check_metadata(&self.metadata, NameRule::Subdomain, errors);
        let root = FieldPath::root();
        match self.address_type.as_str() {
            "" => errors.required(&root.field("addressType"), ""),
            kind => errors.one_of(&root.field("addressType"), Some(kind), &["FQDN", "IPv4", "IPv6"]),
        }
        for (index, endpoint) in self.endpoints.iter().flatten().enumerate() {
            let path = root.field("endpoints").index(index).field("addresses");
            if endpoint.addresses.is_empty() {
                errors.required(&path, "must contain at least 1 address");
            }
            for (index, address) in endpoint.addresses.iter().enumerate() {
                check_address(address, &self.address_type, &path.index(index), errors);
            }
        }
        let mut seen = HashSet::new();
        for (index, port) in self.ports.iter().flatten().enumerate() {
            if !seen.insert(port.name.as_deref().unwrap_or("")) {
                errors.duplicate(&root.field("ports").index(index).field("name"), port.name.as_deref().unwrap_or(""));
            }
        }
    }

    fn validate_change(&self, old: &Self, errors: &mut Errors) {
        if self.address_type != old.address_type {
            errors.invalid(&FieldPath::root().field("addressType"), &self.address_type, "field is immutable");
        }
    }
}

fn check_address(address: &str, kind: &str, path: &FieldPath, errors: &mut Errors) {
    match (kind, address.parse::<IpAddr>()) {
        ("IPv4", Ok(IpAddr::V4(_))) | ("IPv6", Ok(IpAddr::V6(_))) => {}
        ("IPv4", _) => errors.invalid(path, address, "must be an IPv4 address"),
        ("IPv6", _) => errors.invalid(path, address, "must be an IPv6 address"),
        _ => errors.each_fault(path, address, names::dns_subdomain(address)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::tests::faults;
    use super::*;

    #[track_caller]
    fn check(spec: serde_json::Value, expect: &[&str]) {
        assert_eq!(faults::<Service>(json!({"metadata": {"name": "s"}, "spec": spec})), expect);
    }

    #[test]
    fn services() {
        check(json!({"ports": [{"port": 80}]}), &[]);
        check(json!({"clusterIP": "None"}), &[]);
        check(json!({}), &["spec.ports: Required value"]);
        check(json!({"type": "ExternalName"}), &["spec.externalName: Required value"]);
        check(
            json!({"ports": [{"port": 0}]}),
            &[
                "spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
                "spec.ports[0].targetPort: Invalid value: 0: must be between 1 and 65535, inclusive",
            ],
        );
        check(
            json!({"ports": [{"port": 80}, {"port": 80, "name": "b"}]}),
            &["spec.ports[0].name: Required value", "spec.ports[1]: Duplicate value: \"80/TCP\""],
        );
        check(
            json!({"type": "Nodeport", "ports": [{"port": 80}]}),
            &[
                "spec.type: Unsupported value: \"Nodeport\": supported values: \"ClusterIP\", \"ExternalName\", \"LoadBalancer\", \"NodePort\"",
            ],
        );
        check(
            json!({"clusterIP": "10.0.0", "ports": [{"port": 80, "nodePort": 30000}]}),
            &[
                "spec.clusterIP: Invalid value: \"10.0.0\": must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)",
                "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
            ],
        );
    }

    #[test]
    fn slices() {
        let slice = json!({"metadata": {"name": "s"}, "addressType": "IPv4", "endpoints": [{"addresses": ["::1"]}, {"addresses": []}]});
        assert_eq!(
            faults::<EndpointSlice>(slice),
            [
                "endpoints[0].addresses[0]: Invalid value: \"::1\": must be an IPv4 address",
                "endpoints[1].addresses: Required value: must contain at least 1 address",
            ]
        );
    }
}
