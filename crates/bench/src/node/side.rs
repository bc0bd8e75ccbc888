//! The two sides: how the daemons of each are started.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use sys::cgroup::Hierarchy;
use testkit::api::Api;
use testkit::control_plane::ControlPlane;
use testkit::daemon::{Daemon, Nursery};

use crate::arguments::{Common, SideName};
use crate::processes::Crew;
use testkit::{containerd, upstream};

use super::{ADDRESS, NODE};

/// How long a daemon may take until it is ready.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long one may take to end.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// Upstream's default of `maxPods`.
const PODS_MAX: usize = 110;
/// Where pods have their addresses.
const POD_RANGE: &str = "10.88.0.0/16";

/// What a side is made from.
pub(super) struct Place<'a> {
    pub(super) arguments: &'a Common,
    pub(super) plane: &'a ControlPlane,
    /// Everything is written below it.
    pub(super) scratch: &'a Path,
    /// How many pods there will be at once.
    pub(super) pods: usize,
    /// How the node's service proxy leads packets; there is none without it, but orlop's.
    pub(super) proxy: Option<&'a str>,
}

/// The daemons of a node.
pub(super) struct Side {
    crew: Crew,
    /// In the order in which they start.
    daemons: Vec<Daemon>,
    /// Where the last but one serves the last.
    socket: PathBuf,
}

impl Side {
    /// Prepares everything; nothing runs yet.
    pub(super) fn new(name: SideName, place: &Place<'_>) -> anyhow::Result<Self> {
        make_groups(place)?;
        let nursery = Arc::new(Nursery::new());
        let daemon = |program: &Path, arguments: Vec<String>| {
            let name = program.file_name().unwrap_or_default().to_string_lossy();
            Daemon::new(&nursery, program, arguments, place.scratch.join(format!("{name}.log")))
        };
        let programs = match name {
            SideName::Orlop => vec![(place.arguments.orlop.clone(), place.orlop()?)],
            SideName::Reference => place.reference()?,
        };
        let files: Vec<PathBuf> = programs.iter().map(|(program, _)| program.clone()).collect();
        let crew = Crew::new(&files)?;
        let daemons = programs.into_iter().map(|(program, arguments)| daemon(&program, arguments)).collect();
        Ok(Self { crew, daemons, socket: place.scratch.join("cri.sock") })
    }

    /// Starts the daemons and waits until the node is Ready.
    pub(super) fn start(&mut self, api: &Api) -> anyhow::Result<()> {
        let (last, before) = self.daemons.split_last_mut().context("a node has a daemon")?;
        before.iter_mut().try_for_each(Daemon::start)?;
        if let Some(runtime) = before.last_mut() {
            // The kubelet ends when its runtime does not answer at once.
            runtime.wait_ready(PATIENCE, || UnixStream::connect(&self.socket).is_ok())?;
        }
        last.start()?;
        last.wait_ready(PATIENCE, || is_ready(api))
    }

    pub(super) fn crew(&self) -> &Crew {
        &self.crew
    }

    /// Ends the daemons, the last first.
    pub(super) fn stop(mut self) -> anyhow::Result<()> {
        self.daemons.iter_mut().rev().try_for_each(|daemon| daemon.stop(STOP_LIMIT))
    }

    /// The ends of their logs.
    pub(super) fn log_ends(&self) -> String {
        self.daemons.iter().map(Daemon::log_end).collect::<Vec<_>>().join("\n")
    }
}

fn is_ready(api: &Api) -> bool {
    let Ok(node) = api.get(&format!("/api/v1/nodes/{NODE}")) else { return false };
    let conditions = node["status"]["conditions"].as_array().map(Vec::as_slice).unwrap_or_default();
    conditions.iter().any(|one| one["type"] == "Ready" && one["status"] == "True")
}

/// Makes the group of this run, in which the node makes those of its pods: by the paths of this process's own groups, as
/// orlop understands the name, and by those from the top, as upstream does. Whoever removes them looks for the name.
fn make_groups(place: &Place<'_>) -> anyhow::Result<()> {
    let own = std::fs::read_to_string("/proc/self/cgroup")?;
    let top = place.scratch.join("groups");
    let lines = own.lines().filter_map(|line| line.rsplit_once(':'));
    std::fs::write(&top, lines.map(|(controllers, _)| format!("{controllers}:/\n")).collect::<String>())?;
    for groups in [Path::new("/proc/self/cgroup"), &top] {
        Hierarchy::at(Path::new("/sys/fs/cgroup"), groups)?.group(place.name()?).create()?;
    }
    Ok(())
}

impl Place<'_> {
    /// The name of the run.
    fn name(&self) -> anyhow::Result<&str> {
        self.scratch.file_name().and_then(|name| name.to_str()).context("the run has a name")
    }

    fn path(&self, name: &str) -> String {
        self.scratch.join(name).display().to_string()
    }

    fn orlop(&self) -> anyhow::Result<Vec<String>> {
        let mut arguments = vec!["node".to_owned()];
        for (flag, name) in [
            ("--state-dir", "state"),
            ("--run-dir", "run"),
            ("--registry-config-dir", "certs.d"),
            ("--cni-conf-dir", "no-cni"),
        ] {
            arguments.extend([flag.to_owned(), self.path(name)]);
        }
        arguments.extend(self.kubelet_flags(&self.configuration()?)?);
        arguments.extend(["--pod-cidr".to_owned(), POD_RANGE.to_owned()]);
        if self.proxy.is_some() {
            let kubeconfig = self.plane.proxy_kubeconfig()?;
            arguments.push(format!("--proxy-kubeconfig={}", kubeconfig.display()));
            arguments.push(format!("--service-cidr={}", self.plane.options().service_range));
            arguments.push(format!("--cluster-cidr={POD_RANGE}"));
        }
        Ok(arguments)
    }

    /// containerd, the kubelet, and kube-proxy where it is wanted.
    fn reference(&self) -> anyhow::Result<Vec<(PathBuf, Vec<String>)>> {
        let node = upstream::Node {
            programs: self.arguments.reference()?,
            scratch: self.scratch,
            name: NODE,
            address: &ADDRESS.to_string(),
            kubeconfig: &self.plane.node_kubeconfig(NODE)?,
            network: containerd::Network::ALONE,
            configuration: &self.configuration()?,
        };
        let mut daemons = node.daemons()?;
        if let Some(mode) = self.proxy {
            // Before the kubelet: the last one is who makes the node Ready.
            daemons.insert(0, node.proxy(&self.plane.proxy_kubeconfig()?, mode, POD_RANGE)?);
        }
        Ok(daemons)
    }

    /// A KubeletConfiguration that both sides understand.
    fn configuration(&self) -> anyhow::Result<String> {
        let pods = self.pods.max(PODS_MAX);
        Ok(format!("{}cgroupRoot: /{}\nmaxPods: {pods}\n", self.plane.kubelet_configuration()?, self.name()?))
    }

    fn kubelet_flags(&self, configuration: &str) -> anyhow::Result<Vec<String>> {
        let file = self.scratch.join("kubelet.yaml");
        std::fs::write(&file, configuration)?;
        let pairs = [
            ("--kubeconfig", self.plane.node_kubeconfig(NODE)?.display().to_string()),
            ("--config", file.display().to_string()),
            ("--hostname-override", NODE.to_owned()),
            ("--node-ip", ADDRESS.to_string()),
            ("--cert-dir", self.path("pki")),
        ];
        Ok(pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect())
    }
}
