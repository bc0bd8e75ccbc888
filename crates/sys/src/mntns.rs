//! Mount namespaces. Work inside another namespace is done on a thread made for it, which ends with it: the calling
//! thread never changes its mounts, root or working directory.

use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::netns::on_thread;

/// Makes a mount namespace with a copy of all mounts and runs `setup` in it.
///
/// # Errors
/// The kernel refused (CAP_SYS_ADMIN is needed), or what `setup` returned.
pub fn create<T: Send>(setup: impl FnOnce() -> io::Result<T> + Send) -> io::Result<(OwnedFd, T)> {
    on_thread(|| {
        // SAFETY: CLONE_NEWNS and the CLONE_FS that it implies change no table that this thread, made for this, is
        // expected to share; descriptors stay common to the process.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
        // Before `setup`, which may leave the namespace without a /proc.
        let namespace = File::open("/proc/thread-self/ns/mnt")?;
        Ok((namespace.into(), setup()?))
    })
}

/// Runs `work` inside `namespace`, at its root.
///
/// # Errors
/// The descriptor is no mount namespace or may not be entered (CAP_SYS_ADMIN and CAP_SYS_CHROOT are needed), or what
/// `work` returned.
pub fn run_in<T: Send>(namespace: BorrowedFd<'_>, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    on_thread(|| {
        // SAFETY: root and working directory of this thread, made for this, are nobody else's business. The kernel wants
        // them unshared (setns(2)).
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
        move_into_link_name_space(namespace, Some(LinkNameSpaceType::Mount))?;
        work()
    })
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::path::Path;

    use super::*;
    use crate::mount;

    #[test]
    fn what_is_mounted_inside_is_seen_inside_only() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root for a mount namespace");
            return;
        }
        let place = tempfile::tempdir().unwrap();
        let path: &Path = place.path();
        let setup = || {
            mount::set_propagation(Path::new("/"), mount::Propagation::Private, true).map_err(|e| e.errno)?;
            let tmpfs = mount::new_filesystem("tmpfs", &[], 0).map_err(|e| e.errno)?;
            mount::attach_at(tmpfs.as_fd(), path).map_err(|e| e.errno)?;
            std::fs::write(path.join("inside"), "")
        };
        let (namespace, ()) = create(setup).unwrap();
        assert!(!path.join("inside").exists());
        assert!(run_in(namespace.as_fd(), || Ok(path.join("inside").exists())).unwrap());
    }
}
