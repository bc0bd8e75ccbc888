//! What the operator and the cluster say beside Services, as packets feel it.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use cluster::Source as _;
use k8s_openapi::api::core::v1::Node;
use proxy::configuration::{Conntrack, DetectLocal, NodePortAddress};
use proxy::{Config, Proxy, Tallies};
use serde_json::json;
use sys::netns;

use crate::host::{
    Desired, End, FAR, HOST, Host, NODE, OUTSIDE, PATIENCE, Way, answers, ask, ip, on_a_host, ready, serve,
};
use crate::{NODE_PORT, VIP, refused};

/// The host's other address.
const ACROSS: &str = "203.0.113.1";

async fn proxy_with(host: &Host, change: impl FnOnce(&mut Config)) -> Proxy {
    let mut config = host.config();
    change(&mut config);
    let proxy = Proxy::start(config, host.desired.clone()).unwrap();
    proxy.settled().await;
    proxy
}

fn set_node(host: &Host, address: &str, pods: &str) {
    let object = json!({"metadata": {"name": NODE, "uid": "node"}, "spec": {"podCIDR": pods},
        "status": {"addresses": [{"type": "InternalIP", "address": address}]}});
    let node: Node = serde_json::from_value(object).unwrap();
    host.store().nodes().put(node);
}

#[test]
fn pods_are_known_by_ranges_of_the_node_or_by_their_interface() {
    on_a_host(Way::Nftables, async |host| {
        let (client, near) = (host.pod("client").await, host.server("near").await);
        serve(&host.far, "far", 8080);
        let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
        let spec = json!({"type": "NodePort", "clusterIP": VIP, "externalTrafficPolicy": "Local", "ports": ports});
        host.service("web", spec);
        host.endpoints("web", &[End { node: "there", ..ready(ip(FAR)) }, ready(near.ips[0])]);
        set_node(&host, HOST, "10.85.0.0/16");
        for local in [
            DetectLocal::Node,
            DetectLocal::Bridge("orlop0".to_owned()),
            DetectLocal::InterfacePrefix("orlo".to_owned()),
        ] {
            let name = format!("{local:?}");
            let proxy = proxy_with(&host, |config| config.local = local).await;
            assert_eq!(
                answers(&client.netns, ip("10.85.0.1"), NODE_PORT, 30),
                ["far", "near"],
                "{name}: pods are inside"
            );
            assert_eq!(answers(&host.outside, ip(HOST), NODE_PORT, 30), ["near"], "{name}: others are not");
            assert_eq!(answers(&host.here, ip(HOST), NODE_PORT, 30), ["far", "near"], "{name}: the node is");
            proxy.stop().await;
        }
        let proxy = proxy_with(&host, |config| config.local = DetectLocal::Bridge("other0".to_owned())).await;
        assert_eq!(answers(&client.netns, ip("10.85.0.1"), NODE_PORT, 30), ["near"], "nobody comes from there");
        proxy.stop().await;
    });
}

#[test]
fn addresses_that_another_proxy_serves_are_not_refused() {
    on_a_host(Way::Nftables, async |host| {
        let (client, pod) = (host.pod("client").await, host.server("a").await);
        // Of the Services of the other one this proxy knows nothing. It comes first: its chains are before the other's.
        let nothing = Arc::new(Desired::default());
        nothing.store().set_synced();
        let proxy = Proxy::start(host.config(), nothing).unwrap();
        proxy.settled().await;
        refused(ask(&client.netns, ip(VIP), 80));
        host.service("web", json!({"clusterIP": VIP, "ports": [{"port": 80}]}));
        host.endpoints("web", &[ready(pod.ips[0])]);
        let change = |config: &mut Config| (config.table, config.service_cidrs) = ("other".to_owned(), Vec::new());
        let other = proxy_with(&host, change).await;
        ask(&client.netns, ip(VIP), 80).unwrap();
        ask(&host.here, ip(VIP), 80).unwrap();
        refused(ask(&client.netns, ip("10.96.0.99"), 80));
        other.stop().await;
        proxy.stop().await;
    });
}

