//! One container's streams: its output to the log and to attached clients, their input to it.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};

use sys::cgroup::Entry;
use sys::rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use sys::rustix::pipe::fcntl_setpipe_size;

use crate::clock;
use crate::log::{Health, Lines, LogFile, Stream};
use crate::poll::{Interest, Poller, Token};
use crate::protocol::{self, DetachReason, Exit, Process};

/// How much is read at once from a container or a client.
pub(crate) const CHUNK: usize = 32 << 10;
/// Input that waits for the container; nothing more is read from clients meanwhile.
const INPUT_CHUNK: usize = 4 << 10;
/// The buffer between the keeper and an attached client: a client that is behind by more is let go.
const CLIENT_BUFFER: usize = 1 << 20;
/// How much is read after the exit of a container whose other processes go on writing.
const DRAIN_MAX: usize = 2 << 20;

/// A container, from its start until it is forgotten.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) key: u32,
    pub(crate) id: String,
    pub(crate) process: Process,
    /// Present while the init runs.
    pub(crate) pidfd: Option<OwnedFd>,
    pub(crate) exit: Option<Exit>,
    pub(crate) log: Option<LogFile>,
    /// Kept for processes that are exec'd.
    pub(crate) cgroup: Option<Entry>,
    pub(crate) terminal: bool,
    pub(crate) stdin_once: bool,
    pub(crate) stdout: Option<Output>,
    pub(crate) stderr: Option<Output>,
    pub(crate) stdin: Option<Input>,
    pub(crate) clients: Vec<Client>,
}

/// The reading end of a container's output.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) source: File,
    lines: Lines,
}

/// The writing end of a container's standard input.
#[derive(Debug)]
pub(crate) struct Input {
    sink: File,
    /// What the container did not take yet. While there is any, clients are not read.
    pending: Vec<u8>,
    /// No more will come.
    closing: bool,
}

/// An attached client.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) key: u32,
    pub(crate) number: u32,
    pub(crate) stdin: Option<File>,
    pub(crate) stdout: Option<File>,
    pub(crate) stderr: Option<File>,
}

/// What the daemon should hear about.
#[derive(Debug)]
pub(crate) enum Notice {
    /// The log began to fail, or works again (0).
    Log(i32),
    /// A client is gone.
    Detached(u32, DetachReason),
}

impl Output {
    pub(crate) fn new(source: OwnedFd, stream: Stream) -> io::Result<Self> {
        set_nonblocking(&source)?;
        Ok(Self { source: source.into(), lines: Lines::new(stream) })
    }
}

impl Input {
    pub(crate) fn new(sink: OwnedFd) -> io::Result<Self> {
        set_nonblocking(&sink)?;
        Ok(Self { sink: sink.into(), pending: Vec::new(), closing: false })
    }
}

impl Client {
    pub(crate) fn new(key: u32, number: u32, fds: [Option<OwnedFd>; 3]) -> io::Result<Self> {
        let [stdin, stdout, stderr] = fds;
        for fd in [&stdin, &stdout, &stderr].into_iter().flatten() {
            set_nonblocking(fd)?;
        }
        for sink in [&stdout, &stderr].into_iter().flatten() {
            let _ = fcntl_setpipe_size(sink, CLIENT_BUFFER); // A socket has a size of its own.
        }
        Ok(Self {
            key,
            number,
            stdin: stdin.map(File::from),
            stdout: stdout.map(File::from),
            stderr: stderr.map(File::from),
        })
    }

