//! A volume of a CSI driver, as a pod wants it. Pure.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;

use cluster::{Key, Store};
use k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, CSIVolumeSource, PersistentVolume, PersistentVolumeClaim, Pod, SecretReference,
};
use k8s_openapi::api::storage::v1::CSIDriver;
use plugin::csi::VolumeCapability;
use plugin::csi::volume_capability::access_mode::Mode;
use plugin::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use pod::quantity::Quantity;
use sha2::{Digest as _, Sha256};

use super::super::Cause;
use crate::context::uid_of;
use crate::paths::Paths;

/// A volume that a pod wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in super::super) struct CsiVolume {
    /// Who makes it.
    pub(super) driver: String,
    /// What the driver calls it.
    pub(super) handle: String,
    /// The PersistentVolume's name, or that of the pod's own volume: names the directory.
    pub(super) name: String,
    pub(super) fs_type: String,
    pub(in super::super) read_only: bool,
    pub(super) attributes: BTreeMap<String, String>,
    pub(super) mount_options: Vec<String>,
    pub(super) access_modes: Vec<String>,
    pub(super) publish_secret: Option<Key>,
    pub(super) life: Life,
}

/// How long the volume lives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Life {
    /// As long as its pod.
    Ephemeral,
    /// Longer.
    Persistent(Box<Persistent>),
}

/// What only persistent volumes have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Persistent {
    pub(super) stage_secret: Option<Key>,
    pub(super) expand_secret: Option<Key>,
    pub(super) claim: Key,
    /// The size that the driver has made it, if the node has yet to take notice.
    pub(super) grows_to: Option<String>,
    /// A device instead of a file system.
    pub(super) is_block: bool,
}

/// What a driver can do on a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Abilities {
    pub(super) stages: bool,
    pub(super) tells_stats: bool,
    pub(super) expands: bool,
    pub(super) tells_writers_apart: bool,
    pub(super) sets_group: bool,
}

impl CsiVolume {
    /// A volume that the pod's spec describes itself.
    pub(in super::super) fn inline(name: &str, source: &CSIVolumeSource, pod: &Pod) -> Self {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let secret = source.node_publish_secret_ref.as_ref();
        Self {
            driver: source.driver.clone(),
            handle: format!("csi-{}", digest([uid_of(pod), name])),
            name: name.to_owned(),
            fs_type: source.fs_type.clone().unwrap_or_default(),
            read_only: source.read_only == Some(true),
            attributes: source.volume_attributes.clone().unwrap_or_default(),
            mount_options: Vec::new(),
            access_modes: vec!["ReadWriteOnce".to_owned()],
            publish_secret: secret.map(|secret| Key::new(namespace, &secret.name)),
            life: Life::Ephemeral,
        }
    }

    /// The volume behind a claim.
    pub(in super::super) fn of_claim(
        volume: &PersistentVolume,
        source: &CSIPersistentVolumeSource,
        claim: &PersistentVolumeClaim,
        read_only: bool,
    ) -> Self {
        let spec = volume.spec.clone().unwrap_or_default();
        let persistent = Persistent {
            stage_secret: source.node_stage_secret_ref.as_ref().and_then(key_of),
            expand_secret: source.node_expand_secret_ref.as_ref().and_then(key_of),
            claim: Key::of(&claim.metadata),
            grows_to: growth(volume, claim),
            is_block: spec.volume_mode.as_deref() == Some("Block"),
        };
        Self {
            driver: source.driver.clone(),
            handle: source.volume_handle.clone(),
            name: volume.metadata.name.clone().unwrap_or_default(),
            fs_type: source.fs_type.clone().unwrap_or_default(),
            read_only: read_only || source.read_only == Some(true),
            attributes: source.volume_attributes.clone().unwrap_or_default(),
            mount_options: spec.mount_options.unwrap_or_default(),
            access_modes: spec.access_modes.unwrap_or_default(),
            publish_secret: source.node_publish_secret_ref.as_ref().and_then(key_of),
            life: Life::Persistent(Box::new(persistent)),
        }
    }

    pub(super) fn persistent(&self) -> Option<&Persistent> {
        match &self.life {
            Life::Persistent(persistent) => Some(persistent),
            Life::Ephemeral => None,
        }
    }

