//! A connection for a program that has nothing else to do than to wait.

use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::{Address, BusError, Identity, Message, Method, Session, Value};

/// A connection to a bus, or to the only one at the other end.
#[derive(Debug)]
pub struct Bus {
    socket: UnixStream,
    session: Session,
}

impl Bus {
    /// Connects to somebody who is no bus. Each answer may take as long as `limit`.
    ///
    /// # Errors
    /// Nobody is there.
    pub fn direct(address: &Address, identity: Identity, limit: Duration) -> Result<Self, BusError> {
        let socket = address.connect()?;
        socket.set_read_timeout(Some(limit))?;
        socket.set_write_timeout(Some(limit))?;
        let (session, first) = Session::begin(identity);
        let mut bus = Self { socket, session };
        bus.socket.write_all(&first)?;
        Ok(bus)
    }

    /// Connects to a bus.
    ///
    /// # Errors
    /// Nobody is there.
    pub fn connect(address: &Address, identity: Identity, limit: Duration) -> Result<Self, BusError> {
        let mut bus = Self::direct(address, identity, limit)?;
        let (_, hello) = bus.session.hello();
        // Its answer is of no interest: without it there is none to any other call.
        bus.socket.write_all(&hello)?;
        Ok(bus)
    }

    /// Calls a method and waits for the answer.
    ///
    /// # Errors
    /// The connection, or the other side's refusal.
    pub fn call(&mut self, method: Method<'_>, arguments: &[Value]) -> Result<Message, BusError> {
        let serial = self.send(method, arguments)?;
        self.answer(serial, method)
    }

    /// Calls a method; the answer is waited for by [`Self::answer`] with the number that it returns, after other calls.
    ///
    /// # Errors
    /// The connection.
    pub fn send(&mut self, method: Method<'_>, arguments: &[Value]) -> Result<u32, BusError> {
        let (serial, message) = self.session.call(method, arguments);
        self.socket.write_all(&message)?;
        Ok(serial)
    }

    /// Waits for the answer to a call.
    ///
    /// # Errors
    /// As [`Self::call`].
    pub fn answer(&mut self, serial: u32, method: Method<'_>) -> Result<Message, BusError> {
        loop {
            match self.session.answer(serial, method)? {
                Some(answer) => return Ok(answer),
                None => self.fill()?,
            }
        }
    }

    /// Waits for a signal.
    ///
    /// # Errors
    /// The connection.
    pub fn signal(&mut self) -> Result<Message, BusError> {
        loop {
            match self.session.signal()? {
                Some(signal) => return Ok(signal),
                None => self.fill()?,
            }
        }
    }

    fn fill(&mut self) -> Result<(), BusError> {
        let (mut buffer, mut fds) = ([0; 4096], Vec::new());
        let count = match sys::fdpass::recv(self.socket.as_fd(), &mut buffer, &mut fds) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::Error::from(io::ErrorKind::TimedOut).into());
            }
            other => other?,
        };
        self.session.take(&buffer[..count], fds);
        Ok(())
    }
}
