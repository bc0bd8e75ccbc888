//! The built-in bridge in the kernel: the bridge itself, the pods' links, the packet filter.
//!
//! ```text
//!  pod netns            host netns
//!  eth0 10.85.0.7/32 ── vethXXXXXXXX ── orlop0 10.85.0.1/16 ── routes, nftables ── other pods, the world
//! ```
//!
//! A pod's address has no neighbours (/32): all it sends goes to the host's address on the bridge. So each packet between
//! pods passes the host's packet filter, which translates Services there and back, with and without `br_netfilter`.
//! (The ports are not isolated from each other: with `br_netfilter` a packet whose translation leads back to the bridge
//! is forwarded from port to port, `br_nf_pre_routing_finish` in net/bridge/br_netfilter_hooks.c.)
//! Neighbour entries are written, not learned: nobody waits for ARP, and no pod can answer for another.

use std::fs;
use std::net::IpAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ipnet::IpNet;
use netfilter::pods::{Forward, GUARD, PodTable};
use sys::netlink::route::{Link, Mac, Route, VethPair};
use sys::netlink::{self, Socket, Writer};
use sys::netns;
use sys::rustix::io::Errno;

use crate::{Config, InterfaceStats, NetworkError};

/// Name of the interface in the pods.
pub(crate) const POD_INTERFACE: &str = "eth0";
/// Index of the loopback interface in every network namespace.
pub(crate) const LOOPBACK: u32 = 1;
/// How long a new pod waits for the kernel to take notice of its link; it takes milliseconds.
const SETTLE_WITHIN: Duration = Duration::from_secs(1);
/// MTU of a host that has no default route.
const DEFAULT_MTU: u32 = 1500;

/// The host's side of the network.
#[derive(Debug)]
pub(crate) struct Bridge {
    name: String,
    gateways: Vec<(IpAddr, u8)>,
    /// Further addresses of the host, without neighbours.
    addresses: Vec<IpAddr>,
    /// Ranges that the host reaches by the bridge.
    routed: Vec<IpNet>,
    mtu: Option<u32>,
    table: PodTable,
    host: OwnedFd,
    /// Guard one conversation each.
    route: Mutex<Socket>,
    filter: Mutex<Socket>,
}

/// The link of one pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PodLink {
    /// Host's end.
    pub(crate) veth: String,
    /// Addresses.
    pub(crate) ips: Vec<IpAddr>,
    /// Hardware address of the pod's end.
    pub(crate) mac: Mac,
    /// MTU of both ends.
    pub(crate) mtu: u32,
}

/// Names object and step of a refused request.
pub(crate) trait During<T> {
    fn during(self, object: &str, step: &'static str) -> Result<T, NetworkError>;
}

impl<T, E: Into<std::io::Error>> During<T> for Result<T, E> {
    fn during(self, object: &str, step: &'static str) -> Result<T, NetworkError> {
        self.map_err(|source| NetworkError::Kernel { object: object.to_owned(), step, source: source.into() })
    }
}

/// A hardware address that follows from the address: whoever remembers it from an earlier pod is still right.
fn mac_of(address: IpAddr) -> Mac {
    let last: [u8; 4] = match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(v6) => u32::try_from(u128::from(v6) & u128::from(u32::MAX)).unwrap_or(0).to_be_bytes(),
    };
    // 0x0a: locally administered, unicast.
    [0x0a, 0x58, last[0], last[1], last[2], last[3]]
}

/// A name for the host's end of a pair.
pub(crate) fn veth_name() -> String {
    format!("veth{:08x}", u32::from_ne_bytes(sys::random::bytes()))
}

fn full_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

impl Bridge {
    /// Opens the sockets in the calling thread's namespace.
    pub(crate) fn open(config: &Config, gateways: Vec<(IpAddr, u8)>) -> Result<Bridge, NetworkError> {
        let name = config.bridge.clone();
        let cluster = config.cluster.iter().map(|range| (range.network(), range.prefix_len())).collect();
        Ok(Bridge {
            host: netns::current().during(&name, "opening the host's network namespace")?,
            route: Mutex::new(Socket::route().during(&name, "opening a route socket")?),
            filter: Mutex::new(Socket::netfilter().during(&name, "opening a netfilter socket")?),
            table: PodTable { name: config.table.clone(), subnets: gateways.clone(), cluster },
            addresses: config.addresses.clone(),
            routed: config.routed.clone(),
            mtu: config.mtu,
            gateways,
            name,
        })
    }

