//! Mounts by descriptor: the mount API of Linux 5.2 and mount_setattr(2) of 5.12.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags,
};

use crate::error::{Context as _, Error, Result};

/// Attributes for [`set_attributes`], numbered as in mount_setattr(2).
pub mod attribute {
    /// No writes.
    pub const READ_ONLY: u64 = 0x1;
    /// No set-user-id.
    pub const NO_SUID: u64 = 0x2;
    /// No device nodes.
    pub const NO_DEV: u64 = 0x4;
    /// No execution.
    pub const NO_EXEC: u64 = 0x8;
    /// The mask of the three kinds of access times.
    pub const ACCESS_TIME: u64 = 0x70;
    /// No access times.
    pub const NO_ATIME: u64 = 0x10;
    /// Access times always.
    pub const STRICT_ATIME: u64 = 0x20;
    /// No access times of directories.
    pub const NO_DIR_ATIME: u64 = 0x80;
    /// Ids mapped by a user namespace.
    pub const ID_MAP: u64 = 0x10_0000;
    /// No symbolic links are followed.
    pub const NO_SYMFOLLOW: u64 = 0x20_0000;
}

/// How changes of mounts travel between copies of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagation {
    /// Not at all.
    Private,
    /// From the original to the copy.
    Slave,
    /// Both ways.
    Shared,
    /// Not at all, and it cannot be bound.
    Unbindable,
}

impl Propagation {
    fn number(self) -> u64 {
        match self {
            Self::Private => libc::MS_PRIVATE,
            Self::Slave => libc::MS_SLAVE,
            Self::Shared => libc::MS_SHARED,
            Self::Unbindable => libc::MS_UNBINDABLE,
        }
    }
}

/// A file system of a kind, configured by options and detached from every tree.
///
/// Flags are written as `("ro", None)`, options as `("size", Some("64m"))`.
///
/// # Errors
/// `ENODEV` for a kind that the kernel lacks, `EINVAL` for an option that it refuses.
pub fn new_filesystem(kind: &str, options: &[(&str, Option<&str>)], attributes: u64) -> Result<OwnedFd> {
    let context = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).during("fsopen", kind)?;
    for (key, value) in options {
        match value {
            Some(value) => rustix::mount::fsconfig_set_string(&context, *key, *value),
            None => rustix::mount::fsconfig_set_flag(&context, *key),
        }
        .during("fsconfig", format_args!("{kind} {key}={}", value.unwrap_or("")))?;
    }
    rustix::mount::fsconfig_create(&context).during("fsconfig", format_args!("{kind} create"))?;
    let attributes = MountAttrFlags::from_bits_retain(u32::try_from(attributes).unwrap_or(0));
    rustix::mount::fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).during("fsmount", kind)
}

/// A detached copy of the mount at `path`, with everything below it when `recursive` (open_tree(2)).
///
/// # Errors
/// `ENOENT`, `EPERM`.
pub fn copy_tree(path: &Path, recursive: bool) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | recursion(recursive);
    rustix::mount::open_tree(rustix::fs::CWD, path, flags).during("open_tree", path.display())
}

/// As [`copy_tree`], of what `at` refers to.
///
/// # Errors
/// `EPERM`.
pub fn copy_tree_at(at: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | recursion(recursive);
    rustix::mount::open_tree(at, "", flags).during("open_tree", at.as_raw_fd())
}

fn recursion(recursive: bool) -> OpenTreeFlags {
    if recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() }
}

/// Attaches the mount `from` on top of `target`; both are descriptors, no path is resolved (move_mount(2)).
///
/// # Errors
/// `EINVAL` when `target` is outside the caller's mount namespace.
pub fn attach(from: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(from, "", target, "", flags).during("move_mount", target.as_raw_fd())
}

