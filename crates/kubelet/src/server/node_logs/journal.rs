//! The logs of services: those that log to journald by `journalctl`, which the operator allows by `enableSystemLogQuery`
//! (R3), the others by the file that is named like them.

use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, BoxStream, Stream, StreamExt as _};
use jiff::Timestamp;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::time::Instant;

use super::query::Options;
use super::{Found, content, find};

/// As long as upstream gives journalctl.
const WITHIN: Duration = Duration::from_secs(30);
/// Bytes that one step of reading takes.
const CHUNK: usize = 64 * 1024;

type Chunks = BoxStream<'static, io::Result<Bytes>>;

/// What services have logged: first those of journald, then the files of the others.
pub(super) fn of_services(
    dir: PathBuf,
    services: Vec<String>,
    options: Options,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    stream::once(async move {
        let begun = tokio::task::spawn_blocking(move || begin(&dir, &services, &options)).await;
        begun.unwrap_or_else(|_| vec![line("error: journal output not available")])
    })
    .flat_map(|parts| stream::iter(parts).flatten())
}

fn begin(dir: &Path, services: &[String], options: &Options) -> Vec<Chunks> {
    let units = units();
    let (native, others): (Vec<&String>, Vec<&String>) =
        services.iter().partition(|service| units.contains(&format!("{service}.service")));
    let mut parts = Vec::new();
    if !native.is_empty() {
        let started = Journal::chunks(&arguments(&native, options));
        parts.push(started.unwrap_or_else(|_| line("error: journal output not available")));
    }
    if !others.is_empty() && *options != Options::default() {
        let told =
            format!("options present and query resolved to log files for {others:?}\ntry without specifying options");
        parts.push(line(&told));
    } else {
        parts.extend(others.into_iter().map(|service| of_file(dir, service)));
    }
    parts
}

/// All units that journald has something of; none without it.
fn units() -> String {
    let read = || {
        let (_journal, mut output) = Journal::start(&["--field".to_owned(), "_SYSTEMD_UNIT".to_owned()])?;
        let mut text = String::new();
        output.read_to_string(&mut text)?;
        io::Result::Ok(text)
    };
    read().unwrap_or_default()
}

/// journalctl(1), times in UTC.
fn arguments(services: &[&String], options: &Options) -> Vec<String> {
    let time = |time: Timestamp| time.strftime("%Y-%m-%d %H:%M:%S UTC").to_string();
    let mut arguments: Vec<String> = ["--utc", "--no-pager", "--output=short-precise"].map(str::to_owned).to_vec();
    arguments.extend(options.since.map(|since| format!("--since={}", time(since))));
    arguments.extend(options.until.map(|until| format!("--until={}", time(until))));
    arguments.extend(options.tail_lines.map(|lines| format!("--lines={lines}")));
    arguments.extend(services.iter().map(|service| format!("--unit={service}")));
    arguments.extend(options.pattern.iter().map(|pattern| format!("--grep={pattern}")));
    arguments.extend(options.boot.map(|boot| format!("--boot={boot}")));
    arguments
}

/// `service`, `service.log` or `service/service.log`, the first that is there.
fn of_file(dir: &Path, service: &str) -> Chunks {
    for name in [service.to_owned(), format!("{service}.log"), format!("{service}/{service}.log")] {
        match find(dir, &name) {
            Ok(Found::File(file, length)) => return content(file, length).boxed(),
            Ok(Found::Directory(_)) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return line(&format!("error getting log for {service}: {error}")),
        }
    }
    line(&format!("log not found for {service}"))
}

/// A message among the logs.
fn line(text: &str) -> Chunks {
    let text = Bytes::from(format!("\n{text}\n"));
    stream::once(std::future::ready(Ok(text))).boxed()
}

/// A journalctl at work. It ends with this value.
struct Journal(Child);

impl Drop for Journal {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Journal {
    /// Both its outputs come by one pipe.
    fn start(arguments: &[String]) -> io::Result<(Self, io::PipeReader)> {
        let (reader, writer) = io::pipe()?;
        #[allow(clippy::disallowed_methods, reason = "the operator has allowed it by enableSystemLogQuery (R3)")]
        let mut command = Command::new("journalctl");
        command.args(arguments).stdin(Stdio::null()).stdout(writer.try_clone()?).stderr(writer);
        Ok((Self(command.spawn()?), reader))
    }

    /// What it prints, until it has been at it for too long.
    fn chunks(arguments: &[String]) -> io::Result<Chunks> {
        let (journal, output) = Self::start(arguments)?;
        let output = pipe::Receiver::from_owned_fd(OwnedFd::from(output))?;
        let until = Instant::now() + WITHIN;
        let chunks = stream::try_unfold((journal, output), move |(journal, mut output)| async move {
            let mut chunk = BytesMut::with_capacity(CHUNK);
            match tokio::time::timeout_at(until, output.read_buf(&mut chunk)).await {
                Ok(Ok(0)) | Err(_) => Ok(None),
                Ok(read) => read.map(|_| Some((chunk.freeze(), (journal, output)))),
            }
        });
        Ok(chunks.boxed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_journalctls() {
        let time = |text: &str| Some(text.parse().unwrap());
        let options = Options {
            since: time("2026-01-02T03:04:05+01:00"),
            until: time("2026-01-03T00:00:00Z"),
            tail_lines: Some(7),
            boot: Some(-1),
            pattern: Some("a b".to_owned()),
        };
        let expect = [
            "--utc",
            "--no-pager",
            "--output=short-precise",
            "--since=2026-01-02 02:04:05 UTC",
            "--until=2026-01-03 00:00:00 UTC",
            "--lines=7",
            "--unit=kubelet",
            "--grep=a b",
            "--boot=-1",
        ];
        assert_eq!(arguments(&[&"kubelet".to_owned()], &options), expect);
    }
}
