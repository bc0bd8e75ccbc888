//! What comes and goes: endpoints, clients that are remembered, flows, the daemon itself.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use proxy::Mode;
use serde_json::json;
use sys::netlink::Socket;
use sys::netlink::nft::{Batch, Family};

use crate::host::{
    End, HOST, Host, Way, answers, ask, ask_udp, ip, is_alive, on_a_host, on_hosts, open, ready, serve_udp, udp,
};
use crate::{NODE_PORT, VIP};

fn tables() -> Vec<String> {
    Socket::netfilter().unwrap().tables(Family::Inet).unwrap()
}

#[test]
fn an_endpoint_that_leaves_gets_nothing_new_and_keeps_what_it_has() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let (client, a, b) = (host.pod("client").await, host.server("a").await, host.server("b").await);
        host.service("web", json!({"clusterIP": VIP, "ports": [{"port": 80}]}));
        let (a, b) = (ready(a.ips[0]), ready(b.ips[0]));
        host.endpoints("web", &[a.clone(), b.clone()]);
        proxy.settled().await;
        let (mut to_a, name, _) =
            (0..200).map(|_| open(&client.netns, ip(VIP), 80).unwrap()).find(|(_, name, _)| name == "a").unwrap();
        assert_eq!(name, "a");
        for leaving in [End { ready: false, ..a.clone() }, End { ready: false, terminating: true, ..a.clone() }] {
            host.endpoints("web", &[leaving, b.clone()]);
            proxy.settled().await;
            assert_eq!(answers(&client.netns, ip(VIP), 80, 40), ["b"]);
            assert!(is_alive(&mut to_a));
        }
        host.endpoints("web", std::slice::from_ref(&b));
        proxy.settled().await;
        assert_eq!(answers(&client.netns, ip(VIP), 80, 40), ["b"]);
        assert!(is_alive(&mut to_a), "established connections are not touched");
        let ending = End { ready: false, terminating: true, ..b };
        host.endpoints("web", &[ending]);
        proxy.settled().await;
        assert_eq!(answers(&client.netns, ip(VIP), 80, 5), ["b"], "better than nobody");
    });
}

#[test]
fn the_barrier_opens_when_the_kernel_no_longer_leads_to_the_pod() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let barrier = proxy.barrier();
        let (client, a, b) = (host.pod("client").await, host.server("a").await, host.server("b").await);
        host.service("web", json!({"clusterIP": VIP, "ports": [{"port": 80}]}));
        let a = End { pod_uid: Some("uid-a"), ..ready(a.ips[0]) };
        let b = End { pod_uid: Some("uid-b"), ..ready(b.ips[0]) };
        host.endpoints("web", &[a.clone(), b.clone()]);
        barrier.left("uid-of-nobody", &[ip("10.85.9.9")]).await;
        let waiting = tokio::spawn({
            let (barrier, addresses) = (barrier.clone(), [a.address]);
            async move { barrier.left("uid-a", &addresses).await }
        });
        proxy.settled().await;
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished(), "the pod still serves");
        let before = Instant::now();
        host.endpoints("web", &[End { ready: false, terminating: true, ..a }, b.clone()]);
        waiting.await.unwrap();
        let waited = before.elapsed();
        assert!(waited >= Duration::from_millis(30), "packets may still be on their way after {waited:?}");
        assert_eq!(answers(&client.netns, ip(VIP), 80, 30), ["b"]);
        host.endpoints("web", &[End { ready: false, terminating: true, ..b }]);
        barrier.left("uid-b", &[]).await;
        proxy.stop().await;
        barrier.left("uid-b", &[]).await;
    });
}

