//! `bench`: builds both sides and their images, then hands over to the program of crate `bench`.

use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};
use testkit::control_plane;
use testkit::go::{self, Program};
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
    /// Only this section: pod, exec, stop, many, idle, pull, log or bundle; may be given several times
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
    /// How long a node of a real API server takes, and what it costs: orlop, and kubelet with containerd
    Node(NodeOptions),
    /// How long a service proxy takes and what it costs: orlop proxy, and kube-proxy, before the same objects
    Proxy(ProxyOptions),
    /// How many requests a rolling update costs, without preStop hooks: orlop, and kubelet with containerd and kube-proxy
    Rollout(RolloutOptions),
    /// How long the rules of Services take: all of them at a start, and one change among many
    Services {
        /// How many Services
        #[arg(default_value_t = 10_000)]
        services: u32,
        /// How many endpoints each of them has
        #[arg(default_value_t = 10)]
        endpoints: u32,
        /// How rules are carried out: nftables, iptables-nft, iptables-legacy, or another mode of the proxy; may be given
        /// several times, and each has its turn
        #[arg(long, default_values = ["nftables", "iptables-nft", "iptables-legacy"])]
        mode: Vec<String>,
    },
}

/// What to measure of a node. Without options: everything, on both sides.
#[derive(clap::Args)]
struct NodeOptions {
    /// Only this side: orlop or reference
    #[arg(long)]
    side: Option<String>,
    /// Only this section: pod, many, idle or config; may be given several times
    #[arg(long)]
    section: Vec<String>,
    /// How often each side has its turn
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Pods that are created and deleted one after the other
    #[arg(long, default_value_t = 40)]
    pods: usize,
    /// Pods that are created at once
    #[arg(long, default_value_t = 100)]
    many: usize,
    /// Also write the report into this file, relative to the workspace
    #[arg(long)]
    markdown: Option<PathBuf>,
}

/// What to measure of a service proxy. Without options: 10,000 Services in nftables, on both sides.
#[derive(clap::Args)]
struct ProxyOptions {
    /// How many Services: 20 to 60,000
    #[arg(default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(20..=60_000))]
    services: u32,
    /// How many endpoints each of them has: 1 to 60
    #[arg(default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=60))]
    endpoints: u32,
    /// By what means packets are led, userspace by orlop alone and to at most 1,000 Services; may be given several times, and
    /// each has its turn
    #[arg(long, default_values = ["nftables"],
        value_parser = ["nftables", "iptables-nft", "iptables-legacy", "ipvs", "userspace"])]
    mode: Vec<String>,
    /// Only this side
    #[arg(long, value_parser = ["orlop", "reference"])]
    side: Option<String>,
    /// How often each side has its turn
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Services that are created and deleted one after the other
    #[arg(long, default_value_t = 20)]
    changes: u32,
    /// The longest that anything may take, in seconds
    #[arg(long, default_value_t = 600)]
    limit: u64,
    /// Also write the report into this file, relative to the workspace
    #[arg(long)]
    markdown: Option<PathBuf>,
}

/// What to measure of rolling updates. Without options: five of them under 1,000 requests a second, on both sides.
#[derive(clap::Args)]
struct RolloutOptions {
    /// How often the Deployment is updated
    #[arg(long, default_value_t = 5)]
    rollouts: u32,
    /// Requests a second
    #[arg(long, default_value_t = 1000)]
    rate: u32,
    /// How the reference's service proxy leads packets
    #[arg(long, default_value = "nftables", value_parser = ["nftables", "iptables"])]
    mode: String,
    /// Only this side
    #[arg(long, value_parser = ["orlop", "reference"])]
    side: Option<String>,
    /// How often each side has its turn
    #[arg(long, default_value_t = 1)]
    rounds: usize,
    /// Also write the report into this file, relative to the workspace
    #[arg(long)]
    markdown: Option<PathBuf>,
}

/// What all parts of the benchmark take.
struct Common<'a> {
    side: Option<&'a str>,
    section: &'a [String],
    rounds: usize,
    markdown: Option<&'a Path>,
}

/// What the benchmark needs on the host beside what building needs.
const TOOLS: &[Tool] = &[
    Tool { program: "ip", deb: "iproute2", rpm: "iproute" },
    Tool::new("nft", "nftables"),
    Tool { program: "unshare", deb: "util-linux", rpm: "util-linux" },
    Tool { program: "/bin/busybox", deb: "busybox-static", rpm: "busybox" },
];

/// What a node's pods need beside them.
const POD_TOOLS: &[Tool] = &[Tool { program: "gcc", deb: "gcc", rpm: "gcc" }, testkit::registry::TOOL];

