//! A node of a cluster: an agent whose desired state is an API server's.
//!
//! ```text
//! source ─► pods' addresses ─► Base ─► Agent ─► kubelet API, health
//! register ─► membership (lease, status)
//! ```
//!
//! A node that starts while there is no API server goes by what it has kept of its pods (`cluster::api::SealConfig`), and
//! registers when there is one.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;
use async_trait::async_trait;
use cluster::Source as _;
use cluster::api::{Api, ApiSource, ApiSourceConfig, Rate, SealConfig, StandaloneSource};
use cri::v1;
use k8s_openapi::api::core::v1::Taint;
use k8s_openapi::jiff::Timestamp;
use kubelet::admission::Site;
use kubelet::configuration::{Authorization, Configuration};
use kubelet::hosts::ClusterDns;
use kubelet::node::certificates::{self, Files, Holder, Purpose};
use kubelet::node::csi_node::CsiNode;
use kubelet::node::describe::{self, NodeConfig};
use kubelet::node::eviction;
use kubelet::node::features::{self, Abilities};
use kubelet::node::machine::Machine;
use kubelet::node::membership::{self, Membership};
use kubelet::node::news::News;
use kubelet::node::pressure::Pressures;
use kubelet::node::shutdown;
use kubelet::qos;
use kubelet::resources::policies::Policies;
use kubelet::server::health;
use kubelet::server::secure::certificates::{self as serving, Pair, Shown};
use kubelet::server::secure::{self, Authority, NoAuthority, SecureConfig};
use pod::quantity::Quantity;
use sys::cgroup::Hierarchy;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::agent::{self, Agent, PodRules};
use super::base::{self, Base, Forked};
use super::listener::Reserved;
use super::member_metrics::MemberMetrics;
use super::settings::{MemberSettings, Settings, parse_range};
use super::{api, fsck, node_status, service_proxy};

/// How long a cluster that gives addresses to its nodes may take for that.
const ADDRESSES_WITHIN: Duration = Duration::from_secs(20);
/// How long a start waits for an API server that does not answer: networks come up meanwhile.
const ALONE_AFTER: Duration = Duration::from_secs(15);
/// A renewal of the lease that takes longer is given up and tried again.
const HEARTBEAT_WITHIN: Duration = Duration::from_secs(10);

/// How long statuses that wait to be written may hold up the end.
const SETTLE_WITHIN: Duration = Duration::from_secs(2);

/// A member at work.
pub(crate) struct Member {
    agent: Agent,
    /// None for a node that belongs to no cluster.
    source: Option<Arc<ApiSource>>,
    /// There as soon as the node is registered; taken by the end.
    membership: Arc<tokio::sync::Mutex<Option<Membership>>>,
    /// The kubelet's listeners, and what it keeps an eye on; they end with it.
    servers: tokio::sync::Mutex<JoinSet<()>>,
}

