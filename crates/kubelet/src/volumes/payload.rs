//! The files of a volume whose content comes from the store: paths, bytes and modes. Pure.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use cluster::{Key, Store};
use k8s_openapi::api::core::v1::{
    DownwardAPIVolumeFile, KeyToPath, Pod, PodCertificateProjection, ServiceAccountTokenProjection, VolumeProjection,
};

use super::tokens::Wanted;
use super::{Cause, Credentials, trust};
use crate::facts::{self, NodeFacts};

/// A file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct File {
    /// Its content.
    pub(super) data: Vec<u8>,
    /// Its permissions.
    pub(super) mode: u32,
}

/// The files by path below the volume.
pub(super) type Files = BTreeMap<String, File>;

const DEFAULT_MODE: i32 = 0o644;

/// The files of the pod's volume called `name`.
///
/// # Errors
/// What is missing, and what is no path.
pub(super) fn of(
    pod: &Pod,
    name: &str,
    store: &Store,
    node: &NodeFacts,
    credentials: &Credentials,
) -> Result<Files, Cause> {
    let maker = Maker { pod, store, node, credentials };
    let volume = pod::spec::of(pod).volumes.iter().flatten().find(|volume| volume.name == name);
    let Some(volume) = volume else { return Ok(Files::new()) };
    let mode = |mode: Option<i32>| mode.unwrap_or(DEFAULT_MODE);
    let files = if let Some(source) = &volume.config_map {
        maker.config_map(&source.name, source.items.as_deref(), source.optional, mode(source.default_mode))?
    } else if let Some(source) = &volume.secret {
        let name = source.secret_name.as_deref().unwrap_or_default();
        maker.secret(name, source.items.as_deref(), source.optional, mode(source.default_mode))?
    } else if let Some(source) = &volume.downward_api {
        maker.downward(source.items.as_deref().unwrap_or_default(), mode(source.default_mode))?
    } else if let Some(source) = &volume.projected {
        maker.projected(name, source.sources.as_deref().unwrap_or_default(), mode(source.default_mode))?
    } else {
        Files::new()
    };
    files.keys().try_for_each(|path| check_path(path))?;
    Ok(files)
}

/// A path stays below its volume and is no name that the writer uses itself.
fn check_path(path: &str) -> Result<(), Cause> {
    let parts = || Path::new(path).components();
    let valid = !path.is_empty() && !path.starts_with("..") && parts().all(|part| matches!(part, Component::Normal(_)));
    if valid {
        return Ok(());
    }
    Err(Cause::Invalid(format!("path {path:?} must be relative, without '..', and must not begin with '..'")))
}

struct Maker<'a> {
    pod: &'a Pod,
    store: &'a Store,
    node: &'a NodeFacts,
    credentials: &'a Credentials,
}

impl Maker<'_> {
    fn key(&self, name: &str) -> Key {
        Key::new(self.pod.metadata.namespace.as_deref().unwrap_or("default"), name)
    }

    fn config_map(
        &self,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
        mode: i32,
    ) -> Result<Files, Cause> {
        let found = self.store.config_maps().get(&self.key(name));
        let Some(found) = present(found, "configmap", name, optional)? else { return Ok(Files::new()) };
        let text = found.data.iter().flatten().map(|(key, value)| (key.as_str(), value.as_bytes()));
        let binary = found.binary_data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice()));
        chosen(&text.chain(binary).collect(), items, optional, mode, "config")
    }

    fn secret(
        &self,
        name: &str,
        items: Option<&[KeyToPath]>,
        optional: Option<bool>,
        mode: i32,
    ) -> Result<Files, Cause> {
        let found = self.store.secrets().get(&self.key(name));
        let Some(found) = present(found, "secret", name, optional)? else { return Ok(Files::new()) };
        let data = found.data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice()));
        chosen(&data.collect(), items, optional, mode, "secret")
    }

    fn downward(&self, items: &[DownwardAPIVolumeFile], mode: i32) -> Result<Files, Cause> {
        let file = |item: &DownwardAPIVolumeFile| {
            let value = if let Some(field) = &item.field_ref {
                facts::field(&field.field_path, self.pod, &[], self.node)?
            } else if let Some(resource) = &item.resource_field_ref {
                facts::resource(resource, self.pod, None, self.node)?
            } else {
                String::new()
            };
            let file = File { data: value.into_bytes(), mode: bits(item.mode.unwrap_or(mode)) };
            Ok((item.path.clone(), file))
        };
        items.iter().map(file).collect()
    }

    fn projected(&self, volume: &str, sources: &[VolumeProjection], mode: i32) -> Result<Files, Cause> {
        sources.iter().enumerate().try_fold(Files::new(), |mut files, (index, source)| {
            files.extend(self.projection((volume, index), source, mode)?);
            Ok(files)
        })
    }

    fn projection(&self, place: (&str, usize), source: &VolumeProjection, mode: i32) -> Result<Files, Cause> {
        if let Some(source) = &source.config_map {
            return self.config_map(&source.name, source.items.as_deref(), source.optional, mode);
        }
        if let Some(source) = &source.secret {
            return self.secret(&source.name, source.items.as_deref(), source.optional, mode);
        }
        if let Some(source) = &source.downward_api {
            return self.downward(source.items.as_deref().unwrap_or_default(), mode);
        }
        if let Some(source) = &source.service_account_token {
            return self.token(source, mode);
        }
        if let Some(source) = &source.cluster_trust_bundle {
            let file = File { data: trust::bundle(source, self.store)?, mode: self.private(mode) };
            return Ok([(source.path.clone(), file)].into());
        }
        match &source.pod_certificate {
            Some(source) => self.certificate(place, source, mode),
            None => Ok(Files::new()),
        }
    }
}

