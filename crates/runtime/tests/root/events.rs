//! What those who listen are told of each step of a pod, and how it then is (CRI `GetContainerEvents`).

use std::collections::HashMap;

use cri::v1;
use cri::v1::{ContainerEventType as Kind, ContainerState, PodSandboxState};
use futures_util::StreamExt as _;
use testkit::serial::Test;

use crate::fixture::{Node, on_a_node, script_config};

pub(crate) const TESTS: &[Test] =
    &[("each_step_of_a_pod_is_told_with_its_state", each_step), ("events_have_whole_statuses", whole_statuses)];

/// Whom an event is about and what happened; how the sandbox is, and whether it has an address; how its containers are.
///
/// As containerd tells it, but for one line: there a sandbox is ready until its own process has ended, here it is not from the
/// moment that it is being stopped.
const TABLE: &[&str] = &[
    "sandbox created | ready, address |",
    "sandbox started | ready, address |",
    "main created | ready, address | main created",
    "main started | ready, address | main running",
    "side created | ready, address | main running, side created",
    "side started | ready, address | main running, side running",
    "main stopped | ready, address | main exited 3 Error, side running",
    "main deleted | ready, address | side running",
    // There: ready.
    "side stopped | not ready, address | side exited 137 Error",
    "sandbox stopped | not ready | side exited 137 Error",
    "side deleted | not ready |",
    "sandbox deleted | not ready |",
];

/// An event as a line of the table.
fn line(event: &v1::ContainerEventResponse, names: &HashMap<String, &str>) -> String {
    let kind = match event.container_event_type() {
        Kind::ContainerCreatedEvent => "created",
        Kind::ContainerStartedEvent => "started",
        Kind::ContainerStoppedEvent => "stopped",
        Kind::ContainerDeletedEvent => "deleted",
    };
    let sandbox = event.pod_sandbox_status.as_ref().unwrap();
    let ready = if sandbox.state() == PodSandboxState::SandboxReady { "ready" } else { "not ready" };
    let address = if sandbox.network.as_ref().unwrap().ip.is_empty() { "" } else { ", address" };
    let containers = event.containers_statuses.iter().map(|status| {
        let state = match status.state() {
            ContainerState::ContainerCreated => "created".to_owned(),
            ContainerState::ContainerRunning => "running".to_owned(),
            ContainerState::ContainerExited => format!("exited {} {}", status.exit_code, status.reason),
            ContainerState::ContainerUnknown => "unknown".to_owned(),
        };
        format!("{} {state}", names[&status.id])
    });
    let containers = containers.collect::<Vec<_>>().join(", ");
    format!("{} {kind} | {ready}{address} | {containers}", names[&event.container_id]).trim_end().to_owned()
}

/// A container is asked to end by a file, so that it runs before.
async fn start(node: &Node, sandbox: &str, config: &v1::PodSandboxConfig, name: &str) -> String {
    let script = "while [ ! -e /tmp/go ]; do usleep 1000; done; exit 3";
    let container = node.create(sandbox, config, script_config(name, script)).await.unwrap();
    node.start_container(&container).await.unwrap();
    container
}

fn each_step() {
    on_a_node(|node| async {
        let mut events = node.events().await;
        let begun = now();
        let config = node.sandbox_config("told");
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let main = start(&node, &sandbox, &config, "main").await;
        let side = start(&node, &sandbox, &config, "side").await;
        node.exec(&main, &["touch", "/tmp/go"], 60).await.unwrap();
        node.exited(&main).await;
        node.remove_container(&main).await.unwrap();
        node.stop_sandbox(&sandbox).await.unwrap();
        node.remove_sandbox(&sandbox).await.unwrap();
        let names = HashMap::from([(sandbox, "sandbox"), (main, "main"), (side, "side")]);
        let (mut lines, mut before) = (Vec::new(), begun);
        while lines.len() < TABLE.len() {
            let event = events.next().await.unwrap().unwrap();
            assert!(event.created_at >= before, "{event:?}");
            // Nothing of what it tells comes after it.
            for status in &event.containers_statuses {
                let latest = status.created_at.max(status.started_at).max(status.finished_at);
                assert!(begun <= status.created_at && latest <= event.created_at, "{event:?}");
            }
            before = event.created_at;
            lines.push(line(&event, &names));
        }
        assert!(before <= now());
        assert_eq!(lines, TABLE);
        node
    });
}

/// What an event says is what the same moment's calls answer.
fn whole_statuses() {
    on_a_node(|node| async {
        let config = node.sandbox_config("whole");
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let mut events = node.events().await;
        let container = start(&node, &sandbox, &config, "main").await;
        node.exec(&container, &["touch", "/tmp/go"], 60).await.unwrap();
        node.exited(&container).await;
        let mut last = None;
        while last.as_ref().is_none_or(|event: &v1::ContainerEventResponse| {
            event.container_event_type() != Kind::ContainerStoppedEvent
        }) {
            last = Some(events.next().await.unwrap().unwrap());
        }
        let event = last.unwrap();
        assert_eq!(event.pod_sandbox_status, Some(node.sandbox_status(&sandbox).await));
        assert_eq!(event.containers_statuses, [node.status(&container).await]);
        assert_eq!(event.container_id, container);
        node
    });
}

/// In nanoseconds since 1970, as CRI has it.
fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    i64::try_from(since.as_nanos()).unwrap()
}
