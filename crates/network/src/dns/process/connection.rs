//! A client's TCP connection: one query at a time, in the order in which they come.

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use super::sockets::{Interest, prefixed, take_prefixed, unless_blocked};
use crate::dns::message::QUERY_MAX;

/// A client that says nothing, or takes nothing, for so long has lost its connection.
const IDLE: Duration = Duration::from_secs(10);

/// One connection.
#[derive(Debug)]
pub(super) struct Connection {
    stream: TcpStream,
    pub(super) ip: IpAddr,
    input: Vec<u8>,
    output: Vec<u8>,
    /// A query of it is under way.
    waits: bool,
    pub(super) ends_at: Instant,
}

impl Connection {
    pub(super) fn new(stream: TcpStream, ip: IpAddr, now: Instant) -> Connection {
        let (input, output) = (Vec::new(), Vec::new());
        Connection { stream, ip, input, output, waits: false, ends_at: now + IDLE }
    }

    pub(super) fn interest(&self) -> Interest {
        match (self.output.is_empty(), self.waits) {
            (false, _) => Interest::Write,
            (true, true) => Interest::Nothing,
            (true, false) => Interest::Read,
        }
    }

    /// A query of it is under way.
    pub(super) fn waits(&self) -> bool {
        self.waits
    }

    /// Nothing of it is under way.
    pub(super) fn is_idle(&self) -> bool {
        !self.waits && self.output.is_empty()
    }

    /// Goes on when the socket is ready; answers a query when one is complete, which then must be replied to.
    ///
    /// # Errors
    /// The connection is lost, or what comes is no query.
    pub(super) fn step(&mut self, buffer: &mut [u8], now: Instant) -> io::Result<Option<Vec<u8>>> {
        while !self.output.is_empty() {
            let Some(sent) = unless_blocked(self.stream.write(&self.output))? else { return Ok(None) };
            self.output.drain(..sent);
            self.ends_at = now + IDLE;
        }
        if self.waits {
            // Nothing is read meanwhile, so being woken means that the client is gone.
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        loop {
            if let Some(query) = take_prefixed(&mut self.input) {
                self.waits = true;
                self.ends_at = now + IDLE;
                return Ok(Some(query));
            }
            if self.input.len() > QUERY_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
            match unless_blocked(self.stream.read(buffer))? {
                None => return Ok(None),
                Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Some(length) => self.input.extend_from_slice(&buffer[..length]),
            }
        }
    }

    /// Replies to the query that [`Connection::step`] answered; the next step sends it.
    pub(super) fn reply(&mut self, reply: &[u8]) {
        self.waits = false;
        self.output = prefixed(reply);
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
