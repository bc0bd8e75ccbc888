//! The status of a pod as the API shows it.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container, ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus,
    HostIP, Pod, PodCondition, PodIP, PodStatus, ResourceRequirements,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use crate::decide::{has_finished, is_ending, is_initialized, is_started, uninitialized};
use crate::qos::QosClass;
use crate::resize::{self, Resize};
use crate::restart::{self, Verdict};
use crate::spec::{self, Role};
use crate::view::{ContainerRecord, ContainerView, Run, Sandbox, View, describe};

/// What the node contributes to a pod's status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Host {
    /// The node's addresses.
    pub addresses: Vec<String>,
    /// The runtime's name, which stands before ids of containers.
    pub runtime: String,
}

/// Why a pod has failed that made room for a critical one.
pub const PREEMPTING: &str = "Preempting";
/// What the condition of such a pod says.
const PREEMPTED: &str = "Pod was preempted by Kubelet to accommodate a critical pod.";

impl Default for Host {
    fn default() -> Self {
        Self { addresses: Vec::new(), runtime: "orlop".to_owned() }
    }
}

/// Computes the status. `published` is the one before, whose times of transition are kept where nothing has changed.
/// Conditions that others write are not in it: the source keeps them.
pub fn compute(pod: &Pod, view: &View, host: &Host, published: Option<&PodStatus>, now: Timestamp) -> PodStatus {
    let phase = phase(pod, view);
    let addresses = addresses(pod, view, host);
    let (init, main): (Vec<_>, Vec<_>) = spec::containers(pod).partition(|(role, _)| *role != Role::Main);
    let status = |(role, container): (Role, &Container)| {
        let kept = kept(pod, view, container, published).cloned();
        kept.unwrap_or_else(|| with_runtime(container_status(pod, view, role, container, now), &host.runtime))
    };
    let statuses = |containers: Vec<_>| -> Vec<ContainerStatus> { containers.into_iter().map(status).collect() };
    let ephemeral: Vec<Container> = spec::ephemeral(pod).map(spec::as_container).collect();
    let ephemeral: Vec<_> = ephemeral.iter().map(|container| (Role::Ephemeral, container)).collect();
    let host_ips: Vec<HostIP> = host.addresses.iter().map(|ip| HostIP { ip: ip.clone() }).collect();
    PodStatus {
        phase: Some(phase.to_owned()),
        reason: view.record.failed.as_ref().map(|(reason, _)| reason.clone()),
        message: view.record.failed.as_ref().map(|(_, message)| message.clone()),
        start_time: view.record.started.map(Time),
        host_ip: host.addresses.first().cloned(),
        host_ips: (!host_ips.is_empty()).then_some(host_ips),
        pod_ip: addresses.first().cloned(),
        pod_ips: (!addresses.is_empty()).then(|| addresses.iter().map(|ip| PodIP { ip: ip.clone() }).collect()),
        qos_class: Some(QosClass::of(pod).as_str().to_owned()),
        observed_generation: pod.metadata.generation,
        allocated_resources: Some(resize::allocated_shown(pod)).filter(|list| !list.is_empty()),
        resources: Some(resize::whole_shown(pod, view)).filter(|shown| *shown != ResourceRequirements::default()),
        conditions: Some(conditions(pod, view, phase, published, now)),
        init_container_statuses: (!init.is_empty()).then(|| statuses(init)),
        container_statuses: Some(statuses(main)),
        ephemeral_container_statuses: (!ephemeral.is_empty()).then(|| statuses(ephemeral)),
        ..PodStatus::default()
    }
}

/// What was said of a container of a pod that has ended, when the node does not know it any more.
fn kept<'a>(
    pod: &Pod,
    view: &View,
    container: &Container,
    published: Option<&'a PodStatus>,
) -> Option<&'a ContainerStatus> {
    let is_known = view.containers.get(&container.name).is_some_and(|one| one.running.is_some() || one.ended.is_some());
    spec::ended_phase(pod).filter(|_| !is_known)?;
    let published = published?;
    let all =
        [&published.init_container_statuses, &published.container_statuses, &published.ephemeral_container_statuses];
    all.into_iter().flatten().flatten().find(|status| status.name == container.name)
}

