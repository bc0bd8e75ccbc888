//! What can happen to a pod, and how the view takes it in.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;

use crate::backoff::Backoff;
use crate::decide::Action;
use crate::probe::{Answer, Kind, Outcome, States};
use crate::resize::{self, Allocation, Pending, Step};
use crate::restart;
use crate::spec::{self, Role};
use crate::view::{CLAIMS_FAILED, Left, Outage, Run, Running, Sandbox, Setup, View, describe};

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
    /// The preStop hook is over, well or not.
    PreStopped {
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
        /// Out of turn: nobody listened so far.
        early: bool,
        /// What it was told.
        answer: Answer,
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
    /// The node has seen that the pod is to be deleted: its grace period begins.
    Deleted,
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

impl View {
    /// Takes in a change; returns what the operator is to be told. The same change twice changes nothing more.
    pub fn apply(&mut self, pod: &Pod, change: Change, now: Timestamp) -> Vec<Note> {
        match change {
            Change::Begun(action) => self.begun(pod, &action, now),
            Change::Ended(action) => drop(self.busy.remove(&action.key())),
            Change::Retry => self.retry(),
            Change::RetryPulls => self.record.containers.values_mut().for_each(|container| container.pull.retry()),
            Change::VolumesReady => (self.volumes, self.record.volumes) = (Setup::Ready, Outage::default()),
            Change::VolumesFailed { message } => return self.volumes_failed(message, now),
            Change::VolumesMissing => self.volumes = Setup::Absent,
            Change::ClaimsBegun => self.claims = Setup::Ready,
            Change::ClaimsFailed { message } => return self.claims_failed(&message, now),
            Change::SandboxReady { id, addresses } => {
                (self.sandbox, self.record.sandbox) = (Sandbox::Ready { id, addresses }, Outage::default());
            }
            Change::SandboxAppeared { id } => self.sandbox_appeared(pod, id),
            Change::SandboxFailed { message } => return self.sandbox_failed(&message, now),
            Change::SandboxLost => return self.sandbox_lost(pod),
            Change::SandboxRemoved => self.sandbox_removed(pod),
            Change::ImageReady { container, image, image_id } => self.image_ready(&container, image, image_id),
            Change::ImageFailed { container, reason, message } => {
                return self.image_failed(&container, &reason, &message, now);
            }
            Change::ImageMissing { container } => self.container_mut(&container).image = None,
            Change::Started { container, id, at } => self.started(&container, id, at),
            Change::StartFailed { container, reason, message } => {
                return self.start_failed(container, &reason, &message, now);
            }
            Change::Exited { container, run } => return self.exited(pod, &container, run),
            Change::PostStarted { container, id } => self.record_of(&container).post_started = Some(id),
            Change::PreStopped { container, id } => self.record_of(&container).pre_stopped = Some(id),
            Change::Probed { container, id, kind, early, answer } => {
                return self.probed(pod, (&container, &id), (kind, early), &answer, now);
            }
            Change::Fail { reason, message, grace_s, disrupted } => self.fail((reason, message), grace_s, disrupted),
            Change::Allocated { allocation, generation, summary } => {
                self.allocate(pod, allocation, generation);
                return vec![Note::normal("ResizeStarted", format!("Pod resize started: {summary}"), None)];
            }
            Change::ResizePending { pending, summary } => return self.pend(pending, &summary),
            Change::ResizeReverted => {
                self.record.resize.as_mut().into_iter().for_each(|resize| resize.pending = None);
            }
            Change::Resized(step) => self.resized(step),
            Change::GroupResized(granted) => self.group_resized(granted),
            Change::ResizeFailed { message } => return self.resize_failed(pod, &message, now),
            Change::ResizeDone => return self.tell_resize_done(pod),
            Change::Deleted => _ = self.record.deleted.get_or_insert(now),
            Change::Reset => self.reset(pod),
            Change::LeftServices => self.left_services = true,
            Change::Cleaned => self.taken_down(Left::Logs),
            Change::Purged => self.taken_down(Left::Object),
            Change::Forgotten => self.left = Left::Nothing,
        }
        Vec::new()
    }

    /// What begins now begins with what is granted now.
    fn begun(&mut self, pod: &Pod, action: &Action, now: Timestamp) {
        self.record.started.get_or_insert(now);
        self.busy.insert(action.key());
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

    fn retry(&mut self) {
        self.record.volumes.retry();
        if self.waits_for_claims() {
            self.record.sandbox.retry();
        }
        self.record.containers.values_mut().for_each(|container| container.create.retry());
    }

    fn volumes_failed(&mut self, message: String, now: Timestamp) -> Vec<Note> {
        self.record.volumes.fail("FailedMount", &message, now);
        vec![Note::warning("FailedMount", message, None)]
    }

    fn claims_failed(&mut self, message: &str, now: Timestamp) -> Vec<Note> {
        self.record.sandbox.fail(CLAIMS_FAILED, message, now);
        vec![Note::warning(CLAIMS_FAILED, format!("Failed to prepare dynamic resources: {message}"), None)]
    }

    fn sandbox_appeared(&mut self, pod: &Pod, id: String) {
        if self.sandbox == Sandbox::Absent && crate::decide::is_ending(pod, self) {
            self.sandbox = Sandbox::Ready { id, addresses: Vec::new() };
            self.left = Left::Everything;
        }
    }

    fn sandbox_failed(&mut self, message: &str, now: Timestamp) -> Vec<Note> {
        const REASON: &str = "FailedCreatePodSandBox";
        self.record.sandbox.fail(REASON, message, now);
        vec![Note::warning(REASON, format!("Failed to create pod sandbox: {message}"), None)]
    }

    /// Of a pod that ends, it is its own clean-up that stopped the sandbox.
    fn sandbox_lost(&mut self, pod: &Pod) -> Vec<Note> {
        match &self.sandbox {
            Sandbox::Ready { id, .. } if !crate::decide::is_ending(pod, self) => {
                self.sandbox = Sandbox::Lost { id: id.clone() };
            }
            _ => return Vec::new(),
        }
        vec![Note::normal("SandboxChanged", "Pod sandbox changed, it will be killed and re-created.".to_owned(), None)]
    }

    fn image_ready(&mut self, container: &str, image: String, image_id: String) {
        self.record_of(container).pull = Outage::default();
        let view = self.container_mut(container);
        view.image = Some(image);
        view.image_id = image_id;
    }

    fn image_failed(&mut self, container: &str, reason: &str, message: &str, now: Timestamp) -> Vec<Note> {
        self.record_of(container).pull.fail_pull(reason, message, now);
        let note = |event, message| Note::warning(event, message, Some(container.to_owned()));
        vec![note(event_of_image(reason), message.to_owned()), note("Failed", format!("Error: {reason}"))]
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

    fn start_failed(&mut self, container: String, reason: &str, message: &str, now: Timestamp) -> Vec<Note> {
        self.record_of(&container).create.fail(reason, message, now);
        vec![Note::warning("Failed", format!("Error: {message}"), Some(container))]
    }

    fn exited(&mut self, pod: &Pod, container: &str, run: Run) -> Vec<Note> {
        if self.is_of_old(container, &run.id) {
            return Vec::new();
        }
        let is_reset = self.record.resetting;
        let record = self.record_of(container);
        // One that was ended for another, or with the others, has not failed.
        if record.replacing.as_ref() != Some(&run.id) && !is_reset {
            record.backoff = record.backoff.after_failure(run.finished.unwrap_or_default(), run.started);
        }
        let delay = record.backoff.delay.unwrap_or_default();
        record.previous = record.last.replace(run.clone());
        let view = self.container_mut(container);
        view.running = None;
        // A restart asks for the image again: the policy may be Always, or it was removed meanwhile.
        view.image = None;
        view.ended = Some(run.clone());
        if !is_reset && self.begins_reset(pod, container, &run) {
            let code = run.exit_code;
            let message = format!("Container {container} exited with code {code}: all containers are restarted");
            return vec![Note::normal("RestartAllContainers", message, Some(container.to_owned()))];
        }
        let verdict =
            spec::container(pod, container).map(|(role, spec)| restart::after_exit(pod, role, &spec, run.exit_code));
        let is_restarted = verdict == Some(restart::Verdict::Restart) && pod.metadata.deletion_timestamp.is_none();
        if !is_restarted || is_reset || delay.is_zero() {
            return Vec::new();
        }
        let message = format!("Back-off restarting failed container {container} in pod {}", describe(pod));
        vec![Note::warning("BackOff", message, Some(container.to_owned()))]
    }

    /// Whether the end of this run is known, or is that of an old one, which must not end the one that follows it.
    fn is_of_old(&self, container: &str, run: &str) -> bool {
        let view = self.containers.get(container);
        let ended = view.and_then(|view| view.ended.as_ref());
        let last = self.record.containers.get(container).and_then(|record| record.last.as_ref());
        let another = self.running(container).is_some_and(|running| running.id != run);
        another || ended.is_some_and(|ended| ended.id == run) || last.is_some_and(|last| last.id == run)
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

    /// What init containers have done to a sandbox went with it: in the next one they run again.
    fn sandbox_removed(&mut self, pod: &Pod) {
        self.sandbox = Sandbox::Absent;
        self.record.sandbox_attempt += 1;
        if crate::decide::is_ending(pod, self) {
            return;
        }
        for (_, container) in spec::containers(pod).filter(|(role, _)| *role == Role::Init) {
            let Some(view) = self.containers.get_mut(&container.name) else { continue };
            if view.ended.take_if(|run| run.exit_code == 0).is_some() {
                let record = self.record_of(&container.name);
                (record.restarts, record.backoff) = (record.restarts + 1, Backoff::default());
            }
        }
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

    fn probed(
        &mut self,
        pod: &Pod,
        (container, id): (&str, &str),
        (kind, early): (Kind, bool),
        answer: &Answer,
        now: Timestamp,
    ) -> Vec<Note> {
        let Some((_, spec)) = spec::container(pod, container) else { return Vec::new() };
        let Some(probe) = kind.of(&spec) else { return Vec::new() };
        let record = self.record_of(container);
        if record.probed.as_deref() != Some(id) {
            return Vec::new(); // about a run that has ended
        }
        let counts = !early || answer.outcome == Some(Outcome::Success);
        if counts {
            let state = record.probes.get_mut(kind);
            *state = match answer.outcome {
                Some(outcome) => state.after(probe, outcome, answer.asked),
                None => state.unasked(answer.asked),
            };
        }
        // Of the two others only one is asked at a time.
        if kind != Kind::Liveness {
            self.container_mut(container).refused = answer.refused.then_some((kind, now));
        }
        let message = &answer.message;
        let note = |reason, what| {
            let message = format!("{} probe {what}: {message}", kind.as_str());
            vec![Note::warning(reason, message, Some(container.to_owned()))]
        };
        match answer.outcome {
            Some(Outcome::Success) if message.is_empty() => Vec::new(),
            Some(Outcome::Success) => note("ProbeWarning", "warning"),
            Some(Outcome::Failure) if counts => note("Unhealthy", "failed"),
            None if counts => note("Unhealthy", "errored and resulted in unknown state"),
            Some(Outcome::Failure) | None => Vec::new(),
        }
    }

    /// The first reason counts.
    fn fail(&mut self, reason: (String, String), grace_s: Option<i64>, disrupted: bool) {
        if self.record.failed.is_none() {
            self.record.failed = Some(reason);
            self.record.grace_s = grace_s;
            self.record.disrupted = disrupted;
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

    fn group_resized(&mut self, granted: Allocation) {
        let is_latest = self.record.allocated.as_deref() == Some(&granted);
        self.record.group = (!is_latest).then(|| Box::new(granted));
    }

    fn resize_failed(&mut self, pod: &Pod, message: &str, now: Timestamp) -> Vec<Note> {
        let resize = self.record.resize.get_or_insert_default();
        if !resize.fail(message.to_owned(), now) {
            return Vec::new();
        }
        let summary = resize::summary(pod, pod.metadata.generation, Some(message));
        vec![Note::warning("ResizeError", format!("Pod resize error: {summary}"), None)]
    }

    fn tell_resize_done(&mut self, pod: &Pod) -> Vec<Note> {
        let done = self.resize_done().map(|progress| resize::summary(pod, progress.generation, None));
        let note = |summary| Note::normal("ResizeCompleted", format!("Pod resize completed: {summary}"), None);
        done.map(note).into_iter().collect()
    }

    fn taken_down(&mut self, left: Left) {
        self.left = left;
        self.claims = Setup::Absent;
    }
}

/// Upstream's reason of the event that says why an image cannot be had.
fn event_of_image(reason: &str) -> &'static str {
    match reason {
        "ErrImageNeverPull" => "ErrImageNeverPull",
        "InvalidImageName" | "ImageInspectError" => "InspectFailed",
        _ => "Failed",
    }
}
