//! Services and their endpoints, as small values that a scenario can change, and what they are as objects of the API.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use anyhow::Context as _;
use serde_json::{Map, Value, json};
use testkit::service_lab::{Pair, Protocol, backend};

/// The ranges of Services.
pub(super) const SERVICE_RANGES: &str = "10.96.0.0/16,fd00:10:96::/112";

/// The node whose proxy is tested, and its zone.
pub(super) const NODE: &str = "here";
pub(super) const ZONE: &str = "near";
/// The other node.
pub(super) const OTHER_NODE: &str = "there";

const NAMESPACE: &str = "default";

/// Everything that the API server is to have.
#[derive(Debug, Clone, Default)]
pub(super) struct World {
    pub(super) services: Vec<Service>,
    pub(super) slices: Vec<Slice>,
}

/// A Service. Its number is its identity: name and addresses follow from it.
#[derive(Debug, Clone)]
pub(super) struct Service {
    pub(super) number: u8,
    /// Its only family of addresses; none if it has both.
    pub(super) family: Option<Family>,
    pub(super) ports: Vec<Port>,
    /// Fields of its specification beside addresses and ports.
    pub(super) spec: Map<String, Value>,
    pub(super) labels: Map<String, Value>,
    /// Addresses of load balancers: `ip` and perhaps `ipMode`.
    pub(super) ingress: Vec<Value>,
    /// Whether nobody asks for it: it is there to be many.
    pub(super) is_crowd: bool,
}

/// A family of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Family {
    V4,
    V6,
}

impl Family {
    /// As the API spells it.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Port {
    pub(super) name: &'static str,
    pub(super) number: u16,
    pub(super) protocol: Protocol,
    pub(super) node_port: Option<u16>,
}

/// An EndpointSlice of each family of addresses.
#[derive(Debug, Clone)]
pub(super) struct Slice {
    pub(super) service: u8,
    pub(super) number: u8,
    /// Name, protocol and number; one without a number says nothing.
    pub(super) ports: Vec<(&'static str, Protocol, Option<u16>)>,
    pub(super) endpoints: Vec<Endpoint>,
    /// So many endpoints more, where nobody is.
    strangers: u16,
}

#[derive(Debug, Clone)]
pub(super) struct Endpoint {
    pub(super) backend: &'static str,
    pub(super) conditions: Conditions,
    /// Zones that are to use it.
    pub(super) for_zones: Vec<&'static str>,
    /// Nodes that are to use it.
    pub(super) for_nodes: Vec<&'static str>,
    /// Whether the slice says on which node it is.
    has_node: bool,
}

/// What a slice says of an endpoint's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Conditions {
    /// Nothing: ready.
    Unknown,
    Ready,
    /// Neither ready nor serving.
    Unready,
    /// Ending, but it still serves.
    Serving,
    /// Ending, and it serves no more.
    Ended,
}

/// One endpoint, ready.
pub(super) fn end(backend: &'static str) -> Endpoint {
    let conditions = Conditions::Ready;
    Endpoint { backend, conditions, for_zones: Vec::new(), for_nodes: Vec::new(), has_node: true }
}

impl Endpoint {
    pub(super) fn is(self, conditions: Conditions) -> Self {
        Self { conditions, ..self }
    }

    /// Of which the slice does not say on which node it is.
    pub(super) fn anywhere(self) -> Self {
        Self { has_node: false, ..self }
    }

