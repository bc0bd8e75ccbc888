//! `KubeletConfiguration`: file, drop-in directory and flags become one checked value.
//!
//! ```text
//! defaults < --config < --config-dir/*.conf < flags   ─►   merged JSON ─► checked leaf by leaf ─► Configuration
//! ```
//!
//! What an operator wrote is honoured, warned about by name, or refused: never ignored in silence.

mod leaves;
mod typed;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use configfile::{Layers, Schema};
use serde_json::{Value, json};

pub use configfile::Faults;
pub use configfile::spans::parse as parse_duration;
pub use leaves::{FLAGS_WITHOUT_EFFECT, LEAVES};
pub use typed::{
    Authentication, Authorization, Configuration, Enforced, EnforcedGroup, ImageGc, LogLimits, parse_taints,
};

/// The document and its fields.
const SCHEMA: Schema = Schema {
    api_version: "kubelet.config.k8s.io/v1beta1",
    kind: "KubeletConfiguration",
    reader: "kubelet",
    leaves: LEAVES,
};

/// Flags that stand for no field, as if they were a document's.
const WITHOUT_EFFECT: Schema = Schema { leaves: FLAGS_WITHOUT_EFFECT, ..SCHEMA };

/// Where the configuration comes from.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// `--config`
    pub file: Option<PathBuf>,
    /// `--config-dir`: its `*.conf`, in the order of their names.
    pub dir: Option<PathBuf>,
    /// Flags that were given, by name without dashes.
    pub flags: Vec<(String, String)>,
}

/// A configuration, and what of it has no effect here.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What to do.
    pub configuration: Configuration,
    /// Everything that was written, merged: what `/configz` shows.
    pub written: Value,
    /// One line for each field that was set and is not honoured.
    pub warnings: Vec<String>,
}

/// Reads, merges and checks.
///
/// # Errors
/// All faults at once, each with its file and field.
pub fn load(sources: &Sources) -> Result<Loaded, Faults> {
    let mut layers = Layers::new(&SCHEMA);
    sources.file.iter().for_each(|file| layers.file("--config", file));
    match drop_ins(sources.dir.as_deref()) {
        Ok(files) => files.iter().for_each(|file| layers.file("--config-dir", file)),
        Err(fault) => layers.fault(fault),
    }
    let given =
        |name: &'static str| sources.flags.iter().filter(move |(flag, _)| flag == name).map(|(_, text)| text.as_str());
    let fault = |name: &str, fault: String| format!("--{name} {fault}");
    for (flag, field, read) in ADD_UP {
        match given(flag).map(read).collect::<Result<Vec<_>, _>>() {
            Ok(values) if values.is_empty() => {}
            Ok(values) => layers.set(field, together(values)),
            Err(error) => layers.fault(fault(flag, error)),
        }
    }
    for (flag, text) in sources.flags.iter().filter(|(flag, _)| ADD_UP.iter().all(|(name, ..)| flag != name)) {
        layers.flag(flag, text);
    }
    let (written, configuration) = layers.read(typed::read)?;
    let warnings = SCHEMA.warnings(&written);
    Ok(Loaded { configuration, written, warnings })
}

/// One line for each flag of [`FLAGS_WITHOUT_EFFECT`] that asks for something.
///
/// # Errors
/// Values that the flags cannot have, all at once.
pub fn without_effect(given: &[(String, String)]) -> Result<Vec<String>, Faults> {
    let mut layers = Layers::new(&WITHOUT_EFFECT);
    given.iter().for_each(|(flag, text)| layers.flag(flag, text));
    layers.finish().map(|written| WITHOUT_EFFECT.warnings(&written))
}

/// Flags with a form of their own, which add up where they are given several times: their fields, and what one says.
type Reads = fn(&str) -> Result<Value, String>;
const ADD_UP: [(&str, &str, Reads); 3] = [
    ("register-with-taints", "registerWithTaints", taints_of_flag),
    ("reserved-memory", "reservedMemory", reserved_memory_of_flag),
    ("manifest-url-header", "staticPodURLHeader", headers_of_flag),
];

/// Lists one after the other, mappings of lists by their names.
fn together(values: Vec<Value>) -> Value {
    values.into_iter().fold(Value::Null, |all, one| match (all, one) {
        (Value::Array(mut all), Value::Array(one)) => {
            all.extend(one);
            Value::Array(all)
        }
        (Value::Object(mut all), Value::Object(one)) => {
            for (name, value) in one {
                let before = all.remove(&name).unwrap_or_default();
                all.insert(name, together(vec![before, value]));
            }
            Value::Object(all)
        }
        (_, one) => one,
    })
}

