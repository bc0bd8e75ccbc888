//! How patient tests are. Their limits are made for a usual machine; one that is emulated needs several times as long.

use std::sync::LazyLock;
use std::time::Duration;

/// Names the variable by which a machine is said to be slow: limits are multiplied by this number.
pub const VARIABLE: &str = "ORLOP_TEST_PATIENCE";

/// Read once: the machine stays the same.
static PATIENCE: LazyLock<u32> = LazyLock::new(|| parse(std::env::var(VARIABLE).ok().as_deref()));

/// `limit`, as long as it is on this machine.
pub fn stretched(limit: Duration) -> Duration {
    limit.saturating_mul(*PATIENCE)
}

/// Whether this machine is one of the slow ones.
pub fn is_slow() -> bool {
    *PATIENCE > 1
}

fn parse(text: Option<&str>) -> u32 {
    text.map_or(1, |text| match text.parse() {
        Ok(factor @ 1..) => factor,
        _ => panic!("{VARIABLE}={text}: a whole number of 1 or more is needed"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_usual_unless_it_is_said_to_be_slow() {
        assert_eq!(parse(None), 1);
        assert_eq!(parse(Some("8")), 8);
        assert!(std::panic::catch_unwind(|| parse(Some("0"))).is_err());
    }
}
