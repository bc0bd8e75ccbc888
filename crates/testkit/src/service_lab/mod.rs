//! A node for service proxies, in network namespaces of its own, with pods, another node and a client outside. Two of them
//! have the same addresses inside, so that what two proxies make of the same objects can be compared packet by packet:
//!
//! ```text
//! pod client 10.244.0.9  ┐
//! pod a … c  10.244.0.11 ┼── node 10.244.0.1 ┬ up0 192.0.2.1 ── wire ┬ outside 192.0.2.2
//!            10.244.0.13 ┘                   │                       ├ remote  192.0.2.3, pods r, s 10.244.1.11, .12
//!                                            │                       └ remote pod 10.244.1.9
//!                                            └ api0 ── whoever made it
//! ```
//!
//! Each also has an IPv6 address. All pods but the two clients, and both nodes, serve TCP, UDP and SCTP on [`PORTS`] and say who
//! they are and whom they see. Every packet to and from a pod passes its node.

mod ask;
mod echo;
mod place;
mod sctp;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::Context as _;

use crate::host::Tool;

pub use ask::{Answer, Answers, Flow, Kept, Protocol, Question, Times, ask_all, get};
pub use place::{Pending, Place};

/// What it needs on the host.
pub const TOOL: Tool = Tool { program: "ip", deb: "iproute2", rpm: "iproute" };

/// Where every backend serves.
pub const PORTS: [u16; 4] = [8080, 8081, 9001, 9002];

/// Where the API server is to listen, on the side of whoever makes nodes.
pub const API_ADDRESS: Ipv4Addr = Ipv4Addr::new(198, 18, 0, 1);

/// Addresses of pods, of the whole cluster.
pub const POD_RANGES: &str = "10.244.0.0/16,fd00:10:244::/48";

/// Addresses of the pods of the node.
pub const NODE_POD_RANGES: [&str; 2] = ["10.244.0.0/24", "fd00:10:244::/64"];

/// An IPv4 and an IPv6 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pair {
    /// That of IPv4.
    pub v4: Ipv4Addr,
    /// That of IPv6.
    pub v6: Ipv6Addr,
}

impl Pair {
    const fn new(v4: [u8; 4], v6: [u16; 8]) -> Self {
        let ([a, b, c, d], [e, f, g, h, i, j, k, l]) = (v4, v6);
        Self { v4: Ipv4Addr::new(a, b, c, d), v6: Ipv6Addr::new(e, f, g, h, i, j, k, l) }
    }

    /// Both.
    pub fn both(self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// The one of the family of `other`.
    pub fn like(self, other: IpAddr) -> IpAddr {
        if other.is_ipv4() { self.v4.into() } else { self.v6.into() }
    }
}

/// The node's address.
pub const NODE: Pair = Pair::new([192, 0, 2, 1], [0x2001, 0xdb8, 0, 0, 0, 0, 0, 1]);
/// Another address of the node on the same link, which no Node object names.
pub const SECOND: Pair = Pair::new([192, 0, 2, 101], [0x2001, 0xdb8, 0, 0, 0, 0, 0, 0x101]);
/// The node's address towards its pods.
pub const GATEWAY: Pair = Pair::new([10, 244, 0, 1], [0xfd00, 0x10, 0x244, 0, 0, 0, 0, 1]);
/// The client that is no part of the cluster.
pub const OUTSIDE: Pair = Pair::new([192, 0, 2, 2], [0x2001, 0xdb8, 0, 0, 0, 0, 0, 2]);
/// The other node.
pub const REMOTE: Pair = Pair::new([192, 0, 2, 3], [0x2001, 0xdb8, 0, 0, 0, 0, 0, 3]);

/// Who can be an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backend {
    /// Its name.
    pub name: &'static str,
    /// Its addresses.
    pub address: Pair,
    /// Whether it is on the node whose proxy is tested.
    pub is_local: bool,
}

/// All of them: pods of the node, pods of the other one, and the two nodes themselves.
pub const BACKENDS: [Backend; 7] = [
    Backend { name: "a", address: pod(0, 11, 0x11), is_local: true },
    Backend { name: "b", address: pod(0, 12, 0x12), is_local: true },
    Backend { name: "c", address: pod(0, 13, 0x13), is_local: true },
    Backend { name: "r", address: pod(1, 11, 0x11), is_local: false },
    Backend { name: "s", address: pod(1, 12, 0x12), is_local: false },
    Backend { name: "node", address: NODE, is_local: true },
    Backend { name: "remote", address: REMOTE, is_local: false },
];

