//! What runs when the daemon begins: sandboxes and containers of the runtime become views of their pods.

use std::collections::HashMap;

use cri::v1;
use k8s_openapi::api::core::v1::Pod;
use pod::spec::Role;
use pod::{Change, Record, Run, Sandbox, View};

use crate::admission::is_static;
use crate::context::{Context, uid_of};
use crate::effects::{addresses, run_of, run_of_now, time};
use crate::generate::label;
use crate::node::shutdown;
use crate::retry::Rests;

/// A pod's remains in the runtime.
#[derive(Debug, Default)]
pub(crate) struct Found {
    pub(crate) sandboxes: Vec<v1::PodSandboxStatus>,
    pub(crate) containers: Vec<v1::ContainerStatus>,
}

/// Everything of pods that the runtime has, by uid. Asks until the runtime answers.
pub(crate) async fn everything(context: &Context) -> HashMap<String, Found> {
    asked(context, HashMap::new()).await
}

/// What the runtime has of one pod. Asks until the runtime answers.
pub(crate) async fn of_pod(context: &Context, uid: &str) -> Found {
    let label = HashMap::from([(label::POD_UID.to_owned(), uid.to_owned())]);
    asked(context, label).await.remove(uid).unwrap_or_default()
}

async fn asked(context: &Context, label_selector: HashMap<String, String>) -> HashMap<String, Found> {
    let mut rests = Rests::new();
    loop {
        match found(context, label_selector.clone()).await {
            Ok(found) => {
                if context.outage.ends() {
                    tracing::info!("the runtime says again what runs");
                }
                return found;
            }
            Err(error) => {
                if context.outage.begins() {
                    tracing::warn!(%error, "the runtime does not say what runs; it is asked until it does");
                }
                rests.rest().await;
            }
        }
    }
}

async fn found(
    context: &Context,
    label_selector: HashMap<String, String>,
) -> Result<HashMap<String, Found>, cri::Error> {
    let runtime = &context.parts.runtime;
    let mut all: HashMap<String, Found> = HashMap::new();
    let filter = v1::PodSandboxFilter { label_selector: label_selector.clone(), ..v1::PodSandboxFilter::default() };
    for sandbox in runtime.list_pod_sandbox(v1::ListPodSandboxRequest { filter: Some(filter) }).await?.items {
        let Some(uid) = sandbox.labels.get(label::POD_UID) else { continue };
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: sandbox.id.clone(), verbose: false };
        if let Ok(v1::PodSandboxStatusResponse { status: Some(status), .. }) = runtime.pod_sandbox_status(request).await
        {
            all.entry(uid.clone()).or_default().sandboxes.push(status);
        }
    }
    let filter = v1::ContainerFilter { label_selector, ..v1::ContainerFilter::default() };
    for container in runtime.list_containers(v1::ListContainersRequest { filter: Some(filter) }).await?.containers {
        let Some(uid) = container.labels.get(label::POD_UID) else { continue };
        let request = v1::ContainerStatusRequest { container_id: container.id.clone(), verbose: false };
        if let Ok(v1::ContainerStatusResponse { status: Some(status), .. }) = runtime.container_status(request).await {
            all.entry(uid.clone()).or_default().containers.push(status);
        }
    }
    Ok(all)
}

/// The view of a pod that this daemon has not seen yet, and what happened to it while no daemon ran.
pub(crate) fn view_of(context: &Context, pod: &Pod, found: Found) -> (View, Vec<Change>) {
    let mut view = View { record: context.records.load(uid_of(pod)).unwrap_or_default(), ..View::default() };
    recall(&mut view.record, pod);
    begin_anew(&mut view.record, pod, found.sandboxes.is_empty());
    let attempt = |sandbox: &v1::PodSandboxStatus| sandbox.metadata.as_ref().map_or(0, |metadata| metadata.attempt);
    if let Some(newest) = found.sandboxes.iter().max_by_key(|sandbox| (attempt(sandbox), sandbox.created_at)) {
        view.record.sandbox_attempt = view.record.sandbox_attempt.max(attempt(newest));
        view.sandbox = if newest.state == v1::PodSandboxState::SandboxReady as i32 {
            Sandbox::Ready { id: newest.id.clone(), addresses: addresses(newest) }
        } else {
            Sandbox::Lost { id: newest.id.clone() }
        };
    }
    let mut changes = Vec::new();
    for (role, name) in pod::spec::names(pod) {
        let of = |status: &&v1::ContainerStatus| name_of(status) == name && !is_created(status);
        let newest = found.containers.iter().filter(of).max_by_key(|status| (attempt_of(status), status.created_at));
        if let Some(status) = newest {
            changes.extend(take_in(context, pod, &mut view, name, status));
        } else if role == Role::Ephemeral {
            recall_ephemeral(&mut view, pod, name);
        }
    }
    let running = view.containers.iter().filter_map(|(name, container)| {
        let running = container.running.as_ref()?;
        Some((name.as_str(), running.id.as_str()))
    });
    context.parts.resources.adopt(uid_of(pod), running);
    (view, changes)
}

