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
    /// What becomes of more, for messages.
    excess: &'static str,
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

/// Why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Full {
    /// The client has all that it may have.
    Share,
    /// All are in use.
    All,
}

impl Budget {
    pub(super) fn new(what: &'static str, most: usize, excess: &'static str) -> Arc<Budget> {
        let all = Arc::new(Semaphore::new(most));
        Arc::new(Budget { what, excess, share: most.div_ceil(SHARES), all, taken: Mutex::default() })
    }

    /// One for this client, at once or not at all.
    pub(super) fn try_take(self: &Arc<Self>, client: IpAddr) -> Result<Permit, Full> {
        let share = self.share(client).ok_or(Full::Share)?;
        let of_all = self.all.clone().try_acquire_owned().map_err(|_| Full::All)?;
        Ok(Permit { _share: share, _of_all: of_all })
    }

    /// One for this client, as soon as there is one; none if it has all that it may have.
    pub(super) async fn take(self: &Arc<Self>, client: IpAddr) -> Option<Permit> {
        let Some(share) = self.share(client) else {
            self.warn(Full::Share, client);
            return None;
        };
        if self.all.available_permits() == 0 {
            self.warn(Full::All, client);
        }
        let of_all = self.all.clone().acquire_owned().await.ok()?;
        Some(Permit { _share: share, _of_all: of_all })
    }

    fn share(self: &Arc<Self>, client: IpAddr) -> Option<Share> {
        let mut taken = self.taken();
        let count = taken.by.entry(client).or_default();
        if *count >= self.share {
            return None;
        }
        *count += 1;
        Some(Share { budget: self.clone(), client })
    }

    /// Says that there was none for this client.
    pub(super) fn warn(&self, full: Full, client: IpAddr) {
        if !self.taken().is_due(Instant::now()) {
            return;
        }
        let (what, excess) = (self.what, self.excess);
        match full {
            Full::Share => {
                tracing::warn!(%client, share = self.share, "a client has its whole share of {what}: {excess}");
            }
            Full::All => tracing::warn!("all {what} are in use: {excess}"),
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

    fn budget(most: usize) -> Arc<Budget> {
        Budget::new("connections", most, "others wait")
    }

    fn client(last: u8) -> IpAddr {
        [192, 0, 2, last].into()
    }

    #[test]
    fn one_client_cannot_take_all() {
        let budget = budget(8);
        let greedy: Vec<Permit> = (0..8).filter_map(|_| budget.try_take(client(1)).ok()).collect();
        assert_eq!(greedy.len(), 2);
        assert_eq!(budget.try_take(client(1)).unwrap_err(), Full::Share);
        let others: Vec<Permit> = (2..9).filter_map(|last| budget.try_take(client(last)).ok()).collect();
        assert_eq!(others.len(), 6);
        assert_eq!(budget.try_take(client(9)).unwrap_err(), Full::All);
        drop(greedy);
        assert!(budget.try_take(client(9)).is_ok());
        drop(others);
        assert!(budget.taken().by.is_empty(), "nobody is remembered");
    }

    #[tokio::test]
    async fn who_waits_gets_what_another_gives_back() {
        let budget = budget(1);
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
