//! What a node gives to its containers beyond shares: devices, whole CPUs, memory of certain NUMA nodes.
//!
//! ```text
//! manager ─admit(pod)─► Resources ─┬─ devices    plugins and who has which device
//! start ──prepare─────►            ├─ topology   from which NUMA nodes
//! node status ─amounts─►           ╰─ checkpoint what was given out, over restarts
//! ```
//!
//! A pod gets all that its containers will need when the node admits it, and keeps it until it has ended. A node that has
//! nothing of this to give only listens for plugins.

mod checkpoint;
mod devices;
pub mod topology;

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, ContainerStatus, Pod, PodStatus, ResourceHealth, ResourceStatus};
use pod::spec::{self, Role};
use tokio::sync::{Mutex, mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::admission::Rejection;
use crate::context::uid_of;
use crate::plugins::Handler;
use devices::{Devices, Extras, Need};

/// Configuration of the managers.
#[derive(Debug, Clone)]
pub struct Config {
    /// The kubelet's root.
    pub root: PathBuf,
}

/// The managers of a node. Dropping this ends their work; what was given out stays so.
pub struct Resources {
    devices: Arc<Devices>,
    changed: watch::Sender<()>,
    /// Pods whose devices are not as they were; taken by who tells their workers.
    unwell: Mutex<mpsc::UnboundedReceiver<std::collections::BTreeSet<String>>>,
    tasks: TaskTracker,
    stop: DropGuard,
}

/// Why the managers cannot work.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Plugins could not reach the node.
    #[error("the socket for device plugins")]
    Socket(#[from] cri::server::BindError),
}

impl Resources {
    /// Recalls what was given out and listens for plugins.
    ///
    /// # Errors
    /// See [`StartError`].
    pub async fn start(config: &Config) -> Result<Arc<Self>, StartError> {
        let (stop, tasks, changed) = (CancellationToken::new(), TaskTracker::new(), watch::Sender::new(()));
        let (tell, unwell) = mpsc::unbounded_channel();
        let dir = config.root.join("device-plugins");
        let devices = Devices::start(dir, changed.clone(), tell, stop.clone(), &tasks).await?;
        Ok(Arc::new(Self { devices, changed, unwell: unwell.into(), tasks, stop: stop.drop_guard() }))
    }

    /// Serves no plugin any more; returns when the sockets are gone.
    pub async fn stop(&self) {
        self.stop.token().cancel();
        self.tasks.close();
        self.tasks.wait().await;
    }

    /// Who takes the device plugins that register as other plugins do.
    pub fn handler(&self) -> Arc<dyn Handler> {
        self.devices.clone()
    }

    /// Whether something has to be given to a pod, which takes its time.
    pub(crate) fn concerns(&self, pod: &Pod) -> bool {
        spec::containers(pod).any(|(_, container)| !self.devices.requests(container).is_empty())
    }

    /// Gives a pod what its containers will need. Pods that are not among `holders` have ended: what they had is free.
    ///
    /// # Errors
    /// Why the node cannot take the pod; then it has got nothing.
    pub(crate) async fn admit(&self, pod: &Pod, holders: &HashSet<String>) -> Result<(), Rejection> {
        self.devices.retain(&|uid| holders.contains(uid));
        let given = self.give(pod).await;
        if given.is_err() {
            self.release(uid_of(pod));
        }
        given
    }

    async fn give(&self, pod: &Pod) -> Result<(), Rejection> {
        let mut reusable = BTreeMap::new();
        for (role, container) in spec::containers(pod) {
            self.give_devices(uid_of(pod), role, container, &mut reusable).await?;
        }
        Ok(())
    }

    async fn give_devices(
        &self,
        uid: &str,
        role: Role,
        container: &Container,
        reusable: &mut BTreeMap<String, std::collections::BTreeSet<String>>,
    ) -> Result<(), Rejection> {
        for (resource, count) in self.devices.requests(container) {
            let before = reusable.entry(resource.clone()).or_default();
            let (name, affinity) = (container.name.as_str(), None);
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
        self.devices.prepare(uid_of(pod), container).await.map_err(|error| error.to_string())
    }

    /// The containers of a pod have been running since before this daemon began.
    pub(crate) fn confirm(&self, uid: &str) {
        self.devices.confirm(uid);
    }

    /// A pod has ended.
    pub(crate) fn release(&self, uid: &str) {
        self.devices.release(uid);
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
    pub(crate) async fn unwell(&self) -> std::collections::BTreeSet<String> {
        match self.unwell.lock().await.recv().await {
            Some(pods) => pods,
            None => std::future::pending().await,
        }
    }

    /// Says in a pod's status how its devices are (`allocatedResourcesStatus`).
    pub(crate) fn describe(&self, pod: &Pod, status: &mut PodStatus) {
        for status in status.container_statuses.iter_mut().flatten() {
            self.describe_container(uid_of(pod), status);
        }
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

/// As upstream says that something could not be given which the scheduler thought there was.
fn unexpected(error: impl std::fmt::Display) -> Rejection {
    let message = format!("Allocate failed due to {error}, which is unexpected");
    Rejection { reason: "UnexpectedAdmissionError".to_owned(), message }
}
