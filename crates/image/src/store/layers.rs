//! Layers on disk.

use std::fs;
use std::os::fd::AsFd as _;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use sys::tree::Dir;

use super::{Staging, Store, Temporary, read_json, remove_tree};
use crate::digest::{Algorithm, Digest};
use crate::error::Error;
use crate::unpack::Tree;

/// What is known about a layer. Its directory is named by the digest of the bytes it was made of, which the daemon has
/// computed itself; the diff id comes from the confined child, and a child that was taken over could lie about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Layer {
    pub(crate) diff_id: Digest,
    pub(crate) bytes: u64,
    pub(crate) inodes: u64,
    boot_id: String,
    written_out: bool,
}

/// A layer that is nobody's any more.
#[derive(Debug)]
pub(crate) struct TakenOut {
    temporary: Temporary,
    bytes: u64,
}

impl TakenOut {
    /// Removes it for good and returns what it took.
    pub(crate) fn remove(self) -> Result<u64, Error> {
        remove_tree(&self.temporary.path)?;
        Ok(self.bytes)
    }
}

impl Store {
    fn layer_dir(&self, blob: &Digest) -> PathBuf {
        self.root.join("layers").join(blob.algorithm().name()).join(blob.hex())
    }

    /// The tree of a layer.
    pub(crate) fn layer_tree(&self, blob: &Digest) -> PathBuf {
        self.layer_dir(blob).join("fs")
    }

    /// What is known about a layer, if it is there.
    pub(crate) fn layer(&self, blob: &Digest) -> Option<Layer> {
        read_json(&self.layer_dir(blob).join("layer.json"))
    }

    /// Opens the tree inside a staging directory for a worker.
    pub(crate) fn layer_target(&self, staging: &Staging) -> Result<Dir, Error> {
        let tree = staging.path().join("fs");
        let made = fs::create_dir(&tree).and_then(|()| {
            use std::os::unix::fs::PermissionsExt as _;
            // A layer that does not describe its root has the root that every image expects.
            fs::set_permissions(&tree, fs::Permissions::from_mode(0o755))
        });
        made.and_then(|()| Dir::open(&tree)).map_err(|e| Error::store("make the directory", tree, e))
    }

    /// Makes an unpacked tree a layer.
    pub(crate) fn add_layer(&self, blob: &Digest, staging: Staging, tree: &Tree) -> Result<Layer, Error> {
        let layer = Layer {
            diff_id: tree.diff_id.clone(),
            bytes: tree.bytes,
            inodes: tree.inodes,
            boot_id: self.boot_id().to_owned(),
            written_out: false,
        };
        self.put_json(&staging.path().join("layer.json"), &layer)?;
        staging.place(&self.layer_dir(blob))?;
        Ok(layer)
    }

    /// Takes a layer out of sight; none if it is not there.
    pub(crate) fn take_out_layer(&self, blob: &Digest) -> Result<Option<TakenOut>, Error> {
        let bytes = self.layer(blob).map_or(0, |layer| layer.bytes);
        Ok(self.take_out(&self.layer_dir(blob))?.map(|temporary| TakenOut { temporary, bytes }))
    }

    /// All layers, complete or not.
    pub(crate) fn layers(&self) -> Vec<Digest> {
        [Algorithm::Sha256, Algorithm::Sha512]
            .into_iter()
            .flat_map(|algorithm| self.digests_in("layers", algorithm))
            .collect()
    }

    /// All small blobs.
    pub(crate) fn blobs(&self) -> Vec<Digest> {
        [Algorithm::Sha256, Algorithm::Sha512]
            .into_iter()
            .flat_map(|algorithm| self.digests_in("blobs", algorithm))
            .collect()
    }

    fn digests_in(&self, kind: &str, algorithm: Algorithm) -> Vec<Digest> {
        let Ok(entries) = fs::read_dir(self.root.join(kind).join(algorithm.name())) else { return Vec::new() };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        names.filter_map(|name| format!("{}:{name}", algorithm.name()).parse().ok()).collect()
    }

    /// Throws away what a power failure may have left without content. Called when the store is opened.
    pub(crate) fn sweep_doubtful_layers(&self) -> Result<Vec<Digest>, Error> {
        let doubtful =
            |blob: &Digest| self.layer(blob).is_none_or(|layer| !layer.written_out && layer.boot_id != self.boot_id());
        let swept: Vec<Digest> = self.layers().into_iter().filter(doubtful).collect();
        for blob in &swept {
            self.take_out_layer(blob)?.map_or(Ok(0), TakenOut::remove)?;
        }
        Ok(swept)
    }

    /// The layers whose content may still be in memory alone.
    pub(crate) fn layers_in_memory(&self) -> Vec<Digest> {
        let in_memory = |blob: &Digest| self.layer(blob).is_some_and(|layer| !layer.written_out);
        self.layers().into_iter().filter(in_memory).collect()
    }

    /// Has all layers written to disk and remembers that they are. Slow: never on the way of a pull.
    pub(crate) fn write_out(&self) -> Result<(), Error> {
        let pending = self.layers_in_memory();
        if pending.is_empty() {
            return Ok(());
        }
        let synced = Dir::open(&self.root).and_then(|root| sys::tree::sync_file_system(root.as_fd()));
        synced.map_err(|e| Error::store("write out", &self.root, e))?;
        for blob in pending {
            // It may have been removed meanwhile.
            let Some(layer) = self.layer(&blob) else { continue };
            self.put_json(&self.layer_dir(&blob).join("layer.json"), &Layer { written_out: true, ..layer })?;
        }
        Ok(())
    }
}
