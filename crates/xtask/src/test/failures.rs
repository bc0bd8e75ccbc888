//! What failed tests said, from what test programs print: it is told again at the end, where a reader looks first.

use std::fmt;

/// The words of failed tests, without their backtraces.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Failures {
    lines: Vec<String>,
    place: Place,
}

/// Where in the output of a test program a line stands.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Place {
    #[default]
    Elsewhere,
    /// After `failures:`, between what single tests said.
    Between,
    /// Within what a failed test said.
    Said,
    /// Within its backtrace.
    Backtrace,
}

impl Failures {
    /// Takes the next line of a program's output.
    pub(crate) fn add_line(&mut self, line: &str) {
        self.place = match line {
            "failures:" => Place::Between,
            "successes:" => Place::Elsewhere,
            _ if line.starts_with("test result: ") => Place::Elsewhere,
            "stack backtrace:" if self.place == Place::Said => Place::Backtrace,
            _ if self.place != Place::Elsewhere && line.starts_with("---- ") => Place::Said,
            _ => self.place,
        };
        if self.place == Place::Said && !line.is_empty() {
            self.lines.push(line.to_owned());
        }
    }

    /// Adds what another run said.
    pub(crate) fn add(&mut self, other: Self) {
        self.lines.extend(other.lines);
    }
}

impl fmt::Display for Failures {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.lines.iter().try_for_each(|line| writeln!(to, "{line}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_words_of_failed_tests_are_kept() {
        let mut failures = Failures::default();
        let output = "test a ... ok\ntest b ... FAILED\n\nsuccesses:\n\n---- a stdout ----\nfine\n\nsuccesses:\n    a\n\n\
                      failures:\n\n---- b stdout ----\n\nthread 'b' panicked at f.rs:1:2:\nnot so\nstack backtrace:\n   0: c\n\n\
                      ---- d stdout ----\nnor this\n\nfailures:\n    b\n    d\n\n\
                      test result: FAILED. 1 passed; 2 failed; 0 ignored\n---- later";
        output.lines().for_each(|line| failures.add_line(line));
        let expect = "---- b stdout ----\nthread 'b' panicked at f.rs:1:2:\nnot so\n---- d stdout ----\nnor this\n";
        assert_eq!(failures.to_string(), expect);
    }
}
