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

mod child;
mod config;
pub mod credentials;
mod digest;
mod duration;
mod error;
mod flights;
#[cfg(test)]
mod fuzz;
mod index;
mod layers;
mod load;
mod manifest;
mod progress;
mod pull;
mod reference;
mod registry;
pub mod spec;
mod store;
mod unpack;
pub mod worker;

/// Tests hold parsers to a bound of memory.
#[cfg(test)]
#[global_allocator]
static METER: sys::meter::Meter = sys::meter::Meter;

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use flights::Flights;
use index::Index;
use store::Store;
use store::layers::Layer;
use store::rootfs::Owner;
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

pub use config::{Auth, Config, Limits};
pub use digest::{Algorithm, Digest, Hasher, InvalidDigest};
pub use error::Error;
pub use progress::{Event, Progress, Silent};
pub use reference::{InvalidReference, Reference};
pub use spec::ImageConfig;

/// The image store of one node.
#[derive(Debug)]
pub struct Images {
    config: Config,
    store: Store,
    /// What the store holds, by image id. Held for look-ups and after a record has changed, never over an await or the disk.
    index: Mutex<Index>,
    /// Held while records change, on disk and then in the index. Taken where waiting for the disk holds up nobody, and before
    /// all other locks.
    changes: Mutex<()>,
    /// Layers on their way, by where they come from and blob: a hung registry holds up nobody who asks another one.
    flights: Flights<(String, Digest), Layer>,
    /// Layers and documents that a pull or load counts on before its image is recorded, with how many count on them.
    reserved: Mutex<Reserved>,
    /// The layers that root file systems stand on.
    rootfs: Mutex<HashMap<String, Owner>>,
    /// Writing layers out to disk after pulls, and removing what containers have written.
    background: TaskTracker,
    /// Dropping it ends the wait before layers are written out.
    hurry_write_out: Mutex<Option<oneshot::Sender<()>>>,
}

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
    /// Called inside a tokio runtime.
    pub fn open(config: Config) -> Result<Arc<Self>, Error> {
        let store = Store::open(&config.state_dir)?;
        for layer in store.sweep_doubtful_layers()? {
            tracing::warn!(%layer, "removed a layer that a power failure may have damaged");
        }
        let index = Index::new(store.records());
        store.drop_incomplete_records(&index.ids())?;
        let rootfs =
            store.rootfs_owners().into_iter().filter_map(|(container, owner)| Some((container, owner?))).collect();
        let images = Arc::new(Self {
            config,
            store,
            index: Mutex::new(index),
            changes: Mutex::default(),
            flights: Flights::default(),
            reserved: Mutex::default(),
            rootfs: Mutex::new(rootfs),
            background: TaskTracker::new(),
            hurry_write_out: Mutex::default(),
        });
        if !images.store.layers_in_memory().is_empty() {
            images.write_out_later();
        }
        Ok(images)
    }

    /// Brings `reference` from its registry into the store and returns its image.
    ///
    /// Asks the registry even if an image of that name is in the store; layers that are there are not fetched again.
    /// Without `auth` the node's docker `config.json` is consulted. Safe to drop: what is shared with other pulls goes
    /// on, the rest stops.
    pub async fn pull(
        self: &Arc<Self>,
        reference: &Reference,
        auth: Option<Auth>,
        progress: &dyn Progress,
    ) -> Result<Arc<Image>, Error> {
        self.pull_image(reference, auth, progress).await
    }

    /// The image of a name, a name with digest, an id (`sha256:…`, hex, or an unambiguous prefix of at least 6 digits).
    pub fn get(&self, name: &str) -> Option<Arc<Image>> {
        self.index().find(name).map(|stored| Arc::clone(&stored.image))
    }

    /// All images, by id.
    pub fn list(&self) -> Vec<Arc<Image>> {
        self.index().all().map(|stored| Arc::clone(&stored.image)).collect()
    }

    /// Removes an image with all its names, and the layers that nothing else needs. Unknown names are fine: false.
    pub async fn remove(self: &Arc<Self>, name: &str) -> Result<bool, Error> {
        let Some(image) = self.get(name) else { return Ok(false) };
        self.blocking(move |images| {
            images.forget(&image.id)?;
            images.sweep().map(|_| true)
        })
        .await
    }

    /// Takes one name off an image; the image goes with its last name. Unknown names are fine: false.
    pub async fn untag(self: &Arc<Self>, reference: &Reference) -> Result<bool, Error> {
        let name = reference.to_string();
        self.blocking(move |images| {
            let one_at_a_time = images.changes();
            let changed = images.index().without_name(&name);
            match changed {
                None => return Ok(false),
                Some(record) if record.repo_tags.is_empty() && record.repo_digests.is_empty() => {
                    images.take_off(&record.id)?;
                    drop(one_at_a_time);
                    images.sweep()?;
                }
                Some(record) => images.put(record).map(drop)?,
            }
            Ok(true)
        })
        .await
    }

    /// Gives an image one more name. Blocks for a write.
    pub fn tag(&self, name: &str, reference: &Reference) -> Result<(), Error> {
        let mut record = self.record(name)?;
        record.repo_tags.extend(reference.tagged());
        self.add_record(record).map(drop)
    }

    /// Keeps an image from garbage collection, or lets it go again. Blocks for a write.
    pub fn pin(&self, name: &str, pinned: bool) -> Result<(), Error> {
        let _one_at_a_time = self.changes();
        let mut record = self.record(name)?;
        record.pinned = pinned;
        self.put(record).map(drop)
    }

    /// Loads the images of an OCI layout (directory or tar archive) or a `docker save` archive. They come pinned:
    /// nobody can fetch them again.
    pub async fn load(self: &Arc<Self>, path: &Path, progress: &dyn Progress) -> Result<Vec<Arc<Image>>, Error> {
        self.load_archive(path, progress).await
    }

    /// The configuration of an image, as it came.
    ///
    /// # Errors
    /// [`Error::NoSuchImage`].
    pub fn document(&self, image: &Digest) -> Result<Vec<u8>, Error> {
        self.store.blob(image).ok_or_else(|| Error::NoSuchImage(image.to_string()))
    }

    /// Where the store lies.
    pub fn state_dir(&self) -> &Path {
        &self.config.state_dir
    }

    /// What the images take on disk. Blocks: there is something to read for each layer.
    pub fn usage(&self) -> Usage {
        self.store.layers_usage()
    }

    /// What a container has written into its root file system. Walks it: not for the hot path.
    pub async fn writable_usage(self: &Arc<Self>, container_id: &str) -> Result<Usage, Error> {
        let container_id = container_id.to_owned();
        self.blocking(move |images| images.store.rootfs_usage(&container_id)).await
    }

    /// Removes unused images by `policy`; `in_use` are ids that containers need.
    pub async fn collect_garbage(
        self: &Arc<Self>,
        policy: &GcPolicy,
        in_use: &HashSet<Digest>,
    ) -> Result<Reclaimed, Error> {
        let (policy, in_use) = (policy.clone(), in_use.clone());
        self.blocking(move |images| images.collect(&policy, &in_use)).await
    }

    /// Removes every image that is neither in use nor pinned, whatever the disk looks like.
    pub async fn remove_unused(self: &Arc<Self>, in_use: &HashSet<Digest>) -> Result<Reclaimed, Error> {
        let in_use = in_use.clone();
        self.blocking(move |images| {
            let unused = |image: &Arc<Image>| !image.pinned && !in_use.contains(&image.id);
            let ids: Vec<_> =
                images.list().iter().filter(|image| unused(image)).map(|image| image.id.clone()).collect();
            for id in &ids {
                images.forget(id)?;
            }
            Ok(Reclaimed { images: ids, bytes: images.sweep()?, missing_bytes: 0 })
        })
        .await
    }

    /// Mounts the root file system of a container. The second call for one container sees what the first has
    /// written; the first mount must be gone by then. Blocks for well under a millisecond.
    pub fn rootfs(&self, image: &Digest, container_id: &str, options: RootfsOptions) -> Result<Rootfs, Error> {
        let (owner, image) = {
            // The root file system counts as a user of its layers before anybody can sweep them.
            let index = self.index();
            let stored = index.by_id(image).ok_or_else(|| Error::NoSuchImage(image.to_string()))?;
            let owner = Owner { image: image.clone(), layers: stored.record.layers.clone() };
            self.rootfs.lock().expect("no panic while it is held").insert(container_id.to_owned(), owner.clone());
            (owner, Arc::clone(&stored.image))
        };
        self.store.touch(&image.id);
        match self.store.mount_rootfs(container_id, &owner, &options) {
            Ok(mount) => Ok(Rootfs { mount, image }),
            Err(error) => {
                if self.store.remove_rootfs(container_id).is_ok() {
                    self.rootfs.lock().expect("no panic while it is held").remove(container_id);
                }
                Err(error)
            }
        }
    }

    /// Removes what a container has written. Unknown containers are fine.
    ///
    /// It is out of sight when this returns; the disk is told in the background.
    pub async fn release(self: &Arc<Self>, container_id: &str) -> Result<(), Error> {
        let container_id = container_id.to_owned();
        let taken = self.blocking(move |images| {
            let taken = images.store.take_out_rootfs(&container_id)?;
            images.rootfs.lock().expect("no panic while it is held").remove(&container_id);
            Ok(taken)
        });
        if let Some(taken) = taken.await? {
            self.background.spawn_blocking(move || {
                if let Err(error) = taken.remove() {
                    tracing::warn!(%error, "what a container has written cannot be removed");
                }
            });
        }
        Ok(())
    }

    /// The containers that have a root file system in the store.
    pub fn rootfs_owners(&self) -> Vec<String> {
        self.store.rootfs_owners().into_iter().map(|(container, _)| container).collect()
    }

    /// Mounts an image, or the part of it below `sub_path`, read-only as a detached mount (image volumes). All in it has the
    /// SELinux `label`, if there is one.
    ///
    /// The image's layers must stay as long as the mount is used: the caller names the image as in use to garbage collection.
    pub fn mount_image(&self, image: &Digest, sub_path: &str, label: Option<&str>) -> Result<OwnedFd, Error> {
        let layers = {
            let index = self.index();
            index.by_id(image).ok_or_else(|| Error::NoSuchImage(image.to_string()))?.record.layers.clone()
        };
        self.store.touch(image);
        self.store.mount_volume(image, &layers, sub_path, label)
    }

    /// Waits until what pulls have left to do in the background is done: layers are on disk, and what was given up is
    /// removed. For an orderly end; a store that ends without it sweeps at its next start.
    pub async fn settled(&self) {
        self.hurry_write_out().take();
        self.background.close();
        self.background.wait().await;
        self.background.reopen();
        self.store.settled().await;
    }

    /// Everything in the store that nothing owns. Nothing is changed. Blocks.
    pub fn fsck(&self) -> Result<Vec<Unowned>, Error> {
        // A record is on disk before it is known.
        let _none_meanwhile = self.changes();
        let marked = self.marked(&self.reserved.lock().expect("no panic while it is held"));
        let known = self.index().ids();
        self.store.unowned(&marked, &known)
    }
}

