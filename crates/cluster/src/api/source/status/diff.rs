//! From the status that the server has to the one that the kubelet wants: a strategic merge patch. Pure.
//!
//! What others write into a pod's status stays: conditions of their own types (readiness gates, the scheduler's), claims'
//! names. A phase that is terminal stays what it is.

use k8s_openapi::api::core::v1::PodStatus;
use serde_json::{Map, Value, json};

/// Fields that go when the kubelet does not state them any more. The others are somebody else's, or never go.
const OWN: [&str; 14] = [
    "allocatedResources",
    "containerStatuses",
    "ephemeralContainerStatuses",
    "hostIP",
    "hostIPs",
    "initContainerStatuses",
    "message",
    "observedGeneration",
    "phase",
    "podIP",
    "podIPs",
    "reason",
    "resize",
    "resources",
];
/// Conditions that go when the kubelet does not state them any more.
const PASSING: [&str; 3] = ["AllContainersRestarting", "PodResizeInProgress", "PodResizePending"];
/// Lists that the API merges by `ip`: a patch has to say that it is the whole.
const BY_ADDRESS: [&str; 2] = ["hostIPs", "podIPs"];

/// The value of `status` in a patch that leads from `old` to `new`; none if they are the same.
pub(super) fn status_patch(old: &PodStatus, new: &PodStatus) -> Option<Value> {
    let (old, mut new) = (fields(old), fields(new));
    keep_terminal_phase(&old, &mut new);
    let mut patch = Map::new();
    for (field, value) in &new {
        match (field.as_str(), old.get(field)) {
            (_, Some(before)) if before == value => {}
            ("conditions", before) => {
                let changes = conditions(before, value);
                if !changes.is_empty() {
                    patch.insert(field.clone(), changes.into());
                }
            }
            (field, _) if BY_ADDRESS.contains(&field) => {
                let whole = value.as_array().into_iter().flatten().cloned();
                let whole: Vec<Value> = std::iter::once(json!({"$patch": "replace"})).chain(whole).collect();
                patch.insert(field.to_owned(), whole.into());
            }
            (field, Some(before)) => {
                patch.insert(field.to_owned(), merged(before, value));
            }
            (field, None) => {
                patch.insert(field.to_owned(), value.clone());
            }
        }
    }
    for field in OWN.iter().filter(|field| old.contains_key(**field) && !new.contains_key(**field)) {
        patch.insert((*field).to_owned(), Value::Null);
    }
    (!patch.is_empty()).then_some(Value::Object(patch))
}

/// Whether somebody waits for this: a phase, readiness, or a container that started or ended. The rest can wait a moment
/// for what comes next.
pub(super) fn is_urgent(old: &PodStatus, new: &PodStatus) -> bool {
    let ready = |status: &PodStatus| {
        let conditions = status.conditions.iter().flatten();
        let states = conditions.filter(|one| matches!(one.type_.as_str(), "Ready" | "ContainersReady"));
        states.map(|one| (one.type_.clone(), one.status.clone())).collect::<Vec<_>>()
    };
    let states = |status: &PodStatus| {
        let all = [&status.init_container_statuses, &status.container_statuses, &status.ephemeral_container_statuses];
        let all = all.into_iter().flatten().flatten();
        let state = |one: &k8s_openapi::api::core::v1::ContainerStatus| {
            let state = one.state.clone().unwrap_or_default();
            (one.name.clone(), one.ready, one.restart_count, state.running.is_some(), state.terminated.is_some())
        };
        all.map(state).collect::<Vec<_>>()
    };
    // Without a first status the first is only that the kubelet has seen the pod.
    let begun = |status: &PodStatus| states(status).iter().any(|(.., running, ended)| *running || *ended);
    old.phase != new.phase
        || ready_changes(&ready(old), &ready(new))
        || (states(old) != states(new) && (begun(old) || begun(new)))
}

/// That something is not ready which never was is no news.
fn ready_changes(old: &[(String, String)], new: &[(String, String)]) -> bool {
    let state = |all: &[(String, String)], name: &str| all.iter().any(|(kind, state)| kind == name && state == "True");
    ["Ready", "ContainersReady"].iter().any(|name| state(old, name) != state(new, name))
}

fn fields(status: &PodStatus) -> Map<String, Value> {
    match serde_json::to_value(status) {
        Ok(Value::Object(fields)) => fields,
        _ => Map::new(),
    }
}

/// Succeeded and Failed are for ever: who has read them has acted on them.
fn keep_terminal_phase(old: &Map<String, Value>, new: &mut Map<String, Value>) {
    let phase = old.get("phase").and_then(Value::as_str);
    if matches!(phase, Some("Succeeded" | "Failed"))
        && let Some(phase) = old.get("phase")
    {
        new.insert("phase".into(), phase.clone());
    }
}

