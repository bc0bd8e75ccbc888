//! OCI image layouts (OCI image specification, image-layout.md): `oci-layout`, `index.json`, `blobs/<algorithm>/<hex>`.

use std::sync::Arc;

use bytes::Bytes;

use super::files::{Files, Place};
use super::{Found, wanted};
use crate::digest::Digest;
use crate::error::Error;
use crate::manifest::{Chosen, RawManifest, check_config, check_platform, is_index, parse, parse_manifest, select};
use crate::reference::Reference;
use crate::spec::{Descriptor, Index, Platform};

pub(super) const MARKER: &str = "oci-layout";
pub(super) const INDEX: &str = "index.json";

/// Where containerd, Docker and BuildKit put the full name.
const FULL_NAME: &str = "io.containerd.image.name";
/// The specification's own annotation; many tools write only a tag there.
const REF_NAME: &str = "org.opencontainers.image.ref.name";

/// An image that `index.json` names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Entry {
    names: Vec<Reference>,
    descriptor: Descriptor,
}

/// The images for `host`, each once, with all its names.
pub(super) fn entries(files: &Files, host: &Platform) -> Result<Vec<Entry>, Error> {
    let bytes = files.document(INDEX)?;
    let index: Index =
        serde_json::from_slice(&bytes).map_err(|e| files.faulty(format!("{INDEX} is malformed: {e}")))?;
    let images: Vec<&Descriptor> = index.manifests.iter().filter(|descriptor| is_image(descriptor)).collect();
    let fitting = images.iter().copied().filter(|descriptor| fits(descriptor, host));
    let entries = merge(fitting).map_err(|reason| files.faulty(reason))?;
    if entries.is_empty() && !images.is_empty() {
        return select(&name_of(files), &index, host).map(|_| Vec::new());
    }
    Ok(entries)
}

/// Signatures and attestations stand beside images in an index.
fn is_image(descriptor: &Descriptor) -> bool {
    let attested = descriptor.platform.as_ref().is_some_and(|platform| platform.os == "unknown");
    let media_type = descriptor.media_type.as_str();
    !attested && (media_type.is_empty() || media_type.contains("manifest") || media_type.contains("index"))
}

fn fits(descriptor: &Descriptor, host: &Platform) -> bool {
    descriptor.platform.as_ref().is_none_or(|platform| platform.os.is_empty() || host.runs(platform))
}

fn merge<'a>(descriptors: impl Iterator<Item = &'a Descriptor>) -> Result<Vec<Entry>, String> {
    let mut entries: Vec<Entry> = Vec::new();
    for descriptor in descriptors {
        let name = full_name(descriptor)?;
        match entries.iter_mut().find(|entry| entry.descriptor.digest == descriptor.digest) {
            Some(known) => known.names.extend(name.filter(|name| !known.names.contains(name))),
            None => entries.push(Entry { names: name.into_iter().collect(), descriptor: descriptor.clone() }),
        }
    }
    Ok(entries)
}

/// A bare tag (`latest`) names nothing by itself: such an image is known by its id.
fn full_name(descriptor: &Descriptor) -> Result<Option<Reference>, String> {
    let annotation = |key: &str| descriptor.annotations.get(key).filter(|value| !value.is_empty());
    let by_spec = || annotation(REF_NAME).filter(|name| name.contains(['/', ':']));
    let Some(name) = annotation(FULL_NAME).or_else(by_spec) else { return Ok(None) };
    name.parse().map(Some).map_err(|e: crate::InvalidReference| format!("{INDEX} has an {e}"))
}

/// Reads an entry's manifest and configuration and locates its layers.
pub(super) fn find(files: &Arc<Files>, entry: &Entry, host: &Platform) -> Result<Found, Error> {
    let name = entry.names.first().map_or_else(|| name_of(files), Reference::to_string);
    let chosen = choose(files, &entry.descriptor, &name, host)?;
    let described = &chosen.manifest.config;
    let config = blob(files, described)?;
    let parsed = check_config(&described.digest, &config, &chosen.manifest)?;
    check_platform(&name, &parsed, host)?;
    let places = chosen.manifest.layers.iter().map(|layer| Ok((layer.clone(), place(files, layer)?)));
    let layers = wanted(&parsed, places.collect::<Result<_, Error>>()?);
    Ok(Found { names: entry.names.clone(), id: described.digest.clone(), config, chosen: Some(chosen), layers })
}

