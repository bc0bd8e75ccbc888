//! The device manager: plugins that bring devices, and which container has which.
//!
//! ```text
//! plugin ─Register─► server ─► connect ─GetDevicePluginOptions─► ListAndWatch ─► table ─► the Node's capacity
//! admission ─► choose (table) ─GetPreferredAllocation─► reserve ─Allocate─► settle ─► checkpoint
//! start ─PreStartContainer─► extras of the container
//! running container ─its annotation─► restore (table), should the checkpoint be damaged
//! ```
//!
//! Whatever is asked of a plugin has a deadline, and whoever waits is the pod that wants its devices, nobody else.

mod error;
mod extras;
mod kept;
mod saved;
mod server;
mod table;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use k8s_openapi::api::core::v1::Container;
use plugin::device::device_plugin_client::DevicePluginClient;
use plugin::device::{self, DevicePluginOptions, Empty};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::{AbortOnDropHandle, TaskTracker};
use tonic::transport::Channel;

use super::checkpoint;
use super::topology::{Hints, Mask};
pub(crate) use error::DeviceError;
pub(crate) use extras::Extras;
pub(crate) use table::{Amounts, Need};
use table::{Choice, Ids};
pub(super) use table::{Device, Table};

/// How long a plugin may take to make devices ready for a container: some reset hardware.
const ALLOCATE_MAX: Duration = Duration::from_secs(60);
/// How long it may take for anything else; upstream's limit of `PreStartContainer`.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// How long a plugin that registers may take to be reached and to tell its options, as upstream.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// The longest message of a plugin.
const MESSAGE_MAX: usize = 16 << 20;

/// A plugin that is connected.
struct Connection {
    socket: PathBuf,
    client: DevicePluginClient<Channel>,
    options: DevicePluginOptions,
    /// Tells connections apart that had the same socket.
    number: u64,
    /// Follows its devices; ends with the connection.
    watch: Mutex<Option<AbortOnDropHandle<()>>>,
}

#[derive(Default)]
struct State {
    table: Table,
    /// By resource, the newest last: that one is asked.
    plugins: HashMap<String, Vec<Arc<Connection>>>,
    /// Connections so far.
    count: u64,
}

/// The devices of the node.
pub(crate) struct Devices {
    /// `<root>/device-plugins`.
    dir: PathBuf,
    /// Short sections only, never over an await.
    state: Mutex<State>,
    /// Held while the checkpoint is written, so that the newest is written last.
    saving: Mutex<()>,
    /// What the node has is not what it was.
    changed: watch::Sender<()>,
    /// Pods of which a device has fallen ill or recovered, until somebody looks: no more than there are pods.
    unwell: watch::Sender<BTreeSet<String>>,
    /// What was given out is not as the checkpoint has it.
    is_stale: Notify,
    stop: CancellationToken,
    /// For the tasks that follow plugins.
    myself: Weak<Self>,
}

