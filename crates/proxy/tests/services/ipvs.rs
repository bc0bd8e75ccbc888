//! What only the mode `ipvs` has.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use proxy::{Config, Mode, Proxy, StartError};
use service::Target;
use sys::netlink::Socket;
use sys::netlink::ipvs::Ipvs;

use crate::host::{Host, Way, on_a_host};

/// Whether this kernel has IPVS, which it loads when it is asked for.
pub(crate) fn is_there() -> bool {
    Ipvs::open().is_ok()
}

/// Servers that take new connections, by address, protocol and port.
type Led = BTreeMap<(IpAddr, u8, u16), BTreeSet<(IpAddr, u16)>>;

/// Checks that IPVS leads where the rules say, on each address of this node for node ports, and nowhere else.
pub(crate) fn check(host: &Host) {
    let mut route = Socket::route().unwrap();
    let link = route.link("kube-ipvs0").unwrap().unwrap().index;
    let is_own = |address: &IpAddr| !address.is_loopback() && !address.to_string().starts_with("fe80");
    let own = route.addresses().unwrap().into_iter().filter(|(index, address, _)| *index != link && is_own(address));
    let own: Vec<IpAddr> = own.map(|(_, address, _)| address).collect();
    let mut wanted = Led::new();
    let model = crate::kernel::wanted(host);
    for (frontend, entry) in model.rules().iter() {
        let outside = entry.outside.as_ref().map(Target::endpoints).filter(|endpoints| !endpoints.is_empty());
        let endpoints = outside.unwrap_or(entry.inside.endpoints()).iter();
        let endpoints: BTreeSet<_> = endpoints.map(|endpoint| (endpoint.address, endpoint.port)).collect();
        let of_family = own.iter().copied().filter(|own| own.is_ipv6() == frontend.address.is_ipv6());
        let places = if frontend.is_node_port() { of_family.collect() } else { vec![frontend.address] };
        for place in places.into_iter().filter(|_| !endpoints.is_empty()) {
            wanted.insert((place, frontend.protocol.number(), frontend.port), endpoints.clone());
        }
    }
    let mut ipvs = Ipvs::open().unwrap();
    let mut led = Led::new();
    for (service, _) in ipvs.services().unwrap() {
        for status in ipvs.servers(&service).unwrap().into_iter().filter(|status| status.weight > 0) {
            let servers = led.entry((service.address, service.protocol, service.port)).or_default();
            servers.insert((status.server.address, status.server.port));
        }
    }
    assert_eq!(led, wanted);
}

#[test]
fn a_kernel_that_cannot_is_told_with_the_remedy() {
    on_a_host(Way::Nftables, async |host| {
        let mut config = Config { mode: Mode::Ipvs, ..host.config() };
        config.ipvs.scheduler = "orlop".to_owned();
        let error = Proxy::start(config, host.desired.clone()).unwrap_err();
        match is_there() {
            true => assert!(matches!(&error, StartError::NoScheduler { scheduler, .. } if scheduler == "orlop")),
            false => assert!(matches!(error, StartError::NoIpvs(_))),
        }
        let remedy = if is_there() { "`modprobe ip_vs_orlop`" } else { "`modprobe ip_vs`" };
        assert!(error.to_string().contains(remedy), "{error}");
    });
}
