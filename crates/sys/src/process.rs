//! Processes: making, naming, signalling and confining them.
//!
//! What begins with `become_` or `set_` changes the calling process or thread.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus};

use crate::error::{Context as _, Error, Result};

/// Namespaces, as the flags of clone(2).
pub mod namespace {
    /// Mounts.
    pub const MOUNT: u64 = libc::CLONE_NEWNS as u64;
    /// Host and domain name.
    pub const UTS: u64 = libc::CLONE_NEWUTS as u64;
    /// System V IPC and POSIX message queues.
    pub const IPC: u64 = libc::CLONE_NEWIPC as u64;
    /// Users and groups.
    pub const USER: u64 = libc::CLONE_NEWUSER as u64;
    /// Process ids.
    pub const PID: u64 = libc::CLONE_NEWPID as u64;
    /// Network.
    pub const NETWORK: u64 = libc::CLONE_NEWNET as u64;
    /// Control groups.
    pub const CGROUP: u64 = libc::CLONE_NEWCGROUP as u64;
    /// Boot and monotonic clocks.
    pub const TIME: u64 = libc::CLONE_NEWTIME as u64;
}

/// clone(2); the constant of the C library is too narrow for it.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// How [`clone3`] makes a child.
#[derive(Debug, Default)]
pub struct Clone<'a> {
    /// New namespaces ([`namespace`]).
    pub namespaces: u64,
    /// The control group (v2) to begin in.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// The child's parent becomes the caller's parent.
    pub as_sibling: bool,
    /// The only descriptors that the child has beside the standard three; all of the caller's without this. [`spawn`]
    /// only; the child's code must not use others.
    pub keep: Option<&'a [BorrowedFd<'a>]>,
}

/// Which side of a [`clone3`] this is.
#[derive(Debug)]
pub enum Cloned {
    /// The caller, with the child's process id and descriptor.
    Parent(Child),
    /// The child.
    Child,
}

/// A child process.
#[derive(Debug)]
pub struct Child {
    /// Its id in the caller's pid namespace.
    pub pid: Pid,
    /// Its descriptor; closed on exec.
    pub pidfd: OwnedFd,
}

/// Makes a child process (clone3(2)).
///
/// # Safety
/// The caller is single-threaded: the child is a copy of the calling thread only, and a lock that another thread held
/// would stay locked in it.
///
/// # Errors
/// Those of clone3(2).
pub unsafe fn clone3(how: &Clone<'_>) -> Result<Cloned> {
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain data; all zero is its documented default.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = how.namespaces | libc::CLONE_PIDFD as u64;
    arguments.pidfd = std::ptr::from_mut(&mut pidfd) as u64;
    if how.as_sibling {
        arguments.flags |= libc::CLONE_PARENT as u64;
    } else {
        arguments.exit_signal = libc::SIGCHLD as u64;
    }
    if let Some(cgroup) = how.cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = u64::try_from(cgroup.as_raw_fd()).unwrap_or(0);
    }
    // SAFETY: without CLONE_VM the child runs on a copy of this stack; `arguments` outlives the call. That no other
    // thread exists is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<libc::clone_args>()) };
    match result {
        0 => Ok(Cloned::Child),
        pid if pid > 0 => {
            // SAFETY: the kernel has stored a fresh descriptor that nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| failed("clone3", Errno::SRCH))?;
            Ok(Cloned::Parent(Child { pid, pidfd }))
        }
        _ => Err(last("clone3", format!("namespaces {:#x}", how.namespaces))),
    }
}

/// Whether this process is a child of [`spawn`]: it began with one thread and makes none. Its `/proc` may be a
/// container's, which could not tell.
static IS_SPAWNED: AtomicBool = AtomicBool::new(false);

/// Makes a child process that runs `life` and ends with the code that it answers; nothing of the caller's is dropped or
/// flushed in the child.
///
/// # Errors
/// Those of clone3(2), and `EBUSY` when the process has more than one thread: the copy would have locks that nobody
/// unlocks.
pub fn spawn(how: &Clone<'_>, life: impl FnOnce() -> i32) -> Result<Child> {
    let alone = IS_SPAWNED.load(Ordering::Relaxed) || crate::fork::require_one_thread().is_ok();
    if !alone {
        return Err(Error { call: "clone3", subject: "a process with several threads".to_owned(), errno: Errno::BUSY });
    }
    // SAFETY: the process has one thread, so no lock is held by a thread that the copy lacks.
    match unsafe { clone3(how)? } {
        Cloned::Parent(child) => Ok(child),
        Cloned::Child => {
            IS_SPAWNED.store(true, Ordering::Relaxed);
            match how.keep {
                Some(keep) => keep_only(keep, life),
                None => end_with(life),
            }
        }
    }
}