/// The conditions that have changed, whole: the API merges them by `type`.
fn conditions(old: Option<&Value>, new: &Value) -> Vec<Value> {
    let list = |value: Option<&Value>| value.and_then(Value::as_array).cloned().unwrap_or_default();
    let (old, new) = (list(old), list(Some(new)));
    let find = |list: &[Value], kind: &Value| list.iter().find(|one| &one["type"] == kind).cloned();
    let changed = new.iter().filter_map(|condition| match find(&old, &condition["type"]) {
        Some(before) if before == *condition => None,
        Some(before) => Some(merged(&before, condition)),
        None => Some(condition.clone()),
    });
    let is_passing = |kind: &Value| kind.as_str().is_some_and(|kind| PASSING.contains(&kind));
    let gone = old.iter().map(|condition| &condition["type"]);
    let gone = gone.filter(|kind| is_passing(kind) && find(&new, kind).is_none());
    let gone = gone.map(|kind| json!({"$patch": "delete", "type": kind}));
    changed.chain(gone).collect()
}

/// `new`, with null for fields of `old` that it lacks: merging leaves those alone otherwise. Lists are whole.
fn merged(old: &Value, new: &Value) -> Value {
    let (Some(old), Some(fields)) = (old.as_object(), new.as_object()) else { return new.clone() };
    let mut merged: Map<String, Value> = fields
        .iter()
        .map(|(field, value)| (field.clone(), old.get(field).map_or_else(|| value.clone(), |old| merged(old, value))))
        .collect();
    for field in old.keys().filter(|field| !fields.contains_key(*field)) {
        merged.insert(field.clone(), Value::Null);
    }
    Value::Object(merged)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(value: Value) -> PodStatus {
        serde_json::from_value(value).unwrap()
    }

    fn patch(old: Value, new: Value) -> Option<Value> {
        status_patch(&status(old), &status(new))
    }

    #[test]
    fn only_what_differs() {
        let same = json!({"phase": "Running", "startTime": "2026-01-02T03:04:05Z", "podIPs": [{"ip": "10.0.0.1"}]});
        assert_eq!(patch(same.clone(), same), None);
        assert_eq!(
            patch(json!({"phase": "Pending", "reason": "x", "qosClass": "Burstable"}), json!({"phase": "Running"})),
            Some(json!({"phase": "Running", "reason": null}))
        );
        assert_eq!(
            patch(json!({"podIPs": [{"ip": "a"}]}), json!({"podIPs": [{"ip": "b"}]})),
            Some(json!({"podIPs": [{"$patch": "replace"}, {"ip": "b"}]}))
        );
    }

    #[test]
    fn conditions_of_others_stay() {
        let old = json!({"conditions": [
            {"type": "example.com/gate", "status": "True"}, {"type": "PodResizePending", "status": "True"},
            {"type": "Ready", "status": "False", "reason": "ContainersNotReady"}, {"type": "Initialized", "status": "True"}]});
        let new =
            json!({"conditions": [{"type": "Ready", "status": "True"}, {"type": "Initialized", "status": "True"}]});
        let expect = json!({"conditions": [
            {"type": "Ready", "status": "True", "reason": null}, {"$patch": "delete", "type": "PodResizePending"}]});
        assert_eq!(patch(old, new), Some(expect));
        assert_eq!(patch(json!({"conditions": [{"type": "x", "status": "True"}]}), json!({})), None);
    }

    #[test]
    fn the_end_is_for_ever() {
        for phase in ["Succeeded", "Failed"] {
            assert_eq!(patch(json!({"phase": phase}), json!({"phase": "Running"})), None);
            assert_eq!(
                patch(json!({"phase": phase}), json!({"phase": "Pending", "message": "m"})),
                Some(json!({"message": "m"}))
            );
        }
    }

    #[test]
    fn what_is_urgent() {
        let container = |state: Value| json!([{"name": "c", "ready": false, "restartCount": 0, "image": "", "imageID": "", "state": state}]);
        let check = |old: Value, new: Value, expect: bool| {
            assert_eq!(is_urgent(&status(old.clone()), &status(new.clone())), expect, "{old} {new}");
        };
        let waiting = || container(json!({"waiting": {"reason": "ContainerCreating"}}));
        let pending = || json!({"phase": "Pending", "containerStatuses": waiting()});
        check(json!({"phase": "Pending"}), pending(), false);
        let not_ready = json!([{"type": "Ready", "status": "False"}]);
        check(
            pending(),
            json!({"phase": "Pending", "containerStatuses": waiting(), "podIP": "1", "conditions": not_ready}),
            false,
        );
        let running = json!({"phase": "Running", "containerStatuses": container(json!({"running": {}}))});
        check(pending(), running.clone(), true);
        check(
            running.clone(),
            json!({"phase": "Running", "containerStatuses": container(json!({"terminated": {"exitCode": 1}}))}),
            true,
        );
        let ready = json!([{"type": "Ready", "status": "True"}]);
        check(json!({"phase": "Running"}), json!({"phase": "Running", "conditions": ready}), true);
        check(running.clone(), running, false);
    }
}
