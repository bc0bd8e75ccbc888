//! Who may connect, and to whom a client is led.

use std::collections::{BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use service::{Endpoint, Entry, Local};
use tokio::time::Instant;

/// Clients that are remembered for each frontend: a budget, not a promise.
const REMEMBERED_MAX: usize = 1 << 14;

/// What tells who comes from outside the cluster.
#[derive(Debug, Default)]
pub(super) struct Surroundings {
    pub(super) local: Local,
    /// Addresses of this node.
    pub(super) own: BTreeSet<IpAddr>,
}

impl Surroundings {
    /// Pods that are known by their interface only cannot be told here: sockets do not say where packets came in.
    fn is_inside(&self, client: IpAddr) -> bool {
        let is_pod = match &self.local {
            Local::Sources(ranges) => ranges.iter().any(|range| range.contains(&client)),
            Local::Bridge(_) | Local::InterfacePrefix(_) => false,
        };
        is_pod || client.is_loopback() || self.own.contains(&client)
    }
}

/// What holds for a frontend just now.
#[derive(Debug)]
pub(super) struct Terms {
    pub(super) entry: Entry,
    pub(super) surroundings: std::sync::Arc<Surroundings>,
}

impl Terms {
    /// Endpoints for a client that came to `at`; none if it is not to be served.
    pub(super) fn endpoints(&self, client: IpAddr, at: IpAddr) -> &[Endpoint] {
        let admitted = |sources: &[ipnet::IpNet]| sources.iter().any(|range| range.contains(&client));
        if !self.entry.sources.as_deref().is_none_or(admitted) {
            return &[];
        }
        // This host comes to an address of its own from there.
        let inside = client == at || self.surroundings.is_inside(client);
        let outside = self.entry.outside.as_ref().filter(|_| !inside);
        outside.unwrap_or(&self.entry.inside).endpoints()
    }

    /// Whether a client that was led there may stay.
    pub(super) fn leads_to(&self, endpoint: SocketAddr) -> bool {
        self.entry.endpoints().any(|one| place(one) == endpoint)
    }
}

/// Whose turn it is at a frontend, and who was led where.
#[derive(Debug, Default)]
pub(super) struct Balance {
    next: AtomicUsize,
    /// Clients with affinity: their endpoint, and until when.
    remembered: Mutex<HashMap<IpAddr, (SocketAddr, Instant)>>,
}

impl Balance {
    /// All endpoints in the order in which they are to be tried.
    pub(super) fn order(&self, terms: &Terms, client: IpAddr, endpoints: &[Endpoint]) -> Vec<SocketAddr> {
        let mut order: Vec<SocketAddr> = endpoints.iter().map(place).collect();
        if !order.is_empty() {
            let turn = self.next.fetch_add(1, Ordering::Relaxed) % order.len();
            order.rotate_left(turn);
        }
        if terms.entry.affinity_s.is_some()
            && let Some(at) = self.recall(client).and_then(|known| order.iter().position(|one| *one == known))
        {
            order[..=at].rotate_right(1);
        }
        order
    }

    fn recall(&self, client: IpAddr) -> Option<SocketAddr> {
        let remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        remembered.get(&client).filter(|(_, until)| *until > Instant::now()).map(|(endpoint, _)| *endpoint)
    }

    /// Remembers where a client was led, if its Service wants that.
    pub(super) fn remember(&self, terms: &Terms, client: IpAddr, endpoint: SocketAddr) {
        let Some(seconds) = terms.entry.affinity_s else { return };
        let now = Instant::now();
        let mut remembered = self.remembered.lock().unwrap_or_else(PoisonError::into_inner);
        if remembered.len() >= REMEMBERED_MAX {
            remembered.retain(|_, (_, until)| *until > now);
        }
        if remembered.len() < REMEMBERED_MAX || remembered.contains_key(&client) {
            remembered.insert(client, (endpoint, now + Duration::from_secs(seconds.into())));
        }
    }
}

fn place(endpoint: &Endpoint) -> SocketAddr {
    SocketAddr::new(endpoint.address, endpoint.port)
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use service::{Kind, Name, ServicePort, Target};

    use super::*;

    /// An entry of a Service with these endpoints.
    pub(crate) fn entry(endpoints: &[SocketAddr]) -> Entry {
        let endpoint = |at: &SocketAddr| Endpoint { address: at.ip(), port: at.port(), local: true };
        let service = Name { namespace: "default".into(), name: "web".into() };
        Entry {
            port: Arc::new(ServicePort { service, name: "".into(), health_check_port: None }),
            kind: Kind::ClusterIp,
            inside: Target::Endpoints(endpoints.iter().map(endpoint).collect()),
            inside_local: false,
            outside: None,
            affinity_s: None,
            sources: None,
        }
    }

    /// Everybody is led to one endpoint.
    pub(crate) fn leading_to(endpoint: SocketAddr) -> Arc<Terms> {
        Arc::new(Terms { entry: entry(&[endpoint]), surroundings: Arc::default() })
    }
}