/// What the public methods are made of.
impl Images {
    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().expect("no panic while it is held")
    }

    fn changes(&self) -> MutexGuard<'_, ()> {
        self.changes.lock().expect("no panic while it is held")
    }

    /// Runs work on the file system where it holds up nobody.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let images = Arc::clone(self);
        let done = tokio::task::spawn_blocking(move || work(&images)).await;
        done.unwrap_or_else(|e| Err(Error::store("work on", &self.config.state_dir, std::io::Error::other(e))))
    }

    fn record(&self, name: &str) -> Result<store::records::Record, Error> {
        let index = self.index();
        index.find(name).map(|stored| stored.record.clone()).ok_or_else(|| Error::NoSuchImage(name.to_owned()))
    }

    /// Stores an image's record: it joins what was known of that image, and takes over its tags from others.
    fn add_record(&self, record: store::records::Record) -> Result<Arc<Image>, Error> {
        let _one_at_a_time = self.changes();
        let losing = self.index().losing_tags(&record);
        for changed in losing {
            self.put(changed)?;
        }
        let merged = self.index().merged(record);
        self.put(merged)
    }

    /// Writes a record down, and then it is known. The caller holds `changes`.
    fn put(&self, record: store::records::Record) -> Result<Arc<Image>, Error> {
        self.store.put_record(&record)?;
        let incomplete = || Error::Malformed {
            object: format!("image {}", record.id),
            reason: "a part of it vanished while it was recorded".into(),
        };
        let stored = self.store.complete(record.clone()).ok_or_else(incomplete)?;
        let image = Arc::clone(&stored.image);
        self.index().insert(stored);
        Ok(image)
    }

    fn forget(&self, id: &Digest) -> Result<(), Error> {
        let _one_at_a_time = self.changes();
        self.take_off(id)
    }

    /// Removes a record, and then it is not known any more. The caller holds `changes`.
    fn take_off(&self, id: &Digest) -> Result<(), Error> {
        self.store.remove_record(id)?;
        self.index().remove(id);
        Ok(())
    }

    /// What has an owner. `reserved` is held by the caller, and taken before all other locks.
    fn marked(&self, reserved: &Reserved) -> store::gc::Marked {
        let index = self.index();
        let rootfs = self.rootfs.lock().expect("no panic while it is held");
        store::gc::Marked::of(
            index.all(),
            rootfs.values().flat_map(|owner| owner.layers.iter().cloned()),
            reserved.keys().cloned(),
        )
    }

    /// Removes what has no owner. Nobody can reserve a layer between the look at it and its going: then a pull would
    /// count on something that is about to vanish.
    fn sweep(&self) -> Result<u64, Error> {
        let taken = {
            let reserved = self.reserved.lock().expect("no panic while it is held");
            self.store.take_out_unmarked(&self.marked(&reserved))?
        };
        self.store.remove_taken(taken)
    }

    fn collect(&self, policy: &GcPolicy, in_use: &HashSet<Digest>) -> Result<Reclaimed, Error> {
        let space =
            sys::tree::space(&self.config.state_dir).map_err(|e| Error::store("measure", &self.config.state_dir, e))?;
        let images = self.refreshed();
        let plan = store::gc::plan(
            &images.iter().map(Arc::as_ref).collect::<Vec<_>>(),
            policy,
            in_use,
            space,
            SystemTime::now(),
        );
        let mut reclaimed = Reclaimed::default();
        for id in plan.overdue {
            self.forget(&id)?;
            reclaimed.images.push(id);
        }
        reclaimed.bytes = self.sweep()?;
        for id in plan.candidates {
            if reclaimed.bytes >= plan.bytes_to_free {
                break;
            }
            self.forget(&id)?;
            reclaimed.images.push(id);
            reclaimed.bytes += self.sweep()?;
        }
        reclaimed.missing_bytes = plan.bytes_to_free.saturating_sub(reclaimed.bytes);
        Ok(reclaimed)
    }

    /// The images with the time of their last use as it is on disk now.
    fn refreshed(&self) -> Vec<Arc<Image>> {
        self.store.records().into_iter().map(|stored| stored.image).collect()
    }

    /// Keeps layers and documents from being swept until the guard goes.
    fn reserve(self: &Arc<Self>, wanted: impl Iterator<Item = Digest>) -> Reservation {
        let wanted: Vec<_> = wanted.collect();
        let mut reserved = self.reserved.lock().expect("no panic while it is held");
        for digest in &wanted {
            *reserved.entry(digest.clone()).or_default() += 1;
        }
        Reservation { images: Arc::clone(self), wanted }
    }

    async fn node_credentials(&self, reference: &Reference) -> Result<Option<Auth>, Error> {
        credentials::node_credentials(&self.config, reference).await
    }
}

/// How many count on what.
type Reserved = HashMap<Digest, usize>;

/// Layers and documents that somebody counts on.
struct Reservation {
    images: Arc<Images>,
    wanted: Vec<Digest>,
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let mut reserved = self.images.reserved.lock().expect("no panic while it is held");
        for digest in &self.wanted {
            if let Some(count) = reserved.get_mut(digest) {
                *count -= 1;
            }
        }
        reserved.retain(|_, count| *count > 0);
    }
}