impl Maker<'_> {
    /// Readable by its owner alone where the volume gets an owning group, as upstream has it.
    fn private(&self, mode: i32) -> u32 {
        const PRIVATE: i32 = 0o600;
        let security = pod::spec::of(self.pod).security_context.as_ref();
        let has_group = security.is_some_and(|security| security.fs_group.is_some());
        bits(if has_group { PRIVATE } else { mode })
    }

    fn token(&self, source: &ServiceAccountTokenProjection, mode: i32) -> Result<Files, Cause> {
        let token = self.credentials.tokens.get(&Wanted::of(source)).ok_or_else(has_changed)?;
        let file = File { data: token.clone().into_bytes(), mode: self.private(mode) };
        Ok([(source.path.clone(), file)].into())
    }

    fn certificate(
        &self,
        (volume, index): (&str, usize),
        source: &PodCertificateProjection,
        mode: i32,
    ) -> Result<Files, Cause> {
        let bundle = self.credentials.certificates.get(&(volume.to_owned(), index)).ok_or_else(has_changed)?;
        let both = || format!("{}{}", bundle.key, bundle.chain);
        let wanted = [
            (&source.credential_bundle_path, both()),
            (&source.key_path, bundle.key.clone()),
            (&source.certificate_chain_path, bundle.chain.clone()),
        ];
        let wanted =
            wanted.into_iter().filter_map(|(path, text)| Some((path.clone().filter(|path| !path.is_empty())?, text)));
        let file = |text: String| File { data: text.into_bytes(), mode: self.private(mode) };
        Ok(wanted.map(|(path, text)| (path, file(text))).collect())
    }
}

/// What was made for the pod is for another version of it; the next try knows this one.
fn has_changed() -> Cause {
    Cause::Invalid("the pod's volumes have changed".to_owned())
}

fn present<T>(found: Option<T>, kind: &'static str, name: &str, optional: Option<bool>) -> Result<Option<T>, Cause> {
    match found {
        None if optional != Some(true) => Err(Cause::NotFound { kind, name: name.to_owned() }),
        found => Ok(found),
    }
}

/// All keys, or those that `items` names.
fn chosen(
    data: &BTreeMap<&str, &[u8]>,
    items: Option<&[KeyToPath]>,
    optional: Option<bool>,
    mode: i32,
    kind: &'static str,
) -> Result<Files, Cause> {
    let file = |data: &[u8], mode: i32| File { data: data.to_vec(), mode: bits(mode) };
    let Some(items) = items.filter(|items| !items.is_empty()) else {
        return Ok(data.iter().map(|(key, data)| ((*key).to_owned(), file(data, mode))).collect());
    };
    let mut files = Files::new();
    for item in items {
        match data.get(item.key.as_str()) {
            Some(data) => {
                files.insert(item.path.clone(), file(data, item.mode.unwrap_or(mode)));
            }
            None if optional == Some(true) => {}
            None => return Err(Cause::NoKey { kind, key: item.key.clone() }),
        }
    }
    Ok(files)
}

