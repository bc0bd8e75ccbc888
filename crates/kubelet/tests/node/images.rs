//! Images of pods.

use cri::{ImageService as _, v1};
use kubelet::{Allowlist, Verification};
use serde_json::{Value, json};
use testkit::registry::{PASSWORD, USER};
use testkit::serial::Test;

use crate::desk::Desk;
use crate::fixture::{Node, on_a_node};

pub(crate) const TESTS: &[Test] = &[
    (
        "an_image_that_is_removed_before_a_start_is_pulled_again",
        an_image_that_is_removed_before_a_start_is_pulled_again,
    ),
    ("an_image_of_a_volume_is_pulled_again_too", an_image_of_a_volume_is_pulled_again_too),
    ("whether_an_image_is_pulled_is_the_policys_matter", whether_an_image_is_pulled_is_the_policys_matter),
    ("an_image_that_is_never_pulled_is_waited_for", an_image_that_is_never_pulled_is_waited_for),
    ("a_name_of_no_image_is_told", a_name_of_no_image_is_told),
    ("an_image_that_wants_a_login_is_for_those_who_have_one", an_image_that_wants_a_login_is_for_those_who_have_one),
    ("a_login_is_asked_for_as_the_operator_wants_it", a_login_is_asked_for_as_the_operator_wants_it),
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

/// A pod that ends by itself, with an image and perhaps a policy.
fn want_once(node: &Node, pod: &str, image: &str, policy: Option<&str>) {
    let mut container = json!({ "name": "c", "image": image, "command": ["true"] });
    if let Some(policy) = policy {
        container["imagePullPolicy"] = policy.into();
    }
    node.want_spec(pod, json!({ "restartPolicy": "Never", "containers": [container] }));
}

async fn remove(node: &Node, image: &str) {
    let image = Some(v1::ImageSpec { image: image.to_owned(), ..Default::default() });
    node.images.remove_image(v1::RemoveImageRequest { image }).await.unwrap();
}

/// What is there may be as it is wanted, and is pulled only where its policy asks for it.
fn whether_an_image_is_pulled_is_the_policys_matter() {
    on_a_node(|node| async {
        let (tagged, latest) = (node.image().to_owned(), node.latest_image());
        let table = [
            // The policy, the image, whether it is there before, whether it is pulled.
            (Some("IfNotPresent"), &tagged, false, true),
            (Some("IfNotPresent"), &tagged, true, false),
            (Some("Always"), &tagged, true, true),
            (Some("Always"), &tagged, false, true),
            (Some("Never"), &tagged, true, false),
            (None, &tagged, true, false),
            (None, &tagged, false, true),
            (Some("IfNotPresent"), &latest, false, true),
            (Some("Never"), &latest, true, false),
            (None, &latest, true, true),
        ];
        for (number, (policy, image, is_there, is_pulled)) in table.into_iter().enumerate() {
            let case = format!("{policy:?} for {image}, which is there: {is_there}");
            if !is_there {
                remove(&node, image).await;
            }
            let pod = format!("p{number}");
            want_once(&node, &pod, image, policy);
            node.desk.when(&case, |desk| desk.phase(&pod).as_deref() == Some("Succeeded")).await;
            assert_eq!(node.desk.told(&pod, "Pulling"), usize::from(is_pulled), "{case}");
            assert_eq!(node.desk.told(&pod, "Pulled"), 1, "{case}");
            node.desk.delete(&pod, 0);
            node.desk.gone(&pod).await;
        }
        node
    });
}

fn an_image_that_is_never_pulled_is_waited_for() {
    on_a_node(|node| async {
        want_once(&node, "p", node.image(), Some("Never"));
        let waits = |desk: &Desk| desk.container("p")["state"]["waiting"]["reason"] == "ErrImageNeverPull";
        node.desk.when("it waits", waits).await;
        let message = node.desk.container("p")["state"]["waiting"]["message"].to_string();
        assert!(message.contains("is not present with pull policy of Never"), "{message}");
        node.desk.when("it is told", |desk| desk.told("p", "ErrImageNeverPull") > 0).await;
        let image = Some(v1::ImageSpec { image: node.image().to_owned(), ..Default::default() });
        node.images.pull_image(v1::PullImageRequest { image, ..Default::default() }).await.unwrap();
        node.desk.when("it has run", |desk| desk.phase("p").as_deref() == Some("Succeeded")).await;
        assert_eq!(node.desk.told("p", "Pulling"), 0, "it was not to be pulled");
        node
    });
}

fn a_name_of_no_image_is_told() {
    on_a_node(|node| async {
        want_once(&node, "p", "Not A Name", None);
        node.desk.when("it is told", |desk| desk.told("p", "InspectFailed") > 0).await;
        let waits = |desk: &Desk| desk.container("p")["state"]["waiting"]["reason"] == "InvalidImageName";
        node.desk.when("it waits", waits).await;
        assert_eq!(node.desk.told("p", "Pulling"), 0);
        node
    });
}

/// The login that the registry takes.
fn login() -> v1::AuthConfig {
    v1::AuthConfig { username: USER.to_owned(), password: PASSWORD.to_owned(), ..v1::AuthConfig::default() }
}

/// Waits until the container of a pod is refused its image, and removes the pod.
async fn refused(node: &Node, pod: &str, reason: &str, says: &str) {
    let waiting = |desk: &Desk| desk.container(pod)["state"]["waiting"].clone();
    let is_refused = |desk: &Desk| {
        waiting(desk)["reason"] == reason && waiting(desk)["message"].as_str().is_some_and(|text| text.contains(says))
    };
    node.desk.when(&format!("{pod} is refused its image: {reason}, {says}"), is_refused).await;
    node.desk.delete(pod, 0);
    node.desk.gone(pod).await;
}

/// Waits until a pod has run, which pulled so often, and removes it.
async fn has_run(node: &Node, pod: &str, pulls: usize) {
    node.desk.when(&format!("{pod} has run"), |desk| desk.phase(pod).as_deref() == Some("Succeeded")).await;
    assert_eq!(node.desk.told(pod, "Pulling"), pulls, "{pod}");
    node.desk.delete(pod, 0);
    node.desk.gone(pod).await;
}

/// KEP-2535: that an image is on the node does not make it everybody's.
fn an_image_that_wants_a_login_is_for_those_who_have_one() {
    on_a_node(|mut node| async {
        let locked = node.locked_registry();
        let image = format!("{}/busybox:1", locked.address());
        node.desk.log_in("first", login(), "theirs");
        want_once(&node, "first", &image, Some("IfNotPresent"));
        has_run(&node, "first", 1).await;
        want_once(&node, "stranger", &image, Some("IfNotPresent"));
        refused(&node, "stranger", "ImagePullBackOff", "refuses").await;
        want_once(&node, "quiet-stranger", &image, Some("Never"));
        refused(&node, "quiet-stranger", "ErrImageNeverPull", "is not present with pull policy of Never").await;
        let wrong = v1::AuthConfig { password: "wrong".to_owned(), ..login() };
        node.desk.log_in("guesser", wrong, "guess");
        want_once(&node, "guesser", &image, Some("IfNotPresent"));
        refused(&node, "guesser", "ImagePullBackOff", "refuses").await;
        // Whoever shows the same login needs no registry.
        drop(locked);
        for (pod, secret) in [("same", "theirs"), ("other", "others")] {
            node.desk.log_in(pod, login(), secret);
            want_once(&node, pod, &image, Some("Never"));
            has_run(&node, pod, 0).await;
            assert!(node.desk.messages(pod, "Pulled")[0].ends_with("and can be accessed by the pod"));
        }
        // The next kubelet knows it, too.
        node.restart(node.desk.clone()).await;
        node.desk.log_in("later", login(), "others");
        want_once(&node, "later", &image, Some("Never"));
        has_run(&node, "later", 0).await;
        want_once(&node, "late-stranger", &image, Some("Never"));
        refused(&node, "late-stranger", "ErrImageNeverPull", "is not present with pull policy of Never").await;
        node
    });
}

fn a_login_is_asked_for_as_the_operator_wants_it() {
    on_a_node(|mut node| async {
        // What the kubelet has not pulled is everybody's, unless nothing is.
        let loaded = Some(v1::ImageSpec { image: node.image().to_owned(), ..Default::default() });
        node.images.pull_image(v1::PullImageRequest { image: loaded, ..Default::default() }).await.unwrap();
        want_once(&node, "loaded", node.image(), Some("Never"));
        has_run(&node, "loaded", 0).await;
        node.restart_verifying(Verification::Always).await;
        want_once(&node, "always", node.image(), Some("Never"));
        refused(&node, "always", "ErrImageNeverPull", "is not present").await;
        let name = node.image().trim_end_matches(":1").to_owned();
        node.restart_verifying(Verification::NotListed(Allowlist::parse(&[name]).unwrap())).await;
        want_once(&node, "listed", node.image(), Some("Never"));
        has_run(&node, "listed", 0).await;

        let locked = node.locked_registry();
        let image = format!("{}/other:1", locked.address());
        node.desk.log_in("first", login(), "theirs");
        want_once(&node, "first", &image, None);
        has_run(&node, "first", 1).await;
        want_once(&node, "unlisted", &image, Some("Never"));
        refused(&node, "unlisted", "ErrImageNeverPull", "is not present").await;
        node.restart_verifying(Verification::Never).await;
        want_once(&node, "never", &image, Some("Never"));
        has_run(&node, "never", 0).await;
        node
    });
}
