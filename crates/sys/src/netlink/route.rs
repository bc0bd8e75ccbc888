//! Links, addresses, routes and neighbours (rtnetlink).

use std::net::IpAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::{ACK, Attributes, CREATE, DUMP, EXCL, Error, Message, REPLACE, Result, Socket, Writer};

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_GETLINK: u16 = 18;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
pub(super) const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;

const IFINFO_BYTES: usize = 16;
const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_OPERSTATE: u16 = 16;
const IFLA_LINKINFO: u16 = 18;
const IFLA_STATS64: u16 = 23;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INFO_SLAVE_KIND: u16 = 4;
const IFLA_INFO_SLAVE_DATA: u16 = 5;
const VETH_INFO_PEER: u16 = 1;
const IFLA_BRPORT_STATE: u16 = 1;
const IFLA_BRPORT_MODE: u16 = 4;
const IFLA_BRPORT_ISOLATED: u16 = 33;

pub(super) const IFADDR_BYTES: usize = 8;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 2;

const ROUTE_BYTES: usize = 12;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RT_TABLE_MAIN: u8 = 254;
/// `RTPROT_STATIC`: installed by the administrator, left alone by routing daemons.
const RTPROT_STATIC: u8 = 4;
const RTN_UNICAST: u8 = 1;
const RT_SCOPE_LINK: u8 = 253;

const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_PERMANENT: u16 = 0x80;

const IFF_UP: u32 = 1;
/// linux/if.h.
const IF_OPER_UP: u8 = 6;
/// linux/if_bridge.h.
const BR_STATE_FORWARDING: u8 = 3;
/// The group that hears of links.
const RTMGRP_LINK: u32 = 1;

/// A hardware address.
pub type Mac = [u8; 6];

/// A link of the namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Name.
    pub name: String,
    /// Driver: `veth`, `bridge`; empty for hardware and loopback.
    pub kind: String,
    /// Index of the bridge or bond it belongs to, 0 for none.
    pub master: u32,
    /// MTU.
    pub mtu: u32,
    /// Hardware address.
    pub mac: Option<Mac>,
    /// Whether it is administratively up.
    pub up: bool,
    /// Whether the kernel has taken notice that it has a carrier (`IF_OPER_UP`, RFC 2863); nothing leaves by it before.
    pub operational: bool,
    /// Whether it is a port of a bridge that takes what comes from it (`BR_STATE_FORWARDING`).
    pub forwarding: bool,
    /// Whether it is loopback.
    pub loopback: bool,
    /// Counters as this side sees them.
    pub stats: LinkStats,
}

/// `rtnl_link_stats64`, the first eight.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the kernel's own names")]
pub struct LinkStats {
    pub rx_packets: u64,
    pub tx_packets: u64,
    pub rx_bytes: u64,
    pub tx_bytes: u64,
    pub rx_errors: u64,
    pub tx_errors: u64,
    pub rx_dropped: u64,
    pub tx_dropped: u64,
}

/// A veth pair whose peer is born in another namespace.
#[derive(Debug, Clone, Copy)]
pub struct VethPair<'a> {
    /// Name of the end in this namespace.
    pub name: &'a str,
    /// Bridge of the end in this namespace, 0 for none.
    pub master: u32,
    /// MTU of both ends.
    pub mtu: u32,
    /// Name of the other end.
    pub peer: &'a str,
    /// Hardware address of the other end; `None`: random.
    pub peer_mac: Option<Mac>,
    /// Namespace of the other end.
    pub peer_netns: BorrowedFd<'a>,
}

/// A route.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Route {
    /// Destination and prefix length; `None`: default.
    pub destination: Option<(IpAddr, u8)>,
    /// Next hop; `None`: on link.
    pub gateway: Option<IpAddr>,
    /// Outgoing interface.
    pub interface: u32,
    /// Source address for connections of this host.
    pub source: Option<IpAddr>,
}

pub(super) fn family_of(address: IpAddr) -> u8 {
    u8::try_from(if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }).unwrap_or(0)
}

pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

/// struct ifinfomsg.
fn ifinfo(index: u32, flags: u32) -> [u8; IFINFO_BYTES] {
    let mut header = [0; IFINFO_BYTES];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&flags.to_ne_bytes());
    header
}

