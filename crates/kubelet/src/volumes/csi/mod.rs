//! Volumes of CSI drivers.
//!
//! ```text
//! plugins ─► Drivers          pod ─► CsiVolume ─► attached? ─► NodeStageVolume ─► NodePublishVolume ─► fsGroup, size
//!                             pod gone ─► Record on disk ─► NodeUnpublishVolume ─► NodeUnstageVolume, by the last pod
//! ```
//!
//! What is mounted is known from disk: a record is written before the first call and removed after the last, so that a daemon
//! that dies in between leaves nothing behind that the next one does not know of. Calls of one volume come one after the
//! other, as CSI wants it; a driver that hangs holds up the pods that use it, and each of its calls ends with a deadline.

mod attach;
mod driver;
mod record;
mod stats;
mod volume;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use async_trait::async_trait;
use cluster::{EventKind, Key, Source, event_about};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::storage::v1::CSIDriver;
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use plugin::csi::{
    CapacityRange, NodeExpandVolumeRequest, NodePublishVolumeRequest, NodeStageVolumeRequest,
    NodeUnpublishVolumeRequest, NodeUnstageVolumeRequest,
};
use serde_json::json;
use tokio::sync::{Mutex as Turn, OwnedMutexGuard, watch};

use super::ground::Ground;
use super::place::{FsGroup, Writable};
use super::tokens::{Tokens, Wanted};
use super::{Cause, VolumesConfig, remove};
use crate::context::uid_of;
use crate::node::csi_node::{CsiNode, Driver as Announced};
use crate::plugins::{Handler, Plugin, Refusal};
use crate::threads::patient;
pub use attach::ATTACHED_WITHIN;
pub use driver::DriverError;
use driver::{Driver, Drivers};
use record::Published;
pub use stats::{Usage, VolumeStats};
pub(super) use volume::CsiVolume;

/// How long a driver may take for a call (upstream's `csiTimeout`).
pub const CALL_WITHIN: Duration = Duration::from_secs(120);

/// The key under which drivers find tokens of the pod's service account.
const TOKENS: &str = "csi.storage.k8s.io/serviceAccount.tokens";

/// The CSI volumes of a node's pods.
pub(super) struct Csi {
    config: VolumesConfig,
    source: Arc<dyn Source>,
    drivers: Drivers,
    /// Who may call a driver about a volume, by its unique name. Guards the map for short sections; an entry goes with its
    /// last user.
    turns: Mutex<HashMap<String, Weak<Turn<()>>>>,
    /// Volumes that pods here want or have, with the pods' uids, as the attach/detach controller must know before it takes
    /// one away.
    in_use: watch::Sender<BTreeSet<(String, String)>>,
    /// The pods with volumes that are published again from time to time. Guarded for short sections.
    republished: Mutex<BTreeSet<String>>,
}

/// One publication: whose, of what, by whom.
struct Errand<'a> {
    pod: &'a Arc<Pod>,
    volume: &'a CsiVolume,
    driver: Driver,
    /// What the cluster says of the driver.
    about: Option<Arc<CSIDriver>>,
    publish_context: HashMap<String, String>,
}

impl Errand<'_> {
    /// Whether the driver wants to publish the volume again from time to time.
    fn is_repeated(&self) -> bool {
        self.about.as_ref().is_some_and(|about| about.spec.requires_republish == Some(true))
    }
}

impl Csi {
    pub(super) fn new(config: VolumesConfig, source: Arc<dyn Source>) -> Self {
        let left = record::of_node(&config.paths).into_iter();
        let left = left.filter(|(_, one)| one.record.is_persistent());
        let in_use = left.map(|(uid, one)| (one.record.unique_name(), uid)).collect();
        let drivers = Drivers::new(config.csi_call_within);
        Self {
            config,
            source,
            drivers,
            turns: Mutex::default(),
            in_use: watch::Sender::new(in_use),
            republished: Mutex::default(),
        }
    }

    /// Volumes that pods here want or have, with the pods' uids.
    pub(super) fn in_use(&self) -> watch::Receiver<BTreeSet<(String, String)>> {
        self.in_use.subscribe()
    }

    /// Changes when a driver comes.
    pub(super) fn news(&self) -> watch::Receiver<u64> {
        self.drivers.news()
    }

    /// Whether some pod has a volume that its driver wants to publish again from time to time.
    pub(super) fn republishes(&self) -> bool {
        !self.lock_republished().is_empty()
    }

