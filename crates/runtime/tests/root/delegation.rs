//! Containers that manage control groups themselves: those below their own, as service managers in containers do, and others
//! where they have the right. On version 2 a group that hands controllers down takes no process.

use std::time::Duration;

use cri::v1;
use sys::rustix::fs::{CWD, FileType, Mode, mknodat};
use testkit::serial::Test;
use tokio::net::unix::pipe;

use crate::fixture::{Node, Pod, on_a_node};
use crate::requests::{host_mount, secured};

pub(crate) const TESTS: &[Test] = &[
    ("a_container_that_divides_its_group_is_entered_where_it_is", divided),
    ("a_container_with_threaded_groups_is_entered_and_ends", threaded),
    ("groups_that_no_path_leads_to_end_with_their_container", deep),
    ("a_container_that_freezes_itself_ends", frozen),
    ("a_container_that_leaves_its_group_ends", moved),
];

/// What ends a test that hangs.
const LIMIT: Duration = Duration::from_secs(300);
/// Tells the test to go on, and stays.
const READY: &str = "echo ready > /host/said; while :; do sleep 1000; done";

fn is_unified() -> bool {
    sys::cgroup::Hierarchy::detect().unwrap().is_unified()
}

/// A shell's assignment of the directory of its own group to `g`, on version 1 in the freezer's tree.
fn own_group() -> String {
    let (mark, mount) =
        if is_unified() { ("0::", "/sys/fs/cgroup") } else { ("[0-9]*:freezer:", "/sys/fs/cgroup/freezer") };
    format!("g=$(sed -n 's,^{mark},{mount},p' /proc/self/cgroup)")
}

/// A privileged pod that runs this in its own group `g`, after it has said that it is ready.
async fn pod(node: &Node, name: &str, script: &str) -> Pod {
    let dir = tempfile::tempdir().unwrap();
    let said = dir.path().join("said");
    mknodat(CWD, &said, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let reader = pipe::OpenOptions::new().read_write(true).open_receiver(&said).unwrap();
    let mut config = node.sandbox_config(name);
    let context = v1::LinuxSandboxSecurityContext { privileged: true, ..Default::default() };
    config.linux = Some(v1::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() });
    let sandbox = node.run_sandbox(&config).await.unwrap();
    let script = format!("{}; set -e; {script}; {READY}", own_group());
    let mut request = secured(&script, |context| context.privileged = true);
    request.mounts = vec![host_mount("/host", dir.path())];
    let container = node.create(&sandbox, &config, request).await.unwrap();
    node.start_container(&container).await.unwrap();
    tokio::select! {
        ready = tokio::time::timeout(LIMIT, reader.readable()) => ready.unwrap().unwrap(),
        ended = node.exited(&container) => panic!("it ended before it was ready: {ended:?}, {:?}", node.log(name)),
    }
    Pod { config, sandbox, container }
}

async fn says(node: &Node, pod: &Pod, command: &[&str]) -> String {
    let answer = tokio::time::timeout(LIMIT, node.exec(&pod.container, command, 0)).await.unwrap().unwrap();
    assert_eq!(answer.exit_code, 0, "{}", String::from_utf8_lossy(&answer.stderr));
    String::from_utf8(answer.stdout).unwrap()
}

/// Stops and removes the pod, whose container does not heed signals.
async fn end(node: &Node, pod: &Pod) {
    let ended = async {
        node.stop_container(&pod.container, 0).await.unwrap();
        assert_eq!(node.status(&pod.container).await.exit_code, 137);
        node.stop_sandbox(&pod.sandbox).await.unwrap();
        node.remove_sandbox(&pod.sandbox).await.unwrap();
    };
    tokio::time::timeout(LIMIT, ended).await.expect("it does not end");
}

/// Service managers in containers do this; runc enters them since 1.0 (opencontainers/runc#2356).
fn divided() {
    on_a_node(|node| async {
        if !is_unified() {
            println!("skipped: needs control groups version 2");
            return node;
        }
        let script = "mkdir -p $g/init/scope; echo 0 > $g/init/scope/cgroup.procs; echo +memory > $g/cgroup.subtree_control; \
                      echo +memory > $g/init/cgroup.subtree_control";
        let pod = pod(&node, "divided", script).await;
        let entered = says(&node, &pod, &["cat", "/proc/self/cgroup"]).await;
        assert!(entered.trim_end().ends_with("/init/scope"), "{entered}");
        end(&node, &pod).await;
        node
    });
}

/// The groups of a threaded domain tell of no processes; its first one tells of all.
fn threaded() {
    on_a_node(|node| async {
        if !is_unified() {
            println!("skipped: needs control groups version 2");
            return node;
        }
        let script = "mkdir -p $g/t/u; echo threaded > $g/t/cgroup.type; echo threaded > $g/t/u/cgroup.type; \
                      sleep 1000 & echo $! > $g/t/u/cgroup.procs; echo 0 > $g/t/cgroup.procs";
        let pod = pod(&node, "threaded", script).await;
        let entered = says(&node, &pod, &["cat", "/proc/self/cgroup"]).await;
        assert!(!entered.trim_end().ends_with("/t"), "{entered}");
        end(&node, &pod).await;
        node
    });
}

/// A path ends at 4,096 bytes.
fn deep() {
    on_a_node(|node| async {
        let script = "cd $g; n=$(printf %0250d 0); i=0; while [ $i -lt 20 ]; do mkdir $n; cd -P $n; i=$((i + 1)); done; \
                      sleep 1000 & echo $! > cgroup.procs; cd /";
        let pod = pod(&node, "deep", script).await;
        end(&node, &pod).await;
        node
    });
}

fn frozen() {
    on_a_node(|node| async {
        let freeze =
            if is_unified() { "echo 1 > $g/cold/cgroup.freeze" } else { "echo FROZEN > $g/cold/freezer.state" };
        // Who freezes is not in the group; who says that all is ready, neither.
        let script = format!(
            "mkdir $g/cold; mkfifo /gate; (read go < /gate; {freeze}; {READY}) & echo 0 > $g/cold/cgroup.procs; \
             echo go > /gate; while :; do sleep 1000; done"
        );
        let pod = pod(&node, "frozen", &script).await;
        assert_eq!(says(&node, &pod, &["echo", "beside"]).await, "beside\n");
        end(&node, &pod).await;
        node
    });
}

/// One that may manage the host's groups, as Docker in a pod does.
fn moved() {
    on_a_node(|node| async {
        let script = "e=$(dirname $(dirname $g))/elsewhere; mkdir $e; echo 0 > $e/cgroup.procs";
        let pod = pod(&node, "moved", script).await;
        assert_eq!(says(&node, &pod, &["echo", "here"]).await, "here\n");
        end(&node, &pod).await;
        // What a pod makes beside its groups is nobody's: fsck tells of it.
        let left = node.runtime.fsck().await.unwrap();
        let left: Vec<&str> = left.iter().filter(|one| one.owner.is_none()).map(|one| one.name.as_str()).collect();
        let elsewhere = sys::cgroup::Hierarchy::detect().unwrap().group(&node.places.group).child("elsewhere");
        assert_eq!(left, [elsewhere.path().to_str().unwrap()]);
        elsewhere.delete().unwrap();
        node
    });
}
