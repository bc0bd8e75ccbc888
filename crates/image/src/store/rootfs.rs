//! Root file systems of containers: what each has written, and the overlay over its image's layers.

use std::fs;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sys::overlay::{self, Overlay, Restrict};
use sys::tree::Dir;

use super::{Store, Temporary, create_private, read_json, remove_tree};
use crate::digest::Digest;
use crate::error::Error;
use crate::{RootfsOptions, Usage};

/// What a container's root file system is made of: its layers must stay as long as it does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Owner {
    pub(crate) image: Digest,
    pub(crate) layers: Vec<Digest>,
}

/// What a container that is gone had written.
#[derive(Debug)]
pub(crate) struct Written(Temporary);

impl Written {
    /// Removes it for good, which may wait for the disk.
    pub(crate) fn remove(self) -> Result<(), Error> {
        remove_tree(&self.0.path)
    }
}

impl Store {
    fn rootfs_dir(&self, container_id: &str) -> Result<PathBuf, Error> {
        let safe = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        if container_id.is_empty() || container_id.starts_with('.') || !container_id.bytes().all(safe) {
            return Err(Error::BadSubPath {
                image: "rootfs".into(),
                path: container_id.into(),
                reason: "is no container id".into(),
            });
        }
        Ok(self.root.join("rootfs").join(container_id))
    }

    /// Mounts the root file system of a container.
    pub(crate) fn mount_rootfs(
        &self,
        container_id: &str,
        owner: &Owner,
        options: &RootfsOptions,
    ) -> Result<OwnedFd, Error> {
        let directory = self.rootfs_dir(container_id)?;
        let (upper, work) = (directory.join("fs"), directory.join("work"));
        create_private(&directory)?;
        self.put_json(&directory.join("rootfs.json"), owner)?;
        let fresh = !upper.exists();
        // What a volatile mount leaves in its work directory forbids a second mount; nothing in it is worth keeping.
        remove_tree(&work)?;
        for path in [&upper, &work] {
            fs::create_dir(path).or_else(exists_is_fine).map_err(|e| Error::store("make the directory", path, e))?;
        }
        let lower = self.open_layers(&owner.layers, options).map_err(|(step, e)| mount_error(container_id, step, e))?;
        if fresh {
            inherit(&upper, lower.first()).map_err(|e| Error::store("describe", &upper, e))?;
        }
        let overlay = Overlay { lower: &lower, upper: Some((&upper, &work)), label: options.mount_label.as_deref() };
        let scratch = directory.join("mount");
        create_private(&scratch)?;
        let restrict = Restrict { read_only: options.read_only, inert: false };
        overlay
            .mount(restrict, &scratch)
            .map_err(|e| mount_error(container_id, format!("overlay of {} layers", lower.len()), e))
    }

    /// The topmost first, as overlayfs wants them.
    fn open_layers(
        &self,
        layers: &[Digest],
        options: &RootfsOptions,
    ) -> Result<Vec<OwnedFd>, (String, std::io::Error)> {
        let open = |blob: &Digest| {
            let tree = self.layer_tree(blob);
            let opened = match &options.user_namespace {
                None => overlay::layer(&tree),
                Some(namespace) => overlay::idmapped_layer(&tree, namespace.as_fd()),
            };
            opened.map_err(|e| {
                (
                    format!(
                        "opening layer {blob}{}",
                        if options.user_namespace.is_some() { " through the user namespace's mapping" } else { "" }
                    ),
                    e,
                )
            })
        };
        layers.iter().rev().map(open).collect()
    }

