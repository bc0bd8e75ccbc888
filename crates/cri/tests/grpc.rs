//! The gRPC server and client, over a real socket.

#![allow(clippy::unwrap_used, reason = "tests")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use cri::{Client, Error, ImageService, Items, RuntimeService, server, v1};
use futures_util::{StreamExt as _, stream};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// A runtime that answers a few calls.
#[derive(Default)]
struct Fake {
    stop_began: Notify,
    stop_may_end: Notify,
}

#[async_trait::async_trait]
impl RuntimeService for Fake {
    async fn version(&self, request: v1::VersionRequest) -> Result<v1::VersionResponse, Error> {
        Ok(v1::VersionResponse { version: request.version, runtime_name: "fake".to_owned(), ..Default::default() })
    }

    async fn container_status(
        &self,
        request: v1::ContainerStatusRequest,
    ) -> Result<v1::ContainerStatusResponse, Error> {
        Err(Error::NotFound { kind: "container", id: request.container_id })
    }

    async fn exec_sync(&self, request: v1::ExecSyncRequest) -> Result<v1::ExecSyncResponse, Error> {
        let bytes = request.timeout.try_into().unwrap();
        Ok(v1::ExecSyncResponse { stdout: vec![b'x'; bytes], ..Default::default() })
    }

    async fn stop_container(&self, _: v1::StopContainerRequest) -> Result<v1::StopContainerResponse, Error> {
        self.stop_began.notify_one();
        self.stop_may_end.notified().await;
        Ok(v1::StopContainerResponse::default())
    }

    async fn get_container_events(&self, _: v1::GetEventsRequest) -> Result<Items<v1::ContainerEventResponse>, Error> {
        let event = |id: &str| Ok(v1::ContainerEventResponse { container_id: id.to_owned(), ..Default::default() });
        Ok(stream::iter([event("a"), event("b")]).chain(stream::pending()).boxed())
    }
}

#[async_trait::async_trait]
impl ImageService for Fake {
    async fn list_images(&self, _: v1::ListImagesRequest) -> Result<v1::ListImagesResponse, Error> {
        Ok(v1::ListImagesResponse { images: vec![v1::Image::default()] })
    }
}

/// A server of a [`Fake`] on a socket of its own.
struct Node {
    _scratch: tempfile::TempDir,
    socket: PathBuf,
    fake: Arc<Fake>,
    stop: CancellationToken,
    served: JoinHandle<()>,
}

impl Node {
    async fn start() -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let socket = scratch.path().join("cri.sock");
        let listener = server::bind(&socket).await.unwrap();
        let (fake, stop) = (Arc::<Fake>::default(), CancellationToken::new());
        let served = tokio::spawn(server::serve(listener, fake.clone(), fake.clone(), stop.clone()));
        Self { _scratch: scratch, socket, fake, stop, served }
    }

    fn client(&self) -> Client {
        Client::new(&self.socket).unwrap()
    }

    async fn stopped(self) {
        self.stop.cancel();
        self.served.await.unwrap();
        assert!(!self.socket.exists());
    }
}

#[tokio::test]
async fn both_services_answer() {
    let node = Node::start().await;
    let client = node.client();
    let version = client.version(v1::VersionRequest { version: "v1".to_owned() }).await.unwrap();
    assert_eq!((version.version.as_str(), version.runtime_name.as_str()), ("v1", "fake"));
    assert_eq!(client.list_images(v1::ListImagesRequest::default()).await.unwrap().images.len(), 1);
    node.stopped().await;
}

#[tokio::test]
async fn errors_keep_their_kind() {
    let node = Node::start().await;
    let client = node.client();
    let request = v1::ContainerStatusRequest { container_id: "abc".to_owned(), verbose: false };
    let missing = client.container_status(request).await.unwrap_err();
    assert!(matches!(&missing, Error::NotFound { kind: "container", id } if id == "abc"), "{missing:?}");
    let unknown = client.checkpoint_pod(v1::CheckpointPodRequest::default()).await.unwrap_err();
    assert!(matches!(unknown, Error::Unimplemented { call: "CheckpointPod" }), "{unknown:?}");
    node.stopped().await;
}

/// The default limit of gRPC is 4 MiB, CRI's 16 MiB.
#[tokio::test]
async fn messages_may_have_16_mib() {
    let node = Node::start().await;
    let client = node.client();
    let exec = |timeout| client.exec_sync(v1::ExecSyncRequest { timeout, ..Default::default() });
    let fits = 16 * 1024 * 1024 - 16;
    assert_eq!(exec(fits).await.unwrap().stdout.len(), usize::try_from(fits).unwrap());
    assert!(exec(fits + 16).await.is_err());
    node.stopped().await;
}

#[tokio::test]
async fn events_stream_until_the_server_stops() {
    let node = Node::start().await;
    let client = node.client();
    let mut events = client.get_container_events(v1::GetEventsRequest::default()).await.unwrap();
    for id in ["a", "b"] {
        assert_eq!(events.next().await.unwrap().unwrap().container_id, id);
    }
    node.stop.cancel();
    assert!(matches!(events.next().await.unwrap(), Err(Error::Unavailable(_))));
    node.stopped().await;
}

