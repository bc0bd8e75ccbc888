//! Names of chains: upstream's, so that operators and their tools find what they know.

use std::fmt;

use service::{Endpoint, Protocol, ServicePort};
use sha2::{Digest as _, Sha256};

/// The chain that all packets to Services meet first.
pub(super) const SERVICES: &str = "KUBE-SERVICES";
/// The chain of node ports.
pub(super) const NODE_PORTS: &str = "KUBE-NODEPORTS";
/// What is refused to who comes from outside.
pub(super) const EXTERNAL_SERVICES: &str = "KUBE-EXTERNAL-SERVICES";
/// Masquerades what is marked.
pub(super) const POSTROUTING: &str = "KUBE-POSTROUTING";
/// Marks what is to be masqueraded.
pub(super) const MARK_MASQ: &str = "KUBE-MARK-MASQ";
/// Marks what does not come from a pod; only where pods have several ranges. Upstream knows one range and needs none.
pub(super) const MARK_MASQ_OUTSIDE: &str = "KUBE-MARK-MASQ-OUTSIDE";
/// Accepts what is marked, and drops what connection tracking does not understand.
pub(super) const FORWARD: &str = "KUBE-FORWARD";
/// Drops what a load balancer's source ranges do not admit.
pub(super) const FIREWALL: &str = "KUBE-PROXY-FIREWALL";
/// Protects the loopback addresses; the kubelet owns it, too.
pub(super) const KUBELET_FIREWALL: &str = "KUBE-FIREWALL";
/// Does nothing but be there: who removes it has removed the rest.
pub(super) const CANARY: &str = "KUBE-PROXY-CANARY";

/// What begins the name of a chain that belongs to one port; each leads to later ones only.
const PORT_PREFIXES: [&str; 5] = ["KUBE-FW-", "KUBE-EXT-", "KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-"];

/// Whether a chain of this name belongs to a port of a Service.
pub(super) fn is_of_port(chain: &str) -> bool {
    PORT_PREFIXES.iter().any(|prefix| chain.starts_with(prefix))
}

/// In this order no chain of a port leads to one before it.
pub(super) fn rank(chain: &str) -> Option<usize> {
    PORT_PREFIXES.iter().position(|prefix| chain.starts_with(prefix))
}

/// Names of the chains of one port in both address families.
#[derive(Debug, Clone)]
pub(super) struct PortNames {
    /// What is hashed for them.
    seed: String,
    hash: Hash,
}

/// The end of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hash([u8; HASH_LEN]);

const HASH_LEN: usize = 16;

impl PortNames {
    pub(super) fn new(port: &ServicePort, protocol: Protocol) -> PortNames {
        let seed = format!("{port}{}", lower(protocol));
        PortNames { hash: Hash::of(&seed), seed }
    }

    /// Leads to all endpoints.
    pub(super) fn cluster(&self) -> String {
        format!("KUBE-SVC-{}", self.hash)
    }

    /// Leads to those of this node.
    pub(super) fn local(&self) -> String {
        format!("KUBE-SVL-{}", self.hash)
    }

    /// Leads who comes to an address for the outside.
    pub(super) fn external(&self) -> String {
        format!("KUBE-EXT-{}", self.hash)
    }

    /// Lets through whom a load balancer admits.
    pub(super) fn firewall(&self) -> String {
        format!("KUBE-FW-{}", self.hash)
    }

    /// Leads to one endpoint.
    pub(super) fn endpoint(&self, endpoint: &Endpoint) -> String {
        format!("KUBE-SEP-{}", Hash::of(&format!("{}{}", self.seed, place(endpoint))))
    }
}

/// Address and port of an endpoint.
pub(super) fn place(endpoint: &Endpoint) -> std::net::SocketAddr {
    (endpoint.address, endpoint.port).into()
}

/// As iptables spells a protocol.
pub(super) fn lower(protocol: Protocol) -> &'static str {
    match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    }
}

impl Hash {
    /// The first characters of the SHA-256 in base32 (RFC 4648).
    fn of(text: &str) -> Hash {
        const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
        let digest = Sha256::digest(text.as_bytes());
        let mut hash = [0; HASH_LEN];
        // Eight characters stand for five bytes.
        for (characters, bytes) in hash.chunks_exact_mut(8).zip(digest.chunks_exact(5)) {
            let bits = bytes.iter().fold(0u64, |bits, byte| bits << 8 | u64::from(*byte));
            for (at, character) in characters.iter_mut().enumerate() {
                *character = ALPHABET[(bits >> (35 - 5 * at) & 31) as usize];
            }
        }
        Hash(hash)
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|character| write!(f, "{}", char::from(*character)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Names that upstream's tests give (pkg/proxy/iptables/proxier_test.go).
    #[test]
    fn names_are_those_of_upstream() {
        let name = |namespace: &str, name: &str, port: &str| {
            let service = service::Name { namespace: namespace.into(), name: name.into() };
            ServicePort { service, name: port.into(), health_check_port: None }
        };
        let port = PortNames::new(&name("ns1", "svc1", "p80"), Protocol::Tcp);
        assert_eq!(port.cluster(), "KUBE-SVC-XPGD46QRK7WJZT7O");
        let endpoint = Endpoint { address: [10, 180, 0, 1].into(), port: 80, local: false };
        assert_eq!(port.endpoint(&endpoint), "KUBE-SEP-SXIVWICOYRO3J4NJ");
        assert!(is_of_port(&port.endpoint(&endpoint)) && !is_of_port(SERVICES));
    }
}
