//! All pods of the node: which have a worker, and which events go where.

mod grants;
mod news;
mod room;

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cri::v1;
use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use pod::backoff::Backoff;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;
use tokio::task::{self, JoinError, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::admission::{self, Preemption, Rejection, is_static};
use crate::adopt::{self, Found};
use crate::clock;
use crate::context::{Context, name_of, uid_of};
use crate::generate::label;
use crate::remains;
use crate::worker::{self, Begin, Event, Workers};

use grants::Grants;
use news::News;
use room::Rooms;

pub(crate) struct Manager {
    context: Arc<Context>,
    /// Never held over an await.
    workers: Arc<Mutex<Workers>>,
    stop: CancellationToken,
    /// What goes on beside the workers: removals, writes to control groups.
    jobs: JoinSet<()>,
    /// What is left of pods that the source has not named yet, by uid; none when it has named all that there are.
    unclaimed: Option<HashSet<String>>,
    /// Of the jobs those that remove what is left of a pod.
    removals: HashMap<task::Id, Removal>,
    /// Tells of how many pods something is left that nobody wants.
    left: watch::Sender<usize>,
    /// Where workers announce that they end, by the uids of their pods.
    ending: UnboundedSender<String>,
    ended: UnboundedReceiver<String>,
    /// Workers that have died, by the uids of their pods: who dies again and again rests longer and longer.
    deaths: HashMap<String, Backoff>,
    share: Arc<Share>,
    grants: Grants,
    rooms: Rooms,
}

/// The removal of what is left of a pod.
#[derive(Debug)]
struct Removal {
    uid: String,
    /// More of the pod turned up since it began.
    is_late: bool,
}

impl Manager {
    pub(crate) fn new(
        context: Arc<Context>,
        workers: Arc<Mutex<Workers>>,
        left: watch::Sender<usize>,
        stop: CancellationToken,
    ) -> Self {
        let (ending, ended) = unbounded_channel();
        let (jobs, removals) = (JoinSet::new(), HashMap::new());
        let (unclaimed, deaths, share) = (Some(HashSet::new()), HashMap::new(), Arc::default());
        let (grants, rooms) = (Grants::default(), Rooms::default());
        Self { context, workers, stop, jobs, unclaimed, removals, left, ending, ended, deaths, share, grants, rooms }
    }

    /// Adopts what runs, then follows source and runtime until told to stop, whatever it waits for then.
    pub(crate) async fn run(mut self, ready: tokio::sync::oneshot::Sender<()>) {
        let stop = self.stop.clone();
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = self.follow(ready) => {}
        }
        self.jobs.shutdown().await;
    }

    async fn follow(&mut self, ready: tokio::sync::oneshot::Sender<()>) {
        let store = self.context.parts.source.store().clone();
        let mut pods = store.pods().watch();
        let mut config_maps = store.config_maps().watch();
        let mut secrets = store.secrets().watch();
        let mut claims = store.persistent_volume_claims().watch();
        let mut certificates = store.pod_certificate_requests().watch();
        let mut bundles = store.cluster_trust_bundles().watch();
        let mut drivers = self.context.parts.volumes.news();
        let mut claim_drivers = self.context.parts.resources.drivers();
        // Heard before it is asked what runs, so that nothing is missed.
        let events = news::subscribe(&self.context).await;
        self.adopt().await;
        let mut news = std::pin::pin!(news::follow(self.context.clone(), events));
        self.tell_left();
        let _ = ready.send(()); // Nobody may be waiting.
        let resources = self.context.parts.resources.clone();
        let mut known = std::pin::pin!(store.pods().synced());
        loop {
            self.tell_left();
            tokio::select! {
                change = pods.next() => self.hear(change),
                () = &mut known, if self.unclaimed.is_some() => self.remove_unclaimed(),
                change = config_maps.next() => self.retry(|namespace| namespace == change.key.namespace()),
                change = secrets.next() => self.retry(|namespace| namespace == change.key.namespace()),
                change = claims.next() => self.retry(|namespace| namespace == change.key.namespace()),
                change = certificates.next() => self.retry(|namespace| namespace == change.key.namespace()),
                _ = bundles.next() => self.retry(|_| true),
                // The senders live as long as volumes and resources.
                _ = drivers.changed() => self.retry(|_| true),
                _ = claim_drivers.changed() => self.retry(|_| true),
                Some(news) = news.next() => match news {
                    News::Event(event) => self.dispatch(*event),
                    News::Gap(found) => self.catch_up(found),
                },
                Some(uid) = self.ended.recv() => self.bury(&uid),
                pods = resources.unwell() => self.look(&pods),
                Some(done) = self.jobs.join_next_with_id() => self.reap(done),
            }
        }
    }

    /// Pods of the source get workers with what runs of them; what is left of no pod is removed.
    async fn adopt(&mut self) {
        let mut found = adopt::everything(&self.context).await;
        self.restore(&found);
        let mut new = Vec::new();
        for pod in self.context.parts.source.store().pods().list() {
            match found.remove(uid_of(&pod)) {
                Some(remains) => self.begin(pod, Begin::With(remains)),
                None => new.push(pod),
            }
        }
        // Pods that the source has not named yet keep what they were given, though others come meanwhile that want it.
        let (on_disk, records) = (self.context.parts.volumes.on_disk(), self.context.records.uids());
        let claimants = self.context.parts.resources.claimants();
        for uid in found.into_keys().chain(on_disk).chain(records).chain(claimants) {
            if self.known(&uid).is_none() {
                self.remove_unless_wanted(uid);
            }
        }
        // The oldest come first: what they take is taken when the next one is asked about.
        new.sort_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0));
        new.into_iter().for_each(|pod| self.see(pod));
        self.share_cpu();
    }

    /// What runs keeps what it has, should the files be damaged that say so.
    fn restore(&self, found: &HashMap<String, Found>) {
        for (uid, found) in found {
            found.sandboxes.iter().filter_map(ids_of).for_each(|first| self.context.users.restore(uid, first));
            if let Some(pod) = self.known(uid) {
                self.context.parts.resources.restore(&pod, &found.containers);
            }
        }
    }

    /// The source has named all pods: what is left of others is of none.
    fn remove_unclaimed(&mut self) {
        // Those that it has named just now claim theirs first.
        let named: Vec<Arc<Pod>> = self.unclaimed.iter().flatten().filter_map(|uid| self.known(uid)).collect();
        named.into_iter().for_each(|pod| self.see(pod));
        for uid in self.unclaimed.take().unwrap_or_default() {
            self.remove_unless_wanted(uid);
        }
    }

    /// Removes what is left of a pod that has no worker and that the source does not know. A removal under way may not see
    /// what turned up since it began: another one follows it.
    fn remove_unless_wanted(&mut self, uid: String) {
        if let Some(unclaimed) = &mut self.unclaimed {
            unclaimed.insert(uid);
            return;
        }
        let is_wanted = self.lock().contains_key(&uid) || self.known(&uid).is_some();
        if is_wanted {
            return;
        }
        if let Some(removal) = self.removals.values_mut().find(|removal| removal.uid == uid) {
            removal.is_late = true;
            return;
        }
        let job = self.jobs.spawn(remains::remove(self.context.clone(), uid.clone()));
        self.removals.insert(job.id(), Removal { uid, is_late: false });
    }

    fn tell_left(&self) {
        let left = self.removals.len() + self.unclaimed.as_ref().map_or(0, HashSet::len);
        self.left.send_if_modified(|told| std::mem::replace(told, left) != left);
    }

    fn known(&self, uid: &str) -> Option<Arc<Pod>> {
        self.context.parts.source.store().pods().find_uid(uid)
    }

    /// A job has ended. A pod that came back while its remains were removed begins now.
    fn reap(&mut self, done: Result<(task::Id, ()), JoinError>) {
        let id = match done {
            Ok((id, ())) => id,
            Err(error) => {
                tracing::error!(%error, "a job beside the pods has died");
                error.id()
            }
        };
        if self.has_made_room(id) {
            return;
        }
        let Some(Removal { uid, is_late }) = self.removals.remove(&id) else { return };
        match self.known(&uid) {
            Some(pod) => self.see(pod),
            None if is_late => self.remove_unless_wanted(uid),
            None => {}
        }
    }

    /// Gives the Burstable class the CPU share that its pods ask for together: called when pods come or go.
    fn share_cpu(&mut self) {
        if self.share.wants() {
            let (share, context) = (self.share.clone(), self.context.clone());
            self.jobs.spawn_blocking(move || share.write(&context));
        }
    }

    /// After a gap in the runtime's events: every worker hears the present state.
    fn catch_up(&mut self, all: HashMap<String, Found>) {
        for found in all.into_values() {
            self.dispatch(v1::ContainerEventResponse {
                pod_sandbox_status: found.sandboxes.into_iter().max_by_key(|sandbox| sandbox.created_at),
                containers_statuses: found.containers,
                ..v1::ContainerEventResponse::default()
            });
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Workers> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, pod: Arc<Pod>, begin: Begin) {
        let uid = uid_of(&pod).to_owned();
        let handle = worker::start(self.context.clone(), pod, begin, self.ending.clone());
        self.lock().insert(uid, handle);
    }

    /// The source has another version of a pod, another pod of the same name, or none of that name any more.
    fn hear(&mut self, change: cluster::Change<Pod>) {
        let uid = change.object.as_ref().map(|pod| uid_of(pod));
        for (other, worker) in self.lock().iter_mut() {
            if worker.key == change.key && uid != Some(other) {
                worker.is_gone = true;
                let last = change.last.as_ref().filter(|last| uid_of(last) == other).cloned();
                let _ = worker.events.send(Event::Gone { last }); // It may just be ending.
            }
        }
        let has_ended = change.object.as_ref().is_none_or(|pod| pod::spec::ended_phase(pod).is_some());
        if let Some(pod) = change.object {
            self.see(pod);
        }
        if has_ended {
            self.share_cpu();
            self.grant();
        }
    }

    /// A pod of the source is new or has changed.
    fn see(&mut self, pod: Arc<Pod>) {
        let Some(worker) = self.lock().get(uid_of(&pod)).map(|worker| worker.events.clone()) else {
            return self.see_new(pod);
        };
        // One that has just ended is buried next, and finds this version then.
        let _ = worker.send(Event::Pod(pod.clone()));
        self.consider(&pod);
    }

    fn see_new(&mut self, pod: Arc<Pod>) {
        let uid = uid_of(&pod);
        if self.removals.values().any(|removal| removal.uid == uid) {
            return; // It has come back, and begins when that is over.
        }
        let is_claimed = self.unclaimed.as_mut().is_some_and(|unclaimed| unclaimed.remove(uid));
        let others = self.others();
        let begin = match self.admit(&pod, &others) {
            // It runs since before the daemon began, and what is known of that may be old.
            _ if is_claimed => Begin::Asking { after: Duration::ZERO },
            Ok(Preemption { pods, resource }) if !pods.is_empty() => {
                let victims = pods.into_iter().map(|place| others[place].clone()).collect();
                Begin::Giving { room: Some(self.make_room(&pod, victims, &resource)) }
            }
            Ok(_) if self.is_new(&pod) && self.context.parts.resources.concerns(&pod) => {
                self.context.parts.resources.retain_only(&self.holders());
                Begin::Giving { room: None }
            }
            Ok(_) => Begin::With(Found::default()),
            Err(rejection) => {
                self.context.rejected(&pod, &rejection);
                Begin::Rejected(rejection)
            }
        };
        self.begin(pod, begin);
        self.share_cpu();
    }

    /// Whether the node takes a pod that is new to it, and which of `others` have to go for it. One that it took before an
    /// interruption stays taken.
    fn admit(&self, pod: &Pod, others: &[Arc<Pod>]) -> Result<Preemption, Rejection> {
        let site = self.context.parts.site.as_ref().filter(|_| self.is_new(pod));
        let Some(site) = site else { return Ok(Preemption::default()) };
        admission::admit(pod, &site.now(), &others.iter().map(|other| &**other).collect::<Vec<_>>())
    }

    /// Whether nothing was begun of a pod yet, and it is wanted. The source does not bring back what became of a pod that a
    /// file of the node wants; that is on record.
    fn is_new(&self, pod: &Pod) -> bool {
        let is_on_record =
            || is_static(pod) && self.context.records.load(uid_of(pod)).is_some_and(|record| record.started.is_some());
        pod.metadata.deletion_timestamp.is_none() && !is_told(pod) && !is_on_record()
    }

    /// The pods that take room, the oldest first: of two that are alike the younger one makes room.
    fn others(&self) -> Vec<Arc<Pod>> {
        if self.context.parts.site.is_none() {
            return Vec::new(); // Nobody asks.
        }
        let mut others = self.taken(None);
        others.sort_by_cached_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0));
        others
    }

    /// The uids of pods that need what they were given.
    fn holders(&self) -> HashSet<String> {
        let workers = self.lock();
        let holding = workers
            .iter()
            .filter(|(_, worker)| worker.shown.lock().unwrap_or_else(PoisonError::into_inner).is_holding());
        // What runs of pods that the source has not named yet keeps what it has.
        holding.map(|(uid, _)| uid).chain(self.unclaimed.iter().flatten()).cloned().collect()
    }

    /// What others say in the statuses of these pods is not as it was.
    fn look(&self, pods: &BTreeSet<String>) {
        let workers = self.lock();
        for worker in pods.iter().filter_map(|uid| workers.get(uid)) {
            let _ = worker.events.send(Event::Look); // It may just be ending.
        }
    }

    /// Something has changed: pods in namespaces that it concerns and that failed for want of it need not wait out their
    /// back-off.
    fn retry(&self, concerns: impl Fn(&str) -> bool) {
        for worker in self.lock().values() {
            let shown = worker.shown.lock().unwrap_or_else(PoisonError::into_inner);
            let there = concerns(shown.pod.metadata.namespace.as_deref().unwrap_or("default"));
            if there && shown.view.waits_for_objects() {
                let _ = worker.events.send(Event::Change(pod::Change::Retry)); // It may just be ending.
            }
        }
    }

    /// An event goes to its pod's worker. What begins to run of a pod that has none came too late, and goes.
    fn dispatch(&mut self, event: v1::ContainerEventResponse) {
        let sandbox = event.pod_sandbox_status.as_ref();
        let labels = sandbox.map(|sandbox| &sandbox.labels).into_iter();
        let mut labels = labels.chain(event.containers_statuses.iter().map(|status| &status.labels));
        let Some(uid) = labels.find_map(|labels| labels.get(label::POD_UID).cloned()) else { return };
        let runs = sandbox.is_some_and(|sandbox| sandbox.state == v1::PodSandboxState::SandboxReady as i32);
        if let Some(worker) = self.lock().get(&uid) {
            let _ = worker.events.send(Event::Runtime(Box::new(event))); // It may just be ending.
            return;
        }
        if runs {
            self.remove_unless_wanted(uid);
        }
    }

    /// Takes out a worker that has ended. One that left its pod behind has died: the pod gets another at once, which
    /// begins with what runs. Of a pod that is gone something may be left: a volume that did not go, a sandbox that came
    /// too late.
    fn bury(&mut self, uid: &str) {
        let was_gone = self.lock().remove(uid).is_some_and(|worker| worker.is_gone);
        self.context.steps.send_replace(());
        self.grants.forget(uid);
        self.rooms.forget(uid);
        self.share_cpu();
        self.grant();
        let Some(pod) = self.known(uid) else {
            self.deaths.remove(uid);
            self.remove_unless_wanted(uid.to_owned());
            return;
        };
        if was_gone {
            return self.see(pod); // It has come back.
        }
        let now = Timestamp::now();
        let death = self.deaths.entry(uid.to_owned()).or_default();
        *death = death.after_failure(now, None);
        let after = death.until(now).map_or(Duration::ZERO, clock::until);
        tracing::error!(uid, pod = %name_of(&pod), ?after, "the worker of a pod has died; another one begins");
        self.begin(pod, Begin::Asking { after });
    }
}

