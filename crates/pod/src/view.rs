//! What is known of a pod, and how each thing that happens changes it.

use std::collections::{BTreeMap, BTreeSet};

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod};
use serde::{Deserialize, Serialize};

use crate::backoff::{self, Backoff};
use crate::decide::Action;
use crate::probe::{Kind, Outcome, States};
use crate::resize::{self, Allocation, Pending, Resize, Sizes, Step};
use crate::restart;
use crate::spec::{self, Role};

/// The reason for which a sandbox waits for its pod's claims, as the API spells it.
const CLAIMS_FAILED: &str = "FailedPrepareDynamicResources";

/// Everything that is known of a pod beside its spec.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct View {
    /// What outlives the daemon.
    pub record: Record,
    /// The pod's volumes.
    pub volumes: Setup,
    /// What drivers have made ready, or may have, for the pod's claims for devices.
    pub claims: Setup,
    /// The pod's sandbox.
    pub sandbox: Sandbox,
    /// Containers by name, as they run now. In boxes, because a node of the map has room for eleven, and pods have one or two.
    pub containers: BTreeMap<String, Box<ContainerView>>,
    /// Actions under way, by [`Action::key`].
    pub busy: BTreeSet<String>,
    /// What has not been taken down yet.
    pub left: Left,
    /// The endpoints of an ending pod have left the service rules.
    pub left_services: bool,
}

/// What a restarted daemon has to know of a pod.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// When the node took the pod on (`status.startTime`).
    pub started: Option<Timestamp>,
    /// How often the sandbox has been made anew.
    pub sandbox_attempt: u32,
    /// The sandbox attempt in which all init containers have succeeded.
    pub initialized: Option<u32>,
    /// A container has ended in a way that begins all of them anew: what still runs is ended first (KEP-5532).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub resetting: bool,
    /// What is remembered of such ends, of whichever container: the next one costs time.
    #[serde(default)]
    pub resets: Backoff,
    /// Why the pod has been ended by the node: reason and message. Never reverts.
    pub failed: Option<(String, String)>,
    /// Less time than its own that the pod has to end, when the node needs what it uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grace_s: Option<i64>,
    /// The node ended the pod for the node's sake and not for what the pod did (condition `DisruptionTarget`).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub disrupted: bool,
    /// By container name; in boxes as in [`View::containers`].
    pub containers: BTreeMap<String, Box<ContainerRecord>>,
    /// What the node has granted the pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocated: Option<Box<Allocation>>,
    /// What the pod's group was made for, if that is not what was granted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<Box<Allocation>>,
    /// A resize that is not over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resize: Option<Box<Resize>>,
    /// Failures of the volumes.
    pub volumes: Outage,
    /// Failures of the sandbox.
    pub sandbox: Outage,
}

/// A step that failed, and when it may be tried again.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Outage {
    /// The reason as the API spells it, and a message; `None` when the last try went well.
    pub error: Option<(String, String)>,
    /// When the next try may begin.
    pub backoff: Backoff,
}

impl Outage {
    /// A step on this node failed: it is tried again soon, and at once when what it waits for appears ([`Change::Retry`]).
    fn fail(&mut self, reason: &str, message: &str, now: Timestamp) {
        self.error = Some((reason.to_owned(), message.to_owned()));
        self.backoff = self.backoff.after_failed_try(now, SignedDuration::from_secs(1), SignedDuration::from_secs(10));
    }

    /// A registry failed: it gets upstream's rest.
    fn fail_pull(&mut self, reason: &str, message: &str, now: Timestamp) {
        self.error = Some((reason.to_owned(), message.to_owned()));
        self.backoff = self.backoff.after_failed_try(now, backoff::FIRST, backoff::LONGEST);
    }

    fn retry(&mut self) {
        self.backoff.since = None;
    }
}

/// What a restarted daemon has to know of a container.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ContainerRecord {
    /// How often it was started again.
    pub restarts: i32,
    /// The delay before the next start.
    pub backoff: Backoff,
    /// Pulls that failed.
    pub pull: Outage,
    /// Creation or start that failed.
    pub create: Outage,
    /// The probes of the run with the id `probed`.
    pub probes: States,
    /// The run that the probes are about.
    pub probed: Option<String>,
    /// The run whose postStart hook has succeeded.
    pub post_started: Option<String>,
    /// The newest run that has ended.
    pub last: Option<Run>,
    /// The one that ended before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub previous: Option<Run>,
    /// What the run that goes on was given, if that is not what was granted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub actuated: Option<Box<Sizes>>,
    /// The run that is ended so that another one begins with other resources or another image.
    #[serde(default, alias = "resizing", skip_serializing_if = "Option::is_none")]
    pub replacing: Option<String>,
    /// What the newest pull or run is of, as the pod calls it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
}

