//! `/exec`, `/attach` and `/portForward`: the runtime gives a URL, and the caller's upgraded connection is joined to it
//! byte by byte. What is spoken inside (SPDY or WebSocket) is between the caller and the runtime.

use std::any::Any;
use std::path::PathBuf;
use std::sync::Arc;

use cri::v1;
use http::header::{CONNECTION, HOST, UPGRADE};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt as _, Empty, Full, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_util::sync::CancellationToken;

use super::{Answer, Api, Failure, Query};

/// The longest refusal of the runtime that is passed on.
const REFUSAL_MAX: usize = 64 * 1024;

/// What a session has of the server that its request came by, in the request's extensions.
#[derive(Clone)]
pub(super) struct Session {
    /// Its place among the connections, which it keeps when the connection is handed over to it.
    _place: Arc<dyn Any + Send + Sync>,
    /// Ends it.
    stop: CancellationToken,
}

impl Session {
    pub(super) fn new(place: impl Any + Send + Sync, stop: CancellationToken) -> Self {
        Self { _place: Arc::new(place), stop }
    }
}

/// What a session is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Exec,
    Attach,
    PortForward,
}

/// The path of a request for a session.
#[derive(Debug, PartialEq, Eq)]
struct Target<'a> {
    kind: Kind,
    namespace: &'a str,
    pod: &'a str,
    uid: Option<&'a str>,
    container: &'a str,
}

impl<'a> Target<'a> {
    /// `/exec/{namespace}/{pod}[/{uid}]/{container}`, `/portForward/{namespace}/{pod}[/{uid}]`.
    fn parse(parts: &[&'a str]) -> Option<Self> {
        let kind = match *parts.first()? {
            "exec" => Kind::Exec,
            "attach" => Kind::Attach,
            _ => Kind::PortForward,
        };
        let (uid, container) = match (kind, &parts[1..]) {
            (Kind::PortForward, [_, _]) => (None, ""),
            (Kind::PortForward, [_, _, uid]) => (Some(*uid), ""),
            (Kind::Exec | Kind::Attach, [_, _, container]) => (None, *container),
            (Kind::Exec | Kind::Attach, [_, _, uid, container]) => (Some(*uid), *container),
            _ => return None,
        };
        Some(Self { kind, namespace: parts[1], pod: parts[2], uid, container })
    }
}

/// Which streams a caller wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
}

impl Wanted {
    /// With a terminal there is one output. Both the kubelet's names and those of the API server are taken.
    fn parse(query: &Query) -> Result<Self, Failure> {
        let any = |names: [&str; 2]| names.into_iter().any(|name| query.is_set(name));
        let tty = query.is_set("tty");
        let wanted = Self {
            stdin: any(["input", "stdin"]),
            stdout: any(["output", "stdout"]),
            stderr: any(["error", "stderr"]) && !tty,
            tty,
        };
        if wanted.stdin || wanted.stdout || wanted.stderr {
            Ok(wanted)
        } else {
            Err(Failure::bad_request("you must specify at least 1 of stdin, stdout, stderr"))
        }
    }
}

impl Api {
    pub(super) async fn open_stream(&self, parts: &[&str], query: &Query, request: Request<Incoming>) -> Answer {
        let unknown = || Failure::not_found(format!("no session at /{}", parts.join("/")));
        let target = Target::parse(parts).ok_or_else(unknown)?;
        if request.headers().get(UPGRADE).is_none() {
            return Err(Failure::bad_request("unable to upgrade: the request has no Upgrade header"));
        }
        if request.headers()[UPGRADE].as_bytes().eq_ignore_ascii_case(b"websocket") {
            self.telemetry.metrics.spoke_websocket(parts.first().copied().unwrap_or_default());
        }
        let url = match target.kind {
            Kind::PortForward => self.port_forward_url(&target, query).await?,
            Kind::Exec | Kind::Attach => self.container_url(&target, query).await?,
        };
        self.join(request, &url).await
    }

