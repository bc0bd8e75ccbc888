//! A plugin's socket: calls to it with their answers, and calls from it.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::api::{TtrpcRequest, TtrpcResponse, TtrpcStatus};
use crate::wire::{self, Decoder, Message, WireError};

const SERVICE: &str = "nri.pkg.api.v1alpha1.Plugin";
/// gRPC's code for a call that there is not.
pub(crate) const UNIMPLEMENTED: i32 = 12;
const UNKNOWN: i32 = 2;
const CHUNK: usize = 16 << 10;
/// Messages that wait for a plugin which does not read, and calls of it that wait for the runtime (R6).
const QUEUE_MAX: usize = 64;

/// Why a call came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CallError {
    /// The plugin is gone, or was let go.
    #[error("the connection is closed")]
    Closed,
    /// It takes too long.
    #[error("no answer within {} ms", .0.as_millis())]
    TimedOut(Duration),
    /// What it was to be asked is more than can be sent, for which it can do nothing.
    #[error("it cannot be asked: {0}")]
    TooLong(WireError),
    /// The answer is none.
    #[error("{0}")]
    Protocol(String),
    /// It says no.
    #[error("{message}")]
    Refused {
        /// gRPC's.
        code: i32,
        /// Its own words.
        message: String,
    },
}

/// A call of the plugin's.
#[derive(Debug)]
pub(crate) struct Incoming {
    pub(crate) stream: u32,
    pub(crate) method: String,
    pub(crate) payload: Vec<u8>,
}

/// The runtime's end.
#[derive(Debug)]
pub(crate) struct Connection {
    out: mpsc::Sender<Vec<u8>>,
    /// Guards who waits for which answer.
    state: Mutex<State>,
    closed: CancellationToken,
}

#[derive(Debug, Default)]
struct State {
    stream_last: Option<u32>,
    waiting: HashMap<u32, oneshot::Sender<TtrpcResponse>>,
}

impl Connection {
    /// The connection, its calls, and what has to run for it to work; that ends with the connection.
    pub(crate) fn new(
        socket: UnixStream,
    ) -> (std::sync::Arc<Self>, mpsc::Receiver<Incoming>, impl Future<Output = ()> + Send + 'static) {
        let (reader, writer) = socket.into_split();
        let (out, to_write) = mpsc::channel(QUEUE_MAX);
        let (calls, incoming) = mpsc::channel(QUEUE_MAX);
        let connection = std::sync::Arc::new(Self { out, state: Mutex::default(), closed: CancellationToken::new() });
        let served = connection.clone();
        let work = async move {
            tokio::select! {
                () = served.closed.cancelled() => {}
                () = write(writer, to_write) => {}
                error = served.read(reader, calls) => {
                    if let Some(error) = error {
                        tracing::warn!(error, "a plugin does not keep to the protocol");
                    }
                }
            }
            served.close();
        };
        (connection, incoming, work)
    }

    /// Ends it; whoever waits for an answer hears of it.
    pub(crate) fn close(&self) {
        self.closed.cancel();
        self.state().waiting.clear();
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.closed.is_cancelled()
    }

