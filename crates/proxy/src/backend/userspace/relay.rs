//! Bytes from one connection to another, without copying them through this process: splice(2) by way of a pipe.

use std::io;

use sys::rustix::io::Errno;
use sys::rustix::net::Shutdown;
use sys::rustix::pipe::{PipeFlags, SpliceFlags, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// A pipe's size (pipe(7)), which is all that is held of one direction.
const HELD_BYTES: usize = 64 << 10;

/// Carries both directions until both have ended, each by itself: who has said all may still listen.
pub(super) async fn relay(client: &TcpStream, endpoint: &TcpStream) -> io::Result<()> {
    tokio::try_join!(pump(client, endpoint), pump(endpoint, client)).map(|_| ())
}

async fn pump(from: &TcpStream, to: &TcpStream) -> io::Result<()> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
    loop {
        // The pipe is empty here, so only `from` can be what is waited for.
        let take = || Ok(splice(from, None, &write, None, HELD_BYTES, flags)?);
        let mut held = from.async_io(Interest::READABLE, take).await?;
        if held == 0 {
            return match sys::rustix::net::shutdown(to, Shutdown::Write) {
                // It has ended altogether.
                Ok(()) | Err(Errno::NOTCONN) => Ok(()),
                Err(error) => Err(error.into()),
            };
        }
        while held > 0 {
            let give = || Ok(splice(&read, None, to, None, held, flags)?);
            held -= to.async_io(Interest::WRITABLE, give).await?;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (one, other) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (one.unwrap(), other.unwrap().0)
    }

    #[tokio::test]
    async fn who_has_said_all_hears_the_answer() {
        let ((mut client, inner), (outer, mut server)) = (pair().await, pair().await);
        let relayed = tokio::spawn(async move { relay(&inner, &outer).await });
        let sent = vec![7; 3 << 20];
        let answer = tokio::spawn(async move {
            let mut heard = Vec::new();
            server.read_to_end(&mut heard).await.unwrap();
            server.write_all(&heard).await.unwrap();
        });
        client.write_all(&sent).await.unwrap();
        client.shutdown().await.unwrap();
        let mut heard = Vec::new();
        client.read_to_end(&mut heard).await.unwrap();
        answer.await.unwrap();
        relayed.await.unwrap().unwrap();
        assert!(heard == sent);
    }

    #[tokio::test]
    async fn a_connection_that_breaks_ends_both() {
        let ((client, inner), (outer, mut server)) = (pair().await, pair().await);
        let relayed = tokio::spawn(async move { relay(&inner, &outer).await });
        sys::rustix::net::sockopt::set_socket_linger(&client, Some(std::time::Duration::ZERO)).unwrap();
        drop(client);
        assert!(relayed.await.unwrap().is_err());
        let mut rest = Vec::new();
        assert_eq!(server.read_to_end(&mut rest).await.unwrap_or(0), 0);
    }
}
