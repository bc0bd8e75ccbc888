//! The source of a node that has no API server: its static pods are all its pods.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{Event, Node, NodeStatus, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::mirrors;
use super::start::{StartError, open_static_pods};
use crate::api::manifest_url::ManifestUrl;
use crate::manifests::Events;
use crate::source::{Source, SourceError};
use crate::{Key, Store};

/// A source whose pods files of the node and a server of manifests declare. Nobody but the node is told what becomes of them.
pub struct StandaloneSource {
    store: Store,
    /// Held while one is recorded.
    events: Mutex<Events>,
    /// They end with this value.
    _tasks: JoinSet<()>,
}

impl StandaloneSource {
    /// Follows the file or directory `path` and the document at `url` from now on. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The files cannot be followed, or the URL is none.
    pub fn start(node_name: &str, path: Option<&Path>, url: Option<ManifestUrl>) -> Result<Arc<Self>, StartError> {
        let (store, mut tasks) = (Store::new(), JoinSet::new());
        match open_static_pods(path, url, node_name, &mut tasks)? {
            Some(files) => {
                let (tell, complete) = watch::channel(false);
                mirrors::settle(files.declared(), store.pods(), &mut HashSet::new());
                tasks.spawn(mirrors::keep_pods(files, store.pods().clone(), tell));
                tasks.spawn(mark_synced(complete, store.clone()));
            }
            None => store.set_synced(),
        }
        Ok(Arc::new(Self { store, events: Mutex::default(), _tasks: tasks }))
    }

    fn key(&self, uid: &str) -> Option<Key> {
        self.store.pods().find_uid(uid).map(|pod| Key::of(&pod.metadata))
    }
}

/// Marks the tables when all pods that the node starts with are known; what runs of no pod goes then.
async fn mark_synced(mut complete: watch::Receiver<bool>, store: Store) {
    if complete.wait_for(|complete| *complete).await.is_ok() {
        store.set_synced();
    }
}

fn no_pod(uid: &str) -> SourceError {
    SourceError::NotFound { kind: "Pod", name: uid.to_owned() }
}

#[async_trait]
impl Source for StandaloneSource {
    fn store(&self) -> &Store {
        &self.store
    }

    async fn update_pod_status(&self, uid: &str, status: PodStatus) -> Result<(), SourceError> {
        let key = self.key(uid).ok_or_else(|| no_pod(uid))?;
        self.store.pods().update(&key, |pod| pod.status = Some(status));
        Ok(())
    }

    async fn delete_pod(&self, uid: &str) -> Result<(), SourceError> {
        if let Some(key) = self.key(uid) {
            self.store.pods().remove(&key);
        }
        Ok(())
    }

    async fn request_deletion(&self, uid: &str, grace_period_s: Option<i64>) -> Result<(), SourceError> {
        let key = self.key(uid).ok_or_else(|| no_pod(uid))?;
        self.store.pods().update(&key, |pod| mirrors::ask_to_end(pod, grace_period_s));
        Ok(())
    }

    async fn update_node_status(&self, name: &str, status: NodeStatus) -> Result<(), SourceError> {
        let metadata = ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() };
        self.store.nodes().put(Node { metadata, status: Some(status), ..Node::default() });
        Ok(())
    }

    fn event(&self, event: Event) {
        let mut events = self.events.lock().unwrap_or_else(PoisonError::into_inner);
        events.record(&self.store, event, Timestamp::now());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const POD: &str =
        "apiVersion: v1\nkind: Pod\nmetadata: { name: ballast }\nspec:\n  containers: [{ name: c, image: LINE }]\n";
    /// Longer than anything here takes.
    const LONG: Duration = Duration::from_secs(60);

    /// Waits until the pod is as wanted.
    async fn when(store: &Store, holds: impl Fn(Option<&str>, bool) -> bool) {
        let mut watch = store.pods().watch();
        let key = Key::new("default", "ballast-n1");
        let waited = tokio::time::timeout(LONG, async {
            loop {
                let pod = store.pods().get(&key);
                let image = pod.as_ref().and_then(|pod| pod.spec.as_ref()?.containers[0].image.as_deref());
                let ends = pod.as_ref().is_some_and(|pod| pod.metadata.deletion_timestamp.is_some());
                if holds(image, ends) {
                    return;
                }
                watch.next().await;
            }
        });
        waited.await.expect("the pod is as wanted");
    }

    #[tokio::test]
    async fn files_are_all_that_there_is() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("ballast.yaml");
        std::fs::write(&file, POD.replace("LINE", "one")).unwrap();
        let source = StandaloneSource::start("n1", Some(dir.path()), None).unwrap();
        let store = source.store();
        tokio::time::timeout(LONG, store.synced()).await.unwrap();
        let uid = store.pods().list()[0].metadata.uid.clone().unwrap();
        let status = PodStatus { phase: Some("Running".to_owned()), ..PodStatus::default() };
        source.update_pod_status(&uid, status).await.unwrap();
        assert_eq!(store.pods().list()[0].status.as_ref().unwrap().phase.as_deref(), Some("Running"));
        // Another version comes when the one before has gone.
        std::fs::write(&file, POD.replace("LINE", "two")).unwrap();
        when(store, |image, ends| image == Some("one") && ends).await;
        source.delete_pod(&uid).await.unwrap();
        when(store, |image, ends| image == Some("two") && !ends).await;
        std::fs::remove_file(&file).unwrap();
        when(store, |image, ends| image == Some("two") && ends).await;
        assert!(source.update_pod_status(&uid, PodStatus::default()).await.is_err(), "it is gone");
    }

    #[tokio::test]
    async fn a_node_without_any_knows_that_it_has_none() {
        let source = StandaloneSource::start("n1", None, None).unwrap();
        tokio::time::timeout(LONG, source.store().synced()).await.unwrap();
        assert!(source.store().pods().is_empty());
    }
}
