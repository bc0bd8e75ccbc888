//! What the operator wrote, checked: every fault is reported at once.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};

use anyhow::bail;
use cluster::Range;
use image::credentials::CredentialsConfig;
use kubelet::configuration::{self, Authorization, Configuration, ImageGc, LogLimits};

use super::foreign::Endpoint;
use super::layout::Layout;
use super::runtime_config::{self, RuntimeConfig};
use super::service_proxy::ProxySettings;
use crate::args::{MemberOptions, NodeOptions, Places, UpOptions};

/// The tenth address of the service range, as clusters have it.
const DNS_INDEX: u32 = 10;

/// Addresses of pods if nobody says otherwise.
const POD_CIDR: &str = "10.85.0.0/16";

const KUBELET_ROOT: &str = "/var/lib/kubelet";

/// Whose kubelet has the pods run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Agent {
    /// This program's.
    Own,
    /// Another program, which rotates logs and removes images itself and names control groups from their tops.
    Other,
}

/// A node to run, as the operator wants it.
#[derive(Debug, Clone)]
pub(crate) struct Settings {
    pub(crate) layout: Layout,
    pub(crate) agent: Agent,
    /// The CRI socket.
    pub(crate) cri_socket: PathBuf,
    pub(crate) cni_conf_dir: PathBuf,
    pub(crate) cni_bin_dir: PathBuf,
    pub(crate) registry_config_dirs: Vec<PathBuf>,
    pub(crate) credentials: CredentialsConfig,
    /// Where the pods of all nodes are.
    pub(crate) cluster: Option<Range>,
    pub(crate) pods: Range,
    /// When images go that nobody uses.
    pub(crate) image_gc: ImageGc,
    /// When the logs of containers are rotated.
    pub(crate) log_limits: LogLimits,
    /// What the runtime alone is told.
    pub(crate) runtime: RuntimeConfig,
}

/// What `up` needs beside a runtime.
#[derive(Debug, Clone)]
pub(crate) struct UpSettings {
    pub(crate) node: Settings,
    pub(crate) manifests: Vec<PathBuf>,
    pub(crate) services: Range,
    pub(crate) dns: Ipv4Addr,
    pub(crate) domain: String,
    /// The node's name.
    pub(crate) name: String,
}

impl Settings {
    /// Of a runtime alone, by the options that every node has.
    pub(crate) fn new(places: &Places, options: &NodeOptions) -> anyhow::Result<Self> {
        let mut faults = Faults::default();
        let settings = Self::read(places, options, &mut faults);
        faults.none()?;
        Ok(Self { agent: Agent::Other, ..settings })
    }

    fn read(places: &Places, options: &NodeOptions, faults: &mut Faults) -> Self {
        let layout = Layout::new(places);
        let default_socket = layout.run_dir.join("cri.sock");
        let cri_socket = options.listen.as_deref().map_or(Some(default_socket), |listen| {
            let path = listen.strip_prefix("unix://").filter(|path| path.starts_with('/'));
            faults.some(path.map(PathBuf::from), || format!("--listen {listen:?}: write unix:///path/to/socket"))
        });
        let mut registry_config_dirs = options.registry_config_dir.clone();
        if registry_config_dirs.is_empty() {
            registry_config_dirs = vec!["/etc/orlop/certs.d".into(), "/etc/containerd/certs.d".into()];
        }
        Self {
            layout,
            agent: Agent::Own,
            cri_socket: cri_socket.unwrap_or_default(),
            cni_conf_dir: options.cni_conf_dir.clone(),
            cni_bin_dir: options.cni_bin_dir.clone(),
            registry_config_dirs,
            credentials: CredentialsConfig {
                docker_configs: docker_configs(Path::new(KUBELET_ROOT), std::env::home_dir().as_deref()),
                credential_helper_dir: None,
                provider_config: options.image_credential_provider_config.clone(),
                provider_bin_dir: options.image_credential_provider_bin_dir.clone(),
            },
            pods: faults.range("--pod-cidr", options.pod_cidr.as_deref().unwrap_or(POD_CIDR)),
            cluster: options.cluster_cidr.as_deref().map(|text| faults.range("--cluster-cidr", text)),
            image_gc: ImageGc::default(),
            log_limits: LogLimits::default(),
            runtime: runtime_config::load(options.runtime_config.as_deref()).unwrap_or_else(|told| {
                faults.0.extend(told);
                RuntimeConfig::default()
            }),
        }
    }
}

