//! Flows of UDP: a client that sends from one port is one flow, with a socket of its own towards its endpoint.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sys::rustix::io::Errno;
use sys::rustix::net::SendFlags;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::Hold;
use super::budget::{Budget, Permit};
use super::choose::{Balance, Terms};

/// A flow ends when nobody has sent for between one and two of these. The kernel's own time for flows with answers is 120 s
/// (`nf_conntrack_udp_timeout_stream`).
const IDLE: Duration = Duration::from_secs(60);
/// The same of a flow with one question and an answer, as a resolver's: each of its questions comes from another port, so
/// these flows are many. The kernel takes 30 s (`nf_conntrack_udp_timeout`).
const IDLE_AFTER_ONE: Duration = Duration::from_secs(5);
/// The longest datagram.
const DATAGRAM_BYTES: usize = 64 << 10;
/// Flows that have ended and are not forgotten yet; others wait to be.
const ENDED_MAX: usize = 64;

/// One client.
struct Flow {
    endpoint: SocketAddr,
    socket: Arc<UdpSocket>,
    activity: Arc<Activity>,
    _answers: AbortOnDropHandle<()>,
}

/// How long flows are kept.
#[derive(Debug, Clone, Copy)]
struct Times {
    idle: Duration,
    idle_after_one: Duration,
}

const TIMES: Times = Times { idle: IDLE, idle_after_one: IDLE_AFTER_ONE };

/// What a client does.
#[derive(Debug, Default)]
struct Activity {
    /// Whether it has sent since somebody looked.
    recent: AtomicBool,
    /// Whether it has sent more than once.
    more: AtomicBool,
}