/// Pending, Running, Succeeded or Failed. The last two are only reached when nothing runs any more, and never left.
fn phase(pod: &Pod, view: &View) -> &'static str {
    if let Some(phase) = spec::ended_phase(pod) {
        return phase;
    }
    let mains = || spec::containers(pod).filter(|(role, _)| *role == Role::Main);
    let known = |container: &Container| view.containers.get(&container.name);
    let runs = view.containers.values().any(|container| container.running.is_some());
    let all_ended = mains().all(|(_, container)| known(container).is_some_and(|view| view.ended.is_some()));
    let taken_down = is_ending(pod, view) && (all_ended || view.is_taken_down());
    let over = has_finished(pod, view) || view.record.failed.is_some() || taken_down;
    if over && !runs {
        return if succeeded(pod, view) { "Succeeded" } else { "Failed" };
    }
    let has_run =
        |container: &Container| view.record.containers.get(&container.name).is_some_and(|record| record.last.is_some());
    let begun = |(_, container): (Role, &Container)| {
        has_run(container) || known(container).is_some_and(|view| view.running.is_some() || view.ended.is_some())
    };
    // Who has not begun is waited for, and so are init containers that a new sandbox needs again.
    let initializes = |(role, container): (Role, &Container)| {
        role == Role::Init && known(container).is_some_and(|view| view.running.is_some())
    };
    let lasting = |(role, _): &(Role, &Container)| matches!(role, Role::Main | Role::Sidecar);
    let all_begun = spec::containers(pod).filter(lasting).all(begun);
    if all_begun && !spec::containers(pod).any(initializes) { "Running" } else { "Pending" }
}

fn succeeded(pod: &Pod, view: &View) -> bool {
    let code = |container: &Container| view.containers.get(&container.name)?.ended.as_ref().map(|run| run.exit_code);
    view.record.failed.is_none()
        && spec::containers(pod)
            .filter(|(role, _)| *role != Role::Sidecar)
            .all(|(_, container)| code(container) == Some(0))
}

fn addresses(pod: &Pod, view: &View, host: &Host) -> Vec<String> {
    if spec::of(pod).host_network == Some(true) {
        return host.addresses.clone();
    }
    match &view.sandbox {
        Sandbox::Ready { addresses, .. } => addresses.clone(),
        _ => Vec::new(),
    }
}

/// Ids of containers as clients know them: `containerd://…`.
fn with_runtime(mut status: ContainerStatus, runtime: &str) -> ContainerStatus {
    let states = [&mut status.state, &mut status.last_state].into_iter().flatten();
    let ends = states.filter_map(|state| state.terminated.as_mut()).map(|ended| &mut ended.container_id);
    for id in ends.chain([&mut status.container_id]).flatten() {
        *id = format!("{runtime}://{id}");
    }
    status
}

fn container_status(pod: &Pod, view: &View, role: Role, container: &Container, now: Timestamp) -> ContainerStatus {
    let observed = view.containers.get(&container.name).cloned().unwrap_or_default();
    let record = view.record.containers.get(&container.name).cloned().unwrap_or_default();
    let (state, last_state) = states(pod, view, role, container, &observed, &record, now);
    let started = observed.running.is_some() && is_started(view, container);
    let ready = match role {
        Role::Init => observed.ended.as_ref().is_some_and(|run| run.exit_code == 0),
        Role::Sidecar | Role::Main => started && record.probes.ready(container),
        Role::Ephemeral => false,
    };
    let id = observed.running.as_ref().map(|running| &running.id).or(observed.ended.as_ref().map(|run| &run.id));
    ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        image_id: observed.image_id.clone(),
        container_id: id.cloned(),
        ready,
        started: (role != Role::Ephemeral).then_some(started),
        restart_count: record.restarts,
        state: Some(state),
        last_state: Some(last_state),
        resources: match record.actuated.as_ref().filter(|_| observed.running.is_some()) {
            Some(actuated) => actuated.shown(container.resources.as_ref()),
            None => container.resources.clone(),
        },
        allocated_resources: container.resources.as_ref().and_then(|resources| resources.requests.clone()),
        ..ContainerStatus::default()
    }
}

/// State and last state: a container that waits for its next run shows the run that ended as the last.
fn states(
    pod: &Pod,
    view: &View,
    role: Role,
    container: &Container,
    observed: &ContainerView,
    record: &ContainerRecord,
    now: Timestamp,
) -> (ContainerState, ContainerState) {
    let last = record.last.as_ref().map(terminated).unwrap_or_default();
    if let Some(running) = &observed.running {
        let running = ContainerStateRunning { started_at: Some(Time(running.started)) };
        return (ContainerState { running: Some(running), ..ContainerState::default() }, last);
    }
    if let Some(run) = &observed.ended {
        let restarts =
            view.record.resetting || restart::after_run(pod, role, container, Some(record), run) == Verdict::Restart;
        if !restarts || is_ending(pod, view) {
            return (terminated(run), record.previous.as_ref().map(terminated).unwrap_or_default());
        }
    } else if view.is_taken_down() {
        return (terminated(&Run::unknown()), last);
    }
    (waiting(pod, view, role, container, record, now), last)
}