impl ContainerRecord {
    /// Failures of another image tell nothing of this one. Returns whether there was another.
    fn take_image(&mut self, image: Option<String>) -> bool {
        let is_another = self.image.is_some() && self.image != image;
        if is_another {
            (self.backoff, self.pull, self.create) = Default::default();
        }
        self.image = image;
        is_another
    }
}

/// One run of a container, from start to end.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// Its id, without a scheme.
    pub id: String,
    /// When it started.
    pub started: Option<Timestamp>,
    /// When it ended.
    pub finished: Option<Timestamp>,
    /// Its exit code.
    pub exit_code: i32,
    /// `Completed`, `Error`, `OOMKilled`, …
    pub reason: String,
    /// Its termination message.
    pub message: String,
}

/// How much of an ending pod is left on the node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Left {
    /// Whatever there was.
    #[default]
    Everything,
    /// Containers that have ended, and their logs.
    Logs,
    /// Nothing but its object, in the source.
    Object,
    /// The source has been told.
    Nothing,
}

impl Run {
    /// The end of a run that nobody can tell about any more, as upstream has it.
    pub fn unknown() -> Self {
        Self {
            exit_code: 137,
            reason: "ContainerStatusUnknown".to_owned(),
            message: "The container could not be located when the pod was terminated".to_owned(),
            ..Self::default()
        }
    }
}

/// How far a preparation is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Setup {
    /// Not begun, or to be tried again.
    #[default]
    Absent,
    /// Done.
    Ready,
}

/// The pod's sandbox.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum Sandbox {
    /// There is none.
    #[default]
    Absent,
    /// It stands.
    Ready {
        /// Its id.
        id: String,
        /// The pod's addresses; empty on the host's network.
        addresses: Vec<String>,
    },
    /// It broke, or was stopped; its remains have to go before there is a new one.
    Lost {
        /// Its id.
        id: String,
    },
}

impl Sandbox {
    /// Its id, while there is one.
    pub fn id(&self) -> Option<&str> {
        match self {
            Self::Absent => None,
            Self::Ready { id, .. } | Self::Lost { id } => Some(id),
        }
    }
}

/// A container now.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ContainerView {
    /// The image that its next start uses, when it is on the node.
    pub image: Option<String>,
    /// The digest under which the registry knows it (`imageID`).
    pub image_id: String,
    /// The run that goes on.
    pub running: Option<Running>,
    /// The run that has ended and was not followed by another.
    pub ended: Option<Run>,
}

/// A run that goes on.
#[derive(Debug, Clone, PartialEq)]
pub struct Running {
    /// Its id, without a scheme.
    pub id: String,
    /// When it started.
    pub started: Timestamp,
}

