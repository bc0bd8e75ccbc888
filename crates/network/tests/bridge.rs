//! The built-in bridge with real connections, each test in a network namespace of its own that stands for the host.
//!
//! ```text
//! outside 192.0.2.2 ── up0 192.0.2.1 host orlop0 ── pods
//! ```

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]
#![allow(clippy::disallowed_methods, reason = "it starts ip and nft")]

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use network::{AttachRequest, Attachment, Config, LiveSandbox, Network, NetworkError, PortMapping, Protocol};
use sys::netlink::route::{Route, VethPair};
use sys::netlink::{Socket, Writer};
use sys::netns;

const HOST: &str = "192.0.2.1";
const PATIENCE: Duration = Duration::from_secs(10);

/// Runs a test on a thread of its own in a private host namespace.
fn on_a_host<F: Future<Output = ()>>(test: impl FnOnce(Host) -> F + Send + 'static) {
    let run = move || {
        if let Err(error) = testkit::netns::enter_private() {
            println!("skipped: needs CAP_SYS_ADMIN for a network namespace ({error:#})");
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test(Host::new()));
    };
    std::thread::spawn(run).join().unwrap();
}

struct Host {
    dir: tempfile::TempDir,
    here: OwnedFd,
    outside: OwnedFd,
}

impl Host {
    fn new() -> Host {
        let (outside, mut theirs) = netns::create(|| Ok(Socket::route()?)).unwrap();
        let mut ours = Socket::route().unwrap();
        let mut setup = Writer::new();
        setup.create_veth(&VethPair {
            name: "up0",
            master: 0,
            mtu: 1400,
            peer: "eth0",
            peer_mac: None,
            peer_netns: outside.as_fd(),
        });
        ours.request(&setup).unwrap();
        let mut setup = Writer::new();
        let up = ours.link("up0").unwrap().unwrap().index;
        setup.add_address(up, HOST.parse().unwrap(), 24);
        setup.add_address(up, "2001:db8::1".parse().unwrap(), 64);
        setup.add_route(&Route { gateway: Some("192.0.2.2".parse().unwrap()), interface: up, ..Route::default() });
        ours.request(&setup).unwrap();
        let mut setup = Writer::new();
        let eth0 = theirs.link("eth0").unwrap().unwrap().index;
        setup.set_up(1);
        setup.set_up(eth0);
        setup.add_address(eth0, "192.0.2.2".parse().unwrap(), 24);
        setup.add_address(eth0, "2001:db8::2".parse().unwrap(), 64);
        theirs.request(&setup).unwrap();
        Host { dir: tempfile::tempdir().unwrap(), here: netns::current().unwrap(), outside }
    }

    fn config(&self) -> Config {
        let mut config = Config::new(self.dir.path().join("network"));
        config.cni_conf_dir = self.dir.path().join("no-cni");
        config.subnets.push("fd00:85::/64".parse().unwrap());
        config
    }

    async fn network(&self, live: &[&str]) -> Arc<Network> {
        let network = Network::new(self.config()).unwrap();
        let live = live.iter().map(|id| LiveSandbox { sandbox_id: (*id).to_owned(), netns: None }).collect();
        network.adopt(live).await.unwrap();
        network
    }
}

fn request(id: &str, ports: &[(Protocol, u16, u16)]) -> AttachRequest {
    let mapping = |(protocol, host_port, container_port): &(Protocol, u16, u16)| PortMapping {
        protocol: *protocol,
        host_port: *host_port,
        container_port: *container_port,
        host_ip: None,
    };
    AttachRequest {
        sandbox_id: id.to_owned(),
        port_mappings: ports.iter().map(mapping).collect(),
        ..AttachRequest::default()
    }
}

/// A TCP server that answers with the address of who asks.
fn serve(netns: &OwnedFd, port: u16) {
    let listener = netns::run_in(netns.as_fd(), || TcpListener::bind(("::", port))).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let peer = stream.peer_addr().map(|peer| peer.ip().to_canonical().to_string()).unwrap_or_default();
            let _ = stream.write_all(peer.as_bytes());
        }
    });
}

