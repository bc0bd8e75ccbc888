//! Requests to an API server.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HOST, HeaderValue, RETRY_AFTER, USER_AGENT};
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use instruments::{Histograms, labels};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::config::{Config, ConfigError};
use super::connection::{Answer, Body, Pool, Ticket, chain};
use super::error::ApiError;
use super::identity::{Keeper, Shown};
use super::rate::Bucket;

/// How often a request is repeated because the server asks for it.
const PATIENCE: u32 = 10;
/// Nobody waits longer between two of these.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(30);
/// A page of a list is the largest answer; etcd takes objects of 1.5 MiB.
const ANSWER_BYTES_MAX: usize = 256 << 20;
const ERROR_BYTES_MAX: usize = 64 << 10;
/// What is said of a request that is too long to be sent.
const TITLE_CHARS_MAX: usize = 200;
/// Upstream's for the latency of requests.
const DURATIONS: &[f64] = &[0.005, 0.025, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0];
const JSON: HeaderValue = HeaderValue::from_static("application/json");

/// A client of one API server as one user. A handle: clones share connections and credentials.
///
/// Connections are made when they are needed; certificates and tokens are read again when their files change.
#[derive(Clone)]
pub struct Api {
    shared: Arc<Shared>,
}

struct Shared {
    config: Config,
    /// What the server's host is called in requests.
    host: HeaderValue,
    agent: HeaderValue,
    identity: Arc<Keeper>,
    /// Requests with an end do not wait behind the lists and watches of the others.
    requests: Pool,
    watches: Pool,
    bucket: Option<Mutex<Bucket>>,
    /// Counts how often the server has come back after it could not be reached.
    returns: watch::Sender<u64>,
    /// The last request found nobody.
    is_away: Mutex<bool>,
    /// Answers so far, by method and status; none where nobody answered. Guards a table of a few dozen numbers.
    answers: Mutex<BTreeMap<(String, Option<u16>), u64>>,
    /// How long requests with an end took, by method and host.
    durations: Histograms,
}

/// One request.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub(super) method: Method,
    /// Path and query.
    pub(super) path: String,
    pub(super) content_type: HeaderValue,
    pub(super) body: Bytes,
}

/// An answer that comes piece by piece.
pub(super) struct Streamed {
    pub(super) body: Incoming,
    _ticket: Ticket,
}

impl Call {
    pub(super) fn get(path: String) -> Self {
        Call { method: Method::GET, path, content_type: JSON, body: Bytes::new() }
    }

    pub(super) fn json(method: Method, path: String, body: Vec<u8>) -> Self {
        Call { method, path, content_type: JSON, body: body.into() }
    }

    /// Method and path, for messages.
    pub(super) fn title(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    fn unsendable(&self, error: http::uri::InvalidUri) -> ApiError {
        let beginning = self.title().chars().take(TITLE_CHARS_MAX).collect();
        ApiError::Unsendable { request: beginning, reason: error.to_string() }
    }
}

impl Api {
    /// A client for this configuration. Opens no connection: a node starts without its API server, too.
    ///
    /// # Errors
    /// A server or a user agent that cannot stand in a request.
    pub fn new(config: Config) -> Result<Self, ConfigError> {
        let header = |what: &str, text: &str| {
            HeaderValue::from_str(text)
                .map_err(|error| ConfigError::Pem { what: format!("{what} {text:?}"), message: error.to_string() })
        };
        let now = Instant::now();
        Ok(Self {
            shared: Arc::new(Shared {
                host: header("the server", &config.server.authority())?,
                agent: header("the user agent", &config.user_agent)?,
                identity: Arc::new(Keeper::new(config.clone())),
                requests: Pool::new(),
                watches: Pool::new(),
                bucket: config.rate.map(|rate| Mutex::new(Bucket::new(rate, now))),
                returns: watch::Sender::new(0),
                is_away: Mutex::new(false),
                answers: Mutex::default(),
                durations: Histograms::new(DURATIONS),
                config,
            }),
        })
    }

    /// What this client was made from.
    pub fn config(&self) -> &Config {
        &self.shared.config
    }

