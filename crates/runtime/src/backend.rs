//! What the streaming server asks of the runtime.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use cri::{Error, v1};
use keeper::protocol::{self, NamespaceKind, Request, Resize};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::Mutex;
use tokio::time::timeout;

use crate::container::{Container, Phase};
use crate::core::{Core, failed, patient};
use crate::exec::{self, Running, Streams};
use crate::launch::namespace_of;
use crate::stream::{Backend, Process, Session, Stdio, WindowSize};

/// The size of a terminal until its client tells one.
const SIZE: protocol::WindowSize = protocol::WindowSize { rows: 0, columns: 0 };

/// How long a port of a pod may take to answer. A listener whose queue is full never does.
const DIAL_MAX: Duration = Duration::from_secs(10);

/// The runtime as the streaming server sees it.
#[derive(Debug)]
pub(crate) struct Streaming(pub(crate) Arc<Core>);

/// A pipe for each stream that is wanted: the process's ends and ours.
fn pipes(stdin: bool, stdout: bool, stderr: bool) -> Result<(Streams, Stdio), Error> {
    let make = || std::io::pipe().map_err(|error| Error::ResourceExhausted(format!("making pipes: {error}")));
    let (mut theirs, mut ours): (Streams, [Option<OwnedFd>; 3]) = Default::default();
    if stdin {
        let (reader, writer) = make()?;
        (theirs.stdin, ours[0]) = (Some(reader.into()), Some(writer.into()));
    }
    if stdout {
        let (reader, writer) = make()?;
        (theirs.stdout, ours[1]) = (Some(writer.into()), Some(reader.into()));
    }
    if stderr {
        let (reader, writer) = make()?;
        (theirs.stderr, ours[2]) = (Some(writer.into()), Some(reader.into()));
    }
    let [stdin, stdout, stderr] = ours;
    Ok((theirs, Stdio::Pipes { stdin, stdout, stderr }))
}

#[async_trait]
impl Backend for Streaming {
    async fn exec(&self, request: v1::ExecRequest) -> Result<Session, Error> {
        let (streams, stdio) = match request.tty {
            true => (Streams::default(), None),
            false => pipes(request.stdin, request.stdout, request.stderr).map(|(theirs, ours)| (theirs, Some(ours)))?,
        };
        let size = request.tty.then_some(SIZE);
        let mut running = exec::start(&self.0, &request.container_id, &request.cmd, size, streams).await?;
        let stdio = match (stdio, running.terminal.take()) {
            (Some(stdio), _) => stdio,
            (None, Some(master)) => Stdio::Terminal(master),
            (None, None) => return Err(Error::Internal("the keeper sent no terminal".to_owned())),
        };
        let resizer = match &stdio {
            Stdio::Terminal(master) => Some(master.try_clone().map_err(|error| Error::Internal(error.to_string()))?),
            Stdio::Pipes { .. } => None,
        };
        Ok(Session { stdio, process: Box::new(Exec { running: Mutex::new(running), resizer }) })
    }

    async fn attach(&self, request: v1::AttachRequest) -> Result<Session, Error> {
        let (streams, stdio) = pipes(request.stdin, request.stdout, request.stderr && !request.tty)?;
        let container = exec::attach(&self.0, &request.container_id, streams).await?;
        Ok(Session { stdio, process: Box::new(Attached(container)) })
    }

    async fn port_forward(&self, sandbox_id: &str, port: u16) -> Result<TcpStream, Error> {
        let sandbox = exec::ready_sandbox(&self.0, sandbox_id)?;
        let sockets = match sandbox.host_network() {
            true => Sockets::here(),
            false => {
                let namespace = namespace_of(&sandbox, NamespaceKind::Net, None).await?;
                patient(move || sys::netns::run_in(namespace.as_fd(), Sockets::here)).await?
            }
        };
        let failed = |error| Error::Unavailable(format!("connecting to port {port} of the pod: {error}"));
        sockets.map_err(failed)?.dial(port).await.map_err(failed)
    }
}

/// Sockets of the network that they were made in, wherever they are used.
struct Sockets {
    v4: TcpSocket,
    v6: io::Result<TcpSocket>,
}

impl Sockets {
    /// Of the calling thread's network; one without IPv6 is one without the other.
    fn here() -> io::Result<Self> {
        Ok(Self { v4: TcpSocket::new_v4()?, v6: TcpSocket::new_v6() })
    }

    /// Connects to a port of the loopback device. No thread waits for a listener that takes no connection.
    async fn dial(self, port: u16) -> io::Result<TcpStream> {
        let late = || io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {} s", DIAL_MAX.as_secs()));
        timeout(DIAL_MAX, self.connect(port)).await.unwrap_or_else(|_| Err(late()))
    }

    async fn connect(self, port: u16) -> io::Result<TcpStream> {
        let first = match self.v4.connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port))).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let Ok(v6) = self.v6 else { return Err(first) };
        v6.connect(SocketAddr::from((Ipv6Addr::LOCALHOST, port))).await.map_err(|_| first)
    }
}

/// A process that was exec'd for a client.
struct Exec {
    running: Mutex<Running>,
    resizer: Option<OwnedFd>,
}

#[async_trait]
impl Process for Exec {
    async fn resize(&self, size: WindowSize) -> Result<(), Error> {
        let Some(terminal) = &self.resizer else { return Ok(()) };
        sys::pty::resize(terminal, size.rows, size.columns)
            .map_err(|error| Error::Internal(format!("setting the size of a terminal: {error}")))
    }

    async fn wait(&self) -> Result<i32, Error> {
        let exit = self.running.lock().await.exit().await?;
        Ok(i32::try_from(exit.code).unwrap_or(i32::MAX))
    }
}

/// A container whose own streams a client has joined.
struct Attached(Arc<Container>);

#[async_trait]
impl Process for Attached {
    async fn resize(&self, size: WindowSize) -> Result<(), Error> {
        let Some(sandbox) = self.0.sandbox.upgrade() else { return Ok(()) };
        let size = protocol::WindowSize { rows: size.rows, columns: size.columns };
        let request = Request::Resize(Resize { id: self.0.id.clone(), size });
        let asked = match sandbox.keeper() {
            Ok(keeper) => keeper.done(request, Vec::new()).await.map(drop),
            Err(error) => Err(error),
        };
        asked.map_err(|error| failed("setting the terminal's size of container", &self.0.id, &error))
    }

    async fn wait(&self) -> Result<i32, Error> {
        self.0.reached(Phase::Exited).await;
        Ok(self.0.record().end.as_ref().map_or(0, |end| end.exit_code))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A listener whose queue is full answers nobody.
    #[tokio::test(start_paused = true)]
    async fn a_port_that_takes_no_connection_holds_no_thread() {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        let listener = socket.listen(1).unwrap();
        let address = listener.local_addr().unwrap();
        let _queued = [(); 2].map(|()| std::net::TcpStream::connect(address).unwrap());
        let refused = Sockets::here().unwrap().dial(address.port()).await.unwrap_err();
        assert_eq!(refused.to_string(), "no answer within 10 s");
        drop(listener);
        let refused = Sockets::here().unwrap().dial(address.port()).await.unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    }
}
