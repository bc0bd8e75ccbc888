//! Why a volume cannot be had.

use std::io;
use std::path::{Path, PathBuf};

use super::certificates::CertificateError;
use super::csi::DriverError;
use crate::facts::FactError;

/// A volume that cannot be had. The text is the one of upstream's `FailedMount` events.
#[derive(Debug, thiserror::Error)]
#[error("MountVolume.{} failed for volume {volume:?} : {cause}", cause.step())]
pub struct VolumeError {
    /// The volume's name in the pod.
    pub volume: String,
    /// Why.
    pub cause: Cause,
}

/// Why a volume cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// What it refers to is not there (yet); it heals when it appears.
    #[error("{kind} {name:?} not found")]
    NotFound {
        /// `configmap`, `secret`, `persistentvolumeclaim`, `persistentvolume`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The ConfigMap or Secret lacks a key that `items` names.
    #[error("references non-existent {kind} key: {key}")]
    NoKey {
        /// `config` or `secret`.
        kind: &'static str,
        /// The key.
        key: String,
    },
    /// The claim has no volume yet.
    #[error("persistentvolumeclaim {0:?} is not bound to a volume yet")]
    Unbound(String),
    /// The volume cannot be used on this node, as its `nodeAffinity` says.
    #[error("no matching NodeSelectorTerms")]
    Elsewhere,
    /// A kind of volume that this node cannot make; the text says what it can.
    #[error("{0}")]
    Unsupported(String),
    /// A field of the spec that cannot be.
    #[error("{0}")]
    Invalid(String),
    /// Not among the volumes that were made.
    #[error("cannot find volume {volume:?} to mount into container {container:?}")]
    Unmade {
        /// The volume.
        volume: String,
        /// Who wants it.
        container: String,
    },
    /// A value of the downward API.
    #[error(transparent)]
    Fact(#[from] FactError),
    /// The path of a `hostPath` is not what its `type` says.
    #[error("hostPath type check failed: {path} is not a {expected}")]
    HostPath {
        /// On the node.
        path: PathBuf,
        /// As upstream names it.
        expected: &'static str,
    },
    /// The file system refused.
    #[error("{action} {path}: {source}")]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A token of the pod's service account.
    #[error("{reason}: {}", std::error::Error::source(reason).map(ToString::to_string).unwrap_or_default())]
    Token {
        /// Why there is none.
        reason: cluster::SourceError,
    },
    /// What the cluster knows of the volume cannot be read.
    #[error("{reason}: {}", std::error::Error::source(reason).map(ToString::to_string).unwrap_or_default())]
    Source {
        /// Why.
        reason: cluster::SourceError,
    },
    /// A certificate of the pod.
    #[error(transparent)]
    Certificate(#[from] CertificateError),
    /// A CSI driver.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// An NFS server, or the way to it.
    #[error("nfs {server}:{path}: {reason}")]
    Nfs {
        /// As the volume names it.
        server: String,
        /// The directory that it exports.
        path: String,
        /// What is wrong.
        reason: String,
    },
    /// The volume is not where the pod is.
    #[error(
        "volume {volume} is not attached to this node yet, according to the node's status; see the events of the \
         attach/detach controller and the logs of the controller of CSI driver {driver}"
    )]
    Detached {
        /// The PersistentVolume.
        volume: String,
        /// Who is to attach it.
        driver: String,
    },
    /// The volume cannot come to where the pod is: the driver has as many there as it can.
    #[error("volume {volume} is not attached: CSI driver {driver} can attach no more volumes to this node")]
    Exhausted {
        /// The PersistentVolume.
        volume: String,
        /// Whose volumes.
        driver: String,
    },
    /// The kernel refused.
    #[error(transparent)]
    System(#[from] sys::Error),
    /// No thread could be made for what may wait for a file system.
    #[error("cannot start a thread; check the node's limits of processes")]
    Thread(#[from] crate::threads::ThreadError),
    /// The volumes have been taken down: nothing is made any more.
    #[error("the pod ends")]
    Over,
}

impl Cause {
    pub(super) fn file<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + use<'a> {
        move |source| Self::File { action, path: path.to_owned(), source }
    }

    /// The step of upstream's that fails of it.
    fn step(&self) -> &'static str {
        match self {
            Self::Elsewhere => "NodeAffinity check",
            _ => "SetUp",
        }
    }

    /// Whether waiting may help: an object has yet to appear.
    pub fn is_waiting(&self) -> bool {
        matches!(self, Self::NotFound { .. } | Self::NoKey { .. } | Self::Unbound(_))
    }
}
