//! Flows of UDP: a client that sends from one port is one flow, with a socket of its own towards its endpoint.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::Hold;
use super::budget::{Budget, Permit};
use super::choose::{Balance, Terms};

/// A flow ends when nobody has sent for between one and two of these. The kernel's own time for flows with answers is 120 s
/// (`nf_conntrack_udp_timeout_stream`).
const IDLE: Duration = Duration::from_secs(60);
/// The longest datagram.
const DATAGRAM_BYTES: usize = 64 << 10;
/// Flows that have ended and are not forgotten yet; others wait to be.
const ENDED_MAX: usize = 64;

/// One client.
struct Flow {
    endpoint: SocketAddr,
    socket: Arc<UdpSocket>,
    /// Whether the client has sent since somebody looked.
    active: Arc<AtomicBool>,
    _answers: AbortOnDropHandle<()>,
}

/// The socket of a frontend, and its flows.
struct Server {
    socket: Arc<UdpSocket>,
    balance: Arc<Balance>,
    budget: Arc<Budget>,
    flows: HashMap<SocketAddr, Flow>,
    ended: mpsc::Sender<(SocketAddr, SocketAddr)>,
}

/// Carries datagrams until it is dropped.
pub(super) async fn serve(
    socket: UdpSocket,
    terms: watch::Receiver<Arc<Terms>>,
    balance: Arc<Balance>,
    budget: Arc<Budget>,
    _hold: Hold,
) {
    let (ended, mut endings) = mpsc::channel(ENDED_MAX);
    let mut server = Server { socket: Arc::new(socket), balance, budget, flows: HashMap::new(), ended };
    let mut datagram = vec![0; DATAGRAM_BYTES];
    loop {
        let socket = server.socket.clone();
        tokio::select! {
            Some((client, endpoint)) = endings.recv() => server.forget(client, endpoint),
            received = socket.recv_from(&mut datagram) => {
                // An error is one of an answer that nobody took.
                let Ok((length, client)) = received else { continue };
                let terms = terms.borrow().clone();
                server.carry(client, &datagram[..length], &terms).await;
            }
        }
    }
}

impl Server {
    fn forget(&mut self, client: SocketAddr, endpoint: SocketAddr) {
        if self.flows.get(&client).is_some_and(|flow| flow.endpoint == endpoint) {
            self.flows.remove(&client);
        }
    }

    /// Carries one datagram. As everywhere with UDP, one that cannot be carried is lost.
    async fn carry(&mut self, client: SocketAddr, datagram: &[u8], terms: &Terms) {
        if self.flows.get(&client).is_some_and(|flow| !terms.leads_to(flow.endpoint)) {
            self.flows.remove(&client);
        }
        if !self.flows.contains_key(&client)
            && let Some(flow) = self.open(client, terms).await
        {
            self.flows.insert(client, flow);
        }
        let Some(flow) = self.flows.get(&client) else { return };
        flow.active.store(true, Ordering::Relaxed);
        if flow.socket.send(datagram).await.is_err() {
            // It refused what came before; the next datagram finds another.
            self.flows.remove(&client);
        }
    }

    async fn open(&self, client: SocketAddr, terms: &Terms) -> Option<Flow> {
        let at = self.socket.local_addr().ok()?.ip();
        let permit = self.budget.try_take(client.ip())?;
        let endpoints = terms.endpoints(client.ip(), at);
        let endpoint = *self.balance.order(terms, client.ip(), endpoints).first()?;
        let socket = Arc::new(towards(endpoint).await.ok()?);
        self.balance.remember(terms, client.ip(), endpoint);
        let active = Arc::new(AtomicBool::new(true));
        let answers = Answers { to: self.socket.clone(), client, from: socket.clone(), active: active.clone() };
        let ended = self.ended.clone();
        let task = tokio::spawn(async move {
            answers.carry(permit).await;
            // Nobody waits for it when the frontend has gone.
            let _ = ended.send((client, endpoint)).await;
        });
        Some(Flow { endpoint, socket, active, _answers: AbortOnDropHandle::new(task) })
    }
}

async fn towards(endpoint: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = match endpoint {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(endpoint).await?;
    Ok(socket)
}

/// The way back of a flow.
struct Answers {
    to: Arc<UdpSocket>,
    client: SocketAddr,
    from: Arc<UdpSocket>,
    active: Arc<AtomicBool>,
}

impl Answers {
    async fn carry(&self, _permit: Permit) {
        loop {
            match tokio::time::timeout(IDLE, self.from.readable()).await {
                Ok(Ok(())) => {
                    // Memory is taken only for as long as there is an answer.
                    let mut datagram = Vec::with_capacity(DATAGRAM_BYTES);
                    match self.from.try_recv_buf(&mut datagram) {
                        Ok(_) => drop(self.to.send_to(&datagram, self.client).await),
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        // The endpoint refuses.
                        Err(_) => return,
                    }
                }
                Ok(Err(_)) => return,
                Err(_) if self.active.swap(false, Ordering::Relaxed) => {}
                Err(_) => return,
            }
        }
    }
}
