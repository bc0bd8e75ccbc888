//! What the streaming server needs of the runtime: processes with their streams, and connections into a pod.

use std::os::fd::OwnedFd;

use async_trait::async_trait;
use cri::{Error, v1};
use tokio::net::TcpStream;

/// The runtime, as the streaming server sees it.
#[async_trait]
pub(crate) trait Backend: Send + Sync + 'static {
    /// Starts a process in a running container. Called when the client's streams exist, so nothing it writes is lost.
    async fn exec(&self, request: v1::ExecRequest) -> Result<Session, Error>;

    /// Joins the streams of a running container.
    async fn attach(&self, request: v1::AttachRequest) -> Result<Session, Error>;

    /// Connects to `port` of the loopback device inside a sandbox's network: 127.0.0.1, then ::1.
    async fn port_forward(&self, sandbox_id: &str, port: u16) -> Result<TcpStream, Error>;
}

/// A process and our ends of its streams.
///
/// Dropping it is what happens when a client goes away without a word, as under containerd: the process sees the end of
/// its input, its output breaks, its terminal hangs up; it is not killed. Whatever the backend keeps of the process has
/// to go when it ends, whether or not anybody still waits for it.
pub(crate) struct Session {
    pub(crate) stdio: Stdio,
    pub(crate) process: Box<dyn Process>,
}

/// Our ends of a process's streams: pipes, sockets or the master of a terminal. They become non-blocking.
pub(crate) enum Stdio {
    /// One for each stream that the request asked for.
    Pipes { stdin: Option<OwnedFd>, stdout: Option<OwnedFd>, stderr: Option<OwnedFd> },
    /// The master of the process's own terminal.
    Terminal(OwnedFd),
}

/// Size of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WindowSize {
    pub(crate) rows: u16,
    pub(crate) columns: u16,
}

/// The process of a session.
#[async_trait]
pub(crate) trait Process: Send + Sync + 'static {
    /// Sets the size of its terminal.
    async fn resize(&self, size: WindowSize) -> Result<(), Error>;

    /// Waits for its end; the exit code, 128 + the signal's number if a signal ended it. Cancel-safe.
    async fn wait(&self) -> Result<i32, Error>;
}
