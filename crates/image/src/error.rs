//! Why an image operation failed, by what the caller can do about it.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use crate::digest::Digest;
use crate::reference::InvalidReference;
use crate::spec::Platform;

/// The failure of an image operation. Clones share the cause: one pull may have several waiters.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The reference is malformed; a retry will not help.
    #[error(transparent)]
    InvalidReference(#[from] InvalidReference),
    /// No registry host has it, or the credentials may not see it.
    #[error("{reference} not found on {}: check the name and tag; a private image needs an imagePullSecret", hosts.join(", "))]
    NotFound {
        /// What was asked for.
        reference: String,
        /// Who was asked.
        hosts: Vec<String>,
    },
    /// The registry refuses the credentials, or wants some.
    #[error("{host} refuses {reference}: {reason}; {remedy}")]
    Unauthorized {
        /// What was asked for.
        reference: String,
        /// The registry or token server.
        host: String,
        /// Its words.
        reason: String,
        /// What the operator can do.
        remedy: &'static str,
    },
    /// The registry cannot be reached, broke off or answered nonsense; a retry may help.
    #[error("registry {host} is not available for {reference}: {reason}")]
    Unavailable {
        /// What was asked for.
        reference: String,
        /// The registry or token server.
        host: String,
        /// Which step failed and how.
        reason: String,
    },
    /// The bytes are not the ones their digest names.
    #[error(
        "{object} from {source_name} has digest {actual}, expected {expected}: the registry or a proxy changed it; nothing of it was kept"
    )]
    DigestMismatch {
        /// `manifest`, `config`, `layer`.
        object: &'static str,
        /// Where the bytes came from.
        source_name: String,
        /// What the manifest says.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// The index has no image for this machine.
    #[error("{reference} has no image for {wanted}; it has {}: build it for this platform", list(available))]
    UnsupportedPlatform {
        /// What was asked for.
        reference: String,
        /// This machine.
        wanted: Platform,
        /// What is there.
        available: Vec<Platform>,
    },
    /// The manifest is of a kind that no node can run.
    #[error("{object} has media type {media_type:?}, which is not supported: {remedy}")]
    UnsupportedMediaType {
        /// The manifest or layer.
        object: String,
        /// What it says it is.
        media_type: String,
        /// What the operator can do.
        remedy: &'static str,
    },
    /// JSON that is not what its media type says.
    #[error("{object} is malformed: {reason}")]
    Malformed {
        /// The manifest, config or archive.
        object: String,
        /// Where and how.
        reason: String,
    },
    /// The file to load is no image archive, or a broken one.
    #[error("cannot load {}: {reason}", path.display())]
    Archive {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The file system of the store has no space or inodes left.
    #[error("no space left on the file system of {} while storing {object}: free space, or let image garbage collection start earlier (imageGCHighThresholdPercent)", path.display())]
    DiskFull {
        /// What was being written.
        object: String,
        /// The store.
        path: PathBuf,
    },
    /// An entry of the layer tries to leave the image or to exceed a budget. Nothing of the layer was kept.
    #[error("layer {layer} is refused: entry {entry:?} {reason}")]
    MaliciousLayer {
        /// The layer.
        layer: Digest,
        /// The entry's name as it stands in the archive.
        entry: String,
        /// What it tried.
        reason: String,
    },
    /// The layers of an image exceed the budget that they have together.
    #[error("the layers of the image {reason}")]
    TooLarge {
        /// What of.
        reason: String,
    },
    /// The layer's compression or archive is broken. Nothing of the layer was kept.
    #[error("layer {layer} is corrupt: {reason}; push the image again")]
    CorruptLayer {
        /// The layer.
        layer: Digest,
        /// Where and how.
        reason: String,
    },
    /// The confined child that unpacks a layer could not do its work.
    #[error("unpacking {layer}: {reason}")]
    Worker {
        /// The layer.
        layer: Digest,
        /// Which step failed and how.
        reason: String,
    },
    /// No such image in the local store.
    #[error("image {0:?} is not in the local store; pull or load it")]
    NoSuchImage(String),
    /// The image is held by something that lives.
    #[error("image {image} is in use by {by}; remove that first")]
    InUse {
        /// The image.
        image: String,
        /// A container or a pin.
        by: String,
    },
    /// Another daemon owns the store.
    #[error("another process uses the image store {}: stop it, or give this one its own --state-dir", path.display())]
    Locked {
        /// The store.
        path: PathBuf,
    },
    /// A path asked for inside an image is not there or leads out of it.
    #[error("{path:?} in image {image}: {reason}")]
    BadSubPath {
        /// The image.
        image: String,
        /// The path as given.
        path: String,
        /// Why not.
        reason: String,
    },
    /// A file of the operator (hosts.toml, config.json, …) cannot be read or parsed.
    #[error("{}: {reason}", path.display())]
    Configuration {
        /// The file.
        path: PathBuf,
        /// Where and how.
        reason: String,
    },
    /// A configured program that gives out credentials has failed.
    #[error("credential provider {provider}: {reason}")]
    Credentials {
        /// Its name in the configuration.
        provider: String,
        /// How; never with a secret in it.
        reason: String,
    },
    /// The kernel refused a step on the local store.
    #[error("cannot {step} {}", path.display())]
    Store {
        /// What was being done.
        step: &'static str,
        /// To what.
        path: PathBuf,
        /// Why not.
        #[source]
        source: Arc<io::Error>,
    },
    /// The kernel cannot mount the image.
    #[error("cannot mount {what}: {step} failed; see `orlop check` for what this kernel lacks")]
    Mount {
        /// The root file system or image volume.
        what: String,
        /// The system call and its arguments.
        step: String,
        /// Why not.
        #[source]
        source: Arc<io::Error>,
    },
}

fn list(platforms: &[Platform]) -> String {
    if platforms.is_empty() {
        return "none".into();
    }
    platforms.iter().map(Platform::to_string).collect::<Vec<_>>().join(", ")
}

impl Error {
    /// Whether trying again later may help without anybody changing anything.
    pub fn may_pass(&self) -> bool {
        matches!(self, Self::Unavailable { .. } | Self::DiskFull { .. } | Self::Worker { .. } | Self::Store { .. })
    }

    /// A failed step on the store; a full disk gets its own variant.
    pub(crate) fn store(step: &'static str, path: impl Into<PathBuf>, source: io::Error) -> Self {
        let path = path.into();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { object: format!("{} ({step})", path.display()), path }
            }
            _ => Self::Store { step, path, source: Arc::new(source) },
        }
    }
}

/// The error and all its causes in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.ends_with(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}