fn ask(netns: &OwnedFd, server: impl Into<IpAddr>, port: u16) -> io::Result<String> {
    let server = SocketAddr::new(server.into(), port);
    let mut stream = netns::run_in(netns.as_fd(), || TcpStream::connect_timeout(&server, PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn unowned(owned: &[network::Owned]) -> Vec<&network::Owned> {
    owned.iter().filter(|owned| owned.owner.is_none()).collect()
}

#[test]
fn pods_host_and_outside_reach_each_other() {
    on_a_host(async |host| {
        let network = host.network(&[]).await;
        let a = network.attach(request("a", &[])).await.unwrap();
        let b = network.attach(request("b", &[])).await.unwrap();
        assert_eq!((a.interface.as_str(), a.mtu), ("eth0", Some(1400)), "the MTU of the default route's link");
        serve(&b.netns, 80);
        for (index, gateway) in ["10.85.0.1", "fd00:85::1"].into_iter().enumerate() {
            assert_eq!(ask(&a.netns, b.ips[index], 80).unwrap(), a.ips[index].to_string(), "from pod to pod");
            assert_eq!(ask(&b.netns, b.ips[index], 80).unwrap(), b.ips[index].to_string(), "within the pod");
            assert_eq!(ask(&host.here, b.ips[index], 80).unwrap(), gateway, "from host to pod");
        }
        assert_eq!(ask(&b.netns, ip("127.0.0.1"), 80).unwrap(), "127.0.0.1", "loopback is up");
        serve(&host.outside, 80);
        assert_eq!(ask(&a.netns, ip("192.0.2.2"), 80).unwrap(), HOST, "the world sees the host");
        assert_eq!(ask(&a.netns, ip("2001:db8::2"), 80).unwrap(), "2001:db8::1");
        serve(&host.here, 81);
        assert_eq!(ask(&a.netns, ip("10.85.0.1"), 81).unwrap(), a.ips[0].to_string(), "from pod to host");
        let stats = network.stats("b").await.unwrap();
        assert!(stats[0].rx_packets > 5 && stats[0].tx_packets > 5, "{stats:?}");
        assert!(network.stats("unknown").await.unwrap().is_empty());
        network.shutdown().await.unwrap();
    });
}

#[test]
fn pods_keep_their_addresses_on_the_way_to_another_nodes_pods() {
    on_a_host(async |host| {
        let config = Config { cluster: vec!["10.80.0.0/12".parse().unwrap()], ..host.config() };
        let network = Network::new(config).unwrap();
        network.adopt(Vec::new()).await.unwrap();
        let mut theirs = netns::run_in(host.outside.as_fd(), || Ok(Socket::route()?)).unwrap();
        let mut setup = Writer::new();
        setup.add_address(1, ip("10.86.0.1"), 32);
        let eth0 = theirs.link("eth0").unwrap().unwrap().index;
        let back = Some((ip("10.85.0.0"), 16));
        setup.add_route(&Route { destination: back, gateway: Some(ip(HOST)), interface: eth0, ..Route::default() });
        theirs.request(&setup).unwrap();
        serve(&host.outside, 80);
        let pod = network.attach(request("a", &[])).await.unwrap();
        assert_eq!(ask(&pod.netns, ip("10.86.0.1"), 80).unwrap(), pod.ips[0].to_string());
        assert_eq!(ask(&pod.netns, ip("192.0.2.2"), 80).unwrap(), HOST, "what is no pod sees the node");
    });
}

#[test]
fn host_ports_lead_to_the_pod_from_everywhere() {
    on_a_host(check_host_ports);
}

#[test]
fn host_ports_do_not_need_bridge_netfilter() {
    on_a_host(async |host| {
        let switch = "/proc/sys/net/bridge/bridge-nf-call-iptables";
        if std::fs::read_to_string(switch).is_ok_and(|value| value.trim() == "1") {
            std::fs::write(switch, "0").unwrap();
            std::fs::write(switch.replace("iptables", "ip6tables"), "0").unwrap();
        }
        check_host_ports(host).await;
    });
}

async fn check_host_ports(host: Host) {
    let network = host.network(&[]).await;
    let server = network.attach(request("server", &[(Protocol::Tcp, 8080, 80)])).await.unwrap();
    let other = network.attach(request("other", &[])).await.unwrap();
    serve(&server.netns, 80);
    assert_eq!(ask(&host.outside, ip(HOST), 8080).unwrap(), "192.0.2.2", "the client's address is kept");
    assert_eq!(ask(&host.outside, ip("2001:db8::1"), 8080).unwrap(), "2001:db8::2");
    ask(&host.here, ip(HOST), 8080).expect("from the host");
    assert_eq!(ask(&host.here, ip("127.0.0.1"), 8080).unwrap(), "10.85.0.1", "from the host's loopback");
    assert_eq!(ask(&other.netns, ip(HOST), 8080).unwrap(), other.ips[0].to_string());
    assert_eq!(ask(&server.netns, ip(HOST), 8080).unwrap(), "10.85.0.1", "to itself, through the host");

    let clash = network.attach(request("clash", &[(Protocol::Tcp, 8080, 81)])).await.unwrap_err();
    assert!(matches!(&clash, NetworkError::PortTaken { port: 8080, owner, .. } if owner == "server"), "{clash}");
    network.attach(request("udp", &[(Protocol::Udp, 8080, 80)])).await.expect("another protocol");
    let twice = network.attach(request("server", &[])).await.unwrap_err();
    assert!(matches!(twice, NetworkError::AlreadyAttached(_)));

    network.detach("server").await.unwrap();
    network.detach("server").await.unwrap();
    let refused = ask(&host.outside, ip(HOST), 8080).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    let next = network.attach(request("next", &[(Protocol::Tcp, 8080, 80)])).await.unwrap();
    serve(&next.netns, 80);
    ask(&host.outside, ip(HOST), 8080).expect("the port is free again");
    network.shutdown().await.unwrap();
}

/// A bridge drops what comes from a port of whose link the kernel has not taken notice yet: a pod would wait a second for its
/// first connection.
#[test]
fn what_a_pod_says_first_arrives() {
    on_a_host(async |host| {
        let network = host.network(&[]).await;
        let service = netns::run_in(host.here.as_fd(), || UdpSocket::bind("0.0.0.0:5300")).unwrap();
        service.set_read_timeout(Some(PATIENCE)).unwrap();
        for number in 0..40_u8 {
            let pod = network.attach(request(&format!("pod-{number}"), &[])).await.unwrap();
            let say = || UdpSocket::bind("0.0.0.0:0")?.send_to(&[number], "10.85.0.1:5300");
            netns::run_in(pod.netns.as_fd(), say).unwrap();
            let mut heard = [0];
            service.recv_from(&mut heard).unwrap();
            assert_eq!(heard, [number]);
        }
        network.shutdown().await.unwrap();
    });
}

/// To answer on 127.0.0.1 the host routes packets to and from there; a pod that sends some gets nowhere (CVE-2020-8558).
#[test]
fn the_hosts_loopback_is_closed_to_pods() {
    on_a_host(async |host| {
        let network = host.network(&[]).await;
        let pod = network.attach(request("pod", &[(Protocol::Tcp, 8080, 80)])).await.unwrap();
        let service = netns::run_in(host.here.as_fd(), || UdpSocket::bind("0.0.0.0:5300")).unwrap();
        service.set_read_timeout(Some(PATIENCE)).unwrap();
        let ip = |words: &str| testkit::host::run(Command::new("ip").args(words.split(' ')));
        let there = || {
            ip("route del local 127.0.0.0/8 dev lo table local").map_err(io::Error::other)?;
            ip("route add 127.0.0.9/32 via 10.85.0.1 dev eth0 onlink").map_err(io::Error::other)?;
            UdpSocket::bind("0.0.0.0:0")
        };
        let sender = netns::run_in(pod.netns.as_fd(), there).unwrap();
        // Both go the same way, so the first that is let through is the first to come.
        let first = || {
            sender.send_to(b"loopback", "127.0.0.9:5300").unwrap();
            sender.send_to(b"address", "10.85.0.1:5300").unwrap();
            let mut buffer = [0; 16];
            let (length, _) = service.recv_from(&mut buffer).unwrap();
            String::from_utf8(buffer[..length].to_vec()).unwrap()
        };
        assert_eq!(first(), "address");
        let nft = |words: &str| {
            let run = || testkit::host::run(Command::new("nft").args(words.split(' '))).map_err(io::Error::other);
            netns::run_in(host.here.as_fd(), run).unwrap();
        };
        nft("flush chain inet orlop-net guard");
        assert_eq!(first(), "loopback", "without the guard it would be open");
        service.recv_from(&mut [0; 16]).unwrap();
        nft("flush ruleset");
        network.attach(request("next", &[])).await.unwrap();
        assert_eq!(first(), "address", "the next pod finds it missing");
        serve(&pod.netns, 80);
        ask(&host.outside, self::ip(HOST), 8080).expect("the host ports are there again");
        network.shutdown().await.unwrap();
    });
}

/// Nor does it get anywhere as the host's loopback, though the host takes its own addresses for those of others.
#[test]
fn no_pod_passes_for_the_hosts_loopback() {
    on_a_host(async |host| {
        let network = host.network(&[]).await;
        let pod = network.attach(request("pod", &[])).await.unwrap();
        std::fs::write("/proc/sys/net/ipv4/conf/orlop0/accept_local", "1").unwrap();
        let service = netns::run_in(host.here.as_fd(), || UdpSocket::bind("0.0.0.0:5300")).unwrap();
        service.set_read_timeout(Some(PATIENCE)).unwrap();
        let there = || {
            std::fs::write("/proc/sys/net/ipv4/conf/eth0/route_localnet", "1")?;
            Ok((UdpSocket::bind("127.0.0.9:0")?, UdpSocket::bind("0.0.0.0:0")?))
        };
        let (as_loopback, as_itself) = netns::run_in(pod.netns.as_fd(), there).unwrap();
        // Nobody answers who asks in the name of loopback where the host is: the way has to be known.
        as_itself.send_to(b"way", "10.85.0.1:5300").unwrap();
        service.recv_from(&mut [0; 16]).unwrap();
        let first = || {
            as_loopback.send_to(b"loopback", "10.85.0.1:5300").unwrap();
            as_itself.send_to(b"address", "10.85.0.1:5300").unwrap();
            let mut buffer = [0; 16];
            let (length, _) = service.recv_from(&mut buffer).unwrap();
            String::from_utf8(buffer[..length].to_vec()).unwrap()
        };
        assert_eq!(first(), "address");
        let open = || testkit::host::run(Command::new("nft").args(["flush", "chain", "inet", "orlop-net", "guard"]));
        netns::run_in(host.here.as_fd(), || open().map_err(io::Error::other)).unwrap();
        assert_eq!(first(), "loopback", "without the guard it would be taken");
        network.shutdown().await.unwrap();
    });
}

#[test]
fn a_host_port_leaves_the_other_loopback_addresses_to_the_host() {
    on_a_host(async |host| {
        let network = host.network(&[]).await;
        let named =
            PortMapping { protocol: Protocol::Tcp, host_port: 54, container_port: 80, host_ip: Some(ip("127.0.0.2")) };
        let mut ports = request("pod", &[(Protocol::Tcp, 53, 80)]);
        ports.port_mappings.push(named);
        let pod = network.attach(ports).await.unwrap();
        serve(&pod.netns, 80);
        let resolver = TcpListener::bind("127.0.0.53:53").unwrap();
        std::thread::spawn(move || {
            for stream in resolver.incoming() {
                let _ = stream.map(|mut stream| stream.write_all(b"resolver"));
            }
        });
        assert_eq!(ask(&host.here, ip("127.0.0.53"), 53).unwrap(), "resolver");
        assert_eq!(ask(&host.here, ip("127.0.0.1"), 53).unwrap(), "10.85.0.1", "the pod");
        assert_eq!(ask(&host.here, ip("127.0.0.2"), 54).unwrap(), "10.85.0.1", "the pod, by an address that it names");
        let refused = ask(&host.here, ip("127.0.0.2"), 53).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused, "nobody is there");
        network.shutdown().await.unwrap();
    });
}

#[test]
fn a_udp_sender_follows_the_host_port() {
    on_a_host(async |host| {
        let network = host.network(&[]).await;
        let client = netns::run_in(host.outside.as_fd(), || UdpSocket::bind("0.0.0.0:0")).unwrap();
        client.set_read_timeout(Some(PATIENCE / 50)).unwrap();
        for id in ["first", "second"] {
            let pod = network.attach(request(id, &[(Protocol::Udp, 5353, 53)])).await.unwrap();
            let server = netns::run_in(pod.netns.as_fd(), || UdpSocket::bind("0.0.0.0:53")).unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 16];
                while let Ok((length, peer)) = server.recv_from(&mut buffer) {
                    server.send_to(&buffer[..length], peer).unwrap();
                }
            });
            // As resolvers do: a new link may lose a datagram.
            let answered = (0..50).any(|_| {
                client.send_to(id.as_bytes(), (HOST, 5353)).unwrap();
                let mut buffer = [0; 16];
                let answers =
                    std::iter::from_fn(|| client.recv_from(&mut buffer).ok().map(|(n, _)| buffer[..n].to_vec()));
                answers.into_iter().any(|answer| answer == id.as_bytes())
            });
            assert!(answered, "{id}");
            network.detach(id).await.unwrap();
        }
        network.shutdown().await.unwrap();
    });
}

