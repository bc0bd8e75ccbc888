//! What pods use, in the forms that metrics-server and Prometheus read.

use std::path::Path;

use cluster::Store;
use cri::{Error, ImageService, RuntimeService, v1};
use jiff::Timestamp;
use serde_json::{Value, json};
use sys::cgroup::Pressure;

use crate::disk::Disk;
use crate::generate::label;
use crate::volumes::{Usage, VolumeStats, Volumes};

/// `/stats/summary`.
pub(super) async fn summary(runtime: &dyn RuntimeService, node: &str) -> Result<Value, Error> {
    let stats = runtime.list_pod_sandbox_stats(v1::ListPodSandboxStatsRequest { filter: None }).await?.stats;
    let host = Host::read();
    let pods: Vec<Value> = stats.iter().filter_map(pod).collect();
    Ok(json!({
        "node": {
            "nodeName": node,
            "cpu": {"time": now(), "usageCoreNanoSeconds": host.cpu_ns, "psi": of_machine("cpu")},
            "memory": {"time": now(), "availableBytes": host.memory_available,
                "workingSetBytes": host.memory_total.saturating_sub(host.memory_available), "psi": of_machine("memory")},
            "io": of_machine("io").map(|psi| json!({"time": now(), "psi": psi})),
            "swap": {"time": now(), "swapAvailableBytes": host.swap_free,
                "swapUsageBytes": host.swap_total.saturating_sub(host.swap_free)},
        },
        "pods": pods,
    }))
}

/// Adds to each pod of a summary how full its volumes are, as far as anybody tells.
pub(super) async fn add_volumes(summary: &mut Value, volumes: &Volumes, store: &Store) {
    let pods = summary["pods"].as_array_mut().into_iter().flatten();
    let asked = pods.map(|shown| async {
        let uid = shown["podRef"]["uid"].as_str().unwrap_or_default();
        let Some(pod) = store.pods().find_uid(uid) else { return };
        let told: Vec<Value> = volumes.stats(&pod).await.iter().map(volume).collect();
        if !told.is_empty() {
            shown["volume"] = told.into();
        }
    });
    futures_util::future::join_all(asked).await;
}

/// Adds how full the node's disks are: the kubelet's below `root`, and those that its runtime tells of. The first of each kind
/// counts, as upstream has it.
pub(super) async fn add_disks(summary: &mut Value, root: &Path, images: &dyn ImageService) {
    let node = &mut summary["node"];
    node["fs"] = disk(root, None).into();
    let Ok(told) = images.image_fs_info(v1::ImageFsInfoRequest::default()).await else { return };
    let first = |systems: &[v1::FilesystemUsage]| {
        let system = systems.first()?;
        disk(Path::new(&system.fs_id.as_ref()?.mountpoint), Some(system))
    };
    let of_images = first(&told.image_filesystems);
    let of_containers = first(&told.container_filesystems).or_else(|| of_images.clone());
    node["runtime"] = json!({"imageFs": of_images, "containerFs": of_containers});
}

/// A disk, and how much of it somebody uses; none says that it is all that is used.
fn disk(path: &Path, by: Option<&v1::FilesystemUsage>) -> Option<Value> {
    let disk = Disk::to_hold(path)?;
    let has_inodes = disk.inodes > 0;
    let used = by.map_or(Some(disk.used()), |by| number(&by.used_bytes));
    let inodes_used = || disk.inodes.saturating_sub(disk.inodes_free);
    let inodes_used = by.map_or_else(|| has_inodes.then(inodes_used), |by| number(&by.inodes_used));
    Some(json!({
        "time": now(), "availableBytes": disk.available, "capacityBytes": disk.capacity, "usedBytes": used,
        "inodesFree": has_inodes.then_some(disk.inodes_free), "inodes": has_inodes.then_some(disk.inodes),
        "inodesUsed": inodes_used,
    }))
}

fn volume(stats: &VolumeStats) -> Value {
    let claim = stats.claim.as_ref().map(|(namespace, name)| json!({"namespace": namespace, "name": name}));
    let mut shown = json!({"name": stats.volume, "pvcRef": claim, "time": stats.time.to_string()});
    for (usage, names) in [
        (stats.bytes, ["availableBytes", "capacityBytes", "usedBytes"]),
        (stats.inodes, ["inodesFree", "inodes", "inodesUsed"]),
    ] {
        let Some(Usage { available, total, used }) = usage else { continue };
        names.into_iter().zip([available, total, used]).for_each(|(name, amount)| shown[name] = amount.into());
    }
    shown
}

/// How long the machine's tasks have waited for something, where its kernel measures it.
fn of_machine(what: &str) -> Option<Value> {
    let pressure = Pressure::of_machine(what)?;
    // The kernel counts microseconds, the API nanoseconds.
    let part = |([avg10, avg60, avg300], total): ([f64; 3], u64)| {
        waited(&v1::PsiData { total: total.saturating_mul(1000), avg10, avg60, avg300 })
    };
    Some(json!({"full": part(pressure.full), "some": part(pressure.some)}))
}