impl Member {
    /// Adopts what runs, starts everything, and registers. Waits for the API server, unless this node has been a member
    /// before and has kept its pods.
    pub(crate) async fn start(
        settings: &MemberSettings,
        kubeconfig: &Path,
        forked: Forked,
    ) -> anyhow::Result<Arc<Self>> {
        let ports = Ports::take(&settings.configuration)?;
        let config = join(settings, kubeconfig).await?;
        let api = Api::new(config.clone())?;
        let machine = machine(settings)?;
        let node = node_config(settings, &machine)?;
        let mut servers = JoinSet::new();
        let registered = settings.configuration.register_node.then(|| {
            let (api, node, machine) = (api.clone(), node.clone(), machine.clone());
            let (tell, told) = tokio::sync::oneshot::channel();
            servers.spawn(async move {
                membership::register(&api, &node, &machine).await;
                let _ = tell.send(()); // Only the end of the start hears it no more.
            });
            told
        });
        let source = ApiSource::start(source_config(settings, api.clone())?)?;
        source.ready().await;
        let chosen = addresses_of_pods(settings, source.store()).await;
        let base = base(settings, &chosen, forked).await?;
        let findings = Findings::default();
        let (node, site) = at_runtime(settings, node, &machine, &base, source.store().clone(), findings.heard()).await;
        let proxy = settings.proxy.as_ref().map(|proxy| proxy.config(settings, &chosen));
        let agent = agent::Config {
            proxy: proxy.map(|proxy| (proxy, source.clone() as Arc<dyn cluster::Source>)),
            ..agent_config(settings, &node, &machine, site, Some(api.clone()))
        };
        let agent = Agent::start(agent, base, source.clone()).await?;
        let heartbeats = Api::new(config.with_timeout(HEARTBEAT_WITHIN))?;
        let membership = Arc::default();
        let parts = parts(settings, node.clone(), machine, &agent, api.clone(), heartbeats, findings.heard());
        servers.spawn(belong(registered, parts, Arc::clone(&membership)));
        service_proxy::serve(settings, &agent, api.clone(), &mut servers);
        let files = client_files(settings);
        // One that has ended before is renewed when somebody has put another in its place.
        let is_kept = files.is_usable() || certificates::bootstrap::is_own(kubeconfig, &files);
        if settings.configuration.rotate_certificates && is_kept {
            let holder = holder(settings);
            let metrics = agent.metrics.clone();
            servers.spawn(certificates::keep(api.clone(), Purpose::Client, holder, files, metrics, || {}));
        }
        attend(settings, &node, &agent, Some(api), (ports, findings), &mut servers)?;
        Ok(Arc::new(Self { agent, source: Some(source), membership, servers: servers.into() }))
    }

    /// Adopts what runs and starts everything, for a node that belongs to no cluster, as upstream's kubelet is one without
    /// `--kubeconfig`: it runs its static pods, registers nowhere and asks nobody who its callers are.
    pub(crate) async fn start_standalone(settings: &MemberSettings, forked: Forked) -> anyhow::Result<Arc<Self>> {
        let configuration = &settings.configuration;
        let ports = Ports::take(configuration)?;
        let machine = machine(settings)?;
        let node = node_config(settings, &machine)?;
        let (path, url) = (configuration.static_pod_path.as_deref(), configuration.static_pod_url.clone());
        let source = StandaloneSource::start(&settings.name, path, url)?;
        let base = base(settings, &settings.node, forked).await?;
        let findings = Findings::default();
        let (node, site) = at_runtime(settings, node, &machine, &base, source.store().clone(), findings.heard()).await;
        source.update_node_status(&settings.name, node_status::status(&node, &machine)).await?;
        let agent = Agent::start(agent_config(settings, &node, &machine, site, None), base, source).await?;
        let mut servers = JoinSet::new();
        attend(settings, &node, &agent, None, (ports, findings), &mut servers)?;
        Ok(Arc::new(Self { agent, source: None, membership: Arc::default(), servers: servers.into() }))
    }

    /// Serves nobody any more; pods go on, and the next daemon takes them over.
    pub(crate) async fn stop(&self) {
        self.servers.lock().await.shutdown().await;
        if let Some(membership) = self.membership.lock().await.take() {
            membership.stop().await;
        }
        self.agent.stop().await;
        // What pods said last; an API server that does not answer learns of it from the next daemon.
        if let Some(source) = &self.source {
            let _ = tokio::time::timeout(SETTLE_WITHIN, source.settle()).await;
        }
    }
}

#[async_trait]
impl api::Node for Member {
    fn agent(&self) -> &Agent {
        &self.agent
    }

    async fn fsck(&self) -> anyhow::Result<Vec<String>> {
        fsck::of_running(&self.agent).await
    }

    async fn down(&self) -> anyhow::Result<()> {
        if self.source.is_none() {
            bail!("the pods of this node are those of its static pods' files: remove these; SIGTERM ends the daemon");
        }
        bail!(
            "this node belongs to a cluster, which decides about its pods: `kubectl drain` moves them away, and SIGTERM ends \
             the daemon"
        )
    }
}

