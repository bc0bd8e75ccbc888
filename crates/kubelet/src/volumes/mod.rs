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
mod fresh;
mod ground;
mod make;
mod mounts;
mod payload;
mod place;
mod plan;
mod remove;
mod subpath;
mod tokens;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use cluster::Source;
use k8s_openapi::api::core::v1::Pod;
use tokio_util::task::AbortOnDropHandle;

use crate::context::uid_of;
use crate::facts::NodeFacts;
use crate::paths::Paths;
use crate::threads::patient;

pub use cause::{Cause, VolumeError};
use ground::Ground;
use make::Maker;
pub use mounts::PodVolumes;
pub use plan::image_volumes;
use tokens::{Issued, Tokens};

/// What the volumes of a node need to know.
#[derive(Debug, Clone)]
pub struct VolumesConfig {
    /// Where things are.
    pub paths: Paths,
    /// The node, for the downward API.
    pub node: NodeFacts,
    /// Whether the runtime makes mounts recursively read-only.
    pub recursive_read_only: bool,
}

/// The volumes of a node's pods.
pub struct Volumes {
    config: VolumesConfig,
    source: Arc<dyn Source>,
    tokens: Tokens,
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
        let volumes = Arc::new(Self { config, source, tokens, pods: Mutex::default(), refresher: Mutex::default() });
        let task = tokio::spawn(fresh::keep(Arc::downgrade(&volumes), store));
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
        let pod = Arc::new(pod.clone());
        let tokens = self.tokens.issue(&pod).await.map_err(|error| no_token(&pod, error))?;
        let uid = uid_of(&pod).to_owned();
        let ground = self.lock().entry(uid.clone()).or_default().clone();
        let maker = Arc::new(self.maker(pod, tokens));
        if maker.looks_outside() {
            let (maker, ground) = (maker.clone(), ground.clone());
            patient(move || maker.look_outside(&ground)).await.map_err(|error| over(error.into()))??;
        }
        let shown = ground.clone();
        let made = ground.alone(move || {
            // What changes from now on is written when this is done; what has changed already is in the store.
            let maker = maker.of_latest();
            shown.show(maker.pod.clone());
            Ok(maker.make(&shown).inspect_err(|_| shown.hide()))
        });
        Ok(PodVolumes {
            volumes: made.await.map_err(over)??,
            uid,
            paths: self.config.paths.clone(),
            recursive_read_only: self.config.recursive_read_only,
            ground,
        })
    }

    /// Unmounts and removes everything of a pod, its directory included, and ends what is being made for it. What is gone
    /// is no error; after a failure it can be repeated. It waits for no file system but those that were mounted for the
    /// pod.
    ///
    /// # Errors
    /// What could not be unmounted or removed.
    pub async fn tear_down(&self, uid: &str) -> Result<(), Cause> {
        let ground = self.lock().entry(uid.to_owned()).or_default().clone();
        let dir = self.config.paths.pod(uid);
        ground.end(move || remove::pod(&dir)).await?;
        self.lock().remove(uid);
        self.tokens.forget(uid);
        Ok(())
    }

    /// The pods that have left something on disk, by uid.
    pub fn on_disk(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.config.paths.pods());
        let names = entries.into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names.collect()
    }

    fn maker(&self, pod: Arc<Pod>, tokens: Issued) -> Maker {
        Maker { config: self.config.clone(), store: self.source.store().clone(), pod, tokens }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Arc<Ground>>> {
        // Every section leaves the map whole.
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
