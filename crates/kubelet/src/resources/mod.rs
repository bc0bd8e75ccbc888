//! What a node gives to its containers beyond shares: devices, whole CPUs, memory of certain NUMA nodes.
//!
//! ```text
//! manager ─admit(pod)─► Resources ─┬─ devices    plugins and who has which device
//! start ──prepare─────►            ├─ cpu        CPUs of their own, and what the others share
//! node status ─amounts─►           ├─ memory     memory of certain NUMA nodes
//!                                  ├─ topology   from which NUMA nodes
//!                                  ╰─ checkpoint what was given out, over restarts
//! ```
//!
//! A pod gets all that its containers will need when the node admits it, and keeps it until it has ended. A node that has
//! nothing of this to give only listens for plugins.

mod api;
mod checkpoint;
pub mod claims;
pub mod cpu;
mod devices;
pub mod memory;
pub mod policies;
pub mod topology;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::PathBuf;
use std::sync::{Arc, MutexGuard, PoisonError};

use cluster::Source;
use cri::service::RuntimeService;
use cri::v1;
use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod, PodStatus, ResourceHealth, ResourceStatus};
use pod::spec::{self, Role};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::admission::Rejection;
use crate::context::{name_of, uid_of};
use crate::metrics::Metrics;
use crate::plugins::Handler;
use claims::{Claims, Patience};
use cpu::live::Live;
use cpu::{CpuError, CpuSet, Cpus};
use devices::{Devices, Extras, Need};
use memory::Memory;
use policies::{Policies, Scope};
use topology::{Hint, Hints, Machine, Mask, Nodes, Policy};

/// Configuration of the managers.
#[derive(Debug, Clone)]
pub struct Config {
    /// The kubelet's root.
    pub root: PathBuf,
    /// Where the kernel tells of the machine: `/sys`.
    pub sys: PathBuf,
    /// What the operator wants.
    pub policies: Policies,
    /// How long drivers of claims may take.
    pub patience: Patience,
}

impl Config {
    /// A node that gives nothing out but devices.
    pub fn plain(root: PathBuf) -> Self {
        Self { root, sys: "/sys".into(), policies: Policies::default(), patience: Patience::default() }
    }
}

/// The managers of a node. Dropping this ends their work; what was given out stays so.
pub struct Resources {
    root: PathBuf,
    devices: Arc<Devices>,
    claims: Arc<Claims>,
    /// CPUs, where some can be a container's own.
    cpus: Option<Arc<Pool>>,
    /// Memory, where some is taken from certain nodes. Short sections only, never over an await.
    memory: Option<std::sync::Mutex<Memory>>,
    topology: policies::Topology,
    nodes: Nodes,
    changed: watch::Sender<()>,
    tasks: TaskTracker,
    stop: DropGuard,
}

/// CPUs that are given away and shared.
struct Pool {
    /// Short sections only, never over an await.
    cpus: std::sync::Mutex<Cpus>,
    live: Live,
}

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Cpus> {
        self.cpus.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why the managers cannot work.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Plugins could not reach the node.
    #[error("the socket for device plugins")]
    Socket(#[from] cri::server::BindError),
    /// The machine is not as the configuration wants it.
    #[error("the CPU manager: {0}")]
    Cpu(String),
    /// The machine is not as the configuration wants it.
    #[error("the memory manager: {0}")]
    Memory(String),
    /// All combinations of so many nodes cannot be compared.
    #[error(
        "the topology manager: this machine has {count} NUMA nodes, more than {nodes_max}; set max-allowable-numa-nodes \
         in topologyManagerPolicyOptions, or topologyManagerPolicy to none"
    )]
    Nodes {
        /// How many the machine has.
        count: usize,
        /// How many are allowed.
        nodes_max: usize,
    },
}