impl Devices {
    /// Recalls what was given out, and answers plugins from now on; `stop` ends that.
    pub(super) async fn start(
        dir: PathBuf,
        changed: watch::Sender<()>,
        stop: CancellationToken,
        tasks: &TaskTracker,
    ) -> Result<Arc<Self>, cri::server::BindError> {
        let (given, registered) = checkpoint::load(&dir.join(saved::NAME), saved::read).unwrap_or_default();
        let state = State { table: Table::recall(given, registered, Instant::now()), ..State::default() };
        let (state, saving, unwell, is_stale) =
            (Mutex::new(state), Mutex::default(), watch::Sender::default(), Notify::new());
        let devices = Arc::new_cyclic(|myself| Self {
            dir,
            state,
            saving,
            changed,
            unwell,
            is_stale,
            stop,
            myself: myself.clone(),
        });
        server::start(&devices, tasks).await?;
        tasks.spawn(keep_checkpoint(devices.clone()));
        Ok(devices)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A plugin for `resource` serves at `socket`. One that did so before at the same place is replaced.
    pub(crate) async fn connect(self: &Arc<Self>, resource: &str, socket: PathBuf) -> Result<(), DeviceError> {
        let failed =
            |cause: String| DeviceError::Unreachable { resource: resource.to_owned(), socket: socket.clone(), cause };
        let channel = plugin::connect(&socket).map_err(|error| failed(error.to_string()))?;
        let mut client = DevicePluginClient::new(channel).max_decoding_message_size(MESSAGE_MAX);
        let asked = tokio::time::timeout(CONNECT_MAX, client.get_device_plugin_options(Empty {})).await;
        let late = || failed(format!("no answer to GetDevicePluginOptions within {} s", CONNECT_MAX.as_secs()));
        let options = asked.map_err(|_| late())?.map_err(|status| failed(error::rpc(&status)))?.into_inner();
        let connection = {
            let mut state = self.lock();
            state.count += 1;
            let (number, watch) = (state.count, Mutex::default());
            let connection = Arc::new(Connection { socket: socket.clone(), client, options, number, watch });
            state.table.came(resource, options);
            let all = state.plugins.entry(resource.to_owned()).or_default();
            all.retain(|other| other.socket != socket);
            all.push(connection.clone());
            connection
        };
        let task =
            tokio::spawn(follow(self.clone(), resource.to_owned(), connection.client.clone(), connection.number));
        *connection.watch.lock().unwrap_or_else(PoisonError::into_inner) = Some(AbortOnDropHandle::new(task));
        tracing::info!(resource, socket = %socket.display(), "a device plugin is connected");
        Ok(())
    }

    /// The plugin of `resource` at `socket` is gone.
    pub(crate) fn disconnect(&self, resource: &str, socket: &Path) {
        self.forget(resource, |connection| connection.socket == socket);
    }

    fn forget(&self, resource: &str, which: impl Fn(&Connection) -> bool) {
        let mut state = self.lock();
        let Some(all) = state.plugins.get_mut(resource) else { return };
        // They end their tasks when they are dropped, which may be the one that runs here: it has nothing more to do.
        let gone: Vec<_> = all.extract_if(.., |connection| which(connection)).collect();
        if all.is_empty() {
            state.plugins.remove(resource);
            state.table.went(resource, Instant::now());
        }
        drop(state);
        for connection in &gone {
            tracing::warn!(resource, socket = %connection.socket.display(), "a device plugin has gone");
        }
        self.changed.send_replace(());
    }

    fn listed(&self, resource: &str, listed: device::ListAndWatchResponse) {
        let devices = listed.devices.into_iter().map(|device| {
            let nodes = device.topology.into_iter().flat_map(|topology| topology.nodes).map(|node| node.id);
            (device.id, Device { is_healthy: device.health == "Healthy", nodes: nodes.collect() })
        });
        let pods = self.lock().table.listed(resource, devices.collect());
        self.changed.send_replace(());
        if !pods.is_empty() {
            self.unwell.send_modify(|unwell| unwell.extend(pods));
        }
        self.is_stale.notify_one();
    }

    /// Pods of which a device has fallen ill or recovered since this was asked last.
    pub(super) async fn unwell(&self) -> BTreeSet<String> {
        let mut unwell = self.unwell.subscribe();
        // The sender lives as long as this.
        let _ = unwell.wait_for(|pods| !pods.is_empty()).await;
        self.unwell.send_replace(BTreeSet::new())
    }

    /// Writes the checkpoint, on a thread that may wait for the disk. Returns when it is written.
    async fn save(&self) {
        let Some(devices) = self.myself.upgrade() else { return };
        let _ = tokio::task::spawn_blocking(move || devices.save_now()).await; // It fails only when the runtime is ending.
    }

    fn save_now(&self) {
        let _saving = self.saving.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = {
            let state = self.lock();
            let resources = state.table.resources.iter();
            let registered = resources.map(|(name, known)| (name.clone(), known.devices.keys().cloned().collect()));
            saved::write(&state.table.given, registered.collect())
        };
        let path = self.dir.join(saved::NAME);
        if let Err(error) = checkpoint::save(&path, &bytes) {
            tracing::error!(path = %path.display(), %error, "what devices were given out cannot be kept");
        }
    }

    /// Capacity and allocatable of each resource.
    pub(crate) fn amounts(&self) -> BTreeMap<String, Amounts> {
        self.lock().table.amounts(Instant::now())
    }

    /// What a container wants of the resources that plugins manage.
    pub(crate) fn requests(&self, container: &Container) -> Vec<(String, usize)> {
        let limits = container.resources.iter().flat_map(|resources| resources.limits.iter().flatten());
        let wanted = limits.filter(|(name, _)| is_extended(name)).filter_map(|(name, amount)| {
            let count = pod::quantity::Quantity::parse(&amount.0).ok()?.units();
            Some((name.clone(), usize::try_from(count).ok().filter(|count| *count > 0)?))
        });
        let wanted: Vec<_> = wanted.collect();
        if wanted.is_empty() {
            return wanted;
        }
        let state = self.lock();
        wanted.into_iter().filter(|(name, _)| state.table.manages(name)).collect()
    }

    /// From which NUMA nodes a need can be met.
    pub(crate) fn hints(&self, need: &Need<'_>, machine: Mask) -> Hints {
        self.lock().table.hints(need, machine)
    }

    /// The devices that a container has of a resource.
    pub(crate) fn ids(&self, uid: &str, container: &str, resource: &str) -> Ids {
        self.lock().table.allocation(uid, container, resource).map(table::Allocation::ids).unwrap_or_default()
    }

    /// Meets a need. Nothing is given out if it fails.
    pub(crate) async fn allocate(&self, need: &Need<'_>) -> Result<(), DeviceError> {
        let Some((connection, ids, reservation)) = self.reserve(need).await? else { return Ok(()) };
        let request = device::AllocateRequest {
            container_requests: vec![device::ContainerAllocateRequest { devices_ids: ids.into_iter().collect() }],
        };
        let mut client = connection.client.clone();
        let answer = self.ask(need.resource, &connection, "Allocate", ALLOCATE_MAX, client.allocate(request)).await?;
        let mut answers = answer.container_responses.into_iter();
        let answer = answers.next().ok_or_else(|| DeviceError::NoAnswer { resource: need.resource.to_owned() })?;
        reservation.settle(answer);
        // Before the container starts: after a crash nobody else may get them.
        self.save().await;
        Ok(())
    }

    /// Chooses devices and reserves them; nothing if the container has them already.
    async fn reserve<'a>(
        &'a self,
        need: &'a Need<'a>,
    ) -> Result<Option<(Arc<Connection>, Ids, Reservation<'a>)>, DeviceError> {
        let mut preferred = None;
        loop {
            let (connection, available, chosen) = {
                let mut state = self.lock();
                let connection = state.plugins.get(need.resource).and_then(|all| all.last()).cloned();
                let asks = connection.as_ref().is_some_and(|one| one.options.get_preferred_allocation_available);
                let choice = state.table.choose(need, asks, preferred.as_ref())?;
                if choice == Choice::Has {
                    return Ok(None);
                }
                let gone = || DeviceError::Unregistered { resource: need.resource.to_owned() };
                let connection = connection.ok_or_else(gone)?;
                match choice {
                    Choice::Ask { available, chosen } => (connection, available, chosen),
                    Choice::Take(ids) => {
                        state.table.reserve(need, &ids);
                        return Ok(Some((connection, ids, Reservation { devices: self, need, is_settled: false })));
                    }
                    Choice::Has => return Ok(None),
                }
            };
            preferred = Some(self.preferred(need, &connection, available, chosen).await?);
        }
    }

