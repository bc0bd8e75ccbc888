//! Wall-clock time and the two ways in which log files write it down.

use std::time::{SystemTime, UNIX_EPOCH};

use crate::protocol::UnixNanos;

const NANOS: u64 = 1_000_000_000;

/// The time now.
pub(crate) fn now() -> UnixNanos {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    UnixNanos(since.as_secs() * NANOS + u64::from(since.subsec_nanos()))
}

/// A moment of the calendar, UTC.
struct Civil {
    year: u64,
    month: u64,
    day: u64,
    second_of_day: u64,
}

impl Civil {
    /// Days are counted in years that begin in March, so that the leap day is the last (Howard Hinnant,
    /// "chrono-compatible low-level date algorithms").
    fn from_seconds(seconds: u64) -> Self {
        let days = seconds / 86_400 + 719_468;
        let (era, day_of_era) = (days / 146_097, days % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let shifted = (5 * day_of_year + 2) / 153;
        let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
        Self {
            year: era * 400 + year_of_era + u64::from(month <= 2),
            month,
            day: day_of_year - (153 * shifted + 2) / 5 + 1,
            second_of_day: seconds % 86_400,
        }
    }

    fn time(&self) -> (u64, u64, u64) {
        (self.second_of_day / 3600, self.second_of_day / 60 % 60, self.second_of_day % 60)
    }
}

/// `2006-01-02T15:04:05.000000000Z`, always thirty characters.
pub(crate) fn rfc3339(at: UnixNanos) -> String {
    let civil = Civil::from_seconds(at.0 / NANOS);
    let (hour, minute, second) = civil.time();
    let (Civil { year, month, day, .. }, nanos) = (civil, at.0 % NANOS);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}

/// `20060102-150405`: the end of a rotated log's name, as the kubelet's log rotation writes it
/// (`timestampFormat` in `pkg/kubelet/logs/container_log_manager.go`).
pub(crate) fn stamp(seconds: u64) -> String {
    let civil = Civil::from_seconds(seconds);
    let (hour, minute, second) = civil.time();
    let Civil { year, month, day, .. } = civil;
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

/// The inverse of [`stamp`]; `None` for what is not such a text.
pub(crate) fn seconds_of(stamp: &str) -> Option<u64> {
    let number = |from: usize, to: usize| stamp.get(from..to)?.parse::<u64>().ok();
    let (year, month, day) = (number(0, 4)?, number(4, 6)?, number(6, 8)?);
    let year = year.checked_sub(u64::from(month <= 2))?;
    let shifted = (month + 9) % 12;
    let day_of_era =
        year % 400 * 365 + year % 400 / 4 - year % 400 / 100 + (153 * shifted + 2) / 5 + day.checked_sub(1)?;
    let days = (year / 400 * 146_097 + day_of_era).checked_sub(719_468)?;
    Some(days * 86_400 + number(9, 11)? * 3600 + number(11, 13)? * 60 + number(13, 15)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_moments() {
        for (seconds, text, name) in [
            (0, "1970-01-01T00:00:00.000000007Z", "19700101-000000"),
            (951_782_399, "2000-02-28T23:59:59.000000007Z", "20000228-235959"),
            (951_782_400, "2000-02-29T00:00:00.000000007Z", "20000229-000000"),
            (1_767_225_599, "2025-12-31T23:59:59.000000007Z", "20251231-235959"),
            (4_107_542_400, "2100-03-01T00:00:00.000000007Z", "21000301-000000"),
        ] {
            assert_eq!(rfc3339(UnixNanos(seconds * NANOS + 7)), text);
            assert_eq!(stamp(seconds), name);
            assert_eq!(seconds_of(name), Some(seconds));
        }
    }
}