impl Resources {
    /// Recalls what was given out and listens for plugins.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(
        config: &Config,
        runtime: Arc<dyn RuntimeService>,
        source: Arc<dyn Source>,
        metrics: Arc<Metrics>,
    ) -> Result<Arc<Self>, StartError> {
        let topology = config.policies.topology.clone();
        let Policies { cpu, memory, .. } = &config.policies;
        let is_plain = cpu.is_none() && memory.is_none() && topology.policy == Policy::None;
        let machine = Arc::new(if is_plain { Machine::default() } else { Machine::read(&config.sys) });
        let nodes = nodes(&machine, &topology)?;
        let cpus = pool(config, &machine, runtime).map_err(StartError::Cpu)?;
        let memory = memory_of(config, &machine).map_err(StartError::Memory)?;
        let (stop, tasks, changed) = (CancellationToken::new(), TaskTracker::new(), watch::Sender::new(()));
        let dir = config.root.join("device-plugins");
        let devices = Devices::start(dir, changed.clone(), stop.clone(), &tasks).await?;
        let claims = Claims::start(&config.root, source, config.patience, metrics);
        let (root, stop) = (config.root.clone(), stop.drop_guard());
        let resources = Self { root, devices, claims, cpus, memory, topology, nodes, changed, tasks, stop };
        resources.keep_apart();
        Ok(Arc::new(resources))
    }

    /// Keeps containers on the CPUs that they may use, where they do not share all of them.
    fn keep_apart(&self) {
        let (Some(pool), stop) = (self.cpus.clone(), self.stop.token().clone()) else { return };
        self.tasks.spawn(async move {
            let usable = |uid: &str, container: &str| pool.lock().usable(uid, container).to_string();
            stop.run_until_cancelled(pool.live.run(usable)).await;
        });
    }

    /// Serves no plugin any more; returns when the sockets are gone.
    pub async fn stop(&self) {
        self.stop.token().cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Answers who asks what pods have (`pod-resources/kubelet.sock`). `pods` are those that have not ended.
    pub(crate) async fn serve(self: &Arc<Self>, pods: api::Pods) -> Result<(), cri::server::BindError> {
        let listener = cri::server::bind(&self.root.join("pod-resources/kubelet.sock")).await?;
        let service = api::service(self, pods);
        self.tasks.spawn(cri::server::serve_calls(listener, service, self.stop.token().clone()));
        Ok(())
    }

    /// Who takes the device plugins that register as other plugins do, and the drivers of claims.
    pub fn handlers(&self) -> [Arc<dyn Handler>; 2] {
        [self.devices.clone(), self.claims.clone()]
    }

    /// Whether a pod has claims for devices.
    pub(crate) fn has_claims(pod: &Pod) -> bool {
        claims::has_any(pod)
    }

    /// Has the claims of a pod made ready. Done again, it does what is missing. It may be dropped at any time.
    ///
    /// # Errors
    /// What is missing, or which driver does not do it.
    pub(crate) async fn prepare_claims(&self, pod: &Pod) -> Result<(), String> {
        self.claims.prepare(pod).await.map_err(|error| error.to_string())
    }

    /// Has undone what drivers did for the claims of a pod; after a failure it can be repeated.
    ///
    /// # Errors
    /// What is not undone, and why.
    pub(crate) async fn release_claims(&self, uid: &str) -> Result<(), String> {
        let released = self.claims.release(uid).await;
        released.map_err(|error| format!("unprepare dynamic resources: {error}"))
    }

    /// Whether drivers have something to undo for a pod.
    pub(crate) fn holds_claims(&self, uid: &str) -> bool {
        self.claims.holds(uid)
    }

    /// The pods for which they have.
    pub(crate) fn claimants(&self) -> BTreeSet<String> {
        self.claims.pods()
    }

    /// Changes when a driver comes that pods may have waited for.
    pub(crate) fn drivers(&self) -> watch::Receiver<u64> {
        self.claims.news()
    }

    /// The manager that gives a resource to Guaranteed pods for good, if there is one.
    pub(crate) fn pinned(&self, resource: pod::resize::Resource) -> Option<&'static str> {
        match resource {
            pod::resize::Resource::Cpu => self.cpus.is_some().then_some("CPU Manager policy \"static\""),
            pod::resize::Resource::Memory => self.memory.is_some().then_some("Memory Manager policy \"Static\""),
        }
    }

    /// Whether something has to be given to a pod, which takes its time.
    pub(crate) fn concerns(&self, pod: &Pod) -> bool {
        self.cpus.is_some()
            || self.memory.is_some()
            || self.topology.policy != Policy::None
            || spec::containers(pod).any(|(_, container)| !self.devices.requests(container).is_empty())
    }

    /// Pods that are not among `holders` have ended: what they had is free. Called where pods come one after the other, as
    /// it takes from whoever is not on the list.
    pub(crate) fn retain_only(&self, holders: &HashSet<String>) {
        self.devices.retain(&|uid| holders.contains(uid));
        self.retain(holders);
    }

    /// Gives a pod what its containers will need.
    ///
    /// # Errors
    /// Why the node cannot take the pod; then it has got nothing.
    pub(crate) async fn admit(&self, pod: &Pod) -> Result<(), Rejection> {
        let given = self.give(pod).await;
        if given.is_err() {
            self.release(uid_of(pod));
        }
        given
    }

    fn memory(&self) -> Option<MutexGuard<'_, Memory>> {
        self.memory.as_ref().map(|memory| memory.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Pods that have ended leave their CPUs and their memory to the others.
    fn retain(&self, holders: &HashSet<String>) {
        let mut known: BTreeSet<String> = BTreeSet::new();
        if let Some(pool) = &self.cpus {
            known.extend(pool.lock().holders().cloned());
        }
        if let Some(memory) = self.memory() {
            known.extend(memory.holders().cloned());
        }
        for uid in known.iter().filter(|uid| !holders.contains(*uid)) {
            self.release_cpus(uid);
            self.release_memory(uid);
        }
    }

    async fn give(&self, pod: &Pod) -> Result<(), Rejection> {
        let mut reusable = Reusable::default();
        let aligned = (self.topology.policy != Policy::None).then_some(self.topology.scope);
        let whole = if aligned == Some(Scope::Pod) { self.align(&self.hints_of_pod(pod))? } else { None };
        for (role, container) in spec::containers(pod) {
            let affinity = match aligned {
                Some(Scope::Container) => self.align(&self.hints_of_container(pod, container, &reusable))?,
                _ => whole,
            };
            let nodes = affinity.and_then(|hint| hint.affinity);
            self.give_cpus(pod, role, container, nodes, &mut reusable)?;
            self.give_memory(pod, role, container, affinity, &mut reusable)?;
            self.give_devices(uid_of(pod), role, container, nodes, &mut reusable.devices).await?;
        }
        if let Some(pool) = self.cpus.as_ref().filter(|pool| pool.lock().has_own(uid_of(pod))) {
            pool.lock().save(&self.root);
            pool.live.wake();
        }
        if let Some(memory) = self.memory() {
            memory.save(&self.root);
        }
        Ok(())
    }

    /// The NUMA nodes that fit best.
    fn align(&self, hints: &[Hints]) -> Result<Option<Hint>, Rejection> {
        let best = topology::merge(self.topology.policy, &self.nodes, hints);
        best.map(Some).ok_or_else(|| Rejection {
            reason: "TopologyAffinityError".to_owned(),
            message: "Resources cannot be allocated with Topology locality".to_owned(),
        })
    }

    fn hints_of_container(&self, pod: &Pod, container: &Container, reusable: &Reusable) -> Vec<Hints> {
        let (uid, name, all) = (uid_of(pod), container.name.as_str(), self.nodes.all);
        let requests = self.devices.requests(container);
        let devices = requests.iter().map(|(resource, count)| {
            let reusable = reusable.devices.get(resource).cloned().unwrap_or_default();
            let need = Need { uid, container: name, resource, count: *count, reusable, affinity: None };
            self.devices.hints(&need, all)
        });
        let cpus = self.cpus.as_ref().zip(Some(cpu::whole_cpus(pod, container)).filter(|count| *count > 0));
        let mut hints: Vec<Hints> =
            devices.chain(cpus.map(|(pool, count)| pool.lock().hints(count, &reusable.cpus))).collect();
        let wanted = memory::wanted(pod, container);
        if let Some(memory) = self.memory().filter(|_| !wanted.is_empty()) {
            hints.extend(memory.hints(uid, &wanted, &reusable.init));
        }
        hints
    }

    fn hints_of_pod(&self, pod: &Pod) -> Vec<Hints> {
        let uid = uid_of(pod);
        let mut names: BTreeSet<String> = BTreeSet::new();
        for (_, container) in spec::containers(pod) {
            names.extend(self.devices.requests(container).into_iter().map(|(resource, _)| resource));
        }
        let of = |container: &Container, name: &String| {
            let requests = self.devices.requests(container);
            requests.into_iter().find(|(resource, _)| resource == name).map_or(0, |(_, count)| count)
        };
        let devices = names.iter().map(|resource| {
            let count = peak(pod, |container| of(container, resource));
            self.devices.hints(&Need { uid, resource, count, ..Need::default() }, self.nodes.all)
        });
        let cpus = Some(peak(pod, |container| cpu::whole_cpus(pod, container))).filter(|count| *count > 0);
        let cpus = self.cpus.as_ref().zip(cpus);
        let mut hints: Vec<Hints> =
            devices.chain(cpus.map(|(pool, count)| pool.lock().hints(count, &CpuSet::default()))).collect();
        if let Some(memory) = self.memory() {
            let all = memory_of_pod(pod);
            hints.extend(
                Some(all).filter(|all| !all.is_empty()).into_iter().flat_map(|all| memory.hints(uid, &all, &[])),
            );
        }
        hints
    }

    fn give_cpus(
        &self,
        pod: &Pod,
        role: Role,
        container: &Container,
        affinity: Option<Mask>,
        reusable: &mut Reusable,
    ) -> Result<(), Rejection> {
        let (Some(pool), count) = (&self.cpus, cpu::whole_cpus(pod, container)) else { return Ok(()) };
        if count == 0 {
            return Ok(());
        }
        let mut cpus = pool.lock();
        let name = (uid_of(pod), container.name.as_str());
        cpus.give(name, count, affinity, &reusable.cpus).map_err(|error| match error {
            CpuError::TooFew { .. } => unexpected(error),
            CpuError::BrokenCore { .. } | CpuError::TooFewCores { .. } => {
                Rejection { reason: "SMTAlignmentError".to_owned(), message: error.to_string() }
            }
        })?;
        let own = cpus.of(name.0, name.1).cloned().unwrap_or_default();
        reusable.cpus = match role {
            Role::Init => reusable.cpus.or(&own),
            Role::Sidecar | Role::Main | Role::Ephemeral => reusable.cpus.without(&own),
        };
        Ok(())
    }

    fn give_memory(
        &self,
        pod: &Pod,
        role: Role,
        container: &Container,
        affinity: Option<Hint>,
        reusable: &mut Reusable,
    ) -> Result<(), Rejection> {
        let Some(mut memory) = self.memory() else { return Ok(()) };
        let name = (uid_of(pod), container.name.as_str());
        memory.give(name, &memory::wanted(pod, container), affinity, &reusable.init).map_err(unexpected)?;
        if role == Role::Init {
            reusable.init.push(container.name.clone());
        }
        Ok(())
    }

    async fn give_devices(
        &self,
        uid: &str,
        role: Role,
        container: &Container,
        affinity: Option<Mask>,
        reusable: &mut BTreeMap<String, BTreeSet<String>>,
    ) -> Result<(), Rejection> {
        for (resource, count) in self.devices.requests(container) {
            let before = reusable.entry(resource.clone()).or_default();
            let name = container.name.as_str();
            let need = Need { uid, container: name, resource: &resource, count, reusable: before.clone(), affinity };
            self.devices.allocate(&need).await.map_err(unexpected)?;
            let own = self.devices.ids(uid, name, &resource);
            // An init container has ended when the next one begins, which can have its devices.
            match role {
                Role::Init => before.extend(own),
                Role::Sidecar | Role::Main | Role::Ephemeral => before.retain(|id| !own.contains(id)),
            }
        }
        Ok(())
    }

    /// What a container gets when it starts now.
    ///
    /// # Errors
    /// Why its devices are not ready.
    pub(crate) async fn prepare(&self, pod: &Pod, container: &Container) -> Result<Extras, String> {
        let mut extras = self.devices.prepare(uid_of(pod), container).await.map_err(|error| error.to_string())?;
        extras.cdi.extend(self.claims.cdi(pod, container).await.map_err(|error| error.to_string())?);
        let (uid, name) = (uid_of(pod), container.name.as_str());
        let nodes = self.memory().map(|memory| memory.nodes_of(uid, name).nodes().collect::<CpuSet>());
        let extras = Extras { memory_nodes: nodes.filter(|nodes| !nodes.is_empty()), ..extras };
        let Some(pool) = &self.cpus else { return Ok(extras) };
        let cpus = pool.lock();
        let has_own_cpus = cpus.of(uid, name).is_some();
        Ok(Extras { cpus: Some(cpus.usable(uid, name).to_string()), has_own_cpus, ..extras })
    }

    /// A container was made, to run on `cpus` if they matter.
    pub(crate) fn made(&self, uid: &str, container: &str, id: &str, cpus: Option<String>) {
        if let Some(pool) = &self.cpus {
            pool.live.track(uid, container, id, cpus);
        }
    }

    /// Running containers of a pod keep the devices, the CPUs and the memory that they have, though the files are lost which say
    /// that these are theirs. Called before others want something.
    pub(crate) fn restore(&self, pod: &Pod, running: &[v1::ContainerStatus]) {
        for (status, container) in running.iter().filter_map(|status| Some((status, spec_of(pod, status)?))) {
            self.devices.restore(uid_of(pod), &container, &status.annotations);
            let Some(linux) = status.resources.as_ref().and_then(|resources| resources.linux.as_ref()) else {
                continue;
            };
            self.restore_cpus(pod, &container, &linux.cpuset_cpus);
            self.restore_memory(pod, &container, &linux.cpuset_mems);
        }
    }

    fn restore_cpus(&self, pod: &Pod, container: &Container, cpus: &str) {
        let (Some(pool), count) = (&self.cpus, cpu::whole_cpus(pod, container)) else { return };
        let Some(own) = cpus.parse().ok().filter(|_| count > 0) else { return };
        let mut given = pool.lock();
        if given.restore((uid_of(pod), &container.name), count, own) {
            tracing::warn!(pod = %name_of(pod), container = container.name, cpus, "a container keeps the CPUs that it runs on");
            given.save(&self.root);
        }
    }

    fn restore_memory(&self, pod: &Pod, container: &Container, nodes: &str) {
        let (Some(mut memory), wanted) = (self.memory(), memory::wanted(pod, container)) else { return };
        let Some(nodes) = nodes.parse::<CpuSet>().ok().filter(|nodes| !nodes.is_empty()) else { return };
        let name = (uid_of(pod), container.name.as_str());
        if wanted.is_empty() || memory.of(name.0, name.1).is_some() {
            return;
        }
        let hint = Hint { affinity: Some(Mask::of(nodes.iter())), preferred: true };
        match memory.give(name, &wanted, Some(hint), &[]) {
            Ok(()) => memory.save(&self.root),
            Err(error) => {
                tracing::warn!(pod = %name_of(pod), container = container.name, %error, "a container shares memory now")
            }
        }
    }

    /// Containers of a pod, by name and id, have been running since before this daemon began.
    pub(crate) fn adopt<'a>(&self, uid: &str, running: impl Iterator<Item = (&'a str, &'a str)>) {
        let mut running = running.peekable();
        if running.peek().is_some() {
            self.devices.confirm(uid);
        }
        running.for_each(|(container, id)| self.made(uid, container, id, None));
    }

    /// Whether a container of a pod has CPUs of its own: what it does with them is limited by nothing else.
    pub(crate) fn has_own_cpus(&self, uid: &str) -> bool {
        self.cpus.as_ref().is_some_and(|pool| pool.lock().has_own(uid))
    }

    /// Whether this container has.
    pub(crate) fn container_has_own_cpus(&self, uid: &str, name: &str) -> bool {
        self.cpus.as_ref().is_some_and(|pool| pool.lock().of(uid, name).is_some())
    }

    /// A pod has ended.
    pub(crate) fn release(&self, uid: &str) {
        self.devices.release(uid);
        self.release_cpus(uid);
        self.release_memory(uid);
    }

    fn release_memory(&self, uid: &str) {
        if let Some(mut memory) = self.memory()
            && memory.release(uid)
        {
            memory.save(&self.root);
        }
    }

    fn release_cpus(&self, uid: &str) {
        let Some(pool) = &self.cpus else { return };
        pool.live.forget(uid);
        let mut cpus = pool.lock();
        if cpus.release(uid) {
            cpus.save(&self.root);
            pool.live.wake();
        }
    }

    /// Capacity and allocatable of the resources that plugins manage.
    pub(crate) fn amounts(&self) -> BTreeMap<String, (usize, usize)> {
        self.devices.amounts()
    }

    /// Changes of what the node has.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.changed.subscribe()
    }

    /// Pods of which a device has fallen ill or recovered.
    pub(crate) async fn unwell(&self) -> BTreeSet<String> {
        tokio::select! {
            pods = self.devices.unwell() => pods,
            pods = self.claims.unwell() => pods,
        }
    }

    /// Says in a pod's status how its devices are (`allocatedResourcesStatus`).
    pub(crate) fn describe(&self, pod: &Pod, status: &mut PodStatus) {
        for status in status.container_statuses.iter_mut().flatten() {
            self.describe_container(uid_of(pod), status);
        }
        self.claims.describe(pod, status);
    }

    fn describe_container(&self, uid: &str, status: &mut ContainerStatus) {
        let health = self.devices.health(uid, &status.name);
        let devices = |devices: Vec<(String, bool)>| {
            let device = |(id, is_healthy)| ResourceHealth {
                health: Some(if is_healthy { "Healthy" } else { "Unhealthy" }.to_owned()),
                resource_id: id,
                ..ResourceHealth::default()
            };
            devices.into_iter().map(device).collect()
        };
        let resource = |(name, ids)| ResourceStatus { name, resources: Some(devices(ids)) };
        let all: Vec<ResourceStatus> = health.into_iter().map(resource).collect();
        status.allocated_resources_status = (!all.is_empty()).then_some(all);
    }
}

