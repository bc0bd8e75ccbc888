//! What pods ask for: amounts of resources, of containers and of pods as a whole.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity as Text;

use crate::quantity::Quantity;
use crate::spec::{self, Role};

/// Which list of a container's resources.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum List {
    /// `requests`; one that is not written is the limit.
    Requests,
    /// `limits`.
    Limits,
}

/// What a container asks for; `None` when it is not written, or no quantity.
pub fn of_container(container: &Container, resource: &str, list: List) -> Option<Quantity> {
    of_requirements(container.resources.as_ref()?, resource, list)
}

fn of_requirements(resources: &ResourceRequirements, resource: &str, list: List) -> Option<Quantity> {
    let limit = written(resources.limits.as_ref(), resource);
    match list {
        List::Limits => limit,
        List::Requests => written(resources.requests.as_ref(), resource).or(limit),
    }
}

fn written(list: Option<&BTreeMap<String, Text>>, resource: &str) -> Option<Quantity> {
    let text = list?.get(resource)?;
    Quantity::parse(&text.0).ok().filter(|amount| !amount.is_zero())
}

/// What a pod asks for as a whole, beside what its containers ask for; `None` when that is not written. A request that is not
/// written is what the containers request, if they do, and else the limit, as the API server has it: pods from files of the
/// node do not come by it.
pub fn of_whole(pod: &Pod, resource: &str, list: List) -> Option<Quantity> {
    let whole = spec::of(pod).resources.as_ref()?;
    let limit = of_requirements(whole, resource, List::Limits);
    // Huge pages are there or not, so they are requested as they are limited.
    if list == List::Limits || resource.starts_with("hugepages-") {
        return of_requirements(whole, resource, list);
    }
    let of_limit = |limit| {
        let assigned = of_containers(pod, resource, List::Requests);
        if assigned.is_zero() { limit } else { assigned }
    };
    written(whole.requests.as_ref(), resource).or_else(|| limit.map(of_limit))
}

/// What a whole pod asks for: its own amount, or the most that its containers need at one time, plus overhead.
pub fn of_pod(pod: &Pod, resource: &str, list: List) -> Quantity {
    of_whole(pod, resource, list).unwrap_or_else(|| of_containers(pod, resource, list)) + overhead(pod, resource)
}

/// What all containers need at one time: init containers run one at a time beside the sidecars before them; then all
/// others run together.
pub fn of_containers(pod: &Pod, resource: &str, list: List) -> Quantity {
    let mut together = Quantity::default();
    let mut peak = Quantity::default();
    for (role, container) in spec::containers(pod) {
        let amount = of_container(container, resource, list).unwrap_or_default();
        match role {
            Role::Init => peak = peak.max(together + amount),
            Role::Ephemeral => {}
            Role::Sidecar | Role::Main => together = together + amount,
        }
    }
    peak.max(together)
}

fn overhead(pod: &Pod, resource: &str) -> Quantity {
    let text = spec::of(pod).overhead.as_ref().and_then(|list| list.get(resource));
    text.and_then(|text| Quantity::parse(&text.0).ok()).unwrap_or_default()
}

/// Whether every container (or the pod as a whole) has a limit: only then does the pod's group get one.
pub fn is_limited(pod: &Pod, resource: &str) -> bool {
    of_whole(pod, resource, List::Limits).is_some()
        || spec::containers(pod).all(|(_, container)| of_container(container, resource, List::Limits).is_some())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::qos::QosClass;

    #[test]
    fn what_a_pod_does_not_request_is_what_its_containers_do_or_the_limit() {
        let check = |whole: serde_json::Value, own: serde_json::Value, expect: [&str; 2], class: QosClass| {
            let containers = json!([{ "name": "a", "resources": own }, { "name": "b" }]);
            let pod: Pod =
                serde_json::from_value(json!({ "spec": { "resources": whole, "containers": containers } })).unwrap();
            let of = |resource| of_pod(&pod, resource, List::Requests);
            let expect = expect.map(|text| Quantity::parse(text).unwrap());
            assert_eq!((of("cpu"), of("memory")), expect.into(), "{pod:?}");
            assert_eq!(QosClass::of(&pod), class, "{pod:?}");
        };
        let (both, some) = (json!({ "cpu": "2", "memory": "2Gi" }), json!({ "cpu": "500m" }));
        let limits = json!({ "limits": both });
        check(limits.clone(), json!({}), ["2", "2Gi"], QosClass::Guaranteed);
        check(limits.clone(), json!({ "requests": some }), ["500m", "2Gi"], QosClass::Burstable);
        check(limits, json!({ "limits": some }), ["500m", "2Gi"], QosClass::Burstable);
        let written = json!({ "limits": both, "requests": both });
        check(written, json!({ "requests": some }), ["2", "2Gi"], QosClass::Guaranteed);
        check(
            json!({ "requests": { "cpu": "1" } }),
            json!({ "requests": { "memory": "1Gi" } }),
            ["1", "1Gi"],
            QosClass::Burstable,
        );
        check(json!({}), json!({ "requests": some }), ["500m", "0"], QosClass::Burstable);
    }
}