/// As [`of_machine`], of a control group.
fn psi(stats: &v1::PsiStats) -> Value {
    let part = |data: &Option<v1::PsiData>| waited(&data.unwrap_or_default());
    json!({"full": part(&stats.full), "some": part(&stats.some)})
}

fn waited(data: &v1::PsiData) -> Value {
    json!({"total": data.total, "avg10": data.avg10, "avg60": data.avg60, "avg300": data.avg300})
}

fn io(usage: &v1::IoUsage) -> Value {
    json!({"time": time(usage.timestamp), "psi": usage.psi.as_ref().map(psi)})
}

fn swap(usage: &v1::SwapUsage) -> Value {
    json!({"time": time(usage.timestamp), "swapAvailableBytes": number(&usage.swap_available_bytes),
        "swapUsageBytes": number(&usage.swap_usage_bytes)})
}

/// What a pod's containers swap together, which the CRI does not count.
fn containers_swap(pod: &v1::LinuxPodSandboxStats) -> Option<Value> {
    let all: Vec<&v1::SwapUsage> = pod.containers.iter().filter_map(|container| container.swap.as_ref()).collect();
    let sum = |of: fn(&v1::SwapUsage) -> &Option<v1::UInt64Value>| -> Option<v1::UInt64Value> {
        let value = all.iter().filter_map(|usage| number(of(usage))).reduce(u64::saturating_add)?;
        Some(v1::UInt64Value { value })
    };
    let timestamp = all.iter().map(|usage| usage.timestamp).max()?;
    let (available, used) = (sum(|usage| &usage.swap_available_bytes), sum(|usage| &usage.swap_usage_bytes));
    Some(swap(&v1::SwapUsage { timestamp, swap_available_bytes: available, swap_usage_bytes: used }))
}

fn now() -> String {
    Timestamp::now().to_string()
}

/// A point in time that the CRI counts in nanoseconds.
fn time(nanoseconds: i64) -> String {
    Timestamp::from_nanosecond(i128::from(nanoseconds)).unwrap_or_default().to_string()
}

pub(super) fn number(value: &Option<v1::UInt64Value>) -> Option<u64> {
    value.as_ref().map(|value| value.value)
}

fn pod(stats: &v1::PodSandboxStats) -> Option<Value> {
    let metadata = stats.attributes.as_ref()?.metadata.as_ref()?;
    let linux = stats.linux.as_ref()?;
    let network =
        linux.network.as_ref().and_then(|network| Some((network.timestamp, network.default_interface.as_ref()?)));
    let containers: Vec<Value> = linux.containers.iter().filter_map(container).collect();
    Some(json!({
        "podRef": {"name": metadata.name, "namespace": metadata.namespace, "uid": metadata.uid},
        "startTime": Value::Null,
        "containers": containers,
        "cpu": linux.cpu.as_ref().map(cpu),
        "memory": linux.memory.as_ref().map(memory),
        "io": linux.io.as_ref().map(io),
        "swap": containers_swap(linux),
        "network": network.map(|(at, interface)| json!({
            "time": time(at), "name": interface.name,
            "rxBytes": number(&interface.rx_bytes), "rxErrors": number(&interface.rx_errors),
            "txBytes": number(&interface.tx_bytes), "txErrors": number(&interface.tx_errors),
        })),
        "process_stats": linux.process.as_ref().map(|process| json!({"process_count": number(&process.process_count)})),
    }))
}

fn container(stats: &v1::ContainerStats) -> Option<Value> {
    let layer = stats.writable_layer.as_ref();
    Some(json!({
        "name": stats.attributes.as_ref()?.metadata.as_ref()?.name,
        "cpu": stats.cpu.as_ref().map(cpu),
        "memory": stats.memory.as_ref().map(memory),
        "io": stats.io.as_ref().map(io),
        "swap": stats.swap.as_ref().map(swap),
        "rootfs": layer.map(|layer| json!({"time": time(layer.timestamp), "usedBytes": number(&layer.used_bytes),
            "inodesUsed": number(&layer.inodes_used)})),
    }))
}

fn cpu(usage: &v1::CpuUsage) -> Value {
    json!({"time": time(usage.timestamp), "usageNanoCores": number(&usage.usage_nano_cores),
        "usageCoreNanoSeconds": number(&usage.usage_core_nano_seconds), "psi": usage.psi.as_ref().map(psi)})
}