#[test]
fn a_restart_adopts_what_lives_and_removes_the_rest() {
    on_a_host(async |host| {
        let network = host.network(&[]).await;
        let ports = [(Protocol::Tcp, 8080, 80)];
        let lives = network.attach(request("lives", &ports)).await.unwrap();
        let dead = network.attach(request("dead", &[(Protocol::Tcp, 8081, 80)])).await.unwrap();
        serve(&lives.netns, 80);
        let mut open = netns::run_in(host.outside.as_fd(), || TcpStream::connect((HOST, 8080))).unwrap();
        drop(network);
        drop(dead.netns);

        let network = host.network(&["lives"]).await;
        let mut answer = String::new();
        open.read_to_string(&mut answer).expect("an open connection goes on");
        ask(&host.outside, ip(HOST), 8080).expect("the host port is still there");
        let clash = network.attach(request("x", &ports)).await.unwrap_err();
        assert!(matches!(clash, NetworkError::PortTaken { .. }));
        let next = network.attach(request("next", &[(Protocol::Tcp, 8081, 80)])).await.unwrap();
        assert_ne!(next.ips, lives.ips);
        let owned = network.fsck().await.unwrap();
        assert!(unowned(&owned).is_empty(), "{owned:?}");
        let records: Vec<_> = owned.iter().filter(|o| o.kind == "record").map(|o| o.name.as_str()).collect();
        assert_eq!(
            {
                let mut r = records;
                r.sort_unstable();
                r
            },
            ["lives", "next"]
        );
        for id in ["lives", "next"] {
            network.detach(id).await.unwrap();
        }
        network.shutdown().await.unwrap();
        assert_eq!(network.fsck().await.unwrap(), []);
        let links = Socket::route().unwrap().links().unwrap();
        assert_eq!(links.iter().filter(|link| link.kind == "veth").count(), 1, "only up0 is left: {links:?}");
    });
}

