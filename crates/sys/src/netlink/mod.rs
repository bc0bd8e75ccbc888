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
#[cfg(test)]
mod tests;

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
/// Messages that are sent at once: a confirmation takes about 1 KiB, and all have to fit into the buffer, which without
/// CAP_NET_ADMIN has 208 KiB.
const CONFIRMED_AT_ONCE: usize = 128;
/// How often a listing that changes as it is read is begun.
const LISTINGS: u32 = 5;

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
///
/// Every message it sends has a number of its own, and what carries another number is no answer: a request that failed
/// half-way leaves nothing that the next could take for its own.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    buffer: Vec<u8>,
    /// The number of the message sent next.
    next: u32,
}

/// The numbers of the messages of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Numbers {
    first: u32,
    count: u32,
}

impl Numbers {
    /// Which message a number belongs to, from 1; none if it is another request's.
    fn place(self, number: u32) -> Option<u32> {
        let place = number.wrapping_sub(self.first);
        (place < self.count).then(|| place + 1)
    }

    /// The outcome that an answer tells, if it is one to this request that tells an outcome.
    fn outcome(self, message: &Message<'_>) -> Option<Result<()>> {
        let place = self.place(message.sequence)?;
        let tells = matches!(message.kind, NLMSG_DONE | NLMSG_ERROR);
        tells.then(|| message.acknowledgement().map_err(|error| Error { sequence: place, ..error }))
    }
}

impl Socket {
    /// A socket for links, addresses and routes.
    ///
    /// # Errors
    /// The kernel has no netlink, or no descriptor is left.
    pub fn route() -> Result<Self> {
        // NETLINK_ROUTE is protocol 0.
        Self::open(None, 0)
    }

    /// A socket for nftables and connection tracking.
    ///
    /// # Errors
    /// The kernel has no nfnetlink, or no descriptor is left.
    pub fn netfilter() -> Result<Self> {
        Self::open(Some(NETFILTER), 0)
    }

