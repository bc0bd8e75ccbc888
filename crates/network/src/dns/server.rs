//! The daemon's handle of the DNS server: one task that owns the connection to the process.

use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::{UnixListener, UnixStream as StdStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sys::netns;
use sys::rustix::net::sockopt::socket_peercred;
use sys::zygote::Zygote;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

use super::control::{BODY_MAX, Message as _, Order};
use super::link::{Link, Sockets};
use super::process::Begin;
use super::{Config, DnsError, HELPER, Zone, listen};
use crate::Owned;

const SOCKET: &str = "dns.sock";
/// A process that ends again and again is started at most so often.
const PAUSE: Duration = Duration::from_secs(1);

/// The DNS server. It is a process of its own: dropping the handle, or the death of the daemon, leaves it serving.
#[derive(Debug)]
pub struct Server {
    commands: mpsc::Sender<Command>,
    process: watch::Receiver<Option<u32>>,
    run_dir: PathBuf,
    /// Ends when it is stopped, or the channel closes with this handle. Taken by who waits for that; short sections only.
    supervisor: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
enum Command {
    Update(Zone, oneshot::Sender<Result<(), DnsError>>),
    Stop(oneshot::Sender<Result<(), DnsError>>),
}

impl Server {
    /// Listens. A server of an earlier daemon goes on to serve what it knows until the first [`update`](Server::update);
    /// without one, queries wait until then. The calling thread's network namespace is the server's.
    ///
    /// # Errors
    /// An address is taken, or a value of the configuration cannot be used.
    pub async fn start(config: Config, zygote: Arc<Zygote>) -> Result<Server, DnsError> {
        check(&config)?;
        let kernel = |step| move |source| DnsError::Kernel { step, source };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&config.run_dir)
            .map_err(kernel("making the run directory"))?;
        let (earlier, taken) = Link::to_earlier(&config.run_dir.join(SOCKET)).await?.unzip();
        let sockets = listen::all(&config.addresses, taken.unwrap_or_default())?;
        let namespace = netns::current().map_err(kernel("opening the network namespace"))?;
        let (commands, orders) = mpsc::channel(4);
        let (pid, process) = watch::channel(earlier.as_ref().map(|link: &Link| link.pid));
        let run_dir = config.run_dir.clone();
        let ending = JoinSet::new();
        let (link, is_own, order) = (earlier, false, None);
        let supervisor = Supervisor { config, zygote, namespace, sockets, link, is_own, order, ending, pid };
        let supervisor = Mutex::new(Some(tokio::spawn(supervisor.run(orders))));
        Ok(Server { commands, process, run_dir, supervisor })
    }

    /// Serves `zone` from now on; returns when the server has it. Called again at once, the later zone wins.
    ///
    /// # Errors
    /// The server does not take it.
    pub async fn update(&self, zone: Zone) -> Result<(), DnsError> {
        self.command(|done| Command::Update(zone, done)).await
    }

    /// Ends the server and removes its socket. For `down`.
    ///
    /// # Errors
    /// The process cannot be ended, or the server was stopped before.
    pub async fn stop(&self) -> Result<(), DnsError> {
        let stopped = self.command(Command::Stop).await;
        let supervisor = self.supervisor.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(supervisor) = supervisor {
            supervisor.await.map_err(|error| DnsError::Process(error.to_string()))?;
        }
        stopped
    }

    async fn command(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<(), DnsError>>) -> Command,
    ) -> Result<(), DnsError> {
        let (done, result) = oneshot::channel();
        let ended = || DnsError::Process("it was stopped".into());
        self.commands.send(command(done)).await.map_err(|_| ended())?;
        result.await.map_err(|_| ended())?
    }

    /// The server's process, if it runs.
    pub fn process(&self) -> Option<u32> {
        *self.process.borrow()
    }

    /// What the server owns on the host; what is not this daemon's has no owner.
    pub fn fsck(&self) -> Vec<Owned> {
        let ours = self.process().map(process_name);
        let known = |owned: &Owned| owned.kind == "socket" || Some(&owned.name) == ours.as_ref();
        let own = |owned: Owned| match ours.is_some() && known(&owned) {
            true => Owned { owner: Some("pod DNS".into()), ..owned },
            false => owned,
        };
        fsck(&self.run_dir).into_iter().map(own).collect()
    }
}

