//! One task for each pod: hears what happens, asks `pod` what to do, has it done.

mod early;
mod handle;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cluster::Key;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use pod::resize::Allocation;
use pod::status::Host;
use pod::{Action, Change, Record, View};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::admission::{Rejection, is_static};
use crate::adopt::{self, Found};
use crate::clock;
use crate::context::{Context, name_of, uid_of};
use crate::effects::{self, Shared};
use crate::publish::Publisher;
use crate::resources::Resources;
use crate::timeline::Timeline;

use early::Early;
use handle::Announcement;
pub(crate) use handle::{Begin, Event, Handle, Shown, Workers};

/// Starts the worker of a pod. `ending` hears the pod's uid when it ends, however it does.
pub(crate) fn start(context: Arc<Context>, pod: Arc<Pod>, begin: Begin, ending: UnboundedSender<String>) -> Handle {
    let (events, mut heard) = unbounded_channel();
    let key = Key::of(&pod.metadata);
    let announcement = Announcement { uid: uid_of(&pod).to_owned(), ending };
    let mut worker = Worker::new(context, pod, events.clone());
    let shown = worker.shown.clone();
    // What is known is shown from the beginning.
    let known = match begin {
        Begin::With(found) => Ok(worker.take_over(found)),
        Begin::Rejected(rejection) => Ok(worker.reject(rejection)),
        Begin::Giving { room } => Err(Unknown::Given { room }),
        Begin::Asking { after } => Err(Unknown::Found { after }),
    };
    let task = tokio::spawn(async move {
        let _announcement = announcement; // The last that is dropped.
        let changes = match known {
            Ok(changes) => changes,
            Err(Unknown::Found { after }) => worker.ask(after).await,
            Err(Unknown::Given { room }) => worker.get(room, &mut heard).await,
        };
        changes.into_iter().for_each(|change| worker.apply(change));
        worker.run(heard).await;
    });
    Handle { key, is_gone: false, events, shown, task: AbortOnDropHandle::new(task) }
}

/// What a worker has to learn before it begins.
enum Unknown {
    /// What the runtime has of the pod, after a while.
    Found { after: Duration },
    /// Whether it gets what is given out whole, when others have made room for it.
    Given { room: Option<oneshot::Receiver<()>> },
}

struct Worker {
    context: Arc<Context>,
    /// The pod as the source wants it.
    wanted: Arc<Pod>,
    /// The pod as the node has granted it: what runs.
    pod: Arc<Pod>,
    /// What is shown shares it until it changes.
    view: Arc<View>,
    host: Host,
    /// The source does not have the pod any more.
    is_gone: bool,
    /// The status that was published last.
    status: Option<Arc<PodStatus>>,
    /// The record that is on disk.
    saved: Record,
    publisher: Publisher,
    shared: Arc<Shared>,
    shown: Arc<Mutex<Shown>>,
    jobs: JoinSet<()>,
    /// What ends the actions under way, by their keys.
    aborts: HashMap<String, CancellationToken>,
    /// Ends of runs whose start is still under way.
    early: Early,
}

impl Worker {
    fn new(context: Arc<Context>, pod: Arc<Pod>, events: UnboundedSender<Event>) -> Self {
        let (view, status) = (Arc::<View>::default(), pod.status.clone().map(Arc::new));
        let shown = Shown { pod: pod.clone(), view: view.clone(), timeline: Timeline::new(), status: status.clone() };
        let publisher = Publisher::new(context.parts.source.clone(), uid_of(&pod).to_owned());
        let runtime = context.config.runtime_name.clone();
        let host = Host { addresses: context.config.generate.node.ips.clone(), runtime };
        Self {
            saved: Record::default(),
            shared: Arc::new(Shared::new(events, publisher.taken())),
            shown: Arc::new(Mutex::new(shown)),
            jobs: JoinSet::new(),
            aborts: HashMap::new(),
            early: Early::default(),
            is_gone: false,
            context,
            wanted: pod.clone(),
            pod,
            view,
            host,
            status,
            publisher,
        }
    }

    /// Begins with what runs of the pod; what happened to it while nobody looked.
    fn take_over(&mut self, found: Found) -> Vec<Change> {
        let (mut view, changes) = adopt::view_of(&self.context, &self.pod, found);
        if self.holds_claims() {
            view.claims = pod::Setup::Ready;
        }
        self.saved = view.record.clone();
        if self.status.is_none() && !view.record.conditions.is_empty() {
            let conditions = Some(view.record.conditions.clone());
            self.status = Some(Arc::new(PodStatus { conditions, ..PodStatus::default() }));
        }
        self.view = Arc::new(view);
        // A pod is taken with what it asks for; of one that was taken before, this is on record.
        let record = &mut Arc::make_mut(&mut self.view).record;
        record.allocated.get_or_insert_with(|| Box::new(Allocation::of(&self.pod)));
        self.reallocate();
        self.show();
        changes
    }