/// struct ndmsg of a permanent neighbour.
fn ndmsg(index: u32, address: IpAddr) -> [u8; 12] {
    let mut header = [0; 12];
    header[0] = family_of(address);
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    header
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

impl Socket {
    /// All links.
    ///
    /// # Errors
    /// See [`Socket::collect`].
    pub fn links(&mut self) -> Result<Vec<Link>> {
        self.collect(&all(RTM_GETLINK, &ifinfo(0, 0)), |message| Some(parse_link(message)))
    }

    /// The link with this name, if there is one.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn link(&mut self, name: &str) -> Result<Option<Link>> {
        let mut request = Writer::new();
        request.message(RTM_GETLINK, ACK, &ifinfo(0, 0), |w| w.str(IFLA_IFNAME, name));
        let mut found = None;
        match self.list(&request, |message| found = Some(parse_link(message))) {
            Err(Error { errno: rustix::io::Errno::NODEV, .. }) => Ok(None),
            other => other.map(|()| found),
        }
    }

    /// Whether a link has a carrier. The kernel takes notice of a change of it by itself, a moment later, and until then a
    /// bridge drops what comes from a port whose other end has just come up; who asks has it take notice first, from Linux 6.8
    /// on (`linkwatch_sync_dev` in net/core/link_watch.c).
    ///
    /// # Errors
    /// `ENODEV`.
    pub fn has_carrier(&self, name: &str) -> Result<bool> {
        super::message::ask_for_link(self.fd.as_fd(), name)
    }

    /// Waits until a link is as it is wanted to be, and says whether it came to that in time. Of links of the calling thread's
    /// namespace.
    ///
    /// # Errors
    /// `ENODEV`: there is no such link. No descriptor is left.
    pub fn wait_for_link(name: &str, within: Duration, is_wanted: impl Fn(&Link) -> bool) -> Result<bool> {
        let end = Instant::now() + within;
        let (mut asking, mut news) = (Self::route()?, Self::open(None, RTMGRP_LINK)?);
        loop {
            let link = asking.link(name)?.ok_or(Errno::NODEV)?;
            let left = end.saturating_duration_since(Instant::now());
            if is_wanted(&link) || left.is_zero() {
                return Ok(is_wanted(&link));
            }
            let timeout = Timespec::try_from(left).ok();
            match poll(&mut [PollFd::new(&news.fd, PollFlags::IN)], timeout.as_ref()) {
                Ok(_) | Err(Errno::INTR) => news.drain(),
                Err(other) => return Err(other.into()),
            }
        }
    }

    /// Addresses of the links: index, address, prefix length.
    ///
    /// # Errors
    /// See [`Socket::collect`].
    pub fn addresses(&mut self) -> Result<Vec<(u32, IpAddr, u8)>> {
        self.collect(&all(RTM_GETADDR, &[0; IFADDR_BYTES]), parse_address)
    }

    /// Routes of the main table.
    ///
    /// # Errors
    /// See [`Socket::collect`].
    pub fn routes(&mut self) -> Result<Vec<Route>> {
        self.collect(&all(RTM_GETROUTE, &[0; ROUTE_BYTES]), parse_route)
    }
}

/// A request for all objects of a kind.
pub(super) fn all(kind: u16, header: &[u8]) -> Writer {
    let mut request = Writer::new();
    request.message(kind, DUMP, header, |_| ());
    request
}

pub(super) fn parse_link(message: &Message<'_>) -> Link {
    let attributes = message.attributes(IFINFO_BYTES);
    let text = |kind| attributes.get(kind).map(|a| a.text()).unwrap_or_default();
    let number = |kind| attributes.get(kind).map_or(0, |a| a.u32());
    let flags = word(message.payload, 8);
    let port = attributes.get(IFLA_LINKINFO).and_then(|info| info.nested().get(IFLA_INFO_SLAVE_DATA));
    let port_state = port.and_then(|port| port.nested().get(IFLA_BRPORT_STATE));
    Link {
        index: word(message.payload, 4),
        name: text(IFLA_IFNAME),
        kind: attributes
            .get(IFLA_LINKINFO)
            .and_then(|info| info.nested().get(IFLA_INFO_KIND))
            .map(|a| a.text())
            .unwrap_or_default(),
        master: number(IFLA_MASTER),
        mtu: number(IFLA_MTU),
        mac: attributes.get(IFLA_ADDRESS).and_then(|a| a.value.try_into().ok()),
        up: flags & IFF_UP != 0,
        operational: attributes.get(IFLA_OPERSTATE).is_some_and(|a| a.value == [IF_OPER_UP]),
        forwarding: port_state.is_some_and(|a| a.value == [BR_STATE_FORWARDING]),
        loopback: flags & u32::try_from(libc::IFF_LOOPBACK).unwrap_or(8) != 0,
        stats: parse_stats(&attributes),
    }
}