#[test]
fn node_ports_answer_where_the_operator_wants() {
    on_a_host(Way::Nftables, async |host| {
        let pod = host.server("a").await;
        let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
        host.service("web", json!({"type": "NodePort", "clusterIP": VIP, "ports": ports}));
        host.endpoints("web", &[ready(pod.ips[0])]);
        set_node(&host, HOST, "10.85.0.0/16");
        let proxy = proxy_with(&host, |config| config.node_ports = vec![NodePortAddress::Primary]).await;
        ask(&host.outside, ip(HOST), NODE_PORT).unwrap();
        ask(&host.here, ip(HOST), NODE_PORT).unwrap();
        refused(ask(&host.far, ip(ACROSS), NODE_PORT));
        refused(ask(&host.here, ip(ACROSS), NODE_PORT));
        // The Node gets another address while the proxy runs.
        set_node(&host, ACROSS, "10.85.0.0/16");
        proxy.settled().await;
        refused(ask(&host.outside, ip(HOST), NODE_PORT));
        ask(&host.far, ip(ACROSS), NODE_PORT).unwrap();
        proxy.stop().await;
        let range = NodePortAddress::Range("192.0.2.0/24".parse().unwrap());
        let proxy = proxy_with(&host, |config| config.node_ports = vec![range]).await;
        ask(&host.outside, ip(HOST), NODE_PORT).unwrap();
        refused(ask(&host.far, ip(ACROSS), NODE_PORT));
        proxy.stop().await;
    });
}

#[test]
fn everything_is_masqueraded_if_the_operator_wants() {
    on_a_host(Way::Nftables, async |host| {
        let client = host.pod("client").await;
        let pod = host.server("a").await;
        host.service("web", json!({"clusterIP": VIP, "ports": [{"port": 80}]}));
        host.endpoints("web", &[ready(pod.ips[0])]);
        let proxy = proxy_with(&host, |config| config.masquerade_all = true).await;
        assert_eq!(ask(&client.netns, ip(VIP), 80).unwrap(), ("a".to_owned(), ip("10.85.0.1")));
        proxy.stop().await;
    });
}

#[test]
fn the_cluster_says_which_addresses_are_those_of_services() {
    on_a_host(Way::Nftables, async |host| {
        let client = host.pod("client").await;
        let proxy = proxy_with(&host, |config| config.service_cidrs = Vec::new()).await;
        let range = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/16"]}});
        host.store().service_cidrs().put(serde_json::from_value(range).unwrap());
        proxy.settled().await;
        refused(ask(&client.netns, ip("10.96.0.99"), 80));
        proxy.stop().await;
    });
}

