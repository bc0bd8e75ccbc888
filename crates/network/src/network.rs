//! The network of a node: attach, detach, adopt.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use crate::bridge::During as _;
use crate::cni::{Janitor, Sandboxes};
use crate::errand::Errand;
use crate::node::Node;
use crate::slots;
use crate::{AttachRequest, Attachment, Config, InterfaceStats, LiveSandbox, Mode, NetworkError, Owned, Status};

/// The pods' network of a node. Shared; every method may be called at any time from any task.
#[derive(Debug)]
pub struct Network {
    node: Arc<Node>,
    sandboxes: Arc<Sandboxes>,
    filler: Errand,
    clearer: Errand,
    /// Guards the thread that cleans up behind CNI sandboxes, while there is one.
    janitor: Mutex<Option<Janitor>>,
}

impl Network {
    /// Opens the network in the calling thread's network namespace, which is the host's from here on. Makes nothing
    /// in the kernel yet.
    ///
    /// # Errors
    /// A configuration value that cannot be used, or a run directory that cannot be made.
    pub fn new(config: Config) -> Result<Arc<Network>, NetworkError> {
        let node = Arc::new(Node::open(&config)?);
        let sandboxes = Arc::new(Sandboxes::open(&config)?);
        let start = |name, work| Errand::start(&node, name, work).during(&config.bridge, "starting a thread");
        let filler = start("network-slots", slots::fill)?;
        let clearer = start("network-clear", slots::clear)?;
        Ok(Arc::new(Network { node, sandboxes, filler, clearer, janitor: Mutex::default() }))
    }

    /// Takes over what lives after a restart and removes what is left of sandboxes that do not. Call it before the first
    /// [`attach`](Network::attach); it makes the bridge and the prepared slots, too.
    ///
    /// # Errors
    /// The kernel refused to make the bridge. What was wrong with a single sandbox is logged.
    pub async fn adopt(&self, live: Vec<LiveSandbox>) -> Result<(), NetworkError> {
        let (node, sandboxes) = (self.node.clone(), self.sandboxes.clone());
        on_own_thread(move || adopt(&node, &sandboxes, live)).await??;
        if !self.sandboxes.leftovers().is_empty() {
            let janitor = Janitor::start(&self.sandboxes).during("CNI attachments", "starting a thread")?;
            // Replaced as a whole; nothing is left half done by a panic.
            *self.janitor.lock().unwrap_or_else(PoisonError::into_inner) = Some(janitor);
        }
        self.filler.wake();
        Ok(())
    }

    /// Puts a sandbox on the network. On failure nothing is left behind.
    ///
    /// # Errors
    /// See [`NetworkError`].
    pub async fn attach(&self, request: AttachRequest) -> Result<Attachment, NetworkError> {
        let node = self.node.clone();
        let attachment = match self.sandboxes.cni.network().map_err(NetworkError::Config)? {
            None => self.blocking(move |node| node.attach(request)).await,
            Some(network) => {
                let sandboxes = self.sandboxes.clone();
                on_own_thread(move || {
                    node.stop_preparing()?;
                    sandboxes.attach(request, &network)
                })
                .await?
            }
        };
        self.filler.wake();
        if attachment.is_err() {
            self.clearer.wake();
        }
        attachment
    }

    /// Takes a sandbox off the network. On the built-in bridge the host ports are closed when it returns, the interface
    /// goes soon after, and then the address is free again. Done twice or for an unknown sandbox it succeeds.
    ///
    /// # Errors
    /// A CNI plugin failed, or the kernel did; the sandbox counts as attached until a retry succeeds.
    pub async fn detach(&self, sandbox_id: &str) -> Result<(), NetworkError> {
        let sandbox = sandbox_id.to_owned();
        if self.sandboxes.has(sandbox_id) {
            let sandboxes = self.sandboxes.clone();
            return on_own_thread(move || sandboxes.detach(&sandbox)).await?;
        }
        let detached = self.blocking(move |node| node.detach(&sandbox)).await;
        self.clearer.wake();
        detached
    }

