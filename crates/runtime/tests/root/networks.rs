//! What clients ask of a pod's network, and are told of the node's.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::time::Duration;

use cri::{RuntimeService as _, v1};
use testkit::pace;
use testkit::serial::Test;

use crate::fixture::{Ground, Node, run, script_config, zygote};

pub(crate) const TESTS: &[Test] = &[
    ("a_pod_has_both_families_and_ports_of_the_host", both_families_and_host_ports),
    ("a_broken_network_configuration_is_told", broken_network_configuration),
];

/// Answers each connection.
const SERVER: &str = "echo page > /tmp/index.html; exec httpd -f -p 8080 -h /tmp";

/// A socket for packets in a pod's network: busybox has no server for such.
async fn listen_inside(node: &Node, sandbox: &str, port: u16) -> UdpSocket {
    let request = v1::PodSandboxStatusRequest { pod_sandbox_id: sandbox.to_owned(), verbose: true };
    let status = node.runtime.pod_sandbox_status(request).await.unwrap();
    let info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
    let namespace = std::fs::File::open(format!("/proc/{}/ns/net", info["pid"])).unwrap();
    sys::netns::run_in(namespace.as_fd(), || UdpSocket::bind(("0.0.0.0", port))).unwrap()
}

fn both_families_and_host_ports() {
    let ground = Ground::new();
    let mut network = network::Config::new(ground.places.run.join("network"));
    network.subnets.push("fd85::/64".parse().unwrap());
    network.cni_conf_dir = ground.places.run.join("no-cni");
    let zygote = zygote();
    run(async {
        let node = Node::start_on(network, &ground.places, zygote).await;
        let mapping = |protocol: v1::Protocol, container_port, host_port, host_ip: &str| v1::PortMapping {
            protocol: protocol.into(),
            container_port,
            host_port,
            host_ip: host_ip.to_owned(),
        };
        let mut config = node.sandbox_config("both");
        config.port_mappings = vec![
            mapping(v1::Protocol::Tcp, 8080, 18080, ""),
            mapping(v1::Protocol::Tcp, 8080, 18081, "127.0.0.1"),
            mapping(v1::Protocol::Udp, 9090, 19090, ""),
            // No port of the host is no mapping.
            mapping(v1::Protocol::Tcp, 8080, 0, ""),
        ];
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let container = node.create(&sandbox, &config, script_config("main", SERVER)).await.unwrap();
        node.start_container(&container).await.unwrap();
        let network = node.sandbox_status(&sandbox).await.network.unwrap();
        let second = &network.additional_ips[..];
        assert!(
            network.ip.starts_with("10.85.") && second.len() == 1 && second[0].ip.starts_with("fd85:"),
            "{network:?}"
        );
        let inside = [&network.ip, &second[0].ip].map(|ip| SocketAddr::new(ip.parse::<IpAddr>().unwrap(), 8080));
        let outside =
            ["10.85.0.1:18080", "127.0.0.1:18080", "127.0.0.1:18081", "[fd85::1]:18080"].map(|a| a.parse().unwrap());
        let socket = listen_inside(&node, &sandbox, 9090).await;
        let asked = tokio::task::spawn_blocking(move || {
            inside.into_iter().chain(outside).for_each(page);
            packet("10.85.0.1:19090".parse().unwrap(), &socket);
            // That one is for loopback alone.
            TcpStream::connect_timeout(&"10.85.0.1:18081".parse().unwrap(), Duration::from_secs(5)).unwrap_err();
        });
        asked.await.unwrap();
        // The next pod cannot have a port that is taken.
        let mut other = node.sandbox_config("other");
        other.port_mappings = vec![mapping(v1::Protocol::Tcp, 80, 18080, "")];
        let error = node.run_sandbox(&other).await.unwrap_err().to_string();
        assert!(error.contains("18080"), "{error}");
        node.down().await;
    });
}

/// Asks until the server is there.
fn page(address: SocketAddr) {
    let begun = std::time::Instant::now();
    loop {
        let answer = TcpStream::connect(address).and_then(|mut stream| {
            stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
            let mut text = String::new();
            stream.read_to_string(&mut text).map(|_| text)
        });
        match answer {
            Ok(text) if text.ends_with("page\n") => return,
            other => assert!(begun.elapsed() < pace::stretched(Duration::from_secs(30)), "{address}: {other:?}"),
        }
        std::thread::yield_now();
    }
}

/// There and back.
fn packet(address: SocketAddr, server: &UdpSocket) {
    let client = UdpSocket::bind("0.0.0.0:0").unwrap();
    for socket in [&client, server] {
        socket.set_read_timeout(Some(pace::stretched(Duration::from_secs(30)))).unwrap();
    }
    let mut buffer = [0; 64];
    client.send_to(b"who?", address).unwrap();
    let (count, from) = server.recv_from(&mut buffer).unwrap();
    assert_eq!(&buffer[..count], b"who?");
    server.send_to(b"me", from).unwrap();
    let (count, from) = client.recv_from(&mut buffer).unwrap();
    assert_eq!((&buffer[..count], from), (&b"me"[..], address));
}

fn broken_network_configuration() {
    let ground = Ground::new();
    let mut network = network::Config::new(ground.places.run.join("network"));
    let dir = ground.places.run.parent().unwrap().join("cni");
    std::fs::create_dir(&dir).unwrap();
    std::fs::write(dir.join("10-net.conflist"), r#"{"cniVersion": "1.0.0", "name": "net", "plugins": [{}]}"#).unwrap();
    (network.cni_conf_dir, network.cni_bin_dirs) = (dir.clone(), vec![dir.clone()]);
    let zygote = zygote();
    run(async {
        let node = Node::start_on(network, &ground.places, zygote).await;
        let condition = async || {
            let status = node.runtime.status(v1::StatusRequest::default()).await.unwrap().status.unwrap();
            let conditions = status.conditions;
            assert!(conditions.iter().any(|one| one.r#type == "RuntimeReady" && one.status));
            conditions.into_iter().find(|one| one.r#type == "NetworkReady").unwrap()
        };
        let told = condition().await;
        assert_eq!((told.status, told.reason.as_str()), (false, "NetworkPluginNotReady"));
        assert!(told.message.contains("10-net.conflist"), "{}", told.message);
        // Pods may be on the network that it was: nobody goes over to another one unasked.
        std::fs::remove_file(dir.join("10-net.conflist")).unwrap();
        let told = condition().await;
        assert!(!told.status && told.message.contains("has vanished"), "{}", told.message);
        node.down().await;
    });
}