/// Closes every descriptor but the standard three and `keep`, runs `life` and ends the process with the code that it
/// answers: owners of what is closed are never dropped. `life` must use no other descriptor.
///
/// What is closed only by exec is still there when the kernel opens a script's interpreter, whose name is the image's to
/// choose: `/proc/self/fd/…`.
pub fn keep_only(keep: &[BorrowedFd<'_>], life: impl FnOnce() -> i32) -> ! {
    match crate::fork::close_others(keep) {
        Ok(()) => end_with(life),
        Err(_) => exit_now(126), // Linux before 5.9.
    }
}

/// The last that a process does. An unwinding panic must not reach the caller's frames: in a copy they would run twice.
fn end_with(life: impl FnOnce() -> i32) -> ! {
    let end = std::panic::catch_unwind(std::panic::AssertUnwindSafe(life));
    exit_now(end.unwrap_or(101))
}

/// Makes these the standard input, output and error, inherited over exec. Works for any numbers they have now.
///
/// # Errors
/// `EMFILE`.
pub fn set_standard_streams(streams: [BorrowedFd<'_>; 3]) -> Result<()> {
    // First out of the way: one of them may be where another has to go.
    let mut moved = Vec::with_capacity(3);
    for stream in streams {
        moved.push(rustix::io::fcntl_dupfd_cloexec(stream, 3).during("fcntl", "F_DUPFD_CLOEXEC")?);
    }
    for (to, from) in (0..).zip(&moved) {
        // SAFETY: the three standard numbers belong to the process, not to a value in it.
        unsafe { duplicate_to(from, to)? };
    }
    Ok(())
}

fn failed(call: &'static str, errno: Errno) -> Error {
    Error { call, subject: String::new(), errno }
}

/// The calling thread's errno as an error.
fn last(call: &'static str, subject: impl std::fmt::Display) -> Error {
    Error { call, subject: subject.to_string(), errno: last_errno() }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)
}

fn check(result: libc::c_long, call: &'static str, subject: impl std::fmt::Display) -> Result<()> {
    if result < 0 { Err(last(call, subject)) } else { Ok(()) }
}

/// Ends the calling process at once: no destructors, no flushing (_exit(2)).
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit has no preconditions.
    unsafe { libc::_exit(code) }
}

/// Replaces the calling process by `program` (execve(2)). Returns only on failure.
pub fn execute(program: &CStr, arguments: &[CString], environment: &[CString]) -> Errno {
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    // SAFETY: all three are NUL-terminated and live until the call returns, which it does only on failure.
    unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    last_errno()
}

/// Replaces the calling process by the program `name` in `directory`, or by what `directory` refers to where the name is
/// empty (execveat(2)). Returns only on failure.
pub fn execute_at(directory: BorrowedFd<'_>, name: &CStr, arguments: &[CString], environment: &[CString]) -> Errno {
    let (arguments, environment) = (pointers(arguments), pointers(environment));
    let (directory, flags) = (directory.as_raw_fd(), libc::AT_EMPTY_PATH);
    // SAFETY: as above.
    unsafe {
        libc::syscall(libc::SYS_execveat, directory, name.as_ptr(), arguments.as_ptr(), environment.as_ptr(), flags)
    };
    last_errno()
}

/// An array of strings as C wants it. It must not outlive them.
fn pointers(strings: &[CString]) -> Vec<*const libc::c_char> {
    strings.iter().map(|string| string.as_ptr()).chain(std::iter::once(std::ptr::null())).collect()
}

/// Joins the namespaces `kinds` ([`namespace`]) of `target`: a namespace's descriptor, or a process's pidfd (setns(2)).
///
/// # Errors
/// Those of setns(2).
pub fn join(target: BorrowedFd<'_>, kinds: u64) -> Result<()> {
    let kinds = libc::c_int::try_from(kinds).map_err(|_| failed("setns", Errno::INVAL))?;
    // SAFETY: setns reads no memory of ours.
    check(unsafe { libc::setns(target.as_raw_fd(), kinds) }.into(), "setns", format!("{kinds:#x}"))
}

