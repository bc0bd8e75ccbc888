//! A client of the distribution API (OCI distribution specification), for one reference and one caller's credentials.
//!
//! A request walks the hosts of `hosts.toml` in order. Tokens are kept by host and scope and die with the client, so
//! nobody pulls with another's credentials.

mod blob;
pub(crate) mod challenge;
mod connection;
pub(crate) mod hosts;
mod tls;
mod token;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper::body::Incoming;
use serde::Deserialize;

pub(crate) use blob::BlobReader;
use challenge::Challenge;
use connection::{Body, Connections, Endpoint, Reach};
use hosts::{Host, Transport};
use token::TokenError;

use crate::config::Auth;
use crate::digest::Digest;
use crate::error::{Error, chain};
use crate::manifest::{DOCUMENT_BYTES_MAX, RawManifest};
use crate::reference::Reference;
use crate::spec::media_type;

/// The registry of one reference.
pub(crate) struct Registry {
    reference: Reference,
    hosts: Vec<Host>,
    auth: Option<Auth>,
    connections: Connections,
    /// `Authorization` values by host and scope.
    authorizations: Mutex<HashMap<(String, String), String>>,
}

const ERROR_BYTES_MAX: usize = 64 << 10;
const REDIRECTS_MAX: usize = 10;
const ATTEMPTS: u32 = 4;
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(5);
const USER_AGENT: &str = concat!("orlop/", env!("CARGO_PKG_VERSION"));

/// How a single host answered, when not with what was asked for.
#[derive(Debug)]
enum Refusal {
    NotFound,
    Unauthorized(String),
    Unavailable(String),
}

/// One request, before it is known which host takes it.
struct Ask<'a> {
    method: Method,
    /// Below `/v2/<repository>`: `/manifests/latest`.
    path: &'a str,
    headers: HeaderMap,
    action: &'a str,
}

impl std::fmt::Debug for Registry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Registry({})", self.reference)
    }
}

impl Registry {
    pub(crate) fn new(reference: &Reference, trees: &[PathBuf], auth: Option<Auth>) -> Result<Self, Error> {
        let hosts = hosts::hosts_for(reference.host(), trees)?;
        Ok(Self {
            reference: reference.clone(),
            hosts,
            auth,
            connections: Connections::default(),
            authorizations: Mutex::default(),
        })
    }

    pub(crate) fn reference(&self) -> &Reference {
        &self.reference
    }

    /// The manifest or index that the reference names.
    pub(crate) async fn resolve(&self) -> Result<RawManifest, Error> {
        let by_digest = self.reference.digest().is_some();
        self.manifest_from(&self.reference.target(), self.reference.digest(), |host| {
            if by_digest { host.capabilities.pull } else { host.capabilities.resolve }
        })
        .await
    }

    /// A manifest by its digest.
    pub(crate) async fn manifest(&self, digest: &Digest) -> Result<RawManifest, Error> {
        self.manifest_from(&digest.to_string(), Some(digest), |host| host.capabilities.pull).await
    }

    async fn manifest_from(
        &self,
        target: &str,
        expected: Option<&Digest>,
        able: impl Fn(&Host) -> bool,
    ) -> Result<RawManifest, Error> {
        let path = format!("/manifests/{target}");
        let mut refusals = Vec::new();
        for host in self.hosts.iter().filter(|host| able(host)) {
            match self.manifest_of(host, &path).await {
                Ok((media_type, stated, bytes)) => {
                    let expected = expected.or(stated.as_ref());
                    let digest = verify("manifest", &host.authority, expected, &bytes)?;
                    return Ok(RawManifest { media_type, digest, bytes });
                }
                Err(refusal) => refusals.push((host.authority.clone(), refusal)),
            }
        }
        Err(self.refused(refusals))
    }

