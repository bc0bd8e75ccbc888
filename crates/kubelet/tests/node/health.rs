//! gRPC probes, of a real health server in a pod's network.

use std::convert::Infallible;
use std::fs::File;
use std::future::Ready;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::AsFd as _;
use std::task::{Context, Poll};

use cri::{RuntimeService as _, v1};
use serde_json::{Value, json};
use testkit::serial::Test;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::{Service, http};
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::server::HealthReporter;

use crate::desk::Desk;
use crate::fixture::{Node, on_a_node};

pub(crate) const TESTS: &[Test] = &[
    ("a_container_is_ready_while_its_service_serves", a_container_is_ready_while_its_service_serves),
    ("a_service_that_nobody_knows_is_no_life", a_service_that_nobody_knows_is_no_life),
    ("a_server_without_the_health_service_is_not_ready", a_server_without_the_health_service_is_not_ready),
];

const PORT: u16 = 9000;

/// A server on a pod's port; it ends with this value.
struct Serving(JoinHandle<()>);

impl Drop for Serving {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Serves in the network of a pod that runs.
async fn serve<S>(node: &Node, pod: &str, service: S) -> Serving
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    let container_id = node.containers(pod).await[0].id.clone();
    let request = v1::ContainerStatusRequest { container_id, verbose: true };
    let info = node.runtime.container_status(request).await.unwrap().info;
    let info: Value = serde_json::from_str(&info["info"]).unwrap();
    let namespace = File::open(format!("/proc/{}/ns/net", info["pid"])).unwrap();
    let listener = sys::netns::run_in(namespace.as_fd(), || TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))).unwrap();
    listener.set_nonblocking(true).unwrap();
    let incoming = TcpListenerStream::new(tokio::net::TcpListener::from_std(listener).unwrap());
    Serving(tokio::spawn(async move {
        Server::builder().serve_with_incoming(service, incoming).await.unwrap();
    }))
}

/// The health service in which only "db" is known, with this status, beside the server as a whole, which does not serve.
async fn health(status: ServingStatus) -> (HealthReporter, HealthServer<impl Health>) {
    let (reporter, service) = tonic_health::server::health_reporter();
    reporter.set_service_status("", ServingStatus::NotServing).await;
    reporter.set_service_status("db", status).await;
    (reporter, service)
}

/// What a server says that knows no service.
#[derive(Clone)]
struct Nothing;

impl Service<http::Request<Body>> for Nothing {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Ready<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Request<Body>) -> Self::Future {
        std::future::ready(Ok(Status::unimplemented("nothing is served here").into_http()))
    }
}

fn probe(service: Option<&str>) -> Value {
    json!({ "grpc": { "port": PORT, "service": service }, "periodSeconds": 1, "failureThreshold": 1 })
}

/// Waits until the operator is told of a probe that failed for this reason.
async fn failed(node: &Node, pod: &str, reason: &str) {
    let is_told = |desk: &Desk| desk.messages(pod, "Unhealthy").iter().any(|message| message.contains(reason));
    node.desk.when(&format!("{pod} is unhealthy: {reason}"), is_told).await;
}

async fn ready(node: &Node, pod: &str, is_ready: bool) {
    let what = format!("{pod} is ready: {is_ready}");
    node.desk.when(&what, |desk| desk.container(pod)["ready"] == is_ready).await;
}

fn a_container_is_ready_while_its_service_serves() {
    on_a_node(|node| async {
        node.want("one", "sleep 1000", json!({ "readinessProbe": probe(Some("db")) }));
        node.want("all", "sleep 1000", json!({ "readinessProbe": probe(None) }));
        for pod in ["one", "all"] {
            failed(&node, pod, "failed to connect service").await;
        }
        let (one, service) = health(ServingStatus::NotServing).await;
        let _one = serve(&node, "one", service).await;
        failed(&node, "one", "service unhealthy (responded with \"NOT_SERVING\")").await;
        assert_eq!(node.desk.container("one")["ready"], false);
        one.set_service_status("db", ServingStatus::Serving).await;
        ready(&node, "one", true).await;
        // Without a name it is the whole server that is asked.
        let (all, service) = health(ServingStatus::Serving).await;
        let _all = serve(&node, "all", service).await;
        failed(&node, "all", "NOT_SERVING").await;
        all.set_service_status("", ServingStatus::Serving).await;
        ready(&node, "all", true).await;
        one.set_service_status("db", ServingStatus::Unknown).await;
        failed(&node, "one", "service unhealthy (responded with \"UNKNOWN\")").await;
        ready(&node, "one", false).await;
        assert_eq!(node.desk.container("all")["ready"], true);
        node
    });
}

fn a_service_that_nobody_knows_is_no_life() {
    on_a_node(|node| async {
        let alive = |service| json!({ "livenessProbe": probe(Some(service)), "startupProbe": { "exec": { "command": ["test", "-e", "/open"] }, "periodSeconds": 1, "failureThreshold": 600 } });
        for service in ["db", "nobody"] {
            node.want(service, "sleep 1000", alive(service));
            node.desk.running(service).await;
        }
        let mut servers = Vec::new();
        for pod in ["db", "nobody"] {
            let (_, service) = health(ServingStatus::Serving).await;
            servers.push(serve(&node, pod, service).await);
            let cmd = ["touch", "/open"].map(str::to_owned).to_vec();
            let container_id = node.containers(pod).await[0].id.clone();
            node.runtime.exec_sync(v1::ExecSyncRequest { container_id, cmd, timeout: 0 }).await.unwrap();
        }
        failed(&node, "nobody", "health rpc failed with status 5").await;
        node.desk.when("it is restarted", |desk| desk.container("nobody")["restartCount"] == 1).await;
        let killed = node.desk.messages("nobody", "Killing");
        assert!(
            killed.iter().any(|message| message.contains("failed liveness probe, will be restarted")),
            "{killed:?}"
        );
        assert_eq!(node.desk.container("db")["restartCount"], 0, "the service that is known was asked as often");
        let unhealthy = node.desk.messages("db", "Unhealthy");
        assert!(!unhealthy.iter().any(|message| message.contains("Liveness")), "{unhealthy:?}");
        node
    });
}

fn a_server_without_the_health_service_is_not_ready() {
    on_a_node(|node| async {
        node.want("p", "sleep 1000", json!({ "readinessProbe": probe(None) }));
        node.desk.running("p").await;
        let _server = serve(&node, "p", Nothing).await;
        failed(&node, "p", "does not implement the grpc health protocol").await;
        assert_eq!(node.desk.container("p")["ready"], false);
        node
    });
}