/// Leaves the namespaces `kinds` for fresh ones (unshare(2)); only namespaces, never shared descriptors or memory.
///
/// # Errors
/// Those of unshare(2).
pub fn leave(kinds: u64) -> Result<()> {
    let kinds = libc::c_int::try_from(kinds).map_err(|_| failed("unshare", Errno::INVAL))?;
    // SAFETY: with namespace flags only, unshare touches nothing that Rust relies on.
    check(unsafe { libc::unshare(kinds) }.into(), "unshare", format!("{kinds:#x}"))
}

/// The descriptor of a process (pidfd_open(2)); closed on exec.
///
/// # Errors
/// `ESRCH` when it has been reaped.
pub fn pidfd_open(pid: Pid) -> Result<OwnedFd> {
    rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).during("pidfd_open", pid.as_raw_nonzero())
}

/// The id, in the caller's pid namespace, of the process of a descriptor (proc(5), fdinfo).
///
/// # Errors
/// `ESRCH` when it has ended.
pub fn id(pidfd: BorrowedFd<'_>) -> Result<Pid> {
    let path = format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd());
    let text = std::fs::read_to_string(&path).during("read", &path)?;
    let id = text.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
    id.filter(|id| *id > 0).and_then(Pid::from_raw).ok_or(Error { call: "pidfd", subject: path, errno: Errno::SRCH })
}

/// Sends `signal` by number (pidfd_send_signal(2)); real-time signals included.
///
/// # Errors
/// `ESRCH` when the process has ended, `EINVAL` for a number that is no signal.
pub fn send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<()> {
    let no_info = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null siginfo is documented to mean what kill(2) would send.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, no_info, 0) };
    check(result, "pidfd_send_signal", signal)
}

/// Kills the process group that `leader` leads. It must not have been reaped yet: its id could be another's by now.
///
/// # Errors
/// `ESRCH` when nobody is in the group.
pub fn kill_group(leader: Pid) -> Result<()> {
    rustix::process::kill_process_group(leader, Signal::KILL).during("kill", leader.as_raw_nonzero())
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Exit {
    /// The code as a shell and the CRI show it: 128 + the signal's number for a killed process.
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}

/// Reaps a child when it has ended; `None` while it runs (waitid(2) with `P_PIDFD` and `WNOHANG`).
///
/// # Errors
/// `ECHILD` for somebody else's child.
pub fn try_reap(pidfd: BorrowedFd<'_>) -> Result<Option<Exit>> {
    reap_with(pidfd, WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
}

/// Waits for a child to end and reaps it.
///
/// # Errors
/// `ECHILD` for somebody else's child.
pub fn reap(pidfd: BorrowedFd<'_>) -> Result<Exit> {
    loop {
        if let Some(exit) = reap_with(pidfd, WaitIdOptions::EXITED)? {
            return Ok(exit);
        }
    }
}

fn reap_with(pidfd: BorrowedFd<'_>, options: WaitIdOptions) -> Result<Option<Exit>> {
    let status = loop {
        match rustix::process::waitid(WaitId::PidFd(pidfd), options) {
            Err(Errno::INTR) => {}
            other => break other.during("waitid", "")?,
        }
    };
    Ok(status.and_then(exit_of))
}

fn exit_of(status: WaitIdStatus) -> Option<Exit> {
    let signal = status.terminating_signal();
    signal.map(Exit::Signal).or_else(|| status.exit_status().map(Exit::Code))
}

/// Reaps any child that has ended, without waiting: its id and its exit.
pub fn reap_any() -> Option<(Pid, Exit)> {
    let mut status: libc::c_int = 0;
    // SAFETY: `status` is ours and outlives the call.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    let pid = Pid::from_raw(pid).filter(|pid| pid.as_raw_nonzero().get() > 0)?;
    let exit = if libc::WIFSIGNALED(status) {
        Exit::Signal(libc::WTERMSIG(status))
    } else {
        Exit::Code(libc::WEXITSTATUS(status))
    };
    Some((pid, exit))
}

/// A child that has ended and was not reaped yet, if there is one; it is not reaped (waitid(2) with `WNOWAIT`).
pub fn ended_child() -> Option<Pid> {
    // SAFETY: siginfo_t is plain data, which the call fills; without an ended child it stays zero.
    unsafe {
        let mut info: libc::siginfo_t = std::mem::zeroed();
        let options = libc::WEXITED | libc::WNOHANG | libc::WNOWAIT;
        if libc::waitid(libc::P_ALL, 0, &raw mut info, options) < 0 {
            return None;
        }
        Pid::from_raw(info.si_pid())
    }
}

/// Whether a process is the caller's own child, ended or not.
pub fn is_child(pidfd: BorrowedFd<'_>) -> bool {
    reap_with(pidfd, WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT).is_ok()
}

/// Lets orphaned descendants become the caller's children (prctl(2) `PR_SET_CHILD_SUBREAPER`).
///
/// # Errors
/// None in practice.
pub fn become_subreaper() -> Result<()> {
    prctl(libc::PR_SET_CHILD_SUBREAPER, 1, "PR_SET_CHILD_SUBREAPER")
}

/// Asks for `signal` when the parent ends (prctl(2) `PR_SET_PDEATHSIG`).
///
/// # Errors
/// `EINVAL` for a number that is no signal.
pub fn set_parent_death_signal(signal: Option<Signal>) -> Result<()> {
    let number = signal.map_or(0, |signal| signal.as_raw());
    prctl(libc::PR_SET_PDEATHSIG, libc::c_ulong::try_from(number).unwrap_or(0), "PR_SET_PDEATHSIG")
}

/// Forbids, or allows, to look into this process through `/proc` and ptrace (prctl(2) `PR_SET_DUMPABLE`).
///
/// # Errors
/// None in practice.
pub fn set_dumpable(dumpable: bool) -> Result<()> {
    prctl(libc::PR_SET_DUMPABLE, dumpable.into(), "PR_SET_DUMPABLE")
}

/// From now on exec grants no privileges (prctl(2) `PR_SET_NO_NEW_PRIVS`).
///
/// # Errors
/// None in practice.
pub fn set_no_new_privileges() -> Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, "PR_SET_NO_NEW_PRIVS")
}