    /// Name of the bridge.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Name of the nftables table.
    pub(crate) fn table(&self) -> &str {
        &self.table.name
    }

    fn route(&self) -> MutexGuard<'_, Socket> {
        // A conversation that a panic broke off leaves answers behind, which the next one would take for its own; the
        // panic ends the daemon, though, so nobody comes here afterwards.
        self.route.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn filter(&self) -> MutexGuard<'_, Socket> {
        self.filter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the bridge, or takes over the one that is there, and the packet filter with these host ports.
    pub(crate) fn ensure(&self, forwards: &[Forward]) -> Result<(), NetworkError> {
        self.set_sysctl("ipv4/ip_forward", "1")?;
        if self.gateways.iter().any(|(address, _)| address.is_ipv6()) {
            self.set_sysctl("ipv6/conf/all/forwarding", "1")?;
        }
        let index = self.ensure_link()?;
        // Pods reach each other through one and the same interface of the host; redirects would send them past it.
        // The kernel redirects if either of the two is set.
        self.set_sysctl("ipv4/conf/all/send_redirects", "0")?;
        self.set_sysctl(&format!("ipv4/conf/{}/send_redirects", self.name), "0")?;
        let mut addresses = Writer::new();
        for (address, prefix) in &self.gateways {
            addresses.add_address(index, *address, *prefix);
        }
        for address in &self.addresses {
            addresses.add_address(index, *address, full_prefix(*address));
        }
        for range in &self.routed {
            let own = self.gateways.iter().map(|(address, _)| *address);
            addresses.add_route(&Route {
                destination: Some((range.network(), range.prefix_len())),
                interface: index,
                source: own.into_iter().find(|address| address.is_ipv4() == range.network().is_ipv4()),
                ..Route::default()
            });
        }
        self.route().request(&addresses).during(&self.name, "setting the bridge's addresses and routes")?;
        self.filter().commit(self.table.replace(forwards)).during(&self.table.name, "writing the nftables table")?;
        if self.gateways.iter().any(|(address, _)| address.is_ipv4()) {
            // From 127.0.0.1 to a host port. The table, which comes first, keeps pods from going the other way.
            self.set_sysctl(&format!("ipv4/conf/{}/route_localnet", self.name), "1")?;
        }
        Ok(())
    }

    fn ensure_link(&self) -> Result<u32, NetworkError> {
        let mut route = self.route();
        if let Some(link) = route.link(&self.name).during(&self.name, "looking for the bridge")? {
            return if link.kind == "bridge" {
                Ok(link.index)
            } else {
                let message = format!("the interface {} is no bridge; rename it or choose another name", self.name);
                Err(NetworkError::Config(message))
            };
        }
        let mtu = self.mtu_for(&mut route).during(&self.name, "reading the default route")?;
        let mac = self.gateways.first().map_or([2, 0, 0, 0, 0, 1], |(address, _)| mac_of(*address));
        let mut create = Writer::new();
        create.create_bridge(&self.name, mac, mtu);
        route.request(&create).during(&self.name, "creating the bridge")?;
        let link = route.link(&self.name).during(&self.name, "looking for the bridge")?;
        link.map(|link| link.index).ok_or(Errno::NODEV).during(&self.name, "looking for the bridge")
    }

    fn mtu_for(&self, route: &mut Socket) -> netlink::Result<u32> {
        if let Some(mtu) = self.mtu {
            return Ok(mtu);
        }
        let default = route.routes()?.into_iter().find(|route| route.destination.is_none());
        let Some(default) = default else { return Ok(DEFAULT_MTU) };
        let links = route.links()?;
        Ok(links.iter().find(|link| link.index == default.interface).map_or(DEFAULT_MTU, |link| link.mtu))
    }

