//! What the suite runs against: a control plane, a registry with the suite's images, and nodes.

use std::ffi::OsString;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::json;
use testkit::control_plane::{ControlPlane, Options, Part};
use testkit::daemon::Daemon;
use testkit::host::{self, Tool};
use testkit::registry::Registry;
use testkit::{containerd, go, netns, suite};

use super::machine::{Families, Machine};
use super::node::{Kind, Node};
use crate::images;
use crate::member::condition;

/// What it needs on the host beside what building needs.
pub(super) const TOOLS: &[Tool] = &[
    Tool { program: "ip", deb: "iproute2", rpm: "iproute" },
    Tool { program: "conntrack", deb: "conntrack", rpm: "conntrack-tools" },
    testkit::daemon::TOOL,
    testkit::registry::TOOL,
];

/// The address of API server and registry, and of a node that shares it, inside the private network (RFC 5737).
const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Where the registry listens. A spec has one of its own at 5000, in the node's network.
const REGISTRY_PORT: u16 = 5001;
/// How long a node may take to be Ready.
const READY_LIMIT: Duration = Duration::from_secs(60);

/// All of it; fields end in this order.
pub(super) struct Cluster {
    nodes: Vec<Node>,
    /// The way to Services from where the suite and the API server are, if no node is there.
    _proxy: Option<Daemon>,
    _registry: Registry,
    plane: ControlPlane,
    /// Where the control plane's logs are to be found afterwards.
    output: PathBuf,
    dir: PathBuf,
}

/// What a cluster is made from.
pub(super) struct Plan<'a> {
    pub(super) kind: &'a Kind,
    /// How many nodes.
    pub(super) nodes: u8,
    /// Both only with several nodes.
    pub(super) families: Families,
    /// The directory of the control plane's programs.
    pub(super) programs: &'a Path,
    /// Everything but the logs of nodes is written below it.
    pub(super) dir: &'a Path,
    /// Those are written there.
    pub(super) output: &'a Path,
}

impl Cluster {
    /// Starts everything in a network namespace that the calling thread enters, and waits until the nodes are Ready.
    pub(super) fn start(plan: &Plan<'_>) -> anyhow::Result<Self> {
        let Plan { dir, output, .. } = *plan;
        netns::enter_private()?;
        netns::add_address(IpAddr::V4(ADDRESS))?;
        let mut options = Options { address: IpAddr::V4(ADDRESS), ..Options::default() };
        if plan.families == Families::Dual {
            options.service_range.push_str(",fd00:10:96::/112");
            options.pod_range.push_str(",fd00:10:244::/48");
        }
        let mut plane = ControlPlane::start(plan.programs, &dir.join("plane"), options)?;
        for part in [Part::ControllerManager, Part::Scheduler, Part::Dns] {
            plane.run(part)?;
        }
        let registry = Registry::start_in(plane.nursery(), (ADDRESS, REGISTRY_PORT).into(), &dir.join("registry"))?;
        suite::publish(suite::ALL, &registry)?;
        registry.push(&images::pause()?, containerd::PAUSE, "latest")?;
        suite::write_hosts(&dir.join("certs.d"), registry.address())?;
        let (machines, proxy) = match plan.nodes {
            1 => (vec![Machine::shared(ADDRESS.into(), plane.nursery())], None),
            more => {
                let machines = Machine::apart(more, plan.families, plan.kind.needs_cover())?;
                (machines, Some(way_to_services(&plane, plan.families.pods(), output)?))
            }
        };
        let nodes = machines.iter().map(|machine| {
            let own = dir.join(&machine.name);
            std::fs::create_dir_all(&own)?;
            Node::new(plan.kind, machine, &plane, &own, output)
        });
        let nodes = nodes.collect::<anyhow::Result<_>>()?;
        let (output, dir) = (output.to_owned(), dir.to_owned());
        let mut cluster = Self { nodes, _proxy: proxy, _registry: registry, plane, output, dir };
        cluster.start_nodes()?;
        Ok(cluster)
    }

    fn start_nodes(&mut self) -> anyhow::Result<()> {
        let api = self.plane.api();
        let several = self.nodes.len() > 1;
        for (number, node) in (1..).zip(&mut self.nodes) {
            let path = format!("/api/v1/nodes/{}", node.name);
            node.start(READY_LIMIT, || api.get(&path).is_ok_and(|node| condition(&node, "Ready") == Some("True")))?;
            if several {
                let zone = json!({ "topology.kubernetes.io/zone": format!("zone-{number}") });
                api.merge(&path, &json!({ "metadata": { "labels": zone } }))?;
            }
        }
        Ok(())
    }

    /// Whether all programs still run.
    pub(super) fn check(&mut self) -> anyhow::Result<()> {
        self.plane.check()?;
        self.nodes.iter_mut().try_for_each(Node::check)
    }

    /// What the suite has to know of it.
    pub(super) fn suite_arguments(&self, output: &Path) -> anyhow::Result<Vec<OsString>> {
        let mut arguments: Vec<OsString> = ["--provider=skeleton", "--minStartupPods=0"].map(Into::into).into();
        let mut add = |flag: &str, path: &Path| arguments.extend([flag.into(), path.as_os_str().to_owned()]);
        add("--kubeconfig", &self.plane.admin_kubeconfig()?);
        if let Some(node) = self.nodes.first() {
            add("--kubelet-root-dir", &node.kubelet_root());
        }
        add("--e2e-output-dir", output);
        arguments.push(format!("--num-nodes={}", self.nodes.len()).into());
        Ok(arguments)
    }

    /// Ends the nodes with all pods that are left, then the rest, and keeps the logs. What does not go is told.
    pub(super) fn end(mut self) {
        let removed = self.remove_pods();
        let is_removed = removed.is_ok();
        let ends = self.nodes.iter_mut().map(|node| node.end(is_removed));
        for error in std::iter::once(removed).chain(ends).filter_map(Result::err) {
            println!("the nodes did not end cleanly: {error:#}");
        }
        let logs = self.dir.join("plane/logs");
        if let Err(error) = copy_files(&logs, &self.output) {
            println!("the control plane's logs are lost: {error:#}");
        }
    }

    /// By the API server, while the nodes serve: an interrupted suite leaves pods behind.
    fn remove_pods(&self) -> anyhow::Result<()> {
        let words = ["delete", "pods", "--all", "--all-namespaces", "--grace-period=1", "--timeout=60s"];
        host::run(self.plane.kubectl()?.args(words))
    }
}

/// Upstream's kube-proxy, as on the machine of a control plane: the API server calls webhooks by their Services.
fn way_to_services(plane: &ControlPlane, pods: &str, output: &Path) -> anyhow::Result<Daemon> {
    let arguments = [
        format!("--kubeconfig={}", plane.proxy_kubeconfig()?.display()),
        "--hostname-override=plane".to_owned(),
        "--proxy-mode=iptables".to_owned(),
        format!("--cluster-cidr={pods}"),
        "--conntrack-max-per-core=0".to_owned(),
        "--conntrack-tcp-timeout-established=0".to_owned(),
        "--conntrack-tcp-timeout-close-wait=0".to_owned(),
        "--oom-score-adj=0".to_owned(),
    ];
    let program = go::build(&go::KUBE_PROXY)?;
    let mut proxy = Daemon::new(plane.nursery(), &program, arguments.into(), output.join("plane.kube-proxy.log"));
    proxy.start()?;
    Ok(proxy)
}

fn copy_files(from: &Path, to: &Path) -> anyhow::Result<()> {
    for entry in from.read_dir().with_context(|| format!("list {}", from.display()))? {
        let entry = entry?;
        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}
