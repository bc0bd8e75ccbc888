//! Where the desired state comes from: one [`Source`] trait, one [`Store`], a manifests directory or a kube-apiserver.
//!
//! ```text
//! manifests directory ─► Manifests (decode, default, validate, controllers) ─┐
//!                                                                            ├─► Store ─► Watch ─► kubelet, proxy, DNS
//! kube-apiserver      ─► ApiSource (list and watch, statuses, events)         ─┘
//! ```
//!
//! A source writes the store; everybody else reads tables and watches them. Watches are level-based: a watcher is
//! told *which* objects differ from what it last saw, never how often they changed in between.

pub mod api;
mod controllers;
mod key;
pub mod manifests;
pub mod percent;
pub mod quantity;
mod source;
mod state;
mod store;
mod table;

pub use controllers::selector::matches as labels_match;
pub use controllers::service::Range;
pub use k8s_openapi;
pub use key::Key;
pub use source::{EventKind, Source, SourceError, Token, event_about};
pub use store::Store;
pub use table::{Change, Object, Table, Watch};