    async fn manifest_of(&self, host: &Host, path: &str) -> Result<(String, Option<Digest>, Bytes), Refusal> {
        let ask = Ask { method: Method::GET, path, headers: accept_manifests(), action: "pull" };
        let (headers, bytes) = self.document(host, &ask).await?;
        let text =
            |name: header::HeaderName| headers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let media_type = text(header::CONTENT_TYPE).unwrap_or_default();
        let stated =
            text(header::HeaderName::from_static("docker-content-digest")).and_then(|value| value.parse().ok());
        Ok((media_type.split(';').next().unwrap_or_default().trim().to_owned(), stated, bytes))
    }

    /// Reads an answer whole; one that breaks off is asked for again.
    async fn document(&self, host: &Host, ask: &Ask<'_>) -> Result<(HeaderMap, Bytes), Refusal> {
        let mut pause = FIRST_PAUSE;
        let mut attempt = 1;
        loop {
            let response = self.ask(host, ask).await?;
            let headers = response.headers().clone();
            match read_limited(response.into_body(), DOCUMENT_BYTES_MAX).await {
                Ok(bytes) => return Ok((headers, bytes)),
                Err(e) if e.kind() == io::ErrorKind::FileTooLarge || attempt == ATTEMPTS => {
                    return Err(Refusal::Unavailable(format!("reading the manifest: {}", chain(&e))));
                }
                Err(_) => tokio::time::sleep(pause).await,
            }
            pause *= 2;
            attempt += 1;
        }
    }

    /// A small blob (an image configuration), whole and verified.
    pub(crate) async fn small_blob(&self, object: &'static str, digest: &Digest, size: u64) -> Result<Bytes, Error> {
        let most = u64::try_from(DOCUMENT_BYTES_MAX).unwrap_or(u64::MAX);
        if size > most {
            return Err(Error::Malformed {
                object: format!("{object} {digest}"),
                reason: format!("{size} bytes are more than the {most} that a node reads"),
            });
        }
        let mut reader = self.blob(digest, size, &[]);
        let mut bytes = Vec::new();
        while let Some(chunk) = reader.next().await? {
            bytes.extend_from_slice(&chunk);
        }
        verify(object, self.reference.host(), Some(digest), &bytes)?;
        Ok(bytes.into())
    }

    /// A blob as a stream that survives broken connections. The caller verifies it.
    pub(crate) fn blob<'a>(&'a self, digest: &Digest, size: u64, urls: &'a [String]) -> BlobReader<'a> {
        BlobReader::new(self, digest.clone(), size, urls)
    }

    /// Sends a request to one host: answers challenges, follows redirects, waits out moments of weakness.
    async fn ask(&self, host: &Host, ask: &Ask<'_>) -> Result<Response<Incoming>, Refusal> {
        let mut pause = FIRST_PAUSE;
        for _ in 1..ATTEMPTS {
            match self.ask_once(host, ask).await? {
                Ok(response) => return Ok(response),
                Err(weak) => tokio::time::sleep(weak.retry_after.unwrap_or(pause).min(PAUSE_MAX)).await,
            }
            pause *= 2;
        }
        self.ask_once(host, ask).await?.map_err(|weak| Refusal::Unavailable(weak.reason))
    }

