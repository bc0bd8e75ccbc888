//! Port forwarding: each forwarded connection is a pair of channels, one for its bytes and one for an error.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cri::Error;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::activity::Activity;
use super::backend::Backend;
use super::channel::{Input, Output, Reset};
use super::command::CREATION_MAX;
use super::seats::Seats;
use super::spdy::{self, Headers, Incoming};
use super::websocket;

/// Bytes that are passed on at once.
const CHUNK: usize = 32 * 1024;
/// How long a pod may be silent once the client has sent all. Upstream ends the connection within a second; a client that
/// sends its request and closes would not get the answer to it.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// How long a client may be silent once the pod has sent all; upstream's number. A client of WebSocket has no other way to
/// learn of the end than the end of the session.
const REST_MAX: Duration = Duration::from_secs(1);

/// Where connections are forwarded to.
#[derive(Clone)]
pub(super) struct Sandbox {
    backend: Arc<dyn Backend>,
    id: String,
    seats: Seats,
}

impl Sandbox {
    /// Each connection takes one of `seats`.
    pub(super) fn new(backend: Arc<dyn Backend>, id: String, seats: Seats) -> Self {
        Self { backend, id, seats }
    }

    /// Forwards one connection to its end, and tells the client why if it fails.
    async fn forward(self, port: u16, input: Input, data: Output, error: Output) {
        if let Err(cause) = self.join(port, input, &data).await {
            let message = format!("error forwarding port {port} to pod {}: {cause}", self.id);
            tracing::debug!(message);
            // A client that is gone is noticed by the connection's reader.
            let _ = error.send(message.into()).await;
        }
        data.reset(spdy::status::CANCEL).await;
        error.finish().await;
    }

    /// Connects, and copies until both directions have ended, or the client has given up.
    async fn join(&self, port: u16, input: Input, data: &Output) -> Result<(), Error> {
        let full = || Error::ResourceExhausted("too many connections are forwarded already".to_owned());
        let _seat = self.seats.take(&self.id).ok_or_else(full)?;
        let stream = self.backend.port_forward(&self.id, port).await?;
        // Key strokes must not wait for more to come.
        stream.set_nodelay(true).map_err(|error| Error::Internal(format!("set TCP_NODELAY: {error}")))?;
        let (from_pod, to_pod) = stream.into_split();
        let activity = Activity::new();
        let mut upload = pin!(upload(input, to_pod, &activity));
        let mut download = pin!(download(from_pod, data, &activity));
        tokio::select! {
            ended = &mut download => {
                ended?;
                tokio::select! {
                    _ = upload => {}
                    () = activity.ceased(REST_MAX) => {}
                }
                Ok(())
            }
            ended = &mut upload => match ended {
                Err(Reset) => Ok(()),
                Ok(()) => tokio::select! {
                    ended = download => ended,
                    () = activity.ceased(ANSWER_MAX) => Ok(()),
                },
            }
        }
    }
}

async fn upload(mut from: Input, mut to: OwnedWriteHalf, activity: &Activity) -> Result<(), Reset> {
    while let Some(chunk) = from.next().await? {
        if to.write_all(&chunk).await.is_err() {
            // The pod's answer, or why there is none, comes from the other direction.
            return Ok(());
        }
        activity.note();
    }
    // An error means that the connection has ended in the other direction too.
    let _ = to.shutdown().await;
    activity.note();
    Ok(())
}

async fn download(mut from: OwnedReadHalf, to: &Output, activity: &Activity) -> Result<(), Error> {
    let mut buffer = vec![0; CHUNK];
    loop {
        let read = from.read(&mut buffer).await;
        let count = read.map_err(|error| Error::Unavailable(format!("read from the pod: {error}")))?;
        activity.note();
        if count == 0 {
            to.finish().await;
            return Ok(());
        }
        if to.send(Bytes::copy_from_slice(&buffer[..count])).await.is_err() {
            return Ok(());
        }
    }
}