/// The first of the host's ids that a sandbox has for itself.
fn ids_of(sandbox: &v1::PodSandboxStatus) -> Option<u32> {
    let options = sandbox.linux.as_ref()?.namespaces.as_ref()?.options.as_ref()?;
    Some(options.userns_options.as_ref()?.uids.first()?.host_id)
}

/// Whether a pod's status says that something was begun of it.
fn is_told(pod: &Pod) -> bool {
    pod.status.as_ref().is_some_and(|status| {
        status.start_time.is_some() || matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"))
    })
}

/// The CPU share of the Burstable class: one write at a time, with the pods as they are then.
#[derive(Debug, Default)]
struct Share {
    /// A write is to begin that will see everything which is there now.
    is_wanted: AtomicBool,
    /// Held during a write.
    writing: Mutex<()>,
}

impl Share {
    /// Whether a write has to be begun: none is waiting to begin already.
    fn wants(&self) -> bool {
        !self.is_wanted.swap(true, Ordering::AcqRel)
    }

    fn write(&self, context: &Context) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        self.is_wanted.store(false, Ordering::Release);
        let pods = context.parts.source.store().pods().list();
        let active = pods.iter().filter(|pod| pod::spec::ended_phase(pod).is_none());
        if let Err(error) = context.parts.groups.share(active.map(|pod| &**pod)) {
            tracing::warn!(%error, "the CPU share of burstable pods cannot be set");
        }
    }
}
