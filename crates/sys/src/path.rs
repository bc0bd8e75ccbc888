//! Paths inside a tree that somebody else fills: resolved below a directory descriptor, never as strings (R1).

use std::ffi::OsString;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::error::{Context as _, Error, Result};
use crate::program::mount_of;

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

/// Opens the regular file `path` for reading as [`open_in_root`] finds it. Nothing else is opened: to open a device may be to use
/// it, as of a watchdog.
///
/// # Errors
/// `EMEDIUMTYPE` for what is no regular file; else as [`open_in_root`].
pub fn open_file_in_root(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd> {
    let place = open_in_root(root, path, OFlags::PATH)?;
    let stat = rustix::fs::fstat(&place).during("fstat", path.display())?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        let subject = format!("{} (not a regular file)", path.display());
        return Err(Error { call: "open", subject, errno: Errno::MEDIUMTYPE });
    }
    let same = format!("/proc/self/fd/{}", place.as_raw_fd());
    rustix::fs::open(same, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).during("open", path.display())
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
/// as `kind`. A link that leads nowhere is followed, too: images have `/etc/resolv.conf` lead to what a host's services make.
/// One in a volume is not: whoever else may write there has put it, and chooses no place in this container. Nothing is made
/// outside `root`, whatever links lie on the way.
///
/// # Errors
/// `ENOTDIR`, `ELOOP`, `EROFS`.
pub fn make_in_root(root: BorrowedFd<'_>, path: &Path, kind: Kind) -> Result<OwnedFd> {
    make_through(root, path, kind, LINKS_MAX)
}

/// As [`make_in_root`], but no link is completed: in a volume those who may write there have put it, and a working directory
/// is where the image has it.
///
/// # Errors
/// `ELOOP` for a link that leads nowhere; else as [`make_in_root`].
pub fn make_in_root_strictly(root: BorrowedFd<'_>, path: &Path, kind: Kind) -> Result<OwnedFd> {
    make_through(root, path, kind, 0)
}

/// Links that lead nowhere on the way to one place, as many as the kernel follows.
const LINKS_MAX: usize = 40;

fn make_through(root: BorrowedFd<'_>, path: &Path, kind: Kind, links: usize) -> Result<OwnedFd> {
    if let Ok(found) = open_in_root(root, path, OFlags::PATH) {
        return Ok(found);
    }
    let parts: Vec<_> =
        path.components().filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir)).collect();
    // From the end, as most is there: the longest way that leads somewhere.
    let way = |count: usize| Path::new("/").join(parts[..count].iter().collect::<PathBuf>());
    let mut count = parts.len();
    while count > 1 && open_in_root(root, &way(count - 1), OFlags::PATH).is_err() {
        count -= 1;
    }
    for index in count.saturating_sub(1)..parts.len() {
        let parent = open_in_root(root, &way(index), OFlags::PATH | OFlags::DIRECTORY)?;
        let kind = if index + 1 == parts.len() { kind } else { Kind::Directory };
        let name = Path::new(parts[index].as_os_str());
        if let Some(target) = make(parent.as_fd(), name, kind)? {
            let dangling = || Error {
                call: "openat2",
                subject: format!("{} (a dangling symbolic link)", name.display()),
                errno: Errno::LOOP,
            };
            let is_roots = mount_of(parent.as_fd(), Path::new(""))? == mount_of(root, Path::new(""))?;
            let links = links.checked_sub(1).filter(|_| is_roots).ok_or_else(dangling)?;
            make_through(root, &way(index).join(target), kind, links)?;
        }
    }
    open_in_root(root, path, OFlags::PATH)
}

/// Makes it, unless something has the name already. If that is a link, where it is to lead.
fn make(parent: BorrowedFd<'_>, name: &Path, kind: Kind) -> Result<Option<PathBuf>> {
    let (call, made) = match kind {
        Kind::Directory => ("mkdirat", rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755))),
        Kind::File => {
            let mode = Mode::from_raw_mode(0o644);
            ("mknodat", rustix::fs::mknodat(parent, name, FileType::RegularFile, mode, 0))
        }
    };
    match made {
        Err(Errno::EXIST) => match rustix::fs::readlinkat(parent, name, Vec::new()) {
            Ok(target) => Ok(Some(OsString::from_vec(target.into_bytes()).into())),
            Err(Errno::INVAL) => Ok(None), // It is no link.
            Err(errno) => Err(errno).during("readlinkat", name.display()),
        },
        other => other.during(call, name.display()).map(|()| None),
    }
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

    /// An image's /etc/passwd may be the node's watchdog, which restarts the machine some time after it was opened.
    #[test]
    fn only_what_is_a_regular_file_is_opened() {
        use rustix::fs::inotify;
        let (dir, root) = scratch();
        std::fs::write(dir.join("file"), "text").unwrap();
        symlink("/file", dir.join("link")).unwrap();
        let read = open_file_in_root(root.as_fd(), Path::new("/link")).unwrap();
        assert_eq!(std::io::read_to_string(std::fs::File::from(read)).unwrap(), "text");
        rustix::fs::mknodat(&root, "pipe", FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let opens = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        inotify::add_watch(&opens, dir.join("pipe"), inotify::WatchFlags::OPEN).unwrap();
        for path in ["/pipe", "/"] {
            let refused = open_file_in_root(root.as_fd(), Path::new(path)).unwrap_err();
            assert_eq!(refused.errno, Errno::MEDIUMTYPE, "{path}");
        }
        assert_eq!(rustix::io::read(&opens, &mut [0; 256]), Err(Errno::AGAIN), "it was opened");
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_dangling_link_is_completed_within_the_root() {
        let (dir, root) = scratch();
        std::fs::create_dir(dir.join("etc")).unwrap();
        symlink("../run/resolve/stub.conf", dir.join("etc/resolv.conf")).unwrap();
        symlink("/run/lock", dir.join("lock")).unwrap();
        symlink("../../../../orlop-outside/made", dir.join("up")).unwrap();
        for (path, made, kind) in [
            ("/etc/resolv.conf", "run/resolve/stub.conf", Kind::File),
            ("/lock/deep/place", "run/lock/deep/place", Kind::Directory),
            ("/up", "orlop-outside/made", Kind::File),
        ] {
            make_in_root(root.as_fd(), Path::new(path), kind).unwrap();
            let found = std::fs::metadata(dir.join(made)).unwrap();
            assert_eq!(found.is_dir(), kind == Kind::Directory, "{path}");
        }
        assert!(!Path::new("/orlop-outside").exists() && !Path::new("/run/resolve").exists());
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn links_that_lead_to_each_other_are_refused() {
        let (dir, root) = scratch();
        symlink("two", dir.join("one")).unwrap();
        symlink("one", dir.join("two")).unwrap();
        for path in ["/one", "/one/below"] {
            let made = make_in_root(root.as_fd(), Path::new(path), Kind::File);
            assert_eq!(made.unwrap_err().errno, Errno::LOOP, "{path}");
        }
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_dangling_link_is_refused_where_none_is_completed() {
        let (dir, root) = scratch();
        symlink("/nowhere", dir.join("link")).unwrap();
        let made = make_in_root_strictly(root.as_fd(), Path::new("/link"), Kind::Directory);
        assert_eq!(made.unwrap_err().errno, Errno::LOOP);
        assert!(!dir.join("nowhere").exists());
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
