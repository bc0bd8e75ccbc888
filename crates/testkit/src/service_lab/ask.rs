//! Clients: many connections to one address, and the set of what came of them.

use std::cell::Cell;
use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::net;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{echo, sctp};

/// So many connections of a client are open at once: more at the same moment overrun the queues between namespaces.
const OPEN_MAX: usize = 64;

/// A client of UDP or SCTP sends again when nothing has come for this time, or for this part of what it waits in all: a full
/// buffer is no answer. On a busy machine the first answer may be on its way still; a second one to SCTP is no packet that
/// connection tracking knows, is led nowhere, and comes back as an error to whoever is at the same address.
const AGAIN: Duration = Duration::from_millis(80);
const TRIES: u32 = 6;

/// Local ports of clients: none that Kubernetes gives to somebody. They are taken in turn, so that hardly two are one flow
/// while anybody remembers it: connection tracking does for 10 s after a refusal, and would treat the next one alike, whatever
/// the rules are by then.
const PORTS: [std::ops::Range<u16>; 2] = [1024..30_000, 33_000..65_000];

/// Transport protocols.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP; only its first packet and the answer.
    Sctp,
}

impl Protocol {
    /// As Kubernetes writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        }
    }
}

/// How often something is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Times {
    /// Side by side.
    Together(usize),
    /// One after the other.
    InTurn(usize),
}

/// A service's address, asked a number of times.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Question {
    /// By which protocol.
    pub protocol: Protocol,
    /// Where.
    pub to: SocketAddr,
    /// The client's own address; the kernel chooses if there is none.
    pub source: Option<IpAddr>,
    /// How often.
    pub times: Times,
    /// When nothing is taken to come any more.
    pub limit: Duration,
}

/// What came of one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Answer {
    /// An endpoint answered.
    Served {
        /// Where it was reached.
        by: SocketAddr,
        /// Whom it saw.
        seen: IpAddr,
    },
    /// It was refused (ECONNREFUSED).
    Refused,
    /// The kernel said something else: its number of the error.
    Failed(i32),
    /// Something came that makes no sense.
    Broken,
    /// Nothing came.
    Silent,
}

impl Answer {
    fn of(result: io::Result<String>) -> Self {
        match result {
            Ok(text) => echo::read(&text).map_or(Self::Broken, |(by, seen)| Self::Served { by, seen }),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Self::Refused,
            Err(error) => error.raw_os_error().map_or(Self::Broken, Self::Failed),
        }
    }

    /// Whether an endpoint answered.
    pub fn is_served(&self) -> bool {
        matches!(self, Self::Served { .. })
    }
}

impl fmt::Display for Answer {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Served { by, seen } => write!(to, "{by} (saw {seen})"),
            Self::Refused => to.write_str("refused"),
            Self::Failed(errno) => write!(to, "{}", io::Error::from_raw_os_error(*errno)),
            Self::Broken => to.write_str("broken"),
            Self::Silent => to.write_str("nothing"),
        }
    }
}

/// What came of a question.
pub type Answers = BTreeSet<Answer>;

/// Asks all `questions` in the calling task's namespace; the answers are in their order.
pub async fn ask_all(questions: Vec<Question>) -> Vec<Answers> {
    let free = Arc::new(Semaphore::new(OPEN_MAX));
    let mut asked = JoinSet::new();
    let mut answers = vec![Answers::new(); questions.len()];
    for (number, question) in questions.into_iter().enumerate() {
        let free = Arc::clone(&free);
        asked.spawn(async move { (number, ask(question, &free).await) });
    }
    while let Some(Ok((number, answer))) = asked.join_next().await {
        answers[number] = answer;
    }
    answers
}

/// Where nobody answers a few times, nobody ever will: it would only take long.
async fn ask(question: Question, free: &Arc<Semaphore>) -> Answers {
    match question.times {
        Times::InTurn(times) => {
            let mut answers = Answers::new();
            for _ in 0..times {
                let answer = once(&question, free).await;
                answers.insert(answer);
                if !answer.is_served() {
                    break;
                }
            }
            answers
        }
        Times::Together(times) => {
            let mut answers = together(&question, times.min(3), free).await;
            if answers.iter().any(Answer::is_served) {
                answers.extend(together(&question, times.saturating_sub(3), free).await);
            }
            answers
        }
    }
}

async fn together(question: &Question, times: usize, free: &Arc<Semaphore>) -> Answers {
    let mut asked = JoinSet::new();
    for _ in 0..times {
        let (question, free) = (question.clone(), Arc::clone(free));
        asked.spawn(async move { once(&question, &free).await });
    }
    asked.join_all().await.into_iter().collect()
}

async fn once(question: &Question, free: &Semaphore) -> Answer {
    let _one = free.acquire().await; // nobody closes it
    let attempt = async {
        match question.protocol {
            Protocol::Tcp => tcp(question).await,
            Protocol::Udp => udp(question).await,
            Protocol::Sctp => sctp(question).await,
        }
    };
    timeout(question.limit, attempt).await.map_or(Answer::Silent, Answer::of)
}