    /// The pods that have such volumes.
    pub(super) fn republished(&self) -> Vec<String> {
        self.lock_republished().iter().cloned().collect()
    }

    fn lock_republished(&self) -> std::sync::MutexGuard<'_, BTreeSet<String>> {
        self.republished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows a volume to a pod. Done again, it changes nothing but what the driver makes of it. It may be dropped at any
    /// time: what was begun is taken down with the pod.
    pub(super) async fn publish(
        &self,
        pod: &Arc<Pod>,
        volume: &CsiVolume,
        ground: &Arc<Ground>,
        tokens: &Tokens,
    ) -> Result<(), Cause> {
        let about = self.source.csi_driver(&volume.driver).await.map_err(|reason| Cause::Source { reason })?;
        volume.check_mode(about.as_deref())?;
        let publish_context = self.attached(pod, volume, about.as_deref()).await?;
        let driver = self.drivers.get(&volume.driver).await?;
        let errand = Errand { pod, volume, driver, about, publish_context };
        let _turn = self.turn(&volume.unique_name()).await;
        if ground.is_over() {
            return Err(Cause::Over);
        }
        if errand.is_repeated() {
            self.lock_republished().insert(uid_of(pod).to_owned());
        }
        let staging = self.stage(&errand).await?;
        self.show(&errand, staging.clone(), tokens).await?;
        self.give_to_group(&errand, ground).await?;
        self.grow(&errand, staging).await
    }

    /// Does for a volume that a pod has what has to be done while the pod runs: lets it grow, publishes it again if its
    /// driver wants that.
    pub(super) async fn refresh(
        &self,
        pod: &Arc<Pod>,
        volume: &CsiVolume,
        ground: &Arc<Ground>,
        tokens: &Tokens,
    ) -> Result<(), Cause> {
        let about = self.source.csi_driver(&volume.driver).await.map_err(|reason| Cause::Source { reason })?;
        let repeats = about.as_ref().is_some_and(|about| about.spec.requires_republish == Some(true));
        let grows = volume.persistent().is_some_and(|persistent| persistent.grows_to.is_some());
        if !repeats && !grows {
            return Ok(());
        }
        let publish_context = self.attached(pod, volume, about.as_deref()).await?;
        let driver = self.drivers.get(&volume.driver).await?;
        let stages = driver.abilities.stages && volume.persistent().is_some();
        let errand = Errand { pod, volume, driver, about, publish_context };
        let _turn = self.turn(&volume.unique_name()).await;
        if ground.is_over() {
            return Err(Cause::Over);
        }
        let staging = stages.then(|| volume.staging(&self.config.paths).to_string_lossy().into_owned());
        let staging = staging.unwrap_or_default();
        if repeats {
            self.show(&errand, staging.clone(), tokens).await?;
        }
        self.grow(&errand, staging).await
    }

    /// Makes the volume ready for all pods of the node, if the driver wants that. Returns where.
    async fn stage(&self, errand: &Errand<'_>) -> Result<String, Cause> {
        let Errand { pod, volume, driver, publish_context, .. } = errand;
        let Some(persistent) = volume.persistent().filter(|_| driver.abilities.stages) else {
            return Ok(String::new());
        };
        // The pod's record first: it is what takes the staged volume down.
        self.record(pod, volume).await?;
        let (paths, wanted) = (self.config.paths.clone(), (*volume).clone());
        let staging = patient(move || record::stage(&paths, &wanted)).await??;
        let staging_target_path = staging.to_string_lossy().into_owned();
        let request = NodeStageVolumeRequest {
            volume_id: volume.handle.clone(),
            publish_context: publish_context.clone(),
            staging_target_path: staging_target_path.clone(),
            volume_capability: Some(volume.capability(driver.abilities, group_of(pod))),
            secrets: volume::secret(self.source.store(), persistent.stage_secret.as_ref())?,
            volume_context: volume.attributes.clone().into_iter().collect(),
        };
        driver.stage(request).await?;
        Ok(staging_target_path)
    }

