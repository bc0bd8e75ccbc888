//! Connections to registries: TCP, TLS by the host's certificates, HTTP/1.1, reused within one pull and closed with it.

use std::collections::{HashMap, HashSet};
use std::io;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::client::TlsStream;
use tokio_util::either::Either;

use super::hosts::{Tls, Transport, split_authority};
use super::tls;

/// A request's body.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Where a request goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Endpoint {
    pub(crate) transport: Transport,
    pub(crate) authority: String,
    pub(crate) tls: Tls,
    pub(crate) dial_timeout: Option<Duration>,
    pub(crate) reach: Reach,
}

/// What addresses an endpoint may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Reach {
    /// Any: the operator or the reference has named it.
    Anywhere,
    /// None of the node itself or of its link, where services take the node for one of theirs: a registry has named it.
    Far,
}

/// The connections of one pull.
#[derive(Default)]
pub(crate) struct Connections {
    idle: Mutex<HashMap<Endpoint, Vec<http1::SendRequest<Body>>>>,
    /// The tasks that move the bytes of each connection; they end with this value.
    tasks: Mutex<JoinSet<()>>,
    /// Parsing the host's trust roots takes time and memory: once for each set of certificates in a pull.
    tls_configs: Mutex<HashMap<Tls, Arc<rustls::ClientConfig>>>,
    /// Authorities that turned out to speak no TLS.
    plain: Mutex<HashSet<String>>,
    /// Authorities that were reached on the node itself or on its link.
    near: Mutex<HashSet<String>>,
}

const DIAL_TIMEOUT: Duration = Duration::from_secs(30);
/// A proxying registry fetches a manifest or the start of a blob from elsewhere before it answers.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
const READ_BUFFER_BYTES: usize = 512 << 10;

impl Connections {
    /// Sends a request and returns the answer as soon as its head is there.
    pub(crate) async fn send(&self, endpoint: &Endpoint, mut request: Request<Body>) -> io::Result<Response<Incoming>> {
        set_host(&mut request, endpoint)?;
        loop {
            let Some(mut sender) = self.idle(endpoint) else { break };
            match timeout(ANSWER_TIMEOUT, sender.try_send_request(request)).await {
                Err(_) => return Err(silent()),
                Ok(Ok(response)) => {
                    self.keep(endpoint, sender);
                    return Ok(response);
                }
                // The server closed a connection it had let idle: the request was not sent.
                Ok(Err(mut failed)) => match failed.take_message() {
                    Some(unsent) => request = unsent,
                    None => return Err(io::Error::other(failed.into_error())),
                },
            }
        }
        let mut sender = self.connect(endpoint).await?;
        let response = timeout(ANSWER_TIMEOUT, sender.send_request(request))
            .await
            .map_err(|_| silent())?
            .map_err(io::Error::other)?;
        self.keep(endpoint, sender);
        Ok(response)
    }

    fn idle(&self, endpoint: &Endpoint) -> Option<http1::SendRequest<Body>> {
        let mut idle = self.idle.lock().expect("no panic while it is held");
        let senders = idle.get_mut(endpoint)?;
        senders.retain(|sender| !sender.is_closed());
        let ready = senders.iter().position(http1::SendRequest::is_ready)?;
        Some(senders.swap_remove(ready))
    }

    fn keep(&self, endpoint: &Endpoint, sender: http1::SendRequest<Body>) {
        self.idle.lock().expect("no panic while it is held").entry(endpoint.clone()).or_default().push(sender);
    }

