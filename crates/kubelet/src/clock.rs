//! Waiting for a time of day. The clock that tells it is set by others: a machine without a battery believes in 1970 until the
//! network has told it better.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;

/// The clock is looked at again this often: when it is set, a wait is too long by so much at most.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// How long to wait until the clock has to be looked at again for `due`; zero when that has come.
pub(crate) fn until(due: Timestamp) -> Duration {
    left(due, Timestamp::now())
}

/// Waits until the clock says `due` or a later time.
pub(crate) async fn sleep_until(due: Timestamp) {
    loop {
        match until(due) {
            Duration::ZERO => return,
            wait => tokio::time::sleep(wait).await,
        }
    }
}

fn left(due: Timestamp, now: Timestamp) -> Duration {
    Duration::try_from(due.duration_since(now)).unwrap_or(Duration::ZERO).min(LOOK_EVERY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_when_it_is_due_or_the_clock_has_to_be_looked_at() {
        let at = |second| Timestamp::from_second(second).unwrap();
        let cases = [(100, 90, 10), (100, 100, 0), (90, 100, 0), (2_000_000_000, 0, 60)];
        for (due, now, wait) in cases {
            assert_eq!(left(at(due), at(now)), Duration::from_secs(wait), "{due} at {now}");
        }
    }
}
