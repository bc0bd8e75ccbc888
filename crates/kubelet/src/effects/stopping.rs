//! Ending containers and pods.

use std::time::{Duration, Instant};

use cri::v1;
use k8s_openapi::api::core::v1::Container;
use pod::{Change, Run, Stop};

use super::{Job, run_of};
use crate::context::chain;
use crate::probing;
use crate::remains::{self, gone_is_fine};
use crate::retry::Rests;

/// What is left for SIGTERM when preStop has used the whole grace period (upstream's `minimumGracePeriodInSeconds`).
const GRACE_LEAST: Duration = Duration::from_secs(2);
/// How long volumes that do not go hold up the end of their pod.
const VOLUMES_MAX: Duration = Duration::from_secs(10);

impl Job {
    /// preStop, the stop signal, SIGKILL; ends when the run has ended.
    pub(super) async fn stop(&self, stop: &Stop) {
        let Stop { container, id, grace_s, reason, replaces: _ } = stop;
        self.context.normal(&self.pod, "Killing", reason.clone(), Some(container));
        let grace = Duration::from_secs(u64::try_from(*grace_s).unwrap_or(0));
        let begun = Instant::now();
        let spec = pod::spec::container(&self.pod, container).map(|(_, spec)| spec);
        if let Some(spec) = spec.filter(|_| !grace.is_zero() && !self.is_pre_stopped) {
            self.pre_stop(&spec, id, grace).await;
        }
        let left = grace.saturating_sub(begun.elapsed()).max(GRACE_LEAST.min(grace));
        // Rounded up: a second too much is better than one too little.
        let seconds = left.as_secs() + u64::from(left.subsec_nanos() > 0);
        let timeout = i64::try_from(seconds).unwrap_or(i64::MAX);
        let run = self.stopped(id, timeout).await;
        self.change(Change::Exited { container: container.clone(), run });
    }

    async fn pre_stop(&self, container: &Container, id: &str, grace: Duration) {
        let handler = container.lifecycle.as_ref().and_then(|lifecycle| lifecycle.pre_stop.as_ref());
        let Some(handler) = handler else { return };
        let hook = probing::hook(&*self.context.parts.runtime, self.target(container, id), handler, Some(grace));
        let late = |_| Err(format!("it did not end within the grace period of {} s", grace.as_secs()));
        let ended = tokio::time::timeout(grace, hook).await.unwrap_or_else(late);
        // A daemon that takes over from here on does not run it again.
        self.change(Change::PreStopped { container: container.name.clone(), id: id.to_owned() });
        let Err(message) = ended else { return };
        self.context.warning(
            &self.pod,
            "FailedPreStopHook",
            format!("PreStopHook failed: {message}"),
            Some(&container.name),
        );
    }

    /// Asks until the container has ended: a pod whose process may still write must not count as gone.
    async fn stopped(&self, id: &str, timeout: i64) -> Run {
        let runtime = &self.context.parts.runtime;
        let mut rests = Rests::new();
        loop {
            let request = v1::StopContainerRequest { container_id: id.to_owned(), timeout };
            let stopped = gone_is_fine(runtime.stop_container(request).await.map(drop));
            let request = v1::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
            let status = runtime.container_status(request).await;
            match (stopped, status) {
                (_, Ok(v1::ContainerStatusResponse { status: Some(status), .. })) if is_exited(&status) => {
                    return run_of(&self.context, &self.pod, &status).await;
                }
                (_, Err(cri::Error::NotFound { .. })) => return lost(id),
                (Err(message), _) => {
                    tracing::warn!(container = id, message, "a container could not be stopped; trying again");
                }
                (Ok(()), _) => {}
            }
            // The runtime could not do it: there is no event to wait for.
            rests.rest().await;
        }
    }

    /// Takes down what a finished pod no longer needs; its containers stay for their logs until it is deleted.
    pub(super) async fn clean_up(&self) {
        let mut rests = Rests::new();
        while let Err(message) = self.cleaned().await {
            self.context.warning(&self.pod, "FailedKillPod", message, None);
            rests.rest().await;
        }
        self.change(Change::Cleaned);
    }