    fn sink(&mut self, stream: Stream) -> &mut Option<File> {
        match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        }
    }

    pub(crate) fn watch(&self, poller: &Poller) -> io::Result<()> {
        if let Some(stdin) = &self.stdin {
            poller.add(stdin, Token::ClientStdin(self.key), Interest::Read)?;
        }
        for sink in self.stdout.iter().chain(&self.stderr) {
            poller.add(sink, Token::ClientSink(self.key), Interest::Loss)?;
        }
        Ok(())
    }

    fn unwatch(&self, poller: &Poller) {
        self.stdin.iter().chain(&self.stdout).chain(&self.stderr).for_each(|file| poller.remove(file));
    }

    /// Copies output to the client; the reason if it has to be let go.
    fn copy(&mut self, stream: Stream, bytes: &[u8]) -> Option<DetachReason> {
        let sink = self.sink(stream).as_mut()?;
        match sink.write_all(bytes) {
            Ok(()) => None,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Some(DetachReason::Slow),
            Err(_) => Some(DetachReason::Gone),
        }
    }
}

/// What a read from a container's output gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Got {
    Bytes(usize),
    Nothing,
    End,
}

impl Container {
    /// Registers all that has to be waited for.
    pub(crate) fn watch(&self, poller: &Poller) -> io::Result<()> {
        if let Some(pidfd) = &self.pidfd {
            poller.add(pidfd, Token::Init(self.key), Interest::Read)?;
        }
        if let Some(stdout) = &self.stdout {
            poller.add(&stdout.source, Token::Stdout(self.key), Interest::Read)?;
        }
        if let Some(stderr) = &self.stderr {
            poller.add(&stderr.source, Token::Stderr(self.key), Interest::Read)?;
        }
        Ok(())
    }

    /// Takes back what [`Container::watch`] has registered.
    pub(crate) fn unwatch(&self, poller: &Poller) {
        self.pidfd.iter().for_each(|pidfd| poller.remove(pidfd));
        self.stdout.iter().chain(&self.stderr).for_each(|output| poller.remove(&output.source));
    }

    /// Lets a client take part.
    pub(crate) fn add_client(&mut self, client: Client, poller: &Poller) -> io::Result<()> {
        client.watch(poller)?;
        if !self.takes_input()
            && let Some(stdin) = &client.stdin
        {
            poller.remove(stdin);
        }
        self.clients.push(client);
        Ok(())
    }

    /// Whether a client with this key is attached.
    pub(crate) fn has_client(&self, key: u32) -> bool {
        self.clients.iter().any(|client| client.key == key)
    }

    /// Takes one chunk of output, if there is one.
    pub(crate) fn pump_output(&mut self, stream: Stream, buffers: &mut Buffers, poller: &Poller) -> Vec<Notice> {
        let mut notices = Vec::new();
        if self.read_output(stream, buffers, &mut notices) == Got::End {
            self.end_output(stream, buffers, poller, &mut notices);
        }
        self.let_go(&mut notices, poller);
        notices
    }

