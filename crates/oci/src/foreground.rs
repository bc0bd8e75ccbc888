//! A process in the foreground: signals go to it, its terminal is this process's, and its end is awaited.

use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::ExitCode;

use sys::process::{self, Child, Exit};
use sys::pty;
use sys::rustix::event::{PollFd, PollFlags, poll};
use sys::rustix::io::{Errno, ioctl_fionbio};
use sys::rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};
use sys::signals::Signals;

use crate::error::Error;
use crate::notify::Readiness;

/// Bytes that are read at once.
const CHUNK: usize = 32 * 1024;

const SIGCHLD: i32 = 17;
const SIGWINCH: i32 = 28;
/// Go's runtime sends it to itself, and nobody else means anything by it.
const SIGURG: i32 = 23;

/// The end of a process as this one's exit code.
pub(crate) fn exit_code(exit: Exit) -> ExitCode {
    ExitCode::from(u8::try_from(exit.code()).unwrap_or(255))
}

/// Waits for the end of `child`, hands on signals, relays its terminal, and tells that it is ready: of this process, whose end
/// is the container's.
pub(crate) fn attend(
    child: &Child,
    mut signals: Signals,
    mut relay: Option<Relay>,
    mut readiness: Option<Readiness>,
) -> Result<Exit, Error> {
    let failed = |error| Error::file("read", "signalfd")(error);
    let exit = loop {
        if let Some(exit) = reap(child) {
            break exit;
        }
        let woken = wait(&signals, relay.as_mut(), readiness.as_ref());
        readiness = readiness.filter(|readiness| !readiness.is_done(own_id()));
        match woken {
            Ok(true) => {}
            Ok(false) => continue,
            Err(error) => return Err(failed(error)),
        }
        let mut next = || signals.take();
        loop {
            match next() {
                Ok(None) => break,
                Ok(Some(signal)) => hand_on(signal, child, relay.as_ref()),
                Err(error) => return Err(failed(error)),
            }
        }
    };
    if let Some(relay) = &mut relay {
        relay.drain();
    }
    Ok(exit)
}

fn own_id() -> i32 {
    i32::try_from(std::process::id()).unwrap_or(0)
}

/// Everything that has ended; the exit of `child` if it is among it.
fn reap(child: &Child) -> Option<Exit> {
    std::iter::from_fn(process::reap_any).find(|(pid, _)| *pid == child.pid).map(|(_, exit)| exit)
}

fn hand_on(signal: i32, child: &Child, relay: Option<&Relay>) {
    match signal {
        SIGCHLD | SIGURG => {}
        SIGWINCH if relay.is_some() => relay.iter().for_each(|relay| relay.resize()),
        // It may have ended this moment.
        _ => drop(process::send_signal(child.pidfd.as_fd(), signal)),
    }
}

/// Waits for something to do; whether there are signals.
fn wait(signals: &Signals, relay: Option<&mut Relay>, readiness: Option<&Readiness>) -> io::Result<bool> {
    let mut asked = vec![PollFd::new(signals, PollFlags::IN)];
    let Some(relay) = relay else {
        return wait_for_first(asked, readiness);
    };
    let stdin = io::stdin();
    let master = relay.master.try_clone()?;
    let output = if relay.pending.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
    let wants_input = relay.input_open && relay.pending.is_empty();
    if !relay.master_open && !wants_input {
        return wait_for_first(asked, readiness);
    }
    asked.push(PollFd::new(&master, if relay.master_open { PollFlags::IN | output } else { PollFlags::empty() }));
    if wants_input {
        asked.push(PollFd::new(&stdin, PollFlags::IN));
    }
    asked.extend(readiness.map(Readiness::ready));
    retry(poll(&mut asked, None))?;
    let has_signals = !asked[0].revents().is_empty();
    let of_master = asked[1].revents();
    let of_stdin = wants_input && !asked[2].revents().is_empty();
    drop(asked);
    if of_master.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
        relay.show_output();
    }
    if of_stdin {
        relay.take_input();
    }
    relay.pass_input();
    Ok(has_signals)
}

/// Waits for any of them and for readiness; whether the first has something.
fn wait_for_first<'a>(mut asked: Vec<PollFd<'a>>, readiness: Option<&'a Readiness>) -> io::Result<bool> {
    asked.extend(readiness.map(Readiness::ready));
    retry(poll(&mut asked, None))?;
    Ok(!asked[0].revents().is_empty())
}

fn retry(result: Result<usize, Errno>) -> io::Result<usize> {
    match result {
        Err(Errno::INTR) => Ok(0),
        other => Ok(other?),
    }
}

/// The container's terminal between it and this process's own, which is raw as long as this lives.
#[derive(Debug)]
pub(crate) struct Relay {
    master: OwnedFd,
    master_open: bool,
    input_open: bool,
    /// Typed, and not taken yet.
    pending: Vec<u8>,
    /// How this process's terminal was.
    before: Option<Termios>,
}

impl Relay {
    pub(crate) fn new(master: OwnedFd) -> Result<Self, Error> {
        ioctl_fionbio(&master, true).map_err(|errno| Error::file("open", "the terminal")(errno.into()))?;
        let stdin = io::stdin();
        let before = isatty(&stdin).then(|| tcgetattr(&stdin).ok()).flatten();
        if let Some(before) = &before {
            let mut raw = before.clone();
            raw.make_raw();
            let set = tcsetattr(&stdin, OptionalActions::Now, &raw);
            set.map_err(|errno| Error::file("set", "the terminal")(errno.into()))?;
        }
        let relay = Self { master, master_open: true, input_open: true, pending: Vec::new(), before };
        relay.resize();
        Ok(relay)
    }

    /// Gives the container's terminal the size of this one, if this is one.
    fn resize(&self) {
        if let Ok((rows, columns)) = pty::size(io::stdin()) {
            let _ = pty::resize(&self.master, rows, columns); // Its process may have closed it.
        }
    }

    /// The terminal ends by an error (EIO) when the last process has closed it.
    fn show_output(&mut self) {
        let mut buffer = [0; CHUNK];
        match sys::rustix::io::read(&self.master, &mut buffer) {
            Ok(count @ 1..) => {
                let mut stdout = io::stdout();
                // Who has closed our output does not want to see it.
                let _ = stdout.write_all(&buffer[..count]).and_then(|()| stdout.flush());
            }
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(0) | Err(_) => self.master_open = false,
        }
    }

    fn take_input(&mut self) {
        let mut buffer = [0; 4096];
        // Past the buffer of `Stdin`, in which nothing could be polled for.
        match sys::rustix::io::read(io::stdin(), &mut buffer) {
            Ok(count @ 1..) => self.pending.extend(&buffer[..count]),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(0) | Err(_) => self.input_open = false,
        }
    }

    fn pass_input(&mut self) {
        match sys::rustix::io::write(&self.master, &self.pending) {
            Ok(count) => drop(self.pending.drain(..count)),
            Err(Errno::AGAIN | Errno::INTR) => {}
            Err(_) => self.pending.clear(),
        }
    }

    /// What the process has written at last.
    fn drain(&mut self) {
        loop {
            let mut asked = [PollFd::new(&self.master, PollFlags::IN)];
            let ready = poll(&mut asked, Some(&sys::rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 }));
            if !self.master_open || !matches!(ready, Ok(1..)) || !asked[0].revents().contains(PollFlags::IN) {
                return;
            }
            self.show_output();
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = tcsetattr(io::stdin(), OptionalActions::Now, before); // There is nothing else to do about it.
        }
    }
}
