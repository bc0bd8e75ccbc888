//! CRI's calls, each a line or two: what they do stands in the modules they name.

use cri::{Error, Items, RuntimeService, v1};
use futures_util::StreamExt as _;

use crate::runtime::Runtime;
use crate::{create, exec, info, list, logs, plugins, run, stats, stop, update, usage};

/// How many items of a list go into one message of a stream, far from gRPC's limit of 16 MiB.
const PART: usize = 64;

/// Hands the parts of a list out one by one.
fn items<T: Send + 'static>(all: Vec<T>) -> Items<T> {
    futures_util::stream::iter(all.into_iter().map(Ok)).boxed()
}

#[async_trait::async_trait]
impl RuntimeService for Runtime {
    async fn version(&self, _: v1::VersionRequest) -> Result<v1::VersionResponse, Error> {
        Ok(info::version())
    }

    async fn run_pod_sandbox(&self, request: v1::RunPodSandboxRequest) -> Result<v1::RunPodSandboxResponse, Error> {
        let pod_sandbox_id = run::run(self.core(), request).await?;
        Ok(v1::RunPodSandboxResponse { pod_sandbox_id })
    }

    async fn stop_pod_sandbox(&self, request: v1::StopPodSandboxRequest) -> Result<v1::StopPodSandboxResponse, Error> {
        stop::sandbox(self.core(), &request.pod_sandbox_id).await?;
        Ok(v1::StopPodSandboxResponse {})
    }

    async fn remove_pod_sandbox(
        &self,
        request: v1::RemovePodSandboxRequest,
    ) -> Result<v1::RemovePodSandboxResponse, Error> {
        stop::remove_sandbox(self.core(), &request.pod_sandbox_id).await?;
        Ok(v1::RemovePodSandboxResponse {})
    }

    async fn pod_sandbox_status(
        &self,
        request: v1::PodSandboxStatusRequest,
    ) -> Result<v1::PodSandboxStatusResponse, Error> {
        info::sandbox(self.core(), &request)
    }

    async fn list_pod_sandbox(&self, request: v1::ListPodSandboxRequest) -> Result<v1::ListPodSandboxResponse, Error> {
        Ok(v1::ListPodSandboxResponse { items: list::sandboxes(self.core(), request.filter) })
    }

    async fn stream_pod_sandboxes(
        &self,
        request: v1::StreamPodSandboxesRequest,
    ) -> Result<Items<v1::StreamPodSandboxesResponse>, Error> {
        let all = list::sandboxes(self.core(), request.filter);
        let parts = all.chunks(PART).map(<[_]>::to_vec);
        Ok(items(parts.map(|pod_sandboxes| v1::StreamPodSandboxesResponse { pod_sandboxes }).collect()))
    }

    async fn create_container(
        &self,
        request: v1::CreateContainerRequest,
    ) -> Result<v1::CreateContainerResponse, Error> {
        let container_id = create::create(self.core(), request).await?;
        Ok(v1::CreateContainerResponse { container_id })
    }

    async fn start_container(&self, request: v1::StartContainerRequest) -> Result<v1::StartContainerResponse, Error> {
        create::start(self.core(), &request.container_id).await?;
        Ok(v1::StartContainerResponse {})
    }

    async fn stop_container(&self, request: v1::StopContainerRequest) -> Result<v1::StopContainerResponse, Error> {
        stop::container(self.core(), &request.container_id, request.timeout).await?;
        Ok(v1::StopContainerResponse {})
    }

    async fn remove_container(
        &self,
        request: v1::RemoveContainerRequest,
    ) -> Result<v1::RemoveContainerResponse, Error> {
        stop::remove_container(self.core(), &request.container_id).await?;
        Ok(v1::RemoveContainerResponse {})
    }

    async fn list_containers(&self, request: v1::ListContainersRequest) -> Result<v1::ListContainersResponse, Error> {
        Ok(v1::ListContainersResponse { containers: list::containers(self.core(), request.filter) })
    }

    async fn stream_containers(
        &self,
        request: v1::StreamContainersRequest,
    ) -> Result<Items<v1::StreamContainersResponse>, Error> {
        let all = list::containers(self.core(), request.filter);
        let parts = all.chunks(PART).map(<[_]>::to_vec);
        Ok(items(parts.map(|containers| v1::StreamContainersResponse { containers }).collect()))
    }

    async fn container_status(
        &self,
        request: v1::ContainerStatusRequest,
    ) -> Result<v1::ContainerStatusResponse, Error> {
        info::container(self.core(), &request).await
    }

    async fn update_container_resources(
        &self,
        request: v1::UpdateContainerResourcesRequest,
    ) -> Result<v1::UpdateContainerResourcesResponse, Error> {
        update::resources(self.core(), request).await?;
        Ok(v1::UpdateContainerResourcesResponse {})
    }

    async fn reopen_container_log(
        &self,
        request: v1::ReopenContainerLogRequest,
    ) -> Result<v1::ReopenContainerLogResponse, Error> {
        logs::reopen(self.core(), &request.container_id).await?;
        Ok(v1::ReopenContainerLogResponse {})
    }

    async fn exec_sync(&self, request: v1::ExecSyncRequest) -> Result<v1::ExecSyncResponse, Error> {
        exec::sync(self.core(), request).await
    }

