//! Loading images from files: OCI layouts and `docker save` archives, as directories or tar archives, compressed or not.
//!
//! ```text
//! archive ─► confined child: where its files lie ─► index.json or manifest.json ─► each image ─► its layers, as in a pull
//! ```
//!
//! An archive is parsed in the child only; from then on it is a set of named ranges, and a layer is read straight from
//! its range into the child that unpacks it.

mod docker;
pub(crate) mod files;
mod layout;

use std::path::Path;
use std::sync::Arc;

use crate::digest::Digest;
use crate::error::Error;
use crate::layers::{Origin, Wanted};
use crate::manifest::Chosen;
use crate::progress::Progress;
use crate::pull::{Names, Parts};
use crate::reference::Reference;
use crate::spec::{Descriptor, ImageConfig, Platform};
use crate::{Image, Images};

use bytes::Bytes;
use files::{Files, Place};

/// An image that an archive names, before its documents are read.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    Oci(layout::Entry),
    Docker(docker::Entry),
}

/// An image with all its parts located.
struct Found {
    names: Vec<Reference>,
    id: Digest,
    config: Bytes,
    chosen: Option<Chosen>,
    layers: Vec<Wanted>,
}

impl Images {
    pub(crate) async fn load_archive(
        self: &Arc<Self>,
        path: &Path,
        progress: &dyn Progress,
    ) -> Result<Vec<Arc<Image>>, Error> {
        let files = Arc::new(Files::open(self, path).await?);
        let entries = {
            let (files, host) = (Arc::clone(&files), self.config.platform.clone());
            self.blocking(move |_| entries(&files, &host)).await?
        };
        let mut loaded: Vec<Arc<Image>> = Vec::new();
        for entry in entries {
            let found = {
                let (files, host) = (Arc::clone(&files), self.config.platform.clone());
                self.blocking(move |_| find(&files, &entry, &host)).await?
            };
            let image = self.take_in_image_of_archive(found, progress).await?;
            tracing::info!(path = %path.display(), id = %image.id, tags = ?image.repo_tags, "loaded");
            loaded.retain(|other| other.id != image.id);
            loaded.push(image);
        }
        Ok(loaded)
    }

    async fn take_in_image_of_archive(
        self: &Arc<Self>,
        found: Found,
        progress: &dyn Progress,
    ) -> Result<Arc<Image>, Error> {
        let named = found.chosen.as_ref().map(|chosen| chosen.named().digest.clone());
        let names = Names {
            tags: found.names.iter().filter_map(Reference::tagged).collect(),
            digests: named.iter().flat_map(|digest| found.names.iter().map(|name| name.with_digest(digest))).collect(),
            pinned: true,
        };
        let documents = found.chosen.iter().flat_map(Chosen::documents);
        let parts = Parts {
            named: named.unwrap_or_else(|| found.id.clone()),
            id: found.id,
            config: found.config,
            manifests: documents.map(|raw| (raw.digest.clone(), raw.bytes.clone())).collect(),
            layers: found.layers,
        };
        self.take_in_image(parts, names, progress).await
    }
}

/// What the archive says it holds. A current `docker save` archive is an OCI layout, too.
fn entries(files: &Files, host: &Platform) -> Result<Vec<Entry>, Error> {
    let entries: Vec<Entry> = if files.has(layout::MARKER) && files.has(layout::INDEX) {
        layout::entries(files, host)?.into_iter().map(Entry::Oci).collect()
    } else if files.has(docker::MANIFEST) {
        docker::entries(files)?.into_iter().map(Entry::Docker).collect()
    } else if files.has("repositories") {
        return Err(files.faulty("it was saved by a Docker before 1.10: load it there and save it with a current one"));
    } else {
        return Err(files.faulty(
            "it is neither an OCI layout (no oci-layout and index.json) nor made by docker save (no manifest.json)",
        ));
    };
    if entries.is_empty() {
        return Err(files.faulty("it names no image"));
    }
    Ok(entries)
}

fn find(files: &Arc<Files>, entry: &Entry, host: &Platform) -> Result<Found, Error> {
    match entry {
        Entry::Oci(entry) => layout::find(files, entry, host),
        Entry::Docker(entry) => docker::find(files, entry, host),
    }
}

/// The layers of a configuration with the files that hold them.
fn wanted(config: &ImageConfig, places: Vec<(Descriptor, Place)>) -> Vec<Wanted> {
    let layers = places.into_iter().zip(&config.rootfs.diff_ids);
    layers
        .map(|((descriptor, place), diff_id)| Wanted {
            descriptor,
            diff_id: diff_id.clone(),
            origin: Origin::File(place),
        })
        .collect()
}
