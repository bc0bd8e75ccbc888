//! This process's own program, out of reach of whoever gets hold of one of its processes.
//!
//! `/proc/<pid>/exe` leads to the file itself, past all namespaces: whoever reaches it from inside a container, as an image
//! does whose program begins with `#!/proc/self/exe`, could write to the node's program (CVE-2019-5736). So a daemon goes
//! on as a copy of itself that cannot be written: the same file, with the same pages in memory, on a read-only mount that
//! is in no namespace. As no namespace has it, nobody can change the mount, not even root. Children inherit it, and what
//! they start from `/proc/self/exe`.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, MemfdFlags, Mode, OFlags, ResolveFlags, SealFlags, StatVfsMountFlags, StatxFlags};
use rustix::io::Errno;

use crate::error::{Context as _, Error, Result};
use crate::mount::{self, Change, Propagation, attribute};
use crate::process;

/// The magic link to the program of the process that opens it.
const OWN: &str = "/proc/self/exe";

/// What keeps a program from being written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seal {
    /// It is on a read-only mount in no namespace.
    Mount,
    /// It is a copy in memory that takes no writes.
    Memory,
}

/// Goes on as a copy of this program that nobody can write. Returns in the copy only, which begins at `main` with the same
/// arguments, environment and descriptors: call this first.
///
/// # Errors
/// Neither a mount nor a copy in memory can be made; the reason is that of the second.
pub fn seal() -> Result<()> {
    let (own, path) = own()?;
    if !may_be_written(&own)? {
        return Ok(());
    }
    if seal_of(&own, &path)?.is_some() {
        return process::set_name(&own_name()); // A copy in memory is called by the number of its descriptor.
    }
    let copy = match mounted(&own, &path) {
        Ok(copy) => copy,
        Err(_) => in_memory(own)?,
    };
    Err(copy.execute())
}

/// What keeps this process's program from being written; `None` before [`seal`].
///
/// # Errors
/// No `/proc`.
pub fn own_seal() -> Result<Option<Seal>> {
    let (own, path) = own()?;
    seal_of(&own, &path)
}

