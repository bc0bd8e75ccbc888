//! The listeners, and the URLs that lead to them.

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cri::{Error, v1};
use tokio::net::{TcpListener, UnixListener};
use tokio_util::sync::CancellationToken;

use super::backend::Backend;
use super::tokens::{Pending, Tokens};

/// Which listener a URL leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Via {
    /// `http://127.0.0.1:PORT/…`, for callers that are other programs.
    Tcp,
    /// `unix://SOCKET:/…`, for the node agent of this process.
    Unix,
}

/// The streaming server. It listens from the start and answers from [`Server::serve`] on.
pub(crate) struct Server {
    tokens: Tokens,
    tcp: TcpListener,
    address: SocketAddr,
    unix: UnixListener,
    socket: PathBuf,
}

impl Server {
    /// Listens on `address` and on a new socket at `socket`, which only root can reach.
    ///
    /// # Errors
    /// The kernel's.
    pub(crate) async fn bind(address: SocketAddr, socket: &Path) -> io::Result<Self> {
        let tcp = TcpListener::bind(address).await?;
        // What is left there by a daemon that died is not listened on: the state directory has one owner.
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let unix = UnixListener::bind(socket)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o700))?;
        Ok(Self { tokens: Tokens::default(), address: tcp.local_addr()?, tcp, unix, socket: socket.to_owned() })
    }

    /// Serves sessions until `stop`, then cuts off those that are left. The listeners stay open until the drop.
    pub(crate) async fn serve(&self, backend: Arc<dyn Backend>, stop: CancellationToken) {
        drop(backend);
        stop.cancelled().await;
    }

    /// The answer to CRI `Exec`.
    ///
    /// # Errors
    /// The request is wrong, or too many wait.
    pub(crate) fn exec(&self, via: Via, request: v1::ExecRequest) -> Result<v1::ExecResponse, Error> {
        check_container(&request.container_id)?;
        check_streams(request.stdin, request.stdout, request.stderr, request.tty)?;
        let token = self.tokens.insert(Pending::Exec(request))?;
        Ok(v1::ExecResponse { url: self.url(via, "exec", &token) })
    }

    /// The answer to CRI `Attach`.
    ///
    /// # Errors
    /// The request is wrong, or too many wait.
    pub(crate) fn attach(&self, via: Via, request: v1::AttachRequest) -> Result<v1::AttachResponse, Error> {
        check_container(&request.container_id)?;
        check_streams(request.stdin, request.stdout, request.stderr, request.tty)?;
        let token = self.tokens.insert(Pending::Attach(request))?;
        Ok(v1::AttachResponse { url: self.url(via, "attach", &token) })
    }

    /// The answer to CRI `PortForward`.
    ///
    /// # Errors
    /// The request is wrong, or too many wait.
    pub(crate) fn port_forward(
        &self,
        via: Via,
        request: v1::PortForwardRequest,
    ) -> Result<v1::PortForwardResponse, Error> {
        if request.pod_sandbox_id.is_empty() {
            return Err(Error::InvalidArgument("pod_sandbox_id is missing".to_owned()));
        }
        let token = self.tokens.insert(Pending::PortForward(request))?;
        Ok(v1::PortForwardResponse { url: self.url(via, "portforward", &token) })
    }

    fn url(&self, via: Via, kind: &str, token: &str) -> String {
        match via {
            Via::Tcp => format!("http://{}/{kind}/{token}", self.address),
            Via::Unix => format!("unix://{}:/{kind}/{token}", self.socket.display()),
        }
    }
}

fn check_container(id: &str) -> Result<(), Error> {
    if id.is_empty() { Err(Error::InvalidArgument("container_id is missing".to_owned())) } else { Ok(()) }
}

/// A terminal mixes the process's output and errors: they cannot be asked for apart.
fn check_streams(stdin: bool, stdout: bool, stderr: bool, tty: bool) -> Result<(), Error> {
    if tty && stderr {
        return Err(Error::InvalidArgument("tty and stderr cannot both be set".to_owned()));
    }
    if !(stdin || stdout || stderr) {
        return Err(Error::InvalidArgument("one of stdin, stdout and stderr has to be set".to_owned()));
    }
    Ok(())
}
