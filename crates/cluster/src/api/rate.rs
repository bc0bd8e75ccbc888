//! A token bucket: so many at once, then so many a second.

use std::time::Duration;

use tokio::time::Instant;

use super::config::Rate;

/// The bucket. It is full at first.
#[derive(Debug)]
pub(super) struct Bucket {
    rate: Rate,
    tokens: f64,
    at: Instant,
}

impl Bucket {
    pub(super) fn new(rate: Rate, now: Instant) -> Self {
        Bucket { rate, tokens: f64::from(rate.burst), at: now }
    }

    /// Takes a token; returns how long its taker has to wait for it. Those who come later wait longer.
    pub(super) fn take(&mut self, now: Instant) -> Duration {
        self.fill(now);
        self.tokens -= 1.0;
        if self.tokens >= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(-self.tokens / self.rate.per_second) }
    }

    /// Takes a token if there is one.
    pub(super) fn try_take(&mut self, now: Instant) -> bool {
        self.fill(now);
        let has_one = self.tokens >= 1.0;
        if has_one {
            self.tokens -= 1.0;
        }
        has_one
    }

    fn fill(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.at).as_secs_f64();
        self.tokens = (self.tokens + since * self.rate.per_second).min(f64::from(self.rate.burst));
        self.at = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_burst_and_then_a_rate() {
        let mut bucket = Bucket::new(Rate { per_second: 10.0, burst: 2 }, Instant::now());
        let waits: Vec<u128> = (0..4).map(|_| bucket.take(Instant::now()).as_millis()).collect();
        assert_eq!(waits, [0, 0, 100, 200]);
        assert!(!bucket.try_take(Instant::now()));
        tokio::time::advance(Duration::from_millis(300)).await;
        assert!(bucket.try_take(Instant::now()) && !bucket.try_take(Instant::now()));
        tokio::time::advance(Duration::from_secs(60)).await;
        assert_eq!((0..5).filter(|_| bucket.try_take(Instant::now())).count(), 2);
    }
}
