//! Network namespaces, links and the packet filter: tried in a namespace that ends with the try.

use std::io;
use std::os::fd::AsFd as _;

use netfilter::pods::PodTable;
use netfilter::services::{self, ServiceTable};
use sys::netlink::route::VethPair;
use sys::netlink::{Socket, Writer};
use sys::netns;

use super::Finding;

/// What was tried, in order; each is `None` when it worked.
struct Tried {
    links: Option<io::Error>,
    filter: Option<io::Error>,
    flows: Option<io::Error>,
}

pub(super) fn findings() -> Vec<Finding> {
    const NAMESPACES: &str = "network namespaces";
    match netns::create(attempt) {
        Ok((_, tried)) => {
            let mut findings = judge(&tried);
            findings.insert(0, Finding::ok(NAMESPACES, "can be made"));
            findings
        }
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => vec![Finding::unknown(NAMESPACES)],
        Err(error) => vec![Finding::missing(
            NAMESPACES,
            error.to_string(),
            "boot a kernel with CONFIG_NET_NS; raise the sysctl user.max_net_namespaces if it is 0",
        )],
    }
}

fn attempt() -> io::Result<Tried> {
    Ok(Tried { links: links().err(), filter: filter().err(), flows: flows().err() })
}

/// A bridge and a pair of links, as a pod has them.
fn links() -> io::Result<()> {
    let here = netns::current()?;
    let mut links = Writer::new();
    links.create_bridge("bridge", [2, 0, 0, 0, 0, 1], 1500);
    links.create_veth(&VethPair {
        name: "host",
        master: 0,
        mtu: 1500,
        peer: "pod",
        peer_mac: None,
        peer_netns: here.as_fd(),
    });
    Ok(Socket::route()?.request(&links)?)
}

/// The tables of pods and Services.
fn filter() -> io::Result<()> {
    let mut socket = Socket::netfilter()?;
    let pods = PodTable { name: "pods".to_owned(), subnets: vec![([10, 0, 0, 0].into(), 8)], cluster: Vec::new() };
    socket.commit(pods.replace(&[]))?;
    let services = services::Config { name: "services".to_owned(), network: service::Network::default() };
    Ok(socket.commit(ServiceTable::new(services).probe())?)
}

/// Flows of UDP that lead to a pod which has ended are looked for.
fn flows() -> io::Result<()> {
    Ok(Socket::netfilter()?.flows(false, |_| false).map(drop)?)
}

fn judge(tried: &Tried) -> Vec<Finding> {
    let judge = |what: &'static str, failed: &Option<io::Error>, works: &str, remedy: &str| match failed {
        None => Finding::ok(what, works),
        Some(error) => Finding::missing(what, error.to_string(), remedy),
    };
    vec![
        judge(
            "pod links",
            &tried.links,
            "bridge and veth can be made",
            "load them (`modprobe -a bridge veth`) or boot a kernel with CONFIG_BRIDGE and CONFIG_VETH",
        ),
        judge(
            "nftables",
            &tried.filter,
            "takes the tables of pods and Services",
            "load it (`modprobe -a nf_tables nft_chain_nat nft_ct nft_masq nft_numgen nft_fib_inet nft_reject_inet`) or \
             boot a kernel with CONFIG_NF_TABLES and these: pods' networks and Services need it",
        ),
        judge(
            "connection tracking",
            &tried.flows,
            "can be listed",
            "load it (`modprobe nf_conntrack_netlink`) or boot a kernel with CONFIG_NF_CT_NETLINK",
        ),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict;

    #[test]
    fn each_part_that_fails_is_named() {
        let refused = || Some(io::Error::from_raw_os_error(95));
        let found = judge(&Tried { links: refused(), filter: None, flows: refused() });
        let verdicts: Vec<Verdict> = found.iter().map(|finding| finding.verdict).collect();
        assert_eq!(verdicts, [Verdict::Missing, Verdict::Ok, Verdict::Missing]);
        assert!(found.iter().all(|finding| finding.remedy.is_empty() == (finding.verdict == Verdict::Ok)));
    }
}