#[test]
fn affinity_leads_a_client_back_as_long_as_its_endpoint_is_there() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let clients = [host.pod("client1").await, host.pod("client2").await];
        let servers = [host.server("a").await, host.server("b").await, host.server("c").await, host.server("d").await];
        let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
        let addresses = json!([VIP, "fd00:96::10"]);
        let spec = json!({"type": "NodePort", "clusterIP": VIP, "clusterIPs": addresses, "sessionAffinity": "ClientIP", "ports": ports});
        host.service("web", spec);
        let ends: Vec<End> = servers.iter().flat_map(|pod| pod.ips.iter().copied().map(ready)).collect();
        host.endpoints("web", &ends);
        proxy.settled().await;
        for (vip, port, family) in [(VIP, 80, 0), ("fd00:96::10", 80, 1), (HOST, NODE_PORT, 0)] {
            for client in &clients {
                let first = answers(&client.netns, ip(vip), port, 30);
                assert_eq!(first.len(), 1, "one endpoint for one client of {vip}: {first:?}");
                let named = |end: &&End| {
                    let pod = servers.iter().position(|pod| pod.ips[family] == end.address);
                    pod.map(|at| ["a", "b", "c", "d"][at]) != Some(&first[0])
                };
                let without: Vec<End> = ends.iter().filter(named).cloned().collect();
                host.endpoints("web", &without);
                proxy.settled().await;
                let second = answers(&client.netns, ip(vip), port, 30);
                assert_eq!(second.len(), 1, "{second:?}");
                assert_ne!(first, second, "an endpoint that left is forgotten");
                host.endpoints("web", &ends);
                proxy.settled().await;
                assert_eq!(answers(&client.netns, ip(vip), port, 10), second, "and its return changes nothing");
            }
        }
        let before: Vec<_> = clients.iter().map(|client| answers(&client.netns, ip(VIP), 80, 5)).collect();
        proxy.stop().await;
        let proxy = host.proxy().await;
        let after: Vec<_> = clients.iter().map(|client| answers(&client.netns, ip(VIP), 80, 20)).collect();
        assert_eq!(before, after, "a new daemon knows the clients");
        proxy.cleanup().await.unwrap();
    });
}

#[test]
fn udp_clients_follow_their_service() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let (client, a, b) = (host.pod("client").await, host.pod("a").await, host.pod("b").await);
        serve_udp(&a.netns, "a");
        serve_udp(&b.netns, "b");
        let (a, b) = (ready(a.ips[0]), ready(b.ips[0]));
        let ports = json!([{"name": "udp", "port": 53, "protocol": "UDP", "nodePort": NODE_PORT}]);
        host.service("dns", json!({"type": "NodePort", "clusterIP": VIP, "ports": ports}));
        host.endpoints("dns", std::slice::from_ref(&a));
        proxy.settled().await;
        let (inside, outside) = (udp(&client.netns, 4000), udp(&host.outside, 4000));
        assert_eq!(ask_udp(&inside, VIP, 53).unwrap(), "a");
        assert_eq!(ask_udp(&outside, HOST, NODE_PORT).unwrap(), "a");
        // One that nobody has to follow: its flow must stay.
        let bystander = udp(&client.netns, 4001);
        let direct = a.address.to_string();
        assert_eq!(ask_udp(&bystander, &direct, 8080).unwrap(), "a");
        let flow_of = |port| {
            let flows = Socket::netfilter().unwrap().flows(false, |flow| flow.original.source_port == port).unwrap();
            flows.into_iter().map(|flow| (flow.original, flow.reply)).collect::<Vec<_>>()
        };
        let untouched = flow_of(4001);
        assert_eq!(untouched.len(), 1);
        for (ends, expect) in [(vec![a.clone(), b.clone()], "a"), (vec![b.clone()], "b"), (vec![a, b.clone()], "b")] {
            host.endpoints("dns", &ends);
            proxy.settled().await;
            assert_eq!(ask_udp(&inside, VIP, 53).unwrap(), expect);
            assert_eq!(ask_udp(&outside, HOST, NODE_PORT).unwrap(), expect);
        }
        proxy.stop().await;
        // While nobody looks, the endpoint leaves.
        host.endpoints("dns", &[]);
        let proxy = host.proxy().await;
        assert_eq!(
            ask_udp(&connected(inside, VIP, 53), VIP, 53).unwrap_err().kind(),
            std::io::ErrorKind::ConnectionRefused
        );
        host.endpoints("dns", &[b]);
        proxy.settled().await;
        assert_eq!(ask_udp(&outside, HOST, NODE_PORT).unwrap(), "b");
        proxy.stop().await;
        host.remove_service("dns");
        host.proxy().await;
        assert_eq!(flow_of(4000), [], "flows of a service that is gone are gone");
        assert_eq!(flow_of(4001), untouched);
    });
}

