//! Overlay file systems as detached mounts: made by descriptor, visible in no mount namespace, gone with the last user.
//!
//! Three generations of kernels: since 6.13 layers are given by descriptor; since 6.5 one by one (`lowerdir+`) by path;
//! before, all in one string, for which `fsconfig` has 256 bytes and `mount` 4096. The old ways work in a mount
//! namespace of a thread of their own, from which the finished mount is cloned.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
};
use rustix::thread::UnshareFlags;

/// What to mount.
#[derive(Debug, Clone, Copy)]
pub struct Overlay<'a> {
    /// Layers, the topmost first: directories, or detached mounts of them.
    pub lower: &'a [OwnedFd],
    /// Where writes go and its work directory; none for a read-only overlay, which takes two layers at least.
    pub upper: Option<(&'a Path, &'a Path)>,
    /// `context="…"` for SELinux.
    pub label: Option<&'a str>,
}

/// Restrictions of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Restrict {
    /// No writes.
    pub read_only: bool,
    /// No devices and no set-id bits.
    pub inert: bool,
}

impl Overlay<'_> {
    /// Mounts it by the newest way that this kernel knows.
    pub fn mount(&self, restrict: Restrict, scratch: &Path) -> io::Result<OwnedFd> {
        match self.mount_by_descriptors(restrict) {
            // Unknown parameters and descriptors that are not taken (EOPNOTSUPP before 6.5): an older kernel.
            Err(e)
                if matches!(e.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EBADF | libc::EOPNOTSUPP)) =>
            {
                self.mount_by_string(restrict, scratch)
            }
            other => other,
        }
    }

    /// Linux 6.13 and later.
    pub fn mount_by_descriptors(&self, restrict: Restrict) -> io::Result<OwnedFd> {
        let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let fs = context.as_fd();
        rustix::mount::fsconfig_set_string(fs, "source", "overlay")?;
        for layer in self.lower {
            rustix::mount::fsconfig_set_fd(fs, "lowerdir+", layer)?;
        }
        if let Some((upper, work)) = self.upper {
            rustix::mount::fsconfig_set_string(fs, "upperdir", upper)?;
            rustix::mount::fsconfig_set_string(fs, "workdir", work)?;
            rustix::mount::fsconfig_set_flag(fs, "volatile")?;
        }
        rustix::mount::fsconfig_set_string(fs, "index", "off")?;
        if let Some(label) = self.label {
            rustix::mount::fsconfig_set_string(fs, "context", label)?;
        }
        rustix::mount::fsconfig_create(fs)?;
        Ok(rustix::mount::fsmount(fs, FsMountFlags::FSMOUNT_CLOEXEC, restrict.attributes())?)
    }

    /// Any kernel with `open_tree`. `scratch` is an empty directory to mount on; nobody else sees it happen.
    pub fn mount_by_string(&self, restrict: Restrict, scratch: &Path) -> io::Result<OwnedFd> {
        in_own_mount_namespace(|| {
            let places = self.lower.iter().enumerate().map(|(number, layer)| attach(layer.as_fd(), scratch, number));
            let places = places.collect::<io::Result<Vec<_>>>()?;
            let target = scratch.join("overlay");
            make_dir(&target)?;
            rustix::mount::mount(
                "overlay",
                &target,
                "overlay",
                MountFlags::empty(),
                c_options(&self.options(&places))?.as_c_str(),
            )?;
            let mount = clone_tree(rustix::fs::CWD, &target)?;
            restrict.apply(mount.as_fd())?;
            Ok(mount)
        })
    }

    fn options(&self, places: &[String]) -> String {
        let mut options = format!("lowerdir={},index=off", places.join(":"));
        if let Some((upper, work)) = self.upper {
            options += &format!(",upperdir={},workdir={},volatile", upper.display(), work.display());
        }
        if let Some(label) = self.label {
            options += &format!(",context=\"{label}\"");
        }
        options
    }
}

/// `mount` copies one page of options; pages are this long at least.
const PAGE_BYTES: usize = 4096;

