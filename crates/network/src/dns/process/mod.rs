//! The server's process: one thread, no privileges, and all its sockets from the daemon, whose death it does not notice.
//!
//! ```text
//! queries (UDP, TCP) ──► message ──► reply            answers from the zone
//!                           ╰─► forward ──► sockets ──► reply
//! daemons (Unix socket) ──► control: zones, the end
//! ```

mod connection;
mod sockets;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::io::{self, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};
use sys::rustix::net::sockopt::socket_peercred;
use sys::rustix::net::{AddressFamily, SocketType, netdevice, socket};
use sys::{confine, fdpass, fork, process};

use super::Upstreams;
use super::control::{Decoder, Message as _, Order, Report};
use super::forward::{Action, Client, Forwards};
use super::message::{QUERY_MAX, Query, Transport, Verdict};
use super::upstream;
use super::zone::Zone;
use connection::Connection;
use sockets::{Flight, Interest, Poller, Token, unless_blocked};

/// `nobody`: owner of nothing.
const USER: u32 = 65534;
const BUDGET: confine::Budget =
    confine::Budget { memory_bytes_max: 1 << 30, file_bytes_max: 0, open_files_max: FLIGHTS_MAX + 512 };
/// Sockets to other servers; the questions under way times four servers, twice.
const FLIGHTS_MAX: u64 = 2048;
/// TCP connections, all and from one address.
const CONNECTIONS_MAX: usize = 128;
const CONNECTIONS_PER_CLIENT_MAX: usize = 32;
const DAEMONS_MAX: usize = 8;
/// Datagrams from one socket, connections of one listener, or queries of one connection before others have their turn.
const BURST: usize = 64;
/// How long what is under way may take after the order to stop.
const DRAIN: Duration = Duration::from_secs(5);
/// How often the file with the upstream servers is looked at, at most, and only when somebody asks.
const FILE_AGE: Duration = Duration::from_secs(1);
const RESOLVED: &str = "/run/systemd/resolve/resolv.conf";

/// What the daemon says when it starts the process. Descriptors: a daemon's connection, the bound socket for later ones,
/// the network namespace, UDP sockets, TCP listeners.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Begin {
    pub(super) clients: Vec<IpNet>,
    pub(super) upstreams: Upstreams,
    /// How many of the descriptors are UDP sockets.
    pub(super) udp: usize,
}

/// The life of the process.
pub(super) fn run(begin: Vec<u8>, fds: Vec<OwnedFd>) -> ! {
    let mut fds = VecDeque::from(fds);
    if let Some(first) = fds.pop_front() {
        let mut daemon = UnixStream::from(first);
        match start(&begin, fds) {
            Ok(mut server) => {
                server.meet(daemon);
                server.serve();
            }
            Err(error) => {
                let report = Report::Failed(format!("cannot start: {error}")).encode();
                let _ = daemon.write_all(&report); // If the daemon is gone nobody is left to be told.
            }
        }
    }
    process::exit_now(0)
}

fn start(begin: &[u8], mut fds: VecDeque<OwnedFd>) -> io::Result<Server> {
    let begin: Begin = serde_json::from_slice(begin)?;
    let missing = || io::Error::new(io::ErrorKind::InvalidInput, "descriptors are missing");
    let daemons = UnixListener::from(fds.pop_front().ok_or_else(missing)?);
    let namespace = fds.pop_front().ok_or_else(missing)?;
    if fds.len() < begin.udp {
        return Err(missing());
    }
    let tcp = fds.split_off(begin.udp);
    let udp = fds.into_iter().map(UdpSocket::from).collect();
    let tcp = tcp.into_iter().map(TcpListener::from).collect();
    fork::ignore_broken_pipes();
    let _ = fork::set_process_name(super::PROCESS_NAME); // Cosmetic.
    process::join(namespace.as_fd(), process::namespace::NETWORK).map_err(io::Error::other)?;
    drop(namespace);
    // Here and not in the daemon: who connects can then ask the kernel for this process's number.
    sys::rustix::net::listen(&daemons, 8)?;
    let server = Server::new(begin, daemons, udp, tcp)?;
    confine(server.user)?;
    fork::trim_heap();
    Ok(server)
}

