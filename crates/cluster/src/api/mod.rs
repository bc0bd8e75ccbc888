//! The client of a kube-apiserver, and the source of a node that has one.
//!
//! ```text
//! kubeconfig ─► Config ─► Api ─┬─ verbs: get, create, replace, patch, delete, reviews, tokens
//!                              ├─ NodeLease
//!                              ├─ follow: list and watch of a kind ─► Table
//!                              └─ ApiSource: what a node needs, as a Source
//! ```
//!
//! Transport is our own on hyper: one connection of HTTP/2 carries what a node follows, one watch for each Secret and
//! ConfigMap of its pods; half-closed connections are noticed by PING; certificates, keys and tokens may change at any
//! time. kube-rs speaks HTTP/1.1, a connection for each watch, and reads client certificates once.

mod client;
mod config;
mod connection;
mod error;
mod exec;
mod follow;
mod identity;
mod kubeconfig;
mod lease;
mod manifest_url;
mod proxy;
mod rate;
mod source;
mod tls;
mod verbs;

pub use client::Api;
pub use config::{Bearer, Config, ConfigError, Identity, Pem, Rate, Secret, Server, Trust};
pub use error::ApiError;
pub use exec::{ExecError, ExecPlugin};
pub use follow::{Following, Progress, Selection, Sink, follow, poll};
pub use lease::NodeLease;
pub use manifest_url::ManifestUrl;
pub use proxy::Proxy;
pub(crate) use source::first_reference;
pub use source::{ApiSource, ApiSourceConfig, SealConfig, SealError, StandaloneSource, StartError};
pub use verbs::{Deletion, Kind, Patch};
