//! WebSocket, as Kubernetes uses it: each message begins with the number of a channel. Or, as a tunnel, messages are the
//! bytes of a connection that speaks SPDY.

use std::io;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadHalf, WriteHalf};
use tokio::sync::watch;

use super::activity::Activity;
use super::channel::{Budget, Feed, Input, Message, Outbox, Outgoing};
use super::frames::{Decoder, Frame, Kind, encode};

/// What is read at once, which is the most that a session is handed at once.
const READ_LEN: usize = 16 * 1024;
/// Bytes that a tunnel holds in each direction.
const TUNNEL_LEN: usize = 32 * 1024;
/// In `v5.channel.k8s.io`, the channel on which the number of a channel says that it ends.
const CLOSE: u8 = 255;
/// The status of a session that has come to its end (RFC 6455 §7.4.1).
const NORMAL: u16 = 1000;

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
pub(super) fn connect<I: AsyncRead + AsyncWrite + Send + 'static>(
    io: I,
    protocol: Protocol,
    channels: usize,
    activity: &Activity,
) -> (impl Future<Output = ()> + Send, impl Future<Output = ()> + Send, Connection) {
    let (from_client, to_client) = Frames::of(io);
    let (outbox, outgoing) = Outbox::new();
    let budget = Budget::new();
    let (feeds, inputs): (Vec<_>, Vec<_>) = (0..channels).map(|_| budget.channel()).unzip();
    let feeds = Feeds { open: feeds.into_iter().map(Some).collect(), protocol, message: None };
    let reader = read(from_client, feeds, activity.clone());
    let writer = write(to_client, protocol.framing, outgoing, activity.clone());
    (reader, writer, Connection { inputs, outbox })
}

/// A future that carries the bytes that a client sends and receives through a tunnel, and their other end. It ends when
/// both directions have.
pub(super) fn tunnel<I: AsyncRead + AsyncWrite + Send + 'static>(
    io: I,
) -> (impl Future<Output = ()> + Send, DuplexStream) {
    let (session, ours) = tokio::io::duplex(TUNNEL_LEN);
    let (from_session, to_session) = tokio::io::split(ours);
    let (from_client, to_client) = Frames::of(io);
    let carry = async {
        tokio::join!(carry_in(from_client, to_session), carry_out(from_session, to_client));
    };
    (carry, session)
}

async fn carry_in<I: AsyncRead>(mut from: Frames<I>, mut to: WriteHalf<DuplexStream>) {
    while let Some(Piece { bytes, .. }) = from.next().await {
        if to.write_all(&bytes).await.is_err() {
            // The session has ended.
            return;
        }
    }
    // As above.
    let _ = to.shutdown().await;
}

async fn carry_out<I: AsyncWrite>(from: ReadHalf<DuplexStream>, to: Sender<I>) {
    if let Err(error) = carry_all_out(from, to).await {
        tracing::debug!(%error, "a streaming client's connection broke");
    }
}

async fn carry_all_out<I: AsyncWrite>(mut from: ReadHalf<DuplexStream>, mut to: Sender<I>) -> io::Result<()> {
    let mut buffer = BytesMut::with_capacity(READ_LEN);
    while to.or_answer(from.read_buf(&mut buffer)).await?? > 0 {
        to.send(Kind::Binary, &buffer.split()).await?;
        buffer.reserve(READ_LEN);
    }
    to.close().await
}

/// A piece of a message; `last`: the message ends with it.
struct Piece {
    bytes: BytesMut,
    last: bool,
}

/// What a client sends.
struct Frames<I> {
    io: ReadHalf<I>,
    decoder: Decoder,
    buffer: BytesMut,
    /// What the client's last ping says.
    pings: watch::Sender<BytesMut>,
}

impl<I: AsyncRead> Frames<I> {
    /// The two halves of a connection.
    fn of(io: I) -> (Self, Sender<I>)
    where
        I: AsyncWrite,
    {
        let (read, write) = tokio::io::split(io);
        let (pings, pinged) = watch::channel(BytesMut::new());
        let frames = Self { io: read, decoder: Decoder::default(), buffer: BytesMut::new(), pings };
        (frames, Sender { io: write, pinged })
    }