    async fn ask_once(&self, host: &Host, ask: &Ask<'_>) -> Result<Result<Response<Incoming>, Weak>, Refusal> {
        let scope = format!("repository:{}:{}", self.reference.path(), ask.action);
        let mut challenged = false;
        loop {
            let authorization = self.authorization(host, &scope);
            let response = match self.send_following(host, ask, authorization).await {
                Ok(response) => response,
                Err(e) if is_transient(&e) => return Ok(Err(Weak { retry_after: None, reason: chain(&e) })),
                Err(e) => return Err(Refusal::Unavailable(chain(&e))),
            };
            match response.status() {
                status if status.is_success() => return Ok(Ok(response)),
                StatusCode::UNAUTHORIZED if !challenged => {
                    challenged = true;
                    self.meet_challenge(host, &scope, response).await?;
                }
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    return Err(Refusal::Unauthorized(words(response).await));
                }
                StatusCode::NOT_FOUND => return Err(Refusal::NotFound),
                status if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() => {
                    let retry_after = retry_after(response.headers());
                    return Ok(Err(Weak { retry_after, reason: words(response).await }));
                }
                _ => return Err(Refusal::Unavailable(words(response).await)),
            }
        }
    }

    fn authorization(&self, host: &Host, scope: &str) -> Option<String> {
        if let Some(Auth::RegistryToken(token)) = &self.auth {
            return Some(format!("Bearer {token}"));
        }
        self.authorizations
            .lock()
            .expect("no panic while it is held")
            .get(&(host.authority.clone(), scope.to_owned()))
            .cloned()
    }

    /// Finds an answer to a 401 and keeps it; the next try sends it.
    async fn meet_challenge(&self, host: &Host, scope: &str, response: Response<Incoming>) -> Result<(), Refusal> {
        let Some(challenge) = challenge_of(response.headers()) else {
            return Err(Refusal::Unauthorized(words(response).await));
        };
        let answer = token::answer(&self.connections, host, &challenge, scope, self.auth.as_ref()).await;
        match answer {
            Ok(Some(value)) => {
                self.authorizations
                    .lock()
                    .expect("no panic while it is held")
                    .insert((host.authority.clone(), scope.to_owned()), value);
                Ok(())
            }
            Ok(None) => Err(Refusal::Unauthorized(words(response).await)),
            Err(TokenError::Refused(reason)) => Err(Refusal::Unauthorized(reason)),
            Err(TokenError::Unavailable(reason)) => Err(Refusal::Unavailable(reason)),
        }
    }

    async fn send_following(
        &self,
        host: &Host,
        ask: &Ask<'_>,
        authorization: Option<String>,
    ) -> io::Result<Response<Incoming>> {
        let mut endpoint = Endpoint {
            transport: host.transport,
            authority: host.authority.clone(),
            tls: host.tls.clone(),
            dial_timeout: host.dial_timeout,
            reach: Reach::Anywhere,
        };
        let mut target = self.target(host, ask.path);
        let mut authorization = authorization;
        for _ in 0..=REDIRECTS_MAX {
            let own = endpoint.authority == host.authority && endpoint.transport == host.transport;
            let request = request(ask, &target, &host.headers, own.then_some(()), authorization.as_deref())?;
            let response = self.connections.send(&endpoint, request).await?;
            let Some(location) = redirect(&response) else { return Ok(response) };
            let next = elsewhere(&endpoint, &location, self.connections.reach_from(&endpoint.authority))?;
            // Another host, port or scheme is another party: it gets neither credentials nor the operator's headers.
            if next.authority != endpoint.authority || next.transport != endpoint.transport {
                authorization = None;
            }
            target = location.path_and_query().map_or_else(|| "/".to_owned(), |path| path.as_str().to_owned());
            endpoint = next;
        }
        Err(io::Error::other(format!("more than {REDIRECTS_MAX} redirects")))
    }

    fn target(&self, host: &Host, path: &str) -> String {
        let registry = self.reference.host();
        let mut target = format!("{}/{}{path}", host.path, self.reference.path());
        if host.is_mirror_of(registry) {
            // As containerd: a mirror of several registries learns which one is meant.
            target.push(if target.contains('?') { '&' } else { '?' });
            target.push_str(&token::form_encode(&[("ns", registry)]));
        }
        target
    }

    /// How far those may be whom an image names: on the node only if all hosts of its registry are there.
    fn reach(&self) -> Reach {
        let all_near = self.hosts.iter().all(|host| self.connections.reach_from(&host.authority) == Reach::Anywhere);
        if all_near { Reach::Anywhere } else { Reach::Far }
    }

    /// The most telling refusal: bad credentials before an unreachable host before "not found".
    fn refused(&self, refusals: Vec<(String, Refusal)>) -> Error {
        let reference = self.reference.to_string();
        if refusals.is_empty() {
            return Error::Unavailable {
                reference,
                host: self.reference.host().into(),
                reason: "hosts.toml gives no host the capability for this".into(),
            };
        }
        let mut hosts = Vec::new();
        let mut unavailable = None;
        for (host, refusal) in refusals {
            match refusal {
                Refusal::Unauthorized(reason) => {
                    return Error::Unauthorized { reference, host, reason, remedy: self.remedy() };
                }
                Refusal::Unavailable(reason) if unavailable.is_none() => unavailable = Some((host, reason)),
                Refusal::Unavailable(_) => {}
                Refusal::NotFound => hosts.push(host),
            }
        }
        match unavailable {
            Some((host, reason)) if hosts.is_empty() => Error::Unavailable { reference, host, reason },
            // What the others said is the operator's clue when the last one is only the default.
            Some((host, reason)) => {
                let reason = format!("{reason}; {} answered that it does not have it", hosts.join(", "));
                Error::Unavailable { reference, host, reason }
            }
            None => Error::NotFound { reference, hosts },
        }
    }

    fn remedy(&self) -> &'static str {
        match self.auth {
            None => "if the image exists it is private: add an imagePullSecret or a docker config.json",
            Some(_) => "check the credentials and what they may read",
        }
    }
}

