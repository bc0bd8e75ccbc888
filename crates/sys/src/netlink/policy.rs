//! Rules of policy routing: what goes to one port of one address stays on this host, whoever has the address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::route::{family_of, octets};
use super::{ACK, CREATE, DUMP, EXCL, Message, REPLACE, Result, Socket, Writer};

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_NEWRULE: u16 = 32;
const RTM_DELRULE: u16 = 33;
const RTM_GETRULE: u16 = 34;

/// `struct fib_rule_hdr`
const RULE_BYTES: usize = 12;
const FRA_DST: u16 = 1;
const FRA_PRIORITY: u16 = 6;
const FRA_TABLE: u16 = 15;
const FRA_IP_PROTO: u16 = 22;
const FRA_DPORT_RANGE: u16 = 24;
const FR_ACT_TO_TBL: u8 = 1;

const ROUTE_BYTES: usize = 12;
const RTA_OIF: u16 = 4;
const RTA_PREFSRC: u16 = 7;
const RTA_TABLE: u16 = 15;
const RTPROT_STATIC: u8 = 4;
const RT_SCOPE_HOST: u8 = 254;
const RTN_LOCAL: u8 = 2;

/// What goes to one port of an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct PortRule {
    /// The address.
    pub address: IpAddr,
    /// The protocol's number.
    pub protocol: u8,
    /// The port.
    pub port: u16,
}

impl Socket {
    /// Rules that lead to this table, of both families.
    ///
    /// # Errors
    /// See [`Socket::collect`]. A kernel without policy routing has none.
    pub fn port_rules(&mut self, table: u32) -> Result<Vec<PortRule>> {
        let mut request = Writer::new();
        request.message(RTM_GETRULE, DUMP, &[0; RULE_BYTES], |_| ());
        match self.collect(&request, |message| parse_rule(message, table)) {
            Err(error) if error.errno == rustix::io::Errno::OPNOTSUPP => Ok(Vec::new()),
            listed => listed,
        }
    }
}

fn parse_rule(message: &Message<'_>, wanted: u32) -> Option<PortRule> {
    let attributes = message.attributes(RULE_BYTES);
    let table = attributes.get(FRA_TABLE)?.u32();
    let address = attributes.get(FRA_DST)?.address()?;
    let protocol = *attributes.get(FRA_IP_PROTO)?.value.first()?;
    let port = attributes.get(FRA_DPORT_RANGE)?.value.first_chunk().map(|bytes| u16::from_ne_bytes(*bytes))?;
    (table == wanted).then_some(PortRule { address, protocol, port })
}

/// Requests that change rules, and the table that they lead to.
impl Writer {
    /// Lets a table lead everything to this host itself, by the interface `loopback`. Connections of this host that go
    /// there come from a loopback address: the one they go to would lead the answers away.
    pub fn add_local_table(&mut self, table: u32, ipv6: bool, loopback: u32) {
        self.local_route(RTM_NEWROUTE, ACK | CREATE | REPLACE, table, ipv6, loopback);
    }

    /// Empties such a table.
    pub fn delete_local_table(&mut self, table: u32, ipv6: bool, loopback: u32) {
        self.local_route(RTM_DELROUTE, ACK, table, ipv6, loopback);
    }

    fn local_route(&mut self, kind: u16, flags: u16, table: u32, ipv6: bool, loopback: u32) {
        let source: IpAddr = if ipv6 { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
        let mut header = [0; ROUTE_BYTES];
        (header[0], header[5], header[6], header[7]) = (family_of(source), RTPROT_STATIC, RT_SCOPE_HOST, RTN_LOCAL);
        self.message(kind, flags, &header, |w| {
            w.u32(RTA_TABLE, table);
            w.u32(RTA_OIF, loopback);
            w.bytes_attr(RTA_PREFSRC, &octets(source));
        });
    }

    /// Has a table decide where packets of a rule go. One that is there already is refused with `EEXIST`.
    pub fn add_port_rule(&mut self, rule: &PortRule, table: u32, priority: u32) {
        self.port_rule(RTM_NEWRULE, ACK | CREATE | EXCL, rule, table, priority);
    }

    /// Deletes such a rule. One that does not exist is refused with `ENOENT`.
    pub fn delete_port_rule(&mut self, rule: &PortRule, table: u32, priority: u32) {
        self.port_rule(RTM_DELRULE, ACK, rule, table, priority);
    }

    fn port_rule(&mut self, kind: u16, flags: u16, rule: &PortRule, table: u32, priority: u32) {
        let address = octets(rule.address);
        let mut header = [0; RULE_BYTES];
        (header[0], header[7]) = (family_of(rule.address), FR_ACT_TO_TBL);
        header[1] = if rule.address.is_ipv4() { 32 } else { 128 };
        let mut range = [0; 4];
        range[..2].copy_from_slice(&rule.port.to_ne_bytes());
        range[2..].copy_from_slice(&rule.port.to_ne_bytes());
        self.message(kind, flags, &header, |w| {
            w.bytes_attr(FRA_DST, &address);
            w.u32(FRA_PRIORITY, priority);
            w.u32(FRA_TABLE, table);
            w.u8(FRA_IP_PROTO, rule.protocol);
            w.bytes_attr(FRA_DPORT_RANGE, &range);
        });
    }
}
