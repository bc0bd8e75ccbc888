//! Quality of service, from requests and limits.

use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};

use crate::quantity::Quantity;
use crate::resources::{self, List};

/// The class of a pod (`status.qosClass`): whom the kernel takes memory from first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum QosClass {
    /// No requests and no limits at all.
    BestEffort,
    /// Something in between.
    Burstable,
    /// Limits for CPU and memory on every container, and requests equal to them.
    Guaranteed,
}

impl QosClass {
    /// As the API spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::BestEffort => "BestEffort",
            Self::Burstable => "Burstable",
            Self::Guaranteed => "Guaranteed",
        }
    }

    /// The class of a pod.
    pub fn of(pod: &Pod) -> Self {
        let Some(spec) = &pod.spec else { return Self::BestEffort };
        if spec.resources.as_ref().is_some_and(|whole| !is_empty(whole)) {
            let limit = |name| resources::of_whole(pod, name, List::Limits);
            let is_whole =
                |name| limit(name).is_some() && resources::of_whole(pod, name, List::Requests) == limit(name);
            return if COUNTED.into_iter().all(is_whole) { Self::Guaranteed } else { Self::Burstable };
        }
        let all = || spec.containers.iter().chain(spec.init_containers.iter().flatten());
        if all().all(|container| container.resources.as_ref().is_none_or(is_empty)) {
            return Self::BestEffort;
        }
        let guaranteed = |container: &Container| is_guaranteed(container.resources.as_ref());
        if all().all(guaranteed) { Self::Guaranteed } else { Self::Burstable }
    }
}

const COUNTED: [&str; 2] = ["cpu", "memory"];

fn amount(resources: &ResourceRequirements, name: &str, limit: bool) -> Option<Quantity> {
    let list = if limit { &resources.limits } else { &resources.requests };
    list.as_ref()?.get(name).and_then(|text| Quantity::parse(&text.0).ok()).filter(|amount| !amount.is_zero())
}

fn is_empty(resources: &ResourceRequirements) -> bool {
    COUNTED.iter().all(|name| amount(resources, name, true).is_none() && amount(resources, name, false).is_none())
}

fn is_guaranteed(resources: Option<&ResourceRequirements>) -> bool {
    let Some(resources) = resources else { return false };
    COUNTED.iter().all(|name| {
        let limit = amount(resources, name, true);
        // A request that is not written defaults to the limit.
        limit.is_some() && amount(resources, name, false).is_none_or(|request| Some(request) == limit)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::PodSpec;

    fn container(requests: &[(&str, &str)], limits: &[(&str, &str)]) -> Container {
        let list = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter().map(|(name, text)| {
                ((*name).into(), k8s_openapi::apimachinery::pkg::api::resource::Quantity((*text).into()))
            });
            Some(pairs.collect())
        };
        let resources =
            ResourceRequirements { requests: list(requests), limits: list(limits), ..ResourceRequirements::default() };
        Container { resources: Some(resources), ..Container::default() }
    }

    fn check(containers: Vec<Container>, expect: QosClass) {
        let pod = Pod { spec: Some(PodSpec { containers, ..PodSpec::default() }), ..Pod::default() };
        assert_eq!(QosClass::of(&pod), expect);
    }

    #[test]
    fn classes() {
        check(vec![container(&[], &[])], QosClass::BestEffort);
        check(vec![container(&[("cpu", "0")], &[])], QosClass::BestEffort);
        check(vec![container(&[("cpu", "100m")], &[])], QosClass::Burstable);
        check(vec![container(&[], &[("cpu", "1"), ("memory", "1Gi")])], QosClass::Guaranteed);
        check(vec![container(&[("cpu", "1000m")], &[("cpu", "1"), ("memory", "1Gi")])], QosClass::Guaranteed);
        check(vec![container(&[("cpu", "500m")], &[("cpu", "1"), ("memory", "1Gi")])], QosClass::Burstable);
        let guaranteed = container(&[], &[("cpu", "1"), ("memory", "1Gi")]);
        check(vec![guaranteed, container(&[], &[])], QosClass::Burstable);
    }
}
