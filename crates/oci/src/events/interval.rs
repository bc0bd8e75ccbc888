//! How often: a duration as Go writes it.

use std::time::Duration;

use crate::error::Error;

/// `5s`, `1.5s`, `1m30s`, `500ms`; more than none.
pub(super) fn parse(text: &str) -> Result<Duration, Error> {
    let wrong =
        || Error::Invalid(format!("invalid value {text:?} for flag -interval: time: invalid duration {text:?}"));
    let duration = duration(text.trim_start_matches(['+', '-'])).ok_or_else(wrong)?;
    if duration.is_zero() || text.starts_with('-') {
        return Err(Error::Invalid("duration interval must be greater than 0".to_owned()));
    }
    Ok(duration)
}

/// Numbers with their units, one after the other, or a zero without one.
fn duration(text: &str) -> Option<Duration> {
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let (mut left, mut sum) = (text, Duration::ZERO);
    loop {
        let (number, rest) = left.split_at(left.find(|letter| !is_of_number(letter))?);
        let (unit, rest) = rest.split_at(rest.find(is_of_number).unwrap_or(rest.len()));
        let part = number.parse::<f64>().ok()? * seconds(unit)?;
        sum = sum.checked_add(Duration::try_from_secs_f64(part).ok()?)?;
        left = rest;
        if left.is_empty() {
            return Some(sum);
        }
    }
}

fn is_of_number(letter: char) -> bool {
    letter.is_ascii_digit() || letter == '.'
}

fn seconds(unit: &str) -> Option<f64> {
    Some(match unit {
        "ns" => 1e-9,
        "us" | "µs" | "μs" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_gos() {
        for (text, expect) in
            [("5s", 5000), ("500ms", 500), ("1.5s", 1500), ("1m30s", 90_000), ("+1h", 3_600_000), (".5s", 500)]
        {
            assert_eq!(parse(text).unwrap(), Duration::from_millis(expect), "{text}");
        }
        for wrong in ["0s", "0", "-1s", "5", "s", "", "1x", "1s2", ".s", "9999999999999999h"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
