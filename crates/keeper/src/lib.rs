//! The per-pod process that owns stdio, log files, reaping, exit records and exec; and its protocol.

mod clock;
mod config;
mod connection;
mod container;
mod driven;
mod keeper;
mod log;
mod poll;
pub mod protocol;
mod record;
pub mod zygote;

/// Tests hold parsers to a bound of memory.
#[cfg(test)]
#[global_allocator]
static METER: sys::meter::Meter = sys::meter::Meter;

pub use config::{IdMapping, KeeperConfig, KeeperFds, Labels, Network, UserNamespace};
pub use record::read_record;
pub use zygote::{HELPER, Zygote};
