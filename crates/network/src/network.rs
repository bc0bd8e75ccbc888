//! The network of a node: attach, detach, adopt.

use std::net::IpAddr;
use std::sync::Arc;

use crate::{AttachRequest, Attachment, Config, InterfaceStats, LiveSandbox, Mode, NetworkError, Owned, Status};

/// The pods' network of a node. Shared; every method may be called at any time from any task.
#[derive(Debug)]
pub struct Network {
    config: Config,
}

impl Network {
    /// Opens the network in the calling thread's network namespace, which is the host's from here on. Makes nothing
    /// in the kernel yet.
    ///
    /// # Errors
    /// A configuration value that cannot be used, or a run directory that cannot be made.
    pub fn new(config: Config) -> Result<Arc<Network>, NetworkError> {
        Ok(Arc::new(Network { config }))
    }

    /// Takes over what lives after a restart and removes what is left of sandboxes that do not. Call it before the first
    /// [`attach`](Network::attach); it makes the bridge and the prepared slots, too.
    ///
    /// # Errors
    /// The kernel refused to make the bridge. What was wrong with a single sandbox is logged.
    pub async fn adopt(&self, live: Vec<LiveSandbox>) -> Result<(), NetworkError> {
        drop(live);
        Ok(())
    }

    /// Puts a sandbox on the network. On failure nothing is left behind.
    ///
    /// # Errors
    /// See [`NetworkError`].
    pub async fn attach(&self, request: AttachRequest) -> Result<Attachment, NetworkError> {
        Err(NetworkError::Config(format!(
            "sandbox {}: bridge {} is not built yet",
            request.sandbox_id, self.config.bridge
        )))
    }

    /// Takes a sandbox off the network: host ports, interface, address. Done twice or for an unknown sandbox it
    /// succeeds.
    ///
    /// # Errors
    /// A CNI plugin failed, or the kernel did; the sandbox counts as attached until a retry succeeds.
    pub async fn detach(&self, sandbox_id: &str) -> Result<(), NetworkError> {
        let _ = sandbox_id;
        Ok(())
    }

    /// Whether pods can be attached now.
    pub fn status(&self) -> Status {
        Status { mode: Mode::Bridge, problem: None }
    }

    /// Counters of the interfaces of a sandbox, loopback left out; empty for an unknown one.
    ///
    /// # Errors
    /// The kernel refused to tell.
    pub async fn stats(&self, sandbox_id: &str) -> Result<Vec<InterfaceStats>, NetworkError> {
        let _ = sandbox_id;
        Ok(Vec::new())
    }

    /// Addresses of the host on the built-in bridge, where pods reach it (the pods' DNS server listens here).
    pub fn gateways(&self) -> Vec<IpAddr> {
        Vec::new()
    }

    /// Everything the network owns on the host, with the owner of each; what has none is a leak.
    ///
    /// # Errors
    /// The kernel refused to list.
    pub async fn fsck(&self) -> Result<Vec<Owned>, NetworkError> {
        Ok(Vec::new())
    }

    /// Removes bridge, table and prepared slots. For `down`, when no sandbox is left; a daemon that only restarts
    /// leaves them.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn shutdown(&self) -> Result<(), NetworkError> {
        Ok(())
    }
}
