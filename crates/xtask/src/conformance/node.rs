//! The node that the suite grades: orlop's, or upstream's as the measure.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use testkit::control_plane::ControlPlane;
use testkit::daemon::Daemon;
use testkit::{groups, host, upstream};

use super::cluster::ADDRESS;

/// The node's name.
pub(super) const NAME: &str = "node-1";
/// Where containerd's bridge gives addresses to pods.
const UPSTREAM_PODS: &str = "10.88.0.0/16";
/// How long it may take to end; pods go on.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// Whose node.
#[derive(Debug, Clone)]
pub(super) enum Kind {
    /// Of this program.
    Orlop(PathBuf),
    /// Of the programs in this directory: containerd, kubelet, kube-proxy and what belongs to them.
    Upstream(PathBuf),
}

/// A node's daemons.
pub(super) struct Node {
    kind: Kind,
    /// In the order in which they start.
    daemons: Vec<Daemon>,
    dir: PathBuf,
}

impl Node {
    /// Prepares everything; nothing runs yet.
    pub(super) fn new(kind: &Kind, plane: &ControlPlane, dir: &Path, output: &Path) -> anyhow::Result<Self> {
        let invocations = match kind {
            Kind::Orlop(program) => vec![(program.clone(), orlop_arguments(plane, dir)?)],
            Kind::Upstream(programs) => upstream_daemons(programs, plane, dir)?,
        };
        let daemon = |(program, arguments): upstream::Invocation| {
            let name = program.file_name().unwrap_or_default().to_string_lossy();
            Daemon::new(plane.nursery(), &program, arguments, output.join(format!("{name}.log")))
        };
        let daemons = invocations.into_iter().map(daemon).collect();
        Ok(Self { kind: kind.clone(), daemons, dir: dir.to_owned() })
    }

    /// Starts the daemons and waits until the node `is_ready`.
    pub(super) fn start(&mut self, limit: Duration, is_ready: impl FnMut() -> bool) -> anyhow::Result<()> {
        self.daemons.iter_mut().try_for_each(Daemon::start)?;
        self.daemons.last_mut().context("a node has a daemon")?.wait_ready(limit, is_ready)
    }

    /// Whether all daemons still run.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        self.daemons.iter_mut().try_for_each(Daemon::check)
    }

    /// Where it keeps what it prepares for pods.
    pub(super) fn kubelet_root(&self) -> PathBuf {
        match self.kind {
            Kind::Orlop(_) => self.dir.join("state/kubelet"),
            Kind::Upstream(_) => "/var/lib/kubelet".into(),
        }
    }

    /// Ends it after the pods were `removed`, or were not.
    pub(super) fn end(&mut self, removed: anyhow::Result<()>) -> anyhow::Result<()> {
        let orlop = match &self.kind {
            Kind::Orlop(program) => Some(program.clone()),
            Kind::Upstream(_) => None,
        };
        let removed = removed.and_then(|()| orlop.as_deref().map_or(Ok(()), |orlop| self.nothing_is_left(orlop)));
        self.daemons.iter_mut().rev().try_for_each(|daemon| daemon.stop(STOP_LIMIT))?;
        if let (Err(_), Some(orlop)) = (&removed, orlop) {
            self.remove_what_is_left(&orlop)?;
        }
        removed
    }

    fn nothing_is_left(&self, orlop: &Path) -> anyhow::Result<()> {
        let left = host::output(&mut self.command(orlop, &["fsck"]))?;
        let left = String::from_utf8_lossy(&left);
        ensure!(left.is_empty(), "this is left:\n{left}");
        Ok(())
    }

    /// A node alone, with nothing to run, removes the pods that it finds.
    fn remove_what_is_left(&self, orlop: &Path) -> anyhow::Result<()> {
        let nothing = self.dir.join("nothing");
        std::fs::create_dir_all(&nothing)?;
        host::run(self.command(orlop, &["up", "--detach"]).arg(nothing))?;
        host::run(&mut self.command(orlop, &["down"]))
    }

    fn command(&self, orlop: &Path, words: &[&str]) -> Command {
        let mut command = Command::new(orlop);
        command.args(words).args(places(&self.dir)).stdin(Stdio::null());
        command
    }
}

fn orlop_arguments(plane: &ControlPlane, dir: &Path) -> anyhow::Result<Vec<String>> {
    let config = dir.join("kubelet.yaml");
    std::fs::write(&config, plane.kubelet_configuration()?)?;
    let file = |flag: &str, path: &Path| format!("--{flag}={}", path.display());
    let flags = [
        "node".to_owned(),
        file("kubeconfig", &plane.node_kubeconfig(NAME)?),
        file("proxy-kubeconfig", &plane.proxy_kubeconfig()?),
        file("config", &config),
        file("registry-config-dir", &dir.join("certs.d")),
        format!("--service-cidr={}", plane.options().service_range),
        format!("--hostname-override={NAME}"),
        format!("--node-ip={ADDRESS}"),
        "--log-level=info".to_owned(),
    ];
    Ok(flags.into_iter().chain(places(dir)).collect())
}

/// Where orlop keeps its things.
fn places(dir: &Path) -> [String; 2] {
    ["state", "run"].map(|place| format!("--{place}-dir={}", dir.join(place).display()))
}

fn upstream_daemons(programs: &Path, plane: &ControlPlane, dir: &Path) -> anyhow::Result<Vec<upstream::Invocation>> {
    let name = dir.file_name().context("the run has a name")?;
    groups::make(name)?;
    let node = upstream::Node {
        programs,
        scratch: dir,
        name: NAME,
        address: &ADDRESS.to_string(),
        kubeconfig: &plane.node_kubeconfig(NAME)?,
        configuration: &format!("{}cgroupRoot: /{}\n", plane.kubelet_configuration()?, name.display()),
    };
    let mut daemons = node.daemons()?;
    daemons.push(node.proxy(&plane.proxy_kubeconfig()?, "iptables", UPSTREAM_PODS)?);
    Ok(daemons)
}
