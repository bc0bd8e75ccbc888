//! Jobs: pods until enough have succeeded, or too many have failed.

use std::sync::Arc;

use k8s_openapi::api::batch::v1::{Job, JobCondition, JobSpec, JobStatus};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::common::{
    count, created, is_active, is_ready, is_terminating, later, name, owned, phase, pod_from_template, set,
};
use super::{Change, Plan};
use crate::Key;
use crate::manifests::Kind;
use crate::source::{EventKind, event_about};

/// The first delay after a failure and the longest one, in seconds (upstream's `DefaultJobPodFailureBackOff`).
const BACKOFF_S: i64 = 10;
const BACKOFF_MAX_S: i64 = 600;
const COMPONENT: &str = "job-controller";

pub(crate) fn reconcile(job: &Job, pods: &[Arc<Pod>], now: Timestamp) -> Plan {
    let mut plan = Plan::default();
    let Some(spec) = &job.spec else { return plan };
    if let Some(finished) = finished_at(job) {
        expire(job, finished, now, &mut plan);
        return plan;
    }
    let pods = owned(pods, &job.metadata);
    let of = |wanted: &str| pods.iter().filter(|pod| phase(pod) == wanted).count();
    let (succeeded, failed) = (of("Succeeded"), of("Failed"));
    let active: Vec<_> = pods.iter().filter(|pod| is_active(pod)).cloned().collect();
    let mut status = JobStatus {
        active: Some(count(&active)),
        ready: Some(count(active.iter().filter(|pod| is_ready(pod)))),
        succeeded: Some(i32::try_from(succeeded).unwrap_or(i32::MAX)),
        failed: Some(i32::try_from(failed).unwrap_or(i32::MAX)),
        terminating: Some(count(pods.iter().filter(|pod| is_terminating(pod)))),
        start_time: Some(job.status.as_ref().and_then(|status| status.start_time.clone()).unwrap_or(Time(now))),
        ..job.status.clone().unwrap_or_default()
    };
    let limit = usize::try_from(spec.backoff_limit.unwrap_or(6)).unwrap_or(usize::MAX);
    let deadline = spec.active_deadline_seconds.and_then(|s| status.start_time.as_ref().map(|time| later(time.0, s)));
    // Without `completions` it is a work queue: one success ends it once nothing runs any more.
    let wanted = spec.completions.map(|wanted| usize::try_from(wanted).unwrap_or(0));
    let complete = wanted.map_or(succeeded > 0 && active.is_empty(), |wanted| succeeded >= wanted);
    if complete {
        finish(job, &mut status, now, "Complete", "Completed", "Job completed", &mut plan);
    } else if failed > limit || is_past_limit_by_restarts(spec, &active) {
        let message = "Job has reached the specified backoff limit";
        finish(job, &mut status, now, "Failed", "BackoffLimitExceeded", message, &mut plan);
        end_all(&active, &mut plan);
    } else if deadline.is_some_and(|deadline| deadline <= now) {
        let message = "Job was active longer than specified deadline";
        finish(job, &mut status, now, "Failed", "DeadlineExceeded", message, &mut plan);
        end_all(&active, &mut plan);
    } else if spec.suspend == Some(true) {
        end_all(&active, &mut plan);
    } else {
        deadline.into_iter().for_each(|deadline| plan.wake_at(deadline));
        let parallel = usize::try_from(spec.parallelism.unwrap_or(1)).unwrap_or(0);
        let room = match wanted {
            Some(wanted) => parallel.min(wanted - succeeded),
            None if succeeded > 0 => 0,
            None => parallel,
        };
        make_pods(job, &pods, room.saturating_sub(active.len()), failed, now, &mut plan);
    }
    if job.status.as_ref() != Some(&status) {
        plan.push(Change::Replace(Job { status: Some(status), ..job.clone() }.into_any()));
    }
    plan
}

/// Whether the containers of pods that restart them by themselves (`OnFailure`) were restarted too often.
fn is_past_limit_by_restarts(spec: &JobSpec, active: &[Arc<Pod>]) -> bool {
    let policy = spec.template.spec.as_ref().and_then(|pod| pod.restart_policy.as_deref());
    if policy != Some("OnFailure") {
        return false;
    }
    let statuses = active.iter().filter_map(|pod| pod.status.as_ref());
    let containers = statuses.flat_map(|status| [&status.init_container_statuses, &status.container_statuses]);
    let restarts: i32 = containers.flatten().flatten().map(|container| container.restart_count).sum();
    restarts >= spec.backoff_limit.unwrap_or(6).max(1)
}

fn make_pods(job: &Job, pods: &[Arc<Pod>], missing: usize, failed: usize, now: Timestamp, plan: &mut Plan) {
    let Some(spec) = job.spec.as_ref().filter(|_| missing > 0) else { return };
    if failed > 0 {
        let last = pods.iter().filter(|pod| phase(pod) == "Failed").filter_map(|pod| ended_at(pod)).max();
        let exponent = u32::try_from(failed - 1).unwrap_or(u32::MAX).min(10);
        let delay = (BACKOFF_S << exponent).min(BACKOFF_MAX_S);
        let due = last.map(|last| later(last, delay));
        if let Some(due) = due.filter(|due| *due > now) {
            return plan.wake_at(due);
        }
    }
    for _ in 0..missing {
        let mut pod = pod_from_template(job, &spec.template);
        set(&mut pod.metadata.labels, "batch.kubernetes.io/job-name", name(&job.metadata));
        set(&mut pod.metadata.labels, "job-name", name(&job.metadata));
        plan.push(Change::Create(pod.into_any()));
    }
}

