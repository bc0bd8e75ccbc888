//! All pods of the node: which have a worker, and which events go where.

use std::sync::{Arc, Mutex, PoisonError};

use cluster::k8s_openapi::api::core::v1::Pod;
use cri::v1;
use futures_util::StreamExt as _;
use tokio_util::sync::CancellationToken;

use crate::adopt::{self, Found};
use crate::context::{Context, uid_of};
use crate::generate::label;
use crate::worker::{self, Event, Workers};

/// How long to wait before asking a runtime again that does not answer.
const RETRY: std::time::Duration = std::time::Duration::from_secs(1);

pub(crate) struct Manager {
    pub(crate) context: Arc<Context>,
    /// Never held over an await.
    pub(crate) workers: Arc<Mutex<Workers>>,
    pub(crate) stop: CancellationToken,
}

impl Manager {
    /// Adopts what runs, then follows source and runtime until told to stop.
    pub(crate) async fn run(self, ready: tokio::sync::oneshot::Sender<()>) {
        let store = self.context.parts.source.store();
        let mut pods = store.pods().watch();
        let mut config_maps = store.config_maps().watch();
        let mut secrets = store.secrets().watch();
        let mut claims = store.persistent_volume_claims().watch();
        let mut events = self.subscribe().await;
        self.adopt().await;
        let _ = ready.send(()); // Nobody may be waiting.
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                change = pods.next() => {
                    // A pod that is gone has been forgotten by its own worker.
                    if let Some(pod) = change.object {
                        self.see(pod);
                    }
                }
                change = config_maps.next() => self.retry(change.key.namespace()),
                change = secrets.next() => self.retry(change.key.namespace()),
                change = claims.next() => self.retry(change.key.namespace()),
                event = events.next() => match event {
                    Some(Ok(event)) => self.dispatch(event),
                    Some(Err(error)) => tracing::warn!(%error, "the runtime's events"),
                    None => {
                        events = self.subscribe().await;
                        self.catch_up().await;
                    }
                },
            }
            self.bury();
        }
    }

    async fn subscribe(&self) -> cri::service::Items<v1::ContainerEventResponse> {
        loop {
            match self.context.parts.runtime.get_container_events(v1::GetEventsRequest::default()).await {
                Ok(events) => return events,
                Err(error) => {
                    tracing::warn!(%error, "the runtime gives no events; asking again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    async fn everything(&self) -> std::collections::HashMap<String, Found> {
        loop {
            match adopt::everything(&self.context).await {
                Ok(found) => return found,
                Err(error) => {
                    tracing::warn!(%error, "the runtime does not say what runs; asking again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }

    /// Pods of the source get workers with what runs of them; what runs of no pod is removed.
    async fn adopt(&self) {
        let mut found = self.everything().await;
        for pod in self.context.parts.source.store().pods().list() {
            let remains = found.remove(uid_of(&pod)).unwrap_or_default();
            self.begin(pod, remains);
        }
        for (uid, remains) in found {
            tokio::spawn(remove_orphan(self.context.clone(), uid, remains));
        }
        self.remove_unknown_volumes();
        self.share_cpu();
    }

    /// Gives the Burstable class the CPU share that its pods ask for together: called when pods come or go.
    fn share_cpu(&self) {
        let (groups, pods) = (self.context.parts.groups.clone(), self.context.parts.source.store().pods().list());
        tokio::task::spawn_blocking(move || {
            if let Err(error) = groups.share(pods.iter().map(|pod| &**pod)) {
                tracing::warn!(%error, "the CPU share of burstable pods cannot be set");
            }
        });
    }

    /// Volumes of pods that the source does not know any more.
    fn remove_unknown_volumes(&self) {
        for uid in self.context.parts.volumes.on_disk() {
            if self.lock().contains_key(&uid) {
                continue;
            }
            let context = self.context.clone();
            tokio::spawn(async move {
                if let Err(error) = context.parts.volumes.tear_down(&uid).await {
                    tracing::warn!(uid, %error, "volumes of a pod that is gone cannot be removed");
                    return;
                }
                let _ = tokio::fs::remove_dir_all(context.config.generate.paths.pod(&uid)).await; // Empty by now.
                context.records.remove(&uid);
            });
        }
    }

    /// After a gap in the runtime's events: every worker hears the present state.
    async fn catch_up(&self) {
        for (uid, found) in self.everything().await {
            let workers = self.lock();
            let Some(worker) = workers.get(&uid) else { continue };
            let sandboxes = found.sandboxes.into_iter().max_by_key(|sandbox| sandbox.created_at);
            let event = v1::ContainerEventResponse {
                pod_sandbox_status: sandboxes,
                containers_statuses: found.containers,
                ..v1::ContainerEventResponse::default()
            };
            let _ = worker.events.send(Event::Runtime(Box::new(event))); // It may just be ending.
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Workers> {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(&self, pod: Arc<Pod>, found: Found) {
        let uid = uid_of(&pod).to_owned();
        let (view, changes) = adopt::view_of(&self.context, &pod, found);
        let handle = worker::start(self.context.clone(), pod, view, changes);
        self.lock().insert(uid, handle);
    }

    /// A pod of the source is new or has changed.
    fn see(&self, pod: Arc<Pod>) {
        let known = self.lock().get(uid_of(&pod)).map(|worker| worker.events.send(Event::Pod(pod.clone())).is_ok());
        match known {
            Some(true) => {}
            // Its worker has ended: this is the last version before it was forgotten.
            Some(false) => {}
            None => {
                self.begin(pod, Found::default());
                self.share_cpu();
            }
        }
    }

    /// An object of a namespace has changed: pods there that failed for want of it need not wait out their back-off.
    fn retry(&self, namespace: &str) {
        for worker in self.lock().values() {
            let shown = worker.shown.lock().unwrap_or_else(PoisonError::into_inner);
            let there = shown.pod.metadata.namespace.as_deref().unwrap_or("default") == namespace;
            if there && shown.view.waits_for_objects() {
                let _ = worker.events.send(Event::Change(pod::Change::Retry)); // It may just be ending.
            }
        }
    }

    fn dispatch(&self, event: v1::ContainerEventResponse) {
        let sandbox = event.pod_sandbox_status.as_ref();
        let uid = sandbox.and_then(|sandbox| sandbox.metadata.as_ref()).map(|metadata| metadata.uid.clone());
        let labelled =
            || event.containers_statuses.iter().find_map(|status| status.labels.get(label::POD_UID).cloned());
        let Some(uid) = uid.or_else(labelled) else { return };
        if let Some(worker) = self.lock().get(&uid) {
            let _ = worker.events.send(Event::Runtime(Box::new(event))); // It may just be ending.
        }
    }

    /// Takes out workers that have ended; a pod whose worker has died gets another.
    fn bury(&self) {
        let ended: Vec<(String, worker::Handle)> = {
            let mut workers = self.lock();
            let over: Vec<String> =
                workers.iter().filter(|(_, one)| one.task.is_finished()).map(|(uid, _)| uid.clone()).collect();
            over.into_iter().filter_map(|uid| workers.remove_entry(&uid)).collect()
        };
        if !ended.is_empty() {
            self.share_cpu();
        }
        for (uid, handle) in ended {
            if let Some(pod) = self.context.parts.source.store().pods().find_uid(&uid) {
                tracing::error!(uid, "the worker of a pod has died and is started again");
                let (context, workers) = (self.context.clone(), self.workers.clone());
                let manager = Manager { context, workers, stop: self.stop.clone() };
                tokio::spawn(async move {
                    let found = manager.everything().await.remove(&uid).unwrap_or_default();
                    manager.begin(pod, found);
                });
            }
            drop(handle);
        }
    }
}

/// Ends what runs of a pod that the source does not know: it was deleted while no daemon ran.
async fn remove_orphan(context: Arc<Context>, uid: String, found: Found) {
    tracing::info!(uid, "removing a pod that is no longer wanted");
    let runtime = &context.parts.runtime;
    for sandbox in found.sandboxes {
        let stop = v1::StopPodSandboxRequest { pod_sandbox_id: sandbox.id.clone() };
        let remove = v1::RemovePodSandboxRequest { pod_sandbox_id: sandbox.id };
        let stopped = runtime.stop_pod_sandbox(stop).await.map(drop);
        let removed = runtime.remove_pod_sandbox(remove).await.map(drop);
        if let Err(error) = stopped.and(removed) {
            tracing::warn!(uid, %error, "a sandbox of a pod that is gone cannot be removed");
        }
    }
}
