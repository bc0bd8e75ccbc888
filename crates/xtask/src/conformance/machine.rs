//! What stands for the machine of a node.
//!
//! ```text
//! one node:      control plane, registry, suite and node share a network namespace
//! more of them:  control plane, registry, suite ── lab (203.0.113.1) ─┬─ eth0 node-1 (203.0.113.11), pods 10.88.1.0/24
//!                                                                     └─ eth0 node-2 (203.0.113.12), pods 10.88.2.0/24
//! ```

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::process::Command;
use std::sync::Arc;

use anyhow::Context as _;
use testkit::daemon::Nursery;
use testkit::{host, netns};

use super::contained;

/// Where the pods of all nodes are.
pub(super) const PODS: &str = "10.88.0.0/16";
/// The bridge between the machines, and its own address (RFC 5737).
const BRIDGE: &str = "lab";
const GATEWAY: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);

/// A machine.
#[derive(Clone)]
pub(super) struct Machine {
    /// The node's name.
    pub(super) name: String,
    pub(super) address: IpAddr,
    /// Where its pods are.
    pub(super) pods: String,
    /// Starts the node's programs there.
    pub(super) nursery: Arc<Nursery>,
}

impl Machine {
    /// The one that the control plane shares.
    pub(super) fn shared(address: IpAddr, nursery: &Arc<Nursery>) -> Self {
        Self { name: "node-1".to_owned(), address, pods: PODS.to_owned(), nursery: Arc::clone(nursery) }
    }

    /// `count` of them, each in a network namespace of its own, with routes between them and to the caller's. With `covered`
    /// each has places of its own for what its daemons write whatever they are told.
    pub(super) fn apart(count: u8, covered: bool) -> anyhow::Result<Vec<Self>> {
        ip(&["link", "add", BRIDGE, "type", "bridge"])?;
        ip(&["address", "add", &format!("{GATEWAY}/24"), "dev", BRIDGE])?;
        ip(&["link", "set", BRIDGE, "up"])?;
        std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("let this network forward")?;
        let namespaces = (1..=count).map(Place::new).collect::<anyhow::Result<Vec<_>>>()?;
        let places: Vec<(Ipv4Addr, String)> = namespaces.iter().map(|place| (place.address(), place.pods())).collect();
        namespaces.iter().map(|place| place.machine(&places, covered)).collect()
    }
}

/// A machine that is being made.
struct Place {
    number: u8,
    namespace: OwnedFd,
}

impl Place {
    /// Connected to the bridge.
    fn new(number: u8) -> anyhow::Result<Self> {
        let namespace = on_a_thread(|| {
            netns::enter_private()?;
            netns::current()
        })?;
        let place = Self { number, namespace };
        let link = format!("lab{number}");
        let there = format!("/proc/{}/fd/{}", std::process::id(), place.namespace.as_raw_fd());
        ip(&["link", "add", &link, "master", BRIDGE, "type", "veth", "peer", "name", "eth0", "netns", &there])?;
        ip(&["link", "set", &link, "up"])?;
        ip(&["route", "add", &place.pods(), "via", &place.address().to_string()])?;
        Ok(place)
    }

    fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(203, 0, 113, 10 + self.number)
    }

    fn pods(&self) -> String {
        format!("10.88.{}.0/24", self.number)
    }

    /// With its address, the way to the others, and what starts programs there.
    fn machine(&self, all: &[(Ipv4Addr, String)], covered: bool) -> anyhow::Result<Machine> {
        let nursery = on_a_thread(|| {
            netns::enter(&self.namespace)?;
            ip(&["address", "add", &format!("{}/24", self.address()), "dev", "eth0"])?;
            ip(&["link", "set", "eth0", "up"])?;
            ip(&["route", "add", "default", "via", &GATEWAY.to_string()])?;
            for (address, pods) in all.iter().filter(|(address, _)| *address != self.address()) {
                ip(&["route", "add", pods, "via", &address.to_string()])?;
            }
            if covered {
                contained::cover_apart()?;
            }
            Ok(Arc::new(Nursery::new()))
        })?;
        let name = format!("node-{}", self.number);
        Ok(Machine { name, address: self.address().into(), pods: self.pods(), nursery })
    }
}

/// A thread may change its namespaces without changing those of its caller.
fn on_a_thread<T: Send>(work: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    std::thread::scope(|scope| scope.spawn(work).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

fn ip(words: &[&str]) -> anyhow::Result<()> {
    host::run(Command::new("ip").args(words))
}