#[tokio::test]
async fn a_runtime_that_hangs_is_given_up() {
    let node = Node::start().await;
    let client = node.client().with_timeout(Duration::from_millis(50));
    // Nothing but the limit can end it.
    let hung = client.stop_container(v1::StopContainerRequest::default()).await.unwrap_err();
    assert!(matches!(hung, Error::DeadlineExceeded(_)), "{hung:?}");
    assert!(hung.to_string().starts_with("StopContainer: "), "{hung}");
    client.with_timeout(Duration::from_secs(120)).version(v1::VersionRequest::default()).await.unwrap();
    node.stopped().await;
}

#[tokio::test]
async fn a_call_under_way_is_answered_after_the_stop() {
    let node = Node::start().await;
    let client = node.client();
    let call = tokio::spawn(async move { client.stop_container(v1::StopContainerRequest::default()).await });
    node.fake.stop_began.notified().await;
    node.stop.cancel();
    // No new connection is accepted once the socket's file is gone.
    while UnixStream::connect(&node.socket).await.is_ok() {
        tokio::task::yield_now().await;
    }
    node.fake.stop_may_end.notify_one();
    call.await.unwrap().unwrap();
    node.stopped().await;
}

/// A restarted runtime is found again by the same client.
#[tokio::test]
async fn a_client_connects_again() {
    let node = Node::start().await;
    let client = node.client();
    client.version(v1::VersionRequest::default()).await.unwrap();
    let Node { _scratch, socket, fake, stop, served } = node;
    stop.cancel();
    served.await.unwrap();
    assert!(client.version(v1::VersionRequest::default()).await.is_err());
    let listener = server::bind(&socket).await.unwrap();
    let stop = CancellationToken::new();
    let served = tokio::spawn(server::serve(listener, fake.clone(), fake, stop.clone()));
    client.version(v1::VersionRequest::default()).await.unwrap();
    stop.cancel();
    served.await.unwrap();
}

/// An HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A call of `Version` whose `:authority` is written as this field of HPACK.
fn version_call(stream: u32, authority: &[u8]) -> Vec<u8> {
    let path = b"/runtime.v1.RuntimeService/Version";
    let content_type = b"application/grpc";
    let block = [
        // :method POST and :scheme http of the static table; :path, content-type and te as literals.
        &[0x83, 0x86, 0x04, u8::try_from(path.len()).unwrap()][..],
        path,
        authority,
        &[0x0f, 0x10, u8::try_from(content_type.len()).unwrap()],
        content_type,
        b"\x00\x02te\x08trailers",
    ]
    .concat();
    let message = [0; 5];
    [frame(1, 0x4, stream, &block), frame(0, 0x1, stream, &message)].concat()
}

/// Reads frames until one that says how the call ended: trailers of the answer, or a reset.
async fn ended(connection: &mut UnixStream, stream: u32) -> &'static str {
    loop {
        let mut head = [0; 9];
        connection.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; usize::try_from(length).unwrap()];
        connection.read_exact(&mut payload).await.unwrap();
        let (kind, flags) = (head[3], head[4]);
        if head[5..] != stream.to_be_bytes() {
            continue;
        }
        match kind {
            1 if flags & 1 != 0 => return "answered",
            3 => return "reset",
            _ => {}
        }
    }
}

/// The `:authority` of clients that name the socket: Go with its own dialer and Java, Python and C++.
#[tokio::test]
async fn a_socket_path_as_authority() {
    let node = Node::start().await;
    let mut connection = UnixStream::connect(&node.socket).await.unwrap();
    let hello = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(4, 0, 0, &[])].concat();
    connection.write_all(&hello).await.unwrap();
    let calls: [&[u8]; 5] = [
        // Into the dynamic table, where the next call finds it as its newest entry.
        b"\x41\x09/run/cri.",
        b"\xbe",
        b"\x40\x0a:authority\x0arun%2Fcri.",
        b"\x01\x0eunix:///run/cr",
        // `/a` in Huffman's code: 011000 00011 and five bits of padding.
        b"\x41\x82\x60\x7f",
    ];
    for (call, stream) in calls.into_iter().zip((1..).step_by(2)) {
        connection.write_all(&version_call(stream, call)).await.unwrap();
        assert_eq!(ended(&mut connection, stream).await, "answered", "{}", call.escape_ascii());
    }
    drop(connection);
    node.stopped().await;
}

/// Why the test above needs code of ours. When this fails, `server::authority` can go.
#[tokio::test]
async fn h2_refuses_a_socket_path_as_authority() {
    let (mut client, server) = UnixStream::pair().unwrap();
    let answer = hyper::service::service_fn(async |_| {
        Ok::<_, Error>(http::Response::new(http_body_util::Empty::<bytes::Bytes>::new()))
    });
    let executor = hyper_util::rt::TokioExecutor::new();
    let io = hyper_util::rt::TokioIo::new(server);
    let served = tokio::spawn(hyper::server::conn::http2::Builder::new(executor).serve_connection(io, answer));
    let hello = [&b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"[..], &frame(4, 0, 0, &[])].concat();
    client.write_all(&hello).await.unwrap();
    client.write_all(&version_call(1, b"\x01\x09/run/cri.")).await.unwrap();
    assert_eq!(ended(&mut client, 1).await, "reset");
    served.abort();
}