/// Keeps the permitted capabilities over a change of user (prctl(2) `PR_SET_KEEPCAPS`).
///
/// # Errors
/// None in practice.
pub fn set_keep_capabilities(keep: bool) -> Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, keep.into(), "PR_SET_KEEPCAPS")
}

/// The name that `ps` and `top` show; cut to 15 bytes (prctl(2) `PR_SET_NAME`).
///
/// # Errors
/// A NUL in the name.
pub fn set_name(name: &str) -> Result<()> {
    let name = CString::new(name).map_err(|_| failed("prctl", Errno::INVAL))?;
    // SAFETY: the string is NUL-terminated and outlives the call.
    check(unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) }.into(), "prctl", "PR_SET_NAME")
}

fn prctl(option: libc::c_int, value: libc::c_ulong, name: &'static str) -> Result<()> {
    let zero: libc::c_ulong = 0;
    // SAFETY: the options used here take plain numbers.
    check(unsafe { libc::prctl(option, value, zero, zero, zero) }.into(), "prctl", name)
}

/// Puts a seccomp filter on the calling thread (seccomp(2)). `program` is an array of `struct sock_filter`.
///
/// # Errors
/// `EINVAL` for a program that the kernel rejects, `EACCES` without privilege and without no_new_privs.
pub fn set_seccomp_filter(program: &[u8], flags: u32) -> Result<()> {
    install_filter(program, flags).map(drop)
}

/// As [`set_seccomp_filter`], with a descriptor on which the filter's notifications arrive
/// (`SECCOMP_FILTER_FLAG_NEW_LISTENER`); closed on exec.
///
/// # Errors
/// As [`set_seccomp_filter`]; `EBUSY` when another filter of the thread has a listener.
pub fn set_notifying_filter(program: &[u8], flags: u32) -> Result<OwnedFd> {
    const NEW_LISTENER: u32 = 8;
    let number = install_filter(program, flags | NEW_LISTENER)?;
    let number = RawFd::try_from(number).map_err(|_| failed("seccomp", Errno::BADF))?;
    // SAFETY: the kernel has made a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn install_filter(program: &[u8], flags: u32) -> Result<libc::c_long> {
    const INSTRUCTION: usize = size_of::<libc::sock_filter>();
    if program.is_empty() || !program.len().is_multiple_of(INSTRUCTION) {
        return Err(failed("seccomp", Errno::INVAL));
    }
    let len = u16::try_from(program.len() / INSTRUCTION).map_err(|_| failed("seccomp", Errno::TOOBIG))?;
    // The kernel copies from any address, but the pointer type promises alignment: give it an aligned copy.
    let filter: Vec<libc::sock_filter> = program
        .chunks_exact(INSTRUCTION)
        .map(|bytes| libc::sock_filter {
            code: u16::from_ne_bytes([bytes[0], bytes[1]]),
            jt: bytes[2],
            jf: bytes[3],
            k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        })
        .collect();
    let program = libc::sock_fprog { len, filter: filter.as_ptr().cast_mut() };
    // SAFETY: `program` and what it points to live until the call returns; the kernel only reads them.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program) };
    check(result, "seccomp", format!("{len} instructions"))?;
    Ok(result)
}

