//! `/logs/`: the files below `/var/log`, and, where the operator has allowed it (`enableSystemLogQuery`), what the node's
//! services have logged (KEP-2258).
//!
//! ```text
//! /logs/PATH                 the file, or a list of the directory
//! /logs/?query=/messages     the file
//! /logs/?query=SERVICE&…     journalctl's, or the file that is named like the service
//! ```

mod journal;
mod query;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use cluster::percent;
use futures_util::{Stream, StreamExt as _, TryStreamExt as _};
use http::header::{ALLOW, CONTENT_TYPE, LOCATION};
use http::{HeaderValue, Method, Response, StatusCode, Uri};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use sys::rustix::fs::{Dir, FileType, Mode, OFlags, fstat, open};
use tokio::io::AsyncReadExt as _;
use tokio_util::io::ReaderStream;

use super::{Answer, Api, Body, Failure, Query, with_body};
use query::{Asked, LogQuery};

const TEXT: &str = "text/plain; charset=utf-8";

/// What `/logs/` serves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum NodeLogs {
    /// Nothing (`enableSystemLogHandler: false`).
    Off,
    /// Files.
    #[default]
    Files,
    /// Files, and the logs of services (`enableSystemLogQuery: true`).
    Services,
}

/// What a path is that was asked for.
enum Found {
    /// Names, those of directories with a slash at their end.
    Directory(Vec<String>),
    /// With as many bytes as it has now.
    File(File, u64),
}

impl Api {
    /// Answers a request for `uri`, whose path is `/logs/` with these parts.
    pub(super) async fn node_logs(&self, method: &Method, uri: &Uri, parts: &[&str], query: &Query) -> Answer {
        if self.node_logs == NodeLogs::Off {
            return Err(Failure::new(StatusCode::METHOD_NOT_ALLOWED, "logs endpoint is disabled."));
        }
        if method != Method::GET {
            let mut refusal = with_body(StatusCode::METHOD_NOT_ALLOWED, TEXT, "Method Not Allowed");
            refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
            return Ok(refusal);
        }
        let asked = match self.node_logs {
            NodeLogs::Services => LogQuery::parse(query).map_err(Failure::bad_request)?,
            NodeLogs::Off | NodeLogs::Files => None,
        };
        let Some(asked) = asked else {
            let is_directory = uri.path().ends_with('/');
            return file(&self.log_dir, parts.join("/"), is_directory).await;
        };
        let unacceptable = |message: String| Failure::new(StatusCode::NOT_ACCEPTABLE, message);
        if !parts.is_empty() {
            return Err(unacceptable("path not allowed in query mode".to_owned()));
        }
        match asked.checked().map_err(unacceptable)? {
            Asked::File(path) => file(&self.log_dir, path.replace('\\', "/"), true).await,
            Asked::Services(services) => {
                Ok(stream(journal::of_services(self.log_dir.clone(), services, asked.options)))
            }
        }
    }
}

/// A file's content, or what is in a directory.
async fn file(root: &Path, path: String, is_directory: bool) -> Answer {
    let (root, path) = (root.to_owned(), path.trim_matches('/').to_owned());
    let last = path.rsplit('/').next().unwrap_or_default().to_owned();
    let found = tokio::task::spawn_blocking(move || find(&root, &path)).await;
    match found.map_err(io::Error::other).and_then(|found| found) {
        Ok(Found::Directory(_)) if !is_directory => {
            let mut moved = with_body(StatusCode::MOVED_PERMANENTLY, TEXT, "");
            let place = HeaderValue::try_from(format!("{}/", escaped(&last)));
            moved.headers_mut().extend(place.ok().map(|place| (LOCATION, place)));
            Ok(moved)
        }
        Ok(Found::Directory(names)) => Ok(with_body(StatusCode::OK, "text/html; charset=utf-8", listing(&names))),
        Ok(Found::File(file, length)) => Ok(stream(content(file, length))),
        Err(error) => Err(match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Failure::not_found("404 page not found"),
            // A link that leads out, or something that is no file.
            _ => Failure::new(StatusCode::FORBIDDEN, "403 Forbidden"),
        }),
    }
}

/// Looks below `root`, which pods may write to: nothing leads out of it, and nothing but files is read (khv047).
fn find(root: &Path, path: &str) -> io::Result<Found> {
    let root = open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let path = Path::new(if path.is_empty() { "." } else { path });
    let opened = sys::path::open_beneath(root.as_fd(), path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY);
    let opened: OwnedFd = opened.map_err(|error| error.errno)?;
    let stat = fstat(&opened)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            let mut names = Vec::new();
            for entry in Dir::read_from(&opened)? {
                let entry = entry?;
                let name = entry.file_name().to_string_lossy().into_owned();
                let slash = if entry.file_type() == FileType::Directory { "/" } else { "" };
                names.push(format!("{name}{slash}"));
            }
            names.retain(|name| !matches!(name.as_str(), "./" | "../"));
            names.sort_unstable();
            Ok(Found::Directory(names))
        }
        FileType::RegularFile => Ok(Found::File(opened.into(), u64::try_from(stat.st_size).unwrap_or(0))),
        _ => Err(io::ErrorKind::PermissionDenied.into()),
    }
}

/// What a file has now: who writes to it does not make the answer endless.
fn content(file: File, length: u64) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    ReaderStream::new(tokio::fs::File::from_std(file).take(length))
}

/// A page of links, as Go's file server makes it.
fn listing(names: &[String]) -> String {
    let text = |name: &str| {
        let safe = name.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        safe.replace('"', "&#34;").replace('\'', "&#39;")
    };
    let link = |name: &String| format!("<a href=\"{}\">{}</a>\n", escaped(name), text(name));
    let links: String = names.iter().map(link).collect();
    format!("<!doctype html>\n<meta name=\"viewport\" content=\"width=device-width\">\n<pre>\n{links}</pre>\n")
}

/// As a relative URL; the slash at the end of a directory's name stays.
fn escaped(name: &str) -> String {
    name.split('/').map(percent::encode).collect::<Vec<_>>().join("/")
}

/// An answer of text. A failure in the middle can only end it: its status has been sent.
fn stream(chunks: impl Stream<Item = io::Result<Bytes>> + Send + 'static) -> Response<Body> {
    let chunks = chunks.inspect_err(|error| tracing::warn!(%error, "cannot read a log of the node"));
    let frames = chunks.scan((), |(), chunk| std::future::ready(chunk.ok())).map(|bytes| Ok(Frame::data(bytes)));
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(TEXT));
    response
}

/// Where the node's logs are.
pub(super) fn default_dir() -> PathBuf {
    "/var/log".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_links_and_nothing_else() {
        let page = listing(&["a b&<i>".to_owned(), "pods/".to_owned()]);
        assert!(
            page.contains("<a href=\"a%20b%26%3Ci%3E\">a b&amp;&lt;i&gt;</a>\n<a href=\"pods/\">pods/</a>\n"),
            "{page}"
        );
    }
}
