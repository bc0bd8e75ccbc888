//! The node's own messages, on standard error.

use std::io::IsTerminal as _;

/// Starts logging at `level`; once in a process.
pub(crate) fn start(level: tracing::Level) {
    let started = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr)
        .try_init();
    // A test may have set one before.
    let _ = started;
}
