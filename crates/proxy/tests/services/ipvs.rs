//! What only the mode `ipvs` has.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use proxy::{Config, Mode, Proxy, StartError};
use serde_json::json;
use service::{Kind, Target};
use sys::netlink::ipvs::{Command, HASH_PORT, Ipvs, PERSISTENT, Settings, Virtual};
use sys::netlink::{Socket, Writer};

use crate::host::{Host, PATIENCE, Way, ask, ip, is_alive, on_a_host, open, ready};
use crate::{NODE_PORT, VIP, refused};

/// Whether this kernel has IPVS, which it loads when it is asked for.
pub(crate) fn is_there() -> bool {
    let opened = Ipvs::open();
    assert!(opened.is_ok() || !testkit::host::is_own_machine(), "the virtual machine has IPVS: {opened:?}");
    opened.is_ok()
}

/// All virtual services, for who looks for what is left; none on a kernel without.
pub(crate) fn services() -> Vec<String> {
    let listed = Ipvs::open().map(|mut ipvs| ipvs.services().unwrap()).unwrap_or_default();
    listed.into_iter().map(|(service, _)| format!("{service:?}")).collect()
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
    // Rules lead external addresses.
    for (frontend, entry) in model.rules().iter().filter(|(_, entry)| entry.kind != Kind::ExternalIp) {
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
fn an_address_that_the_kernel_refuses_costs_only_itself() {
    if !is_there() {
        return println!("skipped: needs IPVS in the kernel");
    }
    on_a_host(Way::Ipvs, async |host| {
        let proxy = host.proxy().await;
        let disable = "/proc/sys/net/ipv6/conf/kube-ipvs0/disable_ipv6";
        if let Err(error) = std::fs::write(disable, "1") {
            return println!("skipped: needs {disable} ({error})");
        }
        let pod = host.server("a").await;
        let addresses = json!([VIP, "fd00:96::10"]);
        host.service("web", json!({"clusterIP": VIP, "clusterIPs": addresses, "ports": [{"port": 80}]}));
        host.endpoints("web", &[ready(pod.ips[0]), ready(pod.ips[1])]);
        proxy.settled().await;
        ask(&host.here, ip(VIP), 80).expect("the address that can be had is served");
        host.service("more", json!({"clusterIP": "10.96.0.11", "ports": [{"port": 80}]}));
        host.endpoints("more", &[ready(pod.ips[0])]);
        proxy.settled().await;
        ask(&host.here, ip("10.96.0.11"), 80).expect("what comes later is served");
        host.remove_service("web");
        proxy.settled().await;
        ask(&host.here, ip("10.96.0.11"), 80).expect("what goes costs nothing either");
        proxy.cleanup().await.unwrap();
    });
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

/// Those of the kernel (`net/netfilter/ipvs`).
const SCHEDULERS: [&str; 14] =
    ["rr", "wrr", "lc", "wlc", "lblc", "lblcr", "sh", "dh", "sed", "nq", "mh", "twos", "fo", "ovf"];

/// Each is set and leads to the endpoints; the kernel loads it then. One that it lacks is refused, with the remedy.
#[test]
fn every_scheduler_of_the_kernel_is_taken() {
    if !is_there() {
        return println!("skipped: needs IPVS in the kernel");
    }
    on_a_host(Way::Ipvs, async |host| {
        let (a, b) = (host.server("a").await, host.server("b").await);
        host.service("web", json!({"clusterIP": VIP, "ports": [{"port": 80}]}));
        host.endpoints("web", &[ready(a.ips[0]), ready(b.ips[0])]);
        let mut lacking = Vec::new();
        for scheduler in SCHEDULERS {
            let mut config = host.config();
            config.ipvs.scheduler = scheduler.to_owned();
            let proxy = match Proxy::start(config, host.desired.clone()) {
                Err(error @ StartError::NoScheduler { .. }) => {
                    assert!(error.to_string().contains(&format!("`modprobe ip_vs_{scheduler}`")), "{error}");
                    lacking.push(scheduler);
                    continue;
                }
                started => started.unwrap(),
            };
            proxy.settled().await;
            let services = Ipvs::open().unwrap().services().unwrap();
            let set: Vec<&str> = services.iter().map(|(_, settings)| settings.scheduler.as_str()).collect();
            assert_eq!(set, [scheduler]);
            for _ in 0..4 {
                ask(&host.here, ip(VIP), 80).unwrap_or_else(|error| panic!("{scheduler}: {error}"));
            }
            proxy.stop().await;
        }
        // The virtual machine's kernel, Debian's, has all but the newest.
        assert!(lacking == ["twos"] || !testkit::host::is_own_machine(), "this kernel lacks {lacking:?}");
        host.proxy().await.cleanup().await.unwrap();
    });
}

fn weights(service: &Virtual) -> Vec<u32> {
    let servers = Ipvs::open().unwrap().servers(service).unwrap();
    let mut weights: Vec<u32> = servers.iter().map(|status| status.weight).collect();
    weights.sort_unstable();
    weights
}

fn virtual_service(address: &str, port: u16) -> Virtual {
    Virtual { address: ip(address), protocol: 6, port }
}

/// A proxy in the mode `ipvs` that looks often; none on a kernel that cannot.
async fn start(host: &Host, change: impl FnOnce(&mut Config)) -> Option<Proxy> {
    if !is_there() {
        println!("skipped: needs IPVS in the kernel");
        return None;
    }
    let mut config = Config { mode: Mode::Ipvs, look_every: Duration::from_millis(20), ..host.config() };
    change(&mut config);
    let proxy = Proxy::start(config, host.desired.clone()).unwrap();
    proxy.settled().await;
    Some(proxy)
}

async fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < 6 * PATIENCE, "{what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn a_server_goes_with_its_last_connection_and_so_does_its_service() {
    on_a_host(Way::Nftables, async |host| {
        let Some(proxy) = start(&host, |_| ()).await else { return };
        let (client, a, b) = (host.pod("client").await, host.server("a").await, host.server("b").await);
        host.service("web", json!({"clusterIP": VIP, "ports": [{"port": 80}]}));
        host.endpoints("web", &[ready(a.ips[0])]);
        proxy.settled().await;
        let (mut to_a, name, _) = open(&client.netns, ip(VIP), 80).unwrap();
        assert_eq!(name, "a");
        host.endpoints("web", &[ready(b.ips[0])]);
        proxy.settled().await;
        let web = virtual_service(VIP, 80);
        assert_eq!(weights(&web), [0, 1]);
        host.remove_service("web");
        proxy.settled().await;
        // Some looks later it is still there.
        until("nobody waits for a server without connections", || weights(&web) == [0]).await;
        refused(ask(&client.netns, ip(VIP), 80));
        assert!(is_alive(&mut to_a));
        // A reset is forgotten after 10 s, an end after two minutes.
        sys::rustix::net::sockopt::set_socket_linger(&to_a, Some(Duration::ZERO)).unwrap();
        drop(to_a);
        until("the service goes", || Ipvs::open().unwrap().services().unwrap().is_empty()).await;
        proxy.cleanup().await.unwrap();
    });
}

#[test]
fn what_is_excluded_is_left_alone_and_what_somebody_removed_comes_back() {
    on_a_host(Way::Nftables, async |host| {
        if !is_there() {
            return println!("skipped: needs IPVS in the kernel");
        }
        let settings = || Settings { scheduler: "wlc".to_owned(), flags: 0, timeout_s: 0 };
        let (theirs, stale) = (virtual_service("172.16.0.1", 80), virtual_service("172.17.0.1", 80));
        let mut ipvs = Ipvs::open().unwrap();
        ipvs.apply(&[theirs, stale].map(|service| Command::AddService(service, settings()))).unwrap();
        let exclude = |config: &mut Config| {
            config.ipvs.exclude_cidrs = vec!["172.16.0.0/16".parse().unwrap()];
            config.ipvs.scheduler = "mh".to_owned();
            config.ipvs.tcp_timeout = Duration::from_secs(1234);
        };
        let proxy = start(&host, exclude).await.unwrap();
        let pod = host.server("a").await;
        host.service("web", json!({"clusterIP": VIP, "sessionAffinity": "ClientIP", "ports": [{"port": 80}]}));
        host.endpoints("web", &[ready(pod.ips[0])]);
        proxy.settled().await;
        let web = virtual_service(VIP, 80);
        let services =
            |ipvs: &mut Ipvs| ipvs.services().unwrap().into_iter().map(|(one, _)| one).collect::<BTreeSet<_>>();
        assert_eq!(services(&mut ipvs), BTreeSet::from([theirs, web]));
        let ours = ipvs.services().unwrap().into_iter().find(|(one, _)| *one == web).unwrap().1;
        assert_eq!((ours.scheduler.as_str(), ours.flags, ours.timeout_s), ("mh", PERSISTENT | HASH_PORT, 10_800));
        assert_eq!(ipvs.timeouts().unwrap().tcp_s, 1234);
        let server = ipvs.servers(&web).unwrap()[0].server;
        let damages = [
            Command::Flush,
            Command::DeleteService(web),
            Command::DeleteServer(web, server),
            Command::SetServer(web, server, 0),
        ];
        for damage in damages {
            ipvs.apply(&[damage]).unwrap();
            until("the service is made anew", || weights(&web) == [1]).await;
            ask(&host.here, ip(VIP), 80).expect("and leads there");
        }
        ipvs.apply(&[Command::AddService(theirs, settings())]).unwrap();
        proxy.cleanup().await.unwrap();
        assert_eq!(services(&mut ipvs), BTreeSet::from([theirs]));
        assert!(Socket::route().unwrap().link("kube-ipvs0").unwrap().is_none());
    });
}

#[test]
fn node_ports_answer_on_an_address_that_comes() {
    on_a_host(Way::Nftables, async |host| {
        let Some(proxy) = start(&host, |_| ()).await else { return };
        let (client, pod) = (host.pod("client").await, host.server("a").await);
        let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
        host.service("web", json!({"type": "NodePort", "clusterIP": VIP, "ports": ports}));
        host.endpoints("web", &[ready(pod.ips[0])]);
        proxy.settled().await;
        let mut route = Socket::route().unwrap();
        let up0 = route.link("up0").unwrap().unwrap().index;
        let mut setup = Writer::new();
        setup.add_address(up0, ip("192.0.2.7"), 24);
        route.request(&setup).unwrap();
        until("a node port at the new address", || ask(&client.netns, ip("192.0.2.7"), NODE_PORT).is_ok()).await;
        ask(&host.outside, ip("192.0.2.7"), NODE_PORT).expect("from outside");
        proxy.cleanup().await.unwrap();
    });
}
