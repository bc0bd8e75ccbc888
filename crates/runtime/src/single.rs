//! An operation that runs once at a time, to its end, and that everybody who asks for it meanwhile shares.

use std::future::Future;
use std::sync::{Mutex, PoisonError};

use cri::Error;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use tokio::task::AbortHandle;
use tokio_util::task::TaskTracker;

/// What a running operation comes to.
pub(crate) type Outcome = Result<(), Error>;

/// A place for one operation on one object: stopping a container, say.
#[derive(Default)]
pub(crate) struct Single {
    /// Guards the choice between joining and beginning.
    running: Mutex<Option<Running>>,
}

struct Running {
    outcome: Shared<BoxFuture<'static, Outcome>>,
    task: AbortHandle,
}

impl std::fmt::Debug for Single {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Single")
    }
}

impl Single {
    /// Joins the operation if it runs, begins it with `begin` otherwise, and waits for its outcome. It goes on if the
    /// caller does not.
    pub(crate) async fn run<F>(&self, tasks: &TaskTracker, begin: impl FnOnce() -> F) -> Outcome
    where
        F: Future<Output = Outcome> + Send + 'static,
    {
        self.join_or_begin(tasks, begin).await
    }

    /// As [`Single::run`], without waiting.
    pub(crate) fn join_or_begin<F>(
        &self,
        tasks: &TaskTracker,
        begin: impl FnOnce() -> F,
    ) -> Shared<BoxFuture<'static, Outcome>>
    where
        F: Future<Output = Outcome> + Send + 'static,
    {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(operation) = running.as_ref().filter(|operation| !operation.task.is_finished()) {
            return operation.outcome.clone();
        }
        let task = tasks.spawn(begin());
        let handle = task.abort_handle();
        let outcome = async move {
            task.await.unwrap_or_else(|error| Err(Error::Internal(format!("the operation was given up: {error}"))))
        };
        // A shared future moves on only while somebody polls it; the task inside needs nobody.
        let outcome = outcome.boxed().shared();
        *running = Some(Running { outcome: outcome.clone(), task: handle });
        outcome
    }

    /// Waits for the operation if it has begun.
    pub(crate) async fn outcome(&self) -> Outcome {
        let begun = self.begun();
        match begun {
            Some(outcome) => outcome.await,
            None => Ok(()),
        }
    }

    fn begun(&self) -> Option<Shared<BoxFuture<'static, Outcome>>> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.as_ref().map(|operation| operation.outcome.clone())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use tokio::sync::Notify;

    use super::*;

    #[tokio::test]
    async fn callers_share_one_run_and_may_go_away() {
        let (single, tasks) = (Single::default(), TaskTracker::new());
        let (gate, runs) = (Arc::new(Notify::new()), Arc::new(AtomicU32::new(0)));
        let begin = || {
            let (gate, runs) = (gate.clone(), runs.clone());
            async move {
                gate.notified().await;
                runs.fetch_add(1, Ordering::SeqCst);
                Err(Error::Internal("as it happens".into()))
            }
        };
        drop(single.join_or_begin(&tasks, begin)); // This caller goes away.
        let (first, second) = (single.join_or_begin(&tasks, begin), single.join_or_begin(&tasks, begin));
        gate.notify_one();
        assert_eq!(first.await, second.await);
        assert_eq!(runs.load(Ordering::SeqCst), 1);
        gate.notify_one();
        assert!(single.run(&tasks, begin).await.is_err());
        assert_eq!(runs.load(Ordering::SeqCst), 2, "a later call begins anew");
    }
}