fn parse_stats(attributes: &Attributes<'_>) -> LinkStats {
    let values = attributes.get(IFLA_STATS64).map_or(&[][..], |a| a.value);
    let nth = |n: usize| values.get(n * 8..n * 8 + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes);
    LinkStats {
        rx_packets: nth(0),
        tx_packets: nth(1),
        rx_bytes: nth(2),
        tx_bytes: nth(3),
        rx_errors: nth(4),
        tx_errors: nth(5),
        rx_dropped: nth(6),
        tx_dropped: nth(7),
    }
}

pub(super) fn parse_address(message: &Message<'_>) -> Option<(u32, IpAddr, u8)> {
    let attributes = message.attributes(IFADDR_BYTES);
    // IFA_LOCAL is the own address on point-to-point links; IPv6 has only IFA_ADDRESS.
    let address = attributes.get(IFA_LOCAL).or_else(|| attributes.get(IFA_ADDRESS))?.address()?;
    Some((word(message.payload, 4), address, *message.payload.get(1)?))
}

pub(super) fn parse_route(message: &Message<'_>) -> Option<Route> {
    let header: &[u8; ROUTE_BYTES] = message.payload.first_chunk()?;
    if header[4] != RT_TABLE_MAIN || header[7] != RTN_UNICAST {
        return None;
    }
    let attributes = message.attributes(ROUTE_BYTES);
    let address = |kind| attributes.get(kind).and_then(|a| a.address());
    Some(Route {
        destination: address(RTA_DST).map(|destination| (destination, header[1])),
        gateway: address(RTA_GATEWAY),
        interface: attributes.get(RTA_OIF).map_or(0, |a| a.u32()),
        source: address(RTA_PREFSRC),
    })
}

/// Requests that change links, addresses and routes; collect several in one [`Writer`] and hand it to [`Socket::request`].
impl Writer {
    /// Creates a bridge that is up. Fails if the name is taken.
    pub fn create_bridge(&mut self, name: &str, mac: Mac, mtu: u32) {
        self.message(RTM_NEWLINK, ACK | CREATE | EXCL, &ifinfo(0, IFF_UP), |w| {
            w.str(IFLA_IFNAME, name);
            // A fixed address: else the bridge takes the lowest of its ports and changes it as pods come and go.
            w.bytes_attr(IFLA_ADDRESS, &mac);
            w.nest(IFLA_LINKINFO, |w| w.str(IFLA_INFO_KIND, "bridge"));
        });
        // Apart, for it only stays if it is set on a bridge that exists: else the bridge takes that of its ports, and 1500
        // when it has none.
        self.message(RTM_NEWLINK, ACK, &ifinfo(0, 0), |w| {
            w.str(IFLA_IFNAME, name);
            w.u32(IFLA_MTU, mtu);
        });
    }

    /// Creates a dummy link that is up.
    pub fn create_dummy(&mut self, name: &str) {
        self.message(RTM_NEWLINK, ACK | CREATE | EXCL, &ifinfo(0, IFF_UP), |w| {
            w.str(IFLA_IFNAME, name);
            w.nest(IFLA_LINKINFO, |w| w.str(IFLA_INFO_KIND, "dummy"));
        });
    }

    /// Creates a veth pair, this end up.
    pub fn create_veth(&mut self, pair: &VethPair<'_>) {
        self.message(RTM_NEWLINK, ACK | CREATE | EXCL, &ifinfo(0, IFF_UP), |w| {
            w.str(IFLA_IFNAME, pair.name);
            w.u32(IFLA_MTU, pair.mtu);
            if pair.master != 0 {
                w.u32(IFLA_MASTER, pair.master);
            }
            w.nest(IFLA_LINKINFO, |w| {
                w.str(IFLA_INFO_KIND, "veth");
                w.nest(IFLA_INFO_DATA, |w| w.nest(VETH_INFO_PEER, |w| veth_peer(w, pair)));
            });
        });
    }

