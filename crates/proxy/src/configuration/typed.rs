//! The fields that this proxy honours, as values to work with.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use configfile::Reader;
use ipnet::IpNet;
use serde_json::Value;

use crate::{IptablesOptions, IpvsOptions, Mode};

const HEALTHZ_PORT: u16 = 10256;
const METRICS_PORT: u16 = 10249;
const GATES: &str = "featureGates";
/// On by default, as upstream has it in 1.37; the one gate that this proxy knows.
const EXTERNAL_IPS: &str = "AllowServiceExternalIPs";
/// Upstream's `syncPeriod`: a change that has waited for twice as long makes the proxy unhealthy.
const SYNC_PERIOD: Duration = Duration::from_secs(30);

/// What the operator wants of this proxy.
#[derive(Debug, Clone, PartialEq)]
pub struct Configuration {
    /// How rules are carried out.
    pub mode: Mode,
    /// The node's name, if it is not the host's.
    pub hostname_override: Option<String>,
    /// How to reach the API server; without one as the pod that this process is.
    pub kubeconfig: Option<PathBuf>,
    /// Requests a second to the API server, and at once.
    pub rate: (f64, u32),
    /// Upstream's number for what to log.
    pub verbosity: u8,
    /// The node's own address, if it is not the Node's.
    pub bind_address: Option<IpAddr>,
    /// Where `/healthz` and `/livez` answer.
    pub healthz: Option<SocketAddr>,
    /// Where `/metrics` answers.
    pub metrics: Option<SocketAddr>,
    /// Whether the process ends when one of these addresses cannot be had.
    pub bind_address_hard_fail: bool,
    /// How packets of pods are known.
    pub detect_local: DetectLocal,
    /// On which addresses of the node node ports answer.
    pub node_port_addresses: Vec<NodePortAddress>,
    /// Whether what goes to an address of a Service is always masqueraded.
    pub masquerade_all: bool,
    /// The least time between two syncs, if the operator wants one.
    pub sync_pace: Option<Duration>,
    /// After twice this time without the sync that is due the proxy is unhealthy.
    pub sync_period: Duration,
    /// Whether `externalIPs` of Services are served (the gate `AllowServiceExternalIPs`).
    pub external_ips: bool,
    /// `oom_score_adj` of this process.
    pub oom_score_adj: i32,
    /// Connection tracking.
    pub conntrack: Conntrack,
    /// The mode of this name.
    pub iptables: IptablesOptions,
    /// And this one.
    pub ipvs: IpvsOptions,
}

/// How packets of pods are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DetectLocal {
    /// By these sources, if there are any.
    Cluster(Vec<IpNet>),
    /// By the sources that the Node has for its pods.
    Node,
    /// By the bridge that they come from.
    Bridge(String),
    /// By the beginning of the name of the interface that they come from.
    InterfacePrefix(String),
}

/// One of `nodePortAddresses`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NodePortAddress {
    /// The Node's own, one of each family.
    Primary,
    /// All.
    All,
    /// Loopback.
    Localhost,
    /// Those in a range.
    Range(IpNet),
}

/// Limits and times of connection tracking; none leaves what is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conntrack {
    /// Connections for each CPU of the host; 0 leaves the limit alone.
    pub max_per_core: u32,
    /// Connections at least.
    pub min: u32,
    /// Time of a connection that is idle.
    pub tcp_established: Option<Duration>,
    /// Time of one whose end was told by one side.
    pub tcp_close_wait: Option<Duration>,
    /// Whether packets out of the window belong to a connection.
    pub tcp_be_liberal: bool,
    /// Time of a UDP flow that was not answered.
    pub udp: Option<Duration>,
    /// Time of one that was.
    pub udp_stream: Option<Duration>,
}

impl Default for Conntrack {
    fn default() -> Conntrack {
        Conntrack {
            max_per_core: 32 << 10,
            min: 128 << 10,
            tcp_established: Some(Duration::from_secs(24 * 3600)),
            tcp_close_wait: Some(Duration::from_secs(3600)),
            tcp_be_liberal: false,
            udp: None,
            udp_stream: None,
        }
    }
}

