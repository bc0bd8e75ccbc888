//! Images: registry client, content store, confined unpack, overlay root file systems, garbage collection.
//!
//! ```text
//! reference ─► hosts.toml ─► manifest ─┬► layer: network ─► hash ─┤pipe├► inflate ─► hash ─► files   (confined child)
//!                                      └► layer: …
//! image ─► rootfs: overlay of its layers as a detached mount, an OwnedFd
//! ```
//!
//! [`Images`] owns one directory. A layer is known by the digest of the bytes it was made of, is unpacked once and
//! shared by all images that name it. A program that uses this crate calls [`worker::maybe_run`] first in `main`.

mod config;
pub mod credentials;
mod digest;
mod error;
mod progress;
mod reference;
pub mod spec;
pub mod worker;

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

pub use config::{Auth, Config, Limits};
pub use digest::{Algorithm, Digest, Hasher, InvalidDigest};
pub use error::Error;
pub use progress::{Event, Progress, Silent};
pub use reference::{InvalidReference, Reference};
pub use spec::ImageConfig;

/// The image store of one node.
#[derive(Debug)]
pub struct Images {}

/// An image in the store. Its id is the digest of its configuration, as everywhere in CRI.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Digest of the configuration.
    pub id: Digest,
    /// Normalised names with tags: `docker.io/library/busybox:latest`.
    pub repo_tags: Vec<String>,
    /// Normalised names with digests: `docker.io/library/busybox@sha256:…`.
    pub repo_digests: Vec<String>,
    /// Bytes that its layers take on disk.
    pub size_bytes: u64,
    /// Garbage collection leaves it alone.
    pub pinned: bool,
    /// When it came into the store.
    pub stored_at: SystemTime,
    /// When a container was last made from it, or it was last pulled.
    pub used_at: SystemTime,
    /// How to run it.
    pub config: Arc<ImageConfig>,
}

/// How a root file system is to be mounted.
#[derive(Debug, Default)]
pub struct RootfsOptions {
    /// The mount itself refuses writes. An executor that must create mount points first sets this later by itself.
    pub read_only: bool,
    /// A user namespace whose mapping the files are to be seen through.
    pub user_namespace: Option<OwnedFd>,
    /// The SELinux or other `context=` the mount gets.
    pub mount_label: Option<String>,
}

/// A container's root file system.
#[derive(Debug)]
pub struct Rootfs {
    /// A detached mount: it vanishes with the last descriptor and process that uses it.
    pub mount: OwnedFd,
    /// The image it was made from.
    pub image: Arc<Image>,
}

/// Bytes and inodes on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes allocated.
    pub bytes: u64,
    /// Inodes used.
    pub inodes: u64,
}

/// When images are removed, in upstream's words (`imageGCHighThresholdPercent` and so on).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GcPolicy {
    /// Nothing happens below this usage of the file system.
    pub high_threshold_percent: u8,
    /// Images go until usage is below this.
    pub low_threshold_percent: u8,
    /// Younger images stay.
    pub minimum_age: Duration,
    /// Images unused for longer go whatever the usage is. None: never.
    pub maximum_age: Option<Duration>,
}

impl Default for GcPolicy {
    fn default() -> Self {
        Self {
            high_threshold_percent: 85,
            low_threshold_percent: 80,
            minimum_age: Duration::from_secs(120),
            maximum_age: None,
        }
    }
}

/// What garbage collection did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Reclaimed {
    /// The images that went.
    pub images: Vec<Digest>,
    /// Bytes freed on disk.
    pub bytes: u64,
    /// Bytes that should have been freed beyond that, but everything left is in use, pinned or young.
    pub missing_bytes: u64,
}

/// A file or directory in the store that nothing owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unowned {
    /// Where.
    pub path: std::path::PathBuf,
    /// Bytes it takes.
    pub bytes: u64,
    /// Why nothing owns it.
    pub reason: &'static str,
}

impl Images {
    /// Opens (or makes) the store in `config.state_dir`, takes its lock and sweeps what a crash has left half done.
    pub fn open(config: Config) -> Result<Arc<Self>, Error> {
        Err(Error::Locked { path: config.state_dir })
    }

