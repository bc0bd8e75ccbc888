//! What the owner of the host's mounts does for a launch: turns the plan's sources into detached mounts.
//!
//! Runs in the daemon, which sees the host's paths; the keeper and the container only get descriptors.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use sys::mount::{self, Change};
use sys::rustix::io::Errno;

use crate::plan::{IdMap, LaunchPlan, Source};

/// A source that could not be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the mount of {path} at {target}: {cause}")]
pub struct PrepareError {
    /// The path on the host.
    pub path: String,
    /// Where it should appear.
    pub target: String,
    /// Why not.
    pub cause: sys::Error,
}

/// Makes a detached mount of each of the plan's sources, with its attributes, propagation and id mapping.
///
/// `user_namespace` maps the ids of mounts that ask for it without mappings of their own; needed only for those.
///
/// # Errors
/// The first source that is missing or refuses an attribute.
pub fn open_sources(plan: &LaunchPlan, user_namespace: Option<BorrowedFd<'_>>) -> Result<Vec<OwnedFd>, PrepareError> {
    plan.sources.iter().map(|source| open_source(source, user_namespace)).collect()
}

/// As [`open_sources`], for one of them.
///
/// # Errors
/// It is missing or refuses an attribute.
pub fn open_source(source: &Source, user_namespace: Option<BorrowedFd<'_>>) -> Result<OwnedFd, PrepareError> {
    let mount = mount::copy_tree(Path::new(&source.path), source.recursive).map_err(|cause| failed(source, cause))?;
    finish_source(source, mount, user_namespace)
}

/// As [`open_source`], where the detached mount is there already and only has to get its attributes.
///
/// # Errors
/// It refuses one.
pub fn finish_source(
    source: &Source,
    mount: OwnedFd,
    user_namespace: Option<BorrowedFd<'_>>,
) -> Result<OwnedFd, PrepareError> {
    finish(source, mount, user_namespace).map_err(|cause| failed(source, cause))
}

fn failed(source: &Source, cause: sys::Error) -> PrepareError {
    PrepareError { path: source.path.clone(), target: source.target.clone(), cause }
}

fn finish(source: &Source, mount: OwnedFd, user_namespace: Option<BorrowedFd<'_>>) -> sys::Result<OwnedFd> {
    let propagation = source
        .propagation
        .unwrap_or(crate::plan::PropagationPlan { kind: mount::Propagation::Private, recursive: source.recursive });
    let spread = Change { propagation: Some(propagation.kind), recursive: propagation.recursive, ..Change::default() };
    mount::set_attributes(mount.as_fd(), &spread)?;
    if source.set != 0 || source.clear != 0 {
        let change = Change { set: source.set, clear: source.clear, ..Change::default() };
        mount::set_attributes(mount.as_fd(), &change)?;
    }
    if source.set_recursive != 0 {
        let change = Change { set: source.set_recursive, recursive: true, ..Change::default() };
        mount::set_attributes(mount.as_fd(), &change)?;
    }
    let recursive = match &source.id_map {
        IdMap::None => return Ok(mount),
        IdMap::Container { recursive } => *recursive,
        IdMap::Own { .. } => return Err(unmapped(source, "mappings of a mount's own need a user namespace for each")),
    };
    let id_map = Some(user_namespace.ok_or_else(|| unmapped(source, "no user namespace"))?);
    mount::set_attributes(mount.as_fd(), &Change { id_map, recursive, ..Change::default() })?;
    Ok(mount)
}

fn unmapped(source: &Source, why: &str) -> sys::Error {
    sys::Error { call: "mount_setattr", subject: format!("{} ({why})", source.path), errno: Errno::OPNOTSUPP }
}
