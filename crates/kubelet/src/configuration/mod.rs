//! `KubeletConfiguration`: file, drop-in directory and flags become one checked value.
//!
//! ```text
//! defaults < --config < --config-dir/*.conf < flags   ─►   merged JSON ─► checked leaf by leaf ─► Configuration
//! ```
//!
//! What an operator wrote is honoured, warned about by name, or refused: never ignored in silence.

mod leaves;
mod merge;
mod spans;
mod typed;

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

pub use leaves::{Kind, LEAVES, Leaf, Status};
pub use spans::parse as parse_duration;
pub use typed::{Authentication, Authorization, Configuration, ImageGc, LogLimits, parse_taints};

const API_VERSION: &str = "kubelet.config.k8s.io/v1beta1";
const KIND: &str = "KubeletConfiguration";

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

/// Everything that is wrong with a configuration, one line for each.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{}", .0.join("\n"))]
pub struct Faults(pub Vec<String>);

/// Reads, merges and checks.
///
/// # Errors
/// All faults at once, each with its file and field.
pub fn load(sources: &Sources) -> Result<Loaded, Faults> {
    let mut faults = Vec::new();
    let mut written = Value::Object(Map::new());
    for file in sources.file.iter().cloned().chain(drop_ins(sources.dir.as_deref(), &mut faults)) {
        match read(&file) {
            Ok(layer) => {
                check(&layer, "", &mut |path, fault| faults.push(format!("{}: {path}: {fault}", file.display())));
                merge::patch(&mut written, layer);
            }
            Err(fault) => faults.push(format!("{}: {fault}", file.display())),
        }
    }
    for (flag, text) in &sources.flags {
        if let Err(fault) = merge::flag(&mut written, flag, text) {
            faults.push(format!("--{flag} {text:?}: {fault}"));
        }
    }
    if !faults.is_empty() {
        return Err(Faults(faults));
    }
    let configuration = typed::read(&written).map_err(Faults)?;
    let warnings = LEAVES.iter().filter_map(|leaf| warning(leaf, &written)).collect();
    Ok(Loaded { configuration, written, warnings })
}

fn drop_ins(dir: Option<&Path>, faults: &mut Vec<String>) -> Vec<PathBuf> {
    let Some(dir) = dir else { return Vec::new() };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) => {
            faults.push(format!("{}: {error}", dir.display()));
            return Vec::new();
        }
    };
    let mut files: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    files.retain(|file| file.extension().is_some_and(|extension| extension == "conf"));
    files.sort();
    files
}

/// One document, YAML or JSON, without its `apiVersion` and `kind`.
fn read(file: &Path) -> Result<Value, String> {
    let text = std::fs::read_to_string(file).map_err(|error| error.to_string())?;
    let mut value: Value = serde_saphyr::from_str(&text).map_err(|error| error.to_string())?;
    let Some(fields) = value.as_object_mut() else { return Err("not a mapping of fields".to_owned()) };
    for (field, expected) in [("apiVersion", API_VERSION), ("kind", KIND)] {
        match fields.remove(field) {
            Some(Value::String(found)) if found == expected => {}
            found => return Err(format!("{field} is {}, expected {expected}", found.unwrap_or_default())),
        }
    }
    Ok(value)
}

/// Tells of fields that there are not, and of values of the wrong kind.
fn check(value: &Value, prefix: &str, tell: &mut impl FnMut(&str, &str)) {
    for (name, value) in value.as_object().into_iter().flatten() {
        let path = if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
        if let Some(leaf) = LEAVES.iter().find(|leaf| leaf.path == path) {
            if !value.is_null() && !fits(leaf.kind, value) {
                tell(&path, &format!("{value} is not {}", described(leaf.kind)));
            }
        } else if LEAVES.iter().any(|leaf| leaf.path.starts_with(&format!("{path}."))) {
            match value {
                Value::Object(_) => check(value, &path, tell),
                Value::Null => {}
                _ => tell(&path, "has fields of its own"),
            }
        } else {
            let similar = LEAVES.iter().find(|leaf| leaf.path.eq_ignore_ascii_case(&path));
            let hint = similar.map_or_else(String::new, |leaf| format!("; {} is one", leaf.path));
            tell(&path, &format!("there is no such field{hint}"));
        }
    }
}

fn fits(kind: Kind, value: &Value) -> bool {
    match kind {
        Kind::Bool => value.is_boolean(),
        Kind::Integer => value.is_i64(),
        Kind::Number => value.is_number(),
        Kind::Text => value.is_string(),
        Kind::Duration => value.as_str().is_some_and(|text| spans::parse(text).is_some()),
        Kind::List => value.as_array().is_some_and(|items| items.iter().all(Value::is_string)),
        Kind::Map => value.is_object(),
        Kind::Other => value.is_object() || value.is_array(),
    }
}

