//! What the cluster's names mean, as plain records (Kubernetes DNS specification 1.1.0, docs/specification.md in
//! kubernetes/dns).
//!
//! ```text
//! web.default.svc.cluster.local              A, AAAA: the service's addresses, or those of its endpoints (headless)
//! _http._tcp.web.default.svc.cluster.local   SRV, one for each named port (and endpoint)
//! db-0.db.default.svc.cluster.local          A, AAAA of one endpoint
//! 10-85-0-7.default.pod.cluster.local        A, AAAA of a pod
//! 1.0.96.10.in-addr.arpa                     PTR
//! ```

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use domain::base::{Name, NameBuilder, Rtype};
use ipnet::IpNet;

use crate::Protocol;

/// A name, compared without regard to case; copies share their bytes.
pub(crate) type Dname = Name<Arc<[u8]>>;

/// Moves a name to where copies of it are cheap.
pub(crate) fn shared(name: Name<Vec<u8>>) -> Dname {
    Name::from_octets(name.into_octets().into()).expect("it was a name before")
}

/// A value that cannot be a part of a DNS name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} cannot be a DNS name: labels are 1 to 63 bytes, names at most 255")]
pub struct InvalidName {
    /// What was given.
    pub text: String,
}

/// The data of one record.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Data {
    A(Ipv4Addr),
    Aaaa(Ipv6Addr),
    Srv { port: u16, target: Dname },
    Ptr(Dname),
    Cname(Dname),
    Txt(Box<[u8]>),
}

impl Data {
    pub(crate) fn rtype(&self) -> Rtype {
        match self {
            Data::A(_) => Rtype::A,
            Data::Aaaa(_) => Rtype::AAAA,
            Data::Srv { .. } => Rtype::SRV,
            Data::Ptr(_) => Rtype::PTR,
            Data::Cname(_) => Rtype::CNAME,
            Data::Txt(_) => Rtype::TXT,
        }
    }

    pub(crate) fn of(ip: IpAddr) -> Data {
        match ip {
            IpAddr::V4(v4) => Data::A(v4),
            IpAddr::V6(v6) => Data::Aaaa(v6),
        }
    }
}

/// What the zone knows about a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Answer<'a> {
    /// Another server's matter.
    Elsewhere,
    /// There is no such name.
    NoName,
    /// The name exists, records of this type do not.
    NoData,
    /// These.
    Records(Vec<&'a Data>),
    /// The name stands for another one.
    Alias(&'a Dname),
}

/// A named port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Name of the port; one without a name has no record.
    pub name: String,
    /// Transport protocol.
    pub protocol: Protocol,
    /// Number.
    pub port: u16,
}

/// Somebody who serves a headless service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Address.
    pub ip: IpAddr,
    /// Name below the service; `None`: the address with dashes.
    pub hostname: Option<String>,
    /// Ports.
    pub ports: Vec<Port>,
}

/// Where a service's name leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// To the service's own addresses.
    Cluster {
        /// The addresses.
        ips: Vec<IpAddr>,
        /// The ports.
        ports: Vec<Port>,
    },
    /// To these endpoints: the ready ones, or all where the service publishes addresses that are not ready.
    Headless(Vec<Endpoint>),
    /// To another name, in the cluster or outside.
    External(String),
}

/// All names of the cluster at one moment. Built anew for each change, in any order; the same record twice is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Zone {
    domain: Dname,
    records: BTreeMap<Dname, Vec<Data>>,
    networks: Vec<IpNet>,
}

impl Zone {
    /// An empty zone for a cluster domain such as `cluster.local`.
    ///
    /// # Errors
    /// The domain is no DNS name.
    pub fn new(domain: &str) -> Result<Zone, InvalidName> {
        let mut zone = Zone::bare(parse(domain)?);
        // Specification, 2.2.
        zone.add(zone.below(&["dns-version"])?, Data::Txt(b"1.1.0".as_slice().into()));
        Ok(zone)
    }

    /// Nothing but a domain.
    pub(crate) fn bare(domain: Dname) -> Zone {
        Zone { domain, records: BTreeMap::new(), networks: Vec::new() }
    }

