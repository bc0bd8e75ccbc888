//! A directory tree held by a descriptor: every operation is relative to it and cannot leave it.
//!
//! Names of one component go straight to the `*at` calls, which do not follow the last component; paths of several
//! components go through openat2 with `RESOLVE_BENEATH`, which refuses absolute links and `..` that would lead out.

use std::cell::Cell;
use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid};

/// An open directory, or a place in the tree that was opened only to be referred to (`O_PATH`).
#[derive(Debug)]
pub struct Dir(OwnedFd);

/// What kind of special file to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// A character device.
    Character {
        /// Major and minor number.
        device: (u32, u32),
    },
    /// A block device.
    Block {
        /// Major and minor number.
        device: (u32, u32),
    },
    /// A named pipe.
    Fifo,
}

/// Seconds and nanoseconds since 1970, for [`Dir::set_times`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Time {
    /// Whole seconds; may be negative.
    pub seconds: i64,
    /// Nanoseconds, below a thousand million.
    pub nanoseconds: u32,
}

/// What `stat` says, as far as trees need it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Meta {
    /// Regular file, directory, …
    pub kind: Kind,
    /// Permission and special bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Length in bytes.
    pub size: u64,
    /// Bytes allocated on disk.
    pub allocated: u64,
    /// Number of the inode.
    pub inode: u64,
    /// Names that the inode has.
    pub links: u64,
}

/// What a tree takes on disk, the top directory not counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Totals {
    /// Bytes allocated. A file with several names counts for each: nobody frees space by removing one of them.
    pub bytes: u64,
    /// Names.
    pub inodes: u64,
}

/// File types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device with number 0/0: overlayfs takes it as "deleted here".
    Whiteout,
    /// Any other.
    Other,
}

/// The upper end of a tree that is being removed.
struct Top<'a> {
    dir: &'a Dir,
    /// Directories moved up here so far.
    moved: Cell<u64>,
}

/// A directory on the way down, with the directories in it that are yet to be entered.
#[derive(Default)]
struct Level {
    inode: u64,
    directories: Vec<CString>,
}

/// What a walk does after an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Enters it, when its directory has been read to the end.
    Enter,
    /// Goes on beside it.
    Pass,
}

/// How often a tree is gone through that others go on filling.
const PASSES_MAX: u32 = 100_000;
const UP: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const PLACE: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);
const CONFINED: ResolveFlags = ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS);
/// As [`CONFINED`], no link followed anywhere, and not into what is mounted below.
const WITHIN: ResolveFlags = CONFINED.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_XDEV);

