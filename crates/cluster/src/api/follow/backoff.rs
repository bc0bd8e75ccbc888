//! How long to wait after a failure.

use std::time::Duration;

/// Waits that double from [`Backoff::FIRST`] to [`Backoff::MAX`], each with jitter, so that a thousand nodes do not come
/// back at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    pub(crate) const FIRST: Duration = Duration::from_millis(100);
    /// As client-go.
    pub(crate) const MAX: Duration = Duration::from_secs(30);

    pub(crate) fn new() -> Self {
        Backoff { next: Self::FIRST }
    }

    /// The next wait: between one and two times the nominal one. `random` is in 0..1.
    pub(crate) fn wait(&mut self, random: f64) -> Duration {
        let nominal = self.next;
        self.next = (nominal * 2).min(Self::MAX);
        nominal.mul_f64(1.0 + random)
    }

    /// What was tried has worked.
    pub(crate) fn reset(&mut self) {
        *self = Self::new();
    }
}

/// A number in 0..1.
pub(crate) fn random() -> f64 {
    f64::from(u32::from_le_bytes(sys::random::bytes())) / (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_to_a_limit() {
        let mut backoff = Backoff::new();
        let waits: Vec<u128> = (0..11).map(|_| backoff.wait(0.0).as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 6400, 12800, 25600, 30000, 30000]);
        assert_eq!(backoff.wait(0.5), Duration::from_secs(45));
        backoff.reset();
        assert_eq!(backoff, Backoff::new());
        assert!((0..100).map(|_| random()).all(|number| (0.0..1.0).contains(&number)));
    }
}
