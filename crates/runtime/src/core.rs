//! What all calls share.

use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock, Weak};

use cri::{Error, v1};
use keeper::Zygote;
use keeper::protocol::Event;
use sys::cgroup::{Cgroup, Hierarchy};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::client::Listener;
use crate::config::{Config, Parts};
use crate::driver::Handlers;
use crate::events::Bus;
use crate::record::SandboxRecord;
use crate::sandbox::Sandbox;
use crate::selinux::SeLinux;
use crate::spec::Host;
use crate::stats::Stats;
use crate::table::Table;
use crate::{exits, spec, status};

/// The runtime's insides; operations that go on without their caller hold it.
#[derive(Debug)]
pub(crate) struct Core {
    pub(crate) config: Config,
    pub(crate) images: Arc<image::Images>,
    pub(crate) network: Arc<network::Network>,
    pub(crate) stats: Stats,
    pub(crate) zygote: Zygote,
    pub(crate) host: Host,
    pub(crate) handlers: Handlers,
    pub(crate) selinux: SeLinux,
    /// Plugins, once the runtime has started.
    pub(crate) nri: OnceLock<Arc<nri::Nri>>,
    pub(crate) hierarchy: Hierarchy,
    /// The same hierarchies from their tops.
    pub(crate) top: Hierarchy,
    pub(crate) boot_id: String,
    pub(crate) table: Table,
    pub(crate) bus: Bus,
    /// What keeps others from the run directory.
    _lock: File,
    /// Bytes of output that ExecSync keeps for its callers.
    pub(crate) exec_output: Arc<Semaphore>,
    /// Operations under way.
    pub(crate) tasks: TaskTracker,
    /// Ends the streaming server.
    pub(crate) stop: CancellationToken,
}

/// Where a runtime finds itself.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) lock: File,
    pub(crate) host: Host,
    pub(crate) handlers: Handlers,
    pub(crate) hierarchy: Hierarchy,
    pub(crate) top: Hierarchy,
    pub(crate) boot_id: String,
}

impl Core {
    pub(crate) fn new(config: Config, parts: Parts, place: Place) -> Arc<Self> {
        let Place { lock, host, handlers, hierarchy, top, boot_id } = place;
        Arc::new(Self {
            config,
            stats: Stats::new(parts.images.clone(), parts.network.clone()),
            images: parts.images,
            network: parts.network,
            zygote: parts.zygote,
            host,
            handlers,
            selinux: SeLinux::of_host(),
            nri: OnceLock::new(),
            hierarchy,
            top,
            boot_id,
            _lock: lock,
            table: Table::default(),
            bus: Bus::default(),
            exec_output: Arc::new(Semaphore::new(crate::exec::OUTPUT_ALL_MAX)),
            tasks: TaskTracker::new(),
            stop: CancellationToken::new(),
        })
    }

    /// Where the sandboxes' directories are.
    pub(crate) fn sandboxes_dir(&self) -> PathBuf {
        self.config.run_dir.join("sandboxes")
    }

    /// The group that a sandbox's groups are made in, and whether it is ours alone.
    pub(crate) fn pod_group(&self, record: &SandboxRecord) -> (Cgroup, bool) {
        let linux = record.config.as_ref().and_then(|config| config.linux.as_ref());
        match linux.map(|linux| linux.cgroup_parent.as_str()) {
            None | Some("") => (self.hierarchy.group(self.config.cgroup_parent.join(&record.id)), true),
            Some(parent) => {
                let hierarchy = if record.parent_from_top { &self.top } else { &self.hierarchy };
                (hierarchy.group(spec::group_of(parent)), false)
            }
        }
    }

    /// Whoever hears a sandbox's keeper.
    pub(crate) fn listener(self: &Arc<Self>, sandbox: &Arc<Sandbox>) -> Arc<dyn Listener> {
        Arc::new(Ears { core: Arc::downgrade(self), sandbox: Arc::downgrade(sandbox) })
    }

    /// Tells those who listen what happened to a container or a sandbox.
    pub(crate) fn publish(&self, kind: v1::ContainerEventType, id: &str, sandbox: &Sandbox) {
        self.bus.publish(|| v1::ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind.into(),
            created_at: now(),
            pod_sandbox_status: Some(status::sandbox(sandbox)),
            containers_statuses: status::containers_of(sandbox),
        });
    }
}

/// Does not keep alive what it hears for.
struct Ears {
    core: Weak<Core>,
    sandbox: Weak<Sandbox>,
}

impl Listener for Ears {
    fn event(&self, event: Event) {
        if let (Some(core), Some(sandbox)) = (self.core.upgrade(), self.sandbox.upgrade()) {
            exits::heard(&core, &sandbox, event);
        }
    }

    fn gone(&self) {
        if let (Some(core), Some(sandbox)) = (self.core.upgrade(), self.sandbox.upgrade()) {
            exits::keeper_gone(&core, &sandbox);
        }
    }
}

/// Nanoseconds since 1970, as CRI has its times.
pub(crate) fn now() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// An id as CRI clients expect it: 64 hexadecimal digits, of which people type the first.
pub(crate) fn new_id() -> String {
    use std::fmt::Write as _;
    sys::random::bytes::<32>().iter().fold(String::with_capacity(64), |mut id, byte| {
        let _ = write!(id, "{byte:02x}"); // A string takes everything.
        id
    })
}

/// Runs what may wait for the kernel away from the async threads.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Runs what may wait for ever, a mount that does not answer, on a thread of its own: it takes no place from others.
///
/// # Errors
/// No thread can be made.
pub(crate) async fn patient<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let begun = std::thread::Builder::new().name("prepare".into()).stack_size(512 << 10).spawn(move || {
        let _ = sender.send(work()); // Whoever asked may be gone.
    });
    begun.map_err(|error| Error::ResourceExhausted(format!("starting a thread: {error}")))?;
    receiver.await.map_err(|_| Error::Internal("a thread that prepared a container ended early".to_owned()))
}

/// An error with its step and object.
pub(crate) fn failed(step: &str, object: &str, error: &(dyn std::error::Error + 'static)) -> Error {
    let Error::Internal(cause) = Error::internal(error) else { unreachable!("internal errors are") };
    Error::Internal(format!("{step} {object}: {cause}"))
}
