//! A backend whose processes are threads with real pipes and terminals, and whose pod is the loopback device.

use std::fs::File;
use std::io::{BufRead as _, BufReader, PipeReader, PipeWriter, Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use async_trait::async_trait;
use cri::{Error, v1};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};

use crate::stream::{Backend, Process, Session, Stdio, WindowSize};

/// What the processes of a [`Fake`] see.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Seen {
    Resized(WindowSize),
    /// The end of standard input.
    EndOfInput,
    /// Standard output cannot be written to any more.
    BrokenOutput,
}

pub(in crate::stream) struct Fake {
    seen: mpsc::UnboundedSender<Seen>,
    /// What is seen, in its order.
    pub(super) log: Mutex<Option<mpsc::UnboundedReceiver<Seen>>>,
}

impl Fake {
    pub(in crate::stream) fn new() -> Self {
        let (seen, log) = mpsc::unbounded_channel();
        Self { seen, log: Mutex::new(Some(log)) }
    }

    /// Runs the program that a command names.
    fn start(&self, command: &[String], wanted: [bool; 3], tty: bool) -> Session {
        let (exit, exited) = watch::channel(None);
        let command: Vec<String> = command.to_vec();
        let seen = self.seen.clone();
        let (stdio, mut streams) = if tty { terminal() } else { pipes(wanted) };
        std::thread::spawn(move || {
            let code = program(&command, &mut streams, &seen);
            // As in a real process, the streams are closed before the exit is seen.
            drop(streams);
            // The session may be gone.
            let _ = exit.send(Some(code));
        });
        let process = FakeProcess { exited, seen: self.seen.clone() };
        Session { stdio, process: Box::new(process) }
    }
}

/// The process's ends of its streams.
struct Streams {
    stdin: Box<dyn Read + Send>,
    stdout: Box<dyn Write + Send>,
    stderr: Box<dyn Write + Send>,
}

fn pipes([stdin, stdout, stderr]: [bool; 3]) -> (Stdio, Streams) {
    let input = || -> (Option<PipeWriter>, Box<dyn Read + Send>) {
        let (reader, writer) = std::io::pipe().unwrap();
        (Some(writer), Box::new(reader))
    };
    let output = || -> (Option<PipeReader>, Box<dyn Write + Send>) {
        let (reader, writer) = std::io::pipe().unwrap();
        (Some(reader), Box::new(writer))
    };
    let (our_stdin, stdin) = if stdin { input() } else { (None, Box::new(std::io::empty()) as _) };
    let (our_stdout, stdout) = if stdout { output() } else { (None, Box::new(std::io::sink()) as _) };
    let (our_stderr, stderr) = if stderr { output() } else { (None, Box::new(std::io::sink()) as _) };
    let stdio = Stdio::Pipes {
        stdin: our_stdin.map(OwnedFd::from),
        stdout: our_stdout.map(OwnedFd::from),
        stderr: our_stderr.map(OwnedFd::from),
    };
    (stdio, Streams { stdin, stdout, stderr })
}

fn terminal() -> (Stdio, Streams) {
    let (master, terminal) = sys::pty::pair().unwrap();
    let copy = |terminal: &File| terminal.try_clone().unwrap();
    let streams =
        Streams { stdin: Box::new(copy(&terminal)), stdout: Box::new(copy(&terminal)), stderr: Box::new(terminal) };
    (Stdio::Terminal(master.into()), streams)
}

/// The programs that there are; answers the exit code.
fn program(command: &[String], streams: &mut Streams, seen: &mpsc::UnboundedSender<Seen>) -> i32 {
    let words: Vec<&str> = command.iter().map(String::as_str).collect();
    match words[..] {
        // Copies its input to its output.
        ["cat"] => {
            let copied = std::io::copy(&mut streams.stdin, &mut streams.stdout);
            i32::from(copied.is_err())
        }
        // Copies one line.
        ["line"] => {
            let mut line = String::new();
            BufReader::new(&mut streams.stdin).read_line(&mut line).unwrap();
            streams.stdout.write_all(line.as_bytes()).unwrap();
            0
        }
        ["say", out, err, code] => {
            streams.stdout.write_all(out.as_bytes()).unwrap();
            streams.stderr.write_all(err.as_bytes()).unwrap();
            code.parse().unwrap()
        }
        // Ends without having read its input.
        ["ignore", code] => code.parse().unwrap(),
        // Reads to the end, then writes until it cannot.
        ["endless"] => {
            std::io::copy(&mut streams.stdin, &mut std::io::sink()).unwrap();
            seen.send(Seen::EndOfInput).unwrap();
            while streams.stdout.write_all(&[0; 4096]).is_ok() {}
            seen.send(Seen::BrokenOutput).unwrap();
            0
        }
        _ => 127,
    }
}

struct FakeProcess {
    exited: watch::Receiver<Option<i32>>,
    seen: mpsc::UnboundedSender<Seen>,
}

#[async_trait]
impl Process for FakeProcess {
    async fn resize(&self, size: WindowSize) -> Result<(), Error> {
        self.seen.send(Seen::Resized(size)).map_err(|error| Error::Internal(error.to_string()))
    }

    async fn wait(&self) -> Result<i32, Error> {
        let mut exited = self.exited.clone();
        let code = exited.wait_for(Option::is_some).await.map_err(|error| Error::internal(&error))?;
        Ok(code.unwrap())
    }
}

#[async_trait]
impl Backend for Fake {
    async fn exec(&self, request: v1::ExecRequest) -> Result<Session, Error> {
        if request.container_id != "running" {
            return Err(Error::NotFound { kind: "container", id: request.container_id });
        }
        Ok(self.start(&request.cmd, [request.stdin, request.stdout, request.stderr], request.tty))
    }

    /// The container is named by its program.
    async fn attach(&self, request: v1::AttachRequest) -> Result<Session, Error> {
        let command: Vec<String> = request.container_id.split(' ').map(str::to_owned).collect();
        Ok(self.start(&command, [request.stdin, request.stdout, request.stderr], request.tty))
    }

    async fn port_forward(&self, sandbox_id: &str, port: u16) -> Result<TcpStream, Error> {
        let connected = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await;
        connected.map_err(|error| Error::Unavailable(format!("connect to port {port} of {sandbox_id}: {error}")))
    }
}
