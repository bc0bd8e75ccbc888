//! Volumes: what a pod's containers mount, in upstream's places below the kubelet's root.
//!
//! ```text
//! Pod ──plan──► a Kind for each used volume ──set_up──► PodVolumes ──mounts_for──► CRI mounts
//!                     │                                     ▲
//!  ConfigMap, Secret, Pod changed ──payload──► atomic writer┘   (refreshed while the pod runs)
//! ```
//!
//! What touches a file system runs on threads. Paths of the node and of claims may be on one that does not answer: they are
//! looked at before the pod's own directory is touched, by threads of their own that nobody else waits for, not even the
//! removal of the pod.

mod atomic;
mod cause;
mod certificates;
mod csi;
mod fresh;
mod ground;
mod make;
mod mapped;
mod mounts;
mod nfs;
mod payload;
mod place;
mod plan;
mod remove;
mod subpath;
mod times;
mod tokens;
mod trust;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cluster::Source;
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::context::uid_of;
use crate::facts::NodeFacts;
use crate::node::csi_node::CsiNode;
use crate::paths::Paths;
use crate::plugins::Handler;
use crate::threads::patient;

pub use cause::{Cause, VolumeError};
pub use certificates::CertificateError;
use certificates::Certificates;
pub use csi::{ATTACHED_WITHIN, CALL_WITHIN as CSI_CALL_WITHIN, DriverError, Usage, VolumeStats};
use csi::{Csi, CsiVolume, DriverHandler};
pub use fresh::REPUBLISH_EVERY;
use ground::Ground;
use make::Maker;
pub use mounts::PodVolumes;
pub use plan::image_volumes;
pub use times::Times;
use tokens::Tokens;

/// What the volumes of a node need to know.
#[derive(Debug, Clone)]
pub struct VolumesConfig {
    /// Where things are.
    pub paths: Paths,
    /// The node, for the downward API.
    pub node: NodeFacts,
    /// Whether the runtime makes mounts recursively read-only.
    pub recursive_read_only: bool,
    /// How long a CSI driver may take for a call ([`CSI_CALL_WITHIN`]).
    pub csi_call_within: Duration,
    /// How long a pod waits for a volume to be attached before it says that it is not ([`ATTACHED_WITHIN`]).
    pub attached_within: Duration,
    /// How often volumes are published again whose drivers want that ([`REPUBLISH_EVERY`]).
    pub republish_every: Duration,
}

/// The volumes of a node's pods.
pub struct Volumes {
    config: VolumesConfig,
    source: Arc<dyn Source>,
    tokens: Tokens,
    certificates: Certificates,
    csi: Arc<Csi>,
    /// What waits for NFS servers.
    attempts: Arc<nfs::Attempts>,
    /// Guards the pods that have volumes, by uid. Never held over `.await`.
    pods: Mutex<HashMap<String, Arc<Ground>>>,
    /// Keeps volumes up to date; ends with this value.
    refresher: Mutex<Option<AbortOnDropHandle<()>>>,
}

impl Volumes {
    /// Volumes below `config.paths`, kept up to date with `source`'s ConfigMaps, Secrets and pods from now on. Must be
    /// called inside a tokio runtime.
    pub fn new(config: VolumesConfig, source: Arc<dyn Source>) -> Arc<Self> {
        let store = source.store().clone();
        let tokens = Tokens::new(source.clone());
        let csi = Arc::new(Csi::new(config.clone(), source.clone()));
        let certificates = Certificates::new(source.clone(), &config.node.name);
        let (pods, refresher) = (Mutex::default(), Mutex::default());
        let attempts = nfs::Attempts::new(nfs::POD_MAX, nfs::NODE_MAX);
        let volumes = Arc::new(Self { config, source, tokens, certificates, csi, attempts, pods, refresher });
        let task = tokio::spawn(fresh::keep(Arc::downgrade(&volumes), store, volumes.config.republish_every));
        let task = AbortOnDropHandle::new(task);
        *volumes.refresher.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        volumes
    }

