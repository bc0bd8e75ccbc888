//! What happens within a session.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use futures_util::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;

use super::spdy_client::Client;
use super::{Node, STDERR, STDIN, STDOUT, Seen, TTY, spdy, websocket};
use crate::stream::WindowSize;

const V4: &str = "v4.channel.k8s.io";
const SUCCESS: &str = r#"{"status":"Success"}"#;

#[tokio::test]
async fn input_ends_before_output() {
    let node = Node::start().await;
    let mut client = spdy(&node.exec(&["cat"], STDIN | STDOUT), V4).await;
    let [error, stdin, stdout] = client.open_types(["error", "stdin", "stdout"]).await;
    client.send(stdin, b"one ").await;
    assert_eq!(client.received(stdout, 4).await, b"one ");
    client.send(stdin, b"two").await;
    client.finish(stdin).await;
    assert_eq!((client.rest(stdout).await.as_str(), client.rest(error).await.as_str()), ("two", SUCCESS));
    client.closed().await;
    node.stopped().await;
}

#[tokio::test]
async fn the_end_in_each_version() {
    let node = Node::start().await;
    let text = "command terminated with non-zero exit code: 3";
    let json = r#""reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"3"}]}"#;
    for (protocol, expect) in
        [(V4, json), ("v3.channel.k8s.io", text), ("v2.channel.k8s.io", text), ("channel.k8s.io", text)]
    {
        let mut client = spdy(&node.exec(&["say", "out", "err", "3"], STDOUT | STDERR), protocol).await;
        let [error, stdout, stderr] = client.open_types(["error", "stdout", "stderr"]).await;
        assert_eq!((client.rest(stdout).await.as_str(), client.rest(stderr).await.as_str()), ("out", "err"));
        let end = client.rest(error).await;
        assert!(end.contains(expect), "{protocol}: {end}");
        client.closed().await;
    }
    node.stopped().await;
}

