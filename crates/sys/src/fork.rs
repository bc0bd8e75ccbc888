//! Forking a process that has one thread, and what a freshly forked process does to itself.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::WaitOptions;

use crate::process;

/// Copies this process; the copy keeps the standard streams and `keep`, loses all other file descriptors, and runs `run`
/// for the rest of its life. Answers its process id.
///
/// As `run` is a plain function that never returns, nothing in the copy can reach a value that owned a lost descriptor.
///
/// # Errors
/// The kernel's, and `Unsupported` when the process has more than one thread: the copy would have locks that nobody
/// unlocks.
pub fn fork_into(data: Vec<u8>, keep: Vec<OwnedFd>, run: fn(Vec<u8>, Vec<OwnedFd>) -> !) -> io::Result<u32> {
    require_one_thread()?;
    // SAFETY: the process has one thread, so no lock is held by a thread that the copy lacks.
    match unsafe { libc::fork() } {
        0 => begin(data, keep, run),
        pid => u32::try_from(pid).map_err(|_| io::Error::last_os_error()),
    }
}

/// As [`fork_into`], where the copy begins its life in a control group of version 2 (`CLONE_INTO_CGROUP`): to be moved
/// there later would wait for an RCU grace period.
///
/// # Errors
/// As [`fork_into`], and the group's.
pub fn fork_into_group(
    group: BorrowedFd<'_>,
    data: Vec<u8>,
    keep: Vec<OwnedFd>,
    run: fn(Vec<u8>, Vec<OwnedFd>) -> !,
) -> io::Result<()> {
    require_one_thread()?;
    let how = process::Clone { cgroup: Some(group), ..process::Clone::default() };
    // SAFETY: the process has one thread, so no lock is held by a thread that the copy lacks.
    match unsafe { process::clone3(&how) } {
        Ok(process::Cloned::Child) => begin(data, keep, run),
        Ok(process::Cloned::Parent(_)) => Ok(()),
        Err(error) => Err(error.errno.into()),
    }
}

/// The copy's life.
fn begin(data: Vec<u8>, keep: Vec<OwnedFd>, run: fn(Vec<u8>, Vec<OwnedFd>) -> !) -> ! {
    let kept: Vec<BorrowedFd<'_>> = keep.iter().map(AsFd::as_fd).collect();
    match close_others(&kept) {
        Ok(()) => run(data, keep),
        Err(_) => process::exit_now(126),
    }
}

/// A thread that was joined is still listed for a moment: the kernel wakes who waits for it before it takes it off.
pub(crate) fn require_one_thread() -> io::Result<()> {
    const MOMENT: Duration = Duration::from_millis(500);
    let begin = Instant::now();
    loop {
        match std::fs::read_dir("/proc/self/task")?.count() {
            1 => return Ok(()),
            _ if begin.elapsed() < MOMENT => std::thread::yield_now(),
            n => {
                let reason = format!("cannot fork a process with {n} threads");
                return Err(io::Error::new(io::ErrorKind::Unsupported, reason));
            }
        }
    }
}

