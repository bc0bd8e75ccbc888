//! What the proxy tells of itself over HTTP, at upstream's addresses and paths.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cluster::{Key, Store};
use http::{Method, Request, Response, StatusCode};
use hyper::body::Incoming;
use instruments::{Text, process};
use serde_json::Value;
use tokio::net::TcpListener;

use crate::health::Health;
use crate::metrics::Metrics;
use crate::web::{self, Answers, Body};
use crate::{Mode, Questions};

/// As upstream: an address that cannot be had is tried again after this time.
const AGAIN_AFTER: Duration = Duration::from_secs(5);
/// What Prometheus asks for.
const EXPOSITION: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Writes what others count.
pub type More = dyn Fn(&mut Text) + Send + Sync;

/// What there is to tell. A handle.
#[derive(Clone)]
pub struct Telling {
    /// Whose Node it is.
    pub node_name: String,
    /// Where the Node is.
    pub store: Store,
    /// How rules are carried out.
    pub mode: Mode,
    /// Whether the rules keep up.
    pub health: Arc<Health>,
    /// What was counted.
    pub metrics: Arc<Metrics>,
    /// The loop.
    pub questions: Questions,
    /// `/configz`
    pub configuration: Arc<Value>,
    /// `/flagz`: names and values.
    pub flags: Arc<Vec<(String, String)>>,
    /// `/metrics` of others.
    pub more: Option<Arc<More>>,
}

/// An address that cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address}; another kube-proxy may run here, or change {field}")]
pub struct ListenError {
    /// Where.
    pub address: SocketAddr,
    /// The field that names it.
    pub field: &'static str,
    /// The cause.
    #[source]
    pub source: std::io::Error,
}

/// `/healthz` and `/livez`.
#[derive(Clone)]
struct Healthz(Telling);

/// Everything else.
#[derive(Clone)]
struct Status(Telling);

impl Telling {
    /// Serves `/healthz` and `/livez` on `healthzBindAddress`. Ends only if the address cannot be had and `hard` asks for that.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub async fn serve_healthz(self, address: SocketAddr, hard: bool) -> Result<(), ListenError> {
        let listener = listen(address, "healthzBindAddress", hard).await?;
        web::serve(listener, Healthz(self)).await;
        Ok(())
    }

    /// Serves `/metrics` and what goes with it on `metricsBindAddress`, in the same way.
    ///
    /// # Errors
    /// See [`ListenError`].
    pub async fn serve_metrics(self, address: SocketAddr, hard: bool) -> Result<(), ListenError> {
        let listener = listen(address, "metricsBindAddress", hard).await?;
        web::serve(listener, Status(self)).await;
        Ok(())
    }

    /// All that is counted.
    pub async fn metrics_text(&self) -> String {
        let mut text = Text::default();
        let tallies = self.questions.tallies().await;
        self.metrics.write(&mut text, &tallies);
        process::write(&mut text);
        if let Some(more) = &self.more {
            more(&mut text);
        }
        text.out
    }

    fn flags_text(&self) -> String {
        let mut text =
            "\nkube-proxy flagz\nWarning: This endpoint is not meant to be machine parseable, has no formatting \
                        compatibility guarantees and is for debugging purposes only.\n\n"
                .to_owned();
        for (name, value) in self.flags.iter() {
            text.push_str(&format!("{name}={value}\n"));
        }
        text
    }

    fn status_text(&self) -> String {
        let paths = PATHS.join(" ");
        let version = env!("CARGO_PKG_VERSION");
        let mode = self.mode;
        format!(
            "\nkube-proxy statusz\n\nProgram: orlop {version}\nEmulation version: 1.37\nMode: {mode}\nPaths: {paths}\n"
        )
    }
}

/// Paths of the metrics' address.
const PATHS: [&str; 7] = ["/configz", "/flagz", "/healthz", "/metrics", "/metrics/slis", "/proxyMode", "/statusz"];

async fn listen(address: SocketAddr, field: &'static str, hard: bool) -> Result<TcpListener, ListenError> {
    let mut is_told = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(listener),
            Err(source) if hard => return Err(ListenError { address, field, source }),
            Err(error) if !is_told => {
                is_told = true;
                tracing::error!(%address, field, %error, "cannot listen; trying again every few seconds");
            }
            Err(_) => {}
        }
        // Nobody tells when an address becomes free.
        tokio::time::sleep(AGAIN_AFTER).await;
    }
}

impl Answers for Healthz {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Body> {
        let Telling { health, metrics, store, node_name, .. } = &self.0;
        let now = Instant::now();
        let answer = match request.uri().path() {
            "/healthz" => health.healthz(now, store.nodes().get(&Key::cluster(node_name)).as_deref()),
            "/livez" => health.livez(now),
            _ => return web::text(StatusCode::NOT_FOUND, "not found; there are /healthz and /livez\n"),
        };
        let status = if answer.is_healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        match request.uri().path() {
            "/healthz" => metrics.healthz(status.as_u16()),
            _ => metrics.livez(status.as_u16()),
        }
        web::json(status, &answer.body)
    }
}

impl Answers for Status {
    async fn answer(&self, request: &Request<Incoming>) -> Response<Body> {
        let telling = &self.0;
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return web::text(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        }
        match request.uri().path() {
            "/healthz" => web::text(StatusCode::OK, "ok"),
            "/proxyMode" => web::text(StatusCode::OK, telling.mode.as_str()),
            "/metrics" => web::with_type(StatusCode::OK, EXPOSITION, telling.metrics_text().await),
            "/metrics/slis" => web::with_type(StatusCode::OK, EXPOSITION, slis()),
            "/configz" => {
                web::json(StatusCode::OK, &serde_json::json!({"kubeproxy.config.k8s.io": &*telling.configuration}))
            }
            "/flagz" => web::text(StatusCode::OK, telling.flags_text()),
            "/statusz" => web::text(StatusCode::OK, telling.status_text()),
            _ => web::text(StatusCode::NOT_FOUND, format!("not found; there are {}\n", PATHS.join(", "))),
        }
    }
}

/// That `/healthz` answers: it does, as this does.
fn slis() -> String {
    const NAME: &str = "kubernetes_healthcheck";
    let mut text = Text::default();
    text.family(NAME, "gauge", "This metric records the result of a single healthcheck.");
    text.sample(NAME, &instruments::labels(&[("name", "ping"), ("type", "healthz")]), 1);
    text.out
}
