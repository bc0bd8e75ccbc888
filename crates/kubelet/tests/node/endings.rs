//! Pods end, whatever hangs.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

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
    ("who_was_killed_for_want_of_memory_is_told", who_was_killed_for_want_of_memory_is_told),
];

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

fn who_was_killed_for_want_of_memory_is_told() {
    on_a_node(|node| async {
        if std::fs::File::open("/dev/kmsg").is_err() {
            println!("skipped: needs /dev/kmsg");
            return node;
        }
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
        for part in ["(tail) for want of memory", " anon-rss: ", " file-rss: ", ": the container had reached its limit"]
        {
            assert!(message.contains(part), "{message}");
        }
        node.desk.when("it is told", |desk| desk.told("greedy", "OOMKilling") == 1).await;
        assert_eq!(node.desk.messages("greedy", "OOMKilling"), [message]);
        node
    });
}
