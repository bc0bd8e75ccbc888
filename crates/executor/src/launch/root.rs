//! The container's tree: attached mounts, `/dev`, covered paths; then the process moves in.

use std::borrow::Cow;
use std::fs::File;
use std::io::Write as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use sys::mount::{self, Change, Propagation, attribute};
use sys::path::{self, Kind};
use sys::rustix::fs::{FileType, Mode, OFlags};
use sys::rustix::io::Errno;
use sys::{pty, xattr};

use super::{InStep as _, LaunchError, Stdio, Step};
use crate::plan::{DeviceKind, DeviceNode, FilesystemPlan, LaunchPlan, MountPlan, Mounted, RootEntry, RootPlan};

/// Builds the tree on `root` and makes it the caller's root. The master of the terminal, where one is asked for.
pub(super) fn enter(
    plan: &RootPlan,
    whole: &LaunchPlan,
    root: BorrowedFd<'_>,
    mounts: &[OwnedFd],
    stdio: &Stdio,
    before_entry: impl FnOnce() -> Result<(), LaunchError>,
) -> Result<Option<OwnedFd>, LaunchError> {
    mount::set_propagation(Path::new("/"), Propagation::Private, true).step(Step::Root, "/")?;
    // A place in this namespace's tree: a detached mount could not be copied again before Linux 6.15.
    let null = path::open_place(Path::new("/dev/null")).step(Step::MaskedPath, "/dev/null")?;
    // A copy of a shared mount is its peer, and pivot_root takes none such.
    let private = Change { propagation: Some(Propagation::Private), recursive: true, ..Change::default() };
    mount::set_attributes(root, &private).step(Step::Root, "private")?;
    mount::attach_at(root, Path::new(&plan.at)).step(Step::Root, "attaching")?;
    for one in &plan.mounts {
        make(one, plan, root, mounts)?;
    }
    before_entry()?;
    let terminal = match stdio {
        Stdio::Terminal { .. } => Some(terminal(root)?),
        Stdio::Streams { .. } => None,
    };
    make_directory(root, &whole.process.cwd);
    plan.readonly_paths.iter().try_for_each(|path| make_readonly(root, path))?;
    mask(root, plan, &null)?;
    if plan.readonly {
        let change = Change { set: attribute::READ_ONLY, ..Change::default() };
        mount::set_attributes(root, &change).step(Step::RootAttributes, "read-only")?;
    }
    move_in(plan.entry, root)?;
    if let Some(propagation) = plan.propagation {
        mount::set_propagation(Path::new("/"), propagation.kind, propagation.recursive)
            .step(Step::RootAttributes, "propagation")?;
    }
    Ok(terminal)
}

fn move_in(entry: RootEntry, root: BorrowedFd<'_>) -> Result<(), LaunchError> {
    match entry {
        RootEntry::Pivot => mount::pivot(root).step(Step::Root, "pivot_root"),
        RootEntry::Chroot => chroot(root).map_err(|errno| LaunchError::new(Step::Root, errno, "chroot")),
    }
}

/// Moves the tree over `/`, so that nothing of the host's lies above it, and makes that the root.
fn chroot(root: BorrowedFd<'_>) -> Result<(), Errno> {
    sys::rustix::process::fchdir(root)?;
    mount::attach_at(root, Path::new("/")).map_err(|error| error.errno)?;
    sys::rustix::process::chroot(".")?;
    sys::rustix::process::chdir("/")
}

/// A working directory that the image lacks; where it cannot be made, entering it says so.
fn make_directory(root: BorrowedFd<'_>, path: &str) {
    let _ = path::make_in_root_strictly(root, Path::new(path), Kind::Directory);
}

fn make(one: &MountPlan, plan: &RootPlan, root: BorrowedFd<'_>, mounts: &[OwnedFd]) -> Result<(), LaunchError> {
    let at = &one.target;
    match &one.what {
        Mounted::Source(index) => {
            let source = fd_at(mounts, *index, at)?;
            attach(source, root, at)
        }
        Mounted::Own => own(root, at),
        Mounted::New(filesystem) => {
            let fresh = new_filesystem(&with_mode(filesystem, root, at), at)?;
            if filesystem.copy_up {
                copy_up(root, at, fresh.as_fd())?;
            }
            if WELL_KNOWN.contains(&filesystem.kind.as_str()) {
                attach_in_place(fresh.as_fd(), root, at)?;
            } else {
                attach(fresh.as_fd(), root, at)?;
            }
            if let (Some(label), "mqueue") = (&plan.label, filesystem.kind.as_str()) {
                set_label(fresh.as_fd(), label, at)?;
            }
            seal(filesystem, fresh.as_fd(), at)
        }
        Mounted::Devices(filesystem) => {
            let fresh = new_filesystem(filesystem, at)?;
            attach_in_place(fresh.as_fd(), root, at)?;
            fill_dev(plan, root, fresh.as_fd(), mounts)?;
            seal(filesystem, fresh.as_fd(), at)
        }
    }
}

