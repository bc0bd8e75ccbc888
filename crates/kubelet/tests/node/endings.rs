//! Pods end, whatever hangs.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cri::{RuntimeService as _, v1};
use k8s_openapi::api::core::v1::Pod;
use kubelet::Barrier;
use serde_json::{Value, json};
use sys::rustix::process::{Signal, kill_process};
use testkit::serial::Test;

use crate::fixture::{Node, on_a_node};

pub(crate) const TESTS: &[Test] = &[
    ("a_deletion_waits_for_no_mount", a_deletion_waits_for_no_mount),
    ("a_deletion_waits_for_no_start", a_deletion_waits_for_no_start),
    ("a_deletion_waits_for_no_registry", a_deletion_waits_for_no_registry),
    ("a_sandbox_that_comes_too_late_goes", a_sandbox_that_comes_too_late_goes),
    ("a_volume_that_stays_goes_later", a_volume_that_stays_goes_later),
    ("who_is_deleted_by_force_has_no_time_of_its_own", who_is_deleted_by_force_has_no_time_of_its_own),
    ("who_was_killed_for_want_of_memory_is_told", who_was_killed_for_want_of_memory_is_told),
    ("who_was_killed_is_told_where_the_log_has_no_device", who_was_killed_is_told_where_the_log_has_no_device),
    ("a_pod_leaves_services_before_it_hears_of_its_end", a_pod_leaves_services_before_it_hears_of_its_end),
    ("service_rules_that_stay_are_not_waited_for_for_ever", service_rules_that_stay_are_not_waited_for_for_ever),
];

/// Service rules that lead to an ending pod until they are told to let it go.
#[derive(Default)]
struct Rules {
    asked: tokio::sync::Notify,
    addresses: Mutex<Vec<String>>,
    leave: tokio::sync::Notify,
}

#[async_trait::async_trait]
impl Barrier for Rules {
    async fn left(&self, _: &Pod, addresses: &[String]) {
        self.addresses.lock().unwrap().extend_from_slice(addresses);
        self.asked.notify_one();
        self.leave.notified().await;
    }
}

/// Runs a pod that lists `directory` when its preStop hook runs and when it is told to end.
async fn run_witness(node: &Node, directory: &Path) {
    std::fs::create_dir(directory).unwrap();
    let script = "trap 'ls /v > /v/at-sigterm; exit 0' TERM; echo ready; sleep 1000 & wait";
    let container = json!({
        "name": "c", "image": node.image(), "command": ["sh", "-c", script],
        "volumeMounts": [{ "name": "v", "mountPath": "/v" }],
        "lifecycle": { "preStop": { "exec": { "command": ["sh", "-c", "ls /v > /v/at-prestop"] } } },
    });
    node.want_spec("p", spec(json!([container]), json!({ "name": "v", "hostPath": { "path": directory } })));
    node.desk.running("p").await;
    node.said("p", "ready").await;
}

fn a_pod_leaves_services_before_it_hears_of_its_end() {
    on_a_node(|mut node| async {
        let rules = Arc::new(Rules::default());
        node.restart_beside(rules.clone(), Duration::from_secs(600)).await;
        let directory = node.path("seen");
        run_witness(&node, &directory).await;
        node.desk.delete("p", 600);
        rules.asked.notified().await;
        // A round trip to the container, which runs as before.
        let container_id = node.containers("p").await[0].id.clone();
        let cmd = ["ls", "/v"].map(str::to_owned).to_vec();
        let request = v1::ExecSyncRequest { container_id, cmd, timeout: 60 };
        let reply = node.runtime.exec_sync(request).await.unwrap();
        assert_eq!(
            (reply.exit_code, String::from_utf8_lossy(&reply.stdout).as_ref()),
            (0, ""),
            "nothing was run in it"
        );
        assert_eq!(rules.addresses.lock().unwrap().len(), 1, "the pod's address");
        std::fs::write(directory.join("left"), "").unwrap();
        rules.leave.notify_one();
        node.desk.gone("p").await;
        for moment in ["at-prestop", "at-sigterm"] {
            let seen = std::fs::read_to_string(directory.join(moment)).unwrap();
            assert!(seen.lines().any(|name| name == "left"), "{moment}: {seen:?}");
        }
        node
    });
}

fn service_rules_that_stay_are_not_waited_for_for_ever() {
    on_a_node(|mut node| async {
        node.restart_beside(Arc::new(Rules::default()), Duration::from_millis(100)).await;
        let directory = node.path("seen");
        run_witness(&node, &directory).await;
        node.desk.delete("p", 600);
        node.desk.gone("p").await;
        let seen = std::fs::read_to_string(directory.join("at-sigterm")).unwrap();
        assert!(seen.lines().any(|name| name == "at-prestop"), "it ends as always: {seen:?}");
        node
    });
}

