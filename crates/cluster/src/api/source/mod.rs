//! The source of a node that has an API server.
//!
//! ```text
//!   API server ─► follow ─┬─► pods of this node ─► Objects: what they refer to, one watch for each
//!                         ├─► the Node
//!                         ├─► Services
//!                         └─► EndpointSlices, ServiceCIDRs
//!   kubelet ─► Statuses, deletions, Recorder (events) ─► API server
//! ```

mod events;
mod mirrors;
mod objects;
mod references;
mod sealed;
mod standalone;
mod start;
mod status;
mod trim;

pub(crate) use self::references::first as first_reference;
pub use self::sealed::{SealConfig, SealError};
pub use self::standalone::StandaloneSource;
pub use self::start::{ApiSourceConfig, StartError};

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::certificates::v1::PodCertificateRequest;
use k8s_openapi::api::core::v1::{Event, Node, NodeStatus, PersistentVolumeClaim, Pod, PodStatus, ServiceAccount};
use k8s_openapi::api::resource::v1::{ResourceClaim, ResourceSlice};
use k8s_openapi::api::storage::v1::{CSIDriver, VolumeAttachment};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use serde_json::json;
use tokio::sync::watch;
use tokio::task::JoinSet;

use self::events::Recorder;
use self::objects::Objects;
use self::sealed::{SealedToken, Tokens};
use self::status::Statuses;
use super::client::Api;
use super::error::ApiError;
use super::follow::{Following, Progress, Selection, follow_from};
use super::verbs::{Deletion, Kind, Patch};
use crate::manifests::is_static;
use crate::source::{Source, SourceError, Token};
use crate::{Key, Store, Table};

/// How long a caller of `look_up` waits for the server, before it is told to come back.
const LOOK_UP_LIMIT: Duration = Duration::from_secs(10);
/// How long a node with static pods waits for a server that may be one of them.
const STATIC_PATIENCE: Duration = Duration::from_secs(1);

/// A source that follows a kube-apiserver.
pub struct ApiSource {
    store: Store,
    node_name: String,
    /// Writes: the kubelet's client, or the proxy's.
    api: Api,
    objects: Arc<Objects>,
    statuses: Statuses,
    /// Statuses of mirrors.
    mirrors: Statuses,
    recorder: Recorder,
    finished: Finished,
    services: Following,
    /// Few clusters have RuntimeClasses that a pod of this node names.
    classes: OnceLock<Following>,
    /// The same for CSIDrivers.
    drivers: OnceLock<Following>,
    /// And for ClusterTrustBundles.
    bundles: OnceLock<Following>,
    /// And for the requests for certificates of this node's pods.
    certificates: OnceLock<Following>,
    tokens: Option<Tokens>,
    /// There were static pods from the beginning.
    has_static_pods: bool,
    /// How far the server's pods are known; none for a proxy alone.
    pods_of_server: Option<watch::Receiver<Progress>>,
    /// Whether the tables were filled with what was kept.
    restored: watch::Sender<bool>,
    /// All other kinds. What is followed ends with these.
    others: Vec<Following>,
    /// They end with this value.
    tasks: JoinSet<()>,
}

/// The uids of pods that the kubelet has done with, by name. They are not shown again, however long the finalizers of
/// others keep them. Held while such a pod is hidden or another one shown.
type Finished = Arc<Mutex<HashMap<Key, String>>>;

impl ApiSource {
    /// Waits until there is enough to begin with: the server's pods, Services and the Node are known, or there is no API server
    /// and what was kept has come back. Then the tables may still lack pods ([`Table::synced`]), as those of a `staticPodURL`
    /// that does not answer. Static pods do not wait: the server may be one of them.
    pub async fn ready(&self) {
        let mut restored = self.restored.subscribe();
        let patience = async {
            match self.has_static_pods {
                // If it answers at once, what runs is adopted in one go.
                true => tokio::time::sleep(STATIC_PATIENCE).await,
                false => std::future::pending().await,
            }
        };
        let known = async {
            match &self.pods_of_server {
                // The sender lives in `others`.
                Some(pods) => drop(pods.clone().wait_for(|pods| pods.is_known).await),
                None => self.store.pods().synced().await,
            }
            self.store.services().synced().await;
            self.store.nodes().synced().await;
        };
        tokio::select! {
            () = known => {}
            () = patience => {}
            // The sender lives in self.
            _ = restored.wait_for(|restored| *restored) => {}
        }
    }

    /// The first reason why something is not followed at the moment.
    pub fn failure(&self) -> Option<ApiError> {
        let all = std::iter::once(&self.services).chain(&self.others);
        all.map(Following::progress).find_map(|progress| progress.borrow().failure.clone())
    }

