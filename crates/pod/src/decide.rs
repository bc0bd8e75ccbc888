//! The decision: from what is known to what is to be done, and why.

use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{Container, Pod};

use crate::backoff::Backoff;
use crate::probe::{self, Kind, Outcome, States};
use crate::resize::{self, Step};
use crate::restart::{Verdict, after_run};
use crate::spec::{self, Role};
use crate::view::{Left, Outage, Running, Sandbox, Setup, View};

/// One thing to do. Several may go on at once, never two with the same [`Action::key`].
#[derive(Debug, Clone, PartialEq)]
pub enum Action {
    /// Mount the pod's volumes.
    MountVolumes,
    /// Have the pod's claims for devices made ready, and make the sandbox.
    CreateSandbox {
        /// How many there were before.
        attempt: u32,
    },
    /// Remove the sandbox with all its containers, to make a new one.
    RemoveSandbox {
        /// Its id.
        id: String,
    },
    /// See that the container's image is on the node, by its pull policy.
    EnsureImage {
        /// The container.
        container: String,
    },
    /// Create and start the container.
    Start {
        /// The container.
        container: String,
        /// How often it was started before.
        attempt: u32,
    },
    /// Run the postStart hook.
    PostStart {
        /// The container.
        container: String,
        /// The run's id.
        id: String,
    },
    /// Run a probe.
    Probe {
        /// The container.
        container: String,
        /// The run's id.
        id: String,
        /// Which.
        kind: Kind,
        /// Out of turn: nobody listened so far.
        early: bool,
    },
    /// End a run: preStop, then the stop signal, then SIGKILL.
    Stop(Stop),
    /// Write what was granted to the groups of the pod and its containers.
    Resize {
        /// In this order.
        steps: Vec<Step>,
    },
    /// Wait, within bounds, until the pod's endpoints have left the service rules.
    LeaveServices,
    /// Stop the sandbox of a finished pod, give back its claims, unmount its volumes, remove its groups. Its containers stay for their logs.
    CleanUp,
    /// Remove everything of a deleted pod.
    Purge,
    /// Tell the source that nothing of the pod is left.
    Forget,
}

/// How to end a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Stop {
    /// The container.
    pub container: String,
    /// The run's id.
    pub id: String,
    /// Seconds from the begin of preStop to SIGKILL.
    pub grace_s: i64,
    /// Why, for the event.
    pub reason: String,
    /// Another run begins with other resources or another image, whatever the restart policy says of this one.
    pub replaces: bool,
}

impl Action {
    /// What makes two actions the same.
    pub fn key(&self) -> String {
        match self {
            Self::MountVolumes => "volumes".to_owned(),
            Self::CreateSandbox { .. } | Self::RemoveSandbox { .. } => "sandbox".to_owned(),
            Self::EnsureImage { container } => format!("image/{container}"),
            Self::Start { container, .. } => format!("start/{container}"),
            Self::PostStart { container, id } => format!("poststart/{container}/{id}"),
            Self::Probe { container, id, kind, .. } => format!("probe/{container}/{id}/{}", kind.as_str()),
            Self::Stop(stop) => stop_key(&stop.container, &stop.id),
            Self::Resize { .. } => "resize".to_owned(),
            Self::LeaveServices => "leave".to_owned(),
            Self::CleanUp => "cleanup".to_owned(),
            Self::Purge => "purge".to_owned(),
            Self::Forget => "forget".to_owned(),
        }
    }
}

/// Whether an action with this key makes something of a pod.
fn is_preparation(key: &str) -> bool {
    key == "volumes" || key == "sandbox" || key.starts_with("start/")
}

fn stop_key(container: &str, id: &str) -> String {
    format!("stop/{container}/{id}")
}