#[test]
fn nothing_is_made_behind_a_shutdown() {
    on_a_host(async |host| {
        for _ in 0..30 {
            let network = host.network(&[]).await;
            network.attach(request("a", &[])).await.unwrap();
            network.detach("a").await.unwrap();
            network.shutdown().await.unwrap();
            let links = Socket::route().unwrap().links().unwrap();
            assert_eq!(links.iter().filter(|link| link.kind == "veth").count(), 1, "only up0 is left: {links:?}");
        }
    });
}

#[test]
fn a_bridge_that_was_empty_keeps_its_mtu() {
    on_a_host(async |host| {
        let network = Network::new(Config { prepared_slots: 0, ..host.config() }).unwrap();
        network.adopt(Vec::new()).await.unwrap();
        for id in ["first", "second"] {
            let pod = network.attach(request(id, &[])).await.unwrap();
            assert_eq!(pod.mtu, Some(1400), "{id}");
            // Its link is gone with its namespace and with the sandbox, whichever comes first.
            network.detach(id).await.unwrap();
            drop(pod);
            while Socket::route().unwrap().links().unwrap().iter().any(|link| link.name.starts_with("veth")) {
                std::thread::yield_now();
            }
        }
        network.shutdown().await.unwrap();
    });
}

#[test]
fn many_at_once_get_addresses_of_their_own() {
    on_a_host(async |host| {
        let network = host.network(&[]).await;
        let mut tasks = tokio::task::JoinSet::new();
        for n in 0..40 {
            let network = network.clone();
            tasks.spawn(async move { network.attach(request(&format!("pod{n}"), &[])).await.unwrap() });
        }
        let attachments: Vec<Attachment> = tasks.join_all().await;
        let addresses: std::collections::HashSet<_> = attachments.iter().map(|a| a.ips.clone()).collect();
        assert_eq!(addresses.len(), 40);
        for n in 0..40 {
            network.detach(&format!("pod{n}")).await.unwrap();
        }
        network.shutdown().await.unwrap();
        assert_eq!(network.fsck().await.unwrap(), []);
    });
}