impl Settings {
    /// The kubelet's directory is another one (`--root-dir`).
    fn keep_kubelet_in(&mut self, root: &Path, faults: &mut Faults) {
        match std::path::absolute(root) {
            Ok(root) => {
                self.credentials.docker_configs = docker_configs(&root, std::env::home_dir().as_deref());
                self.layout.kubelet_root = root;
            }
            Err(error) => faults.0.push(format!("--root-dir {:?}: {error}; write an absolute path", root.display())),
        }
    }
}

impl UpSettings {
    /// Of the options of `up`.
    pub(crate) fn new(places: &Places, options: &UpOptions) -> anyhow::Result<Self> {
        let mut faults = Faults::default();
        let node = Settings::read(places, &options.node, &mut faults);
        let services = faults.range("--service-cidr", &options.service_cidr);
        if overlap(services, node.pods) {
            faults.0.push("--service-cidr and --pod-cidr overlap; give them ranges of their own".to_owned());
        }
        let tenth = Ipv4Addr::from(u32::from(services.network) + DNS_INDEX);
        let dns = match options.cluster_dns {
            None => tenth,
            Some(IpAddr::V4(address)) => address,
            Some(IpAddr::V6(address)) => {
                faults.0.push(format!("--cluster-dns {address}: only IPv4 is supported yet"));
                tenth
            }
        };
        for path in options.paths.iter().filter(|path| path.as_os_str() != "-" && !path.exists()) {
            let fault = "no such file or directory; name manifests, directories of them, or - for stdin";
            faults.0.push(format!("{}: {fault}", path.display()));
        }
        faults.none()?;
        let name = options.hostname_override.clone().unwrap_or_else(host_name);
        Ok(Self { node, manifests: options.paths.clone(), services, dns, domain: options.cluster_domain.clone(), name })
    }
}

/// What a node of a cluster needs beside a runtime.
#[derive(Debug, Clone)]
pub(crate) struct MemberSettings {
    pub(crate) node: Settings,
    /// Whether the operator chose the addresses of pods; else the cluster does.
    pub(crate) pods_chosen: bool,
    pub(crate) services: Option<Range>,
    /// Another program as the runtime; else it is this one.
    pub(crate) runtime: Option<Endpoint>,
    /// How to reach the API server; none for a node that belongs to no cluster.
    pub(crate) kubeconfig: Option<PathBuf>,
    /// How to get there for the first time.
    pub(crate) bootstrap_kubeconfig: Option<PathBuf>,
    /// The service proxy, if this node is to be one.
    pub(crate) proxy: Option<ProxySettings>,
    /// The node's name.
    pub(crate) name: String,
    pub(crate) addresses: Vec<IpAddr>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) cert_dir: PathBuf,
    /// Whether a controller of a cloud names the node's addresses.
    pub(crate) external_cloud: bool,
    pub(crate) configuration: Configuration,
    /// Fields of the configuration that have no effect.
    pub(crate) warnings: Vec<String>,
    /// The configuration as it was written, for `/configz`.
    pub(crate) written: serde_json::Value,
    /// The flags with their values, for `/flagz`.
    pub(crate) flags: BTreeMap<String, String>,
}

