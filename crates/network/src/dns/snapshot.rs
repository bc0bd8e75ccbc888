//! A zone as bytes, for the way from the daemon to the server's process. Both are of one build, so there is one format.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use domain::base::Name;
use domain::base::wire::ParseError;
use domain::dep::octseq::Parser;
use ipnet::IpNet;

use super::zone::{Data, Dname, Zone, shared};

const A: u8 = 1;
const AAAA: u8 = 2;
const SRV: u8 = 3;
const PTR: u8 = 4;
const CNAME: u8 = 5;
const TXT: u8 = 6;

/// All of a zone.
pub(super) fn encode(zone: &Zone) -> Vec<u8> {
    let mut out = zone.domain().as_slice().to_vec();
    put_count(&mut out, zone.networks().len());
    for network in zone.networks() {
        put_ip(&mut out, network.addr());
        out.push(network.prefix_len());
    }
    put_count(&mut out, zone.records().len());
    for (name, records) in zone.records() {
        out.extend_from_slice(name.as_slice());
        put_count(&mut out, records.len());
        records.iter().for_each(|data| put_data(&mut out, data));
    }
    out
}

fn put_count(out: &mut Vec<u8>, count: usize) {
    let count = u32::try_from(count).expect("tables of this size do not fit into memory");
    out.extend_from_slice(&count.to_be_bytes());
}

fn put_ip(out: &mut Vec<u8>, ip: IpAddr) {
    put_data(out, &Data::of(ip));
}

fn put_data(out: &mut Vec<u8>, data: &Data) {
    match data {
        Data::A(v4) => {
            out.push(A);
            out.extend_from_slice(&v4.octets());
        }
        Data::Aaaa(v6) => {
            out.push(AAAA);
            out.extend_from_slice(&v6.octets());
        }
        Data::Srv { port, target } => {
            out.push(SRV);
            out.extend_from_slice(&port.to_be_bytes());
            out.extend_from_slice(target.as_slice());
        }
        Data::Ptr(name) => {
            out.push(PTR);
            out.extend_from_slice(name.as_slice());
        }
        Data::Cname(name) => {
            out.push(CNAME);
            out.extend_from_slice(name.as_slice());
        }
        Data::Txt(text) => {
            out.push(TXT);
            put_count(out, text.len());
            out.extend_from_slice(text);
        }
    }
}

/// The zone that was encoded.
///
/// # Errors
/// The bytes are no zone.
pub(super) fn decode(bytes: &[u8]) -> Result<Zone, ParseError> {
    let mut input = Parser::from_ref(bytes);
    let mut zone = Zone::bare(take_name(&mut input)?);
    for _ in 0..input.parse_u32_be()? {
        let data = take_data(&mut input)?;
        let ip = address(&data).ok_or_else(|| malformed("no address"))?;
        let network = IpNet::new(ip, input.parse_u8()?).map_err(|_| malformed("no network"))?;
        zone.add_network(network);
    }
    for _ in 0..input.parse_u32_be()? {
        let name = take_name(&mut input)?;
        for _ in 0..input.parse_u32_be()? {
            zone.add(name.clone(), take_data(&mut input)?);
        }
    }
    if input.remaining() > 0 { Err(malformed("bytes after the end")) } else { Ok(zone) }
}

fn malformed(why: &'static str) -> ParseError {
    ParseError::form_error(why)
}

fn address(data: &Data) -> Option<IpAddr> {
    match data {
        Data::A(v4) => Some(IpAddr::V4(*v4)),
        Data::Aaaa(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

fn take_name(input: &mut Parser<'_, [u8]>) -> Result<Dname, ParseError> {
    let name: Name<&[u8]> = Name::parse(input)?;
    Ok(shared(Name::from_octets(name.as_slice().to_vec()).map_err(|_| malformed("no name"))?))
}

fn take_data(input: &mut Parser<'_, [u8]>) -> Result<Data, ParseError> {
    Ok(match input.parse_u8()? {
        A => Data::A(Ipv4Addr::from(input.parse_u32_be()?)),
        AAAA => Data::Aaaa(Ipv6Addr::from(input.parse_u128_be()?)),
        SRV => Data::Srv { port: input.parse_u16_be()?, target: take_name(input)? },
        PTR => Data::Ptr(take_name(input)?),
        CNAME => Data::Cname(take_name(input)?),
        TXT => {
            let length = input.parse_u32_be()?;
            let length = usize::try_from(length).map_err(|_| malformed("too long"))?;
            Data::Txt(input.parse_octets(length)?.into())
        }
        _ => return Err(malformed("an unknown kind of record")),
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::dns::zone::tests::example;

    #[test]
    fn a_zone_survives() {
        let zone = example();
        assert_eq!(decode(&encode(&zone)).unwrap(), zone);
    }

    proptest! {
        #[test]
        fn damage_is_no_panic(place in 0usize..4096, value: u8, cut in 0usize..4096) {
            let mut bytes = encode(&example());
            let length = bytes.len();
            bytes[place % length] = value;
            bytes.truncate(cut % (length + 1));
            let _ = decode(&bytes);
        }
    }
}
