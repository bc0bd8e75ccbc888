//! What a node needs to start its pods again while there is no API server: kept on disk, sealed.
//!
//! ```text
//! dir/pods/UID           a pod with all that it refers to
//! dir/tokens/UID         its service account tokens
//! dir/services/NAMESPACE the Services of a namespace that has pods here
//! dir/drivers/NAME       what the cluster says of a CSI driver, since a pod here has asked for one
//! dir/node/NAME          the Node
//! ```
//!
//! Files follow the tables. After a start the API server's word is waited for; when there is no server for
//! [`SealConfig::patience`], the files fill the tables, and what the server says later counts again. Tables that were filled so
//! are not synced: nobody ends a pod because it was not kept.
//!
//! A VolumeAttachment is not kept. The controller may have taken the volume away since, and given it to another node: that it is
//! attached here has to be the server's word of today, or two nodes would write to one disk. Volumes of drivers that attach
//! nothing need no such word.

#[cfg(test)]
mod past;
mod seal;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, Node, PersistentVolume, PersistentVolumeClaim, Pod, Secret, Service};
use k8s_openapi::api::storage::v1::CSIDriver;
use k8s_openapi::jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};

use self::seal::Seal;
use super::objects::Objects;
use super::references::{self, Referred};
use crate::api::error::ApiError;
use crate::api::follow::Progress;
use crate::{Change, Key, Object, Store, Table, Watch};

/// Changes gather so long before they are written.
const COALESCE: Duration = Duration::from_secs(1);

/// Where a node keeps what it needs without an API server.
#[derive(Debug, Clone)]
pub struct SealConfig {
    /// The directory of the sealed files.
    pub dir: PathBuf,
    /// The file with their key; made if it is missing.
    pub key: PathBuf,
    /// How long a start waits for the API server before it goes by the files.
    pub patience: Duration,
}

/// Sealed files cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot keep pods in {path}; check permissions, or whether the key belongs to the directory")]
pub struct SealError {
    /// The directory or the key.
    pub path: PathBuf,
    /// The cause.
    pub source: io::Error,
}

/// A pod, and all that it refers to and that is there.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Bundle {
    pod: Pod,
    config_maps: Vec<ConfigMap>,
    secrets: Vec<Secret>,
    claims: Vec<PersistentVolumeClaim>,
    volumes: Vec<PersistentVolume>,
}

/// What was kept when the daemon started.
#[derive(Debug, Default)]
pub(super) struct Kept {
    bundles: Vec<Bundle>,
    services: Vec<Service>,
    nodes: Vec<Node>,
    drivers: Vec<CSIDriver>,
}

impl Kept {
    pub(super) fn pods(&self) -> Vec<Key> {
        self.bundles.iter().map(|bundle| Key::of(&bundle.pod.metadata)).collect()
    }

    pub(super) fn services(&self) -> Vec<Key> {
        self.services.iter().map(|service| Key::of(&service.metadata)).collect()
    }

    /// Whether this node was a member of its cluster when it was kept.
    fn is_of_a_member(&self) -> bool {
        !self.nodes.is_empty()
    }

    /// Fills the tables; what the server has said meanwhile stays. They are not synced by that: what they lack may be
    /// there all the same.
    fn restore(self, store: &Store, objects: &Objects) {
        let pods = self.bundles.len();
        objects.believe_services();
        put_all(store.nodes(), self.nodes);
        put_all(store.services(), self.services);
        put_all(store.csi_drivers(), self.drivers);
        for bundle in self.bundles {
            put_all(store.config_maps(), bundle.config_maps);
            put_all(store.secrets(), bundle.secrets);
            put_all(store.persistent_volume_claims(), bundle.claims);
            put_all(store.persistent_volumes(), bundle.volumes);
            objects.believe(references::of(&bundle.pod, store));
            store.pods().mirror_new(bundle.pod);
        }
        tracing::warn!(pods, "there is no API server: this node goes by what it has kept of its pods");
    }
}

fn put_all<T: Object>(table: &Table<T>, objects: Vec<T>) {
    objects.into_iter().for_each(|object| table.mirror_new(object));
}

/// The directory and its key. Its methods do blocking work.
#[derive(Clone)]
pub(super) struct Vault {
    dir: PathBuf,
    seal: Arc<Seal>,
}