    /// Adds a service: its own name, those of its ports and endpoints, and the names of its addresses.
    ///
    /// # Errors
    /// A part is no DNS name; what came before it was added.
    pub fn add_service(&mut self, namespace: &str, name: &str, target: &Target) -> Result<(), InvalidName> {
        let service = self.below(&[name, namespace, "svc"])?;
        match target {
            Target::Cluster { ips, ports } => {
                for ip in ips {
                    self.add(service.clone(), Data::of(*ip));
                    self.add(reverse(*ip), Data::Ptr(service.clone()));
                }
                self.add_ports(&service, ports, &service)
            }
            Target::Headless(endpoints) => {
                endpoints.iter().try_for_each(|endpoint| self.add_endpoint(&service, endpoint))
            }
            Target::External(other) => {
                let other = parse(other)?;
                self.add(service, Data::Cname(other));
                Ok(())
            }
        }
    }

    fn add_endpoint(&mut self, service: &Dname, endpoint: &Endpoint) -> Result<(), InvalidName> {
        let own = match &endpoint.hostname {
            Some(hostname) => prepend(&[hostname], service)?,
            None => prepend(&[&dashed(endpoint.ip)], service)?,
        };
        self.add(service.clone(), Data::of(endpoint.ip));
        self.add(own.clone(), Data::of(endpoint.ip));
        self.add(reverse(endpoint.ip), Data::Ptr(own.clone()));
        self.add_ports(service, &endpoint.ports, &own)
    }

    fn add_ports(&mut self, service: &Dname, ports: &[Port], target: &Dname) -> Result<(), InvalidName> {
        for port in ports.iter().filter(|port| !port.name.is_empty()) {
            let owner = prepend(&[&format!("_{}", port.name), &format!("_{}", port.protocol)], service)?;
            self.add(owner, Data::Srv { port: port.port, target: target.clone() });
        }
        Ok(())
    }

    /// Adds a pod by its address.
    ///
    /// # Errors
    /// The namespace is no DNS label.
    pub fn add_pod(&mut self, namespace: &str, ip: IpAddr) -> Result<(), InvalidName> {
        let name = self.below(&[&dashed(ip), namespace, "pod"])?;
        self.add(name, Data::of(ip));
        Ok(())
    }

    /// Makes the zone the authority for the names of a network's addresses (of pods or services): whichever it does not
    /// know does not exist, and is not asked for elsewhere.
    pub fn add_network(&mut self, network: IpNet) {
        self.networks.push(network.trunc());
    }

    fn below(&self, labels: &[&str]) -> Result<Dname, InvalidName> {
        prepend(labels, &self.domain)
    }

    pub(crate) fn add(&mut self, name: Dname, data: Data) {
        let records = self.records.entry(name).or_default();
        if !records.contains(&data) {
            records.push(data);
        }
    }

    pub(crate) fn domain(&self) -> &Dname {
        &self.domain
    }

    pub(crate) fn records(&self) -> &BTreeMap<Dname, Vec<Data>> {
        &self.records
    }

    pub(crate) fn networks(&self) -> &[IpNet] {
        &self.networks
    }

    /// Who answers for the zone. A domain too long for this name stands for itself.
    pub(crate) fn name_server(&self) -> Dname {
        self.below(&["ns", "dns"]).unwrap_or_else(|_| self.domain.clone())
    }

    /// Who is responsible for the zone.
    pub(crate) fn host_master(&self) -> Dname {
        self.below(&["hostmaster"]).unwrap_or_else(|_| self.domain.clone())
    }

    /// The answer to one question of class IN. The cluster domain's own SOA and NS records are the server's matter.
    pub(crate) fn lookup(&self, name: &Dname, rtype: Rtype) -> Answer<'_> {
        if let Some(records) = self.records.get(name) {
            return pick(records, rtype);
        }
        // Canonical order puts all descendants right behind a name.
        let next = self.records.range(name.clone()..).next();
        if name == &self.domain || self.is_inside(name) && next.is_some_and(|(next, _)| next.ends_with(name)) {
            Answer::NoData
        } else if self.is_inside(name) {
            Answer::NoName
        } else {
            Answer::Elsewhere
        }
    }

    fn is_inside(&self, name: &Dname) -> bool {
        name.ends_with(&self.domain)
            || address_of(name).is_some_and(|ip| self.networks.iter().any(|network| network.contains(&ip)))
    }
}

fn pick(records: &[Data], rtype: Rtype) -> Answer<'_> {
    let alias = records.iter().find_map(|data| match data {
        Data::Cname(target) if rtype != Rtype::CNAME => Some(target),
        _ => None,
    });
    if let Some(target) = alias {
        return Answer::Alias(target);
    }
    let fits: Vec<&Data> = records.iter().filter(|data| data.rtype() == rtype).collect();
    if fits.is_empty() { Answer::NoData } else { Answer::Records(fits) }
}

