//! The kubelet as a whole.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::context::{Config, Context, Parts, uid_of};
use crate::manager::Manager;
use crate::oom::{self, Kills};
use crate::pods_api;
use crate::pulled::Pulled;
use crate::records::Records;
use crate::resources::Resources;
use crate::retry::Outage;
use crate::timeline::Step;
use crate::users::Users;
use crate::worker::{Event, Shown, Workers};

/// A running kubelet. Dropping it ends its work and leaves the pods running.
pub struct Kubelet {
    workers: Arc<Mutex<Workers>>,
    /// Changes whenever a worker has taken a step.
    steps: watch::Receiver<()>,
    /// Of how many pods something is left that nobody wants.
    left: watch::Receiver<usize>,
    /// Stops the manager, with which the workers end.
    stop: DropGuard,
    resources: Arc<Resources>,
    /// Records of pods that are being written.
    writes: TaskTracker,
    /// Taken by the first who stops it.
    manager: Mutex<Option<JoinHandle<()>>>,
    /// The Pods API, and who looks out for kills; as above.
    others: Mutex<Vec<JoinHandle<()>>>,
}

/// What a pod waits for, and how its start went.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Explanation {
    /// The step that goes on, its cause if it is a wait, and for how many milliseconds already.
    pub waiting: Option<(String, String, f64)>,
    /// The steps of the start.
    pub steps: Vec<Step>,
}

/// Why and how the node ends a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ending {
    /// As the API spells it.
    pub reason: &'static str,
    /// For the operator.
    pub message: String,
    /// The most time that the pod gets.
    pub grace_s: i64,
    /// The pod itself is not to blame (condition `DisruptionTarget`).
    pub disrupted: bool,
}

impl Kubelet {
    /// Adopts what runs and begins to work; returns when every pod of the source has a worker.
    ///
    /// # Errors
    /// The directory of records cannot be made, or a socket.
    pub async fn start(config: Config, mut parts: Parts) -> io::Result<Self> {
        parts.runtime = Arc::new(cri::Observed::new(parts.runtime, parts.metrics.clone()));
        parts.images = Arc::new(cri::Observed::new(parts.images, parts.metrics.clone()));
        let records = Records::open(config.records_dir.clone())?;
        let writes = records.writes();
        let users = Users::open(config.generate.paths.clone());
        let pulled = Pulled::open(&config.generate.paths.root, config.verification.clone())?;
        pulled.take_over(&*parts.images).await;
        let resources = parts.resources.clone();
        let steps = watch::Sender::new(());
        let heard = steps.subscribe();
        let root = config.generate.paths.root.clone();
        let pulls = config.pulls_max.map(Semaphore::new);
        let (kills, outage) = (Kills::open(), Outage::default());
        let context = Arc::new(Context { config, parts, records, users, pulled, kills, pulls, outage, steps });
        // A start that is given up leaves nobody at work.
        let (workers, stop): (Arc<Mutex<Workers>>, _) = (Arc::default(), CancellationToken::new().drop_guard());
        let (tell_left, left) = watch::channel(0);
        let (watch, stopped) = (oom::watch(context.clone(), workers.clone()), stop.token().clone());
        let watch = tokio::spawn(async move {
            stopped.run_until_cancelled(watch).await;
        });
        let manager = Manager::new(context, workers.clone(), tell_left, stop.token().clone());
        let (ready, adopted) = tokio::sync::oneshot::channel();
        let manager = Mutex::new(Some(tokio::spawn(manager.run(ready))));
        let shown = workers.clone();
        let serving = resources.serve(Box::new(move || active(&shown))).await;
        serving.map_err(io::Error::other)?;
        // An error means that the manager has died; its panic has been told.
        let _ = adopted.await;
        // Only now are all pods there.
        let pods_api = pods_api::serve(&root, workers.clone(), heard.clone(), stop.token().clone()).await?;
        let others = Mutex::new(vec![watch, pods_api]);
        Ok(Self { workers, steps: heard, left, stop, resources, writes, manager, others })
    }

