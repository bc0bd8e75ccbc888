//! The server's process.

use std::os::fd::OwnedFd;

/// The life of the process.
pub(super) fn run(_config: Vec<u8>, _fds: Vec<OwnedFd>) -> ! {
    sys::process::exit_now(0)
}