/// What is to be done now, and when to ask again.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Plan {
    /// To be begun now.
    pub actions: Vec<Action>,
    /// What is under way and no longer wanted, by [`Action::key`]: it is waited for no longer than it needs to stop.
    pub aborts: Vec<String>,
    /// When something may be due that no change announces: a probe, the end of a back-off, a deadline.
    pub next_due: Option<Timestamp>,
    /// The pod's `activeDeadlineSeconds` are over: apply [`crate::Change::Fail`].
    pub deadline_exceeded: bool,
    /// What was granted is in force: apply [`crate::Change::ResizeDone`].
    pub resize_done: bool,
    /// Nothing runs any more of a pod that begins anew: apply [`crate::Change::Reset`] and decide again.
    pub reset: bool,
}

/// Decides what a pod needs next.
pub fn decide(pod: &Pod, view: &View, now: Timestamp) -> Plan {
    let mut planner = Planner { pod, view, now, plan: Plan::default() };
    if is_ending(pod, view) {
        planner.end();
    } else {
        planner.run();
    }
    planner.plan
}

/// Whether the pod is being ended, or has ended.
pub(crate) fn is_ending(pod: &Pod, view: &View) -> bool {
    pod.metadata.deletion_timestamp.is_some()
        || spec::ended_phase(pod).is_some()
        || view.record.failed.is_some()
        || has_finished(pod, view)
}

/// Whether every container has run its course: none will run again by itself.
pub(crate) fn has_finished(pod: &Pod, view: &View) -> bool {
    if view.record.resetting {
        return false;
    }
    let verdict = |role: Role, container: &Container| -> Option<Verdict> {
        let last = view.containers.get(&container.name)?.ended.as_ref()?;
        Some(after_run(pod, role, container, view.record.containers.get(&container.name).map(|record| &**record), last))
    };
    if spec::containers(pod)
        .any(|(role, container)| role == Role::Init && verdict(role, container) == Some(Verdict::Failed))
    {
        return true;
    }
    let mut mains = spec::containers(pod).filter(|(role, _)| *role == Role::Main).peekable();
    mains.peek().is_some()
        && mains.all(|(role, container)| matches!(verdict(role, container), Some(Verdict::Done | Verdict::Failed)))
}

/// Whether the init containers let the mains begin, in the present sandbox.
pub(crate) fn is_initialized(pod: &Pod, view: &View) -> bool {
    uninitialized(pod, view).next().is_none()
}

/// The init containers that the mains wait for.
pub(crate) fn uninitialized<'a>(pod: &'a Pod, view: &View) -> impl Iterator<Item = &'a str> {
    let is_done = |role, container: &Container| match role {
        Role::Main | Role::Ephemeral => true,
        Role::Init => {
            let ended = view.containers.get(&container.name).and_then(|view| view.ended.as_ref());
            ended.is_some_and(|run| run.exit_code == 0)
        }
        Role::Sidecar => {
            let running = view.running(&container.name).is_some();
            view.record.initialized == Some(view.record.sandbox_attempt) || running && is_started(view, container)
        }
    };
    let waited_for = spec::containers(pod).filter(move |(role, container)| !is_done(*role, container));
    waited_for.map(|(_, container)| container.name.as_str())
}

/// Whether a running container counts as started: its hook and its startup probe have succeeded.
pub(crate) fn is_started(view: &View, container: &Container) -> bool {
    let Some(record) = view.record.containers.get(&container.name) else { return false };
    let Some(running) = view.running(&container.name) else { return false };
    let hooked = post_start(container).is_none() || record.post_started.as_ref() == Some(&running.id);
    hooked && record.probes.started(container)
}

fn post_start(container: &Container) -> Option<&k8s_openapi::api::core::v1::LifecycleHandler> {
    container.lifecycle.as_ref()?.post_start.as_ref()
}

struct Planner<'a> {
    pod: &'a Pod,
    view: &'a View,
    now: Timestamp,
    plan: Plan,
}

