//! The kubelet's HTTP API, as upstream has it, over whatever listener the program opens.
//!
//! ```text
//! request ─► route ─┬─ /healthz /pods /runningpods /stats/summary /metrics[/…]           answers
//!                   ├─ /statusz /flagz /logs/…                                          answers
//!                   ├─ /containerLogs/…                                                 the files, as a stream
//!                   └─ /exec /attach /portForward                                       joined to the runtime's stream
//! ```
//!
//! Who may call is decided before: by the file mode of the socket, or by the TLS listener.

pub mod accept;
mod container_logs;
pub mod health;
pub mod metrics;
mod node_logs;
pub mod others;
mod query;
pub mod secure;
mod stats;
mod streams;
mod zpages;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use cluster::{Key, Source, percent};
use cri::{ImageService, RuntimeService, v1};
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use instruments::Text;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use tokio_util::task::TaskTracker;

use crate::generate::label;
use crate::logs::Watches;
use crate::paths::Paths;
use crate::volumes::Volumes;
use metrics::{Collector, Telemetry};
pub use node_logs::NodeLogs;
pub use query::Query;

/// The body of an answer.
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

/// The API of one node. A handle: clones share the streams.
#[derive(Clone)]
pub struct Api {
    source: Arc<dyn Source>,
    runtime: Arc<dyn RuntimeService>,
    paths: Paths,
    /// The directories of the logs that somebody follows.
    followed: Watches,
    node: String,
    /// `KubeletConfiguration`, as it was written.
    configuration: Arc<Value>,
    /// The flags with their values, for `/flagz`.
    flags: Arc<BTreeMap<String, String>>,
    /// What `/logs/` serves, and of which directory.
    node_logs: NodeLogs,
    log_dir: PathBuf,
    telemetry: Telemetry,
    /// Whose figures `/stats/summary` shows.
    volumes: Option<Arc<Volumes>>,
    /// Who knows of the disks that it shows.
    images: Option<Arc<dyn ImageService>>,
    /// Whether it reaches into pods.
    debugging: bool,
    /// The open exec, attach and port-forward sessions: each has the place of the connection that it came by, and ends with
    /// the server that took it.
    streams: TaskTracker,
}

/// An answer that is a failure: a status and what to tell the caller.
struct Failure {
    status: StatusCode,
    message: String,
}

impl Failure {
    fn new(status: StatusCode, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, message)
    }

    fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }
}

impl From<cri::Error> for Failure {
    fn from(error: cri::Error) -> Self {
        let status = match &error {
            cri::Error::NotFound { .. } => StatusCode::NOT_FOUND,
            cri::Error::InvalidArgument(_) => StatusCode::BAD_REQUEST,
            cri::Error::Unimplemented { .. } => StatusCode::NOT_IMPLEMENTED,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Self::new(status, error.to_string())
    }
}

type Answer = Result<Response<Body>, Failure>;

/// Whether a path is one of those that reach into pods, as upstream counts them.
fn is_debugging(parts: &[&str]) -> bool {
    const DEBUGGING: [&str; 8] =
        ["run", "exec", "attach", "portForward", "containerLogs", "runningpods", "logs", "debug"];
    parts.first().is_some_and(|first| DEBUGGING.contains(first))
}

impl Api {
    /// The API of the node called `node`, which reads logs below `paths`.
    pub fn new(source: Arc<dyn Source>, runtime: Arc<dyn RuntimeService>, paths: Paths, node: &str) -> Self {
        Self {
            source,
            runtime,
            paths,
            followed: Watches::default(),
            node: node.to_owned(),
            configuration: Arc::default(),
            flags: Arc::default(),
            node_logs: NodeLogs::default(),
            log_dir: node_logs::default_dir(),
            telemetry: Telemetry::default(),
            volumes: None,
            images: None,
            debugging: true,
            streams: TaskTracker::new(),
        }
    }

    /// Without what reaches into pods (`enableDebuggingHandlers: false`): logs, exec, attach, port-forward.
    #[must_use]
    pub fn with_debugging(self, debugging: bool) -> Self {
        Self { debugging, ..self }
    }

