//! `orlop proxy --explain`: the running proxy says what a packet to a Service meets.

use std::convert::Infallible;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use proxy::Questions;
use tokio::net::UnixListener;
use tokio::task::JoinSet;

use crate::args::Places;
use crate::cli::client::Client;
use crate::cli::format::print;
use crate::node::layout::Layout;

const PATH: &str = "/orlop/v1/explain/";
/// After a client could not be accepted, as there was no descriptor left.
const BREATH: Duration = Duration::from_millis(100);

/// Where the running proxy is asked for a Service.
pub(crate) fn path(namespace: &str, name: &str) -> String {
    format!("{PATH}{namespace}/{name}")
}

/// Asks whoever serves Services here: the proxy alone, or the node.
pub(super) async fn ask(places: &Places, service: &str) -> anyhow::Result<()> {
    let (namespace, name) = service.split_once('/').unwrap_or(("default", service));
    let alone = Layout::new(places).proxy_socket();
    let socket = if alone.exists() { alone } else { places.socket() };
    let text: Option<String> = Client::new(socket).get(&path(namespace, name)).await?;
    let text = text.with_context(|| {
        format!(
            "the proxy knows no Service {namespace}/{name}; it may be headless, of type ExternalName, or another proxy's \
             (label service.kubernetes.io/service-proxy-name)"
        )
    })?;
    print(&text);
    Ok(())
}

/// Answers on the proxy's own socket until it is dropped.
pub(super) async fn serve(listener: UnixListener, questions: Questions) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    let questions = questions.clone();
                    let service = service_fn(move |request| answer(questions.clone(), request));
                    let builder = hyper::server::conn::http1::Builder::new();
                    connections.spawn(async move {
                        if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
                            tracing::debug!(%error, "a local client went away");
                        }
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a local client");
                    tokio::time::sleep(BREATH).await;
                }
            }
        }
    }
}

async fn answer(questions: Questions, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let mut response = Response::default();
    match request.uri().path().strip_prefix(PATH).and_then(|rest| rest.split_once('/')) {
        Some((namespace, name)) => {
            let text = questions.explain(namespace, name).await.map(|explained| explained.to_string());
            *response.body_mut() = Full::from(serde_json::json!(text).to_string());
        }
        None => *response.status_mut() = StatusCode::NOT_FOUND,
    }
    Ok(response)
}