    fn look<T>(&self, uid: &str, at: impl FnOnce(&Shown) -> T) -> Option<T> {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = workers.get(uid)?.shown.lock().unwrap_or_else(PoisonError::into_inner);
        Some(at(&shown))
    }

    /// Why a pod is not further than it is.
    pub fn explain(&self, uid: &str) -> Option<Explanation> {
        self.look(uid, |shown| Explanation { waiting: waiting(shown), steps: shown.timeline.steps() })
    }

    /// The runtime's id of a pod's container: the one that runs, or the newest that ended.
    pub fn container_id(&self, uid: &str, container: &str) -> Option<String> {
        self.look(uid, |shown| {
            let view = shown.view.containers.get(container)?;
            let running = view.running.as_ref().map(|running| running.id.clone());
            running.or_else(|| view.ended.as_ref().map(|run| run.id.clone()))
        })
        .flatten()
    }

    /// The runtime's id of a pod's sandbox.
    pub fn sandbox_id(&self, uid: &str) -> Option<String> {
        self.look(uid, |shown| shown.view.sandbox.id().map(str::to_owned)).flatten()
    }

    /// All pods with the statuses that were published last.
    pub fn pods(&self) -> Vec<(Arc<Pod>, Option<Arc<PodStatus>>)> {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = workers.values().map(|worker| worker.shown.lock().unwrap_or_else(PoisonError::into_inner));
        shown.map(|shown| (shown.pod.clone(), shown.status.clone())).collect()
    }

    /// Pods that take room on the node: they have not ended, and will not just now.
    pub fn active_pods(&self) -> Vec<Arc<Pod>> {
        self.pods_that(Shown::is_active)
    }

    /// The uids of pods that have ended and of which nothing runs; their containers are there for their logs.
    pub fn finished_pods(&self) -> Vec<String> {
        let cleaned = |shown: &Shown| !shown.is_active() && shown.view.left == pod::Left::Logs;
        self.pods_that(cleaned).iter().map(|pod| uid_of(pod).to_owned()).collect()
    }

    fn pods_that(&self, wanted: impl Fn(&Shown) -> bool) -> Vec<Arc<Pod>> {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        let shown = workers.values().map(|worker| worker.shown.lock().unwrap_or_else(PoisonError::into_inner));
        shown.filter(|shown| wanted(shown)).map(|shown| shown.pod.clone()).collect()
    }

    /// Whether nothing of a pod uses the node any more but its logs and its containers' files.
    pub fn is_cleaned(&self, uid: &str) -> bool {
        self.look(uid, |shown| shown.view.left != pod::Left::Everything).unwrap_or(true)
    }

    /// Returns when that is so of all these pods.
    pub async fn cleaned(&self, uids: &[&str]) {
        let mut steps = self.steps.clone();
        while !uids.iter().all(|uid| self.is_cleaned(uid)) {
            if steps.changed().await.is_err() {
                return; // The kubelet has stopped.
            }
        }
    }

    /// Returns when nothing is left of pods that nobody wants, or when the kubelet has stopped.
    pub async fn tidied(&self) {
        let _ = self.left.clone().wait_for(|left| *left == 0).await; // An error is the end of the kubelet.
    }

    /// Ends a pod for the node's sake: it becomes `Failed`. A pod that the node has ended before stays as it is.
    pub fn end(&self, uid: &str, Ending { reason, message, grace_s, disrupted }: Ending) {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(worker) = workers.get(uid) {
            let change = pod::Change::Fail { reason: reason.to_owned(), message, grace_s: Some(grace_s), disrupted };
            let _ = worker.events.send(Event::Change(change)); // It may just be ending.
        }
    }

