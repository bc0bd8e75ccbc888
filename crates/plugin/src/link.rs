//! A connection of which it is known whether it is there: without a call, and without asking again and again.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::transport::Channel;

use crate::NoAddress;

/// Connects to who listens on the Unix socket at `path`. The second value is done when that connection ends; calls on the
/// channel make another one then, of which nobody tells.
///
/// # Errors
/// Nobody listens there.
pub async fn connect_now(path: &Path) -> Result<(Channel, impl Future<Output = ()> + use<>), LinkError> {
    let endpoint = crate::endpoint(path)?;
    let (alive, ended) = oneshot::channel();
    let dialer = Dialer { path: path.to_owned(), alive: Some(alive) };
    let channel = endpoint.connect_with_connector(dialer).await?;
    let ended = async {
        let _ = ended.await; // Nothing is sent: it ends with the connection.
    };
    Ok((channel, ended))
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The path is no address.
    #[error(transparent)]
    Address(#[from] NoAddress),
    /// Nobody listens.
    #[error("nobody answers there")]
    Connect(#[from] tonic::transport::Error),
}

/// Makes connections; the first takes with it what tells that it lives.
struct Dialer {
    path: PathBuf,
    alive: Option<oneshot::Sender<()>>,
}

impl Service<http::Uri> for Dialer {
    type Response = TokioIo<Connection>;
    type Error = std::io::Error;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: http::Uri) -> Self::Future {
        let (path, alive) = (self.path.clone(), self.alive.take());
        Box::pin(
            async move { Ok(TokioIo::new(Connection { stream: UnixStream::connect(path).await?, _alive: alive })) },
        )
    }
}

/// A connection; who waits for its end hears of it when this goes.
struct Connection {
    stream: UnixStream,
    _alive: Option<oneshot::Sender<()>>,
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<std::io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