    pub(super) fn for_zones(self, zones: &[&'static str]) -> Self {
        Self { for_zones: zones.to_vec(), ..self }
    }

    pub(super) fn for_nodes(self, nodes: &[&'static str]) -> Self {
        Self { for_nodes: nodes.to_vec(), ..self }
    }

    fn json(&self, ipv6: bool) -> anyhow::Result<Value> {
        let place = backend(self.backend)?;
        let node = if place.is_local { NODE } else { OTHER_NODE };
        let [v4, v6] = place.address.both();
        let conditions = match self.conditions {
            Conditions::Unknown => json!({}),
            Conditions::Ready => json!({ "ready": true, "serving": true, "terminating": false }),
            Conditions::Unready => json!({ "ready": false, "serving": false, "terminating": false }),
            Conditions::Serving => json!({ "ready": false, "serving": true, "terminating": true }),
            Conditions::Ended => json!({ "ready": false, "serving": false, "terminating": true }),
        };
        let named = |names: &[&str]| names.iter().map(|name| json!({ "name": name })).collect::<Vec<_>>();
        let mut endpoint = json!({
            "addresses": [if ipv6 { v6 } else { v4 }], "conditions": conditions,
            "zone": if place.is_local { ZONE } else { "far" },
        });
        if self.has_node {
            endpoint["nodeName"] = json!(node);
        }
        if !self.for_zones.is_empty() {
            endpoint["hints"]["forZones"] = json!(named(&self.for_zones));
        }
        if !self.for_nodes.is_empty() {
            endpoint["hints"]["forNodes"] = json!(named(&self.for_nodes));
        }
        Ok(endpoint)
    }
}

impl Service {
    /// With one port of TCP, 80.
    pub(super) fn new(number: u8) -> Self {
        let ports = vec![Port { name: "", number: 80, protocol: Protocol::Tcp, node_port: None }];
        let (spec, labels) = (Map::new(), Map::new());
        Self { number, family: None, ports, spec, labels, ingress: Vec::new(), is_crowd: false }
    }

    /// With addresses of one family.
    pub(super) fn only(self, family: Family) -> Self {
        Self { family: Some(family), ..self }
    }

    /// With other ports: name, protocol, number.
    pub(super) fn ports(self, ports: &[(&'static str, Protocol, u16)]) -> Self {
        let port = |&(name, protocol, number): &(_, _, _)| Port { name, number, protocol, node_port: None };
        Self { ports: ports.iter().map(port).collect(), ..self }
    }

    /// With this field of its specification.
    pub(super) fn with(mut self, field: &str, value: Value) -> Self {
        self.spec.insert(field.to_owned(), value);
        self
    }

    /// With a node port for each port.
    pub(super) fn node_ports(mut self) -> Self {
        let first = 30_000 + u16::from(self.number) * 10;
        for (port, number) in self.ports.iter_mut().zip(first..) {
            port.node_port = Some(number);
        }
        if self.spec.contains_key("type") { self } else { self.with("type", json!("NodePort")) }
    }

    /// Behind a load balancer.
    pub(super) fn balanced(mut self, ingress: Value) -> Self {
        self.ingress.push(ingress);
        self.with("type", json!("LoadBalancer")).node_ports()
    }

    /// With a label.
    pub(super) fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.insert(name.to_owned(), json!(value));
        self
    }

    pub(super) fn name(&self) -> String {
        format!("service-{}", self.number)
    }

    /// Its own addresses, if it has some.
    pub(super) fn cluster_ips(&self) -> Vec<IpAddr> {
        let none = self.is("clusterIP", "None") || self.is("type", "ExternalName");
        let of_family = |address: &IpAddr| self.family.is_none_or(|family| address.is_ipv6() == (family == Family::V6));
        if none { Vec::new() } else { cluster_ips(self.number).both().into_iter().filter(of_family).collect() }
    }

    pub(super) fn is(&self, field: &str, value: &str) -> bool {
        self.spec.get(field).is_some_and(|found| found == value)
    }

    /// External addresses and those of load balancers.
    pub(super) fn external_ips(&self) -> Vec<IpAddr> {
        let external = self.spec.get("externalIPs").and_then(Value::as_array).into_iter().flatten();
        let balancers = self.ingress.iter().filter_map(|ingress| ingress.get("ip"));
        external.chain(balancers).filter_map(|ip| ip.as_str()?.parse().ok()).collect()
    }

    fn json(&self) -> Value {
        let mut spec = self.spec.clone();
        let port = |port: &Port| {
            let mut body = json!({ "name": port.name, "port": port.number, "protocol": port.protocol.name() });
            if let Some(number) = port.node_port {
                body["nodePort"] = json!(number);
            }
            body
        };
        if !self.is("type", "ExternalName") {
            spec.insert("ports".to_owned(), self.ports.iter().map(port).collect());
        }
        let ips = self.cluster_ips();
        if !ips.is_empty() {
            let (policy, families) = match self.family {
                None => ("RequireDualStack", vec!["IPv4", "IPv6"]),
                Some(family) => ("SingleStack", vec![family.name()]),
            };
            spec.insert("ipFamilyPolicy".to_owned(), json!(policy));
            spec.insert("ipFamilies".to_owned(), json!(families));
            spec.insert("clusterIP".to_owned(), json!(ips[0]));
            spec.insert("clusterIPs".to_owned(), json!(ips));
        }
        json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": { "name": self.name(), "labels": self.labels }, "spec": spec,
        })
    }
}

/// The addresses of the Service with this number.
pub(super) fn cluster_ips(number: u8) -> Pair {
    // The first ones are for the cluster's own.
    Pair { v4: [10, 96, 1, number].into(), v6: [0xfd00, 0x10, 0x96, 0, 0, 0, 0, 0x100 + u16::from(number)].into() }
}

impl Slice {
    /// The first slice of a service: its port without a name is 8080.
    pub(super) fn new(service: u8, endpoints: &[Endpoint]) -> Self {
        let ports = vec![("", Protocol::Tcp, Some(8080))];
        Self { service, number: 0, ports, endpoints: endpoints.to_vec(), strangers: 0 }
    }

