//! What a node of either kind has: pods, their services, and what can be asked about them.
//!
//! ```text
//! source ─► Kubelet ─► Base (CRI, images, network) ─► kernel
//!    └────► Proxy ─► service rules ─► kernel
//! ```

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, bail};
use async_trait::async_trait;
use cluster::{Source, Store};
use k8s_openapi::api::core::v1::Pod;
use kubelet::configuration::EnforcedGroup;
use kubelet::facts::NodeFacts;
use kubelet::hosts::ClusterDns;
use kubelet::metrics::Metrics;
use kubelet::node::csi_node::CsiNode;
use kubelet::node::eviction;
use kubelet::node::pressure::{Policy, Pressures};
use kubelet::paths::Paths;
use kubelet::plugins::Registry;
use kubelet::qos::{self, Tree};
use kubelet::resources::policies::Policies;
use kubelet::resources::{self, Resources};
use kubelet::server::Api;
use kubelet::server::metrics::{ContainerMetrics, Telemetry};
use kubelet::server::others::Statistics;
use kubelet::volumes::{ATTACHED_WITHIN, CSI_CALL_WITHIN, REPUBLISH_EVERY, Volumes, VolumesConfig};
use kubelet::{Kubelet, Verification, generate};
use pod::quantity::Quantity;
use proxy::Proxy;
use runtime::Runtime;
use sys::cgroup::Hierarchy;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::base::Base;
use super::keychain::Keychain;
use super::layout::Layout;

/// The longest that an ending pod waits until no service rule leads to it.
const BARRIER: Duration = Duration::from_secs(1);

/// Without a change for so long, the node is at rest.
const QUIET: Duration = Duration::from_secs(5);

/// What an agent is told.
pub(super) struct Config {
    pub(super) layout: Layout,
    pub(super) facts: NodeFacts,
    pub(super) dns: ClusterDns,
    /// The group in which the pods' groups stand; empty for the root of the hierarchy.
    pub(super) cgroup_root: PathBuf,
    /// Who makes them, where the runtime does not tell.
    pub(super) cgroup_driver: qos::Driver,
    /// What is given to containers whole.
    pub(super) policies: Policies,
    pub(super) pods: PodRules,
    /// Whose name servers pods get that want the node's, if those are not in the usual place.
    pub(super) resolv_conf: Option<PathBuf>,
    /// The service proxy, and the source that it follows.
    pub(super) proxy: Option<(proxy::Config, Arc<dyn Source>)>,
    /// To what pods are admitted; a node alone takes all.
    pub(super) site: Option<Arc<dyn kubelet::SiteNow>>,
    /// Where CSI drivers are made known; a node alone tells nobody.
    pub(super) csi_node: Option<CsiNode>,
}

impl Config {
    fn paths(&self) -> Paths {
        Paths { root: self.layout.kubelet_root.clone(), logs: self.layout.pod_logs.clone() }
    }
}

/// What holds for all pods.
#[derive(Debug, Clone, Default)]
pub(super) struct PodRules {
    /// What their limits go by.
    pub(super) limits: qos::Rules,
    /// Most memory of all pods together, bytes.
    pub(super) memory_bytes: Option<i64>,
    /// Containers without a seccomp profile get the runtime's default.
    pub(super) seccomp_default: bool,
    /// Most pulls of images at a time.
    pub(super) pulls_max: Option<usize>,
    /// Which images pods need credentials for though they are on the node.
    pub(super) verification: Verification,
    /// Swap that containers get a share of, bytes.
    pub(super) shared_swap_bytes: u64,
    /// Groups of others that are kept to what is reserved for them.
    pub(super) enforced: Vec<EnforcedGroup>,
}

/// Kubelet and proxy at work, over a runtime.
pub(crate) struct Agent {
    pub(super) layout: Layout,
    pub(super) base: Base,
    pub(super) source: Arc<dyn Source>,
    pub(super) groups: Tree,
    pub(super) kubelet: Arc<Kubelet>,
    pub(super) resources: Arc<Resources>,
    pub(super) kubelet_api: Api,
    pub(super) metrics: Arc<Metrics>,
    pub(super) volumes: Arc<Volumes>,
    /// Plugins register until this is dropped.
    _plugins: Registry,
    /// None where another proxy does it; taken by the end.
    proxy: Mutex<Option<Proxy>>,
    /// Somebody wants the node to end.
    asked: CancellationToken,
    /// Nothing of the node is left but its sockets.
    ended: watch::Sender<bool>,
}