/// What DNS servers in this run directory own on the host while no daemon runs.
pub fn fsck(run_dir: &Path) -> Vec<Owned> {
    let path = run_dir.join(SOCKET);
    let mut owned = Vec::new();
    if path.exists() {
        owned.push(Owned { kind: "socket", name: path.display().to_string(), owner: None });
    }
    if let Ok(peer) = StdStream::connect(&path).and_then(|stream| Ok(socket_peercred(&stream)?)) {
        owned.push(Owned {
            kind: "process",
            name: process_name(peer.pid.as_raw_nonzero().get().unsigned_abs()),
            owner: None,
        });
    }
    owned
}

/// Ends the server in this run directory, if there is one, while no daemon runs.
///
/// # Errors
/// The process cannot be ended, or the socket not be removed.
pub async fn stop(run_dir: &Path) -> Result<(), DnsError> {
    let path = run_dir.join(SOCKET);
    if let Some((mut link, _)) = Link::to_earlier(&path).await? {
        link.dismiss().await;
        link.ended().await?;
    }
    remove(&path)
}

fn process_name(pid: u32) -> String {
    format!("{} {pid}", super::PROCESS_NAME)
}

fn check(config: &Config) -> Result<(), DnsError> {
    if config.addresses.is_empty() {
        return Err(DnsError::Config("no address to listen on".into()));
    }
    match config.addresses.iter().find(|address| address.ip().is_unspecified()) {
        // Replies would come from another address than the one that was asked.
        Some(address) => Err(DnsError::Config(format!("{address} names no single address"))),
        None => Ok(()),
    }
}

fn remove(path: &Path) -> Result<(), DnsError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other.map_err(|source| DnsError::Kernel { step: "removing the socket", source }),
    }
}

/// The owner of the process.
#[derive(Debug)]
struct Supervisor {
    config: Config,
    zygote: Arc<Zygote>,
    namespace: std::os::fd::OwnedFd,
    /// The same open sockets as the process has: if it dies, queries wait in them for the next one.
    sockets: Sockets,
    /// The process that serves.
    link: Option<Link>,
    /// It is this daemon's, not that of an earlier one.
    is_own: bool,
    /// The order with the latest zone.
    order: Option<Vec<u8>>,
    /// Dismissed processes that finish what they have under way.
    ending: JoinSet<Result<(), DnsError>>,
    pid: watch::Sender<Option<u32>>,
}

