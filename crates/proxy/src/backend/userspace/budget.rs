//! How much is carried at a time, for all clients together and for each.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

/// One client gets a quarter of everything.
const SHARES: usize = 4;
/// Warnings are this far apart: who uses a budget up goes on doing so.
const WARN_EVERY: Duration = Duration::from_secs(60);

/// So many connections, or flows, at a time.
#[derive(Debug)]
pub(super) struct Budget {
    /// Of what, for messages.
    what: &'static str,
    /// How many one client may have.
    share: usize,
    all: Arc<Semaphore>,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    by: HashMap<IpAddr, usize>,
    warned: Option<Instant>,
}

/// One of a client's share. Dropped, it is free again.
#[derive(Debug)]
struct Share {
    budget: Arc<Budget>,
    client: IpAddr,
}

/// One connection or flow. Dropped, it is free again.
#[derive(Debug)]
pub(super) struct Permit {
    _share: Share,
    _of_all: OwnedSemaphorePermit,
}

impl Budget {
    pub(super) fn new(what: &'static str, most: usize) -> Arc<Budget> {
        let all = Arc::new(Semaphore::new(most));
        Arc::new(Budget { what, share: most.div_ceil(SHARES), all, taken: Mutex::default() })
    }

    /// One for this client, at once or not at all.
    pub(super) fn try_take(self: &Arc<Self>, client: IpAddr) -> Option<Permit> {
        let share = self.share(client)?;
        match self.all.clone().try_acquire_owned() {
            Ok(of_all) => Some(Permit { _share: share, _of_all: of_all }),
            Err(_) => {
                self.warn(None);
                None
            }
        }
    }

    /// One for this client, as soon as there is one; none if it has all that it may have.
    pub(super) async fn take(self: &Arc<Self>, client: IpAddr) -> Option<Permit> {
        let share = self.share(client)?;
        if self.all.available_permits() == 0 {
            self.warn(None);
        }
        let of_all = self.all.clone().acquire_owned().await.ok()?;
        Some(Permit { _share: share, _of_all: of_all })
    }

    fn share(self: &Arc<Self>, client: IpAddr) -> Option<Share> {
        let mut taken = self.taken();
        let count = taken.by.entry(client).or_default();
        if *count >= self.share {
            drop(taken);
            self.warn(Some(client));
            return None;
        }
        *count += 1;
        Some(Share { budget: self.clone(), client })
    }

    /// Says that somebody got none: a client for having its share, or everybody.
    fn warn(&self, client: Option<IpAddr>) {
        if !self.taken().is_due(Instant::now()) {
            return;
        }
        match client {
            Some(client) => {
                tracing::warn!(%client, share = self.share, "a client has its whole share of {}: more are refused", self.what);
            }
            None => tracing::warn!("all {} are in use: others wait or are dropped", self.what),
        }
    }

    fn taken(&self) -> MutexGuard<'_, Taken> {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Taken {
    fn is_due(&mut self, now: Instant) -> bool {
        let due = self.warned.is_none_or(|warned| now.duration_since(warned) >= WARN_EVERY);
        if due {
            self.warned = Some(now);
        }
        due
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let mut taken = self.budget.taken();
        if let Some(count) = taken.by.get_mut(&self.client) {
            *count -= 1;
            if *count == 0 {
                taken.by.remove(&self.client);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn one_client_cannot_take_all() {
        let budget = Budget::new("connections", 8);
        let greedy: Vec<Permit> = (0..8).filter_map(|_| budget.try_take(client(1))).collect();
        assert_eq!(greedy.len(), 2);
        let others: Vec<Permit> = (2..9).filter_map(|last| budget.try_take(client(last))).collect();
        assert_eq!(others.len(), 6, "all are in use");
        drop(greedy);
        assert!(budget.try_take(client(9)).is_some());
        drop(others);
        assert!(budget.taken().by.is_empty(), "nobody is remembered");
    }

    #[tokio::test]
    async fn who_waits_gets_what_another_gives_back() {
        let budget = Budget::new("connections", 1);
        let first = budget.take(client(1)).await.unwrap();
        let waiting = tokio::spawn({
            let budget = budget.clone();
            async move { budget.take(client(2)).await.is_some() }
        });
        tokio::task::yield_now().await;
        assert!(budget.take(client(1)).await.is_none(), "it does not wait for its own");
        drop(first);
        assert!(waiting.await.unwrap());
    }

    #[test]
    fn a_warning_is_not_given_for_each() {
        let (mut taken, now) = (Taken::default(), Instant::now());
        assert!(taken.is_due(now));
        assert!(!taken.is_due(now + WARN_EVERY / 2));
        assert!(taken.is_due(now + WARN_EVERY));
    }
}
