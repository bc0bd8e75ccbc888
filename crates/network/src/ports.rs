//! Host ports: who has them, and what they become in the packet filter.

use std::net::IpAddr;

use netfilter::pods::Forward;

use crate::{NetworkError, PortMapping, Protocol};

impl Protocol {
    /// `IPPROTO_*`.
    pub(crate) fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }
}

/// The address of the host, `None` for every one.
fn host_ip(mapping: &PortMapping) -> Option<IpAddr> {
    mapping.host_ip.filter(|ip| !ip.is_unspecified())
}

fn overlap(a: &PortMapping, b: &PortMapping) -> bool {
    let same_host = match (host_ip(a), host_ip(b)) {
        (Some(a), Some(b)) => a == b,
        _ => true,
    };
    a.protocol == b.protocol && a.host_port == b.host_port && same_host
}

/// Refuses mappings that another sandbox has, or that occur twice.
pub(crate) fn check<'a>(
    wanted: &'a [PortMapping],
    taken: impl Iterator<Item = (&'a str, &'a [PortMapping])> + Clone,
    sandbox: &'a str,
) -> Result<(), NetworkError> {
    for (index, mapping) in wanted.iter().enumerate() {
        let own = std::iter::once((sandbox, &wanted[..index]));
        let mut all = taken.clone().chain(own);
        if let Some((owner, _)) = all.find(|(_, ports)| ports.iter().any(|other| overlap(mapping, other))) {
            let (port, protocol) = (mapping.host_port, mapping.protocol);
            return Err(NetworkError::PortTaken { port, protocol, owner: owner.to_owned() });
        }
    }
    Ok(())
}

/// What leads to a sandbox with these addresses.
pub(crate) fn forwards(mappings: &[PortMapping], ips: &[IpAddr]) -> Vec<Forward> {
    let pairs = mappings.iter().flat_map(|mapping| ips.iter().map(move |pod| (mapping, *pod)));
    let fits =
        |(mapping, pod): &(&PortMapping, IpAddr)| mapping.host_ip.is_none_or(|host| host.is_ipv4() == pod.is_ipv4());
    let forward = |(mapping, pod): (&PortMapping, IpAddr)| Forward {
        protocol: mapping.protocol.number(),
        host: host_ip(mapping),
        host_port: mapping.host_port,
        pod,
        pod_port: mapping.container_port,
    };
    pairs.filter(fits).map(forward).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(text: &str) -> PortMapping {
        let (host, port) = text.rsplit_once(':').unwrap();
        let host_ip = (!host.is_empty()).then(|| host.parse().unwrap());
        PortMapping { protocol: Protocol::Tcp, container_port: 80, host_port: port.parse().unwrap(), host_ip }
    }

    #[test]
    fn a_port_belongs_to_one_sandbox() {
        let check = |wanted: &[&str], taken: &str| {
            let wanted: Vec<_> = wanted.iter().map(|text| mapping(text)).collect();
            let taken = [mapping(taken)];
            super::check(&wanted, [("other", &taken[..])].into_iter(), "own").map_err(|error| match error {
                NetworkError::PortTaken { owner, .. } => owner,
                error => error.to_string(),
            })
        };
        assert_eq!(check(&[":80"], ":80"), Err("other".into()));
        assert_eq!(check(&["10.0.0.1:80"], ":80"), Err("other".into()));
        assert_eq!(check(&["10.0.0.1:80"], "0.0.0.0:80"), Err("other".into()));
        assert_eq!(check(&["10.0.0.1:80"], "10.0.0.1:80"), Err("other".into()));
        assert_eq!(check(&["10.0.0.1:80", "10.0.0.3:80"], "10.0.0.2:80"), Ok(()));
        assert_eq!(check(&[":81", ":81"], ":80"), Err("own".into()));
        let udp = PortMapping { protocol: Protocol::Udp, ..mapping(":80") };
        assert!(super::check(&[udp], [("other", &[mapping(":80")][..])].into_iter(), "own").is_ok());
    }

    #[test]
    fn forwards_stay_within_their_family() {
        let ips = ["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        assert_eq!(forwards(&[mapping(":80")], &ips).len(), 2);
        assert_eq!(forwards(&[mapping("10.1.1.1:80")], &ips).len(), 1);
        assert_eq!(forwards(&[mapping("0.0.0.0:80")], &ips)[0].host, None);
    }
}
