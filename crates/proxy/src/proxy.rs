//! The proxy of a node: start, look, stop.

use std::sync::Arc;

use cluster::Source;
use sys::netlink;

use crate::{Barrier, Config, Owned};

/// The service rules of a node. Dropping it stops the loop and leaves the rules in the kernel.
#[derive(Debug)]
pub struct Proxy {}

impl Proxy {
    /// Starts the proxy in the calling thread's network namespace and on the current tokio runtime. The rules that an
    /// earlier one left stay in force until the source is synced; then they are replaced in one step.
    ///
    /// # Errors
    /// See [`StartError`].
    pub fn start(_config: Config, _source: Arc<dyn Source>) -> Result<Proxy, StartError> {
        Ok(Proxy {})
    }

    /// What the kubelet waits at before it stops a pod.
    pub fn barrier(&self) -> Barrier {
        Barrier {}
    }

    /// Returns when the kernel's rules say what the store says now.
    pub async fn settled(&self) {}

    /// Everything the proxy owns in the kernel.
    ///
    /// # Errors
    /// The kernel refused to list.
    pub async fn fsck(&self) -> Result<Vec<Owned>, netlink::Error> {
        Ok(Vec::new())
    }

    /// Ends the loop. The rules stay: a daemon that only restarts leaves them to its successor.
    pub async fn stop(self) {}

    /// Ends the loop and removes everything from the kernel. For `down`.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn cleanup(self) -> Result<(), netlink::Error> {
        Ok(())
    }
}

/// Why the proxy could not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The kernel has no nf_tables.
    #[error(
        "service rules need nf_tables in the kernel; load it (`modprobe nf_tables`) or boot a kernel with CONFIG_NF_TABLES_INET"
    )]
    NoNftables(#[source] netlink::Error),
    /// The program may not change the packet filter.
    #[error("service rules need CAP_NET_ADMIN; run as root")]
    NotPermitted(#[source] netlink::Error),
    /// Another answer of the kernel.
    #[error("cannot talk to the kernel about service rules")]
    Kernel(#[source] netlink::Error),
}
