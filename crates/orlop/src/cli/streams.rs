//! `exec`, `attach`, `port-forward` and `cp`: WebSocket streams to the node, in the protocol of kubectl.

use std::os::fd::AsFd as _;
use std::process::ExitCode;

use anyhow::{Context as _, bail};
use cluster::percent::encode;
use futures_util::{SinkExt as _, StreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use super::client::Client;
use super::{container_of, find_pod};
use crate::args::{AttachOptions, CpOptions, ExecOptions, PortForwardOptions};

/// Channels of `v5.channel.k8s.io`: the first byte of each message.
mod channel {
    pub(super) const STDIN: u8 = 0;
    pub(super) const STDOUT: u8 = 1;
    pub(super) const STDERR: u8 = 2;
    pub(super) const ERROR: u8 = 3;
    pub(super) const RESIZE: u8 = 4;
    /// Followed by the number of the channel that ends.
    pub(super) const CLOSE: u8 = 255;
}

const REMOTE_COMMAND: &str = "v5.channel.k8s.io";
const PORT_FORWARD: &str = "v4.channel.k8s.io";

/// Bytes read from a stream at once.
const CHUNK: usize = 32 * 1024;

/// What became of the command is not known then.
const NO_END: &str = "the node ended the stream before the command ended, it may have been restarted: look whether the command \
                      has done its work before you repeat it";

type Socket = WebSocketStream<UnixStream>;

/// Which streams a session has.
#[derive(Debug, Clone, Copy)]
struct Streams {
    stdin: bool,
    tty: bool,
}

/// `orlop exec`; the command's exit code is ours.
pub(crate) async fn exec(client: &Client, options: &ExecOptions) -> anyhow::Result<ExitCode> {
    let pod = find_pod(client, &options.pod.namespace.namespace, &options.pod.pod).await?;
    let container = container_of(&pod, options.container.as_deref())?;
    let streams = Streams { stdin: options.stdin, tty: options.tty };
    let socket = open_exec(client, &pod, &container, &options.command, streams).await?;
    terminal_session(socket, streams).await?.context(NO_END)
}

/// `orlop attach`.
pub(crate) async fn attach(client: &Client, options: &AttachOptions) -> anyhow::Result<ExitCode> {
    let pod = find_pod(client, &options.pod.namespace.namespace, &options.pod.pod).await?;
    let container = container_of(&pod, options.container.as_deref())?;
    let streams = Streams { stdin: options.stdin, tty: options.tty };
    let path = format!("/attach/{}?{}", place(&pod, &container), stream_query(streams));
    // The end of a container that was only looked at is no failure.
    Ok(terminal_session(open(client, &path, REMOTE_COMMAND).await?, streams).await?.unwrap_or(ExitCode::SUCCESS))
}

async fn open_exec(
    client: &Client,
    pod: &Pod,
    container: &str,
    command: &[String],
    streams: Streams,
) -> anyhow::Result<Socket> {
    let words: String = command.iter().map(|word| format!("&command={}", encode(word))).collect();
    open(client, &format!("/exec/{}?{}{words}", place(pod, container), stream_query(streams)), REMOTE_COMMAND).await
}

async fn open(client: &Client, path: &str, protocol: &str) -> anyhow::Result<Socket> {
    let mut request = format!("ws://localhost{path}").into_client_request()?;
    request.headers_mut().insert("sec-websocket-protocol", protocol.parse()?);
    let (socket, _) =
        tokio_tungstenite::client_async(request, client.connect().await?).await.map_err(|error| match error {
            tokio_tungstenite::tungstenite::Error::Http(response) => {
                let body =
                    response.body().as_deref().map(String::from_utf8_lossy).unwrap_or_default().trim().to_owned();
                anyhow::anyhow!("the node refused: {} {body}", response.status())
            }
            other => anyhow::Error::new(other).context("the node did not open a stream"),
        })?;
    Ok(socket)
}

fn place(pod: &Pod, container: &str) -> String {
    let metadata = &pod.metadata;
    format!(
        "{}/{}/{container}",
        metadata.namespace.as_deref().unwrap_or("default"),
        metadata.name.as_deref().unwrap_or_default()
    )
}

fn stream_query(streams: Streams) -> String {
    format!("input={}&output=1&error={}&tty={}", u8::from(streams.stdin), u8::from(!streams.tty), u8::from(streams.tty))
}

/// Our own terminal, raw while this value lives.
struct RawTerminal {
    before: rustix::termios::Termios,
}

impl RawTerminal {
    fn enter() -> anyhow::Result<Option<Self>> {
        let stdin = std::io::stdin();
        if !rustix::termios::isatty(stdin.as_fd()) {
            return Ok(None);
        }
        let before = rustix::termios::tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(stdin.as_fd(), rustix::termios::OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone; then nobody looks at it either.
        let _ =
            rustix::termios::tcsetattr(std::io::stdin().as_fd(), rustix::termios::OptionalActions::Now, &self.before);
    }
}

/// Joins our stdin, stdout and stderr with a session until it ends. None when the node does not tell how it did.
async fn terminal_session(mut socket: Socket, streams: Streams) -> anyhow::Result<Option<ExitCode>> {
    let raw = if streams.tty && streams.stdin { RawTerminal::enter()? } else { None };
    let mut resized = signal(SignalKind::window_change())?;
    if streams.tty {
        send_size(&mut socket).await?;
    }
    let mut stdin = streams.stdin.then(tokio_stdin);
    let mut stdout = std::io::stdout();
    let code = loop {
        tokio::select! {
            message = socket.next() => match message {
                Some(Ok(Message::Binary(bytes))) => {
                    if let Some(code) = take(&bytes, &mut stdout)? { break Some(code); }
                }
                Some(Ok(Message::Close(_))) | None => break None,
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(error).context("the stream broke"),
            },
            _ = resized.recv(), if streams.tty => send_size(&mut socket).await?,
            Some(input) = next_input(&mut stdin) => match input {
                Some(bytes) => socket.send(framed(channel::STDIN, &bytes)).await?,
                None => {
                    stdin = None;
                    socket.send(framed(channel::CLOSE, &[channel::STDIN])).await?;
                }
            },
        }
    };
    drop(raw);
    Ok(code)
}

type Input = mpsc::Receiver<Option<Vec<u8>>>;

/// Our stdin as messages; `None` is its end. Read on a thread of its own: a terminal cannot be polled portably.
fn tokio_stdin() -> Input {
    let (sender, receiver) = mpsc::channel(4);
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        loop {
            match std::io::Read::read(&mut std::io::stdin(), &mut buffer) {
                Ok(0) | Err(_) => {
                    // Nobody listens any more: the session has ended.
                    let _ = sender.blocking_send(None);
                    return;
                }
                Ok(count) => {
                    if sender.blocking_send(Some(buffer[..count].to_vec())).is_err() {
                        return;
                    }
                }
            }
        }
    });
    receiver
}

