//! Deployments: one ReplicaSet per template, and the way from the old ones to the new one.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentCondition, DeploymentStatus, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use k8s_openapi::jiff::Timestamp;

use super::common::{
    TEMPLATE_HASH, annotation, created, is_terminal, later, name, owned, owned_by, resolve, set, template_hash,
};
use super::{Change, Plan};
use crate::Key;
use crate::manifests::Kind;
use crate::source::{EventKind, event_about};

const REVISION: &str = "deployment.kubernetes.io/revision";
const COMPONENT: &str = "deployment-controller";

/// The ReplicaSets of one Deployment.
struct Sets {
    /// The one whose template is the Deployment's.
    new: Option<Arc<ReplicaSet>>,
    /// The others, oldest first.
    old: Vec<Arc<ReplicaSet>>,
}

pub(crate) fn reconcile(deployment: &Deployment, sets: &[Arc<ReplicaSet>], pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let sets = split(deployment, owned(sets, &deployment.metadata));
    let paused = deployment.spec.paused == Some(true);
    if !paused {
        let recreate = strategy(deployment) == "Recreate";
        match &sets.new {
            None if recreate && !all_gone(&sets.old, pods) => scale_all_down(deployment, &sets.old, &mut plan),
            None => create_new(deployment, &sets, &mut plan),
            Some(new) if recreate => roll_recreate(deployment, new, &sets.old, pods, &mut plan),
            Some(new) => roll(deployment, new, &sets.old, &mut plan),
        }
        clean_up(deployment, &sets, &mut plan);
    } else if let Some(latest) = sets.new.as_ref().or(sets.old.last()) {
        scale(deployment, latest, desired(deployment), &mut plan);
    }
    report(deployment, &sets, now, &mut plan);
    plan
}

fn split(deployment: &Deployment, mut sets: Vec<Arc<ReplicaSet>>) -> Sets {
    sets.sort_by_key(|set| (created(&set.metadata), revision(set)));
    let position = sets.iter().position(|set| same_template(set, &deployment.spec.template));
    let new = position.map(|position| sets.remove(position));
    Sets { new, old: sets }
}

fn same_template(set: &ReplicaSet, template: &PodTemplateSpec) -> bool {
    let Some(mut own) = set.spec.template.clone() else { return false };
    if let Some(labels) = own.metadata.as_mut().and_then(|metadata| metadata.labels.as_mut()) {
        labels.remove(TEMPLATE_HASH);
    }
    own == *template
}

fn strategy(deployment: &Deployment) -> &str {
    let strategy = deployment.spec.strategy.as_ref().and_then(|strategy| strategy.type_.as_deref());
    strategy.unwrap_or("RollingUpdate")
}

fn desired(deployment: &Deployment) -> i32 {
    deployment.spec.replicas.unwrap_or(1)
}

fn replicas(set: &ReplicaSet) -> i32 {
    set.spec.replicas.unwrap_or(1)
}

fn available(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|status| status.available_replicas).unwrap_or(0)
}

fn revision(set: &ReplicaSet) -> i64 {
    annotation(&set.metadata, REVISION).and_then(|text| text.parse().ok()).unwrap_or(0)
}

/// Pods above and below the desired number that a roll-out may use. Both zero would never move, so one may be missing.
fn bounds(deployment: &Deployment) -> (i32, i32) {
    let rolling = deployment.spec.strategy.as_ref().and_then(|strategy| strategy.rolling_update.as_ref());
    let total = desired(deployment);
    let surge = resolve(rolling.and_then(|rolling| rolling.max_surge.as_ref()), total, true);
    let unavailable = resolve(rolling.and_then(|rolling| rolling.max_unavailable.as_ref()), total, false);
    match (surge, unavailable) {
        (0, 0) => (0, 1),
        (surge, unavailable) => (surge, unavailable.min(total)),
    }
}

fn create_new(deployment: &Deployment, sets: &Sets, plan: &mut Plan) {
    let total: i32 = sets.old.iter().map(|set| replicas(set)).sum();
    let (surge, _) = bounds(deployment);
    let room = (desired(deployment) + surge - total).max(0);
    let first = if sets.old.is_empty() { desired(deployment) } else { room.min(desired(deployment)) };
    let set = new_set(deployment, sets, first);
    plan.event(scaling_event(deployment, name(&set.metadata), 0, first));
    plan.push(Change::Create(set.into_any()));
}

