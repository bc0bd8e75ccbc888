//! The seam between the node and whoever owns the desired state.

use async_trait::async_trait;
use k8s_openapi::Metadata;
use k8s_openapi::api::core::v1::{Event, NodeStatus, ObjectReference, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::Store;

/// Gives the desired state and takes the observed one: a manifests directory, or later a kube-apiserver.
#[async_trait]
pub trait Source: Send + Sync {
    /// The tables this source fills.
    fn store(&self) -> &Store;

    /// Publishes what the kubelet observes of a pod. Idempotent; the latest status wins.
    async fn update_pod_status(&self, uid: &str, status: PodStatus) -> Result<(), SourceError>;

    /// Removes a pod for good: the kubelet calls it when the pod's deletion was asked for (`deletionTimestamp`) and
    /// nothing of the pod is left on the node. Idempotent: a pod that is gone is no error.
    async fn delete_pod(&self, uid: &str) -> Result<(), SourceError>;

    /// Asks for the deletion of a pod with this grace period (`None`: the pod's own): an eviction, or `orlop delete`.
    /// The pod gets its `deletionTimestamp`; a repeated call can only shorten the grace period.
    async fn request_deletion(&self, uid: &str, grace_period_s: Option<i64>) -> Result<(), SourceError>;

    /// Publishes the status of this node.
    async fn update_node_status(&self, name: &str, status: NodeStatus) -> Result<(), SourceError>;

    /// Records an event. Never fails and never waits: events are best effort. `count`, the timestamps and the name are
    /// the source's business; the caller fills `involvedObject`, `type`, `reason`, `message` and `source` (see [`event_about`]).
    fn event(&self, event: Event);
}

/// Why a source did not take what it was given.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The object is not, or no longer, there; there is nothing to retry.
    #[error("{kind} {name} does not exist")]
    NotFound {
        /// The kind, as manifests spell it.
        kind: &'static str,
        /// Name or uid.
        name: String,
    },
    /// The state directory could not be written; the memory's copy is up to date.
    #[error("cannot save the cluster's state to {path}; check free space and permissions")]
    Save {
        /// The file.
        path: std::path::PathBuf,
        /// The cause.
        source: std::io::Error,
    },
}

/// `type` of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// Something expected happened.
    Normal,
    /// Something an operator may want to look at.
    Warning,
}

impl EventKind {
    /// As the API spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            EventKind::Normal => "Normal",
            EventKind::Warning => "Warning",
        }
    }
}

/// An event about `object`, with upstream's `reason` and the reporting `component` (`kubelet`, `deployment-controller` …).
pub fn event_about<T: Metadata<Ty = ObjectMeta>>(
    object: &T,
    kind: EventKind,
    reason: &str,
    message: impl Into<String>,
    component: &str,
) -> Event {
    let metadata = object.metadata();
    Event {
        involved_object: ObjectReference {
            api_version: Some(T::API_VERSION.into()),
            kind: Some(T::KIND.into()),
            namespace: metadata.namespace.clone(),
            name: metadata.name.clone(),
            uid: metadata.uid.clone(),
            resource_version: metadata.resource_version.clone(),
            field_path: None,
        },
        type_: Some(kind.as_str().into()),
        reason: Some(reason.into()),
        message: Some(message.into()),
        source: Some(k8s_openapi::api::core::v1::EventSource { component: Some(component.into()), host: None }),
        reporting_component: Some(component.into()),
        ..Event::default()
    }
}