    fn set_sysctl(&self, name: &str, value: &str) -> Result<(), NetworkError> {
        let path = format!("/proc/sys/net/{name}");
        // /proc/sys/net shows the namespace of the thread that opens a file.
        let set = || match fs::read_to_string(&path) {
            Ok(now) if now.trim() == value => Ok(()),
            _ => fs::write(&path, value),
        };
        netns::run_in(self.host.as_fd(), set).during(&path, "setting the sysctl")
    }

    /// Makes a namespace with a pod's link in it.
    pub(crate) fn create_pod(
        &self,
        object: &str,
        veth: String,
        ips: Vec<IpAddr>,
    ) -> Result<(OwnedFd, PodLink), NetworkError> {
        let (namespace, mut inside) =
            netns::create(|| Ok(Socket::route()?)).during(object, "making a network namespace")?;
        let link = self.connect(object, namespace.as_fd(), &mut inside, veth, ips)?;
        Ok((namespace, link))
    }

    /// Puts a pod's link into a namespace that is there already.
    pub(crate) fn join_pod(
        &self,
        object: &str,
        namespace: BorrowedFd<'_>,
        veth: String,
        ips: Vec<IpAddr>,
    ) -> Result<PodLink, NetworkError> {
        let mut inside = netns::route_socket(namespace).during(object, "entering the network namespace")?;
        self.connect(object, namespace, &mut inside, veth, ips)
    }

    fn connect(
        &self,
        object: &str,
        namespace: BorrowedFd<'_>,
        inside: &mut Socket,
        veth: String,
        ips: Vec<IpAddr>,
    ) -> Result<PodLink, NetworkError> {
        let mac = ips.first().map_or([2, 0, 0, 0, 0, 2], |ip| mac_of(*ip));
        let mtu = self.plug(object, namespace, &veth, &ips, mac)?;
        let link = PodLink { veth, ips, mac, mtu };
        let settled = self.configure(inside, &link.ips).and_then(|()| self.settle(&link.veth));
        match settled {
            Ok(()) => Ok(link),
            Err(source) => {
                self.unplug(&link.veth, &link.ips)?;
                Err(source).during(object, "configuring eth0")
            }
        }
    }

    /// Waits until the bridge takes what the pod sends, from its first word on, and the host's answers find their way.
    fn settle(&self, veth: &str) -> netlink::Result<()> {
        self.wait_for(veth, |link| link.operational && link.forwarding)?;
        self.wait_for(&self.name, |link| link.operational)
    }

    fn wait_for(&self, name: &str, is_settled: fn(&Link) -> bool) -> netlink::Result<()> {
        let mut route = self.route();
        route.has_carrier(name)?;
        let link = route.link(name)?.ok_or(Errno::NODEV)?;
        drop(route);
        if !is_settled(&link) && !Socket::wait_for_link(name, SETTLE_WITHIN, is_settled)? {
            tracing::warn!(
                link = name,
                "the kernel has not taken notice that the link is up; first packets may be lost"
            );
        }
        Ok(())
    }

    /// Creates the veth pair and makes its one end a port of the bridge.
    fn plug(
        &self,
        object: &str,
        namespace: BorrowedFd<'_>,
        veth: &str,
        ips: &[IpAddr],
        mac: Mac,
    ) -> Result<u32, NetworkError> {
        let mut route = self.route();
        let bridge = route
            .link(&self.name)
            .and_then(|link| link.ok_or(Errno::NODEV.into()))
            .during(&self.name, "looking for the bridge")?;
        let mut plug = Writer::new();
        plug.create_veth(&VethPair {
            name: veth,
            master: bridge.index,
            mtu: bridge.mtu,
            peer: POD_INTERFACE,
            peer_mac: Some(mac),
            peer_netns: namespace,
        });
        // A translated packet may lead a pod to itself: the port must send it back where it came from.
        plug.set_bridge_port(veth, true, false);
        for ip in ips {
            plug.add_neighbour(bridge.index, *ip, mac);
        }
        route.request(&plug).during(object, "creating the veth pair")?;
        Ok(bridge.mtu)
    }

