//! The node agent: pod workers, volumes, probes, statuses; does what `pod` decided.
//!
//! ```text
//! Source ─► manager ─► worker ──pod::decide──► effects ─► CRI
//!                        │                       ├─ volumes   files and mounts that the containers see
//!                        └─ publish              └─ generate  pod ─► CRI requests (env, hosts, qos)
//! ```

pub mod admission;
mod adopt;
mod apparmor;
mod clock;
pub mod configuration;
mod context;
mod damaged;
mod disk;
mod effects;
pub mod env;
pub mod facts;
pub mod generate;
pub mod hosts;
mod kubelet;
pub mod logs;
mod manager;
pub mod metrics;
pub mod node;
mod oom;
pub mod paths;
pub mod plugins;
mod pods_api;
mod probing;
mod publish;
mod pulled;
pub mod qos;
mod records;
mod remains;
pub mod resources;
mod retry;
pub mod server;
mod termination;
mod threads;
mod timeline;
pub mod upkeep;
mod users;
pub mod volumes;
mod worker;

/// The release of Kubernetes whose kubelet this is.
pub const KUBERNETES: &str = "v1.37.2";

pub use context::{Barrier, Config, Credential, Holder, Keychain, NoBarrier, ObjectName, Parts, SiteNow};
pub use kubelet::{Ending, Explanation, Kubelet};
pub use pulled::{Allowlist, Verification};
pub use timeline::Step;
