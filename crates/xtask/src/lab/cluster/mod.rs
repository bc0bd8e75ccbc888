//! A control plane to work with: it lives in a network namespace of its own and ends with the command that started it.
//!
//! ```text
//! up ──► lock ─► private network namespace ─► control plane ─► waits for Ctrl-C or down
//!          ▲                ▲
//! down ────┘  shell ────────┘  (both find the first by the lock file, which names its process)
//! ```

mod claim;
mod detach;

use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use testkit::control_plane::{self, ControlPlane, Options, Part};
use testkit::host::{self, Tool};
use testkit::registry::Registry;
use testkit::suite::{self, Image};
use testkit::{go, netns};
use tokio::signal::unix::{SignalKind, signal};

use claim::{Claim, Running};

/// Which lab, and what to do with it.
#[derive(clap::Args)]
pub(crate) struct Cluster {
    #[command(subcommand)]
    command: Command,
    /// Where the lab keeps everything while it runs; each directory is a lab of its own
    #[arg(long, global = true, default_value = DIR)]
    dir: PathBuf,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Start etcd, kube-apiserver, kube-controller-manager and kube-scheduler; Ctrl-C ends them
    Up(Up),
    /// Run a shell, or the command after --, inside: kubectl is in its PATH and has all rights
    Shell {
        /// What to run instead of a shell
        #[arg(last = true, value_name = "COMMAND")]
        command: Vec<String>,
    },
    /// End what `up` has started
    Down,
}

/// How to start it.
#[derive(clap::Args)]
struct Up {
    /// Return when it is up, and leave it running
    #[arg(long)]
    detach: bool,
    /// The second run of a detached one.
    #[arg(long, hide = true)]
    detached: bool,
    /// Answer the cluster's names by CoreDNS, too
    #[arg(long)]
    dns: bool,
    /// Serve the images of the suites under their real names: a few, or all
    #[arg(long, value_name = "WHICH")]
    images: Option<Images>,
    /// A node to make a kubeconfig for; may be given several times
    #[arg(long, value_name = "NAME", default_value = "node-1")]
    node: Vec<String>,
    /// A flag for a program, as kube-apiserver=--v=4; may be given several times
    #[arg(long, value_name = "PROGRAM=FLAG", value_parser = parse_flag)]
    flag: Vec<(Part, String)>,
}

/// Which images.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Images {
    /// busybox, pause, agnhost, nginx
    Basic,
    /// What critest and Kubernetes' conformance tests pull
    All,
}

impl Images {
    fn list(self) -> &'static [Image] {
        match self {
            Self::Basic => suite::BASIC,
            Self::All => suite::ALL,
        }
    }
}

/// A running lab; the fields end in this order.
struct Lab {
    _registry: Option<Registry>,
    plane: ControlPlane,
}

/// Where the registry listens at the lab's address.
const REGISTRY_PORT: u16 = 5000;

/// The lab's one address in its namespace, from the range that RFC 2544 sets aside for measurements.
const ADDRESS: [u8; 4] = [198, 18, 0, 1];

/// The directory of the lab that needs no name.
const DIR: &str = "/run/orlop-lab/cluster";

/// Where the `hosts.toml` files lie that lead to the lab's registry.
const HOSTS: &str = "certs.d";

/// The command line with which kubeadm makes a machine a node.
const JOIN: &str = "join.sh";

/// How long ending may take.
const END_LIMIT: Duration = Duration::from_secs(60);

const TOOLS: &[Tool] = &[Tool { program: "ip", deb: "iproute2", rpm: "iproute" }, testkit::registry::TOOL];

/// The command.
pub(crate) fn run(Cluster { command, dir }: &Cluster) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the lab makes a network namespace: run it as root");
    }
    let dir = &std::path::absolute(dir)?;
    match command {
        Command::Up(options) => up(options, dir),
        Command::Shell { command } => shell(command, dir),
        Command::Down => down(dir),
    }
}

fn up(options: &Up, dir: &Path) -> anyhow::Result<()> {
    host::install(TOOLS)?;
    let more = if options.dns { &[go::KUBEADM, go::COREDNS][..] } else { &[go::KUBEADM] };
    let programs = control_plane::build_with(more)?;
    if let Some(images) = options.images {
        suite::build(images.list())?;
    }
    if options.detach && !options.detached {
        detach::run(&dir.with_extension("log"))?;
        println!("{}", guide(options, dir));
        return Ok(());
    }
    if options.detached {
        detach::begin()?;
    }
    let claim = Claim::take(dir)?;
    let begun = Instant::now();
    let outcome = start(options, &programs, dir).and_then(|lab| {
        println!("control plane up after {:.1} s", begun.elapsed().as_secs_f32());
        until_told(lab, || {
            if options.detached {
                return detach::tell();
            }
            println!("{}", guide(options, dir));
            Ok(())
        })
    });
    std::fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))?;
    drop(claim);
    outcome
}