async fn tcp(question: &Question) -> io::Result<String> {
    let (stream, text) = converse(question.to, question.source).await?;
    // It ends by a reset. A server that remembered it (TIME_WAIT) would take the same port of the same client on its way to
    // another Service for an old segment: the kernel begins each destination's time stamps elsewhere, and the server sees
    // one destination. Nobody has thousands of connections a minute from one address to one endpoint but we.
    net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO))?;
    Ok(text)
}

/// An open connection, and what the server said first.
async fn converse(to: SocketAddr, source: Option<IpAddr>) -> io::Result<(TcpStream, String)> {
    let mut stream = connect(to, source).await?;
    stream.write_u8(b'?').await?;
    let mut text = Vec::new();
    while text.last() != Some(&b'\n') {
        text.push(stream.read_u8().await?);
    }
    Ok((stream, String::from_utf8_lossy(&text).into_owned()))
}

async fn connect(to: SocketAddr, source: Option<IpAddr>) -> io::Result<TcpStream> {
    let socket = loop {
        let socket = if to.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        match socket.bind((source.unwrap_or(any(to)), next_port()).into()) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            bound => break bound.map(|()| socket)?,
        }
    };
    socket.connect(to).await
}

async fn udp(question: &Question) -> io::Result<String> {
    let socket = udp_socket(question.to, question.source).await?;
    loop {
        socket.send(b"?").await?;
        if let Ok(received) = timeout(again(question), receive(&socket)).await {
            return received;
        }
    }
}

async fn udp_socket(to: SocketAddr, source: Option<IpAddr>) -> io::Result<UdpSocket> {
    let source = source.unwrap_or(any(to));
    let socket = loop {
        match UdpSocket::bind((source, next_port())).await {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
            bound => break bound?,
        }
    };
    socket.connect(to).await?;
    Ok(socket)
}

async fn receive(socket: &UdpSocket) -> io::Result<String> {
    let mut buffer = [0; 128];
    let length = socket.recv(&mut buffer).await?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

async fn sctp(question: &Question) -> io::Result<String> {
    let source_port = next_port();
    let socket = sctp::Socket::bind(question.source.unwrap_or(any(question.to)))?;
    socket.connect(question.to.ip()).await?;
    let answer = async || loop {
        let (packet, _) = socket.receive().await?;
        if (packet.source_port, packet.destination_port) == (question.to.port(), source_port)
            && let Some(text) = packet.text()
        {
            return Ok(text);
        }
    };
    loop {
        socket.send(&sctp::Packet::init(source_port, question.to.port())).await?;
        if let Ok(received) = timeout(again(question), answer()).await {
            return received;
        }
    }
}

fn again(question: &Question) -> Duration {
    AGAIN.max(question.limit / TRIES)
}

fn any(to: SocketAddr) -> IpAddr {
    if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() }
}

fn next_port() -> u16 {
    // A thread is a namespace. Each begins elsewhere: masquerading makes one address of theirs, and the kernel drops
    // packets that would be one flow by that.
    static THREADS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static PASSED: Cell<usize> = Cell::new(THREADS.fetch_add(4801, Ordering::Relaxed));
    }
    let passed = PASSED.replace(PASSED.get().wrapping_add(1));
    let [low, high] = PORTS;
    let place = passed % (low.len() + high.len());
    low.chain(high).nth(place).expect("it is one of them")
}

/// A connection that is kept.
#[derive(Debug)]
pub struct Kept(TcpStream);

impl Kept {
    /// Opens one in the calling task's namespace, and says who answered.
    ///
    /// # Errors
    /// Nobody answers.
    pub async fn open(to: SocketAddr, limit: Duration) -> io::Result<(Self, SocketAddr)> {
        let open = async {
            let (stream, text) = converse(to, None).await?;
            let (by, _) = echo::read(&text).ok_or(io::ErrorKind::InvalidData)?;
            Ok((Self(stream), by))
        };
        timeout(limit, open).await?
    }

    /// Whether what is sent comes back.
    pub async fn is_alive(&mut self, limit: Duration) -> bool {
        let speak = async {
            self.0.write_u8(b'!').await?;
            self.0.read_u8().await
        };
        matches!(timeout(limit, speak).await, Ok(Ok(b'!')))
    }
}

/// A client of UDP that keeps its port, as resolvers and telephones do.
#[derive(Debug)]
pub struct Flow(UdpSocket);

impl Flow {
    /// A client of `to` in the calling task's namespace.
    ///
    /// # Errors
    /// Those of the kernel.
    pub async fn open(to: SocketAddr) -> io::Result<Self> {
        Ok(Self(udp_socket(to, None).await?))
    }

    /// Sends once more, and says what came.
    pub async fn ask(&self, limit: Duration) -> Answer {
        let ask = async {
            self.0.send(b"?").await?;
            receive(&self.0).await
        };
        timeout(limit, ask).await.map_or(Answer::Silent, Answer::of)
    }
}

/// The answer of the HTTP server at `to` to `GET path`, head and body.
///
/// # Errors
/// Nobody answers.
pub async fn get(to: SocketAddr, path: String, limit: Duration) -> io::Result<String> {
    let ask = async {
        let mut stream = connect(to, None).await?;
        stream.write_all(format!("GET {path} HTTP/1.0\r\nHost: {to}\r\n\r\n").as_bytes()).await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    };
    timeout(limit, ask).await?
}
