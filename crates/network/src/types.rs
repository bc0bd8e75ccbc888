//! The words of the public interface.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

/// What a sandbox needs to be on the network. Host-network pods are never attached.
#[derive(Debug, Default)]
pub struct AttachRequest {
    /// The sandbox; attaching the same one twice is an error.
    pub sandbox_id: String,
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// UID of the pod.
    pub uid: String,
    /// Host ports.
    pub port_mappings: Vec<PortMapping>,
    /// The pod's annotations; CNI plugins get `kubernetes.io/ingress-bandwidth` and `egress-bandwidth` from them.
    pub annotations: BTreeMap<String, String>,
    /// DNS settings of the pod, handed to CNI plugins that declare the `dns` capability.
    pub dns: Dns,
    /// A namespace made by the caller (a pod with a user namespace owns its network namespace); `None`: one is made.
    pub netns: Option<OwnedFd>,
}

/// A sandbox on the network.
#[derive(Debug)]
pub struct Attachment {
    /// The network namespace. It lives as long as somebody holds it: hand it to the keeper.
    pub netns: OwnedFd,
    /// Addresses of the pod, the primary one first.
    pub ips: Vec<IpAddr>,
    /// Name of the interface in the namespace.
    pub interface: String,
    /// Hardware address of that interface.
    pub mac: Option<String>,
    /// MTU of that interface.
    pub mtu: Option<u32>,
    /// DNS settings which a CNI plugin returned.
    pub dns: Option<Dns>,
}

/// DNS settings, as in CNI.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// Name servers in order of preference.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// Local domain for short names.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// Search domains.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// Options for the resolver.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

/// A port of the host that leads to a port of the pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// Transport protocol.
    pub protocol: Protocol,
    /// Port in the pod.
    pub container_port: u16,
    /// Port on the host.
    pub host_port: u16,
    /// Address of the host; `None` or unspecified: every local address.
    #[serde(rename = "hostIP", default, skip_serializing_if = "Option::is_none")]
    pub host_ip: Option<IpAddr>,
}

/// A transport protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "tcp",
            Protocol::Udp => "udp",
            Protocol::Sctp => "sctp",
        })
    }
}

/// A sandbox which runs when the daemon starts.
#[derive(Debug)]
pub struct LiveSandbox {
    /// The sandbox.
    pub sandbox_id: String,
    /// Its network namespace, from the keeper. CNI plugins need it for DEL; the built-in bridge does not.
    pub netns: Option<OwnedFd>,
}

/// Counters of one interface of a pod, as the pod sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InterfaceStats {
    /// Name in the pod.
    pub name: String,
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Errors while receiving.
    pub rx_errors: u64,
    /// Received and dropped.
    pub rx_dropped: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
    /// Errors while sending.
    pub tx_errors: u64,
    /// Dropped instead of sent.
    pub tx_dropped: u64,
}

/// Which network pods get.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// The built-in bridge.
    Bridge,
    /// The CNI configuration with this name, which is empty when the configuration cannot be used.
    Cni(String),
}

/// Whether pods can be attached; becomes the runtime's `NetworkReady` condition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Which network pods get.
    pub mode: Mode,
    /// Why pods cannot be attached, with the remedy; `None` when they can.
    pub problem: Option<String>,
}

/// A kernel object or a file that the network owns on the host; see [`Network::fsck`](crate::Network::fsck).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owned {
    /// `link`, `address`, `record`, `table`, `process` or `socket`.
    pub kind: &'static str,
    /// Its name.
    pub name: String,
    /// The sandbox or the part that needs it; `None`: nobody does, it is a leak.
    pub owner: Option<String>,
}

/// Why a network operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetworkError {
    /// A configuration value cannot be used.
    #[error("network configuration: {0}")]
    Config(String),
    /// The sandbox is attached already.
    #[error("sandbox {0} has a network already; detach it first")]
    AlreadyAttached(String),
    /// No address is left.
    #[error("no free address in {subnet} ({used} in use); configure a larger pod subnet or remove pods")]
    Exhausted {
        /// The full subnet.
        subnet: String,
        /// Addresses in use.
        used: usize,
    },
    /// Another pod has the host port.
    #[error("host port {port}/{protocol} is taken by sandbox {owner}; choose another hostPort or remove that pod")]
    PortTaken {
        /// The port.
        port: u16,
        /// Its protocol.
        protocol: Protocol,
        /// Who has it.
        owner: String,
    },
    /// The kernel refused a step.
    #[error("network of sandbox {object}: {step}")]
    Kernel {
        /// Sandbox or host object.
        object: String,
        /// What was tried.
        step: &'static str,
        /// The kernel's answer.
        #[source]
        source: std::io::Error,
    },
    /// A CNI plugin failed.
    #[error("CNI plugin {plugin} ({command}): {message}")]
    Plugin {
        /// Name of the plugin.
        plugin: String,
        /// CNI command.
        command: &'static str,
        /// Its message and details.
        message: String,
    },
}
