//! Values of the downward API: what a pod may learn of itself and its node, as env and as files.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceFieldSelector};
use pod::quantity::Quantity;

/// What the node knows and no pod's spec says.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NodeFacts {
    /// The node's name.
    pub name: String,
    /// The node's addresses, the preferred family first.
    pub ips: Vec<String>,
    /// All memory of the machine.
    pub memory_bytes: u64,
    /// What pods may use, by resource (`cpu`, `memory`, `ephemeral-storage`): the limit of containers without one.
    pub allocatable: BTreeMap<String, Quantity>,
}

/// Why a value of the downward API cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FactError {
    /// Not a field of the downward API.
    #[error("unsupported fieldPath: {0}")]
    Field(String),
    /// Not a resource of the downward API.
    #[error("unsupported container resource: {0}")]
    Resource(String),
    /// The container of a `resourceFieldRef` is not in the pod.
    #[error("container {0:?} not found in the pod")]
    Container(String),
    /// A quantity that is none.
    #[error("resource {resource}")]
    Quantity {
        /// The resource.
        resource: String,
        /// What is wrong with it.
        source: pod::quantity::ParseError,
    },
}

/// The value of a `fieldRef`. `ips` are the pod's, empty until it has a sandbox.
///
/// # Errors
/// An unknown field.
pub fn field(path: &str, pod: &Pod, ips: &[String], node: &NodeFacts) -> Result<String, FactError> {
    if let Some(value) = subscripted(path, pod) {
        return Ok(value);
    }
    let metadata = &pod.metadata;
    let spec = pod::spec::of(pod);
    let ips = if spec.host_network == Some(true) { &node.ips } else { ips };
    Ok(match path {
        "metadata.name" => metadata.name.clone().unwrap_or_default(),
        "metadata.namespace" => metadata.namespace.clone().unwrap_or_default(),
        "metadata.uid" => metadata.uid.clone().unwrap_or_default(),
        "metadata.labels" => lines(metadata.labels.as_ref()),
        "metadata.annotations" => lines(metadata.annotations.as_ref()),
        "spec.nodeName" => spec.node_name.clone().unwrap_or_else(|| node.name.clone()),
        "spec.serviceAccountName" => spec.service_account_name.clone().unwrap_or_default(),
        "status.hostIP" => node.ips.first().cloned().unwrap_or_default(),
        "status.hostIPs" => node.ips.join(","),
        "status.podIP" => ips.first().cloned().unwrap_or_default(),
        "status.podIPs" => ips.join(","),
        _ => return Err(FactError::Field(path.to_owned())),
    })
}

/// `metadata.labels['key']` and `metadata.annotations['key']`; a missing key is an empty value.
fn subscripted(path: &str, pod: &Pod) -> Option<String> {
    let (field, key) = path.strip_suffix("']")?.split_once("['")?;
    let map = match field {
        "metadata.labels" => pod.metadata.labels.as_ref(),
        "metadata.annotations" => pod.metadata.annotations.as_ref(),
        _ => return None,
    };
    Some(map.and_then(|map| map.get(key)).cloned().unwrap_or_default())
}

/// One line `key="value"` for each entry, values quoted as Go's `%q` does.
fn lines(map: Option<&BTreeMap<String, String>>) -> String {
    let lines: Vec<String> = map.into_iter().flatten().map(|(key, value)| format!("{key}={}", quoted(value))).collect();
    lines.join("\n")
}

fn quoted(text: &str) -> String {
    let mut out = String::from('"');
    for one in text.chars() {
        match one {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{b}' => out.push_str("\\v"),
            '\u{c}' => out.push_str("\\f"),
            one if one.is_control() => {
                // Writing to a String cannot fail.
                let _ = write!(out, "\\x{:02x}", u32::from(one));
            }
            one => out.push(one),
        }
    }
    out.push('"');
    out
}

