//! The files that a pod's containers share: names and resolver settings, and one tmpfs for the `/dev/shm` of all of them.
//!
//! ```text
//! /            tmpfs of [`SIZE`]: what a container appends to its /etc/hosts goes no further (R6)
//! ├── hostname, hosts, resolv.conf
//! └── shm      tmpfs of [`SHM_SIZE`]
//! ```
//! A tmpfs lives as long as it is mounted somewhere, and containers come and go. So the two are all that there is in a mount
//! namespace of their own, of which the keeper holds the descriptor: nothing is mounted on the host, and they outlive the
//! daemon but not the pod. Each container gets copies of the mounts. (A detached mount could be copied without a
//! namespace since Linux 6.15 only.)

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use sys::mount::{self, Propagation, attribute};
use sys::rustix::fs::{Mode, OFlags};
use sys::{mntns, rustix};

/// What the files may grow to beyond what they begin with. A resolver's configuration has some hundred bytes.
const SIZE: usize = 1 << 20;
/// The root, the files and the place of the shared memory, and a few for who comes in by the pod's first process.
const INODES: &str = "16";
/// Size of the shared memory, as containerd's.
const SHM_SIZE: &str = "65536k";
/// Its place.
pub(crate) const SHM: &str = "shm";

/// A pod's shared files.
#[derive(Debug)]
pub(crate) struct Shared {
    /// The namespace in which they are; the keeper holds it.
    pub(crate) namespace: OwnedFd,
    /// Its root.
    root: OwnedFd,
}

/// Makes them with their names and contents.
pub(crate) fn make(root_is_initramfs: bool, files: &[(&str, String)]) -> io::Result<Shared> {
    let length: usize = files.iter().map(|(_, text)| text.len()).sum();
    let setup = || {
        mount::set_propagation(Path::new("/"), Propagation::Private, true).map_err(into_io)?;
        let size = (SIZE + length).to_string();
        let options = [("mode", Some("0755")), ("size", Some(size.as_str())), ("nr_inodes", Some(INODES))];
        let root = tmpfs(&options)?;
        if root_is_initramfs {
            cover(&root)?
        } else {
            replace(&root)?
        }
        let place = Path::new("/").join(SHM);
        fs::create_dir(&place)?;
        let shm = tmpfs(&[("mode", Some("1777")), ("size", Some(SHM_SIZE))])?;
        mount::attach_at(shm.as_fd(), &place).map_err(into_io)?;
        open_root()
    };
    let (namespace, root) = mntns::create(setup)?;
    let shared = Shared { namespace, root };
    files.iter().try_for_each(|(name, text)| shared.put(name, text))?;
    Ok(shared)
}

impl Shared {
    /// Writes one of the files.
    pub(crate) fn put(&self, name: &str, text: &str) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::openat(&self.root, name, flags, Mode::from_raw_mode(0o644))?);
        // Whatever the daemon's file mode creation mask is.
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        file.write_all(text.as_bytes())
    }
}

/// Detached copies of the mounts of `names`.
pub(crate) fn copies<'a>(namespace: BorrowedFd<'_>, names: &[&'a str]) -> io::Result<Vec<(&'a str, OwnedFd)>> {
    let copy = |name: &&'a str| {
        let mount = mount::copy_tree(&Path::new("/").join(name), false).map_err(into_io)?;
        Ok((*name, mount))
    };
    mntns::run_in(namespace, || names.iter().map(copy).collect())
}

fn tmpfs(options: &[(&str, Option<&str>)]) -> io::Result<OwnedFd> {
    let attributes = attribute::NO_SUID | attribute::NO_DEV | attribute::NO_EXEC;
    mount::new_filesystem("tmpfs", options, attributes).map_err(into_io)
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
    attach(tmpfs)?;
    // Under what covers it this thread would still see the initramfs.
    rustix::process::fchdir(tmpfs)?;
    Ok(rustix::process::chroot(".")?)
}

fn attach(tmpfs: &OwnedFd) -> io::Result<()> {
    let root = open_root()?;
    mount::attach(tmpfs.as_fd(), root.as_fd()).map_err(into_io)
}

fn open_root() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// The step is named by whoever reports it.
fn into_io(error: sys::Error) -> io::Error {
    io::Error::other(error)
}
