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
}

/// The container runtime's part.
#[derive(Debug, Args)]
pub(crate) struct RuntimeArguments {
    #[command(flatten)]
    pub(crate) common: Common,
    /// The OCI layout of the image whose pull is measured
    #[arg(long)]
    pub(crate) large: PathBuf,
    /// Only these sections
    #[arg(long, value_enum, default_values = ["pod", "exec", "stop", "many", "idle", "pull", "bundle"])]
    pub(crate) section: Vec<Section>,
}

/// The node's part.
#[derive(Debug, Args)]
pub(crate) struct NodeArguments {
    #[command(flatten)]
    pub(crate) common: Common,
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

/// What both parts need.
#[derive(Debug, Args)]
pub(crate) struct Common {
    /// The program under test
    #[arg(long)]
    pub(crate) orlop: PathBuf,
    /// A directory with containerd, its shim, runc, the CNI plugins, and for nodes the kubelet; only if it has a turn
    #[arg(long)]
    reference: Option<PathBuf>,
    /// How the reference is called in the report
    #[arg(long)]
    pub(crate) reference_name: String,
    /// OCI layouts: an image with a shell
    #[arg(long)]
    pub(crate) busybox: PathBuf,
    /// The reference's sandbox image
    #[arg(long)]
    pub(crate) pause: PathBuf,
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
        }
    }
}

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SideName {
    /// The program of this workspace
    Orlop,
    /// containerd with runc and the CNI bridge, under upstream's kubelet where nodes are measured
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