/// A socket that hears of refusals.
fn connected(socket: std::net::UdpSocket, server: &str, port: u16) -> std::net::UdpSocket {
    socket.connect((ip(server), port)).unwrap();
    socket
}

#[test]
fn a_restart_is_not_felt() {
    on_hosts(async |host| {
        let proxy = host.proxy().await;
        let (client, a, b) = (host.pod("client").await, host.server("a").await, host.server("b").await);
        serve_udp(&a.netns, "a");
        serve_udp(&b.netns, "b");
        let ports = json!([{"port": 80, "nodePort": NODE_PORT}, {"name": "udp", "port": 80, "protocol": "UDP"}]);
        host.service("web", json!({"type": "NodePort", "clusterIP": VIP, "ports": ports}));
        host.endpoints("web", &[ready(a.ips[0]), ready(b.ips[0])]);
        proxy.settled().await;
        let (mut open, ..) = open(&client.netns, ip(VIP), 80).unwrap();
        let datagrams: Vec<_> = (4000..4008).map(|port| udp(&client.netns, port)).collect();
        let answered = || datagrams.iter().map(|socket| ask_udp(socket, VIP, 80).unwrap()).collect::<Vec<_>>();
        let first = answered();
        let stop = Arc::new(AtomicBool::new(false));
        let asked = Arc::new(AtomicUsize::new(0));
        let asking =
            [(client.netns.try_clone().unwrap(), VIP, 80), (host.outside.try_clone().unwrap(), HOST, NODE_PORT)].map(
                |(netns, server, port)| {
                    let (stop, asked) = (stop.clone(), asked.clone());
                    std::thread::spawn(move || {
                        while !stop.load(Ordering::Relaxed) {
                            ask(&netns, ip(server), port).expect("no connection fails");
                            asked.fetch_add(1, Ordering::Relaxed);
                        }
                    })
                },
            );
        let mut proxy = Some(proxy);
        for _ in 0..20 {
            let before = asked.load(Ordering::Relaxed);
            // As a daemon that is killed: nobody is told.
            drop(proxy.take());
            proxy = Some(host.proxy().await);
            assert_eq!(answered(), first, "each client of UDP stays where it is");
            while asked.load(Ordering::Relaxed) < before + 5 {
                tokio::task::yield_now().await;
            }
        }
        stop.store(true, Ordering::Relaxed);
        asking.into_iter().for_each(|thread| thread.join().unwrap());
        assert!(is_alive(&mut open));
    });
}

/// What a proxy may have left: tables, or chains.
fn left(way: Way) -> Vec<String> {
    if !way.is_iptables() {
        return tables();
    }
    let listing = way.iptables("-save", "");
    let chains = listing.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next());
    // This one is the kubelet's as well.
    chains.filter(|chain| chain.starts_with("KUBE-") && *chain != "KUBE-FIREWALL").map(str::to_owned).collect()
}

#[test]
fn a_start_waits_for_the_source_and_cleanup_leaves_nothing() {
    on_hosts(async |host| {
        let before = left(host.way);
        let proxy = host.proxy().await;
        let pod = host.server("a").await;
        host.service("web", json!({"clusterIP": VIP, "ports": [{"port": 80}]}));
        host.endpoints("web", &[ready(pod.ips[0])]);
        proxy.settled().await;
        let owned = proxy.fsck().await.unwrap();
        let name = if host.way.is_iptables() { "iptables nat KUBE-SERVICES" } else { "orlop-proxy" };
        assert!(owned.iter().any(|owned| owned.name == name), "{owned:?}");
        assert!(owned.iter().all(|owned| owned.owner.as_deref() == Some("services")), "{owned:?}");
        proxy.stop().await;
        ask(&host.here, ip(VIP), 80).expect("the rules stay");

        let empty = Arc::new(crate::host::Desired::default());
        let proxy = proxy::Proxy::start(host.config(), empty).unwrap();
        tokio::task::yield_now().await;
        ask(&host.here, ip(VIP), 80).expect("an empty store that is not synced says nothing");
        proxy.cleanup().await.unwrap();
        assert_eq!(left(host.way), before);
    });
}