fn terminated(run: &Run) -> ContainerState {
    let ended = ContainerStateTerminated {
        container_id: Some(run.id.clone()),
        exit_code: run.exit_code,
        reason: Some(run.reason.clone()),
        message: (!run.message.is_empty()).then(|| run.message.clone()),
        started_at: run.started.map(Time),
        finished_at: run.finished.map(Time),
        signal: None,
    };
    ContainerState { terminated: Some(ended), ..ContainerState::default() }
}

fn waiting(
    pod: &Pod,
    view: &View,
    role: Role,
    container: &Container,
    record: &ContainerRecord,
    now: Timestamp,
) -> ContainerState {
    let (reason, message) = wait_reason(pod, view, role, container, record, now);
    let waiting = ContainerStateWaiting { reason: Some(reason), message };
    ContainerState { waiting: Some(waiting), ..ContainerState::default() }
}

/// Why a container does not run, in the order of what an operator has to mend first.
fn wait_reason(
    pod: &Pod,
    view: &View,
    role: Role,
    container: &Container,
    record: &ContainerRecord,
    now: Timestamp,
) -> (String, Option<String>) {
    if view.record.resetting {
        return ("RestartingAllContainers".to_owned(), Some("All containers of the pod are restarted".to_owned()));
    }
    if let Some((reason, message)) = &record.create.error {
        return (reason.clone(), Some(message.clone()));
    }
    if let Some((reason, message)) = &record.pull.error {
        let delayed = record.pull.backoff.until(now).is_some() && reason == "ErrImagePull";
        let image = container.image.as_deref().unwrap_or_default();
        return if delayed {
            (
                "ImagePullBackOff".to_owned(),
                Some(format!("Back-off pulling image \"{image}\": ErrImagePull: {message}")),
            )
        } else {
            (reason.clone(), Some(message.clone()))
        };
    }
    if record.backoff.until(now).is_some() {
        let seconds = record.backoff.delay.unwrap_or_default().as_secs();
        let delay = match (seconds / 60, seconds % 60) {
            (0, seconds) => format!("{seconds}s"),
            (minutes, seconds) => format!("{minutes}m{seconds}s"),
        };
        let message = format!("back-off {delay} restarting failed container={} pod={}", container.name, describe(pod));
        return ("CrashLoopBackOff".to_owned(), Some(message));
    }
    let has_init = spec::containers(pod).any(|(role, _)| role != Role::Main);
    let of_init = matches!(role, Role::Init | Role::Sidecar);
    let reason =
        if has_init && (of_init || !is_initialized(pod, view)) { "PodInitializing" } else { "ContainerCreating" };
    let outage = view.record.sandbox.error.as_ref().or(view.record.volumes.error.as_ref());
    (reason.to_owned(), outage.map(|(_, message)| message.clone()))
}

/// A condition's type, whether it holds, and if not why.
struct Condition {
    kind: &'static str,
    holds: bool,
    reason: Option<&'static str>,
    message: Option<String>,
    /// Of the pod that it is about, if that is not the present one.
    generation: Option<i64>,
}

fn conditions(pod: &Pod, view: &View, phase: &str, published: Option<&PodStatus>, now: Timestamp) -> Vec<PodCondition> {
    let sandboxed = matches!(view.sandbox, Sandbox::Ready { .. });
    // Who is initialized stays so, even while all containers begin anew.
    let over = phase == "Succeeded" || is_true(published, "Initialized");
    let containers_ready = ready_condition("ContainersReady", pod, view, phase);
    let gates = missing_gates(pod);
    let mut ready = ready_condition("Ready", pod, view, phase);
    if ready.holds && !gates.is_empty() {
        ready.holds = false;
        ready.reason = Some("ReadinessGatesNotReady");
        ready.message = Some(format!("the status of pod readiness gate \"{}\" is not \"True\", but False", gates[0]));
    }
    let plain = |kind, holds, reason| Condition {
        kind,
        holds,
        reason: if holds { None } else { reason },
        message: None,
        generation: None,
    };
    let mut own = vec![
        plain("PodReadyToStartContainers", sandboxed, None),
        initialized_condition(pod, view, over),
        ready,
        containers_ready,
        plain("PodScheduled", true, None),
    ];
    if restart::may_reset(pod) {
        own.push(restarting_condition(view, phase));
    }
    if let Some((reason, message)) = view.record.failed.as_ref().filter(|_| view.record.disrupted) {
        let message = if reason == PREEMPTING { PREEMPTED.to_owned() } else { message.clone() };
        let (reason, message) = (Some("TerminationByKubelet"), Some(message));
        own.push(Condition { kind: "DisruptionTarget", holds: true, reason, message, generation: None });
    }
    if !matches!(phase, "Succeeded" | "Failed") {
        own.extend(view.record.resize.as_deref().into_iter().flat_map(resize_conditions));
    }
    own.iter().map(|condition| api_condition(pod, condition, published, now)).collect()
}

