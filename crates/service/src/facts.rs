//! What of an object matters here, decoded once.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{LoadBalancerIngress, Node, Service, ServicePort as ApiPort, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint as ApiEndpoint, EndpointHints, EndpointPort, EndpointSlice};

use crate::addresses;
use crate::names::Interner;
use crate::{Frontend, Name, Protocol};

/// A Service with this label is somebody else's business.
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Slices of headless Services carry it.
const HEADLESS: &str = "service.kubernetes.io/headless";
const SERVICE_NAME: &str = "kubernetes.io/service-name";
const SOURCE_RANGES: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";
const ZONE: &str = "topology.kubernetes.io/zone";
/// The API's default of `sessionAffinityConfig.clientIP.timeoutSeconds`.
const AFFINITY_DEFAULT_S: i32 = 10_800;

/// Something about a Service that an operator should know.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Which Service.
    pub service: Name,
    /// What is wrong.
    pub fault: Fault,
}

/// What is wrong with a Service.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// An older Service has the same address and port.
    Taken {
        /// Where clients would connect to.
        frontend: Frontend,
        /// Who has it.
        by: Name,
    },
    /// A field cannot be used.
    Unusable {
        /// Its path.
        field: &'static str,
        /// What it says.
        value: String,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let service = &self.service;
        match &self.fault {
            Fault::Taken { frontend, by } => write!(
                f,
                "{frontend} of Service {service} leads to Service {by}, which is older; give one of them another address or port"
            ),
            Fault::Unusable { field, value } => {
                write!(f, "{field} of Service {service} is left out: \"{value}\" cannot be used; correct it")
            }
        }
    }
}

/// What matters of this node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct NodeFacts {
    pub(crate) zone: Option<Arc<str>>,
    pub(crate) addresses: Vec<IpAddr>,
}

impl NodeFacts {
    pub(crate) fn of(node: &Node) -> NodeFacts {
        let zone = node.metadata.labels.as_ref().and_then(|labels| labels.get(ZONE));
        let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
        NodeFacts {
            zone: zone.filter(|zone| !zone.is_empty()).map(|zone| zone.as_str().into()),
            addresses: addresses.filter_map(|one| one.address.parse().ok()).collect(),
        }
    }
}

/// One port of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Port {
    pub(crate) name: Arc<str>,
    pub(crate) protocol: Protocol,
    pub(crate) port: u16,
    pub(crate) node_port: Option<u16>,
}

/// What matters of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ServiceFacts {
    /// Of two claims to one frontend the older one counts. Seconds since 1970.
    pub(crate) created_s: i64,
    pub(crate) cluster_ips: Vec<IpAddr>,
    pub(crate) external_ips: Vec<IpAddr>,
    pub(crate) balancer_ips: Vec<IpAddr>,
    pub(crate) ports: Vec<Port>,
    pub(crate) affinity_s: Option<u32>,
    pub(crate) internal_local: bool,
    pub(crate) external_local: bool,
    pub(crate) sources: Option<Sources>,
    pub(crate) health_check_port: Option<u16>,
    pub(crate) faults: Vec<Fault>,
}

impl ServiceFacts {
    /// `None`: this Service has no address of its own, or is not ours.
    pub(crate) fn of(service: &Service, names: &mut Interner) -> Option<ServiceFacts> {
        let spec = service.spec.as_ref()?;
        let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
        let foreign = service.metadata.labels.as_ref().is_some_and(|labels| labels.contains_key(PROXY_NAME));
        if foreign || kind == "ExternalName" || !has_cluster_ip(spec) {
            return None;
        }
        let mut read = Reader { faults: Vec::new(), names };
        let created = service.metadata.creation_timestamp.as_ref();
        let node_ports = matches!(kind, "NodePort" | "LoadBalancer");
        let external_ips = read.addresses("spec.externalIPs", spec.external_ips.as_deref().unwrap_or_default());
        let external_local =
            spec.external_traffic_policy.as_deref() == Some("Local") && (node_ports || !external_ips.is_empty());
        let balancer_ips = if kind == "LoadBalancer" { read.ingress(service) } else { Vec::new() };
        let health_check = spec.health_check_node_port.filter(|_| kind == "LoadBalancer" && external_local);
        Some(ServiceFacts {
            created_s: created.map_or(0, |time| time.0.as_second()),
            cluster_ips: read.cluster_ips(spec),
            external_ips,
            balancer_ips,
            ports: read.ports(spec.ports.as_deref().unwrap_or_default(), node_ports),
            affinity_s: affinity(spec),
            internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            external_local,
            sources: read.sources(service, spec),
            health_check_port: health_check.and_then(port_number),
            faults: read.faults,
        })
    }
}

fn has_cluster_ip(spec: &ServiceSpec) -> bool {
    spec.cluster_ip.as_deref().is_some_and(|address| !address.is_empty() && address != "None")
}

fn port_number(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|number| *number != 0)
}

