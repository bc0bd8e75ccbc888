//! In a pod this program is the server that clients ask: it answers each connection once, and on SIGTERM it stops to listen,
//! answers what has come and ends.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};

use anyhow::Context as _;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

/// The word on the command line.
pub(crate) const WORD: &str = "serve";

const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nok\n";

/// Serves on `port` until it is asked to end.
pub(crate) fn run(port: &str) -> anyhow::Result<()> {
    let port: u16 = port.parse().context("the port")?;
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serve(port))
}

async fn serve(port: u16) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let listener = TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, port))).await?;
    let mut begun = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                begun.spawn(answer(accepted?.0));
            }
            // A client that has gone is no fault.
            Some(_) = begun.join_next() => {}
            _ = terminate.recv() => break,
        }
    }
    let mut last = listener.into_std()?;
    while let Some(stream) = waiting(&mut last)? {
        begun.spawn(answer(TcpStream::from_std(stream)?));
    }
    drop(last);
    begun.join_all().await;
    Ok(())
}

/// A connection that has been made and not been accepted.
fn waiting(listener: &mut std::net::TcpListener) -> io::Result<Option<std::net::TcpStream>> {
    match listener.accept() {
        Ok((stream, _)) => stream.set_nonblocking(true).map(|()| Some(stream)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

async fn answer(mut stream: TcpStream) -> io::Result<()> {
    let (from, mut to) = stream.split();
    let mut lines = BufReader::new(from).lines();
    while lines.next_line().await?.is_some_and(|line| !line.is_empty()) {}
    to.write_all(ANSWER).await?;
    to.shutdown().await
}
