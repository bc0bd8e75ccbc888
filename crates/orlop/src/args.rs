//! What the operator may write on the command line: kubectl's words and flags where kubectl has them.

use std::collections::BTreeMap;
use std::marker::PhantomData;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use clap::{ArgMatches, Args, FromArgMatches, Parser, Subcommand, ValueEnum};
use configfile::{Kind, Leaf};
use kubelet::KUBERNETES;

/// The whole Kubernetes worker node as one program.
#[derive(Debug, Parser)]
#[command(name = "orlop", version, max_term_width = 100)]
pub(crate) struct Arguments {
    #[command(flatten)]
    pub(crate) places: Places,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Where a node keeps its things. Two nodes on one machine need two of each.
#[derive(Debug, Clone, Args)]
pub(crate) struct Places {
    /// Images, admitted pods and what else survives a boot
    #[arg(long, global = true, env = "ORLOP_STATE_DIR", default_value = "/var/lib/orlop", value_name = "DIR")]
    pub(crate) state_dir: PathBuf,
    /// Sockets and the records of what runs; on a tmpfs
    #[arg(long, global = true, env = "ORLOP_RUN_DIR", default_value = "/run/orlop", value_name = "DIR")]
    pub(crate) run_dir: PathBuf,
}

impl Places {
    /// The socket on which a running node answers the local command line.
    pub(crate) fn socket(&self) -> PathBuf {
        self.run_dir.join("orlop.sock")
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run the manifests of files and directories on this machine
    Up(UpOptions),
    /// End everything that `up` runs
    Down,
    /// Be a node of a cluster: kubelet, runtime and, on request, service proxy; takes upstream's kubelet flags
    // `--version` says what kubeadm looks for.
    #[command(version = KUBERNETES, display_name = "Kubernetes", visible_alias = "kubelet")]
    Node(Box<MemberOptions>),
    /// Only the service proxy, beside any kubelet: upstream's kube-proxy flags
    Proxy(Box<ProxyOptions>),
    /// Only the container runtime: the CRI on a socket
    Runtime(NodeOptions),
    /// List pods
    Ps(PsOptions),
    /// Print the logs of a container
    Logs(LogsOptions),
    /// Run a command in a container
    Exec(ExecOptions),
    /// Join the streams of a container's first process
    Attach(AttachOptions),
    /// Copy files out of or into a container (needs `tar` there)
    Cp(CpOptions),
    /// Forward local ports to a pod
    PortForward(PortForwardOptions),
    /// List objects of any kind
    Get(GetOptions),
    /// Show an object with its events
    Describe(DescribeOptions),
    /// List events
    Events(EventsOptions),
    /// Show what pods use, against their limits
    Top(TopOptions),
    /// Say what a pod waits for, and where its start went
    Why(PodOptions),
    /// List images
    Images(OutputOptions),
    /// Pull an image
    Pull(ImageOptions),
    /// Load images from an OCI layout or a `docker save` archive
    Load {
        /// The archive or the layout's directory
        path: PathBuf,
    },
    /// Remove an image
    Rmi(ImageOptions),
    /// List what on this machine belongs to orlop and has no owner; prints nothing when all is well
    Fsck(OutputOptions),
    /// Say whether this machine can run a node, and what to do if not
    Check(OutputOptions),
    /// Be an OCI runtime, with runc's command line; so is this program by the name `runc`
    #[command(disable_help_flag = true)]
    Oci {
        /// As runc takes them; `--help` lists them
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGUMENTS")]
        words: Vec<std::ffi::OsString>,
    },
    /// Show the versions of the program and of the running node
    Version(OutputOptions),
    /// Print a completion script
    Completion {
        /// The shell that will read it
        shell: clap_complete::Shell,
    },
}

/// Options of every command that runs a node.
#[derive(Debug, Clone, Args)]
pub(crate) struct NodeOptions {
    /// CRI socket [default: <run-dir>/cri.sock]
    #[arg(long, value_name = "unix://PATH")]
    pub(crate) listen: Option<String>,
    /// CNI configurations; none there means the built-in bridge
    #[arg(long, default_value = "/etc/cni/net.d", value_name = "DIR")]
    pub(crate) cni_conf_dir: PathBuf,
    /// CNI plugins
    #[arg(long, default_value = "/opt/cni/bin", value_name = "DIR")]
    pub(crate) cni_bin_dir: PathBuf,
    /// `hosts.toml` trees; may be repeated [default: /etc/orlop/certs.d, /etc/containerd/certs.d]
    #[arg(long, env = "ORLOP_REGISTRY_CONFIG_DIR", value_name = "DIR")]
    pub(crate) registry_config_dir: Vec<PathBuf>,
    /// RuntimeConfiguration: other OCI runtimes for RuntimeClasses [default: /etc/orlop/runtime.yaml if it is there]
    #[arg(long, value_name = "FILE")]
    pub(crate) runtime_config: Option<PathBuf>,
    /// Which programs give out credentials for which images (CredentialProviderConfig, a file or a directory)
    #[arg(long, value_name = "PATH", requires = "image_credential_provider_bin_dir")]
    pub(crate) image_credential_provider_config: Option<PathBuf>,
    /// Where those programs are
    #[arg(long, value_name = "DIR")]
    pub(crate) image_credential_provider_bin_dir: Option<PathBuf>,
    /// Addresses of pods on the built-in bridge [default: what the cluster gives the node, or 10.85.0.0/16]
    #[arg(long, value_name = "CIDR")]
    pub(crate) pod_cidr: Option<String>,
    /// Addresses of the pods of all nodes: what a pod sends there keeps its address, so the network has to know the way
    #[arg(long, value_name = "CIDR")]
    pub(crate) cluster_cidr: Option<String>,
    /// What to log: error, warn, info, debug or trace
    #[arg(long, env = "ORLOP_LOG", default_value = "warn", value_name = "LEVEL")]
    pub(crate) log_level: tracing::Level,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct UpOptions {
    /// Manifests: files, directories (watched for changes), or - for stdin
    #[arg(required = true, value_name = "PATH")]
    pub(crate) paths: Vec<PathBuf>,
    /// Return when the node is up; `orlop down` ends it
    #[arg(long, short)]
    pub(crate) detach: bool,
    /// Addresses of Services
    #[arg(long, default_value = "10.96.0.0/16", value_name = "CIDR")]
    pub(crate) service_cidr: String,
    /// Address of the pods' DNS server [default: the tenth of the service addresses]
    #[arg(long, value_name = "IP")]
    pub(crate) cluster_dns: Option<IpAddr>,
    /// DNS domain of Services
    #[arg(long, default_value = "cluster.local", value_name = "DOMAIN")]
    pub(crate) cluster_domain: String,
    /// The node's name [default: the host name]
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname_override: Option<String>,
    #[command(flatten)]
    pub(crate) node: NodeOptions,
}

/// A node of a cluster: upstream's kubelet flags.
#[derive(Debug, Clone, Args)]
pub(crate) struct MemberOptions {
    /// How to reach the API server, as which user; without it the node has none and runs its static pods alone
    #[arg(long, value_name = "FILE")]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// How to join while that file is missing or its certificate has ended: the user of a bootstrap token
    #[arg(long, value_name = "FILE")]
    pub(crate) bootstrap_kubeconfig: Option<PathBuf>,
    /// Be the node's service proxy, too, as the user of this kubeconfig; without it Services are left to a kube-proxy
    #[arg(long, value_name = "FILE")]
    pub(crate) proxy_kubeconfig: Option<PathBuf>,
    /// KubeProxyConfiguration of that proxy: its mode and the rest
    #[arg(long, value_name = "FILE")]
    pub(crate) proxy_config: Option<PathBuf>,
    /// Addresses of Services: connections to those that no Service has are refused at once
    #[arg(long, value_name = "CIDR")]
    pub(crate) service_cidr: Option<String>,
    /// KubeletConfiguration
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// More of it: `*.conf`, merged over --config in the order of their names
    #[arg(long, value_name = "DIR")]
    pub(crate) config_dir: Option<PathBuf>,
    /// The node's name [default: the host name]
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname_override: Option<String>,
    /// The node's addresses, one of each family [default: that of the default route]
    #[arg(long, value_name = "IP", value_delimiter = ',')]
    pub(crate) node_ip: Vec<IpAddr>,
    /// Labels that the node is born with: `key=value,…`
    #[arg(long, value_name = "LABELS", value_delimiter = ',')]
    pub(crate) node_labels: Vec<String>,
    /// Certificates that the kubelet makes and is given [default: /var/lib/kubelet/pki]
    #[arg(long, value_name = "DIR")]
    pub(crate) cert_dir: Option<PathBuf>,
    /// Where the kubelet keeps pods, volumes and plugins [default: /var/lib/kubelet]
    #[arg(long, value_name = "DIR")]
    pub(crate) root_dir: Option<PathBuf>,
    /// `external`: a controller of the cloud names the node's addresses, and removes the taint that keeps pods away until then
    #[arg(long, value_name = "PROVIDER", default_value = "")]
    pub(crate) cloud_provider: String,
    /// Upstream's number for what to log: 0 to 3 is info, 4 and 5 debug, more is trace; wins over --log-level
    #[arg(long = "v", short = 'v', value_name = "NUMBER")]
    pub(crate) verbosity: Option<u8>,
    #[command(flatten)]
    pub(crate) configuration: ConfigurationFlags<OfKubelet>,
    #[command(flatten)]
    pub(crate) without_effect: ConfigurationFlags<WithoutEffect>,
    #[command(flatten)]
    pub(crate) node: NodeOptions,
}

impl MemberOptions {
    /// What to log.
    pub(crate) fn log_level(&self) -> tracing::Level {
        self.verbosity.map_or(self.node.log_level, level_of)
    }