#[test]
fn what_upstreams_proxy_has_left_is_removed() {
    on_a_host(Way::Nftables, async |host| {
        for family in [Family::Ipv4, Family::Ipv6] {
            let mut upstreams = Batch::new(family, "kube-proxy");
            upstreams.add_table();
            upstreams.add_chain("services", None);
            Socket::netfilter().unwrap().commit(upstreams).unwrap();
        }
        let has_ipvs = Way::rules().contains(&Way::IptablesNft);
        if has_ipvs {
            for line in [
                "-N KUBE-MARK-MASQ",
                "-N KUBE-LOAD-BALANCER",
                "-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ",
                "-N KUBE-SERVICES",
                "-A PREROUTING -j KUBE-SERVICES",
                "-A KUBE-SERVICES -j KUBE-LOAD-BALANCER",
            ] {
                Way::IptablesNft.iptables("", &format!("-w -t nat {line}"));
            }
            Way::IptablesNft.iptables("", "-w -t mangle -N KUBE-PROXY-CANARY");
        }
        let proxy = host.proxy().await;
        for family in [Family::Ipv4, Family::Ipv6] {
            assert!(!Socket::netfilter().unwrap().tables(family).unwrap().contains(&"kube-proxy".to_owned()));
        }
        if has_ipvs {
            assert_eq!(left(Way::IptablesNft), [""; 0]);
        }
        proxy.stop().await;
    });
}

/// Does what a firewall does that is reloaded.
fn flush(way: Way, chains_too: bool) {
    if !way.is_iptables() {
        let mut flush = Batch::new(Family::Inet, "orlop-proxy");
        if chains_too {
            flush.delete_table();
        } else {
            flush.flush_rules();
        }
        return Socket::netfilter().unwrap().commit(flush).unwrap();
    }
    for table in ["filter", "nat", "mangle"] {
        way.iptables("", &format!("-w -t {table} -F"));
        if chains_too {
            way.iptables("", &format!("-w -t {table} -X"));
        }
    }
}

/// Whether the rules are there. A listing that the other side disturbs says nothing.
fn is_written(way: Way) -> bool {
    match way.is_iptables() {
        true => way.iptables("-save", "-t nat").contains("-A PREROUTING -m comment"),
        false => {
            let uses = Socket::netfilter().unwrap().chain_uses(Family::Inet, "orlop-proxy", "postrouting");
            uses.is_ok_and(|uses| uses > Some(0))
        }
    }
}

#[test]
fn a_table_that_somebody_removed_is_made_again() {
    on_hosts(async |host| {
        let config = proxy::Config { look_every: Duration::from_millis(20), ..host.config() };
        let proxy = proxy::Proxy::start(config, host.desired.clone()).unwrap();
        let pod = host.server("a").await;
        host.service("web", json!({"clusterIP": VIP, "ports": [{"port": 80}]}));
        host.endpoints("web", &[ready(pod.ips[0])]);
        proxy.settled().await;
        for chains_too in [true, false] {
            flush(host.way, chains_too);
            let name = format!("other-{chains_too}");
            host.service(
                &name,
                json!({"clusterIP": format!("10.96.1.{}", u8::from(chains_too)), "ports": [{"port": 80}]}),
            );
            proxy.settled().await;
            ask(&host.here, ip(VIP), 80).expect("the next change brings all rules back");
            flush(host.way, chains_too);
            while !is_written(host.way) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            ask(&host.here, ip(VIP), 80).expect("and so does a look at what is there");
        }
    });
}

#[test]
fn a_part_that_somebody_removed_is_made_again() {
    on_a_host(Way::Nftables, async |host| {
        let config = proxy::Config { look_every: Duration::from_millis(20), ..host.config() };
        let proxy = proxy::Proxy::start(config, host.desired.clone()).unwrap();
        let pod = host.server("a").await;
        host.service("web", json!({"clusterIP": VIP, "ports": [{"port": 80}]}));
        host.endpoints("web", &[ready(pod.ips[0])]);
        proxy.settled().await;
        let mut netfilter = Socket::netfilter().unwrap();
        for map in ["services4", "endpoints4", "verdicts4"] {
            let mut elements = || netfilter.elements(Family::Inet, "orlop-proxy", map).unwrap();
            let before = elements();
            assert!(!before.is_empty());
            let mut damage = Batch::new(Family::Inet, "orlop-proxy");
            damage.flush_set(map);
            Socket::netfilter().unwrap().commit(damage).unwrap();
            while elements().len() < before.len() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            ask(&host.here, ip(VIP), 80).expect("a look at what is there brings it back");
        }
        proxy.stop().await;
    });
}

