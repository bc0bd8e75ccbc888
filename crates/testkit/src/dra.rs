//! A driver of claims for tests, over real gRPC: a claim is ready when there is a description for CDI that gives its containers
//! a variable.

use std::collections::HashMap;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use plugin::dra::dra_plugin_server::{DraPlugin, DraPluginServer};
use plugin::dra::{
    Claim, Device, NodePrepareResourceResponse, NodePrepareResourcesRequest, NodePrepareResourcesResponse,
    NodeUnprepareResourceResponse, NodeUnprepareResourcesRequest, NodeUnprepareResourcesResponse,
};
use plugin::dra_health::dra_resource_health_server::{DraResourceHealth, DraResourceHealthServer};
use plugin::dra_health::{
    DeviceHealth, DeviceIdentifier, HealthStatus, NodeWatchResourcesRequest, NodeWatchResourcesResponse,
};
use serde_json::json;
use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::codegen::{self, BoxFuture, http};
use tonic::{Request, Response, Status};

use crate::plugins::{Registrar, Server};

/// The pool and the device that every claim gets.
pub const POOL: &str = "pool";
/// See [`POOL`].
pub const DEVICE: &str = "one";

/// A call that a driver has answered, with the uids of its claims.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    /// `NodePrepareResources`
    Prepare(Vec<String>),
    /// `NodeUnprepareResources`
    Unprepare(Vec<String>),
}

/// A driver at work. It ends with this value; its descriptions stay.
#[derive(Debug)]
pub struct Driver {
    service: Service,
    /// What the node agent told it.
    pub registrar: Registrar,
    servers: Vec<Server>,
}

#[derive(Debug, Clone)]
struct Service {
    name: String,
    /// Where its descriptions for CDI go.
    descriptions: PathBuf,
    calls: Arc<watch::Sender<Vec<Call>>>,
    hangs: watch::Sender<bool>,
    /// What is said of a claim instead of its devices.
    refusal: Arc<Mutex<Option<String>>>,
    health: watch::Sender<(HealthStatus, String)>,
}

impl Driver {
    /// Serves the driver below a kubelet's root, and registers it there.
    ///
    /// # Errors
    /// A socket cannot be listened on.
    pub fn start(name: &str, kubelet_root: &Path, descriptions: &Path) -> anyhow::Result<Self> {
        let endpoint = kubelet_root.join("plugins").join(name).join("dra.sock");
        let registration = kubelet_root.join("plugins_registry").join(format!("{name}-reg.sock"));
        let versions = ["v1.DRAPlugin", "v1.DRAResourceHealth"];
        let registrar = Registrar::new("DRAPlugin", name, &endpoint, &versions);
        let service = Service {
            name: name.to_owned(),
            descriptions: descriptions.to_owned(),
            calls: Arc::new(watch::Sender::new(Vec::new())),
            hangs: watch::Sender::new(false),
            refusal: Arc::default(),
            health: watch::Sender::new((HealthStatus::Healthy, String::new())),
        };
        let both = Both {
            claims: DraPluginServer::new(service.clone()),
            health: DraResourceHealthServer::new(service.clone()),
        };
        let servers = vec![Server::start(&endpoint, both)?, registrar.serve(&registration)?];
        Ok(Self { service, registrar, servers })
    }

    /// Ends as a process does that is killed: its sockets stay.
    pub fn kill(mut self) {
        self.servers.drain(..).for_each(Server::kill);
    }

    /// The calls that it has answered; changes with each.
    pub fn calls(&self) -> watch::Receiver<Vec<Call>> {
        self.service.calls.subscribe()
    }

    /// Answers nothing about claims from now on, or again.
    pub fn hang(&self, hangs: bool) {
        self.service.hangs.send_replace(hangs);
    }

    /// Refuses every claim from now on, or none.
    pub fn refuse(&self, why: Option<&str>) {
        *self.service.refusal.lock().unwrap_or_else(PoisonError::into_inner) = why.map(str::to_owned);
    }

    /// How its device is from now on.
    pub fn tell(&self, health: HealthStatus, message: &str) {
        self.service.health.send_replace((health, message.to_owned()));
    }
}

impl Service {
    /// Its class of devices.
    fn kind(&self) -> String {
        format!("{}/claim", self.name)
    }

    fn description(&self, claim: &str) -> PathBuf {
        self.descriptions.join(format!("{}-{claim}.json", self.name))
    }