    /// All flags of upstream's with their values, for `/flagz`.
    pub(crate) fn flags(&self) -> BTreeMap<String, String> {
        let path = |path: &Option<PathBuf>| path.as_deref().unwrap_or(Path::new("")).display().to_string();
        let own = [
            ("bootstrap-kubeconfig", path(&self.bootstrap_kubeconfig)),
            ("cert-dir", path(&self.cert_dir)),
            ("cloud-provider", self.cloud_provider.clone()),
            ("config", path(&self.config)),
            ("config-dir", path(&self.config_dir)),
            ("hostname-override", self.hostname_override.clone().unwrap_or_default()),
            ("image-credential-provider-bin-dir", path(&self.node.image_credential_provider_bin_dir)),
            ("image-credential-provider-config", path(&self.node.image_credential_provider_config)),
            ("kubeconfig", path(&self.kubeconfig)),
            ("node-ip", self.node_ip.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")),
            ("node-labels", self.node_labels.join(",")),
            ("pod-cidr", self.node.pod_cidr.clone().unwrap_or_default()),
            ("root-dir", path(&self.root_dir)),
            ("v", self.verbosity.unwrap_or_default().to_string()),
        ];
        let own = own.into_iter().map(|(name, value)| (name.to_owned(), value));
        self.configuration.shown().chain(self.without_effect.shown()).chain(own).collect()
    }
}

/// What upstream's number for what to log stands for.
pub(crate) fn level_of(verbosity: u8) -> tracing::Level {
    match verbosity {
        0..=3 => tracing::Level::INFO,
        4 | 5 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    }
}

/// Only the service proxy: upstream's kube-proxy flags.
#[derive(Debug, Clone, Args)]
pub(crate) struct ProxyOptions {
    /// KubeProxyConfiguration; the flags for its fields have no effect then, and the proxy ends when the file changes
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Write the configuration, with its defaults, to this file and end
    #[arg(long, value_name = "FILE")]
    pub(crate) write_config_to: Option<PathBuf>,
    /// Remove the rules of all modes from this machine and end
    #[arg(long)]
    pub(crate) cleanup: bool,
    /// Ask the running proxy what a packet to a Service meets, print it and end
    #[arg(long, value_name = "[NAMESPACE/]SERVICE")]
    pub(crate) explain: Option<String>,
    /// Only set what needs more than CAP_NET_ADMIN, connection tracking's sysctls, and end
    #[arg(long)]
    pub(crate) init_only: bool,
    /// The API server's URL, whatever the kubeconfig says
    #[arg(long, value_name = "URL")]
    pub(crate) master: Option<String>,
    /// The node's name [default: the host name]; counts beside --config, too
    #[arg(long, value_name = "NAME")]
    pub(crate) hostname_override: Option<String>,
    /// Old form of --healthz-bind-address; 0 is none
    #[arg(long, value_name = "PORT", hide_short_help = true)]
    pub(crate) healthz_port: Option<u16>,
    /// Old form of --metrics-bind-address; 0 is none
    #[arg(long, value_name = "PORT", hide_short_help = true)]
    pub(crate) metrics_port: Option<u16>,
    /// Show the version
    #[arg(long)]
    pub(crate) version: bool,
    /// What to log: error, warn, info, debug or trace
    #[arg(long, env = "ORLOP_LOG", default_value = "warn", value_name = "LEVEL")]
    pub(crate) log_level: tracing::Level,
    /// Upstream's number for what to log: 0 to 3 is info, 4 and 5 debug, more is trace; wins over --log-level
    #[arg(long = "v", short = 'v', value_name = "NUMBER")]
    pub(crate) verbosity: Option<u8>,
    #[command(flatten)]
    pub(crate) configuration: ConfigurationFlags<OfProxy>,
}

/// The flags that stand for fields of a document of configuration, as they were given.
#[derive(Debug, Clone)]
pub(crate) struct ConfigurationFlags<F> {
    /// Names without dashes, and values.
    pub(crate) given: Vec<(String, String)>,
    of: PhantomData<F>,
}

/// Whose flags.
pub(crate) trait Fields {
    const LEAVES: &'static [Leaf];
    const HEADING: &'static str;
    /// Flags that are options of their own.
    const OWN: &'static [&'static str];
}

/// The kubelet's.
#[derive(Debug, Clone)]
pub(crate) struct OfKubelet;

impl Fields for OfKubelet {
    const LEAVES: &'static [Leaf] = kubelet::configuration::LEAVES;
    const HEADING: &'static str = "Fields of KubeletConfiguration (better written into --config)";
    const OWN: &'static [&'static str] = &["pod-cidr"];
}

/// The kubelet's that stand for no field and do nothing here.
#[derive(Debug, Clone)]
pub(crate) struct WithoutEffect;

impl Fields for WithoutEffect {
    const LEAVES: &'static [Leaf] = kubelet::configuration::FLAGS_WITHOUT_EFFECT;
    const HEADING: &'static str = "Upstream's flags that are taken and have no effect";
    const OWN: &'static [&'static str] = &[];
}

/// The proxy's.
#[derive(Debug, Clone)]
pub(crate) struct OfProxy;

impl Fields for OfProxy {
    const LEAVES: &'static [Leaf] = proxy::configuration::LEAVES;
    const HEADING: &'static str = "Fields of KubeProxyConfiguration";
    const OWN: &'static [&'static str] = &[];
}

