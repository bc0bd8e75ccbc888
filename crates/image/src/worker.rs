//! The confined child that turns the bytes of a layer into files.

/// Runs the worker and never returns, if this process was started as one; else does nothing.
///
/// Call it first in `main`, before any thread exists.
pub fn maybe_run() {}
