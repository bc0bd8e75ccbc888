//! Plugins of the node: who they are, and when they come and go.
//!
//! ```text
//! plugins_registry/… ─inotify─► scan ─► one task for each socket: GetInfo ─► Handler::register ─► NotifyRegistrationStatus
//! ```
//!
//! A plugin puts a socket below the directory; what it is, it says itself. A socket that is replaced, as a plugin that was
//! restarted does it, is a new registration; one that is gone ends it. Each socket has a task of its own, so a plugin that
//! hangs holds up nobody else.

mod member;
mod scan;

use std::collections::HashMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use async_trait::async_trait;
use sys::inotify::Inotify;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use scan::{Identity, Scan};

/// What a plugin said of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugin {
    /// Unique among the plugins of its kind.
    pub name: String,
    /// The socket on which it serves its kind's protocol; that of its registration if it named no other.
    pub endpoint: PathBuf,
    /// The versions of that protocol that it knows.
    pub versions: Vec<String>,
}

/// Who takes the plugins of one kind.
#[async_trait]
pub trait Handler: Send + Sync + 'static {
    /// The kind as plugins name it: `CSIPlugin`, `DRAPlugin`, `DevicePlugin`.
    fn kind(&self) -> &'static str;

    /// Takes a plugin, or the same one anew after it was restarted. It is given up when the socket goes or is replaced
    /// meanwhile; whatever it asks of the plugin needs a deadline of its own.
    ///
    /// # Errors
    /// Why it cannot be taken. The plugin is told, and it is tried again later.
    async fn register(&self, plugin: &Plugin) -> Result<(), Refusal>;

    /// Forgets a plugin that it took: its socket is gone, or another plugin is behind it.
    async fn deregister(&self, plugin: &Plugin);
}

/// Why a plugin is not taken, in words for its log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub String);

/// The plugins of a node. Their registrations are followed until this value is dropped.
pub struct Registry {
    _task: AbortOnDropHandle<()>,
}

/// Why plugins cannot be followed.
#[derive(Debug, thiserror::Error)]
#[error("plugins cannot be found in {directory}")]
pub struct RegistryError {
    directory: PathBuf,
    source: std::io::Error,
}

impl Registry {
    /// Follows the sockets in `directory`, which is made if it is missing, and in the directories below it. Must be called
    /// inside a tokio runtime.
    ///
    /// # Errors
    /// The directory cannot be made, or not be watched.
    pub fn start(directory: &Path, handlers: Vec<Arc<dyn Handler>>) -> Result<Self, RegistryError> {
        let failed = |source| RegistryError { directory: directory.to_owned(), source };
        std::fs::create_dir_all(directory).map_err(failed)?;
        let inotify = Inotify::new().map_err(|error| failed(std::io::Error::other(error)))?;
        #[expect(deprecated, reason = "the replacement is unsafe; an OwnedFd inside keeps the descriptor open")]
        let inotify = AsyncFd::new(inotify).map_err(failed)?;
        let members = Members { handlers: handlers.into(), all: HashMap::new() };
        let task = tokio::spawn(follow(directory.to_owned(), Arc::new(inotify), members));
        Ok(Self { _task: AbortOnDropHandle::new(task) })
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

/// Looks again whenever something changes.
async fn follow(directory: PathBuf, inotify: Arc<AsyncFd<Inotify>>, mut members: Members) {
    loop {
        let (root, watches) = (directory.clone(), inotify.clone());
        // Watches come before what they watch is read: no change between the two is lost.
        let scanned = tokio::task::spawn_blocking(move || scan::sockets(&root, watches.get_ref())).await;
        match scanned {
            Ok(Ok(found)) => members.see(found),
            Ok(Err(error)) => {
                tracing::warn!(directory = %directory.display(), %error, "the plugins of the node cannot be listed");
            }
            Err(_) => return, // The daemon ends.
        }
        if !changed(&inotify).await {
            return;
        }
    }
}

/// Waits for a change; takes all that have come.
async fn changed(inotify: &AsyncFd<Inotify>) -> bool {
    loop {
        let Ok(mut ready) = inotify.readable().await else { return false };
        let read = ready.try_io(|inotify| match inotify.get_ref().read() {
            Ok(changes) if changes.is_empty() => Err(std::io::ErrorKind::WouldBlock.into()),
            // What could not be read may have been anything.
            _ => Ok(()),
        });
        if let Ok(Ok(())) = read {
            return true;
        }
    }
}

/// The sockets, each with its task. One that goes keeps it until its plugin is forgotten.
struct Members {
    handlers: Arc<[Arc<dyn Handler>]>,
    all: HashMap<PathBuf, Member>,
}

struct Member {
    seen: Arc<watch::Sender<Seen>>,
    _task: AbortOnDropHandle<()>,
}

/// What is known of a socket.
#[derive(Debug, Clone, Copy, Default)]
struct Seen {
    /// None where there is none.
    socket: Option<Identity>,
    /// There was none any more, and its plugin has been forgotten.
    is_over: bool,
}

impl Members {
    fn see(&mut self, found: Scan) {
        self.all.retain(|path, member| found.contains_key(path) || !member.is_over());
        for (path, member) in &self.all {
            if !found.contains_key(path) {
                member.tell(None);
            }
        }
        for (path, identity) in found {
            let handlers = &self.handlers;
            let member = self.all.entry(path).or_insert_with_key(|path| Member::new(path, handlers.clone()));
            member.tell(Some(identity));
        }
    }
}

impl Member {
    fn new(socket: &Path, handlers: Arc<[Arc<dyn Handler>]>) -> Self {
        let (seen, told) = watch::channel(Seen::default());
        let seen = Arc::new(seen);
        let task = tokio::spawn(member::run(socket.to_owned(), handlers, seen.clone(), told));
        Self { seen, _task: AbortOnDropHandle::new(task) }
    }

    fn tell(&self, socket: Option<Identity>) {
        self.seen.send_if_modified(|before| {
            let now = Seen { socket, is_over: before.is_over && socket.is_none() };
            std::mem::replace(before, now).socket != socket
        });
    }

    fn is_over(&self) -> bool {
        self.seen.borrow().is_over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_that_is_gone_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("plugin.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let inotify = Inotify::new().unwrap();
        let found = || scan::sockets(dir.path(), &inotify).unwrap();
        let mut members = Members { handlers: Arc::new([]), all: HashMap::new() };
        for _ in 0..2 {
            members.see(found());
            members.see(Scan::new());
            assert_eq!(members.all.len(), 1, "its plugin is forgotten first");
            while !members.all[&path].is_over() {
                tokio::task::yield_now().await;
            }
        }
        members.see(found());
        assert!(!members.all[&path].is_over(), "it has come back");
        members.see(Scan::new());
        while !members.all[&path].is_over() {
            tokio::task::yield_now().await;
        }
        members.see(Scan::new());
        assert!(members.all.is_empty());
    }
}
