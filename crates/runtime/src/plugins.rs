//! Plugins of the Node Resource Interface: what they are told of pods, and what they change of containers.
//!
//! ```text
//! RunPodSandbox ─────► told, before the sandbox is ready; may refuse
//! CreateContainer ───► asked, when all is known of the container; its configuration is changed  (`apply`)
//! StartContainer ────► told, before and after
//! UpdateContainer… ──► asked for the limits
//! Stop, Remove ──────► told
//! ```
//! Without plugins nothing is made for them, but what is too large for those that may come is refused. Who refuses what has happened already is told of in the log.

mod apply;
mod show;

use std::sync::{Arc, Weak};

use async_trait::async_trait;
use cri::Error;
use executor::oci;
use nri::api::{self, Event};
use nri::{Host, PluginError};

use crate::container::{Container, Phase};
use crate::core::{Core, blocking};
use crate::sandbox::{self, Sandbox};
use crate::single::Outcome;
use crate::spec::ContainerSpec;
use crate::{info, update};

pub(crate) use apply::merge;

/// The runtime as plugins see it.
#[derive(Debug)]
pub(crate) struct Seen(pub(crate) Weak<Core>);

fn refused(error: &PluginError) -> Error {
    Error::FailedPrecondition(error.to_string())
}

/// Whether anybody wants to know.
fn nri_of(core: &Core) -> Option<&Arc<nri::Nri>> {
    core.nri.get().filter(|nri| !nri.is_empty())
}

/// Tells of a sandbox that is about to be ready, from now on also those plugins that come in.
pub(crate) async fn run_sandbox(core: &Core, sandbox: &Sandbox) -> Outcome {
    if core.nri.get().is_some() {
        nri::fits(&show::pod(sandbox), None).map_err(|error| refused(&error))?;
    }
    sandbox.live().told = true;
    let Some(nri) = nri_of(core) else { return Ok(()) };
    let told = nri.tell(Event::RunPodSandbox, show::pod(sandbox), None).await;
    told.map_err(|error| refused(&error))
}

/// Tells of what has happened to a sandbox.
pub(crate) async fn tell_of_sandbox(core: &Core, event: Event, sandbox: &Sandbox) {
    let Some(nri) = nri_of(core) else { return };
    if let Err(error) = nri.tell(event, show::pod(sandbox), None).await {
        tracing::warn!(sandbox = sandbox.id, ?event, %error, "an NRI plugin refuses what has happened");
    }
}

/// Asks plugins what a container that is being made should be, and changes it so.
pub(crate) async fn create(
    core: &Arc<Core>,
    sandbox: &Sandbox,
    container: &Container,
    spec: &mut ContainerSpec,
) -> Outcome {
    let Some(nri) = core.nri.get() else { return Ok(()) };
    let (pod, shown) = (show::pod(sandbox), show::container(container, Some(&spec.oci)));
    nri::fits(&pod, Some(&shown)).map_err(|error| refused(&error))?;
    if nri.is_empty() {
        return Ok(());
    }
    let creation = nri.create_container(&pod, shown).await.map_err(|error| refused(&error))?;
    apply::adjust(spec, &creation.adjust, &core.host)?;
    // What they have made of it is what others are told.
    let shown = show::container(container, Some(&spec.oci));
    nri::fits(&pod, Some(&shown)).map_err(|error| refused(&error))?;
    change_others(core, creation.updates).await;
    Ok(())
}

/// Tells of a container that is about to start.
pub(crate) async fn start(core: &Core, sandbox: &Sandbox, container: &Container) -> Outcome {
    let Some(nri) = nri_of(core) else { return Ok(()) };
    let told = nri.tell(Event::StartContainer, show::pod(sandbox), Some(whole(sandbox, container).await)).await;
    told.map_err(|error| refused(&error))
}

/// Tells of what has happened to a container.
pub(crate) async fn tell(core: &Core, event: Event, sandbox: &Sandbox, container: &Container) {
    let Some(nri) = nri_of(core) else { return };
    let told = nri.tell(event, show::pod(sandbox), Some(whole(sandbox, container).await)).await;
    if let Err(error) = told {
        tracing::warn!(container = container.id, ?event, %error, "an NRI plugin refuses what has happened");
    }
}

/// Tells that a container has ended, and does to others what plugins want then.
pub(crate) async fn stopped(core: &Arc<Core>, sandbox: &Sandbox, container: &Container) {
    let Some(nri) = nri_of(core) else { return };
    match nri.stop_container(show::pod(sandbox), whole(sandbox, container).await).await {
        Ok(updates) => change_others(core, updates).await,
        Err(error) => {
            tracing::warn!(container = container.id, %error, "an NRI plugin refuses that a container was stopped");
        }
    }
}