/// Labels the directory that a mount has as its root. A policy that labels such file systems itself lets nobody else do it.
fn set_label(mount: BorrowedFd<'_>, label: &str, at: &str) -> Result<(), LaunchError> {
    // The mount's own descriptor takes no attributes, and its link in /proc is covered by the root that is being built.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = sys::rustix::fs::openat(mount, ".", flags, Mode::empty());
    let directory = directory.map_err(|errno| LaunchError::new(Step::Label, errno, at))?;
    match xattr::set(directory.as_fd(), c"security.selinux", label.as_bytes()) {
        Err(error) if error.raw_os_error() != Some(Errno::OPNOTSUPP.raw_os_error()) => {
            Err(LaunchError::io(Step::Label, &error, format!("{label} on {at}")))
        }
        _ => Ok(()),
    }
}

/// A tmpfs without a mode of its own has that of what it covers.
fn with_mode<'a>(plan: &'a FilesystemPlan, root: BorrowedFd<'_>, at: &str) -> Cow<'a, FilesystemPlan> {
    if plan.kind != "tmpfs" || plan.options.iter().any(|(name, _)| name == "mode") {
        return Cow::Borrowed(plan);
    }
    let covered = path::open_in_root(root, Path::new(at), OFlags::PATH).ok();
    let Some(stat) = covered.and_then(|covered| sys::rustix::fs::fstat(covered).ok()) else {
        return Cow::Borrowed(plan);
    };
    let mut plan = plan.clone();
    plan.options.push(("mode".to_owned(), Some(format!("{:o}", stat.st_mode & 0o7777))));
    Cow::Owned(plan)
}

fn fd_at<'a>(mounts: &'a [OwnedFd], index: u32, at: &str) -> Result<BorrowedFd<'a>, LaunchError> {
    let found = usize::try_from(index).ok().and_then(|index| mounts.get(index));
    found.map(OwnedFd::as_fd).ok_or_else(|| LaunchError::new(Step::Mount, Errno::BADF, at))
}

/// Nothing is made in them. Where those that can be seen are read-only, as within another container, the kernel gives a user no
/// others.
const NEVER_FILLED: &[&str] = &["proc", "sysfs"];

/// A new file system, writable for now: mount points and nodes may have to be made in it.
fn new_filesystem(plan: &FilesystemPlan, at: &str) -> Result<OwnedFd, LaunchError> {
    let options: Vec<(&str, Option<&str>)> =
        plan.options.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect();
    let later = if NEVER_FILLED.contains(&plan.kind.as_str()) { 0 } else { attribute::READ_ONLY };
    mount::new_filesystem(&plan.kind, &options, plan.attributes & !later).step(Step::Filesystem, at)
}

fn seal(plan: &FilesystemPlan, mount: BorrowedFd<'_>, at: &str) -> Result<(), LaunchError> {
    if plan.attributes & attribute::READ_ONLY == 0 {
        return Ok(());
    }
    let change = Change { set: attribute::READ_ONLY, ..Change::default() };
    mount::set_attributes(mount, &change).step(Step::Filesystem, at)
}

/// Attaches a mount at a path in the container, which is made of the mount's own kind if it is missing.
fn attach(mount: BorrowedFd<'_>, root: BorrowedFd<'_>, at: &str) -> Result<(), LaunchError> {
    let kind = if path::is_directory(mount).step(Step::Mount, at)? { Kind::Directory } else { Kind::File };
    let target = path::make_in_root(root, Path::new(at), kind).step(Step::Mount, at)?;
    mount::attach(mount, target.as_fd()).step(Step::Mount, at)
}

