//! A node that runs short of something ends a pod that uses it, and pods that exceed their limits.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use cri::{ImageService as _, v1};
use futures_util::StreamExt as _;
use kubelet::node::eviction::{self, Parts, Reclaim};
use kubelet::node::pressure::{Level, Policy, Pressures, Signal, Threshold, Thresholds};
use pod::quantity::Quantity;
use serde_json::{Value, json};
use testkit::serial::Test;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::desk::Desk;
use crate::fixture::{LIMIT, Node, on_a_small_node};

pub(crate) const TESTS: &[Test] = &[
    ("a_full_disk_costs_who_filled_it", a_full_disk_costs_who_filled_it),
    ("a_disk_without_inodes_costs_who_took_them", a_disk_without_inodes_costs_who_took_them),
    ("want_of_process_ids_costs_who_has_most", want_of_process_ids_costs_who_has_most),
    ("want_of_memory_costs_who_uses_most", want_of_memory_costs_who_uses_most),
    ("processes_that_wait_for_memory_wake_the_node", processes_that_wait_for_memory_wake_the_node),
    ("who_takes_long_to_end_is_evicted_too", who_takes_long_to_end_is_evicted_too),
    ("what_nobody_uses_goes_before_pods", what_nobody_uses_goes_before_pods),
    ("who_stores_more_than_its_limit_goes", who_stores_more_than_its_limit_goes),
    ("what_is_reserved_is_kept_by_the_kernel", what_is_reserved_is_kept_by_the_kernel),
];

const DISK: &[(&str, &str)] = &[("size", "64m"), ("nr_inodes", "2000")];

/// Removes images as a node does.
struct Images(Arc<runtime::ImageServer>);

#[async_trait::async_trait]
impl Reclaim for Images {
    async fn unused_images(&self) -> Result<(), String> {
        self.0.remove_unused().await.map(drop).map_err(|error| error.to_string())
    }
}

/// Keeps thresholds until the handle is dropped; what is short is told.
fn keep(node: &Node, thresholds: Vec<Threshold>) -> (AbortOnDropHandle<()>, watch::Receiver<Pressures>) {
    keep_looking(node, thresholds, Duration::from_millis(100))
}

/// As [`keep`], with a look at the node so often.
fn keep_looking(
    node: &Node,
    thresholds: Vec<Threshold>,
    look_every: Duration,
) -> (AbortOnDropHandle<()>, watch::Receiver<Pressures>) {
    let (pressures, short) = watch::channel(Pressures::default());
    let policy = Policy {
        thresholds: Thresholds(thresholds),
        transition: Duration::from_millis(300),
        pod_grace_max_s: 0,
        local_storage: true,
    };
    let parts = Parts {
        kubelet: node.kubelet.clone(),
        source: node.desk.clone(),
        runtime: node.runtime.clone(),
        reclaim: Arc::new(Images(node.images.clone())),
        groups: node.groups.clone(),
        paths: node.paths(),
        image_root: node.path("images"),
        container_root: node.path("images"),
        node: "n".to_owned(),
        metrics: Arc::default(),
        policy,
        look_every,
        pressures,
    };
    (AbortOnDropHandle::new(tokio::spawn(eviction::run(parts))), short)
}

async fn when(short: &mut watch::Receiver<Pressures>, holds: impl FnMut(&Pressures) -> bool) {
    tokio::time::timeout(LIMIT, short.wait_for(holds)).await.expect("the condition changes").unwrap();
}

/// Wants a pod with an emptyDir at `/v`.
fn want(node: &Node, name: &str, script: &str, volume: Value, limit: Value) {
    let resources = json!({ "limits": limit });
    let mounts = json!([{ "name": "v", "mountPath": "/v" }]);
    let container = json!({ "name": "c", "image": node.image(), "command": ["sh", "-c", format!("{script}; sleep 1000 & wait")],
        "resources": resources, "volumeMounts": mounts });
    node.want_spec(
        name,
        json!({ "terminationGracePeriodSeconds": 1, "containers": [container],
        "volumes": [{ "name": "v", "emptyDir": volume }] }),
    );
}