    /// With what `/configz` shows.
    #[must_use]
    pub fn with_configuration(self, written: Value) -> Self {
        Self { configuration: Arc::new(written), ..self }
    }

    /// With what `/flagz` shows.
    #[must_use]
    pub fn with_flags(self, flags: BTreeMap<String, String>) -> Self {
        Self { flags: Arc::new(flags), ..self }
    }

    /// With what `/logs/` serves.
    #[must_use]
    pub fn with_node_logs(self, node_logs: NodeLogs) -> Self {
        Self { node_logs, ..self }
    }

    /// With another directory than `/var/log` below `/logs/`.
    #[must_use]
    pub fn with_log_dir(self, log_dir: PathBuf) -> Self {
        Self { log_dir, ..self }
    }

    /// With what it tells Prometheus.
    #[must_use]
    pub fn with_telemetry(self, telemetry: Telemetry) -> Self {
        Self { telemetry, ..self }
    }

    /// With somebody else who has something to say on `/metrics`.
    #[must_use]
    pub fn with_collector(mut self, other: Arc<dyn Collector>) -> Self {
        self.telemetry.others.push(other);
        self
    }

    /// With the volumes whose figures `/stats/summary` shows.
    #[must_use]
    pub fn with_volumes(self, volumes: Arc<Volumes>) -> Self {
        Self { volumes: Some(volumes), ..self }
    }

    /// With the runtime's disks in `/stats/summary`.
    #[must_use]
    pub fn with_images(self, images: Arc<dyn ImageService>) -> Self {
        Self { images: Some(images), ..self }
    }

    /// Answers one request. Sessions it opens live on after it.
    pub async fn handle(&self, request: Request<Incoming>) -> Response<Body> {
        let path = percent::decode(request.uri().path());
        let first = known(path.split('/').find(|part| !part.is_empty()).unwrap_or_default());
        let (method, begun) = (method_of(&request), Instant::now());
        let answered = self.route(request).await;
        self.telemetry.metrics.requested(method, first, begun.elapsed());
        answered.unwrap_or_else(|failure| with_body(failure.status, "text/plain; charset=utf-8", failure.message))
    }

    /// Waits until all sessions have ended; none can be opened any more that it would wait for.
    pub async fn drain(&self) {
        self.streams.close();
        self.streams.wait().await;
    }

    async fn route(&self, request: Request<Incoming>) -> Answer {
        let path = percent::decode(request.uri().path());
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
        let query = Query::parse(request.uri().query().unwrap_or_default());
        if !self.debugging && is_debugging(&parts) {
            return Err(Failure::new(StatusCode::METHOD_NOT_ALLOWED, "Debug endpoints are disabled."));
        }
        match (request.method(), parts.as_slice()) {
            (&Method::GET, ["healthz"] | ["healthz", "ping" | "log" | "syncloop"]) => {
                Ok(with_body(StatusCode::OK, "text/plain; charset=utf-8", "ok"))
            }
            (&Method::GET, ["configz"]) => Ok(json_body(&json!({"kubeletconfig": *self.configuration}))),
            (&Method::GET, ["statusz"]) => self.statusz(accepted(&request)),
            (&Method::GET, ["flagz"]) => self.flagz(accepted(&request)),
            (_, ["logs", rest @ ..]) => self.node_logs(request.method(), request.uri(), rest, &query).await,
            (&Method::GET, ["pods"]) => Ok(json_body(&self.pod_list())),
            (&Method::GET, ["runningpods"]) => Ok(json_body(&stats::running_pods(&*self.runtime).await?)),
            (&Method::GET | &Method::POST, ["stats", "summary"]) => {
                let mut summary = stats::summary(&*self.runtime, &self.node).await?;
                if let Some(volumes) = &self.volumes {
                    stats::add_volumes(&mut summary, volumes, self.source.store()).await;
                }
                if let Some(images) = &self.images {
                    stats::add_disks(&mut summary, &self.paths.root, &**images).await;
                }
                Ok(json_body(&summary))
            }
            (&Method::GET, ["metrics"]) => {
                let (runtime, store) = (&*self.runtime, self.source.store());
                Ok(prometheus(metrics::own(&self.telemetry, runtime, store, &self.paths, &self.node).await?))
            }
            (&Method::GET, ["metrics", "cadvisor"]) => Ok(prometheus(metrics::cadvisor(&self.telemetry).await)),
            (&Method::GET, ["metrics", "resource"]) => Ok(prometheus(metrics::resource(&*self.runtime).await?)),
            (&Method::GET, ["metrics", "probes"]) => {
                let mut text = Text::default();
                self.telemetry.metrics.write_probes(&mut text);
                Ok(prometheus(text.out))
            }
            (&Method::GET, ["containerLogs", namespace, pod, container]) => {
                let pod = self.pod(namespace, pod, None)?;
                self.container_logs(&pod, container, &query).await
            }
            (&Method::GET | &Method::POST, ["exec" | "attach" | "portForward", ..]) => {
                self.open_stream(&parts, &query, request).await
            }
            (method, _) => {
                Err(Failure::not_found(format!("{method} /{} is not served by this kubelet", parts.join("/"))))
            }
        }
    }

