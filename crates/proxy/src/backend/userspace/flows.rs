//! How many flows of UDP there are at a time, and which one gives way to another.
//!
//! When all are in use, or all that one client may have, one that is no conversation ends: the oldest whose client has asked once
//! and was answered, or else the oldest that nobody has answered. Connection tracking does much the same when its table is
//! full (`early_drop`). Conversations stay; where there is nothing else, what is new is dropped.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio_util::sync::{CancellationToken, DropGuard};

use super::budget::{Budget, Full, Permit};

/// The flows of all frontends.
#[derive(Debug)]
pub(super) struct Flows {
    budget: Arc<Budget>,
    open: Mutex<Open>,
}

/// Flows that may give way, the first one first; those that have become conversations are left out when they are met.
#[derive(Debug, Default)]
struct Open {
    /// What the next flow gets.
    age: u64,
    all: BTreeMap<Rank, IpAddr>,
    by_client: BTreeMap<(IpAddr, Rank), Known>,
}

/// When it is a flow's turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    waits_for_answer: bool,
    /// The oldest one has the least.
    age: u64,
}

/// A flow, as whoever needs its place sees it.
#[derive(Debug)]
struct Known {
    activity: Arc<Activity>,
    stop: CancellationToken,
    gone: CancellationToken,
}

/// What has been said in a flow.
#[derive(Debug, Default)]
pub(super) struct Activity {
    /// Whether the client has sent since somebody looked.
    pub(super) recent: AtomicBool,
    /// Whether it has sent more than once.
    pub(super) more: AtomicBool,
    /// Whether it was answered.
    answered: AtomicBool,
}

/// The place of one flow. Dropped, it is free again.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) activity: Arc<Activity>,
    /// Cancelled when the flow is to end.
    pub(super) stop: CancellationToken,
    flows: Arc<Flows>,
    client: IpAddr,
    age: u64,
    // In this order: who waits for its end finds a permit.
    _permit: Permit,
    _gone: DropGuard,
}

impl Activity {
    /// Whether one question was asked and answered.
    pub(super) fn is_over(&self) -> bool {
        self.answered.load(Ordering::Relaxed) && !self.more.load(Ordering::Relaxed)
    }

    fn is_conversation(&self) -> bool {
        self.answered.load(Ordering::Relaxed) && self.more.load(Ordering::Relaxed)
    }
}

impl Flows {
    pub(super) fn new(most: usize) -> Arc<Flows> {
        let excess = "the oldest that are no conversations give way, and new ones are dropped if there are none";
        Arc::new(Flows { budget: Budget::new("flows of UDP", most, excess), open: Mutex::default() })
    }

    /// A place for a flow of this client. Whose place it becomes has to hear of it first: that takes a turn of the runtime, and
    /// nothing from outside is waited for.
    pub(super) async fn take(self: &Arc<Self>, client: IpAddr) -> Option<Place> {
        loop {
            let full = match self.budget.try_take(client) {
                Ok(permit) => return Some(self.enter(client, permit)),
                Err(full) => full,
            };
            self.budget.warn(full, client);
            let leaving = match full {
                Full::Share => self.open().pop_of(client),
                Full::All => self.open().pop(),
            }?;
            leaving.stop.cancel();
            leaving.gone.cancelled().await;
        }
    }

