//! A small client of an API server, for tests: requests on connections of their own, and waiting for what an object becomes
//! by a watch.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::{Value, json};

use crate::certificates::Pair;
use crate::pace;

/// How long a request may take, unless it is a watch.
const REQUEST_LIMIT: Duration = Duration::from_secs(30);

/// A client with one identity.
#[derive(Debug, Clone)]
pub struct Api {
    address: SocketAddr,
    tls: Arc<ClientConfig>,
}

/// What a server answers.
#[derive(Debug)]
pub struct Reply {
    /// The HTTP status code.
    pub status: u16,
    /// The body as it came.
    pub body: String,
}

impl Reply {
    /// The body as JSON.
    ///
    /// # Errors
    /// The server refused (another code than 2xx; its message is in the error), or it is no JSON.
    pub fn json(&self) -> anyhow::Result<Value> {
        if !(200..300).contains(&self.status) {
            bail!("the API server answered {}: {}", self.status, self.body);
        }
        Ok(serde_json::from_str(&self.body)?)
    }
}

/// A connection that is open already: what is asked on it waits for no handshake. It takes one request.
#[derive(Debug)]
pub struct Connection {
    host: SocketAddr,
    stream: Stream,
}

/// A request on its way.
#[derive(Debug)]
pub struct Sent {
    title: String,
    stream: Stream,
}

impl Connection {
    /// Its socket, to break it off.
    pub(crate) fn socket(&self) -> std::io::Result<TcpStream> {
        self.stream.get_ref().sock.try_clone()
    }

    /// Sends a request and does not wait for its answer; `body` comes with its content type.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn send(mut self, method: &str, path: &str, body: Option<(&str, &Value)>) -> anyhow::Result<Sent> {
        let title = format!("{method} {path}");
        // The answer to HTTP/1.0 ends with the connection, in no chunks.
        let mut head = format!("{title} HTTP/1.0\r\nHost: {}\r\nAccept: application/json\r\n", self.host);
        let (kind, bytes) = match body {
            Some((kind, value)) => (kind, serde_json::to_vec(value)?),
            None => ("application/json", Vec::new()),
        };
        head += &format!("Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n", bytes.len());
        self.stream.get_mut().write_all(&[head.as_bytes(), &bytes].concat())?;
        Ok(Sent { title, stream: self.stream })
    }
}

impl Sent {
    /// Waits for the answer.
    ///
    /// # Errors
    /// None within half a minute.
    pub fn reply(mut self) -> anyhow::Result<Reply> {
        let status = self.head()?;
        Ok(Reply { status, body: read_rest(&mut self.stream)? })
    }

    /// Reads the head of the answer, and returns its status code.
    pub(crate) fn head(&mut self) -> anyhow::Result<u16> {
        read_head(&mut self.stream).with_context(|| self.title.clone())
    }

    /// What comes after the head.
    pub(crate) fn rest(mut self) -> anyhow::Result<String> {
        read_rest(&mut self.stream)
    }

    /// The same, line by line as it comes.
    pub(crate) fn lines(self) -> impl Iterator<Item = std::io::Result<String>> {
        self.stream.lines()
    }
}

/// A connection for one request after the other: many of them cost no handshake each.
#[derive(Debug)]
pub struct Session {
    host: SocketAddr,
    stream: Stream,
}

impl Session {
    /// Any request; `body` comes with its content type.
    ///
    /// # Errors
    /// The connection is lost, or there is no answer within half a minute.
    pub fn request(&mut self, method: &str, path: &str, body: Option<(&str, &Value)>) -> anyhow::Result<Reply> {
        let title = format!("{method} {path}");
        let mut head = format!("{title} HTTP/1.1\r\nHost: {}\r\nAccept: application/json\r\n", self.host);
        let (kind, bytes) = match body {
            Some((kind, value)) => (kind, serde_json::to_vec(value)?),
            None => ("application/json", Vec::new()),
        };
        head += &format!("Content-Type: {kind}\r\nContent-Length: {}\r\n\r\n", bytes.len());
        self.stream.get_mut().write_all(&[head.as_bytes(), &bytes].concat())?;
        self.reply().with_context(|| title)
    }

    /// Creates `object` in the collection at `path`.
    ///
    /// # Errors
    /// As [`Session::request`], or refused.
    pub fn create(&mut self, path: &str, object: &Value) -> anyhow::Result<()> {
        let reply = self.request("POST", path, Some(("application/json", object)))?;
        reply.json().map(drop).with_context(|| format!("POST {path}"))
    }