fn new_set(deployment: &Deployment, sets: &Sets, replicas: i32) -> ReplicaSet {
    let hash = template_hash(&deployment.spec.template);
    let mut template = deployment.spec.template.clone();
    let metadata = template.metadata.get_or_insert_default();
    set(&mut metadata.labels, TEMPLATE_HASH, hash.as_str());
    let mut selector = deployment.spec.selector.clone();
    set(&mut selector.match_labels, TEMPLATE_HASH, hash.as_str());
    let revision = 1 + sets.old.iter().map(|set| self::revision(set)).max().unwrap_or(0);
    let metadata = ObjectMeta {
        name: Some(format!("{}-{hash}", name(&deployment.metadata))),
        namespace: deployment.metadata.namespace.clone(),
        labels: metadata.labels.clone(),
        annotations: Some([(REVISION.into(), revision.to_string())].into()),
        owner_references: Some(owned_by(deployment)),
        ..ObjectMeta::default()
    };
    let min_ready_seconds = deployment.spec.min_ready_seconds;
    let spec = ReplicaSetSpec { replicas: Some(replicas), min_ready_seconds, selector, template: Some(template) };
    ReplicaSet { metadata, spec, status: None }
}

/// One step of a rolling update: the new set may grow into the surge, the old ones shrink as far as availability allows.
fn roll(deployment: &Deployment, new: &ReplicaSet, old: &[Arc<ReplicaSet>], plan: &mut Plan) {
    let (surge, max_unavailable) = bounds(deployment);
    let desired = desired(deployment);
    let old_total: i32 = old.iter().map(|set| replicas(set)).sum();
    let total = old_total + replicas(new);
    let target = match replicas(new) {
        current if current > desired => desired,
        current => current + (desired + surge - total).clamp(0, desired - current),
    };
    scale(deployment, new, target, plan);
    if old_total > 0 {
        let new_unavailable = replicas(new) - available(new);
        let may_go = total - (desired - max_unavailable) - new_unavailable;
        shrink_old(deployment, new, old, may_go, desired - max_unavailable, plan);
    }
}

/// First the old replicas that serve nobody, then healthy ones while enough remain.
fn shrink_old(
    deployment: &Deployment,
    new: &ReplicaSet,
    old: &[Arc<ReplicaSet>],
    may_go: i32,
    minimum: i32,
    plan: &mut Plan,
) {
    let mut budget = may_go.max(0);
    let mut targets: Vec<i32> = old.iter().map(|set| replicas(set)).collect();
    for (set, target) in old.iter().zip(&mut targets) {
        let unhealthy = (replicas(set) - available(set)).clamp(0, budget);
        *target -= unhealthy;
        budget -= unhealthy;
    }
    let serving: i32 = available(new) + old.iter().map(|set| available(set)).sum::<i32>();
    let mut spare = (serving - minimum).clamp(0, budget);
    for target in &mut targets {
        let healthy = (*target).min(spare);
        *target -= healthy;
        spare -= healthy;
    }
    for (set, target) in old.iter().zip(targets) {
        scale(deployment, set, target, plan);
    }
}

fn roll_recreate(
    deployment: &Deployment,
    new: &ReplicaSet,
    old: &[Arc<ReplicaSet>],
    pods: &[Arc<Pod>],
    plan: &mut Plan,
) {
    match all_gone(old, pods) {
        true => scale(deployment, new, desired(deployment), plan),
        false => scale_all_down(deployment, old, plan),
    }
}

fn scale_all_down(deployment: &Deployment, sets: &[Arc<ReplicaSet>], plan: &mut Plan) {
    sets.iter().for_each(|set| scale(deployment, set, 0, plan));
}

/// Whether no pod of these sets runs any more, not even one that is ending.
fn all_gone(sets: &[Arc<ReplicaSet>], pods: &[Arc<Pod>]) -> bool {
    let runs = |set: &Arc<ReplicaSet>| owned(pods, &set.metadata).iter().any(|pod| !is_terminal(pod));
    sets.iter().all(|set| replicas(set) == 0 && !runs(set))
}

fn scale(deployment: &Deployment, set: &ReplicaSet, target: i32, plan: &mut Plan) {
    let current = replicas(set);
    if current == target {
        return;
    }
    let mut scaled = set.clone();
    scaled.spec.replicas = Some(target);
    plan.event(scaling_event(deployment, name(&set.metadata), current, target));
    plan.push(Change::Replace(scaled.into_any()));
}