    /// Writes the statuses that still wait: before the daemon ends.
    pub async fn settle(&self) {
        self.statuses.settle_all().await;
        self.mirrors.settle_all().await;
    }

    /// The pod with this uid.
    fn pod(&self, uid: &str) -> Result<Arc<Pod>, SourceError> {
        let found = self.store.pods().find_uid(uid);
        found.ok_or_else(|| SourceError::NotFound { kind: "Pod", name: uid.to_owned() })
    }

    /// Waits until the table has all objects of a kind that is followed since somebody first asked for one.
    async fn all_of<T: Kind>(
        &self,
        kind: &OnceLock<Following>,
        table: &Table<T>,
        wanted: &str,
    ) -> Result<(), SourceError> {
        self.selected(kind, Selection::all(), table, wanted).await
    }

    /// As [`ApiSource::all_of`], of those that are selected.
    async fn selected<T: Kind>(
        &self,
        kind: &OnceLock<Following>,
        selection: Selection,
        table: &Table<T>,
        wanted: &str,
    ) -> Result<(), SourceError> {
        let following = self.begin(kind, selection, table);
        if tokio::time::timeout(LOOK_UP_LIMIT, following.known()).await.is_ok() {
            return Ok(());
        }
        let failure = following.progress().borrow().failure.clone();
        let source = failure.map_or_else(|| "the API server has not answered".into(), Into::into);
        Err(SourceError::Unavailable { action: format!("look up {wanted}"), source })
    }

    /// Follows these from now on; what the table has of them was kept.
    fn begin<'a, T: Kind>(
        &self,
        kind: &'a OnceLock<Following>,
        selection: Selection,
        table: &Table<T>,
    ) -> &'a Following {
        kind.get_or_init(|| follow_from(&self.api, selection, table.clone(), table.keys()))
    }

    /// One object that a node may read, but not watch.
    async fn read<T: Kind>(&self, key: &Key) -> Result<T, SourceError> {
        self.api.get(key).await.map_err(|error| match error {
            ApiError::NotFound { .. } => SourceError::NotFound { kind: T::KIND, name: key.to_string() },
            error => failed(format!("read {} {key}", T::KIND), error),
        })
    }

    /// Tells the server to delete a pod, or to give it less time.
    async fn delete(&self, pod: &Pod, grace_period_s: Option<i64>) -> Result<(), SourceError> {
        let key = Key::of(&pod.metadata);
        let how = Deletion { grace_period_s, uid: pod.metadata.uid.clone() };
        match self.api.delete::<Pod>(&key, &how).await {
            // It is gone, or another one has its name.
            Ok(()) | Err(ApiError::NotFound { .. } | ApiError::Conflict { .. }) => Ok(()),
            Err(error) => Err(failed(format!("delete pod {key}"), error)),
        }
    }
}

#[async_trait]
impl Source for ApiSource {
    fn store(&self) -> &Store {
        &self.store
    }

    async fn look_up(&self, pod: &Pod) -> Result<(), SourceError> {
        // It refers to nothing, and does not wait for a server to learn of Services.
        if is_static(pod) {
            return Ok(());
        }
        let key = Key::of(&pod.metadata);
        let action = || format!("look up what pod {key} refers to");
        let deadline = tokio::time::Instant::now() + LOOK_UP_LIMIT;
        let left = || deadline.saturating_duration_since(tokio::time::Instant::now());
        let late = |what: String, failure: Option<ApiError>| {
            let reason = format!("{what} is not known yet: the API server has not answered");
            SourceError::Unavailable { action: action(), source: failure.map_or_else(|| reason.into(), Into::into) }
        };
        // A claim that has come may lead to a volume.
        let mut known = Vec::new();
        loop {
            let Some(progress) = self.objects.set(pod) else { break };
            let references: Vec<_> = progress.iter().map(|(reference, _)| reference.clone()).collect();
            if references == known {
                break;
            }
            let waited = objects::wait(progress, left()).await;
            waited.map_err(|((kind, key), failure)| late(format!("{kind:?} {key}"), failure))?;
            known = references;
        }
        if self.objects.believes_services() {
            return Ok(());
        }
        let services = tokio::time::timeout(left(), self.store.services().synced()).await;
        services.map_err(|_| late("what Services there are".into(), self.services.progress().borrow().failure.clone()))
    }

    async fn update_pod_status(&self, uid: &str, status: PodStatus) -> Result<(), SourceError> {
        let pod = self.pod(uid)?;
        if is_static(&pod) {
            // Its mirror gets it from there.
            self.store.pods().update(&Key::of(&pod.metadata), |pod| pod.status = Some(status));
        } else {
            self.statuses.put(&pod, status);
        }
        Ok(())
    }

