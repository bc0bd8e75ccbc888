//! The mode `userspace`: what it carries, and what it cannot do as the others do.

use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, TcpListener};
use std::os::fd::AsFd as _;
use std::process::Command;

use proxy::{Config, Mode, Proxy};
use serde_json::json;
use sys::netlink::Socket;
use sys::netns;

use crate::host::{
    End, FAR, HOST, Host, PATIENCE, Way, answers, ask, ask_udp, ip, is_alive, on_a_host, open, ready, serve, serve_udp,
    udp,
};
use crate::{NODE_PORT, VIP, refused};

/// What pods see of everybody: this node, by its address on their bridge.
const NODE_AT_PODS: &str = "10.85.0.1";

async fn start(host: &Host) -> Proxy {
    let config = Config { mode: Mode::Userspace, ..host.config() };
    let proxy = Proxy::start(config, host.desired.clone()).unwrap();
    proxy.settled().await;
    proxy
}

fn has_link() -> bool {
    Socket::route().unwrap().link("orlop-services").unwrap().is_some()
}

#[test]
fn connections_are_carried_to_all_endpoints() {
    on_a_host(Way::Nftables, async |host| {
        let proxy = start(&host).await;
        let client = host.pod("client").await;
        let (a, b) = (host.server("a").await, host.server("b").await);
        let addresses = json!([VIP, "fd00:96::10"]);
        let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
        host.service("web", json!({"type": "NodePort", "clusterIP": VIP, "clusterIPs": addresses, "ports": ports}));
        let ends: Vec<End> = [&a, &b].iter().flat_map(|pod| pod.ips.iter().copied().map(ready)).collect();
        host.endpoints("web", &ends);
        proxy.settled().await;
        for vip in [VIP, "fd00:96::10"] {
            assert_eq!(answers(&client.netns, ip(vip), 80, 10), ["a", "b"], "from a pod to {vip}");
            assert_eq!(answers(&host.here, ip(vip), 80, 10), ["a", "b"], "from the host to {vip}");
        }
        assert_eq!(answers(&host.outside, ip(HOST), NODE_PORT, 10), ["a", "b"]);
        refused(ask(&host.here, ip("127.0.0.1"), NODE_PORT));
        assert_eq!(ask(&a.netns, ip(VIP), 80).unwrap().1, ip(NODE_AT_PODS), "a pod reaches itself and the other");
        refused(ask(&client.netns, ip(VIP), 81));
        host.endpoints("web", &[]);
        proxy.settled().await;
        refused(ask(&client.netns, ip(VIP), 80));
        refused(ask(&host.outside, ip(HOST), NODE_PORT));
        let owned = proxy.fsck().await.unwrap();
        assert_eq!(owned.iter().map(|owned| owned.name.as_str()).collect::<Vec<_>>(), ["orlop-services"]);
        proxy.cleanup().await.unwrap();
        assert!(!has_link());
    });
}

#[test]
fn open_connections_outlive_rules_and_who_has_said_all_hears_the_rest() {
    on_a_host(Way::Nftables, async |host| {
        let proxy = start(&host).await;
        let (client, a, b) = (host.pod("client").await, host.server("a").await, host.server("b").await);
        host.service("web", json!({"clusterIP": VIP, "ports": [{"port": 80}]}));
        host.endpoints("web", &[ready(a.ips[0])]);
        proxy.settled().await;
        let (mut to_a, name, _) = open(&client.netns, ip(VIP), 80).unwrap();
        assert_eq!(name, "a");
        host.endpoints("web", &[ready(b.ips[0])]);
        proxy.settled().await;
        assert_eq!(answers(&client.netns, ip(VIP), 80, 5), ["b"]);
        assert!(is_alive(&mut to_a));
        host.remove_service("web");
        proxy.settled().await;
        refused(ask(&client.netns, ip(VIP), 80));
        // The server echoes until it hears the end.
        to_a.write_all(b"last").unwrap();
        to_a.shutdown(Shutdown::Write).unwrap();
        let mut rest = String::new();
        to_a.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "last");
        proxy.cleanup().await.unwrap();
    });
}

