//! Userspace: this process takes connections and carries their bytes, for kernels without a packet filter and for user
//! namespaces without privileges.
//!
//! ```text
//! addresses on orlop-services ─► a socket for each frontend ─► endpoint, the next one if it refuses ─► bytes both ways
//! ```
//!
//! It needs nothing but CAP_NET_ADMIN in its network namespace, to have the addresses of Services on an interface of its
//! own; of external addresses it takes ports alone ([`ports`]). What it cannot do, as the kernel has shaken hands before anybody is asked: drop in silence what must not come
//! here, which is reset instead; keep the client's address, as endpoints see this node's; carry SCTP; refuse addresses
//! that no Service has. Connections end with the process.

mod budget;
mod choose;
mod flows;
mod ports;
mod relay;
mod tcp;
mod udp;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use service::{Difference, Endpoint, Entry, Frontend, Kind, Network, Protocol, Rules, Target};
use sys::netlink;
use sys::netlink::policy::PortRule;
use sys::rustix::io::Errno;
use sys::rustix::net::{self, AddressFamily, SocketFlags, SocketType};
use sys::rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};

use self::budget::Budget;
use self::choose::{Balance, Surroundings, Terms};
use self::flows::Flows;
use super::Backend;
use crate::service_link::{NodeAddresses, ServiceLink, USERSPACE as LINK};
use crate::{Owned, RulesError, StartError};

/// Connections at a time: a budget. Each takes twice 64 KiB in the kernel.
const CONNECTIONS_MAX: usize = 4096;
/// Flows of UDP at a time: a budget.
const FLOWS_MAX: usize = 1 << 14;
/// Descriptors that are enough for all of these. Not more: programs that this process starts inherit the limit, and some
/// close all that they might have.
const DESCRIPTORS_WANTED: u64 = 1 << 17;

/// The sockets, and who serves them.
#[derive(Debug)]
pub(super) struct Userspace {
    /// Threads of its own, in the network namespace of the thread that opened it. Taken only at the end.
    runtime: Option<Runtime>,
    connections: Arc<Budget>,
    flows: Arc<Flows>,
    listeners_max: usize,
    link: ServiceLink,
    /// Frontends with an address.
    explicit: BTreeMap<Frontend, Entry>,
    node_ports: BTreeMap<Frontend, Entry>,
    network: Network,
    own: BTreeSet<IpAddr>,
    surroundings: Arc<Surroundings>,
    serving: BTreeMap<Frontend, Serving>,
    /// Places that somebody uses: with the address of a Service that has gone, its connections would go as well.
    holds: BTreeMap<Frontend, Hold>,
    /// Addresses that the kernel does not let this node have, and why; they are tried again.
    refused: BTreeMap<IpAddr, Errno>,
    /// Sockets that could not be had, and why; they are tried again.
    failed: BTreeMap<Frontend, io::ErrorKind>,
}

/// Whoever uses a place has a copy: its socket, and the connections that came by it.
type Hold = Arc<()>;

/// A socket at work; dropped, it takes nothing new.
#[derive(Debug)]
struct Serving {
    terms: watch::Sender<Arc<Terms>>,
    stop: DropGuard,
    task: JoinHandle<Option<()>>,
}

impl Serving {
    /// Tells it to end.
    fn end(self) -> JoinHandle<Option<()>> {
        drop(self.stop);
        self.task
    }
}

impl Userspace {
    /// Makes the interface in the calling thread's namespace, and the threads.
    pub(super) fn open() -> Result<Userspace, StartError> {
        let mut link = ServiceLink::open(LINK).map_err(StartError::Kernel)?;
        make(&mut link).map_err(|error| match error.errno {
            Errno::PERM => StartError::NotPermitted(error),
            Errno::OPNOTSUPP => StartError::NoLink(error),
            _ => StartError::Kernel(error),
        })?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("services")
            .enable_all()
            .build()
            .map_err(StartError::Threads)?;
        let budgets = Budgets::within(descriptors_max());
        Ok(Userspace {
            runtime: Some(runtime),
            connections: Budget::new("connections", budgets.connections, "others wait, or are reset"),
            flows: Flows::new(budgets.flows),
            listeners_max: budgets.listeners,
            link,
            explicit: BTreeMap::new(),
            node_ports: BTreeMap::new(),
            network: Network::default(),
            own: BTreeSet::new(),
            surroundings: Arc::default(),
            serving: BTreeMap::new(),
            holds: BTreeMap::new(),
            refused: BTreeMap::new(),
            failed: BTreeMap::new(),
        })
    }