    /// Sets up loopback, address and routes inside the pod, in one request.
    fn configure(&self, inside: &mut Socket, ips: &[IpAddr]) -> netlink::Result<()> {
        let index = inside.link(POD_INTERFACE)?.ok_or(Errno::NODEV)?.index;
        let mut setup = Writer::new();
        setup.set_up(LOOPBACK);
        for ip in ips {
            setup.add_address(index, *ip, full_prefix(*ip));
        }
        setup.set_up(index);
        let router = self.gateways.first().map_or([2, 0, 0, 0, 0, 1], |(address, _)| mac_of(*address));
        for gateway in self.gateways.iter().map(|(address, _)| *address) {
            let on_link =
                Route { destination: Some((gateway, full_prefix(gateway))), interface: index, ..Route::default() };
            setup.add_route(&on_link);
            setup.add_route(&Route { gateway: Some(gateway), interface: index, ..Route::default() });
            // The bridge's hardware address never changes: no pod waits for it, none can be told a wrong one.
            setup.add_neighbour(index, gateway, router);
        }
        inside.request(&setup)
    }

    /// Deletes a pod's link and its addresses' neighbour entries; what is gone counts as deleted.
    pub(crate) fn unplug(&self, veth: &str, ips: &[IpAddr]) -> Result<(), NetworkError> {
        let mut route = self.route();
        delete_link(&mut route, veth).during(veth, "deleting the link")?;
        let Some(bridge) = route.link(&self.name).during(&self.name, "looking for the bridge")? else { return Ok(()) };
        for ip in ips {
            delete_neighbour(&mut route, bridge.index, *ip).during(veth, "deleting the neighbour entry")?;
        }
        Ok(())
    }

    /// Names of the bridge's ports.
    pub(crate) fn ports(&self) -> Result<Vec<String>, NetworkError> {
        let mut route = self.route();
        let links = route.links().during(&self.name, "listing links")?;
        let Some(bridge) = links.iter().find(|link| link.name == self.name).map(|link| link.index) else {
            return Ok(Vec::new());
        };
        Ok(links.into_iter().filter(|link| link.master == bridge).map(|link| link.name).collect())
    }

    /// Whether the bridge and the table exist.
    pub(crate) fn exists(&self) -> Result<(bool, bool), NetworkError> {
        let link = self.route().link(&self.name).during(&self.name, "looking for the bridge")?;
        let tables = self.filter().tables(PodTable::FAMILY).during(&self.table.name, "listing tables")?;
        Ok((link.is_some(), tables.contains(&self.table.name)))
    }

    /// Counters of a pod's link as the pod sees them: what it receives its other end sends.
    pub(crate) fn stats(&self, veth: &str) -> Result<Option<InterfaceStats>, NetworkError> {
        let link = self.route().link(veth).during(veth, "reading counters")?;
        Ok(link.map(|link| seen_from_peer(&link)))
    }

    /// Adds host ports. `all` are those of every pod, for a table that somebody flushed: without its guard the host's
    /// loopback is open to the pods.
    pub(crate) fn add_ports(
        &self,
        object: &str,
        forwards: &[Forward],
        all: impl FnOnce() -> Vec<Forward>,
    ) -> Result<(), NetworkError> {
        let mut filter = self.filter();
        let guard = filter.chain_uses(PodTable::FAMILY, &self.table.name, GUARD);
        if guard.during(&self.table.name, "looking for the nftables table")?.unwrap_or(0) == 0 {
            tracing::warn!(table = self.table.name, "the pods' nftables table has been flushed; it is written anew");
            return filter.commit(self.table.replace(&all())).during(object, "writing the nftables table");
        }
        if forwards.is_empty() {
            return Ok(());
        }
        filter.commit(self.table.add(forwards)).during(object, "adding host ports")
    }

    /// Removes the host ports of a pod, and the UDP flows that still lead there. `left` are the ports of all the others.
    pub(crate) fn remove_ports(
        &self,
        object: &str,
        forwards: &[Forward],
        left: impl FnOnce() -> Vec<Forward>,
    ) -> Result<(), NetworkError> {
        if forwards.is_empty() {
            return Ok(());
        }
        let mut filter = self.filter();
        // An element that is not there fails the transaction: somebody flushed the table, or a detach was broken off.
        filter
            .commit(self.table.remove(forwards))
            .or_else(|_| filter.commit(self.table.replace(&left())))
            .during(object, "removing host ports")?;
        forget_flows(&mut filter, forwards).during(object, "removing flows of host ports")
    }

