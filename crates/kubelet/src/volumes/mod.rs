//! Volumes: what a pod's containers mount, in upstream's places below the kubelet's root.
//!
//! ```text
//! Pod ──plan──► a Kind for each used volume ──set_up──► PodVolumes ──mounts_for──► CRI mounts
//!                     │                                     ▲
//!  ConfigMap, Secret, Pod changed ──payload──► atomic writer┘   (refreshed while the pod runs)
//! ```
//!
//! Everything that touches a file system runs on a blocking thread that holds the pod's own lock: a hung path delays
//! its pod and nobody else.

mod atomic;
mod payload;
mod place;
mod plan;
mod remove;
mod subpath;
mod tokens;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cluster::{Key, Source, Store};
use cri::v1;
use k8s_openapi::api::core::v1::{Container, Pod, VolumeMount};
use tokio::sync::{Mutex as PodLock, OwnedMutexGuard};
use tokio::task::{JoinHandle, JoinSet};

use crate::env::Environment;
use crate::facts::{FactError, NodeFacts};
use crate::paths::Paths;

pub use plan::image_volumes;
use plan::{Content, Kind};
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

/// A volume that cannot be had. The text is the one of upstream's `FailedMount` events.
#[derive(Debug, thiserror::Error)]
#[error("MountVolume.SetUp failed for volume {volume:?} : {cause}")]
pub struct VolumeError {
    /// The volume's name in the pod.
    pub volume: String,
    /// Why.
    pub cause: Cause,
}

/// Why a volume cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// What it refers to is not there (yet); it heals when it appears.
    #[error("{kind} {name:?} not found")]
    NotFound {
        /// `configmap`, `secret`, `persistentvolumeclaim`, `persistentvolume`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The ConfigMap or Secret lacks a key that `items` names.
    #[error("references non-existent {kind} key: {key}")]
    NoKey {
        /// `config` or `secret`.
        kind: &'static str,
        /// The key.
        key: String,
    },
    /// The claim has no volume yet.
    #[error("persistentvolumeclaim {0:?} is not bound to a volume yet")]
    Unbound(String),
    /// A kind of volume that this node cannot make; the text says what it can.
    #[error("{0}")]
    Unsupported(String),
    /// A field of the spec that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// A value of the downward API.
    #[error(transparent)]
    Fact(#[from] FactError),
    /// The path of a `hostPath` is not what its `type` says.
    #[error("hostPath type check failed: {path} is not a {expected}")]
    HostPath {
        /// On the node.
        path: PathBuf,
        /// As upstream names it.
        expected: &'static str,
    },
    /// The file system refused.
    #[error("{action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A token of the pod's service account.
    #[error("{reason}: {}", std::error::Error::source(reason).map(ToString::to_string).unwrap_or_default())]
    Token {
        /// Why there is none.
        reason: cluster::SourceError,
    },
    /// The kernel refused.
    #[error(transparent)]
    System(#[from] sys::Error),
}

impl Cause {
    fn file<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::File { action, path: path.to_owned(), source }
    }

    /// Whether waiting may help: an object has yet to appear.
    pub fn is_waiting(&self) -> bool {
        matches!(self, Self::NotFound { .. } | Self::NoKey { .. } | Self::Unbound(_))
    }
}

/// A volume that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Ready {
    /// A file or directory of the node.
    Path { path: PathBuf, read_only: bool },
    /// An image; the runtime mounts it.
    Image { reference: String },
}

/// The volumes of one pod, ready to be mounted.
#[derive(Debug, Clone)]
pub struct PodVolumes {
    uid: String,
    paths: Paths,
    recursive_read_only: bool,
    volumes: BTreeMap<String, Ready>,
}

/// The volumes of a node's pods.
pub struct Volumes {
    config: VolumesConfig,
    source: Arc<dyn Source>,
    tokens: Tokens,
    /// Guards the pods whose volumes are up, by uid. Never held over `.await`.
    pods: Mutex<HashMap<String, Registered>>,
    /// Keeps volumes up to date; ends with this value.
    refresher: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Clone)]
struct Registered {
    pod: Arc<Pod>,
    /// One thing at a time is done to a pod's volumes.
    lock: Arc<PodLock<()>>,
    /// Whether they are set up: only then are they refreshed.
    is_up: bool,
}

/// What may change the content of volumes.
enum Changed {
    Object(Content, Key),
    Pod(Arc<Pod>),
    /// Some tokens are due.
    Tokens,
}

impl Volumes {
    /// Volumes below `config.paths`, kept up to date with `source`'s ConfigMaps, Secrets and pods from now on. Must be
    /// called inside a tokio runtime.
    pub fn new(config: VolumesConfig, source: Arc<dyn Source>) -> Arc<Self> {
        let store = source.store().clone();
        let tokens = Tokens::new(source.clone());
        let volumes = Arc::new(Self { config, source, tokens, pods: Mutex::default(), refresher: Mutex::default() });
        let task = tokio::spawn(keep_fresh(Arc::downgrade(&volumes), store));
        *volumes.refresher.lock().unwrap_or_else(PoisonError::into_inner) = Some(task);
        volumes
    }

