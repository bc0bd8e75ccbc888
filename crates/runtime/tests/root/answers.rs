//! What clients are told: lists and their streams, the runtime's own state, details, and what is not there.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use cri::{Error, Items, RuntimeService as _, v1};
use futures_util::StreamExt as _;
use serde_json::Value;
use testkit::serial::Test;

use crate::fixture::{IMAGE, Node, on_a_node, script_config};

pub(crate) const TESTS: &[Test] = &[
    ("streams_tell_what_lists_tell", streams_tell_what_lists_tell),
    ("lists_are_filtered", lists_are_filtered),
    ("the_runtime_tells_of_itself", the_runtime_tells_of_itself),
    ("details_are_told_on_request", details_are_told_on_request),
    ("a_status_says_what_was_asked_for", a_status_says_what_was_asked_for),
    ("what_is_not_there", what_is_not_there),
    ("limits_change_while_a_container_runs", limits_change_while_a_container_runs),
    ("a_renamed_log_is_left_alone", a_renamed_log_is_left_alone),
];

/// More than fit into one message of a stream.
const MANY: usize = 65;

async fn all<T>(stream: Result<Items<T>, Error>) -> Vec<T> {
    stream.unwrap().map(Result::unwrap).collect().await
}

/// A sandbox with containers that were not started.
async fn made(node: &Node, name: &str, count: usize) -> (String, Vec<String>) {
    let config = node.sandbox_config(name);
    let sandbox = node.run_sandbox(&config).await.unwrap();
    let mut containers = Vec::new();
    for number in 0..count {
        let request = script_config(&format!("main-{number}"), "true");
        containers.push(node.create(&sandbox, &config, request).await.unwrap());
    }
    (sandbox, containers)
}

/// Each of the six lists comes in parts as well, of which none is empty and which together are the list.
fn streams_tell_what_lists_tell() {
    on_a_node(|node| async {
        let (_, containers) = made(&node, "many", MANY).await;
        let pod = node.pod("one", "sleep 1000").await;
        let runtime = &node.runtime;
        let listed = runtime.list_containers(v1::ListContainersRequest::default()).await.unwrap().containers;
        let parts = all(runtime.stream_containers(v1::StreamContainersRequest::default()).await).await;
        assert!(parts.len() > 1 && parts.iter().all(|part| !part.containers.is_empty()));
        let streamed: Vec<v1::Container> = parts.into_iter().flat_map(|part| part.containers).collect();
        let ids = |list: &[v1::Container]| list.iter().map(|one| one.id.clone()).collect::<BTreeSet<_>>();
        assert_eq!((streamed.len(), ids(&streamed)), (MANY + 1, ids(&listed)));
        assert!(containers.iter().all(|id| ids(&streamed).contains(id)));

        let listed = runtime.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap().items;
        let parts = all(runtime.stream_pod_sandboxes(v1::StreamPodSandboxesRequest::default()).await).await;
        let streamed: Vec<v1::PodSandbox> = parts.into_iter().flat_map(|part| part.pod_sandboxes).collect();
        let ids = |list: &[v1::PodSandbox]| list.iter().map(|one| one.id.clone()).collect::<BTreeSet<_>>();
        assert_eq!((streamed.len(), ids(&streamed)), (2, ids(&listed)));

        let parts = all(runtime.stream_container_stats(v1::StreamContainerStatsRequest::default()).await).await;
        let stats: Vec<v1::ContainerStats> = parts.into_iter().flat_map(|part| part.container_stats).collect();
        assert!(stats.iter().any(|one| one.attributes.as_ref().is_some_and(|one| one.id == pod.container)));
        let parts = all(runtime.stream_pod_sandbox_stats(v1::StreamPodSandboxStatsRequest::default()).await).await;
        let stats: Vec<v1::PodSandboxStats> = parts.into_iter().flat_map(|part| part.pod_sandbox_stats).collect();
        assert!(stats.iter().any(|one| one.attributes.as_ref().is_some_and(|one| one.id == pod.sandbox)));
        let parts = all(runtime.stream_pod_sandbox_metrics(v1::StreamPodSandboxMetricsRequest::default()).await).await;
        let metrics: Vec<v1::PodSandboxMetrics> = parts.into_iter().flat_map(|part| part.pod_sandbox_metrics).collect();
        let of_pod = metrics.iter().find(|one| one.pod_sandbox_id == pod.sandbox).unwrap();
        let described = runtime.list_metric_descriptors(v1::ListMetricDescriptorsRequest::default()).await.unwrap();
        let described: BTreeSet<String> = described.descriptors.into_iter().map(|one| one.name).collect();
        let of_container = of_pod.container_metrics.iter().flat_map(|one| &one.metrics);
        let names: BTreeSet<&String> = of_pod.metrics.iter().chain(of_container).map(|one| &one.name).collect();
        assert!(!names.is_empty());
        assert!(names.iter().all(|name| described.contains(*name)), "{names:?} are in {described:?}");
        node
    });
}

