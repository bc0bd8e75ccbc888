//! What a source may do that a directory of manifests does not.

use std::sync::Arc;

use cluster::Source as _;
use cri::v1;
use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kubelet::admission::Site;
use pod::quantity::Quantity;
use serde_json::json;
use testkit::serial::Test;

use crate::desk::{Desk, key};
use crate::fixture::{LIMIT, Node, on_a_node};

pub(crate) const TESTS: &[Test] = &[
    ("a_pod_that_vanishes_is_ended", a_pod_that_vanishes_is_ended),
    ("a_pod_that_is_replaced_is_ended", a_pod_that_is_replaced_is_ended),
    ("a_status_is_offered_until_it_is_taken", a_status_is_offered_until_it_is_taken),
    ("the_last_status_comes_before_the_deletion", the_last_status_comes_before_the_deletion),
    ("a_pod_that_has_ended_is_not_run_again", a_pod_that_has_ended_is_not_run_again),
    ("restart_counts_go_on_without_a_record", restart_counts_go_on_without_a_record),
    ("what_runs_keeps_its_ids_though_files_are_damaged", what_runs_keeps_its_ids_though_files_are_damaged),
    ("what_nobody_wants_is_gone_when_it_is_waited_for", what_nobody_wants_is_gone_when_it_is_waited_for),
    ("a_static_pod_that_was_taken_stays_taken", a_static_pod_that_was_taken_stays_taken),
    ("what_runs_is_kept_until_the_source_has_named_all_pods", what_runs_is_kept_until_the_source_has_named_all_pods),
];

/// Ends when it is told to, from when it has said so.
const HEEDS: &str = "trap 'exit 0' TERM; echo heeds; sleep 1000 & wait";

/// Waits until a sandbox has been removed, by its event.
async fn removed(events: &mut cri::Items<v1::ContainerEventResponse>, sandbox: &str) {
    let deleted = async {
        loop {
            let event = events.next().await.unwrap().unwrap();
            let is_deletion = event.container_event_type() == v1::ContainerEventType::ContainerDeletedEvent;
            if is_deletion && event.container_id == sandbox {
                return;
            }
        }
    };
    tokio::time::timeout(LIMIT, deleted).await.expect("the sandbox stays");
}

async fn sandbox(node: &Node, pod: &str) -> String {
    node.containers(pod).await[0].pod_sandbox_id.clone()
}

/// As after `kubectl delete --force`, or when another kubelet has removed the object.
fn a_pod_that_vanishes_is_ended() {
    on_a_node(|node| async {
        node.want("p", HEEDS, json!({}));
        node.desk.running("p").await;
        node.said("p", "heeds").await;
        node.desk.store().pods().remove(&key("p"));
        // Its record goes last.
        node.vanished(&node.path("records").join(format!("{}.json", node.uid("p")))).await;
        node
    });
}

fn a_pod_that_is_replaced_is_ended() {
    on_a_node(|node| async {
        node.want("p", "sleep 1000", json!({}));
        node.desk.running("p").await;
        let (sandbox, mut events) = (sandbox(&node, "p").await, node.events().await);
        let mut next = node.desk.store().pods().get(&key("p")).unwrap().as_ref().clone();
        next.metadata.uid = Some(node.uid("next"));
        next.status = None;
        node.desk.store().pods().put(next);
        removed(&mut events, &sandbox).await;
        node.desk.running("p").await;
        assert_eq!(node.containers("p").await.len(), 1);
        node
    });
}

fn a_status_is_offered_until_it_is_taken() {
    on_a_node(|node| async {
        node.desk.take_statuses(false);
        node.want("p", "sleep 1000", json!({}));
        node.desk.not_taken(2).await;
        node.desk.take_statuses(true);
        node.desk.running("p").await;
        node
    });
}

