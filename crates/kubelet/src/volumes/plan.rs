//! What each volume of a pod is. Pure, but for looking claims up in the store.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

use cluster::{Key, Store};
use k8s_openapi::api::core::v1::{
    EmptyDirVolumeSource, PersistentVolume, PersistentVolumeClaim, Pod, Volume, VolumeProjection,
};
use pod::quantity::Quantity;
use pod::spec;

use super::Cause;
use super::csi::{self, CsiVolume};
use super::mounts::mounted;
use super::nfs::Share;
use crate::admission::affinity;

/// A volume, by how it is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind<'a> {
    /// An empty directory.
    EmptyDir { medium: Medium, size: Option<u64> },
    /// A path of the node. One that is `owned` is the pod's to write, so all below is given to its group, and labelled for it
    /// where there is SELinux: so are local volumes, but a hostPath is the node's, also behind a claim.
    HostPath { path: PathBuf, kind: String, owned: bool, read_only: bool },
    /// Files whose content comes from the store.
    Content { plugin: &'static str, in_memory: bool },
    /// A device of the node.
    Device { path: PathBuf, read_only: bool },
    /// A directory of an NFS server.
    Nfs(Share),
    /// What a CSI driver mounts.
    Csi(Box<CsiVolume>),
    /// An image.
    Image { reference: &'a str },
}

/// Where the files of an emptyDir are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Medium {
    /// On the disk of the kubelet.
    Disk,
    /// In memory.
    Memory,
    /// In memory, in pages of this size.
    HugePages { page_bytes: u64 },
}

/// An object whose content files are made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    ConfigMap,
    Secret,
}

/// The volumes that some container uses; others are not made.
pub(super) fn used(pod: &Pod) -> BTreeSet<&str> {
    let containers = || spec::containers(pod).map(|(_, container)| container);
    let of_files = containers().flat_map(|container| container.env.iter().flatten());
    let of_files = of_files.filter_map(|variable| variable.value_from.as_ref()?.file_key_ref.as_ref());
    let of_files = of_files.map(|file| file.volume_name.as_str());
    let added = spec::ephemeral(pod).flat_map(|one| one.volume_mounts.iter().flatten());
    containers().flat_map(mounted).chain(of_files).chain(added.map(|mount| mount.name.as_str())).collect()
}

/// A volume that some container uses and the pod does not have.
pub(super) fn missing(pod: &Pod) -> Option<&str> {
    let volumes = spec::of(pod).volumes.as_deref().unwrap_or_default();
    used(pod).into_iter().find(|name| volumes.iter().all(|volume| volume.name != *name))
}

/// Image volumes in use: name, reference and pull policy. Their images are pulled before containers are created.
pub fn image_volumes(pod: &Pod) -> Vec<(&str, &str, Option<&str>)> {
    let used = used(pod);
    let volumes = spec::of(pod).volumes.iter().flatten().filter(|volume| used.contains(volume.name.as_str()));
    let images = volumes.filter_map(|volume| {
        let image = volume.image.as_ref()?;
        Some((volume.name.as_str(), image.reference.as_deref()?, image.pull_policy.as_deref()))
    });
    images.collect()
}

/// Whether a pod's volumes show the ConfigMap or Secret called `key`.
pub(super) fn uses(pod: &Pod, content: Content, key: &Key) -> bool {
    if pod.metadata.namespace.as_deref().unwrap_or("default") != key.namespace() {
        return false;
    }
    spec::of(pod).volumes.iter().flatten().any(|volume| names(volume, content).any(|name| name == key.name()))
}

fn names(volume: &Volume, content: Content) -> impl Iterator<Item = &str> {
    let own = match content {
        Content::ConfigMap => volume.config_map.as_ref().map(|source| source.name.as_str()),
        Content::Secret => volume.secret.as_ref().and_then(|source| source.secret_name.as_deref()),
    };
    let projected = volume.projected.as_ref().and_then(|source| source.sources.as_ref()).into_iter().flatten();
    let projected = projected.filter_map(move |source: &VolumeProjection| match content {
        Content::ConfigMap => source.config_map.as_ref().map(|source| source.name.as_str()),
        Content::Secret => source.secret.as_ref().map(|source| source.name.as_str()),
    });
    own.into_iter().chain(projected)
}

