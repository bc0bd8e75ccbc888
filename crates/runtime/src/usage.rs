//! What a client's question about statistics or images means: which containers and sandboxes it is about.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use cri::{Error, v1};
use image::Digest;

use crate::container::{Container, Phase};
use crate::core::Core;
use crate::images::ImagesInUse;
use crate::list::has_labels;
use crate::runtime::Runtime;
use crate::sandbox::{self, Sandbox};
use crate::stats::{ContainerTarget, SandboxTarget, Subject};

/// CRI `ContainerStats`.
pub(crate) async fn container(core: &Core, id: &str) -> Result<v1::ContainerStats, Error> {
    let (sandbox, container) = core.table.container(id)?;
    Ok(core.stats.container(target(&sandbox, &container)).await)
}

/// CRI `ListContainerStats`: all that a filter lets through, in any state, as under containerd.
pub(crate) async fn containers(core: &Core, filter: Option<v1::ContainerStatsFilter>) -> Vec<v1::ContainerStats> {
    let filter = filter.unwrap_or_default();
    let all = core.table.containers().into_iter();
    let here = all.filter(|(sandbox, container)| {
        container.id.starts_with(&filter.id) && sandbox.id.starts_with(&filter.pod_sandbox_id)
    });
    let targets = here.map(|(sandbox, container)| target(&sandbox, &container));
    let wanted = targets.filter(|target| has_labels(&target.attributes.labels, &filter.label_selector));
    core.stats.containers(wanted.collect()).await
}

/// CRI `PodSandboxStats`.
pub(crate) async fn sandbox(core: &Core, id: &str) -> Result<v1::PodSandboxStats, Error> {
    let sandbox = core.table.sandbox(id)?;
    if sandbox.phase() != sandbox::Phase::Ready {
        return Err(Error::FailedPrecondition(format!("sandbox {} is not ready: it uses nothing", sandbox.id)));
    }
    core.stats.sandbox(sandbox_target(&sandbox)).await
}

/// CRI `ListPodSandboxStats`: all that are ready and that a filter lets through.
pub(crate) async fn sandboxes(core: &Core, filter: Option<v1::PodSandboxStatsFilter>) -> Vec<v1::PodSandboxStats> {
    let filter = filter.unwrap_or_default();
    let mut found = Vec::new();
    for sandbox in ready(core) {
        if sandbox.id.starts_with(&filter.id) && has_labels(&sandbox.config.labels, &filter.label_selector) {
            found.extend(unless_gone(&sandbox, core.stats.sandbox(sandbox_target(&sandbox)).await));
        }
    }
    found
}

/// CRI `ListPodSandboxMetrics`: all that are ready.
pub(crate) async fn metrics(core: &Core) -> Vec<v1::PodSandboxMetrics> {
    let mut found = Vec::new();
    for sandbox in ready(core) {
        found.extend(unless_gone(&sandbox, core.stats.metrics(sandbox_target(&sandbox)).await));
    }
    found
}

impl Runtime {
    /// What containers use, and `groups` beside them, as cAdvisor tells Prometheus: in CRI, there are no parts of a second.
    pub async fn container_metrics(&self, groups: Vec<sys::cgroup::Cgroup>) -> String {
        let core = self.core();
        let targets = ready(core).iter().map(|sandbox| sandbox_target(sandbox)).collect();
        core.stats.text(targets, groups).await
    }
}

fn ready(core: &Core) -> Vec<Arc<Sandbox>> {
    let mut all = core.table.sandboxes();
    all.retain(|sandbox| sandbox.phase() == sandbox::Phase::Ready);
    all
}

/// A sandbox that is just being stopped must not cost the others their answer.
fn unless_gone<T>(sandbox: &Sandbox, answer: Result<T, Error>) -> Option<T> {
    let told = |error: &Error| tracing::debug!(sandbox = sandbox.id, %error, "left out of the statistics");
    answer.inspect_err(told).ok()
}

fn target(sandbox: &Sandbox, container: &Container) -> ContainerTarget {
    let runs = container.phase() == Phase::Running;
    let started_at = container.live().started_at;
    let record = container.record().clone();
    let config = record.config.unwrap_or_default();
    let (pod, image) = (sandbox.metadata(), config.image.unwrap_or_default());
    let name = config.metadata.as_ref().map(|metadata| metadata.name.clone());
    ContainerTarget {
        subject: Subject {
            pod: pod.name,
            namespace: pod.namespace,
            container: name.unwrap_or_default(),
            id: container.id.clone(),
            image: if image.user_specified_image.is_empty() { image.image } else { image.user_specified_image },
        },
        attributes: v1::ContainerAttributes {
            id: container.id.clone(),
            metadata: config.metadata,
            labels: config.labels,
            annotations: config.annotations,
        },
        group: runs.then(|| container.group.clone()),
        started_at,
        resources: record.resources.unwrap_or_default(),
    }
}

fn sandbox_target(sandbox: &Sandbox) -> SandboxTarget {
    let mut containers = sandbox.containers();
    containers.retain(|container| container.phase() == Phase::Running);
    SandboxTarget {
        attributes: v1::PodSandboxAttributes {
            id: sandbox.id.clone(),
            metadata: sandbox.config.metadata.clone(),
            labels: sandbox.config.labels.clone(),
            annotations: sandbox.config.annotations.clone(),
        },
        group: sandbox.group.clone(),
        network: !sandbox.host_network(),
        containers: containers.iter().map(|container| target(sandbox, container)).collect(),
    }
}

impl ImagesInUse for Runtime {
    fn roots(&self) -> HashSet<Digest> {
        let all = self.core().table.containers();
        all.iter().filter_map(|(_, container)| container.record().image_id.parse().ok()).collect()
    }

    fn volumes(&self) -> HashMap<Digest, String> {
        let all = self.core().table.containers().into_iter();
        let mounted = all.filter(|(_, container)| container.phase() != Phase::Exited);
        mounted.flat_map(|(_, container)| volumes_of(&container)).collect()
    }
}

fn volumes_of(container: &Arc<Container>) -> Vec<(Digest, String)> {
    let ids = container.record().volume_images.clone();
    ids.iter().filter_map(|id| Some((id.parse().ok()?, container.id.clone()))).collect()
}
