//! The fields that this kubelet honours, as values to work with.

mod eviction;
mod resources;
mod upkeep;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use cluster::api::ManifestUrl;
use configfile::Reader;
use k8s_openapi::api::core::v1::Taint;
use pod::quantity::Quantity;
use serde_json::Value;

use crate::node::pressure::Policy;
use crate::node::shutdown::Period;
use crate::pulled::Verification;
use crate::qos::{Driver, MemoryRules};
use crate::resources::policies::Policies;
use crate::server::NodeLogs;
use crate::server::secure::Holds;

/// What the operator wants of this kubelet.
#[derive(Debug, Clone, PartialEq)]
pub struct Configuration {
    /// Whether the API is served on the network at all.
    pub enable_server: bool,
    /// Whether it reaches into pods.
    pub enable_debugging_handlers: bool,
    /// What it serves of the node's logs.
    pub node_logs: NodeLogs,
    /// Address of the API.
    pub address: IpAddr,
    /// Port of the API.
    pub port: u16,
    /// Serving certificate and key; without one, the kubelet makes its own.
    pub tls: Option<(PathBuf, PathBuf)>,
    /// Whether the node renews its own certificate.
    pub rotate_certificates: bool,
    /// Whether the cluster signs the serving certificate.
    pub server_tls_bootstrap: bool,
    /// Who callers are.
    pub authentication: Authentication,
    /// Who may do what.
    pub authorization: Authorization,
    /// For how long what the API server says about callers holds.
    pub holds: Holds,
    /// Address and port of `/healthz`; port 0 is none.
    pub healthz: (IpAddr, u16),
    /// Domain of the cluster's names.
    pub cluster_domain: String,
    /// Name servers of pods.
    pub cluster_dns: Vec<String>,
    /// How often the node's status is looked at.
    pub node_status_update_frequency: Duration,
    /// How often it is reported though nothing has changed.
    pub node_status_report_frequency: Duration,
    /// How long the node's lease holds, seconds.
    pub node_lease_duration_s: i32,
    /// Most pods.
    pub max_pods: u32,
    /// Most pods for each CPU; 0 is no limit.
    pub pods_per_core: u32,
    /// Most files that the daemon has open.
    pub max_open_files: u64,
    /// The socket of the container runtime.
    pub container_runtime_endpoint: Option<String>,
    /// Where images are pulled, if that is another program still.
    pub image_service_endpoint: Option<String>,
    /// How long another runtime may take for most calls.
    pub runtime_request_timeout: Duration,
    /// Addresses of pods, if the cluster does not say.
    pub pod_cidr: Option<String>,
    /// The group in which the tree of the pods' groups stands, without a slash in front; empty for the root.
    pub cgroup_root: PathBuf,
    /// Who makes the tree, where the runtime does not tell.
    pub cgroup_driver: Driver,
    /// Resolver configuration of pods that use the node's, if it is not in the usual place.
    pub resolv_conf: Option<PathBuf>,
    /// Requests to the API server, per second.
    pub kube_api_qps: u32,
    /// Requests to the API server at once.
    pub kube_api_burst: u32,
    /// Events per second, and at once; 0 is no limit.
    pub event_rate: (u32, u32),
    /// Sysctls that pods may set beside the safe ones.
    pub sysctls: Vec<String>,
    /// When pods are evicted.
    pub eviction: Policy,
    /// When images go that no container uses.
    pub image_gc: ImageGc,
    /// What is given out whole, and from which NUMA nodes.
    pub policies: Policies,
    /// How long pods have when the machine goes down; empty where it does not wait for them.
    pub shutdown: Vec<Period>,
    /// When the logs of containers are rotated.
    pub log_limits: LogLimits,
    /// Where they are, if not where they always are (`podLogsDir`).
    pub pod_logs_dir: Option<PathBuf>,
    /// Most pulls of images at a time (`serializeImagePulls`, `maxParallelImagePulls`); as many as there are without.
    pub pulls_max: Option<usize>,
    /// Which images pods need credentials for though they are on the node (`imagePullCredentialsVerificationPolicy`).
    pub verification: Verification,
    /// Whether containers get a share of the machine's swap (`memorySwap.swapBehavior: LimitedSwap`).
    pub limited_swap: bool,
    /// What control groups of version 2 do for memory (`singleProcessOOMKill`, `memoryThrottlingFactor`,
    /// `memoryReservationPolicy`).
    pub memory: MemoryRules,
    /// Whether a machine that swaps is refused. Upstream refuses it unless told not to; here containers get no swap anyway, so
    /// the operator has to say so.
    pub fail_swap_on: bool,
    /// Most processes of one pod.
    pub pod_pids_limit: Option<i64>,
    /// The length of a CPU period in microseconds; without one, limits of CPU are not kept (`cpuCFSQuota: false`).
    pub cpu_period_us: Option<u64>,
    /// Whether containers without a seccomp profile get the runtime's default.
    pub seccomp_default: bool,
    /// How many images a node lists; all of them without.
    pub status_images_max: Option<usize>,
    /// Who is kept to what the node can give (`enforceNodeAllocatable`).
    pub enforced: Enforced,
    /// `systemReserved` and `kubeReserved` together.
    pub reserved: BTreeMap<String, Quantity>,
    /// The cloud's name of the node.
    pub provider_id: Option<String>,
    /// Taints that the node is born with.
    pub register_with_taints: Vec<Taint>,
    /// Whether the kubelet makes its Node object.
    pub register_node: bool,
    /// The file or directory of the node's static pods.
    pub static_pod_path: Option<PathBuf>,
    /// Where more of them are.
    pub static_pod_url: Option<ManifestUrl>,
}