/// Something that happened to a pod.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// An action was begun.
    Begun(Action),
    /// An action ended, well or not; what it led to comes as further changes.
    Ended(Action),
    /// Something appeared that a failed step may have waited for: it is tried again at once.
    Retry,
    /// Images were loaded: pulls that failed are tried again at once.
    RetryPulls,
    /// The volumes are mounted.
    VolumesReady,
    /// The volumes could not be mounted.
    VolumesFailed {
        /// The cause.
        message: String,
    },
    /// Drivers are asked to make the pod's claims for devices ready: there may be something to undo from now on.
    ClaimsBegun,
    /// The pod's claims for devices could not be made ready; there is no sandbox without them.
    ClaimsFailed {
        /// The cause.
        message: String,
    },
    /// The sandbox stands.
    SandboxReady {
        /// Its id.
        id: String,
        /// The pod's addresses.
        addresses: Vec<String>,
    },
    /// A sandbox stands whose making nobody waited for any more: it is taken down with its pod.
    SandboxAppeared {
        /// Its id.
        id: String,
    },
    /// The sandbox could not be made.
    SandboxFailed {
        /// The cause.
        message: String,
    },
    /// The sandbox broke or was stopped.
    SandboxLost,
    /// The sandbox and its containers were removed.
    SandboxRemoved,
    /// The container's image is on the node.
    ImageReady {
        /// The container.
        container: String,
        /// The image, as the runtime knows it.
        image: String,
        /// Its digest in the registry.
        image_id: String,
    },
    /// The container's image could not be had.
    ImageFailed {
        /// The container.
        container: String,
        /// `ErrImagePull`, `ErrImageNeverPull`, `InvalidImageName`, …
        reason: String,
        /// The cause.
        message: String,
    },
    /// A run has begun.
    Started {
        /// The container.
        container: String,
        /// The run's id.
        id: String,
        /// When.
        at: Timestamp,
    },
    /// A run could not begin.
    StartFailed {
        /// The container.
        container: String,
        /// `CreateContainerConfigError`, `CreateContainerError`, `RunContainerError`.
        reason: String,
        /// The cause.
        message: String,
    },
    /// The container's image is not on the node any more: it was removed between its pull and a start that failed.
    ImageMissing {
        /// The container.
        container: String,
    },
    /// Some of the volumes are not there any more: an image that one of them shows was removed.
    VolumesMissing,
    /// A run has ended.
    Exited {
        /// The container.
        container: String,
        /// The run.
        run: Run,
    },
    /// The postStart hook has succeeded.
    PostStarted {
        /// The container.
        container: String,
        /// The run's id.
        id: String,
    },
    /// A probe was answered, or not.
    Probed {
        /// The container.
        container: String,
        /// The run's id.
        id: String,
        /// Which probe.
        kind: Kind,
        /// What it found.
        outcome: Outcome,
        /// Why it failed, or what is odd about its success.
        message: String,
    },
    /// The node ends the pod: its deadline is over, or it is evicted.
    Fail {
        /// As the API spells it.
        reason: String,
        /// For the operator.
        message: String,
        /// How long the pod has to end; `None`: its own time.
        grace_s: Option<i64>,
        /// The pod itself is not to blame.
        disrupted: bool,
    },
    /// The node grants the pod what it wants.
    Allocated {
        /// What that is.
        allocation: Allocation,
        /// The generation of the pod that wants it.
        generation: Option<i64>,
        /// What the pod wants, for the event.
        summary: String,
    },
    /// The node does not grant the pod what it wants.
    ResizePending {
        /// Why, and whether it ever will.
        pending: Pending,
        /// What the pod wants, for the event.
        summary: String,
    },
    /// The pod wants what it has.
    ResizeReverted,
    /// A step of a resize is done.
    Resized(Step),
    /// The pod's group has what it needs for this.
    GroupResized(Allocation),
    /// A step of a resize failed.
    ResizeFailed {
        /// The cause.
        message: String,
    },
    /// What was granted is in force.
    ResizeDone,
    /// All containers of a pod that begins anew have ended.
    Reset,
    /// The endpoints of an ending pod are out of the rules, or the wait for that is over.
    LeftServices,
    /// Sandbox, volumes and groups of a finished pod are gone.
    Cleaned,
    /// Everything of the pod is gone from the node.
    Purged,
    /// The source has been told that nothing of the pod is left.
    Forgotten,
}

/// Something to tell the operator, as an Event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// How serious.
    pub kind: NoteKind,
    /// As upstream spells it.
    pub reason: &'static str,
    /// One sentence.
    pub message: String,
    /// The container it is about.
    pub container: Option<String>,
}

/// How serious a [`Note`] is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NoteKind {
    /// Expected.
    Normal,
    /// Worth a look.
    Warning,
}

impl View {
    /// Whether a step has failed that the appearance of an object may heal.
    pub fn waits_for_objects(&self) -> bool {
        let failed = |outage: &Outage| outage.error.is_some();
        failed(&self.record.volumes)
            || self.waits_for_claims()
            || self.record.containers.values().any(|container| failed(&container.create))
    }

    /// Whether the sandbox is not made because claims are not ready.
    fn waits_for_claims(&self) -> bool {
        self.record.sandbox.error.as_ref().is_some_and(|(reason, _)| reason == CLAIMS_FAILED)
    }

