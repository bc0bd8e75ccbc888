//! As much of SCTP (RFC 9260) as it takes to see where a first packet goes: an INIT, and an INIT ACK whose cookie is the
//! answer. Spoken through raw sockets, so it works where the kernel has no SCTP of its own, which netfilter does not need.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;

use rustix::net::{self, AddressFamily, SocketFlags, SocketType};
use tokio::net::UdpSocket;

const HEADER: usize = 12;
const CHUNK: usize = 20;
const INIT: u8 = 1;
const INIT_ACK: u8 = 2;
const COOKIE: u16 = 7;

/// A packet that begins an association, or the answer to one.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Packet {
    pub(super) source_port: u16,
    pub(super) destination_port: u16,
    /// What the other one is to put into its packets.
    tag: u32,
    kind: u8,
    cookie: Vec<u8>,
}

impl Packet {
    /// The first packet of an association.
    pub(super) fn init(source_port: u16, destination_port: u16) -> Self {
        Self {
            source_port,
            destination_port,
            tag: 0x0107_0000 | u32::from(source_port),
            kind: INIT,
            cookie: Vec::new(),
        }
    }

    /// The answer to this one.
    pub(super) fn answer(&self, text: &str) -> Self {
        let (source_port, destination_port) = (self.destination_port, self.source_port);
        Self { source_port, destination_port, tag: self.tag, kind: INIT_ACK, cookie: text.as_bytes().to_vec() }
    }

    pub(super) fn is_init(&self) -> bool {
        self.kind == INIT
    }

    /// What the answer says, if it is one.
    pub(super) fn text(&self) -> Option<String> {
        (self.kind == INIT_ACK).then(|| String::from_utf8_lossy(&self.cookie).into_owned())
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.source_port.to_be_bytes());
        bytes.extend(self.destination_port.to_be_bytes());
        // The first packet has no tag, its answer that of the first.
        bytes.extend(if self.kind == INIT { 0 } else { self.tag }.to_be_bytes());
        bytes.extend([0; 4]);
        let cookie = if self.cookie.is_empty() { 0 } else { 4 + self.cookie.len() };
        bytes.extend([self.kind, 0]);
        bytes.extend(u16::try_from(CHUNK + cookie).unwrap_or(u16::MAX).to_be_bytes());
        bytes.extend(self.tag.to_be_bytes());
        bytes.extend(65_536_u32.to_be_bytes()); // window
        bytes.extend([0, 1, 0, 1]); // streams out and in
        bytes.extend(1_u32.to_be_bytes()); // sequence number
        if cookie > 0 {
            bytes.extend(COOKIE.to_be_bytes());
            bytes.extend(u16::try_from(cookie).unwrap_or(u16::MAX).to_be_bytes());
            bytes.extend(&self.cookie);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        let sum = crc32c(&bytes).to_le_bytes();
        bytes[8..HEADER].copy_from_slice(&sum);
        bytes
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let short = |at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let tag = u32::from_be_bytes(bytes.get(HEADER + 4..HEADER + 8)?.try_into().ok()?);
        let kind = *bytes.get(HEADER)?;
        let parameter = HEADER + CHUNK;
        let cookie = match short(parameter) {
            Some(COOKIE) => bytes.get(parameter + 4..parameter + usize::from(short(parameter + 2)?))?.to_vec(),
            _ => Vec::new(),
        };
        Some(Self { source_port: short(0)?, destination_port: short(2)?, tag, kind, cookie })
    }
}

/// A raw socket for SCTP. What tokio does with a socket of UDP is the same for one that is raw.
#[derive(Debug)]
pub(super) struct Socket(UdpSocket);

impl Socket {
    /// One that hears what comes to `local`; everything, if that is unspecified.
    pub(super) fn bind(local: IpAddr) -> io::Result<Self> {
        let family = if local.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = net::socket_with(family, SocketType::RAW, flags, Some(net::ipproto::SCTP))?;
        widen(&socket)?;
        net::bind(&socket, &SocketAddr::new(local, 0))?;
        Ok(Self(UdpSocket::from_std(socket.into())?))
    }

    /// From now on it hears `peer` alone, and whether that is refused.
    pub(super) async fn connect(&self, peer: IpAddr) -> io::Result<()> {
        self.0.connect((peer, 0)).await
    }

    pub(super) async fn send(&self, packet: &Packet) -> io::Result<()> {
        self.0.send(&packet.bytes()).await.map(drop)
    }

    pub(super) async fn send_to(&self, packet: &Packet, peer: IpAddr) -> io::Result<()> {
        self.0.send_to(&packet.bytes(), (peer, 0)).await.map(drop)
    }

    /// The next packet that can be read, and where it came from.
    pub(super) async fn receive(&self) -> io::Result<(Packet, IpAddr)> {
        let mut buffer = [0; 512];
        loop {
            let (length, from) = self.0.recv_from(&mut buffer).await?;
            let received = buffer.get(header_length(from.ip(), &buffer)..length);
            if let Some(packet) = received.and_then(Packet::parse) {
                return Ok((packet, from.ip()));
            }
        }
    }
}

/// Gives a socket room for what all clients send at once. What does not fit into that of a raw socket is refused.
pub(super) fn widen(socket: impl AsFd) -> io::Result<()> {
    const ROOM: usize = 16 << 20;
    Ok(net::sockopt::set_socket_recv_buffer_size_force(socket, ROOM)?)
}

/// Raw sockets of IPv4 deliver the header too.
fn header_length(from: IpAddr, packet: &[u8]) -> usize {
    match from {
        IpAddr::V4(_) => usize::from(packet[0] & 15) * 4,
        IpAddr::V6(_) => 0,
    }
}

/// RFC 3720's checksum, which netfilter verifies.
fn crc32c(bytes: &[u8]) -> u32 {
    const POLYNOMIAL: u32 = 0x82F6_3B78;
    let step = |crc: u32, _| if crc & 1 == 1 { crc >> 1 ^ POLYNOMIAL } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc: u32, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_is_that_of_the_specification() {
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn an_answer_carries_its_text() {
        let init = Packet::init(4000, 80);
        assert_eq!(Packet::parse(&init.bytes()), Some(Packet::init(4000, 80)));
        let answer = Packet::parse(&init.answer("who").bytes()).unwrap();
        assert_eq!((answer.source_port, answer.destination_port), (80, 4000));
        assert_eq!(answer.text().as_deref(), Some("who"));
        assert_eq!(init.text(), None);
    }
}
