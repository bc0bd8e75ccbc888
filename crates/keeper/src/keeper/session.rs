//! One exec'd process.

use std::os::fd::OwnedFd;

use crate::protocol::{ExecSession, Exit, Process};

/// An exec session, from its start until it is forgotten.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) key: u32,
    pub(super) id: String,
    pub(super) container: String,
    pub(super) process: Process,
    /// Present while it runs.
    pub(super) pidfd: Option<OwnedFd>,
    pub(super) exit: Option<Exit>,
}

impl Session {
    pub(super) fn describe(&self) -> ExecSession {
        ExecSession {
            id: self.id.clone(),
            container: self.container.clone(),
            process: self.process.clone(),
            exit: self.exit.clone(),
        }
    }
}
