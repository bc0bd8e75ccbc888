//! The lease by which a node shows that it lives.

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use k8s_openapi::jiff::Timestamp;

use super::client::Api;
use super::error::ApiError;
use crate::Key;

/// Where nodes have theirs.
const NAMESPACE: &str = "kube-node-lease";

/// A node's lease: renewed by whoever calls [`NodeLease::renew`] in time.
#[derive(Debug, Clone)]
pub struct NodeLease {
    api: Api,
    node: String,
    duration_s: i32,
    /// As the server has it, as far as we know.
    latest: Option<Lease>,
}

impl NodeLease {
    /// The lease of this node, which counts for `duration_s` after each renewal (upstream: 40 s, renewed every 10 s). The
    /// client should be one of its own, with a limit for the time of a request that is shorter than the renewals' distance.
    pub fn new(api: Api, node: &str, duration_s: i32) -> Self {
        Self { api, node: node.to_owned(), duration_s, latest: None }
    }

    /// Renews it once, or makes it if it is not there. With `owner`, the Node, the lease goes when the Node goes.
    ///
    /// # Errors
    /// All. After one the next call reads the lease anew.
    pub async fn renew(&mut self, now: Timestamp, owner: Option<&OwnerReference>) -> Result<(), ApiError> {
        if let Some(known) = self.latest.take() {
            match self.replace(known, now, owner).await {
                // Somebody else has touched or removed it.
                Err(ApiError::Conflict { .. } | ApiError::NotFound { .. }) => {}
                done => return done,
            }
        }
        match self.api.get::<Lease>(&Key::new(NAMESPACE, &self.node)).await {
            Ok(there) => self.replace(there, now, owner).await,
            Err(error) if error.is_not_found() => {
                let metadata = ObjectMeta {
                    name: Some(self.node.clone()),
                    namespace: Some(NAMESPACE.into()),
                    ..ObjectMeta::default()
                };
                let lease = self.renewed(Lease { metadata, spec: None }, now, owner);
                self.latest = Some(self.api.create(&lease).await?);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn replace(&mut self, known: Lease, now: Timestamp, owner: Option<&OwnerReference>) -> Result<(), ApiError> {
        let lease = self.renewed(known, now, owner);
        self.latest = Some(self.api.replace(&lease).await?);
        Ok(())
    }

    fn renewed(&self, mut lease: Lease, now: Timestamp, owner: Option<&OwnerReference>) -> Lease {
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        spec.holder_identity = Some(self.node.clone());
        spec.lease_duration_seconds = Some(self.duration_s);
        spec.renew_time = Some(MicroTime(now));
        if let (Some(owner), None | Some([])) = (owner, lease.metadata.owner_references.as_deref()) {
            lease.metadata.owner_references = Some(vec![owner.clone()]);
        }
        lease
    }
}