/// What a volume is.
///
/// # Errors
/// A kind that this node does not make, a claim without a volume, an invalid path.
pub(super) fn kind<'a>(volume: &'a Volume, pod: &Pod, store: &Store) -> Result<Kind<'a>, Cause> {
    if let Some(source) = &volume.empty_dir {
        return empty_dir(source, pod);
    }
    if let Some(source) = &volume.host_path {
        let path = host_path(&source.path)?;
        let kind = source.type_.clone().unwrap_or_default();
        return Ok(Kind::HostPath { path, kind, owned: false, read_only: false });
    }
    if let Some((claim, behind)) = claimed(volume, pod, store)? {
        let read_only = volume.persistent_volume_claim.as_ref().is_some_and(|source| source.read_only == Some(true));
        return persistent(&behind, &claim, read_only);
    }
    if let Some(source) = &volume.csi {
        return Ok(Kind::Csi(Box::new(CsiVolume::inline(&volume.name, source, pod))));
    }
    if let Some(source) = &volume.nfs {
        return Ok(Kind::Nfs(Share::inline(&volume.name, source)));
    }
    if let Some(source) = &volume.image {
        let reference = source.reference.as_deref().filter(|reference| !reference.is_empty());
        let reference = reference.ok_or_else(|| Cause::Invalid("an image volume needs a reference".into()))?;
        return Ok(Kind::Image { reference });
    }
    // ConfigMaps are on disk, everything that may be secret or private is in memory, as upstream has them.
    let content = [
        (volume.config_map.is_some(), "configmap", false),
        (volume.secret.is_some(), "secret", true),
        (volume.downward_api.is_some(), "downward-api", true),
        (volume.projected.is_some(), "projected", true),
    ];
    match content.into_iter().find(|(is_there, ..)| *is_there) {
        Some((_, plugin, in_memory)) => Ok(Kind::Content { plugin, in_memory }),
        None if is_empty(volume) => Ok(Kind::EmptyDir { medium: Medium::Disk, size: None }),
        None => Err(Cause::Unsupported(format!(
            "{} volumes are not supported by this node; use emptyDir, hostPath, configMap, secret, downwardAPI, projected, image, nfs, csi or a persistentVolumeClaim on a csi, nfs, hostPath or local volume",
            unsupported(volume)
        ))),
    }
}

/// The field of a source that this node does not make, as manifests spell it.
fn unsupported(volume: &Volume) -> String {
    let json = serde_json::to_value(volume).unwrap_or_default();
    let field = json.as_object().and_then(|fields| fields.keys().find(|key| *key != "name"));
    field.cloned().unwrap_or_else(|| "such".into())
}

/// A volume without a source is an emptyDir (API default).
fn is_empty(volume: &Volume) -> bool {
    *volume == Volume { name: volume.name.clone(), ..Volume::default() }
}

fn empty_dir(source: &EmptyDirVolumeSource, pod: &Pod) -> Result<Kind<'static>, Cause> {
    let size = source.size_limit.as_ref().map(|text| Quantity::parse(&text.0)).transpose();
    let size = size.map_err(|error| Cause::Invalid(format!("sizeLimit {error}")))?;
    let size = size.and_then(|size| u64::try_from(size.units()).ok()).filter(|size| *size > 0);
    let medium = match source.medium.as_deref().unwrap_or_default() {
        "" => Medium::Disk,
        "Memory" => Medium::Memory,
        medium => Medium::HugePages { page_bytes: page_size(medium, pod)? },
    };
    Ok(Kind::EmptyDir { medium, size })
}

/// The size of the pages of an emptyDir on `HugePages` or `HugePages-<size>`: one that the pod asks for.
fn page_size(medium: &str, pod: &Pod) -> Result<u64, Cause> {
    let bytes = |text: &str| Quantity::parse(text).ok().and_then(|size| u64::try_from(size.units()).ok());
    let wanted = medium.strip_prefix("HugePages-").and_then(bytes);
    if medium != "HugePages" && wanted.is_none() {
        return Err(Cause::Invalid(format!(
            "emptyDir medium {medium:?} is not one; use \"\" (disk), \"Memory\", \"HugePages\" or \"HugePages-<size>\""
        )));
    }
    let own = spec::containers(pod).filter_map(|(_, container)| container.resources.as_ref());
    let own = own.flat_map(|resources| [&resources.requests, &resources.limits]);
    let whole = spec::of(pod).resources.iter().flat_map(|resources| [&resources.requests, &resources.limits]);
    let names = own.chain(whole).flatten().flat_map(|list| list.keys());
    let asked: BTreeSet<u64> = names.filter_map(|name| bytes(name.strip_prefix("hugepages-")?)).collect();
    match (wanted, asked.len()) {
        (Some(size), _) if asked.contains(&size) => Ok(size),
        (None, 1) => Ok(asked.into_iter().sum()),
        (None, 2..) => Err(Cause::Invalid(format!(
            "medium: {medium} can't be used if container requests multiple huge page sizes"
        ))),
        _ => Err(Cause::Invalid(format!("medium {medium}: hugepages of that size are not requested by the pod"))),
    }
}

