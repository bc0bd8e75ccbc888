//! A pull: reference → manifest → configuration and layers, each layer fetched, hashed and unpacked at the same time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt as _, TryStreamExt as _};

use crate::config::Auth;
use crate::digest::{Digest, Hasher};
use crate::error::Error;
use crate::flights::Joined;
use crate::progress::{Event, Progress};
use crate::reference::Reference;
use crate::registry::{RawManifest, Registry};
use crate::spec::{Descriptor, ImageConfig, Index, Manifest, media_type, select_platform};
use crate::store::layers::Layer;
use crate::store::records::Record;
use crate::unpack::Unpack;
use crate::{Image, Images};

/// A manifest chosen for this machine, with the index that it was chosen from.
struct Chosen {
    manifest: Manifest,
    raw: RawManifest,
    index: Option<RawManifest>,
}

impl Chosen {
    /// What the reference names: the index if there is one.
    fn named(&self) -> &RawManifest {
        self.index.as_ref().unwrap_or(&self.raw)
    }
}

impl Images {
    pub(crate) async fn pull_image(
        self: &Arc<Self>,
        reference: &Reference,
        auth: Option<Auth>,
        progress: &dyn Progress,
    ) -> Result<Arc<Image>, Error> {
        let started = Instant::now();
        let auth = match auth {
            Some(auth) => Some(auth),
            None => self.node_credentials(reference).await?,
        };
        let registry = Arc::new(Registry::new(reference, &self.config.registry_config_dirs, auth)?);
        let chosen = self.choose(&registry).await?;
        let size_bytes = chosen.manifest.layers.iter().map(|layer| layer.size).sum();
        progress.event(Event::Resolved {
            digest: &chosen.named().digest,
            layers: chosen.manifest.layers.len(),
            size_bytes,
        });

        let descriptor = &chosen.manifest.config;
        let bytes = registry.small_blob("config", &descriptor.digest, descriptor.size).await?;
        let config = check_config(&descriptor.digest, &bytes, &chosen.manifest)?;
        let reserved = self.reserve(chosen.manifest.layers.iter().map(|layer| layer.digest.clone()));
        self.fetch_layers(&registry, &chosen.manifest, &config, progress).await?;

        let image = self.store_image(&chosen, reference, &bytes)?;
        drop(reserved);
        self.write_out_later(chosen.manifest.layers.iter().map(|layer| layer.digest.clone()).collect());
        let elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(image = %reference, id = %image.id, size_bytes, elapsed_ms, "pulled");
        Ok(image)
    }

    async fn choose(&self, registry: &Registry) -> Result<Chosen, Error> {
        let named = registry.resolve().await?;
        if !is_index(&named) {
            return Ok(Chosen { manifest: parse_manifest(&named)?, raw: named, index: None });
        }
        let index: Index = parse(&named)?;
        let Some(descriptor) = select_platform(&index, &self.config.platform) else {
            let available = index
                .manifests
                .iter()
                .filter_map(|entry| entry.platform.clone())
                .filter(|platform| platform.os != "unknown")
                .collect();
            return Err(Error::UnsupportedPlatform {
                reference: registry.reference().to_string(),
                wanted: self.config.platform.clone(),
                available,
            });
        };
        let raw = registry.manifest(&descriptor.digest).await?;
        Ok(Chosen { manifest: parse_manifest(&raw)?, raw, index: Some(named) })
    }

    async fn fetch_layers(
        self: &Arc<Self>,
        registry: &Arc<Registry>,
        manifest: &Manifest,
        config: &ImageConfig,
        progress: &dyn Progress,
    ) -> Result<(), Error> {
        // One image may name a layer twice; it is fetched once.
        let mut seen = BTreeSet::new();
        let layers =
            manifest.layers.iter().zip(&config.rootfs.diff_ids).filter(|(layer, _)| seen.insert(layer.digest.clone()));
        let layers: Vec<_> =
            layers.map(|(layer, diff_id)| self.fetch_layer(registry, layer, diff_id, progress)).collect();
        stream::iter(layers).buffer_unordered(self.config.parallel_layers.max(1)).try_collect::<()>().await
    }

    /// Sees to it that a layer is in the store: it may be there, on its way for another pull, or ours to fetch.
    async fn fetch_layer(
        self: &Arc<Self>,
        registry: &Arc<Registry>,
        descriptor: &Descriptor,
        diff_id: &Digest,
        progress: &dyn Progress,
    ) -> Result<(), Error> {
        let layer = &descriptor.digest;
        loop {
            if let Some(known) = self.store.layer(layer) {
                check_diff_id(layer, &known, diff_id)?;
                progress.event(Event::LayerExists { layer });
                return Ok(());
            }
            let job = {
                let (images, registry, descriptor) = (Arc::clone(self), Arc::clone(registry), descriptor.clone());
                move |report| async move { images.download(&registry, &descriptor, report).await }
            };
            let (role, outcome) = self
                .flights
                .join(layer, job, |done_bytes| {
                    progress.event(Event::Layer { layer, done_bytes, size_bytes: descriptor.size })
                })
                .await;
            match (role, outcome) {
                (_, Ok(known)) => {
                    check_diff_id(layer, &known, diff_id)?;
                    progress.event(Event::LayerDone { layer });
                    return Ok(());
                }
                // Another pull's credentials or mirrors are not ours: try with our own.
                (Joined::Passenger, Err(_)) => {}
                (Joined::Pilot, Err(error)) => return Err(error),
            }
        }
    }

