//! What a child tells the one who launches it, and the other way.
//!
//! A `SOCK_SEQPACKET` pair, closed on exec, so that its end says "executed". One message is one packet:
//!
//! | bytes | meaning |
//! |---|---|
//! | 0–1 | kind, see [`Kind`] |
//! | 2–3 | [`Step`] of an error |
//! | 4–7 | error number, or the value of the kind |
//! | 8–11 | second value |
//! | 12… | text |
//!
//! The launcher sends one byte, "go on", to a child that has halted or stands at its gate; the end of the channel tells the
//! child to give up. Where the gate is a socket that the child listens on, whoever connects to it becomes the launcher: the
//! byte comes by the new connection, and what is said afterwards goes there.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};

use sys::rustix::io::Errno;
use sys::rustix::net::{AddressFamily, SocketFlags, SocketType, acceptfrom_with, socketpair};

use super::{LaunchError, Step};
use crate::plan::Warning;

const HEADER: usize = 12;
/// Longer texts are cut.
const LENGTH_MAX: usize = 1024;

/// What a child says.
#[derive(Debug)]
pub(crate) enum Message {
    /// It gives up.
    Error(LaunchError),
    /// It could not do all.
    Warning(Warning),
    /// The master of its terminal.
    Terminal(OwnedFd),
    /// The final process, made by the one in between: its id and its descriptor.
    Child(i32, OwnedFd),
    /// It is not in its control group yet and waits to be put there.
    Outside,
    /// Namespaces and mounts are made; it waits for the launcher's hooks.
    Halted,
    /// Everything is set up; it waits for the launcher.
    Ready,
    /// Where its filter reports system calls.
    Listener(OwnedFd),
    /// The next thing is exec: if the channel ends now, it worked.
    Executing,
}

/// Numbers of the kinds.
#[derive(Debug, Clone, Copy)]
#[repr(u16)]
enum Kind {
    Error = 1,
    OomScore = 2,
    Terminal = 3,
    Child = 4,
    Ready = 5,
    Executing = 6,
    Halted = 7,
    Listener = 8,
    Outside = 9,
}

/// A pair of ends: the launcher's and the child's.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Who has opened a gate.
#[derive(Debug)]
pub(crate) enum Opened {
    /// The launcher.
    ByLauncher,
    /// Somebody else, who hears from now on what becomes of the process.
    By(Reporter),
    /// Nobody any more: the launcher has gone.
    Never,
}

/// The child's end.
#[derive(Debug)]
pub(crate) struct Reporter(pub(crate) OwnedFd);

impl Reporter {
    pub(crate) fn error(&self, error: &LaunchError) {
        self.send(Kind::Error, error.step as u16, [error.errno, 0], &error.detail, None);
    }

    pub(crate) fn oom_score(&self, wanted: i32, got: i32) {
        self.send(Kind::OomScore, 0, [wanted, got], "", None);
    }

    pub(crate) fn terminal(&self, master: BorrowedFd<'_>) {
        self.send(Kind::Terminal, 0, [0, 0], "", Some(master));
    }

    pub(crate) fn child(&self, pid: i32, pidfd: BorrowedFd<'_>) {
        self.send(Kind::Child, 0, [pid, 0], "", Some(pidfd));
    }

    /// Says that exec is next. False when the launcher has gone: it would not know of the program.
    pub(crate) fn executing(&self) -> bool {
        self.send(Kind::Executing, 0, [0, 0], "", None)
    }

    /// Says that it is not in its control group, and waits. False when the launcher has gone.
    pub(crate) fn outside(&self) -> bool {
        self.send(Kind::Outside, 0, [0, 0], "", None) && told_to_go_on(self.0.as_fd())
    }

    /// Says that namespaces and mounts are made, and waits. False when the launcher has gone.
    pub(crate) fn halt(&self) -> bool {
        self.send(Kind::Halted, 0, [0, 0], "", None) && told_to_go_on(self.0.as_fd())
    }

    pub(crate) fn listener(&self, listener: BorrowedFd<'_>) {
        self.send(Kind::Listener, 0, [0, 0], "", Some(listener));
    }