fn confine(user: u32) -> io::Result<()> {
    confine::limit(BUDGET)?;
    if user == 0 {
        process::set_user(USER, USER, &[]).map_err(io::Error::other)?;
    }
    confine::keep_capabilities(sys::rustix::thread::CapabilitySet::empty())?;
    process::set_dumpable(false).map_err(io::Error::other)?;
    confine::allow_only(&confine::serving_calls())
}

/// A daemon's connection.
#[derive(Debug)]
struct Daemon {
    stream: UnixStream,
    decoder: Decoder,
}

/// Everything the process has.
#[derive(Debug)]
struct Server {
    poller: Poller,
    udp: Vec<UdpSocket>,
    tcp: Vec<TcpListener>,
    daemons: UnixListener,
    clients: Vec<IpNet>,
    own: Vec<IpAddr>,
    /// Who may give orders, beside root.
    user: u32,
    resolvers: Resolvers,
    zone: Option<Zone>,
    forwards: Forwards,
    flights: BTreeMap<u32, Flight>,
    connections: BTreeMap<u32, Connection>,
    connected: BTreeMap<u32, Daemon>,
    keys_used: u32,
    turn: usize,
    /// Set when the process is to end.
    ends_at: Option<Instant>,
    buffer: Vec<u8>,
}

impl Server {
    fn new(begin: Begin, daemons: UnixListener, udp: Vec<UdpSocket>, tcp: Vec<TcpListener>) -> io::Result<Server> {
        let poller = Poller::new()?;
        daemons.set_nonblocking(true)?;
        poller.add(&daemons, Token::Daemons, Interest::Read)?;
        let own = udp.iter().map(|socket| socket.local_addr().map(|own| own.ip())).collect::<io::Result<Vec<_>>>()?;
        let resolvers = Resolvers::new(begin.upstreams, own.clone());
        Ok(Server {
            poller,
            udp,
            tcp,
            daemons,
            clients: begin.clients,
            own,
            user: sys::rustix::process::geteuid().as_raw(),
            resolvers,
            zone: None,
            forwards: Forwards::default(),
            flights: BTreeMap::new(),
            connections: BTreeMap::new(),
            connected: BTreeMap::new(),
            keys_used: 0,
            turn: 0,
            ends_at: None,
            buffer: vec![0; usize::from(u16::MAX)],
        })
    }

    fn serve(&mut self) {
        while !self.is_done(Instant::now()) {
            let Ok(ready) = self.poller.wait(self.next_tick()) else { return };
            for token in ready {
                match token {
                    // It was ready before the order to stop.
                    Token::Udp(_) | Token::Tcp(_) if self.ends_at.is_some() => {}
                    Token::Udp(key) => self.read_datagrams(key),
                    Token::Tcp(key) => self.accept(key),
                    Token::Connection(key) => self.step_connection(key),
                    Token::Flight(key) => self.step_flight(key),
                    Token::Daemons => self.accept_daemons(),
                    Token::Daemon(key) => self.read_daemon(key),
                }
            }
            self.tick(Instant::now());
        }
    }

    fn is_done(&self, now: Instant) -> bool {
        if self.zone.is_none() && self.connected.is_empty() {
            return true; // Its daemon died before it could tell what to serve.
        }
        let idle = || self.forwards.is_empty() && self.connections.values().all(Connection::is_idle);
        self.ends_at.is_some_and(|end| end <= now || idle())
    }

    fn next_tick(&self) -> Option<Instant> {
        let connections = self.connections.values().map(|connection| connection.ends_at);
        connections.chain(self.forwards.next_tick()).chain(self.ends_at).min()
    }