fn affinity(spec: &ServiceSpec) -> Option<u32> {
    if spec.session_affinity.as_deref() != Some("ClientIP") {
        return None;
    }
    let client_ip = spec.session_affinity_config.as_ref().and_then(|config| config.client_ip.as_ref());
    let seconds = client_ip.and_then(|client_ip| client_ip.timeout_seconds).unwrap_or(AFFINITY_DEFAULT_S);
    u32::try_from(seconds).ok().filter(|seconds| *seconds > 0)
}

/// Reads fields and remembers what it could not.
struct Reader<'n> {
    faults: Vec<Fault>,
    names: &'n mut Interner,
}

impl Reader<'_> {
    fn unusable(&mut self, field: &'static str, value: impl Into<String>) {
        self.faults.push(Fault::Unusable { field, value: value.into() });
    }

    fn addresses(&mut self, field: &'static str, texts: &[String]) -> Vec<IpAddr> {
        let mut read = Vec::new();
        for text in texts {
            match addresses::parse(text).filter(|address| addresses::is_servable(*address)) {
                Some(address) => read.push(address),
                None => self.unusable(field, text),
            }
        }
        read
    }

    fn cluster_ips(&mut self, spec: &ServiceSpec) -> Vec<IpAddr> {
        match spec.cluster_ips.as_deref() {
            Some(all @ [_, ..]) => self.addresses("spec.clusterIPs", all),
            _ => self.addresses("spec.clusterIP", spec.cluster_ip.as_slice()),
        }
    }

    /// Addresses which the load balancer delivers packets to; those of one that makes connections of its own
    /// (`ipMode: Proxy`) must lead through it.
    fn ingress(&mut self, service: &Service) -> Vec<IpAddr> {
        let balancer = service.status.as_ref().and_then(|status| status.load_balancer.as_ref());
        let ingress = balancer.and_then(|balancer| balancer.ingress.as_deref()).unwrap_or_default();
        let direct = |one: &&LoadBalancerIngress| one.ip_mode.as_deref() != Some("Proxy");
        let texts: Vec<String> = ingress.iter().filter(direct).filter_map(|one| one.ip.clone()).collect();
        self.addresses("status.loadBalancer.ingress", &texts)
    }

    fn ports(&mut self, ports: &[ApiPort], node_ports: bool) -> Vec<Port> {
        let mut read = Vec::new();
        for port in ports {
            let Some(protocol) = Protocol::parse(port.protocol.as_deref()) else {
                self.unusable("spec.ports.protocol", port.protocol.as_deref().unwrap_or_default());
                continue;
            };
            let Some(number) = port_number(port.port) else {
                self.unusable("spec.ports.port", port.port.to_string());
                continue;
            };
            read.push(Port {
                name: self.names.text(port.name.as_deref().unwrap_or("")),
                protocol,
                port: number,
                node_port: port.node_port.filter(|_| node_ports).and_then(port_number),
            });
        }
        read
    }

    fn sources(&mut self, service: &Service, spec: &ServiceSpec) -> Option<Sources> {
        const FIELD: &str = "spec.loadBalancerSourceRanges";
        let annotation = service.metadata.annotations.as_ref().and_then(|all| all.get(SOURCE_RANGES));
        let from_annotation = || annotation.iter().flat_map(|text| text.split(',')).map(str::to_owned).collect();
        let texts: Vec<String> = match spec.load_balancer_source_ranges.as_deref() {
            Some(ranges @ [_, ..]) => ranges.to_vec(),
            _ => from_annotation(),
        };
        let mut sources = Sources { ranges: Vec::new(), unread: false };
        for text in texts.iter().map(|text| text.trim()).filter(|text| !text.is_empty()) {
            match addresses::parse_range(text) {
                Some(range) => sources.ranges.push(range.trunc()),
                None => {
                    sources.unread = true;
                    self.unusable(FIELD, text);
                }
            }
        }
        sources.ranges.sort_unstable();
        sources.ranges.dedup();
        (sources.unread || !sources.ranges.is_empty()).then_some(sources)
    }
}

/// Who may connect to the addresses of load balancers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Sources {
    /// In order.
    ranges: Vec<IpNet>,
    /// Some could not be read, and may have been of either family.
    unread: bool,
}

impl Sources {
    /// The ranges that admit clients of a family; `None`: it is not limited. Ranges of one family say nothing of the other
    /// one, as upstream has it: its proxy of each family sees that family's ranges, and none means everybody.
    pub(crate) fn of_family(&self, ipv6: bool) -> Option<Vec<IpNet>> {
        let of_family = self.ranges.iter().filter(|range| range.addr().is_ipv6() == ipv6);
        let ranges: Vec<IpNet> = of_family.copied().collect();
        let limits = !ranges.is_empty() || self.unread;
        (limits && ranges.iter().all(|range| range.prefix_len() > 0)).then_some(ranges)
    }
}

/// What an endpoint says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Conditions {
    pub(crate) ready: bool,
    pub(crate) serving: bool,
    pub(crate) terminating: bool,
}

