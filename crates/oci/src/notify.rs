//! That a container is ready, told to the service manager that this command was started by (sd_notify(3)).
//!
//! ```text
//! container ──READY=1──► /run/notify/notify.sock, which is <root>/<id>/notify/notify.sock
//!                          └─ start, run ──READY=1, MAINPID=…, BARRIER=1──► NOTIFY_SOCKET
//! ```
//!
//! Nothing else that the container says goes on: which process is the service's, and how long it may take, it does not choose.

use std::ffi::OsString;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use executor::oci;
use sys::error::Context as _;
use sys::rustix::event::{PollFd, PollFlags, Timespec, poll};
use sys::rustix::io::Errno;
use sys::rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use sys::rustix::pipe::{PipeFlags, pipe_with};

use crate::error::Error;
use crate::record::{NOTIFY_SOCKET, Place};

/// Names the socket of the service manager; in the container, that of this command.
const VARIABLE: &str = "NOTIFY_SOCKET";

/// Where the container has the directory of its socket.
const INSIDE: &str = "/run/notify";

/// How long the service manager may take to have read what it was told. One that does not know the barrier lets it pass.
const BARRIER: Timespec = Timespec { tv_sec: 30, tv_nsec: 0 };

/// More than any state that a service tells.
const MESSAGE_BYTES_MAX: usize = 4096;

/// The socket of a container.
#[derive(Debug)]
pub(crate) struct Readiness {
    socket: OwnedFd,
}

/// The service manager's socket, where there is one.
fn manager() -> Option<OsString> {
    std::env::var_os(VARIABLE).filter(|name| !name.is_empty())
}

/// Has the container told where to say that it is ready, if somebody wants to know.
pub(crate) fn prepare(place: &Place, spec: &mut oci::Spec) -> Result<(), Error> {
    let (Some(_), Some(process)) = (manager(), &mut spec.process) else { return Ok(()) };
    process.env.push(format!("{VARIABLE}={INSIDE}/{NOTIFY_SOCKET}"));
    spec.mounts.push(oci::Mount {
        destination: INSIDE.to_owned(),
        source: place.make_notify_directory()?.display().to_string(),
        options: ["bind", "nosuid", "noexec", "nodev", "ro"].map(str::to_owned).into(),
        ..oci::Mount::default()
    });
    Ok(())
}

impl Readiness {
    /// The socket that the container was told of, from here on open, if somebody wants to know.
    pub(crate) fn listen(place: &Place) -> Result<Option<Self>, Error> {
        manager().map(|_| Ok(Self { socket: place.listen_for_readiness()? })).transpose()
    }

    /// For `poll`: ready when [`Self::is_done`] has something to look at.
    pub(crate) fn ready(&self) -> PollFd<'_> {
        PollFd::new(&self.socket, PollFlags::IN)
    }

    /// Takes what the container says; whether nothing more is to be heard, as it was ready, and the manager knows that `main` is
    /// its process.
    pub(crate) fn is_done(&self, main: i32) -> bool {
        match self.take() {
            Ok(None) => false,
            Ok(Some(line)) => {
                // A manager that is not there any more does not wait.
                let _ = tell(&line, main);
                true
            }
            Err(_) => true,
        }
    }

    /// Waits until the container is ready or `process` has ended.
    pub(crate) fn wait(&self, process: &OwnedFd, main: i32) -> Result<(), Error> {
        loop {
            let mut all = [self.ready(), PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
            match poll(&mut all, None) {
                Err(errno) if errno != Errno::INTR => {
                    return Err(Error::file("wait for", "the container")(errno.into()));
                }
                _ => {}
            }
            if self.is_done(main) || !all[1].revents().is_empty() {
                return Ok(());
            }
        }
    }

    /// The line that says that it is ready, if that is in what it has said.
    fn take(&self) -> std::io::Result<Option<Vec<u8>>> {
        let (mut buffer, mut fds) = ([0; MESSAGE_BYTES_MAX], Vec::new()); // Those are closed.
        match sys::fdpass::recv(self.socket.as_fd(), &mut buffer, &mut fds) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(None),
            other => Ok(line_of(&buffer[..other?]).map(<[u8]>::to_vec)),
        }
    }
}

fn line_of(message: &[u8]) -> Option<&[u8]> {
    message.split(|byte| *byte == b'\n').find(|line| line.starts_with(b"READY="))
}

/// Tells the manager, and waits until it has read that: it may look for the process at once.
fn tell(ready: &[u8], main: i32) -> Result<(), Error> {
    let Some(name) = manager() else { return Ok(()) };
    let client = client(name.as_bytes())?;
    let say = |text: &[u8], fds: &[_]| {
        sys::fdpass::send(client.as_fd(), text, fds).map_err(Error::file("write to", &name)).map(drop)
    };
    say(&[ready, b"\n"].concat(), &[])?;
    say(format!("MAINPID={main}\n").as_bytes(), &[])?;
    let (end, barrier) = pipe_with(PipeFlags::CLOEXEC).during("pipe2", "")?;
    say(b"BARRIER=1", &[barrier.as_fd()])?;
    drop(barrier);
    // It has come there when nobody has the other end any more.
    poll(&mut [PollFd::new(&end, PollFlags::IN)], Some(&BARRIER)).during("poll", VARIABLE)?;
    Ok(())
}

/// A path, or a name without one after `@`.
fn client(name: &[u8]) -> Result<OwnedFd, Error> {
    let shown = String::from_utf8_lossy(name).into_owned();
    let address = match name.strip_prefix(b"@") {
        Some(name) => SocketAddrUnix::new_abstract_name(name),
        None => SocketAddrUnix::new(name),
    };
    let client = socket_with(AddressFamily::UNIX, SocketType::DGRAM, SocketFlags::CLOEXEC, None);
    let client = client.during("socket", VARIABLE)?;
    connect(&client, &address.during("connect", &shown)?).during("connect", &shown)?;
    Ok(client)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_is_a_line_of_a_message() {
        for (message, line) in [
            ("READY=1", Some("READY=1")),
            ("STATUS=almost\nREADY=1\nMAINPID=1", Some("READY=1")),
            ("MAINPID=1\nX_READY=1", None),
            ("", None),
        ] {
            assert_eq!(line_of(message.as_bytes()), line.map(str::as_bytes), "{message}");
        }
    }
}
