//! A pod's spec as the rest of the crate reads it: containers with their roles, grace periods, deletion.

use std::borrow::Cow;

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, EphemeralContainer, Pod, PodSpec};

/// What a container is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Runs to its end before the next one begins.
    Init,
    /// An init container with `restartPolicy: Always`: runs beside the others, from before them until after them.
    Sidecar,
    /// A container of the application.
    Main,
    /// Added to a running pod to look into it. It runs once, and the pod's life does not depend on it.
    Ephemeral,
}

/// Grace period of a pod that names none (API default).
pub const DEFAULT_GRACE_S: i64 = 30;

/// The pod's spec; an empty one when there is none.
pub fn of(pod: &Pod) -> &PodSpec {
    static EMPTY: std::sync::OnceLock<PodSpec> = std::sync::OnceLock::new();
    pod.spec.as_ref().unwrap_or_else(|| EMPTY.get_or_init(PodSpec::default))
}

/// All containers that the pod consists of, in the order in which they start, with their roles.
pub fn containers(pod: &Pod) -> impl DoubleEndedIterator<Item = (Role, &Container)> {
    let spec = of(pod);
    let init = spec.init_containers.iter().flatten().map(|container| (role_of_init(container), container));
    init.chain(spec.containers.iter().map(|container| (Role::Main, container)))
}

/// The containers that were added to look into the pod, with their targets.
pub fn ephemeral(pod: &Pod) -> impl Iterator<Item = &EphemeralContainer> {
    of(pod).ephemeral_containers.iter().flatten()
}

/// The names of all containers with their roles: those that the pod consists of, then those that look into it.
pub fn names(pod: &Pod) -> impl Iterator<Item = (Role, &str)> {
    let own = containers(pod).map(|(role, container)| (role, container.name.as_str()));
    own.chain(ephemeral(pod).map(|one| (Role::Ephemeral, one.name.as_str())))
}

/// The container called `name`, of any role.
pub fn container<'a>(pod: &'a Pod, name: &str) -> Option<(Role, Cow<'a, Container>)> {
    let own = containers(pod).find(|(_, container)| container.name == name);
    own.map(|(role, container)| (role, Cow::Borrowed(container))).or_else(|| {
        let one = ephemeral(pod).find(|one| one.name == name)?;
        Some((Role::Ephemeral, Cow::Owned(as_container(one))))
    })
}

/// The container whose processes an ephemeral container sees (`targetContainerName`).
pub fn target<'a>(pod: &'a Pod, name: &str) -> Option<&'a str> {
    let one = ephemeral(pod).find(|one| one.name == name)?;
    one.target_container_name.as_deref().filter(|target| !target.is_empty())
}

/// An ephemeral container as any other. What the API allows to none of them (ports, probes, hooks, resources, restarts) is
/// left out.
pub fn as_container(one: &EphemeralContainer) -> Container {
    let one = one.clone();
    Container {
        name: one.name,
        image: one.image,
        command: one.command,
        args: one.args,
        working_dir: one.working_dir,
        env_from: one.env_from,
        env: one.env,
        volume_mounts: one.volume_mounts,
        volume_devices: one.volume_devices,
        termination_message_path: one.termination_message_path,
        termination_message_policy: one.termination_message_policy,
        image_pull_policy: one.image_pull_policy,
        security_context: one.security_context,
        stdin: one.stdin,
        stdin_once: one.stdin_once,
        tty: one.tty,
        ..Container::default()
    }
}

fn role_of_init(container: &Container) -> Role {
    if container.restart_policy.as_deref() == Some("Always") { Role::Sidecar } else { Role::Init }
}

/// The phase of a pod that has ended, as its source has it: it never runs again, and never has another phase.
pub fn ended_phase(pod: &Pod) -> Option<&'static str> {
    match pod.status.as_ref()?.phase.as_deref()? {
        "Succeeded" => Some("Succeeded"),
        "Failed" => Some("Failed"),
        _ => None,
    }
}

/// The grace period for ending the pod, in seconds: of its deletion, else its own.
pub fn grace_s(pod: &Pod) -> i64 {
    let own = of(pod).termination_grace_period_seconds.unwrap_or(DEFAULT_GRACE_S);
    pod.metadata.deletion_grace_period_seconds.unwrap_or(own).max(0)
}

/// When `activeDeadlineSeconds` end a pod that started at `start`.
pub fn active_deadline(pod: &Pod, start: Option<Timestamp>) -> Option<Timestamp> {
    let seconds = of(pod).active_deadline_seconds?;
    start?.saturating_add(SignedDuration::from_secs(seconds)).ok()
}