/// What the pods run on.
async fn base(settings: &MemberSettings, chosen: &Settings, forked: Forked) -> anyhow::Result<Base> {
    match &settings.runtime {
        Some(endpoint) => Base::connect(chosen, endpoint).await,
        None => Base::start(chosen, network_config(settings, chosen), forked.zygote).await,
    }
}

/// The node with what its runtime can do, and to what its pods are admitted.
async fn at_runtime(
    settings: &MemberSettings,
    node: NodeConfig,
    machine: &Machine,
    base: &Base,
    store: cluster::Store,
    heard: Heard,
) -> (NodeConfig, MemberSite) {
    let runtime_version = format!("{}://{}", base.identity.name, base.identity.version);
    let abilities = abilities(base).await;
    let node = NodeConfig { runtime_version, features: features::declared(&abilities), ..node };
    let mut site = MemberSite::new(settings, &node, machine, store, heard);
    site.fixed.supplemental_groups_policy = abilities.supplemental_groups_policy;
    (node, site)
}

/// Serves the kubelet's API and its health, and keeps an eye on shutdowns and on what the node is short of.
fn attend(
    settings: &MemberSettings,
    node: &NodeConfig,
    agent: &Agent,
    api: Option<Api>,
    (ports, findings): (Ports, Findings),
    servers: &mut JoinSet<()>,
) -> anyhow::Result<()> {
    let configuration = &settings.configuration;
    if let Some(port) = ports.api {
        serve_kubelet_api(settings, node, agent, (port, api), servers)?;
    }
    if let Some(port) = ports.health {
        servers.spawn(health::serve(port.listen()?));
    }
    if !configuration.shutdown.is_empty() {
        servers.spawn(shutdown::run(shutdown_parts(settings, agent, findings.shutting_down)));
    }
    let policy = configuration.eviction.clone();
    servers.spawn(eviction::run(agent.eviction(&settings.name, policy, findings.pressures)));
    Ok(())
}

/// Where the kubelet is spoken to. Taken before anything else: a second node on a machine is not to show itself to the cluster.
struct Ports {
    api: Option<Reserved>,
    health: Option<Reserved>,
}

impl Ports {
    fn take(configuration: &Configuration) -> anyhow::Result<Self> {
        let api = configuration.enable_server.then_some((configuration.address, configuration.port));
        let health = Some(configuration.healthz).filter(|(_, port)| *port > 0);
        let take = |place: Option<(std::net::IpAddr, u16)>, field| {
            place.map(|place| Reserved::take(place.into(), field)).transpose()
        };
        Ok(Self { api: take(api, "port")?, health: take(health, "healthzPort")? })
    }
}

/// The machine, as far as this node gives it to pods.
fn machine(settings: &MemberSettings) -> anyhow::Result<Machine> {
    let configuration = &settings.configuration;
    let mut machine = Machine::read(&settings.node.layout.kubelet_root);
    if configuration.fail_swap_on && machine.info.swap.is_some() {
        bail!("this machine swaps, and `failSwapOn` is true; switch swap off (swapoff -a), or set it to false");
    }
    if !Hierarchy::detect()?.is_unified() {
        heed_version_1(configuration)?;
    }
    if !configuration.eviction.local_storage {
        machine.capacity.remove("ephemeral-storage");
    }
    Ok(machine)
}

/// What control groups of version 1 cannot do: refused where pods would not have what the field promises them, as upstream does.
fn heed_version_1(configuration: &Configuration) -> anyhow::Result<()> {
    let memory = configuration.memory;
    let refused = [
        ("memorySwap.swapBehavior: LimitedSwap", configuration.limited_swap),
        ("singleProcessOOMKill: false", memory.single_kill == Some(false)),
    ];
    if let Some((field, _)) = refused.iter().find(|(_, wanted)| *wanted) {
        bail!(
            "`{field}` needs control groups of version 2, which this machine does not have; remove the field, or boot with \
             systemd.unified_cgroup_hierarchy=1"
        );
    }
    let without_effect =
        [("memoryThrottlingFactor", memory.throttling_factor.is_some()), ("memoryReservationPolicy", memory.reserves)];
    for (field, _) in without_effect.iter().filter(|(_, wanted)| *wanted) {
        tracing::warn!(field, "a field has no effect: this machine has control groups of version 1");
    }
    Ok(())
}

