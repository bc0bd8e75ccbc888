//! The pods' DNS server of a node without a cluster: the cluster's names, and a forwarder for all others.
//!
//! ```text
//! main:   let zygote = Arc::new(Zygote::start::<Helpers>()?)    // first thing; Helpers::ALL has dns::HELPER
//! daemon: let server = dns::Server::start(config, zygote).await?
//!         server.update(zone).await?                            // for each change of services and pods
//!         drop(server)  or  server.stop().await?                // it lives on,  or  it ends
//! ```
//! The server is a process of its own, so that names resolve while the daemon is away.

mod config;
mod control;
mod forward;
mod link;
mod listen;
pub(crate) mod message;
mod process;
mod server;
mod snapshot;
mod upstream;
mod zone;

pub use config::{Config, DnsError, Upstreams};
pub use server::{Server, fsck, stop};
pub use zone::{Endpoint, InvalidName, Port, Target, Zone};

/// What `ps` shows.
const PROCESS_NAME: &str = "orlop-dns";

/// The server's process, to be among the zygote's helpers.
pub const HELPER: sys::zygote::Helper = sys::zygote::Helper { name: "dns", run: process::run };