impl std::fmt::Debug for Resources {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Resources").finish_non_exhaustive()
    }
}

/// What the pod says of a container that runs.
fn spec_of(pod: &Pod, status: &v1::ContainerStatus) -> Option<Container> {
    let metadata = status.metadata.as_ref().filter(|_| status.state == v1::ContainerState::ContainerRunning as i32)?;
    spec::container(pod, &metadata.name).map(|(_, container)| container.into_owned())
}

/// What containers of a pod had which have ended before others begin.
#[derive(Default)]
struct Reusable {
    devices: BTreeMap<String, BTreeSet<String>>,
    cpus: CpuSet,
    /// The names of those containers.
    init: Vec<String>,
}

/// The NUMA nodes, as the topology manager looks at them.
fn nodes(machine: &Machine, topology: &policies::Topology) -> Result<Nodes, StartError> {
    let (count, nodes_max) = (machine.nodes.len(), topology.nodes_max);
    if topology.policy != Policy::None && count > nodes_max {
        return Err(StartError::Nodes { count, nodes_max });
    }
    let row = |node: usize| machine.nodes.get(&node).map(|node| node.distances.clone()).unwrap_or_default();
    let numbers = machine.nodes.keys().last().map_or(0, |last| last + 1);
    let distances = topology.closest.then(|| (0..numbers).map(row).collect());
    Ok(Nodes { all: machine.mask(), distances })
}