/// What the runtime can do. One that does not answer is taken to be able to nothing special.
async fn abilities(base: &Base) -> Abilities {
    let status = base.runtime.status(v1::StatusRequest::default()).await;
    Abilities::of(&base.identity.name, status.ok().and_then(|status| status.features))
}

/// How many pods the node takes: `maxPods`, or fewer where `podsPerCore` says so.
fn pods_max(configuration: &Configuration, machine: &Machine) -> u32 {
    let cpus = machine.capacity.get("cpu").and_then(|cpus| u32::try_from(cpus.units()).ok()).unwrap_or(0);
    match configuration.pods_per_core.saturating_mul(cpus) {
        0 => configuration.max_pods,
        most => most.min(configuration.max_pods),
    }
}

fn node_config(settings: &MemberSettings, machine: &Machine) -> anyhow::Result<NodeConfig> {
    let configuration = &settings.configuration;
    let mut addresses = settings.addresses.clone();
    if addresses.is_empty() {
        addresses.extend(node_status::address(None));
    }
    if addresses.is_empty() {
        bail!("the machine has no default route, so it has no address of its own; name one by --node-ip");
    }
    let uninitialized = settings.external_cloud.then(|| Taint {
        key: "node.cloudprovider.kubernetes.io/uninitialized".to_owned(),
        value: Some("true".to_owned()),
        effect: "NoSchedule".to_owned(),
        ..Taint::default()
    });
    Ok(NodeConfig {
        addresses,
        cloud: settings.external_cloud.then(|| settings.addresses.clone()),
        port: configuration.enable_server.then_some(configuration.port),
        labels: settings.labels.clone(),
        taints: configuration.register_with_taints.iter().cloned().chain(uninitialized).collect(),
        provider_id: configuration.provider_id.clone(),
        pods_max: pods_max(configuration, machine),
        images_max: configuration.status_images_max,
        reserved: configuration.reserved.clone(),
        thresholds: configuration.eviction.thresholds.clone(),
        ..node_status::alone(&settings.name, None)
    })
}

/// Keeps lease and status from when the node is registered; at once, if others do that.
async fn belong(
    registered: Option<tokio::sync::oneshot::Receiver<()>>,
    parts: membership::Parts,
    membership: Arc<tokio::sync::Mutex<Option<Membership>>>,
) {
    if let Some(registered) = registered
        && registered.await.is_err()
    {
        return; // The node ends.
    }
    *membership.lock().await = Some(Membership::start(parts));
}

/// The settings with the pods' addresses that the operator chose, or those that the cluster has given this node.
async fn addresses_of_pods(settings: &MemberSettings, store: &cluster::Store) -> Settings {
    let mut chosen = settings.node.clone();
    if settings.pods_chosen || !settings.gives_addresses() || !settings.configuration.register_node {
        return chosen;
    }
    let given = tokio::time::timeout(ADDRESSES_WITHIN, given_addresses(store, &settings.name)).await;
    if let Ok(Some(range)) = given {
        chosen.pods = range;
    } else {
        let pods = chosen.pods;
        tracing::info!(%pods, "the cluster gives this node no addresses for pods (spec.podCIDR)");
    }
    chosen
}

/// `spec.podCIDR`, as soon as a controller has written it. A node that has long been without gets none.
async fn given_addresses(store: &cluster::Store, name: &str) -> Option<cluster::Range> {
    let mut nodes = store.nodes().watch();
    loop {
        let Some(node) = nodes.next().await.object.filter(|node| node.metadata.name.as_deref() == Some(name)) else {
            continue;
        };
        if let Some(text) = node.spec.as_ref().and_then(|spec| spec.pod_cidr.as_deref()) {
            return parse_range(text);
        }
        let born = node.metadata.creation_timestamp.as_ref().map(|time| time.0);
        if born.is_some_and(|born| Timestamp::now().duration_since(born).unsigned_abs() > ADDRESSES_WITHIN) {
            return None;
        }
    }
}

