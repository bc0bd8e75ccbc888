//! Compiling an OCI configuration: everything is decided here, from values, without touching the host.

mod codec;
mod facts;
mod hooks;
mod mounts;
mod process;
mod resources;
mod root;
mod types;

pub use facts::{HostFacts, in_user_namespace};
pub use hooks::hook_plans;
pub use resources::{device_rules, limits};
pub use types::*;

pub(crate) use process::{command, cpu_words, mask_of, process};

use sys::process::namespace;

use crate::oci::{self, NamespaceKind};

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

impl PlanError {
    pub(crate) fn invalid(field: &'static str, value: impl ToString, problem: &'static str) -> Self {
        Self::Invalid { field, value: value.to_string(), problem }
    }
}

/// Compiles a configuration. Pure: the same arguments give the same plan.
///
/// # Errors
/// The first field that cannot be honoured.
pub fn plan(spec: &oci::Spec, facts: &HostFacts) -> Result<LaunchPlan, PlanError> {
    let linux = spec.linux.clone().unwrap_or_default();
    let mut warnings = Vec::new();
    let own = own_namespaces(&linux);
    let has_names = linux.namespaces.iter().any(|one| one.kind == NamespaceKind::Uts);
    require(has_names || spec.hostname.is_empty(), "hostname", &spec.hostname)?;
    require(has_names || spec.domainname.is_empty(), "domainname", &spec.domainname)?;
    let mut process = process(spec.process.as_ref(), linux.seccomp.as_ref(), facts, &mut warnings)?;
    process.personality = linux.personality.as_ref().map(process::personality).transpose()?;
    let mut sources = Vec::new();
    let root = if own & namespace::MOUNT == 0 {
        None
    } else {
        Some(root::root(spec, &linux, facts, process.terminal, &mut sources)?)
    };
    Ok(LaunchPlan {
        process,
        new_namespaces: own,
        joins: joined_namespaces(&linux),
        hostname: (!spec.hostname.is_empty()).then(|| spec.hostname.clone()),
        domainname: (!spec.domainname.is_empty()).then(|| spec.domainname.clone()),
        root,
        sources,
        sysctls: linux.sysctl.into_iter().collect(),
        time_offsets: time_offsets(&linux.time_offsets, own)?,
        hooks: HooksPlan::default(),
        halts: false,
        gate: false,
        dies_with_parent: true,
        warnings,
    })
}

fn time_offsets(
    offsets: &std::collections::BTreeMap<String, oci::TimeOffset>,
    own: u64,
) -> Result<Vec<TimeOffset>, PlanError> {
    let plan = |(clock, offset): (&String, &oci::TimeOffset)| match clock.as_str() {
        "monotonic" | "boottime" if own & namespace::TIME != 0 => {
            Ok(TimeOffset { clock: clock.clone(), secs: offset.secs, nanosecs: offset.nanosecs })
        }
        "monotonic" | "boottime" => {
            Err(PlanError::invalid("linux.timeOffsets", clock, "needs a time namespace of the container's own"))
        }
        _ => Err(PlanError::invalid("linux.timeOffsets", clock, "is none of monotonic and boottime")),
    };
    offsets.iter().map(plan).collect()
}

fn require(holds: bool, field: &'static str, value: &str) -> Result<(), PlanError> {
    if holds { Ok(()) } else { Err(PlanError::invalid(field, value, "needs a UTS namespace")) }
}

/// Namespaces that are made with the process. A user namespace never is: others have to be owned by it.
fn own_namespaces(linux: &oci::Linux) -> u64 {
    let fresh = linux.namespaces.iter().filter(|one| one.path.is_empty() && one.kind != NamespaceKind::User);
    fresh.fold(0, |bits, one| bits | mask_of(one.kind))
}

fn joined_namespaces(linux: &oci::Linux) -> Vec<NamespaceKind> {
    let joined = linux.namespaces.iter().filter(|one| !one.path.is_empty() || one.kind == NamespaceKind::User);
    joined.map(|one| one.kind).collect()
}

#[cfg(test)]
mod tests;