    fn pod_list(&self) -> Value {
        let pods: Vec<Value> = self
            .source
            .store()
            .pods()
            .list()
            .iter()
            .map(|pod| {
                // `apiVersion` and `kind` stand in the list only, as the API server has it.
                let mut value = serde_json::to_value(&**pod).unwrap_or_default();
                if let Some(fields) = value.as_object_mut() {
                    fields.remove("apiVersion");
                    fields.remove("kind");
                }
                value
            })
            .collect();
        json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": pods})
    }

    /// The pod of this name, and of this uid if one is given.
    fn pod(&self, namespace: &str, name: &str, uid: Option<&str>) -> Result<Arc<Pod>, Failure> {
        let pod = self.source.store().pods().get(&Key::new(namespace, name));
        let pod = pod.filter(|pod| uid.is_none_or(|uid| pod.metadata.uid.as_deref() == Some(uid)));
        pod.ok_or_else(|| Failure::not_found(format!("pod does not exist: {namespace}/{name}")))
    }

    /// The container's newest run that is in `state`.
    async fn container_id(
        &self,
        pod: &Pod,
        container: &str,
        state: Option<v1::ContainerState>,
    ) -> Result<Option<String>, Failure> {
        let labels = [
            (label::POD_UID.to_owned(), pod.metadata.uid.clone().unwrap_or_default()),
            (label::CONTAINER_NAME.to_owned(), container.to_owned()),
        ];
        let filter = v1::ContainerFilter {
            state: state.map(|state| v1::ContainerStateValue { state: state.into() }),
            label_selector: labels.into(),
            ..v1::ContainerFilter::default()
        };
        let listed = self.runtime.list_containers(v1::ListContainersRequest { filter: Some(filter) }).await?;
        let newest = listed.containers.into_iter().max_by_key(|container| container.created_at);
        Ok(newest.map(|container| container.id))
    }
}

/// What the caller accepts.
fn accepted(request: &Request<Incoming>) -> &str {
    request.headers().get(http::header::ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default()
}

/// The method for who counts them: callers make up others.
fn method_of(request: &Request<Incoming>) -> &'static str {
    const METHODS: [&str; 8] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "CONNECT", "OPTIONS"];
    METHODS.into_iter().find(|method| *method == request.method().as_str()).unwrap_or("other")
}

fn with_body(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(body.into()).boxed_unsync());
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static(kind));
    response
}

fn json_body(value: &Value) -> Response<Body> {
    with_body(StatusCode::OK, "application/json", value.to_string())
}

/// The first parts of the paths that are served, in alphabetical order.
const PATHS: [&str; 13] = [
    "attach",
    "configz",
    "containerLogs",
    "exec",
    "flagz",
    "healthz",
    "logs",
    "metrics",
    "pods",
    "portForward",
    "runningpods",
    "stats",
    "statusz",
];

/// The first part of a path, if it is one of ours: names that callers make up are not counted.
fn known(first: &str) -> &'static str {
    PATHS.into_iter().find(|path| *path == first).unwrap_or_default()
}

fn prometheus(text: String) -> Response<Body> {
    with_body(StatusCode::OK, "text/plain; version=0.0.4; charset=utf-8", text)
}
