//! The manifests directory as a source.

mod decode;
mod default;
mod engine;
mod events;
mod files;
mod go_print;
mod kinds;
mod path;
mod problem;
mod static_pods;
mod validate;
mod yaml;

pub use engine::{Manifests, ManifestsConfig};
pub use problem::{ObjectName, Problem, Severity};

pub(crate) use kinds::{AnyObject, Kind};
pub(crate) use static_pods::{Declared as StaticPod, StaticPods, is_static};