    fn read_output(&mut self, stream: Stream, buffers: &mut Buffers, notices: &mut Vec<Notice>) -> Got {
        let output = match stream {
            Stream::Stdout => &mut self.stdout,
            Stream::Stderr => &mut self.stderr,
        };
        let Some(output) = output else { return Got::Nothing };
        let got = match output.source.read(&mut buffers.input) {
            Ok(0) => Got::End,
            Ok(n) => Got::Bytes(n),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Got::Nothing
            }
            // A terminal that nobody has open any more answers EIO.
            Err(_) => Got::End,
        };
        if let Got::Bytes(n) = got {
            let bytes = &buffers.input[..n];
            write_log(self.log.as_mut(), &mut output.lines, bytes, &mut buffers.records, notices);
            for client in &mut self.clients {
                notices.extend(client.copy(stream, bytes).map(|reason| Notice::Detached(client.key, reason)));
            }
        }
        got
    }

    /// The stream is over: what is left of its last line goes to the log, its clients see the end.
    fn end_output(&mut self, stream: Stream, buffers: &mut Buffers, poller: &Poller, notices: &mut Vec<Notice>) {
        let output = match stream {
            Stream::Stdout => self.stdout.take(),
            Stream::Stderr => self.stderr.take(),
        };
        if let Some(mut output) = output {
            poller.remove(&output.source);
            let now = clock::now();
            output.lines.finish(&clock::rfc3339(now), &mut buffers.records);
            flush_log(self.log.as_mut(), now, &mut buffers.records, notices);
        }
        for client in &mut self.clients {
            if let Some(sink) = client.sink(stream).take() {
                poller.remove(&sink);
            }
        }
    }

    /// Takes all output that is there, after the init's exit, so that the log is whole before anyone hears of it.
    pub(crate) fn drain(&mut self, buffers: &mut Buffers, poller: &Poller) -> Vec<Notice> {
        let mut notices = Vec::new();
        for stream in [Stream::Stdout, Stream::Stderr] {
            let mut taken = 0;
            let end = loop {
                match self.read_output(stream, buffers, &mut notices) {
                    Got::Bytes(n) if taken < DRAIN_MAX => taken += n,
                    Got::Bytes(_) | Got::Nothing => break self.terminal,
                    Got::End => break true,
                }
            };
            if end {
                self.end_output(stream, buffers, poller, &mut notices);
            }
        }
        self.let_go(&mut notices, poller);
        notices
    }

    /// Ends the streams towards the clients after the exit of the init.
    pub(crate) fn close_clients(&mut self, poller: &Poller) {
        self.clients.drain(..).for_each(|client| client.unwatch(poller));
        self.close_input(poller);
    }

    /// Closes all streams of a container that is forgotten.
    pub(crate) fn close(&mut self, buffers: &mut Buffers, poller: &Poller) {
        let mut nobody_asks = Vec::new();
        self.end_output(Stream::Stdout, buffers, poller, &mut nobody_asks);
        self.end_output(Stream::Stderr, buffers, poller, &mut nobody_asks);
        self.close_clients(poller);
    }

    /// Removes the clients that `notices` speak of, and turns their keys into the numbers that the daemon knows.
    fn let_go(&mut self, notices: &mut Vec<Notice>, poller: &Poller) {
        notices.retain_mut(|notice| match notice {
            Notice::Detached(key, _) => match self.remove_client(*key, poller) {
                Some(number) => {
                    *key = number;
                    true
                }
                None => false,
            },
            Notice::Log(_) => true,
        });
    }

    /// Lets a client go; its number, if it was there.
    fn remove_client(&mut self, key: u32, poller: &Poller) -> Option<u32> {
        let at = self.clients.iter().position(|client| client.key == key)?;
        let client = self.clients.swap_remove(at);
        client.unwatch(poller);
        if client.stdin.is_some() && self.stdin_once {
            self.close_input(poller);
        }
        Some(client.number)
    }

    /// A sink of a client was closed by the other side.
    pub(crate) fn lose_client(&mut self, key: u32, poller: &Poller) -> Option<Notice> {
        self.remove_client(key, poller).map(|number| Notice::Detached(number, DetachReason::Gone))
    }

    /// Reads a client's input and passes it on.
    pub(crate) fn pump_input(&mut self, client: u32, buffers: &mut Buffers, poller: &Poller) {
        let Some(source) = self.clients.iter_mut().find(|c| c.key == client).and_then(|c| c.stdin.as_mut()) else {
            return;
        };
        match source.read(&mut buffers.input[..INPUT_CHUNK]) {
            Ok(0) => self.end_client_input(client, poller),
            Ok(n) => self.give(&buffers.input[..n], poller),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(_) => self.end_client_input(client, poller),
        }
    }

    fn end_client_input(&mut self, client: u32, poller: &Poller) {
        let client = self.clients.iter_mut().find(|c| c.key == client);
        if let Some(stdin) = client.and_then(|client| client.stdin.take()) {
            poller.remove(&stdin);
        }
        if self.stdin_once {
            self.close_input(poller);
        }
    }

    /// Closes the container's input once it has taken what waits for it.
    pub(crate) fn close_input(&mut self, poller: &Poller) {
        match &mut self.stdin {
            Some(input) if !input.pending.is_empty() && self.exit.is_none() => input.closing = true,
            _ => self.drop_input(poller),
        }
    }

    fn drop_input(&mut self, poller: &Poller) {
        if let Some(input) = self.stdin.take() {
            poller.remove(&input.sink);
        }
        for client in &mut self.clients {
            if let Some(stdin) = client.stdin.take() {
                poller.remove(&stdin);
            }
        }
    }

    /// Passes bytes to the container; what it does not take waits, and with it the clients.
    fn give(&mut self, bytes: &[u8], poller: &Poller) {
        let Some(input) = &mut self.stdin else { return };
        match write_some(&mut input.sink, bytes) {
            Ok(n) if n == bytes.len() => {}
            Ok(n) => {
                input.pending = bytes[n..].to_vec();
                let watched = poller.add(&input.sink, Token::Stdin(self.key), Interest::Write);
                self.hold_clients(poller);
                if watched.is_err() {
                    self.drop_input(poller);
                }
            }
            Err(_) => self.drop_input(poller),
        }
    }

    /// The container's input has room again, or is closed.
    pub(crate) fn resume_input(&mut self, poller: &Poller) {
        let Some(input) = &mut self.stdin else { return };
        let Ok(n) = write_some(&mut input.sink, &input.pending) else { return self.drop_input(poller) };
        input.pending.drain(..n);
        if !input.pending.is_empty() {
            return;
        }
        input.pending = Vec::new();
        poller.remove(&input.sink);
        if input.closing {
            return self.drop_input(poller);
        }
        for client in &self.clients {
            if let Some(stdin) = &client.stdin {
                let _ = poller.add(stdin, Token::ClientStdin(client.key), Interest::Read); // It was in the set before.
            }
        }
    }

    fn hold_clients(&self, poller: &Poller) {
        self.clients.iter().filter_map(|client| client.stdin.as_ref()).for_each(|stdin| poller.remove(stdin));
    }

    /// Whether clients may be read now.
    fn takes_input(&self) -> bool {
        self.stdin.as_ref().is_some_and(|input| input.pending.is_empty() && !input.closing)
    }

    /// What the daemon should know of this container.
    pub(crate) fn describe(&self) -> protocol::Container {
        protocol::Container {
            id: self.id.clone(),
            process: self.process.clone(),
            exit: self.exit.clone(),
            lost_bytes: self.log.as_ref().map_or(0, LogFile::lost_bytes),
        }
    }
}