/// Serves the ports that a client of WebSocket has named in its request: two channels for each.
pub(super) async fn of_websocket(sandbox: Sandbox, connection: websocket::Connection, ports: &[u16]) {
    let websocket::Connection { inputs, outbox } = connection;
    let mut forwards = JoinSet::new();
    // What comes on the channels of errors is thrown away.
    for ((input, port), channel) in inputs.into_iter().step_by(2).zip(ports.iter().copied()).zip((0..).step_by(2)) {
        let (data, error) = (outbox.channel(channel), outbox.channel(channel + 1));
        let sandbox = sandbox.clone();
        forwards.spawn(async move {
            // The first message of each channel says for which port it is.
            let named = Bytes::copy_from_slice(&port.to_le_bytes());
            if data.send(named.clone()).await.is_ok() && error.send(named).await.is_ok() {
                sandbox.forward(port, input, data, error).await;
            }
        });
    }
    forwards.join_all().await;
}

/// Serves all the connections that a client of SPDY opens, until it goes.
pub(super) async fn of_spdy(sandbox: Sandbox, mut connection: spdy::Connection) {
    let mut pairs = Pairs::default();
    let mut forwards = JoinSet::new();
    loop {
        tokio::select! {
            Some(stream) = connection.incoming.recv() => {
                if let Some((port, input, data, error)) = pairs.take(stream).await {
                    forwards.spawn(sandbox.clone().forward(port, input, data, error));
                }
            }
            // A panic in one of them was reported where it happened, and ends that one.
            Some(_) = forwards.join_next() => {}
            () = pairs.expiry() => pairs.expire().await,
        }
    }
}

/// Streams that wait for the other of their pair, by the id that the client gave to the pair.
#[derive(Default)]
struct Pairs(HashMap<String, Half>);

/// The first stream of a pair.
struct Half {
    kind: Kind,
    port: u16,
    input: Input,
    output: Output,
    deadline: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Data,
    Error,
}

impl Pairs {
    /// Takes a stream. The second of a pair makes a connection: port, data in both directions, error.
    async fn take(&mut self, stream: Incoming) -> Option<(u16, Input, Output, Output)> {
        let Some((kind, port)) = parse(&stream.headers) else {
            stream.refuse(spdy::status::PROTOCOL_ERROR).await;
            return None;
        };
        let id = pair_id(&stream, kind);
        if self.0.get(&id).is_some_and(|half| half.kind == kind) {
            stream.refuse(spdy::status::PROTOCOL_ERROR).await;
            return None;
        }
        let (input, output) = stream.accept().await;
        match self.0.remove(&id) {
            None => {
                let deadline = Instant::now() + CREATION_MAX;
                self.0.insert(id, Half { kind, port, input, output, deadline });
                None
            }
            Some(first) if kind == Kind::Data => Some((port, input, output, first.output)),
            Some(first) => Some((first.port, first.input, first.output, output)),
        }
    }

    /// Waits until a stream has waited too long.
    async fn expiry(&self) {
        match self.0.values().map(|half| half.deadline).min() {
            Some(deadline) => tokio::time::sleep_until(deadline).await,
            None => std::future::pending().await,
        }
    }

    /// Ends the streams that have waited too long.
    async fn expire(&mut self) {
        let now = Instant::now();
        for (_, half) in self.0.extract_if(|_, half| half.deadline <= now) {
            if half.kind == Kind::Error {
                // A client that is gone is noticed by the connection's reader.
                let _ = half.output.send("timed out waiting for the stream of data".into()).await;
            }
            half.output.finish().await;
        }
    }
}

/// What a stream is for; `None` if its headers do not say so.
fn parse(headers: &Headers) -> Option<(Kind, u16)> {
    let kind = match headers.get("streamtype")? {
        "data" => Kind::Data,
        "error" => Kind::Error,
        _ => return None,
    };
    let port = headers.get("port")?.parse().ok()?;
    (port > 0).then_some((kind, port))
}

/// The id of a stream's pair. Old clients give none; they open the stream of errors and then the one of data.
fn pair_id(stream: &Incoming, kind: Kind) -> String {
    match (stream.headers.get("requestid"), kind) {
        (Some(id), _) => id.to_owned(),
        (None, Kind::Error) => format!("stream {}", stream.id),
        (None, Kind::Data) => format!("stream {}", stream.id.saturating_sub(2)),
    }
}
