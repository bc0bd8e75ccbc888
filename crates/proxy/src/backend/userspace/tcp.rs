//! Connections: taken, led to an endpoint, carried.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use sys::rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::Hold;
use super::budget::Budget;
use super::choose::{Balance, Terms};
use super::relay::relay;

/// How long an endpoint may take to answer before the next one is tried.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// How long a client waits for any of them, however many there are: it uses the budget up meanwhile.
const CONNECT_ALL_MAX: Duration = Duration::from_secs(6);
/// After a connection could not be taken, as there was no descriptor left.
const BREATH: Duration = Duration::from_millis(100);

/// Takes connections until it is dropped; those that it has taken go on. When the budget is used up the one that came first
/// waits here and the others in the kernel's queue; who has his share is reset.
pub(super) async fn accept(
    listener: TcpListener,
    terms: watch::Receiver<Arc<Terms>>,
    balance: Arc<Balance>,
    budget: Arc<Budget>,
    hold: Hold,
) {
    loop {
        let (client, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::debug!(%error, "a connection could not be taken");
                tokio::time::sleep(BREATH).await;
                continue;
            }
        };
        let Some(permit) = budget.take(peer.ip()).await else {
            reset(&client);
            continue;
        };
        let terms = terms.borrow().clone();
        let serve = serve(client, peer.ip(), terms, balance.clone());
        let hold = hold.clone();
        // Owned by nobody: a connection outlives the frontend that it came by. It ends with either peer, or with the process, and
        // until then holds its permit and the frontend's address.
        tokio::spawn(async move {
            serve.await;
            drop((permit, hold));
        });
    }
}

/// Says at its end that nobody is here; without it a peer hears that all has been said.
fn reset(stream: &TcpStream) {
    let _ = sockopt::set_socket_linger(stream, Some(Duration::ZERO)); // else it hears an end
}

async fn serve(client: TcpStream, peer: IpAddr, terms: Arc<Terms>, balance: Arc<Balance>) {
    let Some(endpoint) = connect(&client, peer, &terms, &balance).await else {
        reset(&client);
        return;
    };
    drop(terms);
    for stream in [&client, &endpoint] {
        // Peers that have vanished are found out; without it they only stay longer.
        let _ = sockopt::set_socket_keepalive(stream, true);
        let _ = stream.set_nodelay(true);
    }
    if let Err(error) = relay(&client, &endpoint).await {
        // The other side hears of it as it would have from its peer.
        [&client, &endpoint].into_iter().for_each(reset);
        tracing::trace!(%error, "a connection broke");
    }
}

/// The first endpoint that answers.
async fn connect(client: &TcpStream, peer: IpAddr, terms: &Terms, balance: &Balance) -> Option<TcpStream> {
    let at = client.local_addr().ok()?.ip();
    let order = balance.order(terms, peer, terms.endpoints(peer, at));
    let (endpoint, stream) = first(order, CONNECT_ALL_MAX, try_one).await?;
    balance.remember(terms, peer, endpoint);
    Some(stream)
}

/// The first that an attempt succeeds at, if one does in time.
async fn first<T>(
    order: Vec<SocketAddr>,
    within: Duration,
    attempt: impl AsyncFn(SocketAddr) -> Option<T>,
) -> Option<(SocketAddr, T)> {
    let all = async {
        for endpoint in order {
            if let Some(found) = attempt(endpoint).await {
                return Some((endpoint, found));
            }
        }
        None
    };
    tokio::time::timeout(within, all).await.ok().flatten()
}

async fn try_one(endpoint: SocketAddr) -> Option<TcpStream> {
    match tokio::time::timeout(CONNECT_MAX, TcpStream::connect(endpoint)).await {
        Ok(Ok(stream)) => Some(stream),
        Ok(Err(error)) => {
            tracing::debug!(%endpoint, %error, "an endpoint refuses; the next one is tried");
            None
        }
        Err(_) => {
            tracing::debug!(%endpoint, "an endpoint does not answer; the next one is tried");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::super::choose::tests::leading_to;
    use super::*;

    #[tokio::test]
    async fn listeners_that_nobody_uses_take_nothing_from_the_budget() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (_sender, terms) = watch::channel(leading_to(server.local_addr().unwrap()));
        let budget = Budget::new("connections", 4, "others wait");
        let mut at = None;
        for _ in 0..5 {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            at = listener.local_addr().ok();
            tokio::spawn(accept(listener, terms.clone(), Arc::default(), budget.clone(), Hold::default()));
            tokio::task::yield_now().await;
        }
        let mut client = TcpStream::connect(at.unwrap()).await.unwrap();
        let (mut served, _) = server.accept().await.unwrap();
        served.write_all(b"here").await.unwrap();
        let mut heard = [0; 4];
        client.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"here");
        let mut second = TcpStream::connect(at.unwrap()).await.unwrap();
        let reset = second.read(&mut heard).await.unwrap_err();
        assert_eq!(reset.kind(), std::io::ErrorKind::ConnectionReset, "the client has its share");
    }

    #[tokio::test]
    async fn endpoints_that_do_not_answer_are_not_waited_for_one_by_one() {
        let order = vec![([192, 0, 2, 1], 80).into(); 100];
        let found = first(order, Duration::from_millis(1), async |_| std::future::pending::<Option<()>>().await);
        assert_eq!(found.await, None);
    }
}
