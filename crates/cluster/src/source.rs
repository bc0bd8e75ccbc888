//! The seam between the node and whoever owns the desired state.

use std::sync::Arc;

use async_trait::async_trait;
use k8s_openapi::Metadata;
use k8s_openapi::api::authentication::v1::TokenRequestSpec;
use k8s_openapi::api::certificates::v1::PodCertificateRequest;
use k8s_openapi::api::core::v1::{Event, NodeStatus, ObjectReference, Pod, PodStatus, ServiceAccount};
use k8s_openapi::api::resource::v1::ResourceClaim;
use k8s_openapi::api::storage::v1::{CSIDriver, VolumeAttachment};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;

use crate::{Key, Store};

/// Gives the desired state and takes the observed one: a manifests directory, or a kube-apiserver.
#[async_trait]
pub trait Source: Send + Sync {
    /// The tables this source fills. A pod may leave its table at any time, with or without a `deletionTimestamp`, and
    /// another one of the same name take its place in one step: the uid tells them apart.
    fn store(&self) -> &Store;

    /// Waits until the tables tell of everything that the pod refers to whether it is there: ConfigMaps, Secrets, claims
    /// with their volumes, the Services of its namespace. What is missing then is really missing. Cancel-safe. There is
    /// nothing to wait for where the tables hold all objects from the start.
    ///
    /// # Errors
    /// The source cannot tell now; the caller asks again later.
    async fn look_up(&self, _pod: &Pod) -> Result<(), SourceError> {
        Ok(())
    }

    /// Publishes what the kubelet observes of a pod. Idempotent; the latest status wins, and conditions of types that it
    /// does not have stay as they are. The kubelet calls it again when it failed for now ([`SourceError::is_passing`]).
    async fn update_pod_status(&self, uid: &str, status: PodStatus) -> Result<(), SourceError>;

    /// Removes a pod for good: the kubelet calls it when the pod's deletion was asked for (`deletionTimestamp`), nothing
    /// of it runs on the node and its last status has been taken. Never touches another pod of the same name. Idempotent:
    /// a pod that is gone is no error. The object may stay on, for finalizers of others.
    async fn delete_pod(&self, uid: &str) -> Result<(), SourceError>;

    /// Asks for the deletion of a pod with this grace period (`None`: the pod's own): an eviction, or `orlop delete`.
    /// The pod gets its `deletionTimestamp`; a repeated call can only shorten the grace period.
    async fn request_deletion(&self, uid: &str, grace_period_s: Option<i64>) -> Result<(), SourceError>;

    /// Publishes the status of this node.
    async fn update_node_status(&self, name: &str, status: NodeStatus) -> Result<(), SourceError>;

    /// A token of a service account.
    ///
    /// # Errors
    /// The source makes none, or not for this account.
    async fn request_token(&self, account: &Key, _spec: TokenRequestSpec) -> Result<Token, SourceError> {
        let action = format!("the token of service account {account}");
        Err(SourceError::Refused { action, source: "tokens come from an API server, and this node has none".into() })
    }

    /// The runtime's handler that a RuntimeClass stands for. Without a cluster the class is the handler's own name.
    ///
    /// # Errors
    /// There is no such class, or the source cannot tell now.
    async fn runtime_handler(&self, class: &str) -> Result<String, SourceError> {
        Ok(class.to_owned())
    }

    /// What the cluster says of a CSI driver; none if it says nothing.
    ///
    /// # Errors
    /// The source cannot tell now.
    async fn csi_driver(&self, name: &str) -> Result<Option<Arc<CSIDriver>>, SourceError> {
        Ok(self.store().csi_drivers().get(&Key::cluster(name)))
    }

    /// How a volume was attached to a node.
    ///
    /// # Errors
    /// It is not, or the source cannot tell now.
    async fn volume_attachment(&self, name: &str) -> Result<VolumeAttachment, SourceError> {
        Err(SourceError::NotFound { kind: "VolumeAttachment", name: name.to_owned() })
    }

    /// A claim of pods for devices, as it is now.
    ///
    /// # Errors
    /// There is none of this name, or the source cannot tell now.
    async fn resource_claim(&self, claim: &Key) -> Result<ResourceClaim, SourceError> {
        Err(SourceError::NotFound { kind: "ResourceClaim", name: claim.to_string() })
    }

    /// Takes back what drivers have said that this node has: of one driver, or of all. Nobody counts on it any more then.
    ///
    /// # Errors
    /// The source does not do it now.
    async fn remove_resource_slices(&self, _driver: Option<&str>) -> Result<(), SourceError> {
        Ok(())
    }

    /// Tells that the volume of a claim has this size on its node now: what waited for that has happened.
    ///
    /// # Errors
    /// The claim is gone, or the source does not take it now.
    async fn claim_was_expanded(&self, _claim: &Key, _size: &Quantity) -> Result<(), SourceError> {
        Ok(())
    }

    /// Waits until the table has all ClusterTrustBundles.
    ///
    /// # Errors
    /// The source cannot tell now.
    async fn look_up_trust_bundles(&self) -> Result<(), SourceError> {
        Ok(())
    }

    /// Waits until the table has all requests for certificates of this node's pods.
    ///
    /// # Errors
    /// The source cannot tell now.
    async fn look_up_pod_certificates(&self) -> Result<(), SourceError> {
        Ok(())
    }

    /// Asks for a certificate for a pod. What becomes of it, the table shows.
    ///
    /// # Errors
    /// The source issues none, or refuses.
    async fn request_pod_certificate(
        &self,
        _request: &PodCertificateRequest,
    ) -> Result<PodCertificateRequest, SourceError> {
        let action = "ask for a certificate of a pod".to_owned();
        Err(SourceError::Refused { action, source: "they come from an API server, and this node has none".into() })
    }

    /// A service account, as it is now.
    ///
    /// # Errors
    /// There is none of this name, or the source cannot tell now.
    async fn service_account(&self, account: &Key) -> Result<Arc<ServiceAccount>, SourceError> {
        let missing = || SourceError::NotFound { kind: "ServiceAccount", name: account.to_string() };
        self.store().service_accounts().get(account).ok_or_else(missing)
    }

    /// The uid of a service account.
    ///
    /// # Errors
    /// There is none of this name, or the source cannot tell now.
    async fn service_account_uid(&self, account: &Key) -> Result<String, SourceError> {
        Ok(self.service_account(account).await?.metadata.uid.clone().unwrap_or_default())
    }

    /// Records an event. Never fails and never waits: events are best effort. `count`, the timestamps and the name are
    /// the source's business; the caller fills `involvedObject`, `type`, `reason`, `message` and `source` (see [`event_about`]).
    fn event(&self, event: Event);
}

/// A token of a service account.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    /// What its bearer shows.
    pub text: String,
    /// When it ends.
    pub ends: Timestamp,
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
    /// The source does not answer, or refuses for now: the same call may succeed later.
    #[error("cannot {action} now")]
    Unavailable {
        /// What was tried, as in "update the status of pod shop/web".
        action: String,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The source will never take this, however often it is asked.
    #[error("{action} was refused")]
    Refused {
        /// What was tried.
        action: String,
        /// The cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl SourceError {
    /// Whether the same call may succeed later.
    pub fn is_passing(&self) -> bool {
        match self {
            SourceError::NotFound { .. } | SourceError::Refused { .. } => false,
            SourceError::Save { .. } | SourceError::Unavailable { .. } => true,
        }
    }
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
