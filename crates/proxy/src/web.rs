//! Plain HTTP/1.1, for answers that are ready at once.

use std::convert::Infallible;
use std::time::Duration;

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HeaderName, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

/// A client says what it wants within this time.
const PATIENCE: Duration = Duration::from_secs(10);
/// Clients of one listener at once; more of them wait.
const CLIENTS_MAX: usize = 256;

/// The body of every answer.
pub(crate) type Body = Full<Bytes>;

/// Who answers.
pub(crate) trait Answers: Clone + Send + Sync + 'static {
    /// The answer to one request.
    fn answer(&self, request: &Request<Incoming>) -> impl Future<Output = Response<Body>> + Send;

    /// Whether a client is answered at all.
    fn admits(&self, _client: &TcpStream) -> bool {
        true
    }
}

/// Serves until it is dropped.
pub(crate) async fn serve(listener: TcpListener, answers: impl Answers) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CLIENTS_MAX => match accepted {
                Ok((stream, _)) if answers.admits(&stream) => {
                    connections.spawn(converse(stream, answers.clone()));
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "a client cannot be accepted");
                    tokio::task::yield_now().await;
                }
            }
        }
    }
}

async fn converse(stream: TcpStream, answers: impl Answers) {
    let service = service_fn(|request| {
        let answers = answers.clone();
        async move { Ok::<_, Infallible>(answers.answer(&request).await) }
    });
    let mut builder = hyper::server::conn::http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(PATIENCE);
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(%error, "a client went away");
    }
}

/// A text.
pub(crate) fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<Body> {
    with_type(status, "text/plain; charset=utf-8", text)
}

/// JSON.
pub(crate) fn json(status: StatusCode, value: &serde_json::Value) -> Response<Body> {
    with_type(status, "application/json", value.to_string())
}

/// An answer of this type, which clients must not guess.
pub(crate) fn with_type(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(HeaderName::from_static("x-content-type-options"), HeaderValue::from_static("nosniff"));
    response
}
