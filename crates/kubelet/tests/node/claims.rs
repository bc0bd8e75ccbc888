//! Claims for devices, by a driver over real gRPC: they reach their container, and what happens to a driver harms only its pods.

use std::os::fd::AsFd as _;
use std::path::Path;

use k8s_openapi::api::resource::v1::ResourceClaim;
use plugin::dra_health::HealthStatus;
use plugin::resources::GetPodResourcesRequest;
use plugin::resources::pod_resources_lister_client::PodResourcesListerClient;
use serde_json::{Value, json};
use testkit::dra::{Call, Driver};
use testkit::serial::Test;

use crate::desk::Desk;
use crate::fixture::{LIMIT, Node, on_a_node};

pub(crate) const TESTS: &[Test] = &[
    ("claims_reach_their_container", claims_reach_their_container),
    ("a_claim_is_given_back_by_its_last_pod", a_claim_is_given_back_by_its_last_pod),
    ("a_driver_of_claims_that_hangs_harms_only_its_pods", a_driver_of_claims_that_hangs_harms_only_its_pods),
    ("who_may_not_use_a_claim", who_may_not_use_a_claim),
    ("claims_outlive_the_daemon", claims_outlive_the_daemon),
    ("slices_of_a_driver_that_is_away_are_removed", slices_of_a_driver_that_is_away_are_removed),
];

const NAME: &str = "test.dra.example";
/// Where descriptions for CDI are looked for, in the mount namespace of the test.
const DESCRIPTIONS: &str = "/var/run/cdi";

fn driver(node: &Node) -> Driver {
    Driver::start(NAME, &node.path("kubelet"), Path::new(DESCRIPTIONS)).unwrap()
}

/// An empty `/var`, for the length of a test.
struct Cover;

impl Cover {
    fn new() -> Self {
        let var = sys::mount::new_filesystem("tmpfs", &[], 0).unwrap();
        sys::mount::attach_at(var.as_fd(), Path::new("/var")).unwrap();
        std::fs::create_dir_all(DESCRIPTIONS).unwrap();
        Self
    }
}

impl Drop for Cover {
    fn drop(&mut self) {
        sys::mount::detach(Path::new("/var")).unwrap();
    }
}

/// A claim that the scheduler has allocated and reserved for these pods.
fn claim(node: &Node, name: &str, pods: &[&str]) {
    let consumer = |pod: &&str| json!({ "resource": "pods", "name": pod, "uid": node.uid(pod) });
    let results = json!([{ "driver": NAME, "pool": "pool", "device": "one", "request": "req" }]);
    let status = json!({
        "allocation": { "devices": { "results": results } },
        "reservedFor": pods.iter().map(consumer).collect::<Vec<_>>() });
    let metadata = json!({ "name": name, "namespace": "default", "uid": format!("uid-{name}") });
    let claim = json!({ "metadata": metadata, "spec": {}, "status": status });
    node.desk.claim(serde_json::from_value::<ResourceClaim>(claim).unwrap());
}

/// Wants a pod that uses a claim and runs `script`.
fn want(node: &Node, name: &str, claim: &str, script: &str) {
    let resources = json!({ "claims": [{ "name": "c", "request": "req" }] });
    let container =
        json!({ "name": "c", "image": node.image(), "command": ["sh", "-c", script], "resources": resources });
    let claims = json!([{ "name": "c", "resourceClaimName": claim }]);
    let spec = json!({
        "terminationGracePeriodSeconds": 1, "restartPolicy": "Never", "resourceClaims": claims, "containers": [container] });
    node.want_spec(name, spec);
}

/// Waits until the driver's calls are as wanted.
async fn called(driver: &Driver, holds: impl Fn(&[Call]) -> bool) -> Vec<Call> {
    let mut calls = driver.calls();
    let done = calls.wait_for(|calls| holds(calls));
    tokio::time::timeout(LIMIT, done).await.expect("the driver is called").unwrap().clone()
}

fn says(desk: &Desk, pod: &str, reason: &str, text: &str) -> bool {
    let events = cluster::Source::store(desk).events().list();
    events.iter().any(|event| {
        event.involved_object.name.as_deref() == Some(pod)
            && event.reason.as_deref() == Some(reason)
            && event.message.as_ref().is_some_and(|said| said.contains(text))
    })
}

