//! Limits of a control group.

use cri::v1;
use executor::oci;

use super::{Host, SpecError};

/// CRI's resources as OCI's. What is zero or empty is not asked for.
///
/// # Errors
/// Negative numbers, and huge pages on a host that cannot limit them.
pub(crate) fn resources(wanted: &v1::LinuxContainerResources, host: &Host) -> Result<oci::Resources, SpecError> {
    let limit = nonzero(wanted.memory_limit_in_bytes);
    Ok(oci::Resources {
        cpu: Some(oci::Cpu {
            shares: positive("cpu_shares", wanted.cpu_shares)?,
            quota: nonzero(wanted.cpu_quota),
            period: positive("cpu_period", wanted.cpu_period)?,
            cpus: wanted.cpuset_cpus.clone(),
            mems: wanted.cpuset_mems.clone(),
            ..oci::Cpu::default()
        }),
        memory: Some(oci::Memory {
            limit,
            // With the same number for memory and swap together a container cannot swap, which is the default. Kernels
            // that cannot limit swap have no file for it, and `sys::cgroup` leaves it out there.
            swap: nonzero(wanted.memory_swap_limit_in_bytes).or(limit),
            ..oci::Memory::default()
        }),
        hugepage_limits: hugepages(&wanted.hugepage_limits, host)?,
        unified: unified(wanted, host)?,
        ..oci::Resources::default()
    })
}

fn nonzero(value: i64) -> Option<i64> {
    (value != 0).then_some(value)
}

fn positive(field: &'static str, value: i64) -> Result<Option<u64>, SpecError> {
    let value = u64::try_from(value).map_err(|_| SpecError::invalid(field, value, "is negative"))?;
    Ok((value != 0).then_some(value))
}

/// Kubelets limit all sizes that a container does not ask for to zero; only what it asks for needs the controller.
fn hugepages(limits: &[v1::HugepageLimit], host: &Host) -> Result<Vec<oci::HugepageLimit>, SpecError> {
    if host.hugetlb {
        let convert =
            |limit: &v1::HugepageLimit| oci::HugepageLimit { page_size: limit.page_size.clone(), limit: limit.limit };
        return Ok(limits.iter().map(convert).collect());
    }
    match limits.iter().find(|limit| limit.limit > 0) {
        None => Ok(Vec::new()),
        Some(limit) => Err(SpecError::Unsupported {
            feature: format!("a limit of {} huge pages", limit.page_size),
            reason: "the hugetlb control group controller is missing; enable it in the kernel",
        }),
    }
}

fn unified(
    wanted: &v1::LinuxContainerResources,
    host: &Host,
) -> Result<std::collections::BTreeMap<String, String>, SpecError> {
    if !wanted.unified.is_empty() && !host.facts.unified_cgroups {
        return Err(SpecError::Unsupported {
            feature: "resources.unified".to_owned(),
            reason: "it names files of control groups of version 2, and this host has version 1",
        });
    }
    let is_file = |name: &&String| !name.is_empty() && !name.contains('/') && !name.starts_with('.');
    if let Some(name) = wanted.unified.keys().find(|name| !is_file(name)) {
        return Err(SpecError::invalid("resources.unified", name, "is no name of a control group's file"));
    }
    Ok(wanted.unified.clone().into_iter().collect())
}