    /// Makes all volumes that the pod's containers use. Repeating it, also after a restart, keeps what is there.
    ///
    /// # Errors
    /// The first volume that cannot be had; [`Cause::is_waiting`] says whether it may heal by itself.
    pub async fn set_up(&self, pod: &Pod) -> Result<PodVolumes, VolumeError> {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let pod = Arc::new(pod.clone());
        let tokens = self.tokens.issue(&pod).await.map_err(|error| no_token(&pod, error))?;
        let guard = self.register(&uid, &pod).lock_owned().await;
        let (config, store) = (self.config.clone(), self.source.store().clone());
        let volumes = blocking(guard, move || set_up(&config, &store, &pod, &tokens)).await?;
        if let Some(registered) = self.lock().get_mut(&uid) {
            registered.is_up = true;
        }
        Ok(PodVolumes {
            uid,
            paths: self.config.paths.clone(),
            recursive_read_only: self.config.recursive_read_only,
            volumes,
        })
    }

    /// Unmounts and removes everything of a pod, its directory included. What is gone is no error; after a failure it
    /// can be repeated.
    ///
    /// # Errors
    /// What could not be unmounted or removed.
    pub async fn tear_down(&self, uid: &str) -> Result<(), Cause> {
        let lock = self.lock().get_mut(uid).map(|registered| {
            registered.is_up = false;
            registered.lock.clone()
        });
        let guard = lock.unwrap_or_default().lock_owned().await;
        let dir = self.config.paths.pod(uid);
        blocking(guard, move || remove::pod(&dir)).await?;
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

    fn register(&self, uid: &str, pod: &Arc<Pod>) -> Arc<PodLock<()>> {
        let mut pods = self.lock();
        let registered = pods.entry(uid.to_owned()).or_insert_with(|| Registered {
            pod: pod.clone(),
            lock: Arc::default(),
            is_up: false,
        });
        registered.pod = pod.clone();
        registered.lock.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Registered>> {
        // Every section leaves the map whole.
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pods whose volumes are up and may show what changed.
    fn affected(&self, change: &Changed) -> Vec<String> {
        if matches!(change, Changed::Tokens) {
            return self.tokens.take_due();
        }
        let mut pods = self.lock();
        if let Changed::Pod(pod) = change {
            let uid = pod.metadata.uid.clone().unwrap_or_default();
            let Some(registered) = pods.get_mut(&uid) else { return Vec::new() };
            registered.pod = pod.clone();
        }
        let is_affected = |registered: &Registered| match change {
            Changed::Object(content, key) => plan::uses(&registered.pod, *content, key),
            Changed::Pod(pod) => registered.pod.metadata.uid == pod.metadata.uid,
            Changed::Tokens => false,
        };
        let affected = pods.iter().filter(|(_, registered)| registered.is_up && is_affected(registered));
        affected.map(|(uid, _)| uid.clone()).collect()
    }

    /// Writes the volumes of a pod whose content comes from the store again; what did not change stays untouched.
    async fn refresh(self: Arc<Self>, uid: String) {
        let Some(registered) = self.lock().get(&uid).cloned() else { return };
        let tokens = match self.tokens.issue(&registered.pod).await {
            Ok(tokens) => tokens,
            Err(error) => {
                tracing::warn!(uid, %error, "cannot refresh a volume");
                return;
            }
        };
        let guard = registered.lock.lock_owned().await;
        // It may have changed, or ended, while we waited.
        let Some(Registered { pod, is_up: true, .. }) = self.lock().get(&uid).cloned() else { return };
        let (config, store) = (self.config.clone(), self.source.store().clone());
        if let Err(error) = blocking(guard, move || refresh(&config, &store, &pod, &tokens)).await {
            // The old content stays; it is written when the object changes again.
            tracing::warn!(uid, %error, "cannot refresh a volume");
        }
    }
}

impl Drop for Volumes {
    fn drop(&mut self) {
        if let Some(task) = self.refresher.get_mut().unwrap_or_else(PoisonError::into_inner) {
            task.abort();
        }
    }
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

/// Runs `work` on a blocking thread, holding the pod's lock until it has ended, even when nobody waits any more.
async fn blocking<T: Send + 'static>(guard: OwnedMutexGuard<()>, work: impl FnOnce() -> T + Send + 'static) -> T {
    let task = tokio::task::spawn_blocking(move || {
        let done = work();
        drop(guard);
        done
    });
    match task.await {
        Ok(done) => done,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Refreshes the pods that use what changed, each on its own, until the volumes are dropped.
async fn keep_fresh(volumes: Weak<Volumes>, store: Store) {
    let (mut config_maps, mut secrets, mut pods) =
        (store.config_maps().watch(), store.secrets().watch(), store.pods().watch());
    let mut running = JoinSet::new();
    loop {
        let change = tokio::select! {
            change = config_maps.next() => Changed::Object(Content::ConfigMap, change.key),
            change = secrets.next() => Changed::Object(Content::Secret, change.key),
            change = pods.next() => match change.object {
                Some(pod) => Changed::Pod(pod),
                None => continue,
            },
            () = token_due(&volumes) => Changed::Tokens,
            Some(_) = running.join_next() => continue,
        };
        let Some(volumes) = volumes.upgrade() else { return };
        for uid in volumes.affected(&change) {
            running.spawn(volumes.clone().refresh(uid));
        }
    }
}

/// Returns when a token is due. Tokens that come later are seen when something changes, which they do themselves.
async fn token_due(volumes: &Weak<Volumes>) {
    match volumes.upgrade().and_then(|volumes| volumes.tokens.next_due()) {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}

/// Makes every used volume. Runs on a blocking thread.
fn set_up(
    config: &VolumesConfig,
    store: &Store,
    pod: &Pod,
    tokens: &Issued,
) -> Result<BTreeMap<String, Ready>, VolumeError> {
    let used = plan::used(pod);
    let missing = used.iter().find(|name| !pod::spec::of(pod).volumes.iter().flatten().any(|one| one.name == **name));
    if let Some(name) = missing {
        let cause = Cause::Invalid(format!("the pod has no volume {name:?}; add it to spec.volumes"));
        return Err(VolumeError { volume: (*name).to_owned(), cause });
    }
    let volumes = pod::spec::of(pod).volumes.iter().flatten().filter(|volume| used.contains(volume.name.as_str()));
    let made = volumes.map(|volume| {
        let kind = plan::kind(volume, pod, store);
        let ready = kind.and_then(|kind| make(config, store, pod, &volume.name, &kind, tokens));
        match ready {
            Ok(ready) => Ok((volume.name.clone(), ready)),
            Err(cause) => Err(VolumeError { volume: volume.name.clone(), cause }),
        }
    });
    made.collect()
}

fn make(
    config: &VolumesConfig,
    store: &Store,
    pod: &Pod,
    name: &str,
    kind: &Kind<'_>,
    tokens: &Issued,
) -> Result<Ready, Cause> {
    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
    let group = place::FsGroup::of(pod);
    let dir = |plugin| config.paths.volume(uid, plugin, name);
    match kind {
        Kind::EmptyDir { memory, size } => {
            let path = dir("empty-dir");
            place::empty_dir(&path, *memory, place::memory_size(pod, &config.node, *size))?;
            group.apply(&path, place::Writable::Yes)?;
            Ok(Ready::Path { path, read_only: false })
        }
        Kind::HostPath { path, kind, owned, read_only } => {
            place::host_path(path, kind, *owned)?;
            if *owned {
                group.apply(path, place::Writable::Yes)?;
            }
            Ok(Ready::Path { path: path.clone(), read_only: *read_only })
        }
        Kind::Content { plugin, in_memory } => {
            let path = dir(plugin);
            let files = payload::of(pod, name, store, &config.node, tokens)?;
            place::content_dir(&path, *in_memory)?;
            place::nested_mountpoints(&path, name, pod)?;
            atomic::write(&path, &files, |_| Ok(()))?;
            group.apply(&path, place::Writable::No)?;
            Ok(Ready::Path { path, read_only: true })
        }
        Kind::Image { reference } => Ok(Ready::Image { reference: (*reference).to_owned() }),
    }
}

/// Writes the volumes with content again. Runs on a blocking thread.
fn refresh(config: &VolumesConfig, store: &Store, pod: &Pod, tokens: &Issued) -> Result<(), VolumeError> {
    let used = plan::used(pod);
    for volume in pod::spec::of(pod).volumes.iter().flatten().filter(|volume| used.contains(volume.name.as_str())) {
        let rewrite = || {
            let Kind::Content { plugin, .. } = plan::kind(volume, pod, store)? else { return Ok(()) };
            let files = payload::of(pod, &volume.name, store, &config.node, tokens)?;
            let path = config.paths.volume(pod.metadata.uid.as_deref().unwrap_or_default(), plugin, &volume.name);
            let group = place::FsGroup::of(pod);
            atomic::write(&path, &files, |new| group.apply(new, place::Writable::No)).map(drop)
        };
        rewrite().map_err(|cause| VolumeError { volume: volume.name.clone(), cause })?;
    }
    Ok(())
}

impl PodVolumes {
    /// Where the volumes are on the node, by name; volumes of images are not.
    pub fn host_paths(&self) -> BTreeMap<String, PathBuf> {
        let paths = self.volumes.iter().filter_map(|(name, ready)| match ready {
            Ready::Path { path, .. } => Some((name.clone(), path.clone())),
            Ready::Image { .. } => None,
        });
        paths.collect()
    }

    /// Says what the pulled image of an image volume is called.
    pub fn set_image(&mut self, volume: &str, image_ref: &str) {
        if let Some(Ready::Image { reference }) = self.volumes.get_mut(volume) {
            image_ref.clone_into(reference);
        }
    }

    /// What a container mounts; `environment` is its own (`subPathExpr`). Sub-paths are resolved, made and bound here.
    ///
    /// # Errors
    /// A mount that is invalid, or a sub-path that leads out of its volume.
    pub async fn mounts_for(
        &self,
        container: &Container,
        environment: &Environment,
    ) -> Result<Vec<v1::Mount>, VolumeError> {
        let (volumes, container, environment) = (self.clone(), container.clone(), environment.clone());
        let work = move || {
            let mounts = container.volume_mounts.iter().flatten().enumerate();
            mounts
                .map(|(index, mount)| {
                    let made = volumes.mount(&container.name, index, mount, &environment);
                    made.map_err(|cause| VolumeError { volume: mount.name.clone(), cause })
                })
                .collect()
        };
        // No lock of the pod is needed: the path of a sub-path's mount is its container's own.
        match tokio::task::spawn_blocking(work).await {
            Ok(mounts) => mounts,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }

    fn mount(
        &self,
        container: &str,
        index: usize,
        mount: &VolumeMount,
        environment: &Environment,
    ) -> Result<v1::Mount, Cause> {
        let invalid = |text: String| Err(Cause::Invalid(text));
        let Some(ready) = self.volumes.get(&mount.name) else {
            return invalid(format!("cannot find volume {:?} to mount into container {container:?}", mount.name));
        };
        let sub_path = subpath::of(mount, environment)?;
        let propagation = propagation(mount)?;
        let mut made = v1::Mount {
            container_path: absolute(&mount.mount_path),
            readonly: mount.read_only == Some(true),
            propagation: propagation.into(),
            mount_options: mount.bind_mount_options.clone().unwrap_or_default(),
            ..v1::Mount::default()
        };
        match ready {
            Ready::Image { reference } => {
                made.image = Some(v1::ImageSpec { image: reference.clone(), ..v1::ImageSpec::default() });
                made.image_sub_path = sub_path.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
                made.readonly = true;
            }
            Ready::Path { path, read_only } => {
                let place =
                    subpath::Place { paths: &self.paths, uid: &self.uid, volume: &mount.name, container, index };
                let path = match sub_path {
                    Some(sub_path) => subpath::bind(path, &sub_path, &place, propagation)?,
                    None => path.clone(),
                };
                made.host_path = path.to_string_lossy().into_owned();
                made.readonly |= read_only;
            }
        }
        made.recursive_read_only = self.recursive_read_only(mount, propagation)?;
        Ok(made)
    }

    fn recursive_read_only(&self, mount: &VolumeMount, propagation: v1::MountPropagation) -> Result<bool, Cause> {
        let possible = mount.read_only == Some(true) && propagation == v1::MountPropagation::PropagationPrivate;
        match mount.recursive_read_only.as_deref().unwrap_or("Disabled") {
            "Disabled" => Ok(false),
            "IfPossible" => Ok(possible && self.recursive_read_only),
            "Enabled" if !self.recursive_read_only => {
                Err(Cause::Unsupported("recursiveReadOnly: the runtime cannot make recursive read-only mounts".into()))
            }
            "Enabled" if possible => Ok(true),
            "Enabled" => Err(Cause::Invalid("recursiveReadOnly needs readOnly: true and no mountPropagation".into())),
            other => Err(Cause::Invalid(format!("recursiveReadOnly has no value {other:?}"))),
        }
    }
}

fn propagation(mount: &VolumeMount) -> Result<v1::MountPropagation, Cause> {
    match mount.mount_propagation.as_deref() {
        None | Some("None") => Ok(v1::MountPropagation::PropagationPrivate),
        Some("HostToContainer") => Ok(v1::MountPropagation::PropagationHostToContainer),
        Some("Bidirectional") => Ok(v1::MountPropagation::PropagationBidirectional),
        Some(other) => Err(Cause::Invalid(format!("mountPropagation has no value {other:?}"))),
    }
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

/// The volumes that a container's mounts name.
fn mounted(container: &Container) -> BTreeSet<&str> {
    let mounts = container.volume_mounts.iter().flatten().map(|mount| mount.name.as_str());
    mounts.chain(container.volume_devices.iter().flatten().map(|device| device.name.as_str())).collect()
}
