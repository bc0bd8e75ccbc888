//! What a node with a real pod tells Prometheus, as a parser of it reads it.

use openmetrics_parser::prometheus::parse_prometheus;
use openmetrics_parser::{MetricFamily, MetricsExposition, PrometheusType, PrometheusValue};
use serde_json::json;
use testkit::serial::Test;

use crate::fixture::on_a_node;

pub(crate) const TESTS: &[Test] = &[("containers_are_told_as_cadvisor_does", containers_are_told_as_cadvisor_does)];

type Family = MetricFamily<PrometheusType, PrometheusValue>;

fn family<'a>(all: &'a MetricsExposition<PrometheusType, PrometheusValue>, name: &str) -> &'a Family {
    all.families.get(name).unwrap_or_else(|| panic!("no {name}"))
}

/// The value of the sample with these labels.
fn value(family: &Family, labels: &[(&str, &str)]) -> Option<f64> {
    let sample = family.iter_samples().find(|sample| {
        let own = sample.get_labelset().unwrap();
        labels.iter().all(|(name, value)| own.get_label_value(name) == Some(*value))
    })?;
    match &sample.value {
        PrometheusValue::Counter(counter) => Some(counter.value.as_f64()),
        PrometheusValue::Gauge(number) => Some(number.as_f64()),
        other => panic!("{other:?}"),
    }
}

fn containers_are_told_as_cadvisor_does() {
    on_a_node(async |node| {
        let limits = json!({ "resources": { "limits": { "memory": "64Mi", "cpu": "500m" } } });
        node.want("web", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 1000", limits);
        node.desk.running("web").await;
        let id = node.containers("web").await.remove(0).id;
        let text = node.runtime.container_metrics(node.groups.shared()).await;
        let all = parse_prometheus(&text).unwrap_or_else(|error| panic!("{error}\n{text}"));
        let labels = [("namespace", "default"), ("pod", "web"), ("container", "c"), ("name", id.as_str())];
        let of_container = |name: &str| value(family(&all, name), &labels).unwrap_or_else(|| panic!("{name}\n{text}"));
        let cpu = of_container("container_cpu_usage_seconds_total");
        assert!(cpu > 0.0 && cpu.fract() > 0.0, "parts of a second count: {cpu}");
        assert!(of_container("container_memory_working_set_bytes") > 0.0);
        assert!(of_container("container_processes") >= 1.0);
        assert_eq!(of_container("container_spec_memory_limit_bytes"), f64::from(64 << 20));
        assert!(of_container("container_start_time_seconds") > 1.6e9);
        let network = family(&all, "container_network_receive_bytes_total");
        assert!(value(network, &[("pod", "web"), ("interface", "eth0")]).is_some(), "{text}");
        let cpu = family(&all, "container_cpu_usage_seconds_total");
        for group in ["/", "/kubepods", "/kubepods/burstable"] {
            assert!(value(cpu, &[("id", group), ("pod", "")]).is_some(), "{group}\n{text}");
        }
        assert!(value(family(&all, "container_memory_usage_bytes"), &[("id", "/")]).unwrap() > 1e6);
        node
    });
}
