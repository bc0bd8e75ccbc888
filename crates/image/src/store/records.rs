//! Image records: one JSON file for each image.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::{Store, read_json};
use crate::Image;
use crate::digest::Digest;
use crate::error::Error;
use crate::spec::ImageConfig;

/// What the store remembers about an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Record {
    /// Digest of the configuration: the image's id.
    pub(crate) id: Digest,
    /// Manifests it came with (its own, and the index it was chosen from).
    pub(crate) manifests: BTreeSet<Digest>,
    /// Layers by the digests of their blobs, the lowest first.
    pub(crate) layers: Vec<Digest>,
    pub(crate) repo_tags: BTreeSet<String>,
    pub(crate) repo_digests: BTreeSet<String>,
    pub(crate) pinned: bool,
    /// Seconds since 1970.
    pub(crate) stored_at_s: u64,
}

/// A record with what is read beside it.
#[derive(Debug, Clone)]
pub(crate) struct Stored {
    pub(crate) record: Record,
    pub(crate) image: Arc<Image>,
}

impl Store {
    fn record_path(&self, id: &Digest) -> PathBuf {
        self.root.join("images").join(format!("{}.json", id.hex()))
    }

    /// Writes a record. Its time of use becomes now.
    pub(crate) fn put_record(&self, record: &Record) -> Result<(), Error> {
        self.put_json(&self.record_path(&record.id), record)
    }

    pub(crate) fn remove_record(&self, id: &Digest) -> Result<(), Error> {
        let path = self.record_path(id);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::store("remove", path, e)),
            _ => Ok(()),
        }
    }

    /// Notes that an image was used now. Best effort: it decides only the order of garbage collection.
    pub(crate) fn touch(&self, id: &Digest) {
        let touched = fs::File::open(self.record_path(id)).and_then(|file| file.set_modified(SystemTime::now()));
        if let Err(error) = touched {
            tracing::debug!(%error, image = %id, "cannot note the use of an image");
        }
    }

    /// All records that are complete: those with a missing layer or configuration are of no use and are dropped.
    pub(crate) fn records(&self) -> Vec<Stored> {
        let Ok(entries) = fs::read_dir(self.root.join("images")) else { return Vec::new() };
        let records = entries.flatten().filter_map(|entry| read_json::<Record>(&entry.path()));
        records.filter_map(|record| self.complete(record)).collect()
    }

    /// Removes the records that are of no use. Called when the store is opened.
    pub(crate) fn drop_incomplete_records(&self, complete: &HashSet<Digest>) -> Result<(), Error> {
        let directory = self.root.join("images");
        let kept: HashSet<PathBuf> = complete.iter().map(|id| self.record_path(id)).collect();
        let entries = fs::read_dir(&directory).map_err(|e| Error::store("list", &directory, e))?;
        for path in entries.flatten().map(|entry| entry.path()).filter(|path| !kept.contains(path)) {
            tracing::warn!(path = %path.display(), "removed the record of an image that is not complete; it will be pulled again");
            fs::remove_file(&path).map_err(|e| Error::store("remove", &path, e))?;
        }
        Ok(())
    }

    /// Reads what belongs to a record, if it is all there.
    pub(crate) fn complete(&self, record: Record) -> Option<Stored> {
        let config: ImageConfig = serde_json::from_slice(&self.blob(&record.id)?).ok()?;
        let layers: Option<Vec<_>> = record.layers.iter().map(|blob| self.layer(blob)).collect();
        let size_bytes = layers?.iter().map(|layer| layer.bytes).sum();
        let used_at = fs::metadata(self.record_path(&record.id))
            .and_then(|meta| meta.modified())
            .unwrap_or_else(|_| SystemTime::now());
        let image = Image {
            id: record.id.clone(),
            repo_tags: record.repo_tags.iter().cloned().collect(),
            repo_digests: record.repo_digests.iter().cloned().collect(),
            size_bytes,
            pinned: record.pinned,
            stored_at: SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(record.stored_at_s),
            used_at,
            config: Arc::new(config),
        };
        Some(Stored { record, image: Arc::new(image) })
    }
}