/// The message of a pod that was evicted.
async fn evicted(desk: &Desk, name: &str) -> String {
    desk.when(&format!("{name} is evicted"), |desk| desk.phase(name).as_deref() == Some("Failed")).await;
    let status = desk.pod(name).unwrap().status.clone().unwrap();
    assert_eq!(status.reason.as_deref(), Some("Evicted"));
    assert_eq!(desk.told(name, "Evicted"), 1);
    status.message.unwrap()
}

/// Whether the node said that it was not the pod's own fault.
fn is_disrupted(desk: &Desk, name: &str) -> bool {
    let status = desk.pod(name).unwrap().status.clone().unwrap();
    status
        .conditions
        .unwrap()
        .iter()
        .any(|condition| condition.type_ == "DisruptionTarget" && condition.status == "True")
}

fn a_full_disk_costs_who_filled_it() {
    on_a_small_node(DISK, async |node| {
        let hard = Threshold::hard(Signal::NodeDisk, Level::Amount(40 << 20));
        let (_task, mut short) = keep(&node, vec![hard]);
        want(&node, "small", "true", json!({}), json!({}));
        node.desk.running("small").await;
        assert_eq!(*short.borrow(), Pressures::default());
        want(&node, "greedy", "dd if=/dev/zero of=/v/f bs=1M count=30", json!({}), json!({}));
        when(&mut short, |short| short.disk).await;
        let message = evicted(&node.desk, "greedy").await;
        assert!(
            message
                .starts_with("The node was low on resource: ephemeral-storage. Threshold quantity: 40Mi, available: ")
        );
        assert!(is_disrupted(&node.desk, "greedy"));
        when(&mut short, |short| !short.disk).await;
        assert_eq!(node.desk.phase("small").as_deref(), Some("Running"));
        node
    });
}

/// A pod that is being deleted goes on to use what it has, and nobody else is ended for it.
fn who_takes_long_to_end_is_evicted_too() {
    on_a_small_node(DISK, async |node| {
        want(&node, "small", "true", json!({}), json!({}));
        node.desk.running("small").await;
        let script = "trap '' TERM; dd if=/dev/zero of=/v/f bs=1M count=30; echo full";
        want(&node, "greedy", script, json!({}), json!({}));
        node.desk.running("greedy").await;
        node.said("greedy", "full").await;
        node.desk.delete("greedy", 3600);
        node.desk.when("it is being stopped", |desk| desk.told("greedy", "Killing") == 1).await;
        let hard = Threshold::hard(Signal::NodeDisk, Level::Amount(40 << 20));
        let (_task, mut short) = keep(&node, vec![hard]);
        node.desk.gone("greedy").await;
        assert_eq!(node.desk.told("greedy", "Evicted"), 1);
        when(&mut short, |short| !short.disk).await;
        assert_eq!(node.desk.phase("small").as_deref(), Some("Running"));
        node
    });
}

fn a_disk_without_inodes_costs_who_took_them() {
    on_a_small_node(DISK, async |node| {
        let hard = Threshold::hard(Signal::NodeInodes, Level::Share(0.5));
        let (_task, mut short) = keep(&node, vec![hard]);
        want(&node, "small", "true", json!({}), json!({}));
        node.desk.running("small").await;
        want(&node, "greedy", "for i in $(seq 1200); do : > /v/$i; done", json!({}), json!({}));
        let message = evicted(&node.desk, "greedy").await;
        assert!(
            message.starts_with("The node was low on resource: inodes. Threshold quantity: 1k, available: "),
            "{message}"
        );
        when(&mut short, |short| !short.disk).await;
        assert_eq!(node.desk.phase("small").as_deref(), Some("Running"));
        node
    });
}

