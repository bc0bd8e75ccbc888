//! `/metrics/cadvisor` where another program is the runtime: what its statistics say (CRI), under cAdvisor's names and labels.
//! The paths of its groups are not among them, so `id` is that of the container or sandbox.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use cri::{Error, RuntimeService, v1};
use instruments::{Text, labels};

use super::metrics::{ContainerMetrics, seconds};
use super::stats::number;

/// Of this runtime.
pub struct Statistics(pub Arc<dyn RuntimeService>);

#[async_trait]
impl ContainerMetrics for Statistics {
    async fn text(&self) -> String {
        match Known::ask(&*self.0).await {
            Ok(known) => known.text(),
            Err(error) => {
                tracing::warn!(%error, "what containers use is not known");
                String::new()
            }
        }
    }
}

/// What the runtime says.
struct Known {
    pods: Vec<v1::PodSandboxStats>,
    /// By id: what statistics do not have.
    containers: HashMap<String, v1::Container>,
}

/// What is measured of a container, or of a pod as a whole.
#[derive(Clone, Copy)]
struct Measured<'a> {
    cpu: Option<&'a v1::CpuUsage>,
    memory: Option<&'a v1::MemoryUsage>,
    swap: Option<&'a v1::SwapUsage>,
    written: Option<&'a v1::FilesystemUsage>,
}

