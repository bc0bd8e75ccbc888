//! The listeners, the URLs that lead to them, and the sessions behind them.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use cri::{Error, v1};
use http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::either::Either;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::activity::Activity;
use super::backend::Backend;
use super::channel::{Message, Outbox};
use super::command::{self, Channels};
use super::forward::{self, Sandbox};
use super::seats::{Seat, Seats};
use super::tokens::{Pending, Tokens};
use super::upgrade::{Answer, Purpose, Refusal, Speech, agree};
use super::{spdy, websocket};

/// How long a session may be silent; upstream's and containerd's number.
const IDLE_MAX: Duration = Duration::from_secs(4 * 3600);
/// How long a client may take to read the end of its session and close the connection.
const LINGER_MAX: Duration = Duration::from_secs(10);
/// How long a client may take to send its request.
const REQUEST_MAX: Duration = Duration::from_secs(10);
/// How long a request may be.
const REQUEST_LEN_MAX: usize = 64 * 1024;
/// How many clients of a listener may be about to send their request: anybody on the machine can connect by TCP.
const REQUESTS_MAX: usize = 64;
/// How many sessions there may be of a container, or for the ports of a sandbox, and on the node.
const SESSIONS_MAX: (usize, usize) = (256, 2048);
/// How many connections may be forwarded into a sandbox, and on the node: a page of the web opens some dozens.
const FORWARDS_MAX: (usize, usize) = (512, 4096);
/// How long no connection is accepted after the kernel had no resources for one.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// Which listener a URL leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Via {
    /// `http://127.0.0.1:PORT/…`, for callers that are other programs.
    Tcp,
    /// `unix://SOCKET:/…`, for the node agent of this process.
    Unix,
}

/// The streaming server. It listens from the start and answers from [`Server::serve`] on.
pub(crate) struct Server {
    tokens: Arc<Tokens>,
    tcp: TcpListener,
    address: SocketAddr,
    unix: UnixListener,
    socket: PathBuf,
}

impl Server {
    /// Listens on `address` and on a new socket at `socket`, which only root can reach.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) async fn bind(address: SocketAddr, socket: &Path) -> io::Result<Self> {
        let tcp = TcpListener::bind(address).await?;
        // What is left there by a daemon that died is not listened on: the state directory has one owner.
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let unix = UnixListener::bind(socket)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o700))?;
        Ok(Self { tokens: Arc::default(), address: tcp.local_addr()?, tcp, unix, socket: socket.to_owned() })
    }

    /// Serves sessions until `stop`, then cuts off those that are left and removes the socket.
    pub(crate) async fn serve(&self, backend: Arc<dyn Backend>, stop: CancellationToken) {
        let sessions = Sessions::new(backend, self.tokens.clone(), stop);
        tokio::join!(sessions.accept(Listener::Tcp(&self.tcp)), sessions.accept(Listener::Unix(&self.unix)));
        sessions.tasks.close();
        sessions.tasks.wait().await;
        if let Err(error) = std::fs::remove_file(&self.socket) {
            tracing::debug!(%error, socket = %self.socket.display(), "the socket for streams was not removed");
        }
    }

    /// The answer to CRI `Exec`.
    ///
    /// # Errors
    /// The request is wrong, or too many wait.
    pub(crate) fn exec(&self, via: Via, request: v1::ExecRequest) -> Result<v1::ExecResponse, Error> {
        check_container(&request.container_id)?;
        check_streams(request.stdin, request.stdout, request.stderr, request.tty)?;
        Ok(v1::ExecResponse { url: self.url(via, Pending::Exec(request))? })
    }

    /// The answer to CRI `Attach`.
    ///
    /// # Errors
    /// The request is wrong, or too many wait.
    pub(crate) fn attach(&self, via: Via, request: v1::AttachRequest) -> Result<v1::AttachResponse, Error> {
        check_container(&request.container_id)?;
        check_streams(request.stdin, request.stdout, request.stderr, request.tty)?;
        Ok(v1::AttachResponse { url: self.url(via, Pending::Attach(request))? })
    }

    /// The answer to CRI `PortForward`.
    ///
    /// # Errors
    /// The request is wrong, or too many wait.
    pub(crate) fn port_forward(
        &self,
        via: Via,
        request: v1::PortForwardRequest,
    ) -> Result<v1::PortForwardResponse, Error> {
        if request.pod_sandbox_id.is_empty() {
            return Err(Error::InvalidArgument("pod_sandbox_id is missing".to_owned()));
        }
        ports(&request.port)?;
        Ok(v1::PortForwardResponse { url: self.url(via, Pending::PortForward(request))? })
    }

    fn url(&self, via: Via, request: Pending) -> Result<String, Error> {
        let kind = request.kind();
        let token = self.tokens.insert(request)?;
        Ok(match via {
            Via::Tcp => format!("http://{}/{kind}/{token}", self.address),
            Via::Unix => format!("unix://{}:/{kind}/{token}", self.socket.display()),
        })
    }
}

