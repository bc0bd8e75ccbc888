//! Signals as something to read (signalfd(2)), for a program that hands them on to another.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd as _};

/// All signals that come to this process, except those that mean a fault of its own.
#[derive(Debug)]
pub struct Signals {
    file: File,
}

/// Signals of the process's own faults, and those that job control needs from a program in the foreground.
const LEFT: [i32; 8] = [
    libc::SIGILL,
    libc::SIGABRT,
    libc::SIGBUS,
    libc::SIGFPE,
    libc::SIGSEGV,
    libc::SIGTRAP,
    libc::SIGSYS,
    libc::SIGPIPE,
];

impl Signals {
    /// Blocks them for the calling thread, the only one, and for what it makes afterwards; a new program should begin with
    /// [`crate::process::reset_signals`].
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn catch() -> io::Result<Self> {
        // SAFETY: the set is initialised by sigfillset before it is used; the calls touch nothing else.
        let set = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigfillset(&raw mut set);
            for signal in LEFT {
                libc::sigdelset(&raw mut set, signal);
            }
            set
        };
        Self::of(set)
    }

    /// As [`Signals::catch`], for the ends of children alone (`SIGCHLD`). One tells of any number of them.
    ///
    /// # Errors
    /// `EMFILE`.
    pub fn of_children() -> io::Result<Self> {
        // SAFETY: the set is initialised by sigemptyset before it is used; the calls touch nothing else.
        let set = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGCHLD);
            set
        };
        Self::of(set)
    }

    fn of(set: libc::sigset_t) -> io::Result<Self> {
        // SAFETY: the set is initialised; the calls read it and touch nothing else.
        let number = unsafe {
            if libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) < 0 {
                return Err(io::Error::last_os_error());
            }
            libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
        };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has made a fresh descriptor that nobody else owns.
        Ok(Self { file: unsafe { File::from_raw_fd(number) } })
    }

    /// The next one by number; nothing when none waits.
    ///
    /// # Errors
    /// The kernel's.
    pub fn take(&mut self) -> io::Result<Option<i32>> {
        const INFO: usize = size_of::<libc::signalfd_siginfo>();
        let mut info = [0; INFO];
        match self.file.read(&mut info) {
            Ok(INFO) => {
                // `ssi_signo` is the first field.
                let number = u32::from_ne_bytes([info[0], info[1], info[2], info[3]]);
                Ok(i32::try_from(number).ok())
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Names by number, without `SIG`, of the architectures that this program is built for.
const NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO",
    "PWR", "SYS",
];
/// Other names of some.
const ALIASES: [(&str, i32); 4] = [("IOT", 6), ("CLD", 17), ("POLL", 29), ("UNUSED", 31)];
/// First and last real-time signal, as C libraries leave them to programs.
const REAL_TIME: (i32, i32) = (34, 64);

/// A signal by its number, or by its name with or without `SIG`, in any case: `9`, `KILL`, `sigterm`, `RTMIN+3`.
pub fn number(text: &str) -> Option<i32> {
    if let Ok(number) = text.parse::<i32>() {
        return (0..=REAL_TIME.1).contains(&number).then_some(number);
    }
    let upper = text.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let listed = || NAMES.iter().position(|known| *known == name).and_then(|at| i32::try_from(at + 1).ok());
    let alias = || ALIASES.iter().find(|(known, _)| *known == name).map(|(_, number)| *number);
    listed().or_else(alias).or_else(|| real_time(name))
}

fn real_time(name: &str) -> Option<i32> {
    let offset = |rest: &str, sign: char| match rest {
        "" => Some(0),
        rest => rest.strip_prefix(sign)?.parse::<i32>().ok().filter(|offset| *offset >= 0),
    };
    let from_first = || Some(REAL_TIME.0 + offset(name.strip_prefix("RTMIN")?, '+')?);
    let from_last = || Some(REAL_TIME.1 - offset(name.strip_prefix("RTMAX")?, '-')?);
    from_first().or_else(from_last).filter(|number| (REAL_TIME.0..=REAL_TIME.1).contains(number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_have_names_and_numbers() {
        for (text, expect) in [
            ("9", Some(9)),
            ("KILL", Some(libc::SIGKILL)),
            ("sigterm", Some(libc::SIGTERM)),
            ("SIGWINCH", Some(libc::SIGWINCH)),
            ("SYS", Some(libc::SIGSYS)),
            ("RTMIN+3", Some(37)),
            ("SIGRTMAX-1", Some(63)),
            ("RTMIN+31", None),
            ("65", None),
            ("NOSUCH", None),
        ] {
            assert_eq!(number(text), expect, "{text}");
        }
    }
}
