//! Manifests of static pods that an HTTP server has (`staticPodURL`): asked for again and again, as no event tells that they
//! have changed.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use http::header::{HOST, USER_AGENT};
use http::{HeaderMap, HeaderName, HeaderValue, Request};
use http_body_util::{BodyExt as _, Limited};
use tokio::sync::watch;
use tokio::time::timeout;

use super::config::{Config, Identity, Server, Trust};
use super::connection::{Answer, Body, Pool};
use super::identity::Keeper;

/// As upstream's client.
const WITHIN: Duration = Duration::from_secs(10);
/// As upstream: no manifest is larger.
const BYTES_MAX: usize = 10 << 20;

/// Where to ask.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ManifestUrl {
    /// The URL, with scheme.
    pub url: String,
    /// What to send with a request.
    pub headers: BTreeMap<String, Vec<String>>,
    /// How often.
    pub every: Duration,
}

/// A document of an HTTP server.
pub(crate) struct Page {
    url: String,
    path: String,
    headers: HeaderMap,
    every: Duration,
    config: Config,
    identity: Keeper,
    pool: Pool,
}

impl Page {
    /// Connects to nobody yet.
    ///
    /// # Errors
    /// What is wrong with the URL or a header.
    pub(crate) fn new(at: &ManifestUrl) -> Result<Self, String> {
        let server = Server::parse(&at.url).map_err(|fault| format!("the URL {fault}"))?;
        let uri: http::Uri = at.url.parse().map_err(|error| format!("the URL {:?}: {error}", at.url))?;
        let mut headers = HeaderMap::new();
        let fault = |name: &str, error: &dyn std::fmt::Display| format!("the header {name:?}: {error}");
        let agent = format!("orlop/{}", env!("CARGO_PKG_VERSION"));
        for (name, value) in [(HOST, server.authority()), (USER_AGENT, agent)] {
            headers.insert(name.clone(), HeaderValue::from_str(&value).map_err(|error| fault(name.as_str(), &error))?);
        }
        for (name, values) in &at.headers {
            let key = HeaderName::from_bytes(name.as_bytes()).map_err(|error| fault(name, &error))?;
            headers.remove(&key);
            for value in values {
                let value = HeaderValue::from_str(value).map_err(|error| fault(name, &error))?;
                headers.try_append(&key, value).map_err(|error| fault(name, &error))?;
            }
        }
        let path = uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string);
        let config = Config::new(server, Trust::Host, Identity::default());
        let identity = Keeper::new(config.clone());
        Ok(Self { url: at.url.clone(), path, headers, every: at.every, config, identity, pool: Pool::new() })
    }

    /// Tells what the document is whenever that has changed. What is there no more, or cannot be had, stays as it was; only
    /// where nothing was had before, an empty answer says that there is nothing. Never returns.
    pub(crate) async fn follow(self, told: watch::Sender<Option<String>>) {
        let mut failure = String::new();
        loop {
            let now = match self.get().await {
                Ok(text) if text.is_empty() => {
                    told.send_if_modified(|before| {
                        let is_news = before.is_none();
                        before.get_or_insert_default();
                        is_news
                    });
                    "the answer is empty".to_owned()
                }
                Ok(text) => {
                    told.send_if_modified(|before| before.replace(text.clone()).as_ref() != Some(&text));
                    String::new()
                }
                Err(error) => error,
            };
            if now != failure && !now.is_empty() {
                tracing::warn!(url = self.url, error = now, "the manifests of static pods cannot be had");
            }
            failure = now;
            tokio::time::sleep(self.every).await;
        }
    }

    async fn get(&self) -> Result<String, String> {
        match timeout(WITHIN, self.got()).await {
            Ok(got) => got,
            Err(_) => Err(format!("no answer within {} s", WITHIN.as_secs())),
        }
    }

    async fn got(&self) -> Result<String, String> {
        let shown = self.identity.shown().await.map_err(|error| error.to_string())?;
        let mut request = Request::new(Body::new(Bytes::new()));
        // HTTP/2 takes scheme and authority from here, HTTP/1.1 wants the path alone.
        let uri = if shown.tls.is_some() {
            format!("https://{}{}", self.config.server.authority(), self.path)
        } else {
            self.path.clone()
        };
        *request.uri_mut() = uri.parse().map_err(|error: http::uri::InvalidUri| error.to_string())?;
        *request.headers_mut() = self.headers.clone();
        let answer = self.pool.send(&self.config, &shown, request).await.map_err(|error| error.to_string())?;
        let Answer { response, ticket: _ticket } = answer;
        if response.status() != http::StatusCode::OK {
            return Err(format!("the answer is {}", response.status()));
        }
        let body = Limited::new(response.into_body(), BYTES_MAX).collect().await.map_err(|error| error.to_string())?;
        String::from_utf8(body.to_bytes().into()).map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::super::proxy::Proxy;
    use super::*;

    /// Answers one request after the other; gives what was asked.
    async fn answer(listener: &TcpListener, status: &str, body: &str) -> String {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut asked = String::new();
        while !asked.ends_with("\r\n\r\n") {
            let mut bytes = [0; 1024];
            let count = stream.read(&mut bytes).await.unwrap();
            asked += std::str::from_utf8(&bytes[..count]).unwrap();
        }
        let length = body.len();
        let text = format!("HTTP/1.1 {status}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}");
        stream.write_all(text.as_bytes()).await.unwrap();
        asked.to_ascii_lowercase()
    }

    fn at(listener: &TcpListener) -> ManifestUrl {
        let url = format!("http://{}/pods?of=this", listener.local_addr().unwrap());
        let headers = [("X-Node".to_owned(), vec!["a".to_owned(), "b".to_owned()])].into();
        ManifestUrl { url, headers, every: Duration::from_millis(10) }
    }

    #[tokio::test]
    async fn changes_are_told_and_failures_change_nothing() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let page = Page::new(&at(&listener)).unwrap();
        let (tell, mut told) = watch::channel(None);
        let follow = tokio::spawn(page.follow(tell));
        let asked = answer(&listener, "200 OK", "one").await;
        assert!(asked.starts_with("get /pods?of=this http/1.1\r\n"), "{asked}");
        assert!(asked.contains("x-node: a\r\nx-node: b\r\n"), "{asked}");
        assert_eq!(told.wait_for(Option::is_some).await.unwrap().as_deref(), Some("one"));
        told.mark_unchanged();
        for (status, body) in [("200 OK", "one"), ("404 Not Found", "other"), ("200 OK", "")] {
            answer(&listener, status, body).await;
        }
        // The request after those was asked, so they have been looked at.
        answer(&listener, "200 OK", "two").await;
        assert_eq!(told.wait_for(|text| text.as_deref() != Some("one")).await.unwrap().as_deref(), Some("two"));
        follow.abort();
    }

    #[tokio::test]
    async fn a_server_without_manifests_has_been_read() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let page = Page::new(&at(&listener)).unwrap();
        let (tell, mut told) = watch::channel(None);
        let follow = tokio::spawn(page.follow(tell));
        answer(&listener, "404 Not Found", "other").await;
        answer(&listener, "200 OK", "").await;
        assert_eq!(told.wait_for(Option::is_some).await.unwrap().as_deref(), Some(""));
        follow.abort();
    }

    #[tokio::test]
    async fn a_proxy_is_told_whom_to_ask() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = ManifestUrl { url: "http://pods.example/all".to_owned(), headers: BTreeMap::new(), every: WITHIN };
        let mut page = Page::new(&at).unwrap();
        page.config.proxy = Some(Proxy::parse(&format!("http://{}", listener.local_addr().unwrap())).unwrap());
        let (got, asked) = tokio::join!(page.get(), answer(&listener, "200 OK", "one"));
        assert_eq!(got.as_deref(), Ok("one"));
        assert!(asked.starts_with("get http://pods.example"), "{asked}");
        assert!(asked.contains("/all http/1.1\r\nhost: pods.example"), "{asked}");
    }

    #[test]
    fn what_cannot_be_asked_for_is_a_fault() {
        let with = |url: &str, header: &str| {
            let headers = [(header.to_owned(), vec!["v".to_owned()])].into();
            Page::new(&ManifestUrl { url: url.to_owned(), headers, every: WITHIN }).err()
        };
        assert_eq!(with("http://h/p", "a"), None);
        assert!(with("ftp://h/p", "a").is_some_and(|fault| fault.contains("must begin with https://")));
        assert!(with("http://h/p", "a b").is_some_and(|fault| fault.contains("the header \"a b\"")));
    }
}
