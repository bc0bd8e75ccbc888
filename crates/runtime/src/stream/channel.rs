//! Byte channels between a session and its client, whatever multiplexes them: streams of SPDY, channels of a WebSocket.
//!
//! ```text
//! connection's reader ─► Feed ═══ queue ═══► Input  ─► session      bounded by one budget of bytes for all channels
//! connection's writer ◄═ Outbox ◄═══════════ Output ◄─ session      bounded by a few messages for all channels
//! ```
//!
//! Neither protocol has a window for each channel that its clients would respect. So when a session does not take what
//! one channel brings, the budget runs out and the whole connection is not read until it does.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

/// How many bytes one connection may have read ahead of its session.
const READ_AHEAD: usize = 256 * 1024;
/// The largest piece that is queued at once.
const PIECE_MAX: usize = 32 * 1024;
/// What a piece costs beside its bytes, so that a budget of bytes bounds the memory of small pieces too.
const PIECE_COST: usize = 128;
/// How many messages wait for the connection's writer.
const OUTBOX_LEN: usize = 8;

/// How much a connection may still read ahead.
#[derive(Clone)]
pub(super) struct Budget(Arc<Semaphore>);

impl Budget {
    pub(super) fn new() -> Self {
        Self(Arc::new(Semaphore::new(READ_AHEAD)))
    }

    /// A channel from the client to the session.
    pub(super) fn channel(&self) -> (Feed, Input) {
        let (queue, pieces) = mpsc::unbounded_channel();
        (Feed { queue, budget: self.clone() }, Input { pieces })
    }

    async fn take(&self, bytes: usize) -> OwnedSemaphorePermit {
        let count = u32::try_from(bytes + PIECE_COST).unwrap_or(u32::MAX);
        self.0.clone().acquire_many_owned(count).await.expect("the budget is never closed")
    }
}

enum Piece {
    Data(Chunk),
    Reset,
}

/// Bytes from the client; they count against the budget until this is dropped. They are its own: a part of what was read
/// would hold the whole, which the budget does not know.
pub(super) struct Chunk {
    bytes: Box<[u8]>,
    _budget: OwnedSemaphorePermit,
}

impl Deref for Chunk {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes
    }
}

/// The connection's end of what a client sends on one channel. The channel ends when this is dropped.
pub(super) struct Feed {
    queue: mpsc::UnboundedSender<Piece>,
    budget: Budget,
}

impl Feed {
    /// Passes a copy of these bytes on, and waits while too much is under way. What nobody wants any more is thrown away.
    pub(super) async fn send(&self, bytes: &[u8]) {
        for bytes in bytes.chunks(PIECE_MAX) {
            if self.queue.is_closed() {
                return;
            }
            let budget = self.budget.take(bytes.len()).await;
            // An error means that the session has dropped the input meanwhile.
            let _ = self.queue.send(Piece::Data(Chunk { bytes: bytes.into(), _budget: budget }));
        }
    }

    /// Ends the channel by the client's will to have nothing of it any more.
    pub(super) fn reset(self) {
        // As above.
        let _ = self.queue.send(Piece::Reset);
    }
}

/// The client has given up a channel, in both directions.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Reset;

/// What a client sends on one channel.
pub(super) struct Input {
    pieces: mpsc::UnboundedReceiver<Piece>,
}

impl Input {
    /// The next bytes; `None` at the end, or when the connection is gone. Cancel-safe.
    pub(super) async fn next(&mut self) -> Result<Option<Chunk>, Reset> {
        match self.pieces.recv().await {
            Some(Piece::Data(chunk)) => Ok(Some(chunk)),
            Some(Piece::Reset) => Err(Reset),
            None => Ok(None),
        }
    }
}

/// What the writer of a connection is to send.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Message {
    /// Bytes of a channel.
    Data { channel: u32, bytes: Bytes },
    /// The end of our direction of a channel.
    Finish { channel: u32 },
    /// The end of a channel in both directions, with a status of the protocol.
    Reset { channel: u32, status: u32 },
    /// A channel that the client opened is accepted.
    Accept { channel: u32 },
    /// The answer to a ping.
    Pong { id: u32 },
    /// The end of the connection; nothing is sent after it.
    Close,
}

/// The way to the connection's writer.
#[derive(Clone)]
pub(super) struct Outbox(mpsc::Sender<Message>);

/// The writer's end.
pub(super) type Outgoing = mpsc::Receiver<Message>;

impl Outbox {
    pub(super) fn new() -> (Self, Outgoing) {
        let (sender, receiver) = mpsc::channel(OUTBOX_LEN);
        (Self(sender), receiver)
    }

    /// Sends in the order of the calls; an error means that the connection is gone. Cancel-safe.
    pub(super) async fn send(&self, message: Message) -> Result<(), Reset> {
        self.0.send(message).await.map_err(|_| Reset)
    }

    /// Our direction of a channel.
    pub(super) fn channel(&self, channel: u32) -> Output {
        Output { channel, outbox: self.clone(), closed: Closed::default() }
    }
}

/// Whether a channel takes no more from the session. The [`Output`] and the connection's reader have a copy each.
#[derive(Clone, Default)]
pub(super) struct Closed(Arc<AtomicBool>);

impl Closed {
    /// Answers whether it was closed before.
    pub(super) fn set(&self) -> bool {
        self.0.swap(true, Ordering::Relaxed)
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Whether the session still has the output.
    pub(super) fn is_shared(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

/// What a session sends on one channel.
pub(super) struct Output {
    channel: u32,
    outbox: Outbox,
    closed: Closed,
}

impl Output {
    /// Waits while the client does not read. Cancel-safe: all is sent, or nothing.
    ///
    /// # Errors
    /// The channel is closed by either side, or the client is gone.
    pub(super) async fn send(&self, bytes: Bytes) -> Result<(), Reset> {
        if self.closed.is_set() {
            return Err(Reset);
        }
        self.outbox.send(Message::Data { channel: self.channel, bytes }).await
    }

    /// Tells the client that nothing more comes, unless the channel is closed already.
    pub(super) async fn finish(&self) {
        if !self.closed.set() {
            // A client that is gone needs to know nothing.
            let _ = self.outbox.send(Message::Finish { channel: self.channel }).await;
        }
    }

    /// Ends the channel in both directions, unless it is closed already.
    pub(super) async fn reset(&self, status: u32) {
        if !self.closed.set() {
            // As above.
            let _ = self.outbox.send(Message::Reset { channel: self.channel, status }).await;
        }
    }

    /// For the connection's reader.
    pub(super) fn closed(&self) -> Closed {
        self.closed.clone()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    /// A session that takes nothing stops the connection within the budget, and lets it go on when it does.
    #[tokio::test]
    async fn what_is_read_ahead_is_bounded() {
        let (feed, mut input) = Budget::new().channel();
        let sent = vec![7; 4 * READ_AHEAD];
        let mut sending = std::pin::pin!(feed.send(&sent));
        assert_eq!(sending.as_mut().now_or_never(), None);
        let queued = input.pieces.len() * PIECE_MAX;
        assert!((READ_AHEAD / 2..=READ_AHEAD).contains(&queued), "{queued}");
        let receive = async {
            let mut received = Vec::new();
            while received.len() < sent.len() {
                received.extend_from_slice(&input.next().await.unwrap().unwrap());
            }
            received
        };
        let ((), received) = tokio::join!(sending, receive);
        assert_eq!(received, sent);
    }
}
