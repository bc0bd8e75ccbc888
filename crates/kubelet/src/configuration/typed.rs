//! The fields that this kubelet honours, as values to work with.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::core::v1::Taint;
use pod::quantity::Quantity;
use serde_json::Value;

use super::spans;
use crate::node::pressure::{Threshold, Thresholds};

/// What the operator wants of this kubelet.
#[derive(Debug, Clone, PartialEq)]
pub struct Configuration {
    /// Whether the API is served on the network at all.
    pub enable_server: bool,
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
    /// The socket of the container runtime.
    pub container_runtime_endpoint: Option<String>,
    /// Addresses of pods, if the cluster does not say.
    pub pod_cidr: Option<String>,
    /// The group in which the tree of the pods' groups stands, without a slash in front; empty for the root.
    pub cgroup_root: PathBuf,
    /// Resolver configuration of pods that use the node's.
    pub resolv_conf: PathBuf,
    /// Requests to the API server, per second.
    pub kube_api_qps: u32,
    /// Requests to the API server at once.
    pub kube_api_burst: u32,
    /// Events per second, and at once; 0 is no limit.
    pub event_rate: (u32, u32),
    /// Sysctls that pods may set beside the safe ones.
    pub sysctls: Vec<String>,
    /// Hard eviction thresholds.
    pub thresholds: Thresholds,
    /// `systemReserved` and `kubeReserved` together.
    pub reserved: BTreeMap<String, Quantity>,
    /// The cloud's name of the node.
    pub provider_id: Option<String>,
    /// Taints that the node is born with.
    pub register_with_taints: Vec<Taint>,
    /// Whether the kubelet makes its Node object.
    pub register_node: bool,
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
    let mut reader = Reader { written, faults: Vec::new() };
    let update = reader.span("nodeStatusUpdateFrequency");
    let report = reader.span("nodeStatusReportFrequency");
    let configuration = Configuration {
        enable_server: reader.flag("enableServer", true),
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
        authorization: reader.authorization(),
        healthz: (reader.address("healthzBindAddress", "127.0.0.1"), reader.number("healthzPort", 10248)),
        cluster_domain: reader.text("clusterDomain").unwrap_or_default(),
        cluster_dns: reader.texts("clusterDNS"),
        node_status_update_frequency: update.unwrap_or(Duration::from_secs(10)),
        node_status_report_frequency: report.or(update).unwrap_or(Duration::from_secs(300)),
        node_lease_duration_s: reader.number("nodeLeaseDurationSeconds", 40),
        max_pods: reader.number("maxPods", 110),
        container_runtime_endpoint: reader.text("containerRuntimeEndpoint"),
        pod_cidr: reader.text("podCIDR"),
        cgroup_root: reader.text("cgroupRoot").unwrap_or_default().trim_matches('/').into(),
        resolv_conf: reader.file("resolvConf").unwrap_or_else(|| "/etc/resolv.conf".into()),
        kube_api_qps: reader.number("kubeAPIQPS", 50),
        kube_api_burst: reader.number("kubeAPIBurst", 100),
        event_rate: (reader.number("eventRecordQPS", 50), reader.number("eventBurst", 100)),
        sysctls: reader.texts("allowedUnsafeSysctls"),
        thresholds: reader.thresholds(),
        reserved: reader.reserved(),
        provider_id: reader.text("providerID"),
        register_with_taints: reader.taints(),
        register_node: reader.flag("registerNode", true),
    };
    if reader.faults.is_empty() { Ok(configuration) } else { Err(reader.faults) }
}

struct Reader<'a> {
    written: &'a Value,
    faults: Vec<String>,
}

