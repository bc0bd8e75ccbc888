//! The directory that holds images: what is where, and how a crash at any instant leaves nothing wrong.
//!
//! ```text
//! lock                        flock of the one daemon that owns the store
//! layers/sha256/<hex>/fs      a layer's tree, named by the digest of the bytes it was made of
//! layers/sha256/<hex>/layer.json
//! images/<hex>.json           an image: names, manifest, layers; its mtime is when it was last used
//! blobs/sha256/<hex>          its configuration and manifests, as they came
//! rootfs/<container>/{fs,work,rootfs.json}
//! tmp/                        work in progress, empty when nobody works
//! ```
//!
//! Everything is made in `tmp` and renamed into place, so a name means completeness. Nothing is synced on the way: a
//! layer says in which boot it was made and whether it has been written out since; after a power failure those of
//! another boot that had not been are thrown away.

pub(crate) mod gc;
pub(crate) mod layers;
pub(crate) mod records;
pub(crate) mod rootfs;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::digest::Digest;
use crate::error::Error;

/// Where things are.
#[derive(Debug)]
pub(crate) struct Store {
    pub(crate) root: PathBuf,
    boot_id: String,
    temporaries: Temporaries,
    /// Held as long as the store is open.
    _lock: fs::File,
}

/// The names below `tmp` that somebody works on: what is there beside them is left over.
#[derive(Debug)]
struct Temporaries {
    directory: PathBuf,
    next: AtomicU64,
    live: Arc<watch::Sender<HashSet<PathBuf>>>,
}

/// A name below `tmp`, taken until this is dropped.
#[derive(Debug)]
struct Temporary {
    path: PathBuf,
    live: Arc<watch::Sender<HashSet<PathBuf>>>,
}

/// A directory below `tmp` that is removed unless it is moved into place.
#[derive(Debug)]
pub(crate) struct Staging {
    temporary: Option<Temporary>,
}

const DIRECTORIES: [&str; 6] = ["layers/sha256", "layers/sha512", "images", "blobs/sha256", "blobs/sha512", "rootfs"];
const TEMPORARY: &str = "tmp";

impl Store {
    /// Opens or makes the store and sweeps its `tmp`.
    pub(crate) fn open(root: &Path) -> Result<Self, Error> {
        create_private(root)?;
        let lock = lock(root)?;
        for name in DIRECTORIES {
            create_private(&root.join(name))?;
        }
        let temporaries = Temporaries::new(root.join(TEMPORARY));
        remove_tree(&temporaries.directory)?;
        create_private(&temporaries.directory)?;
        spread(&temporaries.directory);
        Ok(Self { root: root.to_owned(), boot_id: boot_id(), temporaries, _lock: lock })
    }

    pub(crate) fn boot_id(&self) -> &str {
        &self.boot_id
    }

    /// A new empty directory below `tmp`.
    pub(crate) fn stage(&self) -> Result<Staging, Error> {
        let temporary = self.temporaries.take();
        create_private(&temporary.path)?;
        Ok(Staging { temporary: Some(temporary) })
    }

    /// Waits until nobody works in `tmp`: what was given up is removed by then.
    pub(crate) async fn settled(&self) {
        let mut live = self.temporaries.live.subscribe();
        // The sender lives as long as the store.
        let _ = live.wait_for(HashSet::is_empty).await;
    }

    /// Whether somebody works on this path below `tmp`.
    pub(crate) fn is_live(&self, path: &Path) -> bool {
        self.temporaries.live.borrow().contains(path)
    }

    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.algorithm().name()).join(digest.hex())
    }

    /// Stores a small blob: a configuration or a manifest.
    pub(crate) fn put_blob(&self, digest: &Digest, bytes: &[u8]) -> Result<(), Error> {
        self.replace_file(&self.blob_path(digest), bytes)
    }

    /// Reads a small blob and checks that it is what its name says.
    pub(crate) fn blob(&self, digest: &Digest) -> Option<Vec<u8>> {
        let bytes = fs::read(self.blob_path(digest)).ok()?;
        digest.matches(&bytes).then_some(bytes)
    }

    /// Writes a record in one step: readers see the old one or the new one.
    pub(crate) fn put_json(&self, path: &Path, value: &impl Serialize) -> Result<(), Error> {
        let bytes = serde_json::to_vec_pretty(value).map_err(|e| Error::store("encode", path, e.into()))?;
        self.replace_file(path, &bytes)
    }

    fn replace_file(&self, path: &Path, bytes: &[u8]) -> Result<(), Error> {
        let temporary = self.temporaries.take();
        let written = fs::write(&temporary.path, bytes).map_err(|e| Error::store("write", path, e));
        let replaced =
            written.and_then(|()| fs::rename(&temporary.path, path).map_err(|e| Error::store("replace", path, e)));
        replaced.inspect_err(|_| {
            // It may not even have been made.
            let _ = fs::remove_file(&temporary.path);
        })
    }

    /// Removes a directory of the store: first out of sight, then for good.
    pub(crate) fn discard(&self, path: &Path) -> Result<(), Error> {
        self.take_out(path)?.map_or(Ok(()), |temporary| remove_tree(&temporary.path))
    }

    fn take_out(&self, path: &Path) -> Result<Option<Temporary>, Error> {
        let out_of_sight = self.temporaries.take();
        match fs::rename(path, &out_of_sight.path) {
            Ok(()) => Ok(Some(out_of_sight)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(Error::store("remove", path, e)),
        }
    }
}