    /// How many pods have a worker.
    pub fn pod_count(&self) -> usize {
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Images came to the node by another way than a pull: pods that failed to pull do not wait out their back-off.
    pub fn images_loaded(&self) {
        let workers = self.workers.lock().unwrap_or_else(PoisonError::into_inner);
        for worker in workers.values() {
            let _ = worker.events.send(Event::Change(pod::Change::RetryPulls)); // It may just be ending.
        }
    }

    /// Stops working; pods go on. Returns when nothing is done any more.
    pub async fn stop(&self) {
        self.stop.token().cancel();
        let manager = self.manager.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(manager) = manager {
            let _ = manager.await; // It ends by the token.
        }
        let workers = std::mem::take(&mut *self.workers.lock().unwrap_or_else(PoisonError::into_inner));
        for (_, worker) in workers {
            worker.task.abort();
            let _ = worker.task.await; // It was told to end.
        }
        // The next kubelet must not be overtaken by what a worker of this one had begun.
        self.writes.close();
        self.writes.wait().await;
        let others = std::mem::take(&mut *self.others.lock().unwrap_or_else(PoisonError::into_inner));
        for other in others {
            let _ = other.await; // As the manager.
        }
        self.resources.stop().await;
    }
}

/// The pods that have not ended.
fn active(workers: &Mutex<Workers>) -> Vec<Arc<Pod>> {
    let workers = workers.lock().unwrap_or_else(PoisonError::into_inner);
    let shown = workers.values().map(|worker| worker.shown.lock().unwrap_or_else(PoisonError::into_inner));
    shown.filter(|shown| shown.is_active()).map(|shown| shown.pod.clone()).collect()
}

/// The step that goes on, or the reason for which the first container waits.
fn waiting(shown: &Shown) -> Option<(String, String, f64)> {
    let open = shown.timeline.open_ms();
    let statuses = shown.status.as_ref().map(|status| {
        let init = status.init_container_statuses.iter().flatten();
        init.chain(status.container_statuses.iter().flatten()).cloned().collect::<Vec<_>>()
    });
    let held = statuses.unwrap_or_default().into_iter().find_map(|status| {
        let waiting = status.state.as_ref()?.waiting.clone();
        match waiting {
            Some(waiting) => Some((
                format!("container {}: {}", status.name, waiting.reason.unwrap_or_default()),
                waiting.message.unwrap_or_default(),
            )),
            None if status.started == Some(false) && status.state?.running.is_some() => {
                Some((format!("startup of container {}", status.name), probe_text(shown, &status.name)))
            }
            None if !status.ready && status.started == Some(true) => {
                Some((format!("readiness of container {}", status.name), probe_text(shown, &status.name)))
            }
            None => None,
        }
    });
    match (held, open) {
        (Some((what, cause)), Some((step, ms))) if cause.is_empty() => Some((step, what, ms)),
        (Some((what, cause)), open) => Some((what, cause, open.map_or_else(|| age_ms(shown), |(_, ms)| ms))),
        (None, Some((step, ms))) => Some((step, "it goes on".to_owned(), ms)),
        (None, None) => None,
    }
}

/// How long the pod has been on the node.
fn age_ms(shown: &Shown) -> f64 {
    let started = shown.view.record.started.map(|started| k8s_openapi::jiff::Timestamp::now().duration_since(started));
    started.map_or(0.0, |age| age.as_secs_f64() * 1000.0)
}

fn probe_text(shown: &Shown, container: &str) -> String {
    let Some(record) = shown.view.record.containers.get(container) else {
        return "it has not been probed yet".to_owned();
    };
    let Some((_, spec)) = pod::spec::container(&shown.pod, container) else { return String::new() };
    let mut texts = record.probes.active(&spec).filter_map(|kind| {
        let (outcome, count) = record.probes.get(kind).streak?;
        let probe = kind.of(&spec)?;
        let what = match outcome {
            pod::probe::Outcome::Success => "succeeded",
            pod::probe::Outcome::Failure => "failed",
        };
        let (limit, period) = (probe.failure_threshold.unwrap_or(3), probe.period_seconds.unwrap_or(10));
        Some(format!("{} probe {what} {count} times in a row (every {period} s, limit {limit})", kind.as_str()))
    });
    texts.next().unwrap_or_else(|| "its first probe is not due yet".to_owned())
}