/// Reads the merged configuration, whose leaves are of their kinds already; returns all faults.
pub(super) fn read(written: &Value) -> Result<Configuration, Vec<String>> {
    let mut reader = Reader::new(written);
    let mode = mode(&mut reader);
    let section = section(mode);
    let bind_address = reader.address("bindAddress", "0.0.0.0");
    let (healthz, metrics) = default_addresses(bind_address);
    let configuration = Configuration {
        hostname_override: hostname(&mut reader),
        kubeconfig: reader.file("clientConnection.kubeconfig"),
        rate: rate(&mut reader),
        verbosity: reader.number("logging.verbosity", 0),
        bind_address: Some(bind_address).filter(|address| !address.is_unspecified()),
        healthz: socket(&mut reader, "healthzBindAddress", healthz, HEALTHZ_PORT),
        metrics: socket(&mut reader, "metricsBindAddress", metrics, METRICS_PORT),
        bind_address_hard_fail: reader.flag("bindAddressHardFail", false),
        detect_local: detect_local(&mut reader),
        node_port_addresses: node_port_addresses(&mut reader),
        masquerade_all: reader.flag(&format!("{}.masqueradeAll", masquerade_section(mode)), false),
        sync_pace: reader.span(&format!("{section}.minSyncPeriod")),
        sync_period: reader.span(&format!("{section}.syncPeriod")).unwrap_or(SYNC_PERIOD),
        external_ips: reader.flag(&format!("{GATES}.{EXTERNAL_IPS}"), true),
        oom_score_adj: i32::try_from(reader.bounded("oomScoreAdj", -999, -1000, 1000)).unwrap_or_default(),
        conntrack: conntrack(&mut reader),
        iptables: IptablesOptions {
            masquerade_bit: u8::try_from(reader.bounded("iptables.masqueradeBit", 14, 0, 31)).unwrap_or(14),
            localhost_node_ports: reader.flag("iptables.localhostNodePorts", true),
            ..IptablesOptions::default()
        },
        ipvs: ipvs(&mut reader),
        mode,
    };
    if configuration.sync_pace.is_some_and(|pace| pace > configuration.sync_period) {
        reader.fault(&format!("{section}.minSyncPeriod"), "it is longer than syncPeriod");
    }
    if reader.faults.is_empty() { Ok(configuration) } else { Err(reader.faults) }
}

/// What works in another way than the operator may think.
pub(super) fn warnings(configuration: &Configuration, written: &Value) -> Vec<String> {
    let mut warnings: Vec<String> = foreign_gates(written).collect();
    let mode = configuration.mode;
    if written.get("mode").and_then(Value::as_str).unwrap_or_default().is_empty() {
        return warnings;
    }
    let section_of_mode = section(mode);
    for section in ["iptables", "ipvs", "nftables"] {
        let of_other = section != section_of_mode && section != masquerade_section(mode);
        for (field, value) in written.get(section).and_then(Value::as_object).into_iter().flatten() {
            let is_set = !value.is_null() && *value != Value::Bool(false) && value.as_str() != Some("0s");
            if of_other && is_set {
                warnings.push(format!("{section}.{field} = {value} has no effect in the mode {mode}"));
            }
        }
    }
    if configuration.node_port_addresses.contains(&NodePortAddress::Localhost) && mode != Mode::Iptables {
        warnings.push(format!("nodePortAddresses: node ports do not answer on loopback addresses in the mode {mode}"));
    }
    warnings
}

/// Gates that change nothing here.
fn foreign_gates(written: &Value) -> impl Iterator<Item = String> {
    let gates = written.get(GATES).and_then(Value::as_object).into_iter().flatten();
    let foreign = gates.filter(|(name, _)| *name != EXTERNAL_IPS);
    foreign.map(|(name, value)| format!("{GATES}.{name} = {value} has no effect on this kube-proxy"))
}

fn mode(reader: &mut Reader<'_>) -> Mode {
    let Some(text) = reader.text("mode") else { return Mode::default() };
    text.parse().unwrap_or_else(|_| {
        let modes: Vec<&str> = Mode::ALL.iter().map(|mode| mode.as_str()).collect();
        reader.fault("mode", format!("{text:?} is not one of {}", modes.join(", ")));
        Mode::default()
    })
}

/// Where the periods of a mode stand.
fn section(mode: Mode) -> &'static str {
    match mode.as_str() {
        "nftables" => "nftables",
        "ipvs" => "ipvs",
        _ => "iptables",
    }
}

/// Where its masquerading does.
fn masquerade_section(mode: Mode) -> &'static str {
    if mode.as_str() == "nftables" { "nftables" } else { "iptables" }
}

fn hostname(reader: &mut Reader<'_>) -> Option<String> {
    let text = reader.text("hostnameOverride")?;
    let name = text.trim().to_ascii_lowercase();
    if name.is_empty() {
        reader.fault("hostnameOverride", "it is blank");
    }
    Some(name)
}

fn rate(reader: &mut Reader<'_>) -> (f64, u32) {
    let written = reader.get("clientConnection.qps").and_then(Value::as_f64).unwrap_or(0.0);
    let per_second = if written == 0.0 { 5.0 } else { written };
    let burst = match reader.number("clientConnection.burst", 0u32) {
        0 => 10,
        burst => burst,
    };
    (per_second, burst)
}

fn default_addresses(bind_address: IpAddr) -> (SocketAddr, SocketAddr) {
    match bind_address {
        IpAddr::V4(_) => (([0; 4], HEALTHZ_PORT).into(), ([127, 0, 0, 1], METRICS_PORT).into()),
        IpAddr::V6(_) => (([0u16; 8], HEALTHZ_PORT).into(), ([0u16, 0, 0, 0, 0, 0, 0, 1], METRICS_PORT).into()),
    }
}

/// An address with or without a port; unset is the default.
fn socket(reader: &mut Reader<'_>, path: &str, default: SocketAddr, port: u16) -> Option<SocketAddr> {
    let Some(text) = reader.text(path) else { return Some(default) };
    let bare = text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    let address = text.parse().ok().or_else(|| bare.ok().map(|address| SocketAddr::new(address, port)));
    if address.is_none() {
        reader.fault(path, format!("{text:?} is not an IP address with a port"));
    }
    // Port 0 is how the old flags switch it off.
    address.filter(|address| address.port() != 0)
}

