//! Services with real connections, each test on a host of its own.
#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

mod churn;
mod host;
mod ipvs;
mod kernel;
mod life;
mod options;
mod userspace;

use std::io;
use std::net::{IpAddr, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use serde_json::json;
use sys::netns;

use host::{End, FAR, HOST, Host, OUTSIDE, answers, ask, ip, on_hosts, open, ready, serve, udp};

const VIP: &str = "10.96.0.10";
const NODE_PORT: u16 = 30080;

#[track_caller]
fn refused(result: io::Result<(String, IpAddr)>) {
    assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
}

/// That nothing comes can only be seen by waiting.
#[track_caller]
fn dropped(netns: &OwnedFd, server: &str, port: u16) {
    let server = (ip(server), port).into();
    let tried = netns::run_in(netns.as_fd(), || TcpStream::connect_timeout(&server, Duration::from_millis(300)));
    assert_eq!(tried.unwrap_err().kind(), io::ErrorKind::TimedOut);
}

#[test]
fn connections_are_told_by_endpoint() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let (client, a, b) = (host.pod("client").await, host.server("a").await, host.server("b").await);
        let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
        host.service("web", json!({"type": "NodePort", "clusterIP": VIP, "ports": ports}));
        host.service("other", json!({"clusterIP": "10.96.0.11", "ports": [{"port": 80}]}));
        for service in ["web", "other"] {
            host.endpoints(service, &[ready(a.ips[0])]);
        }
        proxy.settled().await;
        let inside = [open(&client.netns, ip(VIP), 80).unwrap(), open(&client.netns, ip(VIP), 80).unwrap()];
        let outside = open(&host.outside, ip(HOST), NODE_PORT).unwrap();
        let past_it = open(&client.netns, a.ips[0], 8080).unwrap();
        host.endpoints("web", &[ready(a.ips[0]), ready(b.ips[0])]);
        proxy.settled().await;
        let text = async |name| proxy.questions().explain("default", name).await.unwrap().to_string();
        let (of_web, of_other) = (text("web").await, text("other").await);
        for (text, address, count) in [(&of_web, a.ips[0], 3), (&of_web, b.ips[0], 0), (&of_other, a.ips[0], 0)] {
            let line = format!("{address}:8080 on this node, {count} connections tracked");
            assert!(text.contains(&line), "no {line:?} in {text}");
        }
        drop((inside, outside, past_it));
        proxy.cleanup().await.unwrap();
    });
}

#[test]
fn a_cluster_ip_leads_to_all_endpoints() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let client = host.pod("client").await;
        let (a, b, c) = (host.server("a").await, host.server("b").await, host.server("c").await);
        let addresses = json!([VIP, "fd00:96::10"]);
        host.service("web", json!({"clusterIP": VIP, "clusterIPs": addresses, "ports": [{"port": 80}]}));
        let ends: Vec<End> = [&a, &b, &c].iter().flat_map(|pod| pod.ips.iter().copied().map(ready)).collect();
        host.endpoints("web", &ends);
        proxy.settled().await;
        for vip in [VIP, "fd00:96::10"] {
            assert_eq!(answers(&client.netns, ip(vip), 80, 60), ["a", "b", "c"], "from a pod to {vip}");
            assert_eq!(answers(&host.here, ip(vip), 80, 60), ["a", "b", "c"], "from the host to {vip}");
        }
        let (_, seen) = ask(&client.netns, ip(VIP), 80).unwrap();
        assert_eq!(seen, client.ips[0], "pods are not masqueraded");
        let (_, seen) = ask(&host.here, ip(VIP), 80).unwrap();
        assert_eq!(seen, host.way.seen(HOST), "nor is the host on its way to its own pods");
        proxy.cleanup().await.unwrap();
    });
}

#[test]
fn connections_spread_evenly() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let servers = [host.server("a").await, host.server("b").await, host.server("c").await, host.server("d").await];
        host.service("web", json!({"clusterIP": VIP, "ports": [{"port": 80}]}));
        host.endpoints("web", &servers.each_ref().map(|pod| ready(pod.ips[0])));
        proxy.settled().await;
        let mut counts = std::collections::BTreeMap::new();
        for _ in 0..1000 {
            *counts.entry(ask(&host.here, ip(VIP), 80).unwrap().0).or_insert(0) += 1;
        }
        // Six standard deviations around 250.
        assert!(counts.len() == 4 && counts.values().all(|count| (168..=332).contains(count)), "{counts:?}");
    });
}