#[test]
fn load_balancers_learn_who_has_endpoints() {
    on_a_host(Way::Nftables, async |host| {
        let proxy = host.proxy().await;
        let spec = json!({"type": "LoadBalancer", "clusterIP": VIP, "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 30500, "ports": [{"port": 80, "nodePort": NODE_PORT}]});
        host.service("web", spec);
        let pod = host.server("a").await;
        host.endpoints("web", &[ready(pod.ips[0])]);
        proxy.settled().await;
        let outside = host.outside.try_clone().unwrap();
        // Asked by another thread: this one runs the proxy.
        let healthy = tokio::task::spawn_blocking(move || health(&outside)).await.unwrap();
        assert!(
            healthy.starts_with("HTTP/1.1 200") && healthy.contains("x-load-balancing-endpoint-weight: 1"),
            "{healthy}"
        );
        assert!(healthy.contains(r#""localEndpoints":1"#) && healthy.contains(r#""name":"web""#), "{healthy}");
        host.endpoints("web", &[End { node: "there", ..ready(ip(FAR)) }]);
        proxy.settled().await;
        let outside = host.outside.try_clone().unwrap();
        let empty = tokio::task::spawn_blocking(move || health(&outside)).await.unwrap();
        assert!(empty.starts_with("HTTP/1.1 503") && empty.contains(r#""localEndpoints":0"#), "{empty}");
        assert_eq!(proxy.questions().refusals().await.external, [1, 0]);
        host.remove_service("web");
        proxy.settled().await;
        let outside = host.outside.try_clone().unwrap();
        let gone = move || netns::run_in(outside.as_fd(), || TcpStream::connect((ip(HOST), 30500)));
        assert!(tokio::task::spawn_blocking(gone).await.unwrap().is_err(), "the port stays open");
    });
}

#[test]
fn rules_of_iptables_are_counted_and_count() {
    for way in Way::rules().into_iter().filter(|way| way.is_iptables()) {
        on_a_host(way, async move |host| {
            let proxy = host.proxy().await;
            let pod = host.server("a").await;
            let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
            host.service("web", json!({"type": "NodePort", "clusterIP": VIP, "ports": ports}));
            host.endpoints("web", &[ready(pod.ips[0])]);
            proxy.settled().await;
            let tallies = proxy.questions().tallies().await;
            for (table, ipv6, counts) in &tallies.rules {
                assert!(counts.total >= counts.written, "{table} {tallies:?}");
                if !ipv6 {
                    let listing = way.iptables("-save", &format!("-t {table}"));
                    let ours = listing.lines().filter(|line| line.starts_with("-A KUBE-")).count();
                    assert_eq!(counts.total, ours, "{table}\n{listing}");
                }
            }
            let written = |tallies: &Tallies, which| {
                let found = tallies.rules.iter().find(|(table, ipv6, _)| (*table, *ipv6) == (which, false));
                found.map(|(.., counts)| counts.written)
            };
            assert!(written(&tallies, "nat") > Some(0), "{tallies:?}");
            assert_eq!(written(&tallies, "filter"), Some(0), "a Service with endpoints has no rule there");
            for _ in 0..3 {
                ask(&host.here, ip("127.0.0.1"), NODE_PORT).unwrap();
            }
            ask(&host.here, ip(HOST), NODE_PORT).unwrap();
            match proxy.questions().tallies().await.loopback_accepted {
                Some(packets) => assert_eq!(packets, 3, "one for each connection"),
                None => println!("skipped: needs CONFIG_NETFILTER_XT_MATCH_NFACCT"),
            }
            proxy.stop().await;
        });
    }
}

/// Whom others have marked is masqueraded if they mean the same by that bit of the mark, and only then.
#[test]
fn the_mark_of_what_is_masqueraded_is_the_operators() {
    for way in Way::rules().into_iter().filter(|way| way.is_iptables()) {
        on_a_host(way, async move |host| {
            let (client, pod) = (host.pod("client").await, host.server("a").await);
            let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
            host.service("web", json!({"type": "NodePort", "clusterIP": VIP, "ports": ports}));
            host.endpoints("web", &[ready(pod.ips[0])]);
            let marks = format!("-w -t mangle -A PREROUTING -s {} -j MARK --set-xmark 0x4000/0x4000", client.ips[0]);
            way.iptables("", &marks);
            for (bit, seen) in [(14, ip("10.85.0.1")), (5, client.ips[0])] {
                let proxy = proxy_with(&host, |config| config.iptables.masquerade_bit = bit).await;
                assert_eq!(ask(&client.netns, ip(VIP), 80).unwrap().1, seen, "bit {bit}");
                assert_eq!(ask(&host.outside, ip(HOST), NODE_PORT).unwrap().1, way.seen(OUTSIDE), "bit {bit}");
                proxy.stop().await;
            }
        });
    }
}

/// `conntrack.tcpBeLiberal`: what is outside of a connection's window is valid to the kernel then, and no rule drops it.
#[test]
fn segments_outside_of_the_window_are_dropped_unless_the_operator_is_liberal() {
    for way in Way::rules().into_iter().filter(|way| way.is_iptables()) {
        on_a_host(way, async move |host| {
            let liberal = || std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal").unwrap();
            for be_liberal in [false, true] {
                let conntrack = Conntrack { max_per_core: 0, tcp_be_liberal: be_liberal, ..Conntrack::default() };
                if let Err(error) = proxy::sysctls::apply(&conntrack, &proxy::sysctls::Places::default()) {
                    return println!("skipped: needs a /proc/sys that can be written ({error})");
                }
                assert_eq!(liberal().trim(), if be_liberal { "1" } else { "0" });
                let proxy = host.proxy().await;
                let rules = way.iptables("", "-w -S KUBE-FORWARD");
                let drops = |rule: &str| rule.contains("--ctstate INVALID") && rule.ends_with("-j DROP");
                assert_eq!(rules.lines().any(drops), !be_liberal, "{rules}");
                proxy.stop().await;
            }
        });
    }
}

/// A proxy alone has no more of a Service than its name by then.
#[test]
fn a_port_of_health_checks_that_is_taken_is_told() {
    on_a_host(Way::Nftables, async |host| {
        host.store().services().let_pass();
        let _taken = TcpListener::bind(("::", 30500)).unwrap();
        let proxy = host.proxy().await;
        let spec = json!({"type": "LoadBalancer", "clusterIP": VIP, "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 30500, "ports": [{"port": 80}]});
        host.service("web", spec);
        proxy.settled().await;
        assert_eq!(host.event_reasons(), ["FailedToStartServiceHealthcheck"]);
        proxy.stop().await;
    });
}

/// What the health-check node port says, from outside.
fn health(netns: &OwnedFd) -> String {
    let address = SocketAddr::new(ip(HOST), 30500);
    let mut stream = netns::run_in(netns.as_fd(), || TcpStream::connect_timeout(&address, PATIENCE)).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}