    /// Takes in a change; returns what the operator is to be told. The same change twice changes nothing more.
    pub fn apply(&mut self, pod: &Pod, change: Change, now: Timestamp) -> Vec<Note> {
        match change {
            Change::Begun(action) => {
                self.record.started.get_or_insert(now);
                self.busy.insert(action.key());
                self.begun(pod, &action);
            }
            Change::Ended(action) => drop(self.busy.remove(&action.key())),
            Change::Retry => {
                self.record.volumes.retry();
                if self.waits_for_claims() {
                    self.record.sandbox.retry();
                }
                self.record.containers.values_mut().for_each(|container| container.create.retry());
            }
            Change::RetryPulls => self.record.containers.values_mut().for_each(|container| container.pull.retry()),
            Change::VolumesReady => {
                self.volumes = Setup::Ready;
                self.record.volumes = Outage::default();
            }
            Change::VolumesFailed { message } => {
                self.record.volumes.fail("FailedMount", &message, now);
                return vec![Note::warning("FailedMount", message, None)];
            }
            Change::ClaimsBegun => self.claims = Setup::Ready,
            Change::ClaimsFailed { message } => {
                self.record.sandbox.fail(CLAIMS_FAILED, &message, now);
                let message = format!("Failed to prepare dynamic resources: {message}");
                return vec![Note::warning(CLAIMS_FAILED, message, None)];
            }
            Change::SandboxReady { id, addresses } => {
                self.sandbox = Sandbox::Ready { id, addresses };
                self.record.sandbox = Outage::default();
            }
            Change::SandboxAppeared { id } => {
                if self.sandbox == Sandbox::Absent && crate::decide::is_ending(pod, self) {
                    self.sandbox = Sandbox::Ready { id, addresses: Vec::new() };
                    self.left = Left::Everything;
                }
            }
            Change::SandboxFailed { message } => {
                self.record.sandbox.fail("FailedCreatePodSandBox", &message, now);
                return vec![Note::warning(
                    "FailedCreatePodSandBox",
                    format!("Failed to create pod sandbox: {message}"),
                    None,
                )];
            }
            // Of a pod that ends, it is its own clean-up that stopped the sandbox.
            Change::SandboxLost if crate::decide::is_ending(pod, self) => {}
            Change::SandboxLost => return self.sandbox_lost(),
            Change::SandboxRemoved => {
                self.sandbox = Sandbox::Absent;
                self.record.sandbox_attempt += 1;
            }
            Change::ImageReady { container, image, image_id } => {
                self.record_of(&container).pull = Outage::default();
                let view = self.container_mut(&container);
                view.image = Some(image);
                view.image_id = image_id;
            }
            Change::ImageFailed { container, reason, message } => {
                self.record_of(&container).pull.fail_pull(&reason, &message, now);
                return image_notes(&container, &reason, &message);
            }
            Change::Started { container, id, at } => self.started(&container, id, at),
            Change::StartFailed { container, reason, message } => {
                self.record_of(&container).create.fail(&reason, &message, now);
                return vec![Note::warning("Failed", format!("Error: {message}"), Some(container))];
            }
            Change::ImageMissing { container } => self.container_mut(&container).image = None,
            Change::VolumesMissing => self.volumes = Setup::Absent,
            Change::Exited { container, run } => return self.exited(pod, &container, run),
            Change::PostStarted { container, id } => self.record_of(&container).post_started = Some(id),
            Change::Probed { container, id, kind, outcome, message } => {
                return self.probed(pod, &container, &id, kind, outcome, &message, now);
            }
            Change::Fail { reason, message, grace_s, disrupted } => {
                if self.record.failed.is_none() {
                    self.record.failed = Some((reason, message));
                    self.record.grace_s = grace_s;
                    self.record.disrupted = disrupted;
                }
            }
            Change::Allocated { allocation, generation, summary } => {
                self.allocate(pod, allocation, generation);
                return vec![Note::normal("ResizeStarted", format!("Pod resize started: {summary}"), None)];
            }
            Change::ResizePending { pending, summary } => return self.pend(pending, &summary),
            Change::ResizeReverted => {
                self.record.resize.as_mut().into_iter().for_each(|resize| resize.pending = None);
            }
            Change::Resized(step) => self.resized(step),
            Change::GroupResized(granted) => {
                let is_latest = self.record.allocated.as_deref() == Some(&granted);
                self.record.group = (!is_latest).then(|| Box::new(granted));
            }
            Change::ResizeFailed { message } => {
                let generation = pod.metadata.generation;
                let resize = self.record.resize.get_or_insert_default();
                if resize.fail(message.clone(), now) {
                    let summary = resize::summary(pod, generation, Some(&message));
                    return vec![Note::warning("ResizeError", format!("Pod resize error: {summary}"), None)];
                }
            }
            Change::ResizeDone => {
                let done = self.resize_done().map(|progress| resize::summary(pod, progress.generation, None));
                let note = |summary| Note::normal("ResizeCompleted", format!("Pod resize completed: {summary}"), None);
                return done.map(note).into_iter().collect();
            }
            Change::Reset => self.reset(pod),
            Change::LeftServices => self.left_services = true,
            Change::Cleaned => self.taken_down(Left::Logs),
            Change::Purged => self.taken_down(Left::Object),
            Change::Forgotten => self.left = Left::Nothing,
        }
        Vec::new()
    }

