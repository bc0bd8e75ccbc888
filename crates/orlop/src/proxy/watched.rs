//! The configuration's file: the process ends when it says something else, as upstream's does, so that whoever watches over
//! it starts it with the new one. Rules stay meanwhile, and nothing of a configuration is in force by halves.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, anyhow};
use sys::inotify::Inotify;
use tokio::io::unix::AsyncFd;

/// A file that is being watched.
pub(super) struct Watched {
    file: PathBuf,
    read: Vec<u8>,
    inotify: AsyncFd<Inotify>,
}

impl Watched {
    /// Watches from now on.
    pub(super) fn new(file: &Path) -> anyhow::Result<Self> {
        let cannot = || format!("cannot watch {}", file.display());
        let file = std::path::absolute(file).with_context(cannot)?;
        let inotify = Inotify::new().with_context(cannot)?;
        // Its directory: editors and ConfigMaps put another file in the place of this one.
        inotify.add(file.parent().unwrap_or(Path::new("/"))).with_context(cannot)?;
        let read = std::fs::read(&file).with_context(cannot)?;
        #[expect(deprecated, reason = "the replacement is unsafe; an OwnedFd inside keeps the descriptor open")]
        let inotify = AsyncFd::new(inotify).with_context(cannot)?;
        Ok(Self { read, inotify, file })
    }

    /// Returns when the file says something else.
    pub(super) async fn changed(&mut self) -> anyhow::Error {
        loop {
            let Ok(mut ready) = self.inotify.readable().await else { return std::future::pending().await };
            // Whatever it was, the content tells.
            let _ = ready.get_inner().read();
            ready.clear_ready();
            // While it is being replaced there may be none.
            if std::fs::read(&self.file).is_ok_and(|now| now != self.read) {
                return anyhow!(
                    "the configuration {} has changed; the proxy has to be started anew",
                    self.file.display()
                );
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn another_content_is_noticed_and_the_same_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (file, data) = (dir.path().join("config.conf"), dir.path().join("data-1"));
        std::fs::write(&data, "a").unwrap();
        std::os::unix::fs::symlink(&data, &file).unwrap();
        let mut watched = Watched::new(&file).unwrap();
        std::fs::write(dir.path().join("other"), "b").unwrap();
        std::fs::write(&data, "a").unwrap();
        // As a ConfigMap is changed: another link is put in its place.
        std::fs::write(dir.path().join("data-2"), "b").unwrap();
        std::os::unix::fs::symlink(dir.path().join("data-2"), dir.path().join("new")).unwrap();
        std::fs::rename(dir.path().join("new"), &file).unwrap();
        let error = watched.changed().await.to_string();
        assert!(error.contains("config.conf has changed"), "{error}");
    }
}
