//! From a pod's volumes to what its containers mount.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use cri::v1;
use k8s_openapi::api::core::v1::{Container, VolumeMount};

use super::ground::Ground;
use super::{Cause, VolumeError, subpath};
use crate::env::Environment;
use crate::paths::Paths;
use crate::threads::patient;

/// A volume that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ready {
    /// A file or directory of the node; `relabel` if it is the pod's own, to be labelled for it where there is SELinux.
    Path { path: PathBuf, read_only: bool, relabel: bool },
    /// A device of the node.
    Device { path: PathBuf, read_only: bool },
    /// An image; the runtime mounts it.
    Image { reference: String },
}

/// The volumes of one pod, ready to be mounted.
#[derive(Debug, Clone)]
pub struct PodVolumes {
    pub(super) uid: String,
    pub(super) paths: Paths,
    pub(super) recursive_read_only: bool,
    pub(super) volumes: BTreeMap<String, Ready>,
    pub(super) ground: Arc<Ground>,
}

/// A mount that is made when its sub-path is bound to its place.
struct Planned {
    volume: String,
    mount: v1::Mount,
    sub_path: Option<subpath::SubPath>,
}

impl PodVolumes {
    /// Where the volumes are on the node, by name; volumes of images are not.
    pub fn host_paths(&self) -> BTreeMap<String, PathBuf> {
        let paths = self.volumes.iter().filter_map(|(name, ready)| match ready {
            Ready::Path { path, .. } => Some((name.clone(), path.clone())),
            Ready::Device { .. } | Ready::Image { .. } => None,
        });
        paths.collect()
    }

    /// Says what the pulled image of an image volume is called.
    pub fn set_image(&mut self, volume: &str, image_ref: &str) {
        if let Some(Ready::Image { reference }) = self.volumes.get_mut(volume) {
            image_ref.clone_into(reference);
        }
    }

    /// What a container mounts; `environment` is its own (`subPathExpr`). Sub-paths are resolved, made and bound here.
    ///
    /// # Errors
    /// A mount that is invalid, or a sub-path that leads out of its volume.
    pub async fn mounts_for(
        &self,
        container: &Container,
        environment: &Environment,
    ) -> Result<Vec<v1::Mount>, VolumeError> {
        let mut planned = self.plan(container, environment)?;
        let of = |volume: &str| {
            let volume = volume.to_owned();
            move |cause: Cause| VolumeError { volume, cause }
        };
        for one in &mut planned {
            let Some(sub_path) = one.sub_path.take() else { continue };
            // The volume may be on a file system that does not answer: nobody else waits for it.
            let (found, target) = patient(move || (sub_path.find(), sub_path.target))
                .await
                .map_err(|error| of(&one.volume)(error.into()))?;
            let found = found.map_err(of(&one.volume))?;
            one.mount.host_path = target.to_string_lossy().into_owned();
            self.ground.alone(move || found.bind(&target)).await.map_err(of(&one.volume))?;
        }
        Ok(planned.into_iter().map(|one| one.mount).collect())
    }

    /// The devices that a container uses (`volumeDevices`).
    ///
    /// # Errors
    /// A volume that is no device.
    pub fn devices_for(&self, container: &Container) -> Result<Vec<v1::Device>, VolumeError> {
        let devices = container.volume_devices.iter().flatten().map(|device| match self.volumes.get(&device.name) {
            Some(Ready::Device { path, read_only }) => Ok(v1::Device {
                container_path: device.device_path.clone(),
                host_path: path.to_string_lossy().into_owned(),
                permissions: if *read_only { "r" } else { "mrw" }.to_owned(),
            }),
            _ => {
                let cause =
                    Cause::Invalid("it is no device; mount it by volumeMounts, or set volumeMode: Block".into());
                Err(VolumeError { volume: device.name.clone(), cause })
            }
        });
        devices.collect()
    }

