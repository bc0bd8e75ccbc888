//! The service proxy of a node: what the store says of Services and EndpointSlices becomes rules of the kernel.
//!
//! ```text
//! store ─► watch ─► service::Model ─difference─► a backend (one for each mode) ─► kernel
//!                        │                                                    │
//!                        └── flows of UDP endpoints that are gone ◄───────────┘
//! ```
//!
//! The rules outlive the daemon: nothing is flushed when it stops or starts.

mod backend;
mod barrier;
mod config;
pub mod configuration;
mod conntrack;
mod flows;
mod health;
mod health_ports;
mod metrics;
mod proxy;
mod server;
mod service_link;
mod surroundings;
mod sync;
pub mod sysctls;
mod trouble;
mod web;

pub use backend::{Mode, UnknownMode};
pub use barrier::Barrier;
pub use config::{Config, IptablesKind, IptablesOptions, IpvsOptions};
pub use health::{Answer, Health};
pub use ipnet::IpNet;
pub use metrics::{Metrics, RuleCounts, Tallies};
pub use proxy::{Proxy, Questions, RulesError, StartError};
pub use server::{ListenError, More, Telling};
pub use service::Refusals;

/// A kernel object that the proxy owns; see [`Proxy::fsck`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owned {
    /// `table` or `chain`.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// The part that needs it; `None`: nobody does, it is a leak.
    pub owner: Option<String>,
}
