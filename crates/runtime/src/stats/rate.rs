//! Rates out of counters: what a container used of a core between two looks at it.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Two looks have to be this far apart: over less the kernel's own ticks show.
const INTERVAL_MIN: Duration = Duration::from_secs(1);

/// The last looks at each container and sandbox.
#[derive(Debug, Default)]
pub(super) struct Rates {
    /// Guards the looks; held for one look-up.
    looks: Mutex<HashMap<String, Looks>>,
}

#[derive(Debug, Clone, Copy)]
struct Looks {
    /// What the rate is measured from.
    from: Option<Sample>,
    /// The newest look that is far enough from `from`; becomes `from` when a newer one comes.
    last: Sample,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    usage_ns: u64,
    at: Instant,
}

impl Rates {
    /// Notes a counter and answers its rate in billionths of a core; none before the second look, and none when it went
    /// backwards (the control group was made anew).
    ///
    /// Several clients may look at once and often: all get a rate over at least a second.
    pub(super) fn note(&self, id: &str, usage_ns: u64, now: Instant) -> Option<u64> {
        let sample = Sample { usage_ns, at: now };
        let mut looks = self.looks.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(known) = looks.get_mut(id) else {
            looks.insert(id.to_owned(), Looks { from: None, last: sample });
            return None;
        };
        if usage_ns < known.last.usage_ns {
            *known = Looks { from: None, last: sample };
            return None;
        }
        if now.saturating_duration_since(known.last.at) >= INTERVAL_MIN {
            *known = Looks { from: Some(known.last), last: sample };
        }
        known.from.and_then(|from| rate(from, sample))
    }

    pub(super) fn forget(&self, id: &str) {
        self.looks.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
    }
}

fn rate(from: Sample, to: Sample) -> Option<u64> {
    let nanoseconds = to.at.saturating_duration_since(from.at).as_nanos();
    let used = u128::from(to.usage_ns.checked_sub(from.usage_ns)?);
    u64::try_from((used * 1_000_000_000).checked_div(nanoseconds)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(looks: &[(u64, u64, Option<u64>)]) {
        let (rates, start) = (Rates::default(), Instant::now());
        for (at_ms, usage_ms, expect) in looks {
            let found = rates.note("c", usage_ms * 1_000_000, start + Duration::from_millis(*at_ms));
            assert_eq!(found, *expect, "at {at_ms} ms");
        }
    }

    #[test]
    fn a_rate_is_over_the_last_interval() {
        let core = 1_000_000_000;
        check(&[(0, 0, None), (10_000, 5_000, Some(core / 2)), (20_000, 25_000, Some(2 * core))]);
    }

    #[test]
    fn many_looks_do_not_shorten_the_interval() {
        let core = 1_000_000_000;
        check(&[
            (0, 0, None),
            (100, 100, None),
            (2_000, 1_000, Some(core / 2)),
            (2_100, 1_000, Some(476_190_476)),
            (2_200, 1_100, Some(core / 2)),
            (3_000, 3_000, Some(2 * core)),
        ]);
    }

    #[test]
    fn a_counter_that_went_backwards_begins_anew() {
        check(&[(0, 9_000, None), (2_000, 10, None), (4_000, 1_010, Some(500_000_000))]);
    }

    #[test]
    fn what_is_forgotten_begins_anew() {
        let (rates, start) = (Rates::default(), Instant::now());
        rates.note("c", 0, start);
        rates.forget("c");
        assert_eq!(rates.note("c", 5, start + Duration::from_secs(9)), None);
    }
}
