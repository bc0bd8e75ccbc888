//! The daemon's connection to a server process.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use sys::rustix::net::sockopt::socket_peercred;
use sys::rustix::process::Pid;
use sys::{fdpass, process};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::DnsError;
use super::control::{Decoder, Message as _, Order, Report};

/// An answer is a matter of microseconds; a process that needs longer hangs.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a process may take to end after it was told to; it waits for queries under way.
const DRAIN: Duration = Duration::from_secs(7);
const SIGKILL: i32 = 9;

/// A connection to a process that has said hello.
#[derive(Debug)]
pub(super) struct Link {
    stream: UnixStream,
    decoder: Decoder,
    pub(super) pid: u32,
    process: OwnedFd,
}

/// The sockets that came with a hello.
#[derive(Debug, Default)]
pub(super) struct Sockets {
    pub(super) udp: Vec<OwnedFd>,
    pub(super) tcp: Vec<OwnedFd>,
}

impl Link {
    /// Connects to the process that listens on `path`; `None` when none does. One that does not greet is ended.
    pub(super) async fn to_earlier(path: &Path) -> Result<Option<(Link, Sockets)>, DnsError> {
        let stream = match UnixStream::connect(path).await {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(source) => {
                return Err(DnsError::Kernel { step: "connecting to the server of an earlier daemon", source });
            }
        };
        let peer = socket_peercred(&stream).map(|peer| peer.pid);
        match Link::greet(stream).await {
            Ok(met) => Ok(Some(met)),
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "the DNS server of an earlier daemon hangs");
                if let Ok(pid) = peer {
                    end_by_force(pid).await?;
                }
                Ok(None)
            }
        }
    }

    /// Waits for the hello of the process at the other end.
    pub(super) async fn greet(stream: UnixStream) -> Result<(Link, Sockets), DnsError> {
        let (mut decoder, mut fds) = (Decoder::default(), Vec::new());
        let hello = async {
            loop {
                let mut buffer = [0; 512];
                let read = || fdpass::recv(stream.as_fd(), &mut buffer, &mut fds);
                let length = stream.async_io(Interest::READABLE, read).await.map_err(lost)?;
                if length == 0 {
                    return Err(DnsError::Process("it ended before it was ready".into()));
                }
                decoder.push(&buffer[..length]);
                if let Some(report) = decoder.next::<Report>().map_err(|error| DnsError::Process(error.to_string()))? {
                    return Ok(report);
                }
            }
        };
        match timeout(PATIENCE, hello).await.map_err(|_| silent())?? {
            Report::Hello { pid, udp } => {
                let udp = usize::try_from(udp).unwrap_or(usize::MAX).min(fds.len());
                let tcp = fds.split_off(udp);
                Ok((Link { process: handle(pid)?, stream, decoder, pid }, Sockets { udp: fds, tcp }))
            }
            Report::Failed(reason) => Err(DnsError::Process(reason)),
            Report::Done => Err(DnsError::Process("it did not say hello".into())),
        }
    }

    /// Gives an order that is answered.
    pub(super) async fn order(&mut self, order: &[u8]) -> Result<(), DnsError> {
        let done = async {
            self.stream.write_all(order).await.map_err(lost)?;
            match self.report().await? {
                Report::Failed(reason) => Err(DnsError::Process(reason)),
                _ => Ok(()),
            }
        };
        timeout(PATIENCE, done).await.map_err(|_| silent())?
    }

    async fn report(&mut self) -> Result<Report, DnsError> {
        loop {
            if let Some(report) = self.decoder.next().map_err(|error| DnsError::Process(error.to_string()))? {
                return Ok(report);
            }
            let mut buffer = [0; 512];
            match self.stream.read(&mut buffer).await.map_err(lost)? {
                0 => return Err(DnsError::Process("it has ended".into())),
                length => self.decoder.push(&buffer[..length]),
            }
        }
    }

    /// Returns when the connection is lost. Cancel-safe.
    pub(super) async fn lost(&mut self) {
        // Without an order there is nothing to be said; whatever comes is the end.
        let _ = self.report().await;
    }

    /// Tells the process to end; it takes no query any more and finishes those under way.
    pub(super) async fn dismiss(&mut self) {
        // If it fails, the process is gone or hangs; see `ended`.
        let _ = self.order(&Order::Stop.encode()).await;
    }

    /// Waits for the end of a dismissed process; one that does not end is killed.
    pub(super) async fn ended(mut self) -> Result<(), DnsError> {
        match timeout(DRAIN, self.lost()).await {
            Ok(()) => wait(self.process).await,
            Err(_) => self.kill().await,
        }
    }

    /// Ends a process that does not do what it is told.
    pub(super) async fn kill(self) -> Result<(), DnsError> {
        // It may have ended by itself.
        let _ = process::send_signal(self.process.as_fd(), SIGKILL);
        wait(self.process).await
    }
}

/// Ends a process that listens but does not answer.
async fn end_by_force(pid: Pid) -> Result<(), DnsError> {
    let Ok(handle) = process::pidfd_open(pid) else { return Ok(()) };
    // Its number may have gone to another process meanwhile.
    let name = std::fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero())).unwrap_or_default();
    if name.trim() != super::PROCESS_NAME {
        return Ok(());
    }
    let _ = process::send_signal(handle.as_fd(), SIGKILL); // It may have ended by itself.
    wait(handle).await
}

/// Waits for the end of a process.
async fn wait(process: OwnedFd) -> Result<(), DnsError> {
    let ended = async {
        #[expect(deprecated, reason = "an owned descriptor keeps its number for as long as it is registered")]
        let process = AsyncFd::with_interest(process, Interest::READABLE)?;
        process.readable().await.map(drop)
    };
    let kernel = |source| DnsError::Kernel { step: "waiting for the process to end", source };
    timeout(PATIENCE, ended).await.map_err(|_| silent())?.map_err(kernel)
}

fn handle(pid: u32) -> Result<OwnedFd, DnsError> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| DnsError::Process("it has no number".into()))?;
    process::pidfd_open(pid).map_err(|_| DnsError::Process("it has ended".into()))
}

fn lost(error: io::Error) -> DnsError {
    DnsError::Process(format!("the connection to it is lost: {error}"))
}

fn silent() -> DnsError {
    DnsError::Process("it does not answer".into())
}