/// For whom an endpoint is near.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Hints {
    pub(crate) names_nodes: bool,
    pub(crate) this_node: bool,
    pub(crate) zones: Box<[Arc<str>]>,
}

impl Hints {
    pub(crate) fn names(&self, zone: &str) -> bool {
        self.zones.iter().any(|named| **named == *zone)
    }
}

/// One endpoint of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SliceEndpoint {
    pub(crate) address: IpAddr,
    /// On this node.
    pub(crate) local: bool,
    pub(crate) conditions: Conditions,
    pub(crate) hints: Option<Box<Hints>>,
    /// Whose it is, if he may be on this node.
    pub(crate) holder: Option<Holder>,
}

/// Who stands behind an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Holder {
    /// The pod with this uid.
    Pod(Arc<str>),
    /// Whoever has this address.
    Address(IpAddr),
}

/// One port of a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SlicePort {
    pub(crate) name: Arc<str>,
    pub(crate) protocol: Protocol,
    pub(crate) number: u16,
}

/// What matters of an EndpointSlice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SliceFacts {
    pub(crate) service: Name,
    pub(crate) ipv6: bool,
    pub(crate) ports: Box<[SlicePort]>,
    pub(crate) endpoints: Box<[SliceEndpoint]>,
}

impl SliceFacts {
    /// `None`: it stands behind no address.
    pub(crate) fn of(slice: &EndpointSlice, node: &str, names: &mut Interner) -> Option<SliceFacts> {
        let labels = slice.metadata.labels.as_ref()?;
        let service = labels.get(SERVICE_NAME).filter(|_| !labels.contains_key(HEADLESS))?;
        let ipv6 = match slice.address_type.as_str() {
            "IPv4" => false,
            "IPv6" => true,
            _ => return None,
        };
        let ports = slice.ports.iter().flatten().filter_map(|port| read_port(port, names)).collect();
        let endpoints = slice.endpoints.iter().flatten();
        Some(SliceFacts {
            service: names.name(slice.metadata.namespace.as_deref().unwrap_or(""), service),
            ipv6,
            ports,
            endpoints: endpoints.filter_map(|endpoint| read_endpoint(endpoint, ipv6, node, names)).collect(),
        })
    }

    /// The number of a port.
    pub(crate) fn port(&self, name: &str, protocol: Protocol) -> Option<u16> {
        let port = self.ports.iter().find(|port| *port.name == *name && port.protocol == protocol)?;
        Some(port.number)
    }

    /// Who of this node takes connections and does not end.
    pub(crate) fn holders(&self) -> impl Iterator<Item = Holder> {
        let open = |conditions: Conditions| conditions.ready && !conditions.terminating;
        self.endpoints.iter().filter(move |endpoint| open(endpoint.conditions)).filter_map(|one| one.holder.clone())
    }
}

/// A port without a number stands for all ports, which nothing can lead to.
fn read_port(port: &EndpointPort, names: &mut Interner) -> Option<SlicePort> {
    let protocol = Protocol::parse(port.protocol.as_deref())?;
    let number = port.port.and_then(port_number)?;
    Some(SlicePort { name: names.text(port.name.as_deref().unwrap_or("")), protocol, number })
}

fn read_endpoint(endpoint: &ApiEndpoint, ipv6: bool, node: &str, names: &mut Interner) -> Option<SliceEndpoint> {
    // The API: consumers use the first address.
    let address = addresses::parse(endpoint.addresses.first()?)?;
    if address.is_ipv6() != ipv6 || address.is_unspecified() {
        return None;
    }
    let of = endpoint.node_name.as_deref();
    let pod = endpoint.target_ref.as_ref().filter(|target| target.kind.as_deref() == Some("Pod"));
    let uid = pod.and_then(|pod| pod.uid.as_deref());
    let holder = uid.map_or(Holder::Address(address), |uid| Holder::Pod(uid.into()));
    let says = endpoint.conditions.as_ref();
    Some(SliceEndpoint {
        address,
        local: of == Some(node),
        conditions: Conditions {
            ready: says.and_then(|says| says.ready).unwrap_or(true),
            serving: says.and_then(|says| says.serving).unwrap_or(true),
            terminating: says.and_then(|says| says.terminating).unwrap_or(false),
        },
        hints: endpoint.hints.as_ref().and_then(|hints| read_hints(hints, node, names)),
        holder: of.is_none_or(|of| of == node).then_some(holder),
    })
}

fn read_hints(hints: &EndpointHints, node: &str, names: &mut Interner) -> Option<Box<Hints>> {
    let nodes = hints.for_nodes.as_deref().unwrap_or_default();
    let zones = hints.for_zones.as_deref().unwrap_or_default();
    if nodes.is_empty() && zones.is_empty() {
        return None;
    }
    Some(Box::new(Hints {
        names_nodes: !nodes.is_empty(),
        this_node: nodes.iter().any(|one| one.name == node),
        zones: zones.iter().map(|one| names.text(&one.name)).collect(),
    }))
}
