//! The service proxy of a node: what the store says of Services and EndpointSlices becomes rules of the kernel.
//!
//! ```text
//! store ─► watch ─► service::Model ─difference─► netfilter::services ─► one transaction ─► kernel
//!                        │                                                    │
//!                        └── flows of UDP endpoints that are gone ◄───────────┘
//! ```
//!
//! The rules outlive the daemon: nothing is flushed when it stops or starts.

mod barrier;
mod config;
mod flows;
mod kernel;
mod proxy;
mod sync;

pub use barrier::Barrier;
pub use config::Config;
pub use ipnet::IpNet;
pub use proxy::{Proxy, StartError};

/// A kernel object that the proxy owns; see [`Proxy::fsck`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owned {
    /// `table`.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// The part that needs it; `None`: nobody does, it is a leak.
    pub owner: Option<String>,
}