async fn next_input(stdin: &mut Option<Input>) -> Option<Option<Vec<u8>>> {
    match stdin {
        Some(stdin) => stdin.recv().await,
        None => std::future::pending().await,
    }
}

fn framed(channel: u8, bytes: &[u8]) -> Message {
    let mut message = Vec::with_capacity(bytes.len() + 1);
    message.push(channel);
    message.extend_from_slice(bytes);
    Message::Binary(message.into())
}

async fn send_size(socket: &mut Socket) -> anyhow::Result<()> {
    let Ok(size) = rustix::termios::tcgetwinsize(std::io::stdout().as_fd()) else { return Ok(()) };
    let text = format!("{{\"Width\":{},\"Height\":{}}}", size.ws_col, size.ws_row);
    Ok(socket.send(framed(channel::RESIZE, text.as_bytes())).await?)
}

/// Writes what a message carries; the message on the error channel ends the session with a code.
fn take(message: &[u8], stdout: &mut impl std::io::Write) -> anyhow::Result<Option<ExitCode>> {
    let Some((&channel, bytes)) = message.split_first() else { return Ok(None) };
    match channel {
        channel::STDOUT => {
            stdout.write_all(bytes)?;
            stdout.flush()?;
        }
        channel::STDERR => std::io::Write::write_all(&mut std::io::stderr(), bytes)?,
        channel::ERROR if !bytes.is_empty() => return exit_code(bytes).map(Some),
        _ => {}
    }
    Ok(None)
}

/// The exit code in the `metav1.Status` that ends a session.
fn exit_code(status: &[u8]) -> anyhow::Result<ExitCode> {
    let status: serde_json::Value =
        serde_json::from_slice(status).context("the node ended the session with an unknown message")?;
    if status["status"] == "Success" {
        return Ok(ExitCode::SUCCESS);
    }
    let causes = status["details"]["causes"].as_array().cloned().unwrap_or_default();
    let code = causes
        .iter()
        .find(|cause| cause["reason"] == "ExitCode")
        .and_then(|cause| cause["message"].as_str()?.parse::<u8>().ok());
    match code {
        Some(code) => Ok(ExitCode::from(code)),
        None => bail!("{}", status["message"].as_str().unwrap_or("the session failed without a reason")),
    }
}