impl Agent {
    /// Writes the service rules, then adopts the pods that run and starts those that do not.
    pub(super) async fn start(config: Config, base: Base, source: Arc<dyn Source>) -> anyhow::Result<Self> {
        let paths = config.paths();
        let driver = driver_of_groups(&config, &base);
        let groups = groups_of_pods(&config, driver, &base)?;
        let kubelet_config = kubelet_config(&config, driver, &base, &groups);
        let proxy = config.proxy.map(|(config, source)| Proxy::start(config, source)).transpose()?;
        let metrics: Arc<Metrics> = Arc::default();
        let given = resources::Config { policies: config.policies, ..resources::Config::plain(paths.root.clone()) };
        let resources = Resources::start(&given, base.runtime.clone(), source.clone(), metrics.clone()).await;
        let resources = resources.context("start the resource managers")?;
        let volumes = Volumes::new(volumes_config(&paths, &config.facts), source.clone());
        let [devices, claims] = resources.handlers();
        let handlers = vec![volumes.driver_handler(config.csi_node), devices, claims];
        let plugins = Registry::start(&paths.plugins_registry(), handlers)?;
        let kubelet_api = Api::new(source.clone(), base.runtime.clone(), paths, &config.facts.name);
        let kubelet_api = kubelet_api.with_telemetry(telemetry(&base, &groups, &metrics)).with_volumes(volumes.clone());
        let kubelet_api = kubelet_api.with_images(base.image_service.clone());
        let parts = kubelet::Parts {
            source: source.clone(),
            runtime: base.runtime.clone(),
            images: base.image_service.clone(),
            volumes: volumes.clone(),
            barrier: barrier(proxy.as_ref()),
            keychain: Arc::new(Keychain::new(source.clone(), base.credentials.clone())),
            groups: groups.clone(),
            resources: resources.clone(),
            site: config.site,
            metrics: metrics.clone(),
        };
        base.tasks.begin(be_thrifty(source.store().changes()));
        let kubelet = Kubelet::start(kubelet_config, parts).await.context("start the kubelet")?;
        Ok(Self {
            layout: config.layout,
            base,
            source,
            groups,
            kubelet: Arc::new(kubelet),
            resources,
            kubelet_api,
            metrics,
            volumes,
            _plugins: plugins,
            proxy: Mutex::new(proxy),
            asked: CancellationToken::new(),
            ended: watch::Sender::new(false),
        })
    }

    /// The tables of the node's source.
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

    /// Nothing is left but the sockets.
    pub(super) fn tell_ended(&self) {
        self.ended.send_replace(true);
    }

    /// What eviction works with on the node called `node`.
    pub(super) fn eviction(&self, node: &str, policy: Policy, pressures: watch::Sender<Pressures>) -> eviction::Parts {
        eviction::Parts {
            kubelet: self.kubelet.clone(),
            source: self.source.clone(),
            runtime: self.base.runtime.clone(),
            reclaim: self.base.reclaim(),
            groups: self.groups.clone(),
            paths: Paths { root: self.layout.kubelet_root.clone(), logs: self.layout.pod_logs.clone() },
            image_root: self.base.image_root.clone(),
            container_root: self.base.container_root.clone(),
            node: node.to_owned(),
            metrics: self.metrics.clone(),
            policy,
            look_every: eviction::LOOK_EVERY,
            pressures,
        }
    }

    /// Serves nobody any more; what runs goes on, and so do the service rules.
    pub(crate) async fn stop(&self) {
        self.kubelet.stop().await;
        self.base.stop().await;
    }

    /// The pods that are there.
    pub(crate) fn pod_names(&self) -> Vec<String> {
        self.store().pods().keys().iter().map(ToString::to_string).collect()
    }

    /// Who answers questions about the rules.
    pub(super) fn proxy_questions(&self) -> Option<proxy::Questions> {
        self.proxy.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(Proxy::questions)
    }

    /// What the proxy tells of itself, if this node is its own.
    pub(super) fn proxy_telling(
        &self,
        node: &str,
        mode: proxy::Mode,
        written: &serde_json::Value,
        more: Arc<proxy::More>,
    ) -> Option<proxy::Telling> {
        let proxy = self.proxy.lock().unwrap_or_else(PoisonError::into_inner);
        let proxy = proxy.as_ref()?;
        Some(proxy::Telling {
            node_name: node.to_owned(),
            store: self.store().clone(),
            mode,
            health: proxy.health(),
            metrics: proxy.metrics(),
            questions: proxy.questions(),
            configuration: Arc::new(proxy::configuration::document(written)),
            flags: Arc::default(),
            more: Some(more),
        })
    }

