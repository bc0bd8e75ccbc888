//! Sub-paths of volumes. A container may have filled the volume with links, so a sub-path is resolved beneath the
//! volume by the kernel (R1), and what was found is bound to a place of ours: no path is resolved a second time.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use cri::v1::MountPropagation;
use k8s_openapi::api::core::v1::VolumeMount;
use sys::Context as _;
use sys::mount::{Change, Propagation};
use sys::rustix::fs::{Mode, OFlags};
use sys::rustix::io::Errno;

use super::Cause;
use crate::env::Environment;

/// A sub-path that a container mounts.
pub(super) struct SubPath {
    pub(super) volume: PathBuf,
    pub(super) path: PathBuf,
    /// Where it is bound to.
    pub(super) target: PathBuf,
    pub(super) propagation: MountPropagation,
}

/// A sub-path that was found, as a mount that is not attached yet.
pub(super) struct Found {
    tree: OwnedFd,
    is_directory: bool,
}

/// The sub-path of a mount, expanded and checked.
pub(super) fn of(mount: &VolumeMount, environment: &Environment) -> Result<Option<PathBuf>, Cause> {
    let expression = mount.sub_path_expr.as_deref().filter(|text| !text.is_empty());
    let text = match expression {
        Some(expression) => environment
            .expand_strictly(expression)
            .map_err(|problem| Cause::Invalid(format!("subPathExpr {expression:?}: {problem}")))?,
        None => mount.sub_path.clone().unwrap_or_default(),
    };
    let path = PathBuf::from(&text);
    if path.is_absolute() {
        return Err(Cause::Invalid(format!("error SubPath `{text}` must not be an absolute path")));
    }
    if path.components().any(|part| part == Component::ParentDir) {
        return Err(Cause::Invalid(format!("unable to provision SubPath `{text}`: must not contain '..'")));
    }
    Ok(Some(path).filter(|path| path.components().any(|part| part != Component::CurDir)))
}

impl SubPath {
    /// Finds, or makes, the sub-path beneath the volume.
    pub(super) fn find(&self) -> Result<Found, Cause> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = sys::rustix::fs::open(&self.volume, flags, Mode::empty()).during("open", self.volume.display())?;
        let found = find_or_make(&root, &self.path)?;
        let is_directory = sys::path::is_directory(found.as_fd())?;
        Ok(Found { tree: copy(&found, self.propagation)?, is_directory })
    }
}

impl Found {
    /// Binds it to its place, in the pod's own directory.
    pub(super) fn bind(self, target: &Path) -> Result<(), Cause> {
        make_target(target, self.is_directory)?;
        Ok(sys::mount::attach_at(self.tree.as_fd(), target)?)
    }
}

fn find_or_make(root: &OwnedFd, sub_path: &Path) -> Result<OwnedFd, Cause> {
    match sys::path::open_beneath(root.as_fd(), sub_path, OFlags::PATH) {
        Err(error) if error.errno == Errno::NOENT => Ok(make(root, sub_path)?),
        Err(error) if error.errno == Errno::XDEV => {
            Err(Cause::Invalid(format!("subPath {:?} leads out of the volume", sub_path.display().to_string())))
        }
        found => Ok(found?),
    }
}

/// Makes the missing directories with the mode of the volume's own, so that the pod's group can use them.
fn make(root: &OwnedFd, sub_path: &Path) -> sys::Result<OwnedFd> {
    let stat = sys::rustix::fs::fstat(root).during("fstat", "")?;
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
    let mut walked = PathBuf::new();
    for part in sub_path.components().filter(|part| matches!(part, Component::Normal(_))) {
        let parent = sys::path::open_beneath(root.as_fd(), &walked, OFlags::RDONLY | OFlags::DIRECTORY)?;
        walked.push(part);
        match sys::rustix::fs::mkdirat(&parent, part.as_os_str(), mode) {
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno).during("mkdirat", walked.display()),
            Ok(()) => {
                // The mode at creation went through the umask; the directory may have been replaced by a link since.
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = sys::rustix::fs::openat(&parent, part.as_os_str(), flags, Mode::empty());
                let made = made.during("openat", walked.display())?;
                sys::rustix::fs::fchmod(&made, mode).during("fchmod", walked.display())?;
            }
        }
    }
    sys::path::open_beneath(root.as_fd(), sub_path, OFlags::PATH)
}

/// An empty directory or file to mount on; what an earlier attempt of the container mounted there goes.
fn make_target(target: &Path, is_directory: bool) -> Result<(), Cause> {
    while sys::mount::detach(target).is_ok() {}
    if let Some(parent) = target.parent() {
        std::fs::create_dir_all(parent).map_err(Cause::file("make directory", parent))?;
    }
    let exists = std::fs::symlink_metadata(target);
    match exists {
        Ok(old) if old.is_dir() == is_directory => Ok(()),
        Ok(old) if old.is_dir() => std::fs::remove_dir(target).and_then(|()| std::fs::write(target, b"")),
        Ok(_) => std::fs::remove_file(target).and_then(|()| std::fs::create_dir(target)),
        Err(_) if is_directory => std::fs::create_dir(target),
        Err(_) => std::fs::write(target, b""),
    }
    .map_err(Cause::file("make mount point", target))
}

/// A copy of the mount. A copy with everything below must not pass its unmounting on to the original; one that passes
/// changes both ways therefore has nothing below.
fn copy(found: &OwnedFd, propagation: MountPropagation) -> sys::Result<OwnedFd> {
    let kept = match propagation {
        MountPropagation::PropagationBidirectional => return sys::mount::copy_tree_at(found.as_fd(), false),
        MountPropagation::PropagationHostToContainer => Propagation::Slave,
        MountPropagation::PropagationPrivate => Propagation::Private,
    };
    let tree = sys::mount::copy_tree_at(found.as_fd(), true)?;
    let change = Change { propagation: Some(kept), recursive: true, ..Change::default() };
    sys::mount::set_attributes(tree.as_fd(), &change)?;
    Ok(tree)
}