const POD: &str = "pods";
const TOKEN: &str = "tokens";
const SERVICE: &str = "services";
const NODE: &str = "node";
const DRIVER: &str = "drivers";

impl Vault {
    pub(super) fn open(config: &SealConfig) -> Result<Self, SealError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| SealError { path, source }
        };
        for kind in [POD, TOKEN, SERVICE, NODE, DRIVER] {
            let dir = config.dir.join(kind);
            make_private(&dir).map_err(failed(&dir))?;
        }
        let seal = Seal::open(&config.key).map_err(failed(&config.key))?;
        Ok(Self { dir: config.dir.clone(), seal: Arc::new(seal) })
    }

    pub(super) fn load(&self) -> Kept {
        Kept {
            bundles: self.read_all(POD).into_values().collect(),
            services: self.read_all::<Vec<Service>>(SERVICE).into_values().flatten().collect(),
            nodes: self.read_all(NODE).into_values().collect(),
            drivers: self.read_all(DRIVER).into_values().collect(),
        }
    }

    fn read_all<T: DeserializeOwned>(&self, kind: &str) -> BTreeMap<String, T> {
        let mut all = BTreeMap::new();
        for name in names(&self.dir.join(kind)) {
            match self.read(kind, &name) {
                Ok(content) => drop(all.insert(name, content)),
                Err(error) => {
                    let path = self.dir.join(kind).join(&name);
                    tracing::warn!(path = %path.display(), %error, "what was kept cannot be read and is forgotten");
                    remove(&path).ok();
                }
            }
        }
        all
    }

    fn read<T: DeserializeOwned>(&self, kind: &str, name: &str) -> io::Result<T> {
        let sealed = std::fs::read(self.path(kind, name)?)?;
        let content = self.seal.unseal(&format!("{kind}/{name}"), &sealed)?;
        serde_json::from_slice(&content).map_err(io::Error::other)
    }

    /// On disk when it returns: it is read after a power failure, if ever.
    fn write(&self, kind: &str, name: &str, content: &impl Serialize) -> io::Result<()> {
        use std::io::Write as _;
        let content = serde_json::to_vec(content).map_err(io::Error::other)?;
        let sealed = self.seal.seal(&format!("{kind}/{name}"), content)?;
        let path = self.path(kind, name)?;
        let temporary = self.dir.join(format!("{kind}-{name}.new"));
        let mut file = std::fs::File::create(&temporary)?;
        file.write_all(&sealed)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &path)
    }

    fn remove(&self, kind: &str, name: &str) -> io::Result<()> {
        remove(&self.path(kind, name)?)
    }

    /// A uid or a namespace, which the API server gave out, is no way out of the directory.
    fn path(&self, kind: &str, name: &str) -> io::Result<PathBuf> {
        if name.is_empty() || name.starts_with('.') || name.contains('/') {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{name:?} is no name of a file")));
        }
        Ok(self.dir.join(kind).join(name))
    }
}

fn make_private(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// Waits for the server's word, or goes by what was kept when there is no server; then keeps the files up to date.
pub(super) async fn run(
    (vault, kept, tokens): (Vault, Kept, Tokens),
    patience: Duration,
    mut pods: watch::Receiver<Progress>,
    store: Store,
    objects: Arc<Objects>,
    restored: watch::Sender<bool>,
) {
    if is_alone(pods.clone(), patience).await && kept.is_of_a_member() {
        kept.restore(&store, &objects);
        restored.send_replace(true);
    }
    let mut keeper = Keeper::new(vault, &store, objects, tokens.clone());
    let mut is_swept = false;
    let mut changes = store.changes();
    loop {
        if !is_swept && pods.borrow_and_update().is_known {
            keeper.sweep(&store);
            is_swept = true;
        }
        keeper.flush().await;
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = tokens.news.notified() => {}
            changed = pods.changed(), if !is_swept => if changed.is_err() { return },
        }
        tokio::time::sleep(COALESCE).await;
    }
}

