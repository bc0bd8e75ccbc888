//! A further process in a running container.

use std::os::fd::{BorrowedFd, OwnedFd};

use sys::cgroup::Entry;

use crate::launch::{LaunchError, Launched, Stdio, Step};
use crate::oci;
use crate::plan::{HostFacts, PlanError, ProcessPlan};
use crate::wire::{self, DecodeError};

/// What an exec inherits from its container beside the process itself.
#[derive(Debug, Clone, Copy)]
pub struct ExecOptions<'a> {
    /// The container's configuration: which namespaces it has of its own, its seccomp filter.
    pub container: &'a oci::Spec,
    /// Facts about the host.
    pub facts: &'a HostFacts,
}

/// A process to start in a running container; goes from the daemon to the keeper as bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecPlan {
    /// The process.
    pub process: ProcessPlan,
    /// Namespaces to join, [`sys::process::namespace`].
    pub namespaces: u64,
}

/// The descriptors of an exec.
#[derive(Debug)]
pub struct ExecFds<'a> {
    /// The container's first process; its namespaces are joined.
    pub target: BorrowedFd<'a>,
    /// The control group to enter; absent leaves the process in the caller's.
    pub cgroup: Option<Entry>,
    /// Further descriptors that stay open, none as a rule.
    pub preserve: Vec<OwnedFd>,
}

wire::wire_struct! { ExecPlan { process, namespaces } }

impl ExecPlan {
    /// As bytes, see [`crate::LaunchPlan::encode`].
    pub fn encode(&self) -> Vec<u8> {
        wire::encode(self)
    }

    /// From bytes.
    ///
    /// # Errors
    /// Bytes of another version, or cut off.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        wire::decode(bytes)
    }
}

/// Compiles a process to start in a running container.
///
/// # Errors
/// What is wrong with `process`.
pub fn exec_plan(process: &oci::Process, options: ExecOptions<'_>) -> Result<ExecPlan, PlanError> {
    let _ = (process, options);
    Err(PlanError::Missing("process"))
}

/// Starts the process. It is a child of the caller, which has one thread only.
///
/// # Errors
/// The first step that failed.
pub fn exec(plan: &ExecPlan, fds: ExecFds<'_>, stdio: Stdio) -> Result<Launched, LaunchError> {
    drop((fds, stdio));
    Err(LaunchError { step: Step::Clone, errno: 38, detail: plan.process.cwd.clone() })
}