fn check_container(id: &str) -> Result<(), Error> {
    if id.is_empty() { Err(Error::InvalidArgument("container_id is missing".to_owned())) } else { Ok(()) }
}

/// A terminal mixes the process's output and errors: they cannot be asked for apart.
fn check_streams(stdin: bool, stdout: bool, stderr: bool, tty: bool) -> Result<(), Error> {
    if tty && stderr {
        return Err(Error::InvalidArgument("tty and stderr cannot both be set".to_owned()));
    }
    if !(stdin || stdout || stderr) {
        return Err(Error::InvalidArgument("one of stdin, stdout and stderr has to be set".to_owned()));
    }
    Ok(())
}

/// The most ports of one request: each needs two channels, whose numbers are a byte.
const PORTS_MAX: usize = 60;

fn ports(numbers: &[i32]) -> Result<Vec<u16>, Error> {
    if numbers.len() > PORTS_MAX {
        return Err(Error::InvalidArgument(format!("at most {PORTS_MAX} ports can be forwarded at once")));
    }
    let port = |number: &i32| u16::try_from(*number).ok().filter(|port| *port > 0);
    let invalid = |number| Error::InvalidArgument(format!("{number} is no port; ports are from 1 to 65535"));
    numbers.iter().map(|number| port(number).ok_or_else(|| invalid(*number))).collect()
}

enum Listener<'a> {
    Tcp(&'a TcpListener),
    Unix(&'a UnixListener),
}

impl Listener<'_> {
    async fn accept(&self) -> io::Result<Either<TcpStream, UnixStream>> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept().await?;
                // Key strokes must not wait for more to come.
                stream.set_nodelay(true)?;
                Ok(Either::Left(stream))
            }
            Self::Unix(listener) => Ok(Either::Right(listener.accept().await?.0)),
        }
    }
}

/// What serves sessions. A handle: clones share the tasks.
#[derive(Clone)]
struct Sessions {
    backend: Arc<dyn Backend>,
    tokens: Arc<Tokens>,
    tasks: TaskTracker,
    stop: CancellationToken,
    seats: Seats,
    forwards: Seats,
}

impl Sessions {
    fn new(backend: Arc<dyn Backend>, tokens: Arc<Tokens>, stop: CancellationToken) -> Self {
        let seats = |(each_max, node_max)| Seats::new(each_max, node_max);
        let (seats, forwards) = (seats(SESSIONS_MAX), seats(FORWARDS_MAX));
        Self { backend, tokens, tasks: TaskTracker::new(), stop, seats, forwards }
    }

