//! The keeper process: one thread, one loop.

mod requests;
mod sandbox;
mod session;
mod starts;

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use sys::process::{self, Exit as Ended};
use sys::rustix::process::Pid;
use sys::signals::Signals;

use crate::clock;
use crate::connection::Connection;
use crate::container::{Buffers, CHUNK, Container, Notice};
use crate::log::Stream;
use crate::poll::{Interest, Poller, Token};
use crate::protocol::{
    self, Detached, Event, Exit, Exited, Failure, LogTrouble, Message, Reason, Reply, Role, Snapshot, Welcome,
};
use crate::record;

use self::sandbox::Sandbox;
use self::session::Session;
use self::starts::{Asked, Rest, Start};

/// After a connection could not be taken, as there was no descriptor left: the next try would fail at once, too.
const BREATH: Duration = Duration::from_millis(100);

/// The life of a keeper.
pub(crate) fn run(config: Vec<u8>, fds: Vec<OwnedFd>) -> ! {
    let code = match sandbox::make(&config, fds) {
        Ok(sandbox::Made { sandbox, control, start_max }) => {
            match Keeper::new(sandbox, control, start_max).and_then(Keeper::serve) {
                Ok(()) => 0,
                Err(_) => 1, // Its containers end with it; the daemon sees the connection end.
            }
        }
        Err(sandbox::Failed { control, failure }) => {
            refuse(control, failure);
            1
        }
    };
    process::exit_now(code)
}

/// Answers the first request of the daemon with the reason why there is no sandbox.
fn refuse(control: Option<UnixStream>, failure: Failure) {
    let Some(mut connection) = control.and_then(|socket| Connection::new(socket).ok()) else { return };
    let _ = connection.socket.set_nonblocking(false);
    let mut buffer = vec![0; CHUNK];
    while connection.receive(&mut buffer).is_ok() {
        if let Ok(Some(frame)) = connection.decoder.next_frame() {
            let failed = Message::Reply(Reply::Failed(failure));
            let _ = connection.queue(frame.number, &failed, Vec::new()).and_then(|()| connection.flush());
            return;
        }
    }
}

struct Keeper {
    sandbox: Sandbox,
    listener: UnixListener,
    /// When it is listened again; present after a connection that could not be taken.
    breath: Option<Instant>,
    poller: Poller,
    connections: Vec<(u32, Connection)>,
    containers: Vec<Container>,
    sessions: Vec<Session>,
    /// Processes on their way to their programs.
    starts: Vec<Start>,
    /// How long each may take.
    start_max: Duration,
    /// Processes that are of no use any more.
    rest: Vec<Rest>,
    /// Present once another OCI runtime was driven: the keeper then gets orphans of processes that it never knew.
    children: Option<Signals>,
    buffers: Buffers,
    key_last: u32,
    over: bool,
}

/// What a request gets: a reply and the file descriptors that go with it.
type Answer = Result<(Reply, Vec<OwnedFd>), Failure>;

fn failure(reason: Reason, step: &str, error: &io::Error, detail: impl Into<String>) -> Failure {
    Failure { reason, step: step.to_owned(), errno: error.raw_os_error().unwrap_or(0), detail: detail.into() }
}

fn state(detail: impl Into<String>) -> Failure {
    Failure { reason: Reason::State, step: String::new(), errno: 0, detail: detail.into() }
}

impl Keeper {
    fn new(sandbox: Sandbox, control: UnixStream, start_max: Duration) -> io::Result<Self> {
        let _ = std::fs::remove_file(protocol::SOCKET); // Of a keeper before this one.
        let listener = UnixListener::bind(protocol::SOCKET)?;
        listener.set_nonblocking(true)?;
        let poller = Poller::new()?;
        poller.add(&listener, Token::Listener, Interest::Read)?;
        let mut keeper = Self {
            sandbox,
            listener,
            breath: None,
            poller,
            connections: Vec::new(),
            containers: Vec::new(),
            sessions: Vec::new(),
            starts: Vec::new(),
            start_max,
            rest: Vec::new(),
            children: None,
            buffers: Buffers::new(),
            key_last: 0,
            over: false,
        };
        keeper.connect(control)?;
        keeper.write_record();
        Ok(keeper)
    }

    fn serve(mut self) -> io::Result<()> {
        while !self.over {
            for token in self.poller.wait(self.patience())? {
                self.handle(token);
            }
            self.give_up_late();
            self.listen_again();
            self.reap_orphans();
        }
        Ok(())
    }

    fn key(&mut self) -> u32 {
        self.key_last = self.key_last.wrapping_add(1);
        self.key_last
    }