#[test]
fn a_namespace_of_the_callers_own_is_joined() {
    on_a_host(async |host| {
        let network = host.network(&[]).await;
        let (theirs, ()) = netns::create(|| Ok(())).unwrap();
        let copy = theirs.try_clone().unwrap();
        let attached = network.attach(AttachRequest { netns: Some(theirs), ..request("own", &[]) }).await.unwrap();
        serve(&copy, 80);
        ask(&host.here, attached.ips[0], 80).unwrap();
        network.shutdown().await.unwrap();
    });
}

#[test]
fn the_name_servers_address_and_the_route_of_services_are_on_the_bridge() {
    on_a_host(|host| async move {
        let mut config = host.config();
        config.addresses = vec![ip("10.96.0.10")];
        config.routed = vec!["10.96.0.0/16".parse().unwrap()];
        let network = Network::new(config).unwrap();
        network.adopt(Vec::new()).await.unwrap();
        let pod = network.attach(request("a", &[])).await.unwrap();
        serve(&host.here, 7053);
        assert_eq!(ask(&pod.netns, ip("10.96.0.10"), 7053).unwrap(), pod.ips[0].to_string());
        // A socket that asks for a service leaves by the bridge, with the host's address there.
        let socket = UdpSocket::bind(("0.0.0.0", 0)).unwrap();
        socket.connect((ip("10.96.7.7"), 9)).unwrap();
        assert_eq!(socket.local_addr().unwrap().ip(), ip("10.85.0.1"));
        network.detach("a").await.unwrap();
        network.shutdown().await.unwrap();
    });
}

