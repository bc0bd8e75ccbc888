//! Statuses on their way to the source: the latest wins, a slow source delays nobody.

use std::sync::Arc;

use cluster::{Source, SourceError};
use k8s_openapi::api::core::v1::PodStatus;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// The publisher of one pod's status.
#[derive(Debug)]
pub(crate) struct Publisher {
    latest: watch::Sender<Option<PodStatus>>,
    task: AbortOnDropHandle<()>,
}

impl Publisher {
    pub(crate) fn new(source: Arc<dyn Source>, uid: String) -> Self {
        let (latest, mut news) = watch::channel(None);
        let task = tokio::spawn(async move {
            while news.changed().await.is_ok() {
                let status: Option<PodStatus> = news.borrow_and_update().clone();
                if let Some(status) = status {
                    publish(&*source, &uid, status).await;
                }
            }
        });
        Self { latest, task: AbortOnDropHandle::new(task) }
    }

    pub(crate) fn publish(&self, status: PodStatus) {
        // The task ends only after this sender.
        let _ = self.latest.send(Some(status));
    }

    /// Waits until the last status has been taken.
    pub(crate) async fn finish(self) {
        drop(self.latest);
        let _ = self.task.await;
    }
}

async fn publish(source: &dyn Source, uid: &str, status: PodStatus) {
    match source.update_pod_status(uid, status).await {
        Ok(()) | Err(SourceError::NotFound { .. }) => {}
        Err(error) => tracing::warn!(uid, %error, "a pod's status was not taken"),
    }
}
