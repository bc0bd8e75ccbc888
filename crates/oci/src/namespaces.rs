//! The namespaces that a container joins.

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use executor::namespaces::Request;
use executor::oci::{self, NamespaceKind};
use sys::error::Context as _;
use sys::rustix::fs::{Mode, OFlags};

use crate::error::Error;

/// Opens those that the configuration names by their paths, and makes a user namespace where it asks for a new one: all others
/// have to be owned by it.
pub(crate) fn open(linux: &oci::Linux) -> Result<Vec<(NamespaceKind, OwnedFd)>, Error> {
    let mut opened = Vec::new();
    for one in &linux.namespaces {
        match one.kind {
            _ if !one.path.is_empty() => opened.push((one.kind, by_path(Path::new(&one.path))?)),
            NamespaceKind::User => opened.extend(make_user(linux)?),
            _ => {}
        }
    }
    Ok(opened)
}

pub(crate) fn by_path(path: &Path) -> Result<OwnedFd, Error> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(sys::rustix::fs::open(path, flags, Mode::empty()).during("open", path.display())?)
}

fn make_user(linux: &oci::Linux) -> Result<Vec<(NamespaceKind, OwnedFd)>, Error> {
    let request = Request { uids: linux.uid_mappings.clone(), gids: linux.gid_mappings.clone(), ..Request::default() };
    Ok(executor::namespaces::create(&request, None)?)
}

/// The user namespace among them.
pub(crate) fn user(namespaces: &[(NamespaceKind, OwnedFd)]) -> Option<BorrowedFd<'_>> {
    namespaces.iter().find(|(kind, _)| *kind == NamespaceKind::User).map(|(_, fd)| fd.as_fd())
}
