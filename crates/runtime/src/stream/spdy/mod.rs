//! SPDY/3.1, the server's side, as the clients of Kubernetes speak it: no window, no priority, no pushed streams.
//!
//! ```text
//! client ─► read ─► Decoder ─┬─ SYN_STREAM ─► Incoming ─► session: accepts or refuses
//!                            ├─ data, FIN  ─► Feed ─────► session
//!                            ╰─ ping ──────► Outbox ─╮
//! client ◄─ write ◄─ Encoder ◄───────────────────────┴── Output ◄─ session
//! ```

mod frame;
mod headers;

use std::collections::HashMap;
use std::io;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::sync::mpsc;

use super::activity::Activity;
use super::channel::{Budget, Closed, Feed, Input, Message, Outbox, Outgoing, Output};
use frame::{Decoder, Encoder, Frame};
pub(super) use headers::Headers;
#[cfg(test)]
pub(super) use headers::{dictionary, tests::block};

/// Statuses of RST_STREAM (SPDY/3 §2.6.3).
pub(super) mod status {
    pub(in crate::stream) const PROTOCOL_ERROR: u32 = 1;
    pub(in crate::stream) const REFUSED_STREAM: u32 = 3;
    pub(in crate::stream) const CANCEL: u32 = 5;
}

/// The most streams that a client may have open; each forwarded connection needs two.
const STREAMS_MAX: usize = 2000;
/// How many streams may wait to be accepted.
const INCOMING_LEN: usize = 8;
const READ_LEN: usize = 16 * 1024;
/// How much is written at once, if there is so much.
const WRITE_LEN: usize = 64 * 1024;

/// A stream that the client wants to open. If it is dropped, the client waits for an answer in vain.
pub(super) struct Incoming {
    pub(super) id: u32,
    pub(super) headers: Headers,
    outbox: Outbox,
    input: Input,
    output: Output,
}

impl Incoming {
    /// Tells the client that the stream is open.
    pub(super) async fn accept(self) -> (Input, Output) {
        // A client that is gone is noticed by the connection's reader.
        let _ = self.outbox.send(Message::Accept { channel: self.id }).await;
        (self.input, self.output)
    }

    /// Tells the client that it has no such stream.
    pub(super) async fn refuse(self, status: u32) {
        self.output.reset(status).await;
    }
}

/// The session's end of a connection.
pub(super) struct Connection {
    pub(super) incoming: mpsc::Receiver<Incoming>,
    pub(super) outbox: Outbox,
}

/// A connection in two halves: futures that read and write `io`, and the session's end. The first future ends when the
/// client is gone or broke the protocol, the second after [`Message::Close`].
pub(super) fn connect<I: AsyncRead + AsyncWrite + Send + 'static>(
    io: I,
    activity: &Activity,
) -> (impl Future<Output = ()> + Send, impl Future<Output = ()> + Send, Connection) {
    let (from_client, to_client) = tokio::io::split(io);
    let (outbox, outgoing) = Outbox::new();
    let (new_streams, incoming) = mpsc::channel(INCOMING_LEN);
    let streams = Streams { open: HashMap::new(), last: 0, budget: Budget::new(), outbox: outbox.clone(), new_streams };
    let reader = read(from_client, streams, activity.clone());
    let writer = write(to_client, outgoing, activity.clone());
    (reader, writer, Connection { incoming, outbox })
}

async fn read(mut io: impl AsyncRead + Unpin, mut streams: Streams, activity: Activity) {
    let (mut decoder, mut buffer) = (Decoder::new(), BytesMut::new());
    loop {
        loop {
            match decoder.next(&mut buffer) {
                Ok(Some(Frame::GoAway)) => return,
                Ok(Some(frame)) => streams.take(frame).await,
                Ok(None) => break,
                Err(error) => {
                    tracing::debug!(%error, "a streaming client broke the protocol");
                    return;
                }
            }
        }
        buffer.reserve(READ_LEN);
        match io.read_buf(&mut buffer).await {
            Ok(1..) => activity.note(),
            Ok(0) => return,
            Err(error) => {
                tracing::debug!(%error, "a streaming client's connection broke");
                return;
            }
        }
    }
}

