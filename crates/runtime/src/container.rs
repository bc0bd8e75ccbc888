//! One container: what it was asked to be, and where it is in its life.
//!
//! ```text
//!            create          start           the keeper says so
//! Making ──────────► Created ─────► Starting ─────► Running ─────► Exited
//!    ╰─ failed: gone                    ╰──── failed ────────────────▲
//! ```

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use cri::v1;
use executor::ExecPlan;
use keeper::protocol::Exit;
use sys::cgroup::Cgroup;
use tokio::sync::watch;

use crate::launch::Ready;
use crate::record::{ContainerRecord, End, Progress, Records};
use crate::sandbox::Sandbox;
use crate::selinux::Labels;
use crate::single::Single;

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Being made; nobody has heard of it.
    Making,
    /// Ready to start.
    Created,
    /// The keeper was asked to start it.
    Starting,
    /// Its first process runs.
    Running,
    /// It has ended, or could not be started.
    Exited,
}

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) id: String,
    pub(crate) sandbox: Weak<Sandbox>,
    pub(crate) name: v1::ContainerMetadata,
    pub(crate) group: Cgroup,
    records: Records,
    /// Its SELinux labels, once they are chosen; those of its record after a restart of the daemon.
    labels: OnceLock<Labels>,
    /// Guards the record, in memory and on disk.
    record: Mutex<ContainerRecord>,
    /// Guards what changes with its process. Never held while anything is waited for.
    live: Mutex<Live>,
    phase: watch::Sender<Phase>,
    /// When it is killed at the latest; nobody stops it while this is none.
    pub(crate) deadline: watch::Sender<Option<tokio::time::Instant>>,
    /// Removed, or being removed: whatever comes of it later is taken back.
    gone: AtomicBool,
    pub(crate) create: Single,
    pub(crate) start: Single,
    pub(crate) stop: Single,
    pub(crate) clean: Single,
    pub(crate) remove: Single,
}

/// What changes with a container's process.
#[derive(Debug, Default)]
pub(crate) struct Live {
    /// What its start needs, made with it; made again after a restart of the daemon.
    pub(crate) ready: Option<Ready>,
    /// Its first process, while it runs.
    pub(crate) pid: Option<u32>,
    pub(crate) started_at: i64,
    /// Its end was noted.
    ended: bool,
    /// Its end, when the keeper told of it before of its beginning.
    pub(crate) early_exit: Option<Exit>,
    /// The plan of its first exec without a terminal: later ones differ in their command only.
    pub(crate) exec: Option<Arc<ExecPlan>>,
}

impl Container {
    pub(crate) fn new(sandbox: &Arc<Sandbox>, record: ContainerRecord, phase: Phase) -> Arc<Self> {
        let name = record.config.as_ref().and_then(|config| config.metadata.clone()).unwrap_or_default();
        Arc::new(Self {
            id: record.id.clone(),
            sandbox: Arc::downgrade(sandbox),
            name,
            group: sandbox.group.child(&record.id),
            records: sandbox.records.clone(),
            labels: OnceLock::new(),
            record: Mutex::new(record),
            live: Mutex::default(),
            phase: watch::Sender::new(phase),
            deadline: watch::Sender::new(None),
            gone: AtomicBool::new(false),
            create: Single::default(),
            start: Single::default(),
            stop: Single::default(),
            clean: Single::default(),
            remove: Single::default(),
        })
    }

    pub(crate) fn live(&self) -> MutexGuard<'_, Live> {
        // Every section leaves it whole at each step.
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn record(&self) -> MutexGuard<'_, ContainerRecord> {
        self.record.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn labels(&self) -> Option<&Labels> {
        self.labels.get()
    }

    /// Gives it labels, which it keeps: a second time changes nothing.
    pub(crate) fn set_labels(&self, labels: Option<Labels>) {
        if let Some(labels) = labels {
            let _ = self.labels.set(labels);
        }
    }

    pub(crate) fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// Goes from one phase to another; false when it is in neither.
    pub(crate) fn step(&self, from: Phase, to: Phase) -> bool {
        self.phase.send_if_modified(|phase| {
            let fits = *phase == from;
            if fits {
                *phase = to;
            }
            fits
        })
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }

    pub(crate) fn set_gone(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// Waits until it is in `phase` or beyond.
    pub(crate) async fn reached(&self, phase: Phase) {
        // The sender is part of this container and cannot have gone.
        let _ = self.phase.subscribe().wait_for(|now| *now >= phase).await;
    }

    /// Changes the record, in memory and on disk.
    pub(crate) fn update(&self, change: impl FnOnce(&mut ContainerRecord)) -> std::io::Result<()> {
        let mut record = self.record();
        // What was left out in memory is still in the file.
        let mut whole = ContainerRecord { config: self.records.container(&self.id)?.config, ..record.clone() };
        change(&mut whole);
        self.records.put_container(&whole)?;
        *record = ContainerRecord { config: record.config.take(), ..whole };
        Ok(())
    }

    /// Keeps in memory only what lists and statuses show: environment and arguments may be large and secret.
    pub(crate) fn forget_request(&self) {
        if let Some(config) = &mut self.record().config {
            (config.envs, config.command, config.args) = Default::default();
        }
    }

    /// Notes how it ended; false if that was known already. Nobody sees it before the phase says so.
    pub(crate) fn finish(&self, end: End) -> bool {
        if std::mem::replace(&mut self.live().ended, true) {
            return false;
        }
        let noted = self.update(|record| {
            record.end = Some(end.clone());
            record.progress = Progress::Ended.into();
        });
        if let Err(error) = noted {
            // Memory has it; after a restart the keeper tells the exit again, if not its reason.
            tracing::warn!(container = self.id, %error, "the end of a container cannot be recorded");
            self.record().end = Some(end);
        }
        let mut live = self.live();
        (live.pid, live.ready, live.exec) = (None, None, None);
        true
    }
}
