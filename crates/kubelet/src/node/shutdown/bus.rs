//! A connection to the system's message bus, in tasks.

use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use dbus::{BusError, Identity, Message, Method, Session, Value};
use sys::fdpass;
use tokio::io::Interest;
use tokio::net::UnixStream;

/// A connection to a bus.
pub(super) struct Bus {
    socket: UnixStream,
    session: Session,
}

impl Bus {
    /// Connects, and says who we are.
    pub(super) async fn connect(socket: &Path) -> Result<Self, BusError> {
        let socket = UnixStream::connect(socket).await?;
        let (session, first) = Session::begin(Identity::User(sys::rustix::process::geteuid().as_raw()));
        let mut bus = Self { socket, session };
        bus.send(&first).await?;
        let (_, hello) = bus.session.hello();
        bus.send(&hello).await?;
        Ok(bus)
    }

    /// Calls a method.
    pub(super) async fn call(&mut self, method: Method<'_>, arguments: &[Value]) -> Result<Message, BusError> {
        let (serial, message) = self.session.call(method, arguments);
        self.send(&message).await?;
        loop {
            match self.session.answer(serial, method)? {
                Some(answer) => return Ok(answer),
                None => self.fill().await?,
            }
        }
    }

    /// The next signal that was asked for. Dropped half-way, it loses nothing.
    pub(super) async fn signal(&mut self) -> Result<Message, BusError> {
        loop {
            match self.session.signal()? {
                Some(signal) => return Ok(signal),
                None => self.fill().await?,
            }
        }
    }

    async fn send(&self, mut bytes: &[u8]) -> Result<(), BusError> {
        while !bytes.is_empty() {
            self.socket.writable().await?;
            match self.socket.try_write(bytes) {
                Ok(count) => bytes = &bytes[count..],
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    async fn fill(&mut self) -> Result<(), BusError> {
        let (mut buffer, mut fds) = ([0; 4096], Vec::new());
        let socket = &self.socket;
        let count = socket.async_io(Interest::READABLE, || fdpass::recv(socket.as_fd(), &mut buffer, &mut fds)).await?;
        if count == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        self.session.take(&buffer[..count], fds);
        Ok(())
    }
}