    /// Shows the volume at the pod's own place.
    async fn show(&self, errand: &Errand<'_>, staging_target_path: String, tokens: &Tokens) -> Result<(), Cause> {
        let Errand { pod, volume, driver, about, publish_context } = errand;
        self.record(pod, volume).await?;
        let mut secrets = volume::secret(self.source.store(), volume.publish_secret.as_ref())?;
        let mut volume_context = volume.context(about.as_deref(), pod);
        if let Some(text) = self.tokens(pod, about.as_deref(), tokens).await? {
            let in_secrets =
                about.as_ref().is_some_and(|about| about.spec.service_account_token_in_secrets == Some(true));
            let place = if in_secrets { &mut secrets } else { &mut volume_context };
            place.insert(TOKENS.to_owned(), text);
        }
        let request = NodePublishVolumeRequest {
            volume_id: volume.handle.clone(),
            publish_context: publish_context.clone(),
            staging_target_path,
            target_path: volume.target(&self.config.paths, uid_of(pod)).to_string_lossy().into_owned(),
            volume_capability: Some(volume.capability(driver.abilities, group_of(pod))),
            readonly: volume.read_only,
            secrets,
            volume_context,
        };
        Ok(driver.publish(request).await?)
    }

    async fn record(&self, pod: &Pod, volume: &CsiVolume) -> Result<(), Cause> {
        let (config, uid, volume) = (self.config.clone(), uid_of(pod).to_owned(), volume.clone());
        patient(move || record::write(&config.paths, &uid, &volume, &config.node.name)).await?
    }

    /// The tokens that the driver wants to have of the pod's service account, as it expects them.
    async fn tokens(&self, pod: &Pod, about: Option<&CSIDriver>, tokens: &Tokens) -> Result<Option<String>, Cause> {
        let mut all = serde_json::Map::new();
        for request in about.iter().flat_map(|about| about.spec.token_requests.iter().flatten()) {
            let wanted = Wanted::by_driver(request);
            let (token, ends) = tokens.with_end(pod, &wanted).await.map_err(|reason| Cause::Token { reason })?;
            all.insert(request.audience.clone(), json!({"token": token, "expirationTimestamp": ends}));
        }
        Ok((!all.is_empty()).then(|| serde_json::Value::Object(all).to_string()))
    }

    /// Gives the files to the pod's group, if that is left to the node. The volume may not answer: nobody else waits for it.
    async fn give_to_group(&self, errand: &Errand<'_>, ground: &Arc<Ground>) -> Result<(), Cause> {
        let Errand { pod, volume, driver, about, .. } = errand;
        if !volume.takes_group(about.as_deref(), driver.abilities) {
            return Ok(());
        }
        let (group, target) = (FsGroup::of(pod), volume.target(&self.config.paths, uid_of(pod)));
        let ground = ground.clone();
        patient(move || group.apply(&target, Writable::Yes, &|| ground.is_over())).await?
    }

    /// Lets the node take notice of a volume that has grown, and tells the claim.
    async fn grow(&self, errand: &Errand<'_>, staging_target_path: String) -> Result<(), Cause> {
        let Errand { pod, volume, driver, .. } = errand;
        let Some(persistent) = volume.persistent() else { return Ok(()) };
        let Some(size) = &persistent.grows_to else { return Ok(()) };
        if driver.abilities.expands {
            let bytes = pod::quantity::Quantity::parse(size).map_or(0, pod::quantity::Quantity::units);
            let request = NodeExpandVolumeRequest {
                volume_id: volume.handle.clone(),
                volume_path: volume.target(&self.config.paths, uid_of(pod)).to_string_lossy().into_owned(),
                capacity_range: Some(CapacityRange { required_bytes: bytes, limit_bytes: 0 }),
                staging_target_path,
                volume_capability: Some(volume.capability(driver.abilities, None)),
                secrets: volume::secret(self.source.store(), persistent.expand_secret.as_ref())?,
            };
            driver.expand(request).await?;
            let message = format!("MountVolume.NodeExpandVolume succeeded for volume {:?}", volume.name);
            let event = event_about(&***pod, EventKind::Normal, "FileSystemResizeSuccessful", message, "kubelet");
            self.source.event(event);
        }
        let told = self.source.claim_was_expanded(&persistent.claim, &Quantity(size.clone())).await;
        told.map_err(|reason| Cause::Source { reason })
    }

    /// Whether a pod has volumes here that were, or may have been, published. Blocking.
    pub(super) fn has_any(&self, uid: &str) -> bool {
        !record::of_pod(&self.config.paths, uid).is_empty()
    }