fn health(desk: &Desk, pod: &str) -> Value {
    desk.container(pod)["allocatedResourcesStatus"][0].clone()
}

fn saved(node: &Node) -> String {
    std::fs::read_to_string(node.path("kubelet/dra_manager_state")).unwrap_or_default()
}

fn claims_reach_their_container() {
    on_a_node(async |node| {
        let _cover = Cover::new();
        let driver = driver(&node);
        claim(&node, "gpu", &["p"]);
        want(&node, "p", "gpu", "[ $CLAIMED = gpu ] && sleep 1000");
        node.desk.when("it has its device", |desk| desk.container("p")["ready"] == true).await;
        let uid = vec!["uid-gpu".to_owned()];
        assert_eq!(*driver.calls().borrow(), [Call::Prepare(uid.clone())]);
        assert!(saved(&node).contains("uid-gpu"));
        let id = "test.dra.example/claim=uid-gpu";
        let told =
            |health: &str| json!({ "name": "claim:c/req", "resources": [{ "health": health, "resourceID": id }] });
        node.desk.when("its health is told", |desk| health(desk, "p") == told("Healthy")).await;
        driver.tell(HealthStatus::Unhealthy, "it smokes");
        node.desk.when("it is told why", |desk| health(desk, "p")["resources"][0]["message"] == "it smokes").await;
        assert_eq!(health(&node.desk, "p")["resources"][0]["health"], "Unhealthy");
        let socket = node.path("kubelet/pod-resources/kubelet.sock");
        let mut client = PodResourcesListerClient::new(plugin::connect(&socket).unwrap());
        let request = GetPodResourcesRequest { pod_name: "p".to_owned(), pod_namespace: "default".to_owned() };
        let has = client.get(request).await.unwrap().into_inner().pod_resources.unwrap();
        let [claimed] = &has.containers[0].dynamic_resources[..] else { panic!("{has:?}") };
        assert_eq!((claimed.claim_name.as_str(), claimed.claim_resources[0].driver_name.as_str()), ("gpu", NAME));
        assert_eq!(claimed.claim_resources[0].cdi_devices[0].name, id);
        node.desk.delete("p", 1);
        node.desk.gone("p").await;
        assert_eq!(*driver.calls().borrow(), [Call::Prepare(uid.clone()), Call::Unprepare(uid)]);
        assert!(!saved(&node).contains("uid-gpu"));
        node
    });
}

fn a_claim_is_given_back_by_its_last_pod() {
    on_a_node(async |node| {
        let _cover = Cover::new();
        let driver = driver(&node);
        claim(&node, "shared", &["first", "second"]);
        want(&node, "first", "shared", "sleep 1000");
        want(&node, "second", "shared", "while ! [ -e /go ]; do sleep 0.1; done");
        node.desk.running("first").await;
        node.desk.running("second").await;
        node.desk.delete("first", 0);
        node.desk.gone("first").await;
        assert!(!driver.calls().borrow().iter().any(|call| matches!(call, Call::Unprepare(_))), "another pod has it");
        // Nobody hears that a pod has ended before its devices are given back: others would get them.
        driver.hang(true);
        let second = node.containers("second").await.remove(0).id;
        let request = cri::v1::ExecSyncRequest {
            container_id: second,
            cmd: ["touch", "/go"].map(str::to_owned).into(),
            timeout: 0,
        };
        cri::RuntimeService::exec_sync(&*node.runtime, request).await.unwrap();
        let told = "DRA driver test.dra.example: NodeUnprepareResources: no answer within 3 s";
        node.desk.when("it is told who hangs", |desk| says(desk, "second", "FailedKillPod", told)).await;
        assert_eq!(node.desk.phase("second").as_deref(), Some("Running"));
        driver.hang(false);
        node.desk.when("it has ended", |desk| desk.phase("second").as_deref() == Some("Succeeded")).await;
        called(&driver, |calls| calls.last() == Some(&Call::Unprepare(vec!["uid-shared".to_owned()]))).await;
        node
    });
}