/// Whether all containers are being ended to begin anew.
fn restarting_condition(view: &View, phase: &str) -> Condition {
    let (holds, reason) = match phase {
        "Succeeded" => (false, Some("PodCompleted")),
        "Failed" => (false, Some("PodFailed")),
        _ if view.record.resetting => (true, Some("RestartAllContainersStarted")),
        _ => (false, None),
    };
    let message = holds.then(|| "container exited with restart policy rule".to_owned());
    Condition { kind: "AllContainersRestarting", holds, reason, message, generation: None }
}

fn is_true(status: Option<&PodStatus>, kind: &str) -> bool {
    let conditions = status.and_then(|status| status.conditions.as_ref()).into_iter().flatten();
    conditions.into_iter().any(|condition| condition.type_ == kind && condition.status == "True")
}

/// `over`: it is settled, whatever the init containers look like now.
fn initialized_condition(pod: &Pod, view: &View, over: bool) -> Condition {
    let incomplete: Vec<&str> = uninitialized(pod, view).collect();
    let holds = incomplete.is_empty() || over;
    let message = || format!("containers with incomplete status: [{}]", incomplete.join(" "));
    Condition {
        kind: "Initialized",
        holds,
        reason: (!holds).then_some("ContainersNotInitialized"),
        message: (!holds).then(message),
        generation: None,
    }
}

fn ready_condition(kind: &'static str, pod: &Pod, view: &View, phase: &str) -> Condition {
    if matches!(phase, "Succeeded" | "Failed") {
        let reason = if phase == "Succeeded" { "PodCompleted" } else { "PodFailed" };
        return Condition { kind, holds: false, reason: Some(reason), message: None, generation: None };
    }
    let is_ready = |container: &Container| {
        let record = view.record.containers.get(&container.name);
        is_started(view, container) && record.is_some_and(|record| record.probes.ready(container))
    };
    let counted = spec::containers(pod).filter(|(role, _)| *role != Role::Init);
    let unready: Vec<&str> =
        counted.filter(|(_, container)| !is_ready(container)).map(|(_, container)| container.name.as_str()).collect();
    let holds = unready.is_empty();
    let message = (!holds).then(|| format!("containers with unready status: [{}]", unready.join(" ")));
    Condition { kind, holds, reason: (!holds).then_some("ContainersNotReady"), message, generation: None }
}

fn missing_gates(pod: &Pod) -> Vec<&str> {
    let holds = |kind: &str| is_true(pod.status.as_ref(), kind);
    let gates = spec::of(pod).readiness_gates.iter().flatten();
    gates.map(|gate| gate.condition_type.as_str()).filter(|kind| !holds(kind)).collect()
}

fn api_condition(pod: &Pod, condition: &Condition, published: Option<&PodStatus>, now: Timestamp) -> PodCondition {
    let status = if condition.holds { "True" } else { "False" };
    let before = published
        .and_then(|status| status.conditions.as_ref())
        .into_iter()
        .flatten()
        .find(|before| before.type_ == condition.kind);
    let since = before.filter(|before| before.status == status).and_then(|before| before.last_transition_time.clone());
    PodCondition {
        type_: condition.kind.to_owned(),
        status: status.to_owned(),
        reason: condition.reason.map(str::to_owned),
        message: condition.message.clone(),
        last_transition_time: Some(since.unwrap_or(Time(now))),
        last_probe_time: None,
        observed_generation: condition.generation.or(pod.metadata.generation),
    }
}

/// What a resize waits for, and that one goes on.
fn resize_conditions(resize: &Resize) -> impl Iterator<Item = Condition> + use<> {
    let pending = resize.pending.as_ref().map(|pending| Condition {
        kind: "PodResizePending",
        holds: true,
        reason: Some(pending.reason()),
        message: Some(pending.message.clone()),
        generation: pending.generation,
    });
    let progress = resize.progress.as_ref().map(|progress| Condition {
        kind: "PodResizeInProgress",
        holds: true,
        reason: progress.error.is_some().then_some("Error"),
        message: progress.error.clone(),
        generation: progress.generation,
    });
    pending.into_iter().chain(progress)
}
