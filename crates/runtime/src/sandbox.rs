//! One pod sandbox: its keeper, its network, its containers.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cri::v1;
use keeper::protocol::Exit;
use sys::cgroup::Cgroup;
use tokio::sync::oneshot;

use crate::client::{Client, ClientError};
use crate::container::Container;
use crate::driver::Driver;
use crate::record::{Progress, Records, SandboxRecord};
use crate::selinux::Labels;
use crate::single::Single;

/// A sandbox. Each has its own locks: none waits for another.
#[derive(Debug)]
pub(crate) struct Sandbox {
    pub(crate) id: String,
    pub(crate) config: v1::PodSandboxConfig,
    pub(crate) handler: String,
    /// Another OCI runtime that its containers run by.
    pub(crate) driver: Option<Driver>,
    pub(crate) created_at: i64,
    pub(crate) records: Records,
    /// Its SELinux labels, on a host that has some for containers.
    pub(crate) labels: Option<Labels>,
    /// The group that its containers' groups are in.
    pub(crate) group: Cgroup,
    /// Whether that group is ours to remove: its parent was not named by the client.
    pub(crate) owns_group: bool,
    parent_from_top: bool,
    /// Guards what changes. Never held while anything is waited for.
    live: Mutex<Live>,
    /// Guards the set of containers.
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
    /// Guards who waits for the end of which exec'd process.
    execs: Mutex<HashMap<String, oneshot::Sender<Exit>>>,
    pub(crate) run: Single,
    /// The keeper's move into its control group, where it could not begin in it.
    pub(crate) settle: Single,
    pub(crate) stop: Single,
    pub(crate) remove: Single,
}

/// What changes in a sandbox.
#[derive(Debug, Default)]
pub(crate) struct Live {
    pub(crate) phase: Phase,
    pub(crate) ips: Vec<String>,
    pub(crate) keeper: Option<Arc<Client>>,
    /// The keeper's process id: `/proc/<pid>/ns` has the pod's namespaces.
    pub(crate) keeper_pid: u32,
    /// An earlier daemon made it, and its keeper has not answered yet: nothing is known of its containers.
    pub(crate) unheard: bool,
    /// Plugins were told of it, or are being told.
    pub(crate) told: bool,
    /// All of it was given back: network, keeper, control groups.
    pub(crate) stopped: bool,
}

/// Where a sandbox is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Phase {
    /// Being made; nobody has heard of it.
    #[default]
    Making,
    /// Its keeper and its network are there.
    Ready,
    /// Being stopped: nothing new begins in it.
    Stopping,
    /// Its keeper is gone, by request or not.
    NotReady,
    /// It was removed, or could not be made.
    Gone,
}

/// What names a sandbox for the client: a second one of the same name is the same.
pub(crate) type Key = (String, String, String, u32);

pub(crate) fn key(metadata: &v1::PodSandboxMetadata) -> Key {
    (metadata.namespace.clone(), metadata.name.clone(), metadata.uid.clone(), metadata.attempt)
}

impl Sandbox {
    pub(crate) fn new(
        record: SandboxRecord,
        records: Records,
        labels: Option<Labels>,
        group: Cgroup,
        owns_group: bool,
    ) -> Arc<Self> {
        let ips = record.ips;
        let driver = (!record.driver.is_empty()).then(|| Driver {
            program: record.driver.into(),
            arguments: record.driver_arguments,
            place: records.directory().to_owned(),
        });
        Arc::new(Self {
            id: record.id,
            config: record.config.unwrap_or_default(),
            handler: record.handler,
            driver,
            created_at: record.created_at,
            records,
            labels,
            group,
            owns_group,
            parent_from_top: record.parent_from_top,
            live: Mutex::new(Live { ips, ..Live::default() }),
            containers: Mutex::default(),
            execs: Mutex::default(),
            run: Single::default(),
            settle: Single::default(),
            stop: Single::default(),
            remove: Single::default(),
        })
    }

    pub(crate) fn live(&self) -> MutexGuard<'_, Live> {
        // Every section leaves it whole at each step.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn phase(&self) -> Phase {
        self.live().phase
    }

    pub(crate) fn metadata(&self) -> v1::PodSandboxMetadata {
        self.config.metadata.clone().unwrap_or_default()
    }

    /// The keeper's connection.
    pub(crate) fn keeper(&self) -> Result<Arc<Client>, ClientError> {
        self.live().keeper.clone().ok_or(ClientError::Gone)
    }

    /// The group of the keeper itself: a leaf, for on version 2 a group with processes has no children.
    pub(crate) fn keeper_group(&self) -> Cgroup {
        self.group.child(&self.id)
    }

    pub(crate) fn containers(&self) -> Vec<Arc<Container>> {
        self.lock_containers().values().cloned().collect()
    }

    pub(crate) fn lock_containers(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Container>>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn execs(&self) -> MutexGuard<'_, HashMap<String, oneshot::Sender<Exit>>> {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn namespaces(&self) -> v1::NamespaceOption {
        let security = self.config.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        security.and_then(|security| security.namespace_options.clone()).unwrap_or_default()
    }

    pub(crate) fn host_network(&self) -> bool {
        self.namespaces().network() == v1::NamespaceMode::Node
    }

    /// Its record as it should be on disk.
    pub(crate) fn record(&self, boot_id: &str, progress: Progress) -> SandboxRecord {
        SandboxRecord {
            id: self.id.clone(),
            boot_id: boot_id.to_owned(),
            created_at: self.created_at,
            config: Some(self.config.clone()),
            handler: self.handler.clone(),
            ips: self.live().ips.clone(),
            progress: progress.into(),
            driver: self
                .driver
                .as_ref()
                .map(|driver| driver.program.to_string_lossy().into_owned())
                .unwrap_or_default(),
            driver_arguments: self.driver.as_ref().map(|driver| driver.arguments.clone()).unwrap_or_default(),
            labels: self.labels.as_ref().map(Labels::record),
            parent_from_top: self.parent_from_top,
        }
    }
}
