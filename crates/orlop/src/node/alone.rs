//! The node of `orlop up`: an agent whose desired state is a directory of manifests, and a name server for its pods.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use cluster::Source as _;
use cluster::manifests::{Manifests, ManifestsConfig};
use kubelet::hosts::ClusterDns;
use kubelet::node::describe::NodeConfig;
use kubelet::node::eviction;
use kubelet::node::machine::Machine;
use kubelet::node::pressure::Policy;
use kubelet::qos;
use kubelet::resources::policies::Policies;
use network::{Network, dns};
use proxy::configuration::DetectLocal;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::agent::{self, Agent};
use super::base::{self, Base, Forked};
use super::settings::UpSettings;
use super::{api, fsck, names, node_status};

const DNS_PORT: u16 = 53;
/// How long the end waits for the removal of what earlier pods have left.
const TIDIED_WITHIN: Duration = Duration::from_secs(10);

/// A node at work, alone.
pub(crate) struct Alone {
    pub(super) agent: Agent,
    manifests: Arc<Manifests>,
    name_server: Arc<dns::Server>,
    /// Hands the cluster's names to the name server.
    names: JoinHandle<()>,
}

impl Alone {
    /// Adopts what runs and starts everything.
    pub(crate) async fn start(settings: &UpSettings, forked: Forked) -> anyhow::Result<Arc<Self>> {
        let base = Base::start(&settings.node, network_config(settings), forked.zygote.clone()).await?;
        let manifests = Manifests::start(manifests_config(settings))?;
        let config = node_config(settings, &base.own()?.network);
        let machine = Machine::read(&settings.node.layout.kubelet_root);
        manifests.update_node_status(&settings.name, node_status::status(&config, &machine)).await?;
        let name_server = Arc::new(dns::Server::start(dns_config(settings), forked.zygote).await?);
        let names = names::serve(manifests.store().clone(), name_server.clone(), names_scope(settings));
        let names = tokio::spawn(names);
        let config = agent::Config {
            layout: settings.node.layout.clone(),
            facts: node_status::facts(&config, &machine),
            dns: ClusterDns { servers: vec![settings.dns.to_string()], domain: settings.domain.clone() },
            cgroup_root: PathBuf::new(),
            cgroup_driver: qos::Driver::Cgroupfs,
            policies: Policies::default(),
            pods: agent::PodRules { limits: qos::Rules::of_machine(), ..agent::PodRules::default() },
            resolv_conf: None,
            proxy: Some((proxy_config(settings), manifests.clone())),
            site: None,
            csi_node: None,
        };
        let agent = Agent::start(config, base, manifests.clone()).await?;
        // What is short, nobody here goes by: it keeps the limits of the pods alone.
        let limits = agent.eviction(&settings.name, Policy::LIMITS, watch::Sender::default());
        agent.base.tasks.begin(eviction::run(limits));
        Ok(Arc::new(Self { agent, manifests, name_server, names }))
    }

    /// Gives the pods that are ending no more time.
    pub(crate) async fn hurry(&self) {
        for pod in self.agent.store().pods().list() {
            let uid = pod.metadata.uid.clone().unwrap_or_default();
            if let Err(error) = self.manifests.request_deletion(&uid, Some(0)).await {
                tracing::debug!(uid, %error, "a pod is gone already");
            }
        }
    }

