//! Connections to one API server.
//!
//! HTTP/2 carries up to [`STREAMS_MAX`] requests on one connection, as Go's clients do: a node follows one Secret or
//! ConfigMap per watch, and has hundreds of them. A silent connection is asked whether it lives (PING), so that a
//! half-closed one holds up nobody for long. Behind a balancer without HTTP/2 each running request has a connection of
//! its own.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use super::config::Config;
use super::error::ApiError;
use super::identity::Shown;
use super::tls;

/// A request's body.
pub(super) type Body = Full<Bytes>;

/// RFC 9113 §6.5.2 recommends that no server allow less; kube-apiserver allows 250 and more.
const STREAMS_MAX: usize = 100;
const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// What the server may send ahead of a slow reader; large lists need some room on fast networks.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 2 << 20;

/// The connections of one kind of traffic.
pub(super) struct Pool {
    open: Mutex<Vec<Connection>>,
    /// Held while one is made: a hundred requests at once make one.
    connecting: tokio::sync::Mutex<()>,
    /// The tasks that move the bytes; they end with this value.
    tasks: Mutex<JoinSet<()>>,
}

/// An answer whose body has not been read yet.
pub(super) struct Answer {
    pub(super) response: Response<Incoming>,
    /// Counts as a running request until it is dropped.
    pub(super) ticket: Ticket,
}

/// A running request.
pub(super) struct Ticket {
    running: Arc<AtomicUsize>,
    id: usize,
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.running.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Clone)]
struct Connection {
    /// Of the credentials that it was opened with.
    generation: u64,
    sender: Sender,
    running: Arc<AtomicUsize>,
}

#[derive(Clone)]
enum Sender {
    Many {
        sender: http2::SendRequest<Body>,
        /// As many as the server allows.
        streams_max: Arc<AtomicUsize>,
    },
    /// Takes one request at a time.
    One(Arc<Mutex<http1::SendRequest<Body>>>),
}

impl Pool {
    pub(super) fn new() -> Self {
        Self { open: Mutex::default(), connecting: tokio::sync::Mutex::default(), tasks: Mutex::default() }
    }

    /// Sends a request and returns the answer as soon as its head is there.
    pub(super) async fn send(
        &self,
        config: &Config,
        shown: &Shown,
        mut request: Request<Body>,
    ) -> Result<Answer, ApiError> {
        if let Some(proxy) = &config.proxy {
            proxy.address(&config.server, &mut request);
        }
        // A connection may have been closed by the server a moment ago; then the request comes back unsent.
        loop {
            let (connection, ticket, is_new) = match self.free(shown.generation) {
                Some((connection, ticket)) => (connection, ticket, false),
                None => self.connect(config, shown).await?,
            };
            match connection.send(request).await {
                Ok(response) => return Ok(Answer { response, ticket }),
                Err(mut failed) => {
                    self.retire(&ticket);
                    match failed.take_message() {
                        Some(unsent) if !is_new => request = unsent,
                        _ => return Err(lost(config, &failed.into_error())),
                    }
                }
            }
        }
    }

    /// Uses the connection of this request for no other.
    pub(super) fn retire(&self, ticket: &Ticket) {
        self.lock().retain(|one| one.id() != ticket.id);
    }

    /// Uses none of the present connections for new requests.
    pub(super) fn retire_all(&self) {
        self.lock().clear();
    }

    /// A connection that can take another request. Those that are closed, or were opened with older credentials, are
    /// left to the requests that run on them.
    fn free(&self, generation: u64) -> Option<(Connection, Ticket)> {
        let mut open = self.lock();
        open.retain(|one| one.generation == generation && !one.is_closed());
        let free = open.iter().find(|one| one.has_room())?;
        Some((free.clone(), free.ticket()))
    }

    async fn connect(&self, config: &Config, shown: &Shown) -> Result<(Connection, Ticket, bool), ApiError> {
        let _one_at_a_time = self.connecting.lock().await;
        if let Some((connection, ticket)) = self.free(shown.generation) {
            return Ok((connection, ticket, false));
        }
        let connection = self.open(config, shown).await?;
        let ticket = connection.ticket();
        self.lock().push(connection.clone());
        Ok((connection, ticket, true))
    }

