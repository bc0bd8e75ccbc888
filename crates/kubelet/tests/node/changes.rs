//! Pods that are changed while they run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cri::v1;
use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::ConfigMap;
use serde_json::{Value, json};
use testkit::serial::Test;

use crate::desk::Desk;
use crate::fixture::{LIMIT, Node, on_a_node};

pub(crate) const TESTS: &[Test] = &[
    ("an_ephemeral_container_looks_into_a_pod", an_ephemeral_container_looks_into_a_pod),
    ("a_pod_is_resized_while_it_runs", a_pod_is_resized_while_it_runs),
    ("of_many_runs_two_are_kept", of_many_runs_two_are_kept),
    ("a_volume_that_changes_all_the_time_holds_up_nobody", a_volume_that_changes_all_the_time_holds_up_nobody),
];

/// The status of a pod's first ephemeral container.
fn looking(desk: &Desk) -> Value {
    let status = desk.pod("p").and_then(|pod| pod.status.clone()).unwrap_or_default();
    serde_json::to_value(status.ephemeral_container_statuses.unwrap_or_default().first()).unwrap()
}

fn look(node: &Node, script: &str) {
    // The volume was made for nobody before.
    let one = json!({ "name": "look", "image": node.image(), "command": ["sh", "-c", script],
        "targetContainerName": "c", "volumeMounts": [{ "name": "v", "mountPath": "/v" }] });
    node.desk.change("p", |spec| spec.ephemeral_containers = Some(vec![serde_json::from_value(one).unwrap()]));
}

fn an_ephemeral_container_looks_into_a_pod() {
    on_a_node(|mut node| async {
        let container = json!({ "name": "c", "image": node.image(), "command": ["sleep", "4321"] });
        let volume = json!({ "name": "v", "emptyDir": {} });
        node.want_spec(
            "p",
            json!({ "terminationGracePeriodSeconds": 1, "containers": [container], "volumes": [volume] }),
        );
        node.desk.running("p").await;
        // It sees the other's processes; its own are its children.
        let script = "tr '\\0' ' ' < /proc/1/cmdline > /dev/termination-log; until test -e /v/end; do sleep 0.1; done";
        look(&node, script);
        node.desk.when("it runs", |desk| looking(desk)["state"]["running"].is_object()).await;
        let desk = Arc::new(Desk::new());
        let pod = node.desk.pod("p").unwrap();
        cluster::Source::store(&*desk).pods().put((*pod).clone());
        let before = looking(&node.desk);
        node.restart(desk).await;
        assert_eq!(looking(&node.desk)["containerID"], before["containerID"], "it was adopted");
        let volume = node.path("kubelet/pods").join(node.uid("p")).join("volumes/kubernetes.io~empty-dir/v");
        std::fs::write(volume.join("end"), "").unwrap();
        node.desk.when("its end is told", |desk| looking(desk)["state"]["terminated"].is_object()).await;
        let message = looking(&node.desk)["state"]["terminated"]["message"].clone();
        assert_eq!(message, "sleep 4321 ", "{message}");
        assert_eq!(node.desk.phase("p").as_deref(), Some("Running"));
        assert_eq!(node.containers("p").await.len(), 2, "nothing runs again");
        node
    });
}

fn resources(cpu: &str, memory: &str) -> Value {
    json!({ "requests": { "cpu": cpu, "memory": memory }, "limits": { "cpu": cpu, "memory": memory } })
}

fn resize(desk: &Desk, cpu: &str, memory: &str) {
    let wanted = resources(cpu, memory);
    desk.change("p", |spec| spec.containers[0].resources = serde_json::from_value(wanted).unwrap());
}

fn condition(desk: &Desk, kind: &str) -> Option<Option<String>> {
    let conditions = desk.pod("p")?.status.clone()?.conditions?;
    conditions.into_iter().find(|condition| condition.type_ == kind).map(|condition| condition.reason)
}

/// Waits until this is in force, as the status has it and as the kernel has it.
async fn has(node: &Node, cpu: &str, memory: &str, bytes: u64) {
    let told = |desk: &Desk| {
        desk.container("p")["resources"] == resources(cpu, memory) && condition(desk, "PodResizeInProgress").is_none()
    };
    node.desk.when(&format!("it has {cpu} and {memory}"), told).await;
    let pod = sys::cgroup::Hierarchy::detect().unwrap().group(format!("kubepods/pod{}", node.uid("p")));
    let id = node.desk.container("p")["containerID"].as_str().unwrap().rsplit('/').next().unwrap().to_owned();
    for group in [pod.clone(), pod.child(id)] {
        assert_eq!(group.stats().memory.limit_bytes, Some(bytes), "{memory}");
    }
}

