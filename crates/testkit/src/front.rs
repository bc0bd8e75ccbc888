//! A relay before an API server that ends TLS on both sides, for one user: it breaks watches off, and lets objects come other
//! than they are stored.
//!
//! ```text
//! client ── TLS ──► front ── TLS, as the user ──► API server
//! ```

use std::collections::HashMap;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, bail};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::{ServerConfig, ServerConnection, StreamOwned};
use serde_json::Value;

use crate::api::{Api, Sent};
use crate::certificates::Pair;

/// The API server ends every watch before.
const ANSWER_LIMIT: Duration = Duration::from_secs(3600);

/// What becomes of each object on its way to the client.
type Change = Box<dyn Fn(&mut Value) + Send>;

/// The relay. It takes no connections after this, and those that it has are broken off.
#[derive(Debug)]
pub struct Front {
    address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    server: Api,
    tls: Arc<ServerConfig>,
    /// A watch is broken off after so many events.
    events_max: AtomicUsize,
    cuts: AtomicUsize,
    change: Mutex<Option<Change>>,
    /// Client and server of the connections that are open.
    open: Mutex<HashMap<usize, [TcpStream; 2]>>,
    ended: AtomicBool,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("server", &self.server).finish_non_exhaustive()
    }
}

/// Why a lock is not poisoned.
const SERVES: &str = "no thread that serves has panicked";

type Client = BufReader<StreamOwned<ServerConnection, TcpStream>>;

struct Request {
    method: String,
    path: String,
    kind: String,
    body: Option<Value>,
}

impl Front {
    /// Serves at a port of `address` with the certificate `pair`, and asks `server` as the user that it speaks for, in the
    /// calling thread's network namespace.
    ///
    /// # Errors
    /// A file cannot be read, or there is no port.
    pub fn start(address: IpAddr, pair: &Pair, server: Api) -> anyhow::Result<Self> {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let chain = vec![CertificateDer::from_pem_file(&pair.certificate)?];
        let tls = tls.with_no_client_auth().with_single_cert(chain, PrivateKeyDer::from_pem_file(&pair.key)?)?;
        let listener = TcpListener::bind((address, 0)).with_context(|| format!("listen at {address}"))?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            server,
            tls: Arc::new(tls),
            events_max: AtomicUsize::new(usize::MAX),
            cuts: AtomicUsize::new(0),
            change: Mutex::default(),
            open: Mutex::default(),
            ended: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        std::thread::spawn(move || {
            for (number, client) in (0..).zip(listener.incoming().map_while(Result::ok)) {
                if accepting.ended.load(Ordering::SeqCst) {
                    break;
                }
                let shared = Arc::clone(&accepting);
                // A connection that breaks is what clients have to bear.
                std::thread::spawn(move || {
                    let _ = shared.serve(number, client);
                    shared.open.lock().expect(SERVES).remove(&number);
                });
            }
        });
        Ok(Self { address, shared })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Breaks each watch off after so many events from now on.
    pub fn cut_after(&self, events: usize) {
        self.shared.events_max.store(events, Ordering::SeqCst);
    }

    /// How many watches have been broken off.
    pub fn cuts(&self) -> usize {
        self.shared.cuts.load(Ordering::SeqCst)
    }

    /// Lets each object come as `change` makes it, from now on.
    ///
    /// # Panics
    /// A thread that serves has panicked.
    pub fn change(&self, change: impl Fn(&mut Value) + Send + 'static) {
        *self.shared.change.lock().expect(SERVES) = Some(Box::new(change));
    }
}

impl Drop for Front {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        // Wakes the accepting thread; if it cannot be reached it is gone.
        let _ = TcpStream::connect(self.address);
        for stream in self.shared.open.lock().expect(SERVES).values().flatten() {
            let _ = stream.shutdown(Shutdown::Both); // The other side may have gone.
        }
    }
}

impl Shared {
    /// One connection, one request: its answer ends with it.
    fn serve(&self, number: usize, mut socket: TcpStream) -> anyhow::Result<()> {
        socket.set_nodelay(true)?;
        let mut session = ServerConnection::new(Arc::clone(&self.tls))?;
        while session.is_handshaking() {
            session.complete_io(&mut socket)?;
        }
        let near = socket.try_clone()?;
        let mut client = BufReader::new(StreamOwned::new(session, socket));
        let Some(request) = read_request(&mut client)? else { return Ok(()) };
        let connection = self.server.connect(ANSWER_LIMIT)?;
        self.open.lock().expect(SERVES).insert(number, [near, connection.socket()?]);
        let body = request.body.as_ref().map(|body| (request.kind.as_str(), body));
        let mut answer = connection.send(&request.method, &request.path, body)?;
        let status = answer.head()?;
        let head = format!("HTTP/1.1 {status} Relayed\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n");
        client.get_mut().write_all(head.as_bytes())?;
        if status == 200 && request.path.contains("watch=") {
            return self.pass_events(answer, &mut client);
        }
        let mut rest = answer.rest()?;
        if status == 200
            && let Ok(mut value) = serde_json::from_str::<Value>(&rest)
        {
            match value.get_mut("items").and_then(Value::as_array_mut) {
                Some(items) => items.iter_mut().for_each(|item| self.apply(item)),
                None => self.apply(&mut value),
            }
            rest = value.to_string();
        }
        client.get_mut().write_all(rest.as_bytes())?;
        client.get_mut().conn.send_close_notify();
        Ok(client.get_mut().flush()?)
    }

    fn pass_events(&self, answer: Sent, client: &mut Client) -> anyhow::Result<()> {
        for (number, line) in (1..).zip(answer.lines()) {
            let mut event: Value = serde_json::from_str(&line?)?;
            self.apply(&mut event["object"]);
            client.get_mut().write_all(format!("{event}\n").as_bytes())?;
            client.get_mut().flush()?;
            if number >= self.events_max.load(Ordering::SeqCst) {
                self.cuts.fetch_add(1, Ordering::SeqCst);
                return Ok(client.get_mut().sock.shutdown(Shutdown::Both)?);
            }
        }
        client.get_mut().conn.send_close_notify();
        Ok(client.get_mut().flush()?)
    }

    fn apply(&self, object: &mut Value) {
        if let Some(change) = &*self.change.lock().expect(SERVES) {
            change(object);
        }
    }
}

/// `None`: the client has gone without one.
fn read_request(client: &mut Client) -> anyhow::Result<Option<Request>> {
    let mut line = String::new();
    if client.read_line(&mut line)? == 0 {
        return Ok(None);
    }
    let mut words = line.split(' ');
    let [Some(method), Some(path)] = [words.next(), words.next()] else { bail!("not HTTP: {line:?}") };
    let (method, path) = (method.to_owned(), path.to_owned());
    let (mut kind, mut length) = ("application/json".to_owned(), 0);
    loop {
        line.clear();
        client.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        match name.to_ascii_lowercase().as_str() {
            "content-type" => value.trim().clone_into(&mut kind),
            "content-length" => length = value.trim().parse()?,
            _ => {}
        }
    }
    let mut body = vec![0; length];
    client.read_exact(&mut body)?;
    let body = if body.is_empty() { None } else { Some(serde_json::from_slice(&body)?) };
    Ok(Some(Request { method, path, kind, body }))
}
