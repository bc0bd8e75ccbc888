//! Pods that are changed while they run.

use std::sync::Arc;

use serde_json::{Value, json};
use testkit::serial::Test;

use crate::desk::Desk;
use crate::fixture::{Node, on_a_node};

pub(crate) const TESTS: &[Test] =
    &[("an_ephemeral_container_looks_into_a_pod", an_ephemeral_container_looks_into_a_pod)];

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
