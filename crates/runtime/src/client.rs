//! A connection to a keeper: requests with their answers, and the keeper's events.
//!
//! Requests are queued and written in one go, so that a caller who goes away never leaves half a frame behind. One task
//! per connection reads; it ends with the connection, and everybody who waits for an answer hears of it.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use keeper::protocol::{
    self, Decoder, Event, Failure, Frame, Hello, Message, Reply, Request, Role, Snapshot, Started, VERSION,
    VERSION_OLDEST, Welcome,
};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{Notify, oneshot};

/// How much is read from a keeper at once.
const CHUNK: usize = 4 << 10;
/// Requests that wait for a keeper which does not read; a container's worth is one or two.
const QUEUE_MAX: usize = 256;

/// Why a request to a keeper came to nothing.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ClientError {
    /// The keeper has ended, or the connection has.
    #[error("the pod's keeper is gone")]
    Gone,
    /// It has more to do than it takes.
    #[error("the pod's keeper does not answer: {QUEUE_MAX} requests wait for it")]
    Stuck,
    /// It refused, or the kernel did.
    #[error("{}", describe(.0))]
    Refused(Failure),
    /// It does not keep to the protocol.
    #[error("the pod's keeper: {0}")]
    Protocol(String),
    /// The connection could not be made.
    #[error("connecting to the pod's keeper")]
    Connect(#[source] io::Error),
}

fn describe(failure: &Failure) -> String {
    let mut text = failure.step.clone();
    let mut add = |part: &str| {
        if !part.is_empty() && part != text {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(part);
        }
    };
    add(&failure.detail);
    if failure.errno != 0 {
        add(&io::Error::from_raw_os_error(failure.errno).to_string());
    }
    text
}

/// What happens on a connection without being asked for. Called from the connection's task: must not wait.
pub(crate) trait Listener: Send + Sync + 'static {
    /// The keeper tells something.
    fn event(&self, event: Event);
    /// The connection is over.
    fn gone(&self);
}

/// A connection to a keeper. It ends with its last handle.
#[derive(Debug)]
pub(crate) struct Client {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    socket: UnixStream,
    /// Guards the order of requests: a request's number, its place in the queue and its entry belong together.
    state: Mutex<State>,
    /// Wakes the task: there is something to write, or nobody has a handle any more.
    wake: Notify,
}

#[derive(Debug, Default)]
struct State {
    number_last: u32,
    waiting: HashMap<u32, oneshot::Sender<(Reply, Vec<OwnedFd>)>>,
    outbox: VecDeque<Packet>,
    closed: bool,
}

#[derive(Debug)]
struct Packet {
    bytes: Vec<u8>,
    sent: usize,
    fds: Vec<OwnedFd>,
}

impl Client {
    /// Takes a connection over. `Hello` is due on it.
    pub(crate) fn new(socket: StdStream, listener: Arc<dyn Listener>) -> Result<Self, ClientError> {
        socket.set_nonblocking(true).map_err(ClientError::Connect)?;
        let socket = UnixStream::from_std(socket).map_err(ClientError::Connect)?;
        let shared = Arc::new(Shared { socket, state: Mutex::default(), wake: Notify::new() });
        // Ends with the connection, which ends with the keeper or with the last handle.
        tokio::spawn(shared.clone().converse(listener));
        Ok(Self { shared })
    }

    /// Connects to the keeper whose socket is in `directory`.
    pub(crate) fn connect(directory: BorrowedFd<'_>, listener: Arc<dyn Listener>) -> Result<Self, ClientError> {
        use std::os::fd::AsRawFd as _;
        // Through the descriptor, since a socket's path has 107 bytes at most and the run directory may be deep.
        let path = format!("/proc/self/fd/{}/{}", directory.as_raw_fd(), protocol::SOCKET);
        let socket = StdStream::connect(Path::new(&path)).map_err(ClientError::Connect)?;
        Self::new(socket, listener)
    }

    /// Opens the conversation.
    pub(crate) async fn hello(&self, role: Role) -> Result<Welcome, ClientError> {
        let hello = Hello { oldest: VERSION_OLDEST, newest: VERSION, role };
        match self.ask(Request::Hello(hello), Vec::new()).await? {
            (Reply::Welcome(welcome), _) => Ok(welcome),
            other => Err(unexpected(&other.0)),
        }
    }

    /// Everything that the keeper knows.
    pub(crate) async fn snapshot(&self) -> Result<Snapshot, ClientError> {
        match self.ask(Request::Snapshot, Vec::new()).await? {
            (Reply::Snapshot(snapshot), _) => Ok(snapshot),
            other => Err(unexpected(&other.0)),
        }
    }

    /// A request that starts a process; what started, and the descriptors that came with it.
    pub(crate) async fn start(
        &self,
        request: Request,
        fds: Vec<OwnedFd>,
    ) -> Result<(Started, Vec<OwnedFd>), ClientError> {
        match self.ask(request, fds).await? {
            (Reply::Started(started), fds) => Ok((started, fds)),
            other => Err(unexpected(&other.0)),
        }
    }

    /// A request that is only done; descriptors that came with the answer.
    pub(crate) async fn done(&self, request: Request, fds: Vec<OwnedFd>) -> Result<Vec<OwnedFd>, ClientError> {
        match self.ask(request, fds).await? {
            (Reply::Done, fds) => Ok(fds),
            other => Err(unexpected(&other.0)),
        }
    }