/// Beginnings of the names of chains: those of one port, and those that all share.
const CHAINS: [&str; 7] =
    ["KUBE-SVC-", "KUBE-SEP-", "KUBE-EXT-", "KUBE-NODEPORTS", "KUBE-SERVICES", "KUBE-MARK-MASQ", "KUBE-POSTROUTING"];

#[test]
fn a_chain_that_somebody_emptied_is_filled_again() {
    for way in Way::rules().into_iter().filter(|way| way.is_iptables()) {
        on_a_host(way, async move |host| {
            let config = proxy::Config { look_every: Duration::from_millis(20), ..host.config() };
            let proxy = proxy::Proxy::start(config, host.desired.clone()).unwrap();
            let pod = host.server("a").await;
            let ports = json!([{"port": 80, "nodePort": NODE_PORT}]);
            host.service("web", json!({"type": "NodePort", "clusterIP": VIP, "ports": ports}));
            host.endpoints("web", &[ready(pod.ips[0])]);
            proxy.settled().await;
            let listed = || way.iptables("-save", "-t nat");
            let before = listed();
            let rules = |listing: &str| listing.lines().filter(|line| line.starts_with("-A KUBE-")).count();
            for beginning in CHAINS {
                let mut declared = before.lines().filter_map(|line| line.strip_prefix(':')?.split(' ').next());
                let chain = declared.find(|chain| chain.starts_with(beginning)).expect(beginning);
                way.iptables("", &format!("-w -t nat -F {chain}"));
                while rules(&listed()) < rules(&before) {
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
                ask(&host.here, ip(VIP), 80).expect("a look at what is there brings it back");
                ask(&host.outside, ip(HOST), NODE_PORT).expect("from outside, too");
            }
            proxy.stop().await;
        });
    }
}

/// Keeps a proxy from writing its rules.
enum Obstacle {
    /// Holds our table, so that nobody else may change it.
    Thief(Thief),
    /// Refers to a chain that is to be removed.
    Jump(Way),
}

impl Obstacle {
    fn new(way: Way) -> Obstacle {
        if way.is_iptables() {
            way.iptables("", "-w -t nat -N KUBE-SVC-STALE");
            way.iptables("", "-w -t nat -A POSTROUTING -j KUBE-SVC-STALE");
            return Obstacle::Jump(way);
        }
        let thief = Thief::new();
        let mut netfilter = Socket::netfilter().unwrap();
        // A listing that is disturbed by what it waits for says nothing.
        while netfilter.chains(Family::Inet, "orlop-proxy").map_or(true, |chains| chains.is_empty()) {
            std::thread::yield_now();
        }
        Obstacle::Thief(thief)
    }

    fn remove(self) {
        match self {
            Obstacle::Thief(mut thief) => {
                thief.nft.kill().unwrap();
                thief.nft.wait().unwrap();
            }
            Obstacle::Jump(way) => {
                way.iptables("", "-w -t nat -D POSTROUTING -j KUBE-SVC-STALE");
            }
        }
    }
}

/// Holds our table, so that nobody else may change it.
struct Thief {
    nft: std::process::Child,
}

impl Thief {
    fn new() -> Thief {
        #[expect(clippy::disallowed_methods, reason = "only a process of its own can own a table")]
        let mut nft =
            Command::new("nft").args(["-i", "-e"]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        nft.stdin
            .as_mut()
            .unwrap()
            .write_all(b"add table inet orlop-proxy { flags owner; }\nadd chain inet orlop-proxy stolen\n")
            .unwrap();
        Thief { nft }
    }
}

#[test]
fn what_the_kernel_refuses_is_told_and_tried_again() {
    on_hosts(async |host: Host| {
        let obstacle = Obstacle::new(host.way);
        let pod = host.server("a").await;
        host.service("web", json!({"clusterIP": VIP, "ports": [{"port": 80}]}));
        host.endpoints("web", &[ready(pod.ips[0])]);
        let proxy = proxy::Proxy::start(host.config(), host.desired.clone()).unwrap();
        while host.event_reasons().is_empty() {
            tokio::task::yield_now().await;
        }
        assert_eq!(host.event_reasons()[0], "ServiceRulesFailed");
        obstacle.remove();
        proxy.settled().await;
        ask(&host.here, ip(VIP), 80).expect("the rules are there in the end");
    });
}

#[test]
fn a_change_of_mode_leaves_no_rule_and_closes_no_connection() {
    for before in Way::rules() {
        for after in Way::rules().into_iter().filter(|after| *after != before) {
            println!("from {before:?} to {after:?}");
            on_a_host(before, move |host| async move {
                let proxy = host.proxy().await;
                let (client, pod) = (host.pod("client").await, host.server("a").await);
                serve_udp(&pod.netns, "a");
                let ports =
                    json!([{"port": 80, "nodePort": NODE_PORT}, {"name": "udp", "port": 80, "protocol": "UDP"}]);
                host.service("web", json!({"type": "NodePort", "clusterIP": VIP, "ports": ports}));
                host.endpoints("web", &[ready(pod.ips[0])]);
                proxy.settled().await;
                let (mut inside, ..) = open(&client.netns, ip(VIP), 80).unwrap();
                let (mut outside, ..) = open(&host.outside, ip(HOST), NODE_PORT).unwrap();
                let datagrams = udp(&client.netns, 4000);
                assert_eq!(ask_udp(&datagrams, VIP, 80).unwrap(), "a");
                let flows =
                    || Socket::netfilter().unwrap().flows(false, |flow| flow.original.source_port == 4000).unwrap();
                let of_client: Vec<_> = flows().into_iter().map(|flow| (flow.original, flow.reply)).collect();
                proxy.stop().await;

                let mut config = host.config();
                after.set(&mut config);
                let proxy = proxy::Proxy::start(config, host.desired.clone()).unwrap();
                proxy.settled().await;
                assert!(is_alive(&mut inside) && is_alive(&mut outside));
                assert_eq!(ask_udp(&datagrams, VIP, 80).unwrap(), "a");
                assert_eq!(flows().into_iter().map(|flow| (flow.original, flow.reply)).collect::<Vec<_>>(), of_client);
                ask(&client.netns, ip(VIP), 80).expect("from a pod");
                ask(&host.outside, ip(HOST), NODE_PORT).expect("from outside");
                let ours: Vec<String> = left(before).into_iter().filter(|name| name != "orlop-net").collect();
                assert_eq!(ours, Vec::<String>::new(), "what the old mode had is gone");
                assert!(is_alive(&mut inside) && is_alive(&mut outside));
                proxy.cleanup().await.unwrap();
            });
        }
    }
}

/// What a mode may have left.
fn left_by(mode: Mode) -> Vec<String> {
    let link = |name: &'static str| Socket::route().unwrap().link(name).unwrap().map(|link| link.name);
    match mode {
        Mode::Nftables => tables().into_iter().filter(|name| name == "orlop-proxy").collect(),
        Mode::Ipvs => link("kube-ipvs0").into_iter().chain(crate::ipvs::services()).collect(),
        Mode::Userspace => link("orlop-services").into_iter().collect(),
        _ => Way::rules().into_iter().filter(|way| way.is_iptables()).flat_map(left).collect(),
    }
}

/// Those that this host can.
fn modes() -> Vec<Mode> {
    let can = |mode: &&Mode| match mode {
        Mode::Ipvs => crate::ipvs::is_there(),
        Mode::Iptables => Way::rules().iter().any(|way| way.is_iptables()),
        _ => true,
    };
    Mode::ALL.iter().filter(can).copied().collect()
}

/// Starts a proxy in a mode, with a Service that answers.
async fn serving(host: &Host, mode: Mode) -> proxy::Proxy {
    let config = proxy::Config { mode, ..host.config() };
    let proxy = proxy::Proxy::start(config, host.desired.clone()).unwrap();
    proxy.settled().await;
    ask(&host.here, ip(VIP), 80).unwrap_or_else(|error| panic!("{mode}: {error}"));
    proxy
}

async fn one_service(host: &Host) {
    let pod = host.server("a").await;
    host.service("web", json!({"clusterIP": VIP, "ports": [{"port": 80}]}));
    host.endpoints("web", &[ready(pod.ips[0])]);
}

#[test]
fn a_change_from_or_to_any_mode_leaves_nothing_of_the_old_one() {
    on_a_host(Way::Nftables, async |host| {
        one_service(&host).await;
        for before in modes() {
            for after in modes().into_iter().filter(|after| *after != before) {
                println!("from {before} to {after}");
                serving(&host, before).await.stop().await;
                let proxy = serving(&host, after).await;
                // IPVS has a table of nftables beside it.
                let shares = (before, after) == (Mode::Nftables, Mode::Ipvs);
                assert_eq!(left_by(before), if shares { vec!["orlop-proxy"] } else { Vec::new() });
                proxy.cleanup().await.unwrap();
                assert_eq!(left_by(after), [""; 0]);
            }
        }
    });
}

#[test]
fn a_cleanup_removes_what_any_mode_has_left() {
    on_a_host(Way::Nftables, async |host| {
        one_service(&host).await;
        let clean = || proxy::Proxy::remove_all_modes(&host.config());
        clean().expect("there is nothing");
        for mode in modes() {
            serving(&host, mode).await.stop().await;
            // The sockets of userspace end with it; its link stays for the next one.
            assert!(!left_by(mode).is_empty(), "{mode}");
            clean().unwrap_or_else(|errors| panic!("{mode}: {errors:?}"));
            for mode in modes() {
                assert_eq!(left_by(mode), [""; 0], "{mode}");
            }
        }
    });
}

/// Which kind of iptables has a proxy's chains after a start that was told nothing, in a host where something has been done.
#[track_caller]
fn check_kind(done: &'static [(Way, &'static str)], expect: Way) {
    on_a_host(Way::Nftables, move |host| async move {
        for (way, arguments) in done {
            way.iptables("", arguments);
        }
        let config = proxy::Config { mode: proxy::Mode::Iptables, ..host.config() };
        let proxy = proxy::Proxy::start(config, host.desired.clone()).unwrap();
        proxy.settled().await;
        for way in [Way::IptablesNft, Way::IptablesLegacy] {
            assert_eq!(left(way).iter().any(|chain| chain == "KUBE-SERVICES"), way == expect, "{done:?}, {way:?}");
        }
        proxy.stop().await;
    });
}

