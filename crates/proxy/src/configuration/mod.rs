//! `KubeProxyConfiguration`: a file, or flags, become one checked value.
//!
//! As upstream has it, flags for fields count only where there is no file; those that were given beside one are named.
//! Two flags always count: `--hostname-override` and `--v`.

mod leaves;
mod typed;

use std::path::PathBuf;

use configfile::{Faults, Kind, Layers, Leaf, Schema, spans};
use serde_json::Value;

pub use leaves::LEAVES;
pub use typed::{Configuration, Conntrack, DetectLocal, NodePortAddress};

/// The document and its fields.
const SCHEMA: Schema = Schema {
    api_version: "kubeproxy.config.k8s.io/v1alpha1",
    kind: "KubeProxyConfiguration",
    reader: "kube-proxy",
    leaves: LEAVES,
};

/// Flags that set a field of the mode that is chosen, and not the one that they are named after.
const OF_MODE: [(&str, &str); 3] = [
    ("masquerade-all", "masqueradeAll"),
    ("iptables-sync-period", "syncPeriod"),
    ("iptables-min-sync-period", "minSyncPeriod"),
];

/// Where the configuration comes from.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The file, and the flag that named it (`--config`).
    pub file: Option<(&'static str, PathBuf)>,
    /// Flags that were given, by name without dashes.
    pub flags: Vec<(String, String)>,
    /// `--hostname-override`, which goes over the file.
    pub hostname: Option<String>,
}

/// A configuration, and what of it has no effect here.
#[derive(Debug, Clone)]
pub struct Loaded {
    /// What to do.
    pub configuration: Configuration,
    /// Everything that was written, merged.
    pub written: Value,
    /// One line for each thing that was set and is not honoured.
    pub warnings: Vec<String>,
}

/// Reads and checks.
///
/// # Errors
/// All faults at once, each with its file and field.
pub fn load(sources: &Sources) -> Result<Loaded, Faults> {
    let mut layers = Layers::new(&SCHEMA);
    let mut warnings = Vec::new();
    match &sources.file {
        Some((name, file)) => {
            layers.file(name, file);
            let given = sources.flags.iter();
            warnings.extend(given.map(|(flag, _)| format!("--{flag} has no effect beside {name}; write it there")));
        }
        None => add_flags(&mut layers, &sources.flags),
    }
    if let Some(name) = &sources.hostname {
        layers.set("hostnameOverride", Value::from(name.as_str()));
    }
    let written = layers.finish()?;
    let configuration = typed::read(&written).map_err(Faults)?;
    warnings.extend(SCHEMA.warnings(&written));
    warnings.extend(typed::warnings(&configuration, &written));
    Ok(Loaded { configuration, written, warnings })
}

fn add_flags(layers: &mut Layers, flags: &[(String, String)]) {
    let nftables = flags.iter().any(|(flag, text)| flag == "proxy-mode" && text == "nftables");
    for (flag, text) in flags {
        match OF_MODE.iter().find(|(name, _)| flag == name).filter(|_| nftables) {
            Some((_, field)) => layers.flag_at(flag, &format!("nftables.{field}"), text),
            None => layers.flag(flag, text),
        }
    }
}

/// The whole document with its defaults, for `--write-config-to` and `/configz`.
pub fn document(written: &Value) -> Value {
    let mut layers = Layers::new(&SCHEMA);
    layers.set("apiVersion", Value::from(SCHEMA.api_version));
    layers.set("kind", Value::from(SCHEMA.kind));
    for leaf in LEAVES {
        let value = leaf.path.split('.').try_fold(written, |value, name| value.get(name));
        let value = value.filter(|value| !is_unset(leaf, value)).cloned();
        if let Some(value) = value.or_else(|| leaf.default_value().ok().flatten()) {
            layers.set(leaf.path, value);
        }
    }
    layers.finish().unwrap_or_default()
}

