//! Extended attributes.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use rustix::fs::XattrFlags;

/// Sets an attribute of an open file or directory.
pub fn set(file: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> io::Result<()> {
    Ok(rustix::fs::fsetxattr(file, name, value, XattrFlags::empty())?)
}

/// Sets an attribute of `name` in the working directory without following a symbolic link: for what cannot be opened.
pub fn set_here(path: &CStr, name: &CStr, value: &[u8]) -> io::Result<()> {
    Ok(rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())?)
}

/// Reads an attribute of an open file or directory; none if it is not set. Values are at most 64 KiB long.
pub fn get(file: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0; 1 << 16];
    match rustix::fs::fgetxattr(file, name, &mut value[..]) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(value))
        }
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Sets an attribute of what was opened only to be referred to (`O_PATH`): also of a symbolic link, and of a mount's root.
///
/// # Errors
/// `EOPNOTSUPP` where the file system has no such attributes.
pub fn set_place(place: BorrowedFd<'_>, name: &CStr, value: &[u8]) -> io::Result<()> {
    // Such a descriptor takes no fsetxattr(2). The link in /proc leads to the thing itself and no further.
    Ok(rustix::fs::setxattr(link_to(place), name, value, XattrFlags::empty())?)
}

/// As [`get`], of what was opened only to be referred to.
///
/// # Errors
/// As [`get`].
pub fn get_place(place: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0; 1 << 12];
    match rustix::fs::getxattr(link_to(place), name, &mut value[..]) {
        Ok(length) => {
            value.truncate(length);
            Ok(Some(value))
        }
        Err(rustix::io::Errno::NODATA | rustix::io::Errno::OPNOTSUPP) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

fn link_to(place: BorrowedFd<'_>) -> String {
    format!("/proc/thread-self/fd/{}", place.as_raw_fd())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use rustix::fs::{Mode, OFlags, open};

    use super::*;

    #[test]
    fn a_link_has_attributes_of_its_own() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root for trusted attributes");
            return;
        }
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        std::fs::write(&file, "").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let place = |path| open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let (file, link) = (place(&file), place(&link));
        set_place(link.as_fd(), c"trusted.orlop", b"link").unwrap();
        assert_eq!(get_place(link.as_fd(), c"trusted.orlop").unwrap().unwrap(), b"link");
        assert_eq!(get_place(file.as_fd(), c"trusted.orlop").unwrap(), None);
        set_place(file.as_fd(), c"trusted.orlop", b"file").unwrap();
        assert_eq!(get_place(file.as_fd(), c"trusted.orlop").unwrap().unwrap(), b"file");
    }
}