    /// Says that it is ready and waits, for the launcher or for whoever comes to `gate`.
    pub(crate) fn wait_at_gate(&self, gate: Option<&OwnedFd>) -> Opened {
        if !self.send(Kind::Ready, 0, [0, 0], "", None) {
            return Opened::Never;
        }
        match gate {
            None if told_to_go_on(self.0.as_fd()) => Opened::ByLauncher,
            None => Opened::Never,
            Some(gate) => wait_for_opener(gate).map_or(Opened::Never, Opened::By),
        }
    }

    /// False when the launcher has gone.
    fn send(&self, kind: Kind, step: u16, values: [i32; 2], text: &str, fd: Option<BorrowedFd<'_>>) -> bool {
        let mut packet = Vec::with_capacity(HEADER + text.len());
        packet.extend((kind as u16).to_le_bytes());
        packet.extend(step.to_le_bytes());
        values.iter().for_each(|value| packet.extend(value.to_le_bytes()));
        packet.extend(text.as_bytes());
        packet.truncate(LENGTH_MAX);
        sys::fdpass::send(self.0.as_fd(), &packet, fd.as_slice()).is_ok()
    }
}

fn told_to_go_on(channel: BorrowedFd<'_>) -> bool {
    matches!(sys::fdpass::recv(channel, &mut [0], &mut Vec::new()), Ok(1))
}

/// Who connects and goes away without a word has changed his mind.
fn wait_for_opener(gate: &OwnedFd) -> Option<Reporter> {
    loop {
        match acceptfrom_with(gate, SocketFlags::CLOEXEC) {
            Ok((opener, _)) if told_to_go_on(opener.as_fd()) => return Some(Reporter(opener)),
            Ok(_) | Err(Errno::INTR | Errno::CONNABORTED) => {}
            Err(_) => return None,
        }
    }
}

/// Reads the next message; `None` at the end.
pub(crate) fn receive(channel: BorrowedFd<'_>) -> io::Result<Option<Message>> {
    let (mut packet, mut fds) = ([0; LENGTH_MAX], Vec::new());
    let length = sys::fdpass::recv(channel, &mut packet, &mut fds)?;
    if length == 0 {
        return Ok(None);
    }
    parse(&packet[..length], fds.pop()).map(Some).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

fn parse(packet: &[u8], fd: Option<OwnedFd>) -> Option<Message> {
    let (header, text) = packet.split_first_chunk::<HEADER>()?;
    let [k0, k1, s0, s1, a0, a1, a2, a3, b0, b1, b2, b3] = *header;
    let step = Step::from_number(u16::from_le_bytes([s0, s1]))?;
    let (first, second) = (i32::from_le_bytes([a0, a1, a2, a3]), i32::from_le_bytes([b0, b1, b2, b3]));
    let detail = || String::from_utf8_lossy(text).into_owned();
    Some(match u16::from_le_bytes([k0, k1]) {
        1 => Message::Error(LaunchError { step, errno: first, detail: detail() }),
        2 => Message::Warning(Warning::OomScoreAdj { wanted: first, got: second }),
        3 => Message::Terminal(fd?),
        4 => Message::Child(first, fd?),
        5 => Message::Ready,
        6 => Message::Executing,
        7 => Message::Halted,
        8 => Message::Listener(fd?),
        9 => Message::Outside,
        _ => return None,
    })
}

/// Lets a child at its gate go on.
pub(crate) fn open_gate(channel: BorrowedFd<'_>) -> io::Result<()> {
    sys::fdpass::send(channel, b"!", &[]).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_arrive_whole_and_in_order() {
        let (here, there) = pair().unwrap();
        let reporter = Reporter(there);
        reporter.oom_score(-998, 0);
        reporter.error(&LaunchError { step: Step::Mount, errno: 2, detail: "/data".to_owned() });
        drop(reporter);
        let next = || receive(here.as_fd()).unwrap();
        assert!(matches!(next(), Some(Message::Warning(Warning::OomScoreAdj { wanted: -998, got: 0 }))));
        match next() {
            Some(Message::Error(error)) => {
                assert_eq!(error, LaunchError { step: Step::Mount, errno: 2, detail: "/data".to_owned() });
            }
            other => panic!("{other:?}"),
        }
        assert!(next().is_none());
    }
}
