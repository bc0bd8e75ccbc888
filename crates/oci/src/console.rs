//! Descriptors for callers: the master of a terminal, a process.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use executor::Stdio;
use executor::oci;

use crate::error::Error;

/// Sockets and files that a caller wants to be told of a new process by. They are opened before anything is made.
#[derive(Debug)]
pub(crate) struct Callers {
    console: Option<UnixStream>,
    pidfd: Option<UnixStream>,
    pid_file: Option<PathBuf>,
}

impl Callers {
    pub(crate) fn open(console: Option<&Path>, pidfd: Option<&Path>, pid_file: Option<&Path>) -> Result<Self, Error> {
        let connect = |path: &Path| UnixStream::connect(path).map_err(Error::file("connect to", path));
        // The working directory changes before it is written.
        let absolute = |path: &Path| std::path::absolute(path).map_err(Error::file("find", path));
        Ok(Self {
            console: console.map(connect).transpose()?,
            pidfd: pidfd.map(connect).transpose()?,
            pid_file: pid_file.map(absolute).transpose()?,
        })
    }

    /// Gives away the master of the terminal; whoever has it decides how long the terminal lives.
    pub(crate) fn give_terminal(&self, master: &OwnedFd) -> Result<(), Error> {
        self.console.as_ref().map_or(Ok(()), |socket| send(socket, master, "/dev/ptmx"))
    }

    /// Tells of the process.
    pub(crate) fn tell(&self, pid: i32, pidfd: BorrowedFd<'_>) -> Result<(), Error> {
        if let Some(socket) = &self.pidfd {
            let pidfd = pidfd.try_clone_to_owned().map_err(Error::file("duplicate", "pidfd"))?;
            send(socket, &pidfd, "pidfd")?;
        }
        let Some(path) = &self.pid_file else { return Ok(()) };
        // In one step: conmon and containerd read it as soon as it is there.
        let name = path.file_name().map(|name| format!(".{}", name.to_string_lossy())).unwrap_or_default();
        let fresh = path.with_file_name(name);
        crate::record::write_file(&fresh, pid.to_string().as_bytes(), 0o644)?;
        std::fs::rename(&fresh, path).map_err(Error::file("write", path))
    }
}

/// One message with a name and the descriptor, as runc sends it.
fn send(socket: &UnixStream, fd: &OwnedFd, name: &str) -> Result<(), Error> {
    let sent = sys::fdpass::send(socket.as_fd(), name.as_bytes(), &[fd.as_fd()]);
    sent.map(drop).map_err(Error::file("send a descriptor to", "the socket of the caller"))
}

/// Who has the other end of a terminal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Terminal {
    /// The process has none.
    None,
    /// The caller, by `--console-socket`.
    Caller,
    /// This process, between it and its own terminal.
    Relayed,
}

impl Terminal {
    /// Who is to have it.
    pub(crate) fn choose(wanted: bool, socket: bool, detached: bool) -> Result<Self, Error> {
        let invalid = |text: &str| Err(Error::Invalid(text.to_owned()));
        match (wanted, socket, detached) {
            (true, false, true) => invalid("cannot allocate tty if runc will detach without setting console socket"),
            (_, true, false) | (false, true, true) => {
                invalid("cannot use console socket if runc will not detach or allocate tty")
            }
            (false, false, _) => Ok(Self::None),
            (true, true, true) => Ok(Self::Caller),
            (true, false, false) => Ok(Self::Relayed),
        }
    }
}

/// The streams of a new process: a terminal, or those that this process has.
pub(crate) fn stdio(terminal: Terminal, size: Option<oci::ConsoleSize>) -> Result<Stdio, Error> {
    if terminal != Terminal::None {
        let size = size.unwrap_or_default();
        return Ok(Stdio::Terminal { rows: size.height, columns: size.width });
    }
    let own = |stream: io::Result<OwnedFd>| stream.map(Some).map_err(Error::file("duplicate", "a standard stream"));
    Ok(Stdio::Streams {
        stdin: own(io::stdin().as_fd().try_clone_to_owned())?,
        stdout: own(io::stdout().as_fd().try_clone_to_owned())?,
        stderr: own(io::stderr().as_fd().try_clone_to_owned())?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_needs_somebody_at_its_other_end() {
        let choose = |wanted, socket, detached| Terminal::choose(wanted, socket, detached).ok();
        assert_eq!(choose(true, true, true), Some(Terminal::Caller));
        assert_eq!(choose(true, false, false), Some(Terminal::Relayed));
        assert_eq!(choose(false, false, true), Some(Terminal::None));
        assert_eq!(choose(true, false, true), None);
        assert_eq!(choose(false, true, true), None);
    }

    #[test]
    fn a_pid_file_appears_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        let own = sys::process::pidfd_open(sys::rustix::process::getpid()).unwrap();
        Callers::open(None, None, Some(&path)).unwrap().tell(4711, own.as_fd()).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "4711");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
