//! Connections: taken, led to an endpoint, carried.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use sys::rustix::net::sockopt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};

use super::Hold;
use super::choose::{Balance, Terms};
use super::relay::relay;

/// How long an endpoint may take to answer before the next one is tried.
const CONNECT_MAX: Duration = Duration::from_secs(2);
/// After a connection could not be taken, as there was no descriptor left.
const BREATH: Duration = Duration::from_millis(100);

/// Takes connections until it is dropped; those that it has taken go on. When the budget is used up the others wait in the
/// kernel's queue.
pub(super) async fn accept(
    listener: TcpListener,
    terms: watch::Receiver<Arc<Terms>>,
    balance: Arc<Balance>,
    budget: Arc<Semaphore>,
    hold: Hold,
) {
    while let Ok(permit) = budget.clone().acquire_owned().await {
        match listener.accept().await {
            Ok((client, peer)) => {
                let terms = terms.borrow().clone();
                let serve = serve(client, peer.ip(), terms, balance.clone());
                let hold = hold.clone();
                tokio::spawn(async move {
                    serve.await;
                    drop((permit, hold));
                });
            }
            Err(error) => {
                tracing::debug!(%error, "a connection could not be taken");
                tokio::time::sleep(BREATH).await;
            }
        }
    }
}

async fn serve(client: TcpStream, peer: IpAddr, terms: Arc<Terms>, balance: Arc<Balance>) {
    let Some(endpoint) = connect(&client, peer, &terms, &balance).await else {
        // A reset says that nobody is here.
        let _ = sockopt::set_socket_linger(&client, Some(Duration::ZERO)); // else it hears an end
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
        for stream in [&client, &endpoint] {
            let _ = sockopt::set_socket_linger(stream, Some(Duration::ZERO));
        }
        tracing::trace!(%error, "a connection broke");
    }
}

/// The first endpoint that answers.
async fn connect(client: &TcpStream, peer: IpAddr, terms: &Terms, balance: &Balance) -> Option<TcpStream> {
    let at = client.local_addr().ok()?.ip();
    for endpoint in balance.order(terms, peer, terms.endpoints(peer, at)) {
        if let Some(stream) = try_one(endpoint).await {
            balance.remember(terms, peer, endpoint);
            return Some(stream);
        }
    }
    None
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
