//! What clients are told of sandboxes and containers.

use std::sync::Arc;

use cri::v1;

use crate::container::{Container, Phase};
use crate::launch::log_path;
use crate::sandbox::{self, Sandbox};

/// A sandbox's status.
pub(crate) fn sandbox(sandbox: &Sandbox) -> v1::PodSandboxStatus {
    let ips = sandbox.live().ips.clone();
    let mut ips = ips.into_iter();
    v1::PodSandboxStatus {
        id: sandbox.id.clone(),
        metadata: sandbox.config.metadata.clone(),
        state: sandbox_state(sandbox).into(),
        created_at: sandbox.created_at,
        network: Some(v1::PodSandboxNetworkStatus {
            ip: ips.next().unwrap_or_default(),
            additional_ips: ips.map(|ip| v1::PodIp { ip }).collect(),
        }),
        linux: Some(v1::LinuxPodSandboxStatus {
            namespaces: Some(v1::Namespace { options: Some(sandbox.namespaces()) }),
        }),
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        runtime_handler: sandbox.handler.clone(),
    }
}

pub(crate) fn sandbox_state(sandbox: &Sandbox) -> v1::PodSandboxState {
    match sandbox.phase() {
        sandbox::Phase::Ready => v1::PodSandboxState::SandboxReady,
        _ => v1::PodSandboxState::SandboxNotready,
    }
}

/// A sandbox as lists have it.
pub(crate) fn sandbox_item(sandbox: &Sandbox) -> v1::PodSandbox {
    v1::PodSandbox {
        id: sandbox.id.clone(),
        metadata: sandbox.config.metadata.clone(),
        state: sandbox_state(sandbox).into(),
        created_at: sandbox.created_at,
        labels: sandbox.config.labels.clone(),
        annotations: sandbox.config.annotations.clone(),
        runtime_handler: sandbox.handler.clone(),
    }
}

/// The statuses of a sandbox's containers, in the order of their making.
pub(crate) fn containers_of(sandbox: &Sandbox) -> Vec<v1::ContainerStatus> {
    let mut known: Vec<Arc<Container>> = sandbox.containers();
    known.retain(|container| container.phase() != Phase::Making);
    let mut all: Vec<v1::ContainerStatus> = known.iter().map(|one| container(sandbox, one)).collect();
    all.sort_by_key(|status| status.created_at);
    all
}

pub(crate) fn container_state(sandbox: &Sandbox, container: &Container) -> v1::ContainerState {
    let unheard = sandbox.live().unheard;
    match container.phase() {
        Phase::Created if unheard => v1::ContainerState::ContainerUnknown,
        Phase::Making | Phase::Created | Phase::Starting => v1::ContainerState::ContainerCreated,
        Phase::Running => v1::ContainerState::ContainerRunning,
        Phase::Exited => v1::ContainerState::ContainerExited,
    }
}

/// A container's status.
pub(crate) fn container(sandbox: &Sandbox, container: &Container) -> v1::ContainerStatus {
    let state = container_state(sandbox, container);
    let started_at = container.live().started_at;
    let record = container.record().clone();
    let config = record.config.unwrap_or_default();
    let log_path = log_path(sandbox, &config).unwrap_or_default();
    // The phase is read first: an end that is noted in between belongs to a later status.
    let end = record.end.filter(|_| state == v1::ContainerState::ContainerExited).unwrap_or_default();
    v1::ContainerStatus {
        id: container.id.clone(),
        metadata: config.metadata,
        state: state.into(),
        created_at: record.created_at,
        started_at: if started_at == 0 { end.started_at } else { started_at },
        finished_at: end.finished_at,
        exit_code: end.exit_code,
        image: config.image.map(|image| as_named(image, &record.image_id)),
        image_ref: record.image_ref,
        reason: end.reason,
        message: end.message,
        labels: config.labels,
        annotations: config.annotations,
        mounts: config.mounts,
        log_path,
        resources: Some(v1::ContainerResources { linux: record.resources, windows: None }),
        image_id: record.image_id,
        user: Some(v1::ContainerUser { linux: record.user }),
        stop_signal: record.stop_signal_name,
    }
}

/// The image as the user wrote it: the kubelet asks for it by its id and says beside that what the pod has.
fn as_named(mut image: v1::ImageSpec, id: &str) -> v1::ImageSpec {
    if image.image == id && !image.user_specified_image.is_empty() {
        image.image.clone_from(&image.user_specified_image);
    }
    image
}

/// A container as lists have it.
pub(crate) fn container_item(sandbox: &Sandbox, container: &Container) -> v1::Container {
    let state = container_state(sandbox, container);
    let record = container.record().clone();
    let config = record.config.unwrap_or_default();
    v1::Container {
        id: container.id.clone(),
        pod_sandbox_id: sandbox.id.clone(),
        metadata: config.metadata,
        image: config.image,
        image_ref: record.image_ref,
        state: state.into(),
        created_at: record.created_at,
        labels: config.labels,
        annotations: config.annotations,
        image_id: record.image_id,
    }
}