#[tokio::test]
async fn a_command_that_cannot_start() {
    let node = Node::start().await;
    let request = cri::v1::ExecRequest { container_id: "gone".to_owned(), stdout: true, ..Default::default() };
    let url = node.server.exec(crate::stream::Via::Tcp, request).unwrap().url;
    let mut client = spdy(&url, V4).await;
    let [error, _] = client.open_types(["error", "stdout"]).await;
    let end = client.rest(error).await;
    assert!(end.contains(r#"error executing command in container: container \"gone\" not found"#), "{end}");
    client.closed().await;
    node.stopped().await;
}

#[tokio::test]
async fn a_terminal() {
    let mut node = Node::start().await;
    let mut client = spdy(&node.exec(&["cat"], STDIN | STDOUT | TTY), V4).await;
    let [error, stdin, stdout, resize] = client.open_types(["error", "stdin", "stdout", "resize"]).await;
    client.send(resize, br#"{"Width":0,"Height":0}{"Width":100,"Hei"#).await;
    client.send(resize, br#"ght":40}"#).await;
    assert_eq!(node.sees().await, Seen::Resized(WindowSize { rows: 40, columns: 100 }));
    // The terminal echoes, and changes ends of lines.
    client.send(stdin, b"hi\n").await;
    assert_eq!(client.received(stdout, 8).await, b"hi\r\nhi\r\n");
    // Version 3 and later have no other way to end the input of a terminal.
    client.send(stdin, b"unfinished").await;
    client.finish(stdin).await;
    assert_eq!(client.rest(error).await, SUCCESS);
    assert!(client.rest(stdout).await.ends_with("unfinished"));
    client.closed().await;
    node.stopped().await;
}

/// As under containerd: the process is not killed, it loses its streams.
#[tokio::test]
async fn a_client_that_goes_away() {
    let mut node = Node::start().await;
    let mut client = spdy(&node.exec(&["endless"], STDIN | STDOUT), V4).await;
    client.open_types(["error", "stdin", "stdout"]).await;
    drop(client);
    assert_eq!((node.sees().await, node.sees().await), (Seen::EndOfInput, Seen::BrokenOutput));
    node.stopped().await;
}

#[tokio::test]
async fn a_reset_stream_is_not_the_session() {
    let mut node = Node::start().await;
    let mut client = spdy(&node.exec(&["endless"], STDIN | STDOUT), V4).await;
    let [error, stdin, stdout] = client.open_types(["error", "stdin", "stdout"]).await;
    client.reset(stdin).await;
    assert_eq!(node.sees().await, Seen::EndOfInput);
    client.received(stdout, 100_000).await;
    client.reset(stdout).await;
    assert_eq!(client.rest(error).await, SUCCESS);
    assert_eq!(node.sees().await, Seen::BrokenOutput);
    client.closed().await;
    node.stopped().await;
}

/// More than all buffers hold, in both directions at once.
#[tokio::test]
async fn much_data() {
    let node = Node::start().await;
    let client = spdy(&node.exec(&["cat"], STDIN | STDOUT), V4).await;
    let sent: Vec<u8> =
        (0..8_000_000_u32).map(|number| number.to_le_bytes()[usize::try_from(number % 3).unwrap()]).collect();
    let received = exchange(client, &sent).await;
    assert!(received == sent);
    node.stopped().await;
}

/// Sends and receives at once, over one connection that is split.
async fn exchange(mut client: Client<TcpStream>, sent: &[u8]) -> Vec<u8> {
    let [_, stdin, stdout] = client.open_types(["error", "stdin", "stdout"]).await;
    let (writing, reading) = client.split();
    let write = async {
        writing.send(stdin, sent).await;
        writing.finish(stdin).await;
    };
    let ((), received) = tokio::join!(write, reading.received(stdout, sent.len()));
    received
}

/// The client learns the end although it has sent what nobody reads.
#[tokio::test]
async fn a_process_that_reads_nothing() {
    let node = Node::start().await;
    let mut client = spdy(&node.exec(&["ignore", "5"], STDIN | STDOUT), V4).await;
    let [error, stdin, _] = client.open_types(["error", "stdin", "stdout"]).await;
    client.send(stdin, &vec![7; 4_000_000]).await;
    let end = client.rest(error).await;
    assert!(end.contains(r#""message":"5""#), "{end}");
    client.closed().await;
    node.stopped().await;
}

#[tokio::test]
async fn unknown_streams_are_refused() {
    let node = Node::start().await;
    let mut client = spdy(&node.exec(&["line"], STDIN | STDOUT), V4).await;
    let [error, stdin] = client.open_types(["error", "stdin"]).await;
    for kind in ["error", "stderr", "video"] {
        let stream = client.request(&[("streamtype", kind)]).await;
        assert_eq!(client.reset_status(stream).await, 1, "{kind}");
    }
    let stdout = client.open(&[("streamtype", "stdout")]).await;
    // The session has all its streams now.
    let late = client.request(&[("streamtype", "stdout")]).await;
    assert_eq!(client.reset_status(late).await, 3);
    client.send(stdin, b"hi\n").await;
    assert_eq!((client.rest(stdout).await.as_str(), client.rest(error).await.as_str()), ("hi\n", SUCCESS));
    client.closed().await;
    node.stopped().await;
}

/// How the container ended is not told to who was attached.
#[tokio::test]
async fn attach() {
    let node = Node::start().await;
    let mut client = spdy(&node.attach("say out err 3", STDOUT | STDERR), V4).await;
    let [error, stdout, stderr] = client.open_types(["error", "stdout", "stderr"]).await;
    assert_eq!((client.rest(stdout).await.as_str(), client.rest(stderr).await.as_str()), ("out", "err"));
    assert_eq!(client.rest(error).await, SUCCESS);
    client.closed().await;
    // With input alone it ends with the container.
    let mut client = spdy(&node.attach("cat", STDIN), V4).await;
    let [error, stdin] = client.open_types(["error", "stdin"]).await;
    client.send(stdin, b"hi").await;
    client.finish(stdin).await;
    assert_eq!(client.rest(error).await, SUCCESS);
    client.closed().await;
    node.stopped().await;
}

/// All messages until the server closes the connection in good order.
async fn messages(mut socket: WebSocketStream<TcpStream>) -> Vec<Message> {
    let mut messages = Vec::new();
    loop {
        match socket.next().await.unwrap().unwrap() {
            Message::Close(frame) => {
                assert_eq!(u16::from(frame.unwrap().code), 1000);
                assert!(socket.next().await.is_none_or(|last| last.is_err()));
                return messages;
            }
            message => messages.push(message),
        }
    }
}

fn binary(channel: u8, bytes: &[u8]) -> Message {
    Message::Binary([&[channel], bytes].concat().into())
}

#[tokio::test]
async fn a_websocket_with_half_close() {
    let node = Node::start().await;
    let mut socket = websocket(&node.exec(&["cat"], STDIN | STDOUT), "v5.channel.k8s.io").await;
    assert_eq!(socket.next().await.unwrap().unwrap(), binary(1, b""));
    socket.send(Message::Ping("p".into())).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), Message::Pong("p".into()));
    socket.send(binary(0, b"hi")).await.unwrap();
    assert_eq!(socket.next().await.unwrap().unwrap(), binary(1, b"hi"));
    // What is sent on channels that are not the client's is thrown away.
    for message in [binary(2, b"x"), binary(77, b"x"), binary(255, &[0])] {
        socket.send(message).await.unwrap();
    }
    assert_eq!(messages(socket).await, [binary(3, SUCCESS.as_bytes())]);
    node.stopped().await;
}

#[tokio::test]
async fn old_websockets() {
    let node = Node::start().await;
    let url = || node.exec(&["say", "out", "err", "3"], STDOUT | STDERR);
    let text = "command terminated with non-zero exit code: 3";
    for protocol in ["", "channel.k8s.io"] {
        let mut got = messages(websocket(&url(), protocol).await).await;
        got.sort_by_key(|message| message.clone().into_data());
        assert_eq!(got, [binary(1, b""), binary(1, b"out"), binary(2, b"err"), binary(3, text.as_bytes())]);
    }
    let base64 = |channel: u8, text: &str| Message::Text(format!("{channel}{}", BASE64.encode(text)).into());
    let mut got = messages(websocket(&url(), "base64.channel.k8s.io").await).await;
    got.sort_by_key(|message| message.clone().into_data());
    assert_eq!(got, [base64(1, ""), base64(1, "out"), base64(2, "err"), base64(3, text)]);
    let mut socket = websocket(&node.exec(&["line"], STDIN | STDOUT), "v4.base64.channel.k8s.io").await;
    socket.send(base64(0, "hi\n")).await.unwrap();
    assert_eq!(messages(socket).await, [base64(1, ""), base64(1, "hi\n"), base64(3, SUCCESS)]);
    node.stopped().await;
}

/// Some clients send all of a command's input in one message.
#[tokio::test]
async fn much_data_in_one_message() {
    let node = Node::start().await;
    let socket = websocket(&node.exec(&["cat"], STDIN | STDOUT), "v5.channel.k8s.io").await;
    let sent: Vec<u8> = (0..33_u32 << 18).flat_map(u32::to_le_bytes).collect();
    let (mut to_server, mut from_server) = socket.split();
    let send = async {
        to_server.send(binary(0, &sent)).await.unwrap();
        to_server.send(binary(255, &[0])).await.unwrap();
    };
    let receive = async {
        let (mut received, mut end) = (Vec::new(), Vec::new());
        while let Message::Binary(message) = from_server.next().await.unwrap().unwrap() {
            let to = if message[0] == 1 { &mut received } else { &mut end };
            to.extend_from_slice(&message[1..]);
        }
        (received, end)
    };
    let ((), (received, end)) = tokio::join!(send, receive);
    assert!(received == sent);
    assert_eq!(end, SUCCESS.as_bytes());
    node.stopped().await;
}

/// A port of a pod that answers with what it is sent, in capitals, once it has been sent all.
async fn pod() -> (u16, tokio::task::JoinHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let serve = async move {
        loop {
            let (mut connection, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let mut request = Vec::new();
                if connection.read_to_end(&mut request).await.is_ok() {
                    request.make_ascii_uppercase();
                    // A client that was reset does not read it.
                    let _ = connection.write_all(&request).await;
                }
            });
        }
    };
    (port, tokio::spawn(serve))
}

/// Opens the two streams of a connection.
async fn pair<I>(client: &mut Client<I>, port: u16, id: &str) -> (u32, u32)
where
    I: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let port = port.to_string();
    let headers = |kind| [("streamtype", kind), ("port", port.as_str()), ("requestid", id)];
    let error = client.open(&headers("error")).await;
    (error, client.open(&headers("data")).await)
}

/// Two connections that are half closed in turn, one that is reset, and one to a port where nobody listens.
async fn check_forwarding<I>(mut client: Client<I>, port: u16)
where
    I: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let (first_error, first) = pair(&mut client, port, "1").await;
    let (_, reset) = pair(&mut client, port, "2").await;
    let (second_error, second) = pair(&mut client, port, "3").await;
    client.send(first, b"one").await;
    client.send(reset, b"none").await;
    client.reset(reset).await;
    let closed = free_port().await;
    let (failed_error, failed) = pair(&mut client, closed, "4").await;
    let why = client.rest(failed_error).await;
    assert!(why.starts_with(&format!("error forwarding port {closed} to pod pod: ")), "{why}");
    assert_eq!(client.reset_status(failed).await, 5);
    client.send(second, b"two").await;
    client.finish(first).await;
    assert_eq!((client.rest(first).await.as_str(), client.rest(first_error).await.as_str()), ("ONE", ""));
    client.finish(second).await;
    assert_eq!((client.rest(second).await.as_str(), client.rest(second_error).await.as_str()), ("TWO", ""));
}

async fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

#[tokio::test]
async fn forwarded_connections() {
    let node = Node::start().await;
    let (port, pod) = pod().await;
    check_forwarding(spdy(&node.port_forward(&[]), "portforward.k8s.io").await, port).await;
    pod.abort();
    node.stopped().await;
}

#[tokio::test]
async fn wrong_streams_of_a_forwarding() {
    let node = Node::start().await;
    let mut client = spdy(&node.port_forward(&[]), "portforward.k8s.io").await;
    for headers in [
        &[("streamtype", "data")][..],
        &[("streamtype", "data"), ("port", "0")],
        &[("streamtype", "data"), ("port", "65536")],
        &[("streamtype", "stdin"), ("port", "80")],
        &[("port", "80")],
    ] {
        let stream = client.request(headers).await;
        assert_eq!(client.reset_status(stream).await, 1, "{headers:?}");
    }
    let half = [("streamtype", "error"), ("port", "80"), ("requestid", "1")];
    client.open(&half).await;
    let same = client.request(&half).await;
    assert_eq!(client.reset_status(same).await, 1);
    node.stopped().await;
}

/// SPDY inside of a WebSocket, as a new kubectl does it.
#[tokio::test]
async fn a_tunnel() {
    let node = Node::start().await;
    let (port, pod) = pod().await;
    let socket = websocket(&node.port_forward(&[]), "SPDY/3.1+portforward.k8s.io").await;
    // The client's side of the tunnel: messages are bytes.
    let (mut outer, inner) = tokio::io::duplex(1000);
    let (mut to_server, mut from_server) = socket.split();
    let carry = async {
        let (mut read, mut write) = tokio::io::split(&mut outer);
        let up = async {
            let mut buffer = [0; 777];
            while let Ok(count @ 1..) = read.read(&mut buffer).await {
                to_server.send(Message::Binary(buffer[..count].to_vec().into())).await.unwrap();
            }
        };
        let down = async {
            while let Some(Ok(Message::Binary(bytes))) = from_server.next().await {
                write.write_all(&bytes).await.unwrap();
            }
        };
        tokio::join!(up, down);
    };
    tokio::select! {
        () = carry => panic!("the tunnel ended"),
        () = check_forwarding(Client::new(inner), port) => {}
    }
    pod.abort();
    node.stopped().await;
}

#[tokio::test]
async fn ports_over_a_websocket() {
    let node = Node::start().await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let closed = free_port().await;
    let mut socket = websocket(&node.port_forward(&[port.into(), closed.into()]), V4).await;
    let (mut pod, _) = listener.accept().await.unwrap();
    socket.send(binary(0, b"hi")).await.unwrap();
    let mut request = [0; 2];
    pod.read_exact(&mut request).await.unwrap();
    pod.write_all(b"ho").await.unwrap();
    drop(pod);
    let mut got = messages(socket).await;
    got.sort_by_key(|message| message.clone().into_data()[0]);
    let why = got.pop().unwrap().into_data();
    assert!(why.starts_with(format!("\x03error forwarding port {closed} ").as_bytes()), "{why:?}");
    let (port, closed) = (port.to_le_bytes(), closed.to_le_bytes());
    assert_eq!(got, [binary(0, &port), binary(0, b"ho"), binary(1, &port), binary(2, &closed), binary(3, &closed)]);
    node.stopped().await;
}

/// In memory, with a clock that goes when nothing else does.
mod times {
    use super::*;
    use crate::stream::server::tests::{command, forward};

    #[tokio::test(start_paused = true)]
    async fn a_client_that_opens_no_streams() {
        let start = tokio::time::Instant::now();
        let (client, server) = tokio::io::duplex(1000);
        let session = tokio::spawn(command(&["cat"], server));
        let mut client = Client::new(client);
        client.open_types(["error"]).await;
        client.closed().await;
        assert_eq!(start.elapsed().as_secs(), 30);
        session.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn an_idle_session() {
        let start = tokio::time::Instant::now();
        let (client, server) = tokio::io::duplex(1000);
        let session = tokio::spawn(command(&["cat"], server));
        let mut client = Client::new(client);
        client.open_types(["error", "stdin", "stdout"]).await;
        session.await.unwrap();
        assert_eq!(start.elapsed(), Duration::from_secs(4 * 3600));
    }

    #[tokio::test(start_paused = true)]
    async fn half_of_a_pair() {
        let start = tokio::time::Instant::now();
        let (client, server) = tokio::io::duplex(1000);
        let session = tokio::spawn(forward(server));
        let mut client = Client::new(client);
        let error = client.open(&[("streamtype", "error"), ("port", "80"), ("requestid", "1")]).await;
        assert_eq!(client.rest(error).await, "timed out waiting for the stream of data");
        assert_eq!(start.elapsed().as_secs(), 30);
        drop(client);
        session.await.unwrap();
    }
}