    fn prepare(&self, claim: &Claim) -> std::io::Result<Device> {
        let edits = json!({ "env": [format!("CLAIMED={}", claim.name)] });
        let devices = json!([{ "name": claim.uid, "containerEdits": edits }]);
        let description = json!({ "cdiVersion": "0.6.0", "kind": self.kind(), "devices": devices });
        std::fs::create_dir_all(&self.descriptions)?;
        std::fs::write(self.description(&claim.uid), description.to_string())?;
        Ok(Device {
            request_names: vec!["req".to_owned()],
            pool_name: POOL.to_owned(),
            device_name: DEVICE.to_owned(),
            cdi_device_ids: vec![format!("{}={}", self.kind(), claim.uid)],
            share_id: None,
        })
    }

    async fn unless_hung(&self) {
        // The sender lives in self.
        let _ = self.hangs.subscribe().wait_for(|hangs| !hangs).await;
    }

    fn refusal(&self) -> Option<String> {
        self.refusal.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn uids(claims: &[Claim]) -> Vec<String> {
    claims.iter().map(|claim| claim.uid.clone()).collect()
}

#[async_trait::async_trait]
impl DraPlugin for Service {
    async fn node_prepare_resources(
        &self,
        request: Request<NodePrepareResourcesRequest>,
    ) -> Result<Response<NodePrepareResourcesResponse>, Status> {
        self.unless_hung().await;
        let claims = request.into_inner().claims;
        let mut made = HashMap::new();
        for claim in &claims {
            let answer = match self.refusal() {
                Some(error) => NodePrepareResourceResponse { devices: Vec::new(), error },
                None => {
                    let device = self.prepare(claim).map_err(|error| Status::internal(error.to_string()))?;
                    NodePrepareResourceResponse { devices: vec![device], error: String::new() }
                }
            };
            made.insert(claim.uid.clone(), answer);
        }
        self.calls.send_modify(|calls| calls.push(Call::Prepare(uids(&claims))));
        Ok(Response::new(NodePrepareResourcesResponse { claims: made }))
    }

    async fn node_unprepare_resources(
        &self,
        request: Request<NodeUnprepareResourcesRequest>,
    ) -> Result<Response<NodeUnprepareResourcesResponse>, Status> {
        self.unless_hung().await;
        let claims = request.into_inner().claims;
        for claim in &claims {
            match std::fs::remove_file(self.description(&claim.uid)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Status::internal(error.to_string()));
                }
                _ => {}
            }
        }
        self.calls.send_modify(|calls| calls.push(Call::Unprepare(uids(&claims))));
        let done = claims.into_iter().map(|claim| (claim.uid, NodeUnprepareResourceResponse::default()));
        Ok(Response::new(NodeUnprepareResourcesResponse { claims: done.collect() }))
    }
}

#[async_trait::async_trait]
impl DraResourceHealth for Service {
    type NodeWatchResourcesStream = ReceiverStream<Result<NodeWatchResourcesResponse, Status>>;

    async fn node_watch_resources(
        &self,
        _: Request<NodeWatchResourcesRequest>,
    ) -> Result<Response<Self::NodeWatchResourcesStream>, Status> {
        let ((reports, stream), mut health) = (mpsc::channel(1), self.health.subscribe());
        // It ends with who listens, or with the driver.
        tokio::spawn(async move {
            loop {
                let now = health.borrow_and_update().clone();
                if reports.send(Ok(report(now))).await.is_err() || health.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Of the driver's one device.
fn report((health, message): (HealthStatus, String)) -> NodeWatchResourcesResponse {
    let device = DeviceIdentifier { pool_name: POOL.to_owned(), device_name: DEVICE.to_owned() };
    let health = DeviceHealth {
        device: Some(device),
        health: health.into(),
        message,
        // Longer than any test.
        health_check_timeout_seconds: 600,
        ..DeviceHealth::default()
    };
    NodeWatchResourcesResponse { devices: vec![health] }
}

/// Two services on one socket.
#[derive(Debug, Clone)]
struct Both {
    claims: DraPluginServer<Service>,
    health: DraResourceHealthServer<Service>,
}

impl codegen::Service<http::Request<Body>> for Both {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        match request.uri().path().starts_with("/v1.DRAResourceHealth/") {
            true => self.health.call(request),
            false => self.claims.call(request),
        }
    }
}