    async fn preferred(
        &self,
        need: &Need<'_>,
        connection: &Connection,
        available: Ids,
        chosen: Ids,
    ) -> Result<Ids, DeviceError> {
        const CALL: &str = "GetPreferredAllocation";
        let wanted = device::ContainerPreferredAllocationRequest {
            available_device_i_ds: available.into_iter().collect(),
            must_include_device_i_ds: chosen.into_iter().collect(),
            allocation_size: i32::try_from(need.count).unwrap_or(i32::MAX),
        };
        let request = device::PreferredAllocationRequest { container_requests: vec![wanted] };
        let mut client = connection.client.clone();
        let call = client.get_preferred_allocation(request);
        let answer = self.ask(need.resource, connection, CALL, ANSWER_MAX, call).await?;
        Ok(answer.container_responses.into_iter().next().into_iter().flat_map(|one| one.device_i_ds).collect())
    }

    /// Asks a plugin, with a deadline. A plugin that goes meanwhile is noticed by the connection.
    async fn ask<T>(
        &self,
        resource: &str,
        connection: &Connection,
        call: &'static str,
        limit: Duration,
        answer: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T, DeviceError> {
        match tokio::time::timeout(limit, answer).await {
            Ok(Ok(answer)) => Ok(answer.into_inner()),
            Ok(Err(status)) => Err(DeviceError::Refused { call, status: Box::new(status) }),
            Err(_) => {
                let (resource, socket) = (resource.to_owned(), connection.socket.clone());
                Err(DeviceError::Hung { call, resource, socket, limit_s: limit.as_secs() })
            }
        }
    }

    /// Makes the devices of a container ready for its start, and says what it gets with them.
    pub(crate) async fn prepare(&self, uid: &str, container: &Container) -> Result<Extras, DeviceError> {
        for (resource, count) in self.requests(container) {
            let need = Need { uid, container: &container.name, resource: &resource, count, ..Need::default() };
            self.make_ready(&need).await?;
        }
        let state = self.lock();
        let resources = state.table.given.get(uid).and_then(|pod| pod.get(&container.name));
        let answers = resources.into_iter().flat_map(BTreeMap::values).filter_map(|one| one.answer.as_ref());
        let mut extras = Extras::of(answers);
        extras.annotations.extend(resources.and_then(kept::write).map(|text| (kept::ANNOTATION.to_owned(), text)));
        Ok(extras)
    }

    /// A running container has the devices that its annotation names, though the checkpoint is lost which says so: those of
    /// resources that it wants.
    pub(crate) fn restore(&self, uid: &str, container: &Container, annotations: &HashMap<String, String>) {
        let Some(devices) = annotations.get(kept::ANNOTATION) else { return };
        let limits = container.resources.iter().flat_map(|resources| resources.limits.iter().flatten());
        let wanted: BTreeSet<&String> = limits.map(|(name, _)| name).filter(|name| is_extended(name)).collect();
        for (resource, ids) in kept::read(devices).into_iter().filter(|(resource, _)| wanted.contains(resource)) {
            let said = format!("{ids:?}");
            if self.lock().table.restore(uid, &container.name, &resource, ids) {
                tracing::warn!(
                    uid,
                    container = container.name,
                    resource,
                    said,
                    "a container keeps the devices that it runs with"
                );
            }
        }
    }

    async fn make_ready(&self, need: &Need<'_>) -> Result<(), DeviceError> {
        let is_ready = {
            let state = self.lock();
            let allocation = state.table.allocation(need.uid, need.container, need.resource);
            allocation.is_some_and(|one| one.is_confirmed && one.answer.is_some())
        };
        if !is_ready {
            // The pod is from before the node's start: its plugin has to be there again, or what it had is not known.
            self.allocate(need).await?;
            self.lock().table.confirm_one(need);
        }
        let Some(connection) = self.readying(need.resource)? else { return Ok(()) };
        let ids = self.ids(need.uid, need.container, need.resource);
        let request = device::PreStartContainerRequest { devices_ids: ids.into_iter().collect() };
        let mut client = connection.client.clone();
        let call = client.pre_start_container(request);
        self.ask(need.resource, &connection, "PreStartContainer", ANSWER_MAX, call).await.map(drop)
    }

    /// The plugin that has to be told before a container with this resource starts, if it wants to be.
    fn readying(&self, resource: &str) -> Result<Option<Arc<Connection>>, DeviceError> {
        let state = self.lock();
        let forgotten = || DeviceError::Forgotten { resource: resource.to_owned() };
        let wants_it = state.table.resources.get(resource).ok_or_else(forgotten)?.options.pre_start_required;
        match state.plugins.get(resource).and_then(|all| all.last()) {
            Some(connection) => Ok(connection.options.pre_start_required.then(|| connection.clone())),
            None if wants_it => Err(DeviceError::Away { resource: resource.to_owned() }),
            None => Ok(None),
        }
    }

    /// The containers of a pod were running already when this daemon began.
    pub(crate) fn confirm(&self, uid: &str) {
        self.lock().table.confirm(uid);
    }

    /// Takes back what a pod has.
    pub(crate) fn release(&self, uid: &str) {
        if self.lock().table.release(uid) {
            self.is_stale.notify_one();
        }
    }

    /// Takes back what all pods have that are not among `holders`.
    pub(crate) fn retain(&self, holders: &dyn Fn(&str) -> bool) {
        let gone: Vec<String> = self.lock().table.given.keys().filter(|uid| !holders(uid)).cloned().collect();
        gone.iter().for_each(|uid| self.release(uid));
    }

    /// The devices of a container: resource, id, NUMA nodes.
    pub(crate) fn of(&self, uid: &str, container: &str) -> Vec<(String, String, Vec<i64>)> {
        let state = self.lock();
        let resources = state.table.given.get(uid).and_then(|pod| pod.get(container)).into_iter().flatten();
        resources.flat_map(|(name, allocation)| allocation.near(name)).collect()
    }

    /// All devices that can be given out, also those that are: resource, id, NUMA nodes.
    pub(crate) fn usable(&self) -> Vec<(String, String, Vec<i64>)> {
        let state = self.lock();
        let all = state.table.resources.iter().flat_map(|(name, known)| {
            let usable = known.usable().into_iter();
            usable.map(|id| (name.clone(), known.devices[&id].nodes.clone(), id)).collect::<Vec<_>>()
        });
        all.map(|(name, nodes, id)| (name, id, nodes)).collect()
    }

    /// The devices of a container by resource, each with whether it is healthy as far as is known.
    pub(crate) fn health(&self, uid: &str, container: &str) -> Vec<(String, Vec<(String, bool)>)> {
        let state = self.lock();
        let resources = state.table.given.get(uid).and_then(|pod| pod.get(container)).into_iter().flatten();
        let healthy = |resource: &str, id: &str| {
            let known = state.table.resources.get(resource).and_then(|known| known.devices.get(id));
            known.is_none_or(|device| device.is_healthy)
        };
        let of = |(resource, allocation): (&String, &table::Allocation)| {
            let ids = allocation.ids().into_iter();
            (resource.clone(), ids.map(|id| (id.clone(), healthy(resource, &id))).collect())
        };
        resources.map(of).collect()
    }
}

/// Writes the checkpoint whenever it is stale. What was taken back may be in it a little longer.
async fn keep_checkpoint(devices: Arc<Devices>) {
    while devices.stop.run_until_cancelled(devices.is_stale.notified()).await.is_some() {
        devices.save().await;
    }
    devices.save().await;
}

/// Devices that are given out if their plugin says so, and taken back if not.
struct Reservation<'a> {
    devices: &'a Devices,
    need: &'a Need<'a>,
    is_settled: bool,
}