/// `containerLogMaxSize` and what belongs to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// A log that is larger is rotated, in bytes.
    pub bytes_max: u64,
    /// Files of a container, the one that is written included.
    pub files_max: u32,
    /// How often the logs of another runtime are looked at; orlop's own rotates as it writes.
    pub look_every: Duration,
    /// How many of those are rotated at a time.
    pub workers: usize,
}

/// Who is kept to what the node can give.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Enforced {
    /// All pods together.
    pub pods: bool,
    /// The groups of others, which exist already.
    pub groups: Vec<EnforcedGroup>,
}

/// A group that is kept to what is reserved for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnforcedGroup {
    /// The field that names it.
    pub field: &'static str,
    /// Its path below the root of the hierarchy.
    pub path: PathBuf,
    /// What it gets.
    pub reserved: BTreeMap<String, Quantity>,
    /// Of that, CPU alone (`…-compressible`).
    pub cpu_only: bool,
}

/// When images go that no container uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageGc {
    /// From this usage of the disk on, percent.
    pub high_percent: u8,
    /// Down to this usage.
    pub low_percent: u8,
    /// Younger ones stay.
    pub minimum_age: Duration,
    /// Those that nobody has used for longer go, however full the disk is.
    pub maximum_age: Option<Duration>,
}

/// Who callers of the API are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authentication {
    /// Callers without credentials are `system:anonymous`.
    pub anonymous: bool,
    /// Tokens are asked about.
    pub webhook: bool,
    /// Authority of client certificates.
    pub client_ca_file: Option<PathBuf>,
}

/// Who may do what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Authorization {
    /// The API server is asked.
    Webhook,
    /// Whoever is known may do everything.
    AlwaysAllow,
}

