//! Paths inside a tree that somebody else fills: resolved below a directory descriptor, never as strings (R1).

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Component, Path};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Context as _, Error, Result};

/// What a path that is made should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// An empty regular file.
    File,
}

/// Opens `path` as if `root` were `/`: symbolic links, absolute ones too, cannot lead out of it, and magic links of
/// `/proc` are refused (openat2(2) `RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS`).
///
/// # Errors
/// `ENOENT`; `ELOOP` for a magic link; `EAGAIN` is retried.
pub fn open_in_root(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd> {
    open(root, path, flags, ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

/// Opens `path` below `root`; a link that leads out is an error (`RESOLVE_BENEATH`).
///
/// # Errors
/// `EXDEV` for a way out.
pub fn open_beneath(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd> {
    open(root, path, flags, ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS)
}

/// Opens `path` below `root` where no part may be a link or another mount: kernel files, which nothing may cover.
///
/// # Errors
/// `ELOOP` for a link, `EXDEV` for a mount on the way.
pub fn open_plain(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd> {
    open(root, path, flags, ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV)
}

/// Opens `path` as if `root` were `/`, where no part may be a symbolic link: for what must stand where its name says.
///
/// # Errors
/// `ELOOP` for a link.
pub fn open_unlinked(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd> {
    open(root, path, flags, ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS)
}

/// The caller's `/proc`, and nothing that only looks like it.
///
/// # Errors
/// `ENOENT`; `EXDEV` when something else is mounted there.
pub fn open_proc() -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let proc = rustix::fs::open("/proc", flags, Mode::empty()).during("open", "/proc")?;
    let found = rustix::fs::fstatfs(&proc).during("fstatfs", "/proc")?;
    if found.f_type == rustix::fs::PROC_SUPER_MAGIC {
        return Ok(proc);
    }
    Err(Error { call: "open", subject: "/proc (not a procfs)".to_owned(), errno: Errno::XDEV })
}

/// A place of the host as `O_PATH`: it can be copied, or mounted upon, while it is in the caller's mount namespace.
///
/// # Errors
/// `ENOENT`.
pub fn open_place(path: &Path) -> Result<OwnedFd> {
    rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).during("open", path.display())
}

fn open(root: BorrowedFd<'_>, path: &Path, flags: OFlags, resolve: ResolveFlags) -> Result<OwnedFd> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let mode = if flags.contains(OFlags::CREATE) { Mode::from_raw_mode(0o644) } else { Mode::empty() };
    loop {
        // EAGAIN: a rename raced with the resolution of "..": the kernel asks to try again.
        match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, mode, resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other.during("openat2", path.display()),
        }
    }
}

/// Opens `path` inside `root` as a mount target (`O_PATH`), making what is missing: directories 0755, and the last part
/// as `kind`. Nothing is made outside `root`, whatever links lie on the way.
///
/// # Errors
/// `ENOTDIR`, `ELOOP`, `EROFS`.
pub fn make_in_root(root: BorrowedFd<'_>, path: &Path, kind: Kind) -> Result<OwnedFd> {
    if let Ok(found) = open_in_root(root, path, OFlags::PATH) {
        return Ok(found);
    }
    let parts: Vec<_> =
        path.components().filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir)).collect();
    // From the end, as most is there: the longest way that leads somewhere.
    let way = |count: usize| Path::new("/").join(parts[..count].iter().collect::<std::path::PathBuf>());
    let mut count = parts.len();
    while count > 1 && open_in_root(root, &way(count - 1), OFlags::PATH).is_err() {
        count -= 1;
    }
    for index in count.saturating_sub(1)..parts.len() {
        let parent = open_in_root(root, &way(index), OFlags::PATH | OFlags::DIRECTORY)?;
        let name = Path::new(parts[index].as_os_str());
        if index + 1 == parts.len() && kind == Kind::File {
            make_file(parent.as_fd(), name)?;
        } else {
            make_directory(parent.as_fd(), name)?;
        }
    }
    open_in_root(root, path, OFlags::PATH)
}

fn make_directory(parent: BorrowedFd<'_>, name: &Path) -> Result<()> {
    match rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST) => dangling(parent, name),
        other => other.during("mkdirat", name.display()),
    }
}

fn make_file(parent: BorrowedFd<'_>, name: &Path) -> Result<()> {
    match rustix::fs::mknodat(parent, name, FileType::RegularFile, Mode::from_raw_mode(0o644), 0) {
        Err(Errno::EXIST) => dangling(parent, name),
        other => other.during("mknodat", name.display()),
    }
}

/// Something has the name but leads nowhere: a dangling link is replaced by nothing of ours.
fn dangling(parent: BorrowedFd<'_>, name: &Path) -> Result<()> {
    let stat = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).during("fstatat", name.display())?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink {
        return Err(Error {
            call: "openat2",
            subject: format!("{} (a dangling symbolic link)", name.display()),
            errno: Errno::LOOP,
        });
    }
    Ok(())
}

/// Whether the descriptor refers to a directory.
///
/// # Errors
/// None in practice.
pub fn is_directory(fd: BorrowedFd<'_>) -> Result<bool> {
    let stat = rustix::fs::fstat(fd).during("fstat", "")?;
    Ok(FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn scratch() -> (std::path::PathBuf, OwnedFd) {
        let dir =
            std::env::temp_dir().join(format!("orlop-path-{}-{:?}", std::process::id(), std::thread::current().id()));
        std::fs::create_dir_all(&dir).unwrap();
        let fd = rustix::fs::open(&dir, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        (dir, fd)
    }

    #[test]
    fn links_cannot_lead_out() {
        let (dir, root) = scratch();
        symlink("/etc", dir.join("out")).unwrap();
        symlink("../../..", dir.join("up")).unwrap();
        make_in_root(root.as_fd(), Path::new("/etc/made-here"), Kind::File).unwrap();
        let through = open_in_root(root.as_fd(), Path::new("/out/made-here"), OFlags::PATH);
        assert!(through.is_ok(), "an absolute link leads to the root's own /etc");
        assert!(open_in_root(root.as_fd(), Path::new("/up/etc/passwd"), OFlags::PATH).is_err());
        assert!(!Path::new("/etc/made-here").exists());
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_dangling_link_is_refused() {
        let (dir, root) = scratch();
        symlink("/nowhere", dir.join("link")).unwrap();
        let made = make_in_root(root.as_fd(), Path::new("/link"), Kind::File);
        assert_eq!(made.unwrap_err().errno, Errno::LOOP);
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn missing_parents_are_made() {
        let (dir, root) = scratch();
        let made = make_in_root(root.as_fd(), Path::new("/a/b/c"), Kind::Directory).unwrap();
        assert!(is_directory(made.as_fd()).unwrap());
        assert!(dir.join("a/b/c").is_dir());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