/// Whether a value stands for the default. Zero does where it would mean nothing, but not for connection tracking.
fn is_unset(leaf: &Leaf, value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) if leaf.kind == Kind::Duration => {
            spans::parse(text).is_some_and(|span| span.is_zero()) && !leaf.path.starts_with("conntrack.")
        }
        Value::String(text) => text.is_empty(),
        Value::Number(number) => number.as_f64() == Some(0.0) && leaf.path.starts_with("clientConnection."),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Mode;

    const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

    fn flags(given: &[(&str, &str)]) -> Result<Loaded, Faults> {
        let flags = given.iter().map(|(flag, text)| ((*flag).to_owned(), (*text).to_owned())).collect();
        load(&Sources { flags, ..Sources::default() })
    }

    fn file(text: &str) -> Result<Loaded, Faults> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.conf");
        std::fs::write(&file, format!("{HEAD}{text}")).unwrap();
        load(&Sources { file: Some(("--config", file)), ..Sources::default() })
    }

    #[test]
    fn every_default_is_of_its_kind_and_every_field_stands_once() {
        for leaf in LEAVES {
            assert!(leaf.default_value().is_ok(), "{leaf:?}");
        }
        let mut paths: Vec<_> = LEAVES.iter().map(|leaf| leaf.path).collect();
        paths.sort_unstable();
        paths.dedup();
        assert_eq!(paths.len(), LEAVES.len(), "a field stands twice");
    }

    #[test]
    fn what_kubeadm_writes_is_taken_without_a_word() {
        let loaded = file(
            "bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection: {acceptContentTypes: '', burst: 0, contentType: '', kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0}
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
configSyncPeriod: 0s
conntrack: {maxPerCore: null, min: null, tcpBeLiberal: false, tcpCloseWaitTimeout: null, tcpEstablishedTimeout: null, udpStreamTimeout: 0s, udpTimeout: 0s}
detectLocal: {bridgeInterface: '', interfaceNamePrefix: ''}
detectLocalMode: ''
enableProfiling: false
healthzBindAddress: ''
hostnameOverride: ''
iptables: {localhostNodePorts: null, masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
ipvs: {excludeCIDRs: null, minSyncPeriod: 0s, scheduler: '', strictARP: false, syncPeriod: 0s, tcpFinTimeout: 0s, tcpTimeout: 0s, udpTimeout: 0s}
logging: {flushFrequency: 0, options: {json: {infoBufferSize: '0'}, text: {infoBufferSize: '0'}}, verbosity: 0}
metricsBindAddress: ''
mode: ''
nftables: {masqueradeAll: false, masqueradeBit: null, minSyncPeriod: 0s, syncPeriod: 0s}
nodePortAddresses: null
oomScoreAdj: null
portRange: ''
showHiddenMetricsForVersion: ''
winkernel: {enableDSR: false, forwardHealthCheckVip: false, networkName: '', rootHnsEndpointName: '', sourceVip: ''}
",
        )
        .unwrap();
        assert_eq!(loaded.warnings, Vec::<String>::new());
        let configuration = loaded.configuration;
        assert_eq!(configuration.healthz, Some("0.0.0.0:10256".parse().unwrap()));
        assert_eq!(configuration.metrics, Some("127.0.0.1:10249".parse().unwrap()));
        assert_eq!(configuration.node_port_addresses, [NodePortAddress::All]);
        let DetectLocal::Cluster(cidrs) = &configuration.detect_local else { panic!("{configuration:?}") };
        assert_eq!(cidrs.len(), 2);
        assert_eq!(configuration.conntrack, Conntrack::default());
    }

    #[test]
    fn flags_go_to_the_fields_of_their_mode() {
        let given = [("proxy-mode", "nftables"), ("masquerade-all", "true"), ("iptables-min-sync-period", "2s")];
        let loaded = flags(&given).unwrap();
        assert_eq!(loaded.written["nftables"], serde_json::json!({"masqueradeAll": true, "minSyncPeriod": "2s"}));
        assert_eq!(loaded.configuration.mode, Mode::Nftables);
        assert!(loaded.configuration.masquerade_all);
        assert_eq!(loaded.configuration.node_port_addresses, [NodePortAddress::Primary]);
    }

    #[test]
    fn the_gate_of_external_addresses_is_heeded_and_others_are_named() {
        let loaded = file("featureGates: {AllowServiceExternalIPs: false, Other: true}\n").unwrap();
        assert!(!loaded.configuration.external_ips);
        assert_eq!(loaded.warnings, ["featureGates.Other = true has no effect on this kube-proxy"]);
        let loaded = flags(&[("feature-gates", "AllowServiceExternalIPs=false")]).unwrap();
        assert!(!loaded.configuration.external_ips);
        assert!(flags(&[]).unwrap().configuration.external_ips);
    }

    #[test]
    fn beside_a_file_flags_have_no_effect_and_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.conf");
        std::fs::write(&path, format!("{HEAD}hostnameOverride: one\n")).unwrap();
        let flags = vec![("cluster-cidr".to_owned(), "10.0.0.0/8".to_owned())];
        let sources = Sources { file: Some(("--config", path)), flags, hostname: Some("Two ".to_owned()) };
        let loaded = load(&sources).unwrap();
        assert_eq!(loaded.configuration.hostname_override.as_deref(), Some("two"));
        assert!(loaded.warnings[0].contains("--cluster-cidr"), "{:?}", loaded.warnings);
    }

    #[test]
    fn all_faults_at_once_by_field() {
        let Faults(faults) = file(
            "mode: kernelspace\ndetectLocalMode: BridgeInterface\nnodePortAddresses: [primary, nonsense]\noomScoreAdj: 2000\n\
             clusterCIDR: 10.0.0.0\nhealthzBindAddress: localhost:10256\nnftables: {syncPeriod: 1s, minSyncPeriod: 2s}\n",
        )
        .unwrap_err();
        for needle in [
            "mode: \"kernelspace\"",
            "detectLocal.bridgeInterface",
            "nodePortAddresses: \"nonsense\"",
            "oomScoreAdj: 2000",
            "healthzBindAddress: \"localhost:10256\"",
        ] {
            assert!(faults.iter().any(|fault| fault.contains(needle)), "{needle}: {faults:?}");
        }
    }

    #[test]
    fn the_document_is_read_as_what_it_was_made_from() {
        let loaded = flags(&[("cluster-cidr", "10.1.0.0/16"), ("conntrack-min", "1")]).unwrap();
        let document = document(&loaded.written);
        assert_eq!(document["conntrack"]["maxPerCore"], 32768);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.conf");
        std::fs::write(&path, document.to_string()).unwrap();
        let again = load(&Sources { file: Some(("--config", path)), ..Sources::default() }).unwrap();
        assert_eq!(again.configuration, loaded.configuration);
        assert_eq!(again.warnings, loaded.warnings);
    }
}