/// A family: name, type, help, more labels, value.
type Family = (&'static str, &'static str, &'static str, &'static str, fn(&Measured<'_>) -> Option<f64>);

const FAMILIES: [Family; 8] = [
    ("container_cpu_usage_seconds_total", "counter", "Processor time used.", ",cpu=\"total\"", |of| {
        number(&of.cpu?.usage_core_nano_seconds).map(seconds)
    }),
    ("container_memory_usage_bytes", "gauge", "Bytes of memory in all.", "", |of| amount(&of.memory?.usage_bytes)),
    ("container_memory_working_set_bytes", "gauge", "Bytes of memory that cannot be dropped at once.", "", |of| {
        amount(&of.memory?.working_set_bytes)
    }),
    ("container_memory_rss", "gauge", "Bytes of anonymous memory.", "", |of| amount(&of.memory?.rss_bytes)),
    ("container_memory_swap", "gauge", "Bytes in swap.", "", |of| amount(&of.swap?.swap_usage_bytes)),
    (
        "container_memory_failures_total",
        "counter",
        "Page faults.",
        ",failure_type=\"pgmajfault\",scope=\"container\"",
        |of| amount(&of.memory?.major_page_faults),
    ),
    ("container_fs_usage_bytes", "gauge", "Bytes written to the root file system that are still there.", "", |of| {
        amount(&of.written?.used_bytes)
    }),
    ("container_fs_inodes_used", "gauge", "Files written to the root file system that are still there.", "", |of| {
        amount(&of.written?.inodes_used)
    }),
];

/// A family of an interface: name, help, value.
type NetworkFamily = (&'static str, &'static str, fn(&v1::NetworkInterfaceUsage) -> Option<f64>);

const NETWORK: [NetworkFamily; 4] = [
    ("container_network_receive_bytes_total", "Bytes received.", |of| amount(&of.rx_bytes)),
    ("container_network_receive_errors_total", "Errors while receiving.", |of| amount(&of.rx_errors)),
    ("container_network_transmit_bytes_total", "Bytes sent.", |of| amount(&of.tx_bytes)),
    ("container_network_transmit_errors_total", "Errors while sending.", |of| amount(&of.tx_errors)),
];

#[expect(clippy::cast_precision_loss, reason = "bytes below 2^53")]
fn amount(value: &Option<v1::UInt64Value>) -> Option<f64> {
    number(value).map(|value| value as f64)
}

impl Known {
    async fn ask(runtime: &dyn RuntimeService) -> Result<Self, Error> {
        let pods = runtime.list_pod_sandbox_stats(v1::ListPodSandboxStatsRequest { filter: None }).await?.stats;
        let listed = runtime.list_containers(v1::ListContainersRequest { filter: None }).await?.containers;
        Ok(Self { pods, containers: listed.into_iter().map(|one| (one.id.clone(), one)).collect() })
    }

    fn text(&self) -> String {
        let rows: Vec<(String, Measured<'_>)> = self.pods.iter().flat_map(|pod| self.rows(pod)).collect();
        let mut text = Text::default();
        for (name, kind, help, more, value) in FAMILIES {
            text.family(name, kind, help);
            rows.iter().for_each(|(labels, of)| text.number(name, &format!("{labels}{more}"), value(of)));
        }
        text.family("container_start_time_seconds", "gauge", "When the container was started.");
        for (labels, at) in self.pods.iter().flat_map(|pod| self.starts(pod)) {
            text.sample("container_start_time_seconds", &labels, at);
        }
        let interfaces: Vec<(String, &v1::NetworkInterfaceUsage)> = self.pods.iter().flat_map(interfaces).collect();
        for (name, help, value) in NETWORK {
            text.family(name, "counter", help);
            interfaces.iter().for_each(|(labels, of)| text.number(name, labels, value(of)));
        }
        text.out
    }

    /// A pod as a whole, and its containers.
    fn rows<'a>(&self, pod: &'a v1::PodSandboxStats) -> Vec<(String, Measured<'a>)> {
        let Some(linux) = &pod.linux else { return Vec::new() };
        let whole = Measured { cpu: linux.cpu.as_ref(), memory: linux.memory.as_ref(), swap: None, written: None };
        let whole = of_pod(pod).map(|labels| (labels, whole));
        let containers = linux.containers.iter().filter_map(|one| {
            let (cpu, memory) = (one.cpu.as_ref(), one.memory.as_ref());
            let measured = Measured { cpu, memory, swap: one.swap.as_ref(), written: one.writable_layer.as_ref() };
            Some((self.of_container(pod, one)?, measured))
        });
        whole.into_iter().chain(containers).collect()
    }

    fn starts(&self, pod: &v1::PodSandboxStats) -> Vec<(String, f64)> {
        let containers = pod.linux.iter().flat_map(|linux| &linux.containers);
        let start = |one: &v1::ContainerStats| {
            let listed = self.containers.get(&one.attributes.as_ref()?.id)?;
            Some((self.of_container(pod, one)?, seconds(u64::try_from(listed.created_at).ok()?)))
        };
        containers.filter_map(start).collect()
    }

    fn of_container(&self, pod: &v1::PodSandboxStats, container: &v1::ContainerStats) -> Option<String> {
        let metadata = pod.attributes.as_ref()?.metadata.as_ref()?;
        let own = container.attributes.as_ref()?;
        let image = self.containers.get(&own.id).and_then(|listed| listed.image.as_ref());
        Some(labels(&[
            ("container", &own.metadata.as_ref()?.name),
            ("id", &own.id),
            ("image", image.map_or("", |image| image.user_specified_image.as_str())),
            ("name", &own.id),
            ("namespace", &metadata.namespace),
            ("pod", &metadata.name),
        ]))
    }
}

/// Labels of what belongs to no container of a pod.
fn of_pod(pod: &v1::PodSandboxStats) -> Option<String> {
    let attributes = pod.attributes.as_ref()?;
    let metadata = attributes.metadata.as_ref()?;
    Some(labels(&[
        ("container", ""),
        ("id", &attributes.id),
        ("image", ""),
        ("name", ""),
        ("namespace", &metadata.namespace),
        ("pod", &metadata.name),
    ]))
}

fn interfaces(pod: &v1::PodSandboxStats) -> Vec<(String, &v1::NetworkInterfaceUsage)> {
    let network = pod.linux.as_ref().and_then(|linux| linux.network.as_ref());
    let (Some(network), Some(pod)) = (network, of_pod(pod)) else { return Vec::new() };
    let all = network.default_interface.iter().chain(&network.interfaces);
    let mut seen = std::collections::HashSet::new();
    let all = all.filter(|one| seen.insert(&one.name));
    all.map(|one| (format!("{pod},{}", labels(&[("interface", &one.name)])), one)).collect()
}

#[cfg(test)]
mod tests {
    use openmetrics_parser::prometheus::parse_prometheus;

    use super::*;

    #[test]
    fn statistics_become_what_dashboards_read() {
        let some = |value| Some(v1::UInt64Value { value });
        let cpu = |value| Some(v1::CpuUsage { usage_core_nano_seconds: some(value), ..v1::CpuUsage::default() });
        let eth0 = v1::NetworkInterfaceUsage {
            name: "eth0".to_owned(),
            rx_bytes: some(7),
            ..v1::NetworkInterfaceUsage::default()
        };
        let metadata = v1::ContainerMetadata { name: "c".to_owned(), attempt: 0 };
        let container = v1::ContainerStats {
            attributes: Some(v1::ContainerAttributes {
                id: "1a".to_owned(),
                metadata: Some(metadata),
                ..v1::ContainerAttributes::default()
            }),
            cpu: cpu(1_500_000_000),
            ..v1::ContainerStats::default()
        };
        let metadata =
            v1::PodSandboxMetadata { name: "web".to_owned(), namespace: "shop".to_owned(), ..Default::default() };
        let pod = v1::PodSandboxStats {
            attributes: Some(v1::PodSandboxAttributes {
                id: "9z".to_owned(),
                metadata: Some(metadata),
                ..v1::PodSandboxAttributes::default()
            }),
            linux: Some(v1::LinuxPodSandboxStats {
                cpu: cpu(2_000_000_000),
                network: Some(v1::NetworkUsage {
                    default_interface: Some(eth0.clone()),
                    interfaces: vec![eth0],
                    ..v1::NetworkUsage::default()
                }),
                containers: vec![container],
                ..v1::LinuxPodSandboxStats::default()
            }),
            windows: None,
        };
        let image = v1::ImageSpec { user_specified_image: "nginx:1".to_owned(), ..v1::ImageSpec::default() };
        let listed = v1::Container { created_at: 3_000_000_000, image: Some(image), ..v1::Container::default() };
        let text = Known { pods: vec![pod], containers: [("1a".to_owned(), listed)].into() }.text();
        parse_prometheus(&text).unwrap();
        for line in [
            r#"container_cpu_usage_seconds_total{container="c",id="1a",image="nginx:1",name="1a",namespace="shop",pod="web",cpu="total"} 1.5"#,
            r#"container_cpu_usage_seconds_total{container="",id="9z",image="",name="",namespace="shop",pod="web",cpu="total"} 2"#,
            r#"container_start_time_seconds{container="c",id="1a",image="nginx:1",name="1a",namespace="shop",pod="web"} 3"#,
            r#"container_network_receive_bytes_total{container="",id="9z",image="",name="",namespace="shop",pod="web",interface="eth0"} 7"#,
        ] {
            assert_eq!(text.lines().filter(|found| *found == line).count(), 1, "{line} is not once in\n{text}");
        }
    }
}
