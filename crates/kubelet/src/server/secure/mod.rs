//! The kubelet's API on the network: TLS, who calls, and whether they may.
//!
//! ```text
//! accept ─► TLS ─► identity (certificate, or token ─► TokenReview) ─► access (SubjectAccessReview) ─► Api
//! ```

mod access;
pub mod certificates;
mod identity;
mod review;
mod room;

use std::convert::Infallible;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

pub use access::{Access, Holds};
pub use identity::User;

use self::access::Gate;
use self::room::{Room, Seat};
use super::streams::Session;
use super::{Api, Body, accept, with_body};

/// What a caller may take of the server.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// For its part of the TLS handshake; and until a first request of it has been let in.
    patience: Duration,
    /// Connections and sessions of all callers at a time; more of them wait.
    most: usize,
    /// Those of one address; more of them are closed. The API server is one address.
    of_a_peer: usize,
}

const LIMITS: Limits = Limits { patience: Duration::from_secs(10), most: 1024, of_a_peer: 256 };

/// How long a connection may idle between two requests: longer than clients in Go keep one, who may be about to use it.
const IDLE: Duration = Duration::from_secs(120);
/// How often a caller by HTTP/2 is asked whether it is still there.
const PING: Duration = Duration::from_secs(30);
/// How long a first request may take to be answered that has not been let in by then: the authority may be slow.
const REVIEW: Duration = Duration::from_secs(60);

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

/// What a node without an API server has instead: nobody has a token, and nobody may do anything that is asked about.
#[derive(Debug)]
pub struct NoAuthority;

#[async_trait]
impl Authority for NoAuthority {
    async fn user_of(&self, _: &str) -> Result<Option<User>, AuthorityError> {
        Ok(None)
    }

    async fn allows(&self, _: &User, _: &Access) -> Result<bool, AuthorityError> {
        Ok(false)
    }
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

/// Serves until `stop`, or until it is dropped. Connections and open sessions are cut then: who calls is told by their end.
pub async fn serve(
    listener: TcpListener,
    api: Api,
    config: SecureConfig,
    authority: Arc<dyn Authority>,
    stop: CancellationToken,
) {
    serve_within(LIMITS, listener, api, config, authority, stop).await;
}

async fn serve_within(
    limits: Limits,
    listener: TcpListener,
    api: Api,
    config: SecureConfig,
    authority: Arc<dyn Authority>,
    stop: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(config.tls.clone());
    let served = Arc::new(Served { limits, acceptor, api, gate: Gate::new(config, authority) });
    let room = Room::new(limits.most, limits.of_a_peer);
    let sessions = stop.child_token();
    let _end_of_sessions = sessions.clone().drop_guard();
    let mut connections = JoinSet::new();
    loop {
        let (stream, seat) = tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => continue,
            accepted = accepted(&listener, &room) => accepted,
        };
        let Some(seat) = seat else { continue };
        let session = Session::new(seat, sessions.clone());
        let served = served.clone();
        connections.spawn(async move {
            if let Err(error) = served.converse(stream, session).await {
                tracing::debug!(%error, "a caller of the kubelet went away");
            }
        });
    }
}

/// The next connection, and its seat if its address has not got its share.
async fn accepted(listener: &TcpListener, room: &Arc<Room>) -> (TcpStream, Option<Seat>) {
    let place = room.place().await;
    let (stream, peer) = accept::next(|| listener.accept()).await;
    (stream, room.seat(place, peer.ip()))
}

/// What all connections share.
struct Served {
    limits: Limits,
    acceptor: TlsAcceptor,
    api: Api,
    gate: Gate,
}

/// How far a caller has come with its first request.
#[derive(Default)]
struct First {
    is_asked: AtomicBool,
    is_let_in: AtomicBool,
}

