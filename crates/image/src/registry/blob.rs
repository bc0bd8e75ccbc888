//! Blobs as streams: a connection that breaks is taken up where it broke.

use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;

use super::connection::Endpoint;
use super::hosts::{Host, Transport, default_host};
use super::{Ask, PAUSE_MAX, Refusal, Registry, elsewhere};
use crate::digest::Digest;
use crate::error::{Error, chain};

/// Nothing for this long counts as a broken connection.
const STALL: Duration = Duration::from_secs(60);
/// Breaks in a row without a byte in between.
const BREAKS_MAX: u32 = 5;
const FIRST_PAUSE: Duration = Duration::from_millis(100);

/// A blob on its way. Bytes come in order and each once, whatever happens to connections.
pub(crate) struct BlobReader<'a> {
    registry: &'a Registry,
    digest: Digest,
    size: u64,
    /// Where else the blob may be had, if the registry does not have it.
    urls: &'a [String],
    offset: u64,
    body: Option<Incoming>,
    /// Bytes that a host without ranges sends again.
    skip: u64,
    breaks: u32,
}

impl<'a> BlobReader<'a> {
    pub(super) fn new(registry: &'a Registry, digest: Digest, size: u64, urls: &'a [String]) -> Self {
        Self { registry, digest, size, urls, offset: 0, body: None, skip: 0, breaks: 0 }
    }

    /// The next bytes; none when all have come.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        while self.offset < self.size {
            if self.body.is_none() {
                self.open().await?;
            }
            match self.frame().await {
                Ok(Some(bytes)) => {
                    if let Some(fresh) = self.accept(bytes)? {
                        return Ok(Some(fresh));
                    }
                }
                Ok(None) => self.broke("the connection ended early").await?,
                Err(reason) => self.broke(&reason).await?,
            }
        }
        Ok(None)
    }

    async fn frame(&mut self) -> Result<Option<Bytes>, String> {
        let Some(body) = &mut self.body else { return Ok(None) };
        loop {
            match tokio::time::timeout(STALL, body.frame()).await {
                Err(_) => return Err(format!("no byte within {} s", STALL.as_secs())),
                Ok(None) => return Ok(None),
                Ok(Some(Err(e))) => return Err(chain(&e)),
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        return Ok(Some(data));
                    }
                }
            }
        }
    }

    fn accept(&mut self, mut bytes: Bytes) -> Result<Option<Bytes>, Error> {
        let again = usize::try_from(self.skip).unwrap_or(usize::MAX).min(bytes.len());
        self.skip -= again as u64;
        bytes = bytes.split_off(again);
        if bytes.is_empty() {
            return Ok(None);
        }
        self.breaks = 0;
        self.offset += bytes.len() as u64;
        if self.offset > self.size {
            return Err(Error::Malformed {
                object: format!("blob {}", self.digest),
                reason: format!("the registry sends more than the {} bytes of the manifest", self.size),
            });
        }
        Ok(Some(bytes))
    }

    async fn broke(&mut self, reason: &str) -> Result<(), Error> {
        self.body = None;
        self.breaks += 1;
        if self.breaks > BREAKS_MAX {
            let reference = self.registry.reference.to_string();
            let reason = format!(
                "blob {} broke off {BREAKS_MAX} times at byte {} of {}: {reason}",
                self.digest, self.offset, self.size
            );
            return Err(Error::Unavailable { reference, host: self.registry.reference.host().into(), reason });
        }
        tracing::debug!(blob = %self.digest, offset = self.offset, reason, "resuming a blob");
        tokio::time::sleep((FIRST_PAUSE * 2u32.pow(self.breaks - 1)).min(PAUSE_MAX)).await;
        Ok(())
    }

    /// Asks the hosts in turn, from where the last connection broke.
    async fn open(&mut self) -> Result<(), Error> {
        let path = format!("/blobs/{}", self.digest);
        let mut refusals = Vec::new();
        for host in self.registry.hosts.iter().filter(|host| host.capabilities.pull) {
            match self.open_at(host, &path).await {
                Ok(()) => return Ok(()),
                Err(refusal) => refusals.push((host.authority.clone(), refusal)),
            }
        }
        for url in self.urls {
            match self.open_url(url).await {
                Ok(()) => return Ok(()),
                Err(reason) => refusals.push((url.clone(), Refusal::Unavailable(reason))),
            }
        }
        Err(self.registry.refused(refusals))
    }

    async fn open_at(&mut self, host: &Host, path: &str) -> Result<(), Refusal> {
        let ask = Ask { method: Method::GET, path, headers: self.headers(), action: "pull" };
        let response = self.registry.ask(host, &ask).await?;
        self.take(response).map_err(Refusal::Unavailable)
    }

    /// A foreign layer: fetched from where its manifest says, without credentials.
    async fn open_url(&mut self, url: &str) -> Result<(), String> {
        let location: http::Uri = url.parse().map_err(|e| format!("not a URL: {e}"))?;
        let host = default_host(location.authority().ok_or("it names no host")?.as_str());
        // Whoever has made the manifest names it.
        let reach = self.registry.reach();
        let nowhere = Endpoint {
            transport: Transport::Plain,
            authority: String::new(),
            tls: host.tls.clone(),
            dial_timeout: None,
            reach,
        };
        let endpoint = elsewhere(&nowhere, &location, reach).map_err(|e| e.to_string())?;
        let path = location.path_and_query().map_or("/", |path| path.as_str());
        let ask = Ask { method: Method::GET, path, headers: self.headers(), action: "pull" };
        let request = super::request(&ask, path, &[], None, None).map_err(|e| e.to_string())?;
        let response = self.registry.connections.send(&endpoint, request).await.map_err(|e| chain(&e))?;
        if !response.status().is_success() {
            return Err(response.status().to_string());
        }
        self.take(response)
    }

    fn headers(&self) -> HeaderMap {
        let mut headers = HeaderMap::new();
        if self.offset > 0 {
            let range = HeaderValue::from_str(&format!("bytes={}-", self.offset)).expect("digits only");
            headers.insert(header::RANGE, range);
        }
        headers
    }

    /// A host that knows ranges answers 206 and goes on; another starts anew, and what has been seen is skipped.
    fn take(&mut self, response: Response<Incoming>) -> Result<(), String> {
        self.skip = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                self.offset
                    - range_start(response.headers())
                        .filter(|start| *start <= self.offset)
                        .ok_or("a range that was not asked for")?
            }
            _ => self.offset,
        };
        self.body = Some(response.into_body());
        Ok(())
    }
}

/// The first byte of `Content-Range: bytes 100-199/200`.
fn range_start(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get(header::CONTENT_RANGE)?.to_str().ok()?;
    range.strip_prefix("bytes ")?.split('-').next()?.trim().parse().ok()
}