    /// Brings addresses and sockets to what is wanted.
    fn settle(&mut self) -> Result<(), RulesError> {
        let NodeAddresses { own, bound } = self.link.addresses()?;
        self.surroundings = Arc::new(Surroundings { local: self.network.local.clone(), own: own.clone() });
        self.own = own;
        let wanted: BTreeSet<IpAddr> = self.taken().filter(|address| !self.own.contains(address)).collect();
        self.take_addresses(wanted.difference(&bound).copied().collect())?;
        let places = self.places();
        self.close(|place| !places.contains_key(place));
        self.failed.retain(|place, _| places.contains_key(place));
        for (place, entry) in places {
            self.serve(place, entry);
        }
        self.holds.retain(|_, hold| Arc::strong_count(hold) > 1);
        let used: BTreeSet<IpAddr> =
            self.holds.keys().map(|place| place.address).filter(|address| !self.own.contains(address)).collect();
        let gone: Vec<IpAddr> = bound.difference(&wanted).filter(|address| !used.contains(*address)).copied().collect();
        self.link.delete(&gone)?;
        let foreign = self.foreign_ports(&wanted);
        // By port: what else is at the address of a foreign host is that host's.
        let held: BTreeSet<PortRule> =
            self.holds.keys().filter(|place| used.contains(&place.address)).map(port_rule).collect();
        Ok(ports::settle(self.link.socket(), &foreign, |rule| held.contains(rule))?)
    }

    /// Addresses of Services that this host is to have.
    fn taken(&self) -> impl Iterator<Item = IpAddr> {
        let taken = self.explicit.iter().filter(|(_, entry)| entry.kind != Kind::ExternalIp);
        taken.map(|(frontend, _)| frontend.address)
    }

    /// Ports of addresses that it is not to have: those without endpoints as well, as connections there are reset. A place
    /// that has no socket stays with the host that may be there, and the budget of sockets is that of the rules, too.
    fn foreign_ports(&self, taken: &BTreeSet<IpAddr>) -> BTreeSet<PortRule> {
        let is_here = |address| taken.contains(address) || self.own.contains(address);
        let foreign = self.explicit.iter().filter(|(place, entry)| {
            entry.kind == Kind::ExternalIp && self.serving.contains_key(place) && !is_here(&place.address)
        });
        foreign.map(|(place, _)| port_rule(place)).collect()
    }

    /// Takes addresses for this node's own. Frontends of those that the kernel refuses are not served.
    fn take_addresses(&mut self, addresses: Vec<IpAddr>) -> Result<(), RulesError> {
        let mut refused = BTreeMap::new();
        for (address, error) in self.link.add(&addresses)? {
            if self.refused.get(&address) != Some(&error.errno) {
                tracing::warn!(%address, %error, "the kernel refuses this address of a Service; it is tried again");
            }
            refused.insert(address, error.errno);
        }
        self.refused = refused;
        Ok(())
    }

    /// Frontends that need a socket, as there is somebody to lead to: a node port at each address of this node.
    fn places(&self) -> BTreeMap<Frontend, Entry> {
        let mut places = BTreeMap::new();
        let answering = self.own.iter().filter(|address| self.network.node_ports.include(**address));
        for address in answering {
            let of_family = self.node_ports.iter().filter(|(port, _)| port.address.is_ipv6() == address.is_ipv6());
            places.extend(of_family.map(|(port, entry)| (Frontend { address: *address, ..*port }, entry.clone())));
        }
        places.extend(self.explicit.iter().map(|(frontend, entry)| (*frontend, entry.clone())));
        self.cut_loops(&mut places);
        // No reset could come from an address that is not here: there has to be a socket for it.
        let is_foreign =
            |place: &Frontend, entry: &Entry| entry.kind == Kind::ExternalIp && !self.own.contains(&place.address);
        places.retain(|place, entry| {
            (leads_somewhere(entry) || is_foreign(place, entry)) && !self.refused.contains_key(&place.address)
        });
        places
    }