    /// Begins with nothing: the node does not take the pod.
    fn reject(&mut self, rejection: Rejection) -> Vec<Change> {
        let mut changes = self.take_over(Found::default());
        changes.push(rejection.change());
        changes
    }

    /// Begins with what the node gives the pod, or with nothing. A pod that is deleted or ended meanwhile needs nothing.
    async fn get(&mut self, room: Option<oneshot::Receiver<()>>, heard: &mut UnboundedReceiver<Event>) -> Vec<Change> {
        let (context, pod) = (self.context.clone(), self.pod.clone());
        // What is decided about the pod meanwhile holds for what it begins with.
        let mut later = Vec::new();
        let given = {
            let mut given = std::pin::pin!(async {
                if let Some(room) = room
                    && room.await.is_err()
                {
                    std::future::pending::<()>().await; // The kubelet stops.
                }
                context.parts.resources.admit(&pod).await
            });
            loop {
                tokio::select! {
                    given = &mut given => break given,
                    Some(event) = heard.recv() => match event {
                        Event::Change(change) => later.push(change),
                        other => self.hear(other).await,
                    },
                }
                let is_ended = later.iter().any(|change| matches!(change, Change::Fail { .. }));
                if is_ended || self.pod.metadata.deletion_timestamp.is_some() {
                    break Ok(());
                }
            }
        };
        let mut changes = match given {
            Ok(()) => self.take_over(Found::default()),
            Err(rejection) => {
                context.rejected(&pod, &rejection);
                self.reject(rejection)
            }
        };
        changes.extend(later);
        changes
    }

    /// Begins with what the runtime says runs of the pod, after a while.
    async fn ask(&mut self, after: Duration) -> Vec<Change> {
        tokio::time::sleep(after).await;
        let found = adopt::of_pod(&self.context, uid_of(&self.pod)).await;
        self.take_over(found)
    }

