//! What `cargo xtask bench` passes.

use std::path::PathBuf;

use clap::{Parser, ValueEnum};

/// Measures container runtimes; started by `cargo xtask bench`.
#[derive(Debug, Parser)]
pub(crate) struct Arguments {
    /// The program under test
    #[arg(long)]
    pub(crate) orlop: PathBuf,
    /// A directory with containerd, its shim, runc and the CNI plugins
    #[arg(long)]
    pub(crate) reference: PathBuf,
    /// How the reference is called in the report
    #[arg(long)]
    pub(crate) reference_name: String,
    /// OCI layouts: an image with a shell
    #[arg(long)]
    pub(crate) busybox: PathBuf,
    /// The reference's sandbox image
    #[arg(long)]
    pub(crate) pause: PathBuf,
    /// The image whose pull is measured
    #[arg(long)]
    pub(crate) large: PathBuf,
    /// Only these sides
    #[arg(long, value_enum, default_values = ["orlop", "reference"])]
    pub(crate) side: Vec<SideName>,
    /// Only these sections
    #[arg(long, value_enum, default_values = ["pod", "exec", "stop", "many", "idle", "pull"])]
    pub(crate) section: Vec<Section>,
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

/// Whose turn it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SideName {
    /// The program of this workspace
    Orlop,
    /// containerd with runc and the CNI bridge
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

/// A part of the work.
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
}