    fn reply(&mut self) -> anyhow::Result<Reply> {
        let status = status_of(&read_line(&mut self.stream)?)?;
        let (mut length, mut is_chunked) = (None, false);
        loop {
            let line = read_line(&mut self.stream)?.to_ascii_lowercase();
            match line.split_once(':').map(|(name, value)| (name, value.trim())) {
                Some(("content-length", value)) => length = Some(value.parse()?),
                Some(("transfer-encoding", value)) => is_chunked = value == "chunked",
                Some(_) => {}
                None => break,
            }
        }
        let body = match length {
            Some(length) => self.read(length)?,
            None if is_chunked => self.read_chunks()?,
            None => bail!("an answer without an end"),
        };
        Ok(Reply { status, body: String::from_utf8(body)? })
    }

    fn read(&mut self, length: usize) -> anyhow::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// RFC 9112, 7.1; the API server sends neither extensions nor trailers.
    fn read_chunks(&mut self) -> anyhow::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = read_line(&mut self.stream)?;
            let length = usize::from_str_radix(&line, 16).with_context(|| format!("no length: {line:?}"))?;
            body.extend(self.read(length)?);
            read_line(&mut self.stream)?;
            if length == 0 {
                return Ok(body);
            }
        }
    }
}

type Stream = BufReader<StreamOwned<ClientConnection, TcpStream>>;

