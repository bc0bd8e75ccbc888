//! What an ended container has to say: its termination message, or the end of its log.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use k8s_openapi::api::core::v1::Container;

use crate::logs;

/// Longest message that is shown (`MaxContainerTerminationMessageLength`), from the file.
const MESSAGE_MAX: u64 = 4096;
/// Longest one from the log, in bytes and lines.
const LOG_BYTES_MAX: usize = 2048;
const LOG_LINES_MAX: usize = 80;

/// The message of a run that ended with `exit_code`.
pub(crate) fn message(container: &Container, exit_code: i32, file: &Path, log: &Path) -> String {
    let written = read_head(file);
    let falls_back = container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError");
    if !written.is_empty() || !falls_back || exit_code == 0 {
        return written;
    }
    log_tail(log)
}

fn read_head(path: &Path) -> String {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MESSAGE_MAX).read_to_end(&mut bytes));
    // A file that cannot be read says nothing.
    read.map_or_else(|_| String::new(), |_| String::from_utf8_lossy(&bytes).into_owned())
}

/// The end of the log as it was said: a last line without an end has none here either.
fn log_tail(path: &Path) -> String {
    // A log that cannot be read says nothing.
    logs::last(path, LOG_LINES_MAX, LOG_BYTES_MAX).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_comes_first_and_the_log_after_an_error_only() {
        let dir = tempfile::tempdir().unwrap();
        let (file, log) = (dir.path().join("message"), dir.path().join("0.log"));
        std::fs::write(&file, "").unwrap();
        std::fs::write(&log, "2026-01-01T00:00:00Z stderr F one\n2026-01-01T00:00:00Z stderr F two words\n").unwrap();
        let policy =
            |policy: &str| Container { termination_message_policy: Some(policy.to_owned()), ..Container::default() };
        assert_eq!(message(&policy("File"), 1, &file, &log), "");
        assert_eq!(message(&policy("FallbackToLogsOnError"), 0, &file, &log), "");
        assert_eq!(message(&policy("FallbackToLogsOnError"), 1, &file, &log), "one\ntwo words\n");
        std::fs::write(&log, "2026-01-01T00:00:00Z stderr F one\n2026-01-01T00:00:00Z stderr P two\n").unwrap();
        assert_eq!(message(&policy("FallbackToLogsOnError"), 1, &file, &log), "one\ntwo");
        std::fs::write(&file, "said").unwrap();
        assert_eq!(message(&policy("FallbackToLogsOnError"), 1, &file, &log), "said");
    }
}
