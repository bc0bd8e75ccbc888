//! The static policy of the CPU manager, on the machine's own CPUs.

use std::path::Path;

use kubelet::resources::cpu::{CpuSet, Options, Reserved, Static};
use kubelet::resources::memory::{self, Bytes};
use kubelet::resources::policies::Policies;
use kubelet::resources::topology::Machine;
use serde_json::{Value, json};
use testkit::serial::Test;

use crate::fixture::{Node, on_a_node};

pub(crate) const TESTS: &[Test] = &[("a_cpu_of_its_own", a_cpu_of_its_own)];

/// Wants a pod that is ready when it runs on exactly these CPUs.
fn want(node: &Node, name: &str, cpus: &CpuSet, resources: Value) {
    let probe = format!("[ \"$(grep Cpus_allowed_list /proc/1/status | cut -f 2)\" = {cpus} ]");
    let container = json!({
        "name": "c", "image": node.image(), "command": ["sleep", "1000"], "resources": resources,
        "readinessProbe": { "exec": { "command": ["sh", "-c", probe] }, "periodSeconds": 1, "failureThreshold": 1 },
    });
    node.want_spec(name, json!({ "terminationGracePeriodSeconds": 0, "containers": [container] }));
}

async fn ready(node: &Node, name: &str, is: bool) {
    let what = format!("{name} is ready: {is}");
    node.desk.when(&what, |desk| desk.container(name)["ready"] == is && desk.container(name)["started"] == true).await;
}

/// The bytes that a pod's container has of the first NUMA node, as the state file says.
fn memory_of(node: &Node, name: &str) -> u64 {
    let file = std::fs::read(node.path("kubelet/memory_manager_state")).unwrap();
    let state: Value = serde_json::from_slice(&file).unwrap();
    state["entries"][node.uid(name)]["c"][0]["size"].as_u64().unwrap_or(0)
}

fn a_cpu_of_its_own() {
    on_a_node(async |mut node| {
        let all = Machine::read(Path::new("/sys")).all();
        let Some(last) = all.iter().last().filter(|_| all.len() > 1) else {
            println!("skipped: needs two CPUs");
            return node;
        };
        let own: CpuSet = [last].into_iter().collect();
        let rest = all.without(&own);
        let cpu = Some(Static { options: Options::default(), reserved: Reserved::Named(rest.clone()) });
        let kept: Bytes = [("memory".to_owned(), 1 << 20)].into();
        let memory = Some(memory::Static { reserved: [(0, kept.clone())].into(), kept });
        let policies = Policies { cpu, memory, ..Policies::default() };
        let desk = node.desk.clone();
        node.restart_with(policies.clone(), desk.clone()).await;
        want(&node, "shared", &rest, json!({}));
        ready(&node, "shared", false).await;
        let guaranteed = json!({ "limits": { "cpu": "1", "memory": "64Mi" } });
        want(&node, "own", &own, guaranteed.clone());
        ready(&node, "own", true).await;
        // Who was there before has made room.
        ready(&node, "shared", true).await;
        assert_eq!(memory_of(&node, "own"), 64 << 20);
        node.restart_with(policies.clone(), desk.clone()).await;
        assert_eq!(memory_of(&node, "own"), 64 << 20);
        // What runs tells what the files do not any more.
        for file in ["cpu_manager_state", "memory_manager_state"] {
            std::fs::write(node.path("kubelet").join(file), "{").unwrap();
        }
        node.restart_with(policies, desk).await;
        assert_eq!(memory_of(&node, "own"), 64 << 20);
        assert!(node.path("kubelet/cpu_manager_state.corrupt").exists());
        want(&node, "second", &own, guaranteed);
        node.desk.when("there is no second CPU", |desk| desk.phase("second").as_deref() == Some("Failed")).await;
        let status = serde_json::to_value(node.desk.pod("second").unwrap().status.clone()).unwrap();
        assert_eq!(status["reason"], "UnexpectedAdmissionError");
        let cause = "not enough cpus available to satisfy request: requested=1, available=0";
        assert!(status["message"].as_str().unwrap().contains(cause), "{status}");
        assert_eq!(node.desk.container("own")["restartCount"], 0);
        node.desk.delete("own", 0);
        ready(&node, "shared", false).await;
        node.until(&node.path("kubelet"), "its memory is free again", || memory_of(&node, "own") == 0).await;
        node
    });
}