/// Who counts on how a pod ended, a Job for one, sees no more of it than its last status.
fn the_last_status_comes_before_the_deletion() {
    on_a_node(|node| async {
        node.want("p", HEEDS, json!({}));
        node.desk.running("p").await;
        node.said("p", "heeds").await;
        node.desk.take_statuses(false);
        node.desk.delete("p", 30);
        node.vanished(&node.path("kubelet/pods").join(node.uid("p"))).await;
        node.desk.not_taken(1).await;
        node.desk.take_statuses(true);
        node.desk.gone("p").await;
        assert_eq!(node.desk.last_phase("p").as_deref(), Some("Succeeded"));
        node
    });
}

/// As after a start of the machine, of which the runtime knows nothing.
fn a_pod_that_has_ended_is_not_run_again() {
    on_a_node(|node| async {
        let mut ended: Pod = serde_json::from_value(json!({
            "metadata": { "name": "done", "namespace": "default", "uid": node.uid("done") },
            "spec": { "restartPolicy": "Never", "containers": [{ "name": "c", "image": node.image(), "command": ["true"] }] },
            "status": { "phase": "Succeeded", "containerStatuses": [{
                "name": "c", "image": "i", "imageID": "i", "ready": false, "restartCount": 0,
                "state": { "terminated": { "exitCode": 0, "reason": "Completed" } } }] } }))
        .unwrap();
        node.desk.store().pods().put(ended.clone());
        node.want("other", "sleep 1000", json!({}));
        node.desk.running("other").await;
        assert_eq!(node.containers("done").await, []);
        let now = node.desk.pod("done").unwrap().status.clone().unwrap();
        let before = ended.status.take().unwrap();
        assert_eq!((now.phase, now.container_statuses), (before.phase, before.container_statuses));
        node
    });
}

fn restart_counts_go_on_without_a_record() {
    on_a_node(|mut node| async {
        node.want("p", "sleep 1000", json!({}));
        node.desk.running("p").await;
        let mut pod = node.desk.pod("p").unwrap().as_ref().clone();
        pod.status.as_mut().unwrap().container_statuses.as_mut().unwrap()[0].restart_count = 7;
        let started = pod.status.as_ref().unwrap().start_time.clone();
        let desk = Arc::new(Desk::new());
        desk.store().pods().put(pod);
        std::fs::remove_dir_all(node.path("records")).unwrap();
        node.restart(desk).await;
        node.want("other", "sleep 1000", json!({}));
        node.desk.running("other").await;
        assert_eq!(node.desk.container("p")["restartCount"], 7);
        assert_eq!(node.desk.pod("p").unwrap().status.as_ref().unwrap().start_time, started);
        node
    });
}

fn what_runs_keeps_its_ids_though_files_are_damaged() {
    if !sys::kernel::maps_owners_on_tmpfs() {
        return println!("skipped: needs Linux 6.3 for a pod with users of its own");
    }
    on_a_node(|mut node| async {
        let want = |node: &Node, name: &str| {
            let container = json!({ "name": "c", "image": node.image(), "command": ["sleep", "1000"] });
            let spec = json!({ "hostUsers": false, "terminationGracePeriodSeconds": 1, "containers": [container] });
            node.want_spec(name, spec);
        };
        want(&node, "first");
        node.desk.running("first").await;
        let ids = |node: &Node, pod: &str| {
            let file = node.path("kubelet/pods").join(node.uid(pod)).join("userns");
            (std::fs::read_to_string(&file).unwrap(), file)
        };
        let (before, file) = ids(&node, "first");
        let (record, containers) =
            (node.path("records").join(format!("{}.json", node.uid("first"))), node.containers("first").await);
        for file in [&file, &record] {
            std::fs::write(file, "{").unwrap();
        }
        node.restart(node.desk.clone()).await;
        want(&node, "second");
        node.desk.running("second").await;
        assert_eq!(ids(&node, "first").0, before);
        assert_ne!(ids(&node, "second").0, before);
        assert_eq!(node.containers("first").await, containers, "it runs on");
        for file in [file, record] {
            let aside = format!("{}.corrupt", file.display());
            assert!(std::path::Path::new(&aside).exists(), "{aside}");
        }
        node
    });
}

