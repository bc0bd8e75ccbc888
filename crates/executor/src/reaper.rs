//! The first process of a pid namespace that the containers of a pod share: it reaps what is orphaned there.
//!
//! Its namespace shows it to every container of the pod, and one with `CAP_SYS_PTRACE` sees through it as if it were the
//! process itself. So it has nothing: no capability, no descriptor, and as its root the pod's mount namespace, in which
//! there is only what the containers have, too. Where a policy labels containers it has the labels of the pod, and an empty
//! directory as its root: what has the node's label is out of the containers' reach, and would be more than they are.

use std::convert::Infallible;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use sys::mount::{self, attribute};
use sys::process::{self, Child, Clone, namespace};
use sys::rustix::fs::{Mode, OFlags, openat};
use sys::rustix::io::Errno;
use sys::rustix::process::Signal;
use sys::{caps, fork, path};

use crate::launch::{self, InStep as _, LaunchError, Reporter, START_MAX, Starting, Step};
use crate::oci::NamespaceKind;

/// User and group, those of upstream's pause images.
const NOBODY: u32 = 65535;

/// SELinux labels of a pod.
#[derive(Debug, Clone, Copy)]
pub struct Labels<'a> {
    /// Of its processes.
    pub process: &'a str,
    /// Of its files.
    pub file: &'a str,
}

/// Starts it in a new pid namespace; it ends with the caller. The pid namespace is `/proc/<pid>/ns/pid`, see also
/// [`crate::namespaces::open`]. In all other respects it is in the namespaces of `pod`, among which one of mounts has to
/// be; with a user namespace, that owns the pid namespace.
///
/// The caller has one thread, see the crate's documentation.
///
/// # Errors
/// The first step that failed.
pub fn start(pod: &[(NamespaceKind, OwnedFd)], labels: Option<Labels<'_>>) -> Result<Child, LaunchError> {
    let mounts = pod.iter().any(|(kind, _)| *kind == NamespaceKind::Mount);
    if !mounts {
        return Err(LaunchError::new(Step::Descriptors, Errno::INVAL, "the pod has no mount namespace to hide in"));
    }
    let mapped = pod.iter().any(|(kind, _)| *kind == NamespaceKind::User);
    // The host's: there is none where it goes.
    let proc = labels.map(|_| path::open_proc()).transpose().step(Step::Label, "/proc")?;
    let label = labels.zip(proc.as_ref()).map(|(labels, proc)| (labels.process, proc.as_fd()));
    let (ours, theirs) =
        launch::channel_pair().map_err(|error| LaunchError::io(Step::Descriptors, &error, "socketpair"))?;
    let reporter = Reporter(theirs);
    let ours_alone = proc.iter().chain([&reporter.0]).map(AsFd::as_fd);
    let keep: Vec<BorrowedFd<'_>> = pod.iter().map(|(_, fd)| fd.as_fd()).chain(ours_alone).collect();
    let how = Clone { namespaces: if mapped { 0 } else { namespace::PID }, keep: Some(&keep), ..Clone::default() };
    let first = process::spawn(&how, || {
        let life = || {
            // It is the host's, so it is joined with the host's rights.
            launch::join_some(pod, |kind| kind == NamespaceKind::Mount)?;
            if let Some(labels) = labels {
                leave_for_nothing(labels.file)?;
            }
            if !mapped {
                return live(pod, NOBODY, label, &reporter);
            }
            launch::join_some(pod, |kind| kind == NamespaceKind::User)?;
            launch::go_through(namespace::PID, &reporter, || live(pod, 0, label, &reporter))
        };
        launch::report(life(), &reporter)
    })
    .map_err(|error| LaunchError::from_call(Step::Clone, &error))?;
    drop(reporter);
    Starting::new(first, mapped, ours, false, Vec::new())?.wait(START_MAX).map(|launched| launched.child)
}

/// Enters a mount namespace of its own, in which there is an empty directory with this label. The pod's has what containers may
/// give labels of their own.
fn leave_for_nothing(label: &str) -> Result<(), LaunchError> {
    const AT: &str = "the root of the pod's first process";
    process::leave(namespace::MOUNT).step(Step::NewNamespace, "mnt")?;
    let options = [("mode", Some("0555")), ("size", Some("4k")), ("nr_inodes", Some("1")), ("context", Some(label))];
    let attributes = attribute::READ_ONLY | attribute::NO_SUID | attribute::NO_DEV | attribute::NO_EXEC;
    let root = mount::new_filesystem("tmpfs", &options, attributes).step(Step::Filesystem, AT)?;
    mount::attach_at(root.as_fd(), Path::new("/")).step(Step::Root, AT)?;
    mount::pivot(root.as_fd()).step(Step::Root, AT)
}

/// A process's label, and the host's `/proc`, by which it takes that on.
type Label<'a> = (&'a str, BorrowedFd<'a>);

/// Its life. Root of a user namespace needs no other user, and the namespace may map none.
fn live(
    pod: &[(NamespaceKind, OwnedFd)],
    user: u32,
    label: Option<Label<'_>>,
    reporter: &Reporter,
) -> Result<Infallible, LaunchError> {
    launch::join_some(pod, |kind| !matches!(kind, NamespaceKind::Mount | NamespaceKind::User))?;
    let _ = fork::set_process_name("orlop-pause"); // Cosmetic.
    let own_label = label.map(|(_, proc)| open_label(proc)).transpose()?;
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
    // The last step: with the pod's label it could not even say that it is done.
    if let Some(((label, _), mut file)) = label.zip(own_label) {
        file.write_all(label.as_bytes()).map_err(|error| LaunchError::io(Step::Label, &error, label))?;
    }
    process::keep_only(&[], || fork::reap_for_ever())
}

/// The file that takes the label of the process that opens it: no program is executed that could have one.
fn open_label(proc: BorrowedFd<'_>) -> Result<File, LaunchError> {
    const FILE: &str = "self/attr/current";
    let file = openat(proc, FILE, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
    file.map(File::from).map_err(|errno| LaunchError::new(Step::Label, errno, FILE))
}
