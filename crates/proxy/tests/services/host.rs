//! A host of its own for each test, with pods on the built-in bridge and a world outside:
//!
//! ```text
//! outside 192.0.2.2 ── up0 192.0.2.1 ┐
//!                                    host ── orlop0 10.85.0.1 ── pods
//! far 203.0.113.2 ── up1 203.0.113.1 ┘
//! ```

use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use cluster::k8s_openapi::api::core::v1::{Event, Node, NodeStatus, PodStatus, Service};
use cluster::k8s_openapi::api::discovery::v1::EndpointSlice;
use cluster::{Key, Source, SourceError, Store};
use network::{AttachRequest, Attachment, Network};
use proxy::configuration::DetectLocal;
use proxy::{Config, IptablesKind, Mode, Proxy};
use serde_json::{Value, json};
use sys::netlink::route::{Route, VethPair};
use sys::netlink::{Socket, Writer};
use sys::netns;

pub(crate) const NODE: &str = "here";
pub(crate) const HOST: &str = "192.0.2.1";
pub(crate) const OUTSIDE: &str = "192.0.2.2";
pub(crate) const FAR: &str = "203.0.113.2";
/// How long something may take that is to happen. Never waited for in full by a test that passes.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

/// How rules are carried out in a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Nftables,
    IptablesNft,
    IptablesLegacy,
    Ipvs,
}

impl Way {
    const ALL: [Way; 3] = [Way::Nftables, Way::IptablesNft, Way::IptablesLegacy];

    /// Those that this host can, but IPVS: it ends connections when it is left. The virtual machine has no programs of
    /// iptables.
    pub(crate) fn rules() -> Vec<Way> {
        let has = |program| testkit::host::find(program).is_some();
        let can = |way: &Way| match way {
            Way::IptablesNft => has("iptables-nft-restore"),
            Way::IptablesLegacy => has("iptables-legacy-restore"),
            _ => true,
        };
        let (can, cannot): (Vec<Way>, Vec<Way>) = Way::ALL.into_iter().partition(can);
        if !cannot.is_empty() && !testkit::host::is_own_machine() {
            println!("skipped: needs the programs of iptables for {cannot:?}");
        }
        can
    }

    /// All that this host can. IPVS is tested in the virtual machine, whose kernel has it.
    fn all() -> Vec<Way> {
        Way::rules().into_iter().chain(crate::ipvs::is_there().then_some(Way::Ipvs)).collect()
    }

    pub(crate) fn is_iptables(self) -> bool {
        matches!(self, Way::IptablesNft | Way::IptablesLegacy)
    }

    /// What this host's own server sees of this host as a client of a Service: IPVS makes the Service's address local.
    pub(crate) fn host_itself(self, service: &str) -> IpAddr {
        ip(if self == Way::Ipvs { service } else { HOST })
    }

    /// What a pod of this node sees of a client that is no pod and comes to an address for the outside, or of this node.
    /// nftables keeps the client's address where answers come back through this node anyway; iptables masquerades, as
    /// upstream does.
    pub(crate) fn seen(self, client: &str) -> IpAddr {
        // With IPVS this host comes from the Service's own address, which has to be masqueraded.
        let masquerades = self.is_iptables() || self == Way::Ipvs && client == HOST;
        ip(if masquerades { "10.85.0.1" } else { client })
    }

    /// Runs a program of iptables of this kind, in the calling thread's network namespace: `-save`, or none of them.
    pub(crate) fn iptables(self, verb: &str, arguments: &str) -> String {
        let kind = if self == Way::IptablesLegacy { "legacy" } else { "nft" };
        #[expect(clippy::disallowed_methods, reason = "what another program makes or lists is the point")]
        let mut command = std::process::Command::new(format!("iptables-{kind}{verb}"));
        let output = testkit::host::output(command.args(arguments.split_whitespace())).unwrap();
        String::from_utf8(output).unwrap()
    }

