//! An HTTP server in front of a registry, which does to a client what networks and broken servers do.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex};

/// Why a lock is not poisoned.
const SERVES: &str = "no thread that serves has panicked";

/// A request as it came.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// `GET` and the like.
    pub method: String,
    /// With its query.
    pub path: String,
    /// Names as the client spells them, with their values.
    pub headers: Vec<(String, String)>,
    /// What came after them.
    pub body: String,
}

impl Request {
    /// The value of a header, whatever the case of its name.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// Whether it is about a layer or a configuration.
    pub fn is_blob(&self) -> bool {
        self.path.contains("/blobs/")
    }
}

/// What becomes of a request.
#[derive(Debug, Clone)]
pub enum Answer {
    /// The registry answers.
    Forward,
    /// The registry answers to this path.
    ForwardTo(String),
    /// The registry answers, and the connection breaks after so many bytes of the body.
    Cut(u64),
    /// The registry answers the whole, whatever range was asked for; the connection breaks after so many bytes.
    WholeCut(u64),
    /// The registry answers, and the connection hangs after so many bytes of the body, until the client is gone or the proxy
    /// lets go ([`Proxy::let_go`]).
    Hang(u64, Sender<()>),
    /// The proxy itself answers.
    Reply(u16, Vec<(&'static str, String)>, Vec<u8>),
}

/// A running proxy; it takes no connections after this.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

type Policy = Box<dyn Fn(&Request) -> Answer + Send + Sync>;

struct Shared {
    upstream: SocketAddr,
    policy: Policy,
    seen: Mutex<Vec<Request>>,
    sent_bytes: Mutex<u64>,
    hung: Mutex<Vec<TcpStream>>,
    ended: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("upstream", &self.upstream).finish_non_exhaustive()
    }
}

impl Proxy {
    /// Serves on a port of loopback; `policy` says what becomes of each request.
    ///
    /// # Panics
    /// There is no port.
    pub fn start(upstream: SocketAddr, policy: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback has a port");
        let address = listener.local_addr().expect("it was bound");
        let shared = Arc::new(Shared {
            upstream,
            policy: Box::new(policy),
            seen: Mutex::default(),
            sent_bytes: Mutex::default(),
            hung: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if accepting.ended.load(Ordering::SeqCst) {
                    break;
                }
                let shared = Arc::clone(&accepting);
                // A client that goes away in the middle is what the tests are about.
                std::thread::spawn(move || drop(serve(&shared, stream)));
            }
        });
        Self { address, shared }
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Breaks the connections that hang: their clients ask again.
    ///
    /// # Panics
    /// As [`Proxy::seen`].
    pub fn let_go(&self) {
        for stream in self.shared.hung.lock().expect(SERVES).drain(..) {
            let _ = stream.shutdown(Shutdown::Both); // Its client may have gone.
        }
    }

    /// All requests so far.
    ///
    /// # Panics
    /// A thread that serves has panicked.
    pub fn seen(&self) -> Vec<Request> {
        self.shared.seen.lock().expect(SERVES).clone()
    }

    /// Bytes of bodies sent to clients so far.
    ///
    /// # Panics
    /// As [`Proxy::seen`].
    pub fn sent_bytes(&self) -> u64 {
        *self.shared.sent_bytes.lock().expect(SERVES)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // Wakes the accepting thread; if it cannot be reached it is gone.
        let _ = TcpStream::connect(self.address);
    }
}

fn serve(shared: &Shared, stream: TcpStream) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    while let Some(request) = read_request(&mut reader)? {
        shared.seen.lock().expect(SERVES).push(request.clone());
        match (shared.policy)(&request) {
            Answer::Reply(status, headers, body) => reply(&stream, status, &headers, &body)?,
            Answer::Forward => return forward(shared, &request, &stream, u64::MAX),
            Answer::ForwardTo(path) => return forward(shared, &Request { path, ..request }, &stream, u64::MAX),
            Answer::Cut(after) => return forward(shared, &request, &stream, after),
            Answer::WholeCut(after) => {
                let mut request = request;
                request.headers.retain(|(name, _)| !name.eq_ignore_ascii_case("range"));
                return forward(shared, &request, &stream, after);
            }
            Answer::Hang(after, reached) => {
                forward(shared, &request, &stream, after)?;
                shared.hung.lock().expect(SERVES).push(stream.try_clone()?);
                let _ = reached.send(());
                return reader.read(&mut [0; 1]).map(drop);
            }
        }
    }
    Ok(())
}

fn read_request(reader: &mut BufReader<TcpStream>) -> std::io::Result<Option<Request>> {
    let mut line = String::new();
    if reader.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split(' ').map(str::to_owned);
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let mut request = Request { method, path, ..Request::default() };
    loop {
        line.clear();
        reader.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        request.headers.push((name.to_owned(), value.trim().to_owned()));
    }
    let length = request.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    reader.take(length).read_to_string(&mut request.body)?;
    Ok(Some(request))
}

fn reply(mut stream: &TcpStream, status: u16, headers: &[(&str, String)], body: &[u8]) -> std::io::Result<()> {
    let mut head = format!("HTTP/1.1 {status} Test\r\nContent-Length: {}\r\n", body.len());
    for (name, value) in headers {
        head += &format!("{name}: {value}\r\n");
    }
    stream.write_all(format!("{head}\r\n").as_bytes())?;
    stream.write_all(body)
}

/// Hands the request on and the answer back, up to `most` bytes of its body; then the connection ends.
fn forward(shared: &Shared, request: &Request, mut client: &TcpStream, most: u64) -> std::io::Result<()> {
    let mut upstream = TcpStream::connect(shared.upstream)?;
    let mut head = format!("{} {} HTTP/1.1\r\nConnection: close\r\n", request.method, request.path);
    let kept = |name: &str| !name.eq_ignore_ascii_case("connection") && !name.eq_ignore_ascii_case("authorization");
    for (name, value) in request.headers.iter().filter(|(name, _)| kept(name)) {
        head += &format!("{name}: {value}\r\n");
    }
    upstream.write_all(format!("{head}\r\n").as_bytes())?;
    let mut answer = BufReader::new(upstream);
    let mut line = String::new();
    while answer.read_line(&mut line)? > 2 {
        client.write_all(line.as_bytes())?;
        line.clear();
    }
    client.write_all(b"\r\n")?;
    let sent = std::io::copy(&mut answer.take(most), &mut client)?;
    *shared.sent_bytes.lock().expect(SERVES) += sent;
    Ok(())
}
