//! Waking up when processes begin to wait for memory: pressure stall information, where the kernel has it
//! (accounting/psi.rst, "Monitoring for pressure thresholds"). Memory can be gone in less than the ten seconds of the timer.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::path::Path;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Some task has waited for memory for a fifth of a second within two, the shortest window that needs no capability.
const TRIGGER: &[u8] = b"some 200000 2000000\0";

/// The kernel's word, if it gives any.
pub(super) struct Wake(Option<AsyncFd<File>>);

impl Wake {
    /// Registers with the kernel. A kernel without PSI leaves the timer.
    pub(super) fn open() -> Self {
        let registered = register(Path::new("/proc/pressure/memory"));
        if let Err(error) = &registered {
            tracing::debug!(%error, "the kernel does not tell of memory pressure; looking at it by a timer alone");
        }
        Self(registered.ok())
    }

    /// For those whom the kernel has nothing to tell.
    pub(super) fn by_timer() -> Self {
        Self(None)
    }

    /// Returns after `pause`, or when processes wait for memory; at most once in two seconds for that.
    pub(super) async fn within(&mut self, pause: Duration) {
        let wait = async {
            match &self.0 {
                Some(trigger) => match trigger.ready(Interest::PRIORITY).await {
                    Ok(mut ready) => ready.clear_ready(),
                    Err(error) => {
                        tracing::debug!(%error, "memory pressure cannot be waited for");
                        std::future::pending().await
                    }
                },
                None => std::future::pending().await,
            }
        };
        let _ = tokio::time::timeout(pause, wait).await; // Either way it is time.
    }
}

fn register(file: &Path) -> io::Result<AsyncFd<File>> {
    let mut trigger = OpenOptions::new().read(true).write(true).open(file)?;
    trigger.write_all(TRIGGER)?;
    #[expect(deprecated, reason = "its replacement is unsafe; a file keeps what that asks for")]
    AsyncFd::with_interest(trigger, Interest::PRIORITY)
}