impl Reader<'_> {
    fn get(&self, path: &str) -> Option<&Value> {
        path.split('.').try_fold(self.written, |value, name| value.get(name)).filter(|value| !value.is_null())
    }

    fn fault(&mut self, path: &str, fault: impl std::fmt::Display) {
        self.faults.push(format!("{path}: {fault}"));
    }

    fn flag(&self, path: &str, default: bool) -> bool {
        self.get(path).and_then(Value::as_bool).unwrap_or(default)
    }

    /// Empty text is unset.
    fn text(&self, path: &str) -> Option<String> {
        self.get(path).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned)
    }

    fn file(&self, path: &str) -> Option<PathBuf> {
        self.text(path).map(PathBuf::from)
    }

    fn texts(&self, path: &str) -> Vec<String> {
        let items = self.get(path).and_then(Value::as_array).into_iter().flatten();
        items.filter_map(|item| item.as_str().map(str::to_owned)).collect()
    }

    /// Zero is unset, as the API has it.
    fn span(&self, path: &str) -> Option<Duration> {
        self.text(path).and_then(|text| spans::parse(&text)).filter(|span| !span.is_zero())
    }

    fn number<T: TryFrom<i64>>(&mut self, path: &str, default: T) -> T {
        let Some(written) = self.get(path).and_then(Value::as_i64) else { return default };
        T::try_from(written).unwrap_or_else(|_| {
            self.fault(path, format!("{written} is out of range"));
            default
        })
    }

    fn address(&mut self, path: &str, default: &str) -> IpAddr {
        let text = self.text(path).unwrap_or_else(|| default.to_owned());
        text.parse().unwrap_or_else(|_| {
            self.fault(path, format!("{text:?} is not an IP address"));
            IpAddr::from([0, 0, 0, 0])
        })
    }

    fn authorization(&mut self) -> Authorization {
        match self.text("authorization.mode").as_deref() {
            None | Some("Webhook") => Authorization::Webhook,
            Some("AlwaysAllow") => Authorization::AlwaysAllow,
            Some(other) => {
                self.fault("authorization.mode", format!("{other:?} is neither Webhook nor AlwaysAllow"));
                Authorization::Webhook
            }
        }
    }

    /// A map that is written in part drops the defaults of the rest, unless `mergeDefaultEvictionSettings` says otherwise.
    fn thresholds(&mut self) -> Thresholds {
        let Some(map) = self.get("evictionHard").and_then(Value::as_object).filter(|map| !map.is_empty()).cloned()
        else {
            return Thresholds::default();
        };
        let merge = self.flag("mergeDefaultEvictionSettings", false);
        let mut thresholds = if merge { Thresholds::default() } else { Thresholds::NONE };
        for (signal, text) in &map {
            let text = text.as_str().unwrap_or_default();
            let place = match signal.as_str() {
                "memory.available" => &mut thresholds.memory,
                "nodefs.available" => &mut thresholds.node_disk,
                "nodefs.inodesFree" => &mut thresholds.node_inodes,
                "imagefs.available" => &mut thresholds.image_disk,
                "imagefs.inodesFree" => &mut thresholds.image_inodes,
                "pid.available" => &mut thresholds.pids,
                // One file system holds images and what containers write.
                "containerfs.available" | "containerfs.inodesFree" => continue,
                _ => {
                    self.fault("evictionHard", format!("there is no signal {signal:?}"));
                    continue;
                }
            };
            match threshold(text) {
                Some(threshold) => *place = Some(threshold),
                None => {
                    self.fault("evictionHard", format!("{signal}: {text:?} is neither a quantity nor a percentage"))
                }
            }
        }
        thresholds
    }

    fn reserved(&mut self) -> BTreeMap<String, Quantity> {
        let mut reserved: BTreeMap<String, Quantity> = BTreeMap::new();
        for path in ["systemReserved", "kubeReserved"] {
            let map = self.get(path).and_then(Value::as_object).cloned().unwrap_or_default();
            for (resource, text) in map {
                match text.as_str().map(Quantity::parse) {
                    Some(Ok(amount)) => {
                        let before = reserved.get(&resource).map_or(0, |before| before.milli());
                        reserved.insert(resource, Quantity::from_milli(before.saturating_add(amount.milli())));
                    }
                    _ => self.fault(path, format!("{resource}: {text} is not a quantity")),
                }
            }
        }
        reserved
    }

    fn taints(&mut self) -> Vec<Taint> {
        let Some(written) = self.get("registerWithTaints").cloned() else { return Vec::new() };
        serde_json::from_value(written).unwrap_or_else(|error| {
            self.fault("registerWithTaints", error);
            Vec::new()
        })
    }
}

/// `100Mi` or `10%`.
fn threshold(text: &str) -> Option<Threshold> {
    match text.strip_suffix('%') {
        Some(percent) => {
            let percent: f64 = percent.parse().ok()?;
            (0.0..=100.0).contains(&percent).then_some(Threshold::Share(percent / 100.0))
        }
        None => u64::try_from(Quantity::parse(text).ok()?.units()).ok().map(Threshold::Amount),
    }
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

    #[test]
    fn nothing_written_is_upstreams_defaults() {
        let configuration = read(&json!({})).unwrap();
        assert_eq!((configuration.port, configuration.max_pods, configuration.node_lease_duration_s), (10250, 110, 40));
        assert_eq!(configuration.node_status_report_frequency, Duration::from_secs(300));
        assert!(!configuration.authentication.anonymous && configuration.authentication.webhook);
        assert_eq!(configuration.thresholds, Thresholds::default());
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
        let thresholds = read(&json!({"evictionHard": hard})).unwrap().thresholds;
        let expected =
            Thresholds { memory: Some(Threshold::Share(0.05)), pids: Some(Threshold::Amount(100)), ..Thresholds::NONE };
        assert_eq!(thresholds, expected);
        let merged = read(&json!({"evictionHard": hard, "mergeDefaultEvictionSettings": true})).unwrap().thresholds;
        assert_eq!(merged.node_disk, Thresholds::default().node_disk);
    }

    #[test]
    fn what_is_reserved_adds_up() {
        let written = json!({"systemReserved": {"cpu": "200m"}, "kubeReserved": {"cpu": "100m", "memory": "1Gi"}});
        let reserved = read(&written).unwrap().reserved;
        assert_eq!((reserved["cpu"].milli(), reserved["memory"].units()), (300, 1 << 30));
    }

    #[test]
    fn faults_name_their_field() {
        let written = json!({"port": 70000, "address": "here", "authorization": {"mode": "Never"},
            "evictionHard": {"memory.free": "1", "nodefs.available": "many"}, "kubeReserved": {"cpu": "x"}});
        let faults = read(&written).unwrap_err();
        assert_eq!(faults.len(), 6, "{faults:#?}");
    }
}