/// `orlop port-forward`.
pub(crate) async fn port_forward(client: &Client, options: &PortForwardOptions) -> anyhow::Result<()> {
    let pod = find_pod(client, &options.namespace.namespace, &options.pod).await?;
    let mut forwards = tokio::task::JoinSet::new();
    for port in &options.ports {
        let (local, remote) = parse_ports(port)?;
        let listener = TcpListener::bind((options.address, local))
            .await
            .with_context(|| format!("listen on {}:{local}", options.address))?;
        eprintln!("Forwarding from {} -> {remote}", listener.local_addr()?);
        forwards.spawn(accept(client.clone(), pod.clone(), listener, remote));
    }
    while let Some(ended) = forwards.join_next().await {
        ended??;
    }
    Ok(())
}

/// `8080:80`, `80`, or `:80` for a free local port.
fn parse_ports(text: &str) -> anyhow::Result<(u16, u16)> {
    let parse =
        |number: &str| number.parse::<u16>().with_context(|| format!("{text:?}: a port is a number from 1 to 65535"));
    match text.split_once(':') {
        None => parse(text).map(|port| (port, port)),
        Some(("", remote)) => Ok((0, parse(remote)?)),
        Some((local, remote)) => Ok((parse(local)?, parse(remote)?)),
    }
}

/// Each connection is a session of its own, so that a reset ends one and not all.
async fn accept(client: Client, pod: Pod, listener: TcpListener, remote: u16) -> anyhow::Result<()> {
    let mut sessions = tokio::task::JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (connection, _) = accepted?;
                let (client, pod) = (client.clone(), pod.clone());
                sessions.spawn(async move {
                    if let Err(error) = forward(&client, &pod, connection, remote).await {
                        eprintln!("port {remote}: {error:#}");
                    }
                });
            }
            Some(_) = sessions.join_next() => {}
        }
    }
}

async fn forward(client: &Client, pod: &Pod, mut local: TcpStream, remote: u16) -> anyhow::Result<()> {
    let (namespace, name) =
        (pod.metadata.namespace.as_deref().unwrap_or("default"), pod.metadata.name.as_deref().unwrap_or_default());
    let mut socket = open(client, &format!("/portForward/{namespace}/{name}?port={remote}"), PORT_FORWARD).await?;
    let mut buffer = vec![0; CHUNK];
    // The first message of either channel carries the port number, not data.
    let (mut data_opened, mut error_opened) = (false, false);
    loop {
        tokio::select! {
            read = local.read(&mut buffer) => match read? {
                0 => { socket.close(None).await?; return Ok(()); }
                count => socket.send(framed(0, &buffer[..count])).await?,
            },
            message = socket.next() => {
                let Some(Message::Binary(bytes)) = message.transpose()? else { return Ok(()) };
                match bytes.split_first() {
                    Some((0, data)) if data_opened => local.write_all(data).await?,
                    Some((0, _)) => data_opened = true,
                    Some((1, text)) if error_opened => bail!("{}", String::from_utf8_lossy(text)),
                    Some((1, _)) => error_opened = true,
                    _ => {}
                }
            }
        }
    }
}

/// One side of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Local(String),
    Pod { namespace: Option<String>, pod: String, path: String },
}

fn parse_place(text: &str) -> Place {
    match text.split_once(':') {
        Some((pod, path)) if !pod.starts_with(['/', '.']) => {
            let (namespace, pod) =
                pod.split_once('/').map_or((None, pod), |(namespace, pod)| (Some(namespace.to_owned()), pod));
            Place::Pod { namespace, pod: pod.to_owned(), path: path.to_owned() }
        }
        _ => Place::Local(text.to_owned()),
    }
}

/// `orlop cp`: a tar stream through exec, as kubectl does it.
pub(crate) async fn cp(client: &Client, options: &CpOptions) -> anyhow::Result<()> {
    match (parse_place(&options.source), parse_place(&options.target)) {
        (Place::Pod { namespace, pod, path }, Place::Local(target)) => {
            let (pod, container) = remote(client, options, namespace, &pod).await?;
            download(client, &pod, &container, &path, &target).await
        }
        (Place::Local(source), Place::Pod { namespace, pod, path }) => {
            let (pod, container) = remote(client, options, namespace, &pod).await?;
            upload(client, &pod, &container, &source, &path).await
        }
        _ => bail!("one side has to be a local path and the other POD:PATH"),
    }
}