/// Lets a program that is going to be started have `fd` as its descriptor `number`.
pub fn give(command: &mut std::process::Command, fd: OwnedFd, number: i32) {
    use std::os::unix::process::CommandExt as _;
    let take = move || {
        // The number is no value's in the new process, which executes the program next; what is duplicated onto itself would
        // still be closed then.
        let moved = rustix::io::fcntl_dupfd_cloexec(&fd, number.saturating_add(1))?;
        // SAFETY: see above; the call takes two numbers.
        match unsafe { libc::dup2(std::os::fd::AsRawFd::as_raw_fd(&moved), number) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: system calls alone, which are safe after a fork.
    unsafe { command.pre_exec(take) };
}

/// Whether whoever this process runs things for could write the program. A user without rights of his own, in whose name all of
/// it is done, can not, where it belongs to somebody else.
fn may_be_written(own: &OwnedFd) -> Result<bool> {
    let user = rustix::process::geteuid();
    let stat = rustix::fs::fstat(own).during("fstat", OWN)?;
    let access = rustix::fs::accessat(CWD, OWN, rustix::fs::Access::WRITE_OK, AtFlags::EACCESS);
    Ok(user.is_root() || stat.st_uid == user.as_raw() || access.is_ok())
}

/// This process's program and its name.
fn own() -> Result<(OwnedFd, PathBuf)> {
    let own = rustix::fs::open(OWN, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).during("open", OWN)?;
    let name = rustix::fs::readlink(OWN, Vec::new()).during("readlink", OWN)?;
    Ok((own, PathBuf::from(OsString::from_vec(name.into_bytes()))))
}

/// What keeps `program` from being written. Each copy is asked before it is executed: one that would not be known again
/// would be copied for ever.
fn seal_of(program: &OwnedFd, path: &Path) -> Result<Option<Seal>> {
    if rustix::fs::fcntl_get_seals(program).is_ok_and(|seals| seals.contains(SealFlags::WRITE)) {
        return Ok(Some(Seal::Memory));
    }
    let read_only = rustix::fs::fstatvfs(program).during("fstatvfs", OWN)?.f_flag.contains(StatVfsMountFlags::RDONLY);
    // A read-only mount where the name leads is one of the host's, which its administrator makes writable again.
    let is_hosts = mount_of(CWD, path).is_ok_and(|hosts| mount_of(program, Path::new("")) == Ok(hosts));
    Ok((read_only && !is_hosts).then_some(Seal::Mount))
}

/// The id of the mount that a file is on.
pub(crate) fn mount_of(at: impl AsFd, path: &Path) -> Result<u64> {
    let stat = rustix::fs::statx(at, path, AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW, StatxFlags::MNT_ID);
    stat.map(|stat| stat.stx_mnt_id).during("statx", path.display())
}

/// A copy of a program: `name` below `base`, or `base` itself where that is empty.
struct Copy {
    base: OwnedFd,
    name: CString,
}

/// The same file on a read-only copy of its mount, with the name that it has there.
fn mounted(own: &OwnedFd, path: &Path) -> Result<Copy> {
    let mount = mount_of(own, Path::new(""))?;
    let same_mount = path.ancestors().take_while(|above| mount_of(CWD, above) == Ok(mount));
    let stale = || Error { call: "open_tree", subject: path.display().to_string(), errno: Errno::STALE };
    let root = same_mount.last().ok_or_else(stale)?;
    let base = mount::copy_tree(root, false)?;
    let sealed = Change { set: attribute::READ_ONLY, propagation: Some(Propagation::Private), ..Change::default() };
    mount::set_attributes(base.as_fd(), &sealed)?;
    let name = path.strip_prefix(root).map_err(|_| stale())?;
    let found = if name.as_os_str().is_empty() {
        base.try_clone().during("fcntl", "F_DUPFD_CLOEXEC")?
    } else {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        rustix::fs::openat2(&base, name, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), resolve)
            .during("openat2", path.display())?
    };
    let (ours, there) = (rustix::fs::fstat(own).during("fstat", OWN)?, rustix::fs::fstat(&found).during("fstat", OWN)?);
    // Replaced since this process began.
    if (ours.st_dev, ours.st_ino) != (there.st_dev, there.st_ino) || seal_of(&found, path)?.is_none() {
        return Err(stale());
    }
    Ok(Copy { base, name: mount::c_path(name)? })
}

/// Where a mount cannot be had: its bytes in memory, sealed.
fn in_memory(own: OwnedFd) -> Result<Copy> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Linux 6.3 wants to be told that it is to be executed; older ones do not know the word.
    let memory = match rustix::fs::memfd_create("orlop", flags | MemfdFlags::EXEC) {
        Err(Errno::INVAL) => rustix::fs::memfd_create("orlop", flags),
        other => other,
    };
    let mut memory = File::from(memory.during("memfd_create", "orlop")?);
    io::copy(&mut File::from(own), &mut memory).during("write", "a copy in memory")?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&memory, seals).during("fcntl", "F_ADD_SEALS")?;
    Ok(Copy { base: memory.into(), name: CString::default() })
}

impl Copy {
    /// Executes it in the place of this process. The descriptor of the mount is closed by that, and with it the mount leaves
    /// the last namespace that it was in.
    fn execute(&self) -> Error {
        let arguments: Vec<CString> =
            std::env::args_os().filter_map(|word| CString::new(word.into_vec()).ok()).collect();
        let environment: Vec<CString> = std::env::vars_os()
            .filter_map(|(name, value)| CString::new([name.into_vec(), value.into_vec()].join(&b'=')).ok())
            .collect();
        let errno = process::execute_at(self.base.as_fd(), &self.name, &arguments, &environment);
        Error { call: "execveat", subject: self.name.to_string_lossy().into_owned(), errno }
    }
}

/// The name that the program was called by.
fn own_name() -> String {
    let first = std::env::args_os().next().map(PathBuf::from).unwrap_or_default();
    first.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}
