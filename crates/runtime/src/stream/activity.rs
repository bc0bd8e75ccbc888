//! Whether anything moves on a connection.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// When something moved last on a connection. Clones share it.
#[derive(Clone)]
pub(super) struct Activity(Arc<Mutex<Instant>>);

impl Activity {
    /// A connection that begins now.
    pub(super) fn new() -> Self {
        Self(Arc::new(Mutex::new(Instant::now())))
    }

    /// Something moves.
    pub(super) fn note(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }

    /// Waits until nothing has moved for so long.
    pub(super) async fn ceased(&self, idle_max: Duration) {
        loop {
            let deadline = *self.0.lock().unwrap_or_else(PoisonError::into_inner) + idle_max;
            if deadline <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(deadline).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn movement_defers_the_end() {
        let (start, idle_max) = (Instant::now(), Duration::from_secs(10));
        let activity = Activity::new();
        let move_once = async {
            tokio::time::sleep(Duration::from_secs(7)).await;
            activity.note();
        };
        tokio::join!(activity.ceased(idle_max), move_once);
        assert_eq!(start.elapsed().as_secs(), 17);
    }
}
