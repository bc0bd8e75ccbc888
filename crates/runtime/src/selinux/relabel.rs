//! Giving files of the host to a container: the label of its mounts on a directory with all that is in it.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use sys::rustix::io::Errno;
use sys::tree::{self, Dir};
use sys::{path, xattr};

const NAME: &std::ffi::CStr = c"security.selinux";

/// What is never relabelled, as upstream's runtimes have it: the host could not go on. Below them it is allowed.
const REFUSED: &[&str] = &[
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/etc/passwd",
    "/etc/pki",
    "/etc/shadow",
    "/home",
    "/lib",
    "/lib64",
    "/media",
    "/opt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/srv",
    "/sys",
    "/tmp",
    "/usr",
    "/usr/bin",
    "/usr/lib",
    "/usr/lib64",
    "/usr/sbin",
    "/var",
    "/var/lib",
    "/var/log",
];

/// Why a volume was not relabelled.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RelabelError {
    /// It is the host's own.
    #[error("SELinux relabeling of {0} is not allowed: mount a directory below it, or do not ask for a relabel")]
    Refused(String),
    /// The kernel refused.
    #[error(transparent)]
    Host(#[from] io::Error),
}

/// Labels what is at `path`, links on the way to it followed, and all that is below, links there not followed. A file
/// system without labels is left as it is.
///
/// # Errors
/// The place is the host's own, or the kernel refuses.
pub(crate) fn path(path: &Path, label: &str) -> Result<(), RelabelError> {
    let real = std::fs::canonicalize(path)?;
    // By either name: `/home` may be a link, and `/usr/bin` is what `/bin` is one to.
    if REFUSED.iter().map(Path::new).any(|refused| real == refused || path == refused) {
        return Err(RelabelError::Refused(real.display().to_string()));
    }
    let place = path::open_place(&real).map_err(|error| io::Error::from(error.errno))?;
    Ok(tree(place.as_fd(), label)?)
}

/// As [`path`], of what was opened: a file, or a directory with all that is below. What is mounted there is left.
///
/// # Errors
/// The kernel refuses.
pub(crate) fn tree(top: BorrowedFd<'_>, label: &str) -> io::Result<()> {
    // The top is labelled last: who finds it labelled may rely on the rest.
    if tree::meta(top)?.kind == tree::Kind::Directory {
        let directory = Dir::from(top.try_clone_to_owned()?);
        directory.for_each_below(|entry, _| one(entry, label))?;
    }
    one(top, label)
}

fn one(place: BorrowedFd<'_>, label: &str) -> io::Result<()> {
    // The kernel shows a label with a zero byte at its end.
    let own = xattr::get_place(place, NAME)?;
    if own.is_some_and(|own| own.strip_suffix(b"\0").unwrap_or(&own) == label.as_bytes()) {
        return Ok(());
    }
    match xattr::set_place(place, NAME, label.as_bytes()) {
        Err(error) if error.raw_os_error() == Some(Errno::OPNOTSUPP.raw_os_error()) => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_the_hosts_own_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/usr", &link).unwrap();
        for refused in ["/", "/usr/", "/etc/../usr", &link.to_string_lossy()] {
            let error = path(Path::new(refused), "a:b:c:s0").unwrap_err().to_string();
            assert!(error.contains("is not allowed"), "{refused}: {error}");
        }
        assert!(matches!(path(&dir.path().join("none"), "a:b:c:s0"), Err(RelabelError::Host(_))));
    }
}
