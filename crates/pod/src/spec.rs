//! A pod's spec as the rest of the crate reads it: containers with their roles, grace periods, deletion.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

/// What a container is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// Runs to its end before the next one begins.
    Init,
    /// An init container with `restartPolicy: Always`: runs beside the others, from before them until after them.
    Sidecar,
    /// A container of the application.
    Main,
}

/// Grace period of a pod that names none (API default).
pub const DEFAULT_GRACE_S: i64 = 30;

/// The pod's spec; an empty one when there is none.
pub fn of(pod: &Pod) -> &PodSpec {
    static EMPTY: std::sync::OnceLock<PodSpec> = std::sync::OnceLock::new();
    pod.spec.as_ref().unwrap_or_else(|| EMPTY.get_or_init(PodSpec::default))
}

/// All containers in the order in which they start, with their roles.
pub fn containers(pod: &Pod) -> impl DoubleEndedIterator<Item = (Role, &Container)> {
    let spec = of(pod);
    let init = spec.init_containers.iter().flatten().map(|container| (role_of_init(container), container));
    init.chain(spec.containers.iter().map(|container| (Role::Main, container)))
}

/// The container called `name`.
pub fn container<'a>(pod: &'a Pod, name: &str) -> Option<(Role, &'a Container)> {
    containers(pod).find(|(_, container)| container.name == name)
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

/// When the pod's deletion was asked for; `deletionTimestamp` is the end of the grace period.
pub fn deletion_requested(pod: &Pod) -> Option<Timestamp> {
    let end = pod.metadata.deletion_timestamp.as_ref()?.0;
    Some(end.saturating_sub(SignedDuration::from_secs(grace_s(pod))).unwrap_or(end))
}

/// When `activeDeadlineSeconds` end a pod that started at `start`.
pub fn active_deadline(pod: &Pod, start: Option<Timestamp>) -> Option<Timestamp> {
    let seconds = of(pod).active_deadline_seconds?;
    start?.saturating_add(SignedDuration::from_secs(seconds)).ok()
}
