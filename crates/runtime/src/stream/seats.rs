//! How many sessions and forwarded connections there may be at once: of a pod or container, and of the node (R6).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Seats on a node. A handle: clones share them.
#[derive(Clone)]
pub(super) struct Seats {
    node: Arc<Semaphore>,
    each_max: usize,
    /// Of those that have some taken. Guards a look into a small table.
    owners: Arc<Mutex<HashMap<String, Weak<Semaphore>>>>,
}

/// One that is taken, until this is dropped.
pub(super) struct Seat {
    _own: OwnedSemaphorePermit,
    _of_node: OwnedSemaphorePermit,
}

impl Seats {
    /// So many of each owner, and so many altogether.
    pub(super) fn new(each_max: usize, node_max: usize) -> Self {
        Self { node: Arc::new(Semaphore::new(node_max)), each_max, owners: Arc::default() }
    }

    /// A seat for this owner, unless it or the node has none left.
    pub(super) fn take(&self, owner: &str) -> Option<Seat> {
        let own = self.of(owner).try_acquire_owned().ok()?;
        let of_node = self.node.clone().try_acquire_owned().ok()?;
        Some(Seat { _own: own, _of_node: of_node })
    }

    fn of(&self, owner: &str) -> Arc<Semaphore> {
        let mut owners = self.owners.lock().unwrap_or_else(PoisonError::into_inner);
        owners.retain(|_, seats| seats.strong_count() > 0);
        if let Some(known) = owners.get(owner).and_then(Weak::upgrade) {
            return known;
        }
        let fresh = Arc::new(Semaphore::new(self.each_max));
        owners.insert(owner.to_owned(), Arc::downgrade(&fresh));
        fresh
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_are_of_an_owner_and_of_the_node() {
        let seats = Seats::new(2, 3);
        let mut of_a = vec![seats.take("a").unwrap(), seats.take("a").unwrap()];
        assert!(seats.take("a").is_none(), "the third of two");
        let of_b = seats.take("b").unwrap();
        assert!(seats.take("b").is_none(), "the node has three");
        of_a.pop();
        assert!(seats.take("b").is_some());
        drop((of_a, of_b));
        assert!(seats.take("c").is_some());
        assert_eq!(seats.owners.lock().unwrap().len(), 1, "nobody is remembered who has none");
    }
}