    fn handle(&mut self, token: Token) {
        match token {
            Token::Listener => self.accept(),
            Token::Connection(key) => self.converse(key),
            Token::Init(key) => self.container_ended(key),
            Token::Exec(key) => self.session_ended(key),
            Token::Start(key) => self.progress(key),
            Token::Rest(key) => self.reap_rest(key),
            Token::Children => {
                // Whatever it says, all of them are looked at.
                while self.children.as_mut().is_some_and(|children| matches!(children.take(), Ok(Some(_)))) {}
            }
            Token::Stdout(key) => self.pump(key, Stream::Stdout),
            Token::Stderr(key) => self.pump(key, Stream::Stderr),
            Token::Stdin(key) => {
                if let Some(container) = self.containers.iter_mut().find(|one| one.key == key) {
                    container.resume_input(&self.poller);
                }
            }
            Token::ClientStdin(key) => {
                if let Some(container) = self.containers.iter_mut().find(|one| one.has_client(key)) {
                    container.pump_input(key, &mut self.buffers, &self.poller);
                }
            }
            Token::ClientSink(key) => self.client_lost(key),
        }
    }

    fn accept(&mut self) {
        match self.listener.accept() {
            // A client that cannot be waited for sees its connection end.
            Ok((socket, _)) => drop(self.connect(socket)),
            // Whoever was in the queue has gone again.
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::ConnectionAborted) => {}
            // Whoever waits stays in the queue, of which the poller would tell without end.
            Err(_) => {
                self.poller.remove(&self.listener);
                self.breath = Some(Instant::now() + BREATH);
            }
        }
    }

    fn listen_again(&mut self) {
        let now = Instant::now();
        if self.breath.is_some_and(|end| end <= now) {
            let added = self.poller.add(&self.listener, Token::Listener, Interest::Read);
            self.breath = added.is_err().then_some(now + BREATH);
        }
    }

    /// How long nothing has to be done by itself.
    fn patience(&self) -> Option<Duration> {
        let first = self.starts.iter().map(|start| start.deadline).chain(self.breath).min();
        first.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    fn connect(&mut self, socket: UnixStream) -> io::Result<()> {
        let key = self.key();
        let connection = Connection::new(socket)?;
        self.poller.add(&connection.socket, Token::Connection(key), Interest::Read)?;
        self.connections.push((key, connection));
        Ok(())
    }

    fn disconnect(&mut self, key: u32) {
        if let Some(at) = self.connections.iter().position(|(known, _)| *known == key) {
            let (_, connection) = self.connections.swap_remove(at);
            self.poller.remove(&connection.socket);
        }
    }

    /// Takes what a client says, answers it, and sends what it can take.
    fn converse(&mut self, key: u32) {
        if self.hear(key).and_then(|()| self.flush(key)).is_err() {
            self.disconnect(key);
        }
    }

    fn connection(&mut self, key: u32) -> io::Result<&mut Connection> {
        let found = self.connections.iter_mut().find(|(known, _)| *known == key);
        found.map(|(_, connection)| connection).ok_or_else(|| io::ErrorKind::NotConnected.into())
    }

    fn hear(&mut self, key: u32) -> io::Result<()> {
        let mut buffer = std::mem::take(&mut self.buffers.input);
        let received = self.connection(key).and_then(|connection| connection.receive(&mut buffer));
        self.buffers.input = buffer;
        received?;
        while let Some(frame) = self.connection(key)?.decoder.next_frame().map_err(io::Error::other)? {
            let Message::Request(request) = frame.message else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            let asked = Asked { connection: key, number: frame.number };
            if let Some(answer) = self.answer(asked, request, frame.fds) {
                self.queue(asked, answer)?;
            }
        }
        Ok(())
    }

    fn queue(&mut self, asked: Asked, answer: Answer) -> io::Result<()> {
        let (reply, fds) = answer.unwrap_or_else(|failure| (Reply::Failed(failure), Vec::new()));
        self.connection(asked.connection)?.queue(asked.number, &Message::Reply(reply), fds)
    }

    /// Answers what was asked a while ago; whoever asked may have gone.
    fn reply(&mut self, asked: Asked, answer: Answer) {
        if self.queue(asked, answer).and_then(|()| self.flush(asked.connection)).is_err() {
            self.disconnect(asked.connection);
        }
    }

    /// Sends what the client takes; for the rest it is waited until there is room.
    fn flush(&mut self, key: u32) -> io::Result<()> {
        let all = self.connection(key)?.flush()?;
        let interest = if all { Interest::Read } else { Interest::Both };
        let (_, connection) =
            self.connections.iter().find(|(known, _)| *known == key).ok_or(io::ErrorKind::NotConnected)?;
        self.poller.change(&connection.socket, Token::Connection(key), interest)
    }

    /// Tells the daemon, if it is there; if it is not, it will ask.
    fn tell(&mut self, event: Event) {
        let control = self.connections.iter().find(|(_, one)| one.role == Some(Role::Control)).map(|(key, _)| *key);
        let Some(key) = control else { return };
        let queued = self.connection(key).and_then(|one| one.queue(0, &Message::Event(event), Vec::new()));
        if queued.and_then(|()| self.flush(key)).is_err() {
            self.disconnect(key);
        }
    }

    fn pump(&mut self, key: u32, stream: Stream) {
        let Some(container) = self.containers.iter_mut().find(|one| one.key == key) else { return };
        let notices = container.pump_output(stream, &mut self.buffers, &self.poller);
        let id = container.id.clone();
        self.tell_notices(&id, notices);
    }

    fn client_lost(&mut self, key: u32) {
        let Some(container) = self.containers.iter_mut().find(|one| one.has_client(key)) else { return };
        let notice = container.lose_client(key, &self.poller);
        let id = container.id.clone();
        self.tell_notices(&id, notice.into_iter().collect());
    }

    fn tell_notices(&mut self, id: &str, notices: Vec<Notice>) {
        for notice in notices {
            let id = id.to_owned();
            let event = match notice {
                Notice::Detached(attach, reason) => Event::Detached(Detached { id, attach, reason }),
                Notice::Log(errno) => {
                    let log = self.containers.iter().find(|one| one.id == id).and_then(|one| one.log.as_ref());
                    let lost_bytes = log.map_or(0, |log| log.lost_bytes());
                    Event::LogTrouble(LogTrouble { id, errno, lost_bytes })
                }
            };
            self.tell(event);
        }
    }

    /// The init has ended: its log is completed, then everybody may know.
    fn container_ended(&mut self, key: u32) {
        let Some(container) = self.containers.iter_mut().find(|one| one.key == key) else { return };
        let Some(exit) = container.pidfd.as_ref().and_then(reaped) else { return };
        let notices = container.drain(&mut self.buffers, &self.poller);
        container.close_clients(&self.poller);
        if let Some(pidfd) = container.pidfd.take() {
            self.poller.remove(&pidfd);
        }
        container.exit = Some(exit.clone());
        let id = container.id.clone();
        self.write_record();
        self.tell_notices(&id, notices);
        self.tell(Event::Exited(Exited { id, exit }));
    }

    fn session_ended(&mut self, key: u32) {
        let Some(session) = self.sessions.iter_mut().find(|one| one.key == key) else { return };
        let Some(exit) = session.pidfd.as_ref().and_then(reaped) else { return };
        if let Some(pidfd) = session.pidfd.take() {
            self.poller.remove(&pidfd);
        }
        session.exit = Some(exit.clone());
        let id = session.id.clone();
        self.tell(Event::ExecExited(Exited { id, exit }));
    }

    /// From now on what a runtime leaves behind, the containers' processes first of all, are children of the keeper.
    fn adopt_orphans(&mut self) -> io::Result<()> {
        if self.children.is_none() {
            process::become_subreaper().map_err(|error| error.errno)?;
            let children = Signals::of_children()?;
            self.poller.add(&children, Token::Children, Interest::Read)?;
            self.children = Some(children);
        }
        Ok(())
    }

    /// Reaps what has ended and is nobody's. While a runtime is at work any of them may be the process that it makes.
    fn reap_orphans(&mut self) {
        if self.children.is_none() || !self.starts.is_empty() {
            return;
        }
        while let Some(pid) = process::ended_child() {
            // One that is known is told by its own descriptor, and then it is looked again.
            if self.knows(pid) || process::pidfd_open(pid).and_then(|pidfd| process::reap(pidfd.as_fd())).is_err() {
                return;
            }
        }
    }

    fn knows(&self, pid: Pid) -> bool {
        let pid = pid.as_raw_nonzero().get().unsigned_abs();
        let containers = self.containers.iter().filter(|one| one.pidfd.is_some()).map(|one| one.process.pid);
        let sessions = self.sessions.iter().filter(|one| one.pidfd.is_some()).map(|one| one.process.pid);
        let rest = self.rest.iter().map(Rest::pid).chain(self.sandbox.reaper_pid());
        containers.chain(sessions).chain(rest).any(|known| known == pid)
    }

    fn snapshot(&self, version: u16) -> Snapshot {
        Snapshot {
            sandbox: self.welcome(version),
            reaper: self.sandbox.reaper_pid(),
            containers: self.containers.iter().map(Container::describe).collect(),
            execs: self.sessions.iter().map(Session::describe).collect(),
        }
    }

    fn welcome(&self, version: u16) -> Welcome {
        Welcome { version, ..self.sandbox.welcome.clone() }
    }

    /// What remains known when the keeper is killed. Without room on the tmpfs the last version stays.
    fn write_record(&self) {
        let snapshot = Snapshot { execs: Vec::new(), ..self.snapshot(protocol::VERSION) };
        let _ = record::write(&snapshot);
    }
}

/// How the process ended; `None` while it runs.
fn reaped(pidfd: &OwnedFd) -> Option<Exit> {
    let ended = process::try_reap(pidfd.as_fd()).ok()??;
    let (code, signal) = match ended {
        Ended::Code(code) => (code, 0),
        Ended::Signal(signal) => (128 + signal, signal),
    };
    Some(Exit { code: code.unsigned_abs(), signal: signal.unsigned_abs(), at: clock::now() })
}
