//! WebSocket, as Kubernetes uses it: each message begins with the number of a channel. Or, as a tunnel, messages are the
//! bytes of a connection that speaks SPDY.

use std::io;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures_util::{Sink, SinkExt as _, Stream, StreamExt as _, TryStreamExt as _};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error, Message as Frame};
use tokio_util::io::{CopyToBytes, SinkWriter, StreamReader};

use super::activity::Activity;
use super::channel::{Budget, Feed, Input, Message, Outbox, Outgoing};

/// The longest message from a client, upstream's limit: some clients send all of a command's input at once.
const MESSAGE_MAX: usize = 32 << 20;
/// What the library reads and writes at once; its own numbers are 128 KiB each.
const BUFFER_LEN: usize = 16 * 1024;
/// In `v5.channel.k8s.io`, the channel on which the number of a channel says that it ends.
const CLOSE: u8 = 255;

/// How the channel and the bytes of a message are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// A byte with the number, then the bytes.
    Binary,
    /// A digit, then the bytes in base64.
    Base64,
}

/// What was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Protocol {
    pub(super) framing: Framing,
    /// Whether the client can say that a channel ends.
    pub(super) half_close: bool,
}

/// The session's end of a connection.
pub(super) struct Connection {
    /// What the client sends on each channel.
    pub(super) inputs: Vec<Input>,
    pub(super) outbox: Outbox,
}

/// A connection in two halves: futures that read and write `io`, and the session's end, with so many channels. The first
/// future ends when the client is gone or broke the protocol, the second after [`Message::Close`].
pub(super) async fn connect<I: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    io: I,
    protocol: Protocol,
    channels: usize,
    activity: &Activity,
) -> (impl Future<Output = ()> + Send, impl Future<Output = ()> + Send, Connection) {
    let (to_client, from_client) = upgraded(io).await.split();
    let (outbox, outgoing) = Outbox::new();
    let budget = Budget::new();
    let (feeds, inputs): (Vec<_>, Vec<_>) = (0..channels).map(|_| budget.channel()).unzip();
    let feeds = Feeds { open: feeds.into_iter().map(Some).collect(), protocol };
    let reader = read(from_client, feeds, activity.clone());
    let writer = write(to_client, protocol.framing, outgoing, activity.clone());
    (reader, writer, Connection { inputs, outbox })
}

/// The bytes that a client sends and receives through a tunnel.
pub(super) async fn tunnel<I: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    io: I,
) -> impl AsyncRead + AsyncWrite + Send {
    let (to_client, from_client) = upgraded(io).await.split();
    let from_client = from_client.map_err(io::Error::other).try_filter_map(async |frame| match frame {
        Frame::Binary(bytes) => Ok(Some(bytes)),
        Frame::Text(text) => Ok(Some(text.into())),
        // After a close frame the stream ends by itself; pings are answered by the library.
        _ => Ok(None),
    });
    let to_client =
        to_client.sink_map_err(io::Error::other).with(async |bytes| Ok::<_, io::Error>(Frame::Binary(bytes)));
    tokio::io::join(StreamReader::new(Box::pin(from_client)), SinkWriter::new(CopyToBytes::new(Box::pin(to_client))))
}

async fn upgraded<I: AsyncRead + AsyncWrite + Unpin>(io: I) -> WebSocketStream<I> {
    let config = WebSocketConfig::default()
        .read_buffer_size(BUFFER_LEN)
        .write_buffer_size(BUFFER_LEN)
        .max_message_size(Some(MESSAGE_MAX))
        .max_frame_size(Some(MESSAGE_MAX));
    WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await
}

async fn read(mut client: impl Stream<Item = Result<Frame, Error>> + Unpin, mut feeds: Feeds, activity: Activity) {
    loop {
        let taken = match client.next().await {
            Some(Ok(Frame::Binary(bytes))) => feeds.take(bytes).await,
            Some(Ok(Frame::Text(text))) => feeds.take(text.into()).await,
            // A ping keeps the connection alive but the session no less idle.
            Some(Ok(Frame::Ping(_) | Frame::Pong(_) | Frame::Frame(_))) => continue,
            Some(Ok(Frame::Close(_))) | None => return,
            Some(Err(error)) => {
                tracing::debug!(%error, "a streaming client's connection broke");
                return;
            }
        };
        if let Err(reason) = taken {
            tracing::debug!(reason, "a streaming client broke the protocol");
            return;
        }
        activity.note();
    }
}

/// Where the bytes of each channel go, until it ends.
struct Feeds {
    open: Vec<Option<Feed>>,
    protocol: Protocol,
}

impl Feeds {
    async fn take(&mut self, mut message: Bytes) -> Result<(), &'static str> {
        // Some clients send an empty message to see whether the connection works.
        let Some(&first) = message.first() else { return Ok(()) };
        if self.protocol.half_close && first == CLOSE {
            let [_, channel] = message[..] else { return Err("one number of a channel has to follow a close signal") };
            let channel = self.open.get_mut(usize::from(channel)).ok_or("a channel is closed that does not exist")?;
            *channel = None;
            return Ok(());
        }
        let bytes = message.split_off(1);
        let (channel, bytes) = match self.protocol.framing {
            Framing::Binary => (first, bytes),
            Framing::Base64 => {
                let bytes = BASE64.decode(&bytes).map_err(|_| "a message is not base64")?;
                (first.wrapping_sub(b'0'), bytes.into())
            }
        };
        if let Some(Some(feed)) = self.open.get(usize::from(channel)) {
            feed.send(bytes).await;
        }
        Ok(())
    }
}

async fn write(
    mut client: impl Sink<Frame, Error = Error> + Unpin,
    framing: Framing,
    mut outgoing: Outgoing,
    activity: Activity,
) {
    while let Some(message) = outgoing.recv().await {
        let sent = match message {
            Message::Data { channel, bytes } => client.send(frame(framing, channel, &bytes)).await,
            Message::Close => {
                let normal = CloseFrame { code: CloseCode::Normal, reason: "".into() };
                // A client that is gone already does not mind.
                let _ = client.send(Frame::Close(Some(normal))).await;
                return;
            }
            // There are no such messages: channels end with their connection.
            Message::Finish { .. } | Message::Reset { .. } | Message::Accept { .. } | Message::Pong { .. } => continue,
        };
        if let Err(error) = sent {
            tracing::debug!(%error, "a streaming client's connection broke");
            return;
        }
        activity.note();
    }
}

fn frame(framing: Framing, channel: u32, bytes: &[u8]) -> Frame {
    // There are fewer channels than 128; see `upgrade`.
    let channel = u8::try_from(channel).unwrap_or(CLOSE);
    match framing {
        Framing::Binary => Frame::Binary([&[channel], bytes].concat().into()),
        Framing::Base64 => Frame::Text(format!("{}{}", char::from(b'0' + channel), BASE64.encode(bytes)).into()),
    }
}
