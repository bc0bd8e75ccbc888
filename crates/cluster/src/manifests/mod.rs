//! The manifests directory as a source.

mod decode;
mod default;
mod engine;
mod events;
mod files;
mod go_print;
mod kinds;
#[cfg(test)]
mod kube_play;
mod path;
mod problem;
mod source;
mod static_pods;
mod validate;
mod yaml;

pub use problem::{ObjectName, Problem, Severity};
pub use source::{Manifests, ManifestsConfig};

pub(crate) use events::Events;
pub(crate) use kinds::{AnyObject, Kind};
pub(crate) use static_pods::{Declared as StaticPod, StaticPods, is_static};
pub(crate) use validate::names;