    /// Waits for its end.
    pub(crate) async fn ended(&self) {
        self.closed.cancelled().await;
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every section leaves it whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls the plugin.
    pub(crate) async fn call<Answer: prost::Message + Default>(
        &self,
        method: &str,
        request: &impl prost::Message,
        limit: Duration,
    ) -> Result<Answer, CallError> {
        let answered = timeout(limit, self.ask(method, request.encode_to_vec(), limit)).await;
        let response = answered.map_err(|_| CallError::TimedOut(limit))??;
        if let Some(TtrpcStatus { code: code @ 1.., message }) = response.status {
            return Err(CallError::Refused { code, message });
        }
        Answer::decode(response.payload.as_slice()).map_err(|error| CallError::Protocol(format!("{method}: {error}")))
    }

    async fn ask(&self, method: &str, payload: Vec<u8>, limit: Duration) -> Result<TtrpcResponse, CallError> {
        let request = TtrpcRequest {
            service: SERVICE.to_owned(),
            method: method.to_owned(),
            payload,
            timeout_nano: i64::try_from(limit.as_nanos()).unwrap_or(i64::MAX),
            metadata: Vec::new(),
        };
        let payload = request.encode_to_vec();
        let (sender, answer) = oneshot::channel();
        // The place in the queue first: streams have to arrive in the order of their numbers.
        let place = self.out.reserve().await.map_err(|_| CallError::Closed)?;
        let stream = {
            let mut state = self.state();
            let stream = state.stream_last.map_or(1, |last| last.wrapping_add(2));
            let message = Message { connection: wire::PLUGIN, stream, kind: wire::REQUEST, payload };
            let bytes = wire::encode(&message).map_err(CallError::TooLong)?;
            state.stream_last = Some(stream);
            state.waiting.insert(stream, sender);
            place.send(bytes);
            stream
        };
        let waiting = Waiting { connection: self, stream };
        if self.is_closed() {
            return Err(CallError::Closed);
        }
        let answer = answer.await.map_err(|_| CallError::Closed);
        drop(waiting);
        answer
    }

    /// Answers a call of the plugin's.
    pub(crate) async fn answer(&self, stream: u32, answer: Result<Vec<u8>, String>) {
        let response = match answer {
            Ok(payload) => TtrpcResponse { status: None, payload },
            Err(message) => TtrpcResponse { status: Some(TtrpcStatus { code: UNKNOWN, message }), payload: Vec::new() },
        };
        let payload = response.encode_to_vec();
        let message = Message { connection: wire::RUNTIME, stream, kind: wire::RESPONSE, payload };
        if let Ok(bytes) = wire::encode(&message) {
            let _ = self.out.send(bytes).await; // It may have gone.
        }
    }

    /// Reads to the end; a reason unless it is just that.
    async fn read(&self, mut reader: OwnedReadHalf, calls: mpsc::Sender<Incoming>) -> Option<String> {
        let (mut decoder, mut buffer) = (Decoder::default(), vec![0; CHUNK]);
        loop {
            let count = reader.read(&mut buffer).await.ok().filter(|count| *count > 0)?;
            if let Err(error) = decoder.push(&buffer[..count]) {
                return Some(error.to_string());
            }
            loop {
                match decoder.next() {
                    Ok(None) => break,
                    Ok(Some(message)) => {
                        if let Err(error) = self.take(message, &calls) {
                            return Some(error);
                        }
                    }
                    Err(error) => return Some(error.to_string()),
                }
            }
        }
    }

    fn take(&self, message: Message, calls: &mpsc::Sender<Incoming>) -> Result<(), String> {
        match (message.connection, message.kind) {
            (wire::PLUGIN, wire::RESPONSE) => {
                let response = TtrpcResponse::decode(message.payload.as_slice()).map_err(|error| error.to_string())?;
                // Whoever asked may have given up.
                if let Some(waiting) = self.state().waiting.remove(&message.stream) {
                    let _ = waiting.send(response);
                }
                Ok(())
            }
            (wire::RUNTIME, wire::REQUEST) => {
                let request = TtrpcRequest::decode(message.payload.as_slice()).map_err(|error| error.to_string())?;
                let call = Incoming { stream: message.stream, method: request.method, payload: request.payload };
                calls.try_send(call).map_err(|_| "it calls faster than it is answered".to_owned())
            }
            (connection, kind) => Err(format!("a message of kind {kind} on connection {connection}")),
        }
    }
}

/// A call whose answer is not there.
struct Waiting<'a> {
    connection: &'a Connection,
    stream: u32,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.connection.state().waiting.remove(&self.stream);
    }
}

async fn write(mut writer: OwnedWriteHalf, mut messages: mpsc::Receiver<Vec<u8>>) {
    while let Some(bytes) = messages.recv().await {
        if writer.write_all(&bytes).await.is_err() {
            return;
        }
    }
}
