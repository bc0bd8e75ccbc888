//! How often: a time span as Go writes it.

use std::time::Duration;

use configfile::spans;

use crate::error::Error;

/// `5s`, `1.5s`, `1m30s`, `500ms`; more than none.
pub(super) fn parse(text: &str) -> Result<Duration, Error> {
    let wrong =
        || Error::Invalid(format!("invalid value {text:?} for flag -interval: time: invalid duration {text:?}"));
    let interval = spans::parse(text.strip_prefix('-').unwrap_or(text)).ok_or_else(wrong)?;
    if interval.is_zero() || text.starts_with('-') {
        return Err(Error::Invalid("duration interval must be greater than 0".to_owned()));
    }
    Ok(interval)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_more_than_none() {
        assert_eq!(parse("1.5s").unwrap(), Duration::from_millis(1500));
        for (text, reason) in
            [("0s", "greater than 0"), ("0", "greater than 0"), ("-1s", "greater than 0"), ("5", "invalid")]
        {
            assert!(parse(text).unwrap_err().to_string().contains(reason), "{text}");
        }
    }
}
