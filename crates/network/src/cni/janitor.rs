//! The thread that deletes sandboxes which died without DEL: after a reboot, a crash, or a plugin's failure.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::sandboxes::Sandboxes;

/// A plugin that fails now may work later (its own daemon has yet to start), so it is called again: at first soon, then
/// seldom.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
const LAST_PAUSE: Duration = Duration::from_secs(600);

/// Stops the thread when dropped, though not in the middle of a plugin's call.
#[derive(Debug)]
pub(crate) struct Janitor {
    _stop: Sender<()>,
}

impl Janitor {
    /// Starts the thread; it ends when nothing is left to delete.
    pub(crate) fn start(sandboxes: &Arc<Sandboxes>) -> std::io::Result<Janitor> {
        let (stop, stopped) = channel();
        let sandboxes = Arc::downgrade(sandboxes);
        std::thread::Builder::new().name("cni-leftovers".into()).spawn(move || clean(&sandboxes, &stopped))?;
        Ok(Janitor { _stop: stop })
    }
}

fn clean(sandboxes: &Weak<Sandboxes>, stopped: &Receiver<()>) {
    let mut pause = FIRST_PAUSE;
    while let Some(sandboxes) = sandboxes.upgrade() {
        for sandbox in sandboxes.leftovers() {
            if let Err(error) = sandboxes.detach(&sandbox) {
                tracing::warn!(
                    sandbox,
                    error = &error as &dyn std::error::Error,
                    "cannot remove a dead sandbox's network"
                );
            }
        }
        if sandboxes.leftovers().is_empty() {
            return;
        }
        drop(sandboxes);
        if stopped.recv_timeout(pause) != Err(RecvTimeoutError::Timeout) {
            return;
        }
        pause = (pause * 2).min(LAST_PAUSE);
    }
}