impl<F: Fields> ConfigurationFlags<F> {
    fn leaves() -> impl Iterator<Item = &'static Leaf> {
        F::LEAVES.iter().filter(|leaf| !leaf.flag.is_empty() && !F::OWN.contains(&leaf.flag))
    }

    /// Names and values; upstream's defaults of those that were not given.
    fn shown(&self) -> impl Iterator<Item = (String, String)> {
        Self::leaves().map(|leaf| {
            let given: Vec<&str> =
                self.given.iter().filter(|(flag, _)| flag == leaf.flag).map(|(_, value)| value.as_str()).collect();
            let value = if given.is_empty() { leaf.default.to_owned() } else { given.join(",") };
            (leaf.flag.to_owned(), value)
        })
    }
}

impl<F: Fields> Args for ConfigurationFlags<F> {
    fn augment_args(command: clap::Command) -> clap::Command {
        command.args(Self::leaves().map(|leaf| {
            let arg = clap::Arg::new(leaf.flag)
                .long(leaf.flag)
                .value_name("VALUE")
                // As upstream: some add up, of the others the last counts.
                .action(clap::ArgAction::Append)
                .help(leaf.help())
                .help_heading(F::HEADING)
                .hide_short_help(true);
            match leaf.kind {
                Kind::Bool => arg.num_args(0..=1).require_equals(true).default_missing_value("true"),
                Kind::Integer | Kind::Number => arg.allow_negative_numbers(true),
                _ => arg,
            }
        }))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

impl<F: Fields> FromArgMatches for ConfigurationFlags<F> {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = Self::leaves().flat_map(|leaf| {
            let values = matches.get_many::<String>(leaf.flag).into_iter().flatten();
            values.map(|value| (leaf.flag.to_owned(), value.clone()))
        });
        Ok(Self { given: given.collect(), of: PhantomData })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// How to print a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Wide,
    Json,
    Yaml,
    Name,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct OutputOptions {
    /// Output format
    #[arg(long, short, value_enum, default_value = "table")]
    pub(crate) output: Format,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct NamespaceOptions {
    /// Namespace of the object
    #[arg(long, short, default_value = "default")]
    pub(crate) namespace: String,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PsOptions {
    /// Only this pod
    pub(crate) pod: Option<String>,
    #[command(flatten)]
    pub(crate) namespace: NamespaceOptions,
    /// Pods of all namespaces
    #[arg(long, short = 'A')]
    pub(crate) all_namespaces: bool,
    /// Only pods with these labels: `key=value,…`
    #[arg(long, short = 'l')]
    pub(crate) selector: Option<String>,
    /// Go on printing changes
    #[arg(long, short)]
    pub(crate) watch: bool,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PodOptions {
    /// The pod; `pod/NAME` and `deployment/NAME` work too
    pub(crate) pod: String,
    #[command(flatten)]
    pub(crate) namespace: NamespaceOptions,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct LogsOptions {
    #[command(flatten)]
    pub(crate) pod: PodOptions,
    /// Container [default: the pod's first]
    #[arg(long, short)]
    pub(crate) container: Option<String>,
    /// Go on printing
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// The container's previous run
    #[arg(long, short)]
    pub(crate) previous: bool,
    /// Only the last lines
    #[arg(long, value_name = "LINES", allow_negative_numbers = true)]
    pub(crate) tail: Option<i64>,
    /// Only what is younger, as 5s, 2m or 3h
    #[arg(long, value_name = "DURATION")]
    pub(crate) since: Option<String>,
    /// Print the time before each line
    #[arg(long)]
    pub(crate) timestamps: bool,
    /// At most so many bytes
    #[arg(long, value_name = "BYTES")]
    pub(crate) limit_bytes: Option<u64>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ExecOptions {
    #[command(flatten)]
    pub(crate) pod: PodOptions,
    /// Container [default: the pod's first]
    #[arg(long, short)]
    pub(crate) container: Option<String>,
    /// Pass stdin
    #[arg(long, short = 'i')]
    pub(crate) stdin: bool,
    /// Give it a terminal
    #[arg(long, short)]
    pub(crate) tty: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct AttachOptions {
    #[command(flatten)]
    pub(crate) pod: PodOptions,
    /// Container [default: the pod's first]
    #[arg(long, short)]
    pub(crate) container: Option<String>,
    /// Pass stdin
    #[arg(long, short = 'i')]
    pub(crate) stdin: bool,
    /// The container has a terminal
    #[arg(long, short)]
    pub(crate) tty: bool,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct CpOptions {
    /// `[namespace/]pod:path` or a local path
    pub(crate) source: String,
    /// `[namespace/]pod:path` or a local path
    pub(crate) target: String,
    #[command(flatten)]
    pub(crate) namespace: NamespaceOptions,
    /// Container [default: the pod's first]
    #[arg(long, short)]
    pub(crate) container: Option<String>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct PortForwardOptions {
    /// The pod; `service/NAME` takes one of its pods
    pub(crate) pod: String,
    /// `LOCAL:REMOTE` or one number for both
    #[arg(required = true)]
    pub(crate) ports: Vec<String>,
    #[command(flatten)]
    pub(crate) namespace: NamespaceOptions,
    /// Local address to listen on
    #[arg(long, default_value = "127.0.0.1")]
    pub(crate) address: IpAddr,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct DescribeOptions {
    /// pod, service, deployment, configmap, …; or KIND/NAME
    pub(crate) kind: String,
    /// Its name; without one, all of the kind
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) namespace: NamespaceOptions,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct GetOptions {
    /// services, configmaps, deployments, …
    pub(crate) kind: String,
    /// Only this one
    pub(crate) name: Option<String>,
    #[command(flatten)]
    pub(crate) namespace: NamespaceOptions,
    /// Objects of all namespaces
    #[arg(long, short = 'A')]
    pub(crate) all_namespaces: bool,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct EventsOptions {
    #[command(flatten)]
    pub(crate) namespace: NamespaceOptions,
    /// Events of all namespaces
    #[arg(long, short = 'A')]
    pub(crate) all_namespaces: bool,
    /// Only events of this object, as pod/NAME
    #[arg(long = "for", value_name = "OBJECT")]
    pub(crate) object: Option<String>,
    /// Go on printing
    #[arg(long, short)]
    pub(crate) watch: bool,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct TopOptions {
    #[command(flatten)]
    pub(crate) namespace: NamespaceOptions,
    /// Pods of all namespaces
    #[arg(long, short = 'A')]
    pub(crate) all_namespaces: bool,
    /// Go on measuring, once a second
    #[arg(long, short)]
    pub(crate) watch: bool,
    #[command(flatten)]
    pub(crate) output: OutputOptions,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ImageOptions {
    /// The image, as in a pod's `image:`
    pub(crate) image: String,
}
