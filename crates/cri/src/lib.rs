//! The Container Runtime Interface v1: messages, traits, and gRPC at the edge.
//!
//! [`v1`] is generated (`cargo xtask codegen`) from `proto/runtime.proto`. The node agent and the runtime meet at the
//! traits of [`service`] and nowhere else: in one process by plain calls; [`server`] lets other node agents in, [`client`]
//! drives another runtime.

mod calls;
pub mod client;
pub mod error;
mod limits;
pub mod observed;
pub mod server;
pub mod service;

/// The messages of package `runtime.v1`.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub mod v1 {
    include!("generated/runtime_v1.rs");
}

pub use client::Client;
pub use error::Error;
pub use observed::{Observed, Observer};
pub use service::{ImageService, Items, RuntimeService};
