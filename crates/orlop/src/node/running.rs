//! The parts of a node that `orlop up` runs, wired.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use async_trait::async_trait;
use cluster::manifests::{Manifests, ManifestsConfig};
use cluster::{Source as _, Store};
use k8s_openapi::api::core::v1::Pod;
use kubelet::facts::NodeFacts;
use kubelet::hosts::ClusterDns;
use kubelet::paths::Paths;
use kubelet::qos::Tree;
use kubelet::server::Api;
use kubelet::volumes::{Volumes, VolumesConfig};
use kubelet::{Kubelet, generate};
use network::{Network, dns};
use pod::quantity::Quantity;
use proxy::Proxy;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::base::{self, Base, Forked};
use super::keychain::Keychain;
use super::settings::UpSettings;
use super::{fsck, names, node_status};

/// The longest that an ending pod waits until no service rule leads to it.
const BARRIER: Duration = Duration::from_secs(1);

const DNS_PORT: u16 = 53;

/// A node at work.
pub(crate) struct Running {
    pub(super) settings: UpSettings,
    pub(super) source: Arc<Manifests>,
    pub(super) base: Base,
    pub(super) groups: Tree,
    pub(super) kubelet: Kubelet,
    pub(super) kubelet_api: Api,
    /// Taken by the end.
    proxy: Mutex<Option<Proxy>>,
    pub(super) name_server: Arc<dns::Server>,
    /// Hands the cluster's names to the name server.
    names: JoinHandle<()>,
    /// Somebody wants the node to end.
    asked: CancellationToken,
    /// Nothing of the node is left but its sockets.
    ended: watch::Sender<bool>,
}

impl Running {
    /// Adopts what runs and starts everything.
    pub(crate) async fn start(settings: &UpSettings, forked: Forked) -> anyhow::Result<Arc<Self>> {
        let layout = &settings.node.layout;
        let base = Base::start(&settings.node, network_config(settings), forked.zygote.clone()).await?;
        let source = Manifests::start(manifests_config(settings))?;
        let facts = facts(settings, &base.network);
        source.update_node_status(&settings.name, node_status::status(&facts)).await?;
        let groups = Tree::new(sys::cgroup::Hierarchy::detect()?, None);
        let cpu = facts.allocatable.get("cpu").copied().map_or(0, Quantity::milli);
        groups.ensure_roots(cpu, None).context("make the control groups of pods")?;

        let proxy = Proxy::start(proxy_config(settings), source.clone())?;
        let name_server = dns::Server::start(dns_config(settings), forked.zygote).await?;
        let name_server = Arc::new(name_server);
        let names = tokio::spawn(names::serve(source.store().clone(), name_server.clone(), names_scope(settings)));
        let paths = Paths { root: layout.kubelet_root.clone(), logs: layout.pod_logs.clone() };
        let volumes = VolumesConfig { paths: paths.clone(), node: facts.clone(), recursive_read_only: true };
        let dns = ClusterDns { servers: vec![settings.dns.to_string()], domain: settings.domain.clone() };
        let config = kubelet::Config {
            generate: generate::Config::of_machine(paths.clone(), facts, dns),
            records_dir: layout.state_dir.join("pods"),
            barrier_timeout: BARRIER,
        };
        let parts = kubelet::Parts {
            source: source.clone(),
            runtime: base.runtime.clone(),
            images: base.image_service.clone(),
            volumes: Volumes::new(volumes, source.clone()),
            barrier: Arc::new(RuleBarrier(proxy.barrier())),
            keychain: Arc::new(Keychain::new(source.store().clone(), base.credentials.clone())),
            groups: groups.clone(),
        };
        let kubelet = Kubelet::start(config, parts).await.context("start the kubelet")?;
        let kubelet_api = Api::new(source.clone(), base.runtime.clone(), paths, &settings.name);
        Ok(Arc::new(Self {
            settings: settings.clone(),
            source,
            base,
            groups,
            kubelet,
            kubelet_api,
            proxy: Mutex::new(Some(proxy)),
            name_server,
            names,
            asked: CancellationToken::new(),
            ended: watch::Sender::new(false),
        }))
    }

    pub(crate) fn store(&self) -> &Store {
        self.source.store()
    }

