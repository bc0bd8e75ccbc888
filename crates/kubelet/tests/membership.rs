//! A node reports its status to a server that takes down what it is told.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cluster::api::{Api, Config, Identity, Server, Trust};
use cluster::{Source, SourceError, Store};
use cri::{ImageService, RuntimeService, v1};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Event, Node, NodeStatus, PodStatus};
use kubelet::node::describe::NodeConfig;
use kubelet::node::machine::Machine;
use kubelet::node::membership::{Membership, Parts};
use kubelet::node::news::News;
use kubelet::node::pressure::{Pressures, Thresholds};
use kubelet::resources::{self, Resources};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;

/// Nothing here is due before it has ended.
const NEVER: Duration = Duration::from_secs(3600);

/// Has a table, and tells of events.
struct Fixed(Store, UnboundedSender<Event>);

#[async_trait::async_trait]
impl Source for Fixed {
    fn store(&self) -> &Store {
        &self.0
    }
    async fn update_pod_status(&self, _: &str, _: PodStatus) -> Result<(), SourceError> {
        Ok(())
    }
    async fn delete_pod(&self, _: &str) -> Result<(), SourceError> {
        Ok(())
    }
    async fn request_deletion(&self, _: &str, _: Option<i64>) -> Result<(), SourceError> {
        Ok(())
    }
    async fn update_node_status(&self, _: &str, _: NodeStatus) -> Result<(), SourceError> {
        Ok(())
    }
    fn event(&self, event: Event) {
        let _ = self.1.send(event); // The test may have ended.
    }
}

/// Nothing is wrong with it.
struct Ready;

#[async_trait::async_trait]
impl RuntimeService for Ready {
    async fn status(&self, _: v1::StatusRequest) -> Result<v1::StatusResponse, cri::Error> {
        Ok(v1::StatusResponse::default())
    }
}

impl ImageService for Ready {}

/// Takes whatever is written, has nothing, and tells of the statuses.
async fn serve(listener: TcpListener, told: UnboundedSender<Node>) {
    while let Ok((stream, _)) = listener.accept().await {
        let told = told.clone();
        let service = service_fn(move |request: Request<Incoming>| {
            let told = told.clone();
            async move { Ok::<_, Infallible>(answer(request, &told).await) }
        });
        let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
        tokio::spawn(connection);
    }
}

async fn answer(request: Request<Incoming>, told: &UnboundedSender<Node>) -> Response<Full<Bytes>> {
    let is_status = request.method() == Method::PATCH && request.uri().path() == "/api/v1/nodes/n1/status";
    let status = if request.method() == Method::GET { StatusCode::NOT_FOUND } else { StatusCode::OK };
    let body = request.into_body().collect().await.unwrap().to_bytes();
    let mut object: Value = serde_json::from_slice(&body).unwrap_or_else(|_| json!({}));
    if is_status {
        object["metadata"] = json!({"name": "n1", "resourceVersion": "7"});
        let addresses = object["status"]["addresses"].as_array_mut().unwrap();
        addresses.retain(|address| address.get("$patch").is_none());
        told.send(serde_json::from_value(object.clone()).unwrap()).unwrap();
    }
    let mut response = Response::new(Full::new(object.to_string().into()));
    *response.status_mut() = status;
    response
}

fn config() -> NodeConfig {
    NodeConfig {
        name: "n1".into(),
        hostname: "host".into(),
        addresses: vec!["192.0.2.7".parse().unwrap()],
        cloud: None,
        port: None,
        labels: BTreeMap::new(),
        taints: Vec::new(),
        unschedulable: false,
        provider_id: None,
        pods_max: 110,
        images_max: None,
        reserved: BTreeMap::new(),
        thresholds: Thresholds::NONE,
        runtime_version: "orlop://0".into(),
        kubelet_version: "v1.37.2".into(),
        features: Vec::new(),
    }
}

/// What the node finds out about itself: nothing.
#[derive(Default)]
struct Findings {
    pressures: watch::Sender<Pressures>,
    shutting_down: watch::Sender<bool>,
    volumes_in_use: watch::Sender<BTreeSet<(String, String)>>,
}

/// A member whose reports come out of the channel.
struct Member {
    _membership: Membership,
    /// What the server tells the node of itself.
    store: Store,
    reports: UnboundedReceiver<Node>,
    events: UnboundedReceiver<Event>,
    _findings: Findings,
    _root: tempfile::TempDir,
}

impl Member {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let server = Server::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap();
        let api = Api::new(Config::new(server, Trust::Host, Identity::default())).unwrap();
        let (tell, reports) = unbounded_channel();
        tokio::spawn(serve(listener, tell));
        let (root, store) = (tempfile::tempdir().unwrap(), Store::new());
        let plain = resources::Config::plain(root.path().to_owned());
        let (tell, events) = unbounded_channel();
        let source = Arc::new(Fixed(store.clone(), tell));
        let resources = Resources::start(&plain, Arc::new(Ready), source.clone(), Arc::default()).await.unwrap();
        let findings = Findings::default();
        let membership = Membership::start(Parts {
            config: config(),
            machine: Machine::default(),
            api: api.clone(),
            heartbeats: api,
            store: store.clone(),
            source,
            first_news: vec![News::normal("NodeAllocatableEnforced", "limits")],
            image_trouble: watch::channel(None).1,
            runtime: Arc::new(Ready),
            images: Arc::new(Ready),
            pressures: findings.pressures.subscribe(),
            shutting_down: findings.shutting_down.subscribe(),
            resources,
            volumes_in_use: findings.volumes_in_use.subscribe(),
            update_every: NEVER,
            report_every: NEVER,
            lease_s: 40,
        });
        Self { _membership: membership, store, reports, events, _findings: findings, _root: root }
    }

    /// The next report: the node, and whether it is ready.
    async fn report(&mut self) -> (Node, String) {
        let node = self.reports.recv().await.unwrap();
        let ready = ready(&mut node.clone()).status.clone();
        (node, ready)
    }
}

fn ready(node: &mut Node) -> &mut k8s_openapi::api::core::v1::NodeCondition {
    let conditions = node.status.as_mut().unwrap().conditions.as_mut().unwrap();
    conditions.iter_mut().find(|condition| condition.type_ == "Ready").unwrap()
}

#[tokio::test]
async fn a_node_tells_how_it_begins() {
    let mut member = Member::start().await;
    member.report().await;
    let expect = [
        "Starting",
        "NodeAllocatableEnforced",
        "NodeHasSufficientMemory",
        "NodeHasNoDiskPressure",
        "NodeHasSufficientPID",
        "NodeReady",
    ];
    for reason in expect {
        let event = member.events.recv().await.unwrap();
        assert_eq!((event.reason.as_deref(), event.involved_object.name.as_deref()), (Some(reason), Some("n1")));
    }
}

/// A server that was cut off from the node takes it for lost, and the node has changed nothing since.
#[tokio::test]
async fn a_node_that_is_taken_for_lost_says_that_it_is_not() {
    let mut member = Member::start().await;
    let (mut node, said) = member.report().await;
    assert_eq!(said, "True");
    ready(&mut node).status = "Unknown".to_owned();
    node.metadata.resource_version = Some("8".to_owned());
    member.store.nodes().mirror(node);
    assert_eq!(member.report().await.1, "True");
}
