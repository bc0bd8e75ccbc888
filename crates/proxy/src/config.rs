//! What the operator says about the proxy.

use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;

use crate::Mode;
use crate::configuration::{Configuration, DetectLocal, NodePortAddress};

/// Configuration of a [`Proxy`](crate::Proxy).
#[derive(Debug, Clone)]
pub struct Config {
    /// How rules are carried out.
    pub mode: Mode,
    /// Name of the nftables table; two proxies on one host need two names.
    pub table: String,
    /// Name of this node, as endpoints spell it.
    pub node_name: String,
    /// How packets of pods are known: they are never masqueraded on their way to a Service. Where nobody knows, connections
    /// of pods to external addresses of Services are.
    pub local: DetectLocal,
    /// Addresses of Services: one that no Service has, or a port that its Service has not, is refused at once instead of
    /// being routed away, unless it is this host's own address. Those of the source's ServiceCIDRs are added.
    pub service_cidrs: Vec<IpNet>,
    /// What only the mode `iptables` asks for.
    pub iptables: IptablesOptions,
    /// Whether rules of the other modes are removed once those of this one are in place. Rules of iptables and IPVS have no
    /// name of ours: they may be those of another proxy, which a node has only one of.
    pub remove_other_modes: bool,
    /// What only the mode `ipvs` asks for.
    pub ipvs: IpvsOptions,
    /// On which addresses of this node node ports answer.
    pub node_ports: Vec<NodePortAddress>,
    /// Whether what goes to an address of a Service is masqueraded wherever it comes from.
    pub masquerade_all: bool,
    /// Whether `externalIPs` of Services are served: who may write Services can take any address by them (CVE-2020-8554).
    pub external_ips: bool,
    /// The node's own address, if it is not the Node's.
    pub bind_address: Option<IpAddr>,
    /// The least time between two syncs: what changes meanwhile goes into one transaction.
    pub pace: Duration,
    /// Upstream's `syncPeriod`: what waits for twice as long makes the proxy unhealthy.
    pub sync_period: Duration,
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
            local: DetectLocal::Cluster(Vec::new()),
            service_cidrs: Vec::new(),
            iptables: IptablesOptions::default(),
            remove_other_modes: true,
            ipvs: IpvsOptions::default(),
            node_ports: vec![NodePortAddress::All],
            masquerade_all: false,
            external_ips: true,
            bind_address: None,
            pace: Duration::from_millis(5),
            sync_period: Duration::from_secs(30),
            look_every: Duration::from_millis(200),
        }
    }

    /// What the operator has configured, for this node.
    pub fn configured(node_name: impl Into<String>, configuration: &Configuration) -> Config {
        let default = Config::new(node_name);
        Config {
            mode: configuration.mode,
            local: configuration.detect_local.clone(),
            node_ports: configuration.node_port_addresses.clone(),
            masquerade_all: configuration.masquerade_all,
            external_ips: configuration.external_ips,
            ipvs: configuration.ipvs.clone(),
            iptables: configuration.iptables.clone(),
            bind_address: configuration.bind_address,
            pace: configuration.sync_pace.unwrap_or(default.pace),
            sync_period: configuration.sync_period,
            ..default
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

/// Options of the mode `iptables`, as `KubeProxyConfiguration` has them below `iptables`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IptablesOptions {
    /// The bit of a packet's mark that says "masquerade", from 0 to 31.
    pub masquerade_bit: u8,
    /// Whether node ports answer on 127.0.0.0/8. This lets packets to it be routed (`route_localnet`); a rule keeps those
    /// of others out.
    pub localhost_node_ports: bool,
    /// Which of the two kinds of iptables.
    pub kind: IptablesKind,
}

impl Default for IptablesOptions {
    fn default() -> IptablesOptions {
        IptablesOptions { masquerade_bit: 14, localhost_node_ports: true, kind: IptablesKind::AsFound }
    }
}

/// Where the host has its rules of iptables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IptablesKind {
    /// Where others have theirs.
    #[default]
    AsFound,
    /// In nftables (`iptables-nft`).
    Nft,
    /// In the kernel's own tables (`iptables-legacy`).
    Legacy,
}