/// When a pod's last container ended, or when it was made.
fn ended_at(pod: &Pod) -> Option<Timestamp> {
    let statuses = pod.status.as_ref()?.container_statuses.iter().flatten();
    let ends = statuses.filter_map(|status| status.state.as_ref()?.terminated.as_ref()?.finished_at.as_ref());
    ends.map(|time| time.0).max().or_else(|| Some(created(&pod.metadata)))
}

fn end_all(pods: &[Arc<Pod>], plan: &mut Plan) {
    for pod in pods {
        plan.push(Change::EndPod { key: Key::of(&pod.metadata), grace_s: None });
    }
}

fn finish(
    job: &Job,
    status: &mut JobStatus,
    now: Timestamp,
    kind: &str,
    reason: &'static str,
    message: &str,
    plan: &mut Plan,
) {
    let condition = JobCondition {
        type_: kind.into(),
        status: "True".into(),
        reason: Some(reason.into()),
        message: Some(message.into()),
        last_probe_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    };
    status.conditions.get_or_insert_default().push(condition);
    let complete = kind == "Complete";
    status.completion_time = complete.then_some(Time(now));
    let severity = if complete { EventKind::Normal } else { EventKind::Warning };
    plan.event(event_about(job, severity, reason, message, COMPONENT));
}

fn finished_at(job: &Job) -> Option<Timestamp> {
    let conditions = job.status.as_ref()?.conditions.iter().flatten();
    let mut over = conditions.filter(|one| matches!(one.type_.as_str(), "Complete" | "Failed") && one.status == "True");
    over.next().and_then(|one| one.last_transition_time.as_ref()).map(|time| time.0)
}

fn expire(job: &Job, finished: Timestamp, now: Timestamp, plan: &mut Plan) {
    let Some(seconds) = job.spec.as_ref().and_then(|spec| spec.ttl_seconds_after_finished) else { return };
    let due = later(finished, seconds.into());
    if due <= now {
        plan.push(Change::Remove("Job", Key::of(&job.metadata)));
    } else {
        plan.wake_at(due);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::common::tests::{now, object};
    use super::*;

    fn job(completions: i32, parallelism: i32) -> Job {
        object(json!({"metadata": {"name": "j"}, "spec": {"completions": completions, "parallelism": parallelism,
            "backoffLimit": 1, "template": {"spec": {"restartPolicy": "Never", "containers": []}}}}))
    }

    fn pods(phases: &[&str]) -> Vec<Arc<Pod>> {
        let one = |phase: &&str| {
            let mut pod = pod_from_template(&job(1, 1), &job(1, 1).spec.unwrap().template);
            pod.metadata.name = Some("p".into());
            pod.metadata.creation_timestamp = Some(Time(now()));
            pod.status = serde_json::from_value(json!({"phase": phase})).unwrap();
            Arc::new(pod)
        };
        phases.iter().map(one).collect()
    }

    fn created(plan: &Plan) -> usize {
        plan.changes.iter().filter(|change| matches!(change, Change::Create(_))).count()
    }

    fn condition(plan: &Plan) -> Option<String> {
        plan.changes.iter().find_map(|change| match change {
            Change::Replace(crate::manifests::AnyObject::Job(job)) => {
                job.status.as_ref()?.conditions.as_ref()?.last().map(|last| last.type_.clone())
            }
            _ => None,
        })
    }

    #[test]
    fn as_many_as_allowed_until_enough() {
        assert_eq!(created(&reconcile(&job(5, 2), &[], now())), 2);
        assert_eq!(created(&reconcile(&job(5, 2), &pods(&["Running", "Succeeded"]), now())), 1);
        assert_eq!(created(&reconcile(&job(3, 5), &pods(&["Succeeded", "Succeeded"]), now())), 1);
        let plan = reconcile(&job(1, 1), &pods(&["Succeeded"]), now());
        assert_eq!((created(&plan), condition(&plan).as_deref()), (0, Some("Complete")));
    }

    #[test]
    fn failures_delay_and_then_end_it() {
        let plan = reconcile(&job(1, 1), &pods(&["Failed"]), later(now(), 1));
        assert_eq!((created(&plan), plan.due), (0, Some(later(now(), 10))));
        assert_eq!(created(&reconcile(&job(1, 1), &pods(&["Failed"]), later(now(), 10))), 1);
        let plan = reconcile(&job(1, 1), &pods(&["Failed", "Failed"]), later(now(), 99));
        assert_eq!((created(&plan), condition(&plan).as_deref()), (0, Some("Failed")));
    }

    #[test]
    fn restarts_within_a_pod_count_as_failures() {
        let mut job = job(1, 1);
        job.spec.as_mut().unwrap().template.spec.as_mut().unwrap().restart_policy = Some("OnFailure".into());
        let restarted = |count: i32| {
            let mut pod = pods(&["Running"]).remove(0);
            let statuses = json!([{ "name": "c", "restartCount": count, "ready": false, "image": "", "imageID": "" }]);
            let status = json!({ "phase": "Running", "containerStatuses": statuses });
            Arc::get_mut(&mut pod).unwrap().status = serde_json::from_value(status).unwrap();
            condition(&reconcile(&job, &[pod], now()))
        };
        assert_eq!([restarted(0), restarted(1)], [None, Some("Failed".to_owned())]);
    }
}
