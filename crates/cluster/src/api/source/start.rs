//! How a source begins: what it follows, and where that goes.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::events::Recorder;
use super::mirrors::{self, Mirrors};
use super::objects::Objects;
use super::references::Referred;
use super::sealed::{self, Kept, SealConfig, SealError, Tokens, Vault};
use super::status::Statuses;
use super::{ApiSource, Finished, trim};
use crate::api::client::Api;
use crate::api::config::Rate;
use crate::api::follow::{Following, Progress, Selection, Sink, follow, follow_from};
use crate::api::manifest_url::{ManifestUrl, Page};
use crate::api::verbs::Kind;
use crate::manifests::{Problem, StaticPods, is_static};
use crate::{Key, Store, Table};

/// Services and slices with these labels are not for this proxy.
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS: &str = "service.kubernetes.io/headless";

/// What a source follows, and as whom.
#[derive(Debug, Clone)]
pub struct ApiSourceConfig {
    /// The name of this node.
    pub node_name: String,
    /// As a kubelet: the pods of this node and what they refer to, the Node, Services. None for a proxy alone.
    pub kubelet: Option<Api>,
    /// As a proxy: EndpointSlices, ServiceCIDRs, and Services and the Node if no kubelet follows them. Nodes may not read EndpointSlices, so
    /// this is usually another user than the kubelet. None for a kubelet alone.
    pub proxy: Option<Api>,
    /// How many events are sent at most (upstream's `eventRecordQPS` and `eventBurst`).
    pub event_rate: Option<Rate>,
    /// Where what pods need is kept, so that they start again without an API server. None: they wait for it.
    pub sealed: Option<SealConfig>,
    /// The file or directory of static pods (`staticPodPath`).
    pub static_pods: Option<PathBuf>,
    /// Where more of them are, on an HTTP server (`staticPodURL`).
    pub static_pods_url: Option<ManifestUrl>,
}

/// Why a source cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Neither kubelet nor proxy.
    #[error("an API source needs a client: for a kubelet, a proxy, or both")]
    NoClient,
    /// The directory of what is kept.
    #[error(transparent)]
    Sealed(#[from] SealError),
    /// The static pods cannot be followed.
    #[error("{0}")]
    StaticPods(Box<Problem>),
    /// Their URL is none, or a header.
    #[error("static pods of a server: {0}; correct staticPodURL or staticPodURLHeader")]
    StaticPodsUrl(String),
}

impl ApiSource {
    /// Follows what `config` says from now on. Whether the server can be reached is seen later, in the progress and in the
    /// tables. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// A configuration without a client, or a directory that cannot be used.
    pub fn start(config: ApiSourceConfig) -> Result<Arc<Self>, StartError> {
        let ApiSourceConfig { node_name, kubelet, proxy, event_rate, sealed, static_pods, static_pods_url } = config;
        let mut tasks = JoinSet::new();
        let files = open_static_pods(static_pods.as_deref(), static_pods_url, &node_name, &mut tasks)?;
        let api = kubelet.clone().or_else(|| proxy.clone()).ok_or(StartError::NoClient)?;
        let sealed = sealed.map(Sealed::open).transpose()?;
        let store = Store::new();
        let kept = sealed.as_ref().map(|sealed| sealed.kept.services()).unwrap_or_default();
        let services = follow_services(&api, &store, kubelet.is_some(), kept);
        mark_synced(&mut tasks, &services, store.services());
        let own = Key::cluster(&node_name);
        let node = follow_from(&api, Selection::named(&own), store.nodes().clone(), [own]);
        mark_synced(&mut tasks, &node, store.nodes());
        let mirrored = Store::new().pods().clone();
        let mut source = Self {
            objects: Arc::new(Objects::new(api.clone(), store.clone())),
            statuses: Statuses::new(api.clone(), store.pods().clone()),
            mirrors: Statuses::new(api.clone(), mirrored.clone()),
            recorder: Recorder::new(api.clone(), &node_name, event_rate),
            store,
            node_name,
            api,
            finished: Finished::default(),
            services,
            classes: OnceLock::new(),
            drivers: OnceLock::new(),
            bundles: OnceLock::new(),
            certificates: OnceLock::new(),
            tokens: sealed.as_ref().map(|sealed| sealed.tokens.clone()),
            has_static_pods: files.as_ref().is_some_and(|pods| !pods.declared().is_empty()),
            restored: watch::Sender::new(false),
            pods_of_server: None,
            others: vec![node],
            tasks,
        };
        if let Some(kubelet) = &kubelet {
            source.follow_pods(kubelet, sealed, files, mirrored);
        }
        if let Some(proxy) = &proxy {
            source.follow_slices(proxy);
        }
        Ok(Arc::new(source))
    }

