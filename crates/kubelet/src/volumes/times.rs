//! How long volumes take: some are made side by side, others one after the other.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The time of each volume of a pod, by its name.
#[derive(Debug, Default)]
pub struct Times(Mutex<BTreeMap<String, Duration>>);

impl Times {
    /// What a volume took in all; none for one that nobody has begun to make.
    pub fn of(&self, volume: &str) -> Option<Duration> {
        self.lock().get(volume).copied()
    }

    pub(super) fn add(&self, volume: &str, took: Duration) {
        *self.lock().entry(volume.to_owned()).or_default() += took;
    }

    /// Notes how long `work` on a volume takes.
    pub(super) async fn note<T>(&self, volume: &str, work: impl Future<Output = T>) -> T {
        let begun = Instant::now();
        let done = work.await;
        self.add(volume, begun.elapsed());
        done
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Duration>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
