//! The service proxy that a node of a cluster is, too: what a kube-proxy beside it would be told, and would do beside its rules.

use std::sync::Arc;

use cluster::api::{Api, Rate};
use proxy::configuration::{self, Configuration, DetectLocal};
use serde_json::Value;
use tokio::task::JoinSet;

use super::agent::Agent;
use super::client_metrics;
use super::settings::{Faults, MemberSettings, Settings};
use crate::args::MemberOptions;

/// Fields of the configuration that concern the process, and here are the node's.
const OF_THE_PROCESS: &[&str] = &["hostnameOverride", "oomScoreAdj", "logging"];

/// What the operator wrote of it.
#[derive(Debug, Clone)]
pub(crate) struct ProxySettings {
    /// Its user.
    pub(crate) api: cluster::api::Config,
    pub(crate) configuration: Configuration,
    /// The configuration as it was written, for `/configz`.
    pub(crate) written: Value,
    /// One line for each field that has no effect.
    pub(crate) warnings: Vec<String>,
}

impl ProxySettings {
    /// Of the options of `node`; none if Services are left to a kube-proxy.
    pub(super) fn read(options: &MemberOptions, faults: &mut Faults) -> Option<Self> {
        let (kubeconfig, file) = (options.proxy_kubeconfig.as_deref(), options.proxy_config.as_deref());
        if kubeconfig.is_none() && file.is_none() {
            return None;
        }
        let file = file.map(|file| ("--proxy-config", file.to_owned()));
        let sources = configuration::Sources { file, ..configuration::Sources::default() };
        let loaded = configuration::load(&sources).map_err(|told| faults.add_all(told.0)).ok()?;
        let configuration = loaded.configuration;
        let mut api = match (kubeconfig, &configuration.kubeconfig) {
            (Some(path), _) => faults.kubeconfig("--proxy-kubeconfig", path),
            (None, Some(path)) => faults.kubeconfig("clientConnection.kubeconfig", path),
            (None, None) => faults.some(None, || {
                "--proxy-config: it names no clientConnection.kubeconfig; name one there or by --proxy-kubeconfig"
                    .to_owned()
            }),
        }?;
        let (per_second, burst) = configuration.rate;
        api.rate = (per_second > 0.0).then_some(Rate { per_second, burst });
        let written = loaded.written;
        let of_the_process = OF_THE_PROCESS.iter().filter(|field| written.get(field).is_some());
        let of_the_process = of_the_process
            .map(|field| format!("{field} of the proxy has no effect: it is a part of the node's process"));
        let warnings = loaded.warnings.into_iter().chain(of_the_process).collect();
        Some(Self { api, configuration, written, warnings })
    }

    /// What the proxy is told. `chosen` has the addresses of this node's pods, where orlop gives them.
    pub(super) fn config(&self, settings: &MemberSettings, chosen: &Settings) -> proxy::Config {
        let range = |range: cluster::Range| range.to_string().parse().into_iter().collect();
        let configured = proxy::Config::configured(&settings.name, &self.configuration);
        let local = match configured.local {
            DetectLocal::Cluster(ranges) if ranges.is_empty() => match settings.node.cluster {
                Some(cluster) => DetectLocal::Cluster(range(cluster)),
                None if settings.gives_addresses() => DetectLocal::Cluster(range(chosen.pods)),
                None => DetectLocal::Node,
            },
            chosen => chosen,
        };
        proxy::Config {
            table: settings.node.layout.service_table.clone(),
            local,
            service_cidrs: settings.services.map(range).unwrap_or_default(),
            ..configured
        }
    }
}

