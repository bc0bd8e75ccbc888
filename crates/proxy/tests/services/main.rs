//! Services with real connections, each test on a host of its own.

mod host;

use std::io;
use std::net::IpAddr;
use std::time::Instant;

use serde_json::json;
use sys::netlink::Socket;
use sys::netlink::nft::Family;

use host::{End, FAR, HOST, OUTSIDE, answers, ask, ip, is_alive, on_a_host, open, ready, serve, udp};

const VIP: &str = "10.96.0.10";

fn refused(result: io::Result<(String, IpAddr)>) {
    assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
}

#[test]
fn a_cluster_ip_leads_to_all_endpoints() {
    on_a_host(async |host| {
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
        refused(ask(&client.netns, ip(VIP), 81));
        refused(ask(&host.here, ip("10.96.0.99"), 80));
        host.remove_service("web");
        proxy.settled().await;
        refused(ask(&client.netns, ip(VIP), 80));
        proxy.cleanup().await.unwrap();
    });
}
