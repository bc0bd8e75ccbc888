//! The runtime as the rest of the node sees it.

use std::path::PathBuf;
use std::sync::Arc;

use crate::config::{Config, Parts};

/// Pod sandboxes and containers of one node. Implements `cri::RuntimeService`.
#[derive(Debug)]
pub struct Runtime {
    config: Config,
    parts: Parts,
}

/// Something on the host that belongs to the runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Owned {
    /// `sandbox`, `cgroup`, `rootfs`, or a kind of the network's.
    pub kind: &'static str,
    /// Its path or name.
    pub name: String,
    /// The sandbox or container that needs it; `None`: nobody does, it is a leak.
    pub owner: Option<String>,
}

/// Why a runtime cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A directory cannot be made or read.
    #[error("{step} {path}; the runtime needs a writable directory of its own there")]
    Directory {
        /// What was tried.
        step: &'static str,
        /// Which.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// The host lacks something.
    #[error("reading what this host offers")]
    Host(#[source] sys::Error),
    /// The pods' network cannot be taken over.
    #[error("taking over the pods' network")]
    Network(#[source] network::NetworkError),
}

impl Runtime {
    /// Starts the runtime: finds the sandboxes of an earlier daemon and takes over what lives of them; what is dead is
    /// reported as such, what belongs to another boot is removed.
    ///
    /// # Errors
    /// See [`StartError`]; a single sandbox that cannot be taken over is no error.
    pub async fn start(config: Config, parts: Parts) -> Result<Arc<Self>, StartError> {
        let sandboxes = config.run_dir.join("sandboxes");
        std::fs::create_dir_all(&sandboxes).map_err(|source| StartError::Directory {
            step: "making",
            path: sandboxes,
            source,
        })?;
        parts.network.adopt(Vec::new()).await.map_err(StartError::Network)?;
        Ok(Arc::new(Self { config, parts }))
    }

    /// Everything on this host that belongs to the runtime, with the owner of each.
    ///
    /// # Errors
    /// What cannot be listed.
    pub async fn fsck(&self) -> Result<Vec<Owned>, cri::Error> {
        let owned = self.parts.network.fsck().await.map_err(|error| cri::Error::internal(&error))?;
        Ok(owned.into_iter().map(|one| Owned { kind: one.kind, name: one.name, owner: one.owner }).collect())
    }

    /// For `down`: stops and removes every sandbox, then the pods' network. A daemon that only restarts does not call it.
    ///
    /// # Errors
    /// The first of what could not be removed; the rest is removed nevertheless.
    pub async fn shutdown(&self) -> Result<(), cri::Error> {
        self.parts.network.shutdown().await.map_err(|error| cri::Error::internal(&error))
    }

    /// How it is set up.
    pub fn config(&self) -> &Config {
        &self.config
    }
}

impl cri::RuntimeService for Runtime {}
