//! What the kubelet tells Prometheus, under upstream's names.
//!
//! ```text
//! /metrics           the kubelet of itself, volumes of claims, what others add (Collector)
//! /metrics/cadvisor  containers, groups and the machine
//! /metrics/resource  CPU and memory of node, pods and containers: what metrics-server reads
//! /metrics/probes    probes by their results
//! ```
//!
//! There is no `kubelet_pleg_*`: nothing is listed again to find out what has happened, so no relist can be late.

mod pods;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use cluster::{Key, Store};
use cri::{Error, RuntimeService, v1};
use instruments::{Text, labels};
use k8s_openapi::api::core::v1::Pod;

use super::stats::{Host, number};
use crate::context::uid_of;
use crate::disk::Disk;
use crate::metrics::Metrics;
use crate::paths::Paths;

/// Where the numbers come from.
#[derive(Clone, Default)]
pub struct Telemetry {
    /// What the kubelet counts.
    pub metrics: Arc<Metrics>,
    /// What containers use; without it, `/metrics/cadvisor` has the machine alone.
    pub containers: Option<Arc<dyn ContainerMetrics>>,
    /// Who else has something to say on `/metrics`.
    pub others: Vec<Arc<dyn Collector>>,
    /// Held while volumes are measured.
    pub measuring: Arc<tokio::sync::Mutex<()>>,
}

/// How long the file systems of volumes may take to say how full they are.
const MEASURED_WITHIN: Duration = Duration::from_secs(5);

/// Who knows what containers use.
#[async_trait]
pub trait ContainerMetrics: Send + Sync + 'static {
    /// All of it in Prometheus' text form.
    async fn text(&self) -> String;
}

/// Who has something to say on `/metrics`. Asked when somebody reads it.
pub trait Collector: Send + Sync + 'static {
    /// Writes families that nobody else does.
    fn write(&self, text: &mut Text);
}

/// `/metrics/resource`, which metrics-server reads.
pub(super) async fn resource(runtime: &dyn RuntimeService) -> Result<String, Error> {
    let stats = runtime.list_pod_sandbox_stats(v1::ListPodSandboxStatsRequest { filter: None }).await?.stats;
    let listed = runtime.list_containers(v1::ListContainersRequest { filter: None }).await?.containers;
    let created: HashMap<String, i64> = listed.into_iter().map(|one| (one.id, one.created_at)).collect();
    let host = Host::read();
    let mut text = Text::default();
    text.single(
        "node_cpu_usage_seconds_total",
        "counter",
        "Cumulative cpu time consumed by the node in core-seconds",
        seconds(host.cpu_ns),
    );
    text.single(
        "node_memory_working_set_bytes",
        "gauge",
        "Current working set of the node in bytes",
        host.memory_total.saturating_sub(host.memory_available),
    );
    text.single(
        "node_swap_usage_bytes",
        "gauge",
        "Current swap usage of the node in bytes. Reported only on non-windows systems",
        host.swap_total.saturating_sub(host.swap_free),
    );
    let containers: Vec<(String, &v1::ContainerStats)> = stats.iter().flat_map(labelled_containers).collect();
    for (name, kind, help, value) in CONTAINERS {
        text.family(name, kind, help);
        containers.iter().for_each(|(labels, stats)| text.number(name, labels, value(stats)));
    }
    text.family("container_start_time_seconds", "gauge", "Start time of the container since unix epoch in seconds");
    for (labels, stats) in &containers {
        let id = stats.attributes.as_ref().map(|attributes| &attributes.id);
        let at = id.and_then(|id| created.get(id)).and_then(|at| u64::try_from(*at).ok());
        text.number("container_start_time_seconds", labels, at.map(seconds));
    }
    let pods: Vec<(String, &v1::LinuxPodSandboxStats)> = stats.iter().filter_map(labelled_pod).collect();
    text.family("pod_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the pod in core-seconds");
    for (labels, stats) in &pods {
        text.number("pod_cpu_usage_seconds_total", labels, cpu_ns(&stats.cpu).map(seconds));
    }
    text.family("pod_memory_working_set_bytes", "gauge", "Current working set of the pod in bytes");
    for (labels, stats) in &pods {
        text.number("pod_memory_working_set_bytes", labels, working_set_of(&stats.memory));
    }
    text.family(
        "pod_swap_usage_bytes",
        "gauge",
        "Current amount of the pod swap usage in bytes. Reported only on non-windows systems",
    );
    for (labels, stats) in &pods {
        let swap = stats.containers.iter().filter_map(|one| number(&one.swap.as_ref()?.swap_usage_bytes));
        text.sample("pod_swap_usage_bytes", labels, swap.sum::<u64>());
    }
    let help = "1 if there was an error while getting container metrics, 0 otherwise";
    text.single("resource_scrape_error", "gauge", help, 0);
    Ok(text.out)
}

