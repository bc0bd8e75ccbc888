//! What the owner of the host's mounts does for a launch: turns the plan's sources into detached mounts.
//!
//! Runs in the daemon, which sees the host's paths; the keeper and the container only get descriptors.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use sys::mount::{self, Change};
use sys::rustix::io::Errno;

use crate::namespaces;
use crate::oci::{IdMapping, NamespaceKind};
use crate::plan::{Below, IdMap, LaunchPlan, Source};

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
        let clear = source.clear | times_of(source.set);
        let change = Change { set: source.set, clear, ..Change::default() };
        mount::set_attributes(mount.as_fd(), &change)?;
    }
    if source.below != Below::default() {
        let Below { set, clear } = source.below;
        let change = Change { set, clear: clear | times_of(set), recursive: true, ..Change::default() };
        mount::set_attributes(mount.as_fd(), &change)?;
    }
    let (own, recursive) = match &source.id_map {
        IdMap::None => return Ok(mount),
        IdMap::Container { recursive } => (None, *recursive),
        IdMap::Own { uids, gids, recursive } => (Some(own_user_namespace(uids, gids)?), *recursive),
    };
    let id_map = own.as_ref().map(OwnedFd::as_fd).or(user_namespace);
    let id_map = Some(id_map.ok_or_else(|| unmapped(source, "no user namespace"))?);
    mount::set_attributes(mount.as_fd(), &Change { id_map, recursive, ..Change::default() })?;
    Ok(mount)
}

/// Access times are one of three kinds, not bits: a new one takes the place of what was.
fn times_of(set: u64) -> u64 {
    if set & mount::attribute::ACCESS_TIME == 0 { 0 } else { mount::attribute::ACCESS_TIME }
}

/// A user namespace for the mappings of one mount. It is made by a process, so the caller has one thread only.
fn own_user_namespace(uids: &[IdMapping], gids: &[IdMapping]) -> sys::Result<OwnedFd> {
    let request = namespaces::Request { uids: uids.to_vec(), gids: gids.to_vec(), ..namespaces::Request::default() };
    let made = namespaces::create(&request, None)?;
    let user = made.into_iter().find(|(kind, _)| *kind == NamespaceKind::User);
    let missing = || sys::Error { call: "clone3", subject: "a user namespace".to_owned(), errno: Errno::INVAL };
    user.map(|(_, fd)| fd).ok_or_else(missing)
}

fn unmapped(source: &Source, why: &str) -> sys::Error {
    sys::Error { call: "mount_setattr", subject: format!("{} ({why})", source.path), errno: Errno::OPNOTSUPP }
}
