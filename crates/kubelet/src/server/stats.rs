//! What pods use, in the forms that metrics-server and Prometheus read.

use std::fmt::Write as _;

use cri::{Error, RuntimeService, v1};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::generate::label;

/// `/stats/summary`.
pub(super) async fn summary(runtime: &dyn RuntimeService, node: &str) -> Result<Value, Error> {
    let stats = runtime.list_pod_sandbox_stats(v1::ListPodSandboxStatsRequest { filter: None }).await?.stats;
    let host = Host::read();
    let pods: Vec<Value> = stats.iter().filter_map(pod).collect();
    Ok(json!({
        "node": {
            "nodeName": node,
            "cpu": {"time": now(), "usageCoreNanoSeconds": host.cpu_ns},
            "memory": {"time": now(), "availableBytes": host.memory_available,
                "workingSetBytes": host.memory_total.saturating_sub(host.memory_available)},
        },
        "pods": pods,
    }))
}

fn now() -> String {
    Timestamp::now().to_string()
}

/// A point in time that the CRI counts in nanoseconds.
fn time(nanoseconds: i64) -> String {
    Timestamp::from_nanosecond(i128::from(nanoseconds)).unwrap_or_default().to_string()
}

fn number(value: &Option<v1::UInt64Value>) -> Option<u64> {
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
        "rootfs": layer.map(|layer| json!({"time": time(layer.timestamp), "usedBytes": number(&layer.used_bytes),
            "inodesUsed": number(&layer.inodes_used)})),
    }))
}

fn cpu(usage: &v1::CpuUsage) -> Value {
    json!({"time": time(usage.timestamp), "usageNanoCores": number(&usage.usage_nano_cores),
        "usageCoreNanoSeconds": number(&usage.usage_core_nano_seconds)})
}

fn memory(usage: &v1::MemoryUsage) -> Value {
    json!({"time": time(usage.timestamp), "workingSetBytes": number(&usage.working_set_bytes),
        "availableBytes": number(&usage.available_bytes), "usageBytes": number(&usage.usage_bytes),
        "rssBytes": number(&usage.rss_bytes), "pageFaults": number(&usage.page_faults),
        "majorPageFaults": number(&usage.major_page_faults)})
}

/// `/metrics/resource`, which metrics-server reads.
pub(super) async fn resource_metrics(runtime: &dyn RuntimeService) -> Result<String, Error> {
    let stats = runtime.list_pod_sandbox_stats(v1::ListPodSandboxStatsRequest { filter: None }).await?.stats;
    let host = Host::read();
    let mut text = Text::default();
    text.family("node_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the node in core-seconds");
    text.sample("node_cpu_usage_seconds_total", "", seconds(host.cpu_ns));
    let working_set = host.memory_total.saturating_sub(host.memory_available);
    text.family("node_memory_working_set_bytes", "gauge", "Current working set of the node in bytes");
    text.sample("node_memory_working_set_bytes", "", working_set);
    let containers: Vec<(String, &v1::ContainerStats)> = stats.iter().flat_map(labelled_containers).collect();
    text.family(
        "container_cpu_usage_seconds_total",
        "counter",
        "Cumulative cpu time consumed by the container in core-seconds",
    );
    for (labels, stats) in &containers {
        text.number("container_cpu_usage_seconds_total", labels, cpu_ns(&stats.cpu).map(seconds));
    }
    text.family("container_memory_working_set_bytes", "gauge", "Current working set of the container in bytes");
    for (labels, stats) in &containers {
        text.number("container_memory_working_set_bytes", labels, working_set_of(&stats.memory));
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
        "resource_scrape_error",
        "gauge",
        "1 if there was an error while getting container metrics, 0 otherwise",
    );
    text.sample("resource_scrape_error", "", 0);
    Ok(text.out)
}

#[allow(clippy::cast_precision_loss, reason = "a time in seconds for people and dashboards")]
fn seconds(nanoseconds: u64) -> f64 {
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
    let labels = format!("namespace={:?},pod={:?}", metadata.namespace, metadata.name);
    Some((labels, stats.linux.as_ref()?))
}

fn labelled_containers(stats: &v1::PodSandboxStats) -> Vec<(String, &v1::ContainerStats)> {
    let Some((pod, linux)) = labelled_pod(stats) else { return Vec::new() };
    let named = linux.containers.iter().filter_map(|container| {
        let name = &container.attributes.as_ref()?.metadata.as_ref()?.name;
        Some((format!("container={name:?},{pod}"), container))
    });
    named.collect()
}

/// `/metrics`: what the kubelet says of itself.
pub(super) async fn metrics(runtime: &dyn RuntimeService, node: &str) -> Result<String, Error> {
    let sandboxes = runtime.list_pod_sandbox(v1::ListPodSandboxRequest { filter: None }).await?.items;
    let containers = runtime.list_containers(v1::ListContainersRequest { filter: None }).await?.containers;
    let ready = sandboxes.iter().filter(|one| one.state == i32::from(v1::PodSandboxState::SandboxReady)).count();
    let mut text = Text::default();
    text.family("kubelet_node_name", "gauge", "The node's name. The count is always 1.");
    text.sample("kubelet_node_name", &format!("node={node:?}"), 1);
    text.family("kubelet_running_pods", "gauge", "Number of pods that have a running pod sandbox");
    text.sample("kubelet_running_pods", "", ready);
    text.family("kubelet_running_containers", "gauge", "Number of containers by state");
    for (state, name) in [
        (v1::ContainerState::ContainerCreated, "created"),
        (v1::ContainerState::ContainerRunning, "running"),
        (v1::ContainerState::ContainerExited, "exited"),
        (v1::ContainerState::ContainerUnknown, "unknown"),
    ] {
        let count = containers.iter().filter(|container| container.state == i32::from(state)).count();
        text.sample("kubelet_running_containers", &format!("container_state={name:?}"), count);
    }
    Ok(text.out)
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

/// Metrics in Prometheus' text form.
#[derive(Default)]
struct Text {
    out: String,
}

impl Text {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let labels = if labels.is_empty() { String::new() } else { format!("{{{labels}}}") };
        // Writing to a String cannot fail.
        let _ = writeln!(self.out, "{name}{labels} {value}");
    }

    fn number(&mut self, name: &str, labels: &str, value: Option<impl std::fmt::Display>) {
        if let Some(value) = value {
            self.sample(name, labels, value);
        }
    }
}

/// What the whole machine uses.
#[derive(Debug, Default, PartialEq, Eq)]
struct Host {
    cpu_ns: u64,
    memory_total: u64,
    memory_available: u64,
}

impl Host {
    fn read() -> Self {
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
        Self { cpu_ns: busy * 10_000_000, memory_total: amount("MemTotal"), memory_available: amount("MemAvailable") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine() {
        let host = Host::parse(
            "cpu  10 0 5 999 3 1 0 0 0 0\ncpu0 …\n",
            "MemTotal: 100 kB\nMemFree: 1 kB\nMemAvailable: 40 kB\n",
        );
        assert_eq!(host, Host { cpu_ns: 160_000_000, memory_total: 102_400, memory_available: 40_960 });
    }
}