    /// The pods of this node with all that they refer to, its static pods from `files`, and the mirrors of those.
    fn follow_pods(&mut self, kubelet: &Api, sealed: Option<Sealed>, files: Option<StaticPods>, mirrored: Table<Pod>) {
        let (store, objects, statuses) = (self.store.clone(), self.objects.clone(), self.statuses.clone());
        let mine = Selection::all().fields(&format!("spec.nodeName={}", self.node_name));
        let sink = Pods { table: store.pods().clone(), mirrors: mirrored.clone(), finished: self.finished.clone() };
        let kept = sealed.as_ref().map(|sealed| sealed.kept.pods()).unwrap_or_default();
        let pods = follow_from(kubelet, mine, sink, kept);
        if let Some(Sealed { vault, kept, tokens, patience }) = sealed {
            let (progress, told) = (pods.progress(), self.restored.clone());
            let kept = (vault, kept, tokens);
            self.tasks.spawn(sealed::run(kept, patience, progress, store.clone(), objects.clone(), told));
        }
        let (tell, complete) = watch::channel(files.is_none());
        if let Some(files) = files {
            mirrors::settle(files.declared(), store.pods(), &mut HashSet::new());
            self.tasks.spawn(mirrors::keep_pods(files, store.pods().clone(), tell));
        }
        self.tasks.spawn(mark_pods_synced(pods.progress(), complete.clone(), store.pods().clone()));
        let keeper = Mirrors {
            api: self.api.clone(),
            store: store.clone(),
            node: Key::cluster(&self.node_name),
            mirrors: mirrored,
            statuses: self.mirrors.clone(),
            complete,
        };
        self.tasks.spawn(keeper.run(pods.progress()));
        self.pods_of_server = Some(pods.progress());
        self.others.push(pods);
        self.tasks.spawn(attend(store, objects, statuses));
    }

    /// What only a proxy needs. It keeps its part of them; together they would be the largest part of its memory.
    fn follow_slices(&mut self, proxy: &Api) {
        let (slices, ranges) = (self.store.endpoint_slices(), self.store.service_cidrs());
        slices.let_pass();
        let selection = Selection::all().labels(&format!("!{HEADLESS},!{PROXY_NAME}"));
        let followed = follow(proxy, selection, Cut { table: slices.clone(), cut: trim::slice });
        mark_synced(&mut self.tasks, &followed, slices);
        // Older servers have no such kind, and older roles no right to it: then nobody knows the ranges.
        let ranged = follow(proxy, Selection::all(), ranges.clone());
        mark_synced(&mut self.tasks, &ranged, ranges);
        self.others.extend([followed, ranged]);
    }
}

/// What a node has kept for a start without a server.
struct Sealed {
    vault: Vault,
    kept: Kept,
    tokens: Tokens,
    patience: Duration,
}

impl Sealed {
    fn open(config: SealConfig) -> Result<Self, SealError> {
        let vault = Vault::open(&config)?;
        Ok(Self { kept: vault.load(), tokens: Tokens::load(&vault), vault, patience: config.patience })
    }
}

/// The static pods of a directory and of an HTTP server, if there are to be any. The latter is asked by one of `tasks`.
pub(super) fn open_static_pods(
    path: Option<&Path>,
    url: Option<ManifestUrl>,
    node_name: &str,
    tasks: &mut JoinSet<()>,
) -> Result<Option<StaticPods>, StartError> {
    let page = url.as_ref().map(Page::new).transpose().map_err(StartError::StaticPodsUrl)?;
    let page = page.zip(url).map(|(page, at)| {
        let (tell, told) = watch::channel(None);
        tasks.spawn(page.follow(tell));
        (at.url, told)
    });
    if path.is_none() && page.is_none() {
        return Ok(None);
    }
    StaticPods::open(path, page, node_name).map(Some).map_err(StartError::StaticPods)
}

/// Services, but for headless ones, which are of no use to proxies and environments. `kept` are those that the table may get
/// from elsewhere.
fn follow_services(api: &Api, store: &Store, is_kubelet: bool, kept: Vec<Key>) -> Following {
    let mut addressed = Selection::all().fields("spec.clusterIP!=None");
    if !is_kubelet {
        addressed = addressed.labels(&format!("!{PROXY_NAME}"));
        // A proxy alone keeps of them what it needs.
        store.services().let_pass();
    }
    follow_from(api, addressed, Cut { table: store.services().clone(), cut: trim::service }, kept)
}