fn c_options(options: &str) -> io::Result<std::ffi::CString> {
    if options.len() >= PAGE_BYTES {
        let reason = format!(
            "the image has too many layers for this kernel: mount options of {} bytes, at most {PAGE_BYTES}; Linux 6.5 has no such limit",
            options.len()
        );
        return Err(io::Error::new(io::ErrorKind::ArgumentListTooLong, reason));
    }
    crate::tree::c_string(options.as_bytes())
}

/// Gives a layer a short name that mount options can hold: a detached mount is attached, a directory is opened once more,
/// because overlayfs takes layers of the caller's own mount namespace only.
fn attach(layer: BorrowedFd<'_>, scratch: &Path, number: usize) -> io::Result<String> {
    let place = scratch.join(number.to_string());
    make_dir(&place)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    let here = match rustix::mount::move_mount(layer, "", rustix::fs::CWD, &place, flags) {
        Ok(()) => place,
        Err(_) => std::fs::read_link(format!("/proc/thread-self/fd/{}", layer.as_raw_fd()))?,
    };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let here = rustix::fs::open(&here, flags, Mode::empty())?;
    let name = format!("/proc/thread-self/fd/{}", here.as_raw_fd());
    // Open until the thread's mount is made: descriptors outlive this function on purpose and close with the thread.
    KEPT.with(|kept| kept.borrow_mut().push(here));
    Ok(name)
}

thread_local! {
    /// Descriptors that the mount options of this thread name.
    static KEPT: std::cell::RefCell<Vec<OwnedFd>> = const { std::cell::RefCell::new(Vec::new()) };
}

fn make_dir(path: &Path) -> io::Result<()> {
    match std::fs::create_dir(path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

impl Restrict {
    fn attributes(self) -> MountAttrFlags {
        let mut attributes = MountAttrFlags::empty();
        attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, self.read_only);
        let inert = MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOSUID;
        attributes.set(inert, self.inert);
        attributes
    }

    fn apply(self, mount: BorrowedFd<'_>) -> io::Result<()> {
        let set = u64::from(self.attributes().bits());
        if set == 0 { Ok(()) } else { set_attributes(mount, set, 0) }
    }
}

/// A layer's directory as it is, to be a lower layer.
pub fn layer(tree: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(tree, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())?)
}

/// A layer's directory as a detached mount that shows owners through the mapping of a user namespace.
pub fn idmapped_layer(tree: &Path, user_namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let mount = clone_tree(rustix::fs::CWD, tree)?;
    let namespace = u64::try_from(user_namespace.as_raw_fd()).map_err(io::Error::other)?;
    set_attributes(mount.as_fd(), libc::MOUNT_ATTR_IDMAP, namespace)?;
    Ok(mount)
}

/// A single directory as a restricted detached mount.
pub fn bind(tree: &Path, restrict: Restrict) -> io::Result<OwnedFd> {
    let mount = clone_tree(rustix::fs::CWD, tree)?;
    restrict.apply(mount.as_fd())?;
    Ok(mount)
}

/// The part of a detached mount that `place` (an `O_PATH` descriptor into it) refers to, as a mount of its own.
pub fn part(mount: &OwnedFd, place: &OwnedFd, sub_path: &Path, scratch: &Path) -> io::Result<OwnedFd> {
    match clone_tree(place, Path::new("")) {
        // Before Linux 6.15 only attached mounts can be cloned.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => in_own_mount_namespace(|| {
            rustix::mount::move_mount(mount, "", rustix::fs::CWD, scratch, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
            let inside = crate::tree::Dir::open(scratch)?.place_in_root(sub_path)?;
            clone_tree(inside, Path::new(""))
        }),
        other => other,
    }
}

fn clone_tree(at: impl AsFd, path: &Path) -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(rustix::mount::open_tree(at, path, flags)?)
}

fn set_attributes(mount: BorrowedFd<'_>, set: u64, user_namespace: u64) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: 0, propagation: 0, userns_fd: user_namespace };
    // SAFETY: `attributes` is a whole `struct mount_attr` of the size given, which the kernel only reads.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Runs `work` on a thread with a mount namespace of its own, which ends with the thread.
fn in_own_mount_namespace<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let isolated = || {
        // SAFETY: the thread shares its descriptors as before; only its own root, directory and mounts become its own.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS)? };
        rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        work()
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("mount".into()).spawn_scoped(scope, isolated)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
    })
}