impl Reservation<'_> {
    fn settle(mut self, answer: device::ContainerAllocateResponse) {
        self.is_settled = true;
        self.devices.lock().table.settle(self.need, answer);
    }
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        if !self.is_settled {
            self.devices.lock().table.cancel(self.need);
        }
    }
}

/// Takes in what a plugin says of its devices until it goes.
async fn follow(devices: Arc<Devices>, resource: String, mut client: DevicePluginClient<Channel>, number: u64) {
    let stop = devices.stop.clone();
    let followed = async {
        let mut stream = client.list_and_watch(Empty {}).await?.into_inner();
        while let Some(listed) = stream.message().await? {
            devices.listed(&resource, listed);
        }
        Ok::<_, tonic::Status>(())
    };
    if let Some(Err(status)) = stop.run_until_cancelled(followed).await {
        tracing::info!(resource, error = error::rpc(&status), "a device plugin tells of its devices no more");
    }
    if !stop.is_cancelled() {
        devices.forget(&resource, |connection| connection.number == number);
    }
}

/// A name that a plugin can give to its resource: with a domain that is not Kubernetes' own.
pub(crate) fn is_extended(name: &str) -> bool {
    let Some((domain, resource)) = name.split_once('/') else { return false };
    let is_word = |text: &str, extra: &[u8]| {
        let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = text.as_bytes();
        edge(bytes.first())
            && edge(bytes.last())
            && bytes.iter().all(|b| b.is_ascii_alphanumeric() || extra.contains(b))
    };
    // Quota names it with this in front, which has to be a DNS name, too.
    let quota_max = 253 - "requests.".len();
    let is_domain = domain.len() <= quota_max
        && domain.split('.').all(|label| is_word(label, b"-") && !label.bytes().any(|byte| byte.is_ascii_uppercase()));
    let is_ours = name.contains("kubernetes.io/") || name.starts_with("requests.");
    is_domain && !is_ours && resource.len() <= 63 && is_word(resource, b"-_.")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_resources() {
        for name in ["example.com/gpu", "a/b", "vendor-1.example.com/gpu.x_y-z", "nvidia.com/mig-1g.5gb"] {
            assert!(is_extended(name), "{name}");
        }
        for name in [
            "cpu",
            "gpu",
            "kubernetes.io/gpu",
            "x.kubernetes.io/y",
            "requests.example.com/gpu",
            "Example.com/gpu",
            "example.com/",
            "/gpu",
            "example.com/-gpu",
            "example..com/gpu",
            "a/b/c",
            "example.com/a b",
            "",
        ] {
            assert!(!is_extended(name), "{name}");
        }
    }
}