    /// Cancelled when nobody is served any more.
    pub(crate) fn stopped(&self) -> CancellationToken {
        self.base.stopped.clone()
    }

    pub(super) fn ask_to_end(&self) {
        self.asked.cancel();
    }

    pub(crate) async fn asked_to_end(&self) {
        self.asked.cancelled().await;
    }

    /// Returns when everything has been ended.
    pub(super) async fn ended(&self) {
        // The sender lives in this value.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    /// Gives the pods that are ending no more time.
    pub(crate) async fn hurry(&self) {
        for pod in self.store().pods().list() {
            let uid = pod.metadata.uid.clone().unwrap_or_default();
            if let Err(error) = self.source.request_deletion(&uid, Some(0)).await {
                tracing::debug!(uid, %error, "a pod is gone already");
            }
        }
    }

    /// Serves nobody any more; what still runs goes on.
    pub(crate) async fn abandon(&self) {
        self.kubelet.stop().await;
        self.base.stop().await;
    }

    /// The pods that are there.
    pub(crate) fn pod_names(&self) -> Vec<String> {
        self.store().pods().keys().iter().map(ToString::to_string).collect()
    }

    /// Ends all pods and takes down everything that the node made, in the reverse order. Goes on after a failure and
    /// returns them all.
    pub(crate) async fn end(&self) -> anyhow::Result<()> {
        self.source.end_everything().await;
        self.kubelet.stop().await;
        let mut faults: Vec<String> = Vec::new();
        let mut note = |what: &str, fault: Option<String>| faults.extend(fault.map(|fault| format!("{what}: {fault}")));
        if let Some(proxy) = self.take_proxy() {
            note("service rules", proxy.cleanup().await.err().map(|error| error.to_string()));
        }
        self.names.abort();
        note("name server", self.name_server.stop().await.err().map(|error| error.to_string()));
        note("sandboxes and pod network", self.base.runtime.shutdown().await.err().map(|error| error.to_string()));
        note("control groups", self.remove_groups().err().map(|error| error.to_string()));
        note("cluster state", self.source.erase().err().map(|error| error.to_string()));
        self.remove_empty_directories();
        self.ended.send_replace(true);
        self.base.stop().await;
        anyhow::ensure!(faults.is_empty(), "something is left behind: {}", faults.join("; "));
        Ok(())
    }

    fn take_proxy(&self) -> Option<Proxy> {
        self.proxy.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The groups of the classes and of all pods; another node may still have pods in them.
    fn remove_groups(&self) -> sys::Result<()> {
        let busy = |error: &sys::Error| error.errno == rustix::io::Errno::BUSY;
        match self.groups.root().delete() {
            Err(error) if !busy(&error) => Err(error),
            _ => Ok(()),
        }
    }

    /// Directories that hold nothing any more; what is not empty stays for `fsck` to tell.
    fn remove_empty_directories(&self) {
        let layout = &self.settings.node.layout;
        for dir in [layout.kubelet_root.join("pods"), layout.state_dir.join("pods")] {
            let _ = std::fs::remove_dir(dir); // Not empty, or not there.
        }
    }

    /// What belongs to the node and has no owner.
    pub(super) async fn unowned(&self) -> anyhow::Result<Vec<String>> {
        fsck::of_running(self).await
    }
}

/// The kubelet's barrier: the rules of this node's own proxy.
struct RuleBarrier(proxy::Barrier);

#[async_trait]
impl kubelet::Barrier for RuleBarrier {
    async fn left(&self, pod: &Pod, addresses: &[String]) {
        let addresses: Vec<IpAddr> = addresses.iter().filter_map(|address| address.parse().ok()).collect();
        self.0.left(pod.metadata.uid.as_deref().unwrap_or_default(), &addresses).await;
    }
}

fn proxy_config(settings: &UpSettings) -> proxy::Config {
    let range = |range: cluster::Range| range.to_string().parse().into_iter().collect();
    proxy::Config {
        table: settings.node.layout.service_table.clone(),
        pod_cidrs: range(settings.node.pods),
        service_cidrs: range(settings.services),
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

fn facts(settings: &UpSettings, network: &Network) -> NodeFacts {
    let address: Option<IpAddr> = node_status::address(network.gateways().first().copied());
    NodeFacts::of_machine(&settings.name, address.iter().map(ToString::to_string).collect())
}