    /// Sets whether a bridge port sends frames back where they came from and whether it is kept apart from other isolated
    /// ports.
    pub fn set_bridge_port(&mut self, name: &str, hairpin: bool, isolated: bool) {
        self.message(RTM_NEWLINK, ACK, &ifinfo(0, 0), |w| {
            w.str(IFLA_IFNAME, name);
            w.nest(IFLA_LINKINFO, |w| {
                w.str(IFLA_INFO_SLAVE_KIND, "bridge");
                w.nest(IFLA_INFO_SLAVE_DATA, |w| {
                    w.u8(IFLA_BRPORT_MODE, hairpin.into());
                    w.u8(IFLA_BRPORT_ISOLATED, isolated.into());
                });
            });
        });
    }

    /// Sets a link up.
    pub fn set_up(&mut self, index: u32) {
        self.message(RTM_NEWLINK, ACK, &ifinfo(index, IFF_UP), |_| ());
    }

    /// Deletes a link; of a veth pair both ends go.
    pub fn delete_link(&mut self, index: u32) {
        self.message(RTM_DELLINK, ACK, &ifinfo(index, 0), |_| ());
    }

    /// Gives a link an address, or leaves it if the link has it. No duplicate address detection.
    pub fn add_address(&mut self, index: u32, address: IpAddr, prefix: u8) {
        let mut header = [0; IFADDR_BYTES];
        header[0] = family_of(address);
        header[1] = prefix;
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        self.message(RTM_NEWADDR, ACK | CREATE | REPLACE, &header, |w| {
            w.bytes_attr(IFA_LOCAL, &octets(address));
            w.bytes_attr(IFA_ADDRESS, &octets(address));
            w.u32(IFA_FLAGS, IFA_F_NODAD);
        });
    }

    /// Takes an address from a link. One that it does not have is refused with `EADDRNOTAVAIL`.
    pub fn delete_address(&mut self, index: u32, address: IpAddr, prefix: u8) {
        let mut header = [0; IFADDR_BYTES];
        header[0] = family_of(address);
        header[1] = prefix;
        header[4..8].copy_from_slice(&index.to_ne_bytes());
        self.message(RTM_DELADDR, ACK, &header, |w| w.bytes_attr(IFA_LOCAL, &octets(address)));
    }

    /// Adds a route or replaces the one with its destination. `family` is that of the default route, when there is no
    /// address to tell it.
    pub fn add_route(&mut self, route: &Route) {
        let family =
            route.destination.map(|(address, _)| address).or(route.gateway).or(route.source).map_or(0, family_of);
        let mut header = [0; ROUTE_BYTES];
        header[0] = family;
        header[1] = route.destination.map_or(0, |(_, prefix)| prefix);
        header[4] = RT_TABLE_MAIN;
        header[5] = RTPROT_STATIC;
        header[6] = if route.gateway.is_none() { RT_SCOPE_LINK } else { 0 };
        header[7] = RTN_UNICAST;
        self.message(RTM_NEWROUTE, ACK | CREATE | REPLACE, &header, |w| {
            if let Some((address, _)) = route.destination {
                w.bytes_attr(RTA_DST, &octets(address));
            }
            if let Some(gateway) = route.gateway {
                w.bytes_attr(RTA_GATEWAY, &octets(gateway));
            }
            if let Some(source) = route.source {
                w.bytes_attr(RTA_PREFSRC, &octets(source));
            }
            w.u32(RTA_OIF, route.interface);
        });
    }

    /// Adds a neighbour that never expires.
    pub fn add_neighbour(&mut self, index: u32, address: IpAddr, mac: Mac) {
        let header = ndmsg(index, address);
        self.message(RTM_NEWNEIGH, ACK | CREATE | REPLACE, &header, |w| {
            w.bytes_attr(NDA_DST, &octets(address));
            w.bytes_attr(NDA_LLADDR, &mac);
        });
    }

    /// Deletes a neighbour. One that does not exist is refused with `ENOENT`.
    pub fn delete_neighbour(&mut self, index: u32, address: IpAddr) {
        let header = ndmsg(index, address);
        self.message(RTM_DELNEIGH, ACK, &header, |w| w.bytes_attr(NDA_DST, &octets(address)));
    }
}

fn veth_peer(w: &mut Writer, pair: &VethPair<'_>) {
    w.raw(&ifinfo(0, 0));
    w.str(IFLA_IFNAME, pair.peer);
    w.u32(IFLA_MTU, pair.mtu);
    if let Some(mac) = pair.peer_mac {
        w.bytes_attr(IFLA_ADDRESS, &mac);
    }
    w.u32(IFLA_NET_NS_FD, pair.peer_netns.as_raw_fd().cast_unsigned());
}