    /// Accepts connections until the stop.
    async fn accept(&self, listener: Listener<'_>) {
        let requests = Arc::new(Semaphore::new(REQUESTS_MAX));
        let accept = || async {
            let permit = requests.clone().acquire_owned().await.expect("the semaphore is never closed");
            Ok::<_, io::Error>((permit, listener.accept().await?))
        };
        while let Some(accepted) = self.stop.run_until_cancelled(accept()).await {
            match accepted {
                Ok((permit, stream)) => self.spawn(self.clone().request(permit, stream)),
                Err(error) => {
                    tracing::warn!(%error, "a streaming client could not connect");
                    // The kernel has no event for descriptors or memory that become free.
                    tokio::time::sleep(ACCEPT_BACKOFF).await;
                }
            }
        }
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let stop = self.stop.clone();
        self.tasks.spawn(async move { stop.run_until_cancelled(task).await });
    }

    /// Reads the one request of a connection.
    async fn request(
        self,
        _permit: OwnedSemaphorePermit,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    ) {
        let answer = service_fn(|request| std::future::ready(Ok::<_, Infallible>(self.answer(request))));
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(REQUEST_MAX)
            .max_buf_size(REQUEST_LEN_MAX)
            .serve_connection(TokioIo::new(stream), answer)
            .with_upgrades();
        if let Err(error) = connection.await {
            tracing::debug!(%error, "a streaming client's request failed");
        }
    }

    /// Answers a request. The session begins when the answer has been sent.
    fn answer(&self, request: Request<Incoming>) -> Answer {
        self.begin(request).unwrap_or_else(Refusal::answer)
    }

    fn begin(&self, mut request: Request<Incoming>) -> Result<Answer, Refusal> {
        if !matches!(*request.method(), Method::GET | Method::POST) {
            return Err(Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "a session is opened by GET or POST"));
        }
        let place = request.uri().path().strip_prefix('/').and_then(|path| path.split_once('/'));
        let pending = place.and_then(|(kind, token)| self.tokens.take(token).filter(|pending| pending.kind() == kind));
        let no_session = || Refusal::new(StatusCode::NOT_FOUND, "no session waits here; ask for a new URL");
        let pending = pending.ok_or_else(no_session)?;
        let purpose = match pending {
            Pending::Exec(_) | Pending::Attach(_) => Purpose::RemoteCommand,
            Pending::PortForward(_) => Purpose::PortForward,
        };
        let full = || Refusal::new(StatusCode::TOO_MANY_REQUESTS, "too many sessions are open already");
        let seat = self.seats.take(pending.owner()).ok_or_else(full)?;
        let (speech, answer) = agree(purpose, request.headers())?;
        let upgraded = hyper::upgrade::on(&mut request);
        self.spawn(self.clone().session(pending, speech, upgraded, seat));
        Ok(answer)
    }

    async fn session(self, pending: Pending, speech: Speech, upgraded: OnUpgrade, _seat: Seat) {
        let io = match upgraded.await {
            Ok(upgraded) => TokioIo::new(upgraded),
            Err(error) => {
                tracing::debug!(%error, "a streaming client went before its session began");
                return;
            }
        };
        match pending {
            Pending::Exec(request) => self.command(command::Request::Exec(request), speech, io).await,
            Pending::Attach(request) => self.command(command::Request::Attach(request), speech, io).await,
            Pending::PortForward(request) => self.forward(request, speech, io).await,
        }
    }

    async fn command<I>(self, request: command::Request, speech: Speech, io: I)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let activity = Activity::new();
        match speech {
            Speech::Spdy(version) => {
                let (reader, writer, connection) = spdy::connect(io, &activity);
                let outbox = connection.outbox.clone();
                let session = async {
                    if let Some(channels) = Channels::of_spdy(connection, &request, version).await {
                        command::run(&*self.backend, request, channels).await;
                    }
                };
                run(session, reader, writer, outbox, &activity).await;
            }
            Speech::WebSocket(protocol, version) => {
                let connected = websocket::connect(io, protocol, command::CHANNELS, &activity);
                let (reader, writer, connection) = connected;
                let outbox = connection.outbox.clone();
                let session = async {
                    let channels = Channels::of_websocket(connection, &request, version).await;
                    command::run(&*self.backend, request, channels).await;
                };
                run(session, reader, writer, outbox, &activity).await;
            }
            Speech::Tunnel => unreachable!("a tunnel is agreed on for port forwarding alone"),
        }
    }

    async fn forward<I>(self, request: v1::PortForwardRequest, speech: Speech, io: I)
    where
        I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let activity = Activity::new();
        let sandbox = Sandbox::new(self.backend, request.pod_sandbox_id, self.forwards);
        match speech {
            Speech::Spdy(_) => forward_spdy(sandbox, io, &activity).await,
            Speech::Tunnel => {
                let (carry, inner) = websocket::tunnel(io);
                tokio::select! {
                    () = forward_spdy(sandbox, inner, &activity) => {}
                    () = carry => {}
                }
            }
            Speech::WebSocket(protocol, _) => {
                // They were checked when the URL was asked for.
                let ports = ports(&request.port).unwrap_or_default();
                let connected = websocket::connect(io, protocol, 2 * ports.len(), &activity);
                let (reader, writer, connection) = connected;
                let outbox = connection.outbox.clone();
                run(forward::of_websocket(sandbox, connection, &ports), reader, writer, outbox, &activity).await;
            }
        }
    }
}