    /// How many requests were answered, by method and status; without a status those that nobody answered.
    pub fn answers(&self) -> Vec<(String, Option<u16>, u64)> {
        let answers = self.shared.answers.lock().unwrap_or_else(PoisonError::into_inner);
        answers.iter().map(|((method, status), count)| (method.clone(), *status, *count)).collect()
    }

    /// How long requests with an end took so far, by method and host.
    pub fn durations(&self) -> &Histograms {
        &self.shared.durations
    }

    /// Takes no connection that is open now for new requests: when they may lead nowhere, as after a heartbeat without
    /// an answer.
    pub fn reconnect(&self) {
        self.shared.requests.retire_all();
        self.shared.watches.retire_all();
    }

    /// Changes when a server that could not be reached answers again: for who waits to try again.
    pub(super) fn returns(&self) -> watch::Receiver<u64> {
        self.shared.returns.subscribe()
    }

    /// Sends a request and reads the whole answer. Waits and repeats it when the server asks for that.
    pub(super) async fn call(&self, call: Call) -> Result<Bytes, ApiError> {
        let mut left = PATIENCE;
        loop {
            let error = match self.call_once(&call).await {
                Err(error) => error,
                done => return done,
            };
            match error.retry_after().filter(|_| left > 0) {
                Some(wait) => tokio::time::sleep(wait.min(RETRY_AFTER_MAX)).await,
                None => return Err(error),
            }
            left -= 1;
        }
    }

    async fn call_once(&self, call: &Call) -> Result<Bytes, ApiError> {
        self.wait_for_turn().await;
        let begun = Instant::now();
        let answered = self.answered(call).await;
        let host = self.shared.config.server.authority();
        let labels = labels(&[("host", &host), ("verb", call.method.as_str())]);
        self.shared.durations.observe(&labels, begun.elapsed());
        answered
    }

    async fn answered(&self, call: &Call) -> Result<Bytes, ApiError> {
        let limit = self.shared.config.timeout;
        let begun = Instant::now();
        let answer = match timeout(limit, self.send(&self.shared.requests, call)).await {
            Ok(answer) => answer?,
            Err(_) => {
                // Nobody knows which connection was silent: none is used again.
                self.shared.requests.retire_all();
                return Err(self.timed_out(limit));
            }
        };
        let Answer { response, ticket } = answer;
        let left = limit.saturating_sub(begun.elapsed());
        match timeout(left, read(response.into_body(), ANSWER_BYTES_MAX)).await {
            Ok(body) => body.map_err(|reason| self.lost(reason)),
            Err(_) => {
                self.shared.requests.retire(&ticket);
                Err(self.timed_out(limit))
            }
        }
    }

    /// Sends a request and returns its answer as it comes: for watches.
    pub(super) async fn stream(&self, call: &Call) -> Result<Streamed, ApiError> {
        let limit = self.shared.config.timeout;
        self.wait_for_turn().await;
        match timeout(limit, self.send(&self.shared.watches, call)).await {
            Ok(answer) => {
                answer.map(|Answer { response, ticket }| Streamed { body: response.into_body(), _ticket: ticket })
            }
            Err(_) => {
                self.shared.watches.retire_all();
                Err(self.timed_out(limit))
            }
        }
    }

    /// The body of such an answer broke.
    pub(super) fn lost(&self, reason: String) -> ApiError {
        ApiError::Lost { server: self.shared.config.server.to_string(), reason }
    }

    pub(super) fn timed_out(&self, limit: Duration) -> ApiError {
        ApiError::TimedOut { server: self.shared.config.server.to_string(), limit }
    }

    async fn wait_for_turn(&self) {
        let Some(bucket) = &self.shared.bucket else { return };
        let wait = bucket.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
        tokio::time::sleep(wait).await;
    }