fn lists_are_filtered() {
    on_a_node(|node| async {
        let (other, made) = made(&node, "made", 1).await;
        let pod = node.pod("runs", "sleep 1000").await;
        let containers = async |filter: v1::ContainerFilter| {
            let request = v1::ListContainersRequest { filter: Some(filter) };
            let listed = node.runtime.list_containers(request).await.unwrap().containers;
            listed.into_iter().map(|one| one.id).collect::<Vec<_>>()
        };
        let state = |state: v1::ContainerState| Some(v1::ContainerStateValue { state: state.into() });
        let label = |key: &str, value: &str| HashMap::from([(key.to_owned(), value.to_owned())]);
        let running = v1::ContainerFilter { state: state(v1::ContainerState::ContainerRunning), ..Default::default() };
        assert_eq!(containers(running).await, [pod.container.as_str()]);
        let of_sandbox = v1::ContainerFilter { pod_sandbox_id: other.clone(), ..Default::default() };
        assert_eq!(containers(of_sandbox).await, made);
        let by_prefix = v1::ContainerFilter { id: pod.container[..12].to_owned(), ..Default::default() };
        assert_eq!(containers(by_prefix).await, [pod.container.as_str()]);
        let labelled = v1::ContainerFilter { label_selector: label("container", "main"), ..Default::default() };
        assert_eq!(containers(labelled).await, [pod.container.as_str()]);
        let both = v1::ContainerFilter {
            label_selector: label("container", "main"),
            pod_sandbox_id: other.clone(),
            ..Default::default()
        };
        assert!(containers(both).await.is_empty());

        node.stop_sandbox(&other).await.unwrap();
        let sandboxes = async |filter: v1::PodSandboxFilter| {
            let request = v1::ListPodSandboxRequest { filter: Some(filter) };
            let listed = node.runtime.list_pod_sandbox(request).await.unwrap().items;
            listed.into_iter().map(|one| one.id).collect::<Vec<_>>()
        };
        let state = |state: v1::PodSandboxState| Some(v1::PodSandboxStateValue { state: state.into() });
        let ready = v1::PodSandboxFilter { state: state(v1::PodSandboxState::SandboxReady), ..Default::default() };
        assert_eq!(sandboxes(ready).await, [pod.sandbox.as_str()]);
        let stopped = v1::PodSandboxFilter { state: state(v1::PodSandboxState::SandboxNotready), ..Default::default() };
        assert_eq!(sandboxes(stopped).await, [other.as_str()]);
        let labelled = v1::PodSandboxFilter { label_selector: label("app", "runs"), ..Default::default() };
        assert_eq!(sandboxes(labelled).await, [pod.sandbox.as_str()]);
        let by_prefix = v1::PodSandboxFilter { id: other[..12].to_owned(), ..Default::default() };
        assert_eq!(sandboxes(by_prefix).await, [other]);
        node
    });
}

