//! Parts of keys and values as the kernel's registers hold them: each padded to 4 bytes.

use std::net::IpAddr;

use sys::netlink::nft::{Cmp, Ct, Expr, Family, From, Meta, Reg, Type};

/// The longest key: two IPv6 addresses.
const PART_BYTES_MAX: usize = 32;

/// A short key or value, held in place: there are very many of them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Part {
    bytes: [u8; PART_BYTES_MAX],
    len: u8,
}

impl Part {
    /// Nothing yet.
    pub(crate) fn new() -> Part {
        Part { bytes: [0; PART_BYTES_MAX], len: 0 }
    }

    /// Followed by bytes as they are.
    pub(crate) fn then(mut self, more: &[u8]) -> Part {
        let from = usize::from(self.len);
        self.bytes[from..from + more.len()].copy_from_slice(more);
        self.len += u8::try_from(more.len()).expect("it has fitted");
        self
    }

    /// Followed by an address.
    pub(crate) fn address(self, address: IpAddr) -> Part {
        match address {
            IpAddr::V4(v4) => self.then(&v4.octets()),
            IpAddr::V6(v6) => self.then(&v6.octets()),
        }
    }

    /// Followed by a protocol number.
    pub(crate) fn protocol(self, protocol: u8) -> Part {
        self.then(&[protocol, 0, 0, 0])
    }

    /// Followed by a port.
    pub(crate) fn port(self, port: u16) -> Part {
        let [high, low] = port.to_be_bytes();
        self.then(&[high, low, 0, 0])
    }

    /// Followed by a number in the order of this machine.
    pub(crate) fn number(self, number: u32) -> Part {
        self.then(&number.to_ne_bytes())
    }

    /// All of it.
    pub(crate) fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }
}

impl std::fmt::Debug for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02x?}", self.as_slice())
    }
}

/// What differs between the address families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
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

    /// IPv6, or IPv4.
    pub(crate) fn v6(is_v6: bool) -> Ip {
        if is_v6 { V6 } else { V4 }
    }

    /// Whether it is IPv6.
    pub(crate) fn is_v6(self) -> bool {
        self.family == Family::Ipv6
    }

    /// The network of a prefix and the mask that keeps it.
    pub(crate) fn network(self, address: IpAddr, prefix: u8) -> (Vec<u8>, Vec<u8>) {
        let bits = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
        let bytes = if self.is_v6() { 16 } else { 4 };
        let mask = bits.to_be_bytes()[..bytes].to_vec();
        let network = Part::new().address(address);
        let network = network.as_slice().iter().zip(&mask).map(|(octet, mask)| octet & mask).collect();
        (network, mask)
    }

    /// The address that stands for any.
    pub(crate) fn unspecified(self) -> &'static [u8] {
        if self.is_v6() { &[0; 16] } else { &[0; 4] }
    }

    /// Goes on if the packet is of this family.
    pub(crate) fn is_family(self) -> [Expr<'static>; 2] {
        [
            Expr::Meta { dreg: Reg(0), key: Meta::NfProto },
            Expr::Compare { sreg: Reg(0), op: Cmp::Eq, value: self.nfproto },
        ]
    }

    /// Where the connection's first packet went to.
    pub(crate) fn original_destination(self) -> Ct {
        if self.is_v6() { Ct::OriginalDstIp6 } else { Ct::OriginalDstIp }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_have_the_length_of_their_family() {
        let network = |text: &str, prefix| {
            let address: IpAddr = text.parse().unwrap();
            Ip::of(address).network(address, prefix)
        };
        assert_eq!(network("10.1.2.3", 16), (vec![10, 1, 0, 0], vec![255, 255, 0, 0]));
        assert_eq!(network("10.1.2.3", 0), (vec![0; 4], vec![0; 4]));
        assert_eq!(network("fd00::1", 4).1[..2], [0xf0, 0]);
        assert_eq!(network("fd00::1", 128).1, [255; 16]);
    }
}