    /// Asks, and waits for the answer. A caller that stops waiting takes nothing back: the keeper does as asked.
    async fn ask(&self, request: Request, fds: Vec<OwnedFd>) -> Result<(Reply, Vec<OwnedFd>), ClientError> {
        let answer = self.shared.queue(request, fds)?;
        match answer.await {
            Ok((Reply::Failed(failure), _)) => Err(ClientError::Refused(failure)),
            Ok(answer) => Ok(answer),
            Err(_) => Err(ClientError::Gone),
        }
    }

    /// Asks, and does not wait for the answer.
    pub(crate) fn tell(&self, request: Request) {
        // Without a keeper there is nobody who would have to do it.
        let _ = self.shared.queue(request, Vec::new());
    }

    /// Whether the connection has not ended. It ends before its listener hears of that.
    pub(crate) fn is_open(&self) -> bool {
        !self.shared.state().closed
    }

    /// Ends the connection; the keeper stays.
    pub(crate) fn close(&self) {
        self.shared.state().closed = true;
        self.shared.wake.notify_one();
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.close();
    }
}

fn unexpected(reply: &Reply) -> ClientError {
    ClientError::Protocol(format!("an answer of kind {:#x} to another question", reply.kind()))
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every section leaves the state whole at each step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn queue(
        &self,
        request: Request,
        fds: Vec<OwnedFd>,
    ) -> Result<oneshot::Receiver<(Reply, Vec<OwnedFd>)>, ClientError> {
        let mut state = self.state();
        if state.closed {
            return Err(ClientError::Gone);
        }
        if state.outbox.len() >= QUEUE_MAX {
            return Err(ClientError::Stuck);
        }
        let number = state.number_last.wrapping_add(1);
        let mut bytes = Vec::new();
        protocol::encode(number, &Message::Request(request), fds.len(), &mut bytes)
            .map_err(|error| ClientError::Protocol(error.to_string()))?;
        let (sender, receiver) = oneshot::channel();
        state.number_last = number;
        state.waiting.insert(number, sender);
        state.outbox.push_back(Packet { bytes, sent: 0, fds });
        // As a rule all of it goes at once; what does not is the task's.
        if !matches!(self.flush(&mut state), Ok(true)) {
            self.wake.notify_one();
        }
        Ok(receiver)
    }

    /// Writes what the keeper takes; whether that was all.
    fn flush(&self, state: &mut State) -> io::Result<bool> {
        while let Some(packet) = state.outbox.front_mut() {
            let fds: Vec<BorrowedFd<'_>> = packet.fds.iter().map(OwnedFd::as_fd).collect();
            // Not through tokio: what it does not know yet to be writable may be so.
            match sys::fdpass::send(self.socket.as_fd(), &packet.bytes[packet.sent..], &fds) {
                Ok(count) => packet.sent += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
            packet.fds.clear(); // They went with the first byte.
            if packet.sent == packet.bytes.len() {
                state.outbox.pop_front();
            }
        }
        Ok(true)
    }

    async fn converse(self: Arc<Self>, listener: Arc<dyn Listener>) {
        // Why it ended is of no use to anybody: whether the keeper lives is asked by connecting again.
        let _ = self.serve(listener.as_ref()).await;
        let mut state = self.state();
        state.closed = true;
        let waiting = std::mem::take(&mut state.waiting);
        state.outbox.clear();
        drop(state);
        drop(waiting);
        let _ = sys::rustix::net::shutdown(&self.socket, sys::rustix::net::Shutdown::Both); // It may be over already.
        listener.gone();
    }

    async fn serve(&self, listener: &dyn Listener) -> io::Result<()> {
        let mut decoder = Decoder::default();
        loop {
            let interest = {
                let mut state = self.state();
                if state.closed {
                    return Ok(());
                }
                if self.flush(&mut state)? { Interest::READABLE } else { Interest::READABLE | Interest::WRITABLE }
            };
            tokio::select! {
                () = self.wake.notified() => {}
                ready = self.socket.ready(interest) => {
                    if ready?.is_writable() && interest.is_writable() {
                        self.write_on()?;
                    }
                    match self.socket.try_io(Interest::READABLE, || self.receive(&mut decoder)) {
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        received => received?,
                    }
                    self.deliver(&mut decoder, listener)?;
                }
            }
        }
    }

    /// Writes more; if it is full again tokio takes note of that.
    fn write_on(&self) -> io::Result<()> {
        let written = self.socket.try_io(Interest::WRITABLE, || match self.flush(&mut self.state())? {
            true => Ok(()),
            false => Err(io::ErrorKind::WouldBlock.into()),
        });
        match written {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            other => other,
        }
    }

    fn receive(&self, decoder: &mut Decoder) -> io::Result<()> {
        // On the stack: connections are silent most of their life.
        let (mut buffer, mut fds) = ([0; CHUNK], Vec::new());
        let count = sys::fdpass::recv(self.socket.as_fd(), &mut buffer, &mut fds)?;
        decoder.push(&buffer[..count], fds);
        if count == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
    }

    fn deliver(&self, decoder: &mut Decoder, listener: &dyn Listener) -> io::Result<()> {
        while let Some(Frame { number, message, fds }) = decoder.next_frame().map_err(io::Error::other)? {
            match message {
                Message::Reply(reply) => {
                    let waiting = self.state().waiting.remove(&number);
                    if let Some(waiting) = waiting {
                        let _ = waiting.send((reply, fds)); // Whoever asked may have gone.
                    }
                }
                Message::Event(event) => listener.event(event),
                Message::Request(_) => return Err(io::ErrorKind::InvalidData.into()),
            }
        }
        Ok(())
    }
}