fn the_runtime_tells_of_itself() {
    on_a_node(|node| async {
        let runtime = &node.runtime;
        let version = runtime.version(v1::VersionRequest::default()).await.unwrap();
        assert_eq!((version.runtime_name.as_str(), version.runtime_api_version.as_str()), ("orlop", "v1"));
        let config = runtime.runtime_config(v1::RuntimeConfigRequest::default()).await.unwrap();
        // Zero is systemd's driver: only a word is an answer.
        assert_eq!(config.linux.unwrap().cgroup_driver(), v1::CgroupDriver::Cgroupfs);
        let brief = runtime.status(v1::StatusRequest { verbose: false }).await.unwrap();
        let conditions = brief.status.unwrap().conditions;
        let ready: Vec<(&str, bool)> = conditions.iter().map(|one| (one.r#type.as_str(), one.status)).collect();
        assert_eq!(ready, [("RuntimeReady", true), ("NetworkReady", true)]);
        let default = brief.runtime_handlers.iter().find(|handler| handler.name.is_empty()).unwrap();
        assert!(default.features.unwrap().recursive_read_only_mounts);
        assert!(brief.features.unwrap().supplemental_groups_policy && brief.info.is_empty());
        let verbose = runtime.status(v1::StatusRequest { verbose: true }).await.unwrap();
        let config: Value = serde_json::from_str(&verbose.info["config"]).unwrap();
        assert_eq!(config["runDir"], node.places.run.to_str().unwrap());
        let network = v1::RuntimeConfig { network_config: Some(v1::NetworkConfig { pod_cidr: "10.1.2.0/24".into() }) };
        let request = v1::UpdateRuntimeConfigRequest { runtime_config: Some(network) };
        runtime.update_runtime_config(request).await.unwrap();
        node
    });
}

fn details_are_told_on_request() {
    on_a_node(|node| async {
        let pod = node.pod("details", "sleep 1000").await;
        let request = |verbose| v1::ContainerStatusRequest { container_id: pod.container.clone(), verbose };
        let brief = node.runtime.container_status(request(false)).await.unwrap();
        assert!(brief.info.is_empty());
        let verbose = node.runtime.container_status(request(true)).await.unwrap();
        let info: Value = serde_json::from_str(&verbose.info["info"]).unwrap();
        // The kernel tells of a new program before that has its words.
        let command = async {
            loop {
                let command = std::fs::read(format!("/proc/{}/cmdline", info["pid"])).unwrap();
                if command.starts_with(b"sleep\0") || command.starts_with(b"sh\0") {
                    break;
                }
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), command).await.expect("it is the container's process");
        assert_eq!(info["sandboxID"], *pod.sandbox);
        assert_eq!(info["runtimeSpec"]["process"]["args"][0], "sh");

        let request = |verbose| v1::PodSandboxStatusRequest { pod_sandbox_id: pod.sandbox.clone(), verbose };
        let brief = node.runtime.pod_sandbox_status(request(false)).await.unwrap();
        assert!(brief.info.is_empty() && brief.timestamp > 0);
        let states: Vec<_> = brief.containers_statuses.iter().map(|one| (one.id.as_str(), one.state())).collect();
        assert_eq!(states, [(pod.container.as_str(), v1::ContainerState::ContainerRunning)]);
        let verbose = node.runtime.pod_sandbox_status(request(true)).await.unwrap();
        let info: Value = serde_json::from_str(&verbose.info["info"]).unwrap();
        assert!(std::path::Path::new(&format!("/proc/{}", info["pid"])).exists(), "{info}");
        node
    });
}

/// As upstream's kubelet makes them: the image by its id, and beside it as the pod has it.
fn a_status_says_what_was_asked_for() {
    on_a_node(|node| async {
        let notes = HashMap::from([("b".to_owned(), "two\nlines".to_owned()), ("a".to_owned(), String::new())]);
        let pid = v1::NamespaceMode::Container.into();
        let namespaces = v1::NamespaceOption { pid, ..Default::default() };
        let security =
            v1::LinuxSandboxSecurityContext { namespace_options: Some(namespaces.clone()), ..Default::default() };
        let mut config = node.sandbox_config("told");
        config.annotations = notes.clone();
        config.linux = Some(v1::LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() });
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let status = node.sandbox_status(&sandbox).await;
        assert_eq!((&status.annotations, &status.labels), (&notes, &config.labels));
        assert_eq!(status.linux.unwrap().namespaces.unwrap().options.unwrap(), namespaces);

        let image = node.images.get(IMAGE).unwrap();
        let linux = v1::LinuxContainerConfig {
            resources: Some(v1::LinuxContainerResources {
                cpu_period: 100_000,
                cpu_quota: 50_000,
                cpu_shares: 512,
                memory_limit_in_bytes: 64 << 20,
                ..Default::default()
            }),
            security_context: Some(v1::LinuxContainerSecurityContext {
                run_as_user: Some(v1::Int64Value { value: 1000 }),
                run_as_group: Some(v1::Int64Value { value: 2000 }),
                supplemental_groups: vec![3000],
                ..Default::default()
            }),
        };
        let request = v1::ContainerConfig {
            image: Some(v1::ImageSpec {
                image: image.id.to_string(),
                user_specified_image: "busybox".to_owned(),
                ..Default::default()
            }),
            annotations: notes.clone(),
            linux: Some(linux.clone()),
            stop_signal: v1::Signal::Sigusr1.into(),
            ..script_config("main", "true")
        };
        let container = node.create(&sandbox, &config, request).await.unwrap();
        let status = node.status(&container).await;
        assert_eq!(status.image.unwrap().image, "busybox");
        assert_eq!(status.image_id, image.id.to_string());
        assert!(status.image_ref == status.image_id || status.image_ref.contains("@sha256:"), "{}", status.image_ref);
        assert_eq!((status.annotations, status.stop_signal), (notes, v1::Signal::Sigusr1.into()));
        let user = status.user.unwrap().linux.unwrap();
        assert_eq!((user.uid, user.gid, user.supplemental_groups), (1000, 2000, vec![2000, 3000]));
        let told = status.resources.unwrap().linux.unwrap();
        let figures =
            |of: &v1::LinuxContainerResources| (of.cpu_period, of.cpu_quota, of.cpu_shares, of.memory_limit_in_bytes);
        assert_eq!(figures(&told), figures(&linux.resources.unwrap()));
        let by_name = node.create(&sandbox, &config, script_config("other", "true")).await.unwrap();
        assert_eq!(node.status(&by_name).await.image.unwrap().image, IMAGE, "as it was asked for");
        node
    });
}

fn is_unknown<T>(answer: Result<T, Error>) -> bool {
    matches!(answer, Err(Error::NotFound { .. }))
}

fn what_is_not_there() {
    on_a_node(|node| async {
        let runtime = &node.runtime;
        let nobody = || "nobody".to_owned();
        node.stop_container("nobody", 0).await.unwrap();
        node.remove_container("nobody").await.unwrap();
        node.stop_sandbox("nobody").await.unwrap();
        node.remove_sandbox("nobody").await.unwrap();
        assert!(is_unknown(node.start_container("nobody").await));
        assert!(is_unknown(node.exec("nobody", &["true"], 0).await));
        // It is the beginning of every id.
        for nameless in [node.remove_container("").await, node.remove_sandbox("").await] {
            assert!(matches!(nameless, Err(Error::InvalidArgument(_))), "{nameless:?}");
        }
        let request = v1::ContainerStatusRequest { container_id: nobody(), verbose: true };
        assert!(is_unknown(runtime.container_status(request).await));
        let request = v1::PodSandboxStatusRequest { pod_sandbox_id: nobody(), verbose: true };
        assert!(is_unknown(runtime.pod_sandbox_status(request).await));
        let request = v1::ExecRequest { container_id: nobody(), cmd: vec!["true".into()], ..Default::default() };
        assert!(is_unknown(runtime.exec(v1::ExecRequest { stdout: true, ..request }).await));
        let request = v1::AttachRequest { container_id: nobody(), stdout: true, ..Default::default() };
        assert!(is_unknown(runtime.attach(request).await));
        let request = v1::PortForwardRequest { pod_sandbox_id: nobody(), port: vec![80] };
        assert!(is_unknown(runtime.port_forward(request).await));
        assert!(is_unknown(runtime.container_stats(v1::ContainerStatsRequest { container_id: nobody() }).await));
        assert!(is_unknown(runtime.pod_sandbox_stats(v1::PodSandboxStatsRequest { pod_sandbox_id: nobody() }).await));
        let request = v1::UpdateContainerResourcesRequest { container_id: nobody(), ..Default::default() };
        assert!(is_unknown(runtime.update_container_resources(request).await));
        let request = v1::UpdatePodSandboxResourcesRequest { pod_sandbox_id: nobody(), ..Default::default() };
        assert!(is_unknown(runtime.update_pod_sandbox_resources(request).await));
        assert!(is_unknown(
            runtime.reopen_container_log(v1::ReopenContainerLogRequest { container_id: nobody() }).await
        ));
        let (sandbox, _) = made(&node, "there", 0).await;
        let config = node.sandbox_config("there");
        assert!(is_unknown(node.create("nobody", &config, script_config("main", "true")).await));
        let mut request = script_config("main", "true");
        request.image = Some(v1::ImageSpec { image: "nowhere.test/none:1".into(), ..Default::default() });
        let error = node.create(&sandbox, &config, request).await.unwrap_err();
        assert!(error.to_string().contains("nowhere.test/none:1"), "{error}");
        let request = v1::RunPodSandboxRequest { config: Some(node.sandbox_config("h")), runtime_handler: nobody() };
        assert!(runtime.run_pod_sandbox(request).await.unwrap_err().to_string().contains("nobody"));

        let checkpoint = runtime.checkpoint_container(v1::CheckpointContainerRequest::default()).await;
        assert!(matches!(checkpoint, Err(Error::Unimplemented { .. })));
        let checkpoint = runtime.checkpoint_pod(v1::CheckpointPodRequest::default()).await;
        assert!(matches!(checkpoint, Err(Error::Unimplemented { .. })));
        let restored = runtime.restore_pod(v1::RestorePodRequest::default()).await;
        assert!(matches!(restored, Err(Error::Unimplemented { .. })));
        node
    });
}

fn limits_change_while_a_container_runs() {
    on_a_node(|node| async {
        let pod = node.pod("limits", "sleep 1000").await;
        let update = async |linux: v1::LinuxContainerResources| {
            let linux = Some(linux);
            let request = v1::UpdateContainerResourcesRequest {
                container_id: pod.container.clone(),
                linux,
                ..Default::default()
            };
            node.runtime.update_container_resources(request).await
        };
        update(v1::LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() }).await.unwrap();
        update(v1::LinuxContainerResources { cpu_quota: 20_000, cpu_period: 100_000, ..Default::default() })
            .await
            .unwrap();
        let linux = node.status(&pod.container).await.resources.unwrap().linux.unwrap();
        // What the second did not name is as the first has set it.
        assert_eq!((linux.memory_limit_in_bytes, linux.cpu_quota, linux.cpu_period), (64 << 20, 20_000, 100_000));
        let overhead = Some(v1::LinuxContainerResources { cpu_shares: 2, ..Default::default() });
        let pod_sandbox_id = pod.sandbox.clone();
        let request = v1::UpdatePodSandboxResourcesRequest { pod_sandbox_id, overhead, ..Default::default() };
        node.runtime.update_pod_sandbox_resources(request).await.unwrap();
        node.stop_container(&pod.container, 0).await.unwrap();
        let error = update(v1::LinuxContainerResources { cpu_quota: 1, ..Default::default() }).await.unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
        node
    });
}

/// As the kubelet rotates: it renames the file, then asks.
fn a_renamed_log_is_left_alone() {
    on_a_node(|node| async {
        let script = "echo before; until test -e /go; do sleep 0.05; done; echo after; sleep 1000";
        let pod = node.pod("rotated", script).await;
        let log = node.places.logs.join("rotated/main/0.log");
        let holds = async |text: &str| {
            while !std::fs::read_to_string(&log).is_ok_and(|log| log.contains(text)) {
                tokio::task::yield_now().await;
            }
        };
        holds("before").await;
        let old = log.with_extension("log.old");
        std::fs::rename(&log, &old).unwrap();
        let request = || v1::ReopenContainerLogRequest { container_id: pod.container.clone() };
        node.runtime.reopen_container_log(request()).await.unwrap();
        node.exec(&pod.container, &["touch", "/go"], 0).await.unwrap();
        holds("after").await;
        assert_eq!(node.log("rotated"), ["stdout F after"]);
        assert!(std::fs::read_to_string(old).unwrap().ends_with(" stdout F before\n"));
        node.stop_container(&pod.container, 0).await.unwrap();
        assert!(node.runtime.reopen_container_log(request()).await.is_err(), "it does not run any more");
        node
    });
}