fn taints_of_flag(text: &str) -> Result<Value, String> {
    serde_json::to_value(parse_taints(text)?).map_err(|error| error.to_string())
}

/// `a:one,a:two,b:three`.
fn headers_of_flag(text: &str) -> Result<Value, String> {
    let mut all: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for item in text.split(',').filter(|item| !item.is_empty()) {
        let (name, value) = item.split_once(':').ok_or_else(|| format!("{item:?} is not name:value"))?;
        all.entry(name.trim()).or_default().push(value.trim());
    }
    Ok(json!(all))
}

/// `0:memory=1Gi,hugepages-2Mi=4Mi;1:memory=2Gi`, as the field has it.
fn reserved_memory_of_flag(text: &str) -> Result<Value, String> {
    let node = |item: &str| {
        let (node, limits) = item.split_once(':')?;
        let limit = |limit: &str| {
            let (name, amount) = limit.split_once('=')?;
            (name == "memory" || name.starts_with("hugepages-")).then(|| (name.to_owned(), Value::from(amount)))
        };
        let limits = limits.split(',').map(limit).collect::<Option<serde_json::Map<_, _>>>()?;
        Some(json!({"numaNode": node.parse::<u32>().ok()?, "limits": limits}))
    };
    let nodes = text.split(';').filter(|item| !item.is_empty());
    let nodes =
        nodes.map(|item| node(item).ok_or_else(|| format!("{item:?} is not as 0:memory=1Gi,hugepages-2Mi=4Mi")));
    nodes.collect::<Result<Vec<_>, _>>().map(Value::Array)
}