    pub(in super::super) fn is_block(&self) -> bool {
        self.persistent().is_some_and(|persistent| persistent.is_block)
    }

    /// `volumeLifecycleMode`, as drivers declare it.
    pub(super) fn mode(&self) -> &'static str {
        match self.life {
            Life::Ephemeral => "Ephemeral",
            Life::Persistent(_) => "Persistent",
        }
    }

    /// Where containers find it on the node.
    pub(in super::super) fn target(&self, paths: &Paths, uid: &str) -> PathBuf {
        if self.is_block() {
            return block_dir(paths).join("publish").join(&self.name).join(uid);
        }
        paths.volume(uid, "csi", &self.name).join("mount")
    }

    /// Where it is staged for all pods of the node.
    pub(super) fn staging(&self, paths: &Paths) -> PathBuf {
        if self.is_block() {
            return block_dir(paths).join("staging").join(&self.name);
        }
        staging(paths, &self.driver, &self.handle)
    }

    /// Whether the driver makes volumes that live as long as this one.
    pub(super) fn check_mode(&self, driver: Option<&CSIDriver>) -> Result<(), Cause> {
        let mode = self.mode();
        let modes = driver.map(|driver| driver.spec.volume_lifecycle_modes.clone().unwrap_or_default());
        let is_fine = match &modes {
            // Nobody has said anything, or nothing of this.
            None => mode == "Persistent",
            Some(modes) if modes.is_empty() => mode == "Persistent",
            Some(modes) => modes.iter().any(|one| one == mode),
        };
        if is_fine {
            return Ok(());
        }
        let name = &self.driver;
        Err(Cause::Unsupported(match modes {
            None => format!("volume mode {mode:?} not supported by driver {name} (no CSIDriver object)"),
            Some(modes) => format!("volume mode {mode:?} not supported by driver {name} (only supports {modes:?})"),
        }))
    }

    /// What the driver is to make of it.
    pub(super) fn capability(&self, abilities: Abilities, group: Option<i64>) -> VolumeCapability {
        let mode = self.access_modes.first().map_or("ReadWriteOnce", String::as_str);
        let mode = match (mode, abilities.tells_writers_apart) {
            ("ReadOnlyMany", _) => Mode::MultiNodeReaderOnly,
            ("ReadWriteMany", _) => Mode::MultiNodeMultiWriter,
            ("ReadWriteOncePod", true) => Mode::SingleNodeSingleWriter,
            ("ReadWriteOnce", true) => Mode::SingleNodeMultiWriter,
            _ => Mode::SingleNodeWriter,
        };
        let access = if self.is_block() {
            AccessType::Block(BlockVolume {})
        } else {
            AccessType::Mount(MountVolume {
                fs_type: self.fs_type.clone(),
                mount_flags: self.mount_options.clone(),
                volume_mount_group: group.filter(|_| abilities.sets_group).map(|id| id.to_string()).unwrap_or_default(),
            })
        };
        VolumeCapability { access_type: Some(access), access_mode: Some(AccessMode { mode: mode.into() }) }
    }

    /// Whether the node gives the files to the pod's group, as the driver's `fsGroupPolicy` says.
    pub(super) fn takes_group(&self, driver: Option<&CSIDriver>, abilities: Abilities) -> bool {
        if abilities.sets_group || self.read_only || self.is_block() {
            return false;
        }
        let policy = driver.and_then(|driver| driver.spec.fs_group_policy.as_deref());
        match policy.unwrap_or("ReadWriteOnceWithFSType") {
            "File" => true,
            "None" => false,
            _ => {
                let once = |mode: &String| mode == "ReadWriteOnce" || mode == "ReadWriteOncePod";
                !self.fs_type.is_empty() && self.access_modes.iter().any(once)
            }
        }
    }

    /// The volume's attributes, with what the driver wants to know of the pod.
    pub(super) fn context(&self, driver: Option<&CSIDriver>, pod: &Pod) -> HashMap<String, String> {
        let mut context: HashMap<String, String> = self.attributes.clone().into_iter().collect();
        if driver.is_some_and(|driver| driver.spec.pod_info_on_mount == Some(true)) {
            let text = |value: &Option<String>| value.clone().unwrap_or_default();
            let account = text(&pod::spec::of(pod).service_account_name);
            let about = [
                ("pod.name", text(&pod.metadata.name)),
                ("pod.namespace", text(&pod.metadata.namespace)),
                ("pod.uid", uid_of(pod).to_owned()),
                ("serviceAccount.name", account),
                ("ephemeral", (self.mode() == "Ephemeral").to_string()),
            ];
            context.extend(about.map(|(name, value)| (format!("csi.storage.k8s.io/{name}"), value)));
        }
        context
    }

    /// The name by which nodes and the attach/detach controller speak of it.
    pub(super) fn unique_name(&self) -> String {
        unique_name(&self.driver, &self.handle)
    }

    /// The name of its attachment to a node.
    pub(super) fn attachment(&self, node: &str) -> String {
        format!("csi-{}", digest([self.handle.as_str(), &self.driver, node]))
    }
}