    pub(crate) fn set(self, config: &mut Config) {
        (config.mode, config.iptables.kind) = match self {
            Way::Nftables => (Mode::Nftables, IptablesKind::AsFound),
            Way::IptablesNft => (Mode::Iptables, IptablesKind::Nft),
            Way::IptablesLegacy => (Mode::Iptables, IptablesKind::Legacy),
            Way::Ipvs => (Mode::Ipvs, IptablesKind::AsFound),
        };
    }
}

/// Runs a test in each way, each time on a thread of its own in a private host namespace.
pub(crate) fn on_hosts<F: Future<Output = ()>>(test: impl Fn(Host) -> F + Copy + Send + 'static) {
    for way in Way::all() {
        println!("{way:?}");
        on_a_host(way, test);
    }
}

/// Runs a test on a thread of its own in a private host namespace.
pub(crate) fn on_a_host<F: Future<Output = ()>>(way: Way, test: impl FnOnce(Host) -> F + Send + 'static) {
    let run = move || {
        if let Err(error) = testkit::netns::enter_private() {
            println!("skipped: needs CAP_SYS_ADMIN for a network namespace ({error:#})");
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async { test(Host::new(way).await).await });
    };
    std::thread::spawn(run).join().unwrap();
}

/// What is desired, and the events about it.
#[derive(Debug, Default)]
pub(crate) struct Desired {
    store: Store,
    events: Mutex<Vec<Event>>,
}

#[async_trait]
impl Source for Desired {
    fn store(&self) -> &Store {
        &self.store
    }
    async fn update_pod_status(&self, uid: &str, _status: PodStatus) -> Result<(), SourceError> {
        Err(SourceError::NotFound { kind: "Pod", name: uid.into() })
    }
    async fn delete_pod(&self, _uid: &str) -> Result<(), SourceError> {
        Ok(())
    }
    async fn request_deletion(&self, uid: &str, _grace_period_s: Option<i64>) -> Result<(), SourceError> {
        Err(SourceError::NotFound { kind: "Pod", name: uid.into() })
    }
    async fn update_node_status(&self, name: &str, _status: NodeStatus) -> Result<(), SourceError> {
        Err(SourceError::NotFound { kind: "Node", name: name.into() })
    }
    fn event(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }
}

/// An endpoint as a slice has it.
#[derive(Debug, Clone)]
pub(crate) struct End {
    pub(crate) address: IpAddr,
    pub(crate) node: &'static str,
    pub(crate) ready: bool,
    pub(crate) terminating: bool,
    pub(crate) pod_uid: Option<&'static str>,
}

pub(crate) fn ready(address: IpAddr) -> End {
    End { address, node: NODE, ready: true, terminating: false, pod_uid: None }
}

pub(crate) struct Host {
    pub(crate) way: Way,
    pub(crate) here: OwnedFd,
    pub(crate) outside: OwnedFd,
    pub(crate) far: OwnedFd,
    pub(crate) network: Arc<Network>,
    pub(crate) desired: Arc<Desired>,
    _dir: tempfile::TempDir,
}

fn up(link: &str, address: &str, theirs: &[&str]) -> OwnedFd {
    let (outside, mut inside) = netns::create(|| Ok(Socket::route()?)).unwrap();
    let mut ours = Socket::route().unwrap();
    let mut setup = Writer::new();
    let pair = VethPair { name: link, master: 0, mtu: 1500, peer: "eth0", peer_mac: None, peer_netns: outside.as_fd() };
    setup.create_veth(&pair);
    ours.request(&setup).unwrap();
    let mut setup = Writer::new();
    let index = ours.link(link).unwrap().unwrap().index;
    setup.add_address(index, ip(address), if ip(address).is_ipv4() { 24 } else { 64 });
    ours.request(&setup).unwrap();
    let mut setup = Writer::new();
    let eth0 = inside.link("eth0").unwrap().unwrap().index;
    setup.set_up(1);
    setup.set_up(eth0);
    for address in theirs {
        setup.add_address(eth0, ip(address), if ip(address).is_ipv4() { 24 } else { 64 });
    }
    inside.request(&setup).unwrap();
    outside
}

