//! What is told to plugins about one sandbox: `CNI_ARGS`, and the arguments of the capabilities that they declare.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use crate::{AttachRequest, Dns, PortMapping};

const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";
/// Limits that Kubernetes sets to these annotations (pkg/util/bandwidth/utils.go), in bits a second.
const BANDWIDTH: std::ops::RangeInclusive<u128> = 1_000..=1_000_000_000_000_000;

/// The generic arguments, with the names that containerd gives them and all plugins for Kubernetes read.
pub(crate) fn generic(request: &AttachRequest) -> String {
    let pairs = [
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", &request.namespace),
        ("K8S_POD_NAME", &request.name),
        ("K8S_POD_INFRA_CONTAINER_ID", &request.sandbox_id),
        ("K8S_POD_UID", &request.uid),
    ];
    let pairs: Vec<String> = pairs.iter().map(|(key, value)| format!("{key}={value}")).collect();
    pairs.join(";")
}

/// The arguments of all capabilities that this runtime knows (CONVENTIONS.md of the CNI project, and containerd's own).
///
/// # Errors
/// An annotation that is no bandwidth.
pub(crate) fn capabilities(request: &AttachRequest) -> Result<Map<String, Value>, String> {
    let mut all = Map::new();
    all.insert("io.kubernetes.cri.pod-annotations".into(), json!(request.annotations));
    if !request.name.is_empty() {
        all.insert("aliases".into(), json!([request.name]));
    }
    if !request.port_mappings.is_empty() {
        all.insert("portMappings".into(), request.port_mappings.iter().map(port_mapping).collect());
    }
    if let Some(bandwidth) = bandwidth(&request.annotations)? {
        all.insert("bandwidth".into(), bandwidth);
    }
    if request.dns != Dns::default() {
        let Dns { nameservers, search, options, .. } = &request.dns;
        all.insert("dns".into(), json!({"servers": nameservers, "searches": search, "options": options}));
    }
    Ok(all)
}

fn port_mapping(mapping: &PortMapping) -> Value {
    let host_ip = mapping.host_ip.map(|ip| ip.to_string()).unwrap_or_default();
    json!({
        "hostPort": mapping.host_port,
        "containerPort": mapping.container_port,
        "protocol": mapping.protocol.to_string(),
        "hostIP": host_ip,
    })
}

fn bandwidth(annotations: &BTreeMap<String, String>) -> Result<Option<Value>, String> {
    let rate = |key: &str| annotations.get(key).map(|text| bits(key, text)).transpose();
    let (ingress, egress) = (rate(INGRESS)?, rate(EGRESS)?);
    if ingress.is_none() && egress.is_none() {
        return Ok(None);
    }
    // The burst that containerd gives; plugins refuse larger ones.
    let burst = |rate: Option<u64>| if rate.is_some() { u64::from(u32::MAX) } else { 0 };
    Ok(Some(json!({
        "ingressRate": ingress.unwrap_or(0),
        "ingressBurst": burst(ingress),
        "egressRate": egress.unwrap_or(0),
        "egressBurst": burst(egress),
    })))
}

fn bits(key: &str, text: &str) -> Result<u64, String> {
    let value = quantity(text).filter(|bits| BANDWIDTH.contains(bits)).and_then(|bits| u64::try_from(bits).ok());
    value.ok_or_else(|| format!("annotation {key}: {text:?} is no bandwidth from 1k to 1P, such as 10M"))
}

/// A whole number with a suffix, as Kubernetes quantities have it.
fn quantity(text: &str) -> Option<u128> {
    const SUFFIXES: [(&str, u128); 11] = [
        ("Ki", 1 << 10),
        ("Mi", 1 << 20),
        ("Gi", 1 << 30),
        ("Ti", 1 << 40),
        ("Pi", 1 << 50),
        ("k", 1_000),
        ("M", 1_000_000),
        ("G", 1_000_000_000),
        ("T", 1_000_000_000_000),
        ("P", 1_000_000_000_000_000),
        ("", 1),
    ];
    let (number, factor) = SUFFIXES.iter().find_map(|(suffix, factor)| Some((text.strip_suffix(suffix)?, *factor)))?;
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()) && text.len() <= 18;
    if whole.is_empty() || !digits(whole) || !digits(fraction) {
        return None;
    }
    let scale = 10u128.pow(u32::try_from(fraction.len()).ok()?);
    let fraction: u128 = if fraction.is_empty() { 0 } else { fraction.parse().ok()? };
    // Rounded up, as quantities are.
    Some((whole.parse::<u128>().ok()? * scale + fraction).checked_mul(factor)?.div_ceil(scale))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Protocol;

    #[test]
    fn plugins_are_told_what_containerd_tells_them() {
        let request = AttachRequest {
            sandbox_id: "abc".into(),
            namespace: "default".into(),
            name: "web".into(),
            uid: "u1".into(),
            port_mappings: vec![PortMapping {
                protocol: Protocol::Udp,
                container_port: 53,
                host_port: 5353,
                host_ip: None,
            }],
            annotations: [(INGRESS.to_owned(), "10M".to_owned())].into(),
            dns: Dns { nameservers: vec!["10.96.0.10".into()], ..Dns::default() },
            netns: None,
        };
        assert_eq!(
            generic(&request),
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web;K8S_POD_INFRA_CONTAINER_ID=abc;K8S_POD_UID=u1"
        );
        let expected = json!({
            "aliases": ["web"],
            "bandwidth": {"ingressRate": 10_000_000, "ingressBurst": u32::MAX, "egressRate": 0, "egressBurst": 0},
            "dns": {"servers": ["10.96.0.10"], "searches": [], "options": []},
            "io.kubernetes.cri.pod-annotations": {INGRESS: "10M"},
            "portMappings": [{"hostPort": 5353, "containerPort": 53, "protocol": "udp", "hostIP": ""}],
        });
        assert_eq!(Value::Object(capabilities(&request).unwrap()), expected);
    }

    #[test]
    fn a_bandwidth_is_a_quantity_within_limits() {
        for (text, expected) in [
            ("1000", Some(1000)),
            ("10M", Some(10_000_000)),
            ("1.5Gi", Some(1_610_612_736)),
            ("1P", Some(1_000_000_000_000_000)),
            ("999", None),
            ("2P", None),
            ("", None),
            ("M", None),
            ("1e6", None),
            ("-1M", None),
            ("10 M", None),
        ] {
            assert_eq!(bits(INGRESS, text).ok(), expected, "{text:?}");
        }
    }
}
