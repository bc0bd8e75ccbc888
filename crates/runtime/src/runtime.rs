//! The runtime as the rest of the node sees it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use keeper::protocol::{VERSION, VERSION_OLDEST};
use network::Owned;
use sys::cgroup::Hierarchy;
use sys::rustix::fs::{FlockOperation, flock};
use sys::rustix::io::Errno;

use crate::adopt::{self, AdoptError, Foreign};
use crate::backend::Streaming;
use crate::config::{Config, Parts};
use crate::core::{Core, Place};
use crate::driver::Handlers;
use crate::fsck;
use crate::plugins::Seen;
use crate::spec::Host;
use crate::stream::{Server, Via};

/// Name of the streaming server's socket in the run directory.
const STREAMING_SOCKET: &str = "streaming.sock";
/// Name of the file in the run directory that one runtime locks.
const LOCK: &str = "runtime.lock";

/// Pod sandboxes and containers of one node. Implements `cri::RuntimeService`.
pub struct Runtime {
    core: Arc<Core>,
    streaming: Arc<Server>,
    via: Via,
}

impl std::fmt::Debug for Runtime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Runtime").field("config", &self.core.config).finish_non_exhaustive()
    }
}

/// Why a runtime cannot start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// A directory or a file in it cannot be made or read.
    #[error("{step} {}; the runtime needs a writable directory of its own there", path.display())]
    Directory {
        /// What was tried.
        step: &'static str,
        /// With what.
        path: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Another runtime uses the directory.
    #[error("{} is in use by another runtime; stop that one, or give this one a run directory of its own", path.display())]
    InUse {
        /// The run directory.
        path: PathBuf,
    },
    /// The host lacks something.
    #[error("reading what this host offers")]
    Host(#[source] sys::Error),
    /// The streaming server cannot listen.
    #[error("listening for exec, attach and port-forward sessions on {address} and in {}", directory.display())]
    Streaming {
        /// The address of the configuration.
        address: std::net::SocketAddr,
        /// The run directory.
        directory: PathBuf,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Plugins cannot connect.
    #[error("starting the Node Resource Interface")]
    Nri(#[source] nri::StartError),
    /// A pod lives with whose keeper this version has no protocol in common.
    #[error(
        "pod {pod} runs, made by another version of orlop whose keepers this one, {}, cannot speak with (sandbox {sandbox}: \
         {detail}, this is {VERSION_OLDEST} to {VERSION}). It goes on, and nothing was changed. Start that version again, or one \
         between the two; or drain the node and boot the machine, after which this one starts",
        env!("CARGO_PKG_VERSION")
    )]
    Foreign {
        /// Whose: namespace and name.
        pod: String,
        /// Its sandbox.
        sandbox: String,
        /// What the keeper says.
        detail: String,
    },
    /// The pods' network cannot be taken over.
    #[error("taking over the pods' network")]
    Network(#[source] network::NetworkError),
}

impl Runtime {
    /// Starts the runtime: finds the sandboxes of an earlier daemon and takes over what lives of them; what is dead is
    /// reported as such, what belongs to another boot is removed.
    ///
    /// # Errors
    /// See [`StartError`]; a single sandbox that cannot be taken over is no error.
    pub async fn start(config: Config, parts: Parts) -> Result<Arc<Self>, StartError> {
        let sandboxes = config.run_dir.join("sandboxes");
        let trouble = |step, source| StartError::Directory { step, path: sandboxes.clone(), source };
        private_directory(&sandboxes).map_err(|error| trouble("making", error))?;
        let place = place(&config, Handlers::ask(&config.handlers).await)?;
        let streaming = Arc::new(listen(&config).await?);
        let core = Core::new(config, parts, place);
        let live = adopt::everything(&core).await.map_err(|error| match error {
            AdoptError::List(error) => trouble("reading", error),
            AdoptError::Foreign(Foreign { pod, sandbox, detail }) => StartError::Foreign { pod, sandbox, detail },
        })?;
        core.network.adopt(live).await.map_err(StartError::Network)?;
        adopt::discard_unfinished(&core).await;
        if let Some(config) = core.config.nri.clone() {
            let seen: Arc<dyn nri::Host> = Arc::new(Seen(Arc::downgrade(&core)));
            let nri = nri::Nri::start(config, seen).await.map_err(StartError::Nri)?;
            let _ = core.nri.set(nri); // Nobody else does.
        }
        let (server, backend, stop) = (streaming.clone(), Arc::new(Streaming(core.clone())), core.stop.clone());
        core.tasks.spawn(async move { server.serve(backend, stop).await });
        Ok(Arc::new(Self { core, streaming, via: Via::Unix }))
    }

    /// The same runtime for callers in other programs: sessions are served where those can reach them.
    pub fn for_clients(&self) -> Arc<Self> {
        Arc::new(Self { core: self.core.clone(), streaming: self.streaming.clone(), via: Via::Tcp })
    }

    /// Everything on this host that belongs to the runtime, with the owner of each.
    ///
    /// # Errors
    /// What cannot be listed.
    pub async fn fsck(&self) -> Result<Vec<Owned>, cri::Error> {
        fsck::everything(&self.core).await
    }

    /// For `down`: stops and removes every sandbox, then the pods' network. A daemon that only restarts does not call it.
    ///
    /// # Errors
    /// The first of what could not be removed; the rest is removed nevertheless.
    pub async fn shutdown(&self) -> Result<(), cri::Error> {
        fsck::tear_down(&self.core).await
    }

    /// For a daemon that ends or restarts: ends the streams of events and the sessions of clients, and waits for what is
    /// under way. The pods stay.
    pub async fn stop(&self) {
        self.core.stop.cancel();
        self.core.bus.close();
        if let Some(nri) = self.core.nri.get() {
            nri.stop().await;
        }
        self.core.tasks.close();
        self.core.tasks.wait().await;
    }

    /// For a daemon that ends: removes the control group that is the runtime's alone, unless pods that go on are in it.
    pub fn leave_group(&self) {
        for directory in self.core.hierarchy.group(&self.core.config.cgroup_parent).directories() {
            let _ = fs::remove_dir(directory); // Not empty, or never made.
        }
    }

    /// The plugins that take part, in the order in which they are asked.
    pub fn plugins(&self) -> Vec<String> {
        self.core.nri.get().map(|nri| nri.names()).unwrap_or_default()
    }

    /// How it is set up.
    pub fn config(&self) -> &Config {
        &self.core.config
    }

    pub(crate) fn core(&self) -> &Arc<Core> {
        &self.core
    }

    pub(crate) fn streaming(&self) -> &Server {
        &self.streaming
    }

    pub(crate) fn via(&self) -> Via {
        self.via
    }
}

fn private_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

async fn listen(config: &Config) -> Result<Server, StartError> {
    let server = Server::bind(config.streaming_address, &config.run_dir.join(STREAMING_SOCKET)).await;
    server.map_err(|source| StartError::Streaming {
        address: config.streaming_address,
        directory: config.run_dir.clone(),
        source,
    })
}

fn place(config: &Config, handlers: Handlers) -> Result<Place, StartError> {
    let lock = lock(&config.run_dir)?;
    let hierarchy = Hierarchy::detect().map_err(StartError::Host)?;
    let mut host = Host::read(&hierarchy).map_err(StartError::Host)?;
    host.device_ownership_from_security_context = config.device_ownership_from_security_context;
    let top = Hierarchy::whole(Path::new("/sys/fs/cgroup")).map_err(StartError::Host)?;
    Ok(Place { lock, host, handlers, hierarchy, top, boot_id: boot_id().map_err(StartError::Host)? })
}

/// Held while this runtime lives; the kernel lets it go with the process, however that ends.
fn lock(run_dir: &Path) -> Result<fs::File, StartError> {
    let path = run_dir.join(LOCK);
    let trouble = |step, source| StartError::Directory { step, path: path.clone(), source };
    let file = fs::File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(|error| trouble("making", error))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(StartError::InUse { path: run_dir.to_owned() }),
        Err(errno) => Err(trouble("locking", errno.into())),
    }
}

fn boot_id() -> sys::Result<String> {
    use sys::Context as _;
    let path = "/proc/sys/kernel/random/boot_id";
    Ok(fs::read_to_string(path).during("read", path)?.trim().to_owned())
}