async fn forward_spdy(sandbox: Sandbox, io: impl AsyncRead + AsyncWrite + Send + 'static, activity: &Activity) {
    let (reader, writer, connection) = spdy::connect(io, activity);
    let outbox = connection.outbox.clone();
    run(forward::of_spdy(sandbox, connection), reader, writer, outbox, activity).await;
}

/// Runs a session and its connection until one of them ends, or nothing has moved for too long. What a session has sent
/// to its end is still written.
async fn run(
    session: impl Future<Output = ()>,
    reader: impl Future<Output = ()>,
    writer: impl Future<Output = ()>,
    outbox: Outbox,
    activity: &Activity,
) {
    let (mut reader, mut writer) = (pin!(reader), pin!(writer));
    tokio::select! {
        () = session => {}
        () = &mut reader => return,
        () = &mut writer => return,
        () = activity.ceased(IDLE_MAX) => return tracing::debug!("a streaming session was idle for too long"),
    }
    // What the client has sent meanwhile is read and thrown away: to close a connection with unread bytes would reset it,
    // and the client might lose the end that was written.
    let close = async {
        // An error means that the writer has ended, with the connection.
        let _ = outbox.send(Message::Close).await;
    };
    let closed = async { tokio::join!(close, reader, writer) };
    if tokio::time::timeout(LINGER_MAX, closed).await.is_err() {
        tracing::debug!("a streaming client did not close its connection");
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::stream::status::Format;
    use crate::stream::tests::fake::Fake;
    use crate::stream::upgrade::Version;

    fn sessions() -> Sessions {
        let (backend, stop) = (Arc::new(Fake::new()), CancellationToken::new());
        Sessions::new(backend, Arc::default(), stop)
    }

    /// An exec over SPDY with input and output, whose client is at the other end of `io`.
    pub(in crate::stream) async fn command(command: &[&str], io: tokio::io::DuplexStream) {
        let request = v1::ExecRequest {
            container_id: "running".to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            stdin: true,
            stdout: true,
            ..Default::default()
        };
        let version = Version { end: Format::Json, resize: true };
        sessions().command(command::Request::Exec(request), Speech::Spdy(version), io).await;
    }

    /// The same with port forwarding.
    pub(in crate::stream) async fn forward(io: tokio::io::DuplexStream) {
        let request = v1::PortForwardRequest { pod_sandbox_id: "pod".to_owned(), port: Vec::new() };
        let version = Version { end: Format::Text, resize: false };
        sessions().forward(request, Speech::Spdy(version), io).await;
    }
}