/// Reads a record; none if it is missing or unreadable (then a sweep removes what it described).
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let bytes = fs::read(path).ok()?;
    match serde_json::from_slice(&bytes) {
        Ok(value) => Some(value),
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "ignoring an unreadable record of the image store");
            None
        }
    }
}

impl Temporaries {
    fn new(directory: PathBuf) -> Self {
        Self { directory, next: AtomicU64::new(0), live: Arc::new(watch::Sender::default()) }
    }

    fn take(&self) -> Temporary {
        let path = self.directory.join(self.next.fetch_add(1, Ordering::Relaxed).to_string());
        self.live.send_modify(|live| {
            live.insert(path.clone());
        });
        Temporary { path, live: Arc::clone(&self.live) }
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        self.live.send_modify(|live| {
            live.remove(&self.path);
        });
    }
}

impl Staging {
    pub(crate) fn path(&self) -> &Path {
        &self.temporary.as_ref().expect("only `place` takes it, and it takes self").path
    }

    /// Moves the directory to its place. If something is there already, that stays: it has the same content.
    pub(crate) fn place(mut self, target: &Path) -> Result<(), Error> {
        let Some(temporary) = self.temporary.take() else { return Ok(()) };
        match fs::rename(&temporary.path, target) {
            Ok(()) => Ok(()),
            Err(e) => {
                remove_tree(&temporary.path)?;
                if target.exists() { Ok(()) } else { Err(Error::store("move into place", target, e)) }
            }
        }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let Some(temporary) = self.temporary.take() else { return };
        // Removing a large tree takes a while; what is left of it after a crash is swept at the next start.
        let removal = move || {
            if let Err(error) = remove_tree(&temporary.path) {
                tracing::warn!(path = %temporary.path.display(), %error, "cannot remove work in progress");
            }
        };
        if let Err(error) = std::thread::Builder::new().name("remove-staging".into()).spawn(removal) {
            tracing::warn!(%error, "cannot start a thread to remove work in progress");
        }
    }
}

/// Has the file system put what is made in `directory`, layers and what containers write, apart from one another.
///
/// ext4 makes files near their directory and steps over inodes freed in the last minutes one by one: a pull after a
/// removal, all below one directory, was four times slower without this. Other file systems have no such flag and no such
/// trouble. Source: `FS_TOPDIR_FL`, chattr(1) `+T`; `recently_deleted` in fs/ext4/ialloc.c.
fn spread(directory: &Path) {
    use sys::rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};
    let set =
        fs::File::open(directory).and_then(|dir| Ok(ioctl_setflags(&dir, ioctl_getflags(&dir)? | IFlags::TOPDIR)?));
    if let Err(error) = set {
        tracing::debug!(%error, directory = %directory.display(), "the file system knows no directories to spread");
    }
}

fn create_private(path: &Path) -> Result<(), Error> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    // The mode is asserted at each start: a store that others may walk through exposes setuid files of images.
    let asserted = made.and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(0o700)));
    asserted.map_err(|e| Error::store("make the directory", path, e))
}

fn lock(root: &Path) -> Result<fs::File, Error> {
    let path = root.join("lock");
    let open = fs::OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(&path);
    let mut file = open.map_err(|e| Error::store("open", &path, e))?;
    match sys::lock::take(&mut file).map_err(|e| Error::store("lock", &path, e))? {
        None => Ok(file),
        Some(_) => Err(Error::Locked { path: root.to_owned() }),
    }
}

pub(crate) fn remove_tree(path: &Path) -> Result<(), Error> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    match sys::tree::Dir::open(parent).and_then(|parent| parent.remove_all(name.as_encoded_bytes())) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(Error::store("remove", path, e)),
    }
}

/// The kernel's name for this boot. Unknown is as good as a boot of its own.
fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned()).unwrap_or_default()
}