    /// Leaves endpoints out that are this process: a frontend of its own, or an address that is here only because a
    /// Service has it. A connection there would come back here, and so on until no descriptor is left, or meet a program of
    /// this host that no Service is about.
    fn cut_loops(&self, places: &mut BTreeMap<Frontend, Entry>) {
        let ours: BTreeSet<Frontend> = places.keys().copied().collect();
        let services: BTreeSet<IpAddr> = self.taken().collect();
        for (place, entry) in places {
            leave_out(entry, |endpoint| {
                let address = endpoint.address.to_canonical();
                let at = Frontend { address, protocol: place.protocol, port: endpoint.port };
                ours.contains(&at) || services.contains(&address) && !self.own.contains(&address)
            });
        }
    }

    fn serve(&mut self, place: Frontend, entry: Entry) {
        let terms = Arc::new(Terms { entry, surroundings: self.surroundings.clone() });
        if let Some(serving) = self.serving.get(&place) {
            serving.terms.send_replace(terms);
            return;
        }
        let started = match self.serving.len() < self.listeners_max {
            true => self.start(place, terms),
            false => Err(no_descriptor_left()),
        };
        match started {
            Ok(serving) => {
                self.failed.remove(&place);
                self.serving.insert(place, serving);
            }
            Err(error) => {
                if self.failed.insert(place, error.kind()) != Some(error.kind()) {
                    tracing::warn!(frontend = %place, %error, "this frontend is not served; it is tried again");
                }
            }
        }
    }

    /// Closes sockets, and returns when they are closed: whoever waits for rules may rely on it.
    fn close(&mut self, gone: impl Fn(&Frontend) -> bool) {
        let Some(runtime) = &self.runtime else { return };
        let tasks: Vec<_> = self.serving.extract_if(.., |place, _| gone(place)).map(|(_, one)| one.end()).collect();
        for task in tasks {
            // It ends by being told so; one that has panicked has closed its socket as well.
            let _ = runtime.block_on(task);
        }
    }

    fn start(&mut self, place: Frontend, terms: Arc<Terms>) -> io::Result<Serving> {
        let hold = self.holds.entry(place).or_default().clone();
        let runtime = self.runtime.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        let _inside = runtime.enter();
        let (address, is_foreign) = (SocketAddr::new(place.address, place.port), terms.entry.kind == Kind::ExternalIp);
        let (sender, terms) = watch::channel(terms);
        let stop = CancellationToken::new();
        let balance = Arc::<Balance>::default();
        let task = match place.protocol {
            Protocol::Tcp => {
                let work = tcp::accept(listen(address, is_foreign)?, terms, balance, self.connections.clone(), hold);
                runtime.spawn(stop.clone().run_until_cancelled_owned(work))
            }
            Protocol::Udp => {
                let work = udp::serve(receive(address, is_foreign)?, terms, balance, self.flows.clone(), hold);
                runtime.spawn(stop.clone().run_until_cancelled_owned(work))
            }
            Protocol::Sctp => {
                return Err(io::Error::new(io::ErrorKind::Unsupported, "SCTP is not carried in the mode userspace"));
            }
        };
        Ok(Serving { terms: sender, stop: stop.drop_guard(), task })
    }

    fn want(&mut self, frontend: Frontend, entry: Option<Entry>) {
        let entries = if frontend.is_node_port() { &mut self.node_ports } else { &mut self.explicit };
        match entry {
            Some(entry) => entries.insert(frontend, entry),
            None => entries.remove(&frontend),
        };
    }
}

