//! OCI runtime spec to `LaunchPlan` (pure), `LaunchPlan` to process (does).
//!
//! ```text
//! oci::Spec ──plan──► LaunchPlan ──encode──► (keeper) ──launch──► clone3 ─► child walks the plan ─► execve
//!                        │ sources                          ▲
//!                        └──prepare::open_sources──► descriptors: root, mounts, control group
//! ```
//!
//! [`plan()`] reads nothing and touches nothing; every choice is made there. [`launch()`] has no choices left: it makes one
//! process in its namespaces and control group and tells what the kernel refused, as step and error number. It is
//! synchronous and **the calling process must have one thread only**: the child goes on with a copy of the caller's
//! memory, in which a lock that another thread held would stay held for ever.
//!
//! No path of a container is resolved by name alone (R1): the root and all bind mounts arrive as detached mounts, their
//! targets are found by `openat2` below the root's descriptor.

mod exec;
#[cfg(test)]
mod fuzz;
pub mod hook;
mod launch;
pub mod namespaces;
pub mod oci;
pub mod plan;
pub mod prepare;
pub mod reaper;
pub mod seccomp;
pub mod wire;

/// Tests hold parsers to a bound of memory.
#[cfg(test)]
#[global_allocator]
static METER: sys::meter::Meter = sys::meter::Meter;

pub use exec::{ExecFds, ExecOptions, ExecPlan, exec, exec_plan, start_exec, start_exec_outside};
pub use launch::{
    Gate, LaunchError, LaunchFds, Launched, Outcome, START_MAX, Starting, Stdio, Step, launch, start, start_outside,
};
pub use plan::{
    HookPlan, HooksPlan, HostFacts, LaunchPlan, PlanError, ProcessPlan, Warning, device_rules, hook_plans,
    in_user_namespace, limits, plan,
};
pub use sys::schedule::Inherited;
pub use wire::DecodeError;