/// CPUs as they were given away before.
fn pool(
    config: &Config,
    machine: &Arc<Machine>,
    runtime: Arc<dyn RuntimeService>,
) -> Result<Option<Arc<Pool>>, String> {
    let Some(policy) = &config.policies.cpu else {
        // What it says does not hold any more.
        let _ = std::fs::remove_file(config.root.join(cpu::NAME)); // It may never have been there.
        return Ok(None);
    };
    let mut cpus = Cpus::new(machine.clone(), policy)?;
    cpus.recall(Cpus::load(&config.root));
    std::fs::create_dir_all(&config.root).map_err(|error| error.to_string())?;
    cpus.save(&config.root);
    Ok(Some(Arc::new(Pool { cpus: cpus.into(), live: Live::new(runtime) })))
}

/// Memory as it was given out before.
fn memory_of(config: &Config, machine: &Arc<Machine>) -> Result<Option<std::sync::Mutex<Memory>>, String> {
    let Some(policy) = &config.policies.memory else {
        // What it says does not hold any more.
        let _ = std::fs::remove_file(config.root.join(memory::NAME)); // It may never have been there.
        return Ok(None);
    };
    let mut memory = Memory::new(machine, policy)?;
    memory.recall(Memory::load(&config.root));
    std::fs::create_dir_all(&config.root).map_err(|error| error.to_string())?;
    memory.save(&config.root);
    Ok(Some(memory.into()))
}