/// Marks the table when its objects are known.
fn mark_synced<T: Kind>(tasks: &mut JoinSet<()>, following: &Following, table: &Table<T>) {
    let (mut progress, table) = (following.progress(), table.clone());
    tasks.spawn(async move {
        if progress.wait_for(|progress: &Progress| progress.is_known).await.is_ok() {
            table.set_synced();
        }
    });
}

/// Marks the table of pods when those of the server and the static ones are known: what runs of no pod goes then.
async fn mark_pods_synced(
    mut server: watch::Receiver<Progress>,
    mut complete: watch::Receiver<bool>,
    table: Table<Pod>,
) {
    let of_server = server.wait_for(|progress| progress.is_known).await.is_ok();
    if of_server && complete.wait_for(|complete| *complete).await.is_ok() {
        table.set_synced();
    }
}

/// A table that gets of an object what a node has use for.
pub(super) struct Cut<T> {
    pub(super) table: Table<T>,
    pub(super) cut: fn(&mut T),
}

impl<T: Kind> Sink<T> for Cut<T> {
    fn put(&mut self, mut object: T) {
        (self.cut)(&mut object);
        self.table.mirror(object);
    }

    fn remove(&mut self, key: &Key) {
        self.table.remove(key);
    }
}

/// The table of pods, without those that are finished; mirrors have their own. The node's static pods are in it, too, and
/// none of the server's takes the place of one.
struct Pods {
    table: Table<Pod>,
    mirrors: Table<Pod>,
    finished: Finished,
}

impl Sink<Pod> for Pods {
    fn put(&mut self, mut pod: Pod) {
        if mirrors::mirrored(&pod).is_some() {
            self.mirrors.mirror(pod);
            return;
        }
        mirrors::disown(&mut pod);
        let key = Key::of(&pod.metadata);
        if self.has_static(&key) {
            return;
        }
        let mut finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        if finished.get(&key) == pod.metadata.uid.as_ref() {
            return;
        }
        finished.remove(&key);
        self.table.mirror(pod);
    }

    fn remove(&mut self, key: &Key) {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner).remove(key);
        self.mirrors.remove(key);
        if !self.has_static(key) {
            self.table.remove(key);
        }
    }
}

impl Pods {
    fn has_static(&self, key: &Key) -> bool {
        self.table.get(key).is_some_and(|pod| is_static(&pod))
    }
}

/// Follows the pods of this node: what they refer to is followed, too, and their statuses are kept as the kubelet says.
async fn attend(store: Store, objects: Arc<Objects>, statuses: Statuses) {
    let mut pods = store.pods().watch();
    let mut claims = store.persistent_volume_claims().watch();
    let mut volumes = store.persistent_volumes().watch();
    loop {
        let referred = tokio::select! {
            change = pods.next() => {
                statuses.keep_only(&change.key, change.object.as_deref());
                match change.object {
                    Some(pod) => drop(objects.set(&pod)),
                    None => objects.forget(&change.key),
                }
                continue;
            }
            change = claims.next() => (Referred::Claim, change.key),
            change = volumes.next() => (Referred::Volume, change.key),
        };
        for pod in objects.pods_of(&referred).iter().filter_map(|key| store.pods().get(key)) {
            objects.set(&pod);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.namespace = Some("shop".into());
        pod.metadata.name = Some("web".into());
        pod.metadata.uid = Some(uid.into());
        pod
    }

    #[test]
    fn a_finished_pod_is_hidden_until_its_name_is_free() {
        let (store, finished) = (Store::new(), Finished::default());
        let mirrors = Store::new().pods().clone();
        let mut sink = Pods { table: store.pods().clone(), mirrors, finished: finished.clone() };
        let key = Key::new("shop", "web");
        finished.lock().unwrap().insert(key.clone(), "one".into());
        sink.put(pod("one"));
        assert!(store.pods().is_empty());
        sink.put(pod("two"));
        assert_eq!((store.pods().len(), finished.lock().unwrap().len()), (1, 0));
        finished.lock().unwrap().insert(key.clone(), "two".into());
        sink.remove(&key);
        assert!(store.pods().is_empty() && finished.lock().unwrap().is_empty());
    }
}
