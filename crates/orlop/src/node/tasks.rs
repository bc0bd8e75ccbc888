//! What a node does for its clients beyond an answer. It goes on when the client goes away, and ends with the node.

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Tasks under way.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    tracker: TaskTracker,
    stop: CancellationToken,
}

impl Tasks {
    /// Begins one; after the end it does nothing.
    pub(super) fn begin(&self, work: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        // A task that is cut off has nobody left who would want to know.
        self.tracker.spawn(async move {
            let _ = stop.run_until_cancelled(work).await;
        });
    }

    /// Ends all of them, wherever they are.
    pub(super) async fn end(&self) {
        self.stop.cancel();
        self.tracker.close();
        self.tracker.wait().await;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[tokio::test]
    async fn nothing_outlives_the_end() {
        let (tasks, held) = (Tasks::default(), Arc::new(()));
        let (copy, (begun, seen)) = (held.clone(), tokio::sync::oneshot::channel());
        tasks.begin(async move {
            let _held = copy;
            begun.send(()).unwrap();
            std::future::pending().await
        });
        seen.await.unwrap();
        tasks.end().await;
        assert_eq!(Arc::strong_count(&held), 1);
    }
}
