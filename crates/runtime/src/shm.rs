//! The memory that a pod's containers share: one tmpfs for the `/dev/shm` of all of them.
//!
//! A tmpfs lives as long as it is mounted somewhere, and containers come and go. So it is the only thing in a mount
//! namespace of its own, of which the keeper holds the descriptor: nothing is mounted on the host, and it outlives the
//! daemon but not the pod. Each container gets a copy of the mount. (A detached mount could be copied without a namespace
//! since Linux 6.15 only.)

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use sys::mount::{self, Propagation, attribute};
use sys::rustix::fs::{Mode, OFlags};
use sys::{mntns, rustix};

/// Its size, as containerd's.
const SIZE: &str = "65536k";

/// Makes it; answers the namespace.
pub(crate) fn make(root_is_initramfs: bool) -> io::Result<OwnedFd> {
    let setup = || {
        mount::set_propagation(Path::new("/"), Propagation::Private, true).map_err(into_io)?;
        let attributes = attribute::NO_SUID | attribute::NO_DEV | attribute::NO_EXEC;
        let options = [("mode", Some("1777")), ("size", Some(SIZE))];
        let tmpfs = mount::new_filesystem("tmpfs", &options, attributes).map_err(into_io)?;
        if root_is_initramfs { cover(&tmpfs) } else { replace(&tmpfs) }
    };
    mntns::create(setup).map(|(namespace, ())| namespace)
}

/// A detached copy of its mount.
pub(crate) fn copy(namespace: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    mntns::run_in(namespace, || mount::copy_tree(Path::new("/"), false).map_err(into_io))
}

/// All other mounts of the namespace go.
fn replace(tmpfs: &OwnedFd) -> io::Result<()> {
    attach(tmpfs)?;
    mount::pivot(tmpfs.as_fd()).map_err(into_io)
}

/// The initramfs cannot be pivoted away: what is mounted on it goes, and the tmpfs covers it.
fn cover(tmpfs: &OwnedFd) -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    for line in mounts.lines() {
        let at = line.split(' ').nth(4).unwrap_or("/");
        if at != "/" {
            let _ = mount::detach(Path::new(at)); // It may have gone with the one that it was mounted in.
        }
    }
    attach(tmpfs)
}

fn attach(tmpfs: &OwnedFd) -> io::Result<()> {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    mount::attach(tmpfs.as_fd(), root.as_fd()).map_err(into_io)
}

/// The step is named by whoever reports it.
fn into_io(error: sys::Error) -> io::Error {
    io::Error::other(error)
}
