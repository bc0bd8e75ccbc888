//! A critical pod gets its place though others have it.

use kubelet::admission::Site;
use pod::quantity::Quantity;
use serde_json::{Value, json};
use testkit::serial::Test;

use crate::fixture::{Node, on_a_node};

pub(crate) const TESTS: &[Test] = &[("a_critical_pod_gets_its_place", a_critical_pod_gets_its_place)];

fn want(node: &Node, name: &str, priority: i32, script: &str, cpu: &str) {
    want_probed(node, name, priority, script, cpu, Value::Null);
}

fn want_probed(node: &Node, name: &str, priority: i32, script: &str, cpu: &str, probe: Value) {
    let resources = json!({ "requests": { "cpu": cpu } });
    let container = json!({ "name": "c", "image": node.image(), "command": ["sh", "-c", script],
        "resources": resources, "readinessProbe": probe });
    let spec = json!({ "terminationGracePeriodSeconds": 60, "priority": priority, "containers": [container] });
    node.want_spec(name, spec);
}

fn status(node: &Node, name: &str) -> Value {
    serde_json::to_value(node.desk.pod(name).unwrap().status.clone()).unwrap()
}

fn a_critical_pod_gets_its_place() {
    on_a_node(async |mut node| {
        let allocatable = [("cpu", 1000), ("pods", 110_000)];
        let allocatable = allocatable.map(|(name, milli)| (name.to_owned(), Quantity::from_milli(milli))).into();
        node.restart_at(Site { name: "n".to_owned(), allocatable, ..Site::default() }).await;
        // It ends when the test lets it, and is ready once it has said what its stop signal means.
        let gate = "trap 'until [ -e /gate ]; do sleep 1; done; exit 0' TERM; touch /heeds; sleep 1000 & wait";
        let heeds = json!({ "exec": { "command": ["test", "-e", "/heeds"] }, "periodSeconds": 1 });
        want_probed(&node, "large", 0, gate, "700m", heeds);
        want(&node, "small", 0, "sleep 1000", "200m");
        node.desk.when("large is ready", |desk| desk.container("large")["ready"] == true).await;
        node.desk.running("small").await;
        want(&node, "critical", 2_000_000_000, "sleep 1000", "600m");
        node.desk
            .when("large goes", |desk| {
                desk.phase("large").as_deref() == Some("Running") && desk.told("large", "Preempting") == 1
            })
            .await;
        // Its room is given away, so another pod does not find any.
        want(&node, "late", 0, "sleep 1000", "300m");
        node.desk.when("late is rejected", |desk| desk.phase("late").as_deref() == Some("Failed")).await;
        assert_eq!(status(&node, "late")["reason"], "OutOfcpu");
        assert!(node.containers("critical").await.is_empty(), "what it needs still runs");
        let open = vec!["touch".to_owned(), "/gate".to_owned()];
        let container_id = node.containers("large").await[0].id.clone();
        let request = cri::v1::ExecSyncRequest { container_id, cmd: open, timeout: 10 };
        let opened = cri::RuntimeService::exec_sync(&*node.runtime, request).await.unwrap();
        assert_eq!(opened.exit_code, 0, "{opened:?}");
        node.desk.running("critical").await;
        let large = status(&node, "large");
        assert_eq!((&large["phase"], &large["reason"]), (&json!("Failed"), &json!("Preempting")), "{large}");
        assert_eq!(large["message"], "Preempted in order to admit critical pod");
        let conditions = large["conditions"].as_array().unwrap();
        let target = conditions.iter().find(|one| one["type"] == "DisruptionTarget").unwrap();
        assert_eq!(target["reason"], "TerminationByKubelet");
        assert_eq!(target["message"], "Pod was preempted by Kubelet to accommodate a critical pod.");
        assert_eq!(node.desk.phase("small").as_deref(), Some("Running"));
        // Nobody is left who would make room for this one.
        want(&node, "more", 2_000_000_000, "sleep 1000", "700m");
        node.desk.when("there is no room", |desk| desk.phase("more").as_deref() == Some("Failed")).await;
        assert_eq!(status(&node, "more")["reason"], "UnexpectedAdmissionError");
        assert_eq!(node.desk.phase("small").as_deref(), Some("Running"), "nobody goes in vain");
        node
    });
}
