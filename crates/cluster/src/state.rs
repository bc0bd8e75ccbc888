//! What the alone mode must still know after `kill -9`: one small JSON file per object, below the state directory.
//!
//! A new object is on disk before anybody can see it, so that its uid never changes; later versions follow within
//! [`COALESCE`]. Files are replaced by rename, without fsync: the kernel keeps them when a process dies, and after a
//! power loss nothing runs that they could contradict (a file that was lost only means a new uid).

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, PersistentVolume};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::table::Object;
use crate::{Key, SourceError, Store, Table, Watch};

/// How long changes gather before they are written.
const COALESCE: Duration = Duration::from_millis(20);

/// The directory.
#[derive(Clone, Debug)]
pub(crate) struct State {
    directory: PathBuf,
    /// Orders "write the file, show the object" against "the object is gone, remove the file" of an object that is made
    /// anew under the same name. Held for the writing of one small file.
    order: Arc<Mutex<()>>,
}

impl State {
    /// Makes the directories of all kinds. They hold Secrets' names and pods' environments: 0700.
    pub(crate) fn open(directory: PathBuf) -> Result<Self, SourceError> {
        let state = State { directory, order: Arc::default() };
        for kind in std::iter::once("").chain(SAVED_KINDS.iter().copied()) {
            let path = state.directory.join(kind);
            make_private(&path).map_err(|source| SourceError::Save { path, source })?;
        }
        Ok(state)
    }

    /// Puts an object into its table once it is on disk.
    pub(crate) fn create<T: Saved>(&self, table: &Table<T>, object: T) -> Result<Arc<T>, SourceError> {
        let path = self.path::<T>(&Key::of(object.metadata()));
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        write(&path, object.saved()).map_err(|source| SourceError::Save { path, source })?;
        Ok(table.put(object))
    }

    /// Makes the file of an object say what the table says.
    fn follow<T: Saved>(&self, table: &Table<T>, key: &Key) -> Result<(), SourceError> {
        let path = self.path::<T>(key);
        let _order = self.order.lock().unwrap_or_else(PoisonError::into_inner);
        let result = match table.get(key) {
            Some(object) => write(&path, object.saved()),
            None => remove(&path),
        };
        result.map_err(|source| SourceError::Save { path, source })
    }

    /// `_` is in no name, so the two parts cannot be confused.
    fn path<T: Saved>(&self, key: &Key) -> PathBuf {
        self.directory.join(T::DIRECTORY).join(format!("{}_{}.json", key.namespace(), key.name()))
    }

    fn load<T: Saved>(&self, table: &Table<T>) -> u64 {
        let mut newest = 0;
        for path in files(&self.directory.join(T::DIRECTORY)) {
            match read::<T>(&path) {
                Ok(object) => {
                    let version = object.metadata().resource_version.as_deref().and_then(|text| text.parse().ok());
                    newest = newest.max(version.unwrap_or(0));
                    table.put(object);
                }
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "a saved object cannot be read and is forgotten");
                    std::fs::remove_file(&path).ok();
                }
            }
        }
        newest
    }

    /// Removes everything: after all has been shut down, when nothing is left to remember.
    pub(crate) fn erase(&self) -> io::Result<()> {
        std::fs::remove_dir_all(&self.directory)
    }
}

/// An object that is kept on disk.
pub(crate) trait Saved: Object + Serialize + DeserializeOwned {
    const DIRECTORY: &'static str;

    /// The part that is worth keeping.
    fn saved(&self) -> serde_json::Result<Vec<u8>> {
        serde_json::to_vec(self)
    }
}

macro_rules! saved {
    ($($kind:ty: $table:ident $(($strip:expr))?,)*) => {
        const SAVED_KINDS: &[&str] = &[$(stringify!($table),)*];

        $(impl Saved for $kind {
            const DIRECTORY: &'static str = stringify!($table);
            $(fn saved(&self) -> serde_json::Result<Vec<u8>> { serde_json::to_vec(&$strip(self)) })?
        })*

        impl State {
            /// Fills the tables with what was saved.
            pub(crate) fn restore(&self, store: &Store) {
                let mut newest = 0;
                $(newest = newest.max(self.load(store.$table()));)*
                store.advance_version(newest);
            }
        }

        impl State {
            /// Has the file of an object in the table called `table` say at once what the table says. Kinds that are not
            /// kept have nothing to say.
            pub(crate) fn write_now(&self, store: &Store, table: &str, key: &Key) -> Result<(), SourceError> {
                match table {
                    $(stringify!($table) => self.follow(store.$table(), key),)*
                    _ => Ok(()),
                }
            }
        }

        /// Follows the tables and writes what changed.
        pub(crate) struct Saver {
            state: State,
            store: Store,
            $($table: Watch<$kind>,)*
        }

        impl Saver {
            pub(crate) fn new(state: State, store: &Store) -> Self {
                Saver { state, store: store.clone(), $($table: store.$table().watch(),)* }
            }

            /// All that waits to be written.
            fn take(&mut self) -> Vec<Write> {
                let mut writes: Vec<Write> = Vec::new();
                $(while let Some(change) = self.$table.try_next() {
                    let (state, table) = (self.state.clone(), self.store.$table().clone());
                    writes.push(Box::new(move || state.follow(&table, &change.key)));
                })*
                writes
            }
        }
    };
}

type Write = Box<dyn FnOnce() -> Result<(), SourceError> + Send>;