/// Whether nothing answers where the API server should be, for so long. A server that refuses us is one.
async fn is_alone(mut pods: watch::Receiver<Progress>, patience: Duration) -> bool {
    let known = tokio::time::timeout(patience, pods.wait_for(|progress| progress.is_known)).await.is_ok();
    if known {
        return false;
    }
    // A connection that breaks is no proof: the server ends those of users that it does not know.
    let nobody = |progress: &Progress| {
        matches!(progress.failure, Some(ApiError::Unreachable { .. } | ApiError::TimedOut { .. }))
    };
    // It closes with the source.
    pods.wait_for(|progress| progress.is_known || nobody(progress)).await.is_ok_and(|progress| !progress.is_known)
}

/// Makes the files say what the tables say.
struct Keeper {
    vault: Vault,
    store: Store,
    objects: Arc<Objects>,
    tokens: Tokens,
    pods: Watch<Pod>,
    config_maps: Watch<ConfigMap>,
    secrets: Watch<Secret>,
    claims: Watch<PersistentVolumeClaim>,
    volumes: Watch<PersistentVolume>,
    services: Watch<Service>,
    nodes: Watch<Node>,
    drivers: Watch<CSIDriver>,
    /// Pods whose files may be old, by name.
    dirty: HashSet<Key>,
    /// Namespaces whose Services may be others.
    moved: HashSet<String>,
    /// What was written of each pod: its uid, and what tells one content from another.
    written: HashMap<Key, (String, String)>,
}

type Write = Box<dyn FnOnce() -> io::Result<()> + Send>;

impl Keeper {
    fn new(vault: Vault, store: &Store, objects: Arc<Objects>, tokens: Tokens) -> Self {
        Self {
            vault,
            store: store.clone(),
            objects,
            tokens,
            pods: store.pods().watch(),
            config_maps: store.config_maps().watch(),
            secrets: store.secrets().watch(),
            claims: store.persistent_volume_claims().watch(),
            volumes: store.persistent_volumes().watch(),
            services: store.services().watch(),
            nodes: store.nodes().watch(),
            drivers: store.csi_drivers().watch(),
            dirty: HashSet::new(),
            moved: HashSet::new(),
            written: HashMap::new(),
        }
    }

    /// Removes what was kept of pods that the server does not have any more.
    fn sweep(&self, store: &Store) {
        for kind in [POD, TOKEN] {
            for uid in names(&self.vault.dir.join(kind)) {
                if store.pods().find_uid(&uid).is_none() {
                    log(self.vault.remove(kind, &uid));
                }
            }
        }
    }

    async fn flush(&mut self) {
        let mut writes = Vec::new();
        self.take_changes(&mut writes);
        let dirty: Vec<Key> = self.dirty.iter().cloned().collect();
        for key in dirty {
            self.keep_pod(&key, &mut writes);
        }
        for namespace in std::mem::take(&mut self.moved) {
            self.keep_services(&namespace, &mut writes);
        }
        for (pod, tokens) in self.tokens.take_dirty() {
            let vault = self.vault.clone();
            writes.push(Box::new(move || vault.write(TOKEN, &pod, &tokens)));
        }
        if !writes.is_empty() {
            let done = tokio::task::spawn_blocking(move || writes.into_iter().for_each(|write| log(write())));
            if let Err(error) = done.await {
                std::panic::resume_unwind(error.into_panic());
            }
        }
    }

    fn take_changes(&mut self, writes: &mut Vec<Write>) {
        while let Some(change) = self.pods.try_next() {
            self.moved.insert(change.key.namespace().to_owned());
            self.dirty.insert(change.key);
        }
        let mut referred = Vec::new();
        while let Some(change) = self.config_maps.try_next() {
            referred.push((Referred::ConfigMap, change.key));
        }
        while let Some(change) = self.secrets.try_next() {
            referred.push((Referred::Secret, change.key));
        }
        while let Some(change) = self.claims.try_next() {
            referred.push((Referred::Claim, change.key));
        }
        while let Some(change) = self.volumes.try_next() {
            referred.push((Referred::Volume, change.key));
        }
        self.dirty.extend(referred.iter().flat_map(|reference| self.objects.pods_of(reference)));
        while let Some(change) = self.services.try_next() {
            self.moved.insert(change.key.namespace().to_owned());
        }
        while let Some(change) = self.nodes.try_next() {
            writes.push(keep(&self.vault, NODE, change));
        }
        while let Some(change) = self.drivers.try_next() {
            writes.push(keep(&self.vault, DRIVER, change));
        }
    }