/// The only buffers of a keeper, shared by all streams.
#[derive(Debug)]
pub(crate) struct Buffers {
    pub(crate) input: Vec<u8>,
    records: Vec<u8>,
}

impl Buffers {
    pub(crate) fn new() -> Self {
        Self { input: vec![0; CHUNK], records: Vec::new() }
    }
}

fn write_log(
    log: Option<&mut LogFile>,
    lines: &mut Lines,
    mut bytes: &[u8],
    records: &mut Vec<u8>,
    notices: &mut Vec<Notice>,
) {
    let Some(log) = log else { return };
    let now = clock::now();
    let time = clock::rfc3339(now);
    while !bytes.is_empty() {
        bytes = lines.feed(bytes, &time, records);
        flush_log(Some(log), now, records, notices);
    }
}

fn flush_log(log: Option<&mut LogFile>, now: protocol::UnixNanos, records: &mut Vec<u8>, notices: &mut Vec<Notice>) {
    if let Some(log) = log.filter(|_| !records.is_empty()) {
        match log.append(records, now) {
            Health::Same => {}
            Health::Failing(errno) => notices.push(Notice::Log(errno)),
            Health::Recovered => notices.push(Notice::Log(0)),
        }
    }
    records.clear();
}

/// Writes what fits; an error only when nothing ever will.
fn write_some(sink: &mut File, bytes: &[u8]) -> io::Result<usize> {
    match sink.write(bytes) {
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
        other => other,
    }
}

fn set_nonblocking(fd: impl AsFd) -> io::Result<()> {
    let flags = fcntl_getfl(&fd)?;
    Ok(fcntl_setfl(fd, flags | OFlags::NONBLOCK)?)
}
