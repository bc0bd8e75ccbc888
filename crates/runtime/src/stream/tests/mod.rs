//! Whole sessions: real clients, sockets, pipes and terminals, and a backend that is a [`Fake`].

pub(super) mod fake;
mod sessions;
mod spdy_client;

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;

use cri::v1;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_util::sync::CancellationToken;

use super::{Server, Via};
use fake::{Fake, Seen};
use spdy_client::Client;

/// A streaming server and its backend.
struct Node {
    server: Arc<Server>,
    seen: mpsc::UnboundedReceiver<Seen>,
    stop: CancellationToken,
    served: JoinHandle<()>,
    scratch: tempfile::TempDir,
}

/// Which streams a client asks for.
const STDIN: u8 = 1;
const STDOUT: u8 = 2;
const STDERR: u8 = 4;
const TTY: u8 = 8;

impl Node {
    async fn start() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let anywhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let server = Arc::new(Server::bind(anywhere, &scratch.path().join("streams.sock")).await.unwrap());
        let (fake, stop) = (Arc::new(Fake::new()), CancellationToken::new());
        let seen = fake.log.lock().unwrap().take().unwrap();
        let served = tokio::spawn({
            let (server, stop) = (server.clone(), stop.clone());
            async move { server.serve(fake, stop).await }
        });
        Self { server, seen, stop, served, scratch }
    }

    fn exec(&self, command: &[&str], streams: u8) -> String {
        let request = v1::ExecRequest {
            container_id: "running".to_owned(),
            cmd: command.iter().map(|word| (*word).to_owned()).collect(),
            stdin: streams & STDIN != 0,
            stdout: streams & STDOUT != 0,
            stderr: streams & STDERR != 0,
            tty: streams & TTY != 0,
        };
        self.server.exec(Via::Tcp, request).unwrap().url
    }

    fn attach(&self, command: &str, streams: u8) -> String {
        let request = v1::AttachRequest {
            container_id: command.to_owned(),
            stdin: streams & STDIN != 0,
            stdout: streams & STDOUT != 0,
            stderr: streams & STDERR != 0,
            tty: streams & TTY != 0,
        };
        self.server.attach(Via::Tcp, request).unwrap().url
    }

    fn port_forward(&self, port: &[i32]) -> String {
        let request = v1::PortForwardRequest { pod_sandbox_id: "pod".to_owned(), port: port.to_vec() };
        self.server.port_forward(Via::Tcp, request).unwrap().url
    }

    /// What the process of a session sees next.
    async fn sees(&mut self) -> Seen {
        self.seen.recv().await.unwrap()
    }

    async fn stopped(self) {
        self.stop.cancel();
        self.served.await.unwrap();
        assert!(!self.scratch.path().join("streams.sock").exists());
    }
}

/// A connection to the place of a URL, and the URL's path.
async fn connect(url: &str) -> (TcpStream, String) {
    let (address, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    (TcpStream::connect(address).await.unwrap(), format!("/{path}"))
}

/// Sends the request for a session of SPDY; answers the head of the response.
async fn upgrade(io: &mut (impl AsyncRead + AsyncWrite + Unpin), path: &str, protocol: &str) -> String {
    let head = "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nHost: localhost\r\nContent-Length: 0";
    let request = format!("POST {path} HTTP/1.1\r\n{head}\r\nX-Stream-Protocol-Version: {protocol}\r\n\r\n");
    io.write_all(request.as_bytes()).await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(io.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

/// A session over SPDY.
async fn spdy(url: &str, protocol: &str) -> Client<TcpStream> {
    let (mut io, path) = connect(url).await;
    let head = upgrade(&mut io, &path, protocol).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert!(head.contains(protocol), "{head}");
    Client::new(io)
}

/// A session over WebSocket.
async fn websocket(url: &str, protocol: &str) -> WebSocketStream<TcpStream> {
    let (io, path) = connect(url).await;
    let mut request = format!("ws://localhost{path}").into_client_request().unwrap();
    if !protocol.is_empty() {
        request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
    }
    tokio_tungstenite::client_async(request, io).await.unwrap().0
}

#[tokio::test]
async fn a_url_opens_one_session() {
    let node = Node::start().await;
    let url = node.exec(&["say", "hi", "", "0"], STDOUT);
    let mut client = spdy(&url, "v4.channel.k8s.io").await;
    let [error, stdout] = client.open_types(["error", "stdout"]).await;
    assert_eq!(
        (client.rest(stdout).await.as_str(), client.rest(error).await.as_str()),
        ("hi", r#"{"status":"Success"}"#)
    );
    client.closed().await;
    let (mut io, path) = connect(&url).await;
    let again = upgrade(&mut io, &path, "v4.channel.k8s.io").await;
    assert!(again.starts_with("HTTP/1.1 404 "), "{again}");
    // The token of one kind is none of another.
    let url = node.port_forward(&[80]).replace("portforward", "exec");
    let (mut io, path) = connect(&url).await;
    let other = upgrade(&mut io, &path, "v4.channel.k8s.io").await;
    assert!(other.starts_with("HTTP/1.1 404 "), "{other}");
    node.stopped().await;
}

#[tokio::test]
async fn the_unix_socket() {
    let node = Node::start().await;
    let request = v1::ExecRequest {
        container_id: "running".to_owned(),
        cmd: ["say", "hi", "", "0"].map(str::to_owned).to_vec(),
        stdout: true,
        ..Default::default()
    };
    let url = node.server.exec(Via::Unix, request).unwrap().url;
    let (socket, path) = url.strip_prefix("unix://").unwrap().split_once(':').unwrap();
    assert_eq!(std::fs::metadata(socket).unwrap().permissions().mode() & 0o777, 0o700);
    let mut io = UnixStream::connect(socket).await.unwrap();
    upgrade(&mut io, path, "v4.channel.k8s.io").await;
    let mut client = Client::new(io);
    let [_, stdout] = client.open_types(["error", "stdout"]).await;
    assert_eq!(client.rest(stdout).await, "hi");
    client.closed().await;
    node.stopped().await;
}

#[tokio::test]
async fn wrong_requests_get_no_url() {
    let node = Node::start().await;
    let exec = |container_id: &str, stderr, tty| {
        let request = v1::ExecRequest { container_id: container_id.to_owned(), stderr, tty, ..Default::default() };
        node.server.exec(Via::Tcp, request).is_err()
    };
    assert!(exec("", true, false) && exec("c", true, true) && exec("c", false, false));
    let ports = |port| {
        let request = v1::PortForwardRequest { pod_sandbox_id: "p".to_owned(), port };
        node.server.port_forward(Via::Tcp, request).is_err()
    };
    assert!(ports(vec![0]) && ports(vec![-1]) && ports(vec![65536]) && ports(vec![80; 100]) && !ports(vec![]));
    node.stopped().await;
}

/// Sessions do not keep a daemon from ending.
#[tokio::test]
async fn a_stop_cuts_sessions_off() {
    let node = Node::start().await;
    let mut client = spdy(&node.exec(&["cat"], STDIN | STDOUT), "v4.channel.k8s.io").await;
    let [_, stdin, stdout] = client.open_types(["error", "stdin", "stdout"]).await;
    client.send(stdin, b"hi").await;
    assert_eq!(client.received(stdout, 2).await, b"hi");
    node.stopped().await;
}
