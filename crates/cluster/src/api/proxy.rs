//! Ways to the API server that lead through a proxy: HTTP CONNECT and SOCKS 5.

use std::fmt;
use std::io;
use std::net::IpAddr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::PROXY_AUTHORIZATION;
use http::uri::PathAndQuery;
use http::{HeaderValue, Request, Uri};
use ipnet::IpNet;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::config::{Secret, Server};
use crate::percent::decode;

/// A proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    kind: Kind,
    host: String,
    port: u16,
    /// Name and password.
    login: Option<(String, Secret)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Connect,
    Socks5,
}

/// No proxy needs more to say that the way is open.
const HEAD_BYTES_MAX: usize = 16 << 10;

impl Proxy {
    /// Reads a URL: `http://`, `socks5://`, with name and password if need be.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(url: &str) -> Result<Self, String> {
        let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let uri: http::Uri = full.parse().map_err(|error| format!("is no URL: {error}"))?;
        let kind = match uri.scheme_str() {
            Some("http") => Kind::Connect,
            Some("socks5" | "socks5h") => Kind::Socks5,
            other => {
                let scheme = other.unwrap_or_default();
                return Err(format!("has the scheme {scheme:?}; use an http:// or socks5:// proxy"));
            }
        };
        let host = uri.host().filter(|host| !host.is_empty()).ok_or("has no host")?;
        let port = uri.port_u16().unwrap_or(if kind == Kind::Connect { 80 } else { 1080 });
        let login = uri.authority().and_then(|authority| authority.as_str().rsplit_once('@')).map(|(login, _)| {
            let (name, password) = login.split_once(':').unwrap_or((login, ""));
            (decode(name), Secret::new(&decode(password)))
        });
        Ok(Proxy { kind, host: host.trim_start_matches('[').trim_end_matches(']').to_owned(), port, login })
    }

    /// The proxy that the environment names for this server, by the rules of Go programs: `HTTPS_PROXY` or `HTTP_PROXY`,
    /// and `NO_PROXY` for exceptions. One that cannot be used is left out with a warning.
    pub(super) fn from_environment(server: &Server, variable: impl Fn(&str) -> Option<String>) -> Option<Self> {
        let either = |upper: &str| variable(upper).or_else(|| variable(&upper.to_lowercase()));
        let name = if server.tls { "HTTPS_PROXY" } else { "HTTP_PROXY" };
        let url = either(name).filter(|url| !url.is_empty())?;
        if is_excepted(server, &either("NO_PROXY").unwrap_or_default()) {
            return None;
        }
        match Proxy::parse(&url) {
            Ok(proxy) => Some(proxy),
            Err(error) => {
                tracing::warn!(variable = name, error, "a proxy of the environment is not used");
                None
            }
        }
    }

    /// Whether it passes requests on to `server` one by one, as Go's clients have it do where nothing is encrypted: it may let
    /// nobody connect to such ports.
    fn forwards(&self, server: &Server) -> bool {
        self.kind == Kind::Connect && !server.tls
    }

    /// Tells the proxy for whom a request is, if it passes requests on (RFC 9112 §3.2.2).
    pub(super) fn address<B>(&self, server: &Server, request: &mut Request<B>) {
        if !self.forwards(server) {
            return;
        }
        let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        let absolute = Uri::builder().scheme("http").authority(server.authority()).path_and_query(path).build();
        *request.uri_mut() = absolute.expect("a server that was parsed has an authority");
        if let Some(login) = self.login() {
            let value = HeaderValue::from_str(&login).expect("base64 is text");
            request.headers_mut().insert(PROXY_AUTHORIZATION, value);
        }
    }

    /// What the proxy wants to see of name and password.
    fn login(&self) -> Option<String> {
        let (name, password) = self.login.as_ref()?;
        Some(format!("Basic {}", STANDARD.encode(format!("{name}:{}", password.expose()))))
    }

    /// A connection to `server` through this proxy, or to the proxy if it passes requests on.
    pub(super) async fn connect(&self, server: &Server) -> io::Result<TcpStream> {
        let mut stream = TcpStream::connect((self.host.as_str(), self.port)).await?;
        match self.kind {
            Kind::Connect if self.forwards(server) => {}
            Kind::Connect => self.ask(&mut stream, server).await?,
            Kind::Socks5 => self.negotiate(&mut stream, server).await?,
        }
        Ok(stream)
    }

    /// HTTP CONNECT (RFC 9110 §9.3.6).
    async fn ask(&self, stream: &mut TcpStream, server: &Server) -> io::Result<()> {
        let authority = server.authority();
        let mut request = format!("CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n");
        if let Some(login) = self.login() {
            request.push_str(&format!("Proxy-Authorization: {login}\r\n"));
        }
        request.push_str("\r\n");
        stream.write_all(request.as_bytes()).await?;
        let head = read_head(stream).await?;
        let status = head.lines().next().unwrap_or_default();
        match status.split_ascii_whitespace().nth(1) {
            Some(code) if code.starts_with('2') => Ok(()),
            _ => Err(io::Error::other(format!("the proxy {self} answers {status:?}"))),
        }
    }

    /// SOCKS 5 (RFC 1928) with a password if there is one (RFC 1929); the proxy looks names up.
    async fn negotiate(&self, stream: &mut TcpStream, server: &Server) -> io::Result<()> {
        const VERSION: u8 = 5;
        let refused = |why: &str| io::Error::other(format!("the proxy {self} {why}"));
        let methods: &[u8] = if self.login.is_some() { &[VERSION, 2, 0, 2] } else { &[VERSION, 1, 0] };
        stream.write_all(methods).await?;
        let mut chosen = [0; 2];
        stream.read_exact(&mut chosen).await?;
        match (chosen[1], &self.login) {
            (0, _) => {}
            (2, Some((name, password))) => {
                let mut login = vec![1];
                push_short(&mut login, name.as_bytes()).ok_or_else(|| refused("takes no name that long"))?;
                push_short(&mut login, password.expose().as_bytes())
                    .ok_or_else(|| refused("takes no password that long"))?;
                stream.write_all(&login).await?;
                let mut answer = [0; 2];
                stream.read_exact(&mut answer).await?;
                if answer[1] != 0 {
                    return Err(refused("refuses name and password"));
                }
            }
            _ => return Err(refused("wants another kind of login")),
        }
        let mut request = vec![VERSION, 1, 0, 3];
        push_short(&mut request, server.host.as_bytes()).ok_or_else(|| refused("takes no host name that long"))?;
        request.extend(server.port.to_be_bytes());
        stream.write_all(&request).await?;
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).await?;
        if answer[1] != 0 {
            return Err(refused(&format!("cannot reach {} (SOCKS reply {})", server.authority(), answer[1])));
        }
        let address = match answer[3] {
            1 => 4,
            4 => 16,
            _ => usize::from(stream.read_u8().await?),
        };
        let mut bound = vec![0; address + 2];
        stream.read_exact(&mut bound).await.map(drop)
    }
}