    /// Brings `reference` from its registry into the store and returns its image.
    ///
    /// Asks the registry even if an image of that name is in the store; layers that are there are not fetched again.
    /// Without `auth` the node's docker `config.json` is consulted. Safe to drop: what is shared with other pulls goes
    /// on, the rest stops.
    pub async fn pull(
        &self,
        reference: &Reference,
        _auth: Option<Auth>,
        _progress: &dyn Progress,
    ) -> Result<Arc<Image>, Error> {
        Err(Error::NoSuchImage(reference.to_string()))
    }

    /// The image of a name, a name with digest, an id (`sha256:…`, hex, or an unambiguous prefix of at least 6 digits).
    pub fn get(&self, _name: &str) -> Option<Arc<Image>> {
        None
    }

    /// All images, by id.
    pub fn list(&self) -> Vec<Arc<Image>> {
        Vec::new()
    }

    /// Removes an image with all its names, and the layers that nothing else needs. Unknown names are fine: false.
    pub async fn remove(&self, _name: &str) -> Result<bool, Error> {
        Ok(false)
    }

    /// Takes one name off an image; the image goes with its last name. Unknown names are fine: false.
    pub async fn untag(&self, _reference: &Reference) -> Result<bool, Error> {
        Ok(false)
    }

    /// Gives an image one more name.
    pub fn tag(&self, name: &str, _reference: &Reference) -> Result<(), Error> {
        Err(Error::NoSuchImage(name.into()))
    }

    /// Keeps an image from garbage collection, or lets it go again.
    pub fn pin(&self, name: &str, _pinned: bool) -> Result<(), Error> {
        Err(Error::NoSuchImage(name.into()))
    }

    /// Loads the images of an OCI layout (directory or tar archive) or a `docker save` archive. They come pinned:
    /// nobody can fetch them again.
    pub async fn load(&self, path: &Path, _progress: &dyn Progress) -> Result<Vec<Arc<Image>>, Error> {
        Err(Error::NoSuchImage(path.display().to_string()))
    }

    /// What the images take on disk.
    pub fn usage(&self) -> Usage {
        Usage::default()
    }

    /// What a container has written into its root file system. Walks it: not for the hot path.
    pub async fn writable_usage(&self, container_id: &str) -> Result<Usage, Error> {
        Err(Error::NoSuchImage(container_id.into()))
    }

    /// Removes unused images by `policy`; `in_use` are ids that containers need.
    pub async fn collect_garbage(&self, _policy: &GcPolicy, _in_use: &HashSet<Digest>) -> Result<Reclaimed, Error> {
        Ok(Reclaimed::default())
    }

    /// Removes every image that is neither in use nor pinned, whatever the disk looks like.
    pub async fn remove_unused(&self, _in_use: &HashSet<Digest>) -> Result<Reclaimed, Error> {
        Ok(Reclaimed::default())
    }

    /// Mounts the root file system of a container. The second call for one container sees what the first has
    /// written; the first mount must be gone by then. Blocks for well under a millisecond.
    pub fn rootfs(&self, image: &Digest, _container_id: &str, _options: RootfsOptions) -> Result<Rootfs, Error> {
        Err(Error::NoSuchImage(image.to_string()))
    }

    /// Removes what a container has written. Unknown containers are fine.
    pub async fn release(&self, _container_id: &str) -> Result<(), Error> {
        Ok(())
    }

    /// The containers that have a root file system in the store.
    pub fn rootfs_owners(&self) -> Vec<String> {
        Vec::new()
    }

    /// Mounts an image, or the part of it below `sub_path`, read-only as a detached mount (image volumes).
    pub fn mount_image(&self, image: &Digest, _sub_path: &str) -> Result<OwnedFd, Error> {
        Err(Error::NoSuchImage(image.to_string()))
    }

    /// Everything in the store that nothing owns. Nothing is changed.
    pub fn fsck(&self) -> Result<Vec<Unowned>, Error> {
        Ok(Vec::new())
    }
}