/// A file system whose server never answers; it fails as soon as the server is dropped.
fn hang(at: &Path) -> Option<std::fs::File> {
    std::fs::create_dir_all(at).unwrap();
    let server = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").ok()?;
    let fd = server.as_raw_fd().to_string();
    let options = [("fd", fd.as_str()), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")];
    let mount = sys::mount::new_filesystem("fuse", &options.map(|(key, value)| (key, Some(value))), 0).ok()?;
    sys::mount::attach_at(mount.as_fd(), at).ok()?;
    Some(server)
}

/// Runs `test` with a directory that does not answer.
async fn beside_a_hung_path(node: Node, test: impl AsyncFnOnce(&Node, &Path)) -> Node {
    let hung = node.path("hung");
    let Some(server) = hang(&hung) else {
        println!("skipped: needs /dev/fuse");
        return node;
    };
    test(&node, &hung).await;
    drop(server);
    sys::mount::detach(&hung).unwrap();
    node
}

fn container(node: &Node, name: &str, mounts: Value) -> Value {
    json!({ "name": name, "image": node.image(), "command": ["sleep", "1000"], "volumeMounts": mounts })
}

fn spec(containers: Value, volume: Value) -> Value {
    json!({ "terminationGracePeriodSeconds": 1, "containers": containers, "volumes": [volume] })
}

fn a_deletion_waits_for_no_mount() {
    on_a_node(|node| {
        beside_a_hung_path(node, async |node, hung| {
            let volume = json!({ "name": "v", "hostPath": { "path": hung.join("x"), "type": "Directory" } });
            node.want_spec(
                "stuck",
                spec(json!([container(node, "c", json!([{ "name": "v", "mountPath": "/v" }]))]), volume),
            );
            node.desk.when("it is mounted", |desk| desk.phase("stuck").is_some()).await;
            node.desk.delete("stuck", 30);
            node.desk.gone("stuck").await;
            assert_eq!(node.desk.told("stuck", "FailedMount"), 0, "the mount was to hang");
        })
    });
}

/// One container runs; of the others one hangs in the resolution of its sub-path, one in the runtime.
fn a_deletion_waits_for_no_start() {
    on_a_node(|node| {
        beside_a_hung_path(node, async |node, hung| {
            let volume = json!({ "name": "v", "hostPath": { "path": hung } });
            let containers = json!([
                container(node, "runs", json!([])),
                container(node, "resolves", json!([{ "name": "v", "mountPath": "/v", "subPath": "x" }])),
                container(node, "opens", json!([{ "name": "v", "mountPath": "/v" }])),
            ]);
            node.want_spec("stuck", spec(containers, volume));
            node.desk.when("one of them runs", |desk| desk.told("stuck", "Started") == 1).await;
            node.desk.delete("stuck", 1);
            node.desk.gone("stuck").await;
            assert_eq!(node.desk.told("stuck", "Started"), 1);
            assert_eq!(node.desk.told("stuck", "Failed"), 0);
        })
    });
}

fn a_deletion_waits_for_no_registry() {
    on_a_node(|node| async {
        kill_process(node.registry, Signal::STOP).unwrap();
        let volume = json!({ "name": "v", "image": { "reference": node.image() } });
        let mount = json!([{ "name": "v", "mountPath": "/v" }]);
        node.want_spec("stuck", spec(json!([container(&node, "c", mount)]), volume));
        node.desk.when("it is pulled", |desk| desk.told("stuck", "Pulling") == 2).await;
        node.desk.delete("stuck", 30);
        node.desk.gone("stuck").await;
        kill_process(node.registry, Signal::CONT).unwrap();
        assert_eq!(node.desk.told("stuck", "Failed"), 0, "the pull was to hang");
        node
    });
}

/// A CNI plugin that connects a pod when its gate is closed again, and removes a file when it disconnects one.
const SLOW_PLUGIN: &str = r#"#!/bin/sh
case $CNI_COMMAND in
ADD) read line < ${0%/*}/gate; echo '{"cniVersion": "1.0.0", "ips": [{"address": "10.1.2.3/24"}]}' ;;
DEL) rm -f ${0%/*}/connected ;;
VERSION) echo '{"cniVersion": "1.0.0", "supportedVersions": ["1.0.0"]}' ;;
esac
"#;

fn a_sandbox_that_comes_too_late_goes() {
    on_a_node(|node| async {
        let cni = node.path("cni");
        std::fs::create_dir(&cni).unwrap();
        std::fs::write(cni.join("slow"), SLOW_PLUGIN).unwrap();
        std::fs::set_permissions(cni.join("slow"), std::fs::Permissions::from_mode(0o755)).unwrap();
        sys::tree::Dir::open(&cni).unwrap().create_node(b"gate", sys::tree::Node::Fifo, 0o600).unwrap();
        let config = json!({ "cniVersion": "1.0.0", "name": "n", "plugins": [{ "type": "slow" }] });
        std::fs::write(cni.join("1.conflist"), config.to_string()).unwrap();

        node.want("late", "sleep 1000", json!({}));
        let connected = cni.join("connected");
        std::fs::write(&connected, "").unwrap();
        let gate = tokio::task::spawn_blocking(move || std::fs::File::create(cni.join("gate")).unwrap()).await.unwrap();
        node.desk.delete("late", 30);
        node.desk.gone("late").await;
        drop(gate);
        node.vanished(&connected).await;
        node
    });
}

fn a_volume_that_stays_goes_later() {
    on_a_node(|node| async {
        node.want("p", "sleep 1000", json!({}));
        node.desk.running("p").await;
        let pods = node.path("kubelet/pods");
        let frozen = sys::mount::copy_tree(&pods, true).unwrap();
        let read_only = sys::mount::Change { set: sys::mount::attribute::READ_ONLY, ..Default::default() };
        sys::mount::set_attributes(frozen.as_fd(), &read_only).unwrap();
        sys::mount::attach_at(frozen.as_fd(), &pods).unwrap();
        node.desk.delete("p", 1);
        node.desk.gone("p").await;
        assert_eq!(node.desk.told("p", "FailedUnMount"), 1);
        assert!(pods.join(node.uid("p")).exists());
        sys::mount::detach(&pods).unwrap();
        node.vanished(&pods.join(node.uid("p"))).await;
        node
    });
}

/// Deletion and removal may be one change for the node.
fn who_is_deleted_by_force_has_no_time_of_its_own() {
    on_a_node(|node| async {
        let script = "trap '' TERM; echo set; sleep 100000";
        let container = json!({ "name": "c", "image": node.image(), "command": ["sh", "-c", script] });
        node.want_spec("p", json!({ "terminationGracePeriodSeconds": 100_000, "containers": [container] }));
        node.desk.running("p").await;
        node.said("p", "set").await;
        node.desk.delete_by_force("p");
        node.vanished(&node.path("kubelet/pods").join(node.uid("p"))).await;
        node
    });
}

fn who_was_killed_for_want_of_memory_is_told() {
    on_a_node(|node| async {
        if std::fs::File::open(KERNEL_LOG).is_err() {
            println!("skipped: needs {KERNEL_LOG}");
            return node;
        }
        who_was_killed_is_told(&node).await;
        node
    });
}

fn who_was_killed_is_told_where_the_log_has_no_device() {
    if sys::klog::read_all().is_err() {
        return println!("skipped: needs the kernel's log (syslog(2))");
    }
    let _hidden = Hidden::new();
    on_a_node(|node| async {
        who_was_killed_is_told(&node).await;
        node
    });
}

const KERNEL_LOG: &str = "/dev/kmsg";

/// Covers the device of the kernel's log, while it is there, by what cannot be opened.
struct Hidden(bool);

impl Hidden {
    fn new() -> Self {
        let is_there = Path::new(KERNEL_LOG).exists();
        if is_there {
            let dir = tempfile::tempdir().unwrap();
            let socket = dir.path().join("socket");
            let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
            let cover = sys::mount::copy_tree(&socket, false).unwrap();
            sys::mount::attach_at(cover.as_fd(), Path::new(KERNEL_LOG)).unwrap();
        }
        assert!(std::fs::File::open(KERNEL_LOG).is_err());
        Self(is_there)
    }
}

impl Drop for Hidden {
    fn drop(&mut self) {
        if self.0 {
            sys::mount::detach(Path::new(KERNEL_LOG)).unwrap();
        }
    }
}

async fn who_was_killed_is_told(node: &Node) {
    let container = |name: &str, command: Value, memory: &str| {
        let limits = json!({ "limits": { "memory": memory } });
        json!({ "name": name, "image": node.image(), "command": command, "resources": limits })
    };
    // `tail` keeps the last line, and here there is no other. Beside another container its limit is less than the pod's.
    let greedy = container("c", json!(["tail", "-n", "1", "/dev/zero"]), "16Mi");
    let containers = [greedy, container("other", json!(["sleep", "1000"]), "64Mi")];
    let spec = json!({ "terminationGracePeriodSeconds": 1, "restartPolicy": "Never", "containers": containers });
    node.want_spec("greedy", spec);
    node.desk.when("it has ended", |desk| desk.container("greedy")["state"]["terminated"].is_object()).await;
    let end = node.desk.container("greedy")["state"]["terminated"].clone();
    assert_eq!(end["reason"], "OOMKilled");
    let message = end["message"].as_str().unwrap();
    for part in ["(tail) for want of memory", " anon-rss: ", " file-rss: ", ": the container had reached its limit"] {
        assert!(message.contains(part), "{message}");
    }
    node.desk.when("it is told", |desk| desk.told("greedy", "OOMKilling") == 1).await;
    assert_eq!(node.desk.messages("greedy", "OOMKilling"), [message]);
}
