//! The keeper process: one thread, one loop.

use std::os::fd::OwnedFd;

/// The life of a keeper.
pub(crate) fn run(_config: Vec<u8>, _fds: Vec<OwnedFd>) -> ! {
    sys::process::exit_now(0)
}