/// A pod from a file of the node has ended with the machine, and nobody makes another in its place: it runs again.
fn begin_anew(record: &mut Record, pod: &Pod, nothing_runs: bool) {
    let went_down = record.failed.as_ref().is_some_and(|(reason, _)| reason == shutdown::REASON);
    if went_down && nothing_runs && is_static(pod) {
        (record.failed, record.grace_s, record.disrupted) = (None, None, false);
    }
}

/// What the source was told of the pod goes on from there, should its record be lost.
fn recall(record: &mut Record, pod: &Pod) {
    let Some(status) = &pod.status else { return };
    record.started = record.started.or(status.start_time.as_ref().map(|time| time.0));
    let all = [&status.init_container_statuses, &status.container_statuses];
    for container in all.into_iter().flatten().flatten().filter(|container| container.restart_count > 0) {
        let own = record.containers.entry(container.name.clone()).or_default();
        own.restarts = own.restarts.max(container.restart_count);
    }
}

/// An ephemeral container that has run is over for good, also when its sandbox is gone and the runtime knows it no more.
fn recall_ephemeral(view: &mut View, pod: &Pod, name: &str) {
    let told = pod.status.iter().flat_map(|status| status.ephemeral_container_statuses.iter().flatten());
    let told = told.filter(|status| status.name == name).find_map(|status| status.container_id.as_deref());
    let told = told.map(|id| id.rsplit('/').next().unwrap_or(id).to_owned());
    let record = view.record_of(name);
    if record.probed.is_none() {
        record.probed = told;
    }
    let Some(id) = record.probed.clone() else { return };
    let run = record.last.clone().unwrap_or(Run { id, ..Run::unknown() });
    record.last = Some(run.clone());
    view.container_mut(name).ended = Some(run);
}

/// Puts the newest run of a container into the view; a change when it ended and the record does not know.
fn take_in(context: &Context, pod: &Pod, view: &mut View, name: &str, status: &v1::ContainerStatus) -> Option<Change> {
    let attempt = i32::try_from(attempt_of(status)).unwrap_or(0);
    let record: &mut Record = &mut view.record;
    let own = record.containers.entry(name.to_owned()).or_default();
    own.restarts = own.restarts.max(attempt);
    let started = time(status.started_at).unwrap_or_default();
    let known_end = own.last.as_ref().is_some_and(|last| last.id == status.id);
    // The count is ahead of the run where all containers begin anew: the next run follows none.
    let is_reset = own.restarts > attempt;
    if own.probed.as_ref() != Some(&status.id) {
        own.probed = Some(status.id.clone());
        own.probes = pod::probe::States::default();
    }
    let last = own.last.clone();
    let container = view.container_mut(name);
    container.image_id.clone_from(&status.image_ref);
    if status.state == v1::ContainerState::ContainerRunning as i32 {
        container.running = Some(pod::Running { id: status.id.clone(), started });
        return None;
    }
    if known_end {
        container.ended = last.filter(|_| !is_reset);
        return None;
    }
    container.running = Some(pod::Running { id: status.id.clone(), started });
    Some(Change::Exited { container: name.to_owned(), run: run_of_now(context, pod, status) })
}

/// The end of a container that the view takes for running.
pub(crate) async fn exit_of(context: &Context, pod: &Pod, view: &View, status: &v1::ContainerStatus) -> Option<Change> {
    let name = name_of(status);
    let running = view.running(name).is_some_and(|running| running.id == status.id);
    let exited = status.state == v1::ContainerState::ContainerExited as i32;
    if !(running && exited) {
        return None;
    }
    Some(Change::Exited { container: name.to_owned(), run: run_of(context, pod, status).await })
}

/// The name of a run's container.
pub(crate) fn name_of(status: &v1::ContainerStatus) -> &str {
    status.metadata.as_ref().map_or("", |metadata| metadata.name.as_str())
}

fn attempt_of(status: &v1::ContainerStatus) -> u32 {
    status.metadata.as_ref().map_or(0, |metadata| metadata.attempt)
}

/// Made but never started: a daemon died in between.
fn is_created(status: &v1::ContainerStatus) -> bool {
    status.state == v1::ContainerState::ContainerCreated as i32
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_static_pod_that_ended_with_the_machine_begins_anew() {
        let check = |source: &str, reason: &str, nothing_runs, expect| {
            let annotations = json!({"kubernetes.io/config.source": source});
            let pod: Pod = serde_json::from_value(json!({"metadata": {"annotations": annotations}})).unwrap();
            let failed = Some((reason.to_owned(), String::new()));
            let mut record = Record { failed, grace_s: Some(1), disrupted: true, ..Record::default() };
            begin_anew(&mut record, &pod, nothing_runs);
            assert_eq!(record == Record::default(), expect, "{source} {reason} {nothing_runs}");
        };
        check("file", "Terminated", true, true);
        check("file", "Terminated", false, false);
        check("file", "Evicted", true, false);
        check("api", "Terminated", true, false);
    }
}
