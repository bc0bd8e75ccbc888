//! Delays that double: restarts of crashing containers, and pulls that fail.

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};

/// First delay, as upstream's kubelet has it (`containerRestartPeriod`, image pulls).
pub const FIRST: SignedDuration = SignedDuration::from_secs(10);
/// Longest delay (`maxContainerRestartPeriod` by default).
pub const LONGEST: SignedDuration = SignedDuration::from_secs(300);
/// A container that ran for so long, or a pull that was not tried for so long, begins anew: twice [`LONGEST`].
pub const RESET: SignedDuration = SignedDuration::from_secs(600);

/// What is remembered of failures so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Backoff {
    /// The delay after the newest failure; `None` before the first.
    pub delay: Option<SignedDuration>,
    /// When the newest failure was counted.
    pub since: Option<Timestamp>,
}

impl Backoff {
    /// Counts a failure at `at`: the first costs nothing, the second waits [`FIRST`], each further one twice as long.
    /// `ran_since` is when what failed had begun: after a long good run it counts as the first again.
    #[must_use]
    pub fn after_failure(self, at: Timestamp, ran_since: Option<Timestamp>) -> Self {
        let good_run = ran_since.is_some_and(|begin| at.duration_since(begin) >= RESET);
        let forgotten =
            self.since.is_none_or(|since| at.duration_since(since) >= RESET + self.delay.unwrap_or_default());
        let delay = match self.delay {
            Some(delay) if !good_run && !forgotten => (delay * 2).clamp(FIRST, LONGEST),
            _ => SignedDuration::ZERO,
        };
        Self { delay: Some(delay), since: Some(at) }
    }

    /// Counts a try that failed at `at`: the next one waits `first`, each further one twice as long, up to `longest`.
    #[must_use]
    pub fn after_failed_try(self, at: Timestamp, first: SignedDuration, longest: SignedDuration) -> Self {
        let forgotten = self.since.is_none_or(|since| at.duration_since(since) >= RESET + longest);
        let delay = match self.delay {
            Some(delay) if !forgotten => (delay * 2).clamp(first, longest),
            _ => first,
        };
        Self { delay: Some(delay), since: Some(at) }
    }

    /// When the next try may begin; `None` when it may begin at once.
    pub fn until(self, now: Timestamp) -> Option<Timestamp> {
        let end = self.since?.saturating_add(self.delay?).ok()?;
        // A clock that jumped back must not make the wait longer than it was meant to be.
        (end > now && end.duration_since(now) <= self.delay?).then_some(end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn delays_double_up_to_the_longest() {
        let mut backoff = Backoff::default();
        let mut delays = Vec::new();
        let mut now = 1000;
        for _ in 0..8 {
            backoff = backoff.after_failure(at(now), Some(at(now - 1)));
            let delay = backoff.delay.unwrap().as_secs();
            delays.push(delay);
            now += delay + 1;
        }
        assert_eq!(delays, [0, 10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn failed_tries_wait_from_the_first_on() {
        let (first, longest) = (SignedDuration::from_secs(1), SignedDuration::from_secs(5));
        let mut backoff = Backoff::default();
        let delays = [0, 10, 20, 30].map(|second| {
            backoff = backoff.after_failed_try(at(second), first, longest);
            backoff.delay.unwrap().as_secs()
        });
        assert_eq!(delays, [1, 2, 4, 5]);
        assert_eq!(backoff.after_failed_try(at(10_000), first, longest).delay, Some(first));
    }

    #[test]
    fn ten_good_minutes_forget_the_past() {
        let failed = Backoff { delay: Some(SignedDuration::from_secs(160)), since: Some(at(0)) };
        assert_eq!(failed.after_failure(at(700), Some(at(100))).delay, Some(SignedDuration::ZERO));
        assert_eq!(failed.after_failure(at(300), Some(at(200))).delay, Some(SignedDuration::from_secs(300)));
    }

    #[test]
    fn a_clock_that_jumps_back_does_not_lengthen_the_wait() {
        let failed = Backoff { delay: Some(FIRST), since: Some(at(10_000)) };
        assert_eq!(failed.until(at(10_004)), Some(at(10_010)));
        assert_eq!(failed.until(at(5_000)), None);
    }
}
