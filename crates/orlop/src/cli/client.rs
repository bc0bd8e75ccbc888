//! HTTP over the node's Unix socket.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio::net::UnixStream;

/// Runs one command to its end.
///
/// # Errors
/// The machine has no descriptors left for the event loop.
pub(crate) fn block_on<T>(command: impl Future<Output = T>) -> std::io::Result<T> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(command))
}

/// A client of one node.
#[derive(Debug, Clone)]
pub(crate) struct Client {
    socket: PathBuf,
}

impl Client {
    /// A client for the node that listens on `socket`.
    pub(crate) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Where the node listens.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Connects, or says that no node is running and how to start one.
    pub(crate) async fn connect(&self) -> anyhow::Result<UnixStream> {
        let connected = UnixStream::connect(&self.socket).await;
        connected.with_context(|| {
            format!(
                "no node answers on {}; start one with `orlop up PATH`, or name its --run-dir",
                self.socket.display()
            )
        })
    }

    /// One request on a connection of its own; the body is left to the caller.
    pub(crate) async fn request(&self, method: Method, path: &str, body: Bytes) -> anyhow::Result<Response<Incoming>> {
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(self.connect().await?)).await?;
        // The connection ends with the response's body, or with this process: nobody has to wait for it.
        let driver = tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header("host", "localhost").body(Full::new(body))?;
        let response = sender.send_request(request).await.context("the node closed the connection; see its log")?;
        drop(driver);
        if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let status = response.status();
        let text = response.into_body().collect().await?.to_bytes();
        bail!("{}", error_text(status, &text))
    }

    /// The JSON answer to `GET path`.
    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> anyhow::Result<T> {
        self.call(Method::GET, path).await
    }

    /// The JSON answer to `method path`.
    pub(crate) async fn call<T: DeserializeOwned>(&self, method: Method, path: &str) -> anyhow::Result<T> {
        let response = self.request(method, path, Bytes::new()).await?;
        let body = response.into_body().collect().await?.to_bytes();
        serde_json::from_slice(&body).with_context(|| format!("the node's answer to {path} is of another version"))
    }

    /// All objects of a kind (`pods`, `services`, …), of one namespace or of all.
    pub(crate) async fn objects<T: DeserializeOwned>(
        &self,
        kind: &str,
        namespace: Option<&str>,
    ) -> anyhow::Result<Vec<T>> {
        let query = namespace.map_or(String::new(), |namespace| format!("?namespace={namespace}"));
        self.get(&format!("/orlop/v1/objects/{kind}{query}")).await
    }

    /// Opens a stream of changes of a kind. Open it before listing, so that no change is missed in between.
    pub(crate) async fn changes(&self, kind: &str) -> anyhow::Result<Changes> {
        let response = self.request(Method::GET, &format!("/orlop/v1/changes/{kind}"), Bytes::new()).await?;
        Ok(Changes { body: response.into_body() })
    }

    /// The pod selector of a workload or a service.
    pub(crate) async fn selector(
        &self,
        kind: &str,
        namespace: &str,
        name: &str,
    ) -> anyhow::Result<Vec<(String, String)>> {
        let kind = plural(kind);
        let objects: Vec<Value> = self.objects(&kind, Some(namespace)).await?;
        let object = objects
            .iter()
            .find(|object| object["metadata"]["name"] == name)
            .with_context(|| format!("no {kind} {name:?} in namespace {namespace:?}"))?;
        let selector = &object["spec"]["selector"];
        let labels = selector.get("matchLabels").unwrap_or(selector);
        let labels = labels.as_object().with_context(|| format!("{kind}/{name} selects no pods"))?;
        Ok(labels.iter().filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned()))).collect())
    }
}

/// A stream of ticks: the first comes at once, each further one after a change.
pub(crate) struct Changes {
    body: Incoming,
}

impl Changes {
    /// Waits for the next tick.
    pub(crate) async fn next(&mut self) -> anyhow::Result<()> {
        let frame = self.body.frame().await.context("the node went away")?;
        frame.context("the node went away").map(drop)
    }
}

/// kubectl's short and singular names as the plural of the API.
pub(crate) fn plural(kind: &str) -> String {
    match kind.to_ascii_lowercase().as_str() {
        "po" | "pod" | "pods" => "pods",
        "svc" | "service" | "services" => "services",
        "deploy" | "deployment" | "deployments" => "deployments",
        "rs" | "replicaset" | "replicasets" => "replicasets",
        "ds" | "daemonset" | "daemonsets" => "daemonsets",
        "job" | "jobs" => "jobs",
        "cm" | "configmap" | "configmaps" => "configmaps",
        "secret" | "secrets" => "secrets",
        "ep" | "endpointslice" | "endpointslices" => "endpointslices",
        "pvc" | "persistentvolumeclaim" | "persistentvolumeclaims" => "persistentvolumeclaims",
        "ns" | "namespace" | "namespaces" => "namespaces",
        "sa" | "serviceaccount" | "serviceaccounts" => "serviceaccounts",
        "no" | "node" | "nodes" => "nodes",
        "ev" | "event" | "events" => "events",
        other => return other.to_owned(),
    }
    .to_owned()
}

/// The message of a `metav1.Status`, or the body as it is.
fn error_text(status: StatusCode, body: &[u8]) -> String {
    let message =
        serde_json::from_slice::<Value>(body).ok().and_then(|value| Some(value["message"].as_str()?.to_owned()));
    let text = message.unwrap_or_else(|| String::from_utf8_lossy(body).trim().to_owned());
    if text.is_empty() { format!("the node answered {status}") } else { text }
}
