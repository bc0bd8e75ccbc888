//! `bench`: builds both sides and their images, then hands over to the program of crate `bench`.

use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, bail};
use testkit::go;
use testkit::host::{self, Tool};

use crate::workspace::build_release_of;
use crate::{images, workspace};

/// What to measure. Without options: everything, on both sides.
#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(subcommand)]
    only: Option<Only>,
    /// Only this side: orlop or reference
    #[arg(long)]
    side: Option<String>,
    /// Only this section: pod, exec, stop, many, idle or pull; may be given several times
    #[arg(long)]
    section: Vec<String>,
    /// How often each side has its turn
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Also write the report into this file, relative to the workspace
    #[arg(long)]
    markdown: Option<PathBuf>,
}

/// Measurements apart from the container runtime.
#[derive(clap::Subcommand)]
enum Only {
    /// How long the rules of Services take: all of them at a start, and one change among many
    Services {
        /// How many Services
        #[arg(default_value_t = 10_000)]
        services: u32,
        /// How many endpoints each of them has
        #[arg(default_value_t = 10)]
        endpoints: u32,
    },
}

/// What the benchmark needs on the host beside what building needs.
const TOOLS: &[Tool] = &[
    Tool { program: "ip", deb: "iproute2", rpm: "iproute" },
    Tool::new("nft", "nftables"),
    Tool { program: "unshare", deb: "util-linux", rpm: "util-linux" },
    Tool { program: "gcc", deb: "gcc", rpm: "gcc" },
    testkit::registry::TOOL,
];

/// Prepares, and becomes the benchmark.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the benchmark makes namespaces, control groups and mounts: run it as root");
    }
    if let Some(Only::Services { services, endpoints }) = options.only {
        let numbers = [services, endpoints].map(|number| number.to_string());
        let load = ["run", "--release", "--quiet", "-p", "proxy", "--example", "load", "--"];
        return workspace::run(workspace::cargo(&load).args(numbers));
    }
    host::install(TOOLS)?;
    host::install(images::TOOLS)?;
    let programs = build_release_of(&["bench", "orlop"])?;
    let [bench, orlop] = &programs[..] else { bail!("cargo has built something else") };
    let mut command = Command::new(bench);
    command.arg("--orlop").arg(orlop);
    command
        .arg("--reference")
        .arg(go::build_all("reference", go::REFERENCE)?)
        .args(["--reference-name", &go::reference_name()]);
    let layouts = [("--busybox", images::busybox()?), ("--pause", images::pause()?), ("--large", images::large()?)];
    for (flag, layout) in layouts {
        command.arg(flag).arg(layout.dir());
    }
    command.args(options.side.iter().flat_map(|side| ["--side", side]));
    command.args(options.section.iter().flat_map(|section| ["--section", section]));
    command.args(["--rounds", &options.rounds.to_string()]);
    if let Some(file) = &options.markdown {
        command.arg("--markdown").arg(workspace::root().join(file));
    }
    // No process of ours stands in between: the benchmark deals with Ctrl-C itself.
    Err(command.exec()).with_context(|| format!("start {}", bench.display()))
}