impl Api {
    /// A client that trusts `authority` and shows `identity`.
    ///
    /// # Errors
    /// A file cannot be read.
    pub fn new(address: SocketAddr, authority: &Path, identity: Option<&Pair>) -> anyhow::Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(authority)?)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
        let builder = builder.with_root_certificates(roots);
        let tls = match identity {
            None => builder.with_no_client_auth(),
            Some(pair) => {
                let chain = vec![CertificateDer::from_pem_file(&pair.certificate)?];
                builder.with_client_auth_cert(chain, PrivateKeyDer::from_pem_file(&pair.key)?)?
            }
        };
        Ok(Self { address, tls: Arc::new(tls) })
    }

    /// The object or list at `path`.
    ///
    /// # Errors
    /// No connection, or refused.
    pub fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.request("GET", path, None)?.json().with_context(|| format!("GET {path}"))
    }

    /// Creates `object` in the collection at `path` and returns it as the server completed it.
    ///
    /// # Errors
    /// No connection, or refused.
    pub fn create(&self, path: &str, object: &Value) -> anyhow::Result<Value> {
        self.request("POST", path, Some(("application/json", object)))?.json().with_context(|| format!("POST {path}"))
    }

    /// Creates `object` unless one with its name is there.
    ///
    /// # Errors
    /// No connection, or refused for another reason.
    pub fn ensure(&self, path: &str, object: &Value) -> anyhow::Result<()> {
        let reply = self.request("POST", path, Some(("application/json", object)))?;
        if reply.status == 409 {
            return Ok(());
        }
        reply.json().map(drop).with_context(|| format!("POST {path}"))
    }

    /// Replaces the object at `path`.
    ///
    /// # Errors
    /// No connection, or refused.
    pub fn replace(&self, path: &str, object: &Value) -> anyhow::Result<Value> {
        self.request("PUT", path, Some(("application/json", object)))?.json().with_context(|| format!("PUT {path}"))
    }

    /// Merges `patch` into the object at `path` (RFC 7396).
    ///
    /// # Errors
    /// No connection, or refused.
    pub fn merge(&self, path: &str, patch: &Value) -> anyhow::Result<Value> {
        let body = Some(("application/merge-patch+json", patch));
        self.request("PATCH", path, body)?.json().with_context(|| format!("PATCH {path}"))
    }

    /// Deletes the object at `path`, with the grace that it asks for.
    ///
    /// # Errors
    /// No connection, or refused.
    pub fn delete(&self, path: &str) -> anyhow::Result<()> {
        self.request("DELETE", path, None)?.json().map(drop).with_context(|| format!("DELETE {path}"))
    }

    /// Binds a Pod to a node, as a scheduler does.
    ///
    /// # Errors
    /// No connection, or refused.
    pub fn bind(&self, namespace: &str, pod: &str, node: &str) -> anyhow::Result<()> {
        let binding = json!({
            "apiVersion": "v1", "kind": "Binding", "metadata": { "name": pod },
            "target": { "apiVersion": "v1", "kind": "Node", "name": node },
        });
        self.create(&format!("/api/v1/namespaces/{namespace}/pods/{pod}/binding"), &binding).map(drop)
    }

    /// Waits until the object `name` of the collection at `path` satisfies `holds`, and returns it.
    ///
    /// # Errors
    /// Not within `limit` (the object as it was last is in the message), or the server goes away.
    pub fn wait(
        &self,
        path: &str,
        name: &str,
        limit: Duration,
        mut holds: impl FnMut(&Value) -> bool,
    ) -> anyhow::Result<Value> {
        let mut last = Value::Null;
        let field = format!("fieldSelector=metadata.name%3D{name}");
        let outcome = self.watch(&format!("{path}?watch=1&{field}"), limit, |event| {
            let deleted = event["type"] == "DELETED";
            last = event["object"].take();
            !deleted && holds(&last)
        });
        outcome.with_context(|| format!("wait for {path}/{name}, last seen as {last}"))?;
        Ok(last)
    }

    /// Waits until the collection at `path` has no object `name`.
    ///
    /// # Errors
    /// Not within `limit`, or the server goes away.
    pub fn wait_gone(&self, path: &str, name: &str, limit: Duration) -> anyhow::Result<()> {
        let field = format!("fieldSelector=metadata.name%3D{name}");
        let list = self.get(&format!("{path}?{field}"))?;
        if list["items"].as_array().is_none_or(Vec::is_empty) {
            return Ok(());
        }
        let version = list["metadata"]["resourceVersion"].as_str().context("a list has a version")?;
        let watch = format!("{path}?watch=1&{field}&resourceVersion={version}");
        let outcome = self.watch(&watch, limit, |event| event["type"] == "DELETED");
        outcome.with_context(|| format!("wait for the end of {path}/{name}"))
    }

    /// Hands the events of the watch at `path` to `see` until it returns true.
    ///
    /// # Errors
    /// Not within `limit`, or the server refuses or goes away.
    pub fn watch(&self, path: &str, limit: Duration, mut see: impl FnMut(&mut Value) -> bool) -> anyhow::Result<()> {
        let deadline = Instant::now() + limit;
        let mut sent = self.connect(limit)?.send("GET", path, None)?;
        let status = sent.head()?;
        let mut stream = sent.stream;
        if status != 200 {
            bail!("the API server answered {status}: {}", read_rest(&mut stream)?);
        }
        let mut line = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("nothing of the kind within {} s", limit.as_secs());
            }
            stream.get_ref().sock.set_read_timeout(Some(left))?;
            line.clear();
            match stream.read_line(&mut line) {
                Ok(0) => bail!("the API server has ended the watch"),
                Ok(_) => {}
                Err(error) if is_timeout(&error) => bail!("nothing of the kind within {} s", limit.as_secs()),
                Err(error) => return Err(error).context("read the watch"),
            }
            let mut event: Value = serde_json::from_str(&line).context("an event of the watch")?;
            if event["type"] == "ERROR" {
                bail!("the watch was ended: {}", event["object"]);
            }
            if see(&mut event) {
                return Ok(());
            }
        }
    }

    /// Any request; `body` comes with its content type.
    ///
    /// # Errors
    /// No connection, or no answer within half a minute.
    pub fn request(&self, method: &str, path: &str, body: Option<(&str, &Value)>) -> anyhow::Result<Reply> {
        self.connection()?.send(method, path, body)?.reply()
    }

    /// A connection for one request, open already.
    ///
    /// # Errors
    /// Nobody there, or not the one who is trusted.
    pub fn connection(&self) -> anyhow::Result<Connection> {
        self.connect(pace::stretched(REQUEST_LIMIT))
    }

    /// A connection for many requests.
    ///
    /// # Errors
    /// Nobody there, or not the one who is trusted.
    pub fn session(&self) -> anyhow::Result<Session> {
        let Connection { host, stream } = self.connect(pace::stretched(REQUEST_LIMIT))?;
        Ok(Session { host, stream })
    }

    /// As [`Api::connection`], where the answer may take so long.
    pub(crate) fn connect(&self, limit: Duration) -> anyhow::Result<Connection> {
        let mut socket = TcpStream::connect_timeout(&self.address, pace::stretched(Duration::from_secs(5)).min(limit))
            .with_context(|| format!("connect to {}", self.address))?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(limit))?;
        let name = ServerName::from(self.address.ip());
        let mut session = ClientConnection::new(Arc::clone(&self.tls), name)?;
        while session.is_handshaking() {
            session.complete_io(&mut socket).with_context(|| format!("greet {}", self.address))?;
        }
        Ok(Connection { host: self.address, stream: BufReader::new(StreamOwned::new(session, socket)) })
    }
}

fn read_head(stream: &mut Stream) -> anyhow::Result<u16> {
    let status = status_of(&read_line(stream)?)?;
    while !read_line(stream)?.is_empty() {}
    Ok(status)
}

/// One line without its end; empty at the end of all.
fn read_line(stream: &mut Stream) -> anyhow::Result<String> {
    let mut line = String::new();
    stream.read_line(&mut line)?;
    line.truncate(line.trim_end().len());
    Ok(line)
}

fn status_of(line: &str) -> anyhow::Result<u16> {
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok());
    status.with_context(|| format!("not HTTP: {line:?}"))
}

fn read_rest(stream: &mut Stream) -> anyhow::Result<String> {
    let mut text = String::new();
    stream.read_to_string(&mut text).context("read the answer")?;
    Ok(text)
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
}