fn a_pod_is_resized_while_it_runs() {
    const MIB: u64 = 1 << 20;
    on_a_node(|mut node| async {
        node.want("p", "exec sleep 1000", json!({ "resources": resources("100m", "32Mi") }));
        node.desk.running("p").await;
        let before = node.desk.container("p")["containerID"].clone();
        resize(&node.desk, "200m", "64Mi");
        has(&node, "200m", "64Mi", 64 * MIB).await;
        resize(&node.desk, "100m", "16Mi");
        has(&node, "100m", "16Mi", 16 * MIB).await;
        assert_eq!(node.desk.told("p", "ResizeCompleted"), 2);
        // Less than it uses is not written, and stays what it wants over a restart of the kubelet.
        resize(&node.desk, "100m", "8Ki");
        let failed = |desk: &Desk| condition(desk, "PodResizeInProgress") == Some(Some("Error".to_owned()));
        node.desk.when("it is told that more is in use", failed).await;
        let desk = Arc::new(Desk::new());
        cluster::Source::store(&*desk).pods().put((*node.desk.pod("p").unwrap()).clone());
        node.restart(desk).await;
        node.desk
            .when("the next kubelet tries it, too", |desk| desk.told("p", "ResizeError") > 0 || failed(desk))
            .await;
        assert_eq!(node.desk.container("p")["resources"], resources("100m", "16Mi"), "what is in force");
        resize(&node.desk, "100m", "32Mi");
        has(&node, "100m", "32Mi", 32 * MIB).await;
        let after = node.desk.container("p");
        assert_eq!((&after["containerID"], &after["restartCount"]), (&before, &json!(0)));
        node
    });
}

/// Another image makes another run at once, without the pause after a crash.
fn of_many_runs_two_are_kept() {
    on_a_node(|node| async {
        node.want("p", "sleep 1000", json!({}));
        node.desk.running("p").await;
        let mut events = node.events().await;
        let images = [node.other_image().to_owned(), node.image().to_owned()];
        for (restarts, image) in images.iter().cycle().take(4).enumerate() {
            node.desk.change("p", |spec| spec.containers[0].image = Some(image.clone()));
            let is_next = |desk: &Desk| {
                let status = desk.container("p");
                status["restartCount"] == restarts + 1 && status["state"]["running"].is_object()
            };
            node.desk.when("it runs again", is_next).await;
        }
        // Three of five runs have gone.
        let gone = async {
            let mut left = 3;
            while left > 0 {
                let event = events.next().await.unwrap().unwrap();
                left -= usize::from(event.container_event_type() == v1::ContainerEventType::ContainerDeletedEvent);
            }
        };
        tokio::time::timeout(LIMIT, gone).await.expect("old runs stay");
        let runs = node.containers("p").await;
        let mut attempts: Vec<u32> = runs.into_iter().map(|run| run.metadata.unwrap().attempt).collect();
        attempts.sort_unstable();
        assert_eq!(attempts, [3, 4]);
        node
    });
}

/// A ConfigMap changes until another pod runs, ten thousand times at least; in the end its volume has the last of it.
fn a_volume_that_changes_all_the_time_holds_up_nobody() {
    const CHANGES: usize = 10_000;
    fn map(n: usize) -> ConfigMap {
        let metadata = json!({ "name": "m", "namespace": "default" });
        serde_json::from_value(json!({ "metadata": metadata, "data": { "k": n.to_string() } })).unwrap()
    }
    on_a_node(|node| async {
        let maps = cluster::Source::store(&*node.desk).config_maps().clone();
        maps.put(map(0));
        let container = json!({ "name": "c", "image": node.image(), "command": ["sleep", "1000"],
            "volumeMounts": [{ "name": "v", "mountPath": "/v" }] });
        let volume = json!({ "name": "v", "configMap": { "name": "m" } });
        node.want_spec(
            "p",
            json!({ "terminationGracePeriodSeconds": 1, "containers": [container], "volumes": [volume] }),
        );
        node.desk.running("p").await;
        let is_over = Arc::new(AtomicBool::new(false));
        let storm = tokio::task::spawn_blocking({
            let is_over = is_over.clone();
            move || {
                let changes = (1..).take_while(|n| *n <= CHANGES || !is_over.load(Ordering::Relaxed));
                changes.inspect(|n| drop(maps.put(map(*n)))).last().unwrap()
            }
        });
        node.want("q", "exec sleep 1000", json!({}));
        node.desk.running("q").await;
        is_over.store(true, Ordering::Relaxed);
        let last = storm.await.unwrap().to_string();
        let dir = node.path("kubelet/pods").join(node.uid("p")).join("volumes/kubernetes.io~configmap/v");
        let has_last = || std::fs::read_to_string(dir.join("k")).is_ok_and(|now| now == last);
        node.until(&dir, "the volume has the last of it", has_last).await;
        println!("  {last} changes");
        node
    });
}