/// Attaches the mount `from` at a path of the caller's own namespace.
///
/// # Errors
/// `ENOENT`, `EPERM`.
pub fn attach_at(from: BorrowedFd<'_>, path: &Path) -> Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    rustix::mount::move_mount(from, "", rustix::fs::CWD, path, flags).during("move_mount", path.display())
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// What [`set_attributes`] changes.
#[derive(Debug, Default, Clone, Copy)]
pub struct Change<'a> {
    /// Attributes to set ([`attribute`]).
    pub set: u64,
    /// Attributes to clear.
    pub clear: u64,
    /// How changes travel.
    pub propagation: Option<Propagation>,
    /// The user namespace whose mapping applies; sets [`attribute::ID_MAP`].
    pub id_map: Option<BorrowedFd<'a>>,
    /// Everything below, too.
    pub recursive: bool,
}

/// Changes the attributes of the mount that `mount` is the root of (mount_setattr(2)).
///
/// # Errors
/// `EINVAL` for a file system without id-mapped mounts, `ENOSYS` before Linux 5.12.
pub fn set_attributes(mount: BorrowedFd<'_>, change: &Change<'_>) -> Result<()> {
    let attributes = MountAttributes {
        set: change.set | if change.id_map.is_some() { attribute::ID_MAP } else { 0 },
        clear: change.clear,
        propagation: change.propagation.map_or(0, Propagation::number),
        user_namespace: change.id_map.and_then(|fd| u64::try_from(fd.as_raw_fd()).ok()).unwrap_or(0),
    };
    let flags = libc::AT_EMPTY_PATH | if change.recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string, `attributes` has the size that is passed and outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    let errno = Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO);
    Err(Error { call: "mount_setattr", subject: format!("{change:?}"), errno })
}

/// Changes the propagation of the mount at `path`.
///
/// # Errors
/// `EINVAL` when `path` is no mount point.
pub fn set_propagation(path: &Path, propagation: Propagation, recursive: bool) -> Result<()> {
    let flags = match propagation {
        Propagation::Private => MountPropagationFlags::PRIVATE,
        Propagation::Slave => MountPropagationFlags::DOWNSTREAM,
        Propagation::Shared => MountPropagationFlags::SHARED,
        Propagation::Unbindable => MountPropagationFlags::UNBINDABLE,
    };
    let flags = if recursive { flags | MountPropagationFlags::REC } else { flags };
    rustix::mount::mount_change(path, flags).during("mount", path.display())
}

/// Makes the directory that `root` refers to, a mount's root, the calling process's root; the old root is gone
/// afterwards (pivot_root(2), "." over ".").
///
/// # Errors
/// `EINVAL` when `root` is no mount point of the caller's namespace.
pub fn pivot(root: BorrowedFd<'_>) -> Result<()> {
    rustix::process::fchdir(root).during("fchdir", "the new root")?;
    rustix::process::pivot_root(".", ".").during("pivot_root", ".")?;
    // The old root lies on top of the new one now; taking it off leaves the new one.
    rustix::mount::unmount(".", UnmountFlags::DETACH).during("umount2", "the old root")?;
    rustix::process::chdir("/").during("chdir", "/")
}

/// Takes the mount at `path` out of the tree; what uses it keeps it alive (umount2(2) with `MNT_DETACH`).
///
/// # Errors
/// `EINVAL` when nothing is mounted there.
pub fn detach(path: &Path) -> Result<()> {
    rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).during("umount2", path.display())
}

/// As [`detach`], of what is mounted on `name` in a directory: no other part of its path is resolved again.
///
/// # Errors
/// As [`detach`].
pub fn detach_in(directory: BorrowedFd<'_>, name: &OsStr) -> Result<()> {
    // umount2(2) takes no descriptor; the link in /proc leads to the directory itself.
    detach(&Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name))
}

/// A path as C wants it.
///
/// # Errors
/// `EINVAL` for a NUL inside.
pub fn c_path(path: &Path) -> Result<CString> {
    use std::os::unix::ffi::OsStrExt as _;
    let invalid = |_| Error { call: "path", subject: path.display().to_string(), errno: Errno::INVAL };
    CString::new(path.as_os_str().as_bytes()).map_err(invalid)
}
