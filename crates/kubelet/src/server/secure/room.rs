//! How many connections there may be, and how many of one address: what a caller can grow has a budget, and nobody takes it
//! all.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

pub(super) struct Room {
    places: Arc<Semaphore>,
    of_a_peer: usize,
    /// How many each address has; none that has none.
    peers: Mutex<HashMap<IpAddr, usize>>,
}

impl Room {
    /// For `most` connections, and `of_a_peer` of each address.
    pub(super) fn new(most: usize, of_a_peer: usize) -> Arc<Self> {
        Arc::new(Self { places: Arc::new(Semaphore::new(most)), of_a_peer, peers: Mutex::default() })
    }

    /// Waits until there is a place for one more.
    pub(super) async fn place(&self) -> OwnedSemaphorePermit {
        self.places.clone().acquire_owned().await.expect("nobody closes the semaphore")
    }

    /// Gives the place to a connection of `peer`, unless that has its share.
    pub(super) fn seat(self: &Arc<Self>, place: OwnedSemaphorePermit, peer: IpAddr) -> Option<Seat> {
        let mut peers = self.peers.lock().unwrap_or_else(PoisonError::into_inner);
        let count = peers.entry(peer).or_default();
        // One that has none has room: what is entered here stays only with a seat.
        (*count < self.of_a_peer).then(|| {
            *count += 1;
            Seat { room: self.clone(), peer, _place: place }
        })
    }
}

/// What a connection takes of the room, until it is dropped.
pub(super) struct Seat {
    room: Arc<Room>,
    peer: IpAddr,
    _place: OwnedSemaphorePermit,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut peers = self.room.peers.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = peers.get_mut(&self.peer) {
            *count -= 1;
            if *count == 0 {
                peers.remove(&self.peer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_has_its_share_and_gives_it_back() {
        let (room, [one, two]) = (Room::new(4, 2), [1, 2].map(|last| IpAddr::from([192, 0, 2, last])));
        let seat = async |peer| room.seat(room.place().await, peer);
        let first = seat(one).await.unwrap();
        let _second = seat(one).await.unwrap();
        assert!(seat(one).await.is_none());
        let _other = seat(two).await.unwrap();
        drop(first);
        let _third = seat(one).await.unwrap();
        assert_eq!((room.places.available_permits(), room.peers.lock().unwrap().len()), (1, 2));
    }
}