    fn tick(&mut self, now: Instant) {
        let late: Vec<u32> =
            self.connections.iter().filter(|(_, connection)| connection.ends_at <= now).map(|(key, _)| *key).collect();
        late.iter().for_each(|key| _ = self.connections.remove(key));
        let actions = self.forwards.tick(now, random_id);
        self.perform(actions);
    }

    fn next_key(&mut self) -> u32 {
        self.keys_used = self.keys_used.wrapping_add(1);
        self.keys_used
    }

    fn may_ask(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        let known = || self.clients.iter().any(|network| network.contains(&client));
        self.clients.is_empty() || client.is_loopback() || self.own.contains(&client) || known()
    }

    fn read_datagrams(&mut self, key: u32) {
        let Ok(number) = usize::try_from(key) else { return };
        for _ in 0..BURST {
            let Some(socket) = self.udp.get(number) else { return };
            // An error is one of an earlier reply, reported late.
            let Ok(Some((length, address))) = unless_blocked(socket.recv_from(&mut self.buffer)) else { return };
            if length <= QUERY_MAX && self.may_ask(address.ip()) {
                let query = self.buffer[..length].to_vec();
                self.take(&query, Client::Udp { socket: number, address });
            }
        }
    }

    fn take(&mut self, bytes: &[u8], client: Client) {
        let transport = match client {
            Client::Udp { .. } => Transport::Udp,
            Client::Tcp { .. } => Transport::Tcp,
        };
        let query = match Query::read(bytes, transport) {
            Ok(query) => query,
            Err(Some(reply)) => return self.reply(client, &reply),
            Err(None) => return self.hang_up(client),
        };
        let Some(zone) = &self.zone else { return };
        self.turn = self.turn.wrapping_add(1);
        match query.answer(zone, self.turn) {
            Verdict::Reply(reply) => self.reply(client, &reply),
            Verdict::Ask(ask) => {
                let now = Instant::now();
                let servers = self.resolvers.now(now);
                let actions = self.forwards.ask((client, query, ask), servers, now, random_id);
                self.perform(actions);
            }
        }
    }

    fn reply(&mut self, client: Client, reply: &[u8]) {
        match client {
            Client::Udp { socket, address } => {
                // What cannot be sent is lost, as datagrams are; the client asks again.
                let _ = self.udp[socket].send_to(reply, address);
            }
            Client::Tcp { connection: key, .. } => {
                if let Some(connection) = self.connections.get_mut(&key) {
                    connection.reply(reply);
                }
                // It is sent with the connection's next step, and nothing here takes one: a client may ask without end.
                self.watch(key);
            }
        }
    }

    fn hang_up(&mut self, client: Client) {
        if let Client::Tcp { connection, .. } = client {
            self.connections.remove(&connection);
        }
    }

    fn perform(&mut self, actions: Vec<Action>) {
        let mut actions = VecDeque::from(actions);
        while let Some(action) = actions.pop_front() {
            match action {
                Action::Send { flight, server, transport, message } => {
                    if self.send(flight, server, transport, &message).is_err() {
                        actions.extend(self.forwards.failed(flight, Instant::now(), random_id));
                    }
                }
                Action::Close { flight } => _ = self.flights.remove(&flight),
                Action::Reply { client, reply } => self.reply(client, &reply),
            }
        }
    }

    fn send(&mut self, key: u32, server: SocketAddr, transport: Transport, message: &[u8]) -> io::Result<()> {
        let flight = Flight::send(server, transport, message)?;
        self.poller.add(&flight, Token::Flight(key), flight.interest())?;
        self.flights.insert(key, flight);
        Ok(())
    }

    fn step_flight(&mut self, key: u32) {
        let Some(flight) = self.flights.get_mut(&key) else { return };
        let now = Instant::now();
        let stepped = flight.step(&mut self.buffer).and_then(|message| {
            self.poller.change(&*flight, Token::Flight(key), flight.interest())?;
            Ok(message)
        });
        let actions = match stepped {
            Ok(None) => return,
            Ok(Some(response)) => self.forwards.received(key, &response, now, random_id),
            Err(_) => self.forwards.failed(key, now, random_id),
        };
        self.perform(actions);
    }