    /// Works until the source has forgotten the pod and nothing of it is left.
    async fn run(&mut self, mut heard: UnboundedReceiver<Event>) {
        let mut operation = "create";
        self.context.parts.metrics.worker_started(self.shown().timeline.age());
        while !(self.is_gone && self.view.is_taken_down()) {
            let begun = std::time::Instant::now();
            let next_due = self.step().await;
            self.context.parts.metrics.stepped(operation, begun.elapsed());
            operation = "sync";
            let wait = async {
                match next_due {
                    Some(due) => tokio::time::sleep(clock::until(due)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                event = heard.recv() => match event {
                    Some(event) => {
                        if matches!(event, Event::Pod(_) | Event::Gone { .. }) {
                            operation = "update";
                        }
                        self.hear(event).await;
                        // What came at the same time is taken in before anything is decided.
                        while let Ok(event) = heard.try_recv() {
                            self.hear(event).await;
                        }
                    }
                    None => return,
                },
                () = wait => {}
                Some(ended) = self.jobs.join_next() => {
                    if let Err(error) = ended && error.is_panic() {
                        std::panic::resume_unwind(error.into_panic());
                    }
                }
            }
        }
    }

    async fn hear(&mut self, event: Event) {
        match event {
            Event::Pod(_) if self.is_gone => {}
            Event::Pod(pod) => self.take_version(pod),
            Event::Gone { last } => {
                self.is_gone = true;
                // A deletion by force is written first, and both may come as one. A pod of which nobody knows how it was
                // deleted has its own time to end, with upstream, too.
                let last = last.unwrap_or_else(|| self.pod.clone());
                self.take_version(Arc::new(ending(&last, Timestamp::now())));
            }
            Event::Runtime(event) => self.hear_runtime(&event).await,
            Event::Change(change) => self.apply(change),
            Event::Look => {}
            Event::Ended(action) => {
                self.aborts.remove(&action.key());
                self.shown().timeline.end(&action);
                // The start's own news came before this.
                self.catch_up(&action).await;
                self.apply(Change::Ended(action));
            }
        }
    }

    /// The pod is what it wants to be, with what it was granted.
    fn reallocate(&mut self) {
        self.pod = match &self.view.record.allocated {
            Some(granted) => granted.given(&self.wanted),
            None => self.wanted.clone(),
        };
    }

    fn take_version(&mut self, pod: Arc<Pod>) {
        self.wanted = pod;
        let before = self.time_to_end();
        self.reallocate();
        let is_pending = self.view.record.resize.as_ref().is_some_and(|resize| resize.pending.is_some());
        if is_pending && self.view.record.allocated.as_ref().is_some_and(|granted| granted.covers(&self.wanted)) {
            self.apply(Change::ResizeReverted);
        }
        if self.time_to_end() < before {
            self.hasten();
        }
    }

    /// The time that the pod has to end, by whoever wants it to; without bounds while nobody does.
    fn time_to_end(&self) -> i64 {
        grace_of(&self.pod).min(self.view.record.grace_s.unwrap_or(i64::MAX))
    }

    /// The pod has less time to end than its stops were told: of two stops the runtime keeps the shorter time.
    fn hasten(&mut self) {
        let timeout = self.time_to_end();
        let stopping = self.view.containers.iter().filter_map(|(name, view)| {
            let id = &view.running.as_ref()?.id;
            self.view.is_busy(&format!("stop/{name}/{id}")).then(|| id.clone())
        });
        for container_id in stopping.collect::<Vec<_>>() {
            let runtime = self.context.parts.runtime.clone();
            self.jobs.spawn(async move {
                let request = cri::v1::StopContainerRequest { container_id, timeout };
                // The stop that is under way tells how it ends.
                let _ = runtime.stop_container(request).await;
            });
        }
    }

    async fn hear_runtime(&mut self, event: &cri::v1::ContainerEventResponse) {
        for status in &event.containers_statuses {
            self.hear_status(status).await;
        }
        let Some(sandbox) = &event.pod_sandbox_status else { return };
        let is_known = self.view.sandbox.id() == Some(sandbox.id.as_str());
        if sandbox.state == cri::v1::PodSandboxState::SandboxReady as i32 {
            if !self.view.is_busy("sandbox") {
                self.apply(Change::SandboxAppeared { id: sandbox.id.clone() });
            }
        } else if is_known && !self.view.is_busy("cleanup") {
            self.apply(Change::SandboxLost);
        }
    }

    /// Takes in the end of a run. It may come before the news of its start does: then it waits for that.
    async fn hear_status(&mut self, status: &cri::v1::ContainerStatus) {
        if let Some(change) = adopt::exit_of(&self.context, &self.pod, &self.view, status).await {
            self.apply(change);
            return;
        }
        let exited = status.state == cri::v1::ContainerState::ContainerExited as i32;
        if exited && self.view.is_busy(&format!("start/{}", adopt::name_of(status))) {
            self.early.note(status);
        }
    }

    /// What was heard of a container's end before its start was known.
    async fn catch_up(&mut self, action: &Action) {
        let Action::Start { container, .. } = action else { return };
        let run = self.view.running(container).map(|running| running.id.clone());
        let Some(status) = self.early.take(container, run.as_deref()) else { return };
        if let Some(change) = adopt::exit_of(&self.context, &self.pod, &self.view, &status).await {
            self.apply(change);
        }
    }

    fn apply(&mut self, change: Change) {
        tracing::debug!(pod = %name_of(&self.pod), ?change);
        let grants = matches!(change, Change::Allocated { .. });
        let before = self.time_to_end();
        self.count_end(&change);
        let notes = Arc::make_mut(&mut self.view).apply(&self.pod, change, Timestamp::now());
        notes.iter().for_each(|note| self.context.note(&self.pod, note));
        if grants {
            self.reallocate();
        }
        if self.time_to_end() < before {
            self.hasten(); // The node needs what the pod uses.
        }
    }

    fn shown(&self) -> std::sync::MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides, begins what was decided, tells what is new; when something is due that no event announces.
    async fn step(&mut self) -> Option<Timestamp> {
        if self.pod.metadata.deletion_timestamp.is_some() && self.view.record.deleted.is_none() {
            self.apply(Change::Deleted);
        }
        let mut plan = pod::decide(&self.pod, &self.view, Timestamp::now());
        if plan.deadline_exceeded {
            let reason = "DeadlineExceeded".to_owned();
            let message = "Pod was active on the node longer than the specified deadline".to_owned();
            self.apply(Change::Fail { reason, message, grace_s: None, disrupted: false });
            plan = pod::decide(&self.pod, &self.view, Timestamp::now());
        }
        if plan.reset {
            self.apply(Change::Reset);
            plan = pod::decide(&self.pod, &self.view, Timestamp::now());
        }
        if plan.resize_done {
            self.apply(Change::ResizeDone);
        }
        for action in &plan.actions {
            self.apply(Change::Begun(action.clone()));
            self.shown().timeline.begin(action);
        }
        let status = self.present_status();
        if is_static(&self.pod) {
            let conditions = status.conditions.clone().unwrap_or_default();
            Arc::make_mut(&mut self.view).record.conditions = conditions;
        }
        // Before anything is done: what it leads to builds on this.
        self.save().await;
        self.publish(status);
        for action in plan.actions {
            let job = effects::job(&self.context, &self.pod, &self.view, action, &self.shared);
            self.aborts.insert(job.action.key(), job.abort.clone());
            self.jobs.spawn(job.run());
        }
        plan.aborts.iter().filter_map(|key| self.aborts.get(key)).for_each(CancellationToken::cancel);
        self.show();
        plan.next_due
    }

    fn show(&self) {
        {
            let mut shown = self.shown();
            shown.pod = self.pod.clone();
            shown.view = self.view.clone();
        }
        self.context.steps.send_replace(());
    }

    async fn save(&mut self) {
        if self.saved == self.view.record {
            return;
        }
        match self.context.records.save(uid_of(&self.pod), &self.view.record).await {
            Ok(()) => self.saved = self.view.record.clone(),
            Err(error) => tracing::warn!(pod = %name_of(&self.pod), %error, "the pod's record cannot be written"),
        }
    }

    fn holds_claims(&self) -> bool {
        Resources::has_claims(&self.pod) && self.context.parts.resources.holds_claims(uid_of(&self.pod))
    }

    fn present_status(&self) -> PodStatus {
        let before = self.status.as_deref();
        let mut status = pod::status::compute(&self.pod, &self.view, &self.host, before, Timestamp::now());
        self.context.parts.resources.describe(&self.pod, &mut status);
        if self.holds_claims() {
            hold_back_end(&mut status, before);
        }
        status
    }

    fn publish(&mut self, status: PodStatus) {
        if self.status.as_deref() != Some(&status) {
            let status = Arc::new(status);
            self.count_start(&status);
            self.publisher.publish(status.clone());
            self.shown().status = Some(status.clone());
            self.status = Some(status);
        }
    }
}

impl Worker {
    /// Counts a run that ends, once.
    fn count_end(&self, change: &Change) {
        let Change::Exited { container, run } = change else { return };
        let is_news = self.view.running(container).is_some_and(|running| running.id == run.id);
        if let Some((role, _)) = pod::spec::container(&self.pod, container).filter(|_| is_news) {
            self.context.parts.metrics.container_ended(role, run.exit_code, &run.reason);
        }
    }

    /// Counts how long a pod took that runs for the first time.
    fn count_start(&self, status: &PodStatus) {
        let phase = |status: &PodStatus| status.phase.as_deref().map(str::to_owned);
        let before = self.status.as_deref().and_then(phase);
        let is_first = self.view.record.sandbox_attempt == 0;
        if !is_first || phase(status).as_deref() != Some("Running") || before.as_deref() != Some("Pending") {
            return;
        }
        let metrics = &self.context.parts.metrics;
        let (seen, images) = {
            let shown = self.shown();
            (shown.timeline.age(), shown.timeline.images())
        };
        metrics.pod_start.observe(seen);
        let created = self.pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
        let Some(age) = created.and_then(|at| Duration::try_from(Timestamp::now().duration_since(at)).ok()) else {
            return;
        };
        metrics.pod_runs(age);
        // Creation times are whole seconds; upstream's figure has that, too.
        if pod::spec::containers(&self.pod).all(|(role, _)| role == pod::spec::Role::Main) {
            metrics.pod_start_sli.observe(age.saturating_sub(images));
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.context.parts.metrics.forget(uid_of(&self.pod));
    }
}

/// The pod as it is when its deletion was asked for, now if it was not.
fn ending(pod: &Pod, now: Timestamp) -> Pod {
    let mut pod = pod.clone();
    if pod.metadata.deletion_timestamp.is_none() {
        let grace_s = pod::spec::grace_s(&pod);
        let end = now.checked_add(SignedDuration::from_secs(grace_s)).unwrap_or(Timestamp::MAX);
        pod.metadata.deletion_timestamp = Some(Time(end));
        pod.metadata.deletion_grace_period_seconds = Some(grace_s);
    }
    pod
}

/// Who reads that a pod has ended gives its devices to others: that is not said before drivers have undone what they did for
/// it.
fn hold_back_end(status: &mut PodStatus, before: Option<&PodStatus>) {
    let has_ended = |status: &PodStatus| matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    if has_ended(status) && !before.is_some_and(has_ended) {
        status.phase = before.and_then(|before| before.phase.clone()).or_else(|| Some("Pending".to_owned()));
        status.reason = before.and_then(|before| before.reason.clone());
        status.message = before.and_then(|before| before.message.clone());
    }
}

/// The time that a pod has to end for its source; without bounds while that does not want it to.
fn grace_of(pod: &Pod) -> i64 {
    let wanted = pod.metadata.deletion_timestamp.is_some();
    pod.metadata.deletion_grace_period_seconds.filter(|_| wanted).unwrap_or(i64::MAX)
}