/// The pod that serves nothing.
const CLIENT: Pair = pod(0, 9, 9);
/// And its like on the other node.
const REMOTE_CLIENT: Pair = pod(1, 9, 9);

/// The backend of this name.
///
/// # Errors
/// There is none.
pub fn backend(name: &str) -> anyhow::Result<Backend> {
    BACKENDS.into_iter().find(|backend| backend.name == name).with_context(|| format!("no backend {name:?}"))
}

/// The pod of a node whose addresses end so.
const fn pod(node: u8, v4: u8, v6: u16) -> Pair {
    Pair::new([10, 244, node, v4], [0xfd00, 0x10, 0x244, node as u16, 0, 0, 0, v6])
}

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Client {
    /// A pod that is no endpoint.
    Pod,
    /// Pod `a`.
    Endpoint,
    /// The node itself.
    Node,
    /// Somebody outside the cluster.
    Outside,
    /// The other node.
    RemoteNode,
    /// A pod on the other node that is no endpoint.
    RemotePod,
}

impl Client {
    /// All of them.
    pub const ALL: [Self; 6] =
        [Self::Pod, Self::Endpoint, Self::Node, Self::Outside, Self::RemoteNode, Self::RemotePod];

    /// In a word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pod => "pod",
            Self::Endpoint => "pod a",
            Self::Node => "node",
            Self::Outside => "outside",
            Self::RemoteNode => "remote node",
            Self::RemotePod => "remote pod",
        }
    }

    /// The addresses of its own.
    pub fn addresses(self) -> Vec<IpAddr> {
        let own: &[Pair] = match self {
            Self::Pod => &[CLIENT],
            Self::Endpoint => &[BACKENDS[0].address],
            Self::Node => &[NODE, SECOND, GATEWAY],
            Self::Outside => &[OUTSIDE],
            Self::RemoteNode => &[REMOTE],
            Self::RemotePod => &[REMOTE_CLIENT],
        };
        own.iter().flat_map(|pair| pair.both()).collect()
    }

    /// The address it is to be known by, where the kernel would choose another.
    pub fn source(self, to: IpAddr) -> Option<IpAddr> {
        match self {
            Self::RemoteNode => Some(REMOTE.like(to)),
            _ => None,
        }
    }
}

/// One node and all around it. It ends on drop.
#[derive(Debug)]
pub struct Side {
    node: Place,
    client: Place,
    pods: Vec<Place>,
    outside: Place,
    remote: Place,
    remote_pod: Place,
    wire: Place,
}

impl Side {
    /// Makes one. The calling thread's namespace becomes the one of the API server, which the node reaches at
    /// [`API_ADDRESS`] by a link of its own.
    ///
    /// # Errors
    /// Needs CAP_SYS_ADMIN and `ip`.
    pub fn new() -> anyhow::Result<Self> {
        let [node, client, outside] = [Place::new()?, Place::new()?, Place::new()?];
        let [remote, remote_pod, wire] = [Place::new()?, Place::new()?, Place::new()?];
        let local = BACKENDS.iter().filter(|backend| backend.is_local && backend.address != NODE);
        let pods = local.clone().map(|_| Place::new()).collect::<anyhow::Result<Vec<_>>>()?;
        let side = Self { node, client, pods, outside, remote, remote_pod, wire };
        side.prepare_node()?;
        side.link_wire()?;
        side.link_api()?;
        side.link_pod("client", CLIENT, &side.client)?;
        for (place, backend) in side.pods.iter().zip(local) {
            side.link_pod(backend.name, backend.address, place)?;
        }
        side.serve()?;
        Ok(side)
    }

    /// The namespace of the node.
    pub fn node(&self) -> &Place {
        &self.node
    }

    /// The namespace of a client.
    pub fn place(&self, client: Client) -> &Place {
        match client {
            Client::Pod => &self.client,
            Client::Endpoint => &self.pods[0],
            Client::Node => &self.node,
            Client::Outside => &self.outside,
            Client::RemoteNode => &self.remote,
            Client::RemotePod => &self.remote_pod,
        }
    }

    fn prepare_node(&self) -> anyhow::Result<()> {
        self.node.set("ipv4/conf/all/rp_filter", "0")?;
        self.node.set("ipv4/conf/default/rp_filter", "0")?;
        self.node.set("ipv4/ip_forward", "1")?;
        // What comes from the wire and goes back there would make clients look for services elsewhere.
        self.node.set("ipv4/conf/all/send_redirects", "0")?;
        self.node.set("ipv4/conf/default/send_redirects", "0")?;
        for place in [&self.outside, &self.remote, &self.remote_pod] {
            place.set("ipv6/conf/default/accept_redirects", "0")?;
        }
        // A refusal is an answer here, and not to be missed because there were many.
        self.node.set("ipv4/icmp_ratemask", "0")?;
        self.node.set("ipv6/icmp/ratelimit", "0")?;
        self.node.set("ipv6/conf/all/forwarding", "1")
    }