/// Where this node serves Services, their addresses have a way even on a machine without a default route.
fn network_config(settings: &MemberSettings, chosen: &Settings) -> network::Config {
    let services = settings.services.filter(|_| settings.proxy.is_some());
    network::Config {
        routed: services.and_then(|services| services.to_string().parse().ok()).into_iter().collect(),
        ..base::network_config(chosen)
    }
}

fn source_config(settings: &MemberSettings, kubelet: Api) -> anyhow::Result<ApiSourceConfig> {
    let configuration = &settings.configuration;
    let proxy = settings.proxy.as_ref().map(|proxy| Api::new(proxy.api.clone())).transpose()?;
    let (per_second, burst) = configuration.event_rate;
    let event_rate = (per_second > 0).then_some(Rate { per_second: per_second.into(), burst });
    let state_dir = &settings.node.layout.state_dir;
    let (dir, key) = (state_dir.join("sealed"), state_dir.join("sealed.key"));
    let sealed = Some(SealConfig { dir, key, patience: ALONE_AFTER });
    let static_pods = configuration.static_pod_path.clone();
    let static_pods_url = configuration.static_pod_url.clone();
    Ok(ApiSourceConfig {
        node_name: settings.name.clone(),
        kubelet: Some(kubelet),
        proxy,
        event_rate,
        sealed,
        static_pods,
        static_pods_url,
    })
}

/// What the operator wants of the resource managers, with what the node keeps from pods.
fn policies(configuration: &Configuration, node: &NodeConfig, machine: &Machine) -> Policies {
    let mut policies = configuration.policies.clone();
    if let Some(memory) = &mut policies.memory {
        let counted = |name: &str| name == "memory" || name.starts_with("hugepages-");
        let kept = describe::reservation(node, machine).into_iter().filter(|(name, _)| counted(name));
        memory.kept = kept.filter_map(|(name, kept)| Some((name, u64::try_from(kept.units()).ok()?))).collect();
    }
    policies
}

fn agent_config(
    settings: &MemberSettings,
    node: &NodeConfig,
    machine: &Machine,
    site: MemberSite,
    api: Option<Api>,
) -> agent::Config {
    let configuration = &settings.configuration;
    let servers = configuration.cluster_dns.clone();
    agent::Config {
        layout: settings.node.layout.clone(),
        facts: node_status::facts(node, machine),
        dns: ClusterDns { servers, domain: configuration.cluster_domain.clone() },
        cgroup_root: configuration.cgroup_root.clone(),
        cgroup_driver: configuration.cgroup_driver,
        policies: policies(configuration, node, machine),
        pods: pod_rules(configuration, node, machine),
        resolv_conf: configuration.resolv_conf.clone(),
        site: Some(Arc::new(site)),
        csi_node: api.map(|api| CsiNode::new(api, &node.name)),
        proxy: None,
    }
}

fn pod_rules(configuration: &Configuration, node: &NodeConfig, machine: &Machine) -> PodRules {
    let reserved = node.reserved.get("memory").map_or(0, |amount| amount.units());
    let memory = machine.capacity.get("memory").map(|amount| amount.units().saturating_sub(reserved));
    let swap = machine.info.swap.as_ref().and_then(|swap| swap.capacity);
    let machine_rules = qos::Rules::of_machine();
    PodRules {
        limits: qos::Rules {
            pids: configuration.pod_pids_limit,
            cpu_period_us: configuration.cpu_period_us,
            memory: machine_rules.memory.map(|_| configuration.memory),
            ..machine_rules
        },
        memory_bytes: memory.filter(|bytes| configuration.enforced.pods && *bytes > 0),
        seccomp_default: configuration.seccomp_default,
        pulls_max: configuration.pulls_max,
        verification: configuration.verification.clone(),
        shared_swap_bytes: swap
            .filter(|_| configuration.limited_swap)
            .and_then(|bytes| bytes.try_into().ok())
            .unwrap_or(0),
        enforced: configuration.enforced.groups.clone(),
    }
}

