//! Loop devices: files as disks (loop(4)).

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::AsRawFd as _;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use crate::error::{Context as _, Result};

/// Where the kernel tells of disks.
const DISKS: &str = "/sys/block";
/// `LOOP_CLR_FD` of linux/loop.h.
const CLEAR: libc::Ioctl = 0x4c01;
/// What the kernel adds to the name of a file that has been removed.
const REMOVED: &[u8] = b" (deleted)";

/// The loop devices whose file is at `path`, by their names below `/dev`.
///
/// # Errors
/// The kernel does not tell.
pub fn of_file(path: &Path) -> Result<Vec<PathBuf>> {
    let disks = match fs::read_dir(DISKS) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        disks => disks.during("opendir", DISKS)?,
    };
    let is_its = |disk: &PathBuf| backing_file(disk).is_some_and(|file| file == path);
    let found = disks.flatten().map(|entry| entry.path()).filter(is_its);
    Ok(found.filter_map(|disk| Some(Path::new("/dev").join(disk.file_name()?))).collect())
}

/// The file of a disk; none if it is no loop device, or has none.
fn backing_file(disk: &Path) -> Option<PathBuf> {
    let mut text = fs::read(disk.join("loop/backing_file")).ok()?;
    text.pop_if(|last| *last == b'\n');
    text.truncate(text.strip_suffix(REMOVED).unwrap_or(&text).len());
    Some(std::ffi::OsString::from_vec(text).into())
}

/// Detaches a loop device from its file. One that is open somewhere is detached when it is closed there.
///
/// # Errors
/// The kernel's; none if it has no file any more.
pub fn detach(device: &Path) -> Result<()> {
    let file = File::open(device).during("open", device.display())?;
    // SAFETY: the descriptor is open throughout, and the request has no argument.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), CLEAR, 0) };
    let failed = (result != 0).then(std::io::Error::last_os_error);
    let failed = failed.filter(|error| error.raw_os_error() != Some(libc::ENXIO));
    failed.map_or(Ok(()), Err).during("ioctl LOOP_CLR_FD", device.display())
}