#[test]
fn the_next_endpoint_is_tried_when_one_refuses() {
    on_a_host(Way::Nftables, async |host| {
        let proxy = start(&host).await;
        let (client, deaf, b) = (host.pod("client").await, host.pod("deaf").await, host.server("b").await);
        host.service("web", json!({"clusterIP": VIP, "sessionAffinity": "ClientIP", "ports": [{"port": 80}]}));
        host.endpoints("web", &[ready(deaf.ips[0]), ready(b.ips[0])]);
        proxy.settled().await;
        assert_eq!(answers(&client.netns, ip(VIP), 80, 10), ["b"]);
        serve(&deaf.netns, "deaf", 8080);
        assert_eq!(answers(&client.netns, ip(VIP), 80, 10), ["b"], "affinity leads back");
        assert_eq!(answers(&host.here, ip(VIP), 80, 10).len(), 1, "each client to its own");
        host.endpoints("web", &[ready(deaf.ips[0])]);
        proxy.settled().await;
        assert_eq!(answers(&client.netns, ip(VIP), 80, 10), ["deaf"], "as long as the endpoint is there");
        proxy.cleanup().await.unwrap();
    });
}

#[test]
fn flows_of_udp_follow_their_service() {
    on_a_host(Way::Nftables, async |host| {
        let proxy = start(&host).await;
        let (client, a, b) = (host.pod("client").await, host.pod("a").await, host.pod("b").await);
        serve_udp(&a.netns, "a");
        serve_udp(&b.netns, "b");
        let ports = json!([{"name": "udp", "port": 53, "protocol": "UDP", "nodePort": NODE_PORT}]);
        host.service("dns", json!({"type": "NodePort", "clusterIP": VIP, "ports": ports}));
        let (inside, outside) = (udp(&client.netns, 4000), udp(&host.outside, 4000));
        let (a, b) = (ready(a.ips[0]), ready(b.ips[0]));
        for (ends, expect) in [(vec![a.clone()], "a"), (vec![a, b.clone()], "a"), (vec![b], "b")] {
            host.endpoints("dns", &ends);
            proxy.settled().await;
            assert_eq!(ask_udp(&inside, VIP, 53).unwrap(), expect);
            assert_eq!(ask_udp(&outside, HOST, NODE_PORT).unwrap(), expect);
        }
        proxy.cleanup().await.unwrap();
    });
}

#[test]
fn of_an_external_address_only_the_ports_of_services_are_taken() {
    on_a_host(Way::Nftables, async |host| {
        let proxy = start(&host).await;
        crate::ports_of_a_host(&host, &proxy).await;
        let pod = host.pod("pod").await;
        serve_udp(&pod.netns, "pod");
        let udp_port = json!([{"name": "udp", "port": 53, "protocol": "UDP"}]);
        host.service("dns", json!({"clusterIP": VIP, "externalIPs": [FAR], "ports": udp_port}));
        host.endpoints("dns", &[ready(pod.ips[0])]);
        proxy.settled().await;
        assert_eq!(ask_udp(&udp(&host.here, 0), FAR, 53).unwrap(), "pod");
        let b = host.server("b").await;
        for (name, cluster_ip, port) in [("stays", "10.96.0.11", 80), ("goes", "10.96.0.12", 8022)] {
            host.service(name, json!({"clusterIP": cluster_ip, "externalIPs": [FAR], "ports": [{"port": port}]}));
            host.endpoints(name, &[ready(b.ips[0])]);
        }
        proxy.settled().await;
        assert_eq!(ask(&host.here, ip(FAR), 8022).unwrap().0, "b");
        host.remove_service("goes");
        proxy.settled().await;
        // What was carried for the port ends first; the other Service, which uses the same address, does not.
        let begun = std::time::Instant::now();
        while !ask(&host.here, ip(FAR), 8022).is_ok_and(|(name, _)| name == "far") {
            assert!(begun.elapsed() < 6 * PATIENCE, "the port is not given back");
            tokio::task::yield_now().await;
        }
        assert_eq!(ask(&host.here, ip(FAR), 80).unwrap().0, "b");
        proxy.cleanup().await.unwrap();
        assert_eq!(Socket::route().unwrap().port_rules(10_254).unwrap(), []);
    });
}