impl<'a> Planner<'a> {
    fn push(&mut self, action: Action) {
        if !self.view.is_busy(&action.key()) {
            self.plan.actions.push(action);
        }
    }

    /// Notes when something is due; returns whether that is now.
    fn is_due(&mut self, at: Option<Timestamp>) -> bool {
        match at {
            Some(at) if at > self.now => {
                self.plan.next_due = Some(self.plan.next_due.map_or(at, |due| due.min(at)));
                false
            }
            _ => true,
        }
    }

    fn may_try(&mut self, backoff: Backoff) -> bool {
        self.is_due(backoff.until(self.now))
    }

    /// A pod that is to run.
    fn run(&mut self) {
        if !self.is_due(self.deadline()) {
        } else if self.deadline().is_some() {
            self.plan.deadline_exceeded = true;
            return;
        }
        if self.view.record.resetting {
            self.reset();
            return;
        }
        self.prepare();
        self.replace();
        self.resize();
        self.ensure_images();
        let is_prepared = self.view.volumes == Setup::Ready && matches!(self.view.sandbox, Sandbox::Ready { .. });
        if is_prepared && !self.is_resizing() {
            self.start_containers();
        }
        self.tend_running();
    }

    /// Ends what runs with another image than the one that its container has now, but for init containers: they may be in the
    /// middle of what is done once.
    fn replace(&mut self) {
        let (pod, view) = (self.pod, self.view);
        for (role, container) in spec::containers(pod).filter(|(_, one)| view.is_outdated(one)) {
            if self.view.is_busy(&format!("image/{}", container.name)) {
                self.plan.aborts.push(format!("image/{}", container.name));
            }
            let Some(running) = view.running(&container.name).filter(|_| role != Role::Init) else { continue };
            self.push(Action::Stop(Stop {
                container: container.name.clone(),
                id: running.id.clone(),
                grace_s: spec::grace_s(pod),
                reason: format!("Container {} definition changed, will be restarted", container.name),
                replaces: true,
            }));
        }
    }

    /// Ends what runs, without grace as upstream does it: an application asked for that.
    fn reset(&mut self) {
        let (pod, view) = (self.pod, self.view);
        let running: Vec<_> =
            spec::containers(pod).filter_map(|(_, one)| Some((&one.name, view.running(&one.name)?))).collect();
        for (name, running) in &running {
            self.push(Action::Stop(Stop {
                container: (*name).clone(),
                id: running.id.clone(),
                grace_s: 0,
                reason: format!("Container {name} will be restarted with all containers of the pod"),
                replaces: false,
            }));
        }
        // Who begins anew again and again waits as one that crashes does, whichever of its containers asks for it.
        self.plan.reset = running.is_empty() && !self.any_starting() && self.may_try(view.record.resets);
    }

    /// Brings what was granted into force. Containers that want to be restarted for it end first.
    fn resize(&mut self) {
        let Some(resize) = self.view.record.resize.as_ref().filter(|resize| resize.progress.is_some()) else { return };
        let restarts: Vec<_> = resize::restarts(self.pod, self.view).collect();
        for (container, running) in &restarts {
            self.push(Action::Stop(Stop {
                container: container.name.clone(),
                id: running.id.clone(),
                grace_s: spec::grace_s(self.pod),
                reason: format!("Container {} resize requires restart", container.name),
                replaces: true,
            }));
        }
        if !restarts.is_empty() {
            return;
        }
        let steps = resize::steps(self.pod, self.view);
        if steps.is_empty() {
            // What began before it was granted gets the old sizes, and shows soon.
            let begins = |key: &String| key == "resize" || key == "sandbox" || key.starts_with("start/");
            self.plan.resize_done = !self.view.busy.iter().any(begins);
        } else if self.may_try(resize.backoff) {
            self.push(Action::Resize { steps });
        }
    }