    async fn exec(&self, request: v1::ExecRequest) -> Result<v1::ExecResponse, Error> {
        let (_, container) = exec::running(self.core(), &request.container_id)?;
        self.streaming().exec(self.via(), v1::ExecRequest { container_id: container.id.clone(), ..request })
    }

    async fn attach(&self, request: v1::AttachRequest) -> Result<v1::AttachResponse, Error> {
        let (_, container) = exec::running(self.core(), &request.container_id)?;
        self.streaming().attach(self.via(), v1::AttachRequest { container_id: container.id.clone(), ..request })
    }

    async fn port_forward(&self, request: v1::PortForwardRequest) -> Result<v1::PortForwardResponse, Error> {
        let sandbox = exec::ready_sandbox(self.core(), &request.pod_sandbox_id)?;
        let request = v1::PortForwardRequest { pod_sandbox_id: sandbox.id.clone(), ..request };
        self.streaming().port_forward(self.via(), request)
    }

    async fn container_stats(&self, request: v1::ContainerStatsRequest) -> Result<v1::ContainerStatsResponse, Error> {
        let stats = usage::container(self.core(), &request.container_id).await?;
        Ok(v1::ContainerStatsResponse { stats: Some(stats) })
    }

    async fn list_container_stats(
        &self,
        request: v1::ListContainerStatsRequest,
    ) -> Result<v1::ListContainerStatsResponse, Error> {
        Ok(v1::ListContainerStatsResponse { stats: usage::containers(self.core(), request.filter).await })
    }

    async fn stream_container_stats(
        &self,
        request: v1::StreamContainerStatsRequest,
    ) -> Result<Items<v1::StreamContainerStatsResponse>, Error> {
        let all = usage::containers(self.core(), request.filter).await;
        let parts = all.chunks(PART).map(<[_]>::to_vec);
        Ok(items(parts.map(|container_stats| v1::StreamContainerStatsResponse { container_stats }).collect()))
    }

    async fn pod_sandbox_stats(
        &self,
        request: v1::PodSandboxStatsRequest,
    ) -> Result<v1::PodSandboxStatsResponse, Error> {
        let stats = usage::sandbox(self.core(), &request.pod_sandbox_id).await?;
        Ok(v1::PodSandboxStatsResponse { stats: Some(stats) })
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: v1::ListPodSandboxStatsRequest,
    ) -> Result<v1::ListPodSandboxStatsResponse, Error> {
        Ok(v1::ListPodSandboxStatsResponse { stats: usage::sandboxes(self.core(), request.filter).await })
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: v1::StreamPodSandboxStatsRequest,
    ) -> Result<Items<v1::StreamPodSandboxStatsResponse>, Error> {
        let all = usage::sandboxes(self.core(), request.filter).await;
        let parts = all.chunks(PART).map(<[_]>::to_vec);
        Ok(items(parts.map(|pod_sandbox_stats| v1::StreamPodSandboxStatsResponse { pod_sandbox_stats }).collect()))
    }

    async fn list_metric_descriptors(
        &self,
        _: v1::ListMetricDescriptorsRequest,
    ) -> Result<v1::ListMetricDescriptorsResponse, Error> {
        Ok(v1::ListMetricDescriptorsResponse { descriptors: stats::descriptors() })
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: v1::ListPodSandboxMetricsRequest,
    ) -> Result<v1::ListPodSandboxMetricsResponse, Error> {
        Ok(v1::ListPodSandboxMetricsResponse { pod_metrics: usage::metrics(self.core()).await })
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _: v1::StreamPodSandboxMetricsRequest,
    ) -> Result<Items<v1::StreamPodSandboxMetricsResponse>, Error> {
        let all = usage::metrics(self.core()).await;
        let parts = all.chunks(PART).map(<[_]>::to_vec);
        Ok(items(
            parts.map(|pod_sandbox_metrics| v1::StreamPodSandboxMetricsResponse { pod_sandbox_metrics }).collect(),
        ))
    }

    async fn update_runtime_config(
        &self,
        _: v1::UpdateRuntimeConfigRequest,
    ) -> Result<v1::UpdateRuntimeConfigResponse, Error> {
        // The pods' subnet is the network's own configuration; upstream's runtimes ignore the request as well unless they
        // write a CNI configuration from it.
        Ok(v1::UpdateRuntimeConfigResponse {})
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: v1::UpdatePodSandboxResourcesRequest,
    ) -> Result<v1::UpdatePodSandboxResourcesResponse, Error> {
        // The pod's control group is the client's; this is only told so that plugins can act on it.
        let sandbox = self.core().table.sandbox(&request.pod_sandbox_id)?;
        plugins::pod_limits(self.core(), &sandbox, &request).await?;
        Ok(v1::UpdatePodSandboxResourcesResponse {})
    }

    async fn status(&self, request: v1::StatusRequest) -> Result<v1::StatusResponse, Error> {
        Ok(info::status(self.core(), request.verbose))
    }

    async fn runtime_config(&self, _: v1::RuntimeConfigRequest) -> Result<v1::RuntimeConfigResponse, Error> {
        let linux = v1::LinuxRuntimeConfiguration { cgroup_driver: v1::CgroupDriver::Cgroupfs.into() };
        Ok(v1::RuntimeConfigResponse { linux: Some(linux) })
    }

    async fn get_container_events(&self, _: v1::GetEventsRequest) -> Result<Items<v1::ContainerEventResponse>, Error> {
        Ok(self.core().bus.listen())
    }
}
