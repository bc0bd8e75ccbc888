//! Making the volumes of a pod, on threads.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use cluster::{Key, Store};
use k8s_openapi::api::core::v1::{Pod, Volume};

use super::csi::CsiVolume;
use super::ground::Ground;
use super::mounts::Ready;
use super::nfs::{self, Share};
use super::place::{self, FsGroup, Writable};
use super::plan::{self, Kind};
use super::{Cause, Credentials, Times, VolumeError, VolumesConfig, atomic, payload, remove};
use crate::context::uid_of;

/// Makes the volumes of one version of a pod.
#[derive(Clone)]
pub(super) struct Maker {
    pub(super) config: VolumesConfig,
    pub(super) store: Store,
    pub(super) pod: Arc<Pod>,
    pub(super) credentials: Credentials,
    pub(super) times: Arc<Times>,
}

impl Maker {
    /// The same for the pod as the store has it now.
    pub(super) fn of_latest(&self) -> Self {
        let latest = self.store.pods().get(&Key::of(&self.pod.metadata));
        let latest = latest.filter(|latest| latest.metadata.uid == self.pod.metadata.uid);
        Self { pod: latest.unwrap_or_else(|| self.pod.clone()), ..self.clone() }
    }

    /// Whether the pod uses paths of the node.
    pub(super) fn looks_outside(&self) -> bool {
        self.used().any(|volume| {
            volume.host_path.is_some() || volume.persistent_volume_claim.is_some() || volume.ephemeral.is_some()
        })
    }

    /// Whether all volumes can be used on this node.
    pub(super) fn check_place(&self) -> Result<(), VolumeError> {
        self.used().try_for_each(|volume| {
            plan::check_place(volume, &self.pod, &self.store, &self.config.node.name)
                .map_err(|cause| VolumeError { volume: volume.name.clone(), cause })
        })
    }

    /// The volumes of CSI drivers, by their names in the pod.
    pub(super) fn csi_volumes(&self) -> Result<BTreeMap<String, CsiVolume>, VolumeError> {
        let all = self.each(|_, kind| match kind {
            Kind::Csi(volume) => Ok(Some(CsiVolume::clone(volume))),
            _ => Ok(None),
        })?;
        Ok(all.into_iter().filter_map(|(name, volume)| Some((name, volume?))).collect())
    }

    /// The shares of NFS servers that are not mounted yet, by their names in the pod.
    pub(super) fn shares(&self) -> Result<BTreeMap<String, Share>, VolumeError> {
        let all = self.each(|_, kind| match kind {
            Kind::Nfs(share) if !remove::is_mountpoint(&self.dir("nfs", &share.name))? => Ok(Some(share.clone())),
            _ => Ok(None),
        })?;
        Ok(all.into_iter().filter_map(|(name, share)| Some((name, share?))).collect())
    }

    /// Looks at the paths of the node that the pod uses, makes those that it is to make, and gives those that are its own to
    /// its group. Any of them may be on a file system that does not answer.
    pub(super) fn look_outside(&self, ground: &Ground) -> Result<(), VolumeError> {
        self.each(|_, kind| match kind {
            Kind::HostPath { path, kind, owned, .. } => {
                place::host_path(path, kind)?;
                if *owned { self.group().apply(path, Writable::Yes, &|| ground.is_over()) } else { Ok(()) }
            }
            Kind::Device { path, .. } => place::host_path(path, "BlockDevice"),
            Kind::EmptyDir { .. } | Kind::Content { .. } | Kind::Csi(_) | Kind::Nfs(_) | Kind::Image { .. } => Ok(()),
        })
        .map(drop)
    }