    /// Whether a container that starts now might need more than the pod's group has.
    fn is_resizing(&self) -> bool {
        let granted =
            |resize: &resize::Resize| resize.progress.as_ref().is_some_and(|progress| progress.error.is_none());
        self.view.record.resize.as_deref().is_some_and(granted) && !resize::steps(self.pod, self.view).is_empty()
    }

    fn deadline(&self) -> Option<Timestamp> {
        spec::active_deadline(self.pod, self.view.record.started)
    }

    /// Volumes and sandbox, side by side.
    fn prepare(&mut self) {
        let Outage { backoff, .. } = self.view.record.volumes;
        if self.view.volumes == Setup::Absent && self.may_try(backoff) {
            self.push(Action::MountVolumes);
        }
        let Outage { backoff, .. } = self.view.record.sandbox;
        match &self.view.sandbox {
            Sandbox::Ready { .. } => {}
            Sandbox::Lost { id } if self.may_try(backoff) => self.push(Action::RemoveSandbox { id: id.clone() }),
            Sandbox::Absent if self.may_try(backoff) => {
                self.push(Action::CreateSandbox { attempt: self.view.record.sandbox_attempt })
            }
            Sandbox::Lost { .. } | Sandbox::Absent => {}
        }
    }

    /// Images of everything that will start, while volumes and sandbox are made.
    fn ensure_images(&mut self) {
        let own = spec::containers(self.pod);
        let wanted = own.filter(|(role, container)| self.wants_start(*role, container));
        let wanted: Vec<&str> = wanted.map(|(_, container)| container.name.as_str()).collect();
        wanted.into_iter().chain(self.unstarted_ephemeral()).for_each(|name| self.ensure_image(name));
    }

    fn ensure_image(&mut self, name: &str) {
        let view = self.view.containers.get(name);
        if view.is_some_and(|view| view.running.is_some()) {
            return;
        }
        if self.is_outdated(name) {
            return self.push(Action::EnsureImage { container: name.to_owned() });
        }
        if view.is_some_and(|view| view.image.is_some()) {
            return;
        }
        let record = self.view.record.containers.get(name).cloned().unwrap_or_default();
        // That of a container which crashed is looked at when its back-off is over, not before; so is one that went
        // missing, or a node whose images go as fast as they come would do nothing but pull.
        let rests = record.backoff.until(self.now).is_some();
        if self.may_try(record.pull.backoff) && !rests && self.may_try(record.create.backoff) {
            self.push(Action::EnsureImage { container: name.to_owned() });
        }
    }

    /// What is known of the container is about another image.
    fn is_outdated(&self, name: &str) -> bool {
        spec::container(self.pod, name).is_some_and(|(_, container)| self.view.is_outdated(&container))
    }

