//! Exec, attach and port forwarding of real containers, over the streaming server.

use cri::{RuntimeService as _, v1};
use futures_util::{SinkExt as _, StreamExt as _};
use testkit::serial::Test;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use crate::fixture::{Node, on_a_node, script_config};

pub(crate) const TESTS: &[Test] = &[
    ("exec_joins_streams", exec_joins_streams),
    ("exec_on_a_terminal_ends_with_its_client", exec_on_a_terminal_ends_with_its_client),
    ("attach_reaches_the_container", attach_reaches_the_container),
    ("ports_are_forwarded_into_the_pod", ports_are_forwarded_into_the_pod),
];

const STDIN: u8 = 0;
pub(crate) const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;

/// A client of `v5.channel.k8s.io`, or of `v4` where there is nothing newer.
pub(crate) struct Client<S>(WebSocketStream<S>);

impl Client<UnixStream> {
    /// A session whose URL is for the node agent.
    pub(crate) async fn inside(url: &str, protocol: &str) -> Self {
        let (socket, path) = url.strip_prefix("unix://").unwrap().split_once(':').unwrap();
        Client::open(UnixStream::connect(socket).await.unwrap(), path, protocol).await
    }
}

impl Client<TcpStream> {
    /// A session whose URL is for other programs.
    async fn outside(url: &str, protocol: &str) -> Self {
        let (address, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
        Client::open(TcpStream::connect(address).await.unwrap(), &format!("/{path}"), protocol).await
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    async fn open(stream: S, path: &str, protocol: &str) -> Self {
        let mut request = format!("ws://localhost{path}").into_client_request().unwrap();
        request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
        Self(tokio_tungstenite::client_async(request, stream).await.unwrap().0)
    }

    pub(crate) async fn send(&mut self, channel: u8, bytes: &[u8]) {
        self.0.send(Message::Binary([&[channel], bytes].concat().into())).await.unwrap();
    }

    /// The next bytes and their channel; `None` at the end.
    pub(crate) async fn next(&mut self) -> Option<(u8, Vec<u8>)> {
        match self.0.next().await.unwrap().unwrap() {
            Message::Binary(message) => Some((message[0], message[1..].to_vec())),
            Message::Close(_) => None,
            other => panic!("an unexpected message: {other}"),
        }
    }

    /// All that comes on a few channels until the session ends.
    async fn rest<const N: usize>(mut self, channels: [u8; N]) -> [String; N] {
        let mut all = channels.map(|_| Vec::new());
        while let Some((channel, bytes)) = self.next().await {
            let place = channels.iter().position(|one| *one == channel).unwrap();
            all[place].extend(bytes);
        }
        all.map(|bytes| String::from_utf8(bytes).unwrap())
    }

    /// Waits until a channel has said this.
    pub(crate) async fn until(&mut self, channel: u8, text: &str) {
        let mut said = Vec::new();
        while !String::from_utf8_lossy(&said).contains(text) {
            let (from, bytes) = self.next().await.unwrap();
            assert_eq!(from, channel, "{}", bytes.escape_ascii());
            said.extend(bytes);
        }
    }
}

pub(crate) fn exec(container: &str, script: &str) -> v1::ExecRequest {
    v1::ExecRequest {
        container_id: container.to_owned(),
        cmd: ["sh", "-c", script].map(str::to_owned).to_vec(),
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    }
}

fn exec_joins_streams() {
    on_a_node(|node| async {
        let pod = node.pod("streams", "sleep 1000").await;
        let request = exec(&pod.container, "tr a-z A-Z; echo no >&2; exit 7");
        let url = node.runtime.exec(request.clone()).await.unwrap().url;
        let mut client = Client::inside(&url, "v5.channel.k8s.io").await;
        client.send(STDIN, b"some ").await;
        client.send(STDIN, b"words").await;
        client.send(CLOSE, &[STDIN]).await;
        let [out, err, end] = client.rest([STDOUT, STDERR, ERROR]).await;
        assert_eq!((out.as_str(), err.as_str()), ("SOME WORDS", "no\n"));
        assert!(end.contains(r#"{"reason":"ExitCode","message":"7"}"#), "{end}");
        // For a client in another program, and with more than all buffers hold.
        let request =
            v1::ExecRequest { stderr: false, ..exec(&pod.container, "head -c 3000000 /dev/zero | tr '\\0' x") };
        let url = node.runtime.for_clients().exec(request).await.unwrap().url;
        let [out, end] = Client::outside(&url, "v5.channel.k8s.io").await.rest([STDOUT, ERROR]).await;
        assert!(out.len() == 3_000_000 && out.bytes().all(|byte| byte == b'x'));
        assert_eq!(end, r#"{"status":"Success"}"#);
        let missing = v1::ExecRequest { cmd: vec!["nothing".to_owned()], ..exec(&pod.container, "") };
        let url = node.runtime.exec(missing).await.unwrap().url;
        let [_, end] = Client::inside(&url, "v5.channel.k8s.io").await.rest([STDOUT, ERROR]).await;
        assert!(end.contains("No such file"), "{end}");
        node
    });
}

fn exec_on_a_terminal_ends_with_its_client() {
    on_a_node(|node| async {
        let pod = node.pod("terminal", "sleep 1000").await;
        let script = "echo $$ > /tmp/pid; while [ \"$(stty size)\" != '33 44' ]; do usleep 1000; done; echo sized; cat";
        let request = v1::ExecRequest { stderr: false, tty: true, ..exec(&pod.container, script) };
        let url = node.runtime.exec(request).await.unwrap().url;
        let mut client = Client::inside(&url, "v5.channel.k8s.io").await;
        client.send(RESIZE, br#"{"Width":44,"Height":33}"#).await;
        client.until(STDOUT, "sized\r\n").await;
        client.send(STDIN, b"hi\n").await;
        client.until(STDOUT, "hi\r\nhi\r\n").await;
        drop(client);
        let gone = ["sh", "-c", "while kill -0 $(cat /tmp/pid); do usleep 1000; done 2>/dev/null"];
        assert_eq!(node.exec(&pod.container, &gone, 20).await.unwrap().exit_code, 0);
        node
    });
}

fn attach_reaches_the_container() {
    on_a_node(|node| async {
        let config = node.sandbox_config("attach");
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let script = "while read line; do echo \"got $line\"; done; echo bye >&2; exit 3";
        let request = v1::ContainerConfig { stdin: true, stdin_once: true, ..script_config("main", script) };
        let container = node.create(&sandbox, &config, request).await.unwrap();
        node.start_container(&container).await.unwrap();
        let mut first = attach(&node, &container, (true, true, true)).await;
        // Another one who only looks on, from some moment on.
        let mut second = attach(&node, &container, (false, true, true)).await;
        let talk = async {
            loop {
                first.send(STDIN, b"one\n").await;
                first.until(STDOUT, "got one\n").await;
            }
        };
        tokio::select! {
            () = talk => {}
            () = second.until(STDOUT, "got one\n") => {}
        }
        first.send(CLOSE, &[STDIN]).await;
        for client in [first, second] {
            let [_, err, end] = client.rest([STDOUT, STDERR, ERROR]).await;
            assert_eq!((err.as_str(), end.as_str()), ("bye\n", r#"{"status":"Success"}"#));
        }
        assert_eq!(node.exited(&container).await.exit_code, 3);
        node
    });
}

pub(crate) async fn attach(
    node: &Node,
    container: &str,
    (stdin, stdout, stderr): (bool, bool, bool),
) -> Client<UnixStream> {
    let container_id = container.to_owned();
    let request = v1::AttachRequest { container_id, stdin, stdout, stderr, tty: false };
    let url = node.runtime.attach(request).await.unwrap().url;
    let mut client = Client::inside(&url, "v5.channel.k8s.io").await;
    // The empty message which says that the session is there. It comes before the runtime is asked.
    assert_eq!(client.next().await, Some((STDOUT, Vec::new())));
    client
}

fn ports_are_forwarded_into_the_pod() {
    on_a_node(|node| async {
        let pod = node.pod("ports", "nc -ll -p 8080 -e cat").await;
        let listening = ["sh", "-c", "while ! netstat -ltn | grep -q :8080; do usleep 1000; done"];
        node.exec(&pod.container, &listening, 20).await.unwrap();
        let request = v1::PortForwardRequest { pod_sandbox_id: pod.sandbox.clone(), port: vec![8080, 1] };
        let url = node.runtime.port_forward(request).await.unwrap().url;
        let mut client = Client::inside(&url, "v4.channel.k8s.io").await;
        let port = 8080_u16.to_le_bytes();
        client.send(0, b"hello").await;
        let mut said = [const { Vec::new() }; 4];
        while said[0].len() < 7 || said[3].len() < 3 {
            let (channel, bytes) = client.next().await.unwrap();
            said[usize::from(channel)].extend(bytes);
        }
        assert_eq!(said[0], [&port[..], b"hello"].concat());
        let why = String::from_utf8_lossy(&said[3][2..]).into_owned();
        assert!(why.starts_with("error forwarding port 1 to pod"), "{why}");
        node
    });
}
