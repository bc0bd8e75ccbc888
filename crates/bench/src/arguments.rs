//! What `cargo xtask bench` passes.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Measures orlop and what it replaces; started by `cargo xtask bench`.
#[derive(Debug, Parser)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    pub(crate) work: Work,
}

/// What is measured.
#[derive(Debug, Subcommand)]
pub(crate) enum Work {
    /// Container runtimes over their CRI sockets
    Runtime(RuntimeArguments),
    /// Nodes of a real API server
    Node(NodeArguments),
    /// Service proxies before the objects of a real API server
    Proxy(ProxyArguments),
    /// Requests to a Deployment while it is updated, on a node
    Rollout(RolloutArguments),
}

/// The container runtime's part.
#[derive(Debug, Args)]
pub(crate) struct RuntimeArguments {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(flatten)]
    pub(crate) images: Images,
    /// The OCI layout of the image whose pull is measured
    #[arg(long)]
    pub(crate) large: PathBuf,
    /// Only these sections
    #[arg(long, value_enum, default_values = ["pod", "exec", "stop", "many", "idle", "pull", "log", "bundle"])]
    pub(crate) section: Vec<Section>,
}

/// The node's part.
#[derive(Debug, Args)]
pub(crate) struct NodeArguments {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(flatten)]
    pub(crate) images: Images,
    /// A directory with the programs of a control plane
    #[arg(long)]
    pub(crate) control_plane: PathBuf,
    /// Only these sections
    #[arg(long, value_enum, default_values = ["pod", "many", "idle", "config"])]
    pub(crate) section: Vec<NodeSection>,
    /// Pods that are created and deleted one after the other
    #[arg(long, default_value_t = 40)]
    pub(crate) pods: usize,
    /// Pods that are created at once; the titles of the report say what they are by default
    #[arg(long, default_value_t = 100)]
    pub(crate) many: usize,
}

/// The service proxy's part.
#[derive(Debug, Args)]
pub(crate) struct ProxyArguments {
    #[command(flatten)]
    pub(crate) common: Common,
    /// A directory with the programs of a control plane
    #[arg(long)]
    pub(crate) control_plane: PathBuf,
    /// How many Services there are
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(20..=60_000))]
    pub(crate) services: u32,
    /// How many endpoints each of them has
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=60))]
    pub(crate) endpoints: u32,
    /// By what means packets are led; each has its turn
    #[arg(long, value_enum, default_values = ["nftables"])]
    pub(crate) mode: Vec<ProxyMode>,
    /// Services that are created and deleted one after the other
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=200))]
    pub(crate) changes: u32,
    /// The longest that anything may take, in seconds
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) limit: u64,
}

/// The part of rolling updates.
#[derive(Debug, Args)]
pub(crate) struct RolloutArguments {
    #[command(flatten)]
    pub(crate) common: Common,
    #[command(flatten)]
    pub(crate) images: Images,
    /// A directory with the programs of a control plane
    #[arg(long)]
    pub(crate) control_plane: PathBuf,
    /// How often the Deployment is updated
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    pub(crate) rollouts: u32,
    /// Requests a second, each with a connection of its own
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=20_000))]
    pub(crate) rate: u32,
    /// How the reference's service proxy leads packets
    #[arg(long, default_value = "nftables")]
    pub(crate) mode: String,
}

/// What pods need.
#[derive(Debug, Args)]
pub(crate) struct Images {
    /// OCI layouts: an image with a shell
    #[arg(long)]
    pub(crate) busybox: PathBuf,
    /// The reference's sandbox image
    #[arg(long)]
    pub(crate) pause: PathBuf,
}

/// What all parts need.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// The program under test
    #[arg(long)]
    pub(crate) orlop: PathBuf,
    /// A directory with the programs that are measured beside it; only if they have a turn
    #[arg(long)]
    reference: Option<PathBuf>,
    /// How the reference is called in the report
    #[arg(long)]
    pub(crate) reference_name: String,
    /// Only these sides
    #[arg(long, value_enum, default_values = ["orlop", "reference"])]
    pub(crate) side: Vec<SideName>,
    /// How often each side has its turn
    #[arg(long, default_value_t = 1)]
    pub(crate) rounds: usize,
    /// Where to write the report as Markdown
    #[arg(long)]
    pub(crate) markdown: Option<PathBuf>,
    /// Set by this program for its run inside the namespaces: the directory of the run
    #[arg(long, hide = true)]
    pub(crate) inside: Option<PathBuf>,
}

impl Common {
    /// The directory of the reference's programs.
    pub(crate) fn reference(&self) -> anyhow::Result<&Path> {
        self.reference.as_deref().context("the reference has a turn: where are its programs (--reference)?")
    }
}

impl Arguments {
    pub(crate) fn common(&self) -> &Common {
        match &self.work {
            Work::Runtime(arguments) => &arguments.common,
            Work::Node(arguments) => &arguments.common,
            Work::Proxy(arguments) => &arguments.common,
            Work::Rollout(arguments) => &arguments.common,
        }
    }

    /// The images of pods, where there are pods.
    pub(crate) fn images(&self) -> Option<&Images> {
        match &self.work {
            Work::Runtime(arguments) => Some(&arguments.images),
            Work::Node(arguments) => Some(&arguments.images),
            Work::Rollout(arguments) => Some(&arguments.images),
            Work::Proxy(_) => None,
        }
    }
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SideName {
    /// The program of this workspace
    Orlop,
    /// containerd with runc and the CNI bridge, under upstream's kubelet where nodes are measured; upstream's kube-proxy
    Reference,
}

impl SideName {
    /// As on the command line.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Orlop => "orlop",
            Self::Reference => "reference",
        }
    }
}

/// A part of a runtime's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Section {
    /// Starting one pod after the other
    Pod,
    /// Running a program in a container
    Exec,
    /// Stopping and removing one pod after the other
    Stop,
    /// 100 pods at once, and what they cost in memory
    Many,
    /// What 100 pods cost in CPU time while nothing happens
    Idle,
    /// Pulling and unpacking an image
    Pull,
    /// A container that logs as fast as it can, also while the daemon is stopped
    Log,
    /// A container by the command line of the OCI runtime alone
    Bundle,
}

/// A part of a node's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum NodeSection {
    /// Creating and deleting one pod after the other
    Pod,
    /// 100 pods at once, and what they cost in memory
    Many,
    /// What 100 pods cost in CPU time while nothing happens
    Idle,
    /// An edited ConfigMap on its way into pods
    Config,
}

/// By what means a service proxy leads packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ProxyMode {
    /// nftables
    Nftables,
    /// iptables, in the kernel's nftables
    IptablesNft,
    /// iptables, in the kernel's own tables
    IptablesLegacy,
    /// IPVS
    Ipvs,
    /// Connections are carried by the proxy itself; upstream's has none any more
    Userspace,
}

impl ProxyMode {
    /// As on the command line.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::IptablesNft => "iptables-nft",
            Self::IptablesLegacy => "iptables-legacy",
            Self::Ipvs => "ipvs",
            Self::Userspace => "userspace",
        }
    }

    /// As a KubeProxyConfiguration has it.
    pub(crate) fn configured(self) -> &'static str {
        match self {
            Self::IptablesNft | Self::IptablesLegacy => "iptables",
            other => other.word(),
        }
    }
}
