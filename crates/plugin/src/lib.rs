//! The protocols of a node's plugins: messages and gRPC, nothing of what they mean.
//!
//! The modules are generated (`cargo xtask codegen`) from `proto/`. A plugin is a server on a Unix socket; [`connect`] is the
//! way to it.

mod link;
mod wire;

use std::path::Path;

use tonic::transport::{Channel, Endpoint};

pub use link::{LinkError, connect_now};
pub use wire::encode_pod;

/// How a plugin makes itself known.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub mod registration {
    include!("generated/pluginregistration.rs");
}

/// The Container Storage Interface 1.12, as far as nodes go.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub mod csi {
    include!("generated/csi_v1.rs");
}

/// Device plugins, v1beta1: how they register, and what the kubelet asks of them.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub mod device {
    include!("generated/v1beta1.rs");
}

/// The pod resources API, v1: what pods have of devices, CPUs and memory.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub mod resources {
    include!("generated/v1.rs");
}

/// Dynamic resource allocation: what a driver does for the claims of pods, v1.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub mod dra {
    include!("generated/dra_v1.rs");
}

/// The same as older drivers know it, v1beta1.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub mod dra_v1beta1 {
    include!("generated/dra_v1beta1.rs");
}

/// How a driver tells of the health of its devices, v1.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub mod dra_health {
    include!("generated/dra_health_v1.rs");
}

/// The same as some drivers knew it before, v1alpha1.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub mod dra_health_v1alpha1 {
    include!("generated/dra_health_v1alpha1.rs");
}

/// The Pods API, v1alpha1: the node's pods for programs beside it.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub mod pods {
    include!("generated/pods.rs");
}

/// The way to who listens on the Unix socket at `path`. Nothing is connected before the first call, and each call that finds
/// no connection tries again.
///
/// # Errors
/// The path is not UTF-8 or cannot be written in an address.
pub fn connect(path: &Path) -> Result<Channel, NoAddress> {
    endpoint(path).map(|endpoint| endpoint.connect_lazy())
}

fn endpoint(path: &Path) -> Result<Endpoint, NoAddress> {
    let address = path.to_str().and_then(|path| Endpoint::from_shared(format!("unix://{path}")).ok());
    address.ok_or_else(|| NoAddress(path.display().to_string()))
}

/// A path that no socket can be reached by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NoAddress(String);

impl std::fmt::Display for NoAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?} is no path of a socket", self.0)
    }
}

impl std::error::Error for NoAddress {}
