//! Time spans as Go writes them (`time.ParseDuration`).

use std::time::Duration;

/// The units, in nanoseconds. What stands for a millionth is its sign or the Greek letter.
const UNITS: [(&str, u64); 8] = [
    ("ns", 1),
    ("us", 1_000),
    ("µs", 1_000),
    ("μs", 1_000),
    ("ms", 1_000_000),
    ("s", 1_000_000_000),
    ("m", 60_000_000_000),
    ("h", 3_600_000_000_000),
];

/// The longest that Go knows, 292 years: times that lie so far away can still be told.
const MAX: u64 = u64::MAX / 2;

/// Digits after a point that count.
const DIGITS: usize = 18;

/// `1h15m30.5s`; none if it is not one. A negative span is not one here, nor is one that Go cannot tell.
pub fn parse(text: &str) -> Option<Duration> {
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Some(Duration::ZERO);
    }
    let mut total: u64 = 0;
    loop {
        let (number, tail) = rest.split_at(rest.find(|letter| !is_of_number(letter))?);
        let (unit, tail) = tail.split_at(tail.find(is_of_number).unwrap_or(tail.len()));
        let (_, unit) = UNITS.iter().find(|(name, _)| *name == unit)?;
        total = total.checked_add(nanoseconds(number, *unit)?).filter(|total| *total <= MAX)?;
        rest = tail;
        if rest.is_empty() {
            return Some(Duration::from_nanos(total));
        }
    }
}

fn is_of_number(letter: char) -> bool {
    letter.is_ascii_digit() || letter == '.'
}

/// Digits with at most one point, before or after which there may be none.
fn nanoseconds(number: &str, unit: u64) -> Option<u64> {
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    if part.contains('.') || whole.is_empty() && part.is_empty() {
        return None;
    }
    let part = &part[..part.len().min(DIGITS)];
    let digits = |digits: &str| if digits.is_empty() { Some(0) } else { digits.parse::<u64>().ok() };
    let scale = 10_u128.pow(u32::try_from(part.len()).ok()?);
    let part = u128::from(digits(part)?) * u128::from(unit) / scale;
    digits(whole)?.checked_mul(unit)?.checked_add(u64::try_from(part).ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans() {
        for (text, nanoseconds) in [
            ("0", 0),
            ("+0", 0),
            ("0s", 0),
            ("7ns", 7),
            ("2000us", 2_000_000),
            ("2000µs", 2_000_000),
            ("2000μs", 2_000_000),
            ("500ms", 500_000_000),
            ("10s", 10_000_000_000),
            ("1.5s", 1_500_000_000),
            (".5s", 500_000_000),
            ("1.s", 1_000_000_000),
            ("0.1h", 360_000_000_000),
            ("0.100000000000000000000001s", 100_000_000),
            ("1m30s", 90_000_000_000),
            ("+1h", 3_600_000_000_000),
            ("12h0m0s", 43_200_000_000_000),
            ("2562047h", 2_562_047 * 3_600_000_000_000),
            ("9223372036854775807ns", MAX),
        ] {
            assert_eq!(parse(text), Some(Duration::from_nanos(nanoseconds)), "{text}");
        }
        let none = [
            "",
            "+",
            "++1s",
            "3",
            "s",
            "3 s",
            "-1s",
            "1 minute",
            "1d",
            "1x",
            "1s2",
            ".s",
            "1..5s",
            "1.5.5s",
            "1e9s",
            "2562048h",
            "9223372036854775808ns",
            "4999999999999999h",
            "99999999999999999999s",
        ];
        for text in none {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
