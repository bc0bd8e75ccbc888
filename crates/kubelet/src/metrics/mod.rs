//! What the kubelet counts of itself, under upstream's names. Counting is an addition; text is only made when somebody asks.

mod probes;
mod starts;

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use instruments::{Counts, Histogram, Histograms, Text, labels, process};
use k8s_openapi::api::core::v1::Pod;
use pod::probe::{Kind, Outcome};
use pod::spec::Role;

use probes::Probes;
pub(crate) use starts::SandboxStart;
use starts::Starts;

/// `ExponentialBuckets(0.005, 2.5, 14)`, upstream's for calls of the runtime.
const CALLS: &[f64] = &[
    0.005,
    0.0125,
    0.031_25,
    0.078_125,
    0.195_312_5,
    0.488_281_25,
    1.220_703_125,
    3.051_757_812_5,
    7.629_394_531_25,
    19.073_486_328_125,
    47.683_715_820_312_5,
    119.209_289_550_781_25,
    298.023_223_876_953_1,
    745.058_059_692_382_8,
];
/// Prometheus' own.
const SHORT: &[f64] = &[0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0];
/// Upstream's for the start of a pod, with three below: most pods here would be in its first.
const STARTS: &[f64] = &[
    0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 20.0, 30.0, 45.0, 60.0, 120.0, 180.0, 240.0, 300.0,
    360.0, 480.0, 600.0, 900.0, 1200.0, 1800.0, 2700.0, 3600.0,
];
/// `ExponentialBucketsRange(0.1, 40, 15)`, upstream's for claims and their drivers, in whole microseconds.
const CLAIMS: &[f64] = &[
    0.1, 0.153413, 0.235355, 0.361064, 0.553918, 0.849781, 1.303673, 2.0, 3.068255, 4.707094, 7.221282, 11.078366,
    16.995625, 26.073454, 40.0,
];
/// Upstream's for volumes.
const STORAGE: &[f64] = &[0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 25.0, 50.0, 120.0, 300.0, 600.0];

/// Everything that is counted. Shared by all who count.
#[derive(Debug)]
pub struct Metrics {
    calls: Counts,
    failed_calls: Counts,
    call_durations: Histograms,
    /// From when a pod is seen until it runs.
    pub(crate) pod_start: Histogram,
    /// From its creation until it runs, less what images took.
    pub(crate) pod_start_sli: Histogram,
    steps: Histograms,
    storage: Histograms,
    evictions: Counts,
    preemptions: Counts,
    rejections: Counts,
    requests: Counts,
    request_durations: Histograms,
    websockets: Counts,
    failed_renewals: Counts,
    claims: Histograms,
    driver_calls: Histograms,
    claims_in_use: Mutex<BTreeMap<String, usize>>,
    probes: Probes,
    starts: Starts,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            calls: Counts::default(),
            failed_calls: Counts::default(),
            call_durations: Histograms::new(CALLS),
            pod_start: Histogram::new(STARTS),
            pod_start_sli: Histogram::new(STARTS),
            steps: Histograms::new(SHORT),
            storage: Histograms::new(STORAGE),
            evictions: Counts::default(),
            preemptions: Counts::default(),
            rejections: Counts::default(),
            requests: Counts::default(),
            request_durations: Histograms::new(SHORT),
            websockets: Counts::default(),
            failed_renewals: Counts::default(),
            claims: Histograms::new(CLAIMS),
            driver_calls: Histograms::new(CLAIMS),
            claims_in_use: Mutex::default(),
            probes: Probes::default(),
            starts: Starts::default(),
        }
    }
}

impl Metrics {
    /// A pod was evicted for want of what a signal is about.
    pub(crate) fn evicted(&self, signal: &str) {
        self.evictions.add(&labels(&[("eviction_signal", signal)]));
    }

    /// A pod made room for a critical one, which lacked a resource.
    pub(crate) fn preempted(&self, resource: &str) {
        self.preemptions.add(&labels(&[("preemption_signal", resource)]));
    }

    /// A pod was not taken.
    pub(crate) fn rejected(&self, reason: &str) {
        self.rejections.add(&labels(&[("reason", rejection(reason))]));
    }

    /// A request of the API has been answered.
    pub(crate) fn requested(&self, method: &str, path: &str, took: Duration) {
        let long = matches!(path, "exec" | "attach" | "portForward" | "containerLogs" | "debug");
        let long = if long { "true" } else { "false" };
        let pairs = [("long_running", long), ("method", method), ("path", path), ("server_type", "readwrite")];
        let labels = labels(&pairs);
        self.requests.add(&labels);
        self.request_durations.observe(&labels, took);
    }