/// Reads the merged configuration, whose leaves are of their kinds already; returns all faults.
pub(super) fn read(written: &Value) -> Result<Configuration, Vec<String>> {
    let mut reader = Reader::new(written);
    let update = reader.span("nodeStatusUpdateFrequency");
    let report = reader.span("nodeStatusReportFrequency");
    let reserved = resources::reserved(&mut reader);
    let configuration = Configuration {
        enable_server: reader.flag("enableServer", true),
        enable_debugging_handlers: reader.flag("enableDebuggingHandlers", true),
        node_logs: node_logs(&mut reader),
        address: reader.address("address", "0.0.0.0"),
        port: reader.number("port", 10250),
        tls: reader.file("tlsCertFile").zip(reader.file("tlsPrivateKeyFile")),
        rotate_certificates: reader.flag("rotateCertificates", false),
        server_tls_bootstrap: reader.flag("serverTLSBootstrap", false),
        authentication: Authentication {
            anonymous: reader.flag("authentication.anonymous.enabled", false),
            webhook: reader.flag("authentication.webhook.enabled", true),
            client_ca_file: reader.file("authentication.x509.clientCAFile"),
        },
        authorization: authorization(&mut reader),
        holds: holds(&reader),
        healthz: (reader.address("healthzBindAddress", "127.0.0.1"), reader.number("healthzPort", 10248)),
        cluster_domain: reader.text("clusterDomain").unwrap_or_default(),
        cluster_dns: reader.texts("clusterDNS"),
        node_status_update_frequency: update.unwrap_or(Duration::from_secs(10)),
        node_status_report_frequency: report.or(update).unwrap_or(Duration::from_secs(300)),
        node_lease_duration_s: reader.number("nodeLeaseDurationSeconds", 40),
        max_pods: reader.number("maxPods", 110),
        pods_per_core: reader.number("podsPerCore", 0),
        max_open_files: reader.number("maxOpenFiles", 1_000_000),
        container_runtime_endpoint: reader.text("containerRuntimeEndpoint"),
        image_service_endpoint: reader.text("imageServiceEndpoint"),
        runtime_request_timeout: reader.span("runtimeRequestTimeout").unwrap_or(Duration::from_secs(120)),
        pod_cidr: reader.text("podCIDR"),
        cgroup_root: reader.text("cgroupRoot").unwrap_or_default().trim_matches('/').into(),
        cgroup_driver: cgroup_driver(&mut reader),
        resolv_conf: reader.file("resolvConf"),
        kube_api_qps: reader.number("kubeAPIQPS", 50),
        kube_api_burst: reader.number("kubeAPIBurst", 100),
        event_rate: (reader.number("eventRecordQPS", 50), reader.number("eventBurst", 100)),
        sysctls: reader.texts("allowedUnsafeSysctls"),
        eviction: eviction::eviction(&mut reader),
        image_gc: upkeep::image_gc(&mut reader),
        shutdown: upkeep::shutdown(&mut reader),
        policies: resources::policies(&mut reader, &reserved),
        reserved,
        log_limits: upkeep::log_limits(&mut reader),
        pod_logs_dir: upkeep::pod_logs_dir(&mut reader),
        pulls_max: pulls_max(&mut reader),
        verification: upkeep::verification(&mut reader),
        limited_swap: limited_swap(&mut reader),
        memory: resources::memory_of_containers(&mut reader),
        fail_swap_on: reader.flag("failSwapOn", false),
        pod_pids_limit: Some(reader.number("podPidsLimit", -1)).filter(|limit: &i64| *limit > 0),
        cpu_period_us: resources::cpu_period(&mut reader),
        seccomp_default: reader.flag("seccompDefault", false),
        // -1 is no limit.
        status_images_max: usize::try_from(reader.number("nodeStatusMaxImages", 50i64)).ok(),
        enforced: resources::enforced(&mut reader),
        provider_id: reader.text("providerID"),
        register_with_taints: taints(&mut reader),
        register_node: reader.flag("registerNode", true),
        static_pod_path: reader.file("staticPodPath"),
        static_pod_url: static_pod_url(&mut reader),
    };
    if reader.faults.is_empty() { Ok(configuration) } else { Err(reader.faults) }
}

impl Default for LogLimits {
    fn default() -> Self {
        Self { bytes_max: 10 << 20, files_max: 5, look_every: Duration::from_secs(10), workers: 1 }
    }
}

impl Default for ImageGc {
    fn default() -> Self {
        Self { high_percent: 85, low_percent: 80, minimum_age: Duration::from_secs(120), maximum_age: None }
    }
}

fn authorization(reader: &mut Reader<'_>) -> Authorization {
    match reader.text("authorization.mode").as_deref() {
        None | Some("Webhook") => Authorization::Webhook,
        Some("AlwaysAllow") => Authorization::AlwaysAllow,
        Some(other) => {
            reader.fault("authorization.mode", format!("{other:?} is neither Webhook nor AlwaysAllow"));
            Authorization::Webhook
        }
    }
}

fn node_logs(reader: &mut Reader<'_>) -> NodeLogs {
    const QUERY: &str = "enableSystemLogQuery";
    match (reader.flag("enableSystemLogHandler", true), reader.flag(QUERY, false)) {
        (true, false) => NodeLogs::Files,
        (true, true) => NodeLogs::Services,
        (false, query) => {
            if query {
                reader.fault(QUERY, "enableSystemLogHandler is required for it");
            }
            NodeLogs::Off
        }
    }
}