impl Backend for Userspace {
    fn place(&self) -> String {
        format!("sockets of this process and link {LINK}")
    }

    fn replace(&mut self, rules: &Rules, network: &Network) -> Result<(), RulesError> {
        make(&mut self.link)?;
        (self.explicit, self.node_ports) = (BTreeMap::new(), BTreeMap::new());
        self.network.clone_from(network);
        for (frontend, entry) in rules.iter() {
            self.want(*frontend, Some(entry.clone()));
        }
        self.settle()
    }

    fn update(&mut self, difference: &Difference) -> Result<(), RulesError> {
        for change in &difference.changes {
            self.want(change.frontend, change.new.clone());
        }
        self.settle()
    }

    /// Sockets are nobody else's, so only the interface can be gone. Addresses of this node may have changed, and ports
    /// that others held may be free.
    fn is_there(&mut self) -> Result<bool, RulesError> {
        if !self.link.is_same()? {
            return Ok(false);
        }
        self.settle().map(|()| true)
    }

    /// Flows end with their endpoint here, and the kernel tracks none that lead there.
    fn udp_frontends(&mut self) -> Result<Vec<Frontend>, RulesError> {
        Ok(Vec::new())
    }

    fn remove(&mut self) -> Result<(), RulesError> {
        self.close(|_| true);
        remove_leftovers()
    }

    fn owned(&mut self) -> Result<Vec<Owned>, RulesError> {
        let link = Owned { kind: "link", name: LINK.to_owned(), owner: Some("services".to_owned()) };
        Ok(self.link.exists()?.then_some(link).into_iter().collect())
    }
}

impl Drop for Userspace {
    fn drop(&mut self) {
        // Waiting for threads is not for who may be on one of another runtime.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Removes the interface, if it is there, and what leads ports here.
pub(super) fn remove_leftovers() -> Result<(), RulesError> {
    let mut link = ServiceLink::open(LINK)?;
    ports::remove(link.socket())?;
    Ok(link.remove()?)
}

/// A dummy interface, or a bridge on kernels that have only that.
fn make(link: &mut ServiceLink) -> netlink::Result<()> {
    match link.make_dummy() {
        Err(error) if error.errno == Errno::OPNOTSUPP => link.make_bridge(),
        made => made,
    }
}

/// Connections that wait to be taken, as far as the kernel's limit (`somaxconn`) allows: as Go's servers have it.
const BACKLOG: i32 = 4096;

fn listen(address: SocketAddr, is_foreign: bool) -> io::Result<tokio::net::TcpListener> {
    let socket = open(address, SocketType::STREAM, is_foreign)?;
    net::listen(&socket, BACKLOG)?;
    tokio::net::TcpListener::from_std(socket.into())
}

/// What may wait for this process at a socket of UDP, while others have the processors: some thousand short questions. The
/// kernel takes twice as much for them, and only when they are there. By default they would be 280, as many as a few resolvers ask
/// at once.
const RECEIVE_BYTES: usize = 1 << 20;

fn receive(address: SocketAddr, is_foreign: bool) -> io::Result<tokio::net::UdpSocket> {
    let socket = open(address, SocketType::DGRAM, is_foreign)?;
    widen(&socket)?;
    tokio::net::UdpSocket::from_std(socket.into())
}

/// Lets a socket have [`RECEIVE_BYTES`], or as much as the host lets its users have (`net.core.rmem_max`).
fn widen(socket: &OwnedFd) -> Result<(), Errno> {
    match net::sockopt::set_socket_recv_buffer_size_force(socket, RECEIVE_BYTES) {
        Err(Errno::PERM) => net::sockopt::set_socket_recv_buffer_size(socket, RECEIVE_BYTES),
        done => done,
    }
}

/// A socket with an address, which may be foreign to this host.
fn open(address: SocketAddr, kind: SocketType, is_foreign: bool) -> io::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = net::socket_with(family, kind, SocketFlags::NONBLOCK | SocketFlags::CLOEXEC, None)?;
    if kind == SocketType::STREAM {
        // Connections of an earlier process may be on their way out.
        net::sockopt::set_socket_reuseaddr(&socket, true)?;
    }
    if is_foreign {
        sys::socket::set_transparent(&socket, address.is_ipv6())?;
    }
    net::bind(&socket, &address)?;
    Ok(socket)
}

/// What this process's descriptors are spent on. An eighth is left for everything else.
#[derive(Debug, PartialEq, Eq)]
struct Budgets {
    connections: usize,
    flows: usize,
    listeners: usize,
}

impl Budgets {
    fn within(descriptors: usize) -> Budgets {
        /// Two sockets and two pipes.
        const OF_A_CONNECTION: usize = 6;
        /// Its own, and that of a connection that waits until others have ended.
        const OF_A_LISTENER: usize = 2;
        Budgets {
            connections: (descriptors / 2 / OF_A_CONNECTION).clamp(1, CONNECTIONS_MAX),
            flows: (descriptors / 8).clamp(1, FLOWS_MAX),
            listeners: (descriptors / 4 / OF_A_LISTENER).max(1),
        }
    }
}

fn no_descriptor_left() -> io::Error {
    let remedy = "all descriptors for frontends are in use; raise the limit of open files";
    io::Error::new(io::ErrorKind::QuotaExceeded, remedy)
}

/// How many descriptors this process may have, once as many as are wanted have been asked for.
fn descriptors_max() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let raised = raised(&limit).filter(|raised| match setrlimit(Resource::Nofile, *raised) {
        Ok(()) => true,
        Err(error) => {
            tracing::warn!(%error, "the limit of open files stays as it is; it is what connections at a time depend on");
            false
        }
    });
    let Rlimit { current, .. } = raised.unwrap_or(limit);
    current.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX))
}

