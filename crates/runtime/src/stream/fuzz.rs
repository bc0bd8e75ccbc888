//! Clients that speak no protocol, or a damaged one: their session ends, and took no more memory than a session may.

use fuzz::Target;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;

use super::activity::Activity;
use super::channel::{Input, Message, Outbox};
use super::websocket::{Framing, Protocol};
use super::{spdy, websocket};

/// More than a whole input, so that a client is never held up by us.
const PIPE: usize = 1 << 20;

fn current_thread() -> Runtime {
    tokio::runtime::Builder::new_current_thread().build().unwrap()
}

/// Both ends of a connection; the client has said `input` and hung up, and hears what is answered.
async fn client(input: &[u8]) -> (DuplexStream, tokio::task::JoinHandle<usize>) {
    let (mut ours, theirs) = tokio::io::duplex(PIPE);
    ours.write_all(input).await.unwrap();
    ours.shutdown().await.unwrap();
    let heard = tokio::spawn(async move {
        let (mut buffer, mut heard) = (vec![0; 4096], 0);
        while let Ok(count @ 1..) = ours.read(&mut buffer).await {
            heard += count;
        }
        heard
    });
    (theirs, heard)
}

/// What came on a channel until its end; `None` after a reset.
async fn drained(mut input: Input) -> Option<usize> {
    let mut bytes = 0;
    loop {
        match input.next().await {
            Ok(Some(chunk)) => bytes += chunk.len(),
            Ok(None) => return Some(bytes),
            Err(_) => return None,
        }
    }
}

/// Runs the two halves of a connection until the client has been heard to its end.
async fn served(reader: impl Future<Output = ()>, writer: impl Future<Output = ()>, outbox: Outbox) {
    let end = async {
        reader.await;
        let _ = outbox.send(Message::Close).await; // The writer may have ended.
    };
    tokio::join!(end, writer);
}

#[test]
fn fuzz_spdy() {
    let target = Target {
        name: "spdy",
        root: env!("CARGO_MANIFEST_DIR"),
        words: &[
            "streamtype",
            "stdin",
            "stdout",
            "error",
            "resize",
            "port",
            "requestid",
            "\u{0}\u{0}\u{0}\u{1}",
            "x\u{1}",
        ],
        memory_max: 16 << 20,
        meter: sys::meter::peak_of,
    };
    let runtime = current_thread();
    target.run(|input| {
        runtime.block_on(async {
            let (io, heard) = client(input).await;
            let activity = Activity::new();
            let (reader, writer, mut connection) = spdy::connect(io, &activity);
            let outbox = connection.outbox.clone();
            let session = tokio::spawn(async move {
                let (mut streams, mut opened) = (JoinSet::new(), Vec::new());
                while let Some(stream) = connection.incoming.recv().await {
                    opened.push(["streamtype", "port", "requestid"].map(|name| stream.headers.get(name).map(str::len)));
                    if opened.len() % 3 == 0 {
                        stream.refuse(spdy::status::PROTOCOL_ERROR).await;
                        continue;
                    }
                    let (input, _output) = stream.accept().await;
                    streams.spawn(drained(input));
                }
                (opened, streams.join_all().await.len())
            });
            served(reader, writer, outbox).await;
            (session.await.unwrap(), heard.await.unwrap().min(64))
        })
    });
}

#[test]
fn fuzz_websocket() {
    let target = Target {
        name: "websocket",
        root: env!("CARGO_MANIFEST_DIR"),
        words: &["\u{0}", "\u{1}", "\u{4}{\"Width\":1}", "0aGk=", "aGk", "\u{2}\u{8}\u{0}\u{0}\u{0}\u{0}"],
        memory_max: 16 << 20,
        meter: sys::meter::peak_of,
    };
    let protocols = [(Framing::Binary, true), (Framing::Base64, false)]
        .map(|(framing, half_close)| Protocol { framing, half_close });
    let runtime = current_thread();
    target.run(|input| {
        protocols.map(|protocol| {
            runtime.block_on(async {
                let (io, heard) = client(input).await;
                let activity = Activity::new();
                let (reader, writer, connection) = websocket::connect(io, protocol, 5, &activity);
                let outbox = connection.outbox.clone();
                let mut channels = JoinSet::new();
                for input in connection.inputs {
                    channels.spawn(drained(input));
                }
                served(reader, writer, outbox).await;
                let mut all = channels.join_all().await;
                all.sort();
                (all, heard.await.unwrap().min(64))
            })
        })
    });
}

#[test]
fn fuzz_websocket_tunnel() {
    let target = Target {
        name: "websocket",
        root: env!("CARGO_MANIFEST_DIR"),
        words: &["\u{2}"],
        memory_max: 16 << 20,
        meter: sys::meter::peak_of,
    };
    let runtime = current_thread();
    target.run(|input| {
        runtime.block_on(async {
            let (io, heard) = client(input).await;
            let (carry, mut inner) = websocket::tunnel(io);
            let listen = async {
                let mut bytes = Vec::new();
                let read = inner.read_to_end(&mut bytes).await;
                drop(inner);
                (read.is_ok(), bytes.len())
            };
            let ((), read) = tokio::join!(carry, listen);
            (read, heard.await.unwrap().min(64))
        })
    });
}
