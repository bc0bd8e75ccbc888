//! Netlink: one socket, one message builder and parser, and on top of them links, addresses and routes ([`route`]),
//! nftables transactions ([`nft`]), connection tracking ([`conntrack`]), counters of iptables ([`nfacct`]) and the kernel's
//! load balancer ([`ipvs`]).
//!
//! A socket belongs to the network namespace of the thread that opened it and works from any thread afterwards.
//! The kernel answers requests inside `sendmsg`, so a request blocks for as long as the kernel works, never on a peer.

pub mod conntrack;
#[cfg(test)]
mod fuzz;
mod generic;
pub mod ipvs;
mod message;
pub mod nfacct;
pub mod nft;
pub mod policy;
pub mod route;

use std::fmt;
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::{GENERIC, NETFILTER, SocketAddrNetlink};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, sockopt};

pub use message::{Attribute, Attributes, Message, Messages, Writer};

/// `NLM_F_REQUEST`: set on every message by [`Writer::message`].
const REQUEST: u16 = 0x01;
/// `NLM_F_ACK`: the kernel confirms the message.
pub const ACK: u16 = 0x04;
/// `NLM_F_DUMP`: list all objects.
pub const DUMP: u16 = 0x300;
/// `NLM_F_REPLACE`.
pub const REPLACE: u16 = 0x100;
/// `NLM_F_EXCL`: fail when the object exists.
pub const EXCL: u16 = 0x200;
/// `NLM_F_CREATE`.
pub const CREATE: u16 = 0x400;
/// `NLM_F_APPEND`.
pub const APPEND: u16 = 0x800;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// Room for one answer; a dump part is at most 32 KiB (`netlink_dump` in net/netlink/af_netlink.c).
const RECEIVE_BYTES: usize = 64 << 10;
/// Errors of a large transaction queue up here; memory is taken only while they do.
const RECEIVE_BUFFER_BYTES: usize = 4 << 20;

/// What the kernel answered to a request, with its own explanation where it gave one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// The error number.
    pub errno: Errno,
    /// The kernel's explanation (extended acknowledgement).
    pub explanation: Option<String>,
    /// Which message of the request failed, from 1; 0 when it is not about one message.
    pub sequence: u32,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", std::io::Error::from(self.errno))?;
        match &self.explanation {
            Some(text) => write!(f, " ({text})"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Error {}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Error { errno, explanation: None, sequence: 0 }
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Errno::from_io_error(&error).unwrap_or(Errno::IO).into()
    }
}

impl From<Error> for std::io::Error {
    fn from(error: Error) -> Self {
        std::io::Error::new(std::io::Error::from(error.errno).kind(), error)
    }
}

/// Result of a netlink request.
pub type Result<T> = std::result::Result<T, Error>;

/// A netlink socket.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    buffer: Vec<u8>,
}

impl Socket {
    /// A socket for links, addresses and routes.
    ///
    /// # Errors
    /// The kernel has no netlink, or no descriptor is left.
    pub fn route() -> Result<Self> {
        // NETLINK_ROUTE is protocol 0.
        Self::open(None)
    }

    /// A socket for nftables and connection tracking.
    ///
    /// # Errors
    /// The kernel has no nfnetlink, or no descriptor is left.
    pub fn netfilter() -> Result<Self> {
        Self::open(Some(NETFILTER))
    }

    /// A socket for generic netlink.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn generic() -> Result<Self> {
        Self::open(Some(GENERIC))
    }

    fn open(protocol: Option<Protocol>) -> Result<Self> {
        let fd = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        message::set_option(fd.as_fd(), message::NETLINK_CAP_ACK)?;
        message::set_option(fd.as_fd(), message::NETLINK_EXT_ACK)?;
        // Without CAP_NET_ADMIN the default size remains, and requests are refused one by one anyway.
        let _ = sockopt::set_socket_recv_buffer_size_force(&fd, RECEIVE_BUFFER_BYTES);
        Ok(Socket { fd, buffer: Vec::new() })
    }

    /// Sends messages that all carry [`ACK`] and waits for the confirmation of each; the first error wins, but the kernel
    /// has tried all of them.
    ///
    /// # Errors
    /// The first refusal.
    pub fn request(&mut self, messages: &Writer) -> Result<()> {
        if messages.count() == 0 {
            return Ok(()); // The kernel refuses to be sent nothing.
        }
        self.send(messages.bytes())?;
        self.confirm(messages.count())
    }

    fn confirm(&mut self, count: u32) -> Result<()> {
        let mut outcome = Ok(());
        let mut pending = count;
        while pending > 0 {
            let length = self.receive(RecvFlags::empty())?;
            for message in Messages::new(&self.buffer[..length]) {
                if message.kind == NLMSG_ERROR {
                    pending = pending.saturating_sub(1);
                    outcome = outcome.and(message.acknowledgement());
                }
            }
        }
        outcome
    }

    /// Sends messages and collects what the kernel has answered by the time it has taken them all: for transactions, where
    /// only errors and the last message are answered.
    ///
    /// # Errors
    /// The first refusal.
    pub fn transact(&mut self, messages: &Writer) -> Result<()> {
        let wanted = messages.bytes().len() + 4096;
        if sockopt::socket_send_buffer_size(&self.fd)? < wanted * 2 {
            sockopt::set_socket_send_buffer_size_force(&self.fd, wanted)?;
        }
        self.send(messages.bytes())?;
        let mut outcome = Ok(());
        loop {
            let length = match self.receive(RecvFlags::DONTWAIT) {
                Err(Error { errno: Errno::AGAIN, .. }) => return outcome,
                other => other?,
            };
            for message in Messages::new(&self.buffer[..length]).filter(|m| m.kind == NLMSG_ERROR) {
                outcome = outcome.and(message.acknowledgement());
            }
        }
    }

    /// Sends a request which carries [`DUMP`], or one that answers with one object, and hands every object to `visit`.
    ///
    /// # Errors
    /// The kernel refused. `EINTR` means that the list changed underway: ask again.
    pub fn list(&mut self, request: &Writer, mut visit: impl FnMut(&Message<'_>)) -> Result<()> {
        self.send(request.bytes())?;
        loop {
            let length = self.receive(RecvFlags::empty())?;
            for message in Messages::new(&self.buffer[..length]) {
                match message.kind {
                    NLMSG_DONE | NLMSG_ERROR => return message.acknowledgement(),
                    _ => visit(&message),
                }
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        let sent = rustix::io::retry_on_intr(|| {
            rustix::net::sendto(&self.fd, bytes, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))
        })?;
        if sent == bytes.len() { Ok(()) } else { Err(Errno::MSGSIZE.into()) }
    }

    fn receive(&mut self, flags: RecvFlags) -> Result<usize> {
        self.buffer.resize(RECEIVE_BYTES, 0);
        let (length, _) = rustix::io::retry_on_intr(|| rustix::net::recv(&self.fd, &mut self.buffer[..], flags))?;
        Ok(length)
    }
}