#[test]
fn a_pod_reaches_itself_through_its_service() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let pod = host.server("self").await;
        let addresses = json!([VIP, "fd00:96::10"]);
        let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
        host.service("web", json!({"type": "NodePort", "clusterIP": VIP, "clusterIPs": addresses, "ports": ports}));
        host.endpoints("web", &[ready(pod.ips[0]), ready(pod.ips[1])]);
        proxy.settled().await;
        for (vip, port, gateway) in
            [(VIP, 80, "10.85.0.1"), ("fd00:96::10", 80, "fd00:85::1"), (HOST, NODE_PORT, "10.85.0.1")]
        {
            assert_eq!(ask(&pod.netns, ip(vip), port).unwrap(), ("self".into(), ip(gateway)), "through {vip}");
        }
    });
}

#[test]
fn the_host_may_be_an_endpoint_itself() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let client = host.pod("client").await;
        serve(&host.here, "host", 8080);
        host.service("web", json!({"clusterIP": VIP, "ports": [{"port": 80}]}));
        host.endpoints("web", &[ready(ip(HOST))]);
        proxy.settled().await;
        let told = |client: IpAddr| ("host".to_owned(), client);
        assert_eq!(ask(&host.here, ip(VIP), 80).unwrap(), told(host.way.host_itself(VIP)));
        assert_eq!(ask(&host.here, ip(HOST), 8080).unwrap(), told(ip(HOST)), "what is no service is not touched");
        assert_eq!(ask(&client.netns, ip(VIP), 80).unwrap(), told(client.ips[0]));
    });
}

#[test]
fn node_ports_answer_on_the_hosts_addresses() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let (client, pod) = (host.pod("client").await, host.server("a").await);
        let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
        host.service("web", json!({"type": "NodePort", "clusterIP": VIP, "ports": ports}));
        host.endpoints("web", &[ready(pod.ips[0])]);
        proxy.settled().await;
        let (_, seen) = ask(&host.outside, ip(HOST), NODE_PORT).unwrap();
        assert_eq!(seen, host.way.seen(OUTSIDE));
        ask(&host.here, ip(HOST), NODE_PORT).expect("from the host itself");
        ask(&client.netns, ip("10.85.0.1"), NODE_PORT).expect("from a pod to the bridge's address");
        let on_loopback = ask(&host.here, ip("127.0.0.1"), NODE_PORT);
        match host.way.is_iptables() {
            true => assert_eq!(on_loopback.unwrap().1, ip("10.85.0.1")),
            false => refused(on_loopback),
        }
        refused(ask(&host.outside, ip(HOST), NODE_PORT + 1));
        host.endpoints("web", &[]);
        proxy.settled().await;
        refused(ask(&host.outside, ip(HOST), NODE_PORT));
    });
}

/// What listens on the loopback addresses listens to its own host. Packets of others to these are routed where
/// `route_localnet` is set, and there a rule has to be.
#[test]
fn cve_2020_8558_no_neighbour_reaches_the_loopback_addresses() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let pod = host.server("a").await;
        let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
        host.service("web", json!({"type": "NodePort", "clusterIP": VIP, "ports": ports}));
        host.endpoints("web", &[ready(pod.ips[0])]);
        proxy.settled().await;
        ask(&host.outside, ip(HOST), NODE_PORT).expect("a node port by the node's address");
        let read = || std::fs::read_to_string("/proc/sys/net/ipv4/conf/all/route_localnet");
        let routed = netns::run_in(host.here.as_fd(), read).unwrap();
        if !host.way.is_iptables() {
            assert_eq!(routed.trim(), "0");
            return;
        }
        let rules = host.way.iptables("", "-S KUBE-FIREWALL");
        let drops = |rule: &str| rule.contains("! -s 127.0.0.0/8 -d 127.0.0.0/8") && rule.ends_with("-j DROP");
        assert!(rules.lines().any(drops), "{rules}");
    });
}