    /// Ends all pods and takes down everything that the node made, in the reverse order. Goes on after a failure and
    /// returns them all.
    pub(crate) async fn end(&self) -> anyhow::Result<()> {
        self.manifests.end_everything().await;
        let tidied = tokio::time::timeout(TIDIED_WITHIN, self.agent.kubelet.tidied()).await;
        self.agent.kubelet.stop().await;
        let mut faults: Vec<String> = Vec::new();
        let mut note = |what: &str, fault: Option<String>| faults.extend(fault.map(|fault| format!("{what}: {fault}")));
        let late = || format!("not all of it went within {} s; `orlop up` goes on with it", TIDIED_WITHIN.as_secs());
        note("what earlier pods have left", tidied.err().map(|_| late()));
        if let Some(proxy) = self.agent.take_proxy() {
            note("service rules", proxy.cleanup().await.err().map(|error| error.to_string()));
        }
        self.names.abort();
        note("name server", self.name_server.stop().await.err().map(|error| error.to_string()));
        let own = self.agent.base.own()?;
        note("sandboxes and pod network", own.runtime.shutdown().await.err().map(|error| error.to_string()));
        note("control groups", self.remove_groups().err().map(|error| error.to_string()));
        note("cluster state", self.manifests.erase().err().map(|error| error.to_string()));
        self.remove_empty_directories();
        self.agent.tell_ended();
        self.agent.base.stop().await;
        anyhow::ensure!(faults.is_empty(), "something is left behind: {}", faults.join("; "));
        Ok(())
    }

    /// The groups of the classes and of all pods; another node may still have pods in them.
    fn remove_groups(&self) -> sys::Result<()> {
        let busy = |error: &sys::Error| error.errno == rustix::io::Errno::BUSY;
        match self.agent.groups.root().delete() {
            Err(error) if !busy(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Directories that hold nothing any more; what is not empty stays for `fsck` to tell.
    fn remove_empty_directories(&self) {
        let layout = &self.agent.layout;
        for dir in [layout.kubelet_root.join("pods"), layout.state_dir.join("pods")] {
            let _ = std::fs::remove_dir(dir); // Not empty, or not there.
        }
    }
}

#[async_trait]
impl api::Node for Alone {
    fn agent(&self) -> &Agent {
        &self.agent
    }

    async fn fsck(&self) -> anyhow::Result<Vec<String>> {
        let mut unowned = fsck::of_running(&self.agent).await?;
        let owned = self.name_server.fsck();
        unowned.extend(owned.iter().filter(|one| one.owner.is_none()).map(|one| format!("{} {}", one.kind, one.name)));
        Ok(unowned)
    }

    async fn down(&self) -> anyhow::Result<()> {
        self.agent.ask_to_end();
        self.agent.ended().await;
        Ok(())
    }
}

fn proxy_config(settings: &UpSettings) -> proxy::Config {
    let range = |range: cluster::Range| range.to_string().parse().into_iter().collect();
    proxy::Config {
        table: settings.node.layout.service_table.clone(),
        local: DetectLocal::Cluster(range(settings.node.pods)),
        service_cidrs: range(settings.services),
        // A cluster's proxy may be at work on this machine, too.
        remove_other_modes: false,
        ..proxy::Config::new(&settings.name)
    }
}

fn dns_config(settings: &UpSettings) -> dns::Config {
    dns::Config {
        run_dir: settings.node.layout.dns(),
        addresses: vec![SocketAddr::from((settings.dns, DNS_PORT))],
        clients: settings.node.pods.to_string().parse().into_iter().collect(),
        upstreams: dns::Upstreams::File("/etc/resolv.conf".into()),
    }
}

fn names_scope(settings: &UpSettings) -> names::Scope {
    let ranges = [settings.services, settings.node.pods];
    let networks = ranges.iter().map(ToString::to_string).collect();
    names::Scope { domain: settings.domain.clone(), networks }
}

fn network_config(settings: &UpSettings) -> network::Config {
    network::Config {
        addresses: vec![settings.dns.into()],
        routed: settings.services.to_string().parse().into_iter().collect(),
        ..base::network_config(&settings.node)
    }
}

fn manifests_config(settings: &UpSettings) -> ManifestsConfig {
    let layout = &settings.node.layout;
    ManifestsConfig {
        paths: settings.manifests.clone(),
        state_dir: layout.state_dir.clone(),
        volumes_dir: layout.state_dir.join("volumes"),
        node_name: settings.name.clone(),
        services: settings.services,
        namespace: "default".to_owned(),
    }
}

fn node_config(settings: &UpSettings, network: &Network) -> NodeConfig {
    node_status::alone(&settings.name, node_status::address(network.gateways().first().copied()))
}
