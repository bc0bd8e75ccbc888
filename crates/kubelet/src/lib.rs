//! The node agent: pod workers, volumes, probes, statuses; does what `pod` decided.
//!
//! ```text
//! Source ─► manager ─► worker ──pod::decide──► effects ─► CRI
//!                        │                       ├─ volumes   files and mounts that the containers see
//!                        └─ publish              └─ generate  pod ─► CRI requests (env, hosts, qos)
//! ```

pub mod env;
pub mod facts;
pub mod generate;
pub mod hosts;
pub mod paths;
pub mod qos;
pub mod volumes;
