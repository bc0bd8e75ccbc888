//! Exec and attach: a process's streams joined with a client's channels.
//!
//! ```text
//! client ─ stdin ──► process ─┬─ stdout ─► client
//!        ─ resize ─►          ├─ stderr ─► client
//!                             ╰─ exit, and all output sent ─► status ─► client
//! ```

use std::collections::HashMap;
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cri::{Error, v1};
use serde::Deserialize;
use tokio::time::Instant;

use super::backend::{Backend, Process, Session, Stdio, WindowSize};
use super::channel::{Input, Output};
use super::descriptor::Descriptor;
use super::spdy;
use super::status::{End, Format};
use super::upgrade::Version;
use super::websocket;

/// How long a client may take to open its streams; upstream's number.
pub(super) const CREATION_MAX: Duration = Duration::from_secs(30);
/// Bytes of output that are passed on at once.
const CHUNK: usize = 32 * 1024;
/// The longest size of a terminal that is waited for; it is a line of JSON.
const SIZE_MAX: usize = 1024;
/// What a terminal takes for the end of input: the first ends a line that was begun, the second is the end itself.
const END_OF_INPUT: &[u8] = b"\x04\x04";

/// What a client asked for.
pub(super) enum Request {
    Exec(v1::ExecRequest),
    Attach(v1::AttachRequest),
}

/// The streams of a request.
#[derive(Clone, Copy)]
struct Wanted {
    stdin: bool,
    stdout: bool,
    stderr: bool,
    tty: bool,
}

impl Request {
    fn wanted(&self) -> Wanted {
        match *self {
            Self::Exec(v1::ExecRequest { stdin, stdout, stderr, tty, .. })
            | Self::Attach(v1::AttachRequest { stdin, stdout, stderr, tty, .. }) => {
                Wanted { stdin, stdout, stderr, tty }
            }
        }
    }

    fn doing(&self) -> &'static str {
        match self {
            Self::Exec(_) => "executing command in",
            Self::Attach(_) => "attaching to",
        }
    }

    /// The streams that a client of SPDY opens for this request, by their header `streamType`.
    fn stream_types(&self, version: Version) -> Vec<&'static str> {
        let Wanted { stdin, stdout, stderr, tty } = self.wanted();
        let types = [
            ("error", true),
            ("stdin", stdin),
            ("stdout", stdout),
            ("stderr", stderr),
            ("resize", tty && version.resize),
        ];
        types.into_iter().filter(|(_, wanted)| *wanted).map(|(name, _)| name).collect()
    }
}

/// A client's channels.
pub(super) struct Channels {
    stdin: Option<Input>,
    stdout: Option<Output>,
    stderr: Option<Output>,
    error: Output,
    resize: Option<Input>,
    end: Format,
}

/// Numbers of the channels of a WebSocket.
mod number {
    pub(super) const STDIN: usize = 0;
    pub(super) const STDOUT: u32 = 1;
    pub(super) const STDERR: u32 = 2;
    pub(super) const ERROR: u32 = 3;
    pub(super) const RESIZE: usize = 4;
}

/// How many channels a WebSocket has for a command.
pub(super) const CHANNELS: usize = 5;

impl Channels {
    /// Takes the channels of a WebSocket.
    pub(super) async fn of_websocket(connection: websocket::Connection, request: &Request, version: Version) -> Self {
        let wanted = request.wanted();
        let mut inputs = connection.inputs.into_iter();
        let (stdin, resize) = (inputs.nth(number::STDIN), inputs.nth(number::RESIZE - number::STDIN - 1));
        let channels = Self {
            stdin: stdin.filter(|_| wanted.stdin),
            stdout: wanted.stdout.then(|| connection.outbox.channel(number::STDOUT)),
            stderr: wanted.stderr.then(|| connection.outbox.channel(number::STDERR)),
            error: connection.outbox.channel(number::ERROR),
            resize: resize.filter(|_| wanted.tty),
            end: version.end,
        };
        // An empty message tells old clients that the session is there.
        let first = channels.stdout.as_ref().or(channels.stderr.as_ref()).unwrap_or(&channels.error);
        // A client that is gone is noticed by the connection's reader.
        let _ = first.send(Bytes::new()).await;
        channels
    }

    /// Waits until the client has opened the streams of its request. `None`: it did not do so in time.
    pub(super) async fn of_spdy(mut connection: spdy::Connection, request: &Request, version: Version) -> Option<Self> {
        let types = request.stream_types(version);
        let deadline = Instant::now() + CREATION_MAX;
        let mut opened = HashMap::new();
        while opened.len() < types.len() {
            let Ok(stream) = tokio::time::timeout_at(deadline, connection.incoming.recv()).await else {
                tracing::debug!(?types, "a streaming client did not open its streams in time");
                return None;
            };
            let stream = stream?;
            let known = types.iter().find(|name| stream.headers.get("streamtype") == Some(**name));
            match known {
                Some(name) if !opened.contains_key(name) => drop(opened.insert(name, stream.accept().await)),
                _ => stream.refuse(spdy::status::PROTOCOL_ERROR).await,
            }
        }
        let mut input = |name| opened.remove(name).map(|(input, _)| input);
        let (stdin, resize) = (input(&"stdin"), input(&"resize"));
        let mut output = |name| opened.remove(name).map(|(_, output)| output);
        let (stdout, stderr, error) = (output(&"stdout"), output(&"stderr"), output(&"error")?);
        Some(Self { stdin, stdout, stderr, error, resize, end: version.end })
    }
}

