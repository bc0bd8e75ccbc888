//! The first process of a pid namespace that the containers of a pod share: it reaps what is orphaned there.
//!
//! Its namespace shows it to every container of the pod, and one with `CAP_SYS_PTRACE` sees through it as if it were the
//! process itself. So it has nothing: no capability, no descriptor, and as its root the pod's mount namespace, in which
//! there is only what the containers have, too.

use std::convert::Infallible;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use sys::process::{self, Child, Clone, namespace};
use sys::rustix::io::Errno;
use sys::rustix::process::Signal;
use sys::{caps, fork};

use crate::launch::{self, InStep as _, LaunchError, Reporter, START_MAX, Starting, Step};
use crate::oci::NamespaceKind;

/// User and group, those of upstream's pause images.
const NOBODY: u32 = 65535;

/// Starts it in a new pid namespace; it ends with the caller. The pid namespace is `/proc/<pid>/ns/pid`, see also
/// [`crate::namespaces::open`]. In all other respects it is in the namespaces of `pod`, among which one of mounts has to
/// be; with a user namespace, that owns the pid namespace.
///
/// The caller has one thread, see the crate's documentation.
///
/// # Errors
/// The first step that failed.
pub fn start(pod: &[(NamespaceKind, OwnedFd)]) -> Result<Child, LaunchError> {
    let mounts = pod.iter().any(|(kind, _)| *kind == NamespaceKind::Mount);
    if !mounts {
        return Err(LaunchError::new(Step::Descriptors, Errno::INVAL, "the pod has no mount namespace to hide in"));
    }
    let mapped = pod.iter().any(|(kind, _)| *kind == NamespaceKind::User);
    let (ours, theirs) =
        launch::channel_pair().map_err(|error| LaunchError::io(Step::Descriptors, &error, "socketpair"))?;
    let reporter = Reporter(theirs);
    let keep: Vec<BorrowedFd<'_>> = pod.iter().map(|(_, fd)| fd.as_fd()).chain([reporter.0.as_fd()]).collect();
    let how = Clone { namespaces: if mapped { 0 } else { namespace::PID }, keep: Some(&keep), ..Clone::default() };
    let first = process::spawn(&how, || {
        let life = || {
            // It is the host's, so it is joined with the host's rights.
            launch::join_some(pod, |kind| kind == NamespaceKind::Mount)?;
            if !mapped {
                return live(pod, NOBODY, &reporter);
            }
            launch::join_some(pod, |kind| kind == NamespaceKind::User)?;
            launch::go_through(namespace::PID, &reporter, || live(pod, 0, &reporter))
        };
        launch::report(life(), &reporter)
    })
    .map_err(|error| LaunchError::from_call(Step::Clone, &error))?;
    drop(reporter);
    Starting::new(first, mapped, ours, false, Vec::new())?.wait(START_MAX).map(|launched| launched.child)
}

/// Its life. Root of a user namespace needs no other user, and the namespace may map none.
fn live(pod: &[(NamespaceKind, OwnedFd)], user: u32, reporter: &Reporter) -> Result<Infallible, LaunchError> {
    launch::join_some(pod, |kind| !matches!(kind, NamespaceKind::Mount | NamespaceKind::User))?;
    let _ = fork::set_process_name("orlop-pause"); // Cosmetic.
    caps::bound(0).step(Step::Capabilities, "bounding set")?;
    process::set_user(user, user, &[]).step(Step::User, user)?;
    caps::set(&caps::Sets::default()).step(Step::Capabilities, "")?;
    process::set_no_new_privileges().step(Step::NoNewPrivileges, "")?;
    // A change of user takes back both.
    process::set_dumpable(false).step(Step::Session, "dumpable")?;
    process::set_parent_death_signal(Some(Signal::KILL)).step(Step::ParentDeath, "")?;
    if !reporter.executing() {
        process::exit_now(1);
    }
    process::keep_only(&[], || fork::reap_for_ever())
}