    async fn container_url(&self, target: &Target<'_>, query: &Query) -> Result<String, Failure> {
        let pod = self.pod(target.namespace, target.pod, target.uid)?;
        let running = self.container_id(&pod, target.container, Some(v1::ContainerState::ContainerRunning)).await?;
        let missing = || Failure::not_found(format!("container not found ({:?})", target.container));
        let container_id = running.ok_or_else(missing)?;
        let Wanted { stdin, stdout, stderr, tty } = Wanted::parse(query)?;
        if target.kind == Kind::Attach {
            let request = v1::AttachRequest { container_id, stdin, tty, stdout, stderr };
            return Ok(self.runtime.attach(request).await?.url);
        }
        let cmd = query.all("command").map(str::to_owned).collect();
        let request = v1::ExecRequest { container_id, cmd, tty, stdin, stdout, stderr };
        Ok(self.runtime.exec(request).await?.url)
    }

    async fn port_forward_url(&self, target: &Target<'_>, query: &Query) -> Result<String, Failure> {
        let pod = self.pod(target.namespace, target.pod, target.uid)?;
        // One parameter may list several ports, separated by commas.
        let ports = query.all("port").chain(query.all("ports")).flat_map(|ports| ports.split(','));
        let port = ports.map(|port| port.parse::<u16>().map(i32::from)).collect::<Result<_, _>>();
        let port = port.map_err(|_| Failure::bad_request("a port is a number from 1 to 65535"))?;
        let labels = [(crate::generate::label::POD_UID.to_owned(), pod.metadata.uid.clone().unwrap_or_default())];
        let filter = v1::PodSandboxFilter {
            state: Some(v1::PodSandboxStateValue { state: v1::PodSandboxState::SandboxReady.into() }),
            label_selector: labels.into(),
            ..v1::PodSandboxFilter::default()
        };
        let listed = self.runtime.list_pod_sandbox(v1::ListPodSandboxRequest { filter: Some(filter) }).await?;
        let newest = listed.items.into_iter().max_by_key(|sandbox| sandbox.created_at);
        let missing = || Failure::not_found(format!("pod {}/{} is not running", target.namespace, target.pod));
        let request = v1::PortForwardRequest { pod_sandbox_id: newest.ok_or_else(missing)?.id, port };
        Ok(self.runtime.port_forward(request).await?.url)
    }

    /// Passes the request on to the runtime and, once both sides have upgraded, the bytes in both directions.
    async fn join(&self, mut request: Request<Incoming>, url: &str) -> Answer {
        let place = Place::parse(url).ok_or_else(|| broken(format!("the runtime gave a URL that is none: {url:?}")))?;
        let inner = place.request(&request)?;
        let answer = match &place.server {
            Server::Tcp(address) => {
                let stream = TcpStream::connect(address)
                    .await
                    .map_err(|error| broken(format!("connect to {address}: {error}")))?;
                // Key strokes must not wait for more to come.
                stream.set_nodelay(true).map_err(|error| broken(error.to_string()))?;
                self.send(stream, inner).await?
            }
            Server::Unix(path) => {
                let stream = UnixStream::connect(path).await;
                self.send(stream.map_err(|error| broken(format!("connect to {}: {error}", path.display())))?, inner)
                    .await?
            }
        };
        if answer.status() != StatusCode::SWITCHING_PROTOCOLS {
            return refusal(answer).await;
        }
        let mut response = Response::new(Empty::new().boxed_unsync());
        *response.status_mut() = answer.status();
        *response.headers_mut() = answer.headers().clone();
        // The socket of the command line gives none: what comes by it ends with the process.
        let session = request.extensions_mut().remove::<Session>();
        let caller = hyper::upgrade::on(&mut request);
        self.streams.spawn(async move {
            let joined = async {
                let (caller, runtime) = (caller.await?, hyper::upgrade::on(answer).await?);
                let copied = tokio::io::copy_bidirectional(&mut TokioIo::new(caller), &mut TokioIo::new(runtime)).await;
                Ok::<_, hyper::Error>(copied)
            };
            let ended = match &session {
                Some(session) => session.stop.run_until_cancelled(joined).await,
                None => Some(joined.await),
            };
            // A side that goes away ends the session; there is nobody to tell.
            if let Some(Err(error)) = ended {
                tracing::debug!(%error, "a session could not be joined");
            }
        });
        Ok(response)
    }