    /// The answer to a request that succeeded.
    async fn send(&self, pool: &Pool, call: &Call) -> Result<Answer, ApiError> {
        let shown = self.shared.identity.shown().await?;
        let request = self.request(call, &shown)?;
        let sent = pool.send(&self.shared.config, &shown, request).await;
        let status = sent.as_ref().ok().map(|answer| answer.response.status().as_u16());
        let key = (call.method.as_str().to_owned(), status);
        *self.shared.answers.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default() += 1;
        self.note(&sent);
        let answer = sent?;
        if answer.response.status().is_success() {
            return Ok(answer);
        }
        let Answer { response, ticket: _ticket } = answer;
        let (parts, body) = response.into_parts();
        if parts.status == StatusCode::UNAUTHORIZED {
            self.shared.identity.refuse(shown.generation).await;
        }
        let retry_after = retry_after(&parts.headers);
        let body = read(body, ERROR_BYTES_MAX).await.unwrap_or_default();
        let error = ApiError::of_answer(parts.status.as_u16(), &body, retry_after);
        Err(error.at(&self.shared.config.server.to_string(), &self.shared.identity.describe()))
    }

    fn request(&self, call: &Call, shown: &Shown) -> Result<Request<Body>, ApiError> {
        let config = &self.shared.config;
        let mut request = Request::new(Body::new(call.body.clone()));
        *request.method_mut() = call.method.clone();
        let path = format!("{}{}", config.server.prefix, call.path);
        // HTTP/2 takes scheme and authority from here, HTTP/1.1 wants the path alone.
        let uri = match shown.tls {
            Some(_) => format!("https://{}{path}", config.server.authority()),
            None => path,
        };
        // Every part is escaped; but there is a longest address, and names in it are those of users.
        *request.uri_mut() = uri.parse().map_err(|error| call.unsendable(error))?;
        let headers = request.headers_mut();
        headers.insert(ACCEPT, JSON);
        headers.insert(USER_AGENT, self.shared.agent.clone());
        headers.insert(HOST, self.shared.host.clone());
        if !call.body.is_empty() {
            headers.insert(CONTENT_TYPE, call.content_type.clone());
        }
        if let Some(value) = &shown.authorization {
            headers.insert(AUTHORIZATION, value.clone());
        }
        Ok(request)
    }

    /// Notes whether there is a server, tells the operator, and those who wait for one.
    fn note(&self, sent: &Result<Answer, ApiError>) {
        let is_away = matches!(sent, Err(ApiError::Unreachable { .. }));
        let was_away =
            std::mem::replace(&mut *self.shared.is_away.lock().unwrap_or_else(PoisonError::into_inner), is_away);
        match sent {
            Err(error) if is_away && !was_away => {
                tracing::warn!(%error, "no API server; trying again until it is back")
            }
            _ if was_away && !is_away => {
                tracing::info!(server = %self.shared.config.server, "the API server is back");
                self.shared.returns.send_modify(|count| *count += 1);
            }
            _ => {}
        }
    }
}

/// Server and credentials.
impl std::fmt::Debug for Api {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Api").field("config", &self.shared.config).finish_non_exhaustive()
    }
}

/// The whole body; one that is too long is as good as none.
async fn read(mut body: Incoming, bytes_max: usize) -> Result<Bytes, String> {
    let mut whole = bytes::BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| chain(&error))?;
        let Some(piece) = frame.data_ref() else { continue };
        if whole.len() + piece.len() > bytes_max {
            return Err(format!("its answer is longer than {bytes_max} bytes"));
        }
        whole.extend_from_slice(piece);
    }
    Ok(whole.freeze())
}

/// Seconds; the API server sends no dates.
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?;
    text.trim().parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Secret;

    use super::*;
    use crate::Key;
    use crate::api::{Identity, Server, Trust};

    /// The API server takes any length where a pod refers to a Secret.
    #[tokio::test]
    async fn a_name_that_fits_into_no_request_is_an_error() {
        let server = Server { tls: false, ..Server::new("127.0.0.1", 1) };
        let api = Api::new(Config::new(server, Trust::Anything, Identity::default())).unwrap();
        let error = api.get::<Secret>(&Key::new("shop", &"s".repeat(66_000))).await.unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, ApiError::Unsendable { .. }) && !error.is_transient(), "{text}");
        assert!(text.contains("GET /api/v1/namespaces/shop/secrets/sss") && text.len() < 400, "{text}");
    }
}
