//! HTTP GET as upstream's prober does it: a fresh connection, no certificate checks, 200 to 399 is a success. Redirections
//! are followed as long as they stay with the host.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderValue, Request, Uri, header};
use http_body_util::{BodyExt as _, Empty};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::HTTPGetAction;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use super::Fault;

/// Redirections that are followed.
const REDIRECTS_MAX: usize = 10;
/// What is read of an answer.
const BODY_MAX: usize = 10 << 10;

/// One resource of the host that is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    secure: bool,
    host: String,
    port: u16,
    /// Path and query.
    path: String,
}

struct Answer {
    status: u16,
    location: Option<String>,
    body: String,
}

/// Asks, with upstream's words for a failure where it has some. A success may have a warning.
pub(super) async fn get(address: SocketAddr, action: &HTTPGetAction) -> Result<Option<String>, Fault> {
    let mut place = Place::of(address, action);
    for hops in 0..REDIRECTS_MAX {
        // Who redirects has been asked.
        let answer = ask(address.ip(), &place, action).await;
        let answer = answer.map_err(|fault| Fault { refused: fault.refused && hops == 0, ..fault })?;
        match answer.status {
            200..300 => return Ok(None),
            300..400 => match answer.location.and_then(|location| place.follow(&location)) {
                Some(next) if next.host == place.host => place = next,
                _ => return Ok(Some(format!("Probe terminated redirects, Response body: {}", answer.body))),
            },
            code => return Err(format!("HTTP probe failed with statuscode: {code}").into()),
        }
    }
    Err(format!("Get \"{place}\": stopped after {REDIRECTS_MAX} redirects").into())
}

impl Place {
    fn of(address: SocketAddr, action: &HTTPGetAction) -> Self {
        let named = action.host.clone().filter(|host| !host.is_empty());
        let path = action.path.as_deref().unwrap_or_default();
        Self {
            secure: action.scheme.as_deref() == Some("HTTPS"),
            host: named.unwrap_or_else(|| address.ip().to_string()),
            port: address.port(),
            path: if path.starts_with('/') { path.to_owned() } else { format!("/{path}") },
        }
    }

    /// Where a `Location` leads to from here (RFC 3986, section 5.2, without dot segments).
    fn follow(&self, location: &str) -> Option<Self> {
        let location = location.split('#').next()?;
        let scheme = |secure| if secure { "https" } else { "http" };
        let absolute = match location {
            "" => return Some(self.clone()),
            _ if location.starts_with("//") => format!("{}:{location}", scheme(self.secure)),
            _ if location.starts_with('/') => return Some(Self { path: location.to_owned(), ..self.clone() }),
            _ if location.contains("://") => location.to_owned(),
            _ => return Some(Self { path: self.beside(location), ..self.clone() }),
        };
        let uri: Uri = absolute.parse().ok()?;
        let secure = match uri.scheme_str()? {
            "http" => false,
            "https" => true,
            _ => return None,
        };
        let host = uri.host()?.trim_matches(['[', ']']).to_owned();
        let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
        let path = uri.path_and_query().map_or("/", |path| path.as_str());
        // A query alone is what the root is asked.
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        Some(Self { secure, host, port, path })
    }

    /// A path relative to this one; a query alone belongs to the same path.
    fn beside(&self, relative: &str) -> String {
        let path = self.path.split('?').next().unwrap_or_default();
        let base = if relative.starts_with('?') { path } else { &path[..=path.rfind('/').unwrap_or(0)] };
        format!("{base}{relative}")
    }

    /// Host and port, as a header names them.
    fn authority(&self) -> String {
        let Self { host, port, .. } = self;
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = if self.secure { "https" } else { "http" };
        write!(to, "{scheme}://{}{}", self.authority(), self.path)
    }
}

/// Asks for one place of the host with this address.
async fn ask(address: IpAddr, place: &Place, action: &HTTPGetAction) -> Result<Answer, Fault> {
    let request = request(place, action)?;
    let address = SocketAddr::new(address, place.port);
    let dial = |error: std::io::Error| Fault::dial(format!("Get \"{place}\": dial tcp {address}: {error}"), &error);
    let stream = TcpStream::connect(address).await.map_err(dial)?;
    if !place.secure {
        return Ok(exchange(stream, request).await?);
    }
    let name = ServerName::IpAddress(address.ip().into());
    let stream = tokio_rustls::TlsConnector::from(trusting()).connect(name, stream).await;
    Ok(exchange(stream.map_err(|error| format!("TLS with {address}: {error}"))?, request).await?)
}