fn drop_ins(dir: Option<&Path>) -> Result<Vec<PathBuf>, String> {
    let Some(dir) = dir else { return Ok(Vec::new()) };
    let entries = std::fs::read_dir(dir).map_err(|error| {
        format!(
            "--config-dir {}: cannot be read: {error}; check that the directory is there and readable",
            dir.display()
        )
    })?;
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "conf"));
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";

    fn with(text: &str) -> Result<Loaded, Faults> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        std::fs::write(&file, format!("{HEAD}{text}")).unwrap();
        load(&Sources { file: Some(file), ..Sources::default() })
    }

    #[test]
    fn every_default_is_of_its_kind() {
        for leaf in LEAVES.iter().filter(|leaf| !leaf.default.is_empty()) {
            assert!(leaf.default_value().is_ok(), "{leaf:?}");
        }
        let mut paths: Vec<_> = LEAVES.iter().map(|leaf| leaf.path).collect();
        paths.sort_unstable();
        paths.dedup();
        assert_eq!(paths.len(), LEAVES.len(), "a field stands twice");
    }

    #[test]
    fn some_flags_add_up() {
        let load = |flags: &[(&str, &str)]| {
            let flags = flags.iter().map(|(flag, text)| ((*flag).to_owned(), (*text).to_owned())).collect();
            load(&Sources { flags, ..Sources::default() })
        };
        let (header, reserved) = ("manifest-url-header", "reserved-memory");
        let all = [(header, "a:one,b:http://x"), (reserved, "0:memory=1"), (header, "a:two"), (reserved, "1:memory=2")];
        let written = load(&all).unwrap().written;
        assert_eq!(written["staticPodURLHeader"], json!({"a": ["one", "two"], "b": ["http://x"]}));
        assert_eq!(written["reservedMemory"][1], json!({"numaNode": 1, "limits": {"memory": "2"}}));
        assert_eq!(load(&[("max-pods", "1"), ("max-pods", "2")]).unwrap().configuration.max_pods, 2);
        let Faults(faults) = load(&[(header, "a"), (reserved, "x"), ("register-with-taints", "y")]).unwrap_err();
        assert_eq!(faults.len(), 3, "{faults:?}");
    }

    #[test]
    fn a_flag_without_effect_is_named() {
        let given = |pairs: &[(&str, &str)]| -> Vec<(String, String)> {
            pairs.iter().map(|(flag, text)| ((*flag).to_owned(), (*text).to_owned())).collect()
        };
        let usual = [("housekeeping-interval", "10s"), ("maximum-dead-containers", "-1"), ("logging-format", "text")];
        assert_eq!(without_effect(&given(&usual)).unwrap(), [""; 0]);
        let asking = [("runtime-cgroups", "/systemd/system.slice"), ("exit-on-lock-contention", "true")];
        let expect = [
            "--exit-on-lock-contention = true has no effect on this kubelet yet",
            "--runtime-cgroups = \"/systemd/system.slice\" has no effect on this kubelet: the runtime is this very program; \
             an external one stays where it is",
        ];
        assert_eq!(without_effect(&given(&asking)).unwrap(), expect);
        let Faults(faults) = without_effect(&given(&[("maximum-dead-containers", "many")])).unwrap_err();
        assert_eq!(faults, ["--maximum-dead-containers \"many\": not a whole number"]);
    }

    #[test]
    fn memory_that_is_reserved_by_node() {
        let reserved = reserved_memory_of_flag("0:memory=1Gi,hugepages-2Mi=4Mi;1:memory=2Gi").unwrap();
        let [zero, one] = [json!({"memory": "1Gi", "hugepages-2Mi": "4Mi"}), json!({"memory": "2Gi"})];
        assert_eq!(reserved, json!([{"numaNode": 0, "limits": zero}, {"numaNode": 1, "limits": one}]));
        for wrong in ["0", "x:memory=1", "0:cpu=1", "0:memory"] {
            assert!(reserved_memory_of_flag(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_kubeadm_writes_is_taken() {
        let loaded = with(
            "authentication: {anonymous: {enabled: false}, webhook: {cacheTTL: 0s, enabled: true},
                x509: {clientCAFile: /etc/kubernetes/pki/ca.crt}}
authorization: {mode: Webhook, webhook: {cacheAuthorizedTTL: 0s, cacheUnauthorizedTTL: 0s}}
cgroupDriver: systemd
clusterDNS: [10.96.0.10]
clusterDomain: cluster.local
containerRuntimeEndpoint: ''
cpuManagerReconcilePeriod: 0s
crashLoopBackOff: {}
evictionPressureTransitionPeriod: 0s
healthzBindAddress: 127.0.0.1
healthzPort: 10248
logging: {flushFrequency: 0, options: {json: {infoBufferSize: '0'}, text: {infoBufferSize: '0'}}, verbosity: 0}
memorySwap: {}
rotateCertificates: true
staticPodPath: /etc/kubernetes/manifests
",
        )
        .unwrap();
        let configuration = &loaded.configuration;
        assert_eq!(configuration.cluster_dns, ["10.96.0.10"]);
        assert_eq!(
            configuration.authentication.client_ca_file.as_deref(),
            Some(Path::new("/etc/kubernetes/pki/ca.crt"))
        );
        let warned: Vec<&str> = loaded.warnings.iter().filter_map(|line| line.split_whitespace().next()).collect();
        assert_eq!(warned, [""; 0]);
        assert_eq!(configuration.static_pod_path.as_deref(), Some(Path::new("/etc/kubernetes/manifests")));
    }

    #[test]
    fn all_faults_at_once_by_field() {
        let Faults(faults) =
            with("maxPods: many\nclusterDns: []\nauthentication: {x509: 1}\nsyncFrequency: 1 minute\nport: 70000\n")
                .unwrap_err();
        for (fault, needle) in faults.iter().zip([
            "authentication.x509: has fields of its own",
            "clusterDns: there is no such field; clusterDNS is one",
            "maxPods: \"many\" is not a whole number",
            "syncFrequency: \"1 minute\" is not a time span",
            "port: 70000 is out of range",
        ]) {
            assert!(fault.contains(needle), "{fault}");
        }
        assert_eq!(faults.len(), 5, "{faults:?}");
    }

    #[test]
    fn drop_ins_and_flags_go_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        std::fs::write(&file, format!("{HEAD}maxPods: 10\nclusterDomain: one\nfeatureGates: {{A: true}}\n")).unwrap();
        std::fs::write(dir.path().join("20.conf"), format!("{HEAD}maxPods: 30\n")).unwrap();
        std::fs::write(dir.path().join("10.conf"), format!("{HEAD}maxPods: 20\nfeatureGates: {{B: true}}\n")).unwrap();
        let taints = "dedicated=ai:NoSchedule,spot:NoExecute";
        let flags = vec![
            ("cluster-domain".to_owned(), "two".to_owned()),
            ("register-with-taints".to_owned(), taints.to_owned()),
        ];
        let loaded = load(&Sources { file: Some(file), dir: Some(dir.path().to_owned()), flags }).unwrap();
        assert_eq!(loaded.configuration.max_pods, 30);
        assert_eq!(loaded.configuration.cluster_domain, "two");
        assert_eq!(loaded.written["featureGates"], json!({"A": true, "B": true}));
        assert_eq!(loaded.configuration.register_with_taints.len(), 2);
    }
}
