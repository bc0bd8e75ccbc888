//! Trying again.

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
}