    fn taken_down(&mut self, left: Left) {
        self.left = left;
        self.claims = Setup::Absent;
    }

    /// What begins now begins with what is granted now.
    fn begun(&mut self, pod: &Pod, action: &Action) {
        match action {
            Action::CreateSandbox { .. } => self.record.group = None,
            Action::Start { container, .. } => {
                // From the first main container on, init containers hold back nobody.
                if spec::container(pod, container).is_some_and(|(role, _)| role == Role::Main) {
                    self.record.initialized = Some(self.record.sandbox_attempt);
                }
                self.record_of(container).actuated = None;
            }
            Action::EnsureImage { container } => {
                let image = spec::container(pod, container).and_then(|(_, spec)| spec.image.clone());
                if self.record_of(container).take_image(image) {
                    self.container_mut(container).image = None;
                }
            }
            Action::Stop(stop) if stop.replaces => self.record_of(&stop.container).replacing = Some(stop.id.clone()),
            _ => {}
        }
    }

    fn pend(&mut self, pending: Pending, summary: &str) -> Vec<Note> {
        let resize = self.record.resize.get_or_insert_default();
        let same = |known: &Pending| (known.infeasible, known.generation) == (pending.infeasible, pending.generation);
        let is_known = resize.pending.as_ref().is_some_and(same);
        let reason = if pending.infeasible { "ResizeInfeasible" } else { "ResizeDeferred" };
        let note = Note::warning(reason, format!("Pod resize {}: {summary}", pending.reason()), None);
        resize.pending = Some(pending);
        if is_known { Vec::new() } else { vec![note] }
    }

    /// The record of a container; made when there is none.
    pub fn record_of(&mut self, container: &str) -> &mut ContainerRecord {
        self.record.containers.entry(container.to_owned()).or_default()
    }

    /// The view of a container; made when there is none.
    pub fn container_mut(&mut self, container: &str) -> &mut ContainerView {
        self.containers.entry(container.to_owned()).or_default()
    }

    /// The run of a container that goes on.
    pub fn running(&self, container: &str) -> Option<&Running> {
        self.containers.get(container)?.running.as_ref()
    }

    /// Whether a container has got another image than what is known is about.
    pub(crate) fn is_outdated(&self, container: &Container) -> bool {
        let known = self.record.containers.get(&container.name).and_then(|record| record.image.as_ref());
        known.is_some_and(|image| container.image.as_ref() != Some(image))
    }

    /// Whether nothing of the pod is left on the node.
    pub fn is_taken_down(&self) -> bool {
        matches!(self.left, Left::Object | Left::Nothing)
    }

    /// Whether an action with this key is under way.
    pub fn is_busy(&self, key: &str) -> bool {
        self.busy.contains(key)
    }

    fn sandbox_lost(&mut self) -> Vec<Note> {
        let Sandbox::Ready { id, .. } = &self.sandbox else { return Vec::new() };
        self.sandbox = Sandbox::Lost { id: id.clone() };
        vec![Note::normal("SandboxChanged", "Pod sandbox changed, it will be killed and re-created.".to_owned(), None)]
    }

    fn started(&mut self, container: &str, id: String, at: Timestamp) {
        let follows = self.containers.get(container).is_some_and(|view| view.ended.is_some());
        let known = self.running(container).is_some_and(|running| running.id == id);
        let record = self.record_of(container);
        record.create = Outage::default();
        if record.probed.as_ref() != Some(&id) {
            record.probed = Some(id.clone());
            record.probes = States::default();
        }
        if follows && !known {
            record.restarts += 1;
        }
        let view = self.container_mut(container);
        view.ended = None;
        view.running = Some(Running { id, started: at });
    }

