//! The network of a node: attach, detach, adopt.

use std::net::IpAddr;
use std::sync::Arc;

use crate::node::Node;
use crate::slots::Filler;
use crate::{AttachRequest, Attachment, Config, InterfaceStats, LiveSandbox, Mode, NetworkError, Owned, Status};

/// The pods' network of a node. Shared; every method may be called at any time from any task.
#[derive(Debug)]
pub struct Network {
    node: Arc<Node>,
    filler: Filler,
}

impl Network {
    /// Opens the network in the calling thread's network namespace, which is the host's from here on. Makes nothing
    /// in the kernel yet.
    ///
    /// # Errors
    /// A configuration value that cannot be used, or a run directory that cannot be made.
    pub fn new(config: Config) -> Result<Arc<Network>, NetworkError> {
        let node = Arc::new(Node::open(&config)?);
        let filler = Filler::start(&node).map_err(|source| NetworkError::Kernel {
            object: config.bridge,
            step: "starting a thread",
            source,
        })?;
        Ok(Arc::new(Network { node, filler }))
    }

    /// Takes over what lives after a restart and removes what is left of sandboxes that do not. Call it before the first
    /// [`attach`](Network::attach); it makes the bridge and the prepared slots, too.
    ///
    /// # Errors
    /// The kernel refused to make the bridge. What was wrong with a single sandbox is logged.
    pub async fn adopt(&self, live: Vec<LiveSandbox>) -> Result<(), NetworkError> {
        self.blocking(move |node| node.adopt(&live)).await?;
        self.filler.wake();
        Ok(())
    }

    /// Puts a sandbox on the network. On failure nothing is left behind.
    ///
    /// # Errors
    /// See [`NetworkError`].
    pub async fn attach(&self, request: AttachRequest) -> Result<Attachment, NetworkError> {
        let attachment = self.blocking(move |node| node.attach(request)).await;
        self.filler.wake();
        attachment
    }

    /// Takes a sandbox off the network: host ports, interface, address. Done twice or for an unknown sandbox it
    /// succeeds.
    ///
    /// # Errors
    /// A CNI plugin failed, or the kernel did; the sandbox counts as attached until a retry succeeds.
    pub async fn detach(&self, sandbox_id: &str) -> Result<(), NetworkError> {
        let sandbox = sandbox_id.to_owned();
        self.blocking(move |node| node.detach(&sandbox)).await
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
        let sandbox = sandbox_id.to_owned();
        self.blocking(move |node| node.stats(&sandbox)).await
    }

    /// Addresses of the host on the built-in bridge, where pods reach it (the pods' DNS server listens here).
    pub fn gateways(&self) -> Vec<IpAddr> {
        self.node.gateways()
    }

    /// Everything the network owns on the host, with the owner of each; what has none is a leak.
    ///
    /// # Errors
    /// The kernel refused to list.
    pub async fn fsck(&self) -> Result<Vec<Owned>, NetworkError> {
        self.blocking(|node| node.fsck()).await
    }

    /// Removes bridge, table and prepared slots. For `down`, when no sandbox is left; a daemon that only restarts
    /// leaves them.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn shutdown(&self) -> Result<(), NetworkError> {
        self.blocking(|node| node.shutdown()).await
    }

    /// Runs what waits for the kernel away from the async threads.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Node) -> T + Send + 'static) -> T {
        let node = self.node.clone();
        match tokio::task::spawn_blocking(move || work(&node)).await {
            Ok(result) => result,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}
