//! What containers have written. That is only known by walking their directories, so it is measured when somebody asks,
//! one at a time and at a pace, and answered from memory.
//!
//! ```text
//! asked for ─► known and young ─► answer
//!          ├─► known and old ───► answer, and measure again ─┐
//!          └─► not known ───────► measure, wait a little ────┤
//!                                                            ▼
//!                                     one task: measure ─► rest 19 times as long ─► next
//! ```

use std::collections::{HashMap, HashSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use image::Usage;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

/// A measurement this old is made again when somebody asks; upstream's runtimes measure each layer as often.
const AGE_MAX: Duration = Duration::from_secs(10);
/// How long the first answer for a container waits for its measurement: that of a fresh one takes far less.
const PATIENCE: Duration = Duration::from_millis(100);
/// Of twenty moments one is spent on measuring, so that a container with a million files costs a twentieth of a disk.
const REST: u32 = 19;
/// Even after the longest walk the next container gets its turn.
const REST_MAX: Duration = Duration::from_secs(60);
/// Containers that wait for being measured; more are taken up the next time they are asked for (R6).
const QUEUE: usize = 1024;

pub(super) type Measuring = Pin<Box<dyn Future<Output = Result<Usage, image::Error>> + Send>>;

/// The known sizes. The task that measures ends with this value.
#[derive(Debug)]
pub(super) struct Writable {
    shared: Arc<Shared>,
    queue: mpsc::Sender<String>,
}

#[derive(Debug)]
struct Shared {
    /// Guards the table; never held over an await.
    table: Mutex<Table>,
    /// Counts measurements, for those who wait for one.
    done: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Table {
    known: HashMap<String, Known>,
    /// In the queue, or being measured.
    waiting: HashSet<String>,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    usage: Usage,
    at: SystemTime,
    /// By the clock that nobody sets.
    measured: Instant,
}

impl Writable {
    /// `measure` walks the directories of a container. Needs a tokio runtime.
    pub(super) fn new(measure: impl Fn(String) -> Measuring + Send + Sync + 'static) -> Self {
        let (queue, mut requests) = mpsc::channel::<String>(QUEUE);
        let shared = Arc::new(Shared { table: Mutex::default(), done: watch::Sender::new(0) });
        let worker = Arc::clone(&shared);
        // It owns nothing that has to be brought to an end, and the queue's other end is ours alone.
        tokio::spawn(async move {
            while let Some(id) = requests.recv().await {
                let begun = Instant::now();
                let measured = measure(id.clone()).await;
                worker.note(&id, measured);
                tokio::time::sleep((begun.elapsed() * REST).min(REST_MAX)).await;
            }
        });
        Self { shared, queue }
    }

    /// What each container has written and when that was measured; `None` for one that is not measured yet.
    pub(super) async fn of(&self, ids: &[String]) -> Vec<Option<(Usage, SystemTime)>> {
        let unknown = self.request(ids);
        if !unknown.is_empty() {
            // Whoever runs out of patience gets an answer without those, and the next time with them.
            let _ = tokio::time::timeout(PATIENCE, self.shared.measured(&unknown)).await;
        }
        let table = self.shared.table();
        ids.iter().map(|id| table.known.get(id).map(|known| (known.usage, known.at))).collect()
    }

    pub(super) fn forget(&self, id: &str) {
        let mut table = self.shared.table();
        table.known.remove(id);
        // Being measured still: the outcome is dropped.
        table.waiting.remove(id);
    }

    /// Asks for what is old or not known; answers the latter.
    fn request(&self, ids: &[String]) -> Vec<String> {
        let mut table = self.shared.table();
        let mut unknown = Vec::new();
        for id in ids {
            let known = table.known.get(id);
            if known.is_some_and(|known| known.measured.elapsed() < AGE_MAX) {
                continue;
            }
            if known.is_none() {
                unknown.push(id.clone());
            }
            if !table.waiting.contains(id) && self.queue.try_send(id.clone()).is_ok() {
                table.waiting.insert(id.clone());
            }
        }
        unknown
    }
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, id: &str, measured: Result<Usage, image::Error>) {
        {
            let mut table = self.table();
            let wanted = table.waiting.remove(id);
            match measured {
                Ok(usage) if wanted => {
                    let known = Known { usage, at: SystemTime::now(), measured: Instant::now() };
                    table.known.insert(id.to_owned(), known);
                }
                Ok(_) => {}
                Err(error) => tracing::debug!(container = id, %error, "what the container has written is not known"),
            }
        }
        self.done.send_modify(|count| *count += 1);
    }

    /// Waits until none of `ids` waits for being measured.
    async fn measured(&self, ids: &[String]) {
        let mut done = self.done.subscribe();
        let none_waits = |_: &u64| {
            let table = self.table();
            ids.iter().all(|id| !table.waiting.contains(id))
        };
        // The sender is ours: it cannot have gone.
        let _ = done.wait_for(none_waits).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Measures `cost` long; each measurement of a container answers one byte more.
    fn writable(cost: Duration) -> (Writable, Arc<AtomicU64>) {
        let count = Arc::new(AtomicU64::new(0));
        let counter = Arc::clone(&count);
        let writable = Writable::new(move |_| {
            let counter = Arc::clone(&counter);
            Box::pin(async move {
                tokio::time::sleep(cost).await;
                Ok(Usage { bytes: counter.fetch_add(1, Ordering::Relaxed) + 1, inodes: 1 })
            })
        });
        (writable, count)
    }

    async fn bytes(writable: &Writable, id: &str) -> Option<u64> {
        writable.of(&[id.to_owned()]).await[0].map(|(usage, _)| usage.bytes)
    }

    #[tokio::test(start_paused = true)]
    async fn a_new_container_is_measured_at_once_and_then_answered_from_memory() {
        let (writable, count) = writable(Duration::from_millis(1));
        assert_eq!(bytes(&writable, "c").await, Some(1));
        tokio::time::advance(AGE_MAX / 2).await;
        assert_eq!(bytes(&writable, "c").await, Some(1));
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn an_old_measurement_is_answered_and_made_again() {
        let (writable, _) = writable(Duration::from_millis(1));
        bytes(&writable, "c").await;
        tokio::time::advance(AGE_MAX).await;
        assert_eq!(bytes(&writable, "c").await, Some(1), "nobody waits for the second one");
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert_eq!(bytes(&writable, "c").await, Some(2));
    }

    #[tokio::test(start_paused = true)]
    async fn a_long_walk_holds_nobody_up_and_comes_later() {
        let (writable, _) = writable(Duration::from_secs(5));
        let begun = Instant::now();
        assert_eq!(bytes(&writable, "big").await, None);
        assert_eq!(begun.elapsed(), PATIENCE);
        tokio::time::sleep(Duration::from_secs(5)).await;
        assert_eq!(bytes(&writable, "big").await, Some(1));
    }

    #[tokio::test(start_paused = true)]
    async fn measuring_takes_a_twentieth_of_the_time() {
        let (writable, count) = writable(Duration::from_secs(1));
        let ids: Vec<String> = (0..100).map(|id| id.to_string()).collect();
        writable.of(&ids).await;
        tokio::time::sleep(Duration::from_secs(200)).await;
        assert_eq!(count.load(Ordering::Relaxed), 10);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_forgotten_meanwhile_is_not_kept() {
        let (writable, _) = writable(Duration::from_secs(1));
        bytes(&writable, "c").await;
        writable.forget("c");
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert!(writable.shared.table().known.is_empty());
    }

    #[tokio::test]
    async fn what_cannot_be_measured_is_not_known() {
        let writable = Writable::new(|id| Box::pin(async move { Err(image::Error::NoSuchImage(id)) }));
        assert_eq!(bytes(&writable, "c").await, None);
        assert!(writable.shared.table().waiting.is_empty());
    }
}