fn host_path(path: &str) -> Result<PathBuf, Cause> {
    if Path::new(path).components().any(|part| part == Component::ParentDir) {
        return Err(Cause::Invalid(format!("hostPath {path:?} must not contain '..'")));
    }
    if !path.starts_with('/') {
        return Err(Cause::Invalid(format!("hostPath {path:?} must be absolute")));
    }
    Ok(path.into())
}

fn missing_object(kind: &'static str, name: &str) -> Cause {
    Cause::NotFound { kind, name: name.to_owned() }
}

/// Whether a volume can be used on this node, as the PersistentVolume behind it says. Where nobody knows the node's labels,
/// whoever bound the pod has to know.
pub(super) fn check_place(volume: &Volume, pod: &Pod, store: &Store, node: &str) -> Result<(), Cause> {
    let Some((_, behind)) = claimed(volume, pod, store)? else { return Ok(()) };
    let Some(node) = store.nodes().get(&Key::cluster(node)) else { return Ok(()) };
    let labels = node.metadata.labels.clone().unwrap_or_default();
    if affinity::has_volume(&behind, &labels) { Ok(()) } else { Err(Cause::Elsewhere) }
}

/// A claim, and the volume behind it.
type Claimed = (Arc<PersistentVolumeClaim>, Arc<PersistentVolume>);

/// What is behind a volume that the pod's spec does not describe itself.
fn claimed(volume: &Volume, pod: &Pod, store: &Store) -> Result<Option<Claimed>, Cause> {
    if let Some(source) = &volume.persistent_volume_claim {
        let key = Key::new(pod.metadata.namespace.as_deref().unwrap_or("default"), &source.claim_name);
        let claim = found_claim(&key, store)?;
        let behind = bound(&claim, store)?;
        return Ok(Some((claim, behind)));
    }
    if volume.ephemeral.is_some() {
        let claim = found_claim(&csi::claim_of_ephemeral(pod, &volume.name), store)?;
        let behind = bound(owned(&claim, pod)?, store)?;
        return Ok(Some((claim, behind)));
    }
    Ok(None)
}

fn found_claim(key: &Key, store: &Store) -> Result<Arc<PersistentVolumeClaim>, Cause> {
    let claim = store.persistent_volume_claims().get(key);
    claim.ok_or_else(|| missing_object("persistentvolumeclaim", key.name()))
}

/// The claim of an ephemeral volume is the pod's own: one of that name which somebody else has made is not.
fn owned<'a>(claim: &'a PersistentVolumeClaim, pod: &Pod) -> Result<&'a PersistentVolumeClaim, Cause> {
    let owners = claim.metadata.owner_references.iter().flatten();
    let is_own = owners
        .filter(|owner| owner.controller == Some(true))
        .any(|owner| pod.metadata.uid.as_ref() == Some(&owner.uid));
    let name = claim.metadata.name.as_deref().unwrap_or_default();
    is_own.then_some(claim).ok_or_else(|| {
        Cause::Invalid(format!("persistentvolumeclaim {name:?} was not made for this pod; delete or rename it"))
    })
}

/// The volume behind a claim. A claim may name any volume; what binds them is that each names the other.
fn bound(claim: &PersistentVolumeClaim, store: &Store) -> Result<Arc<PersistentVolume>, Cause> {
    let unbound = || Cause::Unbound(claim.metadata.name.clone().unwrap_or_default());
    let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
    if phase.is_some_and(|phase| phase != "Bound") {
        return Err(unbound());
    }
    let name = claim.spec.as_ref().and_then(|spec| spec.volume_name.as_deref()).filter(|name| !name.is_empty());
    let name = name.ok_or_else(unbound)?;
    let volume = store.persistent_volumes().get(&Key::cluster(name));
    let volume = volume.ok_or_else(|| missing_object("persistentvolume", name))?;
    let of = volume.spec.as_ref().and_then(|spec| spec.claim_ref.as_ref());
    if of.is_some_and(|of| of.uid != claim.metadata.uid) {
        return Err(unbound());
    }
    Ok(volume)
}

