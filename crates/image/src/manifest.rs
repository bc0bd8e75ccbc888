//! Manifests and configurations as they come, and what of them a node can run.

use bytes::Bytes;

use crate::digest::Digest;
use crate::error::Error;
use crate::spec::{Descriptor, ImageConfig, Index, Manifest, Platform, media_type, select_platform};

/// No honest manifest, index or configuration is larger.
pub(crate) const DOCUMENT_BYTES_MAX: usize = 4 << 20;

/// As many as overlayfs mounts (`OVL_MAX_STACK` in fs/overlayfs/params.h).
const LAYERS_MAX: usize = 500;

/// A manifest or index as it came.
#[derive(Debug, Clone)]
pub(crate) struct RawManifest {
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) bytes: Bytes,
}

/// A manifest chosen for this machine, with the index that it was chosen from.
#[derive(Debug)]
pub(crate) struct Chosen {
    pub(crate) manifest: Manifest,
    pub(crate) raw: RawManifest,
    pub(crate) index: Option<RawManifest>,
}

impl Chosen {
    /// What a reference names: the index if there is one.
    pub(crate) fn named(&self) -> &RawManifest {
        self.index.as_ref().unwrap_or(&self.raw)
    }

    /// All that was read to get here.
    pub(crate) fn documents(&self) -> impl Iterator<Item = &RawManifest> {
        self.index.iter().chain([&self.raw])
    }
}

/// By its media type; by its content where nobody says.
pub(crate) fn is_index(raw: &RawManifest) -> bool {
    match raw.media_type.as_str() {
        media_type::OCI_INDEX | media_type::DOCKER_LIST => true,
        media_type::OCI_MANIFEST | media_type::DOCKER_MANIFEST => false,
        _ => serde_json::from_slice::<Index>(&raw.bytes).is_ok(),
    }
}

/// The entry of an index that is for `host`. `name` is for the message.
pub(crate) fn select<'a>(name: &str, index: &'a Index, host: &Platform) -> Result<&'a Descriptor, Error> {
    select_platform(index, host).ok_or_else(|| Error::UnsupportedPlatform {
        reference: name.to_owned(),
        wanted: host.clone(),
        available: platforms(index),
    })
}

/// The machines that an index has images for. Attestations are entries for `unknown/unknown`.
fn platforms(index: &Index) -> Vec<Platform> {
    let stated = index.manifests.iter().filter_map(|entry| entry.platform.clone());
    stated.filter(|platform| platform.os != "unknown").collect()
}

pub(crate) fn parse<T: serde::de::DeserializeOwned>(raw: &RawManifest) -> Result<T, Error> {
    serde_json::from_slice(&raw.bytes)
        .map_err(|e| Error::Malformed { object: format!("manifest {}", raw.digest), reason: e.to_string() })
}

pub(crate) fn parse_manifest(raw: &RawManifest) -> Result<Manifest, Error> {
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
fn check_layer_type(layer: &Descriptor) -> Result<(), Error> {
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
    check_budget(&config).map_err(malformed)?;
    Ok(config)
}

/// What an image may ask of a node that stores it (R6).
pub(crate) fn check_budget(config: &ImageConfig) -> Result<(), String> {
    let layers = config.rootfs.diff_ids.len();
    if layers > LAYERS_MAX {
        return Err(format!("it has {layers} layers, more than {LAYERS_MAX}"));
    }
    config.config.excess().map_or(Ok(()), Err)
}

/// An image without an index states its machine in the configuration only.
pub(crate) fn check_platform(name: &str, config: &ImageConfig, host: &Platform) -> Result<(), Error> {
    let platform = config.platform();
    let unstated = platform.os.is_empty() || platform.architecture.is_empty();
    if unstated || host.runs(&platform) {
        return Ok(());
    }
    Err(Error::UnsupportedPlatform { reference: name.to_owned(), wanted: host.clone(), available: vec![platform] })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_image_has_as_many_layers_as_can_be_mounted() {
        let check = |layers: usize, config: serde_json::Value| {
            let digest = Digest::of(b"layer");
            let layer = json!({"mediaType": media_type::OCI_LAYER, "digest": digest, "size": 1});
            let manifest = json!({"schemaVersion": 2, "config": layer, "layers": vec![&layer; layers]});
            let config = json!({"config": config, "rootfs": {"diff_ids": vec![&digest; layers]}});
            let manifest = serde_json::from_value(manifest).unwrap();
            check_config(&digest, config.to_string().as_bytes(), &manifest).map(drop).map_err(|error| error.to_string())
        };
        assert_eq!(check(500, json!({})), Ok(()));
        assert!(check(501, json!({})).unwrap_err().contains("501 layers"));
        assert!(check(1, json!({"Cmd": vec!["x"; 3_000]})).unwrap_err().contains("3000 entries"));
    }
}
