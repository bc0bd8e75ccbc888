//! What several controllers ask of pods, owners and templates.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Pod, PodCondition, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use crate::Key;
use crate::table::Object;

pub(crate) const TEMPLATE_HASH: &str = "pod-template-hash";

pub(crate) fn name(metadata: &ObjectMeta) -> &str {
    metadata.name.as_deref().unwrap_or("")
}

pub(crate) fn uid(metadata: &ObjectMeta) -> &str {
    metadata.uid.as_deref().unwrap_or("")
}

pub(crate) fn created(metadata: &ObjectMeta) -> Timestamp {
    metadata.creation_timestamp.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0)
}

/// The controller that owns an object.
pub(crate) fn controller_of(metadata: &ObjectMeta) -> Option<&OwnerReference> {
    metadata.owner_references.iter().flatten().find(|owner| owner.controller == Some(true))
}

pub(crate) fn is_owned_by(metadata: &ObjectMeta, owner: &ObjectMeta) -> bool {
    controller_of(metadata).is_some_and(|reference| Some(&reference.uid) == owner.uid.as_ref())
}

/// A reference that makes `owner` the controller.
pub(crate) fn owned_by<T: Object>(owner: &T) -> Vec<OwnerReference> {
    let metadata = owner.metadata();
    vec![OwnerReference {
        api_version: T::API_VERSION.into(),
        kind: T::KIND.into(),
        name: name(metadata).into(),
        uid: uid(metadata).into(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }]
}

/// The objects of `list` that `owner` controls.
pub(crate) fn owned<T: Object>(list: &[Arc<T>], owner: &ObjectMeta) -> Vec<Arc<T>> {
    list.iter().filter(|object| is_owned_by(object.metadata(), owner)).cloned().collect()
}

/// A pod of `owner`, named after it.
pub(crate) fn pod_from_template<T: Object>(owner: &T, template: &PodTemplateSpec) -> Pod {
    let from = template.metadata.clone().unwrap_or_default();
    let metadata = ObjectMeta {
        namespace: owner.metadata().namespace.clone(),
        generate_name: Some(format!("{}-", name(owner.metadata()))),
        labels: from.labels,
        annotations: from.annotations,
        finalizers: None,
        owner_references: Some(owned_by(owner)),
        ..ObjectMeta::default()
    };
    Pod { metadata, spec: template.spec.clone(), status: None }
}

// Pods

pub(crate) fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Pending")
}

pub(crate) fn is_terminal(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

pub(crate) fn is_terminating(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some()
}

/// Counts towards the replicas of its owner.
pub(crate) fn is_active(pod: &Pod) -> bool {
    !is_terminal(pod) && !is_terminating(pod)
}

pub(crate) fn condition<'p>(pod: &'p Pod, kind: &str) -> Option<&'p PodCondition> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == kind)
}

pub(crate) fn is_ready(pod: &Pod) -> bool {
    condition(pod, "Ready").is_some_and(|ready| ready.status == "True")
}

/// When the pod counts as available: ready for `min_ready_s`. `None` while it is not ready.
pub(crate) fn available_at(pod: &Pod, min_ready_s: i32) -> Option<Timestamp> {
    let ready = condition(pod, "Ready").filter(|ready| ready.status == "True")?;
    let since = ready.last_transition_time.as_ref().map_or(Timestamp::UNIX_EPOCH, |time| time.0);
    Some(later(since, i64::from(min_ready_s)))
}

pub(crate) fn is_available(pod: &Pod, min_ready_s: i32, now: Timestamp) -> bool {
    available_at(pod, min_ready_s).is_some_and(|at| at <= now || min_ready_s == 0)
}

pub(crate) fn later(time: Timestamp, seconds: i64) -> Timestamp {
    time.saturating_add(SignedDuration::from_secs(seconds)).unwrap_or(Timestamp::MAX)
}

pub(crate) fn restarts(pod: &Pod) -> i32 {
    let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
    statuses.map(|status| status.restart_count).sum()
}

