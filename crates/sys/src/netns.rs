//! Network namespaces. Work inside another namespace is done on a thread made for it, which ends with it: the calling
//! thread never changes its namespace.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::netlink;

/// The calling thread's network namespace.
///
/// # Errors
/// `/proc` is not mounted.
pub fn current() -> io::Result<OwnedFd> {
    File::open("/proc/thread-self/ns/net").map(OwnedFd::from)
}

/// Makes a network namespace and runs `setup` in it.
///
/// # Errors
/// The kernel refused (CAP_SYS_ADMIN is needed), or what `setup` returned.
pub fn create<T: Send>(setup: impl FnOnce() -> io::Result<T> + Send) -> io::Result<(OwnedFd, T)> {
    on_thread(|| {
        // SAFETY: CLONE_NEWNET changes no table that threads share; descriptors stay common to the process.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?;
        Ok((current()?, setup()?))
    })
}

/// Runs `work` inside `namespace`.
///
/// # Errors
/// The descriptor is no network namespace or may not be entered (CAP_SYS_ADMIN in its user namespace is needed), or what
/// `work` returned.
pub fn run_in<T: Send>(namespace: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    on_thread(|| {
        move_into_link_name_space(namespace, Some(LinkNameSpaceType::Network))?;
        work()
    })
}

/// A route socket in `namespace`, or in the thread's own.
///
/// # Errors
/// See [`run_in`].
pub fn route_socket(namespace: BorrowedFd<'_>) -> io::Result<netlink::Socket> {
    run_in(namespace.as_fd(), || netlink::Socket::route().map_err(Into::into))
}

pub(crate) fn on_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread =
            std::thread::Builder::new().name("netns".into()).stack_size(256 << 10).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
