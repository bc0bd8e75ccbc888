//! Where keepers are forked from: a copy of the program from before it had a thread.
//!
//! ```text
//!   daemon ── config + file descriptors (one packet) ──► zygote ── fork ──► keeper
//!      ╰───────────────── control connection (socket pair) ────────────────────╯
//! ```
//! The zygote answers nothing: a keeper that could not be forked shows as the end of its control connection, one that
//! could not make its sandbox answers the first request with the reason. When the daemon goes, the zygote goes; keepers
//! stay.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use sys::cgroup::Entry;
use sys::zygote::{self, Helper, Helpers};

use crate::config::{KeeperConfig, KeeperFds};
use crate::protocol::wire;

/// A keeper, to be among the zygote's helpers.
pub const HELPER: Helper = Helper { name: "keeper", run: crate::keeper::run };

/// A zygote that knows nothing but keepers.
struct Keepers;

impl Helpers for Keepers {
    const ALL: &'static [Helper] = &[HELPER];
}

/// The daemon's handle of the zygote.
#[derive(Debug, Clone)]
pub struct Zygote(Arc<zygote::Zygote>);

/// A zygote that has [`HELPER`] among its helpers.
impl From<Arc<zygote::Zygote>> for Zygote {
    fn from(zygote: Arc<zygote::Zygote>) -> Self {
        Self(zygote)
    }
}

impl Zygote {
    /// Forks a zygote for keepers alone. Must be called before the program has a thread, best first thing in `main`.
    ///
    /// # Errors
    /// The kernel's, and `Unsupported` when there are threads.
    pub fn start() -> io::Result<Self> {
        zygote::Zygote::start::<Keepers>().map(|zygote| Self(Arc::new(zygote)))
    }

    /// Starts a keeper and answers its control connection, on which `Hello` is due. Does not wait for anything;
    /// may be called from any thread.
    ///
    /// # Errors
    /// `BrokenPipe` when the zygote has died, `InvalidInput` for a configuration that cannot be sent.
    pub fn spawn_keeper(&self, mut config: KeeperConfig, fds: &KeeperFds<'_>) -> io::Result<UnixStream> {
        config.mounts = fds.mounts.is_some();
        let bytes = wire::encode(&config);
        let (control, keepers_end) = UnixStream::pair()?;
        let all: Vec<BorrowedFd<'_>> = [keepers_end.as_fd()].into_iter().chain(fds.in_order()).collect();
        match fds.cgroup {
            Some(Entry::Directory(group)) => self.0.spawn_in_group(HELPER.name, &bytes, &all, group.as_fd())?,
            _ => self.0.spawn(HELPER.name, &bytes, &all)?,
        }
        Ok(control)
    }
}
