//! The node that the suite grades: orlop's, half of it with upstream's other half, or all of upstream's as the measure.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use testkit::control_plane::ControlPlane;
use testkit::daemon::Daemon;
use testkit::{containerd, groups, upstream};

use super::left;
use super::machine::Machine;
use crate::voyage::keepers_in;

/// How long it may take to end; pods go on.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// Where upstream's kubelet has to find a runtime that it shall ask whose a control group is, for its metrics.
const KNOWN_SOCKET: &str = "/run/containerd/containerd.sock";

/// Whose node.
#[derive(Debug, Clone)]
pub(super) enum Kind {
    /// Of this program.
    Orlop(PathBuf),
    /// Of the programs in this directory: containerd, kubelet, kube-proxy and what belongs to them.
    Upstream { programs: PathBuf, proxy: Proxy },
    /// The kubelet and the kube-proxy of this directory, on the runtime of this program.
    UpstreamKubelet { programs: PathBuf, orlop: PathBuf },
    /// The other way round: kubelet and service proxy of this program, on the containerd of this directory.
    UpstreamRuntime { programs: PathBuf, orlop: PathBuf },
}

impl Kind {
    /// Whether it writes to places that are in no configuration.
    pub(super) fn needs_cover(&self) -> bool {
        !matches!(self, Self::Orlop(_))
    }
}

/// The service proxy of a node of upstream.
#[derive(Debug, Clone)]
pub(super) struct Proxy {
    /// It is orlop's, of this program.
    pub(super) program: Option<PathBuf>,
    pub(super) mode: String,
}

/// A node's daemons.
pub(super) struct Node {
    pub(super) name: String,
    kind: Kind,
    /// In the order in which they start.
    daemons: Vec<Daemon>,
    dir: PathBuf,
}

impl Node {
    /// Prepares everything, with what it writes in `dir`; nothing runs yet.
    pub(super) fn new(
        kind: &Kind,
        machine: &Machine,
        plane: &ControlPlane,
        dir: &Path,
        output: &Path,
    ) -> anyhow::Result<Self> {
        let place = Place { machine, plane, dir };
        let invocations = match kind {
            Kind::Orlop(program) => vec![(program.clone(), place.orlop_arguments("")?)],
            Kind::Upstream { programs, proxy } => place.upstream_daemons(programs, proxy)?,
            Kind::UpstreamKubelet { programs, orlop } => place.upstream_kubelet(programs, orlop)?,
            Kind::UpstreamRuntime { programs, orlop } => place.upstream_runtime(programs, orlop)?,
        };
        let daemon = |(program, arguments): upstream::Invocation| {
            let log = format!("{}.{}.log", machine.name, program.file_name().unwrap_or_default().display());
            Daemon::new(&machine.nursery, &program, arguments, output.join(log))
        };
        let daemons = invocations.into_iter().map(daemon).collect();
        Ok(Self { name: machine.name.clone(), kind: kind.clone(), daemons, dir: dir.to_owned() })
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
            Kind::Orlop(_) | Kind::UpstreamRuntime { .. } => self.dir.join("state/kubelet"),
            Kind::Upstream { .. } | Kind::UpstreamKubelet { .. } => "/var/lib/kubelet".into(),
        }
    }

    /// Ends it; its pods are `removed`, or it removes them.
    pub(super) fn end(&mut self, removed: bool) -> anyhow::Result<()> {
        let orlop = match &self.kind {
            Kind::Orlop(program) => Some(program.clone()),
            Kind::Upstream { .. } => None,
            Kind::UpstreamKubelet { .. } => return self.end_runtime(removed),
            Kind::UpstreamRuntime { orlop, .. } => return self.end_kubelet(&orlop.clone(), removed),
        };
        let left = orlop.as_deref().filter(|_| removed).map_or(Ok(()), |orlop| left::nothing(orlop, &self.dir));
        self.daemons.iter_mut().rev().try_for_each(|daemon| daemon.stop(STOP_LIMIT))?;
        if let Some(orlop) = orlop.filter(|_| !removed || left.is_err()) {
            left::remove(&orlop, &self.dir)?;
        }
        left
    }
}

impl Node {
    /// What it has not removed ends with the namespaces around it.
    fn end_kubelet(&mut self, orlop: &Path, removed: bool) -> anyhow::Result<()> {
        let left = if removed { left::nothing(orlop, &self.dir) } else { Ok(()) };
        self.daemons.iter_mut().rev().try_for_each(|daemon| daemon.stop(STOP_LIMIT))?;
        left
    }

    /// The records of pods that have ended stay until the kubelet removes them, once a minute; their processes do not.
    fn end_runtime(&mut self, removed: bool) -> anyhow::Result<()> {
        let keepers = keepers_in(&self.dir)?;
        self.daemons.iter_mut().rev().try_for_each(|daemon| daemon.stop(STOP_LIMIT))?;
        ensure!(!removed || keepers.is_empty(), "the pods have been removed, and these keepers are left: {keepers:?}");
        Ok(())
    }
}

/// What a node is made from.
struct Place<'a> {
    machine: &'a Machine,
    plane: &'a ControlPlane,
    dir: &'a Path,
}

