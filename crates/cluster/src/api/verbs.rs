//! get, create, replace, patch, delete: one object at a time.

use http::{HeaderValue, Method};
use k8s_openapi::Metadata;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenReview};
use k8s_openapi::api::authorization::v1::SubjectAccessReview;
use k8s_openapi::api::core::v1::ServiceAccount;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, Preconditions};
use k8s_openapi::apimachinery::pkg::version::Info;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::client::{Api, Call};
use super::error::ApiError;
use super::follow::Selection;
use crate::percent::encode;
use crate::{Key, Object};

/// A kind that the API server has: what a table can hold and JSON can carry.
pub trait Kind: Object + Serialize + DeserializeOwned {}
impl<T: Object + Serialize + DeserializeOwned> Kind for T {}

/// A change of some fields.
#[derive(Debug, Clone, PartialEq)]
pub struct Patch {
    kind: PatchKind,
    subresource: Option<&'static str>,
    change: serde_json::Value,
}

/// How lists are changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PatchKind {
    Merge,
    Strategic,
    Json,
}

impl Patch {
    /// RFC 7386: null removes a field, a list is replaced as a whole.
    pub fn merge(change: serde_json::Value) -> Self {
        Self { kind: PatchKind::Merge, subresource: None, change }
    }

    /// Kubernetes' own: elements of lists such as `conditions` are changed by their key.
    pub fn strategic(change: serde_json::Value) -> Self {
        Self { kind: PatchKind::Strategic, subresource: None, change }
    }

    /// RFC 6902: a list of operations.
    pub fn json(operations: serde_json::Value) -> Self {
        Self { kind: PatchKind::Json, subresource: None, change: operations }
    }

    /// Changes `status` and nothing else.
    #[must_use]
    pub fn status(self) -> Self {
        self.subresource("status")
    }

    /// Changes this subresource.
    #[must_use]
    pub fn subresource(self, name: &'static str) -> Self {
        Self { subresource: Some(name), ..self }
    }
}

/// How to delete an object.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Deletion {
    /// How long it has to end; none: its own time.
    pub grace_period_s: Option<i64>,
    /// Only if it is still this one.
    pub uid: Option<String>,
}

impl Api {
    /// Reads an object.
    ///
    /// # Errors
    /// [`ApiError::NotFound`], and all others.
    pub async fn get<T: Kind>(&self, key: &Key) -> Result<T, ApiError> {
        self.typed(Call::get(path_of::<T>(key, None))).await
    }

    /// Creates an object; returns it with what the server has added. Reviews are created, too: the answer has their status.
    ///
    /// # Errors
    /// [`ApiError::AlreadyExists`], and all others.
    pub async fn create<T: Kind>(&self, object: &T) -> Result<T, ApiError> {
        let path = collection::<T>(object.metadata().namespace.as_deref().unwrap_or_default());
        self.typed(Call::json(Method::POST, path, body(object)?)).await
    }

    /// Replaces an object as a whole. If it carries a `resourceVersion`, only that version is replaced.
    ///
    /// # Errors
    /// [`ApiError::Conflict`], [`ApiError::NotFound`], and all others.
    pub async fn replace<T: Kind>(&self, object: &T) -> Result<T, ApiError> {
        let path = path_of::<T>(&Key::of(object.metadata()), None);
        self.typed(Call::json(Method::PUT, path, body(object)?)).await
    }

    /// Changes some fields; returns the whole object.
    ///
    /// # Errors
    /// [`ApiError::NotFound`], [`ApiError::Conflict`] when a `uid` or `resourceVersion` in the patch's metadata is not the
    /// object's, and all others.
    pub async fn patch<T: Kind>(&self, key: &Key, patch: &Patch) -> Result<T, ApiError> {
        let mut call = Call::json(Method::PATCH, path_of::<T>(key, patch.subresource), body(&patch.change)?);
        call.content_type = HeaderValue::from_static(match patch.kind {
            PatchKind::Merge => "application/merge-patch+json",
            PatchKind::Strategic => "application/strategic-merge-patch+json",
            PatchKind::Json => "application/json-patch+json",
        });
        self.typed(call).await
    }

    /// Deletes an object, or asks for its end if it needs time for that.
    ///
    /// # Errors
    /// [`ApiError::NotFound`], [`ApiError::Conflict`] when it is another object of this name, and all others.
    pub async fn delete<T: Kind>(&self, key: &Key, how: &Deletion) -> Result<(), ApiError> {
        let options = DeleteOptions {
            api_version: Some("v1".into()),
            kind: Some("DeleteOptions".into()),
            grace_period_seconds: how.grace_period_s,
            preconditions: how.uid.clone().map(|uid| Preconditions { uid: Some(uid), resource_version: None }),
            ..DeleteOptions::default()
        };
        // The answer is the object, or a Status: neither says more than that it worked.
        self.call(Call::json(Method::DELETE, path_of::<T>(key, None), body(&options)?)).await.map(drop)
    }