/// Prepares, and becomes the benchmark.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the benchmark makes namespaces, control groups and mounts: run it as root");
    }
    match &options.only {
        Some(Only::Services { services, endpoints, mode }) => mode.iter().try_for_each(|mode| {
            // A process each: what the kernel is still tidying up for the one before ends with its network namespace.
            let load = ["run", "--release", "--quiet", "-p", "proxy", "--example", "load", "--"];
            workspace::run(workspace::cargo(&load).args([&services.to_string(), &endpoints.to_string(), mode]))
        }),
        Some(Only::Node(options)) => node(options),
        Some(Only::Proxy(options)) => proxy(options),
        Some(Only::Rollout(options)) => rollout(options),
        None => runtime(options),
    }
}

fn runtime(options: &Options) -> anyhow::Result<()> {
    let Options { side, section, rounds, markdown, .. } = options;
    let common = Common { side: side.as_deref(), section, rounds: *rounds, markdown: markdown.as_deref() };
    let mut command = prepared("runtime", &common, go::REFERENCE, &go::reference_name())?;
    with_images(&mut command)?;
    command.arg("--large").arg(images::large()?.dir());
    become_it(command)
}

fn node(options: &NodeOptions) -> anyhow::Result<()> {
    let NodeOptions { side, section, rounds, pods, many, markdown } = options;
    let common = Common { side: side.as_deref(), section, rounds: *rounds, markdown: markdown.as_deref() };
    let reference = [go::REFERENCE, &[go::KUBELET]].concat();
    let mut command = prepared("node", &common, &reference, &go::reference_node_name())?;
    with_images(&mut command)?;
    command.arg("--control-plane").arg(control_plane::build()?);
    command.args(["--pods", &pods.to_string(), "--many", &many.to_string()]);
    become_it(command)
}

fn proxy(options: &ProxyOptions) -> anyhow::Result<()> {
    let ProxyOptions { services, endpoints, mode, side, rounds, changes, limit, markdown } = options;
    let common = Common { side: side.as_deref(), section: &[], rounds: *rounds, markdown: markdown.as_deref() };
    let name = format!("kube-proxy {}", go::kubernetes_version());
    let mut command = prepared("proxy", &common, &[go::KUBE_PROXY], &name)?;
    command.arg("--control-plane").arg(control_plane::build()?);
    command.args(["--services", &services.to_string(), "--endpoints", &endpoints.to_string()]);
    command.args(["--changes", &changes.to_string(), "--limit", &limit.to_string()]);
    command.args(mode.iter().flat_map(|mode| ["--mode", mode]));
    become_it(command)
}

fn rollout(options: &RolloutOptions) -> anyhow::Result<()> {
    let RolloutOptions { rollouts, rate, mode, side, rounds, markdown } = options;
    let common = Common { side: side.as_deref(), section: &[], rounds: *rounds, markdown: markdown.as_deref() };
    let reference = [go::REFERENCE, go::REFERENCE_NODE].concat();
    let name = format!("{} + kube-proxy", go::reference_node_name());
    let mut command = prepared("rollout", &common, &reference, &name)?;
    with_images(&mut command)?;
    command.arg("--control-plane").arg(control_plane::build()?);
    command.args(["--rollouts", &rollouts.to_string(), "--rate", &rate.to_string(), "--mode", mode]);
    become_it(command)
}

/// The benchmark's program with what all its parts need; the reference is built if it has a turn.
fn prepared(part: &str, common: &Common<'_>, reference: &[Program], name: &str) -> anyhow::Result<Command> {
    host::install(TOOLS)?;
    let programs = build_release_of(&["bench", "orlop"])?;
    let [bench, orlop] = &programs[..] else { bail!("cargo has built something else") };
    let mut command = Command::new(bench);
    command.arg(part).arg("--orlop").arg(orlop).args(["--reference-name", name]);
    if common.side != Some("orlop") {
        command.arg("--reference").arg(go::build_all("reference", reference)?);
    }
    command.args(common.side.iter().flat_map(|side| ["--side", side]));
    command.args(common.section.iter().flat_map(|section| ["--section", section]));
    command.args(["--rounds", &common.rounds.to_string()]);
    if let Some(file) = common.markdown {
        command.arg("--markdown").arg(workspace::root().join(file));
    }
    Ok(command)
}

/// The images of pods.
fn with_images(command: &mut Command) -> anyhow::Result<()> {
    host::install(POD_TOOLS)?;
    host::install(images::TOOLS)?;
    command.arg("--busybox").arg(images::busybox()?.dir()).arg("--pause").arg(images::pause()?.dir());
    Ok(())
}

/// No process of ours stands in between: the benchmark deals with Ctrl-C itself.
fn become_it(mut command: Command) -> anyhow::Result<()> {
    Err(command.exec()).with_context(|| format!("start {}", command.get_program().display()))
}
