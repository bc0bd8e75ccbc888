//! The JSON of the OCI image specification and of Docker's schema 2, as far as a node reads it.

use std::collections::{BTreeMap, BTreeSet};

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;

/// Media types, in both dialects.
pub mod media_type {
    /// OCI manifest of one image.
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// OCI list of images by platform.
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// Docker schema 2 manifest of one image.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// Docker list of images by platform.
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// OCI layer, a plain tar archive.
    pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    /// OCI layer, a gzip-compressed tar archive.
    pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
}

/// What a manifest says about a blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the bytes are.
    pub media_type: String,
    /// Their digest.
    pub digest: Digest,
    /// Their length in bytes.
    pub size: u64,
    /// In an index: what machine the image is for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// Other places that serve the bytes (foreign layers).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Free-form notes; an index of a layout names its images with them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

/// The machine an image is for.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Platform {
    /// CPU architecture in Go's words: `amd64`, `arm64`.
    #[serde(default)]
    pub architecture: String,
    /// Operating system in Go's words.
    #[serde(default)]
    pub os: String,
    /// Variant of the architecture: `v8`, `v7`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// The machine this program was built for.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "aarch64" => ("arm64", Some("v8")),
            "arm" => ("arm", Some("v7")),
            "x86" => ("386", None),
            "powerpc64" => ("ppc64le", None),
            other => (other, None),
        };
        Self { architecture: architecture.into(), os: "linux".into(), variant: variant.map(str::to_owned) }
    }
}

impl Platform {
    /// Whether this machine runs programs for `other`.
    pub fn runs(&self, other: &Self) -> bool {
        self.preferences().iter().any(|wanted| wanted.os == other.os && wanted.architecture == other.architecture)
    }

    /// The platforms whose programs this machine runs, the best first: its own, then its 32-bit relative.
    fn preferences(&self) -> Vec<Self> {
        let of = |architecture: &str, variant: Option<&str>| Self {
            architecture: architecture.to_owned(),
            os: self.os.clone(),
            variant: variant.map(str::to_owned),
        };
        let own = self.architecture.as_str();
        let mut platforms = vec![self.clone(), of(own, None)];
        match own {
            "amd64" => platforms.extend([of(own, Some("v1")), of("386", None)]),
            "arm64" => platforms.extend([of(own, Some("v8"))].into_iter().chain(ARM.map(|variant| of("arm", variant)))),
            "arm" => {
                let older = ARM.into_iter().skip_while(|variant| *variant != self.variant.as_deref());
                platforms.extend(older.map(|variant| of(own, variant)));
            }
            _ => {}
        }
        platforms
    }
}

/// 32-bit ARM from the newest on; an image that states no variant is for v7 (OCI image specification, "Platform Variants").
const ARM: [Option<&str>; 5] = [Some("v8"), Some("v7"), None, Some("v6"), Some("v5")];

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

/// A manifest: one image's configuration and layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// One of the manifest media types; older OCI manifests leave it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The image configuration.
    pub config: Descriptor,
    /// Layers, the lowest first.
    pub layers: Vec<Descriptor>,
}

/// An index: images by platform.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// One of the index media types.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The images.
    pub manifests: Vec<Descriptor>,
}

/// The image configuration (OCI `config.json` of an image).
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct ImageConfig {
    /// CPU architecture.
    #[serde(default)]
    pub architecture: String,
    /// Operating system.
    #[serde(default)]
    pub os: String,
    /// Variant of the architecture.
    #[serde(default)]
    pub variant: Option<String>,
    /// When the image was made, RFC 3339.
    #[serde(default)]
    pub created: Option<String>,
    /// How to run it.
    #[serde(default)]
    pub config: ExecutionConfig,
    /// Its layers, uncompressed.
    pub rootfs: RootfsDigests,
}

/// How to run an image. It is in memory as long as the image is stored; ports and labels, which nothing in the node acts
/// on, are in the document alone.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ExecutionConfig {
    /// `name`, `uid`, `name:group`, `uid:gid`; empty is root.
    #[serde(deserialize_with = "null_is_default")]
    pub user: String,
    /// `NAME=value` in order.
    #[serde(deserialize_with = "null_is_default")]
    pub env: Vec<String>,
    /// The program and its first arguments.
    #[serde(deserialize_with = "null_is_default")]
    pub entrypoint: Vec<String>,
    /// Default arguments, or the program if there is no entrypoint.
    #[serde(deserialize_with = "null_is_default")]
    pub cmd: Vec<String>,
    /// Working directory; empty is `/`.
    #[serde(deserialize_with = "null_is_default")]
    pub working_dir: String,
    /// Paths of anonymous volumes.
    #[serde(deserialize_with = "keys")]
    pub volumes: BTreeSet<String>,
    /// Signal name or number that asks the program to end.
    #[serde(deserialize_with = "null_is_default")]
    pub stop_signal: String,
}

impl ExecutionConfig {
    /// What it has too much of, if anything (R6): each volume is a mount of each container, and all of it goes into what is
    /// recorded of each.
    pub(crate) fn excess(&self) -> Option<String> {
        let lists = [("Env", &self.env), ("Entrypoint", &self.entrypoint), ("Cmd", &self.cmd)];
        let long = lists.iter().find(|(_, list)| list.len() > WORDS_MAX);
        let texts = lists.iter().flat_map(|(_, list)| *list).chain(&self.volumes).map(String::len).sum::<usize>();
        if let Some((name, list)) = long {
            return Some(format!("its {name} has {} entries, more than {WORDS_MAX}", list.len()));
        }
        if self.volumes.len() > VOLUMES_MAX {
            return Some(format!("it declares {} volumes, more than {VOLUMES_MAX}", self.volumes.len()));
        }
        let bytes = texts + self.user.len() + self.working_dir.len() + self.stop_signal.len();
        (bytes > TEXT_BYTES_MAX)
            .then(|| format!("it takes {bytes} bytes to say how it is run, more than {TEXT_BYTES_MAX}"))
    }
}

