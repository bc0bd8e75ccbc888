//! The way through a group and the groups below it. A container may have made these, as deep as it likes: a path ends at 4,096
//! bytes, directories go on. So the way is by descriptors, of which one is open at a time, and back by `..`.

use std::ffi::{CString, OsStr};
use std::io::Read as _;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;
use rustix::process::Pid;

use crate::error::{Context as _, Error, Result};

/// A group on the way, and what is left to see of those directly in it.
struct Level {
    name: CString,
    children: Vec<CString>,
}

/// Calls `enter` with each group, before those below it, and `leave` with each group below the first one, after those below
/// it: with the directory that it is in, and its name there. What goes meanwhile is passed by.
fn walk(
    first: OwnedFd,
    mut enter: impl FnMut(BorrowedFd<'_>) -> Result<()>,
    mut leave: impl FnMut(BorrowedFd<'_>, &CString) -> Result<()>,
) -> Result<()> {
    enter(first.as_fd())?;
    let mut way = vec![Level { name: CString::default(), children: groups_in(&first)? }];
    let mut here = first;
    while let Some(level) = way.last_mut() {
        if let Some(name) = level.children.pop() {
            let Some(group) = open(here.as_fd(), &name)? else { continue };
            enter(group.as_fd())?;
            way.push(Level { name, children: groups_in(&group)? });
            here = group;
        } else if let Some(level) = way.pop()
            && !way.is_empty()
        {
            // A group that is removed under us has no way back any more; what is left of it is its parent's matter.
            let Some(above) = open(here.as_fd(), c"..")? else { return Ok(()) };
            leave(above.as_fd(), &level.name)?;
            here = above;
        }
    }
    Ok(())
}

fn open(directory: BorrowedFd<'_>, name: &std::ffi::CStr) -> Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat(directory, name, flags, Mode::empty()) {
        Err(Errno::NOENT | Errno::NODEV) => Ok(None),
        other => other.map(Some).during("openat", name.to_string_lossy()),
    }
}

fn groups_in(directory: &OwnedFd) -> Result<Vec<CString>> {
    let failed = |errno| Error { call: "readdir", subject: "a control group".to_owned(), errno };
    let entries = match Dir::read_from(directory) {
        Err(Errno::NOENT | Errno::NODEV) => return Ok(Vec::new()),
        other => other.map_err(failed)?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = match entry {
            Err(Errno::NOENT | Errno::NODEV) => break,
            other => other.map_err(failed)?,
        };
        if entry.file_type() == FileType::Directory && !matches!(entry.file_name().to_bytes(), b"." | b"..") {
            names.push(entry.file_name().to_owned());
        }
    }
    Ok(names)
}

fn open_first(first: &Path) -> Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::open(first, flags, Mode::empty()) {
        Err(Errno::NOENT) => Ok(None),
        other => other.map(Some).during("open", first.display()),
    }
}

/// Calls `see` with the directory of the group and of each one below.
///
/// # Errors
/// `EACCES`; none when the group is not there, or goes meanwhile.
pub(super) fn each(first: &Path, mut see: impl FnMut(BorrowedFd<'_>)) -> Result<()> {
    let Some(first) = open_first(first)? else { return Ok(()) };
    let enter = |group: BorrowedFd<'_>| {
        see(group);
        Ok(())
    };
    walk(first, enter, |_, _| Ok(()))
}

/// The processes of a group itself. One of which the kernel does not tell them has none of its own: those in a threaded group
/// are told of where its domain begins.
pub(super) fn processes(group: BorrowedFd<'_>) -> Vec<Pid> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let Ok(file) = openat(group, c"cgroup.procs", flags, Mode::empty()) else { return Vec::new() };
    let mut text = String::new();
    let _ = std::fs::File::from(file).read_to_string(&mut text); // as it goes, so do they
    text.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)).collect()
}

/// Removes the group and the empty ones below it.
///
/// # Errors
/// `EBUSY` while a process is in one of them; none when the group is not there.
pub(super) fn remove(first: &Path) -> Result<()> {
    match std::fs::remove_dir(first) {
        // There are groups below it, or a process in it.
        Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::BUSY | Errno::NOTEMPTY)) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => return other.during("rmdir", first.display()),
    }
    if let Some(group) = open_first(first)? {
        walk(
            group,
            |_| Ok(()),
            |directory, name| match unlinkat(directory, name, AtFlags::REMOVEDIR) {
                Err(Errno::NOENT | Errno::NODEV) => Ok(()),
                other => other.during("rmdir", OsStr::from_bytes(name.to_bytes()).display()),
            },
        )?;
    }
    match std::fs::remove_dir(first) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.during("rmdir", first.display()),
    }
}

/// The group below `first`, or that itself, in which a process is.
///
/// # Errors
/// As [`each`].
pub(super) fn find(first: BorrowedFd<'_>, process: Pid) -> Result<Option<OwnedFd>> {
    let mut found = None;
    let first = open(first, c".")?;
    let see = |group: BorrowedFd<'_>| {
        if found.is_none() && processes(group).contains(&process) {
            found = open(group, c".")?;
        }
        Ok(())
    };
    first.map_or(Ok(()), |first| walk(first, see, |_, _| Ok(())))?;
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Directories below `first`, so deep that no path leads to the last of them.
    fn deep(first: &Path) -> OwnedFd {
        let name = CString::new("d".repeat(250)).unwrap();
        (0..40).fold(open_first(first).unwrap().unwrap(), |above, _| {
            rustix::fs::mkdirat(&above, &name, Mode::RWXU).unwrap();
            open(above.as_fd(), &name).unwrap().unwrap()
        })
    }

    #[test]
    fn what_no_path_leads_to_is_seen_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let first = dir.path().join("first");
        std::fs::create_dir_all(first.join("other/below")).unwrap();
        let last = deep(&first);
        let file = openat(&last, c"cgroup.procs", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
        rustix::io::write(file, b"7\n").unwrap();
        let mut seen = (0, Vec::new());
        each(&first, |group| {
            seen.0 += 1;
            seen.1.extend(processes(group));
        })
        .unwrap();
        let seven = Pid::from_raw(7).unwrap();
        assert_eq!(seen, (43, vec![seven]));
        let found = find(open_first(&first).unwrap().unwrap().as_fd(), seven).unwrap().unwrap();
        assert_eq!(rustix::fs::fstat(found).unwrap().st_ino, rustix::fs::fstat(&last).unwrap().st_ino);
        // A file keeps a directory as a process keeps a group.
        assert_eq!(remove(&first).unwrap_err().errno, Errno::NOTEMPTY);
        unlinkat(&last, c"cgroup.procs", AtFlags::empty()).unwrap();
        remove(&first).unwrap();
        assert!(!first.exists());
        remove(&first).unwrap();
        each(&first, |_| panic!("there is nothing")).unwrap();
    }
}