    fn accept(&mut self, key: u32) {
        let Ok(number) = usize::try_from(key) else { return };
        for _ in 0..BURST {
            let Some(listener) = self.tcp.get(number) else { return };
            let Ok(Some((stream, address))) = unless_blocked(listener.accept()) else { return };
            let ip = address.ip();
            let own = self.connections.values().filter(|other| other.ip == ip).count();
            let full = self.connections.len() >= CONNECTIONS_MAX || own >= CONNECTIONS_PER_CLIENT_MAX;
            if full || !self.may_ask(ip) || stream.set_nonblocking(true).is_err() {
                continue;
            }
            let key = self.next_key();
            let connection = Connection::new(stream, ip, Instant::now());
            if self.poller.add(&connection, Token::Connection(key), Interest::Read).is_ok() {
                self.connections.insert(key, connection);
            }
        }
    }

    /// Answers what a client has asked; what it has asked beyond a burst waits until others have had their turn.
    fn step_connection(&mut self, key: u32) {
        for _ in 0..BURST {
            let Some(connection) = self.connections.get_mut(&key) else { return };
            let client = Client::Tcp { connection: key, ip: connection.ip };
            match connection.step(&mut self.buffer, Instant::now()) {
                Ok(Some(query)) => self.take(&query, client),
                Ok(None) => break,
                Err(_) => return drop(self.connections.remove(&key)),
            }
            if self.connections.get(&key).is_some_and(Connection::waits) {
                break;
            }
        }
        self.watch(key);
    }

    /// A connection that has something to send comes up again when its client takes that, also if more of it is here already.
    fn watch(&mut self, key: u32) {
        let Some(connection) = self.connections.get(&key) else { return };
        if self.poller.change(connection, Token::Connection(key), connection.interest()).is_err() {
            self.connections.remove(&key);
        }
    }

    fn accept_daemons(&mut self) {
        while let Ok((stream, _)) = self.daemons.accept() {
            let peer = socket_peercred(&stream).map(|peer| peer.uid.as_raw());
            if self.connected.len() < DAEMONS_MAX && peer.is_ok_and(|uid| uid == 0 || uid == self.user) {
                self.meet(stream);
            }
        }
    }

    /// Greets a daemon with the listening sockets, so that the next server can have them, too.
    fn meet(&mut self, stream: UnixStream) {
        let udp = u32::try_from(self.udp.len()).unwrap_or(u32::MAX);
        let hello = Report::Hello { pid: std::process::id(), udp }.encode();
        let sockets: Vec<_> =
            self.udp.iter().map(|socket| socket.as_fd()).chain(self.tcp.iter().map(|tcp| tcp.as_fd())).collect();
        let greeted = fdpass::send(stream.as_fd(), &hello, &sockets).is_ok_and(|sent| sent == hello.len());
        let key = self.next_key();
        let set =
            stream.set_nonblocking(true).and_then(|()| self.poller.add(&stream, Token::Daemon(key), Interest::Read));
        if greeted && set.is_ok() {
            self.connected.insert(key, Daemon { stream, decoder: Decoder::default() });
        }
    }

    fn read_daemon(&mut self, key: u32) {
        loop {
            let Some(daemon) = self.connected.get_mut(&key) else { return };
            match unless_blocked(io::Read::read(&mut daemon.stream, &mut self.buffer)) {
                Ok(None) => return,
                Ok(Some(length)) if length > 0 => daemon.decoder.push(&self.buffer[..length]),
                Ok(Some(_)) | Err(_) => return drop(self.connected.remove(&key)),
            }
            while let Some(daemon) = self.connected.get_mut(&key) {
                match daemon.decoder.next() {
                    Ok(None) => break,
                    Ok(Some(order)) => self.obey(key, order),
                    Err(malformed) => {
                        self.report(key, &Report::Failed(malformed.to_string()));
                        self.connected.remove(&key);
                    }
                }
            }
        }
    }

