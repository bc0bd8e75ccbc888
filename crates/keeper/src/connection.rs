//! One client: frames in, frames out, and a bound on what waits for it.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use sys::fdpass;

use crate::protocol::{self, Decoder, Message, Role};

/// A client that leaves so much unread is disconnected; it asks for the state when it is back.
const OUTBOX_MAX: usize = 1 << 20;

/// A client's connection; its socket does not block.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) socket: UnixStream,
    /// Known after `Hello`.
    pub(crate) role: Option<Role>,
    pub(crate) decoder: Decoder,
    outbox: VecDeque<Packet>,
    outbox_bytes: usize,
}

/// A frame, or the rest of one; its file descriptors go with the first byte.
#[derive(Debug)]
struct Packet {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

impl Connection {
    pub(crate) fn new(socket: UnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket, role: None, decoder: Decoder::default(), outbox: VecDeque::new(), outbox_bytes: 0 })
    }

    /// Moves what has arrived into the decoder. `UnexpectedEof` when the client is gone.
    pub(crate) fn receive(&mut self, buffer: &mut [u8]) -> io::Result<()> {
        let mut fds = Vec::new();
        let result = fdpass::recv(self.socket.as_fd(), buffer, &mut fds);
        match result {
            Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(n) => {
                self.decoder.push(&buffer[..n], fds);
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Queues a frame; [`Connection::flush`] sends it.
    pub(crate) fn queue(&mut self, number: u32, message: &Message, fds: Vec<OwnedFd>) -> io::Result<()> {
        let mut bytes = Vec::new();
        protocol::encode(number, message, fds.len(), &mut bytes).map_err(io::Error::other)?;
        self.outbox_bytes += bytes.len();
        if self.outbox_bytes > OUTBOX_MAX {
            return Err(io::Error::new(io::ErrorKind::StorageFull, "client does not read"));
        }
        self.outbox.push_back(Packet { bytes, sent: 0, fds });
        Ok(())
    }

    /// Sends what the socket takes; answers whether all is sent.
    pub(crate) fn flush(&mut self) -> io::Result<bool> {
        while let Some(packet) = self.outbox.front_mut() {
            let fds: Vec<_> = packet.fds.iter().map(AsFd::as_fd).collect();
            match fdpass::send(self.socket.as_fd(), &packet.bytes[packet.sent..], &fds) {
                Ok(n) => packet.sent += n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
            packet.fds.clear();
            if packet.sent == packet.bytes.len() {
                self.outbox_bytes -= packet.bytes.len();
                self.outbox.pop_front();
            }
        }
        self.outbox = VecDeque::new();
        Ok(true)
    }
}