async fn remote(
    client: &Client,
    options: &CpOptions,
    namespace: Option<String>,
    pod: &str,
) -> anyhow::Result<(Pod, String)> {
    let namespace = namespace.unwrap_or_else(|| options.namespace.namespace.clone());
    let pod = find_pod(client, &namespace, pod).await?;
    let container = container_of(&pod, options.container.as_deref())?;
    Ok((pod, container))
}

/// Chunks of an archive between a session and the thread that makes or unpacks it: neither is held as a whole.
mod conveyor {
    use std::io::{self, Read, Write};

    use tokio::sync::mpsc::{Receiver, Sender};

    /// Reads the chunks that come.
    pub(super) struct Incoming {
        pub(super) chunks: Receiver<Vec<u8>>,
        pub(super) rest: io::Cursor<Vec<u8>>,
    }

    impl Read for Incoming {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            loop {
                let count = self.rest.read(buffer)?;
                if count > 0 || buffer.is_empty() {
                    return Ok(count);
                }
                match self.chunks.blocking_recv() {
                    Some(chunk) => self.rest = io::Cursor::new(chunk),
                    None => return Ok(0),
                }
            }
        }
    }

    /// Sends what is written.
    pub(super) struct Outgoing(pub(super) Sender<Vec<u8>>);

    impl Write for Outgoing {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.blocking_send(bytes.to_vec()).map_err(|_| io::ErrorKind::BrokenPipe)?;
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
}

/// Chunks that wait to be taken.
const CHUNKS: usize = 8;

/// Runs `command` to its end, with what `input` gives as its stdin and `output` as its stdout.
async fn run_in(
    mut socket: Socket,
    command: &str,
    mut input: Option<mpsc::Receiver<Vec<u8>>>,
    output: Option<mpsc::Sender<Vec<u8>>>,
) -> anyhow::Result<()> {
    loop {
        tokio::select! {
            message = socket.next() => match message.transpose().context("the stream broke")? {
                Some(Message::Binary(bytes)) => match (bytes.split_first(), &output) {
                    // Who unpacks has told already why he has ended.
                    (Some((&channel::STDOUT, data)), Some(output)) => {
                        output.send(data.to_vec()).await.context("the archive is not read to its end")?;
                    }
                    _ => if let Some(code) = take(&bytes, &mut std::io::sink())? {
                        anyhow::ensure!(code == ExitCode::SUCCESS, "`{command}` failed in the container");
                        return Ok(());
                    },
                },
                Some(Message::Close(_)) | None => bail!(NO_END),
                Some(_) => {}
            },
            chunk = async { input.as_mut()?.recv().await }, if input.is_some() => match chunk {
                Some(chunk) => for chunk in chunk.chunks(CHUNK) {
                    socket.send(framed(channel::STDIN, chunk)).await?;
                },
                None => {
                    input = None;
                    socket.send(framed(channel::CLOSE, &[channel::STDIN])).await?;
                }
            },
        }
    }
}

/// Where a path of a container is, and what it is called there.
fn split(path: &str) -> anyhow::Result<(&str, &str)> {
    let trimmed = path.trim_end_matches('/');
    let (parent, name) = trimmed.rsplit_once('/').unwrap_or((".", trimmed));
    if matches!(name, "" | "." | "..") {
        bail!("{path:?} has no name of its own: name the file or directory in the container, as in POD:/etc/hosts");
    }
    Ok((if parent.is_empty() { "/" } else { parent }, name))
}

fn words(command: &[&str]) -> Vec<String> {
    command.iter().map(|word| (*word).to_owned()).collect()
}

async fn download(client: &Client, pod: &Pod, container: &str, path: &str, target: &str) -> anyhow::Result<()> {
    let (parent, name) = split(path)?;
    let command = words(&["tar", "cf", "-", "-C", parent, "--", name]);
    let socket = open_exec(client, pod, container, &command, Streams { stdin: false, tty: false }).await?;
    let target = std::path::Path::new(target);
    let into = if target.is_dir() { target.join(name) } else { target.to_owned() };
    let scratch = into.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(std::path::Path::new("."));
    let unpacked = scratch.join(format!(".orlop-cp-{}", std::process::id()));
    std::fs::create_dir(&unpacked).with_context(|| format!("create {}", unpacked.display()))?;
    let (sender, chunks) = mpsc::channel(CHUNKS);
    let place = unpacked.clone();
    let unpacking =
        tokio::task::spawn_blocking(move || unpack(conveyor::Incoming { chunks, rest: Default::default() }, &place));
    let ran = run_in(socket, &command.join(" "), None, Some(sender)).await;
    let written = match unpacking.await? {
        Ok(()) if ran.is_ok() => std::fs::rename(unpacked.join(name), &into),
        other => other,
    };
    std::fs::remove_dir_all(&unpacked)?;
    written.with_context(|| format!("write {}", into.display()))?;
    ran
}