fn parse(text: &str) -> Result<Dname, InvalidName> {
    let labels: Vec<&str> = text.strip_suffix('.').unwrap_or(text).split('.').collect();
    prepend(&labels, &shared(Name::root()))
}

/// `labels` in front of `suffix`, in lower case.
fn prepend(labels: &[&str], suffix: &Dname) -> Result<Dname, InvalidName> {
    let build = || {
        let mut name = NameBuilder::new_vec();
        for label in labels {
            name.append_label(label.to_ascii_lowercase().as_bytes()).ok()?;
        }
        let name = name.append_origin(suffix).ok()?;
        let mut name: Name<Vec<u8>> = name;
        name.make_canonical();
        Some(shared(name))
    };
    let whole = labels.iter().all(|label| !label.is_empty());
    whole.then(build).flatten().ok_or_else(|| InvalidName { text: labels.join(".") })
}

/// An address as one label.
fn dashed(ip: IpAddr) -> String {
    ip.to_string().replace(['.', ':'], "-")
}

fn reverse(ip: IpAddr) -> Dname {
    shared(Name::reverse_from_addr(ip).expect("every address has such a name"))
}

/// The address that a name below `in-addr.arpa` or `ip6.arpa` stands for.
fn address_of(name: &Dname) -> Option<IpAddr> {
    let labels: Vec<&str> = name.iter().map(|label| std::str::from_utf8(label.as_slice()).unwrap_or("")).collect();
    match labels.as_slice() {
        [bytes @ .., in_addr, arpa, _root]
            if bytes.len() == 4 && in_addr.eq_ignore_ascii_case("in-addr") && arpa.eq_ignore_ascii_case("arpa") =>
        {
            let mut octets = [0; 4];
            for (octet, text) in octets.iter_mut().rev().zip(bytes) {
                *octet = text.parse().ok()?;
            }
            Some(octets.into())
        }
        [nibbles @ .., ip6, arpa, _root]
            if nibbles.len() == 32 && ip6.eq_ignore_ascii_case("ip6") && arpa.eq_ignore_ascii_case("arpa") =>
        {
            nibbles
                .iter()
                .rev()
                .try_fold(0u128, |sum, nibble| {
                    let digit = u128::from_str_radix(nibble, 16).ok().filter(|_| nibble.len() == 1)?;
                    Some(sum << 4 | digit)
                })
                .map(|bits| IpAddr::V6(bits.into()))
        }
        _ => None,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn port(name: &str, port: u16) -> Port {
        Port { name: name.into(), protocol: Protocol::Tcp, port }
    }

    pub(crate) fn example() -> Zone {
        let mut zone = Zone::new("cluster.local").unwrap();
        let web = Target::Cluster {
            ips: vec![ip("10.96.0.7"), ip("fd00:96::7")],
            ports: vec![port("http", 80), port("", 81)],
        };
        zone.add_service("default", "web", &web).unwrap();
        let endpoint = |text: &str, hostname: Option<&str>| Endpoint {
            ip: ip(text),
            hostname: hostname.map(str::to_owned),
            ports: vec![port("pg", 5432)],
        };
        let db = vec![endpoint("10.85.0.2", Some("db-0")), endpoint("10.85.0.3", None)];
        zone.add_service("data", "db", &Target::Headless(db)).unwrap();
        zone.add_service("data", "none", &Target::Headless(Vec::new())).unwrap();
        zone.add_service("default", "out", &Target::External("www.example.com".into())).unwrap();
        zone.add_service("default", "in", &Target::External("web.default.svc.cluster.local.".into())).unwrap();
        zone.add_pod("default", ip("10.85.0.9")).unwrap();
        zone.add_pod("default", ip("fd00:85::9")).unwrap();
        zone.add_network("10.85.0.0/16".parse().unwrap());
        zone.add_network("fd00:85::/64".parse().unwrap());
        zone
    }

    fn show(zone: &Zone, name: &str, rtype: Rtype) -> String {
        let text = |data: &&Data| match data {
            Data::A(v4) => v4.to_string(),
            Data::Aaaa(v6) => v6.to_string(),
            Data::Srv { port, target } => format!("{port} {target}"),
            Data::Ptr(name) | Data::Cname(name) => name.to_string(),
            Data::Txt(text) => String::from_utf8_lossy(text).into_owned(),
        };
        match zone.lookup(&parse(name).unwrap(), rtype) {
            Answer::Records(records) => records.iter().map(text).collect::<Vec<_>>().join(", "),
            Answer::Alias(target) => format!("-> {target}"),
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn every_form_of_the_specification() {
        let zone = example();
        let db = "10.85.0.2, 10.85.0.3";
        let db_srv = "5432 db-0.db.data.svc.cluster.local, 5432 10-85-0-3.db.data.svc.cluster.local";
        for (name, rtype, expected) in [
            ("web.default.svc.cluster.local", Rtype::A, "10.96.0.7"),
            ("WEB.Default.svc.cluster.LOCAL", Rtype::AAAA, "fd00:96::7"),
            ("_http._tcp.web.default.svc.cluster.local", Rtype::SRV, "80 web.default.svc.cluster.local"),
            ("7.0.96.10.in-addr.arpa", Rtype::PTR, "web.default.svc.cluster.local"),
            ("db.data.svc.cluster.local", Rtype::A, db),
            ("db-0.db.data.svc.cluster.local", Rtype::A, "10.85.0.2"),
            ("10-85-0-3.db.data.svc.cluster.local", Rtype::A, "10.85.0.3"),
            ("_pg._tcp.db.data.svc.cluster.local", Rtype::SRV, db_srv),
            ("2.0.85.10.in-addr.arpa", Rtype::PTR, "db-0.db.data.svc.cluster.local"),
            ("out.default.svc.cluster.local", Rtype::A, "-> www.example.com"),
            ("out.default.svc.cluster.local", Rtype::CNAME, "www.example.com"),
            ("in.default.svc.cluster.local", Rtype::A, "-> web.default.svc.cluster.local"),
            ("10-85-0-9.default.pod.cluster.local", Rtype::A, "10.85.0.9"),
            ("fd00-85--9.default.pod.cluster.local", Rtype::AAAA, "fd00:85::9"),
            ("dns-version.cluster.local", Rtype::TXT, "1.1.0"),
        ] {
            assert_eq!(show(&zone, name, rtype), expected, "{name} {rtype}");
        }
    }

    #[test]
    fn a_name_without_records_is_not_a_name_that_does_not_exist() {
        let zone = example();
        for (name, expected) in [
            ("cluster.local", "NoData"),
            ("svc.cluster.local", "NoData"),
            ("default.svc.cluster.local", "NoData"),
            ("_tcp.web.default.svc.cluster.local", "NoData"),
            ("dns-version.cluster.local", "NoData"),
            ("nothing.default.svc.cluster.local", "NoName"),
            ("eb.default.svc.cluster.local", "NoName"),
            ("none.data.svc.cluster.local", "NoName"),
            ("empty.svc.cluster.local", "NoName"),
            ("x.web.default.svc.cluster.local", "NoName"),
            ("10-85-0-8.default.pod.cluster.local", "NoName"),
            ("8.0.85.10.in-addr.arpa", "NoName"),
            ("8.8.8.8.in-addr.arpa", "Elsewhere"),
            ("85.10.in-addr.arpa", "Elsewhere"),
            ("1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.5.8.0.0.0.0.d.f.ip6.arpa", "Elsewhere"),
            ("1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.5.8.0.0.0.0.d.f.ip6.arpa", "NoName"),
            ("www.example.com", "Elsewhere"),
            ("notcluster.local", "Elsewhere"),
        ] {
            assert_eq!(show(&zone, name, Rtype::A), expected, "{name}");
        }
    }

    #[test]
    fn what_cannot_be_a_name_is_refused() {
        let mut zone = Zone::new("cluster.local.").unwrap();
        let long = "x".repeat(64);
        for name in ["", long.as_str()] {
            assert!(zone.add_pod(name, ip("10.0.0.1")).is_err(), "{name:?}");
        }
        let deep = ["x"; 128].join(".");
        assert!(Zone::new(&deep).is_err());
        assert!(zone.add_service("default", "x", &Target::External("a..b".into())).is_err());
        // A dot inside a label is not a separator.
        zone.add_pod("a.b", ip("10.0.0.1")).unwrap();
        assert_eq!(show(&zone, "10-0-0-1.a.b.pod.cluster.local", Rtype::A), "NoName");
    }
}