    /// The next piece of a message; `None` when the client is gone, or broke the protocol.
    async fn next(&mut self) -> Option<Piece> {
        loop {
            match self.decoder.next(&mut self.buffer) {
                Ok(Some(Frame::Data { bytes, last })) => return Some(Piece { bytes, last }),
                Ok(Some(Frame::Ping(bytes))) => drop(self.pings.send_replace(bytes)),
                Ok(Some(Frame::Close)) => return None,
                Ok(None) => self.fill().await?,
                Err(error) => {
                    tracing::debug!(%error, "a streaming client broke the protocol");
                    return None;
                }
            }
        }
    }

    async fn fill(&mut self) -> Option<()> {
        self.buffer.reserve(READ_LEN);
        match self.io.read_buf(&mut self.buffer).await {
            Ok(count) => (count > 0).then_some(()),
            Err(error) => {
                tracing::debug!(%error, "a streaming client's connection broke");
                None
            }
        }
    }
}

/// What a client is sent.
struct Sender<I> {
    io: WriteHalf<I>,
    pinged: watch::Receiver<BytesMut>,
}

impl<I: AsyncWrite> Sender<I> {
    /// Waits for something and answers pings meanwhile: the last one, if there are several (RFC 6455 §5.5.3), so that they
    /// cost nothing while the client does not read.
    async fn or_answer<T>(&mut self, wanted: impl Future<Output = T>) -> io::Result<T> {
        let mut wanted = std::pin::pin!(wanted);
        loop {
            tokio::select! {
                result = &mut wanted => return Ok(result),
                Ok(()) = self.pinged.changed() => {
                    let bytes = self.pinged.borrow_and_update().clone();
                    self.send(Kind::Pong, &bytes).await?;
                }
            }
        }
    }

    async fn send(&mut self, kind: Kind, payload: &[u8]) -> io::Result<()> {
        self.io.write_all(&encode(kind, payload)).await?;
        self.io.flush().await
    }

    /// Says that nothing more comes.
    async fn close(&mut self) -> io::Result<()> {
        self.send(Kind::Close, &NORMAL.to_be_bytes()).await
    }
}

async fn read<I: AsyncRead>(mut client: Frames<I>, mut feeds: Feeds, activity: Activity) {
    // A ping keeps the connection alive but the session no less idle.
    while let Some(piece) = client.next().await {
        if let Err(reason) = feeds.take(piece).await {
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
    /// The message that has begun.
    message: Option<Begun>,
}

/// A message that has begun.
enum Begun {
    /// Bytes of this channel.
    Bytes(u8),
    /// The same in base64.
    Base64(u8, Letters),
    /// The end of a channel, once that is named.
    Closing(Option<u8>),
}

impl Feeds {
    async fn take(&mut self, Piece { mut bytes, last }: Piece) -> Result<(), &'static str> {
        let mut message = match (self.message.take(), bytes.first()) {
            (Some(message), _) => message,
            // Some clients send an empty message to see whether the connection works.
            (None, None) => return Ok(()),
            (None, Some(&first)) => {
                bytes.advance(1);
                self.begun(first)
            }
        };
        match &mut message {
            Begun::Bytes(channel) => self.feed(*channel, &bytes).await,
            Begun::Base64(channel, letters) => self.feed(*channel, &letters.decode(&bytes, last)?).await,
            Begun::Closing(channel) => {
                for byte in bytes {
                    if channel.replace(byte).is_some() {
                        return Err("more than one number of a channel follows a close signal");
                    }
                }
            }
        }
        match message {
            Begun::Closing(channel) if last => {
                let channel = channel.ok_or("the number of a channel has to follow a close signal")?;
                let feed = self.open.get_mut(usize::from(channel)).ok_or("a channel is closed that does not exist")?;
                *feed = None;
            }
            message => self.message = (!last).then_some(message),
        }
        Ok(())
    }

    fn begun(&self, first: u8) -> Begun {
        match self.protocol {
            Protocol { half_close: true, .. } if first == CLOSE => Begun::Closing(None),
            Protocol { framing: Framing::Binary, .. } => Begun::Bytes(first),
            Protocol { framing: Framing::Base64, .. } => Begun::Base64(first.wrapping_sub(b'0'), Letters::default()),
        }
    }

    async fn feed(&self, channel: u8, bytes: &[u8]) {
        if let Some(Some(feed)) = self.open.get(usize::from(channel)) {
            feed.send(bytes).await;
        }
    }
}

/// Base64 that comes in pieces.
#[derive(Default)]
struct Letters {
    /// Fewer than four, which make no byte yet.
    waiting: Vec<u8>,
    /// Whether padding has come: nothing may follow it.
    ended: bool,
}

impl Letters {
    fn decode(&mut self, piece: &[u8], last: bool) -> Result<Vec<u8>, &'static str> {
        let mut letters = [&self.waiting[..], piece].concat();
        let whole = if last { letters.len() } else { letters.len() / 4 * 4 };
        self.waiting = letters.split_off(whole);
        if self.ended && !letters.is_empty() {
            return Err("a message is not base64");
        }
        self.ended |= letters.last() == Some(&b'=');
        BASE64.decode(&letters).map_err(|_| "a message is not base64")
    }
}

