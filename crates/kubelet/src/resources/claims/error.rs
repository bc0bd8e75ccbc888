//! Why a pod does not get its claims, in upstream's words where it has some.

use std::time::Duration;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClaimError {
    #[error("pod {pod:?}: ResourceClaim not created yet")]
    NotMade { pod: String },
    #[error("pod {pod:?}, spec.resourceClaim {claim:?}: none of the supported fields are set")]
    Unsupported { pod: String, claim: String },
    /// The cluster does not say.
    #[error("fetch ResourceClaim {claim}: {}", crate::context::chain(source))]
    Source { claim: String, source: cluster::SourceError },
    #[error("ResourceClaim {claim} was not created for pod {pod} (it has another owner)")]
    OfAnother { claim: String, pod: String },
    #[error("pod {pod} ({uid}) is not allowed to use ResourceClaim {claim} ({claim_uid})")]
    NotReserved { pod: String, uid: String, claim: String, claim_uid: String },
    #[error("ResourceClaim {claim}: not allocated")]
    NotAllocated { claim: String },
    #[error(
        "old ResourceClaim with same name {claim} and different UID {old} still exists (previous pod force-deleted?!)"
    )]
    Replaced { claim: String, old: String },
    #[error("ResourceClaim {claim} is being unprepared")]
    Released { claim: String },
    #[error("DRA driver {0} is not registered")]
    Unregistered(String),
    #[error("{call} returned result for unknown claim UID {uid}")]
    Unknown { call: &'static str, uid: String },
    #[error("{call} failed for ResourceClaim {claim}: {cause}")]
    Failed { call: &'static str, claim: String, cause: String },
    #[error("{call} skipped {count} ResourceClaims")]
    Skipped { call: &'static str, count: usize },
    #[error("DRA driver {driver}: {call} returned {count} {what} for ResourceClaim {claim}; at most {max} are taken")]
    TooMany { driver: String, call: &'static str, claim: String, what: &'static str, count: usize, max: usize },
    /// The driver said no to the whole.
    #[error("DRA driver {driver}: {call}: rpc error: code = {:?} desc = {}", status.code(), status.message())]
    Refused { driver: String, call: &'static str, status: Box<tonic::Status> },
    /// The driver says nothing.
    #[error("DRA driver {driver}: {call}: no answer within {} s; see the driver's log, or restart it", within.as_secs())]
    Hung { driver: String, call: &'static str, within: Duration },
    /// Its socket is none.
    #[error("DRA driver {driver}: {cause}")]
    Address { driver: String, cause: plugin::NoAddress },
    /// It could not be noted who uses what.
    #[error("checkpoint ResourceClaim state: {0}")]
    Save(#[source] std::io::Error),
    /// The container's pod got no claims.
    #[error("ResourceClaim {claim} has not been prepared")]
    Unprepared { claim: String },
}
