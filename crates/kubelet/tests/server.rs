//! The HTTP API over a real connection, with a runtime that serves one container and its stream.

#![allow(clippy::unwrap_used, reason = "a test")]

mod names;

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use cluster::{Source, SourceError, Store};
use cri::{Error, ImageService, RuntimeService, v1};
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Event, NodeStatus, PodStatus};
use kubelet::paths::Paths;
use kubelet::server::{Api, NodeLogs};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

struct Fixed(Store);

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
    fn event(&self, _: Event) {}
}

/// Runs container `id1` of pod `u1`; sessions lead to `streams`.
struct OneContainer {
    streams: std::net::SocketAddr,
}

#[async_trait::async_trait]
impl RuntimeService for OneContainer {
    async fn list_containers(&self, request: v1::ListContainersRequest) -> Result<v1::ListContainersResponse, Error> {
        let filter = request.filter.unwrap_or_default();
        let wanted = filter.label_selector.get("io.kubernetes.container.name").is_none_or(|name| name == "c");
        let container = v1::Container {
            id: "id1".into(),
            state: v1::ContainerState::ContainerRunning.into(),
            ..v1::Container::default()
        };
        Ok(v1::ListContainersResponse { containers: if wanted { vec![container] } else { Vec::new() } })
    }

    async fn list_pod_sandbox(&self, _: v1::ListPodSandboxRequest) -> Result<v1::ListPodSandboxResponse, Error> {
        let sandbox = v1::PodSandbox { id: "sb1".into(), ..v1::PodSandbox::default() };
        Ok(v1::ListPodSandboxResponse { items: vec![sandbox] })
    }

    async fn list_pod_sandbox_stats(
        &self,
        _: v1::ListPodSandboxStatsRequest,
    ) -> Result<v1::ListPodSandboxStatsResponse, Error> {
        let metadata = v1::PodSandboxMetadata { name: "web".into(), namespace: "shop".into(), ..Default::default() };
        let attributes = v1::PodSandboxAttributes { metadata: Some(metadata), ..Default::default() };
        let cpu = v1::CpuUsage {
            usage_core_nano_seconds: Some(v1::UInt64Value { value: 1_500_000_000 }),
            ..v1::CpuUsage::default()
        };
        let linux = v1::LinuxPodSandboxStats { cpu: Some(cpu), ..Default::default() };
        let stats = v1::PodSandboxStats { attributes: Some(attributes), linux: Some(linux), windows: None };
        Ok(v1::ListPodSandboxStatsResponse { stats: vec![stats] })
    }

    async fn exec(&self, request: v1::ExecRequest) -> Result<v1::ExecResponse, Error> {
        assert_eq!((request.container_id.as_str(), request.tty, request.stderr), ("id1", true, false));
        Ok(v1::ExecResponse { url: format!("http://{}/exec/{}", self.streams, request.cmd.join("-")) })
    }

    async fn port_forward(&self, request: v1::PortForwardRequest) -> Result<v1::PortForwardResponse, Error> {
        assert_eq!((request.pod_sandbox_id.as_str(), request.port), ("sb1", vec![80, 81]));
        Ok(v1::PortForwardResponse { url: format!("http://{}/refused", self.streams) })
    }
}

/// A streaming server that upgrades `/exec/…` and then answers each byte with the next one.
async fn serve_streams() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let service = service_fn(|mut request: Request<Incoming>| async move {
                let mut response = Response::new(http_body_util::Full::new(Bytes::from("no such port")));
                if !request.uri().path().starts_with("/exec/ls--l") {
                    *response.status_mut() = StatusCode::FORBIDDEN;
                    return Ok::<_, Infallible>(response);
                }
                assert!(request.headers().get("authorization").is_none());
                assert_eq!(request.headers()["sec-websocket-protocol"], "v5.channel.k8s.io");
                *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
                *response.body_mut() = http_body_util::Full::default();
                response.headers_mut().insert("upgrade", request.headers()["upgrade"].clone());
                response.headers_mut().insert("connection", "Upgrade".parse().unwrap());
                tokio::spawn(async move {
                    let mut io = TokioIo::new(hyper::upgrade::on(&mut request).await.unwrap());
                    while let Ok(byte) = io.read_u8().await {
                        io.write_u8(byte + 1).await.unwrap();
                    }
                });
                Ok(response)
            });
            let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            tokio::spawn(connection.with_upgrades());
        }
    });
    address
}