    /// Makes all volumes that the pod's containers use. Repeating it, also after a restart, keeps what is there. It may be
    /// dropped at any time.
    ///
    /// # Errors
    /// The first volume that cannot be had; [`Cause::is_waiting`] says whether it may heal by itself.
    pub async fn set_up(&self, pod: &Pod) -> Result<PodVolumes, VolumeError> {
        self.set_up_timed(pod, &Arc::default()).await
    }

    /// As [`Volumes::set_up`]; notes how long each volume takes.
    ///
    /// # Errors
    /// Those of [`Volumes::set_up`].
    pub async fn set_up_timed(&self, pod: &Pod, times: &Arc<Times>) -> Result<PodVolumes, VolumeError> {
        let pod = Arc::new(pod.clone());
        let credentials = self.credentials(&pod).await?;
        let uid = uid_of(&pod).to_owned();
        let ground = self.lock().entry(uid.clone()).or_default().clone();
        let maker = Arc::new(Maker { times: times.clone(), ..self.maker(pod.clone(), credentials) });
        maker.check_place()?;
        self.publish(&pod, maker.csi_volumes()?, &ground, times).await?;
        let shares = self.mount_shares(&uid, maker.shares()?, times).await?;
        if maker.looks_outside() {
            let (maker, ground) = (maker.clone(), ground.clone());
            patient(move || maker.look_outside(&ground)).await.map_err(|error| over(error.into()))??;
        }
        let shown = ground.clone();
        let made = ground.alone(move || {
            // What changes from now on is written when this is done; what has changed already is in the store.
            let maker = maker.of_latest();
            shown.show(maker.pod.clone());
            Ok(maker.make(&shown, &shares).inspect_err(|_| shown.hide()))
        });
        Ok(PodVolumes {
            volumes: made.await.map_err(over)??,
            uid,
            paths: self.config.paths.clone(),
            recursive_read_only: self.config.recursive_read_only,
            ground,
        })
    }

    async fn publish(
        &self,
        pod: &Arc<Pod>,
        volumes: BTreeMap<String, CsiVolume>,
        ground: &Arc<Ground>,
        times: &Times,
    ) -> Result<(), VolumeError> {
        // One volume may be in a pod under two names.
        let mut distinct: Vec<(&String, &CsiVolume)> = Vec::new();
        for (name, volume) in &volumes {
            if distinct.iter().all(|(_, other)| *other != volume) {
                distinct.push((name, volume));
            }
        }
        let published = distinct.into_iter().map(|(name, volume)| async {
            let published = times.note(name, self.csi.publish(pod, volume, ground, &self.tokens)).await;
            published.map_err(|cause| VolumeError { volume: name.clone(), cause })
        });
        futures_util::future::join_all(published).await.into_iter().collect()
    }

    /// Mounts the shares that are not there from before, side by side, each on a thread of its own.
    async fn mount_shares(
        &self,
        uid: &str,
        shares: BTreeMap<String, nfs::Share>,
        times: &Times,
    ) -> Result<nfs::Mounted, VolumeError> {
        let mounted = shares.into_iter().map(|(volume, share)| async move {
            let mounted = times.note(&volume, share.mount(uid, &self.attempts)).await;
            let mounted = mounted.map_err(|cause| VolumeError { volume: volume.clone(), cause })?;
            Ok((volume, mounted))
        });
        futures_util::future::join_all(mounted).await.into_iter().collect()
    }

    /// What takes CSI drivers that register; `node` is told of them.
    pub fn driver_handler(&self, node: Option<CsiNode>) -> Arc<dyn Handler> {
        Arc::new(DriverHandler { csi: self.csi.clone(), node })
    }

    /// Volumes of CSI drivers that pods here want or have, by the names that the attach/detach controller knows, with the
    /// pods' uids.
    pub fn in_use(&self) -> watch::Receiver<BTreeSet<(String, String)>> {
        self.csi.in_use()
    }

    /// Changes when pods that wait for a CSI driver should try again.
    pub(crate) fn news(&self) -> watch::Receiver<u64> {
        self.csi.news()
    }