async fn write(mut io: impl AsyncWrite + Unpin, mut outgoing: Outgoing, activity: Activity) {
    if let Err(error) = write_all(&mut io, &mut outgoing, &activity).await {
        tracing::debug!(%error, "a streaming client's connection broke");
    }
}

async fn write_all(io: &mut (impl AsyncWrite + Unpin), outgoing: &mut Outgoing, activity: &Activity) -> io::Result<()> {
    let (mut encoder, mut bytes) = (Encoder::default(), Vec::new());
    while let Some(message) = outgoing.recv().await {
        let mut closed = message == Message::Close;
        encoder.encode(&message, &mut bytes);
        while !closed && bytes.len() < WRITE_LEN {
            let Ok(message) = outgoing.try_recv() else { break };
            closed = message == Message::Close;
            encoder.encode(&message, &mut bytes);
        }
        io.write_all(&bytes).await?;
        io.flush().await?;
        activity.note();
        bytes.clear();
        if closed {
            return io.shutdown().await;
        }
    }
    Ok(())
}

/// The streams of a connection, as its reader knows them.
struct Streams {
    open: HashMap<u32, Stream>,
    /// The newest stream that the client opened.
    last: u32,
    budget: Budget,
    outbox: Outbox,
    new_streams: mpsc::Sender<Incoming>,
}

struct Stream {
    /// Where the client's bytes go, until it has sent the last.
    feed: Option<Feed>,
    closed: Closed,
}

impl Streams {
    async fn take(&mut self, frame: Frame) {
        match frame {
            Frame::SynStream { stream, headers, fin, mute } => self.open(stream, headers, fin, mute).await,
            Frame::Data { stream, bytes, fin } => {
                // What comes for a stream that has ended was under way when it did.
                if let Some(feed) = self.open.get(&stream).and_then(|stream| stream.feed.as_ref()) {
                    feed.send(&bytes).await;
                }
                if fin {
                    self.finish(stream);
                }
            }
            Frame::Finish { stream } => self.finish(stream),
            Frame::RstStream { stream } => {
                if let Some(stream) = self.open.remove(&stream) {
                    stream.closed.set();
                    if let Some(feed) = stream.feed {
                        feed.reset();
                    }
                }
            }
            // Even numbers answer a server's pings, of which there are none (§2.6.5).
            Frame::Ping { id } if id % 2 == 1 => self.send(Message::Pong { id }).await,
            Frame::Ping { .. } => {}
            Frame::GoAway => {}
        }
    }

    async fn open(&mut self, id: u32, headers: Headers, fin: bool, mute: bool) {
        // Clients have the odd numbers, in ascending order (§2.3.2).
        if id.is_multiple_of(2) || id <= self.last || mute {
            return self.send(Message::Reset { channel: id, status: status::PROTOCOL_ERROR }).await;
        }
        self.last = id;
        self.open.retain(|_, stream| stream.feed.is_some() || stream.closed.is_shared());
        if self.open.len() >= STREAMS_MAX {
            return self.send(Message::Reset { channel: id, status: status::REFUSED_STREAM }).await;
        }
        let (feed, input) = self.budget.channel();
        let output = self.outbox.channel(id);
        self.open.insert(id, Stream { feed: (!fin).then_some(feed), closed: output.closed() });
        let incoming = Incoming { id, headers, outbox: self.outbox.clone(), input, output };
        if self.new_streams.send(incoming).await.is_err() {
            // The session has all the streams it wants.
            self.open.remove(&id);
            self.send(Message::Reset { channel: id, status: status::REFUSED_STREAM }).await;
        }
    }

    fn finish(&mut self, stream: u32) {
        if let Some(stream) = self.open.get_mut(&stream) {
            stream.feed = None;
        }
    }

    async fn send(&self, message: Message) {
        // An error means that the writer has ended, which ends the connection.
        let _ = self.outbox.send(message).await;
    }
}