#[test]
fn a_network_may_have_ipv6_only() {
    on_a_host(async |host| {
        let mut config = host.config();
        config.subnets = vec!["fd00:85::/64".parse().unwrap()];
        config.addresses = vec!["fd00:96::a".parse().unwrap()];
        let network = Network::new(config).unwrap();
        network.adopt(Vec::new()).await.unwrap();
        let a = network.attach(request("a", &[])).await.unwrap();
        let b = network.attach(request("b", &[(Protocol::Tcp, 8080, 80)])).await.unwrap();
        assert_eq!((a.ips.len(), b.ips[0].is_ipv6()), (1, true));
        serve(&b.netns, 80);
        serve(&host.outside, 80);
        serve(&host.here, 53);
        assert_eq!(ask(&a.netns, b.ips[0], 80).unwrap(), a.ips[0].to_string(), "from pod to pod");
        assert_eq!(ask(&a.netns, ip("2001:db8::2"), 80).unwrap(), "2001:db8::1", "the world sees the host");
        assert_eq!(ask(&a.netns, ip("fd00:96::a"), 53).unwrap(), a.ips[0].to_string(), "the host's further address");
        assert_eq!(ask(&host.outside, ip("2001:db8::1"), 8080).unwrap(), "2001:db8::2", "through a host port");
        network.shutdown().await.unwrap();
    });
}
