//! Services that need everything.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use service::{Change, Endpoint, Entry, Frontend, Kind, Name, Protocol, ServicePort, Target};

/// What makes rules of every kind, in both address families.
pub(super) fn changes() -> Vec<Change> {
    let v4 = |last| IpAddr::from(Ipv4Addr::new(192, 0, 2, last));
    let v6 = |last| IpAddr::from(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, last));
    let v4s = of_family([v4(1), v4(2), v4(3), v4(4)], Ipv4Addr::UNSPECIFIED.into());
    let v6s = of_family([v6(1), v6(2), v6(3), v6(4)], Ipv6Addr::UNSPECIFIED.into());
    v4s.into_iter().chain(v6s).collect()
}

fn of_family([vip, balancer, near, far]: [IpAddr; 4], any: IpAddr) -> Vec<Change> {
    let service = Name { namespace: "trial".into(), name: "trial".into() };
    let port = Arc::new(ServicePort { service, name: "".into(), health_check_port: Some(1) });
    let endpoint = |address, local| Endpoint { address, port: 1, local };
    let entry = |kind, inside| Entry {
        port: port.clone(),
        kind,
        inside,
        inside_local: false,
        outside: None,
        affinity_s: Some(1),
        sources: None,
    };
    let change = |protocol, address, port, entry| Change {
        frontend: Frontend { address, protocol, port },
        old: None,
        new: Some(entry),
    };
    let all = Target::Endpoints([endpoint(near, true), endpoint(far, false)].into());
    let outside = Some(Target::Endpoints([endpoint(near, true)].into()));
    let external = |kind| Entry { outside: outside.clone(), ..entry(kind, all.clone()) };
    let limited = Entry { sources: Some([far.into()].into()), ..external(Kind::LoadBalancer) };
    vec![
        change(Protocol::Tcp, vip, 1, entry(Kind::ClusterIp, all.clone())),
        change(Protocol::Tcp, balancer, 1, limited),
        change(Protocol::Tcp, any, 1, external(Kind::NodePort)),
        change(Protocol::Udp, vip, 1, entry(Kind::ClusterIp, Target::Refuse)),
        change(Protocol::Udp, any, 1, entry(Kind::NodePort, Target::Drop)),
    ]
}