    fn keep_pod(&mut self, key: &Key, writes: &mut Vec<Write>) {
        // A static pod is on disk already.
        let there = self.store.pods().get(key).filter(|pod| !crate::manifests::is_static(pod));
        let uid = there.as_ref().and_then(|pod| pod.metadata.uid.clone());
        let before = self.written.get(key).map(|(uid, _)| uid.clone());
        if let Some(gone) = before.filter(|before| Some(before) != uid.as_ref()) {
            self.written.remove(key);
            self.tokens.forget(&gone);
            let vault = self.vault.clone();
            writes.push(Box::new(move || vault.remove(POD, &gone).and_then(|()| vault.remove(TOKEN, &gone))));
        }
        let (Some(pod), Some(uid)) = (there, uid) else {
            self.dirty.remove(key);
            return;
        };
        // What is not known yet is asked for again at the next change, which brings it.
        if !self.objects.are_known(key) {
            return;
        }
        self.dirty.remove(key);
        let bundle = self.bundle(&pod);
        let essence = bundle.essence();
        if self.written.get(key).is_none_or(|(_, written)| *written != essence) {
            self.written.insert(key.clone(), (uid.clone(), essence));
            let vault = self.vault.clone();
            writes.push(Box::new(move || vault.write(POD, &uid, &bundle)));
        }
    }

    fn bundle(&self, pod: &Pod) -> Bundle {
        let mut bundle = Bundle {
            pod: pod.clone(),
            config_maps: Vec::new(),
            secrets: Vec::new(),
            claims: Vec::new(),
            volumes: Vec::new(),
        };
        let store = &self.store;
        for (kind, key) in references::of(pod, store) {
            match kind {
                Referred::ConfigMap => add(&mut bundle.config_maps, store.config_maps(), &key),
                Referred::Secret => add(&mut bundle.secrets, store.secrets(), &key),
                Referred::Claim => add(&mut bundle.claims, store.persistent_volume_claims(), &key),
                Referred::Volume => add(&mut bundle.volumes, store.persistent_volumes(), &key),
            }
        }
        bundle
    }

    /// A namespace without pods here needs none, but for `kubernetes`, whose address every pod gets.
    fn keep_services(&self, namespace: &str, writes: &mut Vec<Write>) {
        let has_pods = !self.store.pods().list_namespace(namespace).is_empty();
        let all = self.store.services().list_namespace(namespace);
        let is_every_pods =
            |service: &Service| namespace == "default" && service.metadata.name.as_deref() == Some("kubernetes");
        let kept = all.iter().filter(|service| has_pods || is_every_pods(service));
        let kept: Vec<Service> = kept.map(|service| Service::clone(service)).collect();
        let (vault, namespace) = (self.vault.clone(), namespace.to_owned());
        writes.push(Box::new(move || match kept.is_empty() {
            true => vault.remove(SERVICE, &namespace),
            false => vault.write(SERVICE, &namespace, &kept),
        }));
    }
}

/// An object that has a file of its own.
fn keep<T: Object + Serialize>(vault: &Vault, kind: &'static str, change: Change<T>) -> Write {
    let (vault, name) = (vault.clone(), change.key.name().to_owned());
    Box::new(move || match change.object {
        Some(object) => vault.write(kind, &name, &*object),
        None => vault.remove(kind, &name),
    })
}

impl Bundle {
    /// What makes a bundle worth writing. Statuses change often; of them a phase that is terminal must not be forgotten.
    fn essence(&self) -> String {
        fn version<T: Object>(object: &T) -> String {
            let metadata = object.metadata();
            [&metadata.uid, &metadata.resource_version].map(|text| text.as_deref().unwrap_or_default()).join("@")
        }
        let pod = &self.pod;
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default();
        let own = format!(
            "{:?} {:?} {phase} {:?} {:?}",
            pod.metadata.generation, pod.metadata.deletion_timestamp, pod.metadata.labels, pod.metadata.annotations
        );
        let maps = self.config_maps.iter().map(version);
        let secrets = self.secrets.iter().map(version);
        let claims = self.claims.iter().map(version).chain(self.volumes.iter().map(version));
        std::iter::once(own).chain(maps).chain(secrets).chain(claims).collect::<Vec<_>>().join(" ")
    }
}