    async fn delete_pod(&self, uid: &str) -> Result<(), SourceError> {
        let Ok(pod) = self.pod(uid) else { return Ok(()) };
        let key = Key::of(&pod.metadata);
        if is_static(&pod) {
            self.store.pods().remove(&key);
            return Ok(());
        }
        match self.statuses.settle(uid).await {
            Ok(()) | Err(ApiError::NotFound { .. }) => {}
            Err(error) if error.is_transient() => {
                return Err(failed(format!("write the last status of pod {key}"), error));
            }
            // Nobody can write it; the pod must end nevertheless.
            Err(error) => tracing::warn!(pod = %key, %error, "the last status of a pod is lost"),
        }
        self.delete(&pod, Some(0)).await?;
        let mut finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        // The watch may have brought another pod of this name; that one stays.
        if self.store.pods().get(&key).is_some_and(|there| there.metadata.uid == pod.metadata.uid) {
            self.store.pods().remove(&key);
            finished.insert(key, uid.to_owned());
        }
        Ok(())
    }

    async fn request_deletion(&self, uid: &str, grace_period_s: Option<i64>) -> Result<(), SourceError> {
        let pod = self.pod(uid)?;
        if is_static(&pod) {
            self.store.pods().update(&Key::of(&pod.metadata), |pod| mirrors::ask_to_end(pod, grace_period_s));
            return Ok(());
        }
        self.delete(&pod, grace_period_s).await
    }

    async fn update_node_status(&self, name: &str, status: NodeStatus) -> Result<(), SourceError> {
        let patch = Patch::strategic(json!({"status": status})).status();
        let patched = self.api.patch::<Node>(&Key::cluster(name), &patch).await;
        patched.map(drop).map_err(|error| match error {
            ApiError::NotFound { .. } => SourceError::NotFound { kind: "Node", name: name.to_owned() },
            error => failed(format!("update the status of node {name}"), error),
        })
    }

    async fn request_token(&self, account: &Key, spec: TokenRequestSpec) -> Result<Token, SourceError> {
        let action = || format!("get a token of service account {account}");
        let pod = spec.bound_object_ref.as_ref().and_then(|bound| bound.uid.clone()).unwrap_or_default();
        let asked = format!("{account} {}", spec.audiences.iter().flatten().cloned().collect::<Vec<_>>().join(" "));
        let request = TokenRequest { spec: Some(spec), ..TokenRequest::default() };
        let answer = match (self.api.request_token(account, &request).await, &self.tokens) {
            (Ok(answer), _) => answer,
            // The one that the pod had is better than none, even when its time is over: the pod runs again, and gets
            // another when there is a server, who is all that it is for.
            (Err(error), Some(tokens)) if error.is_transient() => {
                let kept = tokens.get(&pod, &asked);
                let kept = kept.map(|SealedToken { text, ends }| Token { text, ends });
                return kept.ok_or_else(|| failed(action(), error));
            }
            (Err(error), _) => return Err(failed(action(), error)),
        };
        let status = answer.status.unwrap_or_default();
        let (Some(text), Some(ends)) = (status.token, status.expiration_timestamp) else {
            return Err(SourceError::Refused { action: action(), source: "the answer has no token".into() });
        };
        if let Some(tokens) = &self.tokens {
            tokens.put(&pod, &asked, SealedToken { text: text.clone(), ends: ends.0 });
        }
        Ok(Token { text, ends: ends.0 })
    }

    async fn runtime_handler(&self, class: &str) -> Result<String, SourceError> {
        let table = self.store.runtime_classes();
        self.all_of(&self.classes, table, &format!("RuntimeClass {class}")).await?;
        match table.get(&Key::cluster(class)) {
            Some(known) => Ok(known.handler.clone()),
            None => Err(SourceError::NotFound { kind: "RuntimeClass", name: class.to_owned() }),
        }
    }

    async fn csi_driver(&self, name: &str) -> Result<Option<Arc<CSIDriver>>, SourceError> {
        let (table, key) = (self.store.csi_drivers(), Key::cluster(name));
        self.begin(&self.drivers, Selection::all(), table);
        // What was kept is enough; that nothing was kept means nothing.
        let is_kept = *self.restored.borrow() && table.get(&key).is_some();
        if !is_kept {
            self.all_of(&self.drivers, table, &format!("CSIDriver {name}")).await?;
        }
        Ok(table.get(&key))
    }

    async fn volume_attachment(&self, name: &str) -> Result<VolumeAttachment, SourceError> {
        self.read(&Key::cluster(name)).await
    }