impl MemberSettings {
    /// Of the options of `node`.
    pub(crate) fn new(places: &Places, options: &MemberOptions) -> anyhow::Result<Self> {
        let mut faults = Faults::default();
        let sources = configuration::Sources {
            file: options.config.clone(),
            dir: options.config_dir.clone(),
            flags: options.configuration.given.clone(),
        };
        let loaded = configuration::load(&sources);
        let loaded = loaded.map_err(|error| faults.0.extend(error.0)).ok();
        let warnings = configuration::without_effect(&options.without_effect.given);
        let warnings = warnings.map_err(|error| faults.0.extend(error.0)).unwrap_or_default();
        let mut node = Settings::read(places, &options.node, &mut faults);
        // Where certificates are does not follow the root, as upstream has it.
        let cert_dir = options.cert_dir.clone().unwrap_or_else(|| node.layout.kubelet_root.join("pki"));
        options.root_dir.iter().for_each(|root| node.keep_kubelet_in(root, &mut faults));
        let written_cidr = loaded.as_ref().and_then(|loaded| loaded.configuration.pod_cidr.clone());
        if let (None, Some(text)) = (&options.node.pod_cidr, &written_cidr) {
            node.pods = faults.range("podCIDR", text);
        }
        let own = node.cri_socket.clone();
        let runtime = loaded.as_ref().and_then(|loaded| faults.endpoint(&loaded.configuration, &own));
        if let Some(loaded) = &loaded {
            faults.files_of(&loaded.configuration);
            (node.image_gc, node.log_limits) = (loaded.configuration.image_gc, loaded.configuration.log_limits);
            if let Some(dir) = &loaded.configuration.pod_logs_dir {
                node.layout.pod_logs.clone_from(dir);
            }
        }
        let services = options.service_cidr.as_deref().map(|text| faults.range("--service-cidr", text));
        faults.way_to_cluster(options, loaded.as_ref().map(|loaded| &loaded.configuration));
        let proxy = ProxySettings::read(options, &mut faults);
        let labels = faults.labels(&options.node_labels);
        let external_cloud = faults.is_external(&options.cloud_provider);
        faults.none()?;
        let Some(loaded) = loaded else { bail!("the configuration cannot be read") };
        let of_proxy: Vec<_> = proxy.iter().flat_map(|proxy| proxy.warnings.clone()).collect();
        Ok(Self {
            pods_chosen: options.node.pod_cidr.is_some() || written_cidr.is_some(),
            services,
            runtime,
            kubeconfig: options.kubeconfig.clone(),
            bootstrap_kubeconfig: options.bootstrap_kubeconfig.clone(),
            proxy,
            name: options.hostname_override.clone().unwrap_or_else(host_name).to_ascii_lowercase(),
            addresses: options.node_ip.clone(),
            labels,
            cert_dir,
            external_cloud,
            node,
            configuration: loaded.configuration,
            warnings: [loaded.warnings, warnings, of_proxy].concat(),
            written: loaded.written,
            flags: options.flags(),
        })
    }
}

impl MemberSettings {
    /// Whether the operator or the cluster gives orlop the addresses of this node's pods; else a CNI configuration or another
    /// runtime has them.
    pub(super) fn gives_addresses(&self) -> bool {
        self.pods_chosen || !(self.runtime.is_some() || network::is_cni_configured(&self.node.cni_conf_dir))
    }
}

/// Where upstream's kubelet looks for the node's own logins, but for the working directory: what lies in there is
/// somebody's project.
fn docker_configs(root: &Path, home: Option<&Path>) -> Vec<PathBuf> {
    let new = [Some(root.to_owned()), home.map(|home| home.join(".docker")), Some("/.docker".into())];
    let old = [Some(root.to_owned()), home.map(Path::to_owned), Some("/".into())];
    let new = new.into_iter().flatten().map(|dir| dir.join("config.json"));
    new.chain(old.into_iter().flatten().map(|dir| dir.join(".dockercfg"))).collect()
}

/// The machine's name, as the API wants it: lower case.
pub(crate) fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase()
}

fn overlap(a: Range, b: Range) -> bool {
    let shift = 32 - u32::from(a.prefix.min(b.prefix));
    let network = |range: Range| u32::from(range.network).checked_shr(shift).unwrap_or(0);
    network(a) == network(b)
}

/// `10.96.0.0/16`, with room for a node's needs.
pub(super) fn parse_range(text: &str) -> Option<Range> {
    let (network, prefix) = text.split_once('/')?;
    let (network, prefix): (Ipv4Addr, u8) = (network.parse().ok()?, prefix.parse().ok()?);
    (8..=24).contains(&prefix).then_some(Range { network, prefix })
}

/// What is wrong with the command line.
#[derive(Debug, Default)]
pub(super) struct Faults(Vec<String>);

impl Faults {
    pub(super) fn add_all(&mut self, faults: Vec<String>) {
        self.0.extend(faults);
    }

    pub(super) fn some<T>(&mut self, value: Option<T>, fault: impl FnOnce() -> String) -> Option<T> {
        if value.is_none() {
            self.0.push(fault());
        }
        value
    }

