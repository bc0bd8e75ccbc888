//! Statuses on their way to the source: the latest wins, a slow source delays nobody.

use std::sync::Arc;

use cluster::Source;
use k8s_openapi::api::core::v1::PodStatus;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::context::chain;
use crate::retry::Rests;

/// The publisher of one pod's status. It ends with this value.
#[derive(Debug)]
pub(crate) struct Publisher {
    latest: watch::Sender<Latest>,
    _task: AbortOnDropHandle<()>,
}

/// The latest status, and whether the source has it.
#[derive(Debug, Clone, Default)]
struct Latest {
    status: Option<Arc<PodStatus>>,
    is_taken: bool,
}

/// Tells when the source has taken all statuses that were published.
#[derive(Debug, Clone)]
pub(crate) struct Taken(watch::Receiver<Latest>);

impl Taken {
    /// Returns as soon as the source has the latest status, or there is none.
    pub(crate) async fn all(&mut self) {
        // The publisher is gone only with its pod's worker, and whoever waits here with it.
        let _ = self.0.wait_for(|latest| latest.status.is_none() || latest.is_taken).await;
    }
}

impl Publisher {
    pub(crate) fn new(source: Arc<dyn Source>, uid: String) -> Self {
        let latest = watch::Sender::new(Latest::default());
        let task = tokio::spawn(publish(source, uid, latest.clone()));
        Self { latest, _task: AbortOnDropHandle::new(task) }
    }

    pub(crate) fn publish(&self, status: Arc<PodStatus>) {
        self.latest.send_replace(Latest { status: Some(status), is_taken: false });
    }

    pub(crate) fn taken(&self) -> Taken {
        Taken(self.latest.subscribe())
    }
}

/// Offers the latest status until the source has it, and each newer one.
async fn publish(source: Arc<dyn Source>, uid: String, latest: watch::Sender<Latest>) {
    let mut news = latest.subscribe();
    let mut rests = Rests::new();
    loop {
        // This task has a sender itself, so there is never none.
        let wanted = news.wait_for(|latest| !latest.is_taken && latest.status.is_some()).await;
        let Ok(Some(status)) = wanted.map(|now| now.status.clone()) else { return };
        if is_taken(&*source, &uid, &status).await {
            rests = Rests::new();
            latest.send_if_modified(|latest| {
                latest.is_taken = latest.status.as_ref() == Some(&status);
                latest.is_taken
            });
        } else {
            rests.rest().await;
        }
    }
}

/// Whether there is nothing more to do about a status.
async fn is_taken(source: &dyn Source, uid: &str, status: &PodStatus) -> bool {
    let Err(error) = source.update_pod_status(uid, status.clone()).await else { return true };
    if error.is_passing() {
        tracing::warn!(uid, error = chain(&error), "a pod's status was not taken; trying again");
        return false;
    }
    // Either the pod is gone, or the source will not have it.
    tracing::debug!(uid, error = chain(&error), "a pod's status was not taken");
    true
}