fn request(place: &Place, action: &HTTPGetAction) -> Result<Request<Empty<Bytes>>, String> {
    let path = &place.path;
    let uri: Uri = path.parse().map_err(|error| format!("path {path:?}: {error}"))?;
    let mut request = Request::new(Empty::new());
    *request.uri_mut() = uri;
    let headers = request.headers_mut();
    for one in action.http_headers.iter().flatten() {
        let bad = || format!("header {:?} cannot be sent", one.name);
        let name = header::HeaderName::from_bytes(one.name.as_bytes()).map_err(|_| bad())?;
        let added = headers.try_append(name, HeaderValue::from_str(&one.value).map_err(|_| bad())?);
        added.map_err(|_| "the probe has more headers than can be sent".to_owned())?;
    }
    let defaults = [
        (header::HOST, HeaderValue::from_str(&place.authority())),
        (header::USER_AGENT, Ok(HeaderValue::from_static("kube-probe/1.37"))),
        (header::ACCEPT, Ok(HeaderValue::from_static("*/*"))),
        (header::CONNECTION, Ok(HeaderValue::from_static("close"))),
    ];
    for (name, value) in defaults {
        if let (false, Ok(value)) = (headers.contains_key(&name), value) {
            headers.insert(name, value);
        }
    }
    Ok(request)
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: Request<Empty<Bytes>>,
) -> Result<Answer, String> {
    let failed = |error: hyper::Error| error.to_string();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    // The connection ends with the future that drives it: the probe's timeout ends both.
    let asked = async {
        let response = sender.send_request(request).await.map_err(failed)?;
        let status = response.status().as_u16();
        let location = response.headers().get(header::LOCATION);
        let location = location.and_then(|location| location.to_str().ok()).map(str::to_owned);
        Ok::<_, String>(Answer { status, location, body: head(response.into_body()).await })
    };
    tokio::select! {
        answer = asked => answer,
        Err(error) = connection => Err(failed(error)),
    }
}

/// The beginning of what is said. It is read to its end if that is near: some servers log a reset as an error.
async fn head(mut body: Incoming) -> String {
    let mut bytes = Vec::new();
    while bytes.len() < BODY_MAX
        && let Some(Ok(frame)) = body.frame().await
    {
        if let Ok(data) = frame.into_data() {
            bytes.extend_from_slice(&data[..data.len().min(BODY_MAX - bytes.len())]);
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A configuration that trusts any certificate, as upstream's probes do.
fn trusting() -> Arc<ClientConfig> {
    let builder = trust::client(trust::anything()).expect("the provider has the default versions");
    Arc::new(builder.with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::HTTPHeader;

    use super::*;

    /// The API server counts no headers: some 40,000 fit into a pod.
    #[test]
    fn more_headers_than_can_be_sent_are_a_failure() {
        let header = |number| HTTPHeader { name: format!("h{number}"), value: String::new() };
        let of =
            |count| HTTPGetAction { http_headers: Some((0..count).map(header).collect()), ..HTTPGetAction::default() };
        let asked = |count| request(&Place::of(([10, 0, 0, 1], 80).into(), &of(count)), &of(count)).map(drop);
        assert_eq!(asked(1_000), Ok(()));
        assert_eq!(asked(40_000), Err("the probe has more headers than can be sent".to_owned()));
    }

    #[test]
    fn locations_lead_on_from_where_they_are_found() {
        let check = |location: &str, expected: Option<&str>| {
            let action = HTTPGetAction { path: Some("a/b?c".to_owned()), ..HTTPGetAction::default() };
            let place = Place::of(([10, 0, 0, 1], 8080).into(), &action);
            assert_eq!(place.follow(location).map(|place| place.to_string()).as_deref(), expected, "{location}");
        };
        check("/healthz?d#e", Some("http://10.0.0.1:8080/healthz?d"));
        check("healthz", Some("http://10.0.0.1:8080/a/healthz"));
        check("?d", Some("http://10.0.0.1:8080/a/b?d"));
        check("//10.0.0.2", Some("http://10.0.0.2:80/"));
        check("https://10.0.0.1/x", Some("https://10.0.0.1:443/x"));
        check("http://[::1]:81/", Some("http://[::1]:81/"));
        check("http://10.0.0.1?d", Some("http://10.0.0.1:80/?d"));
        check("ftp://10.0.0.1/", None);
        check("http://", None);
    }
}