#[test]
fn the_kind_of_iptables_is_the_one_that_the_host_uses() {
    if Way::rules().len() < 3 {
        return println!("skipped: needs both kinds of iptables");
    }
    const HINT: &str = "-w -t mangle -N KUBE-KUBELET-CANARY";
    const RULE: &str = "-w -A FORWARD -s 192.0.2.99";
    check_kind(&[], Way::IptablesNft);
    check_kind(&[(Way::IptablesLegacy, HINT)], Way::IptablesLegacy);
    check_kind(&[(Way::IptablesLegacy, HINT), (Way::IptablesNft, HINT)], Way::IptablesNft);
    check_kind(&[(Way::IptablesLegacy, RULE)], Way::IptablesLegacy);
    check_kind(&[(Way::IptablesLegacy, RULE), (Way::IptablesNft, RULE)], Way::IptablesNft);
}

#[test]
fn a_change_waits_for_who_holds_the_lock_of_iptables() {
    if !Way::rules().contains(&Way::IptablesLegacy) {
        return println!("skipped: needs iptables-legacy-restore");
    }
    on_a_host(Way::IptablesLegacy, async |host: Host| {
        let proxy = host.proxy().await;
        let pod = host.server("a").await;
        let lock = std::fs::File::create("/run/xtables.lock").unwrap();
        lock.lock().unwrap();
        host.service("web", json!({"clusterIP": VIP, "ports": [{"port": 80}]}));
        host.endpoints("web", &[ready(pod.ips[0])]);
        // That nothing is written can only be seen by waiting.
        let early = tokio::time::timeout(Duration::from_millis(300), proxy.settled()).await;
        assert!(early.is_err(), "somebody else is at work");
        drop(lock);
        proxy.settled().await;
        ask(&host.here, ip(VIP), 80).expect("the change has waited");
    });
}
