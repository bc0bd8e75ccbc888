//! Swap: Burstable containers have a share of the machine's, others have none.

use std::path::Path;
use std::process::Command;

use kubelet::node::machine::Machine;
use serde_json::{Value, json};
use testkit::host;
use testkit::serial::Test;

use crate::fixture::{Node, on_a_node};

pub(crate) const TESTS: &[Test] = &[("containers_swap_what_is_their_share", containers_swap_what_is_their_share)];

/// The machine's swap, a file, until this is dropped.
struct Swap(tempfile::NamedTempFile);

impl Swap {
    const BYTES: usize = 96 << 20;

    fn on() -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![0; Self::BYTES]).unwrap();
        ["mkswap", "swapon"].into_iter().for_each(|program| run(program, file.path()));
        Self(file)
    }
}

#[expect(clippy::disallowed_methods, reason = "a test")]
fn run(program: &str, file: &Path) {
    host::run(Command::new(program).arg(file)).unwrap();
}

impl Drop for Swap {
    fn drop(&mut self) {
        run("swapoff", self.0.path());
    }
}

/// Wants a pod with one container, of which each byte that it needs beyond 24 MiB has to go to swap.
fn want(node: &Node, name: &str, resources: Value) {
    // `tail` keeps the last line, and here there is no other.
    let script = "head -c 48m /dev/zero | tail -n 1 > /dev/null && echo fits; sleep 1000";
    let container =
        json!({ "name": "c", "image": node.image(), "command": ["sh", "-c", script], "resources": resources });
    node.want_spec(name, json!({ "terminationGracePeriodSeconds": 0, "containers": [container] }));
}

/// The limit of swap that the kernel has for a pod's container.
async fn limit(node: &Node, name: &str) -> String {
    let container = node.containers(name).await.remove(0).id;
    let group = node.groups.pod(&node.desk.pod(name).unwrap()).child(&container);
    let file = group.directories().remove(0).join("memory.swap.max");
    std::fs::read_to_string(file).unwrap().trim().to_owned()
}

fn containers_swap_what_is_their_share() {
    if !host::is_own_machine() || !sys::cgroup::Hierarchy::detect().unwrap().is_unified() {
        return println!("skipped: needs a machine of its own, with control groups version 2");
    }
    let _swap = Swap::on();
    // All but the first page, which says that it is swap.
    let capacity = Machine::read(Path::new("/")).info.swap.unwrap().capacity.unwrap();
    assert_eq!(usize::try_from(capacity).unwrap(), Swap::BYTES - 4096);
    on_a_node(async |mut node| {
        node.restart_swapping(4 << 30).await;
        // The node has 1 GiB of memory, of which each asks for a fortieth or so.
        want(&node, "burstable", json!({ "requests": { "memory": "24Mi" }, "limits": { "memory": "25Mi" } }));
        node.desk.running("burstable").await;
        assert_eq!(limit(&node, "burstable").await, (96 << 20).to_string());
        node.said("burstable", "fits").await;
        want(&node, "guaranteed", json!({ "limits": { "memory": "24Mi", "cpu": "1" } }));
        want(&node, "besteffort", json!({}));
        node.desk.running("besteffort").await;
        assert_eq!(limit(&node, "besteffort").await, "0");
        let killed = |desk: &crate::desk::Desk| {
            let status = desk.container("guaranteed");
            ["state", "lastState"].iter().any(|state| status[*state]["terminated"]["reason"] == "OOMKilled")
        };
        node.desk.when("who has its memory for sure has no more", killed).await;
        // As long as nobody says otherwise, nobody swaps.
        let desk = node.desk.clone();
        node.restart(desk).await;
        want(&node, "plain", json!({ "requests": { "memory": "24Mi" }, "limits": { "memory": "25Mi" } }));
        node.desk.running("plain").await;
        assert_eq!(limit(&node, "plain").await, "0");
        node
    });
}
