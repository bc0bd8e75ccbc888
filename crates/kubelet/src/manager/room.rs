//! Room for critical pods: others end, and who needs their room begins when they have ended.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use pod::status::PREEMPTING;
use pod::{Change, Left};
use tokio::sync::{oneshot, watch};
use tokio::task;

use super::Manager;
use crate::context::{Context, name_of, uid_of};
use crate::worker::{Event, Shown};

/// What a runtime may need to end a pod beside the pod's own time, as upstream has it.
const LEAST: Duration = Duration::from_secs(10);

/// Who goes, and who waits for it.
#[derive(Debug, Default)]
pub(super) struct Rooms {
    /// Pods that were told to go, by uid: their room is given away.
    going: HashSet<String>,
    /// Who begins when a job is over that waits for pods to end.
    waiting: HashMap<task::Id, oneshot::Sender<()>>,
}

impl Rooms {
    /// Whether a pod's room is given away.
    pub(super) fn is_going(&self, uid: &str) -> bool {
        self.going.contains(uid)
    }

    /// A pod has no worker any more.
    pub(super) fn forget(&mut self, uid: &str) {
        self.going.remove(uid);
    }
}

impl Manager {
    /// Ends `victims`, so that a critical pod has what the node is short of; tells when they have ended, or have had more
    /// time for it than they asked for.
    pub(super) fn make_room(&mut self, pod: &Pod, victims: Vec<Arc<Pod>>, resource: &str) -> oneshot::Receiver<()> {
        const MESSAGE: &str = "Preempted in order to admit critical pod";
        let (tell, told) = oneshot::channel();
        let mut shown = Vec::new();
        let mut within = LEAST;
        for victim in victims {
            tracing::warn!(pod = %name_of(&victim), critical = %name_of(pod), resource, "a pod makes room");
            self.context.warning(&victim, PREEMPTING, MESSAGE.to_owned(), None);
            self.context.parts.metrics.preempted(resource);
            let (reason, message) = (PREEMPTING.to_owned(), MESSAGE.to_owned());
            let change = Change::Fail { reason, message, grace_s: None, disrupted: true };
            if let Some(worker) = self.lock().get(uid_of(&victim)) {
                let _ = worker.events.send(Event::Change(change)); // It may just be ending.
                shown.push(worker.shown.clone());
            }
            let grace_s = u64::try_from(pod::spec::grace_s(&victim)).unwrap_or(0);
            within = within.max(Duration::from_secs(grace_s.saturating_add(grace_s / 2)));
            self.rooms.going.insert(uid_of(&victim).to_owned());
        }
        let (context, steps) = (self.context.clone(), self.context.steps.subscribe());
        let job = self.jobs.spawn(async move {
            if tokio::time::timeout(within, ended(&shown, steps)).await.is_err() {
                shown.iter().filter(|one| !is_over(one)).for_each(|one| overdue(&context, one));
            }
        });
        self.rooms.waiting.insert(job.id(), tell);
        told
    }

    /// Whether a job waited for pods to end: who needs their room begins.
    pub(super) fn has_made_room(&mut self, job: task::Id) -> bool {
        let Some(tell) = self.rooms.waiting.remove(&job) else { return false };
        self.context.parts.resources.retain_only(&self.holders());
        let _ = tell.send(()); // The pod may be gone by now.
        true
    }
}

/// Returns when nothing of these pods runs any more.
async fn ended(pods: &[Arc<Mutex<Shown>>], mut steps: watch::Receiver<()>) {
    while !pods.iter().all(is_over) {
        if steps.changed().await.is_err() {
            return; // The kubelet has stopped.
        }
    }
}

fn is_over(shown: &Arc<Mutex<Shown>>) -> bool {
    shown.lock().unwrap_or_else(PoisonError::into_inner).view.left != Left::Everything
}

fn overdue(context: &Context, shown: &Arc<Mutex<Shown>>) {
    let pod = shown.lock().unwrap_or_else(PoisonError::into_inner).pod.clone();
    let message = "Container runtime did not kill the pod within specified grace period.".to_owned();
    context.warning(&pod, "ExceededGracePeriod", message, None);
}
