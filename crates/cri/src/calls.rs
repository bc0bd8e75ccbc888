//! All calls of CRI as two tables, from which the gRPC server and the gRPC client are made.
//!
//! Each line: the call's name, our method, its request and what it answers; a streaming call also has the name that the
//! generated code gives to the type of its stream. `runtime_calls! { make! { prefix } }` is `make! { prefix table }`.

/// The calls of `RuntimeService`.
#[rustfmt::skip]
macro_rules! runtime_calls {
    ($make:ident! { $($prefix:tt)* }) => {
        $make! {
            $($prefix)*
            unary {
                Version = version(VersionRequest) -> VersionResponse;
                RunPodSandbox = run_pod_sandbox(RunPodSandboxRequest) -> RunPodSandboxResponse;
                StopPodSandbox = stop_pod_sandbox(StopPodSandboxRequest) -> StopPodSandboxResponse;
                RemovePodSandbox = remove_pod_sandbox(RemovePodSandboxRequest) -> RemovePodSandboxResponse;
                PodSandboxStatus = pod_sandbox_status(PodSandboxStatusRequest) -> PodSandboxStatusResponse;
                ListPodSandbox = list_pod_sandbox(ListPodSandboxRequest) -> ListPodSandboxResponse;
                CreateContainer = create_container(CreateContainerRequest) -> CreateContainerResponse;
                StartContainer = start_container(StartContainerRequest) -> StartContainerResponse;
                StopContainer = stop_container(StopContainerRequest) -> StopContainerResponse;
                RemoveContainer = remove_container(RemoveContainerRequest) -> RemoveContainerResponse;
                ListContainers = list_containers(ListContainersRequest) -> ListContainersResponse;
                ContainerStatus = container_status(ContainerStatusRequest) -> ContainerStatusResponse;
                UpdateContainerResources = update_container_resources(UpdateContainerResourcesRequest) -> UpdateContainerResourcesResponse;
                ReopenContainerLog = reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse;
                ExecSync = exec_sync(ExecSyncRequest) -> ExecSyncResponse;
                Exec = exec(ExecRequest) -> ExecResponse;
                Attach = attach(AttachRequest) -> AttachResponse;
                PortForward = port_forward(PortForwardRequest) -> PortForwardResponse;
                ContainerStats = container_stats(ContainerStatsRequest) -> ContainerStatsResponse;
                ListContainerStats = list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse;
                PodSandboxStats = pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse;
                ListPodSandboxStats = list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse;
                UpdateRuntimeConfig = update_runtime_config(UpdateRuntimeConfigRequest) -> UpdateRuntimeConfigResponse;
                Status = status(StatusRequest) -> StatusResponse;
                CheckpointContainer = checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse;
                CheckpointPod = checkpoint_pod(CheckpointPodRequest) -> CheckpointPodResponse;
                RestorePod = restore_pod(RestorePodRequest) -> RestorePodResponse;
                ListMetricDescriptors = list_metric_descriptors(ListMetricDescriptorsRequest) -> ListMetricDescriptorsResponse;
                ListPodSandboxMetrics = list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> ListPodSandboxMetricsResponse;
                RuntimeConfig = runtime_config(RuntimeConfigRequest) -> RuntimeConfigResponse;
                UpdatePodSandboxResources = update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest) -> UpdatePodSandboxResourcesResponse;
            }
            streaming {
                StreamPodSandboxes = stream_pod_sandboxes(StreamPodSandboxesRequest) -> StreamPodSandboxesResponse in StreamPodSandboxesStream;
                StreamContainers = stream_containers(StreamContainersRequest) -> StreamContainersResponse in StreamContainersStream;
                StreamContainerStats = stream_container_stats(StreamContainerStatsRequest) -> StreamContainerStatsResponse in StreamContainerStatsStream;
                StreamPodSandboxStats = stream_pod_sandbox_stats(StreamPodSandboxStatsRequest) -> StreamPodSandboxStatsResponse in StreamPodSandboxStatsStream;
                GetContainerEvents = get_container_events(GetEventsRequest) -> ContainerEventResponse in GetContainerEventsStream;
                StreamPodSandboxMetrics = stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest) -> StreamPodSandboxMetricsResponse in StreamPodSandboxMetricsStream;
            }
        }
    };
}

/// The calls of `ImageService`.
#[rustfmt::skip]
macro_rules! image_calls {
    ($make:ident! { $($prefix:tt)* }) => {
        $make! {
            $($prefix)*
            unary {
                ListImages = list_images(ListImagesRequest) -> ListImagesResponse;
                ImageStatus = image_status(ImageStatusRequest) -> ImageStatusResponse;
                PullImage = pull_image(PullImageRequest) -> PullImageResponse;
                RemoveImage = remove_image(RemoveImageRequest) -> RemoveImageResponse;
                ImageFsInfo = image_fs_info(ImageFsInfoRequest) -> ImageFsInfoResponse;
            }
            streaming {
                StreamImages = stream_images(StreamImagesRequest) -> StreamImagesResponse in StreamImagesStream;
            }
        }
    };
}

pub(crate) use {image_calls, runtime_calls};