/// As [`CsiVolume::unique_name`].
pub(super) fn unique_name(driver: &str, handle: &str) -> String {
    format!("kubernetes.io/csi/{driver}^{handle}")
}

/// Where a volume with a file system is staged.
pub(super) fn staging(paths: &Paths, driver: &str, handle: &str) -> PathBuf {
    paths.plugins().join("kubernetes.io/csi").join(driver).join(digest([handle])).join("globalmount")
}

/// Where devices are.
pub(super) fn block_dir(paths: &Paths) -> PathBuf {
    paths.plugins().join("kubernetes.io/csi/volumeDevices")
}

/// What is known of a device, for all pods that have it.
pub(super) fn device_dir(paths: &Paths, name: &str) -> PathBuf {
    block_dir(paths).join(name)
}

/// The data of a Secret, as drivers get it.
pub(super) fn secret(store: &Store, key: Option<&Key>) -> Result<HashMap<String, String>, Cause> {
    let Some(key) = key else { return Ok(HashMap::new()) };
    let missing = || Cause::NotFound { kind: "secret", name: key.to_string() };
    let secret = store.secrets().get(key).ok_or_else(missing)?;
    let text = |(name, value): (&String, &k8s_openapi::ByteString)| {
        (name.clone(), String::from_utf8_lossy(&value.0).into_owned())
    };
    Ok(secret.data.iter().flatten().map(text).collect())
}

fn key_of(secret: &SecretReference) -> Option<Key> {
    Some(Key::new(secret.namespace.as_deref()?, secret.name.as_deref()?))
}

/// The size of the volume if the claim does not know of it yet.
fn growth(volume: &PersistentVolume, claim: &PersistentVolumeClaim) -> Option<String> {
    let made = volume.spec.as_ref()?.capacity.as_ref()?.get("storage")?;
    let known = claim.status.as_ref()?.capacity.as_ref()?.get("storage")?;
    let size = |text: &str| Quantity::parse(text).ok();
    (size(&made.0)? > size(&known.0)?).then(|| made.0.clone())
}