    fn link_wire(&self) -> anyhow::Result<()> {
        let ends =
            [("node", &self.node), ("outside", &self.outside), ("remote", &self.remote), ("pod", &self.remote_pod)];
        let mut lines = "link add wire type bridge mcast_snooping 0\nlink set wire up\n".to_owned();
        for (name, place) in ends {
            lines += &format!("link add {name} type veth peer name up0 netns {}\n", place.number());
            lines += &format!("link set {name} master wire up\n");
        }
        self.wire.ip(lines)?;
        let up = "link set up0 up\n";
        self.outside.ip(address("up0", OUTSIDE, (24, 64)) + up + &routes("default", NODE))?;
        let theirs = BACKENDS.iter().filter(|backend| !backend.is_local && backend.address != REMOTE);
        let pods: String = theirs.map(|backend| address("lo", backend.address, (32, 128))).collect();
        self.remote.ip(address("up0", REMOTE, (24, 64)) + up + &pods + &routes("default", NODE))?;
        self.remote_pod
            .ip(address("up0", REMOTE_CLIENT, (32, 128)) + up + &neighbour(NODE, "up0") + &routes("default", NODE))?;
        let own = address("up0", NODE, (24, 64)) + &address("up0", SECOND, (24, 64)) + up;
        // What nobody has leads outside, where it is dropped.
        let theirs =
            format!("route add 10.244.1.0/24 via {}\nroute add fd00:10:244:1::/64 via {}\n", REMOTE.v4, REMOTE.v6);
        self.node.ip(own + &routes("default", OUTSIDE) + &theirs + &neighbour(REMOTE_CLIENT, "up0"))
    }

    fn link_api(&self) -> anyhow::Result<()> {
        // The link of a node that has ended goes a moment later than its node.
        static MADE: AtomicU8 = AtomicU8::new(0);
        let number = 1 + MADE.fetch_add(1, Ordering::Relaxed) % 250;
        let mine = format!("198.18.{number}.1");
        let link = format!("api{number}");
        place::ip(&format!(
            "link add {link} type veth peer name api0 netns {}\naddress add {mine}/24 dev {link}\nlink set {link} up\n",
            self.node.number()
        ))?;
        self.node.ip(format!(
            "address add 198.18.{number}.2/24 dev api0\nlink set api0 up\nroute add {API_ADDRESS} via {mine}\n"
        ))
    }

    /// As the CNI plugin `ptp` does it: no two pods reach each other but through the node.
    fn link_pod(&self, name: &str, address_of: Pair, place: &Place) -> anyhow::Result<()> {
        let link = format!("pod-{name}");
        self.node.ip(format!("link add {link} type veth peer name eth0 netns {}\n", place.number())
            + &address(&link, GATEWAY, (32, 128))
            + &format!("link set {link} up\n")
            + &neighbour(address_of, &link))?;
        place.ip(address("eth0", address_of, (32, 128))
            + "link set eth0 up\n"
            + &neighbour(GATEWAY, "eth0")
            + &routes("default", GATEWAY))
    }

    fn serve(&self) -> anyhow::Result<()> {
        let mut pods = self.pods.iter();
        let mut started = Vec::new();
        for backend in BACKENDS {
            let place = match backend {
                Backend { address: NODE, .. } => &self.node,
                Backend { is_local: true, .. } => pods.next().context("a place for each local pod")?,
                Backend { is_local: false, .. } => &self.remote,
            };
            started.push(place.start(echo::serve(backend.address.both().to_vec(), PORTS.to_vec())));
        }
        started.into_iter().try_for_each(|started| Ok(started.wait()??))
    }
}

fn address(link: &str, address: Pair, (v4, v6): (u8, u8)) -> String {
    let Pair { v4: of_4, v6: of_6 } = address;
    format!("address add {of_4}/{v4} dev {link}\naddress add {of_6}/{v6} dev {link} nodad\n")
}

/// Who is at the other end of a link although no prefix says so.
fn neighbour(who: Pair, link: &str) -> String {
    format!("route add {} dev {link}\nroute add {} dev {link}\n", who.v4, who.v6)
}

fn routes(to: &str, via: Pair) -> String {
    format!("route add {to} via {}\nroute add {to} via {}\n", via.v4, via.v6)
}
