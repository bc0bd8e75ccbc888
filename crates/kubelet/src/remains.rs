//! What is left of a pod: sandboxes, claims, volumes, groups, logs. A worker removes it with its pod. What turns up without a
//! worker, because it appeared too late or did not go in time, is removed here.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::Arc;

use cri::v1;

use crate::context::Context;
use crate::generate::label;
use crate::retry::Rests;

/// Removes everything of a pod that has no worker. Tries until nothing is left; done again, it finds nothing.
pub(crate) async fn remove(context: Arc<Context>, uid: String) {
    let mut rests = Rests::new();
    while let Err(message) = removed(&context, &uid).await {
        tracing::warn!(uid, message, "something of a pod that is gone cannot be removed; trying again");
        rests.rest().await;
    }
}

async fn removed(context: &Context, uid: &str) -> Result<(), String> {
    remove_sandboxes(context, uid).await?;
    context.parts.volumes.tear_down(uid).await.map_err(|cause| format!("volumes: {cause}"))?;
    let (groups, logs, owner) =
        (context.parts.groups.clone(), context.config.generate.paths.logs.clone(), uid.to_owned());
    let removed = tokio::task::spawn_blocking(move || {
        groups.remove(&owner).map_err(|error| format!("control group: {error}"))?;
        remove_logs(&logs, &owner).map_err(|error| format!("logs: {error}"))
    });
    removed.await.map_err(|error| error.to_string())??;
    // Last: their driver may never come back.
    context.parts.resources.release_claims(uid).await?;
    context.users.release(uid);
    context.parts.resources.release(uid);
    context.records.remove(uid);
    Ok(())
}

/// Sandboxes of all attempts, with their containers. What is not there need not be removed.
pub(crate) async fn remove_sandboxes(context: &Context, uid: &str) -> Result<(), String> {
    let runtime = &context.parts.runtime;
    let label_selector = HashMap::from([(label::POD_UID.to_owned(), uid.to_owned())]);
    let filter = v1::PodSandboxFilter { label_selector, ..v1::PodSandboxFilter::default() };
    let request = v1::ListPodSandboxRequest { filter: Some(filter) };
    let sandboxes = runtime.list_pod_sandbox(request).await.map_err(|error| error.to_string())?.items;
    for one in sandboxes {
        remove_sandbox(context, &one.id).await?;
    }
    Ok(())
}

/// Stops and removes a sandbox with its containers.
pub(crate) async fn remove_sandbox(context: &Context, id: &str) -> Result<(), String> {
    let (runtime, pod_sandbox_id) = (&context.parts.runtime, id.to_owned());
    let stop = v1::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
    gone_is_fine(runtime.stop_pod_sandbox(stop).await.map(drop))?;
    gone_is_fine(runtime.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id }).await.map(drop))
}

/// What is not there need not be removed.
pub(crate) fn gone_is_fine(outcome: Result<(), cri::Error>) -> Result<(), String> {
    match outcome {
        Ok(()) | Err(cri::Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

/// The directories of a pod's logs, whose names end with its uid: who it was is not known any more.
fn remove_logs(logs: &Path, uid: &str) -> io::Result<()> {
    let end = format!("_{uid}");
    let entries = match std::fs::read_dir(logs) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        if entry.file_name().to_string_lossy().ends_with(&end) {
            std::fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}