    /// Takes down all volumes of a pod. What is gone is no error; after a failure it can be repeated.
    ///
    /// # Errors
    /// The first of those that occurred; the other volumes are gone.
    pub(super) async fn release(&self, uid: &str) -> Result<(), Cause> {
        let (paths, owner) = (self.config.paths.clone(), uid.to_owned());
        let published = tokio::task::spawn_blocking(move || record::of_pod(&paths, &owner)).await.unwrap_or_default();
        if !published.is_empty() {
            // What containers mounted of a volume by its sub-paths.
            let sub_paths = self.config.paths.sub_paths(uid);
            patient(move || remove::mounts_below(&sub_paths)).await??;
        }
        let released = published.iter().map(|one| self.unpublish(uid, one));
        let released: Result<Vec<()>, Cause> = futures_util::future::join_all(released).await.into_iter().collect();
        released?;
        self.lock_republished().remove(uid);
        self.in_use.send_if_modified(|in_use| {
            let before = in_use.len();
            in_use.retain(|(_, pod)| pod != uid);
            in_use.len() != before
        });
        Ok(())
    }

    async fn unpublish(&self, uid: &str, published: &Published) -> Result<(), Cause> {
        let record = &published.record;
        let driver = self.drivers.get(&record.driver_name).await?;
        let _turn = self.turn(&record.unique_name()).await;
        let there = published.clone();
        if !patient(move || there.is_recorded()).await? {
            return Ok(()); // Another one has done it while we waited.
        }
        let (paths, owner, mapped) = (self.config.paths.clone(), uid.to_owned(), published.clone());
        patient(move || record::unmap(&paths, &owner, &mapped)).await??;
        let request = NodeUnpublishVolumeRequest {
            volume_id: record.volume_handle.clone(),
            target_path: published.target.to_string_lossy().into_owned(),
        };
        driver.unpublish(request).await?;
        if record.is_persistent() && driver.abilities.stages && !self.is_shared(uid, published).await {
            let request = NodeUnstageVolumeRequest {
                volume_id: record.volume_handle.clone(),
                staging_target_path: published.staging.to_string_lossy().into_owned(),
            };
            driver.unstage(request).await?;
            let staging = published.staging.clone();
            patient(move || record::forget_staged(&staging)).await??;
        }
        let (paths, published) = (self.config.paths.clone(), published.clone());
        patient(move || record::forget(&paths, &published)).await?
    }

    /// Whether another pod here has the same volume.
    async fn is_shared(&self, uid: &str, published: &Published) -> bool {
        let (paths, uid, record) = (self.config.paths.clone(), uid.to_owned(), published.record.clone());
        let is_shared = tokio::task::spawn_blocking(move || {
            record::of_node(&paths).iter().any(|(other, one)| *other != uid && one.record.is_same(&record))
        });
        // In doubt it stays; the next of its pods takes it down.
        is_shared.await.unwrap_or(true)
    }

    /// Calls of one volume come one after the other.
    async fn turn(&self, volume: &str) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            turns.retain(|_, turn| turn.strong_count() > 0);
            let known = turns.get(volume).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let turn = Arc::default();
                turns.insert(volume.to_owned(), Arc::downgrade(&turn));
                turn
            })
        };
        turn.lock_owned().await
    }
}

impl fmt::Debug for Csi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Csi").field("drivers", &self.drivers).finish_non_exhaustive()
    }
}

fn group_of(pod: &Pod) -> Option<i64> {
    pod::spec::of(pod).security_context.as_ref()?.fs_group
}

/// Takes drivers that register, and makes them known to the cluster.
pub(super) struct DriverHandler {
    pub(super) csi: Arc<Csi>,
    /// None where there is no cluster.
    pub(super) node: Option<CsiNode>,
}

#[async_trait]
impl Handler for DriverHandler {
    fn kind(&self) -> &'static str {
        "CSIPlugin"
    }

    async fn register(&self, plugin: &Plugin) -> Result<(), Refusal> {
        let info = self.csi.drivers.add(plugin).await?;
        let Some(node) = &self.node else { return Ok(()) };
        let topology = info.accessible_topology.unwrap_or_default().segments.into_iter().collect();
        let driver = Announced {
            name: plugin.name.clone(),
            node_id: info.node_id,
            topology,
            volumes_max: i32::try_from(info.max_volumes_per_node).ok().filter(|max| *max > 0),
        };
        node.announce(&driver).await.map_err(|error| Refusal(error.to_string()))
    }

    async fn deregister(&self, plugin: &Plugin) {
        if self.csi.drivers.remove(plugin)
            && let Some(node) = &self.node
        {
            node.withdraw(&plugin.name).await;
        }
    }
}

/// The claim of a volume that the pod's spec describes with it (`ephemeral`).
pub(super) fn claim_of_ephemeral(pod: &Pod, volume: &str) -> Key {
    let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
    Key::new(namespace, &format!("{}-{volume}", pod.metadata.name.as_deref().unwrap_or_default()))
}
