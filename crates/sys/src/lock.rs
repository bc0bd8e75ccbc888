//! Files that one process has for itself (flock(2)). The kernel gives them back when it ends, however it ends.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::mpsc;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, retry_on_intr};
use rustix::process::Pid;

/// How long the lock of a process that has been killed may be in the hands of what it was just starting. On a busy machine
/// such a child has waited for seconds until it could execute its program.
const INHERITED_MAX: Duration = Duration::from_secs(30);

/// Takes the lock of a file that is open for reading and writing, and writes this process's id into it; or tells who has it, in
/// that process's own words. That of a process which has ended is waited for.
///
/// # Errors
/// The kernel's.
pub fn take(file: &mut File) -> io::Result<Option<String>> {
    if let Some(pid) = taken_by(file)? {
        return Ok(Some(pid));
    }
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())?;
    Ok(None)
}

/// Takes the lock of an open file, or says at once (`WouldBlock`) that another process has it.
///
/// # Errors
/// The kernel's.
pub fn try_lock(file: BorrowedFd<'_>) -> io::Result<()> {
    Ok(flock(file, FlockOperation::NonBlockingLockExclusive)?)
}

fn taken_by(file: &mut File) -> io::Result<Option<String>> {
    match try_lock(file.as_fd()) {
        Ok(()) => return Ok(None),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(error) => return Err(error),
    }
    if is_gone(&read(file)?) && outlasts(file)? {
        return Ok(None);
    }
    Ok(Some(read(file)?))
}

/// Whether no process has this id.
fn is_gone(pid: &str) -> bool {
    let pid = pid.parse().ok().and_then(Pid::from_raw);
    pid.is_some_and(|pid| crate::process::pidfd_open(pid).is_err_and(|error| error.errno == Errno::SRCH))
}

/// Takes a lock whose process has ended. A child has all descriptors of the process that starts it until it executes its
/// program, and with them the lock, whatever becomes of that process.
fn outlasts(file: &File) -> io::Result<bool> {
    let same = file.try_clone()?;
    let (sender, locked) = mpsc::channel();
    let waiter = std::thread::spawn(move || {
        // Nobody listens any more when it took too long.
        let _ = sender.send(retry_on_intr(|| flock(&same, FlockOperation::LockExclusive)));
    });
    let Ok(locked) = locked.recv_timeout(INHERITED_MAX) else { return Ok(false) };
    // Who comes next forks, and may not while there are threads.
    waiter.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    locked?;
    Ok(true)
}

fn read(file: &mut File) -> io::Result<String> {
    let mut text = String::new();
    file.rewind()?;
    file.read_to_string(&mut text)?;
    Ok(text.trim().to_owned())
}
