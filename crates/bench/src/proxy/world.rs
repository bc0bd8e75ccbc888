//! The objects: Services whose endpoints nobody has, and some among them that pods of the lab serve.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde_json::{Value, json};
use testkit::api::{Api, Session};
use testkit::service_lab::{self, NODE_POD_RANGES, PORTS};

/// The node of the proxy.
pub(super) const NODE: &str = "here";
/// Where Services have their addresses; the largest range that the API server takes.
pub(super) const SERVICE_RANGE: &str = "10.96.0.0/12";
const FIRST_SERVICE: u32 = u32::from_be_bytes([10, 96, 1, 0]);
/// Endpoints that nobody has, and nobody asks.
const FIRST_ENDPOINT: u32 = u32::from_be_bytes([10, 128, 0, 0]);
/// Where streams end.
pub(super) const SINK_PORT: u16 = 5201;
/// Nodes of endpoints that nobody has.
const NODES: u32 = 1000;
/// Services that pods of the lab serve.
const SERVED: u32 = 16;
/// Requests that the API server has at once.
const WRITERS: usize = 8;
/// How long a watch may last; longer than any change takes.
const WATCH_LIMIT: Duration = Duration::from_secs(300);
/// EndpointSlices that change, in turn.
const CHANGING: u32 = 200;

const SERVICES: &str = "/api/v1/namespaces/default/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";

/// How much there is of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct World {
    pub(super) services: u32,
    pub(super) endpoints: u32,
}

/// Who serves a Service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Server {
    Nobody,
    Pods,
    /// The pod with the sink.
    Sink,
}

impl World {
    /// Writes all of it, and the node.
    pub(super) fn write(self, api: &Api) -> anyhow::Result<()> {
        api.ensure("/api/v1/nodes", &node())?;
        let next = AtomicU32::new(0);
        let write = || -> anyhow::Result<()> {
            let mut session = api.session()?;
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= self.services {
                    return Ok(());
                }
                session.create(SLICES, &self.slice(number, 0))?;
                session.create(SERVICES, &service(number))?;
            }
        };
        std::thread::scope(|scope| {
            let writers: Vec<_> = (0..WRITERS).map(|_| scope.spawn(write)).collect();
            let ended = writers
                .into_iter()
                .map(|writer| writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            ended.collect::<anyhow::Result<()>>()
        })
    }

    /// The Services that pods serve, spread over all.
    pub(super) fn served(self) -> Vec<SocketAddr> {
        (0..SERVED).map(|nth| address(self.nth_served(nth))).collect()
    }

    /// The Service behind which streams end.
    pub(super) fn sink(self) -> SocketAddr {
        address(self.nth_served(SERVED))
    }

    /// Writes the endpoints of `count` Services to come.
    pub(super) fn prepare(self, api: &Api, count: u32) -> anyhow::Result<()> {
        let mut session = api.session()?;
        (0..count).try_for_each(|nth| session.create(SLICES, &self.slice(self.services + nth, 0)))
    }

    /// Removes them.
    pub(super) fn clear(self, api: &Api, count: u32) -> anyhow::Result<()> {
        (0..count).try_for_each(|nth| api.delete(&format!("{SLICES}/{}", name(self.services + nth))))
    }

    /// The address of a Service to come.
    pub(super) fn new_address(self, nth: u32) -> SocketAddr {
        address(self.services + nth)
    }

    /// Creates a Service whose endpoints are there.
    pub(super) fn create(self, session: &mut Session, nth: u32) -> anyhow::Result<()> {
        session.create(SERVICES, &service(self.services + nth))
    }

    /// Watches it alone, from before it is made: returns when an event of this type came.
    pub(super) fn watcher(self, api: &Api, nth: u32, wanted: &'static str) -> JoinHandle<anyhow::Result<Instant>> {
        let path = format!("{SERVICES}?watch=1&fieldSelector=metadata.name%3D{}", name(self.services + nth));
        let api = api.clone();
        std::thread::spawn(move || {
            api.watch(&path, WATCH_LIMIT, |event| event["type"] == wanted)?;
            Ok(Instant::now())
        })
    }

    /// Deletes it.
    pub(super) fn delete(self, session: &mut Session, nth: u32) -> anyhow::Result<()> {
        let path = format!("{SERVICES}/{}", name(self.services + nth));
        session.request("DELETE", &path, None)?.json().map(drop).context(path)
    }