/// Has images on one disk, and containers on another.
struct TwoDisks;

#[async_trait::async_trait]
impl ImageService for TwoDisks {
    async fn image_fs_info(&self, _: v1::ImageFsInfoRequest) -> Result<v1::ImageFsInfoResponse, cri::Error> {
        let system = |mountpoint: &str, used| v1::FilesystemUsage {
            fs_id: Some(v1::FilesystemIdentifier { mountpoint: mountpoint.to_owned() }),
            used_bytes: Some(v1::UInt64Value { value: used }),
            ..v1::FilesystemUsage::default()
        };
        let (images, containers) = (vec![system("/dev/shm", 7)], vec![system("/", 8)]);
        Ok(v1::ImageFsInfoResponse { image_filesystems: images, container_filesystems: containers })
    }
}

struct Fixture {
    api: Api,
    dir: tempfile::TempDir,
}

impl Fixture {
    async fn new() -> Self {
        let store = Store::new();
        let pod = json!({"metadata": {"name": "web", "namespace": "shop", "uid": "u1"}, "spec": {"containers": [{"name": "c"}]}});
        store.pods().put(serde_json::from_value(pod).unwrap());
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths { root: dir.path().join("kubelet"), logs: dir.path().join("logs") };
        let runtime = OneContainer { streams: serve_streams().await };
        let api = Api::new(Arc::new(Fixed(store)), Arc::new(runtime), paths, "n1");
        let api = api.with_log_dir(dir.path().join("var"));
        std::fs::create_dir(dir.path().join("var")).unwrap();
        Self { api: api.with_images(Arc::new(TwoDisks)), dir }
    }

    async fn send(&self, request: Request<Empty<Bytes>>) -> Response<Incoming> {
        let (client, server) = tokio::io::duplex(4096);
        let api = self.api.clone();
        let service = service_fn(move |request| {
            let api = api.clone();
            async move { Ok::<_, Infallible>(api.handle(request).await) }
        });
        let server = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(server), service);
        tokio::spawn(server.with_upgrades());
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(client)).await.unwrap();
        tokio::spawn(connection.with_upgrades());
        sender.send_request(request).await.unwrap()
    }

    async fn get(&self, path: &str) -> (StatusCode, String) {
        self.get_as(path, "").await
    }

    async fn get_as(&self, path: &str, accept: &str) -> (StatusCode, String) {
        let request = Request::builder().uri(path).header("host", "localhost").header("accept", accept);
        let response = self.send(request.body(Empty::new()).unwrap()).await;
        let status = response.status();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    async fn upgrade(&self, path: &str) -> Response<Incoming> {
        let request = Request::builder().method(Method::GET).uri(path).header("host", "localhost");
        let request = request.header("connection", "Upgrade").header("upgrade", "websocket");
        let request =
            request.header("authorization", "Bearer secret").header("sec-websocket-protocol", "v5.channel.k8s.io");
        self.send(request.body(Empty::new()).unwrap()).await
    }
}

