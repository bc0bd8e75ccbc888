//! Images of pods.

use cri::{ImageService as _, v1};
use serde_json::{Value, json};
use testkit::serial::Test;

use crate::desk::Desk;
use crate::fixture::{Node, on_a_node};

pub(crate) const TESTS: &[Test] = &[
    (
        "an_image_that_is_removed_before_a_start_is_pulled_again",
        an_image_that_is_removed_before_a_start_is_pulled_again,
    ),
    ("an_image_of_a_volume_is_pulled_again_too", an_image_of_a_volume_is_pulled_again_too),
];

/// A pod whose init container waits at a gate, which is opened when the other image has been removed.
async fn removed_meanwhile(node: &Node, main: Value, volume: Value) {
    let gate = node.path("gate");
    std::fs::create_dir(&gate).unwrap();
    let wait = json!({ "name": "i", "image": node.image(), "imagePullPolicy": "IfNotPresent",
        "command": ["sh", "-c", "until [ -e /gate/open ]; do sleep 0.05; done"],
        "volumeMounts": [{ "name": "gate", "mountPath": "/gate" }] });
    let volumes = json!([{ "name": "gate", "hostPath": { "path": gate } }, volume]);
    node.want_spec("p", json!({ "terminationGracePeriodSeconds": 1, "initContainers": [wait], "containers": [main], "volumes": volumes }));
    let both = |desk: &Desk| desk.told("p", "Started") == 1 && desk.told("p", "Pulled") >= 2;
    node.desk.when("both images are there, and the gate is waited at", both).await;
    let image = Some(v1::ImageSpec { image: node.other_image().to_owned(), ..Default::default() });
    node.images.remove_image(v1::RemoveImageRequest { image }).await.unwrap();
    std::fs::write(gate.join("open"), "").unwrap();
    node.desk.running("p").await;
}

fn an_image_that_is_removed_before_a_start_is_pulled_again() {
    on_a_node(|node| async {
        let main = json!({ "name": "c", "image": node.other_image(), "imagePullPolicy": "IfNotPresent", "command": ["sleep", "1000"] });
        removed_meanwhile(&node, main, json!({ "name": "unused" })).await;
        assert_eq!(node.desk.told("p", "Pulling"), 3, "once more, and not more often");
        assert_eq!(node.desk.told("p", "Failed"), 1);
        node
    });
}

fn an_image_of_a_volume_is_pulled_again_too() {
    on_a_node(|node| async {
        let main = json!({ "name": "c", "image": node.image(), "imagePullPolicy": "IfNotPresent", "command": ["sleep", "1000"],
            "volumeMounts": [{ "name": "v", "mountPath": "/v" }] });
        let volume = json!({ "name": "v", "image": { "reference": node.other_image(), "pullPolicy": "IfNotPresent" } });
        removed_meanwhile(&node, main, volume).await;
        assert_eq!(node.desk.told("p", "Failed"), 1);
        node
    });
}