fn scaling_event(deployment: &Deployment, set: &str, from: i32, to: i32) -> k8s_openapi::api::core::v1::Event {
    let direction = if to >= from { "up" } else { "down" };
    let message = format!("Scaled {direction} replica set {set} from {from} to {to}");
    event_about(deployment, EventKind::Normal, "ScalingReplicaSet", message, COMPONENT)
}

/// Old sets without pods are kept for a roll-back, but not more than `revisionHistoryLimit`.
fn clean_up(deployment: &Deployment, sets: &Sets, plan: &mut Plan) {
    let limit = usize::try_from(deployment.spec.revision_history_limit.unwrap_or(10)).unwrap_or(0);
    let empty =
        |set: &&Arc<ReplicaSet>| replicas(set) == 0 && set.status.as_ref().is_none_or(|status| status.replicas == 0);
    let surplus = sets.old.len().saturating_sub(limit);
    for set in sets.old.iter().filter(empty).take(surplus) {
        plan.push(Change::Remove("ReplicaSet", Key::of(&set.metadata)));
    }
}

fn report(deployment: &Deployment, sets: &Sets, now: Timestamp, plan: &mut Plan) {
    let all = || sets.old.iter().chain(&sets.new);
    let sum = |field: fn(&ReplicaSet) -> i32| all().map(|set| field(set)).sum::<i32>();
    let counted = sum(|set| set.status.as_ref().map_or(0, |status| status.replicas));
    let available = sum(available);
    let updated = sets.new.as_ref().and_then(|set| set.status.as_ref()).map_or(0, |status| status.replicas);
    let ready = sum(|set| set.status.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0));
    let terminating = sum(|set| set.status.as_ref().and_then(|status| status.terminating_replicas).unwrap_or(0));
    let old = deployment.status.clone().unwrap_or_default();
    let mut status = DeploymentStatus {
        replicas: Some(counted),
        updated_replicas: Some(updated),
        ready_replicas: Some(ready),
        available_replicas: Some(available),
        unavailable_replicas: Some((sum(replicas) - available).max(0)),
        terminating_replicas: Some(terminating),
        observed_generation: deployment.metadata.generation,
        ..old.clone()
    };
    let progressed = status != old;
    let conditions = status.conditions.get_or_insert_default();
    let (_, max_unavailable) = bounds(deployment);
    set_condition(conditions, availability(available >= desired(deployment) - max_unavailable), now, false);
    if let Some(new) = &sets.new {
        let complete = updated == desired(deployment) && available >= desired(deployment) && counted == updated;
        let condition = progress(deployment, name(&new.metadata), complete, progressed, conditions, now, plan);
        set_condition(conditions, condition, now, progressed);
    }
    let revision = sets.new.as_ref().map(|set| self::revision(set).to_string());
    let known = annotation(&deployment.metadata, REVISION).map(str::to_owned);
    if status != old || revision.as_ref().is_some_and(|revision| Some(revision) != known.as_ref()) {
        let mut reported = Deployment { status: Some(status), ..deployment.clone() };
        if let Some(revision) = revision {
            set(&mut reported.metadata.annotations, REVISION, revision);
        }
        plan.push(Change::Replace(reported.into_any()));
    }
}

type Verdict = (&'static str, bool, &'static str, String);

fn availability(enough: bool) -> Verdict {
    match enough {
        true => ("Available", true, "MinimumReplicasAvailable", "Deployment has minimum availability.".into()),
        false => {
            ("Available", false, "MinimumReplicasUnavailable", "Deployment does not have minimum availability.".into())
        }
    }
}

fn progress(
    deployment: &Deployment,
    set: &str,
    complete: bool,
    progressed: bool,
    conditions: &[DeploymentCondition],
    now: Timestamp,
    plan: &mut Plan,
) -> Verdict {
    if complete {
        let message = format!("ReplicaSet \"{set}\" has successfully progressed.");
        return ("Progressing", true, "NewReplicaSetAvailable", message);
    }
    let known = conditions.iter().find(|condition| condition.type_.as_deref() == Some("Progressing"));
    let since = known.and_then(|condition| condition.last_update_time.as_ref()).map_or(now, |time| time.0);
    let since = if progressed { now } else { since };
    let was_done = known.is_some_and(|condition| condition.reason.as_deref() == Some("NewReplicaSetAvailable"));
    let deadline = later(since, i64::from(deployment.spec.progress_deadline_seconds.unwrap_or(600)));
    if deadline <= now && !was_done {
        let message = format!("ReplicaSet \"{set}\" has timed out progressing.");
        return ("Progressing", false, "ProgressDeadlineExceeded", message);
    }
    if !was_done {
        plan.wake_at(deadline);
    }
    ("Progressing", true, "ReplicaSetUpdated", format!("ReplicaSet \"{set}\" is progressing."))
}