    fn range(&mut self, flag: &str, text: &str) -> Range {
        let range = self.some(parse_range(text), || {
            format!("{flag} {text:?}: write an IPv4 range with a prefix of 8 to 24 bits, as 10.96.0.0/16")
        });
        range.unwrap_or(Range { network: Ipv4Addr::UNSPECIFIED, prefix: 8 })
    }

    /// The runtime that the configuration names, if it is not the one at `own`.
    fn endpoint(&mut self, configuration: &Configuration, own: &Path) -> Option<Endpoint> {
        let mut socket = |field: &str, text: &str| {
            // Upstream takes a bare path, too.
            let path = text.strip_prefix("unix://").unwrap_or(text);
            let path = path.strip_prefix("/var/run/").map_or(PathBuf::from(path), |rest| Path::new("/run").join(rest));
            let path = path.is_absolute().then_some(path);
            self.some(path, || format!("{field} {text:?}: write unix:///path/to/socket"))
        };
        let runtime = configuration.container_runtime_endpoint.as_ref();
        let runtime = runtime.map(|text| socket("containerRuntimeEndpoint", text));
        let images = configuration.image_service_endpoint.as_ref().map(|text| socket("imageServiceEndpoint", text));
        let runtime = runtime.flatten().filter(|path| path != own);
        match (runtime, images.flatten().filter(|path| path != own)) {
            (Some(runtime), images) => {
                let (images, timeout) =
                    (images.unwrap_or_else(|| runtime.clone()), configuration.runtime_request_timeout);
                Some(Endpoint { runtime, images, timeout })
            }
            (None, None) => None,
            (None, Some(images)) => {
                let fault =
                    "orlop's own runtime pulls its images itself; name its runtime by containerRuntimeEndpoint, too";
                self.0.push(format!("imageServiceEndpoint {}: {fault}", images.display()));
                None
            }
        }
    }

    /// Files that the configuration names have to be there.
    fn files_of(&mut self, configuration: &Configuration) {
        let (certificate, key) = configuration.tls.as_ref().map(|(certificate, key)| (certificate, key)).unzip();
        let named = [
            ("authentication.x509.clientCAFile", configuration.authentication.client_ca_file.as_ref()),
            ("tlsCertFile", certificate),
            ("tlsPrivateKeyFile", key),
        ];
        for (field, path) in named.into_iter().filter_map(|(field, path)| Some((field, path?))) {
            if let Err(error) = std::fs::File::open(path) {
                let path = path.display();
                self.0.push(format!(
                    "{field} {path}: cannot be read: {error}; check that the file is there and readable"
                ));
            }
        }
    }

    /// The kubeconfig by which the API server is reached first; or there is to be none.
    fn way_to_cluster(&mut self, options: &MemberOptions, configuration: Option<&Configuration>) {
        match (&options.kubeconfig, &options.bootstrap_kubeconfig) {
            // It is written when the node has joined.
            (Some(kubeconfig), Some(bootstrap)) if !kubeconfig.exists() => {
                self.kubeconfig("--bootstrap-kubeconfig", bootstrap);
            }
            (Some(kubeconfig), _) => {
                self.kubeconfig("--kubeconfig", kubeconfig);
            }
            (None, _) => self.without_cluster(options, configuration),
        }
    }

    fn labels(&mut self, texts: &[String]) -> BTreeMap<String, String> {
        let labels = texts.iter().filter_map(|text| {
            let pair = text.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
            self.some(pair, || format!("--node-labels {text:?}: write key=value"))
        });
        labels.collect()
    }

