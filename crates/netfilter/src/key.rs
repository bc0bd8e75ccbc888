//! Parts of keys and values as the kernel's registers hold them: each padded to 4 bytes.

use std::net::IpAddr;

use sys::netlink::nft::{Expr, Family, From, Meta, Reg, Type};

/// Appends an address.
pub(crate) fn push_address(key: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(v4) => key.extend(v4.octets()),
        IpAddr::V6(v6) => key.extend(v6.octets()),
    }
}

/// Appends a protocol number.
pub(crate) fn push_protocol(key: &mut Vec<u8>, protocol: u8) {
    key.extend([protocol, 0, 0, 0]);
}

/// Appends a port.
pub(crate) fn push_port(key: &mut Vec<u8>, port: u16) {
    let [high, low] = port.to_be_bytes();
    key.extend([high, low, 0, 0]);
}

/// What differs between the address families.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ip {
    /// For translation.
    pub(crate) family: Family,
    /// Suffix of names.
    pub(crate) suffix: char,
    /// Type of an address.
    pub(crate) address: Type,
    /// Bytes of an address.
    pub(crate) bytes: u32,
    /// Where the source stands in the header.
    pub(crate) source_at: u32,
    /// Where the destination stands in the header.
    pub(crate) destination_at: u32,
    /// `NFPROTO_*`, compared with `meta nfproto`.
    pub(crate) nfproto: &'static [u8],
    /// First octets of the loopback addresses and the mask that keeps them.
    pub(crate) loopback: (&'static [u8], &'static [u8]),
}

/// IPv4.
pub(crate) const V4: Ip = Ip {
    family: Family::Ipv4,
    suffix: '4',
    address: Type::Ipv4Addr,
    bytes: 4,
    source_at: 12,
    destination_at: 16,
    nfproto: &[2],
    loopback: (&[127, 0, 0, 0], &[255, 0, 0, 0]),
};

/// IPv6.
pub(crate) const V6: Ip = Ip {
    family: Family::Ipv6,
    suffix: '6',
    address: Type::Ipv6Addr,
    bytes: 16,
    source_at: 8,
    destination_at: 24,
    nfproto: &[10],
    loopback: (&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1], &[255; 16]),
};

impl Ip {
    /// The family of an address.
    pub(crate) fn of(address: IpAddr) -> Ip {
        if address.is_ipv4() { V4 } else { V6 }
    }

    /// Registers which an address takes.
    pub(crate) fn words(self) -> u8 {
        if self.bytes == 4 { 1 } else { 4 }
    }

    /// Loads the source address.
    pub(crate) fn source(self, dreg: Reg) -> Expr<'static> {
        Expr::Payload { dreg, from: From::Network, offset: self.source_at, len: self.bytes }
    }

    /// Loads the destination address.
    pub(crate) fn destination(self, dreg: Reg) -> Expr<'static> {
        Expr::Payload { dreg, from: From::Network, offset: self.destination_at, len: self.bytes }
    }
}

/// Loads the transport protocol.
pub(crate) fn protocol(dreg: Reg) -> Expr<'static> {
    Expr::Meta { dreg, key: Meta::L4Proto }
}

/// Loads the destination port.
pub(crate) fn destination_port(dreg: Reg) -> Expr<'static> {
    Expr::Payload { dreg, from: From::Transport, offset: 2, len: 2 }
}