/// What a kube-proxy on this node would do beside its rules: connection tracking's settings, and its addresses.
pub(super) fn serve(settings: &MemberSettings, agent: &Agent, api: Api, servers: &mut JoinSet<()>) {
    let Some(ProxySettings { configuration, written, .. }) = &settings.proxy else { return };
    let more = move |text: &mut instruments::Text| client_metrics::write(text, &api);
    let Some(telling) = agent.proxy_telling(&settings.name, configuration.mode, written, Arc::new(more)) else {
        return;
    };
    if let Err(error) = proxy::sysctls::apply(&configuration.conntrack, &proxy::sysctls::Places::default()) {
        let error = &error as &dyn std::error::Error;
        tracing::warn!(error, "connection tracking stays as it is");
    }
    // It waits for its address instead of failing, whatever `bindAddressHardFail` says: pods have to go on.
    if let Some(address) = configuration.healthz {
        let telling = telling.clone();
        servers.spawn(async move {
            let _ = telling.serve_healthz(address, false).await;
        });
    }
    if let Some(address) = configuration.metrics {
        servers.spawn(async move {
            let _ = telling.serve_metrics(address, false).await;
        });
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Arguments, Command};

    const KUBECONFIG: &str = "\
apiVersion: v1
kind: Config
current-context: c
clusters: [{ name: c, cluster: { server: 'https://192.0.2.1:6443', insecure-skip-tls-verify: true } }]
users: [{ name: u, user: { token: t } }]
contexts: [{ name: c, context: { cluster: c, user: u } }]
";

    /// The settings of a node with these words on its command line, beside files of a directory.
    fn read(words: &[&str], files: &[(&str, &str)]) -> anyhow::Result<MemberSettings> {
        let dir = tempfile::tempdir()?;
        let path = |name: &str| dir.path().join(name).display().to_string();
        for (name, text) in [("kubeconfig", KUBECONFIG)].iter().chain(files) {
            std::fs::write(path(name), text.replace("DIR", &dir.path().display().to_string()))?;
        }
        let words = words.iter().map(|word| word.replace("DIR", &dir.path().display().to_string()));
        let before = ["orlop", "node", "--kubeconfig"].map(str::to_owned).into_iter().chain([path("kubeconfig")]);
        // No configuration of CNI is there.
        let before = before.chain(["--cni-conf-dir".to_owned(), path("none")]);
        let arguments = Arguments::parse_from(before.chain(words));
        let Command::Node(options) = arguments.command else { panic!("not node") };
        MemberSettings::new(&arguments.places, &options)
    }

    fn config(words: &[&str], written: &str) -> proxy::Config {
        let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
        let file = format!("{head}clientConnection: {{ kubeconfig: DIR/kubeconfig }}\n{written}");
        let words = [&["--proxy-config", "DIR/proxy.yaml"], words].concat();
        let settings = read(&words, &[("proxy.yaml", &file)]).unwrap();
        let mut chosen = settings.node.clone();
        chosen.pods = cluster::Range { network: "10.244.3.0".parse().unwrap(), prefix: 24 };
        settings.proxy.as_ref().unwrap().config(&settings, &chosen)
    }

    fn ranges(text: &str) -> DetectLocal {
        DetectLocal::Cluster(vec![text.parse().unwrap()])
    }

    #[test]
    fn pods_are_known_by_the_addresses_that_the_node_has_for_them() {
        assert_eq!(config(&[], "").local, ranges("10.244.3.0/24"));
        assert_eq!(config(&["--cluster-cidr", "10.244.0.0/16"], "").local, ranges("10.244.0.0/16"));
        assert_eq!(config(&[], "clusterCIDR: 10.1.0.0/16\n").local, ranges("10.1.0.0/16"), "the operator's own word");
        let bridge = "detectLocalMode: BridgeInterface\ndetectLocal: { bridgeInterface: cni0 }\n";
        assert_eq!(config(&[], bridge).local, DetectLocal::Bridge("cni0".to_owned()));
        let foreign = ["--container-runtime-endpoint", "unix:///run/containerd/containerd.sock"];
        assert_eq!(config(&foreign, "").local, DetectLocal::Node, "others give the addresses");
    }

    #[test]
    fn the_configuration_is_that_of_a_kube_proxy() {
        let config = config(&[], "mode: iptables\niptables: { masqueradeAll: true }\n");
        assert_eq!((config.mode, config.masquerade_all), (proxy::Mode::Iptables, true));
        assert!(read(&[], &[]).unwrap().proxy.is_none());
        let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
        let error = read(&["--proxy-config", "DIR/p"], &[("p", head)]).unwrap_err().to_string();
        assert!(error.contains("clientConnection.kubeconfig"), "{error}");
        let error = read(&["--proxy-config", "DIR/none"], &[]).unwrap_err().to_string();
        assert!(error.starts_with("--proxy-config ") && error.contains("cannot be read"), "{error}");
        let file = format!("{head}oomScoreAdj: -5\n");
        let words = ["--proxy-config", "DIR/p", "--proxy-kubeconfig", "DIR/kubeconfig"];
        let warnings = read(&words, &[("p", &file)]).unwrap().warnings.join("\n");
        assert!(warnings.contains("oomScoreAdj of the proxy has no effect"), "{warnings}");
    }
}