fn memory(usage: &v1::MemoryUsage) -> Value {
    json!({"time": time(usage.timestamp), "workingSetBytes": number(&usage.working_set_bytes),
        "availableBytes": number(&usage.available_bytes), "usageBytes": number(&usage.usage_bytes),
        "rssBytes": number(&usage.rss_bytes), "pageFaults": number(&usage.page_faults),
        "majorPageFaults": number(&usage.major_page_faults), "psi": usage.psi.as_ref().map(psi)})
}

/// `/runningpods`: what the runtime runs, as pods.
pub(super) async fn running_pods(runtime: &dyn RuntimeService) -> Result<Value, Error> {
    let ready = v1::PodSandboxStateValue { state: v1::PodSandboxState::SandboxReady.into() };
    let filter = v1::PodSandboxFilter { state: Some(ready), ..v1::PodSandboxFilter::default() };
    let sandboxes = runtime.list_pod_sandbox(v1::ListPodSandboxRequest { filter: Some(filter) }).await?.items;
    let running = v1::ContainerStateValue { state: v1::ContainerState::ContainerRunning.into() };
    let filter = v1::ContainerFilter { state: Some(running), ..v1::ContainerFilter::default() };
    let containers = runtime.list_containers(v1::ListContainersRequest { filter: Some(filter) }).await?.containers;
    let pods: Vec<Value> = sandboxes
        .iter()
        .map(|sandbox| {
            let metadata = sandbox.metadata.clone().unwrap_or_default();
            let own = containers.iter().filter(|container| container.pod_sandbox_id == sandbox.id);
            let own: Vec<Value> = own.map(|container| json!({
            "name": container.labels.get(label::CONTAINER_NAME), "image": container.image_ref, "resources": {},
        })).collect();
            json!({"metadata": {"name": metadata.name, "namespace": metadata.namespace, "uid": metadata.uid},
            "spec": {"containers": own}, "status": {}})
        })
        .collect();
    Ok(json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": pods}))
}

/// What the whole machine uses.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Host {
    pub(super) cpu_ns: u64,
    pub(super) memory_total: u64,
    pub(super) memory_available: u64,
    pub(super) swap_total: u64,
    pub(super) swap_free: u64,
}

impl Host {
    pub(super) fn read() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        Self::parse(&read("/proc/stat"), &read("/proc/meminfo"))
    }

    /// proc_stat(5): ticks of 1/100 s as user, nice, system, idle, iowait, irq, softirq, …; proc_meminfo(5): kB.
    fn parse(stat: &str, memory: &str) -> Self {
        let ticks: Vec<u64> = stat
            .lines()
            .next()
            .into_iter()
            .flat_map(str::split_whitespace)
            .skip(1)
            .filter_map(|word| word.parse().ok())
            .collect();
        let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|index| ticks.get(*index)).sum();
        let amount = |name: &str| {
            let line = memory.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
        };
        Self {
            cpu_ns: busy * 10_000_000,
            memory_total: amount("MemTotal"),
            memory_available: amount("MemAvailable"),
            swap_total: amount("SwapTotal"),
            swap_free: amount("SwapFree"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_and_swap_of_a_pod() {
        let some = |value| Some(v1::UInt64Value { value });
        let swap = |used| v1::SwapUsage { timestamp: 1, swap_available_bytes: some(1), swap_usage_bytes: some(used) };
        let container = |used| v1::ContainerStats { swap: Some(swap(used)), ..v1::ContainerStats::default() };
        let waited = v1::PsiData { total: 7, avg10: 1.5, avg60: 0.0, avg300: 0.0 };
        let cpu =
            v1::CpuUsage { psi: Some(v1::PsiStats { some: Some(waited), full: None }), ..v1::CpuUsage::default() };
        let linux = v1::LinuxPodSandboxStats {
            cpu: Some(cpu),
            containers: vec![container(2), container(3)],
            ..v1::LinuxPodSandboxStats::default()
        };
        let attributes =
            v1::PodSandboxAttributes { metadata: Some(v1::PodSandboxMetadata::default()), ..Default::default() };
        let shown =
            pod(&v1::PodSandboxStats { attributes: Some(attributes), linux: Some(linux), windows: None }).unwrap();
        assert_eq!(shown["cpu"]["psi"]["some"], json!({"total": 7, "avg10": 1.5, "avg60": 0.0, "avg300": 0.0}));
        assert_eq!(shown["cpu"]["psi"]["full"]["total"], 0);
        assert_eq!((&shown["swap"]["swapUsageBytes"], &shown["swap"]["swapAvailableBytes"]), (&json!(5), &json!(2)));
        assert_eq!(shown["io"], Value::Null);
    }

    #[test]
    fn the_machine() {
        let host = Host::parse(
            "cpu  10 0 5 999 3 1 0 0 0 0\ncpu0 …\n",
            "MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable: 40 kB\n",
        );
        assert_eq!(
            host,
            Host { cpu_ns: 160_000_000, memory_total: 102_400, memory_available: 40_960, ..Host::default() }
        );
    }
}