    async fn cleaned(&self) -> Result<(), String> {
        if let Some(id) = &self.sandbox {
            let request = v1::StopPodSandboxRequest { pod_sandbox_id: id.clone() };
            gone_is_fine(self.context.parts.runtime.stop_pod_sandbox(request).await.map(drop))?;
        }
        self.context.parts.resources.release_claims(self.uid()).await?;
        self.shared.set_volumes(None);
        self.context.parts.volumes.tear_down(self.uid()).await.map_err(|cause| format!("volumes: {cause}"))?;
        self.remove_group().await?;
        self.context.parts.resources.release(self.uid());
        Ok(())
    }

    async fn remove_group(&self) -> Result<(), String> {
        let (groups, pod) = (self.context.parts.groups.clone(), self.pod.clone());
        let begun = Instant::now();
        let removed = tokio::task::spawn_blocking(move || groups.remove_pod(&pod)).await;
        self.context.parts.metrics.group_done("destroy", begun.elapsed());
        removed.map_err(|error| error.to_string())?.map_err(|error| format!("control group: {error}"))
    }

    /// Removes everything of the pod but its object.
    pub(super) async fn purge(&self) {
        let mut rests = Rests::new();
        while let Err(message) = self.purged().await {
            self.context.warning(&self.pod, "FailedKillPod", message, None);
            rests.rest().await;
        }
        self.change(Change::Purged);
    }

    async fn purged(&self) -> Result<(), String> {
        remains::remove_sandboxes(&self.context, self.uid()).await?;
        self.context.parts.resources.release_claims(self.uid()).await?;
        self.remove_group().await?;
        self.context.parts.resources.release(self.uid());
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let metadata = &self.pod.metadata;
        let logs =
            &self.context.config.generate.paths.pod_logs(&text(&metadata.namespace), &text(&metadata.name), self.uid());
        match tokio::fs::remove_dir_all(&logs).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(format!("{}: {error}", logs.display()));
            }
            _ => {}
        }
        self.release_volumes().await;
        self.remove_volumes().await;
        self.context.records.remove(self.uid());
        Ok(())
    }

    /// A pod is kept until its volumes are unmounted that another node may wait for, however long that takes.
    async fn release_volumes(&self) {
        self.shared.set_volumes(None);
        let (volumes, mut rests) = (&self.context.parts.volumes, Rests::new());
        while volumes.holds(self.uid()).await {
            match volumes.release(self.uid()).await {
                Ok(()) => return,
                Err(cause) => {
                    let message = format!("UnmountVolumes failed; the pod stays until it is done: {cause}");
                    self.context.warning(&self.pod, "FailedUnMount", message, None);
                }
            }
            rests.rest().await;
        }
    }

    /// The other volumes are the node's own, and no process of the pod is left to write to them: one that does not go holds
    /// its pod up for some seconds only. The manager sees to it when the worker has gone.
    async fn remove_volumes(&self) {
        self.shared.set_volumes(None);
        let removal = self.context.parts.volumes.tear_down(self.uid());
        let fault = match tokio::time::timeout(VOLUMES_MAX, removal).await {
            Ok(Ok(())) => return self.context.users.release(self.uid()),
            Ok(Err(cause)) => cause.to_string(),
            Err(_) => format!("they are not gone after {} s", VOLUMES_MAX.as_secs()),
        };
        let message = format!("UnmountVolumes failed, which is tried again without the pod: {fault}");
        self.context.warning(&self.pod, "FailedUnMount", message, None);
    }

    /// The last step: the source may forget the pod, once it has its last status. That is what controllers count by.
    pub(super) async fn forget(&self) {
        self.shared.statuses.clone().all().await;
        let mut rests = Rests::new();
        while let Err(error) = self.context.parts.source.delete_pod(self.uid()).await {
            tracing::warn!(uid = self.uid(), error = chain(&error), "a pod cannot be deleted yet; trying again");
            rests.rest().await;
        }
        self.change(Change::Forgotten);
    }
}

fn is_exited(status: &v1::ContainerStatus) -> bool {
    status.state == v1::ContainerState::ContainerExited as i32
}

/// The end of a run that the runtime does not know any more.
fn lost(id: &str) -> Run {
    Run { id: id.to_owned(), finished: Some(k8s_openapi::jiff::Timestamp::now()), ..Run::unknown() }
}
