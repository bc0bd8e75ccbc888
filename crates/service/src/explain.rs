//! What a packet to a Service meets on this node, in words.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::choose::{Candidate, LeftOut, left_out};
use crate::{Entry, Fault, Frontend, Kind, Name, Protocol, Target};

/// All of one Service.
#[derive(Debug, Clone)]
pub struct Explanation {
    /// Which.
    pub service: Name,
    /// Its frontends, and what holds for each.
    pub frontends: Vec<(Frontend, Outcome)>,
    /// Its ports, in each address family.
    pub ports: Vec<PortExplanation>,
    /// What is wrong with it.
    pub faults: Vec<Fault>,
}

/// What holds for a frontend.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// Connections meet this.
    Entry(Entry),
    /// An older Service has it.
    Taken(Name),
}

/// Who stands behind a port in one address family.
#[derive(Debug, Clone)]
pub struct PortExplanation {
    /// Name of the port; empty if it has none.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its address family.
    pub ipv6: bool,
    /// All endpoints, and why some get nothing.
    pub endpoints: Vec<EndpointExplanation>,
    /// Endpoints whose slices have no port of this name.
    pub without_port: usize,
}

/// One endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndpointExplanation {
    /// Its address.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Whether it is on this node.
    pub local: bool,
    /// Why it gets no new connection from whoever may be led to any node; none if it gets some.
    pub left_out: Option<LeftOut>,
    /// Connections to it by this Service that the kernel tracks; none if nobody has counted.
    pub connections: Option<usize>,
}

impl Explanation {
    /// Where the Service's connections come in.
    pub fn led(&self) -> impl Iterator<Item = Frontend> {
        self.frontends.iter().filter(|(_, outcome)| matches!(outcome, Outcome::Entry(_))).map(|(frontend, _)| *frontend)
    }

    /// Says how many connections each endpoint has.
    pub fn set_connections(&mut self, count: impl Fn(Protocol, SocketAddr) -> usize) {
        for port in &mut self.ports {
            for one in &mut port.endpoints {
                one.connections = Some(count(port.protocol, SocketAddr::new(one.address, one.port)));
            }
        }
    }
}

impl PortExplanation {
    pub(crate) fn new(
        (name, protocol, ipv6): (Arc<str>, Protocol, bool),
        candidates: Vec<Candidate<'_>>,
        zone: Option<&str>,
        without_port: usize,
    ) -> PortExplanation {
        let endpoints = left_out(candidates, zone).into_iter().map(|(one, left_out)| EndpointExplanation {
            address: one.endpoint.address,
            port: one.port,
            local: one.endpoint.local,
            left_out,
            connections: None,
        });
        PortExplanation { name, protocol, ipv6, endpoints: endpoints.collect(), without_port }
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "Service {}", self.service)?;
        if self.frontends.is_empty() {
            writeln!(f, "  it has no address of its own: nothing is led anywhere")?;
        }
        for (frontend, outcome) in &self.frontends {
            match outcome {
                Outcome::Entry(entry) => write_entry(f, frontend, entry)?,
                Outcome::Taken(by) => writeln!(f, "  {frontend}: belongs to Service {by}, which is older")?,
            }
        }
        for port in &self.ports {
            write!(f, "{port}")?;
        }
        for fault in &self.faults {
            if let Fault::Unusable { field, value } = fault {
                writeln!(f, "  {field} is left out: \"{value}\" cannot be used")?;
            }
        }
        Ok(())
    }
}

fn write_entry(f: &mut fmt::Formatter<'_>, frontend: &Frontend, entry: &Entry) -> fmt::Result {
    write!(f, "  {frontend} ({}): {}", kind(entry.kind), target(&entry.inside))?;
    if entry.inside_local {
        f.write_str(", of this node only (internalTrafficPolicy: Local)")?;
    }
    if let Some(outside) = &entry.outside {
        write!(f, "; from outside the cluster {} (externalTrafficPolicy: Local)", target(outside))?;
    }
    if let Some(seconds) = entry.affinity_s {
        write!(f, "; a client keeps its endpoint for {seconds} s")?;
    }
    if let Some(sources) = &entry.sources {
        let sources: Vec<String> = sources.iter().map(ToString::to_string).collect();
        write!(f, "; only from {}", if sources.is_empty() { "nobody".to_owned() } else { sources.join(", ") })?;
    }
    writeln!(f)
}

fn kind(kind: Kind) -> &'static str {
    match kind {
        Kind::ClusterIp => "cluster IP",
        Kind::NodePort => "node port",
        Kind::ExternalIp => "external IP",
        Kind::LoadBalancer => "load balancer",
    }
}

fn target(target: &Target) -> String {
    match target {
        Target::Endpoints(all) if all.len() == 1 => "to 1 endpoint".to_owned(),
        Target::Endpoints(all) => format!("to one of {} endpoints", all.len()),
        Target::Refuse => "refused, as nobody serves".to_owned(),
        Target::Drop => "dropped, as nobody serves on this node".to_owned(),
    }
}

impl fmt::Display for PortExplanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let family = if self.ipv6 { "IPv6" } else { "IPv4" };
        let name = if self.name.is_empty() { String::new() } else { format!("{} ", self.name) };
        writeln!(f, "  port {name}{}, {family}:", self.protocol)?;
        if self.endpoints.is_empty() {
            writeln!(f, "    no endpoints")?;
        }
        for one in &self.endpoints {
            let place = SocketAddr::new(one.address, one.port);
            let node = if one.local { "on this node" } else { "elsewhere" };
            write!(f, "    {place} {node}")?;
            match one.connections {
                None => {}
                Some(1) => f.write_str(", 1 connection tracked")?,
                Some(count) => write!(f, ", {count} connections tracked")?,
            }
            match &one.left_out {
                None => writeln!(f)?,
                Some(why) => writeln!(f, ", left out: {why}")?,
            }
        }
        if self.without_port > 0 {
            writeln!(f, "    {} more whose EndpointSlice has no port of this name and protocol", self.without_port)?;
        }
        Ok(())
    }
}
