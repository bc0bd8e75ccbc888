//! The two services of CRI as traits. The node agent calls them in process; [`crate::server`] puts them on a socket.
//!
//! Every method answers `Unimplemented` until its implementer says otherwise, as the CRI allows.

use futures_util::stream::BoxStream;

use crate::error::Error;
use crate::v1;

/// What a streaming call yields: items until the end of the list, or events until the caller goes away.
pub type Items<T> = BoxStream<'static, Result<T, Error>>;

fn unimplemented<T>(call: &'static str) -> Result<T, Error> {
    Err(Error::Unimplemented { call })
}

/// Pod sandboxes, containers, their streams and statistics (CRI `RuntimeService`).
#[async_trait::async_trait]
pub trait RuntimeService: Send + Sync + 'static {
    /// CRI `Version`.
    async fn version(&self, _request: v1::VersionRequest) -> Result<v1::VersionResponse, Error> {
        unimplemented("Version")
    }
    /// CRI `RunPodSandbox`.
    async fn run_pod_sandbox(&self, _request: v1::RunPodSandboxRequest) -> Result<v1::RunPodSandboxResponse, Error> {
        unimplemented("RunPodSandbox")
    }
    /// CRI `StopPodSandbox`.
    async fn stop_pod_sandbox(&self, _request: v1::StopPodSandboxRequest) -> Result<v1::StopPodSandboxResponse, Error> {
        unimplemented("StopPodSandbox")
    }
    /// CRI `RemovePodSandbox`.
    async fn remove_pod_sandbox(
        &self,
        _request: v1::RemovePodSandboxRequest,
    ) -> Result<v1::RemovePodSandboxResponse, Error> {
        unimplemented("RemovePodSandbox")
    }
    /// CRI `PodSandboxStatus`.
    async fn pod_sandbox_status(
        &self,
        _request: v1::PodSandboxStatusRequest,
    ) -> Result<v1::PodSandboxStatusResponse, Error> {
        unimplemented("PodSandboxStatus")
    }
    /// CRI `ListPodSandbox`.
    async fn list_pod_sandbox(&self, _request: v1::ListPodSandboxRequest) -> Result<v1::ListPodSandboxResponse, Error> {
        unimplemented("ListPodSandbox")
    }
    /// CRI `StreamPodSandboxes`.
    async fn stream_pod_sandboxes(
        &self,
        _request: v1::StreamPodSandboxesRequest,
    ) -> Result<Items<v1::StreamPodSandboxesResponse>, Error> {
        unimplemented("StreamPodSandboxes")
    }
    /// CRI `CreateContainer`.
    async fn create_container(
        &self,
        _request: v1::CreateContainerRequest,
    ) -> Result<v1::CreateContainerResponse, Error> {
        unimplemented("CreateContainer")
    }
    /// CRI `StartContainer`.
    async fn start_container(&self, _request: v1::StartContainerRequest) -> Result<v1::StartContainerResponse, Error> {
        unimplemented("StartContainer")
    }
    /// CRI `StopContainer`.
    async fn stop_container(&self, _request: v1::StopContainerRequest) -> Result<v1::StopContainerResponse, Error> {
        unimplemented("StopContainer")
    }
    /// CRI `RemoveContainer`.
    async fn remove_container(
        &self,
        _request: v1::RemoveContainerRequest,
    ) -> Result<v1::RemoveContainerResponse, Error> {
        unimplemented("RemoveContainer")
    }
    /// CRI `ListContainers`.
    async fn list_containers(&self, _request: v1::ListContainersRequest) -> Result<v1::ListContainersResponse, Error> {
        unimplemented("ListContainers")
    }
    /// CRI `StreamContainers`.
    async fn stream_containers(
        &self,
        _request: v1::StreamContainersRequest,
    ) -> Result<Items<v1::StreamContainersResponse>, Error> {
        unimplemented("StreamContainers")
    }
    /// CRI `ContainerStatus`.
    async fn container_status(
        &self,
        _request: v1::ContainerStatusRequest,
    ) -> Result<v1::ContainerStatusResponse, Error> {
        unimplemented("ContainerStatus")
    }
    /// CRI `UpdateContainerResources`.
    async fn update_container_resources(
        &self,
        _request: v1::UpdateContainerResourcesRequest,
    ) -> Result<v1::UpdateContainerResourcesResponse, Error> {
        unimplemented("UpdateContainerResources")
    }
    /// CRI `ReopenContainerLog`.
    async fn reopen_container_log(
        &self,
        _request: v1::ReopenContainerLogRequest,
    ) -> Result<v1::ReopenContainerLogResponse, Error> {
        unimplemented("ReopenContainerLog")
    }
    /// CRI `ExecSync`.
    async fn exec_sync(&self, _request: v1::ExecSyncRequest) -> Result<v1::ExecSyncResponse, Error> {
        unimplemented("ExecSync")
    }
    /// CRI `Exec`.
    async fn exec(&self, _request: v1::ExecRequest) -> Result<v1::ExecResponse, Error> {
        unimplemented("Exec")
    }
    /// CRI `Attach`.
    async fn attach(&self, _request: v1::AttachRequest) -> Result<v1::AttachResponse, Error> {
        unimplemented("Attach")
    }
    /// CRI `PortForward`.
    async fn port_forward(&self, _request: v1::PortForwardRequest) -> Result<v1::PortForwardResponse, Error> {
        unimplemented("PortForward")
    }
    /// CRI `ContainerStats`.
    async fn container_stats(&self, _request: v1::ContainerStatsRequest) -> Result<v1::ContainerStatsResponse, Error> {
        unimplemented("ContainerStats")
    }
    /// CRI `ListContainerStats`.
    async fn list_container_stats(
        &self,
        _request: v1::ListContainerStatsRequest,
    ) -> Result<v1::ListContainerStatsResponse, Error> {
        unimplemented("ListContainerStats")
    }
    /// CRI `StreamContainerStats`.
    async fn stream_container_stats(
        &self,
        _request: v1::StreamContainerStatsRequest,
    ) -> Result<Items<v1::StreamContainerStatsResponse>, Error> {
        unimplemented("StreamContainerStats")
    }
    /// CRI `PodSandboxStats`.
    async fn pod_sandbox_stats(
        &self,
        _request: v1::PodSandboxStatsRequest,
    ) -> Result<v1::PodSandboxStatsResponse, Error> {
        unimplemented("PodSandboxStats")
    }
    /// CRI `ListPodSandboxStats`.
    async fn list_pod_sandbox_stats(
        &self,
        _request: v1::ListPodSandboxStatsRequest,
    ) -> Result<v1::ListPodSandboxStatsResponse, Error> {
        unimplemented("ListPodSandboxStats")
    }
    /// CRI `StreamPodSandboxStats`.
    async fn stream_pod_sandbox_stats(
        &self,
        _request: v1::StreamPodSandboxStatsRequest,
    ) -> Result<Items<v1::StreamPodSandboxStatsResponse>, Error> {
        unimplemented("StreamPodSandboxStats")
    }
    /// CRI `UpdateRuntimeConfig`.
    async fn update_runtime_config(
        &self,
        _request: v1::UpdateRuntimeConfigRequest,
    ) -> Result<v1::UpdateRuntimeConfigResponse, Error> {
        unimplemented("UpdateRuntimeConfig")
    }
    /// CRI `Status`.
    async fn status(&self, _request: v1::StatusRequest) -> Result<v1::StatusResponse, Error> {
        unimplemented("Status")
    }
    /// CRI `CheckpointContainer`.
    async fn checkpoint_container(
        &self,
        _request: v1::CheckpointContainerRequest,
    ) -> Result<v1::CheckpointContainerResponse, Error> {
        unimplemented("CheckpointContainer")
    }
    /// CRI `CheckpointPod`.
    async fn checkpoint_pod(&self, _request: v1::CheckpointPodRequest) -> Result<v1::CheckpointPodResponse, Error> {
        unimplemented("CheckpointPod")
    }
    /// CRI `RestorePod`.
    async fn restore_pod(&self, _request: v1::RestorePodRequest) -> Result<v1::RestorePodResponse, Error> {
        unimplemented("RestorePod")
    }
    /// CRI `GetContainerEvents`.
    async fn get_container_events(
        &self,
        _request: v1::GetEventsRequest,
    ) -> Result<Items<v1::ContainerEventResponse>, Error> {
        unimplemented("GetContainerEvents")
    }
    /// CRI `ListMetricDescriptors`.
    async fn list_metric_descriptors(
        &self,
        _request: v1::ListMetricDescriptorsRequest,
    ) -> Result<v1::ListMetricDescriptorsResponse, Error> {
        unimplemented("ListMetricDescriptors")
    }
    /// CRI `ListPodSandboxMetrics`.
    async fn list_pod_sandbox_metrics(
        &self,
        _request: v1::ListPodSandboxMetricsRequest,
    ) -> Result<v1::ListPodSandboxMetricsResponse, Error> {
        unimplemented("ListPodSandboxMetrics")
    }
    /// CRI `StreamPodSandboxMetrics`.
    async fn stream_pod_sandbox_metrics(
        &self,
        _request: v1::StreamPodSandboxMetricsRequest,
    ) -> Result<Items<v1::StreamPodSandboxMetricsResponse>, Error> {
        unimplemented("StreamPodSandboxMetrics")
    }
    /// CRI `RuntimeConfig`.
    async fn runtime_config(&self, _request: v1::RuntimeConfigRequest) -> Result<v1::RuntimeConfigResponse, Error> {
        unimplemented("RuntimeConfig")
    }
    /// CRI `UpdatePodSandboxResources`.
    async fn update_pod_sandbox_resources(
        &self,
        _request: v1::UpdatePodSandboxResourcesRequest,
    ) -> Result<v1::UpdatePodSandboxResourcesResponse, Error> {
        unimplemented("UpdatePodSandboxResources")
    }
}

