//! What the suite runs against: a control plane, a registry with the suite's images, and one node of orlop.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use testkit::control_plane::{ControlPlane, Options, Part};
use testkit::daemon::Daemon;
use testkit::host::{self, Tool};
use testkit::registry::Registry;
use testkit::{netns, suite};

use crate::member::{condition, kubelet_configuration};

/// What it needs on the host beside what building needs.
pub(super) const TOOLS: &[Tool] = &[
    Tool { program: "ip", deb: "iproute2", rpm: "iproute" },
    Tool { program: "conntrack", deb: "conntrack", rpm: "conntrack-tools" },
    testkit::daemon::TOOL,
    testkit::registry::TOOL,
];

/// The node's name.
const NODE: &str = "node-1";
/// The address of node, API server and registry, inside the private network (RFC 5737).
const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Where the registry listens.
const REGISTRY_PORT: u16 = 5000;
/// How long the node may take to be Ready.
const READY_LIMIT: Duration = Duration::from_secs(60);
/// How long it may take to end; pods go on.
const STOP_LIMIT: Duration = Duration::from_secs(20);

/// All of it; fields end in this order.
pub(super) struct Cluster {
    orlop: PathBuf,
    node: Daemon,
    _registry: Registry,
    plane: ControlPlane,
    /// Where the control plane's logs are to be found afterwards.
    output: PathBuf,
    dir: tempfile::TempDir,
}

impl Cluster {
    /// Starts everything in a network namespace that the calling thread enters, and waits until the node is Ready.
    pub(super) fn start(orlop: &Path, programs: &Path, output: &Path) -> anyhow::Result<Self> {
        netns::enter_private()?;
        netns::add_address(IpAddr::V4(ADDRESS))?;
        let dir = tempfile::Builder::new().prefix("orlop-conformance-").tempdir()?;
        let options = Options { address: IpAddr::V4(ADDRESS), ..Options::default() };
        let mut plane = ControlPlane::start(programs, &dir.path().join("plane"), options)?;
        for part in [Part::ControllerManager, Part::Scheduler, Part::Dns] {
            plane.run(part)?;
        }
        let registry =
            Registry::start_in(plane.nursery(), (ADDRESS, REGISTRY_PORT).into(), &dir.path().join("registry"))?;
        suite::publish(suite::ALL, &registry)?;
        suite::write_hosts(&dir.path().join("certs.d"), registry.address())?;
        let flags = node_flags(&plane, dir.path())?;
        let node = Daemon::new(plane.nursery(), orlop, flags, output.join("orlop.log"));
        let output = output.to_owned();
        let mut cluster = Self { orlop: orlop.to_owned(), node, _registry: registry, plane, output, dir };
        cluster.start_node()?;
        Ok(cluster)
    }

    fn start_node(&mut self) -> anyhow::Result<()> {
        self.node.start()?;
        let api = self.plane.api();
        self.node.wait_ready(READY_LIMIT, || {
            let node = api.get(&format!("/api/v1/nodes/{NODE}"));
            node.is_ok_and(|node| condition(&node, "Ready") == Some("True"))
        })
    }

    /// Whether all programs still run.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        self.plane.check()?;
        self.node.check()
    }

    /// A kubeconfig with all rights.
    pub(super) fn admin_kubeconfig(&self) -> anyhow::Result<PathBuf> {
        self.plane.admin_kubeconfig()
    }

    /// Where the node keeps what it prepares for pods.
    pub(super) fn kubelet_root(&self) -> PathBuf {
        self.dir.path().join("state/kubelet")
    }

    /// Ends the node with all pods that are left, then the rest, and keeps the logs. What does not go is told.
    pub(super) fn end(mut self) {
        if let Err(error) = self.end_node() {
            println!("the node did not end cleanly: {error:#}");
        }
        let logs = self.dir.path().join("plane/logs");
        if let Err(error) = copy_files(&logs, &self.output) {
            println!("the control plane's logs are lost: {error:#}");
        }
    }

    fn end_node(&mut self) -> anyhow::Result<()> {
        let removed = self.remove_pods();
        self.node.stop(STOP_LIMIT)?;
        if removed.is_err() {
            self.remove_what_is_left()?;
        }
        removed
    }

    /// By the API server, while the node serves: an interrupted suite leaves pods behind.
    fn remove_pods(&self) -> anyhow::Result<()> {
        let words = ["delete", "pods", "--all", "--all-namespaces", "--grace-period=1", "--timeout=60s"];
        host::run(self.plane.kubectl()?.args(words))?;
        let left = host::output(&mut self.orlop(&["fsck"]))?;
        let left = String::from_utf8_lossy(&left);
        ensure!(left.is_empty(), "this is left:\n{left}");
        Ok(())
    }

    /// A node alone, with nothing to run, removes the pods that it finds.
    fn remove_what_is_left(&self) -> anyhow::Result<()> {
        let nothing = self.dir.path().join("nothing");
        std::fs::create_dir_all(&nothing)?;
        host::run(self.orlop(&["up", "--detach"]).arg(nothing))?;
        host::run(&mut self.orlop(&["down"]))
    }

    fn orlop(&self, words: &[&str]) -> Command {
        let mut orlop = Command::new(&self.orlop);
        orlop.args(words).args(places(self.dir.path())).stdin(Stdio::null());
        orlop
    }
}

fn node_flags(plane: &ControlPlane, dir: &Path) -> anyhow::Result<Vec<String>> {
    let config = dir.join("kubelet.yaml");
    std::fs::write(&config, kubelet_configuration(plane)?)?;
    let file = |flag: &str, path: &Path| format!("--{flag}={}", path.display());
    let flags = [
        "node".to_owned(),
        file("kubeconfig", &plane.node_kubeconfig(NODE)?),
        file("proxy-kubeconfig", &plane.proxy_kubeconfig()?),
        file("config", &config),
        file("registry-config-dir", &dir.join("certs.d")),
        format!("--service-cidr={}", plane.options().service_range),
        format!("--hostname-override={NODE}"),
        format!("--node-ip={ADDRESS}"),
        "--log-level=info".to_owned(),
    ];
    Ok(flags.into_iter().chain(places(dir)).collect())
}

/// Where the node keeps its things.
fn places(dir: &Path) -> [String; 2] {
    ["state", "run"].map(|place| format!("--{place}-dir={}", dir.join(place).display()))
}

fn copy_files(from: &Path, to: &Path) -> anyhow::Result<()> {
    for entry in from.read_dir().with_context(|| format!("list {}", from.display()))? {
        let entry = entry?;
        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}
