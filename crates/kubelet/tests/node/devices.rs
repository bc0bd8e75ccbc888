//! Device plugins, over real gRPC: their devices reach containers, and what happens to a plugin harms only its pods.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use cri::{RuntimeService as _, v1};
use futures_util::{Stream, StreamExt as _};
use plugin::device::device_plugin_server::{DevicePlugin, DevicePluginServer};
use plugin::device::registration_client::RegistrationClient;
use plugin::device::{self, ContainerAllocateResponse, DevicePluginOptions, Empty, ListAndWatchResponse};
use plugin::resources::pod_resources_lister_client::PodResourcesListerClient;
use plugin::resources::{AllocatableResourcesRequest, GetPodResourcesRequest, ListPodResourcesRequest};
use serde_json::{Value, json};
use testkit::daemon::{Daemon, Nursery};
use testkit::serial::Test;
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tonic::{Request, Response, Status};

use crate::desk::Desk;
use crate::fixture::{LIMIT, Node, on_a_node};

pub(crate) const TESTS: &[Test] = &[
    ("devices_reach_their_container", devices_reach_their_container),
    ("devices_stay_with_their_pod", devices_stay_with_their_pod),
    ("devices_stay_with_who_runs_though_the_file_is_damaged", devices_stay_with_who_runs_though_the_file_is_damaged),
    ("a_plugin_that_hangs_harms_only_its_pods", a_plugin_that_hangs_harms_only_its_pods),
    ("a_start_waits_for_the_plugin_that_readies_devices", a_start_waits_for_the_plugin_that_readies_devices),
    ("what_cannot_register", what_cannot_register),
    ("devices_by_cdi", devices_by_cdi),
    ("the_published_sample", the_published_sample),
];

/// Plugins so far.
static COUNT: AtomicUsize = AtomicUsize::new(0);

const RESOURCE: &str = "example.com/gadget";

/// Each of its devices is `/dev/zero`, under its own name.
struct Gadgets {
    devices: watch::Receiver<Vec<(&'static str, bool)>>,
    /// How often a container was about to start.
    starts: watch::Sender<usize>,
    /// Whether it answers when it is asked for devices.
    answers: bool,
    /// How often it was asked.
    asked: watch::Sender<usize>,
}

#[tonic::async_trait]
impl DevicePlugin for Gadgets {
    type ListAndWatchStream = Pin<Box<dyn Stream<Item = Result<ListAndWatchResponse, Status>> + Send>>;

    async fn get_device_plugin_options(&self, _: Request<Empty>) -> Result<Response<DevicePluginOptions>, Status> {
        let options = DevicePluginOptions { pre_start_required: true, get_preferred_allocation_available: true };
        Ok(Response::new(options))
    }

    async fn list_and_watch(&self, _: Request<Empty>) -> Result<Response<Self::ListAndWatchStream>, Status> {
        let listed = |devices: &Vec<(&'static str, bool)>| {
            let device = |(id, is_healthy): &(&'static str, bool)| device::Device {
                id: (*id).to_owned(),
                health: if *is_healthy { "Healthy" } else { "Unhealthy" }.to_owned(),
                topology: None,
            };
            ListAndWatchResponse { devices: devices.iter().map(device).collect() }
        };
        let news =
            futures_util::stream::unfold((self.devices.clone(), true), move |(mut devices, is_first)| async move {
                if !is_first && devices.changed().await.is_err() {
                    return None;
                }
                let now = listed(&devices.borrow_and_update());
                Some((Ok(now), (devices, false)))
            });
        Ok(Response::new(news.boxed()))
    }

    /// It would give the last ones first.
    async fn get_preferred_allocation(
        &self,
        request: Request<device::PreferredAllocationRequest>,
    ) -> Result<Response<device::PreferredAllocationResponse>, Status> {
        let wanted = request.into_inner().container_requests.remove(0);
        let count = usize::try_from(wanted.allocation_size).unwrap();
        let device_i_ds = wanted.available_device_i_ds.into_iter().rev().take(count).collect();
        let container_responses = vec![device::ContainerPreferredAllocationResponse { device_i_ds }];
        Ok(Response::new(device::PreferredAllocationResponse { container_responses }))
    }