impl Place<'_> {
    /// `more` is added to its configuration.
    fn orlop_arguments(&self, more: &str) -> anyhow::Result<Vec<String>> {
        let Self { machine, plane, dir } = self;
        let config = dir.join("kubelet.yaml");
        std::fs::write(&config, self.configuration()? + more)?;
        let file = |flag: &str, path: &Path| format!("--{flag}={}", path.display());
        let flags = [
            "node".to_owned(),
            file("kubeconfig", &plane.node_kubeconfig(&machine.name)?),
            file("proxy-kubeconfig", &plane.proxy_kubeconfig()?),
            file("config", &config),
            file("registry-config-dir", &self.registries()?),
            format!("--service-cidr={}", plane.options().service_range),
            format!("--pod-cidr={}", machine.pods),
            format!("--cluster-cidr={}", machine.all_pods),
            format!("--hostname-override={}", machine.name),
            format!("--node-ip={}", machine.addresses),
            "--log-level=info".to_owned(),
        ];
        Ok(flags.into_iter().chain(left::places(dir)).collect())
    }

    fn upstream_daemons(&self, programs: &Path, proxy: &Proxy) -> anyhow::Result<Vec<upstream::Invocation>> {
        self.registries()?;
        self.with_node(programs, proxy, |node| node.daemons())
    }

    /// The socket is where containerd's is as a rule: who starts orlop so needs to tell the kubelet nothing else.
    fn upstream_kubelet(&self, programs: &Path, orlop: &Path) -> anyhow::Result<Vec<upstream::Invocation>> {
        upstream::spare_the_kernel(self.dir)?;
        let runtime = (orlop.to_owned(), self.runtime_arguments()?);
        let kubelet = |node: &upstream::Node<'_>| node.kubelet(Path::new(KNOWN_SOCKET));
        let proxy = Proxy { program: None, mode: "iptables".to_owned() };
        self.with_node(programs, &proxy, |node| Ok(vec![runtime, kubelet(node)?]))
    }

    /// containerd has a directory of its own, since both have one that is called `state`.
    fn upstream_runtime(&self, programs: &Path, orlop: &Path) -> anyhow::Result<Vec<upstream::Invocation>> {
        let scratch = self.dir.join("containerd");
        std::fs::create_dir(&scratch)?;
        let socket = scratch.join("cri.sock");
        let endpoint = format!("containerRuntimeEndpoint: unix://{}\n", socket.display());
        let kubelet = (orlop.to_owned(), self.orlop_arguments(&endpoint)?);
        symlink(self.dir.join("certs.d"), scratch.join("certs.d")).context("link the registries")?;
        let runtime = containerd::prepare(programs, &scratch, &socket, &self.network())?;
        Ok(vec![(containerd::program(programs)?, runtime.into()), kubelet])
    }

    fn network(&self) -> containerd::Network<'_> {
        let Machine { pods, all_pods, .. } = self.machine;
        containerd::Network { pods, masquerade: pods == all_pods }
    }

    fn runtime_arguments(&self) -> anyhow::Result<Vec<String>> {
        let Self { machine, dir, .. } = self;
        let flags = [
            "runtime".to_owned(),
            format!("--listen=unix://{KNOWN_SOCKET}"),
            format!("--registry-config-dir={}", self.registries()?.display()),
            format!("--cni-conf-dir={}", dir.join("cni").display()),
            format!("--pod-cidr={}", machine.pods),
            format!("--cluster-cidr={}", machine.all_pods),
            "--log-level=info".to_owned(),
        ];
        Ok(flags.into_iter().chain(left::places(dir)).collect())
    }

    /// What `make` makes of upstream's node, and its service proxy.
    fn with_node(
        &self,
        programs: &Path,
        proxy: &Proxy,
        make: impl FnOnce(&upstream::Node<'_>) -> anyhow::Result<Vec<upstream::Invocation>>,
    ) -> anyhow::Result<Vec<upstream::Invocation>> {
        let Self { machine, plane, dir } = self;
        let node = upstream::Node {
            programs,
            scratch: dir,
            name: &machine.name,
            address: &machine.addresses,
            network: self.network(),
            kubeconfig: &plane.node_kubeconfig(&machine.name)?,
            configuration: &self.configuration()?,
        };
        let mut daemons = make(&node)?;
        daemons.push(self.service_proxy(&node, proxy)?);
        Ok(daemons)
    }

    fn service_proxy(&self, node: &upstream::Node<'_>, proxy: &Proxy) -> anyhow::Result<upstream::Invocation> {
        let (kubeconfig, pods) = (self.plane.proxy_kubeconfig()?, self.machine.all_pods);
        let Some(program) = &proxy.program else { return node.proxy(&kubeconfig, &proxy.mode, pods) };
        let place = |place: &str| format!("--{place}-dir={}", self.dir.join(format!("proxy-{place}")).display());
        let own = ["proxy".to_owned(), place("state"), place("run")];
        let arguments = node.proxy_arguments(&kubeconfig, &proxy.mode, pods);
        Ok((program.clone(), own.into_iter().chain(arguments).collect()))
    }

    /// Groups of its own for each node, since all of them are on one machine.
    fn configuration(&self) -> anyhow::Result<String> {
        let run = self.dir.parent().and_then(Path::file_name).context("the run has a name")?;
        groups::make(&Path::new(run).join(&self.machine.name))?;
        let group = Path::new("/").join(run).join(&self.machine.name);
        Ok(format!("{}cgroupRoot: {}\n", self.plane.kubelet_configuration()?, group.display()))
    }

    /// The directory that says where registries are, which all nodes of the run share.
    fn registries(&self) -> anyhow::Result<PathBuf> {
        let shared = self.dir.with_file_name("certs.d");
        symlink(&shared, self.dir.join("certs.d")).context("link the registries")?;
        Ok(shared)
    }
}