/// Without name and password.
impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.kind {
            Kind::Connect => "http",
            Kind::Socks5 => "socks5",
        };
        write!(f, "{scheme}://{}:{}", self.host, self.port)
    }
}

/// A text with its length in a byte before it; none if it is too long for that.
fn push_short(message: &mut Vec<u8>, text: &[u8]) -> Option<()> {
    message.push(u8::try_from(text.len()).ok()?);
    message.extend(text);
    Some(())
}

/// Byte by byte, because what follows belongs to the server behind.
async fn read_head(stream: &mut TcpStream) -> io::Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() >= HEAD_BYTES_MAX {
            return Err(io::Error::other("the proxy's answer does not end"));
        }
        head.push(stream.read_u8().await?);
    }
    Ok(String::from_utf8_lossy(&head).into_owned())
}

fn is_excepted(server: &Server, exceptions: &str) -> bool {
    let address: Option<IpAddr> = server.host.parse().ok();
    if server.host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
        return true;
    }
    let matches = |exception: &str| {
        let (name, port) = match exception.rsplit_once(':') {
            Some((name, port)) if !name.contains(':') => (name, port.parse::<u16>().ok()),
            _ => (exception, None),
        };
        if port.is_some_and(|port| port != server.port) {
            return false;
        }
        let domain = name.trim_start_matches('*').trim_start_matches('.');
        match (address, name.parse::<IpNet>(), name.parse::<IpAddr>()) {
            (Some(address), Ok(net), _) => net.contains(&address),
            (Some(address), _, Ok(other)) => address == other,
            (Some(_), ..) => name == "*",
            (None, ..) if name == "*" => true,
            (None, ..) => {
                let host = server.host.to_lowercase();
                let below = host.strip_suffix(&domain.to_lowercase());
                !domain.is_empty() && below.is_some_and(|below| below.is_empty() || below.ends_with('.'))
            }
        }
    };
    exceptions.split(',').map(str::trim).filter(|exception| !exception.is_empty()).any(matches)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(server: &str, variables: &[(&str, &str)]) -> Option<String> {
        let server = Server::parse(server).unwrap();
        let variable =
            |name: &str| variables.iter().find(|(one, _)| *one == name).map(|(_, value)| (*value).to_owned());
        Proxy::from_environment(&server, variable).map(|proxy| proxy.to_string())
    }

    #[test]
    fn the_environment_names_proxies_and_exceptions() {
        let check = |server: &str, exceptions: &str, expect: bool| {
            let found = chosen(server, &[("https_proxy", "http://u:p%40@proxy:3128"), ("NO_PROXY", exceptions)]);
            assert_eq!(found, expect.then(|| "http://proxy:3128".to_owned()), "{server} {exceptions}");
        };
        check("https://cp.example:6443", "", true);
        check("http://cp.example", "", false);
        check("https://127.0.0.1:6443", "", false);
        check("https://10.0.0.1:6443", "10.0.0.0/8", false);
        check("https://11.0.0.1:6443", "10.0.0.0/8", true);
        check("https://cp.example:6443", "other, .example", false);
        check("https://cp.example:6443", "ample", true);
        check("https://cp.example:6443", "cp.example:443", true);
        check("https://cp.example:6443", "*", false);
    }

    /// A proxy for one connection, which answers each of its client's messages in turn.
    async fn scripted(script: &'static [(&'static [u8], &'static [u8])]) -> u16 {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            for (expect, answer) in script {
                let mut heard = vec![0; expect.len()];
                stream.read_exact(&mut heard).await.unwrap();
                assert_eq!(String::from_utf8_lossy(&heard), String::from_utf8_lossy(expect));
                stream.write_all(answer).await.unwrap();
            }
            stream.write_all(b"!").await.unwrap();
            stream
        });
        port
    }

    async fn first_byte(url: String) -> io::Result<u8> {
        Proxy::parse(&url).unwrap().connect(&Server::new("cp", 6443)).await?.read_u8().await
    }

    #[tokio::test]
    async fn connect_leads_to_the_server() {
        let script: &[(&[u8], &[u8])] = &[(
            b"CONNECT cp:6443 HTTP/1.1\r\nHost: cp:6443\r\nProxy-Authorization: Basic dTpw\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n",
        )];
        let port = scripted(script).await;
        assert_eq!(first_byte(format!("http://u:p@127.0.0.1:{port}")).await.unwrap(), b'!');
        let port = scripted(&[(b"CONNECT", b"HTTP/1.1 407 No\r\n\r\n")]).await;
        let error = first_byte(format!("http://127.0.0.1:{port}")).await.unwrap_err().to_string();
        assert!(error.contains("407"), "{error}");
    }

    /// As a Go program asks a proxy for what is not encrypted.
    #[tokio::test]
    async fn requests_without_encryption_are_passed_on() {
        let server = Server::parse("http://pods.example:8080").unwrap();
        let script: &[(&[u8], &[u8])] = &[];
        let proxy = Proxy::parse(&format!("http://u:p@127.0.0.1:{}", scripted(script).await)).unwrap();
        assert_eq!(proxy.connect(&server).await.unwrap().read_u8().await.unwrap(), b'!', "nothing is asked first");
        let mut request = Request::get("/all?of=this").body(()).unwrap();
        proxy.address(&server, &mut request);
        assert_eq!(request.uri().to_string(), "http://pods.example:8080/all?of=this");
        assert_eq!(request.headers()[PROXY_AUTHORIZATION], "Basic dTpw");
        for (url, server) in [("socks5://p", &server), ("http://p", &Server::new("cp", 6443))] {
            let mut request = Request::get("/all").body(()).unwrap();
            Proxy::parse(url).unwrap().address(server, &mut request);
            assert_eq!(request.uri().to_string(), "/all", "{url}");
        }
    }

    #[tokio::test]
    async fn socks_leads_to_the_server() {
        let script: &[(&[u8], &[u8])] = &[
            (b"\x05\x02\x00\x02", b"\x05\x02"),
            (b"\x01\x01u\x01p", b"\x01\x00"),
            (b"\x05\x01\x00\x03\x02cp\x19\x2b", b"\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x01"),
        ];
        let port = scripted(script).await;
        assert_eq!(first_byte(format!("socks5://u:p@127.0.0.1:{port}")).await.unwrap(), b'!');
        let port =
            scripted(&[(b"\x05\x01\x00", b"\x05\x00"), (b"\x05\x01\x00\x03\x02cp\x19\x2b", b"\x05\x05\x00\x01")]).await;
        let error = first_byte(format!("socks5://127.0.0.1:{port}")).await.unwrap_err().to_string();
        assert!(error.contains("cannot reach cp:6443"), "{error}");
    }
}