/// What a pod is to have from certain NUMA nodes, all its containers together.
fn memory_of_pod(pod: &Pod) -> memory::Bytes {
    let all = spec::containers(pod).flat_map(|(_, container)| memory::wanted(pod, container).into_keys());
    let most = |resource: &String| {
        let of = |container: &Container| memory::wanted(pod, container).get(resource).copied().unwrap_or(0);
        peak(pod, |container| usize::try_from(of(container)).unwrap_or(usize::MAX)) as u64
    };
    all.collect::<BTreeSet<_>>().into_iter().map(|resource| (resource.clone(), most(&resource))).collect()
}

/// The most that containers of a pod need at one time.
fn peak(pod: &Pod, of: impl Fn(&Container) -> usize) -> usize {
    let (mut together, mut most) = (0, 0);
    for (role, container) in spec::containers(pod) {
        match role {
            Role::Init => most = most.max(together + of(container)),
            Role::Sidecar | Role::Main | Role::Ephemeral => together += of(container),
        }
    }
    most.max(together)
}

/// As upstream says that something could not be given which the scheduler thought there was.
fn unexpected(error: impl std::fmt::Display) -> Rejection {
    let message = format!("Allocate failed due to {error}, which is unexpected");
    Rejection { reason: "UnexpectedAdmissionError".to_owned(), message }
}

#[cfg(test)]
mod tests;
