//! What is tried again and again: told when it begins to fail, and tried less often while it does.

use std::fmt::Display;
use std::time::Duration;

/// The first rest after a failure; each further one is twice as long.
const REST_FIRST: Duration = Duration::from_millis(200);
/// What is done in vain is a few system calls, and rules that somebody removes meanwhile are missed for so long.
const REST_MAX: Duration = Duration::from_secs(5);

/// Failures one after another.
#[derive(Debug, Default)]
pub(crate) struct Trouble {
    /// The error that was told last.
    told: Option<String>,
    rest: Duration,
}

impl Trouble {
    /// A try has failed; whether that is to be told: the last one went well, or failed otherwise.
    pub(crate) fn fails(&mut self, error: &impl Display) -> bool {
        self.rest = (self.rest * 2).clamp(REST_FIRST, REST_MAX);
        let error = Some(error.to_string());
        let is_news = self.told != error;
        self.told = error;
        is_news
    }

    /// A try went well; whether the last one failed.
    pub(crate) fn ends(&mut self) -> bool {
        self.rest = Duration::ZERO;
        self.told.take().is_some()
    }

    /// How long not to try.
    pub(crate) fn rest(&self) -> Duration {
        self.rest
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_told_once_and_tried_less_often() {
        let mut trouble = Trouble::default();
        assert!(!trouble.ends());
        let (mut told, mut rests) = (0, Vec::new());
        for _ in 0..8 {
            told += u32::from(trouble.fails(&"busy"));
            rests.push(trouble.rest().as_millis());
        }
        assert_eq!((told, rests), (1, vec![200, 400, 800, 1600, 3200, 5000, 5000, 5000]));
        assert!(trouble.fails(&"gone"), "another one is");
        assert!(trouble.ends());
        assert!(!trouble.ends());
        assert!(trouble.fails(&"gone"), "it has gone well in between");
        assert_eq!(trouble.rest(), REST_FIRST);
    }
}
