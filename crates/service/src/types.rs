//! The words of the rules.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ipnet::IpNet;

use crate::Name;

/// A transport protocol that Services know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "they are what they are called")]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

impl Protocol {
    /// As the API spells it; absent means TCP.
    pub(crate) fn parse(text: Option<&str>) -> Option<Protocol> {
        match text.unwrap_or("TCP") {
            "TCP" => Some(Protocol::Tcp),
            "UDP" => Some(Protocol::Udp),
            "SCTP" => Some(Protocol::Sctp),
            _ => None,
        }
    }

    /// Its number in the IP header.
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

/// Where clients connect to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Frontend {
    /// An address of a Service; the unspecified one stands for every address of this node: a node port.
    pub address: IpAddr,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its port.
    pub port: u16,
}

impl Frontend {
    /// The node port of the address family of `like`.
    pub(crate) fn node_port(like: IpAddr, protocol: Protocol, port: u16) -> Frontend {
        let address = match like {
            IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
            IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
        };
        Frontend { address, protocol, port }
    }

    /// Whether it stands for every address of this node.
    pub fn is_node_port(&self) -> bool {
        self.address.is_unspecified()
    }
}

impl fmt::Display for Frontend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_node_port() {
            write!(f, "node port {}/{}", self.port, self.protocol)
        } else {
            write!(f, "{}/{}", std::net::SocketAddr::new(self.address, self.port), self.protocol)
        }
    }
}

/// What kind of address a frontend has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[expect(missing_docs, reason = "they are what they are called")]
pub enum Kind {
    ClusterIp,
    NodePort,
    ExternalIp,
    LoadBalancer,
}

/// The port of a Service, as rules are named after it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServicePort {
    /// The Service.
    pub service: Name,
    /// Name of the port; empty if it has none.
    pub name: Arc<str>,
    /// Where load balancers ask for the Service's endpoints on this node.
    pub health_check_port: Option<u16>,
}

impl fmt::Display for ServicePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.name {
            "" => write!(f, "{}", self.service),
            name => write!(f, "{}:{name}", self.service),
        }
    }
}

/// Who serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Endpoint {
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Whether it is on this node.
    pub local: bool,
}

/// What happens to a new connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// It goes to one of these, drawn at random; never empty. The position is the slot.
    Endpoints(Arc<[Endpoint]>),
    /// Nobody serves: it is refused at once.
    Refuse,
    /// Others serve, but this node must not lead there: it is dropped, so that a load balancer looks elsewhere.
    Drop,
}

impl Target {
    /// The endpoints by slot; none when nothing is led anywhere.
    pub fn endpoints(&self) -> &[Endpoint] {
        match self {
            Target::Endpoints(endpoints) => endpoints,
            Target::Refuse | Target::Drop => &[],
        }
    }
}

/// What holds for a frontend.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Whose frontend it is; one for all frontends of the port.
    pub port: Arc<ServicePort>,
    /// What the frontend's address is.
    pub kind: Kind,
    /// For pods and this node, and for everybody if `outside` says nothing else.
    pub inside: Target,
    /// Whether `inside` has endpoints of this node only (`internalTrafficPolicy: Local`).
    pub inside_local: bool,
    /// For who comes from outside the cluster, where `externalTrafficPolicy` is Local.
    pub outside: Option<Target>,
    /// A client that comes back within so many seconds gets the endpoint it had.
    pub affinity_s: Option<u32>,
    /// Who may connect (`loadBalancerSourceRanges`); `None`: everybody.
    pub sources: Option<Arc<[IpNet]>>,
}

impl Entry {
    /// Whether it is meant for clients outside the cluster: a node port, an external or a load balancer's address.
    pub fn is_external(&self) -> bool {
        self.kind != Kind::ClusterIp
    }

    /// All endpoints that it leads to, some of them twice.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        let outside = self.outside.as_ref().map_or(&[][..], Target::endpoints);
        self.inside.endpoints().iter().chain(outside)
    }
}