    /// Gives the host its further addresses on loopback, where there is no bridge.
    pub(crate) fn serve_on_loopback(&self) -> Result<(), NetworkError> {
        let mut addresses = Writer::new();
        for address in &self.addresses {
            addresses.add_address(LOOPBACK, *address, full_prefix(*address));
        }
        self.route().request(&addresses).during("lo", "adding addresses")
    }

    /// Which of the further addresses are on loopback.
    pub(crate) fn loopback_addresses(&self) -> Result<Vec<IpAddr>, NetworkError> {
        let all = self.route().addresses().during("lo", "listing addresses")?;
        let on_loopback = all.into_iter().filter(|(index, ..)| *index == LOOPBACK).map(|(_, address, _)| address);
        Ok(on_loopback.filter(|address| self.addresses.contains(address)).collect())
    }

    /// Removes bridge, table and what is on loopback.
    pub(crate) fn remove(&self) -> Result<(), NetworkError> {
        for address in self.loopback_addresses()? {
            let mut delete = Writer::new();
            delete.delete_address(LOOPBACK, address, full_prefix(address));
            self.route().request(&delete).during("lo", "deleting an address")?;
        }
        // The link first: packets to the host's loopback are routed on it, and the table's guard is what keeps pods off.
        delete_link(&mut self.route(), &self.name).during(&self.name, "deleting the bridge")?;
        self.filter().commit(self.table.remove_table()).during(&self.table.name, "removing the nftables table")
    }
}

fn delete_link(route: &mut Socket, name: &str) -> netlink::Result<()> {
    let Some(link) = route.link(name)? else { return Ok(()) };
    let mut delete = Writer::new();
    delete.delete_link(link.index);
    match route.request(&delete) {
        Err(error) if error.errno == Errno::NODEV => Ok(()),
        other => other,
    }
}

fn delete_neighbour(route: &mut Socket, index: u32, address: IpAddr) -> netlink::Result<()> {
    let mut delete = Writer::new();
    delete.delete_neighbour(index, address);
    match route.request(&delete) {
        Err(error) if error.errno == Errno::NOENT => Ok(()),
        other => other,
    }
}

/// A UDP sender that keeps its port would go on to the address of a pod that is gone. (A TCP connection ends by itself.)
fn forget_flows(filter: &mut Socket, forwards: &[Forward]) -> netlink::Result<()> {
    const UDP: u8 = 17;
    let gone: Vec<&Forward> = forwards.iter().filter(|forward| forward.protocol == UDP).collect();
    for ipv6 in [false, true] {
        if !gone.iter().any(|forward| forward.pod.is_ipv6() == ipv6) {
            continue;
        }
        let flows = filter.flows(ipv6, |flow| {
            flow.destination_translated
                && gone.iter().any(|f| {
                    f.protocol == flow.reply.protocol
                        && (f.pod, f.pod_port) == (flow.reply.source, flow.reply.source_port)
                })
        })?;
        for flow in flows {
            filter.delete_flow(&flow)?;
        }
    }
    Ok(())
}

fn seen_from_peer(link: &Link) -> InterfaceStats {
    let stats = link.stats;
    InterfaceStats {
        name: POD_INTERFACE.to_owned(),
        rx_bytes: stats.tx_bytes,
        rx_packets: stats.tx_packets,
        rx_errors: stats.tx_errors,
        rx_dropped: stats.tx_dropped,
        tx_bytes: stats.rx_bytes,
        tx_packets: stats.rx_packets,
        tx_errors: stats.rx_errors,
        tx_dropped: stats.rx_dropped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_follow_from_addresses() {
        assert_eq!(mac_of("10.85.0.7".parse().unwrap()), [0x0a, 0x58, 10, 85, 0, 7]);
        assert_eq!(mac_of("fd00::102:304".parse().unwrap()), [0x0a, 0x58, 1, 2, 3, 4]);
    }
}
