//! What a pod's status and its event say, in upstream's words: people and tools look for them. Pure.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use pod::quantity::Quantity;

use super::super::machine::binary;
use super::super::pressure::{Observations, Resource, Threshold};

/// Of a pod that is ended because the node is short of something; `used` is what its containers use of it. With it the
/// annotations of the event.
pub(super) fn low(
    pod: &Pod,
    threshold: Threshold,
    observed: &Observations,
    used: &[(String, u64)],
) -> (String, BTreeMap<String, String>) {
    let resource = threshold.signal.resource();
    let mut text = format!("The node was low on resource: {}. ", resource.name());
    if let Some(room) = observed.get(threshold.signal) {
        let (least, left) = (threshold.level.of(room.capacity), room.available);
        text += &format!("Threshold quantity: {}, available: {}. ", written(resource, least), written(resource, left));
    }
    let mut annotations = BTreeMap::from([("starved_resource".to_owned(), resource.name().to_owned())]);
    if let Some((asked, usage)) = whole(pod, resource, used) {
        let name = pod.metadata.name.as_deref().unwrap_or_default();
        text += &larger("Pod", name, usage, &asked, resource);
        annotations.insert("offending_pod".to_owned(), name.to_owned());
        annotations.insert("offending_pod_usage".to_owned(), written(resource, usage));
    }
    let (mut names, mut amounts) = (Vec::new(), Vec::new());
    for (name, usage) in used {
        let (asked, bytes) = asked_by(pod, name, resource);
        if *usage > bytes {
            text += &larger("Container", name, *usage, &asked, resource);
            names.push(name.as_str());
            amounts.push(written(resource, *usage));
        }
    }
    annotations.insert("offending_containers".to_owned(), names.join(","));
    annotations.insert("offending_containers_usage".to_owned(), amounts.join(","));
    (text, annotations)
}

fn larger(what: &str, name: &str, usage: u64, asked: &str, resource: Resource) -> String {
    let (usage, of) = (written(resource, usage), resource.name());
    format!("{what} {name} was using {usage}, request is {asked}, has larger consumption of {of}. ")
}

/// What a pod as a whole asks for and uses, if it asks as a whole.
fn whole(pod: &Pod, resource: Resource, used: &[(String, u64)]) -> Option<(String, u64)> {
    let requests = pod::spec::of(pod).resources.as_ref()?.requests.as_ref()?;
    let asked = requests.get(resource.name()).filter(|_| resource == Resource::Memory)?;
    Some((asked.0.clone(), used.iter().map(|(_, usage)| usage).sum()))
}

/// What a container asks for, as text and as number.
fn asked_by(pod: &Pod, name: &str, resource: Resource) -> (String, u64) {
    let container = pod::spec::container(pod, name).map(|(_, container)| container);
    let requests = container.and_then(|container| container.into_owned().resources?.requests);
    match requests.as_ref().and_then(|requests| requests.get(resource.name())) {
        Some(asked) => (canonical(&asked.0), units(&asked.0)),
        None => ("0".to_owned(), 0),
    }
}

/// Of a container that stores more than its limit.
pub(super) fn container_exceeds(name: &str, limit: &str) -> String {
    format!("Container {name} exceeded its local ephemeral storage limit \"{}\". ", canonical(limit))
}

/// Of a pod that stores more than the limits of its containers together.
pub(super) fn pod_exceeds(limit: u64) -> String {
    format!("Pod ephemeral local storage usage exceeds the total limit of containers {}. ", binary(limit))
}

/// Of a pod with an emptyDir that holds more than it may.
pub(super) fn volume_exceeds(name: &str, limit: &str) -> String {
    format!("Usage of EmptyDir volume \"{name}\" exceeds the limit \"{}\". ", canonical(limit))
}

/// Whole units of a quantity that was written.
pub(super) fn units(text: &str) -> u64 {
    Quantity::parse(text).ok().and_then(|amount| u64::try_from(amount.units()).ok()).unwrap_or(0)
}

/// As the API writes a quantity: with the largest suffix of its kind that divides it.
fn canonical(text: &str) -> String {
    let is_binary = text.ends_with('i');
    if is_binary { binary(units(text)) } else { decimal(units(text)) }
}

fn written(resource: Resource, amount: u64) -> String {
    match resource {
        Resource::Memory | Resource::Disk => binary(amount),
        Resource::Inodes | Resource::Pids => decimal(amount),
    }
}

fn decimal(amount: u64) -> String {
    let units = [("G", 1_000_000_000), ("M", 1_000_000), ("k", 1000)];
    let fits = units.iter().find(|(_, unit)| amount > 0 && amount.is_multiple_of(*unit));
    fits.map_or_else(|| amount.to_string(), |(suffix, unit)| format!("{}{suffix}", amount / unit))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::pressure::{Level, Room, Signal};
    use super::*;

    fn pod() -> Pod {
        let requests = json!({"requests": {"memory": "100Ki", "ephemeral-storage": "1G"}});
        let containers =
            json!([{"name": "a", "resources": requests}, {"name": "b"}, {"name": "c", "resources": requests}]);
        serde_json::from_value(json!({"metadata": {"name": "p"}, "spec": {"containers": containers}})).unwrap()
    }

    fn short(signal: Signal, level: Level, capacity: u64, available: u64) -> (Threshold, Observations) {
        let mut observed = Observations::default();
        observed.set(signal, Some(Room { capacity, available }));
        (Threshold::hard(signal, level), observed)
    }

    #[test]
    fn who_uses_more_than_it_asked_for_is_named() {
        let (threshold, observed) = short(Signal::Memory, Level::Amount(100 << 20), 1 << 30, 51_201 << 10);
        let used = [("a", 300 << 10), ("b", 5), ("c", 1)].map(|(name, bytes)| (name.to_owned(), bytes));
        let (text, annotations) = low(&pod(), threshold, &observed, &used);
        assert_eq!(
            text,
            "The node was low on resource: memory. Threshold quantity: 100Mi, available: 51201Ki. Container a was using \
             300Ki, request is 100Ki, has larger consumption of memory. Container b was using 5, request is 0, has larger \
             consumption of memory. "
        );
        assert_eq!(annotations["offending_containers"], "a,b");
        assert_eq!(annotations["offending_containers_usage"], "300Ki,5");
        assert_eq!(annotations["starved_resource"], "memory");
    }

    #[test]
    fn what_cannot_be_asked_for_is_only_counted() {
        let (threshold, observed) = short(Signal::NodeInodes, Level::Share(0.05), 100_000, 123);
        let (text, _) = low(&pod(), threshold, &observed, &[]);
        assert_eq!(text, "The node was low on resource: inodes. Threshold quantity: 5k, available: 123. ");
    }

    #[test]
    fn limits_are_written_as_the_api_does() {
        assert_eq!(volume_exceeds("v", "1024Mi"), "Usage of EmptyDir volume \"v\" exceeds the limit \"1Gi\". ");
        assert_eq!(container_exceeds("c", "5M"), "Container c exceeded its local ephemeral storage limit \"5M\". ");
        assert_eq!(
            pod_exceeds(3 << 20),
            "Pod ephemeral local storage usage exceeds the total limit of containers 3Mi. "
        );
    }
}