impl AsFd for Dir {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Dir {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl From<Dir> for OwnedFd {
    fn from(dir: Dir) -> Self {
        dir.0
    }
}

impl Dir {
    /// Opens the directory at `path` the ordinary way: for trusted paths, as the roots of trees are. By openat(2), the one
    /// spelling that a confined process may use.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(rustix::fs::openat(
            rustix::fs::CWD,
            path,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?))
    }

    /// The directory at `path` below this one. Symbolic links are followed as long as they stay below.
    pub fn place(&self, path: &[u8]) -> io::Result<Self> {
        Ok(Self(rustix::fs::openat2(&self.0, path, PLACE, Mode::empty(), CONFINED)?))
    }

    /// Anything at `path` below this directory, as `root` would be seen from inside it (`RESOLVE_IN_ROOT`), to refer to.
    pub fn place_in_root(&self, path: &Path) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(rustix::fs::openat2(&self.0, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)?)
    }

    /// The directory at `path` below this one, no link followed anywhere, opened so that it can be read and changed.
    pub fn open_real(&self, path: &[u8]) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(Self(rustix::fs::openat2(&self.0, path, flags, Mode::empty(), CONFINED | ResolveFlags::NO_SYMLINKS)?))
    }

    /// As [`Dir::open_real`], but fails with `CrossesDevices` where something is mounted.
    fn open_within(&self, name: &[u8]) -> io::Result<Self> {
        Ok(Self(rustix::fs::openat2(&self.0, name, UP, Mode::empty(), WITHIN)?))
    }

    /// Opens a regular file below this directory to read it; no link is followed anywhere.
    pub fn open_file(&self, path: &[u8]) -> io::Result<std::fs::File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = rustix::fs::openat2(&self.0, path, flags, Mode::empty(), CONFINED | ResolveFlags::NO_SYMLINKS)?;
        Ok(file.into())
    }

    /// A new regular file to write to. Fails with `AlreadyExists` whatever is there.
    pub fn create_file(&self, name: &[u8], mode: u32) -> io::Result<std::fs::File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.0, name, flags, Mode::from_raw_mode(mode))?.into())
    }

    /// A new directory.
    pub fn create_dir(&self, name: &[u8], mode: u32) -> io::Result<()> {
        Ok(rustix::fs::mkdirat(&self.0, name, Mode::from_raw_mode(mode))?)
    }

    /// A new symbolic link.
    pub fn create_symlink(&self, name: &[u8], target: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::symlinkat(target, &self.0, name)?)
    }

    /// A new device or named pipe.
    pub fn create_node(&self, name: &[u8], node: Node, mode: u32) -> io::Result<()> {
        let (kind, (major, minor)) = match node {
            Node::Character { device } => (FileType::CharacterDevice, device),
            Node::Block { device } => (FileType::BlockDevice, device),
            Node::Fifo => (FileType::Fifo, (0, 0)),
        };
        Ok(rustix::fs::mknodat(&self.0, name, kind, Mode::from_raw_mode(mode), rustix::fs::makedev(major, minor))?)
    }

    /// A second name for `old_name` in `old`; a link is linked itself, not what it points to.
    pub fn create_hard_link(&self, name: &[u8], old: &Self, old_name: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::linkat(&old.0, old_name, &self.0, name, AtFlags::empty())?)
    }

    /// Removes anything but a directory.
    pub fn remove_file(&self, name: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.0, name, AtFlags::empty())?)
    }

    /// Removes an empty directory.
    pub fn remove_dir(&self, name: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(&self.0, name, AtFlags::REMOVEDIR)?)
    }

    /// Removes `name` with everything below it, however deep. Missing is fine, and so is that others remove or make
    /// something in it at the same time, unless they go on and on.
    ///
    /// # Errors
    /// `CrossesDevices` or `ResourceBusy` when something is mounted in it, which stays as it is.
    pub fn remove_all(&self, name: &[u8]) -> io::Result<()> {
        for _ in 0..PASSES_MAX {
            match self.remove_file(name) {
                Err(e) if e.kind() == io::ErrorKind::IsADirectory => {}
                other => return unless_gone(other).map(drop),
            }
            let Some(top) = unless_gone(self.open_within(name))? else { return Ok(()) };
            top.remove_below(&Top { dir: &top, moved: Cell::new(0) }, 0)?;
            match self.remove_dir(name) {
                Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => {}
                other => return unless_gone(other).map(drop),
            }
        }
        Err(io::ErrorKind::DirectoryNotEmpty.into())
    }

    /// Empties this directory, some names at a time: whoever filled it must not fill our memory with them. What others
    /// put into its directories meanwhile stays.
    fn remove_below(&self, top: &Top<'_>, depth: u32) -> io::Result<()> {
        const NAMES: usize = 1024;
        for _ in 0..PASSES_MAX {
            let mut is_over = true;
            for name in self.some_names(NAMES)? {
                is_over &= !self.remove_entry(name.to_bytes(), top, depth)?;
            }
            if is_over {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Removes an entry, if nobody fills it; whether it is gone. Each level costs a descriptor: what is too deep is moved
    /// up to `top`, for its next pass.
    fn remove_entry(&self, name: &[u8], top: &Top<'_>, depth: u32) -> io::Result<bool> {
        const DEPTH_MAX: u32 = 32;
        match self.remove_file(name) {
            Err(e) if e.kind() == io::ErrorKind::IsADirectory => {}
            other => return unless_gone(other).map(|_| true),
        }
        if depth == DEPTH_MAX {
            return self.move_up(name, top).map(|()| true);
        }
        let Some(child) = unless_gone(self.open_within(name))? else { return Ok(true) };
        child.remove_below(top, depth + 1)?;
        match self.remove_dir(name) {
            Err(e) if e.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(false),
            other => unless_gone(other).map(|_| true),
        }
    }

    fn move_up(&self, name: &[u8], top: &Top<'_>) -> io::Result<()> {
        loop {
            let target = format!(".removed-{}", top.moved.get());
            top.moved.set(top.moved.get() + 1);
            match rustix::fs::renameat_with(&self.0, name, top.dir, target, rustix::fs::RenameFlags::NOREPLACE) {
                Err(rustix::io::Errno::EXIST) => {}
                other => return unless_gone(other.map_err(Into::into)).map(drop),
            }
        }
    }

    /// Adds up everything below this directory, however deep, but nothing that is mounted there. The tree may change
    /// meanwhile: what goes is passed over.
    ///
    /// # Errors
    /// `ResourceBusy` if directories move about faster than it gets on, `QuotaExceeded` for far too many of them.
    pub fn totals(&self) -> io::Result<Totals> {
        self.totals_while(&|| true)
    }

    /// As [`Dir::totals`], for as long as `goes_on`: then it is what was found until then.
    ///
    /// # Errors
    /// As [`Dir::totals`].
    pub fn totals_while(&self, goes_on: &dyn Fn() -> bool) -> io::Result<Totals> {
        let add = |totals: &mut Totals, at: &Self, name: &CStr| {
            // Names that are still to come are passed over one by one, and no directory is entered any more.
            if !goes_on() {
                return Ok(Next::Pass);
            }
            let Some(meta) = unless_gone(at.meta(name.to_bytes()))? else { return Ok(Next::Pass) };
            totals.inodes += 1;
            totals.bytes += meta.allocated;
            Ok(if meta.kind == Kind::Directory { Next::Enter } else { Next::Pass })
        };
        repeated(|| {
            let mut totals = Totals::default();
            self.walk(&mut |at, name| add(&mut totals, at, name)).map(|()| totals)
        })
    }

    /// Calls `visit` with everything below this directory, however deep, but with nothing that is mounted there: each is
    /// opened to be referred to (`O_PATH`), no link is followed. The tree may change meanwhile: what goes is passed over,
    /// and `visit` may see something twice.
    ///
    /// # Errors
    /// Those of `visit`; and as [`Dir::totals`].
    pub fn for_each_below(&self, mut visit: impl FnMut(BorrowedFd<'_>, Meta) -> io::Result<()>) -> io::Result<()> {
        repeated(|| {
            self.walk(&mut |at, name| {
                let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let opened = rustix::fs::openat2(&at.0, name, flags, Mode::empty(), WITHIN);
                let Some(entry) = unless_closed(opened.map_err(Into::into))? else { return Ok(Next::Pass) };
                let meta = meta(entry.as_fd())?;
                visit(entry.as_fd(), meta)?;
                Ok(if meta.kind == Kind::Directory { Next::Enter } else { Next::Pass })
            })
        })
    }

    /// Calls `visit` for each name in each directory below this one, with one directory open at a time.
    fn walk(&self, visit: &mut dyn FnMut(&Self, &CStr) -> io::Result<Next>) -> io::Result<()> {
        let mut at = self.open_real(b".")?;
        let mut level = at.read_level(visit, 0)?;
        let (mut above, mut waiting): (Vec<Level>, _) = (Vec::new(), level.directories.len());
        loop {
            let Some(name) = level.directories.pop() else {
                let Some(upper) = above.pop() else { return Ok(()) };
                level = upper;
                at = Self(rustix::fs::openat(&at.0, c"..", UP, Mode::empty())?);
                if meta(at.as_fd())?.inode != level.inode {
                    return Err(io::Error::new(io::ErrorKind::ResourceBusy, "directories are being moved about"));
                }
                continue;
            };
            waiting -= 1;
            let Some(below) = unless_closed(at.open_within(name.to_bytes()))? else { continue };
            let next = below.read_level(visit, waiting)?;
            waiting += next.directories.len();
            above.push(std::mem::replace(&mut level, next));
            at = below;
        }
    }

    /// Visits what is in this directory. `waiting` directories are remembered already.
    fn read_level(&self, visit: &mut dyn FnMut(&Self, &CStr) -> io::Result<Next>, waiting: usize) -> io::Result<Level> {
        /// Each costs some 50 bytes. It is a pod that makes them, and our memory that they are in.
        const WAITING_MAX: usize = 500_000;
        let mut level = Level { inode: meta(self.as_fd())?.inode, directories: Vec::new() };
        self.each_name(|name| {
            if visit(self, name)? == Next::Enter {
                level.directories.push(name.to_owned());
            }
            if waiting + level.directories.len() > WAITING_MAX {
                return Err(io::Error::new(io::ErrorKind::QuotaExceeded, "too many directories beside each other"));
            }
            Ok(true)
        })?;
        Ok(level)
    }

    /// The names in this directory, without `.` and `..`.
    pub fn names(&self) -> io::Result<Vec<CString>> {
        self.some_names(usize::MAX)
    }

    /// At most `limit` of the names in this directory.
    fn some_names(&self, limit: usize) -> io::Result<Vec<CString>> {
        let mut names = Vec::new();
        self.each_name(|name| {
            names.push(name.to_owned());
            Ok(names.len() < limit)
        })?;
        Ok(names)
    }

    /// Calls `visit` with each name in this directory, without `.` and `..`, until it returns false.
    fn each_name(&self, mut visit: impl FnMut(&CStr) -> io::Result<bool>) -> io::Result<()> {
        for entry in rustix::fs::Dir::read_from(&self.0)? {
            let entry = entry?;
            if !matches!(entry.file_name().to_bytes(), b"." | b"..") && !visit(entry.file_name())? {
                break;
            }
        }
        Ok(())
    }

    /// Whether this directory has no entries.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.names()?.is_empty())
    }

    /// What a symbolic link holds. `path` may have several components; none of them may be a link but the last.
    pub fn read_link(&self, path: &[u8]) -> io::Result<Vec<u8>> {
        Ok(rustix::fs::readlinkat(&self.0, path, Vec::new())?.into_bytes())
    }

    /// The metadata of `name` itself.
    pub fn meta(&self, name: &[u8]) -> io::Result<Meta> {
        Ok(meta_of(&rustix::fs::statat(&self.0, name, AtFlags::SYMLINK_NOFOLLOW)?))
    }

    /// Owner and group of `name` itself.
    pub fn set_owner(&self, name: &[u8], uid: u32, gid: u32) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        Ok(rustix::fs::chownat(&self.0, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Modification and access time of `name` itself.
    pub fn set_times(&self, name: &[u8], time: Time) -> io::Result<()> {
        Ok(rustix::fs::utimensat(&self.0, name, &timestamps(time), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Makes this the working directory of the process.
    pub fn enter(&self) -> io::Result<()> {
        Ok(rustix::process::fchdir(&self.0)?)
    }
}

/// Tries again what fails because directories move about.
fn repeated<T>(mut attempt: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    const ATTEMPTS: u32 = 10;
    for _ in 1..ATTEMPTS {
        match attempt() {
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy => {}
            other => return other,
        }
    }
    attempt()
}

/// Nothing instead of what is gone, has become something else meanwhile, or is a mount.
fn unless_closed<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTDIR | libc::ELOOP | libc::EXDEV)) => Ok(None),
        other => unless_gone(other),
    }
}

/// Nothing instead of `NotFound`.
fn unless_gone<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

/// From now on files get exactly the mode that they are created with.
pub fn clear_umask() {
    rustix::process::umask(Mode::empty());
}

/// Owner and group of an open file or directory.
pub fn set_owner(file: BorrowedFd<'_>, uid: u32, gid: u32) -> io::Result<()> {
    Ok(rustix::fs::fchown(file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?)
}

/// Permission and special bits of an open file or directory.
pub fn set_mode(file: BorrowedFd<'_>, mode: u32) -> io::Result<()> {
    Ok(rustix::fs::fchmod(file, Mode::from_raw_mode(mode))?)
}

/// Modification and access time of an open file or directory.
pub fn set_times(file: BorrowedFd<'_>, time: Time) -> io::Result<()> {
    Ok(rustix::fs::futimens(file, &timestamps(time))?)
}

/// The metadata of an open file or directory.
pub fn meta(file: BorrowedFd<'_>) -> io::Result<Meta> {
    Ok(meta_of(&rustix::fs::fstat(file)?))
}

/// Has everything of the file system that `file` is on written to disk.
pub fn sync_file_system(file: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::fs::syncfs(file)?)
}

/// Size and free space of the file system at `path`: bytes in all, bytes that unprivileged writers may still take.
pub fn space(path: &Path) -> io::Result<(u64, u64)> {
    let facts = rustix::fs::statvfs(path)?;
    Ok((facts.f_blocks * facts.f_frsize, facts.f_bavail * facts.f_frsize))
}

fn timestamps(time: Time) -> Timestamps {
    let spec = Timespec { tv_sec: time.seconds, tv_nsec: i64::from(time.nanoseconds) };
    Timestamps { last_access: spec, last_modification: spec }
}

fn meta_of(stat: &rustix::fs::Stat) -> Meta {
    let kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        FileType::CharacterDevice if stat.st_rdev == 0 => Kind::Whiteout,
        _ => Kind::Other,
    };
    Meta {
        kind,
        mode: stat.st_mode & 0o7777,
        uid: stat.st_uid,
        gid: stat.st_gid,
        size: u64::try_from(stat.st_size).unwrap_or(0),
        allocated: u64::try_from(stat.st_blocks).unwrap_or(0) * 512,
        inode: stat.st_ino,
        #[allow(clippy::useless_conversion, reason = "the width of st_nlink depends on the architecture")]
        links: stat.st_nlink.into(),
    }
}

/// A C string for calls that take one; names with a NUL byte are refused with `InvalidInput`.
pub fn c_string(bytes: &[u8]) -> io::Result<CString> {
    CString::new(bytes).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deeper than a process may have descriptors, or a path may be long.
    const DEPTH: usize = 2000;

    fn deep_tree(root: &Dir) {
        let mut at = Dir::from(root.0.try_clone().unwrap());
        for _ in 0..DEPTH {
            at.create_dir(b"directory", 0o700).unwrap();
            at = at.open_real(b"directory").unwrap();
        }
    }

    #[test]
    fn removes_trees_of_any_depth() {
        let scratch = tempfile::tempdir().unwrap();
        let parent = Dir::open(scratch.path()).unwrap();
        parent.create_dir(b"tree", 0o700).unwrap();
        deep_tree(&parent.open_real(b"tree").unwrap());
        assert_eq!(parent.totals().unwrap().inodes, 1 + DEPTH as u64);
        parent.remove_all(b"tree").unwrap();
        assert!(parent.is_empty().unwrap());
        parent.remove_all(b"tree").unwrap();
    }

    #[test]
    fn visits_trees_of_any_depth_and_follows_no_link() {
        let scratch = tempfile::tempdir().unwrap();
        let parent = Dir::open(scratch.path()).unwrap();
        parent.create_dir(b"kept", 0o700).unwrap();
        parent.open_real(b"kept").unwrap().create_file(b"file", 0o600).unwrap();
        parent.create_dir(b"tree", 0o700).unwrap();
        let tree = parent.open_real(b"tree").unwrap();
        deep_tree(&tree);
        tree.create_symlink(b"link", b"../kept").unwrap();
        tree.create_node(b"pipe", Node::Fifo, 0o600).unwrap();
        let mut seen = Vec::new();
        let visit = |_: BorrowedFd<'_>, meta: Meta| {
            seen.push(meta.kind);
            Ok(())
        };
        tree.for_each_below(visit).unwrap();
        let count = |kind: Kind| seen.iter().filter(|seen| **seen == kind).count();
        assert_eq!([count(Kind::Directory), count(Kind::Symlink), count(Kind::Other)], [DEPTH, 1, 1]);
        assert_eq!(seen.len(), DEPTH + 2);
        tree.for_each_below(|_, _| Err(io::ErrorKind::Interrupted.into())).unwrap_err();
        parent.remove_all(b"tree").unwrap();
    }

    #[test]
    fn removes_directories_of_any_length() {
        let scratch = tempfile::tempdir().unwrap();
        let parent = Dir::open(scratch.path()).unwrap();
        parent.create_dir(b"tree", 0o700).unwrap();
        let tree = parent.open_real(b"tree").unwrap();
        for number in 0..3000 {
            tree.create_file(format!("file-{number}").as_bytes(), 0o600).unwrap();
            tree.create_dir(format!("directory-{number}").as_bytes(), 0o700).unwrap();
        }
        parent.remove_all(b"tree").unwrap();
        assert!(parent.is_empty().unwrap());
    }

    #[test]
    fn removes_links_and_not_what_they_point_to() {
        let scratch = tempfile::tempdir().unwrap();
        let parent = Dir::open(scratch.path()).unwrap();
        parent.create_dir(b"kept", 0o700).unwrap();
        parent.create_dir(b"tree", 0o700).unwrap();
        let tree = parent.open_real(b"tree").unwrap();
        tree.create_symlink(b"link", b"../kept").unwrap();
        parent.remove_all(b"tree").unwrap();
        assert_eq!(parent.names().unwrap(), [c"kept".to_owned()]);
    }
}
