//! The kubelet's API on the network: TLS, who calls, and whether they may.
//!
//! ```text
//! accept ─► TLS ─► identity (certificate, or token ─► TokenReview) ─► access (SubjectAccessReview) ─► Api
//! ```

mod access;
pub mod certificates;
mod identity;
mod review;

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

pub use access::{Access, Holds};
pub use identity::User;

use self::access::Gate;
use super::{Api, Body, with_body};

/// How long a client may take for its part of the TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Most connections at a time: what a caller can grow has a budget.
const CONNECTIONS_MAX: usize = 1024;

/// Who knows the users of the cluster and what they may do: the API server.
#[async_trait]
pub trait Authority: Send + Sync + 'static {
    /// The user of a bearer token; none if it is nobody's.
    ///
    /// # Errors
    /// The authority does not answer.
    async fn user_of(&self, token: &str) -> Result<Option<User>, AuthorityError>;

    /// Whether a user may do this to the node.
    ///
    /// # Errors
    /// The authority does not answer.
    async fn allows(&self, user: &User, access: &Access) -> Result<bool, AuthorityError>;
}

/// The authority does not answer.
#[derive(Debug, thiserror::Error)]
#[error("the API server does not say who may call: {0}")]
pub struct AuthorityError(pub String);

/// How the API is served on the network.
pub struct SecureConfig {
    /// The node whose API it is.
    pub node: String,
    /// Certificates of the server, and the authority of its clients'.
    pub tls: Arc<rustls::ServerConfig>,
    /// Whether callers without credentials are let through to the access check (`authentication.anonymous.enabled`).
    pub anonymous: bool,
    /// Whether tokens are asked about (`authentication.webhook.enabled`).
    pub tokens: bool,
    /// Whether everybody who is known may do everything (`authorization.mode: AlwaysAllow`).
    pub always_allow: bool,
    /// For how long answers about callers hold.
    pub holds: Holds,
}

/// Serves until `stop`. Open sessions are cut then: who calls is told by the end of the connection.
pub async fn serve(
    listener: TcpListener,
    api: Api,
    config: SecureConfig,
    authority: Arc<dyn Authority>,
    stop: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(config.tls.clone());
    let gate = Arc::new(Gate::new(config, authority));
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = accept(&listener, &room) => accepted,
        };
        match accepted {
            Ok((stream, peer, permit)) => {
                let (acceptor, api, gate) = (acceptor.clone(), api.clone(), gate.clone());
                connections.spawn(async move {
                    if let Err(error) = serve_connection(stream, &acceptor, api, gate).await {
                        tracing::debug!(%peer, %error, "a caller of the kubelet went away");
                    }
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a caller of the kubelet");
                tokio::task::yield_now().await;
            }
        }
    }
}

type Accepted = (TcpStream, SocketAddr, tokio::sync::OwnedSemaphorePermit);

async fn accept(listener: &TcpListener, room: &Arc<Semaphore>) -> io::Result<Accepted> {
    let permit = room.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (stream, peer) = listener.accept().await?;
    Ok((stream, peer, permit))
}

async fn serve_connection(stream: TcpStream, acceptor: &TlsAcceptor, api: Api, gate: Arc<Gate>) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let stream = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await??;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let user = certificate.map(|certificate| identity::of_certificate(certificate)).transpose()?;
    let service = service_fn(move |request| {
        let (api, gate, user) = (api.clone(), gate.clone(), user.clone());
        async move { Ok::<_, Infallible>(answer(&api, &gate, user, request).await) }
    });
    let builder = auto::Builder::new(TokioExecutor::new());
    let served = builder.serve_connection_with_upgrades(TokioIo::new(stream), service).await;
    served.map_err(io::Error::other)
}

async fn answer(api: &Api, gate: &Gate, user: Option<User>, request: Request<Incoming>) -> Response<Body> {
    match gate.pass(user, &request).await {
        Ok(()) => api.handle(request).await,
        Err(refusal) => refused(&refusal),
    }
}

/// Why a request is not answered.
#[derive(Debug, PartialEq, Eq)]
enum Refusal {
    /// Nobody known.
    Unauthorized,
    /// Somebody who may not.
    Forbidden(String),
    /// The authority does not answer.
    Unknown(String),
}

fn refused(refusal: &Refusal) -> Response<Body> {
    let (status, message) = match refusal {
        Refusal::Unauthorized => (StatusCode::UNAUTHORIZED, "Unauthorized".to_owned()),
        Refusal::Forbidden(message) => (StatusCode::FORBIDDEN, message.clone()),
        Refusal::Unknown(message) => (StatusCode::INTERNAL_SERVER_ERROR, message.clone()),
    };
    with_body(status, "text/plain; charset=utf-8", message)
}