    /// For whoever removes the rules.
    pub(super) fn take_proxy(&self) -> Option<Proxy> {
        self.proxy.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Gives back to the kernel what a burst of work has left of the heap, as soon as nothing changes any more.
async fn be_thrifty(mut changes: watch::Receiver<u64>) {
    while changes.changed().await.is_ok() {
        while let Ok(Ok(())) = tokio::time::timeout(QUIET, changes.changed()).await {}
        // It holds the heaps' locks for a millisecond or two.
        let _ = tokio::task::spawn_blocking(sys::fork::trim_heap).await;
    }
}

/// Who makes the pods' groups: whoever makes those of their containers, as upstream has it.
fn driver_of_groups(config: &Config, base: &Base) -> qos::Driver {
    let Some(told) = base.cgroup_driver else { return config.cgroup_driver };
    if told != config.cgroup_driver {
        tracing::info!(runtime = ?told, configured = ?config.cgroup_driver, "the runtime decides who makes control groups");
    }
    told
}

/// The tree of the pods' groups, in a group that has to exist as upstream wants it: a name that is misspelt shows. Another
/// program, which makes the groups of containers below those of pods, takes their paths from the top: this one may be in a
/// group that a service manager has made for it.
fn groups_of_pods(config: &Config, driver: qos::Driver, base: &Base) -> anyhow::Result<Tree> {
    let (root, rules) = (&config.cgroup_root, &config.pods);
    let hierarchy = match driver {
        qos::Driver::Cgroupfs if base.own().is_ok() => Hierarchy::detect()?,
        qos::Driver::Cgroupfs | qos::Driver::Systemd => Hierarchy::whole(Path::new("/sys/fs/cgroup"))?,
    };
    if !hierarchy.group(qos::place(driver, root, "")).exists() {
        bail!("the control group {root:?} does not exist; make it, or change `cgroupRoot`");
    }
    for group in &rules.enforced {
        let EnforcedGroup { field, path, reserved, cpu_only } = group;
        let kept = qos::keep_reserved(&hierarchy.group(path), reserved, *cpu_only);
        kept.with_context(|| format!("keep the group of `{field}` to what is reserved for it"))?;
    }
    let cpu_milli = config.facts.allocatable.get("cpu").copied().map_or(0, Quantity::milli);
    let groups = Tree::new(hierarchy, rules.limits.clone()).below(root).by(driver);
    groups.ensure_roots(cpu_milli, rules.memory_bytes).context("make the control groups of pods")?;
    Ok(groups)
}

fn kubelet_config(config: &Config, driver: qos::Driver, base: &Base, groups: &Tree) -> kubelet::Config {
    let (facts, dns, pods) = (config.facts.clone(), config.dns.clone(), &config.pods);
    kubelet::Config {
        generate: generate::Config {
            cgroup_root: config.cgroup_root.clone(),
            cgroup_driver: driver,
            seccomp_default: pods.seccomp_default,
            rules: pods.limits.clone(),
            shared_swap_bytes: pods.shared_swap_bytes,
            ..generate::Config::of_machine(config.paths(), facts, dns, config.resolv_conf.as_deref(), groups)
        },
        records_dir: config.layout.state_dir.join("pods"),
        barrier_timeout: BARRIER,
        runtime_name: base.identity.name.clone(),
        pulls_max: pods.pulls_max,
        verification: pods.verification.clone(),
    }
}

fn volumes_config(paths: &Paths, facts: &NodeFacts) -> VolumesConfig {
    VolumesConfig {
        paths: paths.clone(),
        node: facts.clone(),
        recursive_read_only: true,
        csi_call_within: CSI_CALL_WITHIN,
        attached_within: ATTACHED_WITHIN,
        republish_every: REPUBLISH_EVERY,
    }
}

/// What the kubelet's API tells of its work, and of containers: those of another runtime are that one's to measure.
fn telemetry(base: &Base, groups: &Tree, metrics: &Arc<Metrics>) -> Telemetry {
    let containers: Arc<dyn ContainerMetrics> = match base.own() {
        Ok(own) => Arc::new(Containers { runtime: own.runtime.clone(), groups: groups.clone() }),
        Err(_) => Arc::new(Statistics(base.runtime.clone())),
    };
    Telemetry { metrics: metrics.clone(), containers: Some(containers), ..Telemetry::default() }
}

/// What an ending pod waits for before its containers hear of it.
fn barrier(proxy: Option<&Proxy>) -> Arc<dyn kubelet::Barrier> {
    match proxy {
        Some(proxy) => Arc::new(RuleBarrier(proxy.barrier())),
        None => Arc::new(kubelet::NoBarrier),
    }
}

/// What containers use, for Prometheus.
struct Containers {
    runtime: Arc<Runtime>,
    groups: Tree,
}

#[async_trait]
impl ContainerMetrics for Containers {
    async fn text(&self) -> String {
        self.runtime.container_metrics(self.groups.shared()).await
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
