//! ReplicaSets: as many pods as asked for.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{ReplicaSet, ReplicaSetStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;

use super::common::{
    available_at, count, is_active, is_available, is_ready, is_terminating, owned, pod_from_template, rank_for_deletion,
};
use super::{Change, Plan};
use crate::Key;
use crate::manifests::Kind;

/// How many pods are made in one step; the next pass makes more.
const BURST: usize = 500;

pub(crate) fn reconcile(set: &ReplicaSet, pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let pods = owned(pods, &set.metadata);
    let mut active: Vec<_> = pods.iter().filter(|pod| is_active(pod)).cloned().collect();
    let desired = usize::try_from(set.spec.replicas.unwrap_or(1)).unwrap_or(0);
    if let Some(template) = set.spec.template.as_ref().filter(|_| active.len() < desired) {
        for _ in 0..(desired - active.len()).min(BURST) {
            plan.push(Change::Create(pod_from_template(set, template).into_any()));
        }
    } else if active.len() > desired {
        rank_for_deletion(&mut active);
        for pod in &active[..active.len() - desired] {
            plan.push(Change::EndPod { key: Key::of(&pod.metadata), grace_s: None });
        }
    }
    report(set, &pods, now, &mut plan);
    plan
}

fn report(set: &ReplicaSet, pods: &[Arc<Pod>], now: Timestamp, plan: &mut Plan) {
    let min_ready = set.spec.min_ready_seconds.unwrap_or(0);
    let active = || pods.iter().filter(|pod| is_active(pod));
    for at in active().filter_map(|pod| available_at(pod, min_ready)).filter(|at| *at > now && min_ready > 0) {
        plan.wake_at(at);
    }
    let status = ReplicaSetStatus {
        replicas: count(active()),
        fully_labeled_replicas: Some(count(active())),
        ready_replicas: Some(count(active().filter(|pod| is_ready(pod)))),
        available_replicas: Some(count(active().filter(|pod| is_available(pod, min_ready, now)))),
        terminating_replicas: Some(count(pods.iter().filter(|pod| is_terminating(pod)))),
        observed_generation: set.metadata.generation,
        conditions: None,
    };
    if set.status.as_ref() != Some(&status) {
        plan.push(Change::Replace(ReplicaSet { status: Some(status), ..set.clone() }.into_any()));
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::common::tests::{now, object};
    use super::*;
    use crate::manifests::AnyObject;

    fn set(replicas: i32) -> ReplicaSet {
        object(json!({"metadata": {"name": "rs"}, "spec": {"replicas": replicas, "selector": {},
            "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": []}}}}))
    }

    fn pod(name: &str, ready: bool) -> Arc<Pod> {
        let mut pod = pod_from_template(&set(0), &set(0).spec.template.unwrap());
        pod.metadata.name = Some(name.into());
        let status = if ready { "True" } else { "False" };
        pod.status =
            serde_json::from_value(json!({"phase": "Running", "conditions": [{"type": "Ready", "status": status}]}))
                .unwrap();
        Arc::new(pod)
    }

    fn created(plan: &Plan) -> usize {
        plan.changes.iter().filter(|change| matches!(change, Change::Create(_))).count()
    }

    fn ended(plan: &Plan) -> Vec<&str> {
        let ended = plan.changes.iter().filter_map(|change| match change {
            Change::EndPod { key, .. } => Some(key.name()),
            _ => None,
        });
        ended.collect()
    }

    #[test]
    fn pods_are_made_and_given_up() {
        assert_eq!(created(&reconcile(&set(3), &[pod("a", true)], now())), 2);
        let plan = reconcile(&set(1), &[pod("a", true), pod("b", false), pod("c", true)], now());
        assert_eq!(ended(&plan).len(), 2);
        assert_eq!(ended(&plan)[0], "b", "what is not ready goes first");
    }

    #[test]
    fn a_terminating_or_failed_pod_is_replaced() {
        let mut terminating = Pod::clone(&pod("a", true));
        terminating.metadata.deletion_timestamp =
            terminating.metadata.creation_timestamp.clone().or(set(0).metadata.creation_timestamp);
        let mut failed = Pod::clone(&pod("b", true));
        failed.status.as_mut().unwrap().phase = Some("Failed".into());
        let plan = reconcile(&set(2), &[Arc::new(terminating), Arc::new(failed)], now());
        assert_eq!(created(&plan), 2);
    }

    #[test]
    fn the_status_settles() {
        let pods = [pod("a", true), pod("b", false)];
        let plan = reconcile(&set(2), &pods, now());
        let [Change::Replace(AnyObject::ReplicaSet(reported))] = &plan.changes[..] else { panic!("{plan:?}") };
        let status = reported.status.as_ref().unwrap();
        assert_eq!((status.replicas, status.ready_replicas, status.available_replicas), (2, Some(1), Some(1)));
        assert_eq!(reconcile(reported, &pods, now()), Plan::default());
    }
}