    /// Asks the CNI plugins whether a sandbox's network is as they made it (CHECK); on the built-in bridge it is.
    ///
    /// # Errors
    /// A plugin says that it is not.
    pub async fn check(&self, sandbox_id: &str) -> Result<(), NetworkError> {
        let (sandboxes, sandbox) = (self.sandboxes.clone(), sandbox_id.to_owned());
        on_own_thread(move || sandboxes.check(&sandbox)).await?
    }

    /// Whether pods can be attached now. Never waits: what CNI plugins say of themselves (STATUS) may be some seconds
    /// old.
    pub fn status(&self) -> Status {
        match self.sandboxes.cni.network() {
            Ok(None) => Status { mode: Mode::Bridge, problem: None },
            Ok(Some(network)) => {
                let problem = self.sandboxes.cni.problem(&network);
                Status { mode: Mode::Cni(network.name.clone()), problem }
            }
            Err(problem) => Status { mode: Mode::Cni(String::new()), problem: Some(problem) },
        }
    }

    /// Counters of the interfaces of a sandbox, loopback left out; empty for an unknown one.
    ///
    /// # Errors
    /// The kernel refused to tell.
    pub async fn stats(&self, sandbox_id: &str) -> Result<Vec<InterfaceStats>, NetworkError> {
        let (sandboxes, sandbox) = (self.sandboxes.clone(), sandbox_id.to_owned());
        self.blocking(
            move |node| if sandboxes.has(&sandbox) { sandboxes.stats(&sandbox) } else { node.stats(&sandbox) },
        )
        .await
    }

    /// Addresses of the host on the built-in bridge; none where pods come to the operator's network.
    pub fn gateways(&self) -> Vec<IpAddr> {
        match self.sandboxes.cni.network() {
            Ok(None) => self.node.gateways(),
            _ => Vec::new(),
        }
    }

    /// Everything the network owns on the host, with the owner of each; what has none is a leak.
    ///
    /// # Errors
    /// The kernel refused to list.
    pub async fn fsck(&self) -> Result<Vec<Owned>, NetworkError> {
        let sandboxes = self.sandboxes.clone();
        self.blocking(move |node| Ok([node.fsck()?, sandboxes.fsck()?].concat())).await
    }

    /// Removes bridge, table and prepared slots. For `down`, when no sandbox is left; a daemon that only restarts
    /// leaves them.
    ///
    /// # Errors
    /// The kernel refused.
    pub async fn shutdown(&self) -> Result<(), NetworkError> {
        self.blocking(|node| node.shutdown()).await
    }

    /// Runs what waits for the kernel away from the async threads.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Node) -> T + Send + 'static) -> T {
        let node = self.node.clone();
        match tokio::task::spawn_blocking(move || work(&node)).await {
            Ok(result) => result,
            Err(error) => std::panic::resume_unwind(error.into_panic()),
        }
    }
}

/// Takes over the sandboxes of both networks. Bridge and slots are made only where pods come to the bridge.
fn adopt(node: &Node, sandboxes: &Sandboxes, mut live: Vec<LiveSandbox>) -> Result<(), NetworkError> {
    sandboxes.adopt(&mut live)?;
    let network = sandboxes.cni.network();
    let elsewhere = !matches!(network, Ok(None));
    if let Ok(Some(network)) = network
        && sandboxes.leftovers().is_empty()
    {
        sandboxes.collect_garbage(&network);
    }
    let live: HashSet<String> = live.into_iter().map(|sandbox| sandbox.sandbox_id).collect();
    node.adopt(&live, elsewhere)
}

/// Runs what may hang for long, as plugins do, on a thread of its own: it takes nobody else's turn.
async fn on_own_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, NetworkError> {
    let (done, result) = tokio::sync::oneshot::channel();
    let run = move || {
        // Nobody waits any more: what had to be undone is found in the records.
        let _ = done.send(work());
    };
    let thread = std::thread::Builder::new().name("network".into()).stack_size(512 << 10).spawn(run);
    thread.during("network", "starting a thread")?;
    Ok(result.await.expect("the thread has panicked"))
}
