//! What the DNS server is told when it starts, and why it cannot.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// Configuration of a [`Server`](super::Server).
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory on tmpfs for the server's socket; made if missing, mode 0700.
    pub run_dir: PathBuf,
    /// Where queries are answered, over UDP and TCP, each with an address of its own (not `0.0.0.0`). The host need not
    /// have the addresses yet.
    pub addresses: Vec<SocketAddr>,
    /// Networks whose queries are answered; loopback and the server's own addresses always are. Empty: everybody's.
    pub clients: Vec<IpNet>,
    /// Who is asked for names outside the zone.
    pub upstreams: Upstreams,
}

/// The resolvers behind the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Upstreams {
    /// Those of a file like `/etc/resolv.conf`, read again when it changes.
    File(PathBuf),
    /// These, in order of preference.
    Fixed(Vec<SocketAddr>),
}

/// Why the DNS server cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DnsError {
    /// A configuration value cannot be used.
    #[error("DNS configuration: {0}")]
    Config(String),
    /// An address cannot be listened on.
    #[error(
        "DNS cannot listen on {address}/{transport}; end the server that has the port or choose another cluster DNS address"
    )]
    Listen {
        /// The address.
        address: SocketAddr,
        /// `udp` or `tcp`.
        transport: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The kernel refused a step.
    #[error("DNS server: {step}")]
    Kernel {
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// The server process could not begin or did not do what it was told.
    #[error("DNS server process: {0}")]
    Process(String),
    /// The zone is too large for the server.
    #[error("{size} bytes of DNS records are more than the server takes ({max})")]
    TooLarge {
        /// Size of the zone.
        size: usize,
        /// What it takes.
        max: usize,
    },
}
