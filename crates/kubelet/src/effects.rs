//! Doing what was decided: each action becomes calls of the runtime, and each outcome a change.

mod container;
mod image;
mod resize;
mod sandbox;
mod stopping;

pub(crate) use sandbox::addresses;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cri::v1;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use pod::probe::Outcome;
use pod::{Action, Change, Run, View};
use tokio::sync::mpsc::UnboundedSender;
use tokio_util::sync::CancellationToken;

use crate::admission::Rejection;
use crate::context::{Context, chain, uid_of};
use crate::probing::{self, Target};
use crate::publish::Taken;
use crate::volumes::{Cause, PodVolumes, Times, VolumeError};
use crate::worker::Event;

/// One action of one pod, with what it needs to know.
#[derive(Clone)]
pub(crate) struct Job {
    pub(crate) context: Arc<Context>,
    pub(crate) pod: Arc<Pod>,
    pub(crate) action: Action,
    /// The pod's sandbox and addresses when the action was decided.
    pub(crate) sandbox: Option<String>,
    pub(crate) addresses: Vec<String>,
    /// The image of the container that the action is about.
    pub(crate) image: Option<String>,
    /// The run whose processes that container is to see.
    pub(crate) target: Option<String>,
    /// The preStop hook of the run that is to be ended is over: a daemon has died since.
    pub(crate) is_pre_stopped: bool,
    pub(crate) shared: Arc<Shared>,
    /// Cancelled when nobody wants the action any more ([`pod::Plan::aborts`]).
    pub(crate) abort: CancellationToken,
}

/// How long a call of the runtime that nobody wants any more may still take: most end well within that, and leave less to
/// be taken down than one that is given up.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long an action may still take when it is aborted; none if it cannot be dropped at any time.
fn patience(action: &Action) -> Option<Duration> {
    match action {
        Action::MountVolumes | Action::EnsureImage { .. } | Action::PostStart { .. } => Some(Duration::ZERO),
        Action::CreateSandbox { .. } | Action::RemoveSandbox { .. } => Some(PATIENCE),
        Action::Start { .. }
        | Action::Probe { .. }
        | Action::Stop(_)
        | Action::Resize { .. }
        | Action::LeaveServices
        | Action::CleanUp
        | Action::Purge
        | Action::Forget => None,
    }
}

/// What the actions of one pod hand to each other and to its worker.
pub(crate) struct Shared {
    changes: UnboundedSender<Event>,
    statuses: Taken,
    volumes: Mutex<Option<Arc<PodVolumes>>>,
    sandbox_config: Mutex<Option<v1::PodSandboxConfig>>,
}

impl Shared {
    /// `changes` lead to the worker; `statuses` are those that it has published.
    pub(crate) fn new(changes: UnboundedSender<Event>, statuses: Taken) -> Self {
        Self { changes, statuses, volumes: Mutex::default(), sandbox_config: Mutex::default() }
    }

    fn set_volumes(&self, volumes: Option<PodVolumes>) {
        *self.volumes.lock().unwrap_or_else(PoisonError::into_inner) = volumes.map(Arc::new);
    }

    fn volumes(&self) -> Option<Arc<PodVolumes>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn set_sandbox_config(&self, config: v1::PodSandboxConfig) {
        *self.sandbox_config.lock().unwrap_or_else(PoisonError::into_inner) = Some(config);
    }