    /// How full the volumes of a pod are whose drivers tell.
    pub async fn stats(&self, pod: &Pod) -> Vec<VolumeStats> {
        let maker = self.maker(Arc::new(pod.clone()), Credentials::default());
        match maker.csi_volumes() {
            Ok(volumes) => self.csi.stats(pod, volumes).await,
            // A volume that is not there has no figures.
            Err(_) => Vec::new(),
        }
    }

    /// Unmounts the volumes of a pod that another node may wait for, and ends what is being made for the pod. After a
    /// failure it can be repeated.
    ///
    /// # Errors
    /// What could not be unmounted, by whom, and why.
    pub(crate) async fn release(&self, uid: &str) -> Result<(), Cause> {
        let ground = self.lock().entry(uid.to_owned()).or_default().clone();
        ground.finish();
        self.csi.release(uid).await
    }

    /// Whether a pod has volumes here that another node may wait for.
    pub async fn holds(&self, uid: &str) -> bool {
        let (csi, uid) = (self.csi.clone(), uid.to_owned());
        // In doubt it does.
        tokio::task::spawn_blocking(move || csi.has_any(&uid)).await.unwrap_or(true)
    }

    /// Unmounts and removes everything of a pod, its directory included, and ends what is being made for it. What is gone
    /// is no error; after a failure it can be repeated. It waits for no file system but those that were mounted for the
    /// pod.
    ///
    /// # Errors
    /// What could not be unmounted or removed.
    pub async fn tear_down(&self, uid: &str) -> Result<(), Cause> {
        self.release(uid).await?;
        let ground = self.lock().entry(uid.to_owned()).or_default().clone();
        let (paths, owner) = (self.config.paths.clone(), uid.to_owned());
        let end = move || {
            mapped::take_off_local(&paths, &owner)?;
            remove::pod(&paths.pod(&owner))
        };
        ground.end(end).await?;
        self.lock().remove(uid);
        self.tokens.forget(uid);
        self.certificates.forget(uid);
        Ok(())
    }

    /// The pods that have left something on disk, by uid.
    pub fn on_disk(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.config.paths.pods());
        let names = entries.into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names.collect()
    }

    /// What is made for this pod alone, and waits until what its volumes show beside is known.
    async fn credentials(&self, pod: &Pod) -> Result<Credentials, VolumeError> {
        let tokens = self.tokens.issue(pod).await.map_err(|error| no_token(pod, error))?;
        let certificates = self.certificates.issue(pod).await;
        let certificates = certificates.map_err(|(volume, error)| VolumeError { volume, cause: error.into() })?;
        if trust::shows(pod) {
            self.source.look_up_trust_bundles().await.map_err(|reason| over(Cause::Source { reason }))?;
        }
        Ok(Credentials { tokens, certificates })
    }

    fn maker(&self, pod: Arc<Pod>, credentials: Credentials) -> Maker {
        let (config, store, times) = (self.config.clone(), self.source.store().clone(), Arc::default());
        Maker { config, store, pod, credentials, times }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Ground>>> {
        // Every section leaves the map whole.
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What was made for one pod and is nowhere in the store.
#[derive(Debug, Clone, Default)]
struct Credentials {
    tokens: tokens::Issued,
    certificates: certificates::Issued,
}

/// What concerns all volumes of a pod.
fn over(cause: Cause) -> VolumeError {
    VolumeError { volume: String::new(), cause }
}

/// The volume that shows the token which there is none of.
fn no_token(pod: &Pod, reason: cluster::SourceError) -> VolumeError {
    let volumes = pod::spec::of(pod).volumes.iter().flatten();
    let shows = |volume: &&k8s_openapi::api::core::v1::Volume| {
        let sources = volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten());
        sources.filter_map(|source| source.service_account_token.as_ref()).count() > 0
    };
    let volume = volumes.into_iter().find(shows).map(|volume| volume.name.clone()).unwrap_or_default();
    VolumeError { volume, cause: Cause::Token { reason } }
}
