//! The archives of `docker save` before they became OCI layouts: `manifest.json` names configuration and layers by path.

use std::sync::Arc;

use serde::Deserialize;

use super::files::{Files, Place};
use super::{Found, wanted};
use crate::digest::Digest;
use crate::error::Error;
use crate::manifest::{check_budget, check_platform};
use crate::reference::Reference;
use crate::spec::media_type::{OCI_LAYER, OCI_LAYER_GZIP};
use crate::spec::{Descriptor, ImageConfig, Platform};
use crate::worker::inflate::{Compression, compression};

pub(super) const MANIFEST: &str = "manifest.json";

/// An image that `manifest.json` names.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Entry {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

pub(super) fn entries(files: &Files) -> Result<Vec<Entry>, Error> {
    let bytes = files.document(MANIFEST)?;
    serde_json::from_slice(&bytes).map_err(|e| files.faulty(format!("{MANIFEST} is malformed: {e}")))
}

/// Reads an entry's configuration and locates its layers.
pub(super) fn find(files: &Arc<Files>, entry: &Entry, host: &Platform) -> Result<Found, Error> {
    let names = names(entry).map_err(|reason| files.faulty(reason))?;
    let bytes = files.document(&entry.config)?;
    let id = Digest::of(&bytes);
    check_name(files, &entry.config, &id)?;
    let config: ImageConfig =
        serde_json::from_slice(&bytes).map_err(|e| files.faulty(format!("{} is malformed: {e}", entry.config)))?;
    check_budget(&config).map_err(|reason| files.faulty(format!("{}: {reason}", entry.config)))?;
    check_platform(&names.first().map_or_else(|| entry.config.clone(), Reference::to_string), &config, host)?;
    let paths = entry.layers.as_deref().unwrap_or_default();
    let diff_ids = &config.rootfs.diff_ids;
    if paths.len() != diff_ids.len() {
        let counts = format!("{} describes {} layers, {MANIFEST} {}", entry.config, diff_ids.len(), paths.len());
        return Err(files.faulty(counts));
    }
    let places = paths.iter().zip(diff_ids).map(|(path, diff_id)| layer(files, path, diff_id));
    let layers = wanted(&config, places.collect::<Result<_, Error>>()?);
    Ok(Found { names, id, config: bytes, chosen: None, layers })
}

fn names(entry: &Entry) -> Result<Vec<Reference>, String> {
    let tags = entry.repo_tags.as_deref().unwrap_or_default();
    tags.iter().map(|tag| tag.parse().map_err(|e: crate::InvalidReference| format!("{MANIFEST} has an {e}"))).collect()
}

/// Docker names the configuration by its digest; who calls it otherwise has nothing to check.
fn check_name(files: &Files, path: &str, actual: &Digest) -> Result<(), Error> {
    let base = path.rsplit('/').next().unwrap_or(path);
    let hex = base.trim_start_matches("sha256:").trim_end_matches(".json");
    match format!("sha256:{hex}").parse::<Digest>() {
        Ok(expected) if expected != *actual => Err(Error::DigestMismatch {
            object: "config",
            source_name: files.path().display().to_string(),
            expected,
            actual: actual.clone(),
        }),
        _ => Ok(()),
    }
}

/// A plain layer's digest stands in the configuration. One that some tool has compressed is named by nobody: it is read
/// once more for its digest.
fn layer(files: &Files, path: &str, diff_id: &Digest) -> Result<(Descriptor, Place), Error> {
    let place = files.place(path)?;
    let compression = compression(&place.piece(0, 8)?).map_err(|e| files.faulty(format!("{path}: {e}")))?;
    let compressed = compression != Compression::None;
    let (media_type, digest) =
        if compressed { (OCI_LAYER_GZIP, place.digest()?) } else { (OCI_LAYER, diff_id.clone()) };
    let descriptor = Descriptor {
        media_type: media_type.to_owned(),
        digest,
        size: place.size(),
        platform: None,
        urls: Vec::new(),
        annotations: std::collections::BTreeMap::new(),
    };
    Ok((descriptor, place))
}