    fn enter(self: &Arc<Self>, client: IpAddr, permit: Permit) -> Place {
        let (activity, stop, gone) = (Arc::<Activity>::default(), CancellationToken::new(), CancellationToken::new());
        let known = Known { activity: activity.clone(), stop: stop.clone(), gone: gone.clone() };
        let age = self.open().insert(client, known);
        Place { activity, stop, flows: self.clone(), client, age, _permit: permit, _gone: gone.drop_guard() }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Open {
    fn insert(&mut self, client: IpAddr, known: Known) -> u64 {
        let age = self.age;
        self.age += 1;
        self.put(client, Rank { waits_for_answer: true, age }, known);
        age
    }

    fn put(&mut self, client: IpAddr, rank: Rank, known: Known) {
        self.all.insert(rank, client);
        self.by_client.insert((client, rank), known);
    }

    fn remove(&mut self, client: IpAddr, rank: Rank) -> Option<Known> {
        self.all.remove(&rank);
        self.by_client.remove(&(client, rank))
    }

    /// Takes out whose turn it is.
    fn pop(&mut self) -> Option<Known> {
        loop {
            let (&rank, &client) = self.all.first_key_value()?;
            let known = self.remove(client, rank)?;
            if !known.activity.is_conversation() {
                return Some(known);
            }
        }
    }

    /// The same among the flows of one client.
    fn pop_of(&mut self, client: IpAddr) -> Option<Known> {
        const FIRST: Rank = Rank { waits_for_answer: false, age: 0 };
        const LAST: Rank = Rank { waits_for_answer: true, age: u64::MAX };
        loop {
            let &(_, rank) = self.by_client.range((client, FIRST)..=(client, LAST)).next()?.0;
            let known = self.remove(client, rank)?;
            if !known.activity.is_conversation() {
                return Some(known);
            }
        }
    }
}

impl Place {
    /// The flow was answered.
    pub(super) fn answered(&self) {
        if self.activity.answered.swap(true, Ordering::Relaxed) {
            return;
        }
        let mut open = self.flows.open();
        // One whose turn has come is not in there any more.
        if let Some(known) = open.remove(self.client, Rank { waits_for_answer: true, age: self.age }) {
            open.put(self.client, Rank { waits_for_answer: false, age: self.age }, known);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.flows.open();
        for waits_for_answer in [false, true] {
            open.remove(self.client, Rank { waits_for_answer, age: self.age });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A flow that ends when it is told to.
    struct Held {
        place: Arc<Mutex<Option<Place>>>,
    }

    impl Held {
        fn ask_again(&self) {
            self.place.lock().unwrap().as_ref().unwrap().activity.more.store(true, Ordering::Relaxed);
        }

        fn answer(&self) {
            self.place.lock().unwrap().as_ref().unwrap().answered();
        }
    }

    async fn hold(flows: &Arc<Flows>, last: u8) -> Option<Held> {
        let place = flows.take([192, 0, 2, last].into()).await?;
        let stop = place.stop.clone();
        let place = Arc::new(Mutex::new(Some(place)));
        let held = place.clone();
        tokio::spawn(async move {
            stop.cancelled().await;
            held.lock().unwrap().take();
        });
        Some(Held { place })
    }

    fn ended(held: &[Held]) -> Vec<usize> {
        (0..held.len()).filter(|one| held[*one].place.lock().unwrap().is_none()).collect()
    }

    #[tokio::test]
    async fn who_was_answered_gives_way_first_and_conversations_stay() {
        let flows = Flows::new(4);
        let mut held = Vec::new();
        for last in 0..4 {
            held.push(hold(&flows, last).await.unwrap());
        }
        // A conversation, one that nobody has answered, two questions with their answers.
        for one in [0, 2, 3] {
            held[one].answer();
        }
        held[0].ask_again();
        held[1].ask_again();
        for (last, gone) in [(4, vec![2]), (5, vec![2, 3]), (6, vec![1, 2, 3])] {
            held.push(hold(&flows, last).await.unwrap());
            assert_eq!(ended(&held), gone);
        }
        for one in [4, 5, 6] {
            held[one].ask_again();
            held[one].answer();
        }
        assert!(hold(&flows, 7).await.is_none());
        assert_eq!(ended(&held), [1, 2, 3]);
    }

    #[tokio::test]
    async fn who_has_its_share_gives_way_to_itself() {
        let flows = Flows::new(8);
        let mut held = Vec::new();
        for last in [1, 2, 2, 2] {
            held.push(hold(&flows, last).await.unwrap());
        }
        assert_eq!(ended(&held), [1]);
        for one in [2, 3] {
            held[one].ask_again();
            held[one].answer();
        }
        assert!(hold(&flows, 2).await.is_none());
        assert!(hold(&flows, 1).await.is_some());
        assert_eq!(ended(&held), [1]);
    }

    #[tokio::test]
    async fn who_has_ended_is_not_remembered() {
        let flows = Flows::new(4);
        for is_answered in [false, true] {
            let place = flows.take([192, 0, 2, 1].into()).await.unwrap();
            if is_answered {
                place.answered();
            }
            drop(place);
            assert!(flows.open().all.is_empty() && flows.open().by_client.is_empty());
        }
    }
}
