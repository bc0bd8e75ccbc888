//! HTTP on the node's Unix socket: `/orlop/v1/…` for the local command line, everything else is the kubelet's API.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::stream::{self, BoxStream};
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use kubelet::server::{Query, accept};
use serde::Serialize;
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::agent::Agent;
use super::objects;
use crate::cli::top::Usage;
use crate::cli::version::Version;

/// How long answers under way may take when the node ends.
const DRAIN: Duration = Duration::from_secs(1);

/// The body of every answer.
pub(crate) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// A node, for the local command line: what every node answers, its agent does.
#[async_trait]
pub(crate) trait Node: Send + Sync + 'static {
    /// The node's agent.
    fn agent(&self) -> &Agent;
    /// What has no owner.
    async fn fsck(&self) -> anyhow::Result<Vec<String>>;
    /// Ends every pod and then the node; returns when the pods are gone.
    async fn down(&self) -> anyhow::Result<()>;
}

/// Serves until `stop`; then answers under way get a moment to end, and endless ones are cut.
pub(crate) async fn serve(listener: UnixListener, node: Arc<dyn Node>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            (stream, _) = accept::next(|| listener.accept()) => {
                connections.spawn(serve_connection(stream, node.clone(), stop.clone()));
            }
        }
    }
    let drained = async { while connections.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(DRAIN, drained).await; // What is open then is a watch: it has no end of its own.
}

async fn serve_connection(stream: UnixStream, node: Arc<dyn Node>, stop: CancellationToken) {
    let service = service_fn(move |request| answer(node.clone(), request));
    let connection = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection.with_upgrades());
    let served = tokio::select! {
        served = connection.as_mut() => served,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a local client went away");
    }
}

async fn answer(node: Arc<dyn Node>, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let Some(path) = request.uri().path().strip_prefix("/orlop/v1/").map(str::to_owned) else {
        return Ok(node.agent().answer_kubelet(request).await);
    };
    let query = Query::parse(request.uri().query().unwrap_or_default());
    let method = request.method().clone();
    let answered = route(&*node, &method, &path, &query).await;
    Ok(answered.unwrap_or_else(|error| failed(StatusCode::INTERNAL_SERVER_ERROR, &format!("{error:#}"))))
}

async fn route(node: &dyn Node, method: &Method, path: &str, query: &Query) -> anyhow::Result<Response<Body>> {
    let parts: Vec<&str> = path.split('/').collect();
    match (method.as_str(), parts.as_slice()) {
        ("GET", ["version"]) => json(&Version::own()),
        ("GET", ["objects", kind]) => match objects::list(node.agent().store(), kind, query.get("namespace")) {
            Some(listed) => {
                let mut listed = listed?;
                if *kind == "pods" {
                    node.agent().show_newest(&mut listed);
                }
                json(&listed)
            }
            None => Ok(unknown_kind(kind)),
        },
        ("GET", ["changes", kind]) => match objects::changes(node.agent().store(), kind) {
            Some(ticks) => {
                Ok(lines(stream::unfold(ticks, |mut ticks| async { ticks.recv().await.map(|()| ((), ticks)) }).boxed()))
            }
            None => Ok(unknown_kind(kind)),
        },
        ("GET", ["top"]) => {
            let usages = node.agent().top().await?;
            let wanted = |usage: &Usage| query.get("namespace").is_none_or(|namespace| usage.namespace == namespace);
            json(&usages.into_iter().filter(wanted).collect::<Vec<_>>())
        }
        ("GET", ["why", namespace, pod]) => json(&node.agent().why(namespace, pod).await?),
        ("GET", ["explain", namespace, service]) => json(&node.agent().explain_service(namespace, service).await?),
        ("GET", ["images"]) => json(&node.agent().images().await?),
        ("DELETE", ["images"]) => json(&node.agent().remove_image(need(query, "image")?).await?),
        ("POST", ["pull"]) => Ok(lines(node.agent().pull(need(query, "image")?.to_owned())?)),
        ("POST", ["load"]) => json(&node.agent().load(need(query, "path")?).await?),
        ("GET", ["fsck"]) => json(&node.fsck().await?),
        ("POST", ["down"]) => json(&node.down().await?),
        _ => Ok(failed(StatusCode::NOT_FOUND, &format!("{method} /orlop/v1/{path} is not known to this version"))),
    }
}

fn unknown_kind(kind: &str) -> Response<Body> {
    failed(StatusCode::NOT_FOUND, &format!("no kind {kind:?}; known: {}", objects::KINDS.join(", ")))
}

/// An answer as JSON.
fn json<T: Serialize + ?Sized>(value: &T) -> anyhow::Result<Response<Body>> {
    Ok(with_body(StatusCode::OK, full(serde_json::to_vec(value)?)))
}

/// A line of JSON for each item, as they come.
fn lines<T: Serialize + Send + 'static>(items: BoxStream<'static, T>) -> Response<Body> {
    let frames = items.map(|item| {
        let mut line = serde_json::to_vec(&item).unwrap_or_default();
        line.push(b'\n');
        Ok(Frame::data(Bytes::from(line)))
    });
    with_body(StatusCode::OK, StreamBody::new(frames).boxed_unsync())
}

/// A failure as a `metav1.Status` has it: a message to act on.
pub(crate) fn failed(status: StatusCode, message: &str) -> Response<Body> {
    let text = serde_json::json!({ "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": status.as_u16() });
    with_body(status, full(text.to_string().into_bytes()))
}

fn full(bytes: Vec<u8>) -> Body {
    Full::new(Bytes::from(bytes)).boxed_unsync()
}

fn with_body(status: StatusCode, body: Body) -> Response<Body> {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(http::header::CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    response
}

fn need<'a>(query: &'a Query, name: &str) -> anyhow::Result<&'a str> {
    query.get(name).ok_or_else(|| anyhow::anyhow!("the request lacks the parameter {name:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let query = Query::parse("image=docker.io%2Flibrary%2Fbusybox&x=100%");
        assert_eq!(query.get("image"), Some("docker.io/library/busybox"));
        assert_eq!(query.get("x"), Some("100%"));
        assert!(need(&query, "y").is_err());
    }
}
