//! A pull: reference → manifest → configuration and layers.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use bytes::Bytes;

use crate::config::Auth;
use crate::digest::Digest;
use crate::error::Error;
use crate::layers::{Origin, Wanted};
use crate::manifest::{Chosen, check_config, check_platform, is_index, parse, parse_manifest, select};
use crate::progress::{Event, Progress};
use crate::reference::Reference;
use crate::registry::Registry;
use crate::spec::{ImageConfig, Manifest};
use crate::store::records::Record;
use crate::{Image, Images};

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
        let descriptor = &chosen.manifest.config;
        let config = registry.small_blob("config", &descriptor.digest, descriptor.size).await?;
        let names = Names {
            tags: reference.tagged().into_iter().collect(),
            digests: vec![reference.with_digest(&chosen.named().digest)],
            pinned: false,
        };
        let parsed = check_config(&descriptor.digest, &config, &chosen.manifest)?;
        check_platform(&reference.to_string(), &parsed, &self.config.platform)?;
        let layers = wanted(&chosen.manifest, &parsed, &registry);
        let parts = Parts {
            id: descriptor.digest.clone(),
            named: chosen.named().digest.clone(),
            config,
            manifests: chosen.documents().map(|raw| (raw.digest.clone(), raw.bytes.clone())).collect(),
            layers,
        };
        let size_bytes = parts.size_bytes();
        let image = self.take_in_image(parts, names, progress).await?;
        let elapsed_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
        tracing::info!(image = %reference, id = %image.id, size_bytes, elapsed_ms, "pulled");
        Ok(image)
    }

    async fn choose(&self, registry: &Registry) -> Result<Chosen, Error> {
        let named = registry.resolve().await?;
        if !is_index(&named) {
            return Ok(Chosen { manifest: parse_manifest(&named)?, raw: named, index: None });
        }
        let index = parse(&named)?;
        let descriptor = select(&registry.reference().to_string(), &index, &self.config.platform)?;
        let raw = registry.manifest(&descriptor.digest).await?;
        Ok(Chosen { manifest: parse_manifest(&raw)?, raw, index: Some(named) })
    }

    /// Brings an image that has been found, in a registry or a file, into the store.
    pub(crate) async fn take_in_image(
        self: &Arc<Self>,
        parts: Parts,
        names: Names,
        progress: &dyn Progress,
    ) -> Result<Arc<Image>, Error> {
        let layers: Vec<Digest> = parts.layers.iter().map(|layer| layer.descriptor.digest.clone()).collect();
        progress.event(Event::Resolved { digest: &parts.named, layers: layers.len(), size_bytes: parts.size_bytes() });
        // Until the image is recorded nothing else keeps its parts from being swept.
        let documents = parts.manifests.iter().map(|(digest, _)| digest).chain([&parts.id]);
        let reserved = self.reserve(layers.iter().chain(documents).cloned());
        self.fetch_layers(parts.layers, progress).await?;
        let (id, config, manifests) = (parts.id, parts.config, parts.manifests);
        let recorded = self.blocking(move |images| {
            images.store.put_blob(&id, &config)?;
            for (digest, bytes) in &manifests {
                images.store.put_blob(digest, bytes)?;
            }
            images.add_record(Record {
                id,
                manifests: manifests.into_iter().map(|(digest, _)| digest).collect(),
                layers,
                repo_tags: names.tags.into_iter().collect(),
                repo_digests: names.digests.into_iter().collect(),
                pinned: names.pinned,
                stored_at_s: now_s(),
            })
        });
        let image = recorded.await?;
        drop(reserved);
        self.write_out_later();
        Ok(image)
    }
}

/// An image whose parts are known but not yet here.
#[derive(Debug)]
pub(crate) struct Parts {
    /// Digest of the configuration.
    pub(crate) id: Digest,
    /// Digest of what its names stand for: an index, a manifest, or the configuration if it has neither.
    pub(crate) named: Digest,
    pub(crate) config: Bytes,
    pub(crate) manifests: Vec<(Digest, Bytes)>,
    pub(crate) layers: Vec<Wanted>,
}

impl Parts {
    pub(crate) fn size_bytes(&self) -> u64 {
        self.layers.iter().map(|layer| layer.descriptor.size).sum()
    }
}

/// What the image is to be known by.
#[derive(Debug)]
pub(crate) struct Names {
    pub(crate) tags: Vec<String>,
    pub(crate) digests: Vec<String>,
    pub(crate) pinned: bool,
}

fn wanted(manifest: &Manifest, config: &ImageConfig, registry: &Arc<Registry>) -> Vec<Wanted> {
    let layers = manifest.layers.iter().zip(&config.rootfs.diff_ids);
    layers
        .map(|(descriptor, diff_id)| Wanted {
            descriptor: descriptor.clone(),
            diff_id: diff_id.clone(),
            origin: Origin::Registry(Arc::clone(registry)),
        })
        .collect()
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