    /// Somebody speaks WebSocket in a session.
    pub(crate) fn spoke_websocket(&self, path: &str) {
        self.websockets.add(&labels(&[("subresource", &path.to_ascii_lowercase())]));
    }

    /// A sandbox was made, or not.
    pub(crate) fn sandbox_started(&self, start: SandboxStart<'_>) {
        self.starts.sandbox(start);
    }

    /// A container was started, or why not.
    pub(crate) fn container_started(&self, role: Role, failed: Option<&str>) {
        self.starts.container(role, failed);
    }

    /// A run has ended.
    pub(crate) fn container_ended(&self, role: Role, exit_code: i32, reason: &str) {
        self.starts.container_ended(role, exit_code, reason);
    }

    /// The worker of a pod begins, so long after the pod was seen.
    pub(crate) fn worker_started(&self, waited: Duration) {
        self.starts.worker(waited);
    }

    /// The group of a pod was made, changed or removed.
    pub(crate) fn group_done(&self, operation: &str, took: Duration) {
        self.starts.group(operation, took);
    }

    /// An image of this size was pulled.
    pub(crate) fn pulled(&self, bytes: u64, took: Duration) {
        self.starts.pull(bytes, took);
    }

    /// A pod runs, so long after it was created.
    pub(crate) fn pod_runs(&self, age: Duration) {
        self.starts.total(age);
    }

    /// A worker has decided and begun what it decided.
    pub(crate) fn stepped(&self, operation: &str, took: Duration) {
        self.steps.observe(&labels(&[("operation_type", operation)]), took);
    }

    /// A volume of a pod was made, or could not be.
    pub(crate) fn mounted(&self, plugin: &str, took: Duration, failed: bool) {
        let status = if failed { "fail-unknown" } else { "success" };
        let pairs =
            [("migrated", "false"), ("operation_name", "volume_mount"), ("status", status), ("volume_plugin", plugin)];
        self.storage.observe(&labels(&pairs), took);
    }

    /// A certificate could not be renewed; of the client, or of the server.
    pub(crate) fn renewal_failed(&self, is_client: bool) {
        let name = match is_client {
            true => "kubelet_certificate_manager_client_expiration_renew_errors",
            false => "kubelet_server_expiration_renew_errors",
        };
        self.failed_renewals.add(name);
    }

    /// The claims of a pod were made ready, or that was undone.
    pub(crate) fn claims_done(&self, operation: &str, failed: bool, took: Duration) {
        let failed = if failed { "true" } else { "false" };
        self.claims.observe(&labels(&[("is_error", failed), ("operation_name", operation)]), took);
    }

    /// A driver of claims has answered, or not in time.
    pub(crate) fn asked_driver(&self, driver: &str, method: &str, code: tonic::Code, took: Duration) {
        let code = match code {
            tonic::Code::Ok => "OK".to_owned(),
            code => format!("{code:?}"),
        };
        let pairs = [("driver_name", driver), ("grpc_status_code", &code), ("method_name", method)];
        self.driver_calls.observe(&labels(&pairs), took);
    }

    /// How many claims are ready, of each driver.
    pub(crate) fn claims_in_use(&self, counts: BTreeMap<String, usize>) {
        *self.claims_in_use.lock().unwrap_or_else(PoisonError::into_inner) = counts;
    }

    /// A probe was answered.
    pub(crate) fn probed(&self, pod: &Pod, container: &str, kind: Kind, outcome: Outcome, took: Duration) {
        self.probes.answered(pod, container, kind, outcome, took);
    }

    /// A pod is gone.
    pub(crate) fn forget(&self, uid: &str) {
        self.probes.forget(uid);
    }

    /// `/metrics/probes`.
    pub(crate) fn write_probes(&self, text: &mut Text) {
        self.probes.write(text);
    }

    /// What belongs to `/metrics`.
    pub(crate) fn write(&self, text: &mut Text) {
        for name in
            ["kubelet_certificate_manager_client_expiration_renew_errors", "kubelet_server_expiration_renew_errors"]
        {
            text.family(name, "counter", "Counter of certificate renewal errors.");
            text.sample(name, "", self.failed_renewals.get(name));
        }
        self.counters().into_iter().for_each(|(counts, name, help)| counts.write(text, name, help));
        self.durations().into_iter().for_each(|(histograms, name, help)| histograms.write(text, name, help));
        self.write_claims_in_use(text);
        self.starts.write(text);
        let start = "Duration in seconds from kubelet seeing a pod for the first time to the pod starting to run";
        self.pod_start.write(text, "kubelet_pod_start_duration_seconds", start);
        let sli = "Duration in seconds to start a pod, excluding time to pull images and run init containers, measured from \
                   pod creation timestamp to when all its containers are reported as started and observed via watch";
        self.pod_start_sli.write(text, "kubelet_pod_start_sli_duration_seconds", sli);
        process::write(text);
    }

