//! The work: pods over the CRI, as a kubelet asks for them.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use cri::v1;
use cri::{Client, ImageService as _, RuntimeService as _};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};

use crate::inside::IMAGE;

/// The container's log in the directory of the pod's.
const LOG: &str = "app.log";

/// Asks a runtime for pods.
pub(super) struct Work {
    client: Client,
    cgroup_parent: String,
    logs: PathBuf,
    next: AtomicU32,
}

/// A running pod with one container.
#[derive(Debug, Clone)]
pub(super) struct Pod {
    sandbox: String,
    container: String,
    log: PathBuf,
}

impl Pod {
    /// Where its container's output goes.
    pub(super) fn log(&self) -> &Path {
        &self.log
    }
}

/// How long the steps of a start took.
#[derive(Debug, Clone, Copy)]
pub(super) struct StartTimes {
    pub(super) sandbox: Duration,
    pub(super) create: Duration,
    pub(super) start: Duration,
}

/// How long the steps of an end took.
#[derive(Debug, Clone, Copy)]
pub(super) struct StopTimes {
    pub(super) stop: Duration,
    pub(super) remove: Duration,
}

impl Work {
    pub(super) fn new(client: Client, cgroup_parent: String, logs: PathBuf) -> Self {
        Self { client, cgroup_parent, logs, next: AtomicU32::new(0) }
    }

    /// Whether the runtime says that pods can be started.
    pub(super) async fn is_ready(&self) -> bool {
        let Ok(answer) = self.client.status(v1::StatusRequest::default()).await else { return false };
        let conditions = answer.status.map(|status| status.conditions).unwrap_or_default();
        !conditions.is_empty() && conditions.iter().filter(|one| one.r#type.ends_with("Ready")).all(|one| one.status)
    }

    /// Starts a pod whose container does nothing.
    pub(super) async fn start(&self) -> anyhow::Result<(Pod, StartTimes)> {
        self.start_program(&["sleep", "86400"]).await
    }

    /// Starts a pod whose container runs `program`.
    pub(super) async fn start_program(&self, program: &[&str]) -> anyhow::Result<(Pod, StartTimes)> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let config = self.sandbox_config(number);
        // A kubelet has made it long before.
        std::fs::create_dir_all(&config.log_directory)?;
        let log = Path::new(&config.log_directory).join(LOG);
        let begin = Instant::now();
        let request = v1::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        let sandbox = self.client.run_pod_sandbox(request).await.context("RunPodSandbox")?.pod_sandbox_id;
        let sandbox_took = begin.elapsed();
        let begin = Instant::now();
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: sandbox.clone(),
            config: Some(container_config(program)),
            sandbox_config: Some(config),
        };
        let container = self.client.create_container(request).await.context("CreateContainer")?.container_id;
        let create = begin.elapsed();
        let begin = Instant::now();
        let request = v1::StartContainerRequest { container_id: container.clone() };
        self.client.start_container(request).await.context("StartContainer")?;
        let times = StartTimes { sandbox: sandbox_took, create, start: begin.elapsed() };
        Ok((Pod { sandbox, container, log }, times))
    }

    /// Runs `true` in the pod's container.
    pub(super) async fn exec(&self, pod: &Pod) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let request =
            v1::ExecSyncRequest { container_id: pod.container.clone(), cmd: vec!["true".to_owned()], timeout: 10 };
        let answer = self.client.exec_sync(request).await.context("ExecSync")?;
        ensure!(answer.exit_code == 0, "`true` ended with {}", answer.exit_code);
        Ok(begin.elapsed())
    }

    /// The process of the pod's container, as this process sees it.
    pub(super) async fn process(&self, pod: &Pod) -> anyhow::Result<u32> {
        let request = v1::ContainerStatusRequest { container_id: pod.container.clone(), verbose: true };
        let answer = self.client.container_status(request).await.context("ContainerStatus")?;
        let info: serde_json::Value = serde_json::from_str(answer.info.get("info").context("it tells no more")?)?;
        let pid = info["pid"].as_u64().context("it tells no process")?;
        Ok(u32::try_from(pid)?)
    }

    /// Stops and removes a pod with its container.
    pub(super) async fn stop(&self, pod: &Pod) -> anyhow::Result<StopTimes> {
        let begin = Instant::now();
        let request = v1::StopPodSandboxRequest { pod_sandbox_id: pod.sandbox.clone() };
        self.client.stop_pod_sandbox(request).await.context("StopPodSandbox")?;
        let stop = begin.elapsed();
        let begin = Instant::now();
        let request = v1::RemovePodSandboxRequest { pod_sandbox_id: pod.sandbox.clone() };
        self.client.remove_pod_sandbox(request).await.context("RemovePodSandbox")?;
        Ok(StopTimes { stop, remove: begin.elapsed() })
    }

    /// Starts pods with several on their way at any time.
    pub(super) async fn start_many(&self, count: usize, in_flight: usize) -> anyhow::Result<Vec<Pod>> {
        let starts = stream::iter(0..count).map(|_| self.start()).buffer_unordered(in_flight);
        starts.map_ok(|(pod, _)| pod).try_collect().await
    }

    /// Stops pods with several on their way at any time.
    pub(super) async fn stop_many(&self, pods: &[Pod], in_flight: usize) -> anyhow::Result<()> {
        let stops = stream::iter(pods).map(|pod| self.stop(pod)).buffer_unordered(in_flight);
        stops.try_for_each(|_| std::future::ready(Ok(()))).await
    }

    /// Pulls an image.
    pub(super) async fn pull(&self, image: &str) -> anyhow::Result<Duration> {
        let begin = Instant::now();
        let request = v1::PullImageRequest { image: Some(image_spec(image)), ..Default::default() };
        self.client.pull_image(request).await.with_context(|| format!("PullImage {image}"))?;
        Ok(begin.elapsed())
    }

    /// Removes an image.
    pub(super) async fn remove_image(&self, image: &str) -> anyhow::Result<()> {
        let request = v1::RemoveImageRequest { image: Some(image_spec(image)) };
        self.client.remove_image(request).await.with_context(|| format!("RemoveImage {image}"))?;
        Ok(())
    }

    fn sandbox_config(&self, number: u32) -> v1::PodSandboxConfig {
        let name = format!("bench-{number}");
        v1::PodSandboxConfig {
            hostname: name.clone(),
            log_directory: self.logs.join(&name).display().to_string(),
            linux: Some(v1::LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}/pod{number}", self.cgroup_parent),
                security_context: Some(v1::LinuxSandboxSecurityContext {
                    namespace_options: Some(namespace_options()),
                    seccomp: Some(runtime_default()),
                    ..Default::default()
                }),
                ..Default::default()
            }),
            metadata: Some(v1::PodSandboxMetadata {
                uid: name.clone(),
                name,
                namespace: "bench".to_owned(),
                attempt: 0,
            }),
            ..Default::default()
        }
    }
}