    /// Makes every used volume, and the place of what its containers write for the node; paths of the node have been looked
    /// at. Shares that were not there before are attached.
    pub(super) fn make(&self, ground: &Ground, shares: &nfs::Mounted) -> Result<BTreeMap<String, Ready>, VolumeError> {
        let written = place::written(&self.config.paths.written(uid_of(&self.pod)));
        written.map_err(|cause| VolumeError { volume: "etc-hosts".to_owned(), cause })?;
        self.each(|name, kind| match kind {
            Kind::EmptyDir { medium, size } => {
                let path = self.dir("empty-dir", name);
                place::empty_dir(&path, *medium, place::memory_size(&self.pod, &self.config.node, *size))?;
                self.group().apply(&path, Writable::Yes, &|| ground.is_over())?;
                Ok(Ready::Path { path, read_only: false, relabel: true })
            }
            Kind::HostPath { path, read_only, owned, .. } => {
                Ok(Ready::Path { path: path.clone(), read_only: *read_only, relabel: *owned })
            }
            Kind::Content { plugin, in_memory } => {
                let path = self.dir(plugin, name);
                let files = self.files(name)?;
                place::content_dir(&path, *in_memory)?;
                place::nested_mountpoints(&path, name, &self.pod)?;
                atomic::write(&path, &files, |_| Ok(()))?;
                self.group().apply(&path, Writable::No, &|| ground.is_over())?;
                Ok(Ready::Path { path, read_only: true, relabel: true })
            }
            Kind::Device { path, read_only } => Ok(Ready::Device { path: path.clone(), read_only: *read_only }),
            Kind::Csi(volume) => {
                let (path, read_only) = (volume.target(&self.config.paths, uid_of(&self.pod)), volume.read_only);
                Ok(if volume.is_block() {
                    Ready::Device { path, read_only }
                } else {
                    Ready::Path { path, read_only, relabel: !read_only }
                })
            }
            Kind::Nfs(share) => {
                let (path, read_only) = (self.dir("nfs", &share.name), share.read_only);
                nfs::attach(&path, shares.get(name))?;
                Ok(Ready::Path { path, read_only, relabel: false })
            }
            Kind::Image { reference } => Ok(Ready::Image { reference: (*reference).to_owned() }),
        })
    }

    /// Writes the volumes with content again, all that can be; returns what keeps the others from it.
    pub(super) fn refresh(&self) -> Vec<VolumeError> {
        let visited = self.visited(|name, kind| {
            let Kind::Content { plugin, .. } = kind else { return Ok(()) };
            let (files, group) = (self.files(name)?, self.group());
            atomic::write(&self.dir(plugin, name), &files, |new| group.apply(new, Writable::No, &|| false)).map(drop)
        });
        visited.filter_map(Result::err).collect()
    }

    fn each<T>(&self, visit: impl Fn(&str, &Kind<'_>) -> Result<T, Cause>) -> Result<BTreeMap<String, T>, VolumeError> {
        if let Some(name) = plan::missing(&self.pod) {
            let cause = Cause::Invalid(format!("the pod has no volume {name:?}; add it to spec.volumes"));
            return Err(VolumeError { volume: name.to_owned(), cause });
        }
        self.visited(visit).collect()
    }

    fn visited<T>(
        &self,
        visit: impl Fn(&str, &Kind<'_>) -> Result<T, Cause>,
    ) -> impl Iterator<Item = Result<(String, T), VolumeError>> {
        self.used().map(move |volume| {
            let begun = Instant::now();
            let visited = plan::kind(volume, &self.pod, &self.store).and_then(|kind| visit(&volume.name, &kind));
            self.times.add(&volume.name, begun.elapsed());
            let visited = visited.map_err(|cause| VolumeError { volume: volume.name.clone(), cause })?;
            Ok((volume.name.clone(), visited))
        })
    }

    /// The volumes that some container uses.
    fn used(&self) -> impl Iterator<Item = &Volume> {
        let used = plan::used(&self.pod);
        pod::spec::of(&self.pod).volumes.iter().flatten().filter(move |volume| used.contains(volume.name.as_str()))
    }

    fn group(&self) -> FsGroup {
        FsGroup::of(&self.pod)
    }

    fn dir(&self, plugin: &str, name: &str) -> PathBuf {
        self.config.paths.volume(uid_of(&self.pod), plugin, name)
    }

    fn files(&self, name: &str) -> Result<payload::Files, Cause> {
        payload::of(&self.pod, name, &self.store, &self.config.node, &self.credentials)
    }
}