    /// Those that never ran: they run once, whatever became of that and of the sandbox they ran in.
    fn unstarted_ephemeral(&self) -> Vec<&'a str> {
        let view = self.view;
        let has_run = |name: &str| {
            let record = view.record.containers.get(name);
            view.running(name).is_some()
                || record.is_some_and(|record| record.probed.is_some() || record.last.is_some())
        };
        spec::ephemeral(self.pod).map(|one| one.name.as_str()).filter(|name| !has_run(name)).collect()
    }

    /// Whether a container that does not run should.
    fn wants_start(&self, role: Role, container: &Container) -> bool {
        let Some(view) = self.view.containers.get(&container.name) else { return true };
        match (&view.running, &view.ended) {
            (Some(_), _) => false,
            (None, None) => true,
            (None, Some(run)) => {
                let record = self.view.record.containers.get(&container.name).map(|record| &**record);
                after_run(self.pod, role, container, record, run) == Verdict::Restart
            }
        }
    }

    fn start_containers(&mut self) {
        let initialized = is_initialized(self.pod, self.view);
        self.unstarted_ephemeral().into_iter().for_each(|name| self.start(name));
        for (role, container) in spec::containers(self.pod) {
            if role == Role::Main && !initialized {
                return;
            }
            if self.wants_start(role, container) {
                self.start(&container.name);
            }
            let passes = match role {
                Role::Main | Role::Ephemeral => !self.is_hooking(container),
                Role::Init => self.has_succeeded(container),
                Role::Sidecar => initialized || is_started(self.view, container),
            };
            if !passes {
                return;
            }
        }
    }

    fn start(&mut self, name: &str) {
        let record = self.view.record.containers.get(name).cloned().unwrap_or_default();
        if !self.may_try(record.backoff) || !self.may_try(record.create.backoff) {
            return;
        }
        let view = self.view.containers.get(name);
        if view.is_some_and(|view| view.image.is_some()) && !self.is_outdated(name) {
            let again = view.is_some_and(|view| view.ended.is_some());
            let attempt = u32::try_from(record.restarts).unwrap_or(0) + u32::from(again);
            self.push(Action::Start { container: name.to_owned(), attempt });
        }
    }

    fn has_succeeded(&self, container: &Container) -> bool {
        self.view
            .containers
            .get(&container.name)
            .and_then(|view| view.ended.as_ref())
            .is_some_and(|run| run.exit_code == 0)
    }

    /// The next container waits for this one's postStart hook, or for its start to end.
    fn is_hooking(&self, container: &Container) -> bool {
        let starting = self.view.is_busy(&format!("start/{}", container.name));
        let Some(running) = self.view.running(&container.name) else { return starting };
        let record = self.view.record.containers.get(&container.name);
        post_start(container).is_some() && record.is_none_or(|record| record.post_started.as_ref() != Some(&running.id))
    }

    /// Hooks and probes of what runs.
    fn tend_running(&mut self) {
        for (_, container) in spec::containers(self.pod) {
            let Some(running) = self.view.running(&container.name) else { continue };
            if self.view.is_busy(&stop_key(&container.name, &running.id)) {
                continue;
            }
            if self.is_hooking(container) {
                self.push(Action::PostStart { container: container.name.clone(), id: running.id.clone() });
            } else {
                self.probe(container, running);
            }
        }
    }

    fn probe(&mut self, container: &Container, running: &Running) {
        let probes = self.view.record.containers.get(&container.name).map(|record| record.probes).unwrap_or_default();
        if let Some(kind) = probes.fatal(container) {
            self.push(Action::Stop(Stop {
                container: container.name.clone(),
                id: running.id.clone(),
                grace_s: self.probe_grace(container, kind),
                reason: format!(
                    "Container {} failed {} probe, will be restarted",
                    container.name,
                    kind.as_str().to_lowercase()
                ),
                replaces: false,
            }));
            return;
        }
        self.probe_kinds(container, running, |_| true);
    }

    fn probe_kinds(&mut self, container: &Container, running: &Running, wanted: impl Fn(Kind) -> bool) {
        let probes = self.view.record.containers.get(&container.name).map(|record| record.probes).unwrap_or_default();
        for kind in probes.active(container).filter(|kind| wanted(*kind)) {
            let Some(probe) = kind.of(container) else { continue };
            let turn = probes.get(kind).due(probe, running.started, self.now);
            let look = self.look(&container.name, running, kind, &probes).filter(|look| *look < turn);
            let early = look.is_some() && turn > self.now;
            let action = Action::Probe { container: container.name.clone(), id: running.id.clone(), kind, early };
            if !self.view.is_busy(&action.key()) && self.is_due(Some(look.unwrap_or(turn))) {
                self.push(action);
            }
        }
    }

    /// When a container that is waited for is asked out of turn.
    fn look(&self, container: &str, running: &Running, kind: Kind, probes: &States) -> Option<Timestamp> {
        let is_awaited = kind != Kind::Liveness && probes.get(kind).verdict != Some(Outcome::Success);
        let (of, refused) = self.view.containers.get(container)?.refused.filter(|_| is_awaited)?;
        if of == kind { probe::look(refused, running.started) } else { None }
    }

    fn probe_grace(&self, container: &Container, kind: Kind) -> i64 {
        let own = kind.of(container).and_then(|probe| probe.termination_grace_period_seconds);
        own.unwrap_or_else(|| spec::grace_s(self.pod))
    }

    /// A pod that is to end, or has ended: mains, then sidecars in reverse order, then everything else.
    fn end(&mut self) {
        self.abort_preparations();
        if self.any_running() && !self.view.left_services {
            self.push(Action::LeaveServices);
            return;
        }
        self.probe_while_ending();
        if self.stop_running() || self.any_starting() {
            return;
        }
        let deleted = self.pod.metadata.deletion_timestamp.is_some();
        match self.view.left {
            Left::Everything if !deleted && self.has_remains() => self.push(Action::CleanUp),
            Left::Everything | Left::Logs if deleted => self.push(Action::Purge),
            Left::Object if deleted => self.push(Action::Forget),
            _ => {}
        }
    }

    /// Nobody waits any more for what a start needs, be it a registry or a file system that does not answer.
    fn abort_preparations(&mut self) {
        let wanted_by_starts =
            |key: &&String| is_preparation(key) || key.starts_with("image/") || key.starts_with("poststart/");
        self.plan.aborts = self.view.busy.iter().filter(wanted_by_starts).cloned().collect();
    }

    /// A finished pod keeps its containers for their logs; its sandbox, volumes and claims go.
    fn has_remains(&self) -> bool {
        let is_ready = |setup| setup == Setup::Ready;
        self.view.sandbox != Sandbox::Absent || is_ready(self.view.volumes) || is_ready(self.view.claims)
    }

    fn any_running(&self) -> bool {
        self.view.containers.values().any(|container| container.running.is_some())
    }

    /// What has been begun is waited for: nothing of it may appear after the clean-up.
    fn any_starting(&self) -> bool {
        self.view.busy.iter().any(|key| is_preparation(key))
    }

    /// Readiness goes on to be probed, so that a draining pod says when it no longer answers.
    fn probe_while_ending(&mut self) {
        for (_, container) in spec::containers(self.pod) {
            if let Some(running) = self.view.running(&container.name) {
                self.probe_kinds(container, running, |kind| kind == Kind::Readiness);
            }
        }
    }

    /// Stops what runs, in order; returns whether something still does.
    fn stop_running(&mut self) -> bool {
        let pod = self.pod;
        let view = self.view;
        let running = |(role, name): (Role, &'a str)| Some((role, name, view.running(name)?));
        let all: Vec<_> = spec::names(pod).filter_map(running).collect();
        let first: Vec<_> = all.iter().filter(|(role, ..)| *role != Role::Sidecar).collect();
        let next = if first.is_empty() { all.last().into_iter().collect() } else { first };
        for (_, name, running) in &next {
            self.push(Action::Stop(Stop {
                container: (*name).to_owned(),
                id: running.id.clone(),
                grace_s: self.remaining_grace_s(),
                reason: format!("Stopping container {name}"),
                replaces: false,
            }));
        }
        !next.is_empty()
    }

    /// What is left of the grace period, in whole seconds rounded up; 0 only when 0 was asked for.
    fn remaining_grace_s(&self) -> i64 {
        /// Upstream's least time between SIGTERM and SIGKILL when preStop or others have used the rest.
        const LEAST_S: i64 = 2;
        let whole = spec::grace_s(self.pod).min(self.view.record.grace_s.unwrap_or(i64::MAX));
        let Some(begun) = self.view.record.deleted else { return whole };
        let used = self.now.duration_since(begun).max(SignedDuration::ZERO);
        let left = SignedDuration::from_secs(whole).saturating_sub(used);
        let left = left.as_secs() + i64::from(left.subsec_nanos() > 0);
        left.max(LEAST_S.min(whole))
    }
}
