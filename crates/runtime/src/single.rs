//! An operation that runs once at a time, to its end, and that everybody who asks for it meanwhile shares.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cri::Error;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, Shared};
use tokio::sync::oneshot;
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
    /// Alive while it runs. A handle of the task would keep the task's memory, kilobytes, for as long as the object lives.
    is_running: Weak<()>,
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
        if let Some(operation) = running.as_ref().filter(|operation| operation.is_running.strong_count() > 0) {
            return operation.outcome.clone();
        }
        let (runs, (tell, told)) = (Arc::new(()), oneshot::channel());
        let is_running = Arc::downgrade(&runs);
        let operation = begin();
        tasks.spawn(async move {
            let outcome = operation.await;
            // Before anybody hears of it: who has heard of it may begin anew.
            drop(runs);
            let _ = tell.send(outcome); // Nobody may be waiting.
        });
        let outcome = async move {
            told.await.unwrap_or_else(|_| Err(Error::Internal("the operation was given up: it has died".to_owned())))
        };
        // A shared future moves on only while somebody polls it; the task inside needs nobody.
        let outcome = outcome.boxed().shared();
        *running = Some(Running { outcome: outcome.clone(), is_running });
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
