//! What the suite runs against: a control plane, a registry with the suite's images, and one node.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use testkit::control_plane::{ControlPlane, Options, Part};
use testkit::host::{self, Tool};
use testkit::registry::Registry;
use testkit::{containerd, netns, suite};

use super::node::{self, Kind, Node};
use crate::images;
use crate::member::condition;

/// What it needs on the host beside what building needs.
pub(super) const TOOLS: &[Tool] = &[
    Tool { program: "ip", deb: "iproute2", rpm: "iproute" },
    Tool { program: "conntrack", deb: "conntrack", rpm: "conntrack-tools" },
    testkit::daemon::TOOL,
    testkit::registry::TOOL,
];

/// The address of node, API server and registry, inside the private network (RFC 5737).
pub(super) const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Where the registry listens.
const REGISTRY_PORT: u16 = 5000;
/// How long the node may take to be Ready.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// All of it; fields end in this order.
pub(super) struct Cluster {
    node: Node,
    _registry: Registry,
    plane: ControlPlane,
    /// Where the control plane's logs are to be found afterwards.
    output: PathBuf,
    dir: PathBuf,
}

impl Cluster {
    /// Starts everything in a network namespace that the calling thread enters, with all it writes in `dir`, and waits until
    /// the node is Ready.
    pub(super) fn start(kind: &Kind, programs: &Path, dir: &Path, output: &Path) -> anyhow::Result<Self> {
        netns::enter_private()?;
        netns::add_address(IpAddr::V4(ADDRESS))?;
        let options = Options { address: IpAddr::V4(ADDRESS), ..Options::default() };
        let mut plane = ControlPlane::start(programs, &dir.join("plane"), options)?;
        for part in [Part::ControllerManager, Part::Scheduler, Part::Dns] {
            plane.run(part)?;
        }
        let registry = Registry::start_in(plane.nursery(), (ADDRESS, REGISTRY_PORT).into(), &dir.join("registry"))?;
        suite::publish(suite::ALL, &registry)?;
        registry.push(&images::pause()?, containerd::PAUSE, "latest")?;
        suite::write_hosts(&dir.join("certs.d"), registry.address())?;
        let node = Node::new(kind, &plane, dir, output)?;
        let (output, dir) = (output.to_owned(), dir.to_owned());
        let mut cluster = Self { node, _registry: registry, plane, output, dir };
        cluster.start_node()?;
        Ok(cluster)
    }

    fn start_node(&mut self) -> anyhow::Result<()> {
        let api = self.plane.api();
        self.node.start(READY_LIMIT, || {
            let node = api.get(&format!("/api/v1/nodes/{}", node::NAME));
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
        self.node.kubelet_root()
    }

    /// Ends the node with all pods that are left, then the rest, and keeps the logs. What does not go is told.
    pub(super) fn end(mut self) {
        let removed = self.remove_pods();
        if let Err(error) = self.node.end(removed) {
            println!("the node did not end cleanly: {error:#}");
        }
        let logs = self.dir.join("plane/logs");
        if let Err(error) = copy_files(&logs, &self.output) {
            println!("the control plane's logs are lost: {error:#}");
        }
    }

    /// By the API server, while the node serves: an interrupted suite leaves pods behind.
    fn remove_pods(&self) -> anyhow::Result<()> {
        let words = ["delete", "pods", "--all", "--all-namespaces", "--grace-period=1", "--timeout=60s"];
        host::run(self.plane.kubectl()?.args(words))
    }
}

fn copy_files(from: &Path, to: &Path) -> anyhow::Result<()> {
    for entry in from.read_dir().with_context(|| format!("list {}", from.display()))? {
        let entry = entry?;
        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}
