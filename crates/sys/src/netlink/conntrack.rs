//! Connection tracking: list flows, delete one.

use std::net::IpAddr;

use rustix::io::Errno;

use super::{ACK, Attributes, DUMP, Error, Message, Result, Socket, Writer};

const SUBSYSTEM: u16 = 1 << 8;
const GET: u16 = SUBSYSTEM | 1;
const DELETE: u16 = SUBSYSTEM | 2;
const HEADER_BYTES: usize = 4;

const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
/// `IPS_DST_NAT`: the destination was translated.
const DST_NAT: u32 = 1 << 5;

/// One direction of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuple {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Source port, 0 for protocols without.
    pub source_port: u16,
    /// Destination port, 0 for protocols without.
    pub destination_port: u16,
}

/// A tracked connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Flow {
    /// As the first packet came in.
    pub original: Tuple,
    /// As answers come in: its source is where the connection really goes.
    pub reply: Tuple,
    /// Whether the destination was translated.
    pub destination_translated: bool,
    key: Vec<u8>,
    id: Option<u32>,
    zone: Option<u16>,
}

impl Socket {
    /// All flows of the address family (of `libc::AF_INET` or `AF_INET6`) that `wanted` picks.
    ///
    /// # Errors
    /// The kernel refused, or has no connection tracking over netlink.
    pub fn flows(&mut self, ipv6: bool, mut wanted: impl FnMut(&Flow) -> bool) -> Result<Vec<Flow>> {
        let mut request = Writer::new();
        request.message(GET, DUMP, &header(ipv6), |_| ());
        self.collect(&request, |message| parse_flow(message).filter(|flow| wanted(flow)))
    }

    /// Deletes a flow; one that is gone counts as deleted.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn delete_flow(&mut self, flow: &Flow) -> Result<()> {
        let mut request = Writer::new();
        request.message(DELETE, ACK, &header(flow.original.source.is_ipv6()), |w| {
            w.nest(CTA_TUPLE_ORIG, |w| w.raw(&flow.key));
            if let Some(zone) = flow.zone {
                w.be16(CTA_ZONE, zone);
            }
            // The same addresses may have been used again since the listing: the number tells the flows apart.
            if let Some(id) = flow.id {
                w.be32(CTA_ID, id);
            }
        });
        match self.request(&request) {
            Err(Error { errno: Errno::NOENT, .. }) => Ok(()),
            other => other,
        }
    }
}

fn header(ipv6: bool) -> [u8; HEADER_BYTES] {
    let family = if ipv6 { libc::AF_INET6 } else { libc::AF_INET };
    [u8::try_from(family).unwrap_or(0), 0, 0, 0]
}

pub(super) fn parse_flow(message: &Message<'_>) -> Option<Flow> {
    let attributes = message.attributes(HEADER_BYTES);
    let original = attributes.get(CTA_TUPLE_ORIG)?.nested();
    Some(Flow {
        key: original.raw().to_vec(),
        original: parse_tuple(&original)?,
        reply: parse_tuple(&attributes.get(CTA_TUPLE_REPLY)?.nested())?,
        destination_translated: attributes.get(CTA_STATUS).is_some_and(|a| a.be32() & DST_NAT != 0),
        id: attributes.get(CTA_ID).map(|a| a.be32()),
        zone: attributes.get(CTA_ZONE).map(|a| a.be16()),
    })
}

fn parse_tuple(tuple: &Attributes<'_>) -> Option<Tuple> {
    let ip = tuple.get(CTA_TUPLE_IP)?.nested();
    // CTA_IP_V4_SRC, V4_DST, V6_SRC, V6_DST are 1 to 4.
    let address = |v4, v6| ip.get(v4).or_else(|| ip.get(v6))?.address();
    let proto = tuple.get(CTA_TUPLE_PROTO)?.nested();
    Some(Tuple {
        source: address(1, 3)?,
        destination: address(2, 4)?,
        protocol: *proto.get(1)?.value.first()?,
        source_port: proto.get(2).map_or(0, |a| a.be16()),
        destination_port: proto.get(3).map_or(0, |a| a.be16()),
    })
}