#[test]
fn what_nobody_serves_is_refused_at_once() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let client = host.pod("client").await;
        let ports = json!([{"name": "web", "port": 80}, {"name": "udp", "port": 53, "protocol": "UDP"}]);
        let addresses = json!([VIP, "fd00:96::10"]);
        host.service("web", json!({"clusterIP": VIP, "clusterIPs": addresses, "ports": ports}));
        proxy.settled().await;
        for netns in [&client.netns, &host.here] {
            for vip in [VIP, "fd00:96::10"] {
                refused(ask(netns, ip(vip), 80));
                refused(ask(netns, ip(vip), 81));
            }
            refused(ask(netns, ip("10.96.0.99"), 80));
        }
        // On the host itself a packet that is refused is an error of the call that sends it (EPERM).
        let (inside, host) = (udp(&client.netns, 0), udp(&host.here, 0));
        inside.connect((ip(VIP), 53)).unwrap();
        inside.send(b"anybody?").unwrap();
        assert_eq!(inside.recv(&mut [0; 8]).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        let sent = host.send_to(b"anybody?", (ip(VIP), 53));
        assert_eq!(sent.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
        proxy.stop().await;
    });
}

#[test]
fn who_comes_from_outside_to_an_endpoint_elsewhere_is_masqueraded() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let client = host.pod("client").await;
        // It has no route back to anybody but its neighbour, the host.
        serve(&host.far, "far", 8080);
        let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
        host.service("web", json!({"type": "NodePort", "clusterIP": VIP, "ports": ports}));
        host.endpoints("web", &[End { node: "there", ..ready(ip(FAR)) }]);
        proxy.settled().await;
        let far = |from: IpAddr| ("far".to_owned(), from);
        assert_eq!(ask(&host.outside, ip(HOST), NODE_PORT).unwrap(), far(ip("203.0.113.1")));
        assert_eq!(ask(&host.here, ip(VIP), 80).unwrap(), far(ip("203.0.113.1")), "not the address of up0");
        ask(&client.netns, ip(VIP), 80).expect("from a pod");
    });
}

#[test]
fn local_traffic_policies_keep_to_this_node() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let (client, near) = (host.pod("client").await, host.server("near").await);
        serve(&host.far, "far", 8080);
        let far = || End { node: "there", ..ready(ip(FAR)) };
        let both = ["far", "near"];
        let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
        let spec = json!({"type": "NodePort", "clusterIP": VIP, "externalTrafficPolicy": "Local", "ports": ports});
        host.service("external", spec);
        let spec = json!({"clusterIP": "10.96.0.11", "internalTrafficPolicy": "Local", "ports": [{"port": 80}]});
        host.service("internal", spec);
        for service in ["external", "internal"] {
            host.endpoints(service, &[far(), ready(near.ips[0])]);
        }
        proxy.settled().await;
        assert_eq!(answers(&host.outside, ip(HOST), NODE_PORT, 30), ["near"]);
        assert_eq!(ask(&host.outside, ip(HOST), NODE_PORT).unwrap().1, ip(OUTSIDE));
        assert_eq!(answers(&client.netns, ip("10.85.0.1"), NODE_PORT, 30), both, "pods are inside");
        assert_eq!(answers(&host.here, ip(HOST), NODE_PORT, 30), both, "and so is the node");
        assert_eq!(answers(&client.netns, ip(VIP), 80, 30), both);
        assert_eq!(answers(&client.netns, ip("10.96.0.11"), 80, 30), ["near"]);
        for service in ["external", "internal"] {
            host.endpoints(service, &[far()]);
        }
        proxy.settled().await;
        dropped(&host.outside, HOST, NODE_PORT);
        dropped(&client.netns, "10.96.0.11", 80);
        assert_eq!(answers(&client.netns, ip(VIP), 80, 5), ["far"]);
        for service in ["external", "internal"] {
            host.endpoints(service, &[]);
        }
        proxy.settled().await;
        refused(ask(&host.outside, ip(HOST), NODE_PORT));
        refused(ask(&client.netns, ip("10.96.0.11"), 80));
    });
}

#[test]
fn of_an_external_address_only_the_ports_of_services_are_taken() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        ports_of_a_host(&host, &proxy).await;
    });
}