/// Mounts what is at a path over itself; a directory where there is nothing.
fn own(root: BorrowedFd<'_>, at: &str) -> Result<(), LaunchError> {
    let target = path::make_in_root(root, Path::new(at), Kind::Directory).step(Step::Mount, at)?;
    // A link may lead to the root itself, which would come to lie, unmasked, over everything that protects it.
    if is_same(root, target.as_fd()).map_err(|errno| LaunchError::new(Step::Mount, errno, at))? {
        return Err(LaunchError::new(Step::Mount, Errno::BUSY, format!("{at} (is the root)")));
    }
    let copy = mount::copy_tree_at(target.as_fd(), true).step(Step::Mount, at)?;
    mount::attach(copy.as_fd(), target.as_fd()).step(Step::Mount, at)
}

fn is_same(a: BorrowedFd<'_>, b: BorrowedFd<'_>) -> Result<bool, Errno> {
    let (a, b) = (sys::rustix::fs::fstat(a)?, sys::rustix::fs::fstat(b)?);
    Ok((a.st_dev, a.st_ino) == (b.st_dev, b.st_ino))
}

/// File systems that masks, read-only paths and device nodes are found in by their well-known places.
const WELL_KNOWN: &[&str] = &["proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue"];

/// Attaches a file system of the kernel's. Where an image has a link in its place, the masks would protect another one
/// (CVE-2019-19921, CVE-2023-27561): such an image is refused.
fn attach_in_place(mount: BorrowedFd<'_>, root: BorrowedFd<'_>, at: &str) -> Result<(), LaunchError> {
    path::make_in_root(root, Path::new(at), Kind::Directory).step(Step::Mount, at)?;
    let target = path::open_unlinked(root, Path::new(at), OFlags::PATH | OFlags::DIRECTORY).map_err(|error| {
        let why = if error.errno == Errno::LOOP { " (the image has a symbolic link there)" } else { "" };
        LaunchError::new(Step::Mount, error.errno, format!("{at}{why}"))
    })?;
    mount::attach(mount, target.as_fd()).step(Step::Mount, at)
}

/// Devices and links of `/dev`. It is the container's own fresh tmpfs, so nothing is there to be followed.
fn fill_dev(plan: &RootPlan, root: BorrowedFd<'_>, dev: BorrowedFd<'_>, mounts: &[OwnedFd]) -> Result<(), LaunchError> {
    for node in &plan.devices {
        device(node, root, dev, mounts).map_err(|error| LaunchError { step: Step::Device, ..error })?;
    }
    for (name, to) in &plan.device_links {
        sys::rustix::fs::symlinkat(to, dev, name).map_err(|errno| LaunchError::new(Step::Device, errno, name))?;
    }
    Ok(())
}

fn device(node: &DeviceNode, root: BorrowedFd<'_>, dev: BorrowedFd<'_>, mounts: &[OwnedFd]) -> Result<(), LaunchError> {
    let kind = match node.kind {
        DeviceKind::Character => FileType::CharacterDevice,
        DeviceKind::Block => FileType::BlockDevice,
        DeviceKind::Fifo => FileType::Fifo,
        DeviceKind::Bound(index) => return attach(fd_at(mounts, index, &node.path)?, root, &node.path),
    };
    let failed = |errno| LaunchError::new(Step::Device, errno, &node.path);
    let relative = Path::new(&node.path).strip_prefix("/dev").unwrap_or(Path::new(&node.path));
    let name = relative.file_name().ok_or(Errno::INVAL).map_err(failed)?;
    let parent = relative.parent().map(Path::to_owned).unwrap_or_default();
    let parent =
        path::make_in_root(dev, &Path::new("/").join(parent), Kind::Directory).step(Step::Device, &node.path)?;
    let number = sys::rustix::fs::makedev(node.major, node.minor);
    sys::rustix::fs::mknodat(&parent, name, kind, Mode::from_raw_mode(node.mode), number).map_err(failed)?;
    // The file mode creation mask does not count for devices.
    let at = sys::rustix::fs::AtFlags::empty();
    sys::rustix::fs::chmodat(&parent, name, Mode::from_raw_mode(node.mode), at).map_err(failed)?;
    if node.uid != 0 || node.gid != 0 {
        let (uid, gid) = (sys::rustix::fs::Uid::from_raw(node.uid), sys::rustix::fs::Gid::from_raw(node.gid));
        sys::rustix::fs::chownat(&parent, name, Some(uid), Some(gid), at).map_err(failed)?;
    }
    Ok(())
}

