//! A network namespace with nothing but loopback: whatever a test sends stays in it.

use std::net::IpAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::Command;

use anyhow::Context as _;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::host;

/// Moves the calling **thread**, and what it starts from now on, into a fresh network namespace with loopback up.
/// Call it before other threads exist if they should be inside too.
///
/// # Errors
/// Needs CAP_SYS_ADMIN.
pub fn enter_private() -> anyhow::Result<()> {
    // SAFETY-free: only the network namespace changes; nothing this process shares by file descriptor is affected.
    #[expect(deprecated, reason = "the replacement is unsafe for flags that this call does not pass")]
    rustix::thread::unshare(UnshareFlags::NEWNET)
        .context("a private network namespace needs root (CAP_SYS_ADMIN); run as root or pass --host")?;
    host::run(Command::new("ip").args(["link", "set", "lo", "up"]))
}

/// Gives the calling thread's network namespace one more address of its own, on loopback: others on its bridges and links
/// reach it by that. Nothing happens when it has it.
///
/// # Errors
/// Needs CAP_NET_ADMIN.
pub fn add_address(address: IpAddr) -> anyhow::Result<()> {
    host::run(Command::new("ip").args(["address", "replace", &address.to_string(), "dev", "lo"]))
}

/// The calling thread's network namespace, to come back to or to hand to another.
///
/// # Errors
/// `/proc` is not mounted.
pub fn current() -> anyhow::Result<OwnedFd> {
    Ok(std::fs::File::open("/proc/thread-self/ns/net")?.into())
}

/// Moves the calling thread into `namespace`.
///
/// # Errors
/// Needs CAP_SYS_ADMIN.
pub fn enter(namespace: &OwnedFd) -> anyhow::Result<()> {
    Ok(move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?)
}
