//! Addresses and ranges as objects spell them.
//!
//! Old objects have numbers with leading zeros, which the API server still admits and which upstream reads as decimal
//! (`ParseIPSloppy`, `ParseCIDRSloppy` of k8s.io/utils/net): `010.0.0.1` is 10.0.0.1.

use std::borrow::Cow;
use std::net::IpAddr;

use ipnet::IpNet;

/// An address; one of IPv4 that is mapped into IPv6 is one of IPv4.
pub(crate) fn parse(text: &str) -> Option<IpAddr> {
    plain(text)?.parse::<IpAddr>().ok().map(|address| address.to_canonical())
}

/// A range, as it is written: bits beyond its prefix are kept.
pub(crate) fn parse_range(text: &str) -> Option<IpNet> {
    let (address, bits) = text.split_once('/')?;
    let bits = bits.bytes().all(|byte| byte.is_ascii_digit()).then(|| bits.parse().ok()).flatten()?;
    IpNet::new(plain(address)?.parse().ok()?, bits).ok()
}

/// Whether a Service can have it: an address of one host that others can reach. The rest would be this host itself, many
/// hosts at once, or refused by the kernel.
pub(crate) fn is_servable(address: IpAddr) -> bool {
    let special = match address {
        IpAddr::V4(v4) => v4.is_broadcast() || v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    !(special || address.is_unspecified() || address.is_loopback() || address.is_multicast())
}

/// Numbers of IPv4 without leading zeros.
fn plain(text: &str) -> Option<Cow<'_, str>> {
    if !text.contains('.') {
        return Some(text.into());
    }
    let (head, v4) = text.rsplit_once(':').map_or(("", text), |(head, v4)| (&text[..=head.len()], v4));
    let numbers: Vec<&str> = v4.split('.').map(without_zeros).collect::<Option<_>>()?;
    Some(format!("{head}{}", numbers.join(".")).into())
}

fn without_zeros(number: &str) -> Option<&str> {
    let last = number.len().checked_sub(1)?;
    let zeros = number.bytes().take(last).take_while(|byte| *byte == b'0').count();
    number.get(zeros..)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leading_zeros_are_decimal() {
        for (text, expect) in [
            ("010.000.0.01", Some("10.0.0.1")),
            ("10.0.0.1", Some("10.0.0.1")),
            ("::ffff:010.0.0.1", Some("10.0.0.1")),
            ("64:ff9b::192.0.2.033", Some("64:ff9b::c000:221")),
            ("fd00::10", Some("fd00::10")),
            ("0256.0.0.1", None),
            ("10..0.1", None),
            ("10.0.0.1é", None),
            ("10.0.0.+1", None),
            ("0x0a.0.0.1", None),
            ("", None),
        ] {
            assert_eq!(parse(text), expect.map(|expect| expect.parse().unwrap()), "{text}");
        }
        for (text, expect) in [
            ("010.0.0.0/08", Some("10.0.0.0/8")),
            ("fd00::/64", Some("fd00::/64")),
            ("10.0.0.0/33", None),
            ("10.0.0.0/+8", None),
            ("10.0.0.0", None),
        ] {
            assert_eq!(parse_range(text), expect.map(|expect| expect.parse().unwrap()), "{text}");
        }
    }

    #[test]
    fn a_service_has_an_address_of_one_host() {
        for text in ["10.0.0.1", "240.0.0.1", "192.0.2.255", "fd00::1", "2001:db8::1"] {
            assert!(is_servable(parse(text).unwrap()), "{text}");
        }
        let special =
            ["0.0.0.0", "127.9.0.1", "224.0.0.1", "255.255.255.255", "169.254.1.1", "::", "::1", "ff02::1", "fe80::1"];
        for text in special.into_iter().chain(["::ffff:127.0.0.1"]) {
            assert!(!is_servable(parse(text).unwrap()), "{text}");
        }
    }
}
