//! Single flight: work that several want at once is done once, by a task that lives as long as anybody wants it.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Mutex, Weak};

use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::error::Error;

/// Work under way, by what it is for.
#[derive(Debug)]
pub(crate) struct Flights<K, V> {
    under_way: Mutex<HashMap<K, Weak<Flight<V>>>>,
}

/// Whether the caller's own job ran or somebody else's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Joined {
    Pilot,
    Passenger,
}

#[derive(Debug)]
struct Flight<V> {
    state: watch::Receiver<State<V>>,
    task: AbortHandle,
}

#[derive(Debug, Clone)]
enum State<V> {
    Progress(u64),
    Done(Result<V, Error>),
}

/// The last who waits for it ends it.
impl<V> Drop for Flight<V> {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Self { under_way: Mutex::default() }
    }
}

impl<K: Clone + Eq + Hash, V: Clone + Send + Sync + 'static> Flights<K, V> {
    /// Starts `job` or joins the one that is under way for `key`. `job` gets a function to report its progress with;
    /// `progress` hears of it, whosever job it is.
    pub(crate) async fn join<F, Fut>(&self, key: &K, job: F, progress: impl Fn(u64)) -> (Joined, Result<V, Error>)
    where
        F: FnOnce(Box<dyn Fn(u64) + Send + Sync>) -> Fut,
        Fut: Future<Output = Result<V, Error>> + Send + 'static,
    {
        let (role, flight) = self.board(key, job);
        let mut state = flight.state.clone();
        loop {
            let now = state.borrow_and_update().clone();
            match now {
                State::Progress(value) => progress(value),
                State::Done(result) => return (role, result),
            }
            if state.changed().await.is_err() {
                // The task is gone without a result: it panicked, or the runtime shuts down.
                let reason = "the task that fetched it has ended".to_owned();
                return (role, Err(Error::Unavailable { reference: String::new(), host: String::new(), reason }));
            }
        }
    }

    fn board<F, Fut>(&self, key: &K, job: F) -> (Joined, Arc<Flight<V>>)
    where
        F: FnOnce(Box<dyn Fn(u64) + Send + Sync>) -> Fut,
        Fut: Future<Output = Result<V, Error>> + Send + 'static,
    {
        let mut under_way = self.under_way.lock().expect("no panic while it is held");
        under_way.retain(|_, flight| flight.strong_count() > 0);
        if let Some(flight) = under_way.get(key).and_then(Weak::upgrade).filter(|flight| !is_over(flight)) {
            return (Joined::Passenger, flight);
        }
        let (sender, state) = watch::channel(State::Progress(0));
        let sender = Arc::new(sender);
        let reporter = Arc::clone(&sender);
        // Nobody listening is fine: then the task is about to be ended.
        let report = Box::new(move |value| drop(reporter.send(State::Progress(value))));
        let work = job(report);
        let task = tokio::spawn(async move {
            let result = work.await;
            sender.send_replace(State::Done(result));
        });
        let flight = Arc::new(Flight { state, task: task.abort_handle() });
        under_way.insert(key.clone(), Arc::downgrade(&flight));
        (Joined::Pilot, flight)
    }
}

fn is_over<V>(flight: &Flight<V>) -> bool {
    matches!(*flight.state.borrow(), State::Done(_))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn runs_once_for_all_who_wait() {
        let flights = Flights::<&str, u32>::default();
        let runs = Arc::new(AtomicUsize::new(0));
        let (go, wait) = oneshot::channel::<()>();
        let counted = Arc::clone(&runs);
        let first = flights.join(
            &"k",
            |_| async move {
                counted.fetch_add(1, Ordering::SeqCst);
                wait.await.unwrap();
                Ok(7)
            },
            |_| {},
        );
        let second = flights.join(&"k", |_| async { panic!("must not run") }, |_| {});
        let release = async { go.send(()).unwrap() };
        let (first, second, ()) = tokio::join!(first, second, release);
        assert_eq!((first.0, second.0), (Joined::Pilot, Joined::Passenger));
        assert_eq!((first.1.unwrap(), second.1.unwrap(), runs.load(Ordering::SeqCst)), (7, 7, 1));
    }

    #[tokio::test]
    async fn ends_with_the_last_who_waits() {
        let flights = Flights::<&str, u32>::default();
        let (alive, ended) = oneshot::channel::<()>();
        let job = |_| async move {
            let _alive = alive;
            std::future::pending().await
        };
        let waiting = flights.join(&"k", job, |_| {});
        assert!(tokio::time::timeout(std::time::Duration::ZERO, waiting).await.is_err());
        assert!(ended.await.is_err(), "the job was dropped");
    }
}