#[tokio::test]
async fn answers() {
    let node = Fixture::new().await;
    assert_eq!(node.get("/healthz").await, (StatusCode::OK, "ok".into()));
    let pods: Value = serde_json::from_str(&node.get("/pods").await.1).unwrap();
    assert_eq!((&pods["kind"], &pods["items"][0]["metadata"]["name"]), (&json!("PodList"), &json!("web")));
    let summary: Value = serde_json::from_str(&node.get("/stats/summary").await.1).unwrap();
    assert_eq!(summary["node"]["nodeName"], "n1");
    assert_eq!(summary["pods"][0]["cpu"]["usageCoreNanoSeconds"], 1_500_000_000);
    let runtime = &summary["node"]["runtime"];
    assert_eq!((&runtime["imageFs"]["usedBytes"], &runtime["containerFs"]["usedBytes"]), (&json!(7), &json!(8)));
    assert_ne!(runtime["imageFs"]["capacityBytes"], runtime["containerFs"]["capacityBytes"]);
    let disk = &summary["node"]["fs"];
    assert!(disk["usedBytes"].as_u64().unwrap() <= disk["capacityBytes"].as_u64().unwrap(), "{disk}");
    assert!(disk["availableBytes"].is_u64() && disk["time"].is_string(), "{disk}");
    let metrics = node.get("/metrics/resource").await.1;
    assert!(metrics.contains("pod_cpu_usage_seconds_total{namespace=\"shop\",pod=\"web\"} 1.5\n"), "{metrics}");
    assert!(node.get("/metrics").await.1.contains("kubelet_running_containers{container_state=\"running\"} 1\n"));
    for path in ["/metrics", "/metrics/cadvisor", "/metrics/resource", "/metrics/probes"] {
        let text = node.get(path).await.1;
        let parsed = openmetrics_parser::prometheus::parse_prometheus(&text);
        assert!(!parsed.unwrap_or_else(|error| panic!("{path}: {error}\n{text}")).families.is_empty(), "{path}");
    }
    assert_eq!(node.get("/nothing").await.0, StatusCode::NOT_FOUND);
    assert_eq!(node.get("/exec/shop/web/c?output=1").await.0, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn every_metric_of_upstream_is_told_or_not_for_a_reason() {
    let node = Fixture::new().await;
    let text = [node.get("/metrics").await.1, node.get("/metrics/probes").await.1].concat();
    let families = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
    let told: BTreeSet<&str> = families.collect();
    for name in names::OF_UPSTREAM.split_whitespace() {
        let excused = names::NOT_TOLD.iter().find(|(beginning, _)| name.starts_with(beginning));
        assert!(told.contains(name) != excused.is_some(), "{name} is told or excused ({excused:?}), one of them");
    }
    for (beginning, _) in names::NOT_TOLD {
        assert!(names::OF_UPSTREAM.split_whitespace().any(|name| name.starts_with(beginning)), "{beginning}");
    }
}

#[tokio::test]
async fn who_may_not_reach_into_pods_sees_the_rest() {
    let mut node = Fixture::new().await;
    node.api = node.api.with_debugging(false);
    for path in ["/containerLogs/shop/web/c", "/runningpods/", "/exec/shop/web/c?command=ls", "/debug/pprof/heap"] {
        assert_eq!(node.get(path).await, (StatusCode::METHOD_NOT_ALLOWED, "Debug endpoints are disabled.".to_owned()));
    }
    assert_eq!(node.get("/healthz").await.0, StatusCode::OK);
}

#[tokio::test]
async fn logs_are_streamed() {
    let node = Fixture::new().await;
    let missing = node.get("/containerLogs/shop/web/other").await;
    assert_eq!(missing, (StatusCode::BAD_REQUEST, "container other is not valid for pod web".into()));
    let waiting = node.get("/containerLogs/shop/web/c").await;
    assert_eq!(waiting, (StatusCode::BAD_REQUEST, r#"container "c" in pod "web" is waiting to start"#.into()));
    let dir = node.dir.path().join("logs/shop_web_u1/c");
    std::fs::create_dir_all(&dir).unwrap();
    std::fs::write(dir.join("0.log"), "2026-01-31T12:00:00Z stdout F old\n").unwrap();
    std::fs::write(dir.join("1.log"), "2026-01-31T12:00:00Z stdout F a\n2026-01-31T12:00:01Z stderr F b\n").unwrap();
    for (query, expect) in
        [("", "a\nb\n"), ("?tailLines=1", "b\n"), ("?previous=true", "old\n"), ("?limitBytes=1", "a")]
    {
        assert_eq!(node.get(&format!("/containerLogs/shop/web/c{query}")).await, (StatusCode::OK, expect.into()));
    }
}

#[tokio::test]
async fn it_says_what_it_is_and_with_which_flags_it_runs() {
    let mut node = Fixture::new().await;
    node.api = node.api.with_flags([("max-pods".to_owned(), "110".to_owned())].into());
    let (status, text) = node.get("/statusz").await;
    assert_eq!(status, StatusCode::OK);
    assert!(
        text.starts_with("\nkubelet statusz\nWarning: This endpoint is not meant to be machine parseable"),
        "{text}"
    );
    assert!(text.contains("\nBinary version: 1.37.2\nEmulation version: 1.37\n"), "{text}");
    let (_, text) = node.get_as("/statusz", "application/json;v=v1beta1;g=config.k8s.io;as=Statusz").await;
    let object: Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&object["kind"], &object["apiVersion"]), (&json!("Statusz"), &json!("config.k8s.io/v1beta1")));
    assert!(object["paths"].as_array().unwrap().contains(&json!("/statusz")), "{object}");
    assert_eq!(node.get_as("/statusz", "application/json").await.0, StatusCode::NOT_ACCEPTABLE);
    let (_, text) = node.get("/flagz").await;
    assert!(text.starts_with("\nkubelet flagz\n") && text.ends_with("\nmax-pods=110\n"), "{text}");
    let (_, text) = node.get_as("/flagz", "application/json;v=v1alpha1;g=config.k8s.io;as=Flagz").await;
    assert_eq!(serde_json::from_str::<Value>(&text).unwrap()["flags"], json!({"max-pods": "110"}));
}

#[tokio::test]
async fn logs_of_the_node_are_files() {
    let mut node = Fixture::new().await;
    let var = node.dir.path().join("var");
    std::fs::create_dir(var.join("app")).unwrap();
    std::fs::write(var.join("app/app.log"), "of the app\n").unwrap();
    std::fs::write(var.join("messages"), "all\n").unwrap();
    let (status, page) = node.get("/logs/").await;
    assert_eq!(status, StatusCode::OK);
    assert!(page.contains("<a href=\"app/\">app/</a>\n<a href=\"messages\">messages</a>\n"), "{page}");
    assert_eq!(node.get("/logs/app/app.log").await, (StatusCode::OK, "of the app\n".to_owned()));
    assert_eq!(node.get("/logs/app").await.0, StatusCode::MOVED_PERMANENTLY);
    assert_eq!(node.get("/logs/none").await.0, StatusCode::NOT_FOUND);
    assert_eq!(node.get("/logs/?query=app").await.1, page, "services are not to be asked about");

    node.api = node.api.with_node_logs(NodeLogs::Services);
    assert_eq!(node.get("/logs/?query=/messages").await, (StatusCode::OK, "all\n".to_owned()));
    let asked = "/logs/?query=app&query=orlop-none";
    assert_eq!(node.get(asked).await, (StatusCode::OK, "of the app\n\nlog not found for orlop-none\n".to_owned()));
    let (_, told) = node.get("/logs/?query=app&tailLines=1").await;
    assert!(told.contains("options present and query resolved to log files"), "{told}");
    assert_eq!(node.get("/logs/?query=%20").await.0, StatusCode::BAD_REQUEST);
    assert_eq!(node.get("/logs/?boot=0").await.0, StatusCode::NOT_ACCEPTABLE);
    assert_eq!(node.get("/logs/messages?query=app").await.0, StatusCode::NOT_ACCEPTABLE);

    node.api = node.api.with_node_logs(NodeLogs::Off);
    let disabled = (StatusCode::METHOD_NOT_ALLOWED, "logs endpoint is disabled.".to_owned());
    assert_eq!(node.get("/logs/messages").await, disabled);
}

/// Whoever may write below the node's logs reads no other file of it.
#[tokio::test]
async fn nothing_leads_out_of_the_logs_of_the_node() {
    let node = Fixture::new().await;
    let var = node.dir.path().join("var");
    std::fs::write(node.dir.path().join("secret"), "the host's\n").unwrap();
    std::os::unix::fs::symlink(node.dir.path().join("secret"), var.join("absolute")).unwrap();
    std::os::unix::fs::symlink("../secret", var.join("relative")).unwrap();
    let fifo = sys::rustix::fs::FileType::Fifo;
    sys::rustix::fs::mknodat(sys::rustix::fs::CWD, var.join("fifo"), fifo, 0o600.into(), 0).unwrap();
    for path in ["absolute", "relative", "../secret", "%2e%2e/secret", "fifo"] {
        assert_eq!(node.get(&format!("/logs/{path}")).await.0, StatusCode::FORBIDDEN, "{path}");
    }
}

#[tokio::test]
async fn sessions_are_joined() {
    let node = Fixture::new().await;
    let response = node.upgrade("/exec/shop/web/c?input=1&output=1&tty=1&command=ls&command=-l").await;
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(response.headers()["upgrade"], "websocket");
    let mut io = TokioIo::new(hyper::upgrade::on(response).await.unwrap());
    for byte in [1, 42] {
        io.write_u8(byte).await.unwrap();
        assert_eq!(io.read_u8().await.unwrap(), byte + 1);
    }
    drop(io);

    let refused = node.upgrade("/portForward/shop/web?port=80,81").await;
    assert_eq!(refused.status(), StatusCode::FORBIDDEN);
    let text = refused.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(text, "no such port");
    assert_eq!(node.upgrade("/exec/shop/web/u2/c?output=1").await.status(), StatusCode::NOT_FOUND);
    node.api.drain().await;
}

/// A pod with the node's directory of logs at hand has read the node's files by its own log (khv047), which has no number of
/// the kind.
#[tokio::test]
async fn no_log_is_a_link_or_a_pipe() {
    let node = Fixture::new().await;
    let dir = node.dir.path().join("logs/shop_web_u1/c");
    std::fs::create_dir_all(&dir).unwrap();
    let secret = node.dir.path().join("secret");
    std::fs::write(&secret, "2026-01-31T12:00:00Z stdout F the host's\n").unwrap();
    for query in ["", "?tailLines=1"] {
        std::os::unix::fs::symlink(&secret, dir.join("0.log")).unwrap();
        let (_, text) = node.get(&format!("/containerLogs/shop/web/c{query}")).await;
        assert!(!text.contains("the host's"), "{text}");
        std::fs::remove_file(dir.join("0.log")).unwrap();
        let fifo = sys::rustix::fs::FileType::Fifo;
        sys::rustix::fs::mknodat(sys::rustix::fs::CWD, dir.join("0.log"), fifo, 0o600.into(), 0).unwrap();
        assert_eq!(node.get(&format!("/containerLogs/shop/web/c{query}")).await.1, "");
        std::fs::remove_file(dir.join("0.log")).unwrap();
    }
}

/// There are no checkpoints, with credentials or without.
#[tokio::test]
async fn cve_2025_0426_nobody_makes_checkpoints() {
    let node = Fixture::new().await;
    for method in [Method::POST, Method::GET] {
        let request = Request::builder().method(method).uri("/checkpoint/shop/web/c").header("host", "localhost");
        let response = node.send(request.body(Empty::new()).unwrap()).await;
        assert_eq!(response.status(), StatusCode::NOT_FOUND);
    }
}