/// The node as its cluster sees it, for pods that come.
struct MemberSite {
    fixed: Site,
    store: cluster::Store,
    heard: Heard,
}

/// What the node finds out about itself, and tells those of its parts that go by it. Nothing is short until somebody has
/// looked.
#[derive(Default)]
struct Findings {
    pressures: watch::Sender<Pressures>,
    shutting_down: watch::Sender<bool>,
}

impl Findings {
    fn heard(&self) -> Heard {
        Heard { pressures: self.pressures.subscribe(), shutting_down: self.shutting_down.subscribe() }
    }
}

/// The other end of it.
struct Heard {
    pressures: watch::Receiver<Pressures>,
    shutting_down: watch::Receiver<bool>,
}

impl MemberSite {
    fn new(
        settings: &MemberSettings,
        node: &NodeConfig,
        machine: &Machine,
        store: cluster::Store,
        heard: Heard,
    ) -> Self {
        let mut allocatable = describe::allocatable(node, machine);
        allocatable.insert("pods".to_owned(), Quantity::from_units(node.pods_max.into()));
        let (labels, sysctls) = (describe::labels(node), settings.configuration.sysctls.clone());
        let apparmor = sys::kernel::has_apparmor();
        let (name, features) = (node.name.clone(), node.features.clone());
        let fixed = Site { name, labels, allocatable, sysctls, apparmor, features, ..Site::default() };
        Self { fixed, store, heard }
    }
}

impl kubelet::SiteNow for MemberSite {
    fn now(&self) -> Site {
        let mut site = Site {
            pressures: *self.heard.pressures.borrow(),
            shutting_down: *self.heard.shutting_down.borrow(),
            ..self.fixed.clone()
        };
        let Some(node) = self.store.nodes().get(&cluster::Key::cluster(&site.name)) else { return site };
        if let Some(labels) = &node.metadata.labels {
            site.labels.clone_from(labels);
        }
        site.taints = node.spec.as_ref().and_then(|spec| spec.taints.clone()).unwrap_or_default();
        site
    }
}

fn parts(
    settings: &MemberSettings,
    config: NodeConfig,
    machine: Machine,
    agent: &Agent,
    api: Api,
    heartbeats: Api,
    heard: Heard,
) -> membership::Parts {
    let configuration = &settings.configuration;
    membership::Parts {
        config,
        machine,
        api,
        heartbeats,
        store: agent.store().clone(),
        source: agent.source.clone(),
        first_news: first_news(configuration),
        image_trouble: agent.base.image_trouble.clone(),
        runtime: agent.base.runtime.clone(),
        images: agent.base.image_service.clone(),
        pressures: heard.pressures,
        shutting_down: heard.shutting_down,
        resources: agent.resources.clone(),
        volumes_in_use: agent.volumes.in_use(),
        update_every: configuration.node_status_update_frequency,
        report_every: configuration.node_status_report_frequency,
        lease_s: configuration.node_lease_duration_s,
    }
}

/// What is as it is from the start on.
fn first_news(configuration: &Configuration) -> Vec<News> {
    let enforced = "Updated Node Allocatable limit across pods";
    let enforced = configuration.enforced.pods.then(|| News::normal("NodeAllocatableEnforced", enforced));
    let is_old = Hierarchy::detect().is_ok_and(|hierarchy| !hierarchy.is_unified());
    let advice = "this machine has control groups of version 1, which Kubernetes gives up; boot with \
                  systemd.unified_cgroup_hierarchy=1";
    let old = is_old.then(|| News::warning("CgroupV1", advice));
    enforced.into_iter().chain(old).collect()
}