fn choose(files: &Files, descriptor: &Descriptor, name: &str, host: &Platform) -> Result<Chosen, Error> {
    let named = raw(files, descriptor)?;
    if !is_index(&named) {
        return Ok(Chosen { manifest: parse_manifest(&named)?, raw: named, index: None });
    }
    let index: Index = parse(&named)?;
    let raw = raw(files, select(name, &index, host)?)?;
    Ok(Chosen { manifest: parse_manifest(&raw)?, raw, index: Some(named) })
}

fn raw(files: &Files, descriptor: &Descriptor) -> Result<RawManifest, Error> {
    let bytes = blob(files, descriptor)?;
    Ok(RawManifest { media_type: descriptor.media_type.clone(), digest: descriptor.digest.clone(), bytes })
}

fn blob(files: &Files, descriptor: &Descriptor) -> Result<Bytes, Error> {
    let bytes = files.document(&path_of(&descriptor.digest))?;
    if descriptor.digest.matches(&bytes) {
        return Ok(bytes);
    }
    Err(Error::DigestMismatch {
        object: "document",
        source_name: name_of(files),
        expected: descriptor.digest.clone(),
        actual: Digest::of(&bytes),
    })
}

fn place(files: &Files, layer: &Descriptor) -> Result<Place, Error> {
    let path = path_of(&layer.digest);
    let place = files.place(&path)?;
    if place.size() != layer.size {
        let sizes = format!("{path} has {} bytes, the manifest says {}", place.size(), layer.size);
        return Err(files.faulty(sizes));
    }
    Ok(place)
}

fn path_of(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm().name(), digest.hex())
}

fn name_of(files: &Files) -> String {
    files.path().display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::media_type::OCI_MANIFEST;

    fn descriptor(digest: &str, annotations: &[(&str, &str)]) -> Descriptor {
        Descriptor {
            media_type: OCI_MANIFEST.into(),
            digest: Digest::of(digest.as_bytes()),
            size: 1,
            platform: None,
            urls: vec![],
            annotations: annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        }
    }

    #[test]
    fn names_come_from_annotations() {
        let check = |annotations: &[(&str, &str)], expected: Option<&str>| {
            let name = full_name(&descriptor("a", annotations)).unwrap().map(|name| name.to_string());
            assert_eq!(name.as_deref(), expected, "{annotations:?}");
        };
        check(&[], None);
        check(&[(REF_NAME, "latest")], None);
        check(&[(REF_NAME, "busybox:1.37")], Some("docker.io/library/busybox:1.37"));
        check(&[(REF_NAME, "quay.io/a/b")], Some("quay.io/a/b:latest"));
        check(
            &[(REF_NAME, "1.37"), (FULL_NAME, "docker.io/library/busybox:1.37")],
            Some("docker.io/library/busybox:1.37"),
        );
        assert!(full_name(&descriptor("a", &[(FULL_NAME, "A B")])).unwrap_err().contains("index.json"));
    }

    #[test]
    fn one_image_has_several_names() {
        let descriptors = [
            descriptor("a", &[(FULL_NAME, "x:1")]),
            descriptor("b", &[]),
            descriptor("a", &[(FULL_NAME, "x:2")]),
            descriptor("a", &[(FULL_NAME, "x:2")]),
        ];
        let entries = merge(descriptors.iter()).unwrap();
        let names: Vec<Vec<String>> =
            entries.iter().map(|entry| entry.names.iter().map(Reference::to_string).collect()).collect();
        assert_eq!(names, [vec!["docker.io/library/x:1", "docker.io/library/x:2"], vec![]]);
    }
}
