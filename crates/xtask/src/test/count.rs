//! Counts of tests, from what test programs print.

use std::fmt;

use super::failures::Failures;

/// Begins the line with the count of a whole run.
pub(super) const TOTAL: &str = "tests: ";

/// How many tests passed, failed and were skipped.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    pub(crate) passed: u64,
    pub(crate) failed: u64,
    pub(crate) skipped: u64,
    /// Tests of the present program that returned early because the machine lacks something.
    gave_up: u64,
    /// What those said that failed.
    pub(crate) failures: Failures,
}

impl Count {
    /// Adds what a line says: a result (`test result: ok. 3 passed; 0 failed; 1 ignored; …`), or that one of the tests
    /// which will be in the next result as passed has done nothing (`skipped: needs …`).
    pub(crate) fn add_line(&mut self, line: &str) {
        self.failures.add_line(line);
        if line.starts_with("skipped: ") {
            self.gave_up += 1;
        }
        let Some(rest) = line.strip_prefix("test result: ") else { return };
        let number = |word: &str| -> u64 {
            let before = rest.split_once(&format!(" {word}")).map_or("", |(before, _)| before);
            before.rsplit([' ', '.']).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
        };
        let passed = number("passed");
        let gave_up = std::mem::take(&mut self.gave_up).min(passed);
        self.passed += passed - gave_up;
        self.failed += number("failed");
        self.skipped += number("ignored") + gave_up;
    }

    /// The count in a line that ends a whole run.
    pub(super) fn total(line: &str) -> Option<Self> {
        let mut words = line.strip_prefix(TOTAL)?.split(", ");
        let mut number = |kind: &str| words.next()?.strip_suffix(kind)?.trim().parse().ok();
        let (passed, failed, skipped) = (number("passed")?, number("failed")?, number("skipped")?);
        Some(Self { passed, failed, skipped, ..Self::default() })
    }

    /// Adds another count.
    pub(crate) fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.skipped += other.skipped;
        self.failures.add(other.failures);
    }
}

impl fmt::Display for Count {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(lines: &[&str], expect: &str) {
        let mut count = Count::default();
        lines.iter().for_each(|line| count.add_line(line));
        assert_eq!(count.to_string(), expect, "{lines:?}");
    }

    #[test]
    fn result_lines_are_counted() {
        check(
            &[
                "test result: ok. 13 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.01s",
                "test result: FAILED. 1 passed; 4 failed; 0 ignored; 0 measured",
                "test foo ... ok",
            ],
            "14 passed, 4 failed, 2 skipped",
        );
    }

    #[test]
    fn a_test_that_gave_up_has_not_passed() {
        let result = "test result: ok. 2 passed; 0 failed; 0 ignored";
        check(&["skipped: needs /dev/fuse", result, result], "3 passed, 0 failed, 1 skipped");
        check(
            &["skipped: needs root", "test result: ok. 0 passed; 0 failed; 3 ignored"],
            "0 passed, 0 failed, 3 skipped",
        );
    }

    #[test]
    fn a_total_is_read_as_it_was_written() {
        let count = Count { passed: 13, failed: 1, skipped: 2, ..Count::default() };
        assert_eq!(Count::total(&format!("{TOTAL}{count}")), Some(count));
        assert_eq!(Count::total("tests: many"), None);
    }
}
