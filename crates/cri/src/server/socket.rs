//! The file of the CRI socket.

use std::fs::{DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use tokio::net::{UnixListener, UnixStream};

/// Why a socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A process listens there.
    #[error("{path} is in use by {owner}; stop it, or listen elsewhere (--listen)")]
    InUse {
        /// The socket.
        path: PathBuf,
        /// Name and process id of who listens.
        owner: String,
    },
    /// There is a file which is no socket.
    #[error("{path} exists and is no socket; remove it, or listen elsewhere (--listen)")]
    NoSocket {
        /// The file.
        path: PathBuf,
    },
    /// The kernel refuses.
    #[error("{step} {path}")]
    System {
        /// What was tried.
        step: &'static str,
        /// With which file.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
}

/// Listens on a socket at `path` that only root can open. Its directory is made if it is missing, with mode 0700. The
/// socket of a daemon that died is replaced.
///
/// # Errors
/// See [`BindError`]. Whoever listens already is not disturbed.
pub async fn bind(path: &Path) -> Result<UnixListener, BindError> {
    let failed = |step| move |source| BindError::System { step, path: path.to_owned(), source };
    if let Some(directory) = path.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed("making the directory of"))?;
    }
    make_way(path).await?;
    let listener = UnixListener::bind(path).map_err(failed("listening on"))?;
    // Until here it had what the umask leaves of 0777; nobody but the owner may connect without write permission.
    std::fs::set_permissions(path, Permissions::from_mode(0o600)).map_err(failed("setting the mode of"))?;
    Ok(listener)
}

/// Removes a socket that nobody listens on.
async fn make_way(path: &Path) -> Result<(), BindError> {
    let failed = |step| move |source| BindError::System { step, path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed("looking at")(error)),
        Ok(file) if !file.file_type().is_socket() => return Err(BindError::NoSocket { path: path.to_owned() }),
        Ok(_) => {}
    }
    match UnixStream::connect(path).await {
        Ok(stream) => Err(BindError::InUse { path: path.to_owned(), owner: owner(&stream) }),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            std::fs::remove_file(path).map_err(failed("removing the unused socket"))
        }
        Err(error) => Err(failed("asking who listens on")(error)),
    }
}

fn owner(stream: &UnixStream) -> String {
    let Some(pid) = stream.peer_cred().ok().and_then(|peer| peer.pid()) else {
        return "a process of another pid namespace".to_owned();
    };
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("{} (process {pid})", name.trim())
}

/// Removes the file of a listener, so that nobody tries to connect any more.
pub(super) fn remove(listener: &UnixListener) {
    let address = listener.local_addr();
    let Some(path) = address.as_ref().ok().and_then(|address| address.as_pathname()) else { return };
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(%error, path = %path.display(), "the socket's file remains");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn only_root_may_connect() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("run/cri.sock");
        let listener = bind(&path).await.unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        remove(&listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_live_socket_is_left_alone_and_a_dead_one_replaced() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("cri.sock");
        let first = bind(&path).await.unwrap();
        let refused = bind(&path).await.unwrap_err().to_string();
        assert!(refused.contains(&format!("process {}", std::process::id())), "{refused}");
        // As after kill -9: the file stays.
        drop(first);
        let second = bind(&path).await.unwrap();
        let connected = UnixStream::connect(&path).await.unwrap();
        second.accept().await.unwrap();
        drop(connected);
    }

    #[tokio::test]
    async fn no_file_is_overwritten() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("cri.sock");
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(bind(&path).await, Err(BindError::NoSocket { .. })));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