    async fn allocate(
        &self,
        request: Request<device::AllocateRequest>,
    ) -> Result<Response<device::AllocateResponse>, Status> {
        self.asked.send_modify(|count| *count += 1);
        if !self.answers {
            std::future::pending::<()>().await;
        }
        let ids = request.into_inner().container_requests.remove(0).devices_ids;
        let device = |id: &String| device::DeviceSpec {
            container_path: format!("/dev/{id}"),
            host_path: "/dev/zero".into(),
            permissions: "rw".into(),
        };
        let mount =
            device::Mount { container_path: "/etc/gadgets".into(), host_path: "/proc/version".into(), read_only: true };
        let is_described = Path::new("/var/run/cdi/gadget.json").exists();
        let named = |id: &String| device::CdiDevice { name: format!("{RESOURCE}={id}") };
        let answer = ContainerAllocateResponse {
            envs: [("GADGETS".to_owned(), ids.join(","))].into(),
            mounts: vec![mount],
            devices: ids.iter().map(device).collect(),
            annotations: [("example.com/gadgets".to_owned(), ids.join(","))].into(),
            // By CDI, too, where the host describes them.
            cdi_devices: if is_described { ids.iter().map(named).collect() } else { Vec::new() },
        };
        Ok(Response::new(device::AllocateResponse { container_responses: vec![answer] }))
    }