/// Files and directories, all below `into`. What a container says of links, devices and the like is nothing for the host.
fn unpack(archive: impl std::io::Read, into: &std::path::Path) -> std::io::Result<()> {
    let mut archive = tar::Archive::new(archive);
    for entry in archive.entries()? {
        let mut entry = entry?;
        if matches!(entry.header().entry_type(), tar::EntryType::Regular | tar::EntryType::Directory) {
            entry.unpack_in(into)?;
        } else {
            eprintln!("skipped {}: neither a file nor a directory", entry.path()?.display());
        }
    }
    // `tar` fills its last block.
    std::io::copy(&mut archive.into_inner(), &mut std::io::sink()).map(drop)
}

async fn upload(client: &Client, pod: &Pod, container: &str, source: &str, path: &str) -> anyhow::Result<()> {
    let (parent, name) = split(path)?;
    let command = words(&["tar", "xf", "-", "-C", parent]);
    let source = std::path::PathBuf::from(source);
    std::fs::metadata(&source).with_context(|| format!("read {}", source.display()))?;
    let socket = open_exec(client, pod, container, &command, Streams { stdin: true, tty: false }).await?;
    let (sender, chunks) = mpsc::channel(CHUNKS);
    let name = name.to_owned();
    let packing = tokio::task::spawn_blocking(move || pack(&source, &name, conveyor::Outgoing(sender)));
    let ran = run_in(socket, &command.join(" "), Some(chunks), None).await;
    // What is half an archive to the container is the container's failure, too; the reason is here.
    packing.await?.context("read what is copied")?;
    ran
}

fn pack(source: &std::path::Path, name: &str, to: conveyor::Outgoing) -> std::io::Result<()> {
    let mut archive = tar::Builder::new(std::io::BufWriter::with_capacity(CHUNK, to));
    if source.is_dir() {
        archive.append_dir_all(name, source)?;
    } else {
        archive.append_path_with_name(source, name)?;
    }
    std::io::Write::flush(&mut archive.into_inner()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        assert_eq!(parse_place("./a:b"), Place::Local("./a:b".into()));
        assert_eq!(parse_place("x"), Place::Local("x".into()));
        let pod = Place::Pod { namespace: Some("ns".into()), pod: "p".into(), path: "/etc".into() };
        assert_eq!(parse_place("ns/p:/etc"), pod);
    }

    #[test]
    fn what_is_copied_has_a_name() {
        assert_eq!(split("/etc/hosts").unwrap(), ("/etc", "hosts"));
        assert_eq!(split("/etc/").unwrap(), ("/", "etc"));
        assert_eq!(split("a").unwrap(), (".", "a"));
        for path in ["/", "..", "/a/..", "."] {
            assert!(split(path).is_err(), "{path}");
        }
    }

    /// In the order of a container that wants to write through a link.
    #[test]
    fn links_of_a_container_stay_there() {
        let mut archive = tar::Builder::new(Vec::new());
        let mut link = tar::Header::new_gnu();
        link.set_entry_type(tar::EntryType::Symlink);
        link.set_size(0);
        archive.append_link(&mut link, "d/link", "/etc").unwrap();
        let mut file = tar::Header::new_gnu();
        file.set_size(2);
        file.set_mode(0o644);
        archive.append_data(&mut file, "d/file", &b"ok"[..]).unwrap();
        let bytes = archive.into_inner().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let (sender, chunks) = mpsc::channel(bytes.len());
        bytes.chunks(7).for_each(|chunk| sender.try_send(chunk.to_vec()).unwrap());
        drop(sender);
        unpack(conveyor::Incoming { chunks, rest: Default::default() }, dir.path()).unwrap();
        let names: Vec<_> =
            std::fs::read_dir(dir.path().join("d")).unwrap().map(|one| one.unwrap().file_name()).collect();
        assert_eq!(names, ["file"]);
    }

    #[test]
    fn ports() {
        assert_eq!(parse_ports("80").unwrap(), (80, 80));
        assert_eq!(parse_ports("8080:80").unwrap(), (8080, 80));
        assert_eq!(parse_ports(":80").unwrap(), (0, 80));
        assert!(parse_ports("http").is_err());
    }

    #[test]
    fn a_failed_command_gives_its_exit_code() {
        let status = br#"{"status":"Failure","reason":"NonZeroExitCode","details":{"causes":[{"reason":"ExitCode","message":"7"}]}}"#;
        assert_eq!(exit_code(status).unwrap(), ExitCode::from(7));
    }
}