impl Host {
    async fn new(way: Way) -> Host {
        let outside = up("up0", HOST, &[OUTSIDE, "2001:db8::2"]);
        let far = up("up1", "203.0.113.1", &[FAR]);
        let mut route = Socket::route().unwrap();
        let mut setup = Writer::new();
        let up0 = route.link("up0").unwrap().unwrap().index;
        setup.add_address(up0, ip("2001:db8::1"), 64);
        for gateway in [OUTSIDE, "2001:db8::2"] {
            setup.add_route(&Route { gateway: Some(ip(gateway)), interface: up0, ..Route::default() });
        }
        route.request(&setup).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut config = network::Config::new(dir.path().join("network"));
        config.cni_conf_dir = dir.path().join("no-cni");
        config.subnets.push("fd00:85::/64".parse().unwrap());
        let network = Network::new(config).unwrap();
        network.adopt(Vec::new()).await.unwrap();
        let desired = Arc::new(Desired::default());
        let node: Node = serde_json::from_value(json!({"metadata": {"name": NODE, "uid": "node"}})).unwrap();
        desired.store.nodes().put(node);
        desired.store.set_synced();
        Host { way, here: netns::current().unwrap(), outside, far, network, desired, _dir: dir }
    }

    pub(crate) fn config(&self) -> Config {
        let mut config = Config::new(NODE);
        self.way.set(&mut config);
        config.local = DetectLocal::Cluster(vec!["10.85.0.0/16".parse().unwrap(), "fd00:85::/64".parse().unwrap()]);
        config.service_cidrs = vec!["10.96.0.0/16".parse().unwrap(), "fd00:96::/112".parse().unwrap()];
        config
    }

    /// A proxy whose rules are in place.
    pub(crate) async fn proxy(&self) -> Proxy {
        let proxy = Proxy::start(self.config(), self.desired.clone()).unwrap();
        proxy.settled().await;
        proxy
    }

    pub(crate) async fn pod(&self, name: &str) -> Attachment {
        let request = AttachRequest { sandbox_id: name.to_owned(), ..AttachRequest::default() };
        self.network.attach(request).await.unwrap()
    }

    /// A pod with a TCP server on port 8080 that says its name and who asks.
    pub(crate) async fn server(&self, name: &'static str) -> Attachment {
        let pod = self.pod(name).await;
        serve(&pod.netns, name, 8080);
        pod
    }

    /// Declares a Service.
    pub(crate) fn service(&self, name: &str, spec: Value) {
        let object = json!({"metadata": {"namespace": "default", "name": name, "uid": name}, "spec": spec});
        let service: Service = serde_json::from_value(object).unwrap();
        self.desired.store.services().put(service);
    }

    /// Declares a Service that a load balancer has given an address.
    pub(crate) fn balancer(&self, name: &str, spec: Value, address: &str) {
        let object = json!({"metadata": {"namespace": "default", "name": name, "uid": name}, "spec": spec,
            "status": {"loadBalancer": {"ingress": [{"ip": address}]}}});
        let service: Service = serde_json::from_value(object).unwrap();
        self.desired.store.services().put(service);
    }

    pub(crate) fn remove_service(&self, name: &str) {
        self.desired.store.services().remove(&Key::new("default", name));
    }

    /// Declares who stands behind a Service: each family of addresses in a slice of its own, port 8080 for all ports.
    pub(crate) fn endpoints(&self, service: &str, ends: &[End]) {
        for (suffix, kind, ipv6) in [("4", "IPv4", false), ("6", "IPv6", true)] {
            let endpoint = |end: &End| {
                json!({"addresses": [end.address], "nodeName": end.node,
                    "conditions": {"ready": end.ready, "serving": true, "terminating": end.terminating},
                    "targetRef": end.pod_uid.map(|uid| json!({"kind": "Pod", "uid": uid}))})
            };
            let of_family = ends.iter().filter(|end| end.address.is_ipv6() == ipv6);
            let slice: EndpointSlice = serde_json::from_value(json!({
                "metadata": {"namespace": "default", "name": format!("{service}-{suffix}"),
                    "labels": {"kubernetes.io/service-name": service}},
                "addressType": kind, "endpoints": of_family.map(endpoint).collect::<Vec<_>>(),
                "ports": [{"name": "", "port": 8080}, {"name": "udp", "port": 8080, "protocol": "UDP"}]}))
            .unwrap();
            self.desired.store.endpoint_slices().put(slice);
        }
    }