/// SHA-256 of what stands together, in hex.
fn digest<const N: usize>(parts: [&str; N]) -> String {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn volume(spec: Value, claim: Value) -> CsiVolume {
        let mut pv: PersistentVolume =
            serde_json::from_value(json!({"metadata": {"name": "pv1"}, "spec": spec})).unwrap();
        let source = json!({"driver": "d.example", "volumeHandle": "h", "fsType": "ext4"});
        pv.spec.as_mut().unwrap().csi = Some(serde_json::from_value(source).unwrap());
        let claim = serde_json::from_value(
            json!({"metadata": {"name": "data", "namespace": "shop"}, "spec": {}, "status": claim}),
        )
        .unwrap();
        CsiVolume::of_claim(&pv, pv.spec.as_ref().unwrap().csi.as_ref().unwrap(), &claim, false)
    }

    fn driver(spec: Value) -> CSIDriver {
        serde_json::from_value(json!({"metadata": {"name": "d.example"}, "spec": spec})).unwrap()
    }

    #[test]
    fn names_are_upstreams() {
        let paths = Paths { root: "/k".into(), logs: "/l".into() };
        let volume = volume(json!({"accessModes": ["ReadWriteOnce"]}), json!({}));
        assert_eq!(volume.target(&paths, "u"), PathBuf::from("/k/pods/u/volumes/kubernetes.io~csi/pv1/mount"));
        // The SHA-256 of "h".
        let sha = "aaa9402664f1a41f40ebbc52c9993eb66aeb366602958fdfaa283b71e64db123";
        let staged = format!("/k/plugins/kubernetes.io/csi/d.example/{sha}/globalmount");
        assert_eq!(volume.staging(&paths), PathBuf::from(staged));
        assert_eq!(volume.unique_name(), "kubernetes.io/csi/d.example^h");
        assert_eq!(volume.attachment("n1").len(), "csi-".len() + 64);
    }

    #[test]
    fn access_modes() {
        let mode = |mode: &str, apart: bool| {
            let volume = volume(json!({"accessModes": [mode]}), json!({}));
            let abilities = Abilities { tells_writers_apart: apart, ..Abilities::default() };
            volume.capability(abilities, None).access_mode.unwrap().mode()
        };
        assert_eq!(mode("ReadWriteOnce", false), Mode::SingleNodeWriter);
        assert_eq!(mode("ReadWriteOnce", true), Mode::SingleNodeMultiWriter);
        assert_eq!(mode("ReadWriteOncePod", false), Mode::SingleNodeWriter);
        assert_eq!(mode("ReadWriteOncePod", true), Mode::SingleNodeSingleWriter);
        assert_eq!(mode("ReadOnlyMany", true), Mode::MultiNodeReaderOnly);
        assert_eq!(mode("ReadWriteMany", true), Mode::MultiNodeMultiWriter);
    }

    #[test]
    fn whose_the_files_are() {
        let takes = |modes: Value, policy: Option<&str>, sets_group: bool| {
            let driver = policy.map(|policy| driver(json!({"fsGroupPolicy": policy})));
            let abilities = Abilities { sets_group, ..Abilities::default() };
            volume(json!({"accessModes": modes}), json!({})).takes_group(driver.as_ref(), abilities)
        };
        let (once, many) = (json!(["ReadWriteOnce"]), json!(["ReadWriteMany"]));
        assert!(takes(once.clone(), None, false) && !takes(many.clone(), None, false));
        assert!(takes(many.clone(), Some("File"), false) && !takes(once.clone(), Some("None"), false));
        assert!(!takes(many, Some("ReadWriteOnceWithFSType"), false));
        assert!(!takes(once, Some("File"), true), "the driver does it");
    }

    #[test]
    fn lives() {
        let pod: Pod =
            serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "shop", "uid": "u"}})).unwrap();
        let source = serde_json::from_value(json!({"driver": "d.example"})).unwrap();
        let inline = CsiVolume::inline("v", &source, &pod);
        let persistent = volume(json!({}), json!({}));
        let both = driver(json!({"volumeLifecycleModes": ["Persistent", "Ephemeral"], "podInfoOnMount": true}));
        assert!(inline.check_mode(Some(&both)).is_ok() && persistent.check_mode(None).is_ok());
        let error = inline.check_mode(None).unwrap_err().to_string();
        assert_eq!(error, "volume mode \"Ephemeral\" not supported by driver d.example (no CSIDriver object)");
        assert!(inline.check_mode(Some(&driver(json!({})))).is_err(), "persistent is the default");
        let context = inline.context(Some(&both), &pod);
        assert_eq!(context["csi.storage.k8s.io/ephemeral"], "true");
        assert_eq!(context["csi.storage.k8s.io/pod.uid"], "u");
        assert!(persistent.context(None, &pod).is_empty());
    }

    #[test]
    fn growth_that_the_node_has_yet_to_see() {
        let grows = |made: &str, known: Value| {
            let volume = volume(json!({"capacity": {"storage": made}}), known);
            volume.persistent().unwrap().grows_to.clone()
        };
        let known = |size: &str| json!({"capacity": {"storage": size}});
        assert_eq!(grows("2Gi", known("1Gi")).as_deref(), Some("2Gi"));
        assert_eq!(grows("1Gi", known("1024Mi")), None);
        assert_eq!(grows("1Gi", json!({})), None, "it is not bound yet");
    }
}