/// User, group and supplementary groups of the calling process, in the order that the kernel's checks need.
///
/// # Errors
/// `EPERM` without the capabilities, `EINVAL` for an id without a mapping.
pub fn set_user(uid: u32, gid: u32, groups: &[u32]) -> Result<()> {
    // SAFETY: the slice is valid for its length.
    let result = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    match check(result, "setgroups", format!("{groups:?}")) {
        // A user without rights of his own may not leave groups that take rights away (user_namespaces(7)).
        Err(error) if error.errno == Errno::PERM && groups.is_empty() && is_bound_to_groups() => {}
        other => other?,
    }
    // SAFETY: plain numbers. The raw call changes this thread only; the caller is the only one.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) }, "setresgid", gid)?;
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) }, "setresuid", uid)
}

/// Whether the user namespace forbids setgroups(2) to everybody.
fn is_bound_to_groups() -> bool {
    std::fs::read("/proc/self/setgroups").is_ok_and(|text| text.starts_with(b"deny"))
}

/// User and group 0 without supplementary groups, as the first process of a user namespace needs before it can own
/// files there.
///
/// # Errors
/// `EINVAL` when 0 has no mapping.
pub fn become_root() -> Result<()> {
    set_user(0, 0, &[])
}

/// Host name of the calling process's UTS namespace.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN there.
pub fn set_host_name(name: &str) -> Result<()> {
    // SAFETY: pointer and length belong together.
    check(unsafe { libc::sethostname(name.as_ptr().cast(), name.len()) }.into(), "sethostname", name)
}

/// NIS domain name of the calling process's UTS namespace.
///
/// # Errors
/// `EPERM` without CAP_SYS_ADMIN there.
pub fn set_domain_name(name: &str) -> Result<()> {
    // SAFETY: pointer and length belong together.
    check(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }.into(), "setdomainname", name)
}

/// A resource limit by its number in getrlimit(2); `u64::MAX` is unlimited.
///
/// # Errors
/// `EPERM` for raising a hard limit without CAP_SYS_RESOURCE.
pub fn set_limit(resource: u32, soft: u64, hard: u64) -> Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: `limit` outlives the call; a null old limit is allowed.
    let result = unsafe {
        libc::syscall(libc::SYS_prlimit64, 0, resource, &raw const limit, std::ptr::null::<libc::rlimit64>())
    };
    check(result, "prlimit64", format!("{resource}: {soft}, {hard}"))
}

/// Default dispositions for all signals and an empty mask, as a fresh program expects.
///
/// # Errors
/// None in practice.
pub fn reset_signals() -> Result<()> {
    for signal in 1..=64 {
        // SAFETY: setting the default disposition is always allowed; SIGKILL, SIGSTOP and the C library's own signals
        // refuse and stay as they are.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    // SAFETY: sigset_t is plain data, filled by sigemptyset before it is used.
    unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()).into(), "sigprocmask", "")
    }
}

/// Moves `from` to exactly the descriptor `to`, inherited over exec (dup2(2)).
///
/// # Safety
/// Nobody in this process owns `to`, or the caller means to replace what it is.
///
/// # Errors
/// `EBADF` for numbers out of range.
pub unsafe fn duplicate_to(from: impl AsFd, to: RawFd) -> Result<()> {
    // SAFETY: plain numbers; that `to` may be replaced is the caller's promise.
    check(unsafe { libc::dup2(from.as_fd().as_raw_fd(), to) }.into(), "dup2", to)
}
