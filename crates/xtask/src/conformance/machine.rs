//! What stands for the machine of a node.
//!
//! ```text
//! one node:      control plane, registry, suite and node share a network namespace
//! more of them:  control plane, registry, suite ── lab (198.51.100.1) ─┬─ eth0 node-1 (198.51.100.11), pods 10.88.1.0/24
//!                                                                     └─ eth0 node-2 (198.51.100.12), pods 10.88.2.0/24
//! ```
//!
//! With two address families these have 2001:db8:ab::11 and ::12, too, and their pods fd00:88:1::/64 and fd00:88:2::/64.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::process::Command;
use std::sync::Arc;

use anyhow::Context as _;
use testkit::daemon::Nursery;
use testkit::{host, netns};

use super::contained;

/// Where the pods of all nodes are.
pub(super) const PODS: &str = "10.88.0.0/16";
/// The same with two address families.
const PODS_DUAL: &str = "10.88.0.0/16,fd00:88::/32";
/// The bridge between the machines, and its own address (RFC 5737); a spec takes 203.0.113.0/24 for addresses of Services.
const BRIDGE: &str = "lab";
const GATEWAY: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
/// The same of IPv6 (RFC 3849).
const GATEWAY_6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0xab, 0, 0, 0, 0, 1);

/// What nodes and pods have addresses of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Families {
    Ipv4,
    /// Both of them, IPv4 first.
    Dual,
}

impl Families {
    /// Where the pods of all nodes are.
    pub(super) fn pods(self) -> &'static str {
        match self {
            Families::Ipv4 => PODS,
            Families::Dual => PODS_DUAL,
        }
    }
}

/// A machine.
#[derive(Clone)]
pub(super) struct Machine {
    /// The node's name.
    pub(super) name: String,
    /// Its addresses, with a comma between them if it has one of each family.
    pub(super) addresses: String,
    /// Where its pods are, in the same way.
    pub(super) pods: String,
    /// Where the pods of all nodes are.
    pub(super) all_pods: &'static str,
    /// Starts the node's programs there.
    pub(super) nursery: Arc<Nursery>,
}

impl Machine {
    /// The one that the control plane shares.
    pub(super) fn shared(address: IpAddr, nursery: &Arc<Nursery>) -> Self {
        let (name, addresses, pods) = ("node-1".to_owned(), address.to_string(), PODS.to_owned());
        Self { name, addresses, pods, all_pods: PODS, nursery: Arc::clone(nursery) }
    }

    /// `count` of them, each in a network namespace of its own, with routes between them and to the caller's. With `covered`
    /// each has places of its own for what its daemons write whatever they are told.
    pub(super) fn apart(count: u8, families: Families, covered: bool) -> anyhow::Result<Vec<Self>> {
        ip(&["link", "add", BRIDGE, "type", "bridge"])?;
        ip(&["address", "add", &format!("{GATEWAY}/24"), "dev", BRIDGE])?;
        if families == Families::Dual {
            ip(&["address", "add", &format!("{GATEWAY_6}/64"), "dev", BRIDGE, "nodad"])?;
        }
        ip(&["link", "set", BRIDGE, "up"])?;
        for forwarding in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
            std::fs::write(format!("/proc/sys/net/{forwarding}"), "1").context("let this network forward")?;
        }
        let places = (1..=count).map(|number| Place::new(number, families)).collect::<anyhow::Result<Vec<_>>>()?;
        let ways: Vec<Way> = places.iter().flat_map(Place::ways).collect();
        places.iter().map(|place| place.machine(&ways, covered)).collect()
    }
}

/// The way to the pods of a node.
#[derive(Clone, PartialEq, Eq)]
struct Way {
    pods: String,
    /// The node's address.
    by: IpAddr,
}

impl Way {
    fn add(&self) -> anyhow::Result<()> {
        ip(&["route", "add", &self.pods, "via", &self.by.to_string()])
    }
}

/// A machine that is being made.
struct Place {
    number: u8,
    families: Families,
    namespace: OwnedFd,
}

impl Place {
    /// Connected to the bridge.
    fn new(number: u8, families: Families) -> anyhow::Result<Self> {
        let namespace = on_a_thread(|| {
            netns::enter_private()?;
            netns::current()
        })?;
        let place = Self { number, families, namespace };
        let link = format!("lab{number}");
        let there = format!("/proc/{}/fd/{}", std::process::id(), place.namespace.as_raw_fd());
        ip(&["link", "add", &link, "master", BRIDGE, "type", "veth", "peer", "name", "eth0", "netns", &there])?;
        ip(&["link", "set", &link, "up"])?;
        place.ways().iter().try_for_each(Way::add)?;
        Ok(place)
    }

    /// The ways to its pods, of each family.
    fn ways(&self) -> Vec<Way> {
        let number = self.number;
        let v4 = Way { pods: format!("10.88.{number}.0/24"), by: Ipv4Addr::new(198, 51, 100, 10 + number).into() };
        // Written as the other: 11, 12 ...
        let last = 0x10 + u16::from(number);
        let v6 = Way {
            pods: format!("fd00:88:{number}::/64"),
            by: Ipv6Addr::new(0x2001, 0xdb8, 0xab, 0, 0, 0, 0, last).into(),
        };
        std::iter::once(v4).chain((self.families == Families::Dual).then_some(v6)).collect()
    }

    /// With its address, the way to the others, and what starts programs there.
    fn machine(&self, all: &[Way], covered: bool) -> anyhow::Result<Machine> {
        let own = self.ways();
        let nursery = on_a_thread(|| {
            netns::enter(&self.namespace)?;
            for Way { by, .. } in &own {
                let (length, more): (u8, &[&str]) = if by.is_ipv6() { (64, &["nodad"]) } else { (24, &[]) };
                ip(&[&["address", "add", &format!("{by}/{length}"), "dev", "eth0"], more].concat())?;
            }
            ip(&["link", "set", "eth0", "up"])?;
            ip(&["route", "add", "default", "via", &GATEWAY.to_string()])?;
            if self.families == Families::Dual {
                ip(&["-6", "route", "add", "default", "via", &GATEWAY_6.to_string()])?;
            }
            all.iter().filter(|way| !own.contains(way)).try_for_each(Way::add)?;
            if covered {
                contained::cover_apart()?;
            }
            Ok(Arc::new(Nursery::new()))
        })?;
        let name = format!("node-{}", self.number);
        let join = |part: fn(&Way) -> String| own.iter().map(part).collect::<Vec<_>>().join(",");
        let (addresses, pods) = (join(|way| way.by.to_string()), join(|way| way.pods.clone()));
        Ok(Machine { name, addresses, pods, all_pods: self.families.pods(), nursery })
    }
}

/// A thread may change its namespaces without changing those of its caller.
fn on_a_thread<T: Send>(work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

fn ip(words: &[&str]) -> anyhow::Result<()> {
    host::run(Command::new("ip").args(words))
}
