//! What a pull tells about itself while it runs.

use crate::digest::Digest;

/// Listens to a pull. Calls come often and from the pulling task: return at once.
pub trait Progress: Send + Sync {
    /// Something happened.
    fn event(&self, event: Event<'_>);
}

/// One step of a pull.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event<'a> {
    /// The reference has become a manifest.
    Resolved {
        /// Digest of the manifest or index that the reference names.
        digest: &'a Digest,
        /// How many layers the image has.
        layers: usize,
        /// Their compressed size in bytes.
        size_bytes: u64,
    },
    /// A layer was on disk already.
    LayerExists {
        /// The layer's blob.
        layer: &'a Digest,
    },
    /// A layer is on its way; unpacking goes along with it.
    Layer {
        /// The layer's blob.
        layer: &'a Digest,
        /// Compressed bytes received so far.
        done_bytes: u64,
        /// Compressed bytes in all.
        size_bytes: u64,
    },
    /// A layer is verified and unpacked.
    LayerDone {
        /// The layer's blob.
        layer: &'a Digest,
    },
}

/// For callers that do not listen.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl Progress for Silent {
    fn event(&self, _event: Event<'_>) {}
}