/// Entries of a list. Images have some dozens.
const WORDS_MAX: usize = 2_000;
const VOLUMES_MAX: usize = 500;
/// All texts together.
const TEXT_BYTES_MAX: usize = 256 << 10;

impl ImageConfig {
    /// The machine that the image says it is for.
    pub fn platform(&self) -> Platform {
        Platform { architecture: self.architecture.clone(), os: self.os.clone(), variant: self.variant.clone() }
    }
}

/// The `rootfs` part of an image configuration.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
pub struct RootfsDigests {
    /// Always `layers`.
    #[serde(rename = "type", default)]
    pub kind: String,
    /// Digests of the uncompressed layers, the lowest first.
    #[serde(default)]
    pub diff_ids: Vec<Digest>,
}

/// Docker writes `null` where it means "none".
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Option::<T>::deserialize(deserializer).map(Option::unwrap_or_default)
}

/// The names of an object whose values say nothing.
fn keys<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<BTreeSet<String>, D::Error> {
    let all = Option::<BTreeMap<String, IgnoredAny>>::deserialize(deserializer)?;
    Ok(all.unwrap_or_default().into_keys().collect())
}

/// Picks the image for `host` out of an index: of all entries that it can run, the one it runs best.
pub fn select_platform<'a>(index: &'a Index, host: &Platform) -> Option<&'a Descriptor> {
    let entries = || index.manifests.iter().filter_map(|d| Some((d, d.platform.as_ref()?)));
    host.preferences()
        .iter()
        .find_map(|wanted| entries().find(|(_, platform)| *platform == wanted).map(|(descriptor, _)| descriptor))
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, json};

    use super::*;

    fn entry(platform: &str) -> Descriptor {
        let mut parts = platform.split('/').map(str::to_owned);
        let mut part = || parts.next();
        Descriptor {
            media_type: media_type::OCI_MANIFEST.into(),
            digest: Digest::of(platform.as_bytes()),
            size: 1,
            platform: Some(Platform { os: part().unwrap(), architecture: part().unwrap(), variant: part() }),
            urls: vec![],
            annotations: BTreeMap::new(),
        }
    }

    fn check(platforms: &[&str], host: &str, expected: Option<&str>) {
        let index =
            Index { schema_version: 2, media_type: None, manifests: platforms.iter().map(|p| entry(p)).collect() };
        let host = entry(host).platform.unwrap();
        let found = select_platform(&index, &host).map(|d| d.platform.as_ref().unwrap().to_string());
        assert_eq!(found.as_deref(), expected, "{platforms:?} on {host}");
    }

    #[test]
    fn selects_by_platform() {
        check(&["linux/arm64/v8", "linux/amd64"], "linux/amd64", Some("linux/amd64"));
        check(&["linux/arm64", "linux/arm64/v8"], "linux/arm64/v8", Some("linux/arm64/v8"));
        check(&["linux/arm64"], "linux/arm64/v8", Some("linux/arm64"));
        check(&["windows/amd64", "unknown/unknown"], "linux/amd64", None);
        check(&["linux/amd64/v3"], "linux/amd64", None);
        check(&["linux/amd64/v3", "linux/amd64/v1"], "linux/amd64", Some("linux/amd64/v1"));
        check(&["linux/386", "linux/arm64"], "linux/amd64", Some("linux/386"));
        check(&["linux/arm/v6", "linux/arm/v7"], "linux/arm64/v8", Some("linux/arm/v7"));
        check(&["linux/arm/v8", "linux/arm/v6"], "linux/arm/v7", Some("linux/arm/v6"));
    }

    #[test]
    fn docker_nulls_are_nothing() {
        let config: ImageConfig = serde_json::from_str(
            r#"{"architecture":"amd64","os":"linux","config":{"User":"","Env":null,"Cmd":["sh"],"Entrypoint":null,"Volumes":null,"Labels":null},"rootfs":{"type":"layers","diff_ids":[]}}"#,
        )
        .unwrap();
        assert_eq!(config.config.cmd, ["sh"]);
        assert!(config.config.entrypoint.is_empty() && config.config.volumes.is_empty());
    }

    /// 400,000 volumes fit into a configuration.
    #[test]
    fn what_an_image_says_of_itself_has_a_budget() {
        let check = |config: serde_json::Value, excess: Option<&str>| {
            let config: ExecutionConfig = serde_json::from_value(config).unwrap();
            let found = config.excess();
            assert_eq!(found.is_some(), excess.is_some(), "{found:?}");
            assert!(found.unwrap_or_default().contains(excess.unwrap_or_default()));
        };
        let volumes = |count| (0..count).map(|at| (format!("/{at}"), json!({"any": ["thing"]}))).collect::<Map<_, _>>();
        check(json!({"Volumes": volumes(500), "Env": vec!["A=b"; 2_000], "Cmd": ["x".repeat(250_000)]}), None);
        check(json!({ "Volumes": volumes(501) }), Some("501 volumes"));
        check(json!({"Env": vec!["A=b"; 2_001]}), Some("Env has 2001 entries"));
        check(json!({"WorkingDir": "x".repeat(200_000), "Cmd": ["x".repeat(200_000)]}), Some("400000 bytes"));
        let ports: Map<_, _> = (0..50_000).map(|port| (format!("{port}/udp"), json!({}))).collect();
        check(json!({"ExposedPorts": ports, "Labels": {"a": "x".repeat(1_000_000)}}), None);
    }
}
