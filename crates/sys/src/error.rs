//! A failed system call: which one, on what, and why.

use std::fmt;

use rustix::io::Errno;

/// The failure of one system call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// The call, as its man page is named.
    pub call: &'static str,
    /// What it was about: a path, an option, a process.
    pub subject: String,
    /// The kernel's reason.
    pub errno: Errno,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.subject.is_empty() {
            write!(f, "{}: {}", self.call, self.errno)
        } else {
            write!(f, "{} {}: {}", self.call, self.subject, self.errno)
        }
    }
}

impl std::error::Error for Error {}

/// The result of a system call.
pub type Result<T> = std::result::Result<T, Error>;

/// Names the call behind an errno.
pub trait Context<T> {
    /// Says which call on what.
    ///
    /// # Errors
    /// The errno, with its call.
    fn during(self, call: &'static str, subject: impl fmt::Display) -> Result<T>;
}

impl<T> Context<T> for std::result::Result<T, Errno> {
    fn during(self, call: &'static str, subject: impl fmt::Display) -> Result<T> {
        self.map_err(|errno| Error { call, subject: subject.to_string(), errno })
    }
}

impl<T> Context<T> for std::io::Result<T> {
    fn during(self, call: &'static str, subject: impl fmt::Display) -> Result<T> {
        self.map_err(|error| Error {
            call,
            subject: subject.to_string(),
            errno: Errno::from_io_error(&error).unwrap_or(Errno::IO),
        })
    }
}