fn range(reader: &mut Reader<'_>, path: &str, text: &str) -> Option<IpNet> {
    let range = text.trim().parse::<IpNet>().ok().map(|range| range.trunc());
    if range.is_none() {
        reader.fault(path, format!("{text:?} is not a range as 10.244.0.0/16"));
    }
    range
}

fn detect_local(reader: &mut Reader<'_>) -> DetectLocal {
    match reader.text("detectLocalMode").as_deref() {
        None | Some("ClusterCIDR") => DetectLocal::Cluster(cluster_cidrs(reader)),
        Some("NodeCIDR") => DetectLocal::Node,
        Some("BridgeInterface") => DetectLocal::Bridge(interface(reader, "detectLocal.bridgeInterface")),
        Some("InterfaceNamePrefix") => {
            DetectLocal::InterfacePrefix(interface(reader, "detectLocal.interfaceNamePrefix"))
        }
        Some(other) => {
            let modes = "ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix";
            reader.fault("detectLocalMode", format!("{other:?} is not one of {modes}"));
            DetectLocal::Node
        }
    }
}

/// A name, or the beginning of one, of at most the 15 bytes that the kernel takes.
fn interface(reader: &mut Reader<'_>, path: &str) -> String {
    let name = reader.text(path).unwrap_or_default();
    if name.is_empty() || name.len() > 15 {
        reader.fault(path, format!("{name:?} is not the name of an interface, which detectLocalMode asks for"));
    }
    name
}

/// One range, or one of each family.
fn cluster_cidrs(reader: &mut Reader<'_>) -> Vec<IpNet> {
    const PATH: &str = "clusterCIDR";
    let text = reader.text(PATH).unwrap_or_default();
    let texts = text.split(',').filter(|text| !text.is_empty());
    let ranges: Vec<IpNet> = texts.filter_map(|text| range(reader, PATH, text)).collect();
    match ranges.as_slice() {
        [] | [_] => {}
        [one, other] if one.addr().is_ipv6() != other.addr().is_ipv6() => {}
        _ => reader.fault(PATH, format!("{text:?} has more than one range of a family")),
    }
    ranges
}

fn node_port_addresses(reader: &mut Reader<'_>) -> Vec<NodePortAddress> {
    const PATH: &str = "nodePortAddresses";
    let texts = reader.texts(PATH);
    if texts.is_empty() {
        let nftables = reader.text("mode").as_deref() == Some("nftables");
        return vec![if nftables { NodePortAddress::Primary } else { NodePortAddress::All }];
    }
    let mut addresses = Vec::new();
    for text in &texts {
        let address = match text.as_str() {
            "primary" => Some(NodePortAddress::Primary),
            "all" => Some(NodePortAddress::All),
            "localhost" => Some(NodePortAddress::Localhost),
            text => range(reader, PATH, text).map(NodePortAddress::Range),
        };
        if addresses.iter().any(|known| Some(*known) == address) {
            reader.fault(PATH, format!("{text:?} stands twice"));
        }
        addresses.extend(address);
    }
    addresses
}

fn conntrack(reader: &mut Reader<'_>) -> Conntrack {
    let default = Conntrack::default();
    // Here zero is not the default: it leaves what is.
    let time = |reader: &Reader<'_>, path: &str, default: Option<Duration>| match reader.get(path) {
        Some(_) => reader.span(path),
        None => default,
    };
    Conntrack {
        max_per_core: reader.number("conntrack.maxPerCore", default.max_per_core),
        min: reader.number("conntrack.min", default.min),
        tcp_established: time(reader, "conntrack.tcpEstablishedTimeout", default.tcp_established),
        tcp_close_wait: time(reader, "conntrack.tcpCloseWaitTimeout", default.tcp_close_wait),
        tcp_be_liberal: reader.flag("conntrack.tcpBeLiberal", false),
        udp: reader.span("conntrack.udpTimeout"),
        udp_stream: reader.span("conntrack.udpStreamTimeout"),
    }
}

fn ipvs(reader: &mut Reader<'_>) -> IpvsOptions {
    const EXCLUDED: &str = "ipvs.excludeCIDRs";
    let texts = reader.texts(EXCLUDED);
    let default = IpvsOptions::default();
    let time = |reader: &Reader<'_>, path: &str| reader.span(path).unwrap_or_default();
    IpvsOptions {
        scheduler: reader.text("ipvs.scheduler").unwrap_or(default.scheduler),
        exclude_cidrs: texts.iter().filter_map(|text| range(reader, EXCLUDED, text)).collect(),
        strict_arp: reader.flag("ipvs.strictARP", false),
        tcp_timeout: time(reader, "ipvs.tcpTimeout"),
        tcp_fin_timeout: time(reader, "ipvs.tcpFinTimeout"),
        udp_timeout: time(reader, "ipvs.udpTimeout"),
    }
}