/// What a PersistentVolume is.
fn persistent(
    volume: &PersistentVolume,
    claim: &PersistentVolumeClaim,
    read_only: bool,
) -> Result<Kind<'static>, Cause> {
    let spec = volume.spec.as_ref();
    if let Some(source) = spec.and_then(|spec| spec.csi.as_ref()) {
        return Ok(Kind::Csi(Box::new(CsiVolume::of_claim(volume, source, claim, read_only))));
    }
    if let Some(source) = spec.and_then(|spec| spec.nfs.as_ref()) {
        return Ok(Kind::Nfs(Share::of_claim(volume, source, read_only)));
    }
    let (path, kind) = on_node(volume)?;
    let path = host_path(&path)?;
    if spec.and_then(|spec| spec.volume_mode.as_deref()) == Some("Block") {
        return Ok(Kind::Device { path, read_only });
    }
    let owned = !read_only && spec.is_some_and(|spec| spec.host_path.is_none() && spec.local.is_some());
    Ok(Kind::HostPath { path, kind, owned, read_only })
}

fn on_node(volume: &PersistentVolume) -> Result<(String, String), Cause> {
    let spec = volume.spec.as_ref();
    if let Some(source) = spec.and_then(|spec| spec.host_path.as_ref()) {
        return Ok((source.path.clone(), source.type_.clone().unwrap_or_default()));
    }
    if let Some(source) = spec.and_then(|spec| spec.local.as_ref()) {
        return Ok((source.path.clone(), "Directory".into()));
    }
    let name = volume.metadata.name.as_deref().unwrap_or_default();
    Err(Cause::Unsupported(format!(
        "persistentvolume {name:?} is neither csi, nfs, hostPath nor local; this node supports no others"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn check(volume: serde_json::Value, expect: Result<Kind<'_>, &str>) {
        let store = Store::new();
        store.persistent_volume_claims().put(
            serde_json::from_value(
                json!({"metadata": {"name": "data", "namespace": "shop"}, "spec": {"volumeName": "pv1"}}),
            )
            .unwrap(),
        );
        store.persistent_volume_claims().put(
            serde_json::from_value(json!({"metadata": {"name": "new", "namespace": "shop"}, "spec": {}})).unwrap(),
        );
        store.persistent_volumes().put(
            serde_json::from_value(json!({"metadata": {"name": "pv1"}, "spec": {"hostPath": {"path": "/data"}}}))
                .unwrap(),
        );
        store.persistent_volume_claims().put(
            serde_json::from_value(
                json!({"metadata": {"name": "disk", "namespace": "shop"}, "spec": {"volumeName": "pv2"}}),
            )
            .unwrap(),
        );
        store.persistent_volumes().put(
            serde_json::from_value(json!({"metadata": {"name": "pv2"}, "spec": {"local": {"path": "/disk"}}})).unwrap(),
        );
        let pod: Pod = serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "shop"}})).unwrap();
        let mut volume = volume;
        volume["name"] = json!("v");
        let volume: Volume = serde_json::from_value(volume).unwrap();
        match (kind(&volume, &pod, &store), expect) {
            (Ok(kind), Ok(expect)) => assert_eq!(kind, expect),
            (Err(cause), Err(expect)) => assert!(cause.to_string().contains(expect), "{cause}"),
            (got, expect) => panic!("{got:?} instead of {expect:?}"),
        }
    }

    /// CVE-2025-1767 too: a repository of Git brings hooks, which ran on the node.
    #[test]
    fn cve_2024_10220_no_volume_is_a_repository() {
        let repository = json!({"gitRepo": {"repository": "/home/other/repo", "directory": "..", "revision": "main"}});
        check(repository, Err("gitRepo volumes are not supported"));
    }

    #[test]
    fn kinds() {
        check(json!({}), Ok(Kind::EmptyDir { medium: Medium::Disk, size: None }));
        check(
            json!({"emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}),
            Ok(Kind::EmptyDir { medium: Medium::Memory, size: Some(1 << 20) }),
        );
        check(json!({"emptyDir": {"medium": "HugePages"}}), Err("not requested by the pod"));
        check(json!({"emptyDir": {"medium": "Paper"}}), Err("emptyDir medium \"Paper\" is not one"));
        check(json!({"hostPath": {"path": "/a/../b"}}), Err("'..'"));
        check(json!({"secret": {"secretName": "s"}}), Ok(Kind::Content { plugin: "secret", in_memory: true }));
        let source = json!({"server": "s", "path": "/", "readOnly": true});
        let share = Share::inline("v", &serde_json::from_value(source.clone()).unwrap());
        check(json!({ "nfs": source }), Ok(Kind::Nfs(share)));
        check(json!({"iscsi": {"targetPortal": "s", "iqn": "i", "lun": 0}}), Err("iscsi volumes are not supported"));
        check(json!({"image": {"reference": "r"}}), Ok(Kind::Image { reference: "r" }));
        let claim = |name: &str| json!({"persistentVolumeClaim": {"claimName": name}});
        check(claim("none"), Err("persistentvolumeclaim \"none\" not found"));
        check(claim("new"), Err("not bound"));
    }

    #[test]
    fn only_local_volumes_that_a_pod_may_write_are_its_own() {
        let made = |path: &str, kind: &str, owned, read_only| {
            Ok(Kind::HostPath { path: path.into(), kind: kind.into(), owned, read_only })
        };
        let claim =
            |name: &str, read_only: bool| json!({"persistentVolumeClaim": {"claimName": name, "readOnly": read_only}});
        check(json!({"hostPath": {"path": "/data"}}), made("/data", "", false, false));
        check(claim("data", false), made("/data", "", false, false));
        check(claim("data", true), made("/data", "", false, true));
        check(claim("disk", false), made("/disk", "Directory", true, false));
        check(claim("disk", true), made("/disk", "Directory", false, true));
    }

    #[test]
    fn huge_pages_are_of_a_size_that_the_pod_asks_for() {
        let page = |medium: &str, limits: serde_json::Value| {
            let containers = json!([{"name": "c", "resources": {"limits": limits}}]);
            let pod = serde_json::from_value(json!({"spec": {"containers": containers}})).unwrap();
            page_size(medium, &pod).ok()
        };
        let (one, two) = (json!({"hugepages-2Mi": "4Mi"}), json!({"hugepages-2Mi": "4Mi", "hugepages-1Gi": "1Gi"}));
        assert_eq!([page("HugePages", one.clone()), page("HugePages", two.clone())], [Some(2 << 20), None]);
        assert_eq!([page("HugePages-1Gi", two), page("HugePages-1Gi", one)], [Some(1 << 30), None]);
        assert_eq!(page("HugePages-", json!({"cpu": "1"})), None);
    }

    /// A claim may name any volume, and a pod any claim: whose they are, the other side has to say.
    #[test]
    fn what_belongs_to_somebody_else_is_not_mounted() {
        let store = Store::new();
        let put = |name: &str, volume: &str, phase: &str, owner: &str| {
            let owners = json!([{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": owner, "controller": true}]);
            let metadata = json!({"name": name, "namespace": "shop", "uid": name, "ownerReferences": owners});
            let claim = json!({"metadata": metadata, "spec": {"volumeName": volume}, "status": {"phase": phase}});
            store.persistent_volume_claims().put(serde_json::from_value(claim).unwrap());
        };
        put("mine", "pv1", "Bound", "u");
        put("thief", "pv1", "Bound", "u");
        put("hopeful", "pv1", "Pending", "u");
        put("p-scratch", "pv1", "Bound", "other");
        let spec =
            json!({"hostPath": {"path": "/data"}, "claimRef": {"namespace": "shop", "name": "mine", "uid": "mine"}});
        let volume = json!({"metadata": {"name": "pv1"}, "spec": spec});
        store.persistent_volumes().put(serde_json::from_value(volume).unwrap());
        let metadata = json!({"name": "p", "namespace": "shop", "uid": "u"});
        let pod: Pod = serde_json::from_value(json!({"metadata": metadata})).unwrap();
        let outcome = |source: serde_json::Value| {
            let volume: Volume = serde_json::from_value(source).unwrap();
            kind(&volume, &pod, &store).map(drop).map_err(|cause| cause.to_string())
        };
        let claim = |name: &str| outcome(json!({"name": "v", "persistentVolumeClaim": {"claimName": name}}));
        assert_eq!(claim("mine"), Ok(()));
        for name in ["thief", "hopeful"] {
            assert_eq!(claim(name), Err(format!("persistentvolumeclaim {name:?} is not bound to a volume yet")));
        }
        let error = outcome(json!({"name": "scratch", "ephemeral": {}})).unwrap_err();
        assert!(error.contains("\"p-scratch\" was not made for this pod"), "{error}");
    }

    #[test]
    fn uses_are_found_in_projections_too() {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"namespace": "shop"}, "spec": {"containers": [], "volumes": [
            {"name": "a", "configMap": {"name": "x"}},
            {"name": "b", "projected": {"sources": [{"secret": {"name": "y"}}]}}]}}))
            .unwrap();
        assert!(uses(&pod, Content::ConfigMap, &Key::new("shop", "x")));
        assert!(uses(&pod, Content::Secret, &Key::new("shop", "y")));
        assert!(!uses(&pod, Content::ConfigMap, &Key::new("other", "x")));
        assert!(!uses(&pod, Content::Secret, &Key::new("shop", "x")));
    }
}
