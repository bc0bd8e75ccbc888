//! Health of the kubelet for whoever watches over processes: plain HTTP, on loopback by default (upstream: port 10248).

use std::convert::Infallible;
use std::time::Duration;

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::{Body, accept, with_body};

/// A client says what it wants within this time.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves until it is dropped.
pub async fn serve(listener: TcpListener) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            (stream, _) = accept::next(|| listener.accept()) => {
                connections.spawn(serve_connection(stream));
            }
        }
    }
}

async fn serve_connection(stream: TcpStream) {
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
    let served = builder.serve_connection(TokioIo::new(stream), service_fn(answer)).await;
    if let Err(error) = served {
        tracing::debug!(%error, "a client of /healthz went away");
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    let (status, text) = match request.uri().path() {
        "/healthz" | "/healthz/ping" | "/healthz/syncloop" => (StatusCode::OK, "ok"),
        _ => (StatusCode::NOT_FOUND, "not found; there is /healthz"),
    };
    Ok(with_body(status, "text/plain; charset=utf-8", text))
}
