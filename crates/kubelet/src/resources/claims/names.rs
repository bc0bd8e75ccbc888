//! Which claims a pod has, and which requests of them a container may use. Pure.

use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Container, Pod, PodExtendedResourceClaimStatus, PodResourceClaim};
use k8s_openapi::api::resource::v1::ResourceClaim;
use pod::spec;

use super::ClaimError;
use crate::context::{name_of, uid_of};

/// A resource whose name says which class of devices is meant: `deviceclass.resource.kubernetes.io/<class>`.
const BY_CLASS: &str = "deviceclass.resource.kubernetes.io/";

/// A claim of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Named {
    /// Its name, in the pod's namespace.
    pub(super) name: String,
    /// It was made for this pod, which has to be seen: the name alone says little.
    pub(super) is_own: bool,
}

/// The claims of a pod. One that the cluster found not to be needed is not among them.
pub(super) fn of_pod(pod: &Pod) -> Result<Vec<Named>, ClaimError> {
    let mut all = Vec::new();
    for claim in spec::of(pod).resource_claims.iter().flatten() {
        all.extend(of_claim(pod, claim)?);
    }
    // The scheduler has made it for resources that devices stand behind.
    let extended = extended(pod).map(|extended| extended.resource_claim_name.clone());
    all.extend(extended.filter(|name| !name.is_empty()).map(|name| Named { name, is_own: false }));
    Ok(all)
}

/// Whether a pod has claims at all.
pub(in crate::resources) fn has_any(pod: &Pod) -> bool {
    spec::of(pod).resource_claims.as_ref().is_some_and(|claims| !claims.is_empty()) || extended(pod).is_some()
}

fn extended(pod: &Pod) -> Option<&PodExtendedResourceClaimStatus> {
    pod.status.as_ref()?.extended_resource_claim_status.as_ref()
}

fn of_claim(pod: &Pod, claim: &PodResourceClaim) -> Result<Option<Named>, ClaimError> {
    if let Some(name) = &claim.resource_claim_name {
        return Ok(Some(Named { name: name.clone(), is_own: false }));
    }
    if claim.resource_claim_template_name.is_none() {
        return Err(ClaimError::Unsupported { pod: name_of(pod), claim: claim.name.clone() });
    }
    let statuses = pod.status.iter().flat_map(|status| status.resource_claim_statuses.iter().flatten());
    let made = statuses.into_iter().find(|status| status.name == claim.name);
    let made = made.ok_or_else(|| ClaimError::NotMade { pod: name_of(pod) })?;
    Ok(made.resource_claim_name.clone().map(|name| Named { name, is_own: true }))
}

/// What a container may use of each claim, by the claim's name: an empty request stands for all of it.
pub(super) fn of_container(pod: &Pod, container: &Container) -> Result<BTreeMap<String, BTreeSet<String>>, ClaimError> {
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for used in container.resources.iter().flat_map(|resources| resources.claims.iter().flatten()) {
        let mut claims = spec::of(pod).resource_claims.iter().flatten();
        let Some(claim) = claims.find(|claim| claim.name == used.name) else { continue };
        if let Some(named) = of_claim(pod, claim)? {
            all.entry(named.name).or_default().insert(used.request.clone().unwrap_or_default());
        }
    }
    if let Some(extended) = extended(pod) {
        let mappings = extended.request_mappings.iter();
        let own = mappings.filter(|one| one.container_name == container.name && wants(container, &one.resource_name));
        for one in own {
            all.entry(extended.resource_claim_name.clone()).or_default().insert(one.request_name.clone());
        }
    }
    Ok(all)
}

/// The claim that one of a pod's entries stands for, if it is known.
pub(super) fn of_entry(pod: &Pod, entry: &str) -> Option<String> {
    let claim = spec::of(pod).resource_claims.iter().flatten().find(|claim| claim.name == entry)?;
    of_claim(pod, claim).ok().flatten().map(|named| named.name)
}

fn wants(container: &Container, resource: &str) -> bool {
    let is_device = resource.starts_with(BY_CLASS) || resource.contains('/');
    is_device && pod::resources::of_container(container, resource, pod::resources::List::Requests).is_some()
}

/// Whether a pod may use a claim.
pub(super) fn check(pod: &Pod, named: &Named, claim: &ResourceClaim) -> Result<(), ClaimError> {
    let uid = uid_of(pod);
    if named.is_own && !is_controlled_by(pod, claim) {
        return Err(ClaimError::OfAnother { claim: named.name.clone(), pod: name_of(pod) });
    }
    let status = claim.status.as_ref();
    let mut reserved = status.iter().flat_map(|status| status.reserved_for.iter().flatten());
    let is_for = |consumer: &k8s_openapi::api::resource::v1::ResourceClaimConsumerReference| {
        consumer.uid == uid || is_for_group(pod, consumer)
    };
    if reserved.any(is_for) {
        return Ok(());
    }
    Err(ClaimError::NotReserved {
        pod: pod.metadata.name.clone().unwrap_or_default(),
        uid: uid.to_owned(),
        claim: named.name.clone(),
        claim_uid: claim.metadata.uid.clone().unwrap_or_default(),
    })
}

const GROUPS: &str = "scheduling.k8s.io";