    /// Mounts an image read-only and inert. Its programs can be run, as everywhere else: a volume may be what brings them.
    pub(crate) fn mount_volume(
        &self,
        image: &Digest,
        layers: &[Digest],
        sub_path: &str,
        label: Option<&str>,
    ) -> Result<OwnedFd, Error> {
        let what = image.to_string();
        let scratch = self.stage()?;
        let restrict = Restrict { read_only: true, inert: true };
        let mount = match layers {
            // A label is the whole file system's, which would be the store's.
            [single] if label.is_none() => {
                overlay::bind(&self.layer_tree(single), restrict).map_err(|e| mount_error(&what, "bind".into(), e))?
            }
            _ => {
                let mut lower = self
                    .open_layers(layers, &RootfsOptions::default())
                    .map_err(|(step, e)| mount_error(&what, step, e))?;
                if lower.len() == 1 {
                    let empty = scratch.path().join("empty");
                    create_private(&empty)?;
                    let empty = overlay::layer(&empty).map_err(|e| mount_error(&what, "an empty layer".into(), e))?;
                    lower.push(empty);
                }
                let overlay = Overlay { lower: &lower, upper: None, label };
                overlay
                    .mount(restrict, scratch.path())
                    .map_err(|e| mount_error(&what, format!("read-only overlay of {} layers", lower.len()), e))?
            }
        };
        if sub_path.is_empty() {
            return Ok(mount);
        }
        sub_mount(&mount, image, sub_path, scratch.path())
    }

    /// Removes what a container has written.
    pub(crate) fn remove_rootfs(&self, container_id: &str) -> Result<(), Error> {
        self.discard(&self.rootfs_dir(container_id)?)
    }

    /// Takes what a container has written out of sight; none if there is nothing.
    pub(crate) fn take_out_rootfs(&self, container_id: &str) -> Result<Option<Written>, Error> {
        Ok(self.take_out(&self.rootfs_dir(container_id)?)?.map(Written))
    }

    /// All root file systems by container.
    pub(crate) fn rootfs_owners(&self) -> Vec<(String, Option<Owner>)> {
        let Ok(entries) = fs::read_dir(self.root.join("rootfs")) else { return Vec::new() };
        let named = entries.flatten().filter_map(|entry| {
            Some((entry.file_name().into_string().ok()?, read_json(&entry.path().join("rootfs.json"))))
        });
        named.collect()
    }

    /// What a container has written.
    pub(crate) fn rootfs_usage(&self, container_id: &str) -> Result<Usage, Error> {
        let upper = self.rootfs_dir(container_id)?.join("fs");
        let measured = Dir::open(&upper).and_then(|dir| dir.totals());
        let measured = measured.map(|totals| Usage { bytes: totals.bytes, inodes: totals.inodes });
        measured.map_err(|e| Error::store("measure", upper, e))
    }
}

fn mount_error(what: &str, step: String, source: std::io::Error) -> Error {
    Error::Mount { what: what.to_owned(), step, source: Arc::new(source) }
}

fn exists_is_fine(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::AlreadyExists { Ok(()) } else { Err(error) }
}

/// The root directory that a container sees is the upper one: it gets owner and mode of the image's.
fn inherit(upper: &Path, top: Option<&OwnedFd>) -> std::io::Result<()> {
    let Some(top) = top else { return Ok(()) };
    // Through an idmapped mount the owner is the mapped one already.
    let meta = sys::tree::meta(top.as_fd())?;
    let upper = Dir::open(upper)?;
    sys::tree::set_owner(upper.as_fd(), meta.uid, meta.gid)?;
    sys::tree::set_mode(upper.as_fd(), meta.mode)
}

fn sub_mount(mount: &OwnedFd, image: &Digest, sub_path: &str, scratch: &Path) -> Result<OwnedFd, Error> {
    let bad = |reason: String| Error::BadSubPath { image: image.to_string(), path: sub_path.to_owned(), reason };
    let climbs = sub_path.split('/').any(|component| component == "..");
    if climbs || sub_path.starts_with('/') {
        return Err(bad("must be a relative path without \"..\"".into()));
    }
    let root = mount.try_clone().map_err(|e| bad(e.to_string()))?;
    let place = Dir::from(root).place_in_root(Path::new(sub_path)).map_err(|e| bad(e.to_string()))?;
    overlay::part(mount, &place, Path::new(sub_path), scratch)
        .map_err(|e| mount_error(&image.to_string(), format!("mounting {sub_path:?}"), e))
}