    /// Each with its name and upstream's explanation.
    fn counters(&self) -> [(&Counts, &'static str, &'static str); 7] {
        [
            (
                &self.calls,
                "kubelet_runtime_operations_total",
                "Cumulative number of runtime operations by operation type.",
            ),
            (
                &self.failed_calls,
                "kubelet_runtime_operations_errors_total",
                "Cumulative number of runtime operation errors by operation type.",
            ),
            (&self.evictions, "kubelet_evictions", "Cumulative number of pod evictions by eviction signal"),
            (&self.preemptions, "kubelet_preemptions", "Cumulative number of pod preemptions by preemption resource"),
            (
                &self.rejections,
                "kubelet_admission_rejections_total",
                "Cumulative number pod admission rejections by the Kubelet.",
            ),
            (
                &self.requests,
                "kubelet_http_requests_total",
                "Number of the http requests received since the server started",
            ),
            (
                &self.websockets,
                "kubelet_websocket_streaming_requests_total",
                "Total number of WebSocket streaming requests (exec/attach/portforward) received by the kubelet.",
            ),
        ]
    }

    /// As [`Metrics::counters`].
    fn durations(&self) -> [(&Histograms, &'static str, &'static str); 6] {
        [
            (
                &self.call_durations,
                "kubelet_runtime_operations_duration_seconds",
                "Duration in seconds of runtime operations. Broken down by operation type.",
            ),
            (
                &self.steps,
                "kubelet_pod_worker_duration_seconds",
                "Duration in seconds to sync a single pod. Broken down by operation type: create, update, or sync",
            ),
            (&self.storage, "storage_operation_duration_seconds", "Storage operation duration"),
            (
                &self.request_durations,
                "kubelet_http_requests_duration_seconds",
                "Duration in seconds to serve http requests",
            ),
            (
                &self.claims,
                "dra_operations_duration_seconds",
                "Latency histogram in seconds for the duration of handling all ResourceClaims referenced by a pod when the pod \
                 starts or stops. Identified by the name of the operation (PrepareResources or UnprepareResources) and separated \
                 by the success of the operation. The number of failed operations is provided through the histogram's overall \
                 count.",
            ),
            (
                &self.driver_calls,
                "dra_grpc_operations_duration_seconds",
                "Duration in seconds of the DRA gRPC operations",
            ),
        ]
    }

    fn write_claims_in_use(&self, text: &mut Text) {
        const IN_USE: &str = "dra_resource_claims_in_use";
        let help = "The number of ResourceClaims that are currently in use on the node, by driver name";
        text.family(IN_USE, "gauge", help);
        let in_use = self.claims_in_use.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (driver, count) in in_use {
            let driver = if driver.is_empty() { "<any>" } else { &driver };
            text.sample(IN_USE, &labels(&[("driver_name", driver)]), count);
        }
    }
}

impl cri::Observer for Metrics {
    fn done(&self, call: &'static str, took: Duration, failed: bool) {
        let labels = labels(&[("operation_type", operation(call))]);
        self.calls.add(&labels);
        if failed {
            self.failed_calls.add(&labels);
        }
        self.call_durations.observe(&labels, took);
    }
}

/// The reason as it is counted. Resources have any names, so those that are not Kubernetes' own count as one, as upstream
/// has it.
fn rejection(reason: &str) -> &str {
    const KNOWN: &[&str] = &[
        "AppArmor",
        "Evicted",
        "InvalidNodeInfo",
        "NodeAffinity",
        "NodeName",
        "NodePorts",
        "NodeShutdown",
        "OutOfcpu",
        "OutOfephemeral-storage",
        "OutOfmemory",
        "OutOfpods",
        "PodFeatureUnsupported",
        "PodLevelResourcesNotSupported",
        "PodOSNotSupported",
        "PodOSSelectorNodeLabelDoesNotMatch",
        "SMTAlignmentError",
        "SupplementalGroupsPolicyNotSupported",
        "SysctlForbidden",
        "TaintToleration",
        "TopologyAffinityError",
        "UnexpectedAdmissionError",
        "VolumeAttachmentLimitExceeded",
    ];
    match KNOWN.binary_search(&reason) {
        Ok(_) => reason,
        Err(_) if reason.starts_with("OutOf") => "OutOfExtendedResources",
        Err(_) => "Other",
    }
}