    async fn open(&self, config: &Config, shown: &Shown) -> Result<Connection, ApiError> {
        let stream = stream(config, shown).await?;
        let sender = if speaks_http2(&stream) {
            let (sender, mut connection) = http2::Builder::new(TokioExecutor::new())
                .timer(TokioTimer::new())
                .keep_alive_interval(config.silence)
                .keep_alive_timeout(config.silence / 2)
                .initial_stream_window_size(STREAM_WINDOW_BYTES)
                .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
                .handshake(TokioIo::new(stream))
                .await
                .map_err(|error| lost(config, &error))?;
            let streams_max = Arc::new(AtomicUsize::new(STREAMS_MAX));
            let told = streams_max.clone();
            self.spawn(std::future::poll_fn(move |cx| {
                let polled = Pin::new(&mut connection).poll(cx);
                told.store(connection.current_max_send_streams(), Ordering::Relaxed);
                polled
            }));
            Sender::Many { sender, streams_max }
        } else {
            let (sender, connection) =
                http1::handshake(TokioIo::new(stream)).await.map_err(|error| lost(config, &error))?;
            self.spawn(connection);
            Sender::One(Arc::new(Mutex::new(sender)))
        };
        Ok(Connection { generation: shown.generation, sender, running: Arc::default() })
    }

    fn spawn(&self, connection: impl Future<Output = hyper::Result<()>> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that have ended leave nothing to look at.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            // A broken connection is seen by the requests that it breaks.
            let _ = connection.await;
        });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Connection>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Connection {
    fn id(&self) -> usize {
        Arc::as_ptr(&self.running).addr()
    }

    fn ticket(&self) -> Ticket {
        self.running.fetch_add(1, Ordering::Relaxed);
        Ticket { running: self.running.clone(), id: self.id() }
    }

    fn is_closed(&self) -> bool {
        match &self.sender {
            Sender::Many { sender, .. } => sender.is_closed(),
            Sender::One(sender) => one(sender).is_closed(),
        }
    }

    fn has_room(&self) -> bool {
        let running = self.running.load(Ordering::Relaxed);
        match &self.sender {
            Sender::Many { streams_max, .. } => running < STREAMS_MAX.min(streams_max.load(Ordering::Relaxed)),
            Sender::One(sender) => running == 0 && one(sender).is_ready(),
        }
    }

    async fn send(self, request: Request<Body>) -> Result<Response<Incoming>, TrySendError<Request<Body>>> {
        match self.sender {
            Sender::Many { mut sender, .. } => sender.try_send_request(request).await,
            Sender::One(sender) => {
                let sent = one(&sender).try_send_request(request);
                sent.await
            }
        }
    }
}

fn one(sender: &Mutex<http1::SendRequest<Body>>) -> std::sync::MutexGuard<'_, http1::SendRequest<Body>> {
    sender.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The chain of causes in one line: hyper's own words say little.
fn lost(config: &Config, error: &(dyn std::error::Error + 'static)) -> ApiError {
    ApiError::Lost { server: config.server.to_string(), reason: chain(error) }
}

pub(super) fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let words = error.to_string();
        if !text.ends_with(&words) {
            text = format!("{text}: {words}");
        }
        cause = error.source();
    }
    text
}

async fn stream(config: &Config, shown: &Shown) -> Result<Stream, ApiError> {
    let server = config.server.to_string();
    let unreachable = |reason: String| ApiError::Unreachable { server: server.clone(), reason };
    let dial = async {
        match &config.proxy {
            Some(proxy) => proxy.connect(&config.server).await,
            None => TcpStream::connect((config.server.host.as_str(), config.server.port)).await,
        }
    };
    let silent = || unreachable(format!("no connection within {} s", DIAL_TIMEOUT.as_secs()));
    let tcp = timeout(DIAL_TIMEOUT, dial).await.map_err(|_| silent())?;
    let tcp = tcp.map_err(|error| unreachable(error.to_string()))?;
    tcp.set_nodelay(true).map_err(|error| unreachable(error.to_string()))?;
    let Some(settings) = &shown.tls else { return Ok(Stream::Left(tcp)) };
    let name = tls::server_name(config.server_name.as_deref().unwrap_or(&config.server.host))?;
    let shaking = tokio_rustls::TlsConnector::from(settings.clone()).connect(name, tcp);
    match timeout(DIAL_TIMEOUT, shaking).await.map_err(|_| silent())? {
        Ok(stream) => Ok(Stream::Right(Box::new(stream))),
        Err(error) => Err(handshake_error(&server, &error)),
    }
}

fn handshake_error(server: &str, error: &io::Error) -> ApiError {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(inner) => {
            ApiError::Untrusted { server: server.to_owned(), reason: inner.to_string(), remedy: tls::remedy(inner) }
        }
        None => {
            ApiError::Unreachable { server: server.to_owned(), reason: format!("the TLS handshake broke: {error}") }
        }
    }
}

/// In the clear, or of TLS.
type Stream = Either<TcpStream, Box<TlsStream<TcpStream>>>;

fn speaks_http2(stream: &Stream) -> bool {
    matches!(stream, Stream::Right(stream) if stream.get_ref().1.alpn_protocol() == Some(b"h2"))
}