/// A terminal of the container's own devpts, which also becomes its `/dev/console`.
fn terminal(root: BorrowedFd<'_>) -> Result<OwnedFd, LaunchError> {
    let devpts = path::open_in_root(root, Path::new("/dev/pts"), OFlags::RDONLY | OFlags::DIRECTORY)
        .step(Step::Terminal, "/dev/pts")?;
    let failed = |error: std::io::Error| LaunchError::io(Step::Terminal, &error, "/dev/pts/ptmx");
    let master = pty::open_in(devpts.as_fd()).map_err(failed)?;
    let peer = pty::peer(&master).map_err(failed)?;
    let console = mount::copy_tree_at(peer.as_fd(), false).step(Step::Terminal, "/dev/console")?;
    attach(console.as_fd(), root, "/dev/console")?;
    Ok(master)
}

/// Copies what the image has at `at` into the new file system that is about to cover it: files, directories and links.
fn copy_up(root: BorrowedFd<'_>, at: &str, into: BorrowedFd<'_>) -> Result<(), LaunchError> {
    let mut directories = vec![PathBuf::new()];
    while let Some(relative) = directories.pop() {
        let from = Path::new(at).join(&relative);
        let Ok(directory) = path::open_in_root(root, &from, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW)
        else {
            continue;
        };
        copy_entries(&directory, &relative, into, &mut directories)
            .map_err(|error| LaunchError::io(Step::Filesystem, &error, from.to_string_lossy()))?;
    }
    Ok(())
}

fn copy_entries(
    directory: &OwnedFd,
    relative: &Path,
    into: BorrowedFd<'_>,
    more: &mut Vec<PathBuf>,
) -> std::io::Result<()> {
    use sys::rustix::fs::{AtFlags, Dir, mkdirat, openat, readlinkat, statat, symlinkat};
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let to = relative.join(name.to_string_lossy().as_ref());
        let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                mkdirat(into, &to, mode)?;
                more.push(to);
            }
            FileType::Symlink => symlinkat(readlinkat(directory, name, Vec::new())?, into, &to)?,
            FileType::RegularFile => {
                let from = openat(directory, name, OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
                let mut copy = File::from(openat(into, &to, flags, mode)?);
                std::io::copy(&mut File::from(from), &mut copy)?;
                copy.flush()?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// What is not there needs no protection.
fn existing(root: BorrowedFd<'_>, at: &str, step: Step) -> Result<Option<OwnedFd>, LaunchError> {
    match path::open_in_root(root, Path::new(at), OFlags::PATH) {
        Ok(found) => Ok(Some(found)),
        Err(error) if matches!(error.errno, Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(LaunchError::new(step, error.errno, at)),
    }
}

fn make_readonly(root: BorrowedFd<'_>, at: &str) -> Result<(), LaunchError> {
    let Some(found) = existing(root, at, Step::ReadonlyPath)? else { return Ok(()) };
    let copy = mount::copy_tree_at(found.as_fd(), true).step(Step::ReadonlyPath, at)?;
    let change = Change { set: attribute::READ_ONLY, recursive: true, ..Change::default() };
    mount::set_attributes(copy.as_fd(), &change).step(Step::ReadonlyPath, at)?;
    mount::attach(copy.as_fd(), found.as_fd()).step(Step::ReadonlyPath, at)
}

/// Covers files with `/dev/null` and directories with one empty tmpfs.
fn mask(root: BorrowedFd<'_>, plan: &RootPlan, null: &OwnedFd) -> Result<(), LaunchError> {
    let mut empty: Option<OwnedFd> = None;
    for at in &plan.masked_paths {
        let Some(found) = existing(root, at, Step::MaskedPath)? else { continue };
        let cover = if path::is_directory(found.as_fd()).step(Step::MaskedPath, at)? {
            match &empty {
                Some(first) => mount::copy_tree_at(first.as_fd(), false).step(Step::MaskedPath, at)?,
                None => {
                    let fresh = empty_directory(plan.label.as_deref()).step(Step::MaskedPath, at)?;
                    mount::attach(fresh.as_fd(), found.as_fd()).step(Step::MaskedPath, at)?;
                    empty = Some(fresh);
                    continue;
                }
            }
        } else {
            mount::copy_tree_at(null.as_fd(), false).step(Step::MaskedPath, at)?
        };
        mount::attach(cover.as_fd(), found.as_fd()).step(Step::MaskedPath, at)?;
    }
    Ok(())
}

fn empty_directory(label: Option<&str>) -> sys::Result<OwnedFd> {
    let mut options = vec![("size", Some("0")), ("nr_blocks", Some("1")), ("nr_inodes", Some("1"))];
    options.extend(label.map(|label| ("context", Some(label))));
    mount::new_filesystem("tmpfs", &options, attribute::READ_ONLY)
}