/// Closes every file descriptor above the standard three but those in `keep`. Nobody may use or drop an owner of another one
/// afterwards.
pub(crate) fn close_others(keep: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(fd.as_raw_fd()).ok()).collect();
    keep.sort_unstable();
    let mut first = 3;
    for fd in keep.into_iter().filter(|fd| *fd >= 3) {
        if fd > first {
            close_range(first, fd - 1)?;
        }
        first = fd + 1;
    }
    close_range(first, u32::MAX)
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: no memory is passed; that nobody uses what is closed is the promise of `close_others`.
    match unsafe { libc::close_range(first, last, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes standard input, output and error `/dev/null`.
///
/// # Errors
/// The kernel's.
pub fn detach_stdio() -> io::Result<()> {
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    for standard in 0..=2 {
        // SAFETY: the three standard numbers belong to the process, not to a value in it.
        if unsafe { libc::dup2(null.as_raw_fd(), standard) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// Lets the kernel reap this process's children, until the default action is set again.
pub fn ignore_children() {
    // SAFETY: SIG_IGN is no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Takes back [`ignore_children`]: children can be waited for again.
pub fn restore_children() {
    // SAFETY: SIG_DFL is no handler.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Lets a write to a closed pipe be an error and not the end of the process.
pub fn ignore_broken_pipes() {
    // SAFETY: SIG_IGN is no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

/// Makes this process the leader of a session of its own, away from the terminal's signals.
///
/// # Errors
/// The kernel's.
pub fn new_session() -> io::Result<()> {
    rustix::process::setsid()?;
    Ok(())
}

/// Lets all threads share so many heaps: each keeps what was freed in it, and glibc makes eight for each processor. Call it
/// before there are threads.
pub fn share_heaps(count: i32) {
    #[cfg(target_env = "gnu")]
    // SAFETY: two numbers; a value that glibc does not take changes nothing.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, count);
    }
}

/// Lets blocks of so many bytes and more be mappings of their own, which go back to the kernel as they are freed, whatever lies
/// around them. Without it glibc raises the bound to the largest block that was ever freed.
pub fn map_blocks_from(bytes: i32) {
    #[cfg(target_env = "gnu")]
    // SAFETY: two numbers; a value that glibc does not take changes nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, bytes);
    }
}

/// Gives freed heap back to the kernel.
pub fn trim_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: no arguments but a number; glibc locks its own structures.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Waits until no child is left, for ever if the process gets new ones: the life of a pid namespace's first process.
pub fn reap_for_ever() -> ! {
    loop {
        if matches!(rustix::process::wait(WaitOptions::empty()), Err(Errno::CHILD)) {
            // SAFETY: `set` is initialised before use; waiting for a signal touches nothing else.
            unsafe {
                let mut set = std::mem::zeroed();
                libc::sigemptyset(&raw mut set);
                libc::sigaddset(&raw mut set, libc::SIGCHLD);
                libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
                let limit = libc::timespec { tv_sec: 3600, tv_nsec: 0 };
                libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const limit);
            }
        }
    }
}

/// Takes out of this process's memory what it was told by its environment: `/proc/<pid>/environ` shows that of all copies, too.
/// Call it in a process that has one thread.
pub(crate) fn forget_environment() {
    // SAFETY: the one thread changes no variable meanwhile; each entry is a string of this process that may be written, where
    // the kernel or `setenv` put it, and afterwards nobody finds any of them.
    unsafe {
        let mut next = libc::environ;
        while let Some(entry) = next.as_ref().filter(|entry| !entry.is_null()) {
            entry.write_bytes(0, libc::strlen(*entry));
            next = next.add(1);
        }
        libc::clearenv();
    }
}

/// Overwrites the command line that `/proc/<pid>/cmdline` shows, and the thread's name that `ps` shows without it.
///
/// The name is cut to the room that the arguments and the environment of this process take.
///
/// # Errors
/// The kernel's.
pub fn set_process_name(name: &str) -> io::Result<()> {
    let comm: Vec<u8> = name.bytes().filter(|b| *b != 0).take(15).collect();
    let comm = std::ffi::CString::new(comm).expect("zeros were filtered");
    rustix::thread::set_name(&comm)?;
    set_command_line(name.as_bytes())
}

/// Moves the kernel's idea of where the arguments are to a copy of `name` that is never freed (`PR_SET_MM`).
fn set_command_line(name: &[u8]) -> io::Result<()> {
    let mut copy = name.to_vec();
    copy.push(0);
    let copy: &'static [u8] = Vec::leak(copy);
    let end = copy.as_ptr_range().end as usize;
    let start = copy.as_ptr() as usize;
    // The kernel refuses a start beyond the end, so the order depends on which way the place moves: try both.
    set_mm(libc::PR_SET_MM_ARG_END, end)
        .and_then(|()| set_mm(libc::PR_SET_MM_ARG_START, start))
        .or_else(|_| set_mm(libc::PR_SET_MM_ARG_START, start).and_then(|()| set_mm(libc::PR_SET_MM_ARG_END, end)))
}

fn set_mm(what: libc::c_int, address: usize) -> io::Result<()> {
    // SAFETY: the kernel only notes the address; what it later reads there is ours, static and mapped.
    match unsafe { libc::prctl(libc::PR_SET_MM, what, address, 0, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_is_not_forked() {
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || wait.recv());
        let end = |_, _| crate::process::exit_now(0);
        assert_eq!(fork_into(Vec::new(), Vec::new(), end).unwrap_err().kind(), io::ErrorKind::Unsupported);
        drop(go);
        assert!(thread.join().unwrap().is_err());
    }
}