/// A family of a container: name, type, help, value.
type ContainerFamily = (&'static str, &'static str, &'static str, fn(&v1::ContainerStats) -> Option<f64>);

#[allow(clippy::cast_precision_loss, reason = "bytes below 2^53")]
const CONTAINERS: [ContainerFamily; 4] = [
    (
        "container_cpu_usage_seconds_total",
        "counter",
        "Cumulative cpu time consumed by the container in core-seconds",
        |stats| cpu_ns(&stats.cpu).map(seconds),
    ),
    ("container_memory_working_set_bytes", "gauge", "Current working set of the container in bytes", |stats| {
        working_set_of(&stats.memory).map(|bytes| bytes as f64)
    }),
    (
        "container_swap_usage_bytes",
        "gauge",
        "Current amount of the container swap usage in bytes. Reported only on non-windows systems",
        |stats| number(&stats.swap.as_ref()?.swap_usage_bytes).map(|bytes| bytes as f64),
    ),
    (
        "container_swap_limit_bytes",
        "gauge",
        "Current amount of the container swap limit in bytes. Reported only on non-windows systems",
        |stats| {
            let swap = stats.swap.as_ref()?;
            Some((number(&swap.swap_usage_bytes)? + number(&swap.swap_available_bytes)?) as f64)
        },
    ),
];

#[allow(clippy::cast_precision_loss, reason = "a time in seconds for people and dashboards")]
pub(super) fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

fn cpu_ns(usage: &Option<v1::CpuUsage>) -> Option<u64> {
    number(&usage.as_ref()?.usage_core_nano_seconds)
}

fn working_set_of(usage: &Option<v1::MemoryUsage>) -> Option<u64> {
    number(&usage.as_ref()?.working_set_bytes)
}

fn labelled_pod(stats: &v1::PodSandboxStats) -> Option<(String, &v1::LinuxPodSandboxStats)> {
    let metadata = stats.attributes.as_ref()?.metadata.as_ref()?;
    let labels = labels(&[("namespace", &metadata.namespace), ("pod", &metadata.name)]);
    Some((labels, stats.linux.as_ref()?))
}

fn labelled_containers(stats: &v1::PodSandboxStats) -> Vec<(String, &v1::ContainerStats)> {
    let Some((pod, linux)) = labelled_pod(stats) else { return Vec::new() };
    let named = linux.containers.iter().filter_map(|container| {
        let name = &container.attributes.as_ref()?.metadata.as_ref()?.name;
        Some((format!("{},{pod}", labels(&[("container", name)])), container))
    });
    named.collect()
}

/// `/metrics`: what the kubelet says of itself.
pub(super) async fn own(
    telemetry: &Telemetry,
    runtime: &dyn RuntimeService,
    store: &Store,
    paths: &Paths,
    node: &str,
) -> Result<String, Error> {
    let sandboxes = runtime.list_pod_sandbox(v1::ListPodSandboxRequest { filter: None }).await?.items;
    let containers = runtime.list_containers(v1::ListContainersRequest { filter: None }).await?.containers;
    let ready = sandboxes.iter().filter(|one| one.state == i32::from(v1::PodSandboxState::SandboxReady)).count();
    let mut text = Text::default();
    text.family("kubelet_node_name", "gauge", "The node's name. The count is always 1.");
    text.sample("kubelet_node_name", &labels(&[("node", node)]), 1);
    text.single("kubelet_running_pods", "gauge", "Number of pods that have a running pod sandbox", ready);
    text.family("kubelet_running_containers", "gauge", "Number of containers currently running");
    for (state, name) in [
        (v1::ContainerState::ContainerCreated, "created"),
        (v1::ContainerState::ContainerRunning, "running"),
        (v1::ContainerState::ContainerExited, "exited"),
        (v1::ContainerState::ContainerUnknown, "unknown"),
    ] {
        let count = containers.iter().filter(|container| container.state == i32::from(state)).count();
        text.sample("kubelet_running_containers", &labels(&[("container_state", name)]), count);
    }
    pods::write(&mut text, store, paths).await;
    telemetry.metrics.write(&mut text);
    telemetry.others.iter().for_each(|other| other.write(&mut text));
    write_volumes(&mut text, &measured_volumes(telemetry, store, paths).await);
    Ok(text.out)
}

/// The volumes of claims whose file systems answer in time. One that does not holds up no other answer, and one thread.
async fn measured_volumes(telemetry: &Telemetry, store: &Store, paths: &Paths) -> Vec<(String, Disk)> {
    let Ok(turn) = telemetry.measuring.clone().try_lock_owned() else { return Vec::new() };
    let (store, paths) = (store.clone(), paths.clone());
    let measured = tokio::task::spawn_blocking(move || -> Vec<(String, Disk)> {
        let _turn = turn;
        let claimed = claimed_volumes(&store, &paths).into_iter();
        claimed.filter_map(|(labels, places)| Some((labels, places.iter().find_map(|at| Disk::of(at))?))).collect()
    });
    tokio::time::timeout(MEASURED_WITHIN, measured).await.ok().and_then(Result::ok).unwrap_or_default()
}

/// The volumes of claims: labels, and where each may be mounted.
fn claimed_volumes(store: &Store, paths: &Paths) -> Vec<(String, Vec<PathBuf>)> {
    let pods = store.pods().list();
    pods.iter()
        .flat_map(|pod| claims_of(pod).map(|(volume, claim)| place_of(store, paths, pod, volume, &claim)))
        .flatten()
        .collect()
}

/// Names of volumes that are claims, and of the claims.
fn claims_of(pod: &Pod) -> impl Iterator<Item = (&str, String)> {
    let pod_name = pod.metadata.name.clone().unwrap_or_default();
    pod::spec::of(pod).volumes.iter().flatten().filter_map(move |volume| {
        let named = volume.persistent_volume_claim.as_ref().map(|claim| claim.claim_name.clone());
        let own = volume.ephemeral.as_ref().map(|_| format!("{pod_name}-{}", volume.name));
        Some((volume.name.as_str(), named.or(own)?))
    })
}

fn place_of(store: &Store, paths: &Paths, pod: &Pod, volume: &str, claim: &str) -> Option<(String, Vec<PathBuf>)> {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
    let bound = store.persistent_volume_claims().get(&Key::new(namespace, claim))?;
    let name = bound.spec.as_ref().and_then(|spec| spec.volume_name.clone());
    let labels = labels(&[("namespace", namespace), ("persistentvolumeclaim", claim)]);
    // Each plugin has a directory of its own; CSI mounts one below.
    let plugins = std::fs::read_dir(paths.pod(uid_of(pod)).join("volumes")).into_iter().flatten().flatten();
    let names = [name, Some(volume.to_owned())];
    let places = plugins.flat_map(|plugin| {
        let dirs = names.clone().into_iter().flatten().map(move |name| plugin.path().join(name));
        dirs.flat_map(|dir| [dir.join("mount"), dir])
    });
    Some((labels, places.collect()))
}

/// A family of a volume: name, help, value.
type VolumeFamily = (&'static str, &'static str, fn(&Disk) -> u64);

fn write_volumes(text: &mut Text, volumes: &[(String, Disk)]) {
    let families: [VolumeFamily; 6] = [
        ("kubelet_volume_stats_capacity_bytes", "Capacity in bytes of the volume", |fs| fs.capacity),
        ("kubelet_volume_stats_available_bytes", "Number of available bytes in the volume", |fs| fs.available),
        ("kubelet_volume_stats_used_bytes", "Number of used bytes in the volume", |fs| fs.used()),
        ("kubelet_volume_stats_inodes", "Maximum number of inodes in the volume", |fs| fs.inodes),
        ("kubelet_volume_stats_inodes_free", "Number of free inodes in the volume", |fs| fs.inodes_free),
        ("kubelet_volume_stats_inodes_used", "Number of used inodes in the volume", |fs| {
            fs.inodes.saturating_sub(fs.inodes_free)
        }),
    ];
    for (name, help, value) in families {
        text.family(name, "gauge", help);
        let mut written = std::collections::HashSet::new();
        // Two pods with one claim have one volume.
        for (labels, fs) in volumes.iter().filter(|(labels, _)| written.insert(labels.clone())) {
            text.sample(name, labels, value(fs));
        }
    }
}

/// `/metrics/cadvisor`: containers, groups, the machine.
pub(super) async fn cadvisor(telemetry: &Telemetry) -> String {
    let mut text = Text::default();
    if let Some(containers) = &telemetry.containers {
        text.out = containers.text().await;
    }
    machine(&mut text);
    text.out
}

fn machine(text: &mut Text) {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let (cpuinfo, host) = (read("/proc/cpuinfo"), Host::read());
    let own = labels(&[
        ("boot_id", &read("/proc/sys/kernel/random/boot_id")),
        ("machine_id", &read("/etc/machine-id")),
        ("system_uuid", &read("/sys/class/dmi/id/product_uuid")),
    ]);
    let cores = cpuinfo.lines().filter(|line| line.starts_with("processor")).count() as u64;
    let sockets = distinct(&cpuinfo, &["physical id"]).max(1);
    for (name, help, value) in [
        ("machine_cpu_cores", "Number of logical CPU cores.", cores),
        (
            "machine_cpu_physical_cores",
            "Number of physical CPU cores.",
            distinct(&cpuinfo, &["physical id", "core id"]),
        ),
        ("machine_cpu_sockets", "Number of CPU sockets.", sockets),
        ("machine_memory_bytes", "Amount of memory installed on the machine.", host.memory_total),
        ("machine_swap_bytes", "Amount of swap memory available on the machine.", host.swap_total),
    ] {
        text.family(name, "gauge", help);
        text.sample(name, &own, value);
    }
    let help = "1 if there was an error while getting container metrics, 0 otherwise.";
    text.single("container_scrape_error", "gauge", help, 0);
}

/// How many processors differ in these fields of proc_cpuinfo(5).
fn distinct(cpuinfo: &str, fields: &[&str]) -> u64 {
    let of = |block: &str| -> Vec<String> {
        let values = fields.iter().map(|field| {
            let line = block.lines().find(|line| line.split(':').next().is_some_and(|name| name.trim() == *field));
            line.and_then(|line| line.split_once(':')).map(|(_, value)| value.trim().to_owned()).unwrap_or_default()
        });
        values.collect()
    };
    let blocks = cpuinfo.split("\n\n").filter(|block| !block.trim().is_empty());
    blocks.map(of).collect::<std::collections::HashSet<_>>().len() as u64
}

#[cfg(test)]
mod tests {
    use openmetrics_parser::prometheus::parse_prometheus;
    use serde_json::json;

    use super::*;

    #[test]
    fn processors_share_cores_and_sockets() {
        let one =
            |number, socket, core| format!("processor : {number}\nphysical id\t: {socket}\ncore id\t\t: {core}\n");
        let cpuinfo = [one(0, 0, 0), one(1, 0, 0), one(2, 0, 1), one(3, 1, 0)].join("\n");
        assert_eq!((distinct(&cpuinfo, &["physical id"]), distinct(&cpuinfo, &["physical id", "core id"])), (2, 3));
    }

    #[tokio::test]
    async fn the_machine_is_there_without_containers() {
        let text = cadvisor(&Telemetry::default()).await;
        let parsed = parse_prometheus(&text).unwrap();
        assert!(
            parsed.families.contains_key("machine_cpu_cores") && parsed.families.contains_key("machine_memory_bytes")
        );
    }

    #[test]
    fn a_volume_of_a_claim_is_found_where_its_plugin_has_it() {
        let root = tempfile::tempdir().unwrap();
        let (paths, store) = (Paths { root: root.path().to_owned(), logs: "/".into() }, Store::new());
        let pod = json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": {"containers": [], "volumes": [
            {"name": "v", "persistentVolumeClaim": {"claimName": "data"}},
            {"name": "none", "persistentVolumeClaim": {"claimName": "missing"}}]}});
        store.pods().put(serde_json::from_value(pod).unwrap());
        let claim = json!({"metadata": {"name": "data", "namespace": "n"}, "spec": {"volumeName": "pv-1"}});
        store.persistent_volume_claims().put(serde_json::from_value(claim).unwrap());
        let mount = root.path().join("pods/u/volumes/kubernetes.io~csi/pv-1/mount");
        std::fs::create_dir_all(&mount).unwrap();
        let found = claimed_volumes(&store, &paths);
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].0.as_str(), &found[0].1[0]), (r#"namespace="n",persistentvolumeclaim="data""#, &mount));
        let mut text = Text::default();
        write_volumes(&mut text, &[(found[0].0.clone(), Disk::of(&mount).unwrap())]);
        assert!(parse_prometheus(&text.out).unwrap().families.contains_key("kubelet_volume_stats_used_bytes"));
    }
}
