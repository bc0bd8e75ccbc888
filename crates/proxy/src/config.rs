//! What the operator says about the proxy.

use std::time::Duration;

use ipnet::IpNet;

use crate::Mode;

/// Configuration of a [`Proxy`](crate::Proxy).
#[derive(Debug, Clone)]
pub struct Config {
    /// How rules are carried out.
    pub mode: Mode,
    /// Name of the nftables table; two proxies on one host need two names.
    pub table: String,
    /// Name of this node, as endpoints spell it.
    pub node_name: String,
    /// Addresses of pods, of the whole cluster or at least of this node: what comes from them is never masqueraded on its
    /// way to a Service. Empty if unknown; then connections of pods to external addresses of Services are.
    pub pod_cidrs: Vec<IpNet>,
    /// Addresses of Services: one that no Service has, or a port that its Service has not, is refused at once instead of
    /// being routed away, unless it is this host's own address. Empty if unknown.
    pub service_cidrs: Vec<IpNet>,
    /// What only the mode `ipvs` asks for.
    pub ipvs: IpvsOptions,
    /// The least time between two syncs: what changes meanwhile goes into one transaction.
    pub pace: Duration,
    /// How often to look whether somebody else has removed the rules, as `nft flush ruleset` does when a firewall is
    /// reloaded. The kernel could tell, but for who listens it keeps 4 KiB for each element of every transaction on the
    /// host until that is done; asking costs microseconds. Upstream writes everything anew every 30 s.
    pub look_every: Duration,
}

impl Config {
    /// The defaults for this node.
    pub fn new(node_name: impl Into<String>) -> Config {
        Config {
            mode: Mode::default(),
            table: "orlop-proxy".to_owned(),
            node_name: node_name.into(),
            pod_cidrs: Vec::new(),
            service_cidrs: Vec::new(),
            ipvs: IpvsOptions::default(),
            pace: Duration::from_millis(5),
            look_every: Duration::from_secs(5),
        }
    }
}

/// Options of the mode `ipvs`, as `KubeProxyConfiguration` has them below `ipvs`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IpvsOptions {
    /// Name of the kernel's scheduler: `rr`, `wrr`, `lc`, `wlc`, `lblc`, `lblcr`, `sh`, `dh`, `sed`, `nq`, `mh` ...
    pub scheduler: String,
    /// Virtual services with these addresses are left alone.
    pub exclude_cidrs: Vec<IpNet>,
    /// Whether the node keeps from answering ARP requests for addresses of Services on its other interfaces.
    pub strict_arp: bool,
    /// How long an idle TCP connection is remembered; zero leaves what the kernel has.
    pub tcp_timeout: Duration,
    /// The same after a FIN.
    pub tcp_fin_timeout: Duration,
    /// The same of UDP.
    pub udp_timeout: Duration,
}

impl Default for IpvsOptions {
    fn default() -> Self {
        IpvsOptions {
            scheduler: "rr".to_owned(),
            exclude_cidrs: Vec::new(),
            strict_arp: false,
            tcp_timeout: Duration::ZERO,
            tcp_fin_timeout: Duration::ZERO,
            udp_timeout: Duration::ZERO,
        }
    }
}
