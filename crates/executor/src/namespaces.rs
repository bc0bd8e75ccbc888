//! Namespaces that outlive a container: a pod's own, held as descriptors.

use std::os::fd::{BorrowedFd, OwnedFd};

use sys::process::Child;

use crate::oci::{IdMapping, NamespaceKind};

/// Which namespaces to make, and what to set in them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// Of `Network`, `Ipc`, `Uts`, `Time`, `Cgroup`, `Mount`. A user namespace is asked for by its mappings, a pid
    /// namespace by [`start_reaper`].
    pub kinds: Vec<NamespaceKind>,
    /// Users of a new user namespace that owns all the others; empty for none.
    pub uids: Vec<IdMapping>,
    /// Its groups.
    pub gids: Vec<IdMapping>,
    /// Host name in the new UTS namespace.
    pub hostname: Option<String>,
    /// Dotted names and values, set in the new network and IPC namespaces.
    pub sysctls: Vec<(String, String)>,
}

/// Makes namespaces. The caller stays where it is and has one thread only.
///
/// # Errors
/// The call that failed; nothing remains.
pub fn create(request: &Request) -> sys::Result<Vec<(NamespaceKind, OwnedFd)>> {
    let _ = request;
    Ok(Vec::new())
}

/// Starts the first process of a new pid namespace, owned by `user` if given: it reaps what is orphaned there and
/// ends with the caller. Its pid namespace is `/proc/<pid>/ns/pid`; see also [`open`].
///
/// # Errors
/// Those of clone3(2) and setns(2).
pub fn start_reaper(user: Option<BorrowedFd<'_>>) -> sys::Result<Child> {
    let _ = user;
    Err(sys::Error { call: "clone3", subject: String::new(), errno: sys::rustix::io::Errno::NOSYS })
}

/// The namespace of a process.
///
/// # Errors
/// The process has ended.
pub fn open(process: &Child, kind: NamespaceKind) -> sys::Result<OwnedFd> {
    let _ = (process, kind);
    Err(sys::Error { call: "open", subject: String::new(), errno: sys::rustix::io::Errno::NOSYS })
}
