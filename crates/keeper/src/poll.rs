//! Waiting for many file descriptors at once.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use sys::rustix::event::Timespec;
use sys::rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

/// What a file descriptor belongs to. The number is the key of a connection, container, exec session or client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Token {
    /// The keeper's socket.
    Listener,
    /// A connection.
    Connection(u32),
    /// The end of a container's init.
    Init(u32),
    /// The end of an exec'd process.
    Exec(u32),
    /// A container's standard output, or its terminal.
    Stdout(u32),
    /// A container's standard error.
    Stderr(u32),
    /// Room in a container's standard input.
    Stdin(u32),
    /// Input of an attached client.
    ClientStdin(u32),
    /// The loss of an attached client.
    ClientSink(u32),
    /// News of a process on its way to its program.
    Start(u32),
    /// The end of a process that nobody needs.
    Rest(u32),
    /// The end of any child, told by signal.
    Children,
}

impl Token {
    fn pack(self) -> EventData {
        let (tag, key) = match self {
            Self::Listener => (0, 0),
            Self::Connection(key) => (1, key),
            Self::Init(key) => (2, key),
            Self::Exec(key) => (3, key),
            Self::Stdout(key) => (4, key),
            Self::Stderr(key) => (5, key),
            Self::Stdin(key) => (6, key),
            Self::ClientStdin(key) => (7, key),
            Self::ClientSink(key) => (8, key),
            Self::Start(key) => (9, key),
            Self::Rest(key) => (10, key),
            Self::Children => (11, 0),
        };
        EventData::new_u64(tag << 32 | u64::from(key))
    }

    fn unpack(data: EventData) -> Self {
        let packed = data.u64();
        #[allow(clippy::cast_possible_truncation, reason = "the lower half is the key")]
        let key = packed as u32;
        match packed >> 32 {
            1 => Self::Connection(key),
            2 => Self::Init(key),
            3 => Self::Exec(key),
            4 => Self::Stdout(key),
            5 => Self::Stderr(key),
            6 => Self::Stdin(key),
            7 => Self::ClientStdin(key),
            8 => Self::ClientSink(key),
            9 => Self::Start(key),
            10 => Self::Rest(key),
            11 => Self::Children,
            _ => Self::Listener,
        }
    }
}

/// What to wake up for, beside the other side's going away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Interest {
    /// Something to read.
    Read,
    /// Room to write.
    Write,
    /// Both.
    Both,
    /// Nothing else.
    Loss,
}

impl Interest {
    fn flags(self) -> EventFlags {
        match self {
            Self::Read => EventFlags::IN,
            Self::Write => EventFlags::OUT,
            Self::Both => EventFlags::IN | EventFlags::OUT,
            Self::Loss => EventFlags::empty(),
        }
    }
}

/// The set of file descriptors that are waited for. One must leave the set before it is closed: others may hold the same
/// open file, and then the kernel would go on to report it.
#[derive(Debug)]
pub(crate) struct Poller(OwnedFd);

impl Poller {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    pub(crate) fn add(&self, fd: impl AsFd, token: Token, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.0, fd, token.pack(), interest.flags())?)
    }

    pub(crate) fn change(&self, fd: impl AsFd, token: Token, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.0, fd, token.pack(), interest.flags())?)
    }

    /// Done as well when it is not in the set.
    pub(crate) fn remove(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.0, fd); // The only error is that it is not there.
    }

    /// Waits, not longer than `limit`, and answers what woke it up; a few at a time, the rest comes with the next call.
    pub(crate) fn wait(&self, limit: Option<Duration>) -> io::Result<impl Iterator<Item = Token> + use<>> {
        let mut events: [epoll::Event; 8] =
            [epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) }; 8];
        // One that is too long for the kernel's numbers is none.
        let limit = limit.and_then(|limit| Timespec::try_from(limit).ok());
        let count = match epoll::wait(&self.0, &mut events[..], limit.as_ref()) {
            Err(sys::rustix::io::Errno::INTR) => 0, // Whoever calls comes again, with what is left of the time.
            other => other?,
        };
        Ok(events.into_iter().take(count).map(|event| Token::unpack(event.data)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_packing() {
        use Token::*;
        let key = u32::MAX;
        let keyed = [Connection, Init, Exec, Stdout, Stderr, Stdin, ClientStdin, ClientSink, Start, Rest];
        let keyed = keyed.map(|token| token(key));
        for token in keyed.into_iter().chain([Listener, Children]) {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }
}