    /// What a node without `--kubeconfig` cannot be: nobody tells it who its callers are, as upstream has it, nor of Services.
    fn without_cluster(&mut self, options: &MemberOptions, configuration: Option<&Configuration>) {
        let served = configuration.filter(|configuration| configuration.enable_server);
        let asks_who = served.is_some_and(|served| served.authentication.webhook);
        let asks_whether = served.is_some_and(|served| served.authorization == Authorization::Webhook);
        let faults = [
            (
                asks_who,
                "authentication.webhook.enabled: there is no API server to ask; write false, or name one by --kubeconfig",
            ),
            (
                asks_whether,
                "authorization.mode: there is no API server to ask; write AlwaysAllow, or name one by --kubeconfig",
            ),
            (
                options.bootstrap_kubeconfig.is_some(),
                "--bootstrap-kubeconfig: name the file to write by --kubeconfig, too",
            ),
            (
                options.proxy_kubeconfig.is_some() || options.proxy_config.is_some(),
                "a node without --kubeconfig is no service proxy; `orlop proxy` is one by itself",
            ),
        ];
        self.0.extend(faults.iter().filter(|(is_wrong, _)| *is_wrong).map(|(_, fault)| (*fault).to_owned()));
    }

    /// Whether `--cloud-provider` names a controller; kubelets have no providers of their own any more.
    fn is_external(&mut self, provider: &str) -> bool {
        let known = match provider {
            "" => Some(false),
            "external" => Some(true),
            _ => None,
        };
        let fault =
            || format!("--cloud-provider {provider:?}: providers are not a kubelet's part any more; write external");
        self.some(known, fault).unwrap_or(false)
    }

    pub(super) fn kubeconfig(&mut self, flag: &str, path: &Path) -> Option<cluster::api::Config> {
        let config = cluster::api::Config::from_kubeconfig(path);
        config.map_err(|error| self.0.push(format!("{flag} {}: {error}", path.display()))).ok()
    }

    fn none(self) -> anyhow::Result<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        bail!("{}", self.0.join("\norlop: "))
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Arguments, Command};

    fn read(words: &[&str]) -> anyhow::Result<UpSettings> {
        let arguments = Arguments::parse_from([&["orlop", "up", "/"], words].concat());
        let Command::Up(options) = arguments.command else { panic!("not up") };
        UpSettings::new(&arguments.places, &options)
    }

    #[test]
    fn the_tenth_service_address_is_the_name_server() {
        assert_eq!(read(&[]).unwrap().dns, Ipv4Addr::new(10, 96, 0, 10));
        assert_eq!(read(&["--service-cidr", "10.7.0.0/20"]).unwrap().dns, Ipv4Addr::new(10, 7, 0, 10));
    }

    #[test]
    fn all_faults_are_told_at_once() {
        let error = read(&["--listen", "cri.sock", "--pod-cidr", "10.0.0.0"]).unwrap_err().to_string();
        assert!(error.contains("--listen") && error.contains("--pod-cidr"), "{error}");
        let error = read(&["--service-cidr", "10.85.0.0/20"]).unwrap_err().to_string();
        assert!(error.contains("overlap"), "{error}");
    }

    #[test]
    fn a_node_without_an_api_server_asks_none() {
        let dir = tempfile::tempdir().unwrap();
        let read = |written: &str, more: &[&str]| {
            let file = dir.path().join("kubelet.yaml");
            let head = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n";
            std::fs::write(&file, format!("{head}{written}")).unwrap();
            let file = file.display().to_string();
            let arguments = Arguments::parse_from([&["orlop", "node", "--config", &file][..], more].concat());
            let Command::Node(options) = arguments.command else { panic!("not node") };
            MemberSettings::new(&arguments.places, &options)
        };
        let own = "authentication: { webhook: { enabled: false } }\nauthorization: { mode: AlwaysAllow }\n";
        assert_eq!(read(own, &[]).unwrap().kubeconfig, None);
        read("enableServer: false\n", &[]).unwrap();
        let error = read("", &["--bootstrap-kubeconfig", "/b", "--proxy-kubeconfig", "/p"]).unwrap_err().to_string();
        for fault in ["webhook.enabled", "authorization.mode", "--bootstrap-kubeconfig", "no service proxy"] {
            assert!(error.contains(fault), "{fault} is not in {error}");
        }
    }

    #[test]
    fn logins_come_from_where_the_kubelet_looks() {
        let read = docker_configs(Path::new(KUBELET_ROOT), Some(Path::new("/root")));
        let expected = [
            "/var/lib/kubelet/config.json",
            "/root/.docker/config.json",
            "/.docker/config.json",
            "/var/lib/kubelet/.dockercfg",
            "/root/.dockercfg",
            "/.dockercfg",
        ];
        assert_eq!(read, expected.map(PathBuf::from));
    }
}