    /// With other ports.
    pub(super) fn ports(self, ports: &[(&'static str, Protocol, Option<u16>)]) -> Self {
        Self { ports: ports.to_vec(), ..self }
    }

    /// As another slice of the same service.
    pub(super) fn number(self, number: u8) -> Self {
        Self { number, ..self }
    }

    /// With so many endpoints more, of which none is there.
    pub(super) fn strangers(self, strangers: u16) -> Self {
        Self { strangers, ..self }
    }

    fn stranger(&self, nth: u16, ipv6: bool) -> IpAddr {
        let [high, low] = nth.to_be_bytes();
        match ipv6 {
            true => [0xfd00, 0x10, 0x244, 0xff, 0, 0, self.number.into(), nth].into(),
            false => [10, 244, 128 + 16 * self.number + high, low].into(),
        }
    }

    fn json(&self, ipv6: bool) -> anyhow::Result<Value> {
        let port = |(name, protocol, number): &(&str, Protocol, Option<u16>)| {
            let mut body = json!({ "name": name, "protocol": protocol.name() });
            if let Some(number) = number {
                body["port"] = json!(number);
            }
            body
        };
        let mut endpoints = self.endpoints.iter().map(|end| end.json(ipv6)).collect::<anyhow::Result<Vec<_>>>()?;
        endpoints.extend((0..self.strangers).map(|nth| json!({ "addresses": [self.stranger(nth, ipv6)] })));
        let (family, suffix) = if ipv6 { ("IPv6", 6) } else { ("IPv4", 4) };
        let service = format!("service-{}", self.service);
        Ok(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
            "metadata": {
                "name": format!("{service}-{}-{suffix}", self.number),
                "labels": { "kubernetes.io/service-name": service },
            },
            "ports": self.ports.iter().map(port).collect::<Vec<_>>(), "endpoints": endpoints,
        }))
    }
}

/// A Service with more endpoints than kube-proxy writes all words about, and than one slice may have.
pub(super) fn crowd() -> World {
    const NUMBER: u8 = 250;
    let service = Service { is_crowd: true, ..Service::new(NUMBER) };
    let slices = [0, 1].map(|number| Slice::new(NUMBER, &[]).number(number).strangers(501));
    World { services: vec![service], slices: slices.to_vec() }
}

/// An object of the API.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Object {
    /// Where such objects are created.
    pub(super) collection: String,
    pub(super) body: Value,
    /// What has to be written apart.
    pub(super) status: Option<Value>,
}

impl World {
    /// Its objects by their names.
    pub(super) fn objects(&self) -> anyhow::Result<BTreeMap<String, Object>> {
        let mut objects = BTreeMap::new();
        let mut add = |collection: String, body: Value, status: Option<Value>| {
            let name = body["metadata"]["name"].as_str().context("an object has a name")?;
            objects.insert(format!("{collection}/{name}"), Object { collection, body, status });
            anyhow::Ok(())
        };
        for service in &self.services {
            let status = json!({ "status": { "loadBalancer": { "ingress": service.ingress } } });
            add(services(), service.json(), (!service.ingress.is_empty()).then_some(status))?;
        }
        for slice in &self.slices {
            for ipv6 in [false, true] {
                add(slices(), slice.json(ipv6)?, None)?;
            }
        }
        Ok(objects)
    }

    /// Shows what it is made of.
    pub(super) fn print(&self, name: &str) -> anyhow::Result<()> {
        println!("{name}:");
        for (path, object) in self.objects()? {
            println!("  {path} {} {}", object.body, object.status.unwrap_or_default());
        }
        Ok(())
    }

    /// Addresses of a service's endpoints, as far as they may be led to at all.
    pub(super) fn addresses(&self, service: u8) -> BTreeSet<IpAddr> {
        let slices = self.slices.iter().filter(|slice| slice.service == service);
        let is_used = |end: &&Endpoint| !matches!(end.conditions, Conditions::Unready | Conditions::Ended);
        let ends = slices.flat_map(|slice| &slice.endpoints).filter(is_used);
        ends.filter_map(|end| backend(end.backend).ok()).flat_map(|backend| backend.address.both()).collect()
    }

    /// How many endpoints a service can have at most.
    pub(super) fn endpoints(&self, service: u8) -> usize {
        let slices = self.slices.iter().filter(|slice| slice.service == service);
        slices.map(|slice| slice.endpoints.len() * slice.ports.len().max(1)).sum()
    }
}

fn services() -> String {
    format!("/api/v1/namespaces/{NAMESPACE}/services")
}

fn slices() -> String {
    format!("/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices")
}

/// A service that leads to pod `a` at a port of its own choice, which tells how far a proxy has come.
#[derive(Debug, Clone, Copy)]
pub(super) struct Marker(pub(super) u16);

impl Marker {
    const NUMBER: u8 = 254;

    pub(super) fn add_to(self, world: &mut World) {
        let service = Service::new(Self::NUMBER).ports(&[("", Protocol::Tcp, self.port())]);
        world.services.push(service);
        let ports = [("", Protocol::Tcp, Some(self.target()))];
        world.slices.push(Slice::new(Self::NUMBER, &[end("a")]).ports(&ports));
    }

    pub(super) fn addresses(self) -> [IpAddr; 2] {
        cluster_ips(Self::NUMBER).both()
    }

    pub(super) fn port(self) -> u16 {
        10_000 + self.0
    }

    /// Another one than before.
    pub(super) fn target(self) -> u16 {
        9001 + self.0 % 2
    }
}