/// Whoever may write Services chooses external addresses, also those of hosts that are really there (CVE-2020-8554).
pub(crate) async fn ports_of_a_host(host: &Host, proxy: &proxy::Proxy) {
    const OUTSIDE6: &str = "2001:db8::2";
    let mut theirs = sys::netns::route_socket(host.far.as_fd()).unwrap();
    let eth0 = theirs.link("eth0").unwrap().unwrap().index;
    let mut setup = sys::netlink::Writer::new();
    let via = sys::netlink::route::Route { gateway: Some(ip("203.0.113.1")), interface: eth0, ..Default::default() };
    setup.add_route(&via);
    theirs.request(&setup).unwrap();
    for port in [80, 8022] {
        serve(&host.far, "far", port);
        serve(&host.outside, "outside", port);
    }
    let (client, pod) = (host.pod("client").await, host.server("a").await);
    let addresses = json!([VIP, "fd00:96::10"]);
    host.service(
        "web",
        json!({"clusterIP": VIP, "clusterIPs": addresses, "externalIPs": [FAR, OUTSIDE6],
        "ports": [{"port": 80}]}),
    );
    host.endpoints("web", &[ready(pod.ips[0]), ready(pod.ips[1])]);
    proxy.settled().await;
    let who = |netns: &OwnedFd, address: &str, port| ask(netns, ip(address), port).unwrap().0;
    for (netns, address, host_there) in
        [(&client.netns, FAR, "far"), (&host.here, FAR, "far"), (&host.here, OUTSIDE6, "outside")]
    {
        assert_eq!((who(netns, address, 80).as_str(), who(netns, address, 8022).as_str()), ("a", host_there));
    }
    host.endpoints("web", &[]);
    proxy.settled().await;
    // In userspace it is reset once it is made. Upstream's iptables, and so ours, have no rule for what the host itself sends.
    let told = |netns: &OwnedFd, address: &str| {
        let error = ask(netns, ip(address), 80).unwrap_err();
        assert!(!matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock), "{error}");
    };
    told(&client.netns, FAR);
    if !host.way.is_iptables() {
        told(&host.here, OUTSIDE6);
    }
    assert_eq!(who(&client.netns, FAR, 8022), "far");
    host.remove_service("web");
    proxy.settled().await;
    // What was carried for a port ends first.
    let begun = std::time::Instant::now();
    while !ask(&client.netns, ip(FAR), 80).is_ok_and(|(name, _)| name == "far") {
        assert!(begun.elapsed() < host::PATIENCE, "the port is not given back");
        tokio::task::yield_now().await;
    }
}

#[test]
fn load_balancers_and_external_addresses_are_taken_up() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let pod = host.server("a").await;
        let mut theirs = sys::netns::route_socket(host.outside.as_fd()).unwrap();
        let eth0 = theirs.link("eth0").unwrap().unwrap().index;
        let mut setup = sys::netlink::Writer::new();
        let via = sys::netlink::route::Route { gateway: Some(ip(HOST)), interface: eth0, ..Default::default() };
        setup.add_route(&via);
        theirs.request(&setup).unwrap();
        let spec = |ranges: &[&str]| {
            json!({"type": "LoadBalancer", "clusterIP": VIP, "externalIPs": ["198.51.100.8"],
                "loadBalancerSourceRanges": ranges, "ports": [{"port": 80}]})
        };
        let declare = |ranges: &[&str]| host.balancer("web", spec(ranges), "198.51.100.9");
        declare(&[]);
        host.endpoints("web", &[ready(pod.ips[0])]);
        proxy.settled().await;
        for address in ["198.51.100.8", "198.51.100.9"] {
            assert_eq!(ask(&host.outside, ip(address), 80).unwrap().1, host.way.seen(OUTSIDE));
            ask(&host.here, ip(address), 80).expect("from the host");
        }
        declare(&["203.0.113.0/24"]);
        proxy.settled().await;
        dropped(&host.outside, "198.51.100.9", 80);
        ask(&host.outside, ip("198.51.100.8"), 80).expect("ranges are about the load balancer only");
        declare(&["203.0.113.0/24", "192.0.2.2/32"]);
        proxy.settled().await;
        ask(&host.outside, ip("198.51.100.9"), 80).expect("admitted");
        declare(&["nonsense"]);
        proxy.settled().await;
        dropped(&host.outside, "198.51.100.9", 80);
        assert_eq!(host.event_reasons(), ["ServiceNotProxied"]);
    });
}
