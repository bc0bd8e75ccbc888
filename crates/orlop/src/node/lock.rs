//! One daemon per directory: two would end each other's pods.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// Who has a directory for itself writes its process id here.
const FILE: &str = "lock";
/// The same in the kubelet's root, where upstream's kubelet has files, too.
const FILE_IN_ROOT: &str = "orlop.lock";

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
        "another orlop (pid {pid}) runs with {dir}; end it first (`orlop down`, or SIGTERM to a node of a cluster), or give \
         this node directories of its own (--state-dir, --run-dir, --root-dir)"
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
        Self::take_by(dir, FILE)
    }

    /// Makes the kubelet's root if it is missing and takes it. Others have files there, too: its mode stays as it is.
    pub(crate) fn take_root(dir: &Path) -> Result<Self, LockError> {
        let unusable = |source| LockError::Unusable { dir: dir.to_owned(), source };
        std::fs::DirBuilder::new().recursive(true).mode(0o750).create(dir).map_err(unusable)?;
        Self::take_by(dir, FILE_IN_ROOT)
    }

    fn take_by(dir: &Path, name: &str) -> Result<Self, LockError> {
        let unusable = |source| LockError::Unusable { dir: dir.to_owned(), source };
        let open = File::options().read(true).write(true).create(true).truncate(false).mode(0o600).open(dir.join(name));
        let mut file = open.map_err(unusable)?;
        match sys::lock::take(&mut file).map_err(unusable)? {
            None => Ok(Self { _file: file }),
            Some(pid) => Err(LockError::Taken { dir: dir.to_owned(), pid }),
        }
    }

    /// Whether somebody has `dir`. A directory without a lock file is free.
    pub(crate) fn is_taken(dir: &Path) -> bool {
        let Ok(file) = File::open(dir.join(FILE)) else { return false };
        sys::lock::try_lock(file.as_fd()).is_err()
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_second_is_told_who_the_first_is() {
        let dir = tempfile::tempdir().unwrap();
        let first = Lock::take(dir.path()).unwrap();
        let error = Lock::take(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        assert!(Lock::is_taken(dir.path()));
        drop(first);
        // What another test is just starting has it, too, until it executes its program.
        while Lock::is_taken(dir.path()) || Lock::take(dir.path()).is_err() {
            std::thread::yield_now();
        }
    }

    #[test]
    fn the_root_of_a_kubelet_has_one_too() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let _first = Lock::take_root(dir.path()).unwrap();
        assert_eq!(dir.path().metadata().unwrap().permissions().mode() & 0o777, 0o755);
        let error = Lock::take_root(dir.path()).unwrap_err().to_string();
        let first = format!("pid {}) runs with {}", std::process::id(), dir.path().display());
        assert!(error.contains(&first) && error.contains("--root-dir"), "{error}");
    }

    #[test]
    fn what_a_killed_process_was_starting_is_outlasted() {
        let dir = tempfile::tempdir().unwrap();
        let mut ended = child().spawn().unwrap();
        drop(ended.stdin.take());
        ended.wait().unwrap();
        let lock = Lock::take(dir.path()).unwrap();
        std::fs::write(dir.path().join("lock"), format!("{}\n", ended.id())).unwrap();
        // It has the lock when the process has gone, as one that has not executed yet.
        let mut heir = child().stdout(lock._file.try_clone().unwrap()).spawn().unwrap();
        drop(lock);
        let taken = std::thread::scope(|scope| {
            let taking = scope.spawn(|| Lock::take(dir.path()));
            while !is_waited_for() {
                assert!(!taking.is_finished(), "{:?}", taking.join());
                std::thread::yield_now();
            }
            drop(heir.stdin.take());
            taking.join().unwrap()
        });
        heir.wait().unwrap();
        taken.unwrap();
    }

    /// It ends with its standard input.
    #[expect(clippy::disallowed_methods, reason = "a test needs a process that has a descriptor of this one")]
    fn child() -> Command {
        let mut command = Command::new("cat");
        command.stdin(Stdio::piped());
        command
    }

    /// Whether this process waits for a lock (proc_locks(5)).
    fn is_waited_for() -> bool {
        let own = format!(" {} ", std::process::id());
        std::fs::read_to_string("/proc/locks").unwrap().lines().any(|line| line.contains("->") && line.contains(&own))
    }
}
