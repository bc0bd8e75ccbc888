//! What pods ask for: amounts of resources, of containers and of pods as a whole.

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};

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

/// As [`of_container`], of a list that may be a whole pod's.
pub fn of_requirements(resources: &ResourceRequirements, resource: &str, list: List) -> Option<Quantity> {
    let read = |list: &Option<std::collections::BTreeMap<String, _>>| {
        let text: &k8s_openapi::apimachinery::pkg::api::resource::Quantity = list.as_ref()?.get(resource)?;
        Quantity::parse(&text.0).ok().filter(|amount| !amount.is_zero())
    };
    let limit = read(&resources.limits);
    match list {
        List::Limits => limit,
        List::Requests => read(&resources.requests).or(limit),
    }
}

/// What a whole pod asks for: its own amount, or the most that its containers need at one time, plus overhead.
pub fn of_pod(pod: &Pod, resource: &str, list: List) -> Quantity {
    let whole = spec::of(pod).resources.as_ref().and_then(|whole| of_requirements(whole, resource, list));
    whole.unwrap_or_else(|| of_containers(pod, resource, list)) + overhead(pod, resource)
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
    let whole = spec::of(pod).resources.as_ref();
    whole.is_some_and(|whole| of_requirements(whole, resource, List::Limits).is_some())
        || spec::containers(pod).all(|(_, container)| of_container(container, resource, List::Limits).is_some())
}
