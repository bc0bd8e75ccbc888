//! Takes a pod's directory away: first every mount in it, then the files, following no link and entering no mount.
//!
//! What is in it was written by the pod: trees of any depth and size, in which nothing is taken at its word.

use std::fs;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use sys::tree::Dir;

use super::Cause;

/// Removes the directory of a pod and everything mounted in it.
pub(super) fn pod(dir: &Path) -> Result<(), Cause> {
    // The kernel lists mounts by their real paths.
    let real = match fs::canonicalize(dir) {
        Ok(real) => real,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(Cause::file("look at", dir)(error)),
    };
    detach_below(&real)?;
    tree(&real)
}

/// Takes off what is mounted in a directory, which stays.
pub(super) fn mounts_below(dir: &Path) -> Result<(), Cause> {
    match fs::canonicalize(dir) {
        Ok(real) => detach_below(&real),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Cause::file("look at", dir)(error)),
    }
}

/// Takes off what is mounted at a path.
pub(super) fn mount_at(path: &Path) -> Result<(), Cause> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(()) };
    while is_mountpoint(path)? {
        let parent = Dir::open(parent).map_err(Cause::file("open", parent))?;
        sys::mount::detach_in(parent.as_fd(), name)?;
    }
    Ok(())
}

/// Whether something is mounted at a path. What is mounted there is not touched: it may not answer.
pub(super) fn is_mountpoint(path: &Path) -> Result<bool, Cause> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Ok(false) };
    let real = match fs::canonicalize(parent) {
        Ok(real) => real.join(name),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(Cause::file("look at", parent)(error)),
    };
    let table = mount_table()?;
    let mut mounts = table.split(|byte| *byte == b'\n').filter_map(Mount::parse);
    Ok(mounts.any(|mount| mount.place == real))
}

/// Removes a directory with everything below it; nothing may be mounted there.
pub(super) fn tree(dir: &Path) -> Result<(), Cause> {
    let (Some(parent), Some(name)) = (dir.parent(), dir.file_name()) else { return Ok(()) };
    let removed = Dir::open(parent).and_then(|parent| parent.remove_all(name.as_bytes()));
    removed.map_err(Cause::file("remove", dir))
}

/// Takes every mount in a directory off. Only the outermost are named: what is mounted inside one goes with it, and no
/// path leads through a file system that may not answer.
fn detach_below(dir: &Path) -> Result<(), Cause> {
    let root = Dir::open(dir).map_err(Cause::file("open", dir))?;
    // What lies below another mount on the same place shows when that one is gone.
    loop {
        let mounts = outermost(&mount_table()?, dir);
        if mounts.is_empty() {
            return Ok(());
        }
        for mount in mounts {
            detach(&root, dir, &mount)?;
        }
    }
}

fn detach(root: &Dir, dir: &Path, mount: &Path) -> Result<(), Cause> {
    let inside = mount.strip_prefix(dir).ok().and_then(|inside| Some((inside.parent()?, inside.file_name()?)));
    let Some((parent, name)) = inside else { return Ok(sys::mount::detach(mount)?) };
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    let parent = root.open_real(parent.as_os_str().as_bytes()).map_err(Cause::file("open", mount))?;
    Ok(sys::mount::detach_in(parent.as_fd(), name)?)
}

fn mount_table() -> Result<Vec<u8>, Cause> {
    let table = Path::new("/proc/thread-self/mountinfo");
    fs::read(table).map_err(Cause::file("read", table))
}

/// The mount points in a directory whose own mounts lie outside.
fn outermost(table: &[u8], dir: &Path) -> Vec<PathBuf> {
    let mut mounts: Vec<Mount> = table.split(|byte| *byte == b'\n').filter_map(Mount::parse).collect();
    mounts.retain(|mount| mount.place.starts_with(dir));
    let is_inside = |mount: &Mount| mounts.iter().any(|other| other.id == mount.parent);
    mounts.iter().filter(|mount| !is_inside(mount)).map(|mount| mount.place.clone()).collect()
}

/// A line of the table (proc_pid_mountinfo(5)).
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    id: u64,
    parent: u64,
    place: PathBuf,
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let mut number = || std::str::from_utf8(fields.next()?).ok()?.parse().ok();
        let (id, parent) = (number()?, number()?);
        Some(Self { id, parent, place: unescaped(fields.nth(2)?) })
    }
}

/// White space is written as `\040`.
fn unescaped(field: &[u8]) -> PathBuf {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_mounts_inside_each_other_the_outermost_is_named() {
        let table = b"22 1 0:21 / /proc rw - proc proc rw\n\
            36 22 98:0 / /pod/a\\040b\\134 rw - ext4 /dev/sda rw\n\
            37 36 98:1 / /pod/a\\040b\\134/c rw shared:1 - ext4 /dev/sdb rw\n\
            38 22 98:2 / /pods rw - ext4 /dev/sdc rw\n";
        assert_eq!(outermost(table, Path::new("/pod")), [PathBuf::from("/pod/a b\\")]);
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