/// The socket of a frontend, and its flows.
struct Server {
    socket: Arc<UdpSocket>,
    balance: Arc<Balance>,
    budget: Arc<Budget>,
    times: Times,
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
    let mut server = Server { socket: Arc::new(socket), balance, budget, times: TIMES, flows: HashMap::new(), ended };
    let mut datagram = vec![0; DATAGRAM_BYTES];
    loop {
        let socket = server.socket.clone();
        tokio::select! {
            Some((client, endpoint)) = endings.recv() => server.forget(client, endpoint),
            received = socket.recv_from(&mut datagram) => {
                // An error is one of an answer that nobody took.
                let Ok((length, client)) = received else { continue };
                let terms = terms.borrow().clone();
                server.carry(client, &datagram[..length], &terms);
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

    /// Carries one datagram. As everywhere with UDP, one that cannot be carried is lost. Nothing is waited for here: an
    /// endpoint that takes nothing would hold up the flows of all others.
    fn carry(&mut self, client: SocketAddr, datagram: &[u8], terms: &Terms) {
        if self.flows.get(&client).is_some_and(|flow| !terms.leads_to(flow.endpoint)) {
            self.flows.remove(&client);
        }
        let is_new = !self.flows.contains_key(&client);
        if is_new && let Some(flow) = self.open(client, terms) {
            self.flows.insert(client, flow);
        }
        let Some(flow) = self.flows.get(&client) else { return };
        flow.activity.recent.store(true, Ordering::Relaxed);
        flow.activity.more.fetch_or(!is_new, Ordering::Relaxed);
        // The socket itself is asked: tokio knows of a new one only later that it can be written to.
        match sys::rustix::net::send(&flow.socket, datagram, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) | Err(Errno::WOULDBLOCK) => {}
            // It refused what came before; the next datagram finds another.
            Err(_) => drop(self.flows.remove(&client)),
        }
    }

    fn open(&self, client: SocketAddr, terms: &Terms) -> Option<Flow> {
        let at = self.socket.local_addr().ok()?.ip();
        let permit = self.budget.try_take(client.ip())?;
        let endpoints = terms.endpoints(client.ip(), at);
        let endpoint = *self.balance.order(terms, client.ip(), endpoints).first()?;
        let socket = Arc::new(towards(endpoint).ok()?);
        self.balance.remember(terms, client.ip(), endpoint);
        let activity = Arc::<Activity>::default();
        let answers = Answers {
            to: self.socket.clone(),
            client,
            from: socket.clone(),
            activity: activity.clone(),
            times: self.times,
        };
        let ended = self.ended.clone();
        let task = tokio::spawn(async move {
            answers.carry(permit).await;
            // Nobody waits for it when the frontend has gone.
            let _ = ended.send((client, endpoint)).await;
        });
        Some(Flow { endpoint, socket, activity, _answers: AbortOnDropHandle::new(task) })
    }
}

fn towards(endpoint: SocketAddr) -> io::Result<UdpSocket> {
    let any: SocketAddr = match endpoint {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = std::net::UdpSocket::bind(any)?;
    socket.connect(endpoint)?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

/// The way back of a flow.
struct Answers {
    to: Arc<UdpSocket>,
    client: SocketAddr,
    from: Arc<UdpSocket>,
    activity: Arc<Activity>,
    times: Times,
}

impl Answers {
    async fn carry(&self, _permit: Permit) {
        let mut is_answered = false;
        loop {
            let is_one = is_answered && !self.activity.more.load(Ordering::Relaxed);
            let idle = if is_one { self.times.idle_after_one } else { self.times.idle };
            match tokio::time::timeout(idle, self.from.readable()).await {
                Ok(Ok(())) => {
                    // Memory is taken only for as long as there is an answer.
                    let mut datagram = Vec::with_capacity(DATAGRAM_BYTES);
                    match self.from.try_recv_buf(&mut datagram) {
                        Ok(_) => {
                            drop(self.to.send_to(&datagram, self.client).await);
                            is_answered = true;
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        // The endpoint refuses.
                        Err(_) => return,
                    }
                }
                Ok(Err(_)) => return,
                Err(_) if self.activity.recent.swap(false, Ordering::Relaxed) => {}
                Err(_) => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use sys::netlink::{Socket, Writer};
    use sys::rustix::net::sockopt;

    use super::super::choose::tests::leading_to;
    use super::*;

    #[test]
    fn an_endpoint_that_takes_nothing_holds_nobody_up() {
        let run = || {
            if let Err(error) = testkit::netns::enter_private() {
                return eprintln!("skipped: needs CAP_SYS_ADMIN for a network namespace ({error:#})");
            }
            make_neighbourhood();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(check_a_slow_endpoint());
        };
        std::thread::spawn(run).join().unwrap();
    }

    /// A link on which nobody answers.
    fn make_neighbourhood() {
        let mut route = Socket::route().unwrap();
        let mut request = Writer::new();
        request.create_bridge("quiet", [0x0a, 0x58, 0, 0, 0, 1], 1500);
        route.request(&request).unwrap();
        let link = route.link("quiet").unwrap().unwrap().index;
        let mut request = Writer::new();
        request.set_up(1);
        request.set_up(link);
        request.add_address(link, [192, 0, 2, 1].into(), 24);
        route.request(&request).unwrap();
    }

    #[tokio::test]
    async fn who_asks_once_is_soon_forgotten() {
        let endpoint = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (ended, mut endings) = mpsc::channel(ENDED_MAX);
        let mut server = Server {
            socket: Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap()),
            balance: Arc::default(),
            budget: Budget::new("flows", 8),
            times: Times { idle: Duration::from_secs(600), idle_after_one: Duration::from_millis(1) },
            flows: HashMap::new(),
            ended,
        };
        let [once, twice] =
            [UdpSocket::bind("127.0.0.1:0").await.unwrap(), UdpSocket::bind("127.0.0.1:0").await.unwrap()];
        let [one, other] = [&once, &twice].map(|client| client.local_addr().unwrap());
        let to_endpoint = leading_to(endpoint.local_addr().unwrap());
        // The second of the two has sent twice before it is answered.
        for client in [other, other, one] {
            server.carry(client, b"?", &to_endpoint);
        }
        for _ in 0..3 {
            let (_, flow) = endpoint.recv_from(&mut [0; 8]).await.unwrap();
            endpoint.send_to(b"!", flow).await.unwrap();
        }
        for client in [&twice, &twice, &once] {
            client.recv_from(&mut [0; 8]).await.unwrap();
        }
        assert_eq!(endings.recv().await.unwrap().0, one);
        server.forget(one, endpoint.local_addr().unwrap());
        assert_eq!(server.flows.keys().collect::<Vec<_>>(), [&other]);
        assert!(endings.try_recv().is_err());
    }

    async fn check_a_slow_endpoint() {
        let endpoint = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (ended, _endings) = mpsc::channel(ENDED_MAX);
        let mut server = Server {
            socket: Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap()),
            balance: Arc::default(),
            budget: Budget::new("flows", 8),
            times: TIMES,
            flows: HashMap::new(),
            ended,
        };
        let (slow, other): (SocketAddr, SocketAddr) = (([127, 0, 0, 1], 9).into(), ([127, 0, 0, 2], 9).into());
        let to_slow = leading_to(([192, 0, 2, 9], 9).into());
        let datagram = [0; 1024];
        server.carry(slow, &datagram, &to_slow);
        // What waits for the neighbour fills the least buffer that a socket can have.
        let socket = server.flows[&slow].socket.clone();
        sockopt::set_socket_send_buffer_size(&socket, 1).unwrap();
        while sys::rustix::net::send(&socket, &datagram, SendFlags::DONTWAIT).is_ok() {}
        server.carry(slow, &datagram, &to_slow);
        assert!(server.flows.contains_key(&slow), "what is lost ends no flow");
        server.carry(other, b"other", &leading_to(endpoint.local_addr().unwrap()));
        let mut heard = [0; 16];
        let (length, _) = endpoint.recv_from(&mut heard).await.unwrap();
        assert_eq!(&heard[..length], b"other", "nor is the first datagram of a flow lost");
    }
}