fn holds(reader: &Reader<'_>) -> Holds {
    let upstream = Holds::default();
    let span = |path: &str, default| reader.span(path).unwrap_or(default);
    Holds {
        token: span("authentication.webhook.cacheTTL", upstream.token),
        allowed: span("authorization.webhook.cacheAuthorizedTTL", upstream.allowed),
        denied: span("authorization.webhook.cacheUnauthorizedTTL", upstream.denied),
    }
}

fn static_pod_url(reader: &mut Reader<'_>) -> Option<ManifestUrl> {
    const HEADERS: &str = "staticPodURLHeader";
    let url = reader.text("staticPodURL")?;
    let every = reader.span("httpCheckFrequency").unwrap_or(Duration::from_secs(20));
    let written = reader.get(HEADERS).cloned().unwrap_or_default();
    let headers: Result<BTreeMap<String, Vec<String>>, _> =
        serde_json::from_value(if written.is_null() { Value::Object(serde_json::Map::new()) } else { written });
    let headers = headers.unwrap_or_else(|_| {
        reader.fault(HEADERS, "its values are not lists of texts");
        BTreeMap::new()
    });
    Some(ManifestUrl { url, headers, every })
}

/// Pulls go side by side unless the operator wants them one after the other.
fn pulls_max(reader: &mut Reader<'_>) -> Option<usize> {
    const MOST: &str = "maxParallelImagePulls";
    let most: Option<usize> = reader.get(MOST).is_some().then(|| reader.number(MOST, 1));
    let serial = reader.flag("serializeImagePulls", false);
    match most {
        Some(0) => reader.fault(MOST, "it has to be at least 1"),
        Some(2..) if serial => reader.fault(MOST, "it cannot be more than 1 unless serializeImagePulls is false"),
        _ => {}
    }
    if serial { Some(1) } else { most }
}

fn limited_swap(reader: &mut Reader<'_>) -> bool {
    const FIELD: &str = "memorySwap.swapBehavior";
    match reader.text(FIELD).as_deref() {
        None | Some("NoSwap") => false,
        Some("LimitedSwap") => true,
        Some(other) => {
            reader.fault(FIELD, format!("{other:?} is neither NoSwap nor LimitedSwap"));
            false
        }
    }
}

fn cgroup_driver(reader: &mut Reader<'_>) -> Driver {
    match reader.text("cgroupDriver").as_deref() {
        None | Some("cgroupfs") => Driver::Cgroupfs,
        Some("systemd") => Driver::Systemd,
        Some(other) => {
            reader.fault("cgroupDriver", format!("{other:?} is neither cgroupfs nor systemd"));
            Driver::Cgroupfs
        }
    }
}

fn taints(reader: &mut Reader<'_>) -> Vec<Taint> {
    let Some(written) = reader.get("registerWithTaints").cloned() else { return Vec::new() };
    serde_json::from_value(written).unwrap_or_else(|error| {
        reader.fault("registerWithTaints", error);
        Vec::new()
    })
}

