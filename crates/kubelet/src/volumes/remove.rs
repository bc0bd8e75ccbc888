//! Takes a pod's directory away: first every mount in it, then the files, following no link and entering no mount.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use sys::Context as _;
use sys::rustix::fs::{AtFlags, Dir, Mode, OFlags, ResolveFlags};
use sys::rustix::io::Errno;

use super::Cause;

/// Removes the directory of a pod and everything mounted in it.
pub(super) fn pod(dir: &Path) -> Result<(), Cause> {
    // The kernel lists mounts by their real paths.
    let real = match fs::canonicalize(dir) {
        Ok(real) => real,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Cause::file("look at", dir)(error)),
    };
    for mount in mounts_below(&real)? {
        sys::mount::detach(&mount)?;
    }
    let (Some(parent), Some(name)) = (real.parent(), real.file_name()) else { return Ok(()) };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let parent = sys::rustix::fs::open(parent, flags, Mode::empty()).during("open", parent.display())?;
    Ok(remove(&parent, Path::new(name), &real)?)
}

/// Mount points in a directory, those inside others first. A place mounted twice is listed twice.
fn mounts_below(dir: &Path) -> Result<Vec<PathBuf>, Cause> {
    let table = Path::new("/proc/thread-self/mountinfo");
    let text = fs::read(table).map_err(Cause::file("read", table))?;
    let mut mounts = mount_points(&text);
    mounts.retain(|mount| mount.starts_with(dir));
    mounts.sort_by_key(|mount| std::cmp::Reverse(mount.components().count()));
    Ok(mounts)
}

/// The fifth field of each line (proc_pid_mountinfo(5)), in which white space is written as `\040`.
fn mount_points(table: &[u8]) -> Vec<PathBuf> {
    let fields = table.split(|byte| *byte == b'\n').filter_map(|line| line.split(|byte| *byte == b' ').nth(4));
    fields.map(unescaped).collect()
}

fn unescaped(field: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStringExt as _;
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, more @ ..] = rest {
        let octal = more.get(..3).filter(|_| *first == b'\\');
        let octal = octal.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        out.push(octal.unwrap_or(*first));
        rest = if octal.is_some() { &more[3..] } else { more };
    }
    PathBuf::from(std::ffi::OsString::from_vec(out))
}

/// Removes the entry `name` of `parent` and, if it is a directory, what is in it. `shown` is for messages.
fn remove(parent: &OwnedFd, name: &Path, shown: &Path) -> sys::Result<()> {
    match sys::rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::ISDIR | Errno::PERM) => {}
        Err(errno) => return Err(errno).during("unlinkat", shown.display()),
    }
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    // EXDEV: something is still mounted here, and what is in it is not ours to remove.
    let dir =
        sys::rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve).during("openat2", shown.display())?;
    for entry in Dir::read_from(&dir).during("getdents64", shown.display())? {
        let entry = entry.during("getdents64", shown.display())?;
        let child = os_path(entry.file_name().to_bytes());
        if matches!(entry.file_name().to_bytes(), b"." | b"..") {
            continue;
        }
        remove(&dir, &child, &shown.join(&child))?;
    }
    match sys::rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Err(Errno::NOENT) => Ok(()),
        other => other.during("rmdir", shown.display()),
    }
}

fn os_path(bytes: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStrExt as _;
    PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_unescaped() {
        let table = b"22 1 0:21 / /proc rw - proc proc rw\n36 35 98:0 / /mnt/a\\040b\\134 rw - ext4 /dev/sda rw\n";
        assert_eq!(mount_points(table), [PathBuf::from("/proc"), PathBuf::from("/mnt/a b\\")]);
    }

    #[test]
    fn links_are_removed_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (keep, pod_dir) = (dir.path().join("keep"), dir.path().join("pod"));
        fs::create_dir_all(pod_dir.join("a/b")).unwrap();
        fs::create_dir(&keep).unwrap();
        fs::write(keep.join("file"), "x").unwrap();
        std::os::unix::fs::symlink(&keep, pod_dir.join("a/link")).unwrap();
        pod(&pod_dir).unwrap();
        assert!(!pod_dir.exists() && keep.join("file").exists());
        pod(&pod_dir).unwrap();
    }
}