fn group_of(pod: &Pod) -> Option<&str> {
    spec::of(pod).scheduling_group.as_ref()?.pod_group_name.as_deref()
}

/// Pods do not know the uid of their group: all that they know has to be right.
fn is_for_group(pod: &Pod, consumer: &k8s_openapi::api::resource::v1::ResourceClaimConsumerReference) -> bool {
    consumer.api_group.as_deref() == Some(GROUPS)
        && consumer.resource == "podgroups"
        && group_of(pod) == Some(consumer.name.as_str())
}

/// A claim made from a template belongs to its pod, or to the pod's group.
fn is_controlled_by(pod: &Pod, claim: &ResourceClaim) -> bool {
    let owners = claim.metadata.owner_references.iter().flatten();
    let Some(owner) = owners.into_iter().find(|owner| owner.controller == Some(true)) else { return false };
    let is_group =
        owner.kind == "PodGroup" && owner.api_version.strip_prefix(GROUPS).is_some_and(|v| v.starts_with('/'));
    owner.uid == uid_of(pod) || (is_group && group_of(pod) == Some(owner.name.as_str()))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(spec: Value, status: Value) -> Pod {
        let metadata = json!({ "name": "p", "namespace": "shop", "uid": "u" });
        serde_json::from_value(json!({ "metadata": metadata, "spec": spec, "status": status })).unwrap()
    }

    #[test]
    fn claims_have_names_by_themselves_or_by_their_template() {
        let claims = json!([
            { "name": "a", "resourceClaimName": "shared" },
            { "name": "b", "resourceClaimTemplateName": "t" },
            { "name": "c", "resourceClaimTemplateName": "t" }]);
        let resources =
            json!({ "claims": [{ "name": "a", "request": "r" }, { "name": "b" }], "requests": { "v.com/gpu": "1" } });
        let containers = json!([{ "name": "c", "resources": resources }, { "name": "d" }]);
        let spec = json!({ "containers": containers, "resourceClaims": claims });
        let statuses = json!([{ "name": "b", "resourceClaimName": "p-b-x" }, { "name": "c" }]);
        let mappings = json!([
            { "containerName": "c", "requestName": "q", "resourceName": "v.com/gpu" },
            { "containerName": "d", "requestName": "s", "resourceName": "v.com/gpu" }]);
        let extended = json!({ "resourceClaimName": "p-extended", "requestMappings": mappings });
        let pod =
            pod(spec.clone(), json!({ "resourceClaimStatuses": statuses, "extendedResourceClaimStatus": extended }));
        let named = |name: &str, is_own| Named { name: name.to_owned(), is_own };
        let expect = [named("shared", false), named("p-b-x", true), named("p-extended", false)];
        assert_eq!(of_pod(&pod).unwrap(), expect);
        let used = of_container(&pod, &pod.spec.as_ref().unwrap().containers[0]).unwrap();
        let used: Vec<_> =
            used.iter().map(|(name, all)| (name.as_str(), all.iter().cloned().collect::<Vec<_>>())).collect();
        assert_eq!(
            used,
            [("p-b-x", vec![String::new()]), ("p-extended", vec!["q".to_owned()]), ("shared", vec!["r".to_owned()])]
        );
        assert!(of_container(&pod, &pod.spec.as_ref().unwrap().containers[1]).unwrap().is_empty());
        let early = self::pod(spec, json!({}));
        assert_eq!(of_pod(&early).unwrap_err().to_string(), "pod \"shop/p\": ResourceClaim not created yet");
        assert!(has_any(&early));
    }

    #[test]
    fn a_claim_is_for_whom_it_is_reserved() {
        let group = json!({ "podGroupName": "team" });
        let pod = pod(json!({ "containers": [], "schedulingGroup": group }), json!({}));
        let check = |is_own: bool, owner: Value, consumer: Value| {
            let metadata = json!({ "name": "c", "uid": "cu", "ownerReferences": [owner] });
            let status = json!({ "reservedFor": [consumer] });
            let claim = json!({ "metadata": metadata, "spec": {}, "status": status });
            let claim: ResourceClaim = serde_json::from_value(claim).unwrap();
            super::check(&pod, &Named { name: "c".into(), is_own }, &claim).map_err(|error| error.to_string())
        };
        let owner = |kind: &str, name: &str, uid: &str| json!({ "apiVersion": "scheduling.k8s.io/v1beta1", "kind": kind, "name": name, "uid": uid, "controller": true });
        let me = json!({ "resource": "pods", "name": "p", "uid": "u" });
        let team = json!({ "apiGroup": "scheduling.k8s.io", "resource": "podgroups", "name": "team", "uid": "g" });
        let other = json!({ "resource": "pods", "name": "p", "uid": "old" });
        assert_eq!(check(true, owner("Pod", "p", "u"), me.clone()), Ok(()));
        assert_eq!(check(true, owner("PodGroup", "team", "g"), team), Ok(()));
        let refused = check(true, owner("Pod", "p", "old"), me).unwrap_err();
        assert_eq!(refused, "ResourceClaim c was not created for pod shop/p (it has another owner)");
        let refused = check(false, owner("Pod", "p", "old"), other).unwrap_err();
        assert_eq!(refused, "pod p (u) is not allowed to use ResourceClaim c (cu)");
    }
}
