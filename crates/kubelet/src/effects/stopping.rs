//! Ending containers and pods.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use cri::v1;
use k8s_openapi::api::core::v1::Container;
use pod::{Change, Run, Stop};

use super::{Job, run_of, sandbox};
use crate::generate::label;
use crate::probing;

/// What is left for SIGTERM when preStop has used the whole grace period (upstream's `minimumGracePeriodInSeconds`).
const GRACE_LEAST: Duration = Duration::from_secs(2);
/// How often the end of a container is asked for again when the runtime could not.
const RETRY: Duration = Duration::from_secs(2);

impl Job {
    /// preStop, the stop signal, SIGKILL; ends when the run has ended.
    pub(super) async fn stop(&self, stop: &Stop) {
        let Stop { container, id, grace_s, reason } = stop;
        self.context.normal(&self.pod, "Killing", reason.clone(), Some(container));
        let grace = Duration::from_secs(u64::try_from(*grace_s).unwrap_or(0));
        let begun = Instant::now();
        let spec = pod::spec::container(&self.pod, container).map(|(_, spec)| spec);
        if let Some(spec) = spec.filter(|_| !grace.is_zero()) {
            self.pre_stop(spec, id, grace).await;
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
        let message = match tokio::time::timeout(grace, hook).await {
            Ok(Ok(())) => return,
            Ok(Err(message)) => message,
            Err(_) => format!("it did not end within the grace period of {} s", grace.as_secs()),
        };
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
        loop {
            let request = v1::StopContainerRequest { container_id: id.to_owned(), timeout };
            let stopped = sandbox::gone_is_fine(runtime.stop_container(request).await.map(drop));
            let request = v1::ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
            let status = runtime.container_status(request).await;
            match (stopped, status) {
                (_, Ok(v1::ContainerStatusResponse { status: Some(status), .. })) if is_exited(&status) => {
                    return run_of(&self.context, &self.pod, &status);
                }
                (_, Err(cri::Error::NotFound { .. })) => return lost(id),
                (Err(message), _) => {
                    tracing::warn!(container = id, message, "a container could not be stopped; trying again");
                }
                (Ok(()), _) => {}
            }
            // The runtime could not do it: there is no event to wait for.
            tokio::time::sleep(RETRY).await;
        }
    }

    /// Takes down what a finished or deleted pod no longer needs; its containers stay for their logs until it is deleted.
    pub(super) async fn clean_up(&self) {
        loop {
            match self.cleaned().await {
                Ok(()) => break,
                Err(message) => {
                    self.context.warning(&self.pod, "FailedKillPod", message, None);
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
        self.change(Change::Cleaned);
    }

    async fn cleaned(&self) -> Result<(), String> {
        if self.pod.metadata.deletion_timestamp.is_some() {
            return self.purge().await;
        }
        if let Some(id) = &self.sandbox {
            let request = v1::StopPodSandboxRequest { pod_sandbox_id: id.clone() };
            sandbox::gone_is_fine(self.context.parts.runtime.stop_pod_sandbox(request).await.map(drop))?;
        }
        self.tear_down().await
    }

    async fn tear_down(&self) -> Result<(), String> {
        self.shared.set_volumes(None);
        self.context.parts.volumes.tear_down(self.uid()).await.map_err(|cause| format!("volumes: {cause}"))?;
        let (groups, pod) = (self.context.parts.groups.clone(), self.pod.clone());
        let removed = tokio::task::spawn_blocking(move || groups.remove_pod(&pod)).await;
        removed.map_err(|error| error.to_string())?.map_err(|error| format!("control group: {error}"))
    }

    /// Removes everything of the pod but its object: sandboxes and containers of all attempts, volumes, groups, files.
    async fn purge(&self) -> Result<(), String> {
        let runtime = &self.context.parts.runtime;
        let label_selector = HashMap::from([(label::POD_UID.to_owned(), self.uid().to_owned())]);
        let filter = v1::PodSandboxFilter { label_selector, ..v1::PodSandboxFilter::default() };
        let request = v1::ListPodSandboxRequest { filter: Some(filter) };
        let sandboxes = runtime.list_pod_sandbox(request).await.map_err(|error| error.to_string())?.items;
        for one in sandboxes {
            self.stop_and_remove(&one.id).await?;
        }
        self.tear_down().await?;
        let paths = &self.context.config.generate.paths;
        let metadata = &self.pod.metadata;
        let text = |value: &Option<String>| value.clone().unwrap_or_default();
        let logs = paths.pod_logs(&text(&metadata.namespace), &text(&metadata.name), self.uid());
        match tokio::fs::remove_dir_all(&logs).await {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(format!("{}: {error}", logs.display()));
            }
            _ => {}
        }
        self.context.users.release(self.uid());
        Ok(())
    }

    /// The last step: what a finished pod kept goes, then the source may forget it.
    pub(super) async fn forget(&self) {
        loop {
            let purged = self.purge().await;
            let deleted = match purged {
                Ok(()) => {
                    // First the record: nobody would look for that of a pod which is not there.
                    self.context.records.remove(self.uid());
                    self.context.parts.source.delete_pod(self.uid()).await.map_err(|error| error.to_string())
                }
                Err(message) => Err(message),
            };
            match deleted {
                Ok(()) => return,
                Err(message) => {
                    tracing::warn!(uid = self.uid(), message, "a pod cannot be removed yet; trying again");
                    tokio::time::sleep(RETRY).await;
                }
            }
        }
    }
}

fn is_exited(status: &v1::ContainerStatus) -> bool {
    status.state == v1::ContainerState::ContainerExited as i32
}

/// The end of a run that nobody can tell about any more (upstream's `ContainerStatusUnknown`).
fn lost(id: &str) -> Run {
    Run {
        id: id.to_owned(),
        exit_code: 137,
        reason: "ContainerStatusUnknown".to_owned(),
        message: "The container could not be located when the pod was terminated".to_owned(),
        finished: Some(k8s_openapi::jiff::Timestamp::now()),
        ..Run::default()
    }
}