async fn write<I: AsyncWrite>(mut client: Sender<I>, framing: Framing, mut outgoing: Outgoing, activity: Activity) {
    loop {
        let sent = match client.or_answer(outgoing.recv()).await {
            Ok(Some(Message::Data { channel, bytes })) => {
                let (kind, message) = message(framing, channel, &bytes);
                client.send(kind, &message).await
            }
            Ok(Some(Message::Close)) => {
                // A client that is gone already does not mind.
                let _ = client.close().await;
                return;
            }
            Ok(None) => return,
            // There are no such messages: channels end with their connection.
            Ok(Some(
                Message::Finish { .. } | Message::Reset { .. } | Message::Accept { .. } | Message::Pong { .. },
            )) => {
                continue;
            }
            Err(error) => Err(error),
        };
        if let Err(error) = sent {
            tracing::debug!(%error, "a streaming client's connection broke");
            return;
        }
        activity.note();
    }
}

fn message(framing: Framing, channel: u32, bytes: &[u8]) -> (Kind, Vec<u8>) {
    // There are fewer channels than 128; see `upgrade`.
    let channel = u8::try_from(channel).unwrap_or(CLOSE);
    match framing {
        Framing::Binary => (Kind::Binary, [&[channel], bytes].concat()),
        Framing::Base64 => (Kind::Text, format!("{}{}", char::from(b'0' + channel), BASE64.encode(bytes)).into_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    const BINARY: Protocol = Protocol { framing: Framing::Binary, half_close: true };
    const IN_BASE64: Protocol = Protocol { framing: Framing::Base64, half_close: false };
    /// A zero in the mask leaves every fourth byte as it is.
    const MASK: [u8; 4] = [1, 2, 3, 0];

    /// How a message of a client begins whose payload has this length.
    fn header(payload: u64) -> Vec<u8> {
        [&[0x82, 0xff][..], &payload.to_be_bytes(), &MASK].concat()
    }

    fn masked(payload: &[u8]) -> Vec<u8> {
        payload.iter().zip(MASK.iter().cycle()).map(|(byte, mask)| byte ^ mask).collect()
    }

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().build().unwrap()
    }

    /// Each byte is with the session before the client has sent the next one of the same message.
    #[tokio::test]
    async fn a_message_that_trickles_is_passed_on_as_it_comes() {
        let expect = b"trickle";
        for (protocol, message) in [(BINARY, &b"\x00trickle"[..]), (IN_BASE64, &b"0dHJpY2tsZQ=="[..])] {
            let activity = Activity::new();
            let (mut client, server) = tokio::io::duplex(1);
            let (reader, _writer, mut connection) = connect(server, protocol, 1, &activity);
            let trickle = async {
                client.write_all(&header(message.len() as u64)).await.unwrap();
                let (mut passed, in_base64) = (Vec::new(), protocol == IN_BASE64);
                for (sent, byte) in masked(message).into_iter().enumerate() {
                    client.write_all(&[byte]).await.unwrap();
                    let due = if in_base64 { (sent / 4 * 3).min(expect.len()) } else { sent };
                    while passed.len() < due {
                        passed.extend_from_slice(&connection.inputs[0].next().await.unwrap().unwrap());
                    }
                }
                assert_eq!(passed, expect);
            };
            tokio::select! {
                () = reader => panic!("the connection ended"),
                () = trickle => {}
            }
        }
    }

    /// A message of any length costs what the budget of its connection says, whether its session takes it or not.
    #[test]
    fn a_message_of_40_mib_is_never_held() {
        const LENGTH: usize = 40 << 20;
        let block = masked(&[7; 1 << 20]);
        let peak = sys::meter::peak_of(&mut || {
            runtime().block_on(async {
                let activity = Activity::new();
                let (mut client, server) = tokio::io::duplex(64 << 10);
                let (reader, _writer, mut connection) = connect(server, BINARY, 1, &activity);
                let mut send = std::pin::pin!(async {
                    client.write_all(&header(LENGTH as u64 + 4)).await.unwrap();
                    client.write_all(&masked(&[0, 7, 7, 7])).await.unwrap();
                    for _ in 0..LENGTH / block.len() {
                        client.write_all(&block).await.unwrap();
                    }
                });
                let mut reader = std::pin::pin!(reader);
                // The session does not listen: the client is held up.
                for _ in 0..100 {
                    assert_eq!((send.as_mut().now_or_never(), reader.as_mut().now_or_never()), (None, None));
                }
                let listen = async {
                    let mut heard = 0;
                    while heard < LENGTH + 3 {
                        let chunk = connection.inputs[0].next().await.unwrap().unwrap();
                        assert!(chunk.iter().all(|byte| *byte == 7));
                        heard += chunk.len();
                    }
                };
                tokio::select! {
                    () = reader => panic!("the connection ended"),
                    ((), ()) = async { tokio::join!(send, listen) } => {}
                }
            });
        });
        assert!(peak < 2 << 20, "{peak}");
    }

    /// What comes in small pieces, and waits for its session, costs what it is counted as.
    #[test]
    fn small_pieces_are_no_larger_than_they_seem() {
        let peak = sys::meter::peak_of(&mut || {
            runtime().block_on(async {
                let activity = Activity::new();
                let (mut client, server) = tokio::io::duplex(1);
                let (reader, _writer, mut connection) = connect(server, BINARY, 1, &activity);
                let trickle = async {
                    client.write_all(&header(1501)).await.unwrap();
                    client.write_all(&masked(&[0; 1501])).await.unwrap();
                };
                tokio::select! {
                    () = reader => panic!("the connection ended"),
                    () = trickle => {}
                }
                assert_eq!(connection.inputs[0].next().await.unwrap().unwrap().len(), 1);
            });
        });
        assert!(peak < 2 << 20, "{peak}");
    }

    #[tokio::test]
    async fn what_no_message_may_say() {
        let check = async |protocol, pieces: &[&[u8]], expect: Result<&[u8], &str>| {
            let (feed, mut input) = Budget::new().channel();
            let mut feeds = Feeds { open: vec![Some(feed)], protocol, message: None };
            let mut taken = Ok(());
            for (at, piece) in pieces.iter().enumerate() {
                taken = feeds.take(Piece { bytes: (*piece).into(), last: at + 1 == pieces.len() }).await;
                if taken.is_err() {
                    break;
                }
            }
            drop(feeds);
            let mut passed = Vec::new();
            while let Some(chunk) = input.next().await.unwrap() {
                passed.extend_from_slice(&chunk);
            }
            assert_eq!(taken.map(|()| &passed[..]), expect, "{pieces:?}");
        };
        check(BINARY, &[b"\0a", b"", b"b"], Ok(b"ab")).await;
        check(BINARY, &[b""], Ok(b"")).await;
        check(BINARY, &[b"\xff", b"\0"], Ok(b"")).await;
        check(BINARY, &[b"\xff", b""], Err("the number of a channel has to follow a close signal")).await;
        check(BINARY, &[b"\xff\0", b"\0"], Err("more than one number of a channel follows a close signal")).await;
        check(BINARY, &[b"\xff\x01"], Err("a channel is closed that does not exist")).await;
        check(IN_BASE64, &[b"0", b"aG", b"k", b"="], Ok(b"hi")).await;
        check(IN_BASE64, &[b"0aGk=", b"aGk="], Err("a message is not base64")).await;
        check(IN_BASE64, &[b"0aG", b"k"], Err("a message is not base64")).await;
        check(IN_BASE64, &[b"0a?"], Err("a message is not base64")).await;
    }
}