fn described(kind: Kind) -> &'static str {
    match kind {
        Kind::Bool => "true or false",
        Kind::Integer => "a whole number",
        Kind::Number => "a number",
        Kind::Text => "a text",
        Kind::Duration => "a time span as 1m30s",
        Kind::List => "a list of texts",
        Kind::Map => "a mapping",
        Kind::Other => "a structure",
    }
}

/// What to tell about a field that has no effect: nothing where it is as it would be anyway.
fn warning(leaf: &Leaf, written: &Value) -> Option<String> {
    let value = leaf.path.split('.').try_fold(written, |value, name| value.get(name))?;
    if leaf.status == Status::Honoured || is_default(leaf, value) {
        return None;
    }
    Some(format!("{} = {value} has no effect on this kubelet yet", leaf.path))
}

/// Unset, zero, or upstream's default.
fn is_default(leaf: &Leaf, value: &Value) -> bool {
    let default = (!leaf.default.is_empty()).then(|| merge::value_of(leaf.kind, leaf.default).ok()).flatten();
    match (leaf.kind, value) {
        (_, value) if is_nothing(value) => true,
        (Kind::Duration, Value::String(text)) => {
            let span = spans::parse(text);
            span.is_some_and(|span| span.is_zero()) || span == spans::parse(leaf.default)
        }
        (_, Value::Bool(false)) | (_, Value::Number(_)) if default.is_none() => {
            *value == Value::Bool(false) || value.as_i64() == Some(0)
        }
        (_, value) => Some(value) == default.as_ref(),
    }
}

/// Structures of nothing but zeros are what kubeadm writes for whatever it leaves alone.
fn is_nothing(value: &Value) -> bool {
    let zero = |value: &Value| match value {
        Value::Bool(set) => !set,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty() || text == "0" || spans::parse(text).is_some_and(|span| span.is_zero()),
        value => is_nothing(value),
    };
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.values().all(zero),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(text: &str) -> Result<Loaded, Faults> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.yaml");
        std::fs::write(&file, format!("apiVersion: {API_VERSION}\nkind: {KIND}\n{text}")).unwrap();
        load(&Sources { file: Some(file), ..Sources::default() })
    }

    #[test]
    fn every_default_is_of_its_kind() {
        for leaf in LEAVES.iter().filter(|leaf| !leaf.default.is_empty()) {
            assert!(merge::value_of(leaf.kind, leaf.default).is_ok(), "{leaf:?}");
        }
        let mut paths: Vec<_> = LEAVES.iter().map(|leaf| leaf.path).collect();
        paths.sort_unstable();
        paths.dedup();
        assert_eq!(paths.len(), LEAVES.len(), "a field stands twice");
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
        assert_eq!(warned, ["cgroupDriver"]);
        assert_eq!(configuration.static_pod_path.as_deref(), Some(Path::new("/etc/kubernetes/manifests")));
    }

    #[test]
    fn all_faults_at_once_by_field() {
        let Faults(faults) =
            with("maxPods: many\nclusterDns: []\nauthentication: {x509: 1}\nsyncFrequency: 1 minute\n").unwrap_err();
        for (fault, needle) in faults.iter().zip([
            "authentication.x509: has fields of its own",
            "clusterDns: there is no such field; clusterDNS is one",
            "maxPods: \"many\" is not a whole number",
            "syncFrequency: \"1 minute\" is not a time span",
        ]) {
            assert!(fault.contains(needle), "{fault}");
        }
        assert_eq!(faults.len(), 4);
    }

    #[test]
    fn drop_ins_and_flags_go_over_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let head = format!("apiVersion: {API_VERSION}\nkind: {KIND}\n");
        let file = dir.path().join("config.yaml");
        std::fs::write(&file, format!("{head}maxPods: 10\nclusterDomain: one\nfeatureGates: {{A: true}}\n")).unwrap();
        std::fs::write(dir.path().join("20.conf"), format!("{head}maxPods: 30\n")).unwrap();
        std::fs::write(dir.path().join("10.conf"), format!("{head}maxPods: 20\nfeatureGates: {{B: true}}\n")).unwrap();
        let flags = vec![("cluster-domain".to_owned(), "two".to_owned())];
        let loaded = load(&Sources { file: Some(file), dir: Some(dir.path().to_owned()), flags }).unwrap();
        assert_eq!(loaded.configuration.max_pods, 30);
        assert_eq!(loaded.configuration.cluster_domain, "two");
        assert_eq!(loaded.written["featureGates"], serde_json::json!({"A": true, "B": true}));
    }

    #[test]
    fn another_kind_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("x");
        std::fs::write(&file, "apiVersion: v1\nkind: Pod\n").unwrap();
        let error = load(&Sources { file: Some(file), ..Sources::default() }).unwrap_err();
        assert!(error.to_string().contains("apiVersion is \"v1\", expected kubelet.config"), "{error}");
    }
}