    /// A socket for generic netlink.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn generic() -> Result<Self> {
        Self::open(Some(GENERIC), 0)
    }

    /// A socket that also hears of what happens in `groups`, a bit each.
    fn open(protocol: Option<Protocol>, groups: u32) -> Result<Self> {
        let fd = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, groups))?;
        message::set_option(fd.as_fd(), message::NETLINK_CAP_ACK)?;
        message::set_option(fd.as_fd(), message::NETLINK_EXT_ACK)?;
        // Without CAP_NET_ADMIN the default size remains, and requests are refused one by one anyway.
        let _ = sockopt::set_socket_recv_buffer_size_force(&fd, RECEIVE_BUFFER_BYTES);
        Ok(Socket { fd, buffer: Vec::new(), next: 1 })
    }

    /// Sends messages that all carry [`ACK`] and reads the confirmation of each; the first error wins, but the kernel has
    /// tried all of them.
    ///
    /// # Errors
    /// The first refusal. `ENOBUFS`: nothing was seen to be refused, but not every confirmation came.
    pub fn request(&mut self, messages: &Writer) -> Result<()> {
        let mut messages = messages.clone();
        let numbers = self.number(&mut messages);
        let mut outcome = Ok(());
        for (bytes, count) in messages.portions(CONFIRMED_AT_ONCE) {
            self.send(bytes)?;
            outcome = outcome.and(self.confirmed(numbers, count));
        }
        outcome
    }

    /// Sends messages of which only those that are refused and the last are answered: a transaction.
    ///
    /// # Errors
    /// The first refusal. `ENOBUFS`: there was no answer, and nobody knows whether the transaction holds.
    fn transact(&mut self, mut messages: Writer) -> Result<()> {
        let wanted = messages.bytes().len() + 4096;
        if sockopt::socket_send_buffer_size(&self.fd)? < wanted * 2 {
            sockopt::set_socket_send_buffer_size_force(&self.fd, wanted)?;
        }
        let numbers = self.number(&mut messages);
        self.send(messages.bytes())?;
        self.confirmed(numbers, 1)
    }

    /// Reads what the kernel has answered by the time it has taken the messages: at least `count` outcomes.
    fn confirmed(&mut self, numbers: Numbers, count: usize) -> Result<()> {
        let mut outcome = Ok(());
        let mut seen = 0;
        loop {
            match self.receive() {
                Ok(length) => {
                    for one in Messages::new(&self.buffer[..length]).filter_map(|message| numbers.outcome(&message)) {
                        seen += 1;
                        outcome = outcome.and(one);
                    }
                }
                // What did not fit is lost; what did is still there.
                Err(Errno::NOBUFS) => {}
                Err(Errno::AGAIN) if seen < count => return outcome.and(Err(Errno::NOBUFS.into())),
                Err(Errno::AGAIN) => return outcome,
                Err(other) => return outcome.and(Err(other.into())),
            }
        }
    }

    /// Sends a request for a list, which carries [`DUMP`], and returns what `parse` makes of its objects. A list that
    /// changes while it is read is read anew.
    ///
    /// # Errors
    /// The kernel refused. `EINTR`: the list does not rest.
    pub fn collect<T, I: IntoIterator<Item = T>>(
        &mut self,
        request: &Writer,
        mut parse: impl FnMut(&Message<'_>) -> I,
    ) -> Result<Vec<T>> {
        let mut objects = Vec::new();
        let mut readings = 0;
        loop {
            readings += 1;
            match self.list(request, |message| objects.extend(parse(message))) {
                // EBUSY: a list that was begun before has not been read to its end.
                Err(Error { errno: Errno::INTR | Errno::NOBUFS | Errno::BUSY, .. }) if readings < LISTINGS => {
                    self.drain();
                    objects.clear();
                }
                other => return other.map(|()| objects),
            }
        }
    }

    /// Sends a request which carries [`DUMP`], or one that answers with one object and carries [`ACK`], and hands every
    /// object to `visit`.
    ///
    /// # Errors
    /// The kernel refused. `EINTR` means that the list changed underway, `ENOBUFS` that a part was lost: ask again.
    fn list(&mut self, request: &Writer, mut visit: impl FnMut(&Message<'_>)) -> Result<()> {
        let mut request = request.clone();
        let numbers = self.number(&mut request);
        self.send(request.bytes())?;
        // The kernel marks the first message after a change, seldom the last.
        let mut is_interrupted = false;
        loop {
            // Where nothing is lost there is an answer until the end of the list.
            let length = self.receive().map_err(|error| if error == Errno::AGAIN { Errno::NOBUFS } else { error })?;
            for message in Messages::new(&self.buffer[..length]) {
                if numbers.place(message.sequence).is_none() {
                    continue;
                }
                is_interrupted |= message.is_interrupted();
                match numbers.outcome(&message) {
                    Some(outcome) if is_interrupted => return outcome.and(Err(Errno::INTR.into())),
                    Some(outcome) => return outcome,
                    None => visit(&message),
                }
            }
        }
    }

    /// Reads what is left of a list: the kernel begins no other before, and goes on with one only as it is read.
    fn drain(&mut self) {
        while matches!(self.receive(), Ok(_) | Err(Errno::NOBUFS)) {}
    }

    /// Gives messages the numbers of this socket.
    fn number(&mut self, messages: &mut Writer) -> Numbers {
        let numbers = Numbers { first: self.next, count: messages.count() };
        messages.number_from(self.next);
        self.next = self.next.wrapping_add(numbers.count);
        numbers
    }

    fn send(&self, bytes: &[u8]) -> Result<()> {
        let sent = rustix::io::retry_on_intr(|| {
            rustix::net::sendto(&self.fd, bytes, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))
        })?;
        if sent == bytes.len() { Ok(()) } else { Err(Errno::MSGSIZE.into()) }
    }

    /// The next answers. There is nothing to wait for: the kernel gives them while it takes a request, and those of a list
    /// as they are read.
    fn receive(&mut self) -> std::result::Result<usize, Errno> {
        self.buffer.resize(RECEIVE_BYTES, 0);
        let receive = || rustix::net::recv(&self.fd, &mut self.buffer[..], RecvFlags::DONTWAIT);
        rustix::io::retry_on_intr(receive).map(|(length, _)| length)
    }
}
