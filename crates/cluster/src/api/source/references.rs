//! What a pod refers to, and a node therefore has to know while it has the pod.

use std::collections::BTreeSet;

use k8s_openapi::api::core::v1::{
    Container, EnvFromSource, EnvVar, EphemeralContainer, PersistentVolume, Pod, PodSpec, SecretReference, Volume,
    VolumeProjection,
};

use crate::manifests::names;
use crate::{Key, Store};

/// A kind of object that pods refer to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Referred {
    ConfigMap,
    Secret,
    Claim,
    Volume,
}

/// An object that pods refer to.
pub(super) type Reference = (Referred, Key);

/// Everything that this pod refers to, as far as it is known: which volume stands behind a claim, only the claim tells. What
/// no object can be called is left out: nobody has to be asked to know that it is not there.
pub(super) fn of(pod: &Pod, store: &Store) -> BTreeSet<Reference> {
    let mut all = named(pod, store);
    all.retain(|(_, key)| names::dns_subdomain(key.name()).is_none());
    all
}

fn named(pod: &Pod, store: &Store) -> BTreeSet<Reference> {
    let mut found = Found { namespace: pod.metadata.namespace.as_deref().unwrap_or("default"), all: BTreeSet::new() };
    let has_ended = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    if matches!(has_ended, Some("Succeeded" | "Failed")) {
        return found.all;
    }
    if let Some(spec) = &pod.spec {
        found.spec(spec, pod.metadata.name.as_deref().unwrap_or_default());
    }
    found.behind_claims(store);
    found.all
}

/// One of the objects that this pod refers to: the kind as the API has it in its paths, and the name.
pub(crate) fn first(pod: &Pod) -> Option<(&'static str, String)> {
    let (kind, key) = named(pod, &Store::new()).pop_first()?;
    let kind = match kind {
        Referred::ConfigMap => "configmaps",
        Referred::Secret => "secrets",
        Referred::Claim => "persistentvolumeclaims",
        Referred::Volume => "persistentvolumes",
    };
    Some((kind, key.name().to_owned()))
}

struct Found<'a> {
    namespace: &'a str,
    all: BTreeSet<Reference>,
}

impl Found<'_> {
    fn add(&mut self, kind: Referred, name: &str) {
        if !name.is_empty() {
            self.all.insert((kind, Key::new(self.namespace, name)));
        }
    }

    fn spec(&mut self, spec: &PodSpec, pod: &str) {
        for secret in spec.image_pull_secrets.iter().flatten() {
            self.add(Referred::Secret, &secret.name);
        }
        spec.init_containers.iter().flatten().chain(&spec.containers).for_each(|container| self.container(container));
        spec.ephemeral_containers.iter().flatten().for_each(|container| self.ephemeral(container));
        spec.volumes.iter().flatten().for_each(|volume| self.volume(volume, pod));
    }

    fn container(&mut self, container: &Container) {
        self.environment(container.env_from.as_deref(), container.env.as_deref());
    }

    fn ephemeral(&mut self, container: &EphemeralContainer) {
        self.environment(container.env_from.as_deref(), container.env.as_deref());
    }

    fn environment(&mut self, all: Option<&[EnvFromSource]>, each: Option<&[EnvVar]>) {
        for from in all.unwrap_or_default() {
            from.config_map_ref.iter().for_each(|one| self.add(Referred::ConfigMap, &one.name));
            from.secret_ref.iter().for_each(|one| self.add(Referred::Secret, &one.name));
        }
        for from in each.unwrap_or_default().iter().filter_map(|variable| variable.value_from.as_ref()) {
            from.config_map_key_ref.iter().for_each(|one| self.add(Referred::ConfigMap, &one.name));
            from.secret_key_ref.iter().for_each(|one| self.add(Referred::Secret, &one.name));
        }
    }

    fn volume(&mut self, volume: &Volume, pod: &str) {
        if let Some(source) = &volume.config_map {
            self.add(Referred::ConfigMap, &source.name);
        }
        if let Some(source) = &volume.persistent_volume_claim {
            self.add(Referred::Claim, &source.claim_name);
        }
        if volume.ephemeral.is_some() {
            self.add(Referred::Claim, &format!("{pod}-{}", volume.name));
        }
        for source in volume.projected.iter().flat_map(|projected| projected.sources.iter().flatten()) {
            self.projection(source);
        }
        secrets_of(volume).into_iter().flatten().for_each(|name| self.add(Referred::Secret, name));
    }

    fn projection(&mut self, source: &VolumeProjection) {
        source.config_map.iter().for_each(|one| self.add(Referred::ConfigMap, &one.name));
        source.secret.iter().for_each(|one| self.add(Referred::Secret, &one.name));
    }

    /// The volumes of claims that are bound, and the Secrets that these name.
    fn behind_claims(&mut self, store: &Store) {
        let claims = self.all.iter().filter(|(kind, _)| *kind == Referred::Claim);
        let claims: Vec<_> = claims.filter_map(|(_, key)| store.persistent_volume_claims().get(key)).collect();
        for claim in claims {
            let Some(name) = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()) else { continue };
            if name.is_empty() {
                continue;
            }
            let key = Key::cluster(name);
            if let Some(volume) = store.persistent_volumes().get(&key) {
                self.all.extend(secrets_behind(&volume));
            }
            self.all.insert((Referred::Volume, key));
        }
    }
}