/// The order in which replicas are given up: first what serves least, then the youngest.
pub(crate) fn rank_for_deletion(pods: &mut [Arc<Pod>]) {
    let phase_rank = |pod: &Pod| match phase(pod) {
        "Pending" => 0,
        "Unknown" => 1,
        _ => 2,
    };
    pods.sort_by_cached_key(|pod| {
        let assigned = pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some());
        let cost: i32 = annotation(&pod.metadata, "controller.kubernetes.io/pod-deletion-cost")
            .and_then(|cost| cost.parse().ok())
            .unwrap_or(0);
        let age = std::cmp::Reverse(created(&pod.metadata));
        (assigned, phase_rank(pod), is_ready(pod), cost, std::cmp::Reverse(restarts(pod)), age, Key::of(&pod.metadata))
    });
}

pub(crate) fn annotation<'m>(metadata: &'m ObjectMeta, key: &str) -> Option<&'m str> {
    metadata.annotations.as_ref()?.get(key).map(String::as_str)
}

pub(crate) fn label<'m>(metadata: &'m ObjectMeta, key: &str) -> Option<&'m str> {
    metadata.labels.as_ref()?.get(key).map(String::as_str)
}

pub(crate) fn set(map: &mut Option<BTreeMap<String, String>>, key: &str, value: impl Into<String>) {
    map.get_or_insert_default().insert(key.into(), value.into());
}

// Numbers

/// `count`, or a percentage of `total`; a fraction is rounded up or down.
pub(crate) fn resolve(value: Option<&IntOrString>, total: i32, round_up: bool) -> i32 {
    match value {
        None => 0,
        Some(IntOrString::Int(count)) => *count,
        Some(IntOrString::String(text)) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            let scaled = i64::from(total) * percent + if round_up { 99 } else { 0 };
            i32::try_from(scaled / 100).unwrap_or(i32::MAX)
        }
    }
}

pub(crate) fn count<T>(items: impl IntoIterator<Item = T>) -> i32 {
    i32::try_from(items.into_iter().count()).unwrap_or(i32::MAX)
}

/// A short name for the content of a template, in the alphabet of upstream's hashes (no vowels: no words).
pub(crate) fn template_hash(template: &PodTemplateSpec) -> String {
    // Maps inside are ordered and absent fields are left out, so equal templates print equally.
    let text = serde_json::to_vec(template).unwrap_or_default();
    short_hash(&text)
}

pub(crate) const ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";

pub(crate) fn short_hash(bytes: &[u8]) -> String {
    // FNV-1a, 64 bits.
    let mut hash = bytes
        .iter()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3));
    let digits = (0..10).map(|_| {
        let digit = ALPHABET[usize::try_from(hash % 27).unwrap_or(0)];
        hash /= 27;
        char::from(digit)
    });
    digits.collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    /// An object from JSON, with a uid and an age.
    pub(crate) fn object<T: Object + serde::de::DeserializeOwned>(value: serde_json::Value) -> T {
        let mut object: T = serde_json::from_value(value).unwrap();
        let metadata = object.metadata_mut();
        metadata.namespace.get_or_insert_with(|| "default".into());
        let uid = format!("uid-{}", metadata.name.as_deref().unwrap_or(""));
        metadata.uid.get_or_insert(uid);
        metadata.creation_timestamp.get_or_insert(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now()));
        object
    }

    #[test]
    fn percentages_round_as_asked() {
        let percent = |text: &str| Some(IntOrString::String(text.into()));
        assert_eq!(resolve(percent("25%").as_ref(), 2, true), 1);
        assert_eq!(resolve(percent("25%").as_ref(), 2, false), 0);
        assert_eq!(resolve(percent("100%").as_ref(), 3, false), 3);
        assert_eq!(resolve(Some(&IntOrString::Int(4)), 3, false), 4);
    }

    #[test]
    fn hashes_are_stable() {
        assert_eq!(short_hash(b""), short_hash(b""));
        assert_ne!(short_hash(b"a"), short_hash(b"b"));
        assert_eq!(short_hash(b"a").len(), 10);
    }
}