#[test]
fn an_endpoint_that_is_a_frontend_is_no_endpoint() {
    on_a_host(Way::Nftables, async |host| {
        let proxy = start(&host).await;
        let (client, pod, good) = (host.pod("client").await, host.server("pod").await, host.server("good").await);
        let externals = json!([pod.ips[0].to_string()]);
        host.service("web", json!({"clusterIP": VIP, "externalIPs": externals, "ports": [{"port": 8080}]}));
        host.endpoints("web", &[ready(pod.ips[0]), ready(good.ips[0])]);
        proxy.settled().await;
        assert_eq!(answers(&client.netns, ip(VIP), 8080, 10), ["good"]);
        host.endpoints("web", &[ready(pod.ips[0])]);
        proxy.settled().await;
        refused(ask(&client.netns, ip(VIP), 8080));
        proxy.cleanup().await.unwrap();
    });
}

#[test]
fn an_address_that_the_kernel_refuses_costs_only_itself() {
    on_a_host(Way::Nftables, async |host| {
        let config =
            Config { mode: Mode::Userspace, look_every: std::time::Duration::from_millis(20), ..host.config() };
        let proxy = Proxy::start(config, host.desired.clone()).unwrap();
        proxy.settled().await;
        let disable = "/proc/sys/net/ipv6/conf/orlop-services/disable_ipv6";
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
        std::fs::write(disable, "0").unwrap();
        let begun = std::time::Instant::now();
        while ask(&host.here, ip("fd00:96::10"), 80).is_err() {
            assert!(begun.elapsed() < 6 * PATIENCE, "nobody tries again");
            tokio::task::yield_now().await;
        }
        proxy.cleanup().await.unwrap();
    });
}

#[test]
fn who_must_not_come_is_reset() {
    on_a_host(Way::Nftables, async |host| {
        let proxy = start(&host).await;
        let (client, near) = (host.pod("client").await, host.server("near").await);
        serve(&host.far, "far", 8080);
        let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
        host.service(
            "web",
            json!({"type": "NodePort", "clusterIP": VIP, "externalTrafficPolicy": "Local", "ports": ports}),
        );
        let far = End { node: "there", ..ready(ip(FAR)) };
        host.endpoints("web", &[far.clone(), ready(near.ips[0])]);
        proxy.settled().await;
        assert_eq!(answers(&host.outside, ip(HOST), NODE_PORT, 6), ["near"]);
        assert_eq!(answers(&client.netns, ip(NODE_AT_PODS), NODE_PORT, 6), ["far", "near"], "pods are inside");
        host.endpoints("web", &[far]);
        proxy.settled().await;
        let error = ask(&host.outside, ip(HOST), NODE_PORT).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        proxy.cleanup().await.unwrap();
    });
}

#[test]
fn a_port_that_another_holds_is_taken_when_it_is_free() {
    on_a_host(Way::Nftables, async |host| {
        let held = netns::run_in(host.here.as_fd(), || TcpListener::bind(("0.0.0.0", NODE_PORT))).unwrap();
        let config =
            Config { mode: Mode::Userspace, look_every: std::time::Duration::from_millis(20), ..host.config() };
        let proxy = Proxy::start(config, host.desired.clone()).unwrap();
        let pod = host.server("a").await;
        let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
        host.service("web", json!({"type": "NodePort", "clusterIP": VIP, "ports": ports}));
        host.endpoints("web", &[ready(pod.ips[0])]);
        proxy.settled().await;
        ask(&host.here, ip(VIP), 80).expect("the rest is served");
        drop(held);
        let begun = std::time::Instant::now();
        while ask(&host.outside, ip(HOST), NODE_PORT).is_err() {
            assert!(begun.elapsed() < 6 * PATIENCE, "nobody takes the port");
            tokio::task::yield_now().await;
        }
        proxy.cleanup().await.unwrap();
    });
}

#[test]
fn it_works_in_an_unprivileged_user_namespace() {
    let nobody = ["--reuid=65534", "--regid=65534", "--clear-groups"];
    let inside = ["unshare", "--user", "--map-root-user", "--net"];
    let test = ["--exact", "userspace::connections_are_carried_to_all_endpoints", "--nocapture"];
    #[expect(clippy::disallowed_methods, reason = "a user namespace needs a process of its own")]
    let mut command = Command::new("setpriv");
    let program = std::env::current_exe().unwrap();
    let Ok(output) = command.args(nobody).args(inside).arg(program).args(test).current_dir("/tmp").output() else {
        return println!("skipped: needs the program setpriv");
    };
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    if said.contains("setpriv: ") || said.contains("unshare: ") {
        return println!("skipped: needs setpriv, unshare and unprivileged user namespaces ({said})");
    }
    assert!(output.status.success() && said.contains("1 passed") && !said.contains("skipped"), "{said}");
}