fn want_of_process_ids_costs_who_has_most() {
    on_a_small_node(DISK, async |node| {
        let limits = sys::cgroup::Limits { pids: Some(60), ..sys::cgroup::Limits::default() };
        node.groups.root().set(&limits).unwrap();
        let (_task, mut short) = keep(&node, vec![Threshold::hard(Signal::Pids, Level::Amount(25))]);
        want(&node, "small", "true", json!({}), json!({}));
        node.desk.running("small").await;
        want(&node, "greedy", "for i in $(seq 32); do sleep 1000 & done", json!({}), json!({}));
        when(&mut short, |short| short.pids).await;
        let message = evicted(&node.desk, "greedy").await;
        assert!(
            message.starts_with("The node was low on resource: pids. Threshold quantity: 25, available: "),
            "{message}"
        );
        when(&mut short, |short| !short.pids).await;
        assert_eq!(node.desk.phase("small").as_deref(), Some("Running"));
        node
    });
}

fn who_stores_more_than_its_limit_goes() {
    on_a_small_node(DISK, async |node| {
        let (_task, _short) = keep(&node, Vec::new());
        let write = |at: &str| format!("dd if=/dev/zero of={at} bs=1M count=3");
        want(&node, "fits", &write("/v/f"), json!({ "sizeLimit": "4Mi" }), json!({}));
        want(&node, "volume", &write("/v/f"), json!({ "sizeLimit": "2Mi" }), json!({}));
        want(&node, "layer", &write("/f"), json!({}), json!({ "ephemeral-storage": "2Mi" }));
        let message = evicted(&node.desk, "volume").await;
        assert_eq!(message, "Usage of EmptyDir volume \"v\" exceeds the limit \"2Mi\". ");
        assert!(!is_disrupted(&node.desk, "volume"), "it is the pod's own fault");
        let message = evicted(&node.desk, "layer").await;
        assert_eq!(message, "Pod ephemeral local storage usage exceeds the total limit of containers 2Mi. ");
        assert_eq!(node.desk.phase("fits").as_deref(), Some("Running"));
        node
    });
}

/// What all pods may use together runs short, as the node's memory would.
fn want_of_memory_costs_who_uses_most() {
    on_a_small_node(DISK, async |node| {
        let limits = sys::cgroup::Limits { memory_bytes: Some(120 << 20), ..sys::cgroup::Limits::default() };
        node.groups.root().set(&limits).unwrap();
        let (_task, mut short) = keep(&node, vec![Threshold::hard(Signal::AllocatableMemory, Level::Amount(70 << 20))]);
        want(&node, "small", "true", json!({}), json!({}));
        node.desk.running("small").await;
        want(&node, "greedy", "dd if=/dev/zero of=/dev/shm/f bs=1M count=60", json!({}), json!({}));
        when(&mut short, |short| short.memory).await;
        let message = evicted(&node.desk, "greedy").await;
        assert!(
            message.starts_with("The node was low on resource: memory. Threshold quantity: 70Mi, available: "),
            "{message}"
        );
        assert!(
            message.contains("Container c was using ")
                && message.contains(", request is 0, has larger consumption of memory. ")
        );
        when(&mut short, |short| !short.memory).await;
        assert_eq!(node.desk.phase("small").as_deref(), Some("Running"));
        node
    });
}

/// The kernel tells of it (PSI): the timer of this node comes in a day.
fn processes_that_wait_for_memory_wake_the_node() {
    let hierarchy = sys::cgroup::Hierarchy::detect().unwrap();
    if !hierarchy.is_unified() || !std::path::Path::new("/proc/pressure/memory").exists() {
        return println!("skipped: needs control groups version 2, and a kernel that tells of pressure (PSI)");
    }
    on_a_small_node(DISK, async |node| {
        let limits = sys::cgroup::Limits { memory_bytes: Some(120 << 20), ..sys::cgroup::Limits::default() };
        node.groups.root().set(&limits).unwrap();
        let threshold = Threshold::hard(Signal::AllocatableMemory, Level::Amount(70 << 20));
        let (_task, mut short) = keep_looking(&node, vec![threshold], Duration::from_secs(24 * 3600));
        want(&node, "small", "true", json!({}), json!({}));
        node.desk.running("small").await;
        let more = "while :; do dd if=/dev/zero of=/dev/shm/g bs=1M count=1; done";
        let greedy = format!("dd if=/dev/zero of=/dev/shm/f bs=1M count=60; echo full; {more}");
        want(&node, "greedy", &greedy, json!({}), json!({}));
        node.desk.running("greedy").await;
        node.said("greedy", "full").await;
        assert_eq!(*short.borrow_and_update(), Pressures::default(), "nobody has looked since it was small");
        // From now on whoever wants more waits for it each time.
        let high = vec![("memory.high".to_owned(), (30 << 20).to_string())];
        node.groups.root().set(&sys::cgroup::Limits { unified: high, ..sys::cgroup::Limits::default() }).unwrap();
        when(&mut short, |short| short.memory).await;
        let message = evicted(&node.desk, "greedy").await;
        assert!(message.starts_with("The node was low on resource: memory. Threshold quantity: 70Mi"), "{message}");
        assert_eq!(node.desk.phase("small").as_deref(), Some("Running"));
        node
    });
}

