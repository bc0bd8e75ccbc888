//! Node ports on which load balancers ask whether this node has endpoints of a Service (`healthCheckNodePort`).

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use http::header::{HeaderName, HeaderValue};
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use serde_json::json;
use service::{HealthCheck, Name, Network};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use crate::health::Health;
use crate::web::{self, Answers, Body};

/// As upstream: Google's and others' load balancers send in proportion to it.
const WEIGHT: &str = "x-load-balancing-endpoint-weight";

/// The listeners that there are.
#[derive(Debug)]
pub(crate) struct HealthPorts {
    health: Arc<Health>,
    open: BTreeMap<(Name, u16), Open>,
}

/// One of them, until this is dropped.
#[derive(Debug)]
struct Open {
    port: Port,
    task: JoinHandle<()>,
}

impl Drop for Open {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A port that cannot be had.
#[derive(Debug)]
pub(crate) struct Blocked {
    pub(crate) service: Name,
    pub(crate) port: u16,
    pub(crate) error: std::io::Error,
}

impl HealthPorts {
    pub(crate) fn new(health: Arc<Health>) -> HealthPorts {
        HealthPorts { health, open: BTreeMap::new() }
    }

    /// Opens and closes ports until there are these. What could not be opened is tried again with the next call.
    pub(crate) fn set(&mut self, checks: Vec<HealthCheck>, network: &Network) -> Vec<Blocked> {
        let wanted: BTreeMap<(Name, u16), usize> =
            checks.into_iter().map(|check| ((check.service, check.port), check.local_endpoints)).collect();
        self.open.retain(|key, _| wanted.contains_key(key));
        let mut blocked = Vec::new();
        for ((service, port), endpoints) in wanted {
            let state = Answer { endpoints, network: network.clone() };
            if let Some(open) = self.open.get(&(service.clone(), port)) {
                open.port.set(state);
                continue;
            }
            match listen(port) {
                Ok(listener) => {
                    let answers = Port {
                        service: service.clone(),
                        health: self.health.clone(),
                        state: Arc::new(Mutex::new(state)),
                    };
                    let task = tokio::spawn(web::serve(listener, answers.clone()));
                    self.open.insert((service, port), Open { port: answers, task });
                }
                Err(error) => blocked.push(Blocked { service, port, error }),
            }
        }
        blocked
    }
}

/// On all addresses of both families; of one, if the host has no other.
fn listen(port: u16) -> std::io::Result<TcpListener> {
    let bind = |address: SocketAddr| std::net::TcpListener::bind(address);
    let listener = bind((Ipv6Addr::UNSPECIFIED, port).into()).or_else(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => Err(error),
        _ => bind((Ipv4Addr::UNSPECIFIED, port).into()),
    })?;
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

/// What is told on one port.
#[derive(Debug, Clone)]
struct Port {
    service: Name,
    health: Arc<Health>,
    state: Arc<Mutex<Answer>>,
}

#[derive(Debug, Clone)]
struct Answer {
    endpoints: usize,
    network: Network,
}

impl Port {
    fn set(&self, state: Answer) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = state;
    }

    fn state(&self) -> Answer {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Answers for Port {
    async fn answer(&self, _request: &Request<Incoming>) -> Response<Body> {
        let endpoints = self.state().endpoints;
        let healthy = self.health.is_healthy(Instant::now());
        let body = json!({
            "service": {"namespace": &*self.service.namespace, "name": &*self.service.name},
            "localEndpoints": endpoints,
            "serviceProxyHealthy": healthy,
        });
        let status = if endpoints > 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        let mut response = web::json(status, &body);
        response.headers_mut().insert(HeaderName::from_static(WEIGHT), HeaderValue::from(endpoints));
        response
    }

    /// Only on the addresses on which node ports answer.
    fn admits(&self, client: &TcpStream) -> bool {
        let own = client.local_addr().map(|own| own.ip().to_canonical());
        own.is_ok_and(|own| self.state().network.node_ports.include(own))
    }
}
