//! The Node Resource Interface (NRI) 0.12: plugins that see the pods of a node and adjust their containers.
//!
//! ```text
//! plugin ── socket ──► Plugin (registered ─► configured ─► synchronized) ─┐ in the order of their indices
//! runtime ── event, container to be made ─────────────────────────────────┴─► adjustments of all, put together
//! ```
//! A connection carries two of ttrpc: on one the runtime calls the plugin, on the other the plugin calls the runtime
//! (`wire`). A plugin is asked one thing at a time; one that does not answer in time, or not as it should, is disconnected and
//! told of, and pods go on without it. What could not be told to plugins is not made ([`fits`]).

mod connection;
mod hub;
mod merge;
mod plugin;
mod wire;

/// The messages, generated (`cargo xtask codegen`) from `proto/nri.proto`.
#[allow(missing_docs, unreachable_pub, clippy::all, reason = "generated")]
pub mod api {
    include!("generated/nri.rs");
}

pub use hub::{Config, Host, Nri, StartError};
pub use merge::{Creation, removal};
pub use plugin::{PluginError, fits};

/// The version that plugins are told.
pub const VERSION: &str = "v0.12.3";
