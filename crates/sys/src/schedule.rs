//! How the calling process competes for processors and disks, and what kind of system it believes to run on.

use std::os::fd::{BorrowedFd, RawFd};

use rustix::io::Errno;

use crate::error::{Context as _, Error, Result};

/// `struct sched_attr` of sched_setattr(2), in the size of its first version.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Scheduling {
    size: u32,
    /// `SCHED_OTHER` and so on, by number.
    pub policy: u32,
    /// `SCHED_FLAG_RESET_ON_FORK` and so on.
    pub flags: u64,
    /// -20 to 19, of the policies that share.
    pub nice: i32,
    /// 1 to 99, of the real-time policies.
    pub priority: u32,
    /// Nanoseconds, of `SCHED_DEADLINE`; so are the two below.
    pub runtime_ns: u64,
    /// Until when the time is given.
    pub deadline_ns: u64,
    /// How often it is given.
    pub period_ns: u64,
}

/// Changes how the calling thread is scheduled (sched_setattr(2)).
///
/// # Errors
/// `EPERM` without CAP_SYS_NICE, `EINVAL` for values that do not fit the policy.
pub fn set_scheduling(scheduling: &Scheduling) -> Result<()> {
    let size = u32::try_from(size_of::<Scheduling>()).unwrap_or_default();
    let attributes = Scheduling { size, ..*scheduling };
    // SAFETY: the kernel reads `size` bytes of the structure, which outlives the call.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    check(result, "sched_setattr", format!("policy {}", scheduling.policy))
}

/// Priority of input and output of the calling thread: a class (1 real time, 2 best effort, 3 idle) and a level
/// (ioprio_set(2)).
///
/// # Errors
/// `EPERM` for the real-time class without CAP_SYS_NICE.
pub fn set_io_priority(class: u32, level: u32) -> Result<()> {
    const PROCESS: i32 = 1; // IOPRIO_WHO_PROCESS
    let value = class << 13 | level;
    // SAFETY: plain numbers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, PROCESS, 0, value) }, "ioprio_set", format!("{class}, {level}"))
}

/// Execution domain of the calling process (personality(2)).
///
/// # Errors
/// `EINVAL` where the kernel does not know it.
pub fn set_personality(domain: u64) -> Result<()> {
    let domain = libc::c_ulong::try_from(domain).unwrap_or(libc::c_ulong::MAX);
    // SAFETY: a plain number.
    check(unsafe { libc::personality(domain) }.into(), "personality", format!("{domain:#x}"))
}

/// CPUs on which the calling thread may run (sched_setaffinity(2)): bit n of the words for CPU n.
///
/// # Errors
/// `EINVAL` when it may use none of them.
pub fn set_affinity(cpus: &[u64]) -> Result<()> {
    // SAFETY: the kernel reads as many bytes as the slice has.
    let result = unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, size_of_val(cpus), cpus.as_ptr()) };
    check(result, "sched_setaffinity", format!("{cpus:x?}"))
}

/// Gives the calling process a new session keyring of this name (keyctl(2) `KEYCTL_JOIN_SESSION_KEYRING`), so that it
/// shares no keys with whoever started it.
///
/// # Errors
/// `ENOSYS` on a kernel without keyrings, `EDQUOT` when the user has too many.
pub fn join_session_keyring(name: &str) -> Result<()> {
    const JOIN_SESSION_KEYRING: libc::c_int = 1;
    let text = std::ffi::CString::new(name).map_err(|_| failure("keyctl", name, Errno::INVAL))?;
    // SAFETY: the string is NUL-terminated and outlives the call.
    check(unsafe { libc::syscall(libc::SYS_keyctl, JOIN_SESSION_KEYRING, text.as_ptr()) }, "keyctl", name)
}

/// Descriptors that this process was started with and hands on, under the numbers that they have.
#[derive(Debug, Default)]
pub struct Inherited(Vec<RawFd>);

impl Inherited {
    /// `count` of them from number 3 on.
    ///
    /// # Errors
    /// `EBADF` for a number that is not open, or that this process has opened itself.
    pub fn after_standard(count: u32) -> Result<Self> {
        let last = i32::try_from(count).ok().and_then(|count| count.checked_add(3));
        let last = last.ok_or_else(|| failure("fcntl", "too many descriptors", Errno::INVAL))?;
        let numbers = (3..last).map(|number| is_inherited(number).map(|()| number));
        numbers.collect::<Result<_>>().map(Self)
    }

    /// All of them.
    pub fn borrowed(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        // SAFETY: they were open without FD_CLOEXEC, which everything has that is opened here: nobody owns them, so
        // nobody closes them.
        self.0.iter().map(|number| unsafe { BorrowedFd::borrow_raw(*number) })
    }
}

fn is_inherited(number: RawFd) -> Result<()> {
    // SAFETY: asks about a number; nothing is changed.
    let flags = unsafe { libc::fcntl(number, libc::F_GETFD) };
    let subject = || format!("file descriptor {number}");
    match flags {
        ..0 => Err(std::io::Error::last_os_error()).during("fcntl", subject()),
        0 => Ok(()),
        _ => Err(failure("fcntl", &subject(), Errno::BADF)),
    }
}

fn failure(call: &'static str, subject: &str, errno: Errno) -> Error {
    Error { call, subject: subject.to_owned(), errno }
}

fn check(result: libc::c_long, call: &'static str, subject: impl AsRef<str>) -> Result<()> {
    if result >= 0 {
        return Ok(());
    }
    let errno = Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO);
    Err(failure(call, subject.as_ref(), errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structure_has_the_kernels_size() {
        assert_eq!(size_of::<Scheduling>(), 48, "SCHED_ATTR_SIZE_VER0");
    }
}