impl Supervisor {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut next_start = Instant::now();
        loop {
            tokio::select! {
                biased;
                command = commands.recv() => match command {
                    None => return,
                    Some(Command::Update(zone, done)) => {
                        // Nobody waits: the caller has gone on to a later zone.
                        let _ = done.send(self.update(&zone).await);
                        next_start = Instant::now() + PAUSE;
                    }
                    Some(Command::Stop(done)) => {
                        let _ = done.send(self.stop().await);
                        return;
                    }
                },
                () = lost(&mut self.link) => {
                    tracing::warn!("the DNS server's process has ended");
                    self.kill().await;
                }
                Some(ended) = self.ending.join_next() => report(ended),
                () = sleep_until(next_start), if self.order.is_some() && !(self.is_own && self.link.is_some()) => {
                    next_start = Instant::now() + PAUSE;
                    if let Err(error) = self.replace().await {
                        tracing::error!(error = &error as &dyn std::error::Error, "cannot start the DNS server");
                    }
                }
            }
        }
    }

    fn set_link(&mut self, link: Option<Link>) -> Option<Link> {
        // Nobody reads it any more when the handle is gone.
        let _ = self.pid.send(link.as_ref().map(|link| link.pid));
        std::mem::replace(&mut self.link, link)
    }

    async fn update(&mut self, zone: &Zone) -> Result<(), DnsError> {
        let order = Order::Zone(zone.clone()).encode();
        if order.len() > BODY_MAX {
            return Err(DnsError::TooLarge { size: order.len(), max: BODY_MAX });
        }
        let order = self.order.insert(order);
        if let Some(link) = self.link.as_mut().filter(|_| self.is_own) {
            match link.order(order).await {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::warn!(error = &error as &dyn std::error::Error, "the DNS server's process is replaced");
                    self.kill().await;
                }
            }
        }
        self.replace().await
    }

    /// Starts a process with the zone; the one before goes on until the new one serves.
    async fn replace(&mut self) -> Result<(), DnsError> {
        let Some(order) = &self.order else { return Ok(()) };
        let path = self.config.run_dir.join(SOCKET);
        let new_path = self.config.run_dir.join(format!(".{SOCKET}"));
        let mut link = self.spawn(&new_path).await?;
        if let Err(error) = link.order(order).await {
            // It may have the zone nevertheless, and would go on to take queries.
            report(Ok(link.kill().await));
            return Err(error);
        }
        let earlier = self.set_link(Some(link));
        self.is_own = true;
        let renamed = std::fs::rename(&new_path, &path);
        if let Some(mut earlier) = earlier {
            earlier.dismiss().await;
            self.ending.spawn(earlier.ended());
        }
        renamed.map_err(|source| DnsError::Kernel { step: "moving the socket to its place", source })
    }

    /// Makes sure that a process which is of no use any more is gone.
    async fn kill(&mut self) {
        if let Some(link) = self.set_link(None) {
            report(Ok(link.kill().await));
        }
    }

    async fn spawn(&self, path: &Path) -> Result<Link, DnsError> {
        let kernel = |step| move |source| DnsError::Kernel { step, source };
        remove(path)?;
        let later = UnixListener::bind(path).map_err(kernel("making the socket"))?;
        let (here, there) = StdStream::pair().map_err(kernel("making a socket pair"))?;
        here.set_nonblocking(true).map_err(kernel("making a socket pair"))?;
        let begin = Begin {
            clients: self.config.clients.clone(),
            upstreams: self.config.upstreams.clone(),
            udp: self.sockets.udp.len(),
        };
        let begin = serde_json::to_vec(&begin).map_err(|error| DnsError::Config(error.to_string()))?;
        let mut fds = vec![there.as_fd(), later.as_fd(), self.namespace.as_fd()];
        fds.extend(self.sockets.udp.iter().chain(&self.sockets.tcp).map(|socket| socket.as_fd()));
        self.zygote.spawn(HELPER.name, &begin, &fds).map_err(kernel("starting the process"))?;
        drop(there);
        let here = UnixStream::from_std(here).map_err(kernel("waiting for the process"))?;
        Ok(Link::greet(here).await?.0)
    }

    async fn stop(&mut self) -> Result<(), DnsError> {
        let mut ended = Vec::new();
        if let Some(mut link) = self.set_link(None) {
            link.dismiss().await;
            ended.push(link.ended().await);
        }
        while let Some(other) = self.ending.join_next().await {
            ended.extend(other);
        }
        ended.into_iter().collect::<Result<(), DnsError>>()?;
        remove(&self.config.run_dir.join(SOCKET))
    }
}

fn report(ended: Result<Result<(), DnsError>, tokio::task::JoinError>) {
    let error: Box<dyn std::error::Error> = match ended {
        Ok(Ok(())) => return,
        Ok(Err(error)) => error.into(),
        Err(error) => error.into(),
    };
    tracing::error!(error = &*error, "a DNS server's process cannot be ended");
}

/// Returns when the connection is lost; never without one.
async fn lost(link: &mut Option<Link>) {
    match link {
        Some(link) => link.lost().await,
        None => std::future::pending().await,
    }
}