    fn exited(&mut self, pod: &Pod, container: &str, run: Run) -> Vec<Note> {
        let seen =
            self.containers.get(container).and_then(|view| view.ended.as_ref()).is_some_and(|ended| ended.id == run.id);
        if seen {
            return Vec::new();
        }
        // A late word of an old run must not end the one that follows it.
        let other = self.running(container).is_some_and(|running| running.id != run.id);
        let old = self.record.containers.get(container).and_then(|record| record.last.as_ref());
        if other || old.is_some_and(|last| last.id == run.id) {
            return Vec::new();
        }
        let finished = run.finished.unwrap_or_default();
        let is_reset = self.record.resetting;
        let record = self.record_of(container);
        // One that was ended for another, or with the others, has not failed.
        if record.replacing.as_ref() != Some(&run.id) && !is_reset {
            record.backoff = record.backoff.after_failure(finished, run.started);
        }
        let delay = record.backoff.delay.unwrap_or_default();
        record.previous = record.last.replace(run.clone());
        let view = self.container_mut(container);
        view.running = None;
        // A restart asks for the image again: the policy may be Always, or it was removed meanwhile.
        view.image = None;
        let exit_code = run.exit_code;
        view.ended = Some(run.clone());
        if !is_reset && self.begins_reset(pod, container, &run) {
            let message = format!("Container {container} exited with code {exit_code}: all containers are restarted");
            return vec![Note::normal("RestartAllContainers", message, Some(container.to_owned()))];
        }
        let restarts = spec::container(pod, container)
            .is_some_and(|(role, spec)| restart::after_exit(pod, role, &spec, exit_code) == restart::Verdict::Restart);
        if !restarts || is_reset || delay.is_zero() || pod.metadata.deletion_timestamp.is_some() {
            return Vec::new();
        }
        let message = format!("Back-off restarting failed container {container} in pod {}", describe(pod));
        vec![Note::warning("BackOff", message, Some(container.to_owned()))]
    }

    /// Notes that a pod begins anew, if the end of a container makes it.
    fn begins_reset(&mut self, pod: &Pod, container: &str, run: &Run) -> bool {
        let asks = spec::container(pod, container).is_some_and(|(_, spec)| restart::resets_pod(&spec, run.exit_code));
        self.record.resetting = asks && !crate::decide::is_ending(pod, self);
        if self.record.resetting {
            self.record.resets = self.record.resets.after_failure(run.finished.unwrap_or_default(), run.started);
        }
        self.record.resetting
    }

    /// As if none of the containers had run yet, but for their counts and what is told of their last ends.
    fn reset(&mut self, pod: &Pod) {
        self.record.resetting = false;
        self.record.initialized = None;
        for (_, container) in spec::containers(pod) {
            let Some(view) = self.containers.get_mut(&container.name) else { continue };
            if view.ended.take().is_some() {
                let record = self.record_of(&container.name);
                record.restarts += 1;
                record.backoff = Backoff::default(); // The pod has had its own.
            }
        }
    }

    #[expect(clippy::too_many_arguments, reason = "the fields of one change")]
    fn probed(
        &mut self,
        pod: &Pod,
        container: &str,
        id: &str,
        kind: Kind,
        outcome: Outcome,
        message: &str,
        now: Timestamp,
    ) -> Vec<Note> {
        let Some((_, spec)) = spec::container(pod, container) else { return Vec::new() };
        let Some(probe) = kind.of(&spec) else { return Vec::new() };
        let record = self.record_of(container);
        if record.probed.as_deref() != Some(id) {
            return Vec::new(); // about a run that has ended
        }
        let state = record.probes.get_mut(kind);
        *state = state.after(probe, outcome, now);
        let note = |reason, what| {
            let message = format!("{} probe {what}: {message}", kind.as_str());
            vec![Note::warning(reason, message, Some(container.to_owned()))]
        };
        match outcome {
            Outcome::Success if message.is_empty() => Vec::new(),
            Outcome::Success => note("ProbeWarning", "warning"),
            Outcome::Failure => note("Unhealthy", "failed"),
        }
    }
}

fn image_notes(container: &str, reason: &str, message: &str) -> Vec<Note> {
    let about = || Some(container.to_owned());
    vec![
        Note::warning("Failed", message.to_owned(), about()),
        Note::warning("Failed", format!("Error: {reason}"), about()),
    ]
}

/// `name_namespace(uid)`, as upstream names a pod in messages.
pub(crate) fn describe(pod: &Pod) -> String {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    format!("{}_{}({})", text(&pod.metadata.name), text(&pod.metadata.namespace), text(&pod.metadata.uid))
}

impl Note {
    /// An expected event.
    pub fn normal(reason: &'static str, message: String, container: Option<String>) -> Self {
        Self { kind: NoteKind::Normal, reason, message, container }
    }

    /// An event worth a look.
    pub fn warning(reason: &'static str, message: String, container: Option<String>) -> Self {
        Self { kind: NoteKind::Warning, reason, message, container }
    }
}
