//! Why a container gets no devices, in upstream's words where it has some.

use std::path::PathBuf;

/// See the module.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DeviceError {
    /// A pod's requests do not change.
    #[error("a container changed its request for resource {resource:?} from {had} to {wants}")]
    Changed { resource: String, had: usize, wants: usize },
    #[error("cannot allocate unregistered device {resource}")]
    Unregistered { resource: String },
    #[error("no healthy devices present; cannot allocate unhealthy devices {resource}")]
    NoneHealthy { resource: String },
    #[error("previously allocated devices are no longer healthy; cannot allocate unhealthy devices {resource}")]
    NoLongerHealthy { resource: String },
    #[error("requested number of devices unavailable for {resource}. Requested: {requested}, Available: {available}")]
    TooFew { resource: String, requested: usize, available: usize },
    #[error("no containers return in allocation response of the device plugin for {resource}")]
    NoAnswer { resource: String },
    /// The plugin said no.
    #[error("{}", refused(call, status))]
    Refused { call: &'static str, status: Box<tonic::Status> },
    /// The plugin says nothing.
    #[error(
        "the device plugin for {resource} at {socket} has not answered {call} within {limit_s} s; restart the plugin, and \
         then the pod"
    )]
    Hung { call: &'static str, resource: String, socket: PathBuf, limit_s: u64 },
    /// Nobody knows what a container that has devices needs before it starts; upstream's words.
    #[error("endpoint not found in cache for a registered resource: {resource}; start its device plugin")]
    Forgotten { resource: String },
    /// Who has to ready the devices for a start has gone.
    #[error("the device plugin for {resource}, which readies devices for each start, is not connected; start it again")]
    Away { resource: String },
    /// A plugin that registers is not there.
    #[error("the device plugin for {resource} cannot be reached at {socket}: {cause}")]
    Unreachable { resource: String, socket: PathBuf, cause: String },
}

fn refused(call: &str, status: &tonic::Status) -> String {
    match call {
        "Allocate" => rpc(status),
        _ => format!("device plugin {call} rpc failed with err: {}", rpc(status)),
    }
}

/// As Go prints what a call failed for.
pub(super) fn rpc(status: &tonic::Status) -> String {
    format!("rpc error: code = {:?} desc = {}", status.code(), status.message())
}
