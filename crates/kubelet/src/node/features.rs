//! What schedulers and the API server may count on that not every kubelet does (`declaredFeatures`, KEP-5328), and which of it
//! a pod needs. Pure.

use cri::v1;
use k8s_openapi::api::core::v1::{Pod, PodSpec};
use pod::spec;

/// What a node's runtime brings along.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Abilities {
    /// It speaks WebSocket to who runs programs in its containers, and tunnels what is forwarded to its ports.
    pub websockets: bool,
    /// It honours `supplementalGroupsPolicy`.
    pub supplemental_groups_policy: bool,
    /// Pods of the host's network may have users of their own.
    pub user_namespaces_host_network: bool,
    /// It mounts volumes with options that a container wants.
    pub mount_options: bool,
}

impl Abilities {
    /// Those of the runtime called `name`, which has told its features. That a runtime speaks WebSocket CRI does not tell:
    /// the own one does, others speak SPDY.
    pub fn of(name: &str, told: Option<v1::RuntimeFeatures>) -> Self {
        let told = told.unwrap_or_default();
        Self {
            websockets: name == "orlop",
            supplemental_groups_policy: told.supplemental_groups_policy,
            user_namespaces_host_network: told.user_namespaces_host_network,
            mount_options: told.mount_options,
        }
    }
}

/// A feature that nodes declare.
struct Feature {
    name: &'static str,
    is_there: fn(&Abilities) -> bool,
    /// Whether a pod cannot run without it. What is only about changes of pods is the API server's to ask for.
    is_needed: fn(&PodSpec) -> bool,
}

/// All that Kubernetes 1.37 knows of (k8s.io/component-helpers/nodedeclaredfeatures), in alphabetical order.
const FEATURES: [Feature; 9] = [
    // Claims do not count as CPU and memory.
    Feature { name: "DRANodeAllocatableResources", is_there: |_| false, is_needed: |_| false },
    // Every driver of a claim is asked.
    Feature { name: "DRAOptionalNodeOperations", is_there: |_| false, is_needed: |_| false },
    Feature { name: "ExtendWebSocketsToKubelet", is_there: |node| node.websockets, is_needed: |_| false },
    Feature { name: "InPlacePodLevelResourcesVerticalScaling", is_there: |_| true, is_needed: |_| false },
    Feature { name: "InPlacePodVerticalScalingInitContainers", is_there: |_| true, is_needed: |_| false },
    // An emptyDir in memory keeps its size.
    Feature { name: "InPlacePodVerticalScalingMemoryBackedVolumes", is_there: |_| false, is_needed: |_| false },
    Feature { name: "RestartAllContainersOnContainerExits", is_there: |_| true, is_needed: restarts_all },
    Feature {
        name: "UserNamespacesHostNetworkSupport",
        is_there: |node| node.user_namespaces_host_network,
        is_needed: |spec| spec.host_network == Some(true) && spec.host_users == Some(false),
    },
    Feature { name: "VolumeBindMountOptions", is_there: |node| node.mount_options, is_needed: mounts_with_options },
];

/// What a node declares whose runtime can do this.
pub fn declared(abilities: &Abilities) -> Vec<&'static str> {
    FEATURES.iter().filter(|feature| (feature.is_there)(abilities)).map(|feature| feature.name).collect()
}

/// What `pod` needs that is not declared.
pub fn missing(pod: &Pod, declared: &[&str]) -> Vec<&'static str> {
    let needed = FEATURES.iter().filter(|feature| (feature.is_needed)(spec::of(pod)));
    needed.map(|feature| feature.name).filter(|name| !declared.contains(name)).collect()
}

fn restarts_all(spec: &PodSpec) -> bool {
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mut rules = containers.flat_map(|container| container.restart_policy_rules.iter().flatten());
    rules.any(|rule| rule.action == "RestartAllContainers")
}

fn mounts_with_options(spec: &PodSpec) -> bool {
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let ephemeral = spec.ephemeral_containers.iter().flatten().flat_map(|container| container.volume_mounts.iter());
    let mut mounts = containers.flat_map(|container| container.volume_mounts.iter()).chain(ephemeral).flatten();
    mounts.any(|mount| mount.bind_mount_options.as_ref().is_some_and(|options| !options.is_empty()))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    const OWN: v1::RuntimeFeatures = v1::RuntimeFeatures {
        supplemental_groups_policy: true,
        user_namespaces_host_network: false,
        mount_options: true,
    };

    #[test]
    fn exactly_what_is_there_is_declared() {
        let own = declared(&Abilities::of("orlop", Some(OWN)));
        let expect = [
            "ExtendWebSocketsToKubelet",
            "InPlacePodLevelResourcesVerticalScaling",
            "InPlacePodVerticalScalingInitContainers",
            "RestartAllContainersOnContainerExits",
            "VolumeBindMountOptions",
        ];
        assert_eq!(own, expect);
        let other = declared(&Abilities::of("containerd", None));
        assert_eq!(other, [expect[1], expect[2], expect[3]]);
        assert!(FEATURES.is_sorted_by_key(|feature| feature.name), "the API wants them in order");
    }

    #[test]
    fn a_pod_needs_what_its_spec_uses() {
        let missing = |spec: Value, declared: &[&str]| {
            let pod: Pod = serde_json::from_value(json!({ "spec": spec })).unwrap();
            super::missing(&pod, declared)
        };
        let rules = json!([{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [1]}}]);
        let restarting = json!({"containers": [{"name": "c", "restartPolicyRules": rules}]});
        assert_eq!(missing(restarting.clone(), &[]), ["RestartAllContainersOnContainerExits"]);
        assert_eq!(missing(restarting, &["RestartAllContainersOnContainerExits"]), [""; 0]);
        let mapped = json!({"containers": [], "hostNetwork": true, "hostUsers": false});
        assert_eq!(missing(mapped, &[]), ["UserNamespacesHostNetworkSupport"]);
        let mounts = json!([{"name": "v", "mountPath": "/v", "bindMountOptions": ["noexec"]}]);
        let mounting = json!({"containers": [], "initContainers": [{"name": "c", "volumeMounts": mounts}]});
        assert_eq!(missing(mounting, &[]), ["VolumeBindMountOptions"]);
        assert_eq!(missing(json!({"containers": [{"name": "c"}]}), &[]), [""; 0]);
    }
}
