//! Waiting for sockets, and the sockets to other servers.

use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use sys::rustix::event::Timespec;
use sys::rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use sys::rustix::io::Errno;
use sys::rustix::net::{AddressFamily, SocketFlags, SocketType, connect, socket_with};

use crate::dns::message::Transport;

/// What a descriptor belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    /// A socket with queries.
    Udp(u32),
    /// A listener for connections with queries.
    Tcp(u32),
    /// A client's connection.
    Connection(u32),
    /// A socket to another server.
    Flight(u32),
    /// The listener for daemons.
    Daemons,
    /// A daemon's connection.
    Daemon(u32),
}

impl Token {
    fn pack(self) -> EventData {
        let (tag, key) = match self {
            Token::Udp(key) => (0, key),
            Token::Tcp(key) => (1, key),
            Token::Connection(key) => (2, key),
            Token::Flight(key) => (3, key),
            Token::Daemons => (4, 0),
            Token::Daemon(key) => (5, key),
        };
        EventData::new_u64(u64::from(key) << 8 | tag)
    }

    fn unpack(data: EventData) -> Token {
        let packed = data.u64();
        let key = u32::try_from(packed >> 8).unwrap_or(u32::MAX);
        match packed & 0xff {
            0 => Token::Udp(key),
            1 => Token::Tcp(key),
            2 => Token::Connection(key),
            3 => Token::Flight(key),
            4 => Token::Daemons,
            _ => Token::Daemon(key),
        }
    }
}

/// What to wake up for, beside failures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interest {
    Read,
    Write,
    Nothing,
}

impl Interest {
    fn flags(self) -> EventFlags {
        match self {
            Interest::Read => EventFlags::IN,
            Interest::Write => EventFlags::OUT,
            Interest::Nothing => EventFlags::empty(),
        }
    }
}

/// The descriptors that are waited for. One must leave before it is closed where others hold the same open file.
#[derive(Debug)]
pub(super) struct Poller(OwnedFd);

impl Poller {
    pub(super) fn new() -> io::Result<Poller> {
        Ok(Poller(epoll::create(CreateFlags::CLOEXEC)?))
    }

    pub(super) fn add(&self, fd: impl AsFd, token: Token, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.0, fd, token.pack(), interest.flags())?)
    }

    pub(super) fn change(&self, fd: impl AsFd, token: Token, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.0, fd, token.pack(), interest.flags())?)
    }

    pub(super) fn remove(&self, fd: impl AsFd) {
        let _ = epoll::delete(&self.0, fd); // The only error is that it is not there.
    }

    /// What is ready, at the latest at `until`; a few at a time, the rest comes with the next call.
    pub(super) fn wait(&self, until: Option<Instant>) -> io::Result<impl Iterator<Item = Token> + use<>> {
        const NONE: epoll::Event = epoll::Event { flags: EventFlags::empty(), data: EventData::new_u64(0) };
        let mut events = [NONE; 32];
        // Rounded up: woken a moment early, the loop would turn without anything to do.
        let left = until.map(|until| until.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        let limit = left.and_then(|left| Timespec::try_from(left).ok());
        let count = match epoll::wait(&self.0, &mut events[..], limit.as_ref()) {
            Err(Errno::INTR) => 0,
            other => other?,
        };
        Ok(events.into_iter().take(count).map(|event| Token::unpack(event.data)))
    }
}

/// A socket to another server, with one question on it.
#[derive(Debug)]
pub(super) enum Flight {
    Udp(UdpSocket),
    Tcp(Stream),
}

/// A connection to another server.
#[derive(Debug)]
pub(super) struct Stream {
    stream: TcpStream,
    /// What is still to be sent.
    output: Vec<u8>,
    input: Vec<u8>,
}

impl Flight {
    /// Opens a socket of its own, so that its port is a secret, too, and the kernel reports who is not there.
    pub(super) fn send(server: SocketAddr, transport: Transport, message: &[u8]) -> io::Result<Flight> {
        match transport {
            Transport::Udp => {
                let any: SocketAddr = match server {
                    SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
                    SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
                };
                let socket = UdpSocket::bind(any)?;
                socket.set_nonblocking(true)?;
                socket.connect(server)?;
                socket.send(message)?;
                Ok(Flight::Udp(socket))
            }
            Transport::Tcp => {
                let family = if server.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let socket = socket_with(family, SocketType::STREAM, flags, None)?;
                match connect(&socket, &server) {
                    Ok(()) | Err(Errno::INPROGRESS) => {}
                    Err(errno) => return Err(errno.into()),
                }
                let output = prefixed(message);
                Ok(Flight::Tcp(Stream { stream: socket.into(), output, input: Vec::new() }))
            }
        }
    }

    pub(super) fn interest(&self) -> Interest {
        match self {
            Flight::Tcp(stream) if !stream.output.is_empty() => Interest::Write,
            _ => Interest::Read,
        }
    }

    /// Goes on when the socket is ready; answers a message when one is complete.
    ///
    /// # Errors
    /// No answer will come on this socket.
    pub(super) fn step(&mut self, buffer: &mut [u8]) -> io::Result<Option<Vec<u8>>> {
        match self {
            Flight::Udp(socket) => Ok(unless_blocked(socket.recv(buffer))?.map(|length| buffer[..length].to_vec())),
            Flight::Tcp(stream) => stream.step(buffer),
        }
    }
}

impl Stream {
    fn step(&mut self, buffer: &mut [u8]) -> io::Result<Option<Vec<u8>>> {
        while !self.output.is_empty() {
            let Some(sent) = unless_blocked(self.stream.write(&self.output))? else { return Ok(None) };
            self.output.drain(..sent);
        }
        while let Some(length) = unless_blocked(self.stream.read(buffer))? {
            if length == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.input.extend_from_slice(&buffer[..length]);
            if let Some(message) = take_prefixed(&mut self.input) {
                return Ok(Some(message));
            }
        }
        Ok(None)
    }
}

impl AsFd for Flight {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Flight::Udp(socket) => socket.as_fd(),
            Flight::Tcp(stream) => stream.stream.as_fd(),
        }
    }
}

/// A message as it goes over TCP (RFC 1035, 4.2.2).
pub(super) fn prefixed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes(), &message[..usize::from(length)]].concat()
}

/// The first message of what came over TCP, if all of it is there.
pub(super) fn take_prefixed(input: &mut Vec<u8>) -> Option<Vec<u8>> {
    let (length, rest) = input.split_first_chunk()?;
    let length = usize::from(u16::from_be_bytes(*length));
    let message = rest.get(..length)?.to_vec();
    input.drain(..2 + length);
    Some(message)
}

/// `None` when the call would have had to wait, or was interrupted.
pub(super) fn unless_blocked<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_survive_packing() {
        let keyed = [Token::Udp, Token::Tcp, Token::Connection, Token::Flight, Token::Daemon];
        for token in keyed.map(|token| token(u32::MAX)).into_iter().chain([Token::Daemons]) {
            assert_eq!(Token::unpack(token.pack()), token);
        }
    }

    #[test]
    fn messages_of_a_stream_come_in_pieces() {
        let mut input = Vec::new();
        let mut seen = Vec::new();
        for byte in [prefixed(b"one"), prefixed(b""), prefixed(b"three")].concat() {
            input.push(byte);
            seen.extend(take_prefixed(&mut input));
        }
        assert_eq!(seen, [&b"one"[..], b"", b"three"]);
    }
}