/// Enters a private network and starts everything in it.
fn start(options: &Up, programs: &Path, dir: &Path) -> anyhow::Result<Lab> {
    symlink(programs, dir.join("bin"))?;
    netns::enter_private()?;
    netns::add_address(ADDRESS.into())?;
    let cluster = Options { address: ADDRESS.into(), extra: options.flag.clone(), ..Options::default() };
    let mut plane = ControlPlane::start(programs, dir, cluster)?;
    plane.run(Part::ControllerManager)?;
    plane.run(Part::Scheduler)?;
    if options.dns {
        plane.run(Part::Dns)?;
    }
    plane.admin_kubeconfig()?;
    plane.bootstrap_kubeconfig()?;
    std::fs::write(dir.join(JOIN), format!("kubeadm join {}\n", plane.prepare_join()?.arguments().join(" ")))?;
    plane.proxy_kubeconfig()?;
    for node in &options.node {
        plane.node_kubeconfig(node)?;
    }
    let registry = options.images.map(|images| serve(images, &plane, dir)).transpose()?;
    Ok(Lab { _registry: registry, plane })
}

/// Starts a registry with `images` in the lab's network.
fn serve(images: Images, plane: &ControlPlane, dir: &Path) -> anyhow::Result<Registry> {
    let address = (ADDRESS, REGISTRY_PORT).into();
    let registry = Registry::start_in(plane.nursery(), address, &dir.join("registry"))?;
    suite::publish(images.list(), &registry)?;
    suite::write_hosts(&dir.join(HOSTS), address)?;
    Ok(registry)
}

/// Waits for a signal to end, or for a program that ends by itself. What `begin` tells is true: signals are heard by then.
fn until_told(mut lab: Lab, begin: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut child = signal(SignalKind::child())?;
        begin()?;
        loop {
            lab.plane.check()?;
            tokio::select! {
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
                _ = hangup.recv() => break,
                _ = child.recv() => {}
            }
        }
        println!("ending the control plane");
        Ok(())
    })
}

/// What there is and what can be done with it.
fn guide(options: &Up, dir: &Path) -> String {
    let at = |name: &str| dir.join(name).display().to_string();
    let nodes: Vec<String> = options.node.iter().map(|node| at(&format!("node-{node}.kubeconfig"))).collect();
    let mut places = vec![
        ("all rights", at("admin.kubeconfig")),
        ("nodes", nodes.join(" ")),
        ("bootstrap", at("bootstrap.kubeconfig")),
        ("joining", at(JOIN)),
        ("proxy", at("kube-proxy.kubeconfig")),
        ("logs", at("logs/")),
    ];
    if options.images.is_some() {
        places.push(("images", format!("{} (ORLOP_REGISTRY_CONFIG_DIR, set in the shell)", at(HOSTS))));
    }
    let mut text = "\nIt is inside a network namespace of its own; nothing outside reaches it, and it reaches nothing \
                    outside.\n\n"
        .to_owned();
    for (what, place) in places {
        text += &format!("  {what:<12}{place}\n");
    }
    text.push('\n');
    let commands = [
        ("shell", "a shell inside; kubectl is in its PATH"),
        ("shell -- kubectl get nodes", "one command"),
        ("down", if options.detach { "ends it" } else { "ends it, as Ctrl-C does here" }),
    ];
    let lines = commands.map(|(words, effect)| (command_line(dir, words), effect));
    let width = lines.iter().map(|(line, _)| line.len()).max().unwrap_or(0);
    for (line, effect) in lines {
        text += &format!("  {line:<width$}  {effect}\n");
    }
    text
}

/// How to do something else with the lab in `dir`.
fn command_line(dir: &Path, words: &str) -> String {
    let place = if dir == Path::new(DIR) { String::new() } else { format!("--dir {} ", dir.display()) };
    format!("cargo xtask lab cluster {place}{words}")
}

/// Becomes a shell or a command in the lab's network.
fn shell(command: &[String], dir: &Path) -> anyhow::Result<()> {
    let running = running(dir)?;
    let kubeconfig = dir.join("admin.kubeconfig");
    if !kubeconfig.exists() {
        bail!("the lab is still starting; its logs are in {}", dir.join("logs").display());
    }
    let namespace = std::fs::File::open(format!("/proc/{}/ns/net", running.pid)).context("open the lab's network")?;
    netns::enter(&namespace.into())?;
    let default = [std::env::var("SHELL").unwrap_or_else(|_| "/bin/sh".to_owned())];
    let words = if command.is_empty() { &default[..] } else { command };
    let [program, arguments @ ..] = words else { bail!("nothing to run") };
    let path = std::env::var_os("PATH").unwrap_or_default();
    let path = std::env::join_paths(std::iter::once(dir.join("bin")).chain(std::env::split_paths(&path)))?;
    let mut inside = process::Command::new(program);
    inside.args(arguments).env("PATH", path).env("KUBECONFIG", kubeconfig);
    if dir.join(HOSTS).exists() {
        inside.env("ORLOP_REGISTRY_CONFIG_DIR", dir.join(HOSTS));
    }
    Err(inside.exec()).with_context(|| format!("start {program}"))
}

fn down(dir: &Path) -> anyhow::Result<()> {
    running(dir)?.end(END_LIMIT)?;
    println!("the lab is down");
    Ok(())
}

fn running(dir: &Path) -> anyhow::Result<Running> {
    Running::find(dir)?.with_context(|| format!("the lab is not up; `{}` starts it", command_line(dir, "up")))
}

fn parse_flag(text: &str) -> Result<(Part, String), String> {
    let (program, flag) = text.split_once('=').ok_or("expected PROGRAM=FLAG")?;
    let part = Part::ALL.into_iter().find(|part| part.name() == program);
    let names = || Part::ALL.map(Part::name).join(", ");
    Ok((part.ok_or_else(|| format!("no program {program:?}; there are {}", names()))?, flag.to_owned()))
}
