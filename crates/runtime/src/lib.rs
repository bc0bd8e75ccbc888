//! The container runtime: pod sandboxes, containers, streams, statistics; implements CRI.
//!
//! ```text
//! CRI call ─► Runtime ─► Sandbox (one keeper each) ─► Container (created → running → exited)
//!                │            ▲                             │
//!                │            ╰── exits, from the keeper ───┤
//!                ╰─◄──────────── events ────────────────────╯
//! ```
//! What has to outlive the daemon is in two places: the keeper of each pod knows its processes and how they ended, and a
//! small record of each sandbox and container in `<run-dir>/sandboxes/<id>/` knows what they were asked to be. The
//! record is written before the keeper is asked; [`Runtime::start`] puts the two together again.
//!
//! Containers are started by the keeper itself, or by another OCI runtime that the operator has configured (`driver`).
//!
//! Every call that changes something runs to its end even if its caller goes away, and whoever asks for the same thing
//! meanwhile gets the same outcome. No sandbox waits for another.

mod adopt;
mod apparmor;
mod backend;
mod client;
mod config;
mod container;
mod core;
mod create;
mod driver;
mod events;
mod exec;
mod exits;
mod files;
mod fsck;
mod group;
mod images;
mod info;
mod launch;
mod list;
mod logs;
mod plugins;
mod program;
mod record;
mod run;
mod runtime;
mod sandbox;
mod selinux;
mod service;
mod shared;
mod single;
mod spec;
mod stats;
mod status;
mod stop;
mod stream;
mod table;
mod tasks;
mod update;
mod usage;

/// Tests hold parsers to a bound of memory.
#[cfg(test)]
#[global_allocator]
static METER: sys::meter::Meter = sys::meter::Meter;

pub use config::{Config, HandlerConfig, LogLimits, Parts};
pub use images::{ImageServer, ImagesInUse};
/// Something on the host that belongs to the runtime: `sandbox`, `cgroup`, `rootfs`, or a kind of the network's.
pub use network::Owned;
pub use runtime::{Runtime, StartError};