    async fn resource_claim(&self, claim: &Key) -> Result<ResourceClaim, SourceError> {
        self.read(claim).await
    }

    async fn remove_resource_slices(&self, driver: Option<&str>) -> Result<(), SourceError> {
        let own = format!("spec.nodeName={}", self.node_name);
        let fields = driver.map_or_else(|| own.clone(), |driver| format!("{own},spec.driver={driver}"));
        let removed = self.api.delete_all::<ResourceSlice>(&Selection::all().fields(&fields)).await;
        removed.map_err(|error| failed("remove the node's ResourceSlices".to_owned(), error))
    }

    async fn claim_was_expanded(&self, claim: &Key, size: &Quantity) -> Result<(), SourceError> {
        let there: PersistentVolumeClaim = self.read(claim).await?;
        let patch = Patch::json(expanded(&there, size)).status();
        let patched = self.api.patch::<PersistentVolumeClaim>(claim, &patch).await;
        patched.map(drop).map_err(|error| failed(format!("tell the new size of claim {claim}"), error))
    }

    async fn look_up_trust_bundles(&self) -> Result<(), SourceError> {
        self.all_of(&self.bundles, self.store.cluster_trust_bundles(), "ClusterTrustBundles").await
    }

    async fn request_pod_certificate(
        &self,
        request: &PodCertificateRequest,
    ) -> Result<PodCertificateRequest, SourceError> {
        let made = self.api.create(request).await;
        made.map_err(|error| failed("ask for a certificate of a pod".to_owned(), error))
    }

    async fn look_up_pod_certificates(&self) -> Result<(), SourceError> {
        let own = Selection::all().fields(&format!("spec.nodeName={}", self.node_name));
        let table = self.store.pod_certificate_requests();
        self.selected(&self.certificates, own, table, "PodCertificateRequests").await
    }

    async fn service_account(&self, account: &Key) -> Result<Arc<ServiceAccount>, SourceError> {
        self.read(account).await.map(Arc::new)
    }

    fn event(&self, event: Event) {
        self.recorder.record(event);
    }
}

/// Server and what is followed.
impl std::fmt::Debug for ApiSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ApiSource").field("api", &self.api).finish_non_exhaustive()
    }
}

fn failed(action: String, error: ApiError) -> SourceError {
    match error {
        // The operator may renew credentials or rights while we run.
        error @ (ApiError::Invalid { .. }
        | ApiError::Unsendable { .. }
        | ApiError::Answer { .. }
        | ApiError::AlreadyExists { .. }) => SourceError::Refused { action, source: error.into() },
        error => SourceError::Unavailable { action, source: error.into() },
    }
}

/// The changes of a claim's status when its volume has grown on its node: the size, and no more waiting for it.
fn expanded(claim: &PersistentVolumeClaim, size: &Quantity) -> serde_json::Value {
    let status = claim.status.clone().unwrap_or_default();
    let mut capacity = status.capacity.unwrap_or_default();
    capacity.insert("storage".to_owned(), size.clone());
    let waits = ["FileSystemResizePending", "Resizing"];
    let conditions = status.conditions.unwrap_or_default().into_iter();
    let conditions: Vec<_> = conditions.filter(|condition| !waits.contains(&condition.type_.as_str())).collect();
    let mut changes = vec![
        json!({"op": "test", "path": "/metadata/resourceVersion", "value": claim.metadata.resource_version}),
        json!({"op": "add", "path": "/status/capacity", "value": capacity}),
        json!({"op": "add", "path": "/status/conditions", "value": conditions}),
    ];
    if status.allocated_resource_statuses.is_some_and(|resources| resources.contains_key("storage")) {
        changes.push(json!({"op": "remove", "path": "/status/allocatedResourceStatuses/storage"}));
    }
    changes.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_whose_volume_has_grown_waits_no_more() {
        let claim: PersistentVolumeClaim = serde_json::from_value(json!({
            "metadata": {"name": "data", "resourceVersion": "7"},
            "status": {"capacity": {"storage": "1Gi"}, "allocatedResourceStatuses": {"storage": "NodeResizePending"},
                "conditions": [{"type": "FileSystemResizePending", "status": "True"}, {"type": "Other", "status": "True"}]}
        }))
        .unwrap();
        let expect = json!([
            {"op": "test", "path": "/metadata/resourceVersion", "value": "7"},
            {"op": "add", "path": "/status/capacity", "value": {"storage": "2Gi"}},
            {"op": "add", "path": "/status/conditions", "value": [{"type": "Other", "status": "True"}]},
            {"op": "remove", "path": "/status/allocatedResourceStatuses/storage"},
        ]);
        assert_eq!(expanded(&claim, &Quantity("2Gi".to_owned())), expect);
    }
}