saved! {
    k8s_openapi::api::core::v1::Namespace: namespaces,
    k8s_openapi::api::core::v1::ServiceAccount: service_accounts,
    k8s_openapi::api::core::v1::ConfigMap: config_maps (identity_of_config_map),
    k8s_openapi::api::core::v1::Secret: secrets (identity_of_secret),
    k8s_openapi::api::core::v1::PersistentVolumeClaim: persistent_volume_claims,
    PersistentVolume: persistent_volumes,
    k8s_openapi::api::core::v1::Service: services,
    k8s_openapi::api::core::v1::Pod: pods,
    k8s_openapi::api::core::v1::Node: nodes,
    k8s_openapi::api::apps::v1::ReplicaSet: replica_sets,
    k8s_openapi::api::apps::v1::Deployment: deployments,
    k8s_openapi::api::apps::v1::DaemonSet: daemon_sets,
    k8s_openapi::api::apps::v1::StatefulSet: stateful_sets,
    k8s_openapi::api::batch::v1::Job: jobs,
    k8s_openapi::api::batch::v1::CronJob: cron_jobs,
    Event: events,
}

/// The content comes from the manifests; only uid and age are ours.
fn identity_of_config_map(object: &k8s_openapi::api::core::v1::ConfigMap) -> k8s_openapi::api::core::v1::ConfigMap {
    k8s_openapi::api::core::v1::ConfigMap { metadata: object.metadata.clone(), ..Default::default() }
}

/// A secret's data stays out of the state directory.
fn identity_of_secret(object: &k8s_openapi::api::core::v1::Secret) -> k8s_openapi::api::core::v1::Secret {
    k8s_openapi::api::core::v1::Secret {
        metadata: object.metadata.clone(),
        type_: object.type_.clone(),
        ..Default::default()
    }
}

impl Saver {
    /// Writes changes until the owner drops it. Cancel-safe at every await but the write itself, which then finishes
    /// on its own thread.
    pub(crate) async fn run(mut self) {
        let mut changes = self.store.changes();
        loop {
            self.flush().await;
            if changes.changed().await.is_err() {
                return;
            }
            tokio::time::sleep(COALESCE).await;
        }
    }

    /// Writes what waits now.
    pub(crate) async fn flush(&mut self) {
        let writes = self.take();
        if writes.is_empty() {
            return;
        }
        let failed =
            tokio::task::spawn_blocking(move || writes.into_iter().filter_map(|write| write().err()).collect());
        let failed: Vec<SourceError> = failed.await.unwrap_or_default();
        // One line for all: a full disk must not fill the log as well.
        if let Some(error) = failed.first() {
            let cause = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
            tracing::error!(%error, cause, objects = failed.len(), "state is not saved; after a crash it would be older");
        }
    }
}

fn make_private(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Replaces a file atomically.
pub(crate) fn write(path: &Path, content: serde_json::Result<Vec<u8>>) -> io::Result<()> {
    let content = content.map_err(io::Error::other)?;
    let temporary = path.with_extension("tmp");
    std::fs::write(&temporary, content)?;
    std::fs::rename(&temporary, path)
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|ext| ext == "json")).collect()
}

pub(crate) fn read<T: DeserializeOwned>(path: &Path) -> io::Result<T> {
    serde_json::from_slice(&std::fs::read(path)?).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;
    use k8s_openapi::api::core::v1::{Pod, Secret};

    use super::*;

    fn pod(name: &str) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.namespace = Some("default".into());
        pod.metadata.name = Some(name.into());
        pod.metadata.uid = Some(format!("uid-{name}"));
        pod
    }

    #[tokio::test]
    async fn what_was_saved_is_restored() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path().join("cluster")).unwrap();
        let store = Store::new();
        let mut saver = Saver::new(state.clone(), &store);
        store.pods().put(pod("a"));
        store.pods().put(pod("b"));
        let mut secret =
            Secret { data: Some([("k".into(), ByteString(b"top".to_vec()))].into()), ..Default::default() };
        secret.metadata = pod("s").metadata;
        store.secrets().put(secret);
        store.pods().remove(&Key::new("default", "b"));
        saver.flush().await;

        let restored = Store::new();
        state.restore(&restored);
        let uids: Vec<_> = restored.pods().list().iter().map(|pod| pod.metadata.uid.clone().unwrap()).collect();
        assert_eq!(uids, ["uid-a"]);
        let secret = restored.secrets().get(&Key::new("default", "s")).unwrap();
        assert!(secret.data.is_none() && secret.metadata.uid.is_some());
        assert!(
            restored.version() >= store.pods().list()[0].metadata.resource_version.as_ref().unwrap().parse().unwrap()
        );
    }

    #[test]
    fn a_torn_file_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let state = State::open(directory.path().into()).unwrap();
        state.create(Store::new().pods(), pod("a")).unwrap();
        std::fs::write(directory.path().join("pods/default_b.json"), "{\"metadata\":").unwrap();
        std::fs::write(directory.path().join("pods/default_c.tmp"), "{").unwrap();
        let store = Store::new();
        state.restore(&store);
        assert_eq!(store.pods().len(), 1);
        store.pods().remove(&Key::new("default", "a"));
        state.follow(store.pods(), &Key::new("default", "a")).unwrap();
        state.follow(store.pods(), &Key::new("default", "a")).unwrap();
        assert!(
            files(&directory.path().join("pods")).is_empty() || !directory.path().join("pods/default_a.json").exists()
        );
    }
}