    async fn connect(&self, endpoint: &Endpoint) -> io::Result<http1::SendRequest<Body>> {
        let stream = self.stream(endpoint).await?;
        let (sender, connection) = http1::Builder::new()
            .max_buf_size(READ_BUFFER_BYTES)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(io::Error::other)?;
        let mut tasks = self.tasks.lock().expect("no panic while it is held");
        // Those that have ended leave nothing to look at.
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            // A broken connection is seen by the request that it breaks.
            let _ = connection.await;
        });
        Ok(sender)
    }

    async fn stream(&self, endpoint: &Endpoint) -> io::Result<Stream> {
        let port = if endpoint.transport == Transport::Plain { 80 } else { 443 };
        if endpoint.transport == Transport::Plain || self.is_known_plain(&endpoint.authority) {
            return self.dial(endpoint, port).await.map(Stream::Left);
        }
        match self.tls_stream(endpoint, self.dial(endpoint, port).await?).await {
            Err(e) if endpoint.transport == Transport::TlsOrPlain && speaks_no_tls(&e) => {
                self.remember_plain(&endpoint.authority);
                self.dial(endpoint, port).await.map(Stream::Left)
            }
            other => other,
        }
    }

    async fn tls_stream(&self, endpoint: &Endpoint, tcp: TcpStream) -> io::Result<Stream> {
        let (name, _) = split_authority(&endpoint.authority);
        let name = name.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(name).map_err(io::Error::other)?;
        let connector = tokio_rustls::TlsConnector::from(self.tls_config(&endpoint.tls)?);
        let wait = endpoint.dial_timeout.unwrap_or(DIAL_TIMEOUT);
        let stream = timeout(wait, connector.connect(name, tcp))
            .await
            .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the TLS handshake takes too long"))??;
        Ok(Stream::Right(Box::new(stream)))
    }

    fn tls_config(&self, settings: &Tls) -> io::Result<Arc<rustls::ClientConfig>> {
        let mut configs = self.tls_configs.lock().expect("no panic while it is held");
        if let Some(config) = configs.get(settings) {
            return Ok(Arc::clone(config));
        }
        let config = Arc::new(tls::client_config(settings)?);
        configs.insert(settings.clone(), Arc::clone(&config));
        Ok(config)
    }

    /// How far those may be whom this host names: who is near itself may name whom it wants.
    pub(crate) fn reach_from(&self, authority: &str) -> Reach {
        let is_near = self.near.lock().expect("no panic while it is held").contains(authority);
        if is_near { Reach::Anywhere } else { Reach::Far }
    }

    async fn dial(&self, endpoint: &Endpoint, default_port: u16) -> io::Result<TcpStream> {
        let stream = dial(endpoint, default_port).await?;
        if is_near(stream.peer_addr()?.ip()) {
            self.near.lock().expect("no panic while it is held").insert(endpoint.authority.clone());
        }
        Ok(stream)
    }

    fn is_known_plain(&self, authority: &str) -> bool {
        self.plain.lock().expect("no panic while it is held").contains(authority)
    }

    fn remember_plain(&self, authority: &str) {
        self.plain.lock().expect("no panic while it is held").insert(authority.to_owned());
    }
}

fn silent() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))
}

fn set_host(request: &mut Request<Body>, endpoint: &Endpoint) -> io::Result<()> {
    let host = http::HeaderValue::from_str(&endpoint.authority).map_err(io::Error::other)?;
    request.headers_mut().insert(http::header::HOST, host);
    Ok(())
}

/// What a plain HTTP server makes of a TLS greeting: an answer that is no TLS, or a closed connection.
fn speaks_no_tls(error: &io::Error) -> bool {
    let by_rustls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match by_rustls {
        Some(rustls::Error::InvalidMessage(_) | rustls::Error::PeerSentOversizedRecord) => true,
        Some(_) => false,
        None => matches!(error.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset),
    }
}

async fn dial(endpoint: &Endpoint, default_port: u16) -> io::Result<TcpStream> {
    let (name, port) = split_authority(&endpoint.authority);
    let name = name.trim_start_matches('[').trim_end_matches(']');
    let wait = endpoint.dial_timeout.unwrap_or(DIAL_TIMEOUT);
    let stream = timeout(wait, reach(name, port.unwrap_or(default_port), endpoint.reach)).await;
    let stream = stream
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, format!("no connection within {} s", wait.as_secs())))??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Tries the addresses of a name in turn.
async fn reach(name: &str, port: u16, reach: Reach) -> io::Result<TcpStream> {
    let mut failure = io::Error::new(io::ErrorKind::NotFound, "it has no address");
    for address in tokio::net::lookup_host((name, port)).await? {
        if reach == Reach::Far && is_near(address.ip()) {
            let reason =
                format!("a registry elsewhere leads to {}, which is of the node itself or of its link", address.ip());
            failure = io::Error::new(io::ErrorKind::InvalidInput, reason);
            continue;
        }
        match TcpStream::connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => failure = error,
        }
    }
    Err(failure)
}

/// Loopback, link-local (where clouds tell machines their credentials) and unspecified addresses.
fn is_near(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => address.is_loopback() || address.is_link_local() || address.is_unspecified(),
        IpAddr::V6(address) => address.is_loopback() || address.is_unicast_link_local() || address.is_unspecified(),
    }
}

/// In the clear, or of TLS.
type Stream = Either<TcpStream, Box<TlsStream<TcpStream>>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_node_and_its_link() {
        let near = ["127.0.0.1", "127.9.9.9", "169.254.169.254", "0.0.0.0", "::1", "::", "fe80::1", "::ffff:127.0.0.1"];
        assert!(near.iter().all(|address| is_near(address.parse().unwrap())));
        assert!(!["10.0.0.1", "192.0.2.1", "2001:db8::1", "fd00::1"].iter().any(|far| is_near(far.parse().unwrap())));
    }

    #[tokio::test]
    async fn whom_a_registry_names_is_not_on_the_node() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        for name in ["127.0.0.1", "localhost"] {
            let refused = reach(name, port, Reach::Far).await.unwrap_err();
            assert!(refused.to_string().contains("of the node itself"), "{refused}");
            reach("127.0.0.1", port, Reach::Anywhere).await.unwrap();
        }
    }
}
