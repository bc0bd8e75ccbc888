//! Making the process that a plan describes.

use std::os::fd::OwnedFd;

use sys::cgroup::Entry;
use sys::process::Child;

use crate::oci::NamespaceKind;
use crate::plan::{LaunchPlan, Warning};

/// The descriptors that a launch needs. Nothing else connects it with the file system of the host.
#[derive(Debug, Default)]
pub struct LaunchFds {
    /// The root file system: a detached mount, or the mount point's descriptor. Absent only for a plan without a mount
    /// namespace of its own.
    pub rootfs: Option<OwnedFd>,
    /// Detached mounts, one for each of [`LaunchPlan::sources`], as [`crate::prepare::open_sources`] makes them.
    pub mounts: Vec<OwnedFd>,
    /// The namespaces to join, one for each of [`LaunchPlan::joins`]; the order does not matter.
    pub namespaces: Vec<(NamespaceKind, OwnedFd)>,
    /// The control group; absent leaves the process in the caller's.
    pub cgroup: Option<Entry>,
}

/// The standard streams of a process.
#[derive(Debug)]
pub enum Stdio {
    /// These three. What is absent is `/dev/null`.
    Streams {
        /// Standard input.
        stdin: Option<OwnedFd>,
        /// Standard output.
        stdout: Option<OwnedFd>,
        /// Standard error.
        stderr: Option<OwnedFd>,
    },
    /// A new pseudo terminal of the container's own `devpts`, controlling; [`Launched::terminal`] is its master.
    Terminal {
        /// Rows, 0 leaves the size unset.
        rows: u16,
        /// Columns.
        columns: u16,
    },
}

/// A process that runs, or waits at its gate.
#[derive(Debug)]
pub struct Launched {
    /// The process, a child of the caller: who launches it reaps it.
    pub child: Child,
    /// The master of its terminal.
    pub terminal: Option<OwnedFd>,
    /// Present when the plan has a gate: everything is set up, the program does not run yet.
    pub gate: Option<Gate>,
    /// What could not be done as asked although the process runs.
    pub warnings: Vec<Warning>,
}

/// A process that is ready and waits before exec: OCI's state *created*. Dropping it ends the process.
#[derive(Debug)]
pub struct Gate {
    pub(crate) channel: OwnedFd,
}

impl Gate {
    /// Lets the process exec its program: OCI's *start*.
    ///
    /// # Errors
    /// The program could not be executed; the process has ended.
    pub fn open(self) -> Result<(), LaunchError> {
        Err(LaunchError { step: Step::Execute, errno: 38, detail: String::new() })
    }
}

/// Steps of a launch, in about the order in which they are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
#[allow(missing_docs, reason = "`Display` says what each one is")]
pub enum Step {
    Protocol = 1,
    Clone,
    JoinCgroup,
    Rlimit,
    OomScore,
    JoinNamespace,
    NewNamespaces,
    Session,
    Hostname,
    MakeFilesystem,
    AttachRoot,
    ChangeRoot,
    MountTarget,
    Mount,
    Device,
    Terminal,
    MaskPath,
    ReadonlyPath,
    Sysctl,
    RootAttributes,
    WorkingDirectory,
    Streams,
    Capabilities,
    User,
    NoNewPrivileges,
    Seccomp,
    ParentDeath,
    Execute,
}

impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{self:?}")
    }
}

/// Why there is no process. Nothing of it remains.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{step}: {detail}: {}", std::io::Error::from_raw_os_error(*errno))]
pub struct LaunchError {
    /// What was being done.
    pub step: Step,
    /// The kernel's reason.
    pub errno: i32,
    /// The object: a mount's target, a sysctl, the program.
    pub detail: String,
}

/// Makes the process of `plan`. Without a gate it answers when the program has been executed.
///
/// The caller has one thread, see the crate's documentation.
///
/// # Errors
/// The first step that failed.
pub fn launch(plan: &LaunchPlan, fds: LaunchFds, stdio: Stdio) -> Result<Launched, LaunchError> {
    drop((fds, stdio));
    Err(LaunchError { step: Step::Clone, errno: 38, detail: plan.process.cwd.clone() })
}