fn set_condition(conditions: &mut Vec<DeploymentCondition>, verdict: Verdict, now: Timestamp, touch: bool) {
    let (kind, status, reason, message) = verdict;
    let status = if status { "True" } else { "False" };
    let position = conditions.iter().position(|condition| condition.type_.as_deref() == Some(kind));
    let known = position.map(|position| &conditions[position]);
    let same_status = known.is_some_and(|condition| condition.status.as_deref() == Some(status));
    let same = same_status && known.is_some_and(|condition| condition.reason.as_deref() == Some(reason));
    if same && !touch {
        return;
    }
    let since = known.filter(|_| same_status).and_then(|condition| condition.last_transition_time.clone());
    let condition = DeploymentCondition {
        type_: Some(kind.into()),
        status: Some(status.into()),
        reason: Some(reason.into()),
        message: Some(message),
        last_update_time: Some(Time(now)),
        last_transition_time: Some(since.unwrap_or(Time(now))),
    };
    match position {
        Some(position) => conditions[position] = condition,
        None => conditions.push(condition),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::super::common::tests::{now, object};
    use super::*;
    use crate::manifests::AnyObject;

    fn deployment(replicas: i32, image: &str, strategy: serde_json::Value) -> Deployment {
        object(
            json!({"metadata": {"name": "web", "generation": 1}, "spec": {"replicas": replicas, "strategy": strategy,
            "selector": {"matchLabels": {"a": "b"}},
            "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": image}]}}}}),
        )
    }

    fn rolling(surge: serde_json::Value, unavailable: serde_json::Value) -> serde_json::Value {
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}})
    }

    /// Carries out a plan on the sets, as if pods followed at once; `healthy` says which templates become available.
    fn carry_out(
        deployment: &mut Deployment,
        sets: &mut Vec<Arc<ReplicaSet>>,
        plan: Plan,
        healthy: impl Fn(&ReplicaSet) -> bool,
    ) {
        for change in plan.changes {
            match change {
                Change::Create(AnyObject::ReplicaSet(mut set)) => {
                    set.metadata.uid = Some(format!("uid-{}", name(&set.metadata)));
                    set.metadata.creation_timestamp = Some(Time(later(now(), i64::try_from(sets.len()).unwrap())));
                    sets.push(Arc::new(*set));
                }
                Change::Replace(AnyObject::ReplicaSet(set)) => {
                    let known = sets.iter_mut().find(|known| known.metadata.name == set.metadata.name).unwrap();
                    *known = Arc::new(*set);
                }
                Change::Replace(AnyObject::Deployment(new)) => *deployment = *new,
                Change::Remove("ReplicaSet", key) => sets.retain(|set| Key::of(&set.metadata) != key),
                Change::Event(_) => {}
                other => panic!("{other:?}"),
            }
        }
        for set in sets {
            let mut new = ReplicaSet::clone(set);
            let available = if healthy(&new) { new.spec.replicas } else { Some(0) };
            new.status = Some(k8s_openapi::api::apps::v1::ReplicaSetStatus {
                replicas: new.spec.replicas.unwrap(),
                available_replicas: available,
                ready_replicas: available,
                ..Default::default()
            });
            *set = Arc::new(new);
        }
    }

    fn sizes(sets: &[Arc<ReplicaSet>]) -> Vec<i32> {
        sets.iter().map(|set| replicas(set)).collect()
    }

    #[test]
    fn a_first_deployment_makes_its_set() {
        let mut d = deployment(2, "i:1", json!({}));
        let mut sets = Vec::new();
        let plan = reconcile(&d, &sets, &[], now());
        carry_out(&mut d, &mut sets, plan, |_| true);
        assert_eq!(sizes(&sets), [2]);
        let hash = template_hash(&d.spec.template);
        assert_eq!(sets[0].metadata.name, Some(format!("web-{hash}")));
        assert_eq!(sets[0].spec.selector.match_labels.as_ref().unwrap()[TEMPLATE_HASH], hash);
        let plan = reconcile(&d, &sets, &[], now());
        carry_out(&mut d, &mut sets, plan, |_| true);
        assert_eq!(reconcile(&d, &sets, &[], now()), Plan::default());
        let conditions = d.status.unwrap().conditions.unwrap();
        assert!(conditions.iter().all(|condition| condition.status.as_deref() == Some("True")), "{conditions:?}");
    }

    #[test]
    fn a_broken_image_stops_the_roll_out() {
        let mut d = deployment(4, "i:1", rolling(json!("25%"), json!("25%")));
        let mut sets = Vec::new();
        for _ in 0..3 {
            let plan = reconcile(&d, &sets, &[], now());
            carry_out(&mut d, &mut sets, plan, |_| true);
        }
        d.spec.template = deployment(4, "i:broken", json!({})).spec.template;
        let good = sets[0].metadata.name.clone();
        for _ in 0..10 {
            let plan = reconcile(&d, &sets, &[], now());
            carry_out(&mut d, &mut sets, plan, |set| set.metadata.name == good);
        }
        assert_eq!(sizes(&sets), [3, 2], "3 of 4 keep serving, one above");
        d.spec.template = deployment(4, "i:1", json!({})).spec.template;
        for _ in 0..10 {
            let plan = reconcile(&d, &sets, &[], now());
            carry_out(&mut d, &mut sets, plan, |set| set.metadata.name == good);
        }
        assert_eq!(sizes(&sets), [4, 0], "the old template comes back in its own set");
    }

    #[test]
    fn recreate_waits_for_the_old_pods() {
        let mut d = deployment(1, "i:1", json!({"type": "Recreate"}));
        let mut sets = Vec::new();
        let plan = reconcile(&d, &sets, &[], now());
        carry_out(&mut d, &mut sets, plan, |_| true);
        let pod = Arc::new(super::super::common::pod_from_template(&*sets[0], &d.spec.template));
        d.spec.template = deployment(1, "i:2", json!({})).spec.template;
        let plan = reconcile(&d, &sets, std::slice::from_ref(&pod), now());
        carry_out(&mut d, &mut sets, plan, |_| true);
        assert_eq!(sizes(&sets), [0]);
        let plan = reconcile(&d, &sets, &[pod], now());
        carry_out(&mut d, &mut sets, plan, |_| true);
        assert_eq!(sizes(&sets), [0], "its pod is still ending");
        let plan = reconcile(&d, &sets, &[], now());
        carry_out(&mut d, &mut sets, plan, |_| true);
        assert_eq!(sizes(&sets), [0, 1]);
    }

    #[test]
    fn no_progress_is_reported_after_the_deadline() {
        let mut d = deployment(1, "i:1", json!({}));
        d.spec.progress_deadline_seconds = Some(60);
        let mut sets = Vec::new();
        for _ in 0..3 {
            let plan = reconcile(&d, &sets, &[], now());
            carry_out(&mut d, &mut sets, plan, |_| false);
        }
        let plan = reconcile(&d, &sets, &[], now());
        assert_eq!(plan.due, Some(later(now(), 60)));
        let plan = reconcile(&d, &sets, &[], later(now(), 61));
        carry_out(&mut d, &mut sets, plan, |_| false);
        let conditions = d.status.unwrap().conditions.unwrap();
        let progressing = conditions.iter().find(|c| c.type_.as_deref() == Some("Progressing")).unwrap();
        assert_eq!(progressing.reason.as_deref(), Some("ProgressDeadlineExceeded"));
    }

    proptest! {
        /// Whatever the numbers, a roll-out ends, never exceeds its surge, and never serves with less than it promised.
        #[test]
        fn a_roll_out_keeps_its_bounds(count in 1..8i32, surge in 0..4i32, unavailable in 0..4i32) {
            let strategy = rolling(json!(surge), json!(unavailable));
            let mut d = deployment(count, "i:1", strategy);
            let mut sets = Vec::new();
            for _ in 0..3 {
                let plan = reconcile(&d, &sets, &[], now());
                carry_out(&mut d, &mut sets, plan, |_| true);
            }
            d.spec.template = deployment(count, "i:2", json!({})).spec.template;
            let (surge, unavailable) = bounds(&d);
            for _ in 0..40 {
                let plan = reconcile(&d, &sets, &[], now());
                carry_out(&mut d, &mut sets, plan, |_| true);
                let total: i32 = sizes(&sets).iter().sum();
                prop_assert!(total <= count + surge, "{:?}", sizes(&sets));
                prop_assert!(total >= count - unavailable, "{:?}", sizes(&sets));
            }
            prop_assert_eq!(sizes(&sets), vec![0, count]);
        }
    }
}
