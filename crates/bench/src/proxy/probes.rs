//! What a client of Services sees. All of these run in the namespace of a [`testkit::service_lab::Place`].

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use testkit::service_lab::{Protocol, Question, Times, ask_all};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::sleep;

/// What has not come by now was dropped. It is less than TCP takes to try once more.
const PATIENCE: Duration = Duration::from_millis(900);
/// One write of a stream.
const CHUNK: usize = 256 * 1024;

/// Returns when `to` answers: how long after `begun`; none within `limit`.
pub(super) async fn until_served(to: SocketAddr, begun: Instant, limit: Duration) -> Option<Duration> {
    let mut attempts = JoinSet::new();
    while begun.elapsed() < limit {
        // Each is a connection of its own: one that was dropped meets the rules of its first packet for ever.
        attempts.spawn(is_served(to));
        let pause = sleep(pace(begun));
        tokio::pin!(pause);
        loop {
            tokio::select! {
                served = attempts.join_next(), if !attempts.is_empty() => {
                    if matches!(served, Some(Ok(true))) {
                        return Some(begun.elapsed());
                    }
                }
                () = &mut pause => break,
            }
        }
    }
    None
}

/// Returns when `to` answers no more: how long after `begun` the first connection began that was not answered.
pub(super) async fn until_refused(to: SocketAddr, begun: Instant, limit: Duration) -> Option<Duration> {
    while begun.elapsed() < limit {
        let at = begun.elapsed();
        if !is_served(to).await {
            return Some(at);
        }
        sleep(pace(begun)).await;
    }
    None
}

/// Rules have no event for who is outside of the proxy. What takes longer is looked for less often, and with the same
/// precision.
fn pace(begun: Instant) -> Duration {
    (begun.elapsed() / 50).clamp(Duration::from_millis(1), Duration::from_millis(20))
}

async fn is_served(to: SocketAddr) -> bool {
    let question = Question { protocol: Protocol::Tcp, to, source: None, times: Times::InTurn(1), limit: PATIENCE };
    let answers = ask_all(vec![question]).await;
    answers.iter().flatten().any(testkit::service_lab::Answer::is_served)
}

/// How long each of `count` connections takes to be made, to `all` in turn.
pub(super) async fn connections(all: Vec<SocketAddr>, count: usize) -> io::Result<Vec<Duration>> {
    let mut times = Vec::with_capacity(count);
    for to in all.iter().cycle().take(count) {
        let begun = Instant::now();
        let stream = TcpStream::connect(to).await?;
        times.push(begun.elapsed());
        drop(stream);
    }
    Ok(times)
}

/// Opens a server at `here` that takes everything; it lives as long as its place.
pub(super) async fn open_sink(here: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(here).await?;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut buffer = vec![0; CHUNK];
                while stream.read(&mut buffer).await.is_ok_and(|length| length > 0) {}
            });
        }
    });
    Ok(())
}

/// How much a sink takes in `time`, in Gbit/s.
pub(super) async fn stream(to: SocketAddr, time: Duration) -> io::Result<f64> {
    let mut stream = TcpStream::connect(to).await?;
    let chunk = vec![0; CHUNK];
    let (begun, mut bits) = (Instant::now(), 0.0);
    while begun.elapsed() < time {
        stream.write_all(&chunk).await?;
        bits += 8.0 * 256.0 * 1024.0;
    }
    stream.shutdown().await?;
    // The sink ends when it has taken all.
    stream.read_to_end(&mut Vec::new()).await?;
    Ok(bits / begun.elapsed().as_secs_f64() / 1e9)
}
