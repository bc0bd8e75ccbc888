//! Which directories of logs change, told to those who follow one.
//!
//! One instance of inotify serves all of them: a user has 128, and the programs of most pods are of the same user.

use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use sys::inotify::{Change, Inotify, WatchId};
use sys::rustix::io::Errno;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

/// The watched directories. A handle: clones have the same ones.
#[derive(Clone, Default)]
pub struct Watches {
    /// There while somebody follows. Held for a call of the kernel at most.
    instance: Arc<Mutex<Option<Instance>>>,
}

struct Instance {
    inotify: Arc<AsyncFd<Inotify>>,
    directories: HashMap<WatchId, Directory>,
    _teller: AbortOnDropHandle<()>,
}

struct Directory {
    followers: usize,
    changed: watch::Sender<()>,
}

/// One who follows a directory, for as long as this value lives.
pub(super) struct Watch {
    watches: Watches,
    id: WatchId,
    changed: watch::Receiver<()>,
}

impl Watches {
    /// Watches a directory: what is written, made or renamed in it from now on is told.
    ///
    /// # Errors
    /// It is not there, or a limit of the kernel's is reached.
    pub(super) fn add(&self, directory: &Path) -> io::Result<Watch> {
        let mut held = self.lock();
        let instance = match &mut *held {
            Some(instance) => instance,
            none => none.insert(self.start()?),
        };
        // What happens from here on is told when the lock is free.
        let id = match instance.inotify.get_ref().add_written(directory) {
            Ok(id) => id,
            Err(error) => {
                if instance.directories.is_empty() {
                    *held = None;
                }
                return Err(too_many(error.errno));
            }
        };
        let of = instance.directories.entry(id);
        let of = of.or_insert_with(|| Directory { followers: 0, changed: watch::Sender::new(()) });
        of.followers += 1;
        Ok(Watch { watches: self.clone(), id, changed: of.changed.subscribe() })
    }

    fn start(&self) -> io::Result<Instance> {
        let inotify = Inotify::new().map_err(|error| too_many(error.errno))?;
        #[expect(deprecated, reason = "the replacement is unsafe; an OwnedFd inside keeps the descriptor open")]
        let inotify = Arc::new(AsyncFd::new(inotify)?);
        let teller = tokio::spawn(tell(inotify.clone(), Arc::downgrade(&self.instance)));
        Ok(Instance { inotify, directories: HashMap::new(), _teller: AbortOnDropHandle::new(teller) })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Instance>> {
        self.instance.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watch {
    /// Returns after at least one change since the last return.
    pub(super) async fn changed(&mut self) -> io::Result<()> {
        self.changed.changed().await.map_err(|_| io::Error::other("changes of the log are not told any more"))
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut held = self.watches.lock();
        let Some(instance) = &mut *held else { return };
        let Some(of) = instance.directories.get_mut(&self.id) else { return };
        of.followers -= 1;
        if of.followers == 0 {
            instance.directories.remove(&self.id);
            let _ = instance.inotify.get_ref().remove(self.id); // It goes with the instance, at the latest.
        }
        if instance.directories.is_empty() {
            *held = None;
        }
    }
}

/// Tells the followers of all changes, for as long as there is one.
async fn tell(inotify: Arc<AsyncFd<Inotify>>, instance: Weak<Mutex<Option<Instance>>>) {
    loop {
        let changes = next(&inotify).await;
        let Some(instance) = instance.upgrade() else { return };
        let mut held = instance.lock().unwrap_or_else(PoisonError::into_inner);
        match (&*held, changes) {
            (Some(instance), Ok(changes)) => changes.iter().for_each(|change| instance.tell(change)),
            (_, Err(error)) => {
                tracing::warn!(%error, "changes of logs cannot be read; who follows one has to begin anew");
                *held = None;
                return;
            }
            (None, _) => return,
        }
    }
}

/// Changes that have come, at least one.
async fn next(inotify: &AsyncFd<Inotify>) -> io::Result<Vec<Change>> {
    loop {
        let mut ready = inotify.readable().await?;
        let read = ready.try_io(|inotify| match inotify.get_ref().read_some() {
            Ok(changes) if changes.is_empty() => Err(io::ErrorKind::WouldBlock.into()),
            read => read.map_err(io::Error::other),
        });
        if let Ok(changes) = read {
            return changes;
        }
    }
}

impl Instance {
    fn tell(&self, change: &Change) {
        let (Change::Entry { watch, .. } | Change::Directory { watch }) = change else {
            return self.directories.values().for_each(|directory| directory.changed.send_replace(()));
        };
        if let Some(directory) = self.directories.get(watch) {
            directory.changed.send_replace(());
        }
    }
}

/// A limit of the kernel's is an error that says which: `EMFILE` may be one of inotify (inotify_init(2)).
fn too_many(errno: Errno) -> io::Error {
    let limit = match errno {
        Errno::MFILE => "max_user_instances",
        Errno::NOSPC => "max_user_watches",
        other => return other.into(),
    };
    io::Error::other(format!(
        "the log cannot be followed: too many are followed already, or other programs of the node use up \
         fs.inotify.{limit}; raise it with sysctl ({errno})"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_of_the_kernel_is_named() {
        assert!(too_many(Errno::MFILE).to_string().contains("fs.inotify.max_user_instances"));
        assert!(too_many(Errno::NOSPC).to_string().contains("fs.inotify.max_user_watches"));
        assert_eq!(too_many(Errno::NOENT).kind(), io::ErrorKind::NotFound);
    }

    /// A user has 128 instances of inotify, by default.
    #[tokio::test]
    async fn all_who_follow_share_an_instance() {
        let dir = tempfile::tempdir().unwrap();
        let watches = Watches::default();
        let follow = |name: usize| {
            let directory = dir.path().join(name.to_string());
            std::fs::create_dir_all(&directory).unwrap();
            watches.add(&directory).unwrap()
        };
        // Two for each directory.
        let mut all: Vec<Watch> = (0..300).map(|number| follow(number / 2)).collect();
        let is_inotify = |entry: std::fs::DirEntry| {
            std::fs::read_link(entry.path()).is_ok_and(|to| to == Path::new("anon_inode:inotify"))
        };
        let instances = std::fs::read_dir("/proc/self/fd").unwrap().flatten().map(is_inotify).filter(|is| *is).count();
        assert!((1..100).contains(&instances), "{instances}");
        let write = |name: &str| std::fs::write(dir.path().join(name), "line").unwrap();
        (0..150).for_each(|name| write(&format!("{name}/0.log")));
        for watch in &mut all {
            watch.changed().await.unwrap();
        }
        // The other one of a directory is told when one has gone, and only of its own directory.
        all.truncate(3);
        write("1/0.log");
        all[2].changed().await.unwrap();
        assert!(!all[0].changed.has_changed().unwrap());
        assert!(watches.add(&dir.path().join("none")).is_err_and(|error| error.kind() == io::ErrorKind::NotFound));
        all.clear();
        assert!(watches.lock().is_none(), "it ends with the last");
        assert!(watches.add(&dir.path().join("none")).is_err());
        assert!(watches.lock().is_none());
    }
}