/// Permission bits; others are not for files of content.
fn bits(mode: i32) -> u32 {
    mode.unsigned_abs() & 0o777
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volumes::certificates::Bundle;
    use serde_json::json;

    fn files(volume: serde_json::Value) -> Result<Vec<(String, String, u32)>, String> {
        let store = Store::new();
        store.config_maps().put(
            serde_json::from_value(json!({"metadata": {"name": "cm", "namespace": "shop"}, "data": {"a": "1"}, "binaryData": {"b": "Mg=="}})).unwrap(),
        );
        store.secrets().put(
            serde_json::from_value(json!({"metadata": {"name": "s", "namespace": "shop"}, "data": {"k": "Mw=="}}))
                .unwrap(),
        );
        let mut volume = volume;
        volume["name"] = json!("v");
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "shop", "labels": {"x": "y"}},
            "spec": {"containers": [{"name": "c", "resources": {"limits": {"cpu": "2"}}}], "volumes": [volume]}}))
            .unwrap();
        let vault = Wanted {
            audience: Some("vault".to_owned()),
            seconds: 600,
            shown_by: crate::volumes::tokens::ShownBy::Volume,
        };
        let bundle = Bundle { key: "KEY\n".to_owned(), chain: "CHAIN\n".to_owned() };
        let credentials = Credentials {
            tokens: [(vault, "a-token".to_owned())].into(),
            certificates: [(("v".to_owned(), 0), bundle)].into(),
        };
        let files = of(&pod, "v", &store, &NodeFacts::default(), &credentials).map_err(|cause| cause.to_string())?;
        let shown = |(path, file): (String, File)| (path, String::from_utf8_lossy(&file.data).into_owned(), file.mode);
        Ok(files.into_iter().map(shown).collect())
    }

    fn file(path: &str, data: &str, mode: u32) -> (String, String, u32) {
        (path.into(), data.into(), mode)
    }

    #[test]
    fn contents() {
        let all = files(json!({"configMap": {"name": "cm"}}));
        assert_eq!(all, Ok(vec![file("a", "1", 0o644), file("b", "2", 0o644)]));
        let items = json!([{"key": "k", "path": "dir/key", "mode": 256}]);
        assert_eq!(
            files(json!({"secret": {"secretName": "s", "items": items}})),
            Ok(vec![file("dir/key", "3", 0o400)])
        );
        let sources = json!([{"secret": {"name": "s"}}, {"configMap": {"name": "none", "optional": true}},
            {"downwardAPI": {"items": [{"path": "l", "fieldRef": {"fieldPath": "metadata.labels"}},
                {"path": "c", "resourceFieldRef": {"containerName": "c", "resource": "limits.cpu"}}]}}]);
        let projected = files(json!({"projected": {"defaultMode": 288, "sources": sources}}));
        assert_eq!(projected, Ok(vec![file("c", "2", 0o440), file("k", "3", 0o440), file("l", "x=\"y\"", 0o440)]));
    }

    #[test]
    fn tokens() {
        let token = json!({"serviceAccountToken": {"path": "token", "audience": "vault", "expirationSeconds": 600}});
        let shown = files(json!({"projected": {"defaultMode": 420, "sources": [token]}}));
        assert_eq!(shown, Ok(vec![file("token", "a-token", 0o644)]));
    }

    #[test]
    fn certificates() {
        let source = json!({"signerName": "s", "keyType": "ED25519", "credentialBundlePath": "both", "keyPath": "key",
            "certificateChainPath": "chain"});
        let shown = files(json!({"projected": {"sources": [{"podCertificate": source}]}}));
        let expect =
            [file("both", "KEY\nCHAIN\n", 0o644), file("chain", "CHAIN\n", 0o644), file("key", "KEY\n", 0o644)];
        assert_eq!(shown, Ok(expect.to_vec()));
    }

    #[test]
    fn failures() {
        let failure = |volume| files(volume).unwrap_err();
        assert_eq!(failure(json!({"configMap": {"name": "none"}})), "configmap \"none\" not found");
        let items = |path| json!({"configMap": {"name": "cm", "items": [{"key": "a", "path": path}]}});
        assert!(failure(items("../x")).contains("must be relative"));
        assert!(failure(items("..data")).contains("must not begin"));
        let no_key = json!({"configMap": {"name": "cm", "items": [{"key": "z", "path": "z"}]}});
        assert_eq!(failure(no_key), "references non-existent config key: z");
    }
}