/// As a node that is told to end as soon as it has begun does.
fn what_nobody_wants_is_gone_when_it_is_waited_for() {
    on_a_node(|mut node| async {
        let container = json!({ "name": "c", "image": node.image(), "command": ["sleep", "1000"],
            "volumeMounts": [{ "name": "words", "mountPath": "/words" }] });
        let volume = json!({ "name": "words", "emptyDir": { "medium": "Memory" } });
        let spec = json!({ "terminationGracePeriodSeconds": 1, "containers": [container], "volumes": [volume] });
        node.want_spec("p", spec);
        node.desk.running("p").await;
        node.restart(Arc::new(Desk::new())).await;
        tokio::time::timeout(LIMIT, node.kubelet.tidied()).await.expect("it goes");
        assert!(node.containers("p").await.is_empty(), "a container is left");
        assert!(!node.path("kubelet/pods").join(node.uid("p")).exists(), "volumes are left");
        node
    });
}

/// A file of the node says what it wants and not what became of it: that the node has taken it is on record.
fn a_static_pod_that_was_taken_stays_taken() {
    on_a_node(|mut node| async {
        let site = |label: &str| Site {
            name: "n".to_owned(),
            labels: [("deck".to_owned(), label.to_owned())].into(),
            allocatable: [("pods".to_owned(), Quantity::from_milli(110_000))].into(),
            ..Site::default()
        };
        let of_file = |name: &str| -> Pod {
            let metadata = json!({ "name": name, "namespace": "default", "uid": node.uid(name),
                "annotations": { "kubernetes.io/config.source": "file" } });
            let container = json!({ "name": "c", "image": node.image(), "command": ["sleep", "1000"] });
            let spec = json!({ "nodeSelector": { "deck": "lower" }, "terminationGracePeriodSeconds": 1, "containers": [container] });
            serde_json::from_value(json!({ "metadata": metadata, "spec": spec })).unwrap()
        };
        let (taken, late) = (of_file("taken"), of_file("late"));
        node.restart_at(site("lower")).await;
        node.desk.store().pods().put(taken.clone());
        node.desk.running("taken").await;
        let started = node.desk.pod("taken").unwrap().status.as_ref().unwrap().start_time.clone();
        node.go_down().await;
        let desk = Arc::new(Desk::new());
        desk.store().pods().put(taken);
        // Nobody who is new would be taken.
        node.restart_at_for(site("upper"), desk).await;
        node.desk.store().pods().put(late);
        node.desk.when("late is rejected", |desk| desk.phase("late").as_deref() == Some("Failed")).await;
        node.desk.running("taken").await;
        assert_eq!(node.desk.pod("taken").unwrap().status.as_ref().unwrap().start_time, started);
        node
    });
}

fn what_runs_is_kept_until_the_source_has_named_all_pods() {
    on_a_node(|mut node| async {
        node.want("named-late", "sleep 1000", json!({}));
        node.want("unwanted", "sleep 1000", json!({}));
        node.desk.running("named-late").await;
        node.desk.running("unwanted").await;
        let (before, unwanted) = (node.containers("named-late").await, sandbox(&node, "unwanted").await);
        let mut events = node.events().await;
        let old = node.restart(Arc::new(Desk::unknowing())).await;
        node.want("other", "sleep 1000", json!({}));
        node.desk.running("other").await;
        assert_eq!(node.containers("unwanted").await.len(), 1, "nobody knows yet that nobody wants it");
        node.desk.store().pods().put(old.pod("named-late").unwrap().as_ref().clone());
        node.desk.store().set_synced();
        removed(&mut events, &unwanted).await;
        node.desk.running("named-late").await;
        assert_eq!(node.containers("named-late").await, before, "it was taken over as it runs");
        node
    });
}