fn shutdown_parts(settings: &MemberSettings, agent: &Agent, shutting_down: watch::Sender<bool>) -> shutdown::Parts {
    shutdown::Parts {
        kubelet: agent.kubelet.clone(),
        source: agent.source.clone(),
        node: settings.name.clone(),
        periods: settings.configuration.shutdown.clone(),
        places: shutdown::Places::default(),
        shutting_down,
    }
}

/// Serves the kubelet's API on the network, and keeps its certificate.
fn serve_kubelet_api(
    settings: &MemberSettings,
    node: &NodeConfig,
    agent: &Agent,
    (port, api): (Reserved, Option<Api>),
    servers: &mut JoinSet<()>,
) -> anyhow::Result<()> {
    let configuration = &settings.configuration;
    let files = Files::new(&settings.cert_dir, Purpose::Serving);
    let signed = Pair { certificate: files.current(), key: files.current() };
    let pair = match &configuration.tls {
        Some((certificate, key)) => Pair { certificate: certificate.clone(), key: key.clone() },
        None if configuration.server_tls_bootstrap && files.is_usable() => signed.clone(),
        None => serving::self_signed(&settings.cert_dir, &node.hostname, &node.addresses)?,
    };
    let shown = Shown::new(&pair)?;
    let authentication = &configuration.authentication;
    let config = SecureConfig {
        node: settings.name.clone(),
        tls: serving::server_config(shown.clone(), authentication.client_ca_file.as_deref())?,
        anonymous: authentication.anonymous,
        tokens: authentication.webhook,
        always_allow: configuration.authorization == Authorization::AlwaysAllow,
        holds: configuration.holds,
    };
    if let Some(api) = api.clone().filter(|_| configuration.server_tls_bootstrap && configuration.tls.is_none()) {
        let holder = Holder { addresses: node.addresses.clone(), ..holder(settings) };
        let show = move || {
            if let Err(error) = shown.replace(&signed) {
                tracing::warn!(error = &error as &dyn std::error::Error, "the new serving certificate cannot be used");
            }
        };
        let metrics = agent.metrics.clone();
        servers.spawn(certificates::keep(api, Purpose::Serving, holder, files, metrics, show));
    }
    let listener = port.listen()?;
    let certificates = [Purpose::Client, Purpose::Serving].map(|purpose| Files::new(&settings.cert_dir, purpose));
    let more = MemberMetrics { api: api.clone(), certificates };
    let authority: Arc<dyn Authority> = match api {
        Some(api) => Arc::new(api),
        None => Arc::new(NoAuthority),
    };
    let kubelet_api = agent.kubelet_api.clone().with_configuration(settings.written.clone());
    let kubelet_api = kubelet_api.with_flags(settings.flags.clone()).with_node_logs(configuration.node_logs);
    let kubelet_api = kubelet_api.with_debugging(configuration.enable_debugging_handlers);
    let kubelet_api = kubelet_api.with_collector(Arc::new(more));
    servers.spawn(secure::serve(listener, kubelet_api, config, authority, agent.stopped()));
    Ok(())
}

fn holder(settings: &MemberSettings) -> Holder {
    Holder { node: settings.name.clone(), names: vec![settings.name.clone()], addresses: settings.addresses.clone() }
}

fn client_files(settings: &MemberSettings) -> Files {
    Files::new(&settings.cert_dir, Purpose::Client)
}

/// How to reach the API server; a node that has not been there yet joins first.
async fn join(settings: &MemberSettings, kubeconfig: &Path) -> anyhow::Result<cluster::api::Config> {
    let files = client_files(settings);
    if let Some(bootstrap) = &settings.bootstrap_kubeconfig
        && certificates::bootstrap::is_needed(kubeconfig, &files)
    {
        certificates::bootstrap::join(bootstrap, kubeconfig, &holder(settings), &files).await?;
    }
    Ok(cluster::api::Config::from_kubeconfig(kubeconfig)?)
}