    fn obey(&mut self, key: u32, order: Order) {
        match order {
            Order::Zone(zone) => {
                let began = match self.zone.replace(zone) {
                    Some(_) => Ok(()),
                    None => self.begin_listening(),
                };
                fork::trim_heap();
                match began {
                    Ok(()) => self.report(key, &Report::Done),
                    Err(error) => self.report(key, &Report::Failed(error.to_string())),
                }
            }
            Order::Stop => {
                // Others have the same open files, in which the queries that come now wait for them.
                self.udp.iter().for_each(|socket| self.poller.remove(socket));
                self.tcp.iter().for_each(|listener| self.poller.remove(listener));
                self.ends_at = Some(Instant::now() + DRAIN);
                self.report(key, &Report::Done);
            }
        }
    }

    fn begin_listening(&self) -> io::Result<()> {
        for (key, socket) in (0..).zip(&self.udp) {
            self.poller.add(socket, Token::Udp(key), Interest::Read)?;
        }
        for (key, listener) in (0..).zip(&self.tcp) {
            self.poller.add(listener, Token::Tcp(key), Interest::Read)?;
        }
        Ok(())
    }

    /// Reports are far shorter than a socket's buffer; a daemon that lets it fill up has lost its connection.
    fn report(&mut self, key: u32, report: &Report) {
        let sent = self.connected.get_mut(&key).map(|daemon| daemon.stream.write_all(&report.encode()));
        if matches!(sent, Some(Err(_))) {
            self.connected.remove(&key);
        }
    }
}

fn random_id() -> u16 {
    u16::from_ne_bytes(sys::random::bytes())
}

/// The servers that are asked for other names, as new as their file.
#[derive(Debug)]
struct Resolvers {
    source: Upstreams,
    /// Never asked: it would be this server.
    own: Vec<IpAddr>,
    servers: Vec<SocketAddr>,
    looked_at: Option<Instant>,
}

impl Resolvers {
    fn new(source: Upstreams, own: Vec<IpAddr>) -> Resolvers {
        Resolvers { source, own, servers: Vec::new(), looked_at: None }
    }

    fn now(&mut self, now: Instant) -> &[SocketAddr] {
        let fresh = self.looked_at.is_some_and(|then| now.saturating_duration_since(then) < FILE_AGE);
        if !fresh {
            self.looked_at = Some(now);
            self.look();
        }
        &self.servers
    }

    fn look(&mut self) {
        let servers = match &self.source {
            Upstreams::Fixed(servers) => servers.clone(),
            Upstreams::File(path) => read_servers(path),
        };
        self.servers = servers.into_iter().filter(|server| !self.own.contains(&server.ip())).collect();
    }
}

/// The servers of a file, or systemd-resolved's own ones when it names its stub only: the stub may have been told to ask
/// here, which nobody could see.
fn read_servers(path: &Path) -> Vec<SocketAddr> {
    let servers = parse_file(path);
    let resolved = Path::new(RESOLVED);
    if upstream::is_stub(&servers) && resolved.exists() { parse_file(resolved) } else { servers }
}

fn parse_file(path: &Path) -> Vec<SocketAddr> {
    const TEXT_MAX: u64 = 64 << 10;
    let mut text = Vec::new();
    let read =
        fs::File::open(path).and_then(|file| io::Read::read_to_end(&mut io::Read::take(file, TEXT_MAX), &mut text));
    // A file that cannot be read names no servers; so do resolvers see it.
    if read.is_err() {
        return Vec::new();
    }
    upstream::parse(&String::from_utf8_lossy(&text), interface_index)
}

fn interface_index(name: &str) -> Option<u32> {
    let any = socket(AddressFamily::INET, SocketType::DGRAM, None).ok()?;
    netdevice::name_to_index(&any, name).ok()
}
