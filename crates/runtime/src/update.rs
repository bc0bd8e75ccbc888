//! New limits for a running container.

use std::sync::Arc;

use cri::{Error, v1};
use executor::oci;
use nri::api::Event;

use crate::container::Phase;
use crate::core::{Core, blocking, failed};
use crate::single::Outcome;
use crate::{plugins, spec};

/// CRI `UpdateContainerResources`: what is not named stays as it is.
pub(crate) async fn resources(core: &Arc<Core>, request: v1::UpdateContainerResourcesRequest) -> Outcome {
    let (sandbox, container) = core.table.container(&request.container_id)?;
    let Some(wanted) = request.linux else { return Ok(()) };
    if container.phase() == Phase::Exited {
        return Err(Error::FailedPrecondition(format!("container {} has ended", container.id)));
    }
    let resources = spec::resources(&wanted, &core.host)?;
    let resources = plugins::limits(core, &sandbox, &container, resources).await?;
    let limits = executor::limits(&resources).map_err(|error| Error::InvalidArgument(error.to_string()))?;
    let fail =
        |error: &(dyn std::error::Error + 'static)| failed("changing the resources of container", &container.id, error);
    match &sandbox.driver {
        None => {
            let group = container.group.clone();
            blocking(move || group.set(&limits)).await.map_err(|error| fail(&error))?;
        }
        Some(driver) if container.phase() >= Phase::Starting => {
            container.reached(Phase::Running).await;
            driver.update(&container.id, &resources).await.map_err(|error| fail(&error))?;
        }
        Some(driver) => {
            driver.put_resources(&container.id, resources).map_err(|error| fail(&error))?;
        }
    }
    let noted = container.update(|record| {
        let mut merged = record.resources.clone().unwrap_or_default();
        merge(&mut merged, wanted);
        record.resources = Some(merged);
    });
    noted.map_err(|error| fail(&error))?;
    plugins::tell(core, Event::PostUpdateContainer, &sandbox, &container).await;
    Ok(())
}

/// Changes the limits of a container as a plugin wants it.
pub(crate) async fn by_plugin(core: &Arc<Core>, id: &str, resources: oci::Resources) -> Outcome {
    let (sandbox, container) = core.table.container(id)?;
    let fail =
        |error: &(dyn std::error::Error + 'static)| failed("changing the resources of container", &container.id, error);
    if container.phase() != Phase::Running {
        return Err(Error::FailedPrecondition(format!("container {} does not run", container.id)));
    }
    match &sandbox.driver {
        Some(driver) => driver.update(&container.id, &resources).await.map_err(|error| fail(&error)),
        None => {
            let limits = executor::limits(&resources).map_err(|error| Error::InvalidArgument(error.to_string()))?;
            let group = container.group.clone();
            blocking(move || group.set(&limits)).await.map_err(|error| fail(&error))
        }
    }
}

/// Zero and empty are "not named" in CRI.
fn merge(known: &mut v1::LinuxContainerResources, new: v1::LinuxContainerResources) {
    let number = |known: &mut i64, new: i64| {
        if new != 0 {
            *known = new;
        }
    };
    number(&mut known.cpu_period, new.cpu_period);
    number(&mut known.cpu_quota, new.cpu_quota);
    number(&mut known.cpu_shares, new.cpu_shares);
    number(&mut known.memory_limit_in_bytes, new.memory_limit_in_bytes);
    number(&mut known.memory_swap_limit_in_bytes, new.memory_swap_limit_in_bytes);
    number(&mut known.oom_score_adj, new.oom_score_adj);
    if !new.cpuset_cpus.is_empty() {
        known.cpuset_cpus = new.cpuset_cpus;
    }
    if !new.cpuset_mems.is_empty() {
        known.cpuset_mems = new.cpuset_mems;
    }
    if !new.hugepage_limits.is_empty() {
        known.hugepage_limits = new.hugepage_limits;
    }
    known.unified.extend(new.unified);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_named_stays() {
        let mut known = v1::LinuxContainerResources { cpu_quota: 1000, cpuset_cpus: "0".into(), ..Default::default() };
        merge(
            &mut known,
            v1::LinuxContainerResources { memory_limit_in_bytes: 7, cpu_quota: -1, ..Default::default() },
        );
        assert_eq!((known.cpu_quota, known.memory_limit_in_bytes, known.cpuset_cpus.as_str()), (-1, 7, "0"));
    }
}