/// The limit of open files as it should be, as far as it may be; none if it is.
fn raised(limit: &Rlimit) -> Option<Rlimit> {
    let wanted = limit.maximum.map_or(DESCRIPTORS_WANTED, |maximum| maximum.min(DESCRIPTORS_WANTED));
    let is_less = limit.current.is_some_and(|current| current < wanted);
    is_less.then_some(Rlimit { current: Some(wanted), maximum: limit.maximum })
}

fn leave_out(entry: &mut Entry, ends: impl Fn(&Endpoint) -> bool) {
    let narrow = |target: &mut Target| {
        if target.endpoints().iter().any(&ends) {
            let left: Vec<Endpoint> = target.endpoints().iter().filter(|one| !ends(one)).copied().collect();
            *target = if left.is_empty() { Target::Refuse } else { Target::Endpoints(left.into()) };
        }
    };
    narrow(&mut entry.inside);
    entry.outside.iter_mut().for_each(narrow);
}

fn leads_somewhere(entry: &Entry) -> bool {
    let leads = |target: &Target| !target.endpoints().is_empty();
    leads(&entry.inside) || entry.outside.as_ref().is_some_and(leads)
}

fn port_rule(place: &Frontend) -> PortRule {
    PortRule { address: place.address, protocol: place.protocol.number(), port: place.port }
}

#[cfg(test)]
pub(super) mod tests {
    use service::Change;

    pub(crate) use super::choose::tests::entry;
    use super::*;

    #[test]
    fn budgets_stay_within_the_descriptors() {
        for descriptors in [64, 1024, 1 << 16, 1 << 20] {
            let Budgets { connections, flows, listeners } = Budgets::within(descriptors);
            let spent = 6 * connections + flows + 2 * listeners;
            assert!(spent <= descriptors * 7 / 8, "{spent} of {descriptors}");
        }
        let all = Budgets { connections: CONNECTIONS_MAX, flows: FLOWS_MAX, listeners: 1 << 17 };
        assert_eq!(Budgets::within(1 << 20), all);
    }