fn a_driver_of_claims_that_hangs_harms_only_its_pods() {
    on_a_node(async |node| {
        let _cover = Cover::new();
        claim(&node, "gpu", &["waits"]);
        want(&node, "waits", "gpu", "sleep 1000");
        let told = "Failed to prepare dynamic resources: DRA driver test.dra.example is not registered";
        let failed = "FailedPrepareDynamicResources";
        node.desk.when("it is told who is missing", |desk| says(desk, "waits", failed, told)).await;
        assert!(!saved(&node).contains("uid-gpu"), "nothing to undo");
        let driver = driver(&node);
        driver.hang(true);
        node.want("other", "sleep 1000", json!({}));
        node.desk.running("other").await;
        let told = "DRA driver test.dra.example: NodePrepareResources: no answer within 3 s";
        node.desk.when("it is told who hangs", |desk| says(desk, "waits", failed, told)).await;
        driver.hang(false);
        driver.refuse(Some("out of order"));
        let told = "NodePrepareResources failed for ResourceClaim gpu: out of order";
        node.desk.when("it is told why not", |desk| says(desk, "waits", failed, told)).await;
        driver.refuse(None);
        node.desk.running("waits").await;
        // Without its driver it would stay.
        node.desk.delete("waits", 0);
        node.desk.gone("waits").await;
        node
    });
}

fn who_may_not_use_a_claim() {
    on_a_node(async |node| {
        let _cover = Cover::new();
        let driver = driver(&node);
        claim(&node, "gpu", &["other"]);
        want(&node, "thief", "gpu", "sleep 1000");
        want(&node, "early", "none", "sleep 1000");
        let failed = "FailedPrepareDynamicResources";
        let told = format!("pod thief ({}) is not allowed to use ResourceClaim gpu (uid-gpu)", node.uid("thief"));
        node.desk.when("it is told whose it is", |desk| says(desk, "thief", failed, &told)).await;
        let told = "fetch ResourceClaim none: ResourceClaim default/none does not exist";
        node.desk.when("it is told what is missing", |desk| says(desk, "early", failed, told)).await;
        assert!(driver.calls().borrow().is_empty());
        node
    });
}

fn claims_outlive_the_daemon() {
    on_a_node(async |mut node| {
        let _cover = Cover::new();
        let driver = driver(&node);
        claim(&node, "gpu", &["p"]);
        claim(&node, "left", &["forgotten"]);
        want(&node, "p", "gpu", "[ $CLAIMED = gpu ] && sleep 1000");
        want(&node, "forgotten", "left", "sleep 1000");
        node.desk.running("p").await;
        node.desk.running("forgotten").await;
        let before = node.containers("p").await;
        // One of the pods goes while there is no daemon, and the claims are not to be had.
        let desk = std::sync::Arc::new(Desk::new());
        let kept = node.desk.pod("p").unwrap();
        cluster::Source::store(&*desk).pods().put((*kept).clone());
        node.restart(desk).await;
        let undone = vec!["uid-left".to_owned()];
        called(&driver, |calls| calls.contains(&Call::Unprepare(undone.clone()))).await;
        assert_eq!(node.containers("p").await, before, "it runs on");
        node.desk.when("its health is told", |desk| health(desk, "p")["resources"][0]["health"] == "Healthy").await;
        node.desk.delete("p", 0);
        node.desk.gone("p").await;
        let undone = vec!["uid-gpu".to_owned()];
        called(&driver, |calls| calls.contains(&Call::Unprepare(undone.clone()))).await;
        node
    });
}

fn slices_of_a_driver_that_is_away_are_removed() {
    on_a_node(async |node| {
        let _cover = Cover::new();
        node.desk.slices_removed(&[None]).await;
        let driver = driver(&node);
        let mut told = driver.registrar.told();
        let registered = told.wait_for(|told| told.iter().any(|status| status.plugin_registered));
        tokio::time::timeout(LIMIT, registered).await.expect("it registers").unwrap();
        driver.kill();
        node.desk.slices_removed(&[None, Some(NAME)]).await;
        // Its sockets are still there: it is asked again until it comes back.
        let driver = self::driver(&node);
        claim(&node, "gpu", &["p"]);
        want(&node, "p", "gpu", "sleep 1000");
        node.desk.running("p").await;
        called(&driver, |calls| calls == [Call::Prepare(vec!["uid-gpu".to_owned()])]).await;
        node.desk.delete("p", 0);
        node.desk.gone("p").await;
        node
    });
}