/// `key=value:Effect,key:Effect`, as `--register-with-taints` has it.
///
/// # Errors
/// What is not a taint.
pub fn parse_taints(text: &str) -> Result<Vec<Taint>, String> {
    let taint = |item: &str| {
        let (name, effect) = item.rsplit_once(':').ok_or_else(|| format!("{item:?} is not key=value:Effect"))?;
        if !["NoSchedule", "PreferNoSchedule", "NoExecute"].contains(&effect) {
            return Err(format!("{effect:?} is not an effect: NoSchedule, PreferNoSchedule or NoExecute"));
        }
        let (key, value) = match name.split_once('=') {
            Some((key, value)) => (key, Some(value.to_owned())),
            None => (name, None),
        };
        Ok(Taint { key: key.to_owned(), value, effect: effect.to_owned(), time_added: None })
    };
    text.split(',').map(str::trim).filter(|item| !item.is_empty()).map(taint).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::node::pressure::{Level, Signal, Threshold, Thresholds};
    use crate::resources::cpu::Reserved;
    use crate::resources::policies::Scope;
    use crate::resources::topology;

    #[test]
    fn nothing_written_is_upstreams_defaults() {
        let configuration = read(&json!({})).unwrap();
        assert_eq!((configuration.port, configuration.max_pods, configuration.node_lease_duration_s), (10250, 110, 40));
        assert_eq!(configuration.node_status_report_frequency, Duration::from_secs(300));
        assert_eq!(configuration.max_open_files, 1_000_000);
        assert_eq!(configuration.cgroup_driver, Driver::Cgroupfs);
        assert_eq!(read(&json!({"cgroupDriver": "systemd"})).unwrap().cgroup_driver, Driver::Systemd);
        assert!(read(&json!({"cgroupDriver": "upstart"})).is_err());
        assert!(!configuration.authentication.anonymous && configuration.authentication.webhook);
        let Thresholds(thresholds) = configuration.eviction.thresholds;
        let allocatable = Threshold::hard(Signal::AllocatableMemory, Level::Amount(100 << 20));
        assert_eq!(thresholds, [Thresholds::upstream().0, vec![allocatable]].concat());
        assert_eq!(configuration.eviction.transition, Duration::from_secs(300));
        assert_eq!(configuration.cgroup_root, PathBuf::new());
    }

    #[test]
    fn the_root_of_groups_is_a_path_below_the_hierarchy() {
        for (written, expect) in [("/", ""), ("/node/pods/", "node/pods"), ("node", "node")] {
            assert_eq!(read(&json!({"cgroupRoot": written})).unwrap().cgroup_root, PathBuf::from(expect));
        }
    }

    #[test]
    fn the_report_follows_an_update_frequency_that_was_set() {
        let configuration = read(&json!({"nodeStatusUpdateFrequency": "20s"})).unwrap();
        assert_eq!(configuration.node_status_report_frequency, Duration::from_secs(20));
    }

    #[test]
    fn thresholds_written_in_part_drop_the_rest() {
        let hard = json!({"memory.available": "5%", "pid.available": "100"});
        let Thresholds(thresholds) = read(&json!({"evictionHard": hard})).unwrap().eviction.thresholds;
        let memory = Threshold::hard(Signal::Memory, Level::Share(0.05));
        let allocatable = Threshold { signal: Signal::AllocatableMemory, ..memory };
        assert_eq!(thresholds, [memory, Threshold::hard(Signal::Pids, Level::Amount(100)), allocatable]);
        let written = json!({"evictionHard": hard, "mergeDefaultEvictionSettings": true});
        let merged = read(&written).unwrap().eviction.thresholds;
        assert_eq!(merged.hard(Signal::NodeDisk), Some(Level::Share(0.10)));
        assert_eq!(merged.hard(Signal::Memory), Some(Level::Share(0.05)));
        let off = read(&json!({"evictionHard": {"nodefs.available": "0%", "imagefs.available": "0"}})).unwrap();
        assert_eq!(off.eviction.thresholds, Thresholds::NONE);
    }

    #[test]
    fn soft_thresholds_have_grace_periods() {
        let written = json!({
            "evictionSoft": {"memory.available": "1Gi", "nodefs.available": "20%"},
            "evictionSoftGracePeriod": {"memory.available": "1m30s", "nodefs.available": "2m"},
            "evictionMinimumReclaim": {"memory.available": "500Mi"},
            "evictionMaxPodGracePeriod": 30,
            "evictionPressureTransitionPeriod": "1m",
        });
        let eviction = read(&written).unwrap().eviction;
        let soft = eviction.thresholds.0.iter().find(|one| !one.is_hard()).unwrap();
        let grace = Duration::from_secs(90);
        let reclaim = Some(Level::Amount(500 << 20));
        assert_eq!(*soft, Threshold { signal: Signal::Memory, level: Level::Amount(1 << 30), grace, reclaim });
        assert_eq!((eviction.pod_grace_max_s, eviction.transition), (30, Duration::from_secs(60)));
        let faults = read(&json!({"evictionSoft": {"memory.available": "1Gi"}})).unwrap_err();
        assert!(faults[0].contains("must be specified"), "{faults:?}");
    }

    #[test]
    fn images_go_between_two_levels_and_two_ages() {
        let gc = read(&json!({})).unwrap().image_gc;
        assert_eq!((gc.high_percent, gc.low_percent, gc.maximum_age), (85, 80, None));
        let written =
            json!({"imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 1, "imageMaximumGCAge": "1h"});
        let gc = read(&written).unwrap().image_gc;
        assert_eq!((gc.high_percent, gc.low_percent, gc.maximum_age), (100, 1, Some(Duration::from_secs(3600))));
        let wrong = json!({"imageGCHighThresholdPercent": 50, "imageMinimumGCAge": "2h", "imageMaximumGCAge": "1h"});
        assert_eq!(read(&wrong).unwrap_err().len(), 2);
    }

    #[test]
    fn a_shutdown_waits_for_as_long_as_is_written() {
        assert_eq!(read(&json!({})).unwrap().shutdown, []);
        let two =
            read(&json!({"shutdownGracePeriod": "30s", "shutdownGracePeriodCriticalPods": "10s"})).unwrap().shutdown;
        assert_eq!(two.iter().map(|period| period.seconds).collect::<Vec<_>>(), [20, 10]);
        let by_priority = json!([{"priority": 5, "shutdownGracePeriodSeconds": 7}]);
        let own = read(&json!({"shutdownGracePeriodByPodPriority": by_priority})).unwrap().shutdown;
        assert_eq!(own, [Period { priority: 5, seconds: 7 }]);
        for wrong in [
            json!({"shutdownGracePeriod": "10s", "shutdownGracePeriodCriticalPods": "11s"}),
            json!({"shutdownGracePeriod": "10s", "shutdownGracePeriodByPodPriority": by_priority}),
            json!({"shutdownGracePeriodByPodPriority": [{"priority": 5}]}),
        ] {
            assert_eq!(read(&wrong).unwrap_err().len(), 1, "{wrong}");
        }
    }

    #[test]
    fn what_holds_for_all_pods() {
        let plain = read(&json!({})).unwrap();
        assert_eq!((plain.pod_pids_limit, plain.status_images_max), (None, Some(50)));
        assert_eq!((plain.seccomp_default, plain.enforced.pods), (false, true));
        assert_eq!(plain.log_limits, LogLimits::default());
        let written = json!({"podPidsLimit": 100, "nodeStatusMaxImages": -1, "seccompDefault": true,
            "enforceNodeAllocatable": ["none"], "containerLogMaxSize": "1Mi", "containerLogMaxFiles": 2});
        let chosen = read(&written).unwrap();
        assert_eq!((chosen.pod_pids_limit, chosen.status_images_max), (Some(100), None));
        assert_eq!((chosen.seccomp_default, chosen.enforced.pods), (true, false));
        assert_eq!((chosen.log_limits.bytes_max, chosen.log_limits.files_max), (1 << 20, 2));
        let wrong = json!({"containerLogMaxSize": "much", "containerLogMaxFiles": 1, "containerLogMonitorInterval": "1s",
            "containerLogMaxWorkers": 0});
        assert_eq!(read(&wrong).unwrap_err().len(), 4);
    }

    #[test]
    fn logs_of_services_are_served_only_if_wanted() {
        let logs = |written| read(&written).map(|configuration| configuration.node_logs);
        assert_eq!(logs(json!({})), Ok(NodeLogs::Files));
        assert_eq!(logs(json!({"enableSystemLogQuery": true})), Ok(NodeLogs::Services));
        assert_eq!(logs(json!({"enableSystemLogHandler": false})), Ok(NodeLogs::Off));
        assert!(logs(json!({"enableSystemLogHandler": false, "enableSystemLogQuery": true})).is_err());
    }

    #[test]
    fn pulls_one_after_the_other_only_if_wanted() {
        let most = |written| read(&written).map(|configuration| configuration.pulls_max);
        assert_eq!(most(json!({})), Ok(None));
        assert_eq!(most(json!({"serializeImagePulls": true})), Ok(Some(1)));
        assert_eq!(most(json!({"serializeImagePulls": false, "maxParallelImagePulls": 3})), Ok(Some(3)));
        for wrong in
            [json!({"serializeImagePulls": true, "maxParallelImagePulls": 2}), json!({"maxParallelImagePulls": 0})]
        {
            assert_eq!(most(wrong.clone()).map_err(|faults| faults.len()), Err(1), "{wrong}");
        }
    }

    #[test]
    fn who_is_kept_to_what_is_reserved_has_a_group() {
        let written = json!({"enforceNodeAllocatable": ["pods", "system-reserved", "kube-reserved-compressible"],
            "systemReserved": {"memory": "1Gi"}, "systemReservedCgroup": "/system.slice",
            "kubeReserved": {"cpu": "100m"}, "kubeReservedCgroup": "kube"});
        let enforced = read(&written).unwrap().enforced;
        let groups: Vec<_> = enforced.groups.iter().map(|one| (one.path.to_str().unwrap(), one.cpu_only)).collect();
        assert_eq!((enforced.pods, groups), (true, vec![("system.slice", false), ("kube", true)]));
        assert_eq!(enforced.groups[0].reserved["memory"].units(), 1 << 30);
        assert_eq!(read(&json!({"enforceNodeAllocatable": ["none"]})).unwrap().enforced, Enforced::default());
        let wrong = json!({"enforceNodeAllocatable":
            ["none", "system-reserved", "system-reserved-compressible", "pods-compressible", "kube-reserved"],
            "systemReservedCgroup": "s"});
        assert_eq!(read(&wrong).unwrap_err().len(), 4);
    }

    #[test]
    fn answers_about_callers_hold_as_long_as_is_written() {
        assert_eq!(read(&json!({})).unwrap().holds, Holds::default());
        let written = json!({"authentication": {"webhook": {"cacheTTL": "1s"}},
            "authorization": {"webhook": {"cacheAuthorizedTTL": "2s", "cacheUnauthorizedTTL": "0s"}}});
        let (token, allowed) = (Duration::from_secs(1), Duration::from_secs(2));
        assert_eq!(read(&written).unwrap().holds, Holds { token, allowed, ..Holds::default() });
    }

    #[test]
    fn static_pods_of_a_server() {
        assert_eq!(read(&json!({"staticPodURLHeader": {"a": ["b"]}})).unwrap().static_pod_url, None);
        let written = json!({"staticPodURL": "http://s/p", "staticPodURLHeader": {"a": ["b", "c"]},
            "httpCheckFrequency": "5s"});
        let headers = [("a".to_owned(), vec!["b".to_owned(), "c".to_owned()])].into();
        let expect = ManifestUrl { url: "http://s/p".to_owned(), headers, every: Duration::from_secs(5) };
        assert_eq!(read(&written).unwrap().static_pod_url, Some(expect));
        assert!(read(&json!({"staticPodURL": "http://s/p", "staticPodURLHeader": {"a": "b"}})).is_err());
    }

    #[test]
    fn who_may_have_images() {
        let verification = |written| read(&written).map(|configuration| configuration.verification);
        let policy = |name: &str| verification(json!({ "imagePullCredentialsVerificationPolicy": name }));
        assert_eq!(verification(json!({})), Ok(Verification::NotPreloaded));
        assert_eq!(policy("AlwaysVerify"), Ok(Verification::Always));
        assert!(policy("Sometimes").is_err());
        let listed = |policy: &str, image: &str| {
            verification(json!({ "imagePullCredentialsVerificationPolicy": policy,
                "preloadedImagesVerificationAllowlist": [image] }))
        };
        assert!(matches!(listed("NeverVerifyAllowlistedImages", "r.io/*"), Ok(Verification::NotListed(_))));
        assert!(listed("NeverVerifyAllowlistedImages", "r.io/app:1").is_err());
        assert!(listed("AlwaysVerify", "r.io/app").is_err(), "a list without its policy");
        let off = verification(json!({ "featureGates": { "KubeletEnsureSecretPulledImages": false } }));
        assert_eq!(off, Ok(Verification::Never));
    }

    #[test]
    fn memory_of_version_2() {
        assert_eq!(read(&json!({})).unwrap().memory, MemoryRules::default());
        let chosen = json!({"singleProcessOOMKill": true, "memoryThrottlingFactor": 0.5,
            "memoryReservationPolicy": "TieredReservation"});
        let expect = MemoryRules { single_kill: Some(true), throttling_factor: Some(0.5), reserves: true };
        assert_eq!(read(&chosen).unwrap().memory, expect);
        let wrong = json!({"memoryThrottlingFactor": 1.5, "memoryReservationPolicy": "All"});
        assert_eq!(read(&wrong).unwrap_err().len(), 2);
    }

    #[test]
    fn swap_and_logs() {
        let chosen = read(&json!({"memorySwap": {"swapBehavior": "LimitedSwap"}, "podLogsDir": "/logs"})).unwrap();
        assert!(chosen.limited_swap && chosen.pod_logs_dir.is_some_and(|dir| dir == std::path::Path::new("/logs")));
        let wrong = json!({"memorySwap": {"swapBehavior": "UnlimitedSwap"}, "podLogsDir": "/var/../logs"});
        assert_eq!(read(&wrong).unwrap_err().len(), 2);
    }

    #[test]
    fn cpu_limits_have_a_period_or_are_not_kept() {
        let period = |written| read(&written).map(|configuration| configuration.cpu_period_us);
        assert_eq!(period(json!({})), Ok(Some(100_000)));
        assert_eq!(period(json!({"cpuCFSQuotaPeriod": "5ms"})), Ok(Some(5000)));
        assert_eq!(period(json!({"cpuCFSQuota": false})), Ok(None));
        assert!(period(json!({"cpuCFSQuotaPeriod": "2s"})).is_err());
    }

    #[test]
    fn what_is_reserved_adds_up() {
        let written = json!({"systemReserved": {"cpu": "200m"}, "kubeReserved": {"cpu": "100m", "memory": "1Gi"}});
        let reserved = read(&written).unwrap().reserved;
        assert_eq!((reserved["cpu"].milli(), reserved["memory"].units()), (300, 1 << 30));
    }

    #[test]
    fn policies_of_cpus_and_topology() {
        let plain = read(&json!({})).unwrap();
        assert_eq!(plain.policies, Policies::default());
        let written = json!({"cpuManagerPolicy": "static", "cpuManagerPolicyOptions": {"full-pcpus-only": "true"},
            "kubeReserved": {"cpu": "1500m"}, "topologyManagerPolicy": "restricted", "topologyManagerScope": "pod",
            "topologyManagerPolicyOptions": {"max-allowable-numa-nodes": "12"}});
        let policies = read(&written).unwrap().policies;
        let cpu = policies.cpu.unwrap();
        assert!(cpu.options.full_pcpus_only);
        assert_eq!(cpu.reserved, Reserved::Count(2));
        let wanted = policies.topology;
        assert_eq!((wanted.policy, wanted.scope, wanted.nodes_max), (topology::Policy::Restricted, Scope::Pod, 12));
        let named =
            read(&json!({"cpuManagerPolicy": "static", "reservedSystemCPUs": "0,2", "kubeReserved": {"cpu": "5"}}));
        let named = named.unwrap();
        assert_eq!(named.policies.cpu.unwrap().reserved, Reserved::Named("0,2".parse().unwrap()));
        assert_eq!(named.reserved["cpu"].units(), 2);
        let faults =
            read(&json!({"cpuManagerPolicy": "dynamic", "reservedSystemCPUs": "x", "topologyManagerPolicy": "all",
            "topologyManagerScope": "node", "topologyManagerPolicyOptions": {"closest": "true"}}));
        assert_eq!(faults.unwrap_err().len(), 5);
    }

    #[test]
    fn memory_of_nodes() {
        let reserved =
            json!([{"numaNode": 0, "limits": {"memory": "1Gi"}}, {"numaNode": 1, "limits": {"memory": "1Mi"}}]);
        let memory =
            read(&json!({"memoryManagerPolicy": "Static", "reservedMemory": reserved})).unwrap().policies.memory;
        assert_eq!(memory.unwrap().reserved[&1]["memory"], 1 << 20);
        assert!(read(&json!({"memoryManagerPolicy": "static"})).is_err());
    }

    #[test]
    fn faults_name_their_field() {
        let written = json!({"port": 70000, "address": "here", "authorization": {"mode": "Never"},
            "evictionHard": {"memory.free": "1", "nodefs.available": "many"}, "kubeReserved": {"cpu": "x"}});
        let faults = read(&written).unwrap_err();
        assert_eq!(faults.len(), 6, "{faults:#?}");
    }
}
