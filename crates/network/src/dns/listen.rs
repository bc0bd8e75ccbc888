//! The sockets on which queries come.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;

use sys::rustix::net::sockopt::{set_ip_freebind, set_socket_reuseaddr};
use sys::rustix::net::{AddressFamily, SocketFlags, SocketType, bind, getsockname, listen, socket_with};

use super::DnsError;
use super::link::Sockets;

const BACKLOG: i32 = 64;

/// One socket of each transport for each address, in order: those that an earlier server has, and new ones.
pub(super) fn all(addresses: &[SocketAddr], mut earlier: Sockets) -> Result<Sockets, DnsError> {
    let mut sockets = Sockets::default();
    for address in addresses {
        let (udp, tcp) = (take(&mut earlier.udp, *address), take(&mut earlier.tcp, *address));
        let refused = |transport| move |source| DnsError::Listen { address: *address, transport, source };
        sockets.udp.push(udp.map_or_else(|| bind_udp(*address), Ok).map_err(refused("udp"))?);
        sockets.tcp.push(tcp.map_or_else(|| bind_tcp(*address), Ok).map_err(refused("tcp"))?);
    }
    Ok(sockets)
}

fn take(sockets: &mut Vec<OwnedFd>, address: SocketAddr) -> Option<OwnedFd> {
    let bound = |socket: &OwnedFd| getsockname(socket).ok().and_then(|bound| SocketAddr::try_from(bound).ok());
    let place = sockets.iter().position(|socket| bound(socket) == Some(address))?;
    Some(sockets.swap_remove(place))
}

fn bind_udp(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = open(address, SocketType::DGRAM)?;
    bind(&socket, &address)?;
    Ok(socket)
}

fn bind_tcp(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = open(address, SocketType::STREAM)?;
    // Closed connections of an earlier server keep its port otherwise. (For datagrams it would let two servers share one.)
    set_socket_reuseaddr(&socket, true)?;
    bind(&socket, &address)?;
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

fn open(address: SocketAddr, kind: SocketType) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = socket_with(family, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)?;
    // The address may come, and go, later than the server.
    set_ip_freebind(&socket, true)?;
    Ok(socket)
}