impl Served {
    async fn converse(self: Arc<Self>, stream: TcpStream, session: Session) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let patience = self.limits.patience;
        let stream = tokio::time::timeout(patience, self.acceptor.accept(stream)).await??;
        let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
        let user = certificate.map(|certificate| identity::of_certificate(certificate)).transpose()?;
        let first = Arc::<First>::default();
        let service = service_fn(|mut request: Request<Incoming>| {
            let (served, first, user) = (self.clone(), first.clone(), user.clone());
            first.is_asked.store(true, Ordering::Relaxed);
            request.extensions_mut().insert(session.clone());
            async move { Ok::<_, Infallible>(served.answer(user, request, &first).await) }
        });
        let builder = builder();
        let mut connection = pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
        let ended = match tokio::time::timeout(patience, connection.as_mut()).await {
            Ok(ended) => ended,
            Err(_) if first.is_let_in.load(Ordering::Relaxed) => connection.await,
            Err(late) if !first.is_asked.load(Ordering::Relaxed) => return Err(late.into()),
            // It gets its answer, and is heard no more.
            Err(_) => {
                connection.as_mut().graceful_shutdown();
                tokio::time::timeout(REVIEW, connection).await?
            }
        };
        ended.map_err(io::Error::other)
    }

    async fn answer(&self, user: Option<User>, request: Request<Incoming>, first: &First) -> Response<Body> {
        match self.gate.pass(user, &request).await {
            Ok(()) => {
                first.is_let_in.store(true, Ordering::Relaxed);
                self.api.handle(request).await
            }
            Err(refusal) => refused(&refusal),
        }
    }
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(IDLE);
    builder.http2().timer(TokioTimer::new()).keep_alive_interval(PING);
    builder
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

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use cluster::{Source, SourceError, Store};
    use cri::{RuntimeService, v1};
    use k8s_openapi::api::core::v1::{Event, NodeStatus, Pod, PodStatus};
    use serde_json::json;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpSocket;
    use tokio_rustls::TlsConnector;
    use tokio_rustls::client::TlsStream;

    use super::*;
    use crate::paths::Paths;

    /// Has one pod, and a container of it that runs.
    struct OnePod {
        store: Store,
        streams: SocketAddr,
    }

    #[async_trait]
    impl Source for OnePod {
        fn store(&self) -> &Store {
            &self.store
        }
        async fn update_pod_status(&self, _: &str, _: PodStatus) -> Result<(), SourceError> {
            Ok(())
        }
        async fn delete_pod(&self, _: &str) -> Result<(), SourceError> {
            Ok(())
        }
        async fn request_deletion(&self, _: &str, _: Option<i64>) -> Result<(), SourceError> {
            Ok(())
        }
        async fn update_node_status(&self, _: &str, _: NodeStatus) -> Result<(), SourceError> {
            Ok(())
        }
        fn event(&self, _: Event) {}
    }

    #[async_trait]
    impl RuntimeService for OnePod {
        async fn list_containers(
            &self,
            _: v1::ListContainersRequest,
        ) -> Result<v1::ListContainersResponse, cri::Error> {
            let container = v1::Container { id: "id1".to_owned(), ..v1::Container::default() };
            Ok(v1::ListContainersResponse { containers: vec![container] })
        }

        async fn attach(&self, _: v1::AttachRequest) -> Result<v1::AttachResponse, cri::Error> {
            Ok(v1::AttachResponse { url: format!("http://{}/attach", self.streams) })
        }
    }

    /// Knows the bearer of one token.
    struct OneToken;

    #[async_trait]
    impl Authority for OneToken {
        async fn user_of(&self, token: &str) -> Result<Option<User>, AuthorityError> {
            Ok((token == "known").then(User::anonymous))
        }
        async fn allows(&self, _: &User, _: &Access) -> Result<bool, AuthorityError> {
            Ok(true)
        }
    }

    /// A streaming server that upgrades and says no more.
    async fn stream_to(listener: TcpListener) {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut asked = Vec::new();
        while !asked.ends_with(b"\r\n\r\n") {
            asked.push(stream.read_u8().await.unwrap());
        }
        stream
            .write_all(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n")
            .await
            .unwrap();
        // Until the other side goes.
        let _ = stream.read(&mut [0; 1]).await;
    }

    struct Server {
        at: SocketAddr,
        stop: CancellationToken,
        /// The certificate's.
        _dir: tempfile::TempDir,
    }

    impl Server {
        async fn start(limits: Limits) -> Self {
            let local = || TcpListener::bind("127.0.0.1:0");
            let (listener, streams) = (local().await.unwrap(), local().await.unwrap());
            let (at, stop, dir) =
                (listener.local_addr().unwrap(), CancellationToken::new(), tempfile::tempdir().unwrap());
            let pair = certificates::self_signed(dir.path(), "n1", &[]).unwrap();
            let config = SecureConfig {
                node: "n1".to_owned(),
                tls: certificates::server_config(certificates::Shown::new(&pair).unwrap(), None).unwrap(),
                anonymous: false,
                tokens: true,
                always_allow: false,
                holds: Holds::default(),
            };
            let pod = json!({"metadata": {"name": "web", "namespace": "shop", "uid": "u1"}, "spec": {"containers": [{"name": "c"}]}});
            let one = || {
                let store = Store::new();
                store.pods().put(serde_json::from_value::<Pod>(pod.clone()).unwrap());
                Arc::new(OnePod { store, streams: streams.local_addr().unwrap() })
            };
            let paths = Paths { root: dir.path().join("kubelet"), logs: dir.path().join("logs") };
            let api = Api::new(one(), one(), paths, "n1");
            tokio::spawn(stream_to(streams));
            tokio::spawn(serve_within(limits, listener, api, config, Arc::new(OneToken), stop.clone()));
            Self { at, stop, _dir: dir }
        }

        /// A connection from an address of the loopback network; an error if it is closed at once.
        async fn connect(&self, last: u8) -> io::Result<TlsStream<TcpStream>> {
            let socket = TcpSocket::new_v4()?;
            socket.bind(([127, 0, 0, last], 0).into())?;
            let stream = socket.connect(self.at).await?;
            let config = trust::client(trust::anything()).map_err(io::Error::other)?.with_no_client_auth();
            let name = rustls::pki_types::ServerName::try_from("n1").map_err(io::Error::other)?;
            TlsConnector::from(Arc::new(config)).connect(name, stream).await
        }
    }

    /// Asks, and gives the beginning of the answer; empty if there is none.
    async fn ask(stream: &mut TlsStream<TcpStream>, request: &str) -> String {
        let text = format!("{request}\r\nhost: n1\r\nauthorization: Bearer known\r\n\r\n");
        if stream.write_all(text.as_bytes()).await.is_err() {
            return String::new();
        }
        let mut heard = [0; 1024];
        let count = stream.read(&mut heard).await.unwrap_or(0);
        String::from_utf8_lossy(&heard[..count]).into_owned()
    }

    const HEALTHZ: &str = "GET /healthz HTTP/1.1";
    const ATTACH: &str = "GET /attach/shop/web/c?output=1 HTTP/1.1\r\nconnection: upgrade\r\nupgrade: x";

    /// Longer than anything here takes.
    const LONG: Duration = Duration::from_secs(600);

    async fn is_over(stream: &mut TlsStream<TcpStream>) {
        let mut rest = Vec::new();
        // However it ends.
        let _ = stream.read_to_end(&mut rest).await;
    }

    #[tokio::test]
    async fn who_says_nothing_or_nothing_good_is_sent_away() {
        let server = Server::start(Limits { patience: Duration::from_millis(300), ..LIMITS }).await;
        let mut known = server.connect(1).await.unwrap();
        assert!(ask(&mut known, HEALTHZ).await.starts_with("HTTP/1.1 200 "));
        for beginning in
            ["", "GET /healthz HT", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "GET /pods HTTP/1.1\r\nhost: n1\r\n\r\n"]
        {
            let mut stranger = server.connect(1).await.unwrap();
            stranger.write_all(beginning.as_bytes()).await.unwrap();
            is_over(&mut stranger).await;
        }
        // By now the one that was let in has been there for longer than those.
        assert!(ask(&mut known, HEALTHZ).await.starts_with("HTTP/1.1 200 "));
    }

    #[tokio::test]
    async fn one_address_does_not_keep_others_out() {
        let server = Server::start(Limits { patience: LONG, most: 8, of_a_peer: 2 }).await;
        let mut greedy = server.connect(1).await.unwrap();
        let _silent = server.connect(1).await.unwrap();
        assert!(server.connect(1).await.is_err());
        assert!(ask(&mut server.connect(2).await.unwrap(), HEALTHZ).await.starts_with("HTTP/1.1 200 "));
        assert!(ask(&mut greedy, HEALTHZ).await.starts_with("HTTP/1.1 200 "));
    }

    #[tokio::test]
    async fn a_session_takes_a_place_and_ends_with_the_server() {
        let server = Server::start(Limits { patience: LONG, most: 8, of_a_peer: 1 }).await;
        let mut session = server.connect(1).await.unwrap();
        assert!(ask(&mut session, ATTACH).await.starts_with("HTTP/1.1 101 "));
        assert!(server.connect(1).await.is_err());
        server.stop.cancel();
        is_over(&mut session).await;
    }
}