fn add<T: Object>(into: &mut Vec<T>, table: &Table<T>, key: &Key) {
    into.extend(table.get(key).map(|object| T::clone(&object)));
}

/// One line for each: a full disk has few pods to tell of.
fn log(written: io::Result<()>) {
    if let Err(error) = written {
        tracing::error!(%error, "what a pod needs is not kept: without an API server it would not start again");
    }
}

/// Tokens of service accounts, for as long as their pods are there.
#[derive(Clone)]
pub(super) struct Tokens {
    state: Arc<Mutex<TokenState>>,
    news: Arc<Notify>,
}

#[derive(Default)]
struct TokenState {
    /// By pod, then by what was asked for.
    all: HashMap<String, BTreeMap<String, SealedToken>>,
    /// Pods whose files are old.
    dirty: HashSet<String>,
}

/// A token as it is kept.
#[derive(Clone, Serialize, Deserialize)]
pub(super) struct SealedToken {
    pub(super) text: String,
    pub(super) ends: Timestamp,
}

impl Tokens {
    pub(super) fn load(vault: &Vault) -> Self {
        let all = vault.read_all(TOKEN).into_iter().collect();
        let state = TokenState { all, dirty: HashSet::new() };
        Self { state: Arc::new(Mutex::new(state)), news: Arc::default() }
    }

    pub(super) fn get(&self, pod: &str, asked: &str) -> Option<SealedToken> {
        self.lock().all.get(pod)?.get(asked).cloned()
    }

    /// Keeps a token; on disk a moment later.
    pub(super) fn put(&self, pod: &str, asked: &str, token: SealedToken) {
        let mut state = self.lock();
        state.all.entry(pod.to_owned()).or_default().insert(asked.to_owned(), token);
        state.dirty.insert(pod.to_owned());
        self.news.notify_one();
    }

    fn forget(&self, pod: &str) {
        self.lock().all.remove(pod);
    }

    fn take_dirty(&self) -> Vec<(String, BTreeMap<String, SealedToken>)> {
        let mut state = self.lock();
        let dirty = std::mem::take(&mut state.dirty);
        dirty.into_iter().filter_map(|pod| Some((pod.clone(), state.all.get(&pod)?.clone()))).collect()
    }

    fn lock(&self) -> MutexGuard<'_, TokenState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn vault(dir: &Path) -> Vault {
        let config = SealConfig { dir: dir.join("sealed"), key: dir.join("key"), patience: Duration::ZERO };
        Vault::open(&config).unwrap()
    }

    #[test]
    fn what_is_damaged_is_forgotten_alone() {
        let dir = tempfile::tempdir().unwrap();
        let vault = vault(dir.path());
        let node = |name: &str| -> Node { serde_json::from_value(json!({"metadata": {"name": name}})).unwrap() };
        vault.write(NODE, "a", &node("a")).unwrap();
        vault.write(NODE, "b", &node("b")).unwrap();
        let file = dir.path().join("sealed/node/a");
        let mut bytes = std::fs::read(&file).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&file, bytes).unwrap();
        // One that another name was sealed for is as good as damaged.
        std::fs::copy(dir.path().join("sealed/node/b"), dir.path().join("sealed/node/c")).unwrap();
        let nodes = vault.load().nodes;
        assert_eq!(nodes.iter().map(|node| node.metadata.name.as_deref().unwrap()).collect::<Vec<_>>(), ["b"]);
        assert!(!file.exists());
    }

    #[test]
    fn a_status_alone_is_not_worth_a_write() {
        let bundle = |pod: serde_json::Value| Bundle {
            pod: serde_json::from_value(pod).unwrap(),
            config_maps: Vec::new(),
            secrets: Vec::new(),
            claims: Vec::new(),
            volumes: Vec::new(),
        };
        let pod = |generation: i64, phase: &str, message: &str| {
            bundle(json!({"metadata": {"generation": generation}, "status": {"phase": phase, "message": message}}))
                .essence()
        };
        assert_eq!(pod(1, "Running", "a"), pod(1, "Running", "b"));
        assert_ne!(pod(1, "Running", "a"), pod(2, "Running", "a"));
        assert_ne!(pod(1, "Running", "a"), pod(1, "Failed", "a"));
    }
}