    /// Changes one endpoint of one of some Services: it leaves, and in the next round it comes back.
    pub(super) fn change(self, session: &mut Session, nth: u32) -> anyhow::Result<()> {
        let changing = CHANGING.min(self.services / 2);
        // An odd number is served by nobody.
        let (number, round) = (2 * (nth % changing) + 1, nth / changing);
        let (number, gone) = (number.min(self.services - 1), (round + 1) % 2);
        let path = format!("{SLICES}/{}", name(number));
        let body = self.slice(number, gone);
        session.request("PUT", &path, Some(("application/json", &body)))?.json().map(drop).context(path)
    }

    /// The number of a Service that is served; all of them are even.
    fn nth_served(self, nth: u32) -> u32 {
        (nth * (self.services / (SERVED + 1))) & !1
    }

    fn who_serves(self, number: u32) -> Server {
        match number {
            number if number >= self.services => Server::Pods,
            number if number == self.nth_served(SERVED) => Server::Sink,
            number if (0..SERVED).any(|nth| self.nth_served(nth) == number) => Server::Pods,
            _ => Server::Nobody,
        }
    }

    /// The endpoints of a Service but for the first `gone`.
    fn slice(self, number: u32, gone: u32) -> Value {
        let (addresses, port) = match self.who_serves(number) {
            Server::Nobody => {
                let first = FIRST_ENDPOINT + number * self.endpoints;
                ((first + gone..first + self.endpoints).map(Ipv4Addr::from).collect(), PORTS[0])
            }
            Server::Pods => (pods(), PORTS[0]),
            Server::Sink => (pods()[..1].to_vec(), SINK_PORT),
        };
        let is_here = self.who_serves(number) != Server::Nobody;
        let endpoint = |address: &Ipv4Addr| {
            let node = if is_here { NODE.to_owned() } else { format!("node-{}", u32::from(*address) % NODES) };
            json!({
                "addresses": [address], "nodeName": node,
                "conditions": { "ready": true, "serving": true, "terminating": false },
                "targetRef": {
                    "kind": "Pod", "namespace": "default", "name": format!("pod-{address}"),
                    "uid": format!("00000000-0000-4000-8000-{:012x}", u32::from(*address)),
                },
            })
        };
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": name(number),
                "labels": {
                    "kubernetes.io/service-name": name(number),
                    "endpointslice.kubernetes.io/managed-by": "bench",
                },
            },
            "addressType": "IPv4", "ports": [{ "name": "http", "port": port, "protocol": "TCP" }],
            "endpoints": addresses.iter().map(endpoint).collect::<Vec<_>>(),
        })
    }
}

/// Pods of the lab on the node, the one with the sink first.
fn pods() -> Vec<Ipv4Addr> {
    let backends = service_lab::BACKENDS.iter().filter(|backend| backend.is_local && backend.name != "node");
    backends.map(|backend| backend.address.v4).collect()
}

/// The pod with the sink.
pub(super) fn first_pod() -> Ipv4Addr {
    pods()[0]
}

fn name(number: u32) -> String {
    format!("service-{number}")
}

fn address(number: u32) -> SocketAddr {
    (Ipv4Addr::from(FIRST_SERVICE + number), 80).into()
}

fn service(number: u32) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": name(number) },
        "spec": { "clusterIP": address(number).ip(), "ports": [{ "name": "http", "port": 80, "protocol": "TCP" }] },
    })
}

fn node() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": NODE },
        "spec": { "podCIDR": NODE_POD_RANGES[0], "podCIDRs": NODE_POD_RANGES },
        "status": { "addresses": service_lab::NODE.both()
            .map(|address| json!({ "type": "InternalIP", "address": address })) },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_is_served_by_nobody_and_comes_back() {
        for services in [20, 1000, 10_000] {
            let world = World { services, endpoints: 10 };
            let numbers: std::collections::BTreeSet<u32> = (0..=SERVED).map(|nth| world.nth_served(nth)).collect();
            assert!(numbers.iter().all(|number| number % 2 == 0 && *number < services), "{numbers:?}");
            assert_eq!(world.who_serves(1), Server::Nobody);
            assert_eq!(world.slice(1, 1)["endpoints"].as_array().unwrap().len(), 9);
            assert_eq!(world.slice(1, 0)["endpoints"].as_array().unwrap().len(), 10);
        }
    }

    #[test]
    fn endpoints_of_the_largest_world_stay_in_their_range() {
        let world = World { services: 60_000, endpoints: 60 };
        let slice = world.slice(59_999, 0);
        let last: Ipv4Addr = slice["endpoints"][59]["addresses"][0].as_str().unwrap().parse().unwrap();
        assert!(last < Ipv4Addr::new(10, 192, 0, 0) && address(60_200).ip() < Ipv4Addr::new(10, 112, 0, 0), "{last}");
    }
}
