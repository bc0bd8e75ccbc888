//! Ports of addresses that are not this host's and must not become so: a Service's `externalIPs` are the word of whoever
//! may write Services, and a host may be there that serves other things (CVE-2020-8554).
//!
//! ```text
//! to 198.51.100.4, TCP, port 80 ─ rule ─► table: everything is local ─► a socket that is bound to 198.51.100.4:80
//! to 198.51.100.4, anything else ─► the host that is there
//! ```

use std::collections::BTreeSet;

use sys::netlink::policy::PortRule;
use sys::netlink::{self, Socket, Writer};
use sys::rustix::io::Errno;

/// The table of routes, and what is known as ours by it.
const TABLE: u32 = 10_254;
/// Before rules of others but that of the host's own addresses: a Service comes before routes.
const PRIORITY: u32 = 190;

/// Has these ports led here and no others but those that `is_held` wants to keep.
///
/// # Errors
/// The first refusal, after all have been tried.
pub(super) fn settle(
    route: &mut Socket,
    wanted: &BTreeSet<PortRule>,
    is_held: impl Fn(&PortRule) -> bool,
) -> netlink::Result<()> {
    let there: BTreeSet<PortRule> = route.port_rules(TABLE)?.into_iter().collect();
    let come: Vec<&PortRule> = wanted.difference(&there).collect();
    if !come.is_empty() {
        make_tables(route)?;
    }
    let mut refused = None;
    for rule in come {
        let mut request = Writer::new();
        request.add_port_rule(rule, TABLE, PRIORITY);
        refused = refused.or(route.request(&request).err().filter(|error| error.errno != Errno::EXIST));
    }
    for rule in there.difference(wanted).filter(|rule| !is_held(rule)) {
        refused = refused.or(delete(route, rule).err());
    }
    refused.map_or(Ok(()), Err)
}

/// Removes everything.
pub(super) fn remove(route: &mut Socket) -> netlink::Result<()> {
    let there = route.port_rules(TABLE)?;
    if there.is_empty() {
        return Ok(());
    }
    there.iter().try_for_each(|rule| delete(route, rule))?;
    let Some(loopback) = route.link("lo")? else { return Ok(()) };
    for ipv6 in [false, true] {
        let mut request = Writer::new();
        request.delete_local_table(TABLE, ipv6, loopback.index);
        // One that was never made.
        route.request(&request).or_else(|error| if error.errno == Errno::SRCH { Ok(()) } else { Err(error) })?;
    }
    Ok(())
}

fn delete(route: &mut Socket, rule: &PortRule) -> netlink::Result<()> {
    let mut request = Writer::new();
    request.delete_port_rule(rule, TABLE, PRIORITY);
    route.request(&request).or_else(|error| if error.errno == Errno::NOENT { Ok(()) } else { Err(error) })
}

fn make_tables(route: &mut Socket) -> netlink::Result<()> {
    let Some(loopback) = route.link("lo")? else { return Ok(()) };
    for ipv6 in [false, true] {
        let mut request = Writer::new();
        request.add_local_table(TABLE, ipv6, loopback.index);
        match route.request(&request) {
            // A kernel without IPv6, or with it switched off: no rule of it is wanted then.
            Err(_) if ipv6 => {}
            made => made?,
        }
    }
    Ok(())
}