/// As upstream names the call.
fn operation(call: &'static str) -> &'static str {
    match call {
        "run_pod_sandbox" => "run_podsandbox",
        "stop_pod_sandbox" => "stop_podsandbox",
        "remove_pod_sandbox" => "remove_podsandbox",
        "pod_sandbox_status" => "podsandbox_status",
        "list_pod_sandbox" => "list_podsandbox",
        "pod_sandbox_stats" => "podsandbox_stats",
        "list_pod_sandbox_stats" => "list_podsandbox_stats",
        "update_container_resources" => "update_container",
        "update_pod_sandbox_resources" => "update_podsandbox",
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use cri::Observer as _;
    use openmetrics_parser::PrometheusValue;
    use openmetrics_parser::prometheus::parse_prometheus;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_parser_reads_all_of_it() {
        let metrics = Metrics::default();
        metrics.done("run_pod_sandbox", Duration::from_millis(10), false);
        metrics.done("run_pod_sandbox", Duration::from_millis(100), true);
        metrics.evicted("memory.available");
        metrics.rejected("OutOfcpu");
        metrics.requested("GET", "metrics", Duration::from_millis(3));
        metrics.spoke_websocket("portForward");
        metrics.stepped("sync", Duration::from_micros(50));
        metrics.mounted("kubernetes.io/empty-dir", Duration::from_millis(1), false);
        metrics.pod_start.observe(Duration::from_millis(60));
        metrics.renewal_failed(true);
        let pod = json!({"metadata": {"name": "p\"q", "namespace": "n", "uid": "u"}});
        metrics.probed(
            &serde_json::from_value(pod).unwrap(),
            "c",
            Kind::Liveness,
            Outcome::Failure,
            Duration::from_millis(20),
        );
        let mut text = Text::default();
        metrics.write(&mut text);
        metrics.write_probes(&mut text);
        let parsed = parse_prometheus(&text.out).unwrap_or_else(|error| panic!("{error}\n{}", text.out));
        let family = |name: &str| parsed.families.get(name).unwrap_or_else(|| panic!("{name}\n{}", text.out));
        let total = family("kubelet_runtime_operations_total").iter_samples().next().unwrap();
        assert_eq!(total.get_labelset().unwrap().get_label_value("operation_type"), Some("run_podsandbox"));
        assert!(matches!(&total.value, PrometheusValue::Counter(counter) if counter.value.as_f64() == 2.0));
        let took = family("kubelet_runtime_operations_duration_seconds").iter_samples().next().unwrap();
        let PrometheusValue::Histogram(took) = &took.value else { panic!("{took:?}") };
        assert_eq!((took.count, took.buckets[1].count.as_f64(), took.buckets.len()), (Some(2), 1.0, CALLS.len() + 1));
        let probe = family("prober_probe_total").iter_samples().next().unwrap();
        assert_eq!(probe.get_labelset().unwrap().get_label_value("result"), Some("failed"));
        let took = family("prober_probe_duration_seconds").iter_samples().next().unwrap();
        assert_eq!(took.get_labelset().unwrap().get_label_value("probe_type"), Some("Liveness"));
        let PrometheusValue::Histogram(took) = &took.value else { panic!("{took:?}") };
        assert_eq!((took.count, took.buckets[2].count.as_f64()), (Some(1), 1.0));
        assert!(text.out.contains("kubelet_certificate_manager_client_expiration_renew_errors 1\n"));
    }

    #[test]
    fn reasons_are_of_a_bounded_number() {
        for (reason, counted) in [
            ("OutOfcpu", "OutOfcpu"),
            ("NodePorts", "NodePorts"),
            ("VolumeAttachmentLimitExceeded", "VolumeAttachmentLimitExceeded"),
            ("AppArmor", "AppArmor"),
            ("OutOfhugepages-2Mi", "OutOfExtendedResources"),
            ("OutOfexample.com/gpu", "OutOfExtendedResources"),
            ("Whatever", "Other"),
        ] {
            assert_eq!(rejection(reason), counted);
        }
    }

    #[test]
    fn pods_that_are_gone_are_not_counted() {
        let metrics = Metrics::default();
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "uid": "u"}})).unwrap();
        metrics.probed(&pod, "c", Kind::Readiness, Outcome::Success, Duration::from_millis(1));
        metrics.forget("u");
        let mut text = Text::default();
        metrics.write_probes(&mut text);
        assert_eq!(text.out.lines().filter(|line| !line.starts_with('#')).count(), 0);
    }
}
