//! Pod networks: the built-in bridge and its address management, host ports, CNI, pod DNS.
//!
//! ```text
//! attach ─► configuration in cni_conf_dir? ─ no ─► prepared slot (netns + veth + address + route) ─► host ports ─► record
//!                                          └ yes ► new netns ─► plugins' ADD ─────────────────────────────────► record
//! ```
//!
//! A network namespace is a file descriptor. Nothing is mounted on the host: whoever holds the descriptor (the pod's
//! keeper) keeps the namespace, and the kernel frees it, with its veth pair, when the last holder is gone.
//! Addresses are managed from the set of live sandboxes: a record per sandbox lies in the run directory (tmpfs), so
//! that a restarted daemon adopts them; a record of another boot is garbage.

mod bridge;
mod cni;
mod config;
pub mod dns;
mod errand;
#[cfg(test)]
mod fuzz;
mod ipam;
mod network;
mod node;
mod ports;
mod record;
mod slots;
mod types;

/// Tests hold parsers to a bound of memory.
#[cfg(test)]
#[global_allocator]
static METER: sys::meter::Meter = sys::meter::Meter;

pub use cni::is_configured as is_cni_configured;
pub use config::Config;
pub use network::Network;
pub use types::{
    AttachRequest, Attachment, Dns, InterfaceStats, LiveSandbox, Mode, NetworkError, Owned, PortMapping, Protocol,
    Status,
};