/// Containers of pods that have ended, and images, go first; a critical pod stays even if that does not help.
fn what_nobody_uses_goes_before_pods() {
    on_a_small_node(DISK, async |node| {
        let script = ["sh", "-c", "true"];
        let once = json!({ "name": "c", "image": node.other_image(), "command": script });
        node.want_spec("done", json!({ "restartPolicy": "Never", "containers": [once] }));
        node.desk.when("done", |desk| desk.phase("done").as_deref() == Some("Succeeded")).await;
        let critical = json!({ "name": "c", "image": node.image(), "command": ["sleep", "1000"] });
        node.want_spec(
            "critical",
            json!({ "priority": 2_000_001_000, "terminationGracePeriodSeconds": 1,
            "containers": [critical] }),
        );
        node.desk.running("critical").await;
        assert_eq!(node.containers("done").await.len(), 1);
        let mut events = node.events().await;
        // More than there can be: whatever is done is not enough.
        let (_task, mut short) = keep(&node, vec![Threshold::hard(Signal::ImageDisk, Level::Amount(1 << 60))]);
        let gone = async {
            while !node.containers("done").await.is_empty() {
                events.next().await.unwrap().unwrap();
            }
        };
        tokio::time::timeout(LIMIT, gone).await.expect("the container of a pod that has ended goes");
        when(&mut short, |short| short.disk).await;
        let used = node.images.list_images(v1::ListImagesRequest::default()).await.unwrap().images;
        assert!(used.iter().any(|image| image.repo_tags.iter().any(|tag| tag == node.image())));
        assert_eq!(node.desk.phase("critical").as_deref(), Some("Running"));
        assert_eq!(node.desk.phase("done").as_deref(), Some("Succeeded"), "it stays what it was");
        node
    });
}

/// What pods get together, and what others that the node keeps in groups of their own.
fn what_is_reserved_is_kept_by_the_kernel() {
    on_a_small_node(DISK, async |node| {
        node.groups.ensure_roots(1500, Some(512 << 20)).unwrap();
        assert_eq!(node.groups.root().stats().memory.limit_bytes, Some(512 << 20));
        let root = node.groups.root();
        let others = sys::cgroup::Hierarchy::detect().unwrap().group(root.path().with_file_name("others"));
        let amounts = [("cpu", "500m"), ("memory", "64Mi"), ("pid", "100")];
        let reserved: BTreeMap<String, Quantity> =
            amounts.iter().map(|(name, amount)| ((*name).to_owned(), Quantity::parse(amount).unwrap())).collect();
        let missing = kubelet::qos::keep_reserved(&others, &reserved, false).unwrap_err().to_string();
        assert!(missing.contains("does not exist"), "{missing}");
        others.create().unwrap();
        kubelet::qos::keep_reserved(&others, &reserved, true).unwrap();
        assert_eq!(others.stats().memory.limit_bytes, None, "CPU alone");
        kubelet::qos::keep_reserved(&others, &reserved, false).unwrap();
        let stats = others.stats();
        assert_eq!((stats.memory.limit_bytes, stats.pids.limit), (Some(64 << 20), Some(100)));
        others.delete().unwrap();
        node
    });
}