/// The value of a `resourceFieldRef`; `own` is the container that asks, for a selector that names none.
///
/// # Errors
/// An unknown resource or container, or a quantity that is none.
pub fn resource(
    selector: &ResourceFieldSelector,
    pod: &Pod,
    own: Option<&Container>,
    node: &NodeFacts,
) -> Result<String, FactError> {
    let container = match selector.container_name.as_deref().filter(|name| !name.is_empty()) {
        Some(name) => pod::spec::container(pod, name).map(|(_, container)| container),
        None => own.map(Cow::Borrowed),
    };
    let missing = || FactError::Container(selector.container_name.clone().unwrap_or_default());
    let container = container.ok_or_else(missing)?;
    let unknown = || FactError::Resource(selector.resource.clone());
    let (list, resource) = selector.resource.split_once('.').ok_or_else(unknown)?;
    let amount = match list {
        "limits" => amount(&container, resource, List::Limits)?
            .or_else(|| node.allocatable.get(resource).copied())
            .unwrap_or_default(),
        "requests" => amount(&container, resource, List::Requests)?.unwrap_or_default(),
        _ => return Err(unknown()),
    };
    let known = matches!(resource, "cpu" | "memory" | "ephemeral-storage") || resource.starts_with("hugepages-");
    if !known {
        return Err(unknown());
    }
    let divisor = selector.divisor.as_ref().map(|text| parse(resource, &text.0)).transpose()?;
    Ok(divided(amount, divisor.filter(|divisor| !divisor.is_zero())).to_string())
}

/// How many times `divisor` (one, if none) goes into `amount`, rounded up.
fn divided(amount: Quantity, divisor: Option<Quantity>) -> i128 {
    let divisor = i128::from(divisor.map_or(1000, Quantity::milli));
    let amount = i128::from(amount.milli());
    amount.div_euclid(divisor) + i128::from(amount.rem_euclid(divisor) != 0)
}

#[derive(Clone, Copy)]
enum List {
    Limits,
    Requests,
}

/// An amount that is written and not zero.
fn amount(container: &Container, resource: &str, list: List) -> Result<Option<Quantity>, FactError> {
    let Some(resources) = &container.resources else { return Ok(None) };
    let list = match list {
        List::Limits => &resources.limits,
        List::Requests => &resources.requests,
    };
    let text = list.as_ref().and_then(|list| list.get(resource));
    let amount = text.map(|text| parse(resource, &text.0)).transpose()?;
    Ok(amount.filter(|amount| !amount.is_zero()))
}

fn parse(resource: &str, text: &str) -> Result<Quantity, FactError> {
    Quantity::parse(text).map_err(|source| FactError::Quantity { resource: resource.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod() -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "u1",
                "labels": {"app": "web", "b": "a\"b\n"}, "annotations": {"x/y": "z"}},
            "spec": {"nodeName": "n1", "serviceAccountName": "robot", "containers": [
                {"name": "c", "resources": {"limits": {"cpu": "1500m"}, "requests": {"memory": "64Mi"}}}]}
        }))
        .unwrap()
    }

    fn node() -> NodeFacts {
        NodeFacts {
            name: "n1".into(),
            ips: vec!["192.0.2.1".into()],
            memory_bytes: 1 << 30,
            allocatable: [("memory".to_owned(), Quantity::from_units(1 << 30))].into(),
        }
    }

    #[test]
    fn fields() {
        let ips = ["10.0.0.7".to_owned(), "fd00::7".to_owned()];
        for (path, expect) in [
            ("metadata.name", "web"),
            ("metadata.labels['app']", "web"),
            ("metadata.labels['none']", ""),
            ("metadata.annotations['x/y']", "z"),
            ("metadata.labels", "app=\"web\"\nb=\"a\\\"b\\n\""),
            ("spec.serviceAccountName", "robot"),
            ("status.hostIP", "192.0.2.1"),
            ("status.podIP", "10.0.0.7"),
            ("status.podIPs", "10.0.0.7,fd00::7"),
        ] {
            assert_eq!(field(path, &pod(), &ips, &node()).as_deref(), Ok(expect), "{path}");
        }
        assert!(field("spec.containers", &pod(), &ips, &node()).is_err());
    }

    #[test]
    fn resources() {
        let pod = pod();
        let own = &pod.spec.as_ref().unwrap().containers[0];
        for (name, divisor, expect) in [
            ("limits.cpu", None, "2"),
            ("limits.cpu", Some("1m"), "1500"),
            ("requests.memory", Some("1Mi"), "64"),
            ("limits.memory", Some("1Gi"), "1"),
            ("requests.cpu", None, "0"),
        ] {
            let selector = ResourceFieldSelector {
                container_name: None,
                divisor: divisor.map(|text| k8s_openapi::apimachinery::pkg::api::resource::Quantity(text.into())),
                resource: name.into(),
            };
            assert_eq!(resource(&selector, &pod, Some(own), &node()).as_deref(), Ok(expect), "{name}");
        }
    }
}