    #[test]
    fn a_burst_of_questions_waits() {
        let socket = open(([127, 0, 0, 1], 0).into(), SocketType::DGRAM, false).unwrap();
        widen(&socket).unwrap();
        if net::sockopt::socket_recv_buffer_size(&socket).unwrap() < 2 * RECEIVE_BYTES {
            return eprintln!("skipped: needs CAP_NET_ADMIN, or a higher net.core.rmem_max");
        }
        let socket = std::net::UdpSocket::from(socket);
        let client = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        for _ in 0..2000 {
            client.send_to(b"?", socket.local_addr().unwrap()).unwrap();
        }
        let waiting = std::iter::from_fn(|| socket.recv(&mut [0; 8]).ok()).count();
        assert_eq!(waiting, 2000);
    }

    #[test]
    fn the_limit_of_descriptors_is_raised_as_far_as_it_may_be() {
        let limit = |current, maximum| Rlimit { current, maximum };
        let check = |before: Rlimit, after: Option<u64>| {
            assert_eq!(
                raised(&before).map(|after| (after.current, after.maximum)),
                after.map(|n| (Some(n), before.maximum))
            );
        };
        check(limit(Some(1024), Some(4096)), Some(4096));
        check(limit(Some(1024), Some(1 << 20)), Some(1 << 17));
        check(limit(Some(1024), None), Some(1 << 17));
        check(limit(Some(1 << 20), Some(1 << 20)), None);
        check(limit(None, None), None);
    }

    #[test]
    fn frontends_beyond_the_descriptors_fail_until_others_go() {
        let run = || {
            if let Err(error) = testkit::netns::enter_private() {
                return eprintln!("skipped: needs CAP_SYS_ADMIN for a network namespace ({error:#})");
            }
            let mut userspace = Userspace::open().unwrap();
            userspace.listeners_max = 2;
            let at = |last| Frontend { address: [10, 96, 0, last].into(), protocol: Protocol::Tcp, port: 80 };
            let new = || Some(entry(&[([10, 0, 0, 1], 80).into()]));
            let changes: Vec<Change> =
                (1..=3).map(|last| Change { frontend: at(last), old: None, new: new() }).collect();
            userspace.update(&Difference { changes }).unwrap();
            let serving = |userspace: &Userspace| userspace.serving.keys().copied().collect::<Vec<_>>();
            assert_eq!(serving(&userspace), [at(1), at(2)]);
            assert_eq!(userspace.failed.get(&at(3)), Some(&io::ErrorKind::QuotaExceeded));
            let gone = Change { frontend: at(1), old: new(), new: None };
            userspace.update(&Difference { changes: vec![gone] }).unwrap();
            assert_eq!(serving(&userspace), [at(2), at(3)]);
            assert!(userspace.failed.is_empty());
        };
        std::thread::spawn(run).join().unwrap();
    }

    #[test]
    fn only_places_that_have_a_socket_are_led_here() {
        let run = || {
            if let Err(error) = testkit::netns::enter_private() {
                return eprintln!("skipped: needs CAP_SYS_ADMIN for a network namespace ({error:#})");
            }
            let mut userspace = Userspace::open().unwrap();
            userspace.listeners_max = 2;
            let at = |port| Frontend { address: [198, 51, 100, 4].into(), protocol: Protocol::Tcp, port };
            let new = || Some(Entry { kind: Kind::ExternalIp, ..entry(&[([10, 0, 0, 1], 80).into()]) });
            let come = |port| Change { frontend: at(port), old: None, new: new() };
            userspace.update(&Difference { changes: [80, 443, 8080].map(come).to_vec() }).unwrap();
            let led = || {
                let mut ports: Vec<u16> =
                    netlink::Socket::route().unwrap().port_rules(10_254).unwrap().iter().map(|r| r.port).collect();
                ports.sort_unstable();
                ports
            };
            assert_eq!(led(), [80, 443], "as many as there may be sockets");
            let gone = |port| Change { frontend: at(port), old: new(), new: None };
            userspace.update(&Difference { changes: vec![gone(8080)] }).unwrap();
            userspace.update(&Difference { changes: vec![gone(443)] }).unwrap();
            assert_eq!(led(), [80], "the socket of a port holds no other port of its address");
        };
        std::thread::spawn(run).join().unwrap();
    }
}