/// What new limits of a container are to be.
pub(crate) async fn limits(
    core: &Arc<Core>,
    sandbox: &Sandbox,
    container: &Container,
    wanted: oci::Resources,
) -> Result<oci::Resources, Error> {
    let Some(nri) = nri_of(core) else { return Ok(wanted) };
    let shown = whole(sandbox, container).await;
    let asked = nri.update_container(&show::pod(sandbox), &shown, show::resources(&wanted)).await;
    let (resources, others) = asked.map_err(|error| refused(&error))?;
    let limits = apply::resources(&resources)?;
    change_others(core, others).await;
    Ok(oci::Resources { devices: wanted.devices, ..limits })
}

/// New limits of a pod as a whole, which its control group has from whoever made it.
pub(crate) async fn pod_limits(
    core: &Core,
    sandbox: &Sandbox,
    request: &cri::v1::UpdatePodSandboxResourcesRequest,
) -> Outcome {
    let Some(nri) = nri_of(core) else { return Ok(()) };
    let converted = |resources: &Option<cri::v1::LinuxContainerResources>| {
        resources
            .as_ref()
            .map(|one| crate::spec::resources(one, &core.host).map(|one| show::resources(&one)))
            .transpose()
    };
    let request = api::UpdatePodSandboxRequest {
        pod: Some(show::pod(sandbox)),
        overhead_linux_resources: converted(&request.overhead)?,
        linux_resources: converted(&request.resources)?,
    };
    nri.update_pod(&request).await.map_err(|error| refused(&error))?;
    tell_of_sandbox(core, Event::PostUpdatePodSandbox, sandbox).await;
    Ok(())
}

/// A container with its configuration, from its record.
async fn whole(sandbox: &Sandbox, container: &Container) -> api::Container {
    let (records, id) = (sandbox.records.clone(), container.id.clone());
    let spec = blocking(move || {
        let json = records.spec(&id).ok()?; // It has none yet, or is being removed.
        serde_json::from_slice::<ContainerSpec>(&json).ok()
    });
    show::container(container, spec.await.as_ref().map(|spec| &spec.oci))
}

/// Changes other containers as plugins want it; those that could not be changed.
async fn change(core: &Arc<Core>, updates: Vec<api::ContainerUpdate>) -> Vec<(api::ContainerUpdate, Error)> {
    let mut failed = Vec::new();
    for one in updates {
        let resources = one.linux.as_ref().and_then(|linux| linux.resources.as_ref());
        let changed = match resources.map(apply::resources) {
            None => Ok(()),
            Some(Err(error)) => Err(error.into()),
            Some(Ok(resources)) => update::by_plugin(core, &one.container_id, resources).await,
        };
        failed.extend(changed.err().map(|error| (one, error)));
    }
    failed
}

async fn change_others(core: &Arc<Core>, updates: Vec<api::ContainerUpdate>) {
    for (one, error) in change(core, updates).await {
        if !one.ignore_failure {
            tracing::warn!(container = one.container_id, %error, "a container cannot be changed as an NRI plugin wants it");
        }
    }
}

#[async_trait]
impl Host for Seen {
    fn identity(&self) -> (String, String) {
        let version = info::version();
        (version.runtime_name, version.runtime_version)
    }

    async fn list(&self) -> (Vec<api::PodSandbox>, Vec<api::Container>) {
        let Some(core) = self.0.upgrade() else { return Default::default() };
        let (mut pods, mut containers) = (Vec::new(), Vec::new());
        for sandbox in core.table.every_sandbox() {
            let is_known = {
                let live = sandbox.live();
                live.told || !matches!(live.phase, sandbox::Phase::Making | sandbox::Phase::Gone)
            };
            if !is_known {
                continue;
            }
            pods.push(show::pod(&sandbox));
            for container in sandbox.containers().iter().filter(|one| one.phase() != Phase::Making && !one.is_gone()) {
                containers.push(whole(&sandbox, container).await);
            }
        }
        (pods, containers)
    }

    async fn update(&self, updates: Vec<api::ContainerUpdate>) -> Vec<api::ContainerUpdate> {
        let Some(core) = self.0.upgrade() else { return updates };
        change(&core, updates).await.into_iter().map(|(update, _)| update).collect()
    }
}
