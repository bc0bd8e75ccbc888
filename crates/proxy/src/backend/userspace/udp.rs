//! Flows of UDP: a client that sends from one port is one flow, with a socket of its own towards its endpoint.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

use sys::rustix::io::Errno;
use sys::rustix::net::SendFlags;
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};
use tokio_util::task::AbortOnDropHandle;

use super::Hold;
use super::choose::{Balance, Terms};
use super::flows::{Activity, Flows, Place};

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
    /// It is the task's and ends with it.
    socket: Weak<UdpSocket>,
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

/// The socket of a frontend, and its flows.
struct Server {
    socket: Arc<UdpSocket>,
    balance: Arc<Balance>,
    budget: Arc<Flows>,
    times: Times,
    flows: HashMap<SocketAddr, Flow>,
    ended: mpsc::Sender<SocketAddr>,
}

/// Carries datagrams until it is dropped.
pub(super) async fn serve(
    socket: UdpSocket,
    terms: watch::Receiver<Arc<Terms>>,
    balance: Arc<Balance>,
    budget: Arc<Flows>,
    _hold: Hold,
) {
    let (ended, mut endings) = mpsc::channel(ENDED_MAX);
    let mut server = Server { socket: Arc::new(socket), balance, budget, times: TIMES, flows: HashMap::new(), ended };
    let mut datagram = vec![0; DATAGRAM_BYTES];
    loop {
        let socket = server.socket.clone();
        tokio::select! {
            Some(client) = endings.recv() => server.forget(client),
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
    /// Forgets a flow that has ended, unless its client has begun another.
    fn forget(&mut self, client: SocketAddr) {
        if self.flows.get(&client).is_some_and(|flow| flow.socket.strong_count() == 0) {
            self.flows.remove(&client);
        }
    }

    /// Carries one datagram. As everywhere with UDP, one that cannot be carried is lost. No endpoint is waited for: one that
    /// takes nothing would hold up the flows of all others.
    async fn carry(&mut self, client: SocketAddr, datagram: &[u8], terms: &Terms) {
        let socket = match self.known(client, terms) {
            Some(socket) => socket,
            None => match self.open(client, terms).await {
                Some(socket) => socket,
                None => return,
            },
        };
        // The socket itself is asked: tokio knows of a new one only later that it can be written to.
        match sys::rustix::net::send(&socket, datagram, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(_) | Err(Errno::WOULDBLOCK) => {}
            // It refused what came before; the next datagram finds another.
            Err(_) => drop(self.flows.remove(&client)),
        }
    }

    /// Where the client has sent before, if it may go on.
    fn known(&mut self, client: SocketAddr, terms: &Terms) -> Option<Arc<UdpSocket>> {
        let flow = self.flows.get(&client)?;
        let Some(socket) = flow.socket.upgrade().filter(|_| terms.leads_to(flow.endpoint)) else {
            self.flows.remove(&client);
            return None;
        };
        flow.activity.recent.store(true, Ordering::Relaxed);
        flow.activity.more.store(true, Ordering::Relaxed);
        Some(socket)
    }

    async fn open(&mut self, client: SocketAddr, terms: &Terms) -> Option<Arc<UdpSocket>> {
        let at = self.socket.local_addr().ok()?.ip();
        let endpoints = terms.endpoints(client.ip(), at);
        let endpoint = *self.balance.order(terms, client.ip(), endpoints).first()?;
        let place = self.budget.take(client.ip()).await?;
        let socket = Arc::new(towards(endpoint).ok()?);
        self.balance.remember(terms, client.ip(), endpoint);
        let activity = place.activity.clone();
        activity.recent.store(true, Ordering::Relaxed);
        let (stop, ended) = (place.stop.clone(), self.ended.clone());
        let answers = Answers { to: self.socket.clone(), client, from: socket.clone(), times: self.times, place };
        let task = tokio::spawn(async move {
            stop.run_until_cancelled(answers.carry()).await;
            drop(answers);
            // Nobody waits for it when the frontend has gone.
            let _ = ended.send(client).await;
        });
        let flow = Flow { endpoint, socket: Arc::downgrade(&socket), activity, _answers: AbortOnDropHandle::new(task) };
        self.flows.insert(client, flow);
        Some(socket)
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
    times: Times,
    // The last one: the socket is closed before another flow gets the place.
    place: Place,
}

impl Answers {
    async fn carry(&self) {
        loop {
            let activity = &self.place.activity;
            let idle = if activity.is_over() { self.times.idle_after_one } else { self.times.idle };
            match tokio::time::timeout(idle, self.from.readable()).await {
                Ok(Ok(())) => {
                    // Memory is taken only for as long as there is an answer.
                    let mut datagram = Vec::with_capacity(DATAGRAM_BYTES);
                    match self.from.try_recv_buf(&mut datagram) {
                        Ok(_) => {
                            drop(self.to.send_to(&datagram, self.client).await);
                            self.place.answered();
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        // The endpoint refuses.
                        Err(_) => return,
                    }
                }
                Ok(Err(_)) => return,
                Err(_) if activity.recent.swap(false, Ordering::Relaxed) => {}
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
            budget: Flows::new(8),
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
            server.carry(client, b"?", &to_endpoint).await;
        }
        for _ in 0..3 {
            let (_, flow) = endpoint.recv_from(&mut [0; 8]).await.unwrap();
            endpoint.send_to(b"!", flow).await.unwrap();
        }
        for client in [&twice, &twice, &once] {
            client.recv_from(&mut [0; 8]).await.unwrap();
        }
        assert_eq!(endings.recv().await.unwrap(), one);
        server.forget(one);
        assert_eq!(server.flows.keys().collect::<Vec<_>>(), [&other]);
        assert!(endings.try_recv().is_err());
    }

    #[tokio::test]
    async fn new_flows_find_a_place_and_leave_conversations_alone() {
        let endpoint = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let to_endpoint = leading_to(endpoint.local_addr().unwrap());
        let frontend = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let at = frontend.local_addr().unwrap();
        let (_terms, terms) = watch::channel(to_endpoint);
        // One client has two of these.
        let work = serve(frontend, terms, Arc::default(), Flows::new(8), Hold::default());
        let _server = AbortOnDropHandle::new(tokio::spawn(work));
        let ask = async |client: &UdpSocket| {
            client.send_to(b"?", at).await.unwrap();
            let (_, flow) = endpoint.recv_from(&mut [0; 8]).await.unwrap();
            endpoint.send_to(b"!", flow).await.unwrap();
            client.recv_from(&mut [0; 8]).await.unwrap();
            flow
        };
        let talker = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let flow = ask(&talker).await;
        assert_eq!(ask(&talker).await, flow);
        for _ in 0..20 {
            ask(&UdpSocket::bind("127.0.0.1:0").await.unwrap()).await;
        }
        assert_eq!(ask(&talker).await, flow);
    }

    async fn check_a_slow_endpoint() {
        let endpoint = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let (ended, _endings) = mpsc::channel(ENDED_MAX);
        let mut server = Server {
            socket: Arc::new(UdpSocket::bind("127.0.0.1:0").await.unwrap()),
            balance: Arc::default(),
            budget: Flows::new(8),
            times: TIMES,
            flows: HashMap::new(),
            ended,
        };
        let (slow, other): (SocketAddr, SocketAddr) = (([127, 0, 0, 1], 9).into(), ([127, 0, 0, 2], 9).into());
        let to_slow = leading_to(([192, 0, 2, 9], 9).into());
        let datagram = [0; 1024];
        server.carry(slow, &datagram, &to_slow).await;
        // What waits for the neighbour fills the least buffer that a socket can have.
        let socket = server.flows[&slow].socket.upgrade().unwrap();
        sockopt::set_socket_send_buffer_size(&socket, 1).unwrap();
        while sys::rustix::net::send(&socket, &datagram, SendFlags::DONTWAIT).is_ok() {}
        server.carry(slow, &datagram, &to_slow).await;
        assert!(server.flows.contains_key(&slow), "what is lost ends no flow");
        server.carry(other, b"other", &leading_to(endpoint.local_addr().unwrap())).await;
        let mut heard = [0; 16];
        let (length, _) = endpoint.recv_from(&mut heard).await.unwrap();
        assert_eq!(&heard[..length], b"other", "nor is the first datagram of a flow lost");
    }
}
