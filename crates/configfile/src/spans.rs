//! Time spans as Go writes them (`time.ParseDuration`).

use std::time::Duration;

const UNITS: [(&str, f64); 7] =
    [("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];

/// The longest that Go knows, 292 years: times that lie so far away can still be told.
const MAX: Duration = Duration::from_nanos(u64::MAX / 2);

/// `1h15m30.5s`; none if it is not one. A negative span is not one here, nor is one that Go cannot tell.
pub fn parse(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').filter(|end| *end > 0)?;
        let (number, tail) = rest.split_at(digits);
        let end = tail.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(end);
        let factor = UNITS.iter().find(|(name, _)| *name == unit)?.1;
        seconds += number.parse::<f64>().ok()? * factor;
        rest = tail;
    }
    let span = (!text.is_empty()).then(|| Duration::try_from_secs_f64(seconds).ok()).flatten();
    span.filter(|span| *span <= MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans() {
        for (text, milliseconds) in [
            ("0s", 0),
            ("0", 0),
            ("10s", 10_000),
            ("1m30s", 90_000),
            ("4h0m0s", 14_400_000),
            ("1.5s", 1500),
            ("100ms", 100),
            ("2562047h", 2_562_047 * 3_600_000),
        ] {
            assert_eq!(parse(text), Some(Duration::from_millis(milliseconds)), "{text}");
        }
        for none in ["", "10", "s", "-1s", "1 minute", "1d", "1..5s", "2562048h", "4999999999999999h"] {
            assert_eq!(parse(none), None, "{none}");
        }
    }
}