/// Images (CRI `ImageService`).
#[async_trait::async_trait]
pub trait ImageService: Send + Sync + 'static {
    /// CRI `ListImages`.
    async fn list_images(&self, _request: v1::ListImagesRequest) -> Result<v1::ListImagesResponse, Error> {
        unimplemented("ListImages")
    }
    /// CRI `StreamImages`.
    async fn stream_images(&self, _request: v1::StreamImagesRequest) -> Result<Items<v1::StreamImagesResponse>, Error> {
        unimplemented("StreamImages")
    }
    /// CRI `ImageStatus`.
    async fn image_status(&self, _request: v1::ImageStatusRequest) -> Result<v1::ImageStatusResponse, Error> {
        unimplemented("ImageStatus")
    }
    /// CRI `PullImage`.
    async fn pull_image(&self, _request: v1::PullImageRequest) -> Result<v1::PullImageResponse, Error> {
        unimplemented("PullImage")
    }
    /// CRI `RemoveImage`.
    async fn remove_image(&self, _request: v1::RemoveImageRequest) -> Result<v1::RemoveImageResponse, Error> {
        unimplemented("RemoveImage")
    }
    /// CRI `ImageFsInfo`.
    async fn image_fs_info(&self, _request: v1::ImageFsInfoRequest) -> Result<v1::ImageFsInfoResponse, Error> {
        unimplemented("ImageFsInfo")
    }
}