    fn sandbox_config(&self) -> Option<v1::PodSandboxConfig> {
        self.sandbox_config.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What an action needs to know of the pod's present state.
pub(crate) fn job(context: &Arc<Context>, pod: &Arc<Pod>, view: &View, action: Action, shared: &Arc<Shared>) -> Job {
    let addresses = match &view.sandbox {
        pod::Sandbox::Ready { addresses, .. } => addresses.clone(),
        _ => Vec::new(),
    };
    let (image, target) = match &action {
        Action::Start { container, .. } => (
            view.containers.get(container).and_then(|view| view.image.clone()),
            pod::spec::target(pod, container).and_then(|target| view.running(target)).map(|run| run.id.clone()),
        ),
        _ => (None, None),
    };
    let is_pre_stopped = match &action {
        Action::Stop(stop) => {
            let record = view.record.containers.get(&stop.container);
            record.is_some_and(|record| record.pre_stopped.as_ref() == Some(&stop.id))
        }
        _ => false,
    };
    Job {
        context: context.clone(),
        pod: pod.clone(),
        action,
        sandbox: view.sandbox.id().map(str::to_owned),
        addresses,
        image,
        target,
        is_pre_stopped,
        shared: shared.clone(),
        abort: CancellationToken::new(),
    }
}

impl Job {
    /// Carries the action out. What it leads to goes to the worker; then that the action has ended.
    pub(crate) async fn run(self) {
        match patience(&self.action) {
            Some(patience) => drop(self.unless_aborted(patience, self.carry_out()).await),
            None => self.carry_out().await,
        }
        let _ = self.shared.changes.send(Event::Ended(self.action)); // The worker may have gone meanwhile.
    }

    async fn carry_out(&self) {
        match &self.action {
            Action::MountVolumes => self.mount_volumes().await,
            Action::CreateSandbox { attempt } => self.create_sandbox(*attempt).await,
            Action::RemoveSandbox { id } => self.remove_sandbox(id).await,
            Action::EnsureImage { container } => self.ensure_image(container).await,
            Action::Start { container, attempt } => self.start(container, *attempt).await,
            Action::PostStart { container, id } => self.post_start(container, id).await,
            Action::Probe { container, id, kind, early } => self.probe(container, id, *kind, *early).await,
            Action::Stop(stop) => self.stop(stop).await,
            Action::Resize { steps } => self.resize(steps).await,
            Action::LeaveServices => self.leave_services().await,
            Action::CleanUp => self.clean_up().await,
            Action::Purge => self.purge().await,
            Action::Forget => self.forget().await,
        }
    }

    /// Does `work`, unless the action has been aborted; gives it up, `patience` later, when that happens.
    async fn unless_aborted<T>(&self, patience: Duration, work: impl Future<Output = T>) -> Option<T> {
        if self.abort.is_cancelled() {
            return None;
        }
        let mut work = std::pin::pin!(work);
        tokio::select! {
            biased;
            done = &mut work => Some(done),
            () = self.abort.cancelled() => tokio::time::timeout(patience, work).await.ok(),
        }
    }

    fn change(&self, change: Change) {
        let _ = self.shared.changes.send(Event::Change(change)); // As above.
    }

    fn uid(&self) -> &str {
        uid_of(&self.pod)
    }

    fn target<'a>(&'a self, container: &'a k8s_openapi::api::core::v1::Container, id: &'a str) -> Target<'a> {
        let own = self.addresses.first().map(String::as_str);
        let host = self.context.config.generate.node.ips.first().map(String::as_str);
        let on_host = pod::spec::of(&self.pod).host_network == Some(true);
        Target { container, id, address: if on_host { host } else { own } }
    }

    /// Waits until the source knows what the pod refers to: what is missing then is really missing.
    async fn look_up(&self) -> Result<(), String> {
        self.context.parts.source.look_up(&self.pod).await.map_err(|error| chain(&error))
    }

    async fn mount_volumes(&self) {
        if let Err(message) = self.look_up().await {
            return self.change(Change::VolumesFailed { message });
        }
        let times = Arc::<Times>::default();
        let made = self.context.parts.volumes.set_up_timed(&self.pod, &times).await;
        self.count_volumes(&times, made.as_ref().err().map(|error| error.volume.as_str()));
        match made {
            Ok(mut volumes) => match self.image_volumes(&mut volumes).await {
                Ok(()) => {
                    self.shared.set_volumes(Some(volumes));
                    self.change(Change::VolumesReady);
                }
                Err(message) => self.change(Change::VolumesFailed { message }),
            },
            Err(VolumeError { volume, cause: cause @ Cause::Exhausted { .. } }) => {
                let message = format!(
                    "Node has reached its volume attachment limit, rejecting pod. unmounted volumes=[{volume}], unattached \
                     volumes=[{volume}], failed to process volumes=[]: {cause}"
                );
                let rejection = Rejection { reason: "VolumeAttachmentLimitExceeded".to_owned(), message };
                self.context.rejected(&self.pod, &rejection);
                self.change(rejection.change());
            }
            Err(error) => self.change(Change::VolumesFailed { message: error.to_string() }),
        }
    }

    /// Counts the volumes that were made, or the one that could not be: then the others begin anew.
    fn count_volumes(&self, times: &Times, failed: Option<&str>) {
        for volume in pod::spec::of(&self.pod).volumes.iter().flatten() {
            let is_failed = failed == Some(volume.name.as_str());
            if let Some(took) = times.of(&volume.name)
                && (failed.is_none() || is_failed)
            {
                self.context.parts.metrics.mounted(plugin(volume), took, is_failed);
            }
        }
    }