    async fn pre_start_container(
        &self,
        _: Request<device::PreStartContainerRequest>,
    ) -> Result<Response<device::PreStartContainerResponse>, Status> {
        self.starts.send_modify(|count| *count += 1);
        Ok(Response::new(device::PreStartContainerResponse {}))
    }
}

/// A plugin at work; it goes with this value.
struct Plugin {
    devices: watch::Sender<Vec<(&'static str, bool)>>,
    starts: watch::Sender<usize>,
    asked: watch::Sender<usize>,
    _serving: DropGuard,
}

impl Plugin {
    async fn start(node: &Node, resource: &str, devices: &[(&'static str, bool)], answers: bool) -> Self {
        let stop = CancellationToken::new();
        let (devices, watched) = watch::channel(devices.to_vec());
        let plugin = Self {
            devices,
            starts: watch::Sender::new(0),
            asked: watch::Sender::new(0),
            _serving: stop.clone().drop_guard(),
        };
        let (starts, asked) = (plugin.starts.clone(), plugin.asked.clone());
        let service = DevicePluginServer::new(Gadgets { devices: watched, starts, answers, asked });
        // One that ends removes its own socket, not that of its successor.
        let endpoint = format!("{}.{}", resource.replace('/', "_"), COUNT.fetch_add(1, Ordering::Relaxed));
        let listener = cri::server::bind(&directory(node).join(&endpoint)).await.unwrap();
        tokio::spawn(cri::server::serve_calls(listener, service, stop));
        register(&directory(node), "v1beta1", &endpoint, resource).await.unwrap();
        plugin
    }
}

fn directory(node: &Node) -> std::path::PathBuf {
    node.path("kubelet/device-plugins")
}

async fn register(directory: &Path, version: &str, endpoint: &str, resource: &str) -> Result<(), Status> {
    let mut client = RegistrationClient::new(plugin::connect(&directory.join("kubelet.sock")).unwrap());
    let request = device::RegisterRequest {
        version: version.into(),
        endpoint: endpoint.into(),
        resource_name: resource.into(),
        options: None,
    };
    client.register(request).await.map(drop)
}

/// A pod that is ready when it has checked that it has `count` gadgets.
fn want(node: &Node, name: &str, resource: &str, count: usize) {
    let script = format!(
        "set -e; [ \"$(echo $GADGETS | tr , '\\n' | grep -c .)\" = {count} ]; grep -q Linux /etc/gadgets; \
         for id in $(echo $GADGETS | tr , ' '); do head -c 1 /dev/$id > /dev/null; done; \
         trap 'exit 0' TERM; touch /checked; sleep 1000 & wait"
    );
    let probe = json!({ "exec": { "command": ["test", "-e", "/checked"] }, "periodSeconds": 1 });
    let resources = json!({ "limits": { resource: count.to_string() } });
    node.want(name, &script, json!({ "resources": resources, "readinessProbe": probe }));
}

fn status(desk: &Desk, name: &str) -> Value {
    serde_json::to_value(desk.pod(name).and_then(|pod| pod.status.clone())).unwrap()
}

/// The devices of a pod's container, as its status tells of them.
fn devices(desk: &Desk, name: &str) -> Vec<(String, String)> {
    let status = desk.container(name);
    let listed = status["allocatedResourcesStatus"][0]["resources"].as_array().cloned().unwrap_or_default();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    listed.iter().map(|device| (text(&device["resourceID"]), text(&device["health"]))).collect()
}

fn pairs(devices: &[(&str, &str)]) -> Vec<(String, String)> {
    devices.iter().map(|(id, health)| ((*id).to_owned(), (*health).to_owned())).collect()
}

async fn at_least(count: &watch::Sender<usize>, least: usize) {
    let mut seen = count.subscribe();
    tokio::time::timeout(LIMIT, seen.wait_for(|count| *count >= least)).await.expect("the plugin is asked").unwrap();
}

fn devices_reach_their_container() {
    on_a_node(async |node| {
        let plugin = Plugin::start(&node, RESOURCE, &[("one", true), ("two", true), ("three", true)], true).await;
        plugin_has(&node, 3).await;
        want(&node, "first", RESOURCE, 1);
        node.desk.running("first").await;
        node.desk.when("it is ready", |desk| desk.container("first")["ready"] == true).await;
        // "two" is the last by name, which the plugin prefers.
        assert_eq!(devices(&node.desk, "first"), pairs(&[("two", "Healthy")]));
        at_least(&plugin.starts, 1).await;
        let has = resources_of(&node, "first").await.unwrap();
        assert_eq!(has.containers[0].devices[0].device_ids, ["two"]);
        assert_eq!(resources_of(&node, "other").await.unwrap_err().code(), tonic::Code::NotFound);
        want(&node, "greedy", RESOURCE, 3);
        node.desk.when("the second pod is not taken", |desk| desk.phase("greedy").as_deref() == Some("Failed")).await;
        let refused = status(&node.desk, "greedy");
        assert_eq!(refused["reason"], "UnexpectedAdmissionError");
        let message = "Pod was rejected: Allocate failed due to requested number of devices unavailable for \
            example.com/gadget. Requested: 3, Available: 2, which is unexpected";
        assert_eq!(refused["message"], message);
        plugin.devices.send_replace(vec![("one", true), ("two", false), ("three", true)]);
        let ill = pairs(&[("two", "Unhealthy")]);
        node.desk.when("its device is told ill", |desk| devices(desk, "first") == ill).await;
        assert_eq!(node.desk.phase("first").as_deref(), Some("Running"));
        node
    });
}

/// What the pod resources API says that a pod has.
async fn resources_of(node: &Node, name: &str) -> Result<plugin::resources::PodResources, Status> {
    let socket = node.path("kubelet/pod-resources/kubelet.sock");
    let mut client = PodResourcesListerClient::new(plugin::connect(&socket).unwrap());
    let allocatable = client.get_allocatable_resources(AllocatableResourcesRequest {}).await?.into_inner();
    assert_eq!(allocatable.devices.len(), 3);
    let listed = client.list(ListPodResourcesRequest {}).await?.into_inner();
    assert_eq!(listed.pod_resources[0].name, "first");
    let request = GetPodResourcesRequest { pod_name: name.to_owned(), pod_namespace: "default".to_owned() };
    Ok(client.get(request).await?.into_inner().pod_resources.unwrap())
}

/// Waits until the plugin's devices are known: a list comes after the registration.
async fn plugin_has(node: &Node, count: usize) {
    resource_has(node, RESOURCE, count).await;
}

async fn resource_has(node: &Node, resource: &str, count: usize) {
    let file = directory(node).join("kubelet_internal_checkpoint");
    let listed = || {
        let saved: Value =
            std::fs::read(&file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        saved["Data"]["RegisteredDevices"][resource].as_array().map_or(0, Vec::len) == count
    };
    node.until(&directory(node), "the devices are known", listed).await;
}

/// Waits until the node knows of so many healthy devices. The file names those of before a restart, too.
async fn can_be_had(node: &Node, count: usize) {
    let socket = node.path("kubelet/pod-resources/kubelet.sock");
    let mut client = PodResourcesListerClient::new(plugin::connect(&socket).unwrap());
    let mut look = tokio::time::interval(Duration::from_millis(100)); // Well below the limit of requests.
    let seen = async {
        loop {
            look.tick().await;
            let listed = client.get_allocatable_resources(AllocatableResourcesRequest {}).await;
            if listed.is_ok_and(|listed| listed.into_inner().devices.len() == count) {
                break;
            }
        }
    };
    tokio::time::timeout(LIMIT, seen).await.expect("the plugin's devices can be had");
}

fn devices_stay_with_their_pod() {
    on_a_node(async |mut node| {
        let plugin = Plugin::start(&node, RESOURCE, &[("one", true), ("two", true)], true).await;
        plugin_has(&node, 2).await;
        want(&node, "old", RESOURCE, 1);
        node.desk.when("it is ready", |desk| desk.container("old")["ready"] == true).await;
        let has = devices(&node.desk, "old");
        let desk = node.desk.clone();
        node.restart(desk).await;
        // The plugin is not there yet: what it gave stays given, what it did not cannot be had.
        assert_eq!(devices(&node.desk, "old"), has);
        drop(plugin);
        let _plugin = Plugin::start(&node, RESOURCE, &[("one", true), ("two", true)], true).await;
        can_be_had(&node, 2).await;
        want(&node, "new", RESOURCE, 1);
        node.desk.when("it is ready", |desk| desk.container("new")["ready"] == true).await;
        assert_ne!(devices(&node.desk, "new"), has);
        // What a pod had is free when it has gone.
        node.desk.delete("old", 1);
        node.desk.gone("old").await;
        want(&node, "last", RESOURCE, 1);
        node.desk.when("it is ready", |desk| desk.container("last")["ready"] == true).await;
        assert_eq!(devices(&node.desk, "last"), has);
        node
    });
}

fn devices_stay_with_who_runs_though_the_file_is_damaged() {
    on_a_node(async |mut node| {
        let plugin = Plugin::start(&node, RESOURCE, &[("one", true), ("two", true)], true).await;
        plugin_has(&node, 2).await;
        want(&node, "old", RESOURCE, 1);
        node.desk.when("it is ready", |desk| desk.container("old")["ready"] == true).await;
        let has = devices(&node.desk, "old");
        let file = directory(&node).join("kubelet_internal_checkpoint");
        node.stop().await; // It writes the file once more.
        std::fs::write(&file, "{").unwrap();
        let desk = node.desk.clone();
        node.restart(desk).await;
        assert!(file.with_extension("corrupt").exists());
        drop(plugin);
        let plugin = Plugin::start(&node, RESOURCE, &[("one", true), ("two", true)], true).await;
        can_be_had(&node, 2).await;
        want(&node, "new", RESOURCE, 1);
        node.desk.when("it is ready", |desk| desk.container("new")["ready"] == true).await;
        assert_ne!(devices(&node.desk, "new"), has);
        assert_eq!(devices(&node.desk, "old"), has);
        // It starts anew with its own, for which the plugin is asked again.
        let container_id = node.containers("old").await.remove(0).id;
        node.runtime.stop_container(v1::StopContainerRequest { container_id, timeout: 0 }).await.unwrap();
        let is_again =
            |desk: &Desk| desk.container("old")["restartCount"] == 1 && desk.container("old")["ready"] == true;
        node.desk.when("it is ready again", is_again).await;
        assert_eq!(devices(&node.desk, "old"), has);
        assert_eq!(*plugin.asked.borrow(), 2, "for the new one and the old one");
        node
    });
}

fn a_plugin_that_hangs_harms_only_its_pods() {
    const HUNG: &str = "example.com/hung";
    on_a_node(async |node| {
        let _plugin = Plugin::start(&node, RESOURCE, &[("one", true)], true).await;
        let hung = Plugin::start(&node, HUNG, &[("a", true)], false).await;
        plugin_has(&node, 1).await;
        resource_has(&node, HUNG, 1).await;
        want(&node, "stuck", HUNG, 1);
        at_least(&hung.asked, 1).await;
        want(&node, "free", RESOURCE, 1);
        node.want("plain", "sleep 1000", json!({}));
        node.desk.when("it is ready", |desk| desk.container("free")["ready"] == true).await;
        node.desk.running("plain").await;
        node.desk.delete("stuck", 1);
        node.desk.gone("stuck").await;
        // What was asked for can be asked for again.
        want(&node, "again", HUNG, 1);
        at_least(&hung.asked, 2).await;
        node
    });
}

/// A plugin that resets its hardware before each start must not be passed over when it is away.
fn a_start_waits_for_the_plugin_that_readies_devices() {
    on_a_node(async |node| {
        let plugin = Plugin::start(&node, RESOURCE, &[("one", true)], true).await;
        plugin_has(&node, 1).await;
        want(&node, "p", RESOURCE, 1);
        node.desk.when("it is ready", |desk| desk.container("p")["ready"] == true).await;
        drop(plugin);
        can_be_had(&node, 0).await;
        let container_id = node.containers("p").await.remove(0).id;
        node.runtime.stop_container(v1::StopContainerRequest { container_id, timeout: 0 }).await.unwrap();
        let waits = |desk: &Desk| {
            let message = desk.container("p")["state"]["waiting"]["message"].clone();
            message.as_str().is_some_and(|message| message.contains("example.com/gadget, which readies devices"))
        };
        node.desk.when("it waits for the plugin", waits).await;
        let plugin = Plugin::start(&node, RESOURCE, &[("one", true)], true).await;
        at_least(&plugin.starts, 1).await;
        node.desk.when("it is ready again", |desk| desk.container("p")["ready"] == true).await;
        node
    });
}

fn what_cannot_register() {
    on_a_node(async |node| {
        let register = async |version: &str, endpoint: &str, resource: &str| {
            let refused = register(&directory(&node), version, endpoint, resource).await.unwrap_err();
            refused.message().to_owned()
        };
        assert!(register("v1alpha1", "a.sock", RESOURCE).await.contains("is not supported by kubelet"));
        assert_eq!(register("v1beta1", "a.sock", "cpu").await, "the ResourceName \"cpu\" is invalid");
        assert!(register("v1beta1", "../a.sock", RESOURCE).await.contains("no socket in the directory"));
        assert!(register("v1beta1", "none.sock", RESOURCE).await.contains("cannot be reached"));
        node
    });
}

/// An empty `/var`, in the mount namespace of the test.
fn cover_var() {
    let var = sys::mount::new_filesystem("tmpfs", &[], 0).unwrap();
    sys::mount::attach_at(var.as_fd(), Path::new("/var")).unwrap();
    for directory in ["/var/lib", "/var/run/cdi"] {
        std::fs::create_dir_all(directory).unwrap();
    }
}

/// What a plugin names by CDI is what the host's description of it says.
fn devices_by_cdi() {
    on_a_node(async |node| {
        cover_var();
        let edits = json!({ "env": ["CDI=1"], "deviceNodes": [{ "path": "/dev/by-cdi", "hostPath": "/dev/zero" }] });
        let devices = json!([{ "name": "one", "containerEdits": edits }]);
        let description = json!({ "cdiVersion": "0.6.0", "kind": RESOURCE, "devices": devices });
        std::fs::write("/var/run/cdi/gadget.json", description.to_string()).unwrap();
        let _plugin = Plugin::start(&node, RESOURCE, &[("one", true)], true).await;
        plugin_has(&node, 1).await;
        let limits = json!({ "resources": { "limits": { RESOURCE: "1" } } });
        node.want("named", "[ $CDI = 1 ] && head -c 1 /dev/by-cdi > /dev/null && sleep 1000", limits);
        node.desk.when("it has its device", |desk| desk.container("named")["ready"] == true).await;
        sys::mount::detach(Path::new("/var")).unwrap();
        node
    });
}

/// The plugin that Kubernetes publishes as a sample, as it is: it knows only the usual place of the node agent's socket, which
/// is this node's in the mount namespace of the test.
fn the_published_sample() {
    const SAMPLE: &str = "example.com/resource";
    let program = match testkit::go::build(&testkit::go::SAMPLE_DEVICE_PLUGIN) {
        Ok(program) => program,
        Err(error) => return println!("skipped: needs go and the module proxy ({error:#})"),
    };
    on_a_node(async |node| {
        cover_var();
        std::os::unix::fs::symlink(node.path("kubelet"), "/var/lib/kubelet").unwrap();
        let nursery = Arc::new(Nursery::new());
        let mut plugin = Daemon::new(&nursery, &program, Vec::new(), node.path("sample.log"));
        plugin.start().unwrap();
        let listed = || {
            let file = std::fs::read(directory(&node).join("kubelet_internal_checkpoint"));
            let saved: Value = file.ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
            saved["Data"]["RegisteredDevices"][SAMPLE].as_array().map_or(0, Vec::len) == 2
        };
        node.until(&directory(&node), "the sample's devices are known", listed).await;
        let limits = json!({ "resources": { "limits": { SAMPLE: "1" } } });
        node.want("sampled", "test -e /tmp/Dev-1 && sleep 1000", limits);
        node.desk.when("it has its device", |desk| desk.container("sampled")["ready"] == true).await;
        assert_eq!(devices(&node.desk, "sampled"), pairs(&[("Dev-1", "Healthy")]));
        plugin.kill().unwrap();
        drop(plugin);
        sys::mount::detach(Path::new("/var")).unwrap();
        node
    });
}