/// An answer that may be another one in a moment.
struct Weak {
    retry_after: Option<Duration>,
    reason: String,
}

/// A connection that breaks before an answer is worth another try; one that nobody takes, or a bad certificate, is not.
fn is_transient(error: &io::Error) -> bool {
    let refused = matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::TimedOut
            | io::ErrorKind::InvalidInput
            | io::ErrorKind::InvalidData
            | io::ErrorKind::NotFound
    );
    let broken = matches!(
        error.kind(),
        io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::UnexpectedEof
    );
    let by_http = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<hyper::Error>())
        .is_some_and(|e| e.is_incomplete_message() || e.is_closed());
    !refused && (broken || by_http)
}

fn request(
    ask: &Ask<'_>,
    target: &str,
    operator_headers: &[(String, String)],
    own_host: Option<()>,
    authorization: Option<&str>,
) -> io::Result<Request<Body>> {
    let mut request = Request::builder().method(ask.method.clone()).uri(target).header(header::USER_AGENT, USER_AGENT);
    if let Some(headers) = request.headers_mut() {
        headers.extend(ask.headers.clone());
    }
    if own_host.is_some() {
        for (name, value) in operator_headers {
            request = request.header(name, value);
        }
    }
    if let Some(value) = authorization {
        request = request.header(header::AUTHORIZATION, value);
    }
    request.body(empty_body()).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))
}

fn redirect(response: &Response<Incoming>) -> Option<Uri> {
    let moved = matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
    if !moved {
        return None;
    }
    response.headers().get(header::LOCATION)?.to_str().ok()?.parse().ok()
}

fn elsewhere(now: &Endpoint, location: &Uri, reach: Reach) -> io::Result<Endpoint> {
    let Some(authority) = location.authority() else { return Ok(now.clone()) };
    let authority = authority.to_string();
    let transport = match location.scheme_str() {
        Some("http") => Transport::Plain,
        Some("https") => Transport::Tls,
        other => return Err(io::Error::other(format!("a redirect to scheme {other:?}"))),
    };
    if now.transport == Transport::Tls && transport == Transport::Plain {
        return Err(io::Error::other(format!("a redirect from https to http://{authority}")));
    }
    if authority == now.authority {
        // A plain answer came from what was tried as TLS first: it is the same place.
        let transport = if now.transport == Transport::TlsOrPlain { now.transport } else { transport };
        return Ok(Endpoint { transport, ..now.clone() });
    }
    Ok(Endpoint {
        transport,
        tls: hosts::Tls { clients: Vec::new(), ..now.tls.clone() },
        authority,
        dial_timeout: now.dial_timeout,
        reach,
    })
}

