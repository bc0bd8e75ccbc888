//! The process from which keepers are forked: a copy of the program from before it had a thread.
//!
//! ```text
//!   daemon ── config + file descriptors (one packet) ──► zygote ── fork ──► keeper
//!      ╰───────────────── control connection (socket pair) ────────────────────╯
//! ```
//! The zygote answers nothing: a keeper that could not be forked shows as the end of its control connection, one that
//! could not make its sandbox answers the first request with the reason. When the daemon goes, the zygote goes; keepers
//! stay.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use sys::rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use sys::{fdpass, fork, process};

use crate::config::{KeeperConfig, KeeperFds};
use crate::protocol::wire;

/// Longest configuration. Sysctls are its only part that can grow, and a pod has a dozen at most.
const CONFIG_MAX: usize = 64 << 10;

/// The daemon's handle of the zygote.
#[derive(Debug)]
pub struct Zygote {
    socket: OwnedFd,
}

impl Zygote {
    /// Forks the zygote. Must be called before the program has a thread, best first thing in `main`.
    ///
    /// # Errors
    /// The kernel's, and `Unsupported` when there are threads.
    pub fn start() -> io::Result<Self> {
        let (here, there) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        fork::fork_into(Vec::new(), vec![there], run)?;
        Ok(Self { socket: here })
    }

    /// Starts a keeper and answers its control connection, on which `Hello` is due. Does not wait for anything;
    /// may be called from any thread.
    ///
    /// # Errors
    /// `BrokenPipe` when the zygote has died, `InvalidInput` for a configuration that cannot be sent.
    pub fn spawn_keeper(&self, mut config: KeeperConfig, fds: &KeeperFds<'_>) -> io::Result<UnixStream> {
        config.cgroup = fds.cgroup_entry();
        config.mounts = fds.mounts.is_some();
        let bytes = wire::encode(&config);
        if bytes.len() > CONFIG_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "sandbox configuration is longer than 64 KiB"));
        }
        let (control, keepers_end) = UnixStream::pair()?;
        let all: Vec<BorrowedFd<'_>> = [keepers_end.as_fd()].into_iter().chain(fds.in_order()).collect();
        fdpass::send(self.socket.as_fd(), &bytes, &all)?;
        Ok(control)
    }
}

/// The life of the zygote.
fn run(_: Vec<u8>, mut fds: Vec<OwnedFd>) -> ! {
    let _ = fork::new_session(); // It is a fresh child and leads nothing, so this cannot fail.
    let _ = fork::detach_stdio(); // Without /dev/null it keeps the daemon's streams; nothing is written to them.
    let _ = process::set_dumpable(false); // Defence in depth; cannot fail for this value.
    fork::ignore_children();
    let _ = fork::set_process_name("orlop-zygote"); // Cosmetic.
    fork::trim_heap();
    if let Some(socket) = fds.pop() {
        while let Ok(Some((config, fds))) = next_order(&socket) {
            let _ = fork::fork_into(config, fds, crate::keeper::run); // The daemon sees the connection end.
        }
    }
    process::exit_now(0)
}

/// One configuration with its file descriptors; `None` when the daemon is gone.
fn next_order(socket: &OwnedFd) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
    let (mut config, mut fds) = (vec![0; CONFIG_MAX], Vec::new());
    let length = fdpass::recv(socket.as_fd(), &mut config, &mut fds)?;
    config.truncate(length);
    config.shrink_to_fit();
    Ok((length > 0).then_some((config, fds)))
}