    fn plan(&self, container: &Container, environment: &Environment) -> Result<Vec<Planned>, VolumeError> {
        let mounts = container.volume_mounts.iter().flatten().enumerate();
        let planned = mounts.map(|(index, mount)| {
            let planned = self.plan_one(&container.name, index, mount, environment);
            planned.map_err(|cause| VolumeError { volume: mount.name.clone(), cause })
        });
        planned.collect()
    }

    fn plan_one(
        &self,
        container: &str,
        index: usize,
        mount: &VolumeMount,
        environment: &Environment,
    ) -> Result<Planned, Cause> {
        let Some(ready) = self.volumes.get(&mount.name) else {
            return Err(Cause::Unmade { volume: mount.name.clone(), container: container.to_owned() });
        };
        let propagation = propagation(mount)?;
        let mut planned = Planned {
            volume: mount.name.clone(),
            mount: v1::Mount {
                container_path: absolute(&mount.mount_path),
                readonly: mount.read_only == Some(true),
                propagation: propagation.into(),
                mount_options: mount.bind_mount_options.clone().unwrap_or_default(),
                recursive_read_only: self.recursive_read_only(mount, propagation)?,
                ..v1::Mount::default()
            },
            sub_path: None,
        };
        let sub_path = subpath::of(mount, environment)?;
        match ready {
            Ready::Device { .. } => {
                return Err(Cause::Invalid("it is a device; use it by volumeDevices".into()));
            }
            Ready::Image { reference } => {
                planned.mount.image = Some(v1::ImageSpec { image: reference.clone(), ..v1::ImageSpec::default() });
                planned.mount.image_sub_path =
                    sub_path.map(|path| path.to_string_lossy().into_owned()).unwrap_or_default();
                planned.mount.readonly = true;
            }
            Ready::Path { path: volume, read_only, relabel } => {
                planned.mount.host_path = volume.to_string_lossy().into_owned();
                planned.mount.readonly |= read_only;
                planned.mount.selinux_relabel = *relabel && sys::kernel::has_selinux();
                let target = || self.paths.sub_path(&self.uid, &mount.name, container, index);
                let sub_path = sub_path.map(|path| subpath::SubPath {
                    volume: volume.clone(),
                    path,
                    target: target(),
                    propagation,
                });
                planned.sub_path = sub_path;
            }
        }
        Ok(planned)
    }

    fn recursive_read_only(&self, mount: &VolumeMount, propagation: v1::MountPropagation) -> Result<bool, Cause> {
        let possible = mount.read_only == Some(true) && propagation == v1::MountPropagation::PropagationPrivate;
        match mount.recursive_read_only.as_deref().unwrap_or("Disabled") {
            "Disabled" => Ok(false),
            "IfPossible" => Ok(possible && self.recursive_read_only),
            "Enabled" if !self.recursive_read_only => {
                Err(Cause::Unsupported("recursiveReadOnly: the runtime cannot make recursive read-only mounts".into()))
            }
            "Enabled" if possible => Ok(true),
            "Enabled" => Err(Cause::Invalid("recursiveReadOnly needs readOnly: true and no mountPropagation".into())),
            other => Err(Cause::Invalid(format!("recursiveReadOnly has no value {other:?}"))),
        }
    }
}

fn propagation(mount: &VolumeMount) -> Result<v1::MountPropagation, Cause> {
    match mount.mount_propagation.as_deref() {
        None | Some("None") => Ok(v1::MountPropagation::PropagationPrivate),
        Some("HostToContainer") => Ok(v1::MountPropagation::PropagationHostToContainer),
        Some("Bidirectional") => Ok(v1::MountPropagation::PropagationBidirectional),
        Some(other) => Err(Cause::Invalid(format!("mountPropagation has no value {other:?}"))),
    }
}

fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

/// The volumes that a container's mounts name.
pub(super) fn mounted(container: &Container) -> BTreeSet<&str> {
    let mounts = container.volume_mounts.iter().flatten().map(|mount| mount.name.as_str());
    mounts.chain(container.volume_devices.iter().flatten().map(|device| device.name.as_str())).collect()
}