    /// Deletes all objects that are selected.
    ///
    /// # Errors
    /// All. That there is none is no error.
    pub async fn delete_all<T: Kind>(&self, selection: &Selection) -> Result<(), ApiError> {
        let options = DeleteOptions {
            api_version: Some("v1".into()),
            kind: Some("DeleteOptions".into()),
            ..DeleteOptions::default()
        };
        // The answer lists what was deleted.
        self.call(Call::json(Method::DELETE, selection.path::<T>(&[]), body(&options)?)).await.map(drop)
    }

    /// Creates a subresource of an object: `eviction` and `binding` of a pod, `approval` of a request, ….
    ///
    /// # Errors
    /// All.
    pub async fn create_sub<T: Kind, B: Serialize, R: DeserializeOwned>(
        &self,
        key: &Key,
        subresource: &'static str,
        object: &B,
    ) -> Result<R, ApiError> {
        self.typed(Call::json(Method::POST, path_of::<T>(key, Some(subresource)), body(object)?)).await
    }

    /// A token for a service account; the answer's `status` has it and its end.
    ///
    /// # Errors
    /// [`ApiError::Forbidden`] when no pod of this node uses the account, and all others.
    pub async fn request_token(&self, account: &Key, request: &TokenRequest) -> Result<TokenRequest, ApiError> {
        self.create_sub::<ServiceAccount, _, _>(account, "token", request).await
    }

    /// Whose token this is; the answer's `status` says so.
    ///
    /// # Errors
    /// All. A token that is nobody's is no error.
    pub async fn review_token(&self, review: &TokenReview) -> Result<TokenReview, ApiError> {
        self.create(review).await
    }

    /// Whether somebody may do something; the answer's `status` says so.
    ///
    /// # Errors
    /// All. A no is no error.
    pub async fn review_access(&self, review: &SubjectAccessReview) -> Result<SubjectAccessReview, ApiError> {
        self.create(review).await
    }

    /// The server's version: a question that any user may ask, to see whether it answers.
    ///
    /// # Errors
    /// All.
    pub async fn server_version(&self) -> Result<Info, ApiError> {
        self.typed(Call::get("/version".into())).await
    }

    async fn typed<R: DeserializeOwned>(&self, call: Call) -> Result<R, ApiError> {
        let title = call.title();
        let answer = self.call(call).await?;
        serde_json::from_slice(&answer).map_err(|error| ApiError::Answer { request: title, reason: error.to_string() })
    }
}

fn body(object: &impl Serialize) -> Result<Vec<u8>, ApiError> {
    serde_json::to_vec(object)
        .map_err(|error| ApiError::Answer { request: "an object of our own".into(), reason: error.to_string() })
}

/// The path of all objects of a kind, in one namespace unless it is empty.
pub(super) fn collection<T: Metadata>(namespace: &str) -> String {
    let root = match T::GROUP {
        "" => format!("/api/{}", T::VERSION),
        group => format!("/apis/{group}/{}", T::VERSION),
    };
    match namespace {
        "" => format!("{root}/{}", T::URL_PATH_SEGMENT),
        namespace => format!("{root}/namespaces/{}/{}", encode(namespace), T::URL_PATH_SEGMENT),
    }
}

fn path_of<T: Metadata>(key: &Key, subresource: Option<&str>) -> String {
    let object = format!("{}/{}", collection::<T>(key.namespace()), encode(key.name()));
    match subresource {
        None => object,
        Some(subresource) => format!("{object}/{subresource}"),
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::coordination::v1::Lease;
    use k8s_openapi::api::core::v1::{Node, Pod};

    use super::*;

    #[test]
    fn paths() {
        assert_eq!(path_of::<Pod>(&Key::new("shop", "p"), Some("status")), "/api/v1/namespaces/shop/pods/p/status");
        assert_eq!(path_of::<Node>(&Key::cluster("n1"), None), "/api/v1/nodes/n1");
        let lease = path_of::<Lease>(&Key::new("kube-node-lease", "n1"), None);
        assert_eq!(lease, "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/n1");
        assert_eq!(collection::<TokenReview>(""), "/apis/authentication.k8s.io/v1/tokenreviews");
    }
}