/// The Secrets that a volume of a pod names, in the pod's namespace.
fn secrets_of(volume: &Volume) -> [Option<&str>; 9] {
    [
        volume.secret.as_ref().and_then(|source| source.secret_name.as_deref()),
        volume.csi.as_ref().and_then(|source| source.node_publish_secret_ref.as_ref()).map(|one| one.name.as_str()),
        volume.azure_file.as_ref().map(|source| source.secret_name.as_str()),
        volume.cephfs.as_ref().and_then(|source| source.secret_ref.as_ref()).map(|one| one.name.as_str()),
        volume.flex_volume.as_ref().and_then(|source| source.secret_ref.as_ref()).map(|one| one.name.as_str()),
        volume.iscsi.as_ref().and_then(|source| source.secret_ref.as_ref()).map(|one| one.name.as_str()),
        volume.rbd.as_ref().and_then(|source| source.secret_ref.as_ref()).map(|one| one.name.as_str()),
        volume.scale_io.as_ref().map(|source| source.secret_ref.name.as_str()),
        volume.storageos.as_ref().and_then(|source| source.secret_ref.as_ref()).map(|one| one.name.as_str()),
    ]
}

/// The Secrets that a CSI driver gets on a node for this volume.
fn secrets_behind(volume: &PersistentVolume) -> Vec<Reference> {
    let csi = volume.spec.as_ref().and_then(|spec| spec.csi.as_ref());
    let Some(csi) = csi else { return Vec::new() };
    let all = [&csi.node_stage_secret_ref, &csi.node_publish_secret_ref, &csi.node_expand_secret_ref];
    let named = all.into_iter().flatten().filter_map(|SecretReference { name, namespace }| {
        Some((Referred::Secret, Key::new(namespace.as_deref()?, name.as_deref()?)))
    });
    named.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn pod(spec: Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"namespace": "shop", "name": "p"}, "spec": spec})).unwrap()
    }

    fn shown(pod: &Pod, store: &Store) -> Vec<String> {
        of(pod, store).into_iter().map(|(kind, key)| format!("{kind:?} {key}")).collect()
    }

    #[test]
    fn everything_a_pod_names() {
        let container = |name: &str| {
            json!({"name": name, "envFrom": [{"configMapRef": {"name": format!("{name}-all")}}],
                "env": [{"name": "A", "value": "b"}, {"name": "K", "valueFrom": {"secretKeyRef": {"name": format!("{name}-key"), "key": "k"}}}]})
        };
        let pod = pod(json!({
            "imagePullSecrets": [{"name": "registry"}, {"name": ""}],
            "initContainers": [container("i")], "containers": [container("c")], "ephemeralContainers": [container("e")],
            "volumes": [
                {"name": "a", "secret": {"secretName": "s"}}, {"name": "b", "configMap": {"name": "m", "optional": true}},
                {"name": "d", "projected": {"sources": [{"secret": {"name": "ps"}}, {"configMap": {"name": "pm"}}]}},
                {"name": "f", "csi": {"driver": "x", "nodePublishSecretRef": {"name": "csi"}}},
                {"name": "g", "persistentVolumeClaim": {"claimName": "data"}}, {"name": "scratch", "ephemeral": {}}
            ]
        }));
        let expect = [
            "ConfigMap shop/c-all",
            "ConfigMap shop/e-all",
            "ConfigMap shop/i-all",
            "ConfigMap shop/m",
            "ConfigMap shop/pm",
            "Secret shop/c-key",
            "Secret shop/csi",
            "Secret shop/e-key",
            "Secret shop/i-key",
            "Secret shop/ps",
            "Secret shop/registry",
            "Secret shop/s",
            "Claim shop/data",
            "Claim shop/p-scratch",
        ];
        assert_eq!(shown(&pod, &Store::new()), expect);
        let mut ended = pod;
        ended.status.get_or_insert_default().phase = Some("Succeeded".into());
        assert!(shown(&ended, &Store::new()).is_empty());
    }

    /// The API server looks at most of these names only for whether they are empty.
    #[test]
    fn what_no_object_can_be_called_is_not_asked_for() {
        let long = "s".repeat(66_000);
        let names = [&*long, &"s".repeat(254), "a/b", "a b", "A", "a..b", "-a"];
        let secrets = names.iter().map(|name| json!({"name": "v", "secret": {"secretName": name}}));
        let claim = json!({"name": "g", "persistentVolumeClaim": {"claimName": long}});
        let volumes: Vec<_> = secrets.chain([claim]).collect();
        let env = json!([{"name": "K", "valueFrom": {"configMapKeyRef": {"name": long, "key": "k"}}}]);
        let pod = pod(json!({
            "imagePullSecrets": [{"name": long}, {"name": "s".repeat(253)}],
            "containers": [{"name": "c", "env": env}],
            "volumes": volumes,
        }));
        assert_eq!(shown(&pod, &Store::new()), [format!("Secret shop/{}", "s".repeat(253))]);
    }

    #[test]
    fn claims_lead_to_volumes_and_their_secrets() {
        let store = Store::new();
        let pod =
            pod(json!({"containers": [], "volumes": [{"name": "g", "persistentVolumeClaim": {"claimName": "data"}}]}));
        store.persistent_volume_claims().put(
            serde_json::from_value(
                json!({"metadata": {"namespace": "shop", "name": "data"}, "spec": {"volumeName": "pv"}}),
            )
            .unwrap(),
        );
        assert_eq!(shown(&pod, &store), ["Claim shop/data", "Volume pv"]);
        let secret = json!({"name": "stage", "namespace": "storage"});
        store.persistent_volumes().put(
            serde_json::from_value(json!({"metadata": {"name": "pv"}, "spec": {"csi": {"driver": "d", "volumeHandle": "h", "nodeStageSecretRef": secret}}}))
                .unwrap(),
        );
        assert_eq!(shown(&pod, &store), ["Secret storage/stage", "Claim shop/data", "Volume pv"]);
    }
}
