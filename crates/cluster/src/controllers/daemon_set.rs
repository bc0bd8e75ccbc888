//! DaemonSets: one pod on this node.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetStatus};
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::jiff::Timestamp;

use super::common::{
    count, created, is_available, is_ready, is_terminating, label, later, owned, phase, pod_from_template, resolve,
    set, template_hash,
};
use super::{Change, Plan};
use crate::Key;
use crate::manifests::Kind;
use crate::source::{EventKind, event_about};

const HASH: &str = "controller-revision-hash";
/// How long a failed pod is left for the operator to look at before it is replaced.
const FAILED_KEEP_S: i64 = 10;

pub(crate) fn reconcile(set: &DaemonSet, pods: &[Arc<Pod>], node: &Node, now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let pods = owned(pods, &set.metadata);
    let hash = template_hash(&set.spec.template);
    let wanted = runs_on(set, node);
    let living: Vec<_> = pods.iter().filter(|pod| !is_terminating(pod)).collect();
    match wanted {
        false => living.iter().for_each(|pod| end(pod, &mut plan)),
        true => keep_one(set, &pods, &living, &hash, now, &mut plan),
    }
    report(set, &pods, &hash, wanted, now, &mut plan);
    plan
}

fn runs_on(set: &DaemonSet, node: &Node) -> bool {
    let wanted = set.spec.template.spec.as_ref().and_then(|spec| spec.node_selector.as_ref());
    let labels = node.metadata.labels.clone().unwrap_or_default();
    wanted.is_none_or(|wanted| super::selector::contains(wanted, &labels))
}

fn end(pod: &Pod, plan: &mut Plan) {
    plan.push(Change::EndPod { key: Key::of(&pod.metadata), grace_s: None });
}

fn keep_one(set: &DaemonSet, all: &[Arc<Pod>], living: &[&Arc<Pod>], hash: &str, now: Timestamp, plan: &mut Plan) {
    let is_new = |pod: &Pod| label(&pod.metadata, HASH) == Some(hash);
    let (failed, running): (Vec<_>, Vec<_>) =
        living.iter().copied().partition(|pod| matches!(phase(pod), "Failed" | "Succeeded"));
    for pod in failed {
        replace_failed(set, pod, now, plan);
    }
    let (new, old): (Vec<_>, Vec<_>) = running.into_iter().partition(|pod| is_new(pod));
    new.iter().skip(1).for_each(|pod| end(pod, plan));
    let on_delete =
        set.spec.update_strategy.as_ref().is_some_and(|strategy| strategy.type_.as_deref() == Some("OnDelete"));
    if on_delete && !old.is_empty() {
        return;
    }
    let min_ready = set.spec.min_ready_seconds.unwrap_or(0);
    let new_serves = new.first().is_some_and(|pod| is_available(pod, min_ready, now));
    if !surges(set) || new_serves {
        old.iter().for_each(|pod| end(pod, plan));
    }
    // Without surge the new pod waits until the old one has left the node: both may claim the same host port.
    let free = if surges(set) { new.is_empty() } else { all.is_empty() };
    if free && new.is_empty() {
        let mut pod = pod_from_template(set, &set.spec.template);
        self::set(&mut pod.metadata.labels, HASH, hash);
        plan.push(Change::Create(pod.into_any()));
    }
}

fn surges(set: &DaemonSet) -> bool {
    let rolling = set.spec.update_strategy.as_ref().and_then(|strategy| strategy.rolling_update.as_ref());
    resolve(rolling.and_then(|rolling| rolling.max_surge.as_ref()), 1, true) > 0
}

fn replace_failed(set: &DaemonSet, pod: &Pod, now: Timestamp, plan: &mut Plan) {
    let at = later(created(&pod.metadata), FAILED_KEEP_S);
    if at > now {
        return plan.wake_at(at);
    }
    let name = super::common::name(&pod.metadata);
    let message = format!("Found failed daemon pod {}, will try to kill it", name);
    plan.event(event_about(set, EventKind::Warning, "FailedDaemonPod", message, "daemonset-controller"));
    end(pod, plan);
}

fn report(set: &DaemonSet, pods: &[Arc<Pod>], hash: &str, wanted: bool, now: Timestamp, plan: &mut Plan) {
    let min_ready = set.spec.min_ready_seconds.unwrap_or(0);
    let living = || pods.iter().filter(|pod| !is_terminating(pod));
    let one = |yes: bool| i32::from(wanted && yes);
    let available = one(living().any(|pod| is_available(pod, min_ready, now)));
    let status = DaemonSetStatus {
        current_number_scheduled: one(living().next().is_some()),
        desired_number_scheduled: one(true),
        number_misscheduled: if wanted { 0 } else { count(living()) },
        number_ready: one(living().any(|pod| is_ready(pod))),
        number_available: Some(available),
        number_unavailable: Some(one(true) - available),
        updated_number_scheduled: Some(one(living().any(|pod| label(&pod.metadata, HASH) == Some(hash)))),
        observed_generation: set.metadata.generation,
        ..DaemonSetStatus::default()
    };
    if set.status.as_ref() != Some(&status) {
        plan.push(Change::Replace(DaemonSet { status: Some(status), ..set.clone() }.into_any()));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::common::tests::{now, object};
    use super::*;
    use crate::manifests::AnyObject;

    fn daemon_set(image: &str) -> DaemonSet {
        object(json!({"metadata": {"name": "d"}, "spec": {"selector": {},
            "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": image}]}}}}))
    }

    fn first_pod(plan: &Plan) -> Option<Pod> {
        plan.changes.iter().find_map(|change| match change {
            Change::Create(AnyObject::Pod(pod)) => Some(Pod::clone(pod)),
            _ => None,
        })
    }

    #[test]
    fn one_pod_runs_and_rolls() {
        let node = Node::default();
        let plan = reconcile(&daemon_set("i:1"), &[], &node, now());
        let mut pod = first_pod(&plan).unwrap();
        pod.metadata.name = Some("d-x".into());
        let pods = [Arc::new(pod.clone())];
        assert!(first_pod(&reconcile(&daemon_set("i:1"), &pods, &node, now())).is_none());

        let plan = reconcile(&daemon_set("i:2"), &pods, &node, now());
        assert!(plan.changes.iter().any(|change| matches!(change, Change::EndPod { .. })));
        assert!(first_pod(&plan).is_none(), "the old pod is still there");
        pod.metadata.deletion_timestamp = daemon_set("").metadata.creation_timestamp;
        assert!(first_pod(&reconcile(&daemon_set("i:2"), &[Arc::new(pod)], &node, now())).is_none());
        assert!(first_pod(&reconcile(&daemon_set("i:2"), &[], &node, now())).is_some());
    }

    #[test]
    fn a_node_selector_keeps_it_away() {
        let mut set = daemon_set("i");
        set.spec.template.spec.as_mut().unwrap().node_selector = Some([("gpu".into(), "yes".into())].into());
        assert!(first_pod(&reconcile(&set, &[], &Node::default(), now())).is_none());
        let node: Node = object(json!({"metadata": {"name": "n", "labels": {"gpu": "yes"}}}));
        assert!(first_pod(&reconcile(&set, &[], &node, now())).is_some());
    }
}