fn challenge_of(headers: &HeaderMap) -> Option<Challenge> {
    let values = headers.get_all(header::WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
    let mut challenges: Vec<_> = values.filter_map(challenge::parse).collect();
    challenges.sort_by_key(|challenge| *challenge == Challenge::Basic);
    challenges.into_iter().next()
}

fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    headers.get(header::RETRY_AFTER)?.to_str().ok()?.parse().ok().map(Duration::from_secs)
}

#[expect(clippy::disallowed_methods, reason = "one name")]
fn accept_manifests() -> HeaderMap {
    let types = [media_type::OCI_INDEX, media_type::DOCKER_LIST, media_type::OCI_MANIFEST, media_type::DOCKER_MANIFEST];
    let mut headers = HeaderMap::new();
    for name in types {
        headers.append(header::ACCEPT, HeaderValue::from_static(name));
    }
    headers
}

#[derive(Deserialize)]
struct ErrorBody {
    errors: Vec<ErrorItem>,
}

#[derive(Deserialize)]
struct ErrorItem {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// What the registry says about a failure: its error list, else the status.
async fn words(response: Response<Incoming>) -> String {
    let status = response.status();
    let body = read_limited(response.into_body(), ERROR_BYTES_MAX).await.unwrap_or_default();
    let said = serde_json::from_slice::<ErrorBody>(&body).ok().map(|body| {
        let items = body.errors.iter().map(|item| format!("{} {}", item.code, item.message).trim().to_owned());
        items.collect::<Vec<_>>().join("; ")
    });
    match said.filter(|said| !said.is_empty()) {
        Some(said) => format!("{status}: {said}"),
        None => status.to_string(),
    }
}

pub(crate) fn verify(
    object: &'static str,
    source: &str,
    expected: Option<&Digest>,
    bytes: &[u8],
) -> Result<Digest, Error> {
    let Some(expected) = expected else { return Ok(Digest::of(bytes)) };
    if expected.matches(bytes) {
        return Ok(expected.clone());
    }
    Err(Error::DigestMismatch {
        object,
        source_name: source.to_owned(),
        expected: expected.clone(),
        actual: Digest::of(bytes),
    })
}

fn empty_body() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

async fn read_limited(body: Incoming, most: usize) -> io::Result<Bytes> {
    const PATIENCE: Duration = Duration::from_secs(60);
    let collected = tokio::time::timeout(PATIENCE, Limited::new(body, most).collect()).await;
    let collected = collected.map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "it takes too long"))?;
    let collected = collected.map_err(|e| match e.downcast::<LengthLimitError>() {
        Ok(_) => io::Error::new(io::ErrorKind::FileTooLarge, format!("it is longer than {most} bytes")),
        Err(e) => io::Error::other(e),
    });
    Ok(collected?.to_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_leads_to_no_lesser_transport() {
        let lead = |transport, to: &str| {
            let now = Endpoint {
                transport,
                authority: "registry.test".to_owned(),
                tls: hosts::Tls::default(),
                dial_timeout: None,
                reach: Reach::Anywhere,
            };
            elsewhere(&now, &to.parse().unwrap(), Reach::Far).map(|next| (next.transport, next.reach))
        };
        for to in ["http://registry.test/x", "http://store.test/x", "ftp://store.test/x"] {
            assert!(lead(Transport::Tls, to).is_err(), "{to}");
        }
        assert_eq!(lead(Transport::Tls, "https://store.test/x").unwrap(), (Transport::Tls, Reach::Far));
        assert_eq!(lead(Transport::Plain, "http://store.test/x").unwrap(), (Transport::Plain, Reach::Far));
        assert_eq!(lead(Transport::Tls, "/x").unwrap(), (Transport::Tls, Reach::Anywhere));
    }
}