/// Runs a session to its end, and tells the client how it ended.
pub(super) async fn run(backend: &dyn Backend, request: Request, channels: Channels) {
    let doing = request.doing();
    let exec = matches!(request, Request::Exec(_));
    let started = match request {
        Request::Exec(request) => backend.exec(request).await,
        Request::Attach(request) => backend.attach(request).await,
    };
    let Channels { stdin, stdout, stderr, error, resize, end: format } = channels;
    let ended = match started.and_then(Ends::new) {
        Ok(ends) => join(ends, stdin, [stdout, stderr], resize, exec).await,
        Err(error) => Err(error),
    };
    let end = match ended {
        // How an attached container ends is none of the client's business: it may have attached to one of many.
        Ok(code) if exec && code != 0 => End::ExitCode(code),
        Ok(_) => End::Success,
        Err(error) => End::Failed { doing, error },
    };
    if let Some(bytes) = end.encode(format) {
        // A client that is gone is noticed by the connection's reader.
        let _ = error.send(bytes).await;
    }
    error.finish().await;
}

/// Our ends of a process.
struct Ends {
    stdin: Option<Arc<Descriptor>>,
    outputs: [Option<Arc<Descriptor>>; 2],
    /// Whether the process has a terminal of its own.
    terminal: bool,
    process: Box<dyn Process>,
}

impl Ends {
    fn new(session: Session) -> Result<Self, Error> {
        let open = |fd: OwnedFd| {
            let opened = Descriptor::new(fd).map(Arc::new);
            opened.map_err(|error| Error::Internal(format!("poll a stream of the process: {error}")))
        };
        let process = session.process;
        Ok(match session.stdio {
            Stdio::Pipes { stdin, stdout, stderr } => Self {
                stdin: stdin.map(open).transpose()?,
                outputs: [stdout.map(open).transpose()?, stderr.map(open).transpose()?],
                terminal: false,
                process,
            },
            Stdio::Terminal(master) => {
                let master = open(master)?;
                Self { stdin: Some(master.clone()), outputs: [Some(master), None], terminal: true, process }
            }
        })
    }
}

/// Joins the process's streams with the client's until the process has ended and all of its output is sent.
async fn join(
    ends: Ends,
    stdin: Option<Input>,
    [stdout, stderr]: [Option<Output>; 2],
    resize: Option<Input>,
    exec: bool,
) -> Result<i32, Error> {
    let Ends { stdin: input, outputs: [first, second], terminal, process } = ends;
    let process = &*process;
    let has_output = first.is_some() || second.is_some();
    let output = async {
        tokio::join!(pass_output(first, stdout), pass_output(second, stderr));
    };
    let ended = async {
        if exec || !has_output {
            // A background process that holds the output keeps the session open, as under containerd.
            tokio::join!(output, process.wait()).1
        } else {
            output.await;
            Ok(0)
        }
    };
    let input = async {
        tokio::join!(pass_input(stdin, input, terminal), pass_sizes(resize, process));
        std::future::pending::<Infallible>().await
    };
    tokio::select! {
        ended = ended => ended,
        never = input => match never {},
    }
}

/// Copies a process's output to the client, or away if the client does not want it: the process must not block.
async fn pass_output(from: Option<Arc<Descriptor>>, to: Option<Output>) {
    let Some(from) = from else { return };
    let mut buffer = vec![0; CHUNK];
    loop {
        // An error of the kernel ends the stream as its end does; what had been written has been read.
        let count = from.read(&mut buffer).await.unwrap_or(0);
        if count == 0 {
            break;
        }
        if let Some(to) = &to
            && to.send(Bytes::copy_from_slice(&buffer[..count])).await.is_err()
        {
            return;
        }
    }
    if let Some(to) = to {
        to.finish().await;
    }
}

/// Copies what the client sends to a process. At its end a pipe is closed, and a terminal is told.
async fn pass_input(from: Option<Input>, to: Option<Arc<Descriptor>>, terminal: bool) {
    let (Some(mut from), Some(to)) = (from, to) else { return };
    while let Ok(chunk) = from.next().await {
        let written = match &chunk {
            Some(chunk) => to.write_all(chunk).await,
            None if terminal => to.write_all(END_OF_INPUT).await,
            None => return,
        };
        if chunk.is_none() || written.is_err() {
            // Who has closed its standard input is not interested in more of it.
            return;
        }
    }
}

/// A size of a terminal, as clients write it.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Size {
    width: u16,
    height: u16,
}

/// Passes the sizes of the client's terminal on.
async fn pass_sizes(from: Option<Input>, process: &dyn Process) {
    let Some(mut from) = from else { return };
    let mut text = Vec::new();
    while let Ok(Some(chunk)) = from.next().await {
        text.extend_from_slice(&chunk);
        let mut sizes = serde_json::Deserializer::from_slice(&text).into_iter::<Size>();
        let newest = sizes.by_ref().map_while(Result::ok).last();
        let consumed = sizes.byte_offset();
        text.drain(..consumed);
        if text.len() > SIZE_MAX {
            tracing::debug!("a streaming client sends no sizes of a terminal");
            return;
        }
        // A terminal without lines or columns is none: some clients say so before they know better.
        if let Some(Size { width: columns @ 1.., height: rows @ 1.. }) = newest
            && let Err(error) = process.resize(WindowSize { rows, columns }).await
        {
            tracing::debug!(%error, "a terminal was not resized");
        }
    }
}