    async fn probe(&self, container: &str, id: &str, kind: pod::probe::Kind, early: bool) {
        let Some((_, spec)) = pod::spec::container(&self.pod, container) else { return };
        let Some(probe) = kind.of(&spec) else { return };
        let asked = std::time::Instant::now();
        let answer = probing::probe(&*self.context.parts.runtime, self.target(&spec, id), probe).await;
        if let Some(outcome) = answer.outcome.filter(|outcome| !early || *outcome == Outcome::Success) {
            self.context.parts.metrics.probed(&self.pod, container, kind, outcome, asked.elapsed());
        }
        let (container, id) = (container.to_owned(), id.to_owned());
        self.change(Change::Probed { container, id, kind, early, answer });
    }

    /// Waits for the service rules, not for ever.
    async fn leave_services(&self) {
        let limit = self.context.config.barrier_timeout;
        let left = self.context.parts.barrier.left(&self.pod, &self.addresses);
        if !limit.is_zero() && tokio::time::timeout(limit, left).await.is_err() {
            tracing::warn!(pod = %crate::context::name_of(&self.pod), "the service rules still lead to an ending pod; it ends now");
        }
        self.change(Change::LeftServices);
    }
}

/// Upstream's name of what makes a volume.
pub(crate) fn plugin(volume: &k8s_openapi::api::core::v1::Volume) -> &'static str {
    let kinds = [
        (volume.config_map.is_some(), "kubernetes.io/configmap"),
        (volume.secret.is_some(), "kubernetes.io/secret"),
        (volume.projected.is_some(), "kubernetes.io/projected"),
        (volume.downward_api.is_some(), "kubernetes.io/downward-api"),
        (volume.host_path.is_some(), "kubernetes.io/host-path"),
        (volume.image.is_some(), "kubernetes.io/image"),
        (volume.nfs.is_some(), "kubernetes.io/nfs"),
        (volume.csi.is_some(), "kubernetes.io/csi"),
        (volume.persistent_volume_claim.is_some() || volume.ephemeral.is_some(), "persistentvolumeclaim"),
    ];
    kinds.into_iter().find_map(|(is, name)| is.then_some(name)).unwrap_or("kubernetes.io/empty-dir")
}

/// Nanoseconds since 1970, as CRI has them; 0 is "never".
pub(crate) fn time(nanos: i64) -> Option<Timestamp> {
    (nanos > 0).then(|| Timestamp::from_nanosecond(nanos.into()).ok()).flatten()
}

/// What is said of a container's end that has said nothing itself.
fn said(context: &Context, status: &v1::ContainerStatus) -> String {
    let killed = if status.reason == "OOMKilled" { context.kills.of(&status.id) } else { None };
    killed.unwrap_or_else(|| status.message.clone())
}

/// The run that a container's status tells of, with its termination message. Whoever asks waits for the disk, no thread of
/// others does.
pub(crate) async fn run_of(context: &Context, pod: &Pod, status: &v1::ContainerStatus) -> Run {
    let written = match message_of(context, pod, status) {
        Some(read) => tokio::task::spawn_blocking(read).await.unwrap_or_default(), // The daemon ends.
        None => String::new(),
    };
    run_with(context, status, written)
}

/// The same for those who have nothing else to do: the daemon begins.
pub(crate) fn run_of_now(context: &Context, pod: &Pod, status: &v1::ContainerStatus) -> Run {
    let written = message_of(context, pod, status).map(|read| read()).unwrap_or_default();
    run_with(context, status, written)
}

/// Reads the termination message of a run.
fn message_of(
    context: &Context,
    pod: &Pod,
    status: &v1::ContainerStatus,
) -> Option<impl FnOnce() -> String + Send + use<>> {
    let name = status.metadata.as_ref().map(|metadata| metadata.name.clone()).unwrap_or_default();
    let attempt = status.metadata.as_ref().map_or(0, |metadata| metadata.attempt);
    let file = context.config.generate.paths.termination_message(uid_of(pod), &name, attempt);
    let (_, spec) = pod::spec::container(pod, &name)?;
    let (spec, exit_code, log) = (spec.into_owned(), status.exit_code, PathBuf::from(&status.log_path));
    Some(move || crate::termination::message(&spec, exit_code, &file, &log))
}

fn run_with(context: &Context, status: &v1::ContainerStatus, written: String) -> Run {
    let reason = match status.reason.as_str() {
        "" if status.exit_code == 0 => "Completed".to_owned(),
        "" => "Error".to_owned(),
        reason => reason.to_owned(),
    };
    Run {
        id: status.id.clone(),
        started: time(status.started_at),
        finished: time(status.finished_at),
        exit_code: status.exit_code,
        reason,
        message: if written.is_empty() { said(context, status) } else { written },
    }
}
