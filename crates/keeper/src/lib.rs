//! The per-pod process that owns stdio, log files, reaping, exit records and exec; and its protocol.

mod clock;
mod config;
mod keeper;
mod log;
pub mod protocol;
pub mod zygote;

pub use config::{IdMapping, KeeperConfig, KeeperFds, Network, UserNamespace};
pub use zygote::Zygote;
