//! Trying again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);

/// The rests between tries that fail: each is twice as long as the one before, up to half a minute.
#[derive(Debug)]
pub(crate) struct Rests {
    next: Duration,
}

impl Rests {
    pub(crate) fn new() -> Self {
        Self { next: FIRST }
    }

    /// Rests once.
    pub(crate) async fn rest(&mut self) {
        let now = self.next;
        self.next = (now * 2).min(LONGEST);
        tokio::time::sleep(now).await;
    }
}

/// Whether something fails that many try: it is told once for all of them.
#[derive(Debug, Default)]
pub(crate) struct Outage(AtomicBool);

impl Outage {
    /// A try has failed; whether it is the first since one went well.
    pub(crate) fn begins(&self) -> bool {
        !self.0.swap(true, Ordering::Relaxed)
    }

    /// A try went well; whether it is the first since one failed.
    pub(crate) fn ends(&self) -> bool {
        self.0.load(Ordering::Relaxed) && self.0.swap(false, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn rests_grow_to_a_limit() {
        let (mut rests, mut lengths) = (Rests::new(), Vec::new());
        for _ in 0..7 {
            let begun = tokio::time::Instant::now();
            rests.rest().await;
            lengths.push(begun.elapsed().as_secs());
        }
        assert_eq!(lengths, [1, 2, 4, 8, 16, 30, 30]);
    }

    #[test]
    fn an_outage_begins_and_ends_once() {
        let outage = Outage::default();
        assert!(!outage.ends());
        assert_eq!([outage.begins(), outage.begins(), outage.begins()], [true, false, false]);
        assert_eq!([outage.ends(), outage.ends()], [true, false]);
        assert!(outage.begins());
    }
}