    async fn send(
        &self,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        request: Request<Empty<bytes::Bytes>>,
    ) -> Result<Response<Incoming>, Failure> {
        let failed = |error: hyper::Error| broken(format!("the runtime's streaming server: {error}"));
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
        // Ends with the session, or with the answer if there is none.
        self.streams.spawn(async move {
            if let Err(error) = connection.with_upgrades().await {
                tracing::debug!(%error, "a session ended early");
            }
        });
        sender.send_request(request).await.map_err(failed)
    }
}

fn broken(message: String) -> Failure {
    Failure::new(StatusCode::BAD_GATEWAY, message)
}

/// The runtime said no: its words for the caller.
async fn refusal(answer: Response<Incoming>) -> Answer {
    let (head, body) = answer.into_parts();
    let text = Limited::new(body, REFUSAL_MAX).collect().await.map(|body| body.to_bytes()).unwrap_or_default();
    Ok(Response::from_parts(head, Full::new(text).boxed_unsync()))
}

/// Where a URL leads.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    server: Server,
    path: String,
}

#[derive(Debug, PartialEq, Eq)]
enum Server {
    Tcp(String),
    Unix(PathBuf),
}

impl Place {
    /// `http://host:port/path`, or `unix:///socket:/path`.
    fn parse(url: &str) -> Option<Self> {
        if let Some(rest) = url.strip_prefix("unix://") {
            let (socket, path) = rest.split_once(':')?;
            return Some(Self { server: Server::Unix(socket.into()), path: path.to_owned() });
        }
        let rest = url.strip_prefix("http://")?;
        let (address, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let address = if address.contains(':') { address.to_owned() } else { format!("{address}:80") };
        let path = if path.is_empty() { "/" } else { path };
        Some(Self { server: Server::Tcp(address), path: path.to_owned() })
    }

    /// The caller's request, to the runtime.
    fn request(&self, caller: &Request<Incoming>) -> Result<Request<Empty<bytes::Bytes>>, Failure> {
        let mut request = Request::new(Empty::new());
        *request.method_mut() = caller.method().clone();
        *request.uri_mut() =
            self.path.parse().map_err(|_| broken(format!("the runtime gave the path {:?}", self.path)))?;
        *request.headers_mut() = caller.headers().clone();
        let headers = request.headers_mut();
        // Who the caller is, is settled here; its credentials are none of the runtime's business.
        headers.remove(http::header::AUTHORIZATION);
        headers.remove(http::header::CONTENT_LENGTH);
        headers.insert(CONNECTION, http::HeaderValue::from_static("Upgrade"));
        let host = match &self.server {
            Server::Tcp(address) => address.as_str(),
            Server::Unix(_) => "localhost",
        };
        headers.insert(HOST, host.parse().map_err(|_| broken(format!("the runtime gave the host {host:?}")))?);
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths() {
        let parse = |path: &'static str| Target::parse(&path.split('/').collect::<Vec<_>>());
        let exec = parse("exec/shop/web/c").unwrap();
        assert_eq!((exec.kind, exec.uid, exec.container), (Kind::Exec, None, "c"));
        assert_eq!(parse("attach/shop/web/u1/c").unwrap().uid, Some("u1"));
        let forward = parse("portForward/shop/web/u1").unwrap();
        assert_eq!((forward.kind, forward.uid, forward.container), (Kind::PortForward, Some("u1"), ""));
        assert!(parse("exec/shop/web").is_none() && parse("portForward/shop").is_none());
    }

    #[test]
    fn urls() {
        let tcp = Place::parse("http://127.0.0.1:4321/exec/token").unwrap();
        assert_eq!((tcp.server, tcp.path.as_str()), (Server::Tcp("127.0.0.1:4321".into()), "/exec/token"));
        let unix = Place::parse("unix:///run/s.sock:/exec/token").unwrap();
        assert_eq!((unix.server, unix.path.as_str()), (Server::Unix("/run/s.sock".into()), "/exec/token"));
        assert!(Place::parse("ftp://x").is_none());
    }

    #[test]
    fn a_terminal_has_one_output() {
        let parse = |text| Wanted::parse(&Query::parse(text)).ok();
        let wanted = parse("input=1&output=1&error=1&tty=1").unwrap();
        assert_eq!(wanted, Wanted { stdin: true, stdout: true, stderr: false, tty: true });
        assert!(parse("tty=1").is_none());
    }
}