    /// Network → hash → pipe → the confined child, which inflates and writes. Nothing counts until all digests agree.
    async fn download(
        &self,
        registry: &Registry,
        descriptor: &Descriptor,
        report: impl Fn(u64),
    ) -> Result<Layer, Error> {
        let digest = &descriptor.digest;
        let staging = self.store.stage()?;
        let mut unpack = Unpack::start(digest, self.store.layer_target(&staging)?, &self.config.limits)?;
        let mut hasher = Hasher::new(digest.algorithm());
        let mut blob = registry.blob(digest, descriptor.size, &descriptor.urls);
        let mut done = 0;
        while let Some(bytes) = blob.next().await? {
            hasher.update(&bytes);
            if unpack.feed(&bytes).await.is_err() {
                break;
            }
            done += bytes.len() as u64;
            report(done);
        }
        let complete = done == descriptor.size;
        let outcome = unpack.finish().await;
        let actual = hasher.finish();
        // Wrong bytes explain whatever the child thinks of them.
        if complete && actual != *digest {
            return Err(Error::DigestMismatch {
                object: "layer",
                source_name: registry.reference().host().to_owned(),
                expected: digest.clone(),
                actual,
            });
        }
        self.store.add_layer(digest, staging, &outcome?)
    }

    fn store_image(&self, chosen: &Chosen, reference: &Reference, config: &Bytes) -> Result<Arc<Image>, Error> {
        let id = chosen.manifest.config.digest.clone();
        self.store.put_blob(&id, config)?;
        for raw in chosen.index.iter().chain([&chosen.raw]) {
            self.store.put_blob(&raw.digest, &raw.bytes)?;
        }
        let record = Record {
            id,
            manifests: chosen.index.iter().chain([&chosen.raw]).map(|raw| raw.digest.clone()).collect(),
            layers: chosen.manifest.layers.iter().map(|layer| layer.digest.clone()).collect(),
            repo_tags: reference.tagged().into_iter().collect(),
            repo_digests: [reference.with_digest(&chosen.named().digest)].into(),
            pinned: false,
            stored_at_s: now_s(),
        };
        self.add_record(record)
    }

    /// After a pull the disk catches up; nobody waits for it.
    pub(crate) fn write_out_later(self: &Arc<Self>, layers: Vec<Digest>) {
        let images = Arc::clone(self);
        let job = move || {
            if let Err(error) = images.store.write_out(&layers) {
                tracing::warn!(error = %crate::error::chain(&error), "cannot write layers out; they will be fetched again after a power failure");
            }
        };
        self.background.lock().expect("no panic while it is held").spawn_blocking(job);
    }
}

pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// By its media type; by its content where the registry does not say.
fn is_index(raw: &RawManifest) -> bool {
    match raw.media_type.as_str() {
        media_type::OCI_INDEX | media_type::DOCKER_LIST => true,
        media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST => false,
        _ => serde_json::from_slice::<Index>(&raw.bytes).is_ok(),
    }
}

fn parse<T: serde::de::DeserializeOwned>(raw: &RawManifest) -> Result<T, Error> {
    serde_json::from_slice(&raw.bytes)
        .map_err(|e| Error::Malformed { object: format!("manifest {}", raw.digest), reason: e.to_string() })
}

fn parse_manifest(raw: &RawManifest) -> Result<Manifest, Error> {
    let unsupported = |remedy| Error::UnsupportedMediaType {
        object: format!("manifest {}", raw.digest),
        media_type: raw.media_type.clone(),
        remedy,
    };
    if raw.media_type.contains(".v1+prettyjws")
        || raw.media_type == "application/vnd.docker.distribution.manifest.v1+json"
    {
        return Err(unsupported("Docker schema 1 is obsolete: push the image again with a current tool"));
    }
    let manifest: Manifest = parse(raw)?;
    for layer in &manifest.layers {
        check_layer_type(layer)?;
    }
    Ok(manifest)
}

/// Encrypted layers and artifacts that are no file trees are refused by name.
pub(crate) fn check_layer_type(layer: &Descriptor) -> Result<(), Error> {
    let name = layer.media_type.as_str();
    let is_tree = name.contains(".tar") || name.contains("diff.tar");
    if is_tree && !name.contains("+encrypted") {
        return Ok(());
    }
    let remedy = if name.contains("+encrypted") {
        "encrypted layers need a key that nodes do not have"
    } else {
        "this is no container image"
    };
    Err(Error::UnsupportedMediaType { object: format!("layer {}", layer.digest), media_type: name.to_owned(), remedy })
}

pub(crate) fn check_config(digest: &Digest, bytes: &[u8], manifest: &Manifest) -> Result<ImageConfig, Error> {
    let malformed = |reason: String| Error::Malformed { object: format!("config {digest}"), reason };
    let config: ImageConfig = serde_json::from_slice(bytes).map_err(|e| malformed(e.to_string()))?;
    let (named, described) = (manifest.layers.len(), config.rootfs.diff_ids.len());
    if named != described {
        return Err(malformed(format!("it describes {described} layers, the manifest {named}")));
    }
    Ok(config)
}

pub(crate) fn check_diff_id(layer: &Digest, known: &Layer, expected: &Digest) -> Result<(), Error> {
    if known.diff_id == *expected {
        return Ok(());
    }
    Err(Error::DigestMismatch {
        object: "uncompressed layer",
        source_name: format!("layer {layer}"),
        expected: expected.clone(),
        actual: known.diff_id.clone(),
    })
}