    pub(crate) fn store(&self) -> &Store {
        &self.desired.store
    }

    pub(crate) fn event_reasons(&self) -> Vec<String> {
        self.desired.events.lock().unwrap().iter().filter_map(|event| event.reason.clone()).collect()
    }
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A TCP server that answers `name client-address` and keeps echoing what comes.
pub(crate) fn serve(netns: &OwnedFd, name: &'static str, port: u16) {
    let listener = netns::run_in(netns.as_fd(), || TcpListener::bind(("::", port))).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else { return };
            std::thread::spawn(move || converse(stream, name));
        }
    });
}

fn converse(mut stream: TcpStream, name: &str) {
    let peer = stream.peer_addr().map(|peer| peer.ip().to_canonical().to_string()).unwrap_or_default();
    // A client that has gone ends the conversation.
    let _ = stream.write_all(format!("{name} {peer}\n").as_bytes());
    let mut buffer = [0; 64];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

/// Opens a connection and reads the greeting: server and client address as it sees it.
pub(crate) fn open(netns: &OwnedFd, server: impl Into<IpAddr>, port: u16) -> io::Result<(TcpStream, String, IpAddr)> {
    let server = SocketAddr::new(server.into(), port);
    let mut stream = netns::run_in(netns.as_fd(), || TcpStream::connect_timeout(&server, PATIENCE))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut greeting = Vec::new();
    let mut octet = [0];
    while octet != *b"\n" {
        stream.read_exact(&mut octet)?;
        greeting.extend(octet);
    }
    let greeting = String::from_utf8_lossy(&greeting).trim().to_owned();
    let (name, client) = greeting.split_once(' ').unwrap();
    Ok((stream, name.to_owned(), ip(client)))
}

pub(crate) fn ask(netns: &OwnedFd, server: impl Into<IpAddr>, port: u16) -> io::Result<(String, IpAddr)> {
    open(netns, server, port).map(|(_, name, client)| (name, client))
}

/// Who answers, of many connections.
pub(crate) fn answers(netns: &OwnedFd, server: impl Into<IpAddr>, port: u16, count: usize) -> Vec<String> {
    let server = server.into();
    let mut names: Vec<String> = (0..count).map(|_| ask(netns, server, port).unwrap().0).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// Still the same connection.
pub(crate) fn is_alive(stream: &mut TcpStream) -> bool {
    let mut buffer = [0; 4];
    stream.write_all(b"ping").is_ok() && stream.read_exact(&mut buffer).is_ok() && &buffer == b"ping"
}

pub(crate) fn udp(netns: &OwnedFd, port: u16) -> UdpSocket {
    let socket = netns::run_in(netns.as_fd(), || UdpSocket::bind(("0.0.0.0", port))).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

/// A UDP server on port 8080 that answers its name.
pub(crate) fn serve_udp(netns: &OwnedFd, name: &'static str) {
    let socket = netns::run_in(netns.as_fd(), || UdpSocket::bind("0.0.0.0:8080")).unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((_, peer)) = socket.recv_from(&mut buffer) {
            // A client that has gone needs no answer.
            let _ = socket.send_to(name.as_bytes(), peer);
        }
    });
}

/// Sends to a service and says who answered.
pub(crate) fn ask_udp(socket: &UdpSocket, server: &str, port: u16) -> io::Result<String> {
    socket.send_to(b"who?", (ip(server), port))?;
    let mut buffer = [0; 64];
    let length = socket.recv(&mut buffer)?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}
