//! One daemon per directory: two would end each other's pods.

use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// A directory that this process has for itself. The kernel gives it back when the process ends, however it ends.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

/// Why a directory cannot be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LockError {
    /// Somebody has it.
    #[error(
        "another orlop (pid {pid}) runs with {dir}; `orlop down` ends it, --state-dir and --run-dir start a second node"
    )]
    Taken {
        /// The directory.
        dir: PathBuf,
        /// The process that has it, as it wrote itself.
        pid: String,
    },
    /// It cannot be made or written.
    #[error("cannot use {dir}; run as root, or choose another --state-dir and --run-dir")]
    Unusable {
        /// The directory.
        dir: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
}

impl Lock {
    /// Makes `dir` if it is missing (mode 0700) and takes it.
    pub(crate) fn take(dir: &Path) -> Result<Self, LockError> {
        let unusable = |source| LockError::Unusable { dir: dir.to_owned(), source };
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(unusable)?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700)).map_err(unusable)?;
        let open =
            File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(dir.join("lock"));
        let mut file = open.map_err(unusable)?;
        match sys::tree::try_lock(file.as_fd()) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                let mut pid = String::new();
                file.read_to_string(&mut pid).map_err(unusable)?;
                return Err(LockError::Taken { dir: dir.to_owned(), pid: pid.trim().to_owned() });
            }
            Err(error) => return Err(unusable(error)),
        }
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.rewind()?;
            writeln!(file, "{}", std::process::id())
        };
        write(&mut file).map_err(unusable)?;
        Ok(Self { _file: file })
    }

    /// Whether somebody has `dir`. A directory without a lock file is free.
    pub(crate) fn is_taken(dir: &Path) -> bool {
        let Ok(file) = File::open(dir.join("lock")) else { return false };
        sys::tree::try_lock(file.as_fd()).is_err()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_who_the_first_is() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::take(dir.path()).unwrap();
        let error = Lock::take(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        assert!(Lock::is_taken(dir.path()));
        drop(first);
        assert!(!Lock::is_taken(dir.path()));
        Lock::take(dir.path()).unwrap();
    }
}