fn container_config(program: &[&str]) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: "app".to_owned(), attempt: 0 }),
        image: Some(image_spec(IMAGE)),
        command: program.iter().map(|word| (*word).to_owned()).collect(),
        log_path: LOG.to_owned(),
        linux: Some(v1::LinuxContainerConfig {
            resources: Some(v1::LinuxContainerResources {
                cpu_shares: 102,
                memory_limit_in_bytes: 64 << 20,
                ..Default::default()
            }),
            security_context: Some(v1::LinuxContainerSecurityContext {
                namespace_options: Some(namespace_options()),
                seccomp: Some(runtime_default()),
                no_new_privs: true,
                ..Default::default()
            }),
        }),
        ..Default::default()
    }
}

fn image_spec(image: &str) -> v1::ImageSpec {
    v1::ImageSpec { image: image.to_owned(), ..Default::default() }
}

/// As a kubelet sets them for a pod that shares nothing with the host.
fn namespace_options() -> v1::NamespaceOption {
    v1::NamespaceOption {
        network: v1::NamespaceMode::Pod.into(),
        pid: v1::NamespaceMode::Container.into(),
        ipc: v1::NamespaceMode::Pod.into(),
        ..Default::default()
    }
}

fn runtime_default() -> v1::SecurityProfile {
    v1::SecurityProfile { profile_type: v1::security_profile::ProfileType::RuntimeDefault.into(), ..Default::default() }
}
