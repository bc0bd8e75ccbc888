//! Taking over what an earlier daemon has left, and finding a keeper again whose connection broke.
//!
//! The keeper's word counts for processes, the records for everything else. A sandbox whose keeper is gone is reported
//! as not ready with its containers ended; one of another boot, or that was never finished, is removed.

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cri::v1::ContainerEventType as Kind;
use futures_util::future::join_all;
use keeper::protocol::{self, ExecSession, GetNamespace, NamespaceKind, Reason, Request, Role, Signal, Snapshot};
use network::LiveSandbox;
use tokio::time::timeout;

use crate::client::{Client, ClientError};
use crate::container::{Container, Phase};
use crate::core::Core;
use crate::record::{ContainerRecord, Progress, Records, SandboxRecord};
use crate::sandbox::{self, Sandbox};
use crate::{exits, fsck, group, run};

const KILL: u32 = 9;
/// How long the start waits for keepers, all at once. They answer in less than a millisecond unless they are stuck, in the
/// writing of a log as a rule.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Why nothing can be taken over.
#[derive(Debug)]
pub(crate) enum AdoptError {
    /// The directory cannot be read.
    List(std::io::Error),
    /// A pod lives with whose keeper nothing can be agreed on.
    Foreign(Foreign),
}

/// A keeper with which there is no common version of the protocol. Its pod lives, and is not to be taken for one that has
/// ended: it would be started twice.
#[derive(Debug)]
pub(crate) struct Foreign {
    /// Namespace and name.
    pub(crate) pod: String,
    pub(crate) sandbox: String,
    /// What the keeper says.
    pub(crate) detail: String,
}

impl Foreign {
    /// Whether it was refused for that.
    fn of(sandbox: &Sandbox, error: &ClientError) -> Option<Self> {
        let ClientError::Refused(failure) = error else { return None };
        let (detail, metadata) = (failure.detail.clone(), sandbox.metadata());
        let pod = format!("{}/{}", metadata.namespace, metadata.name);
        (failure.reason == Reason::Version).then(|| Self { pod, sandbox: sandbox.id.clone(), detail })
    }
}

/// Takes over the sandboxes in the run directory; those that live, for the network.
pub(crate) async fn everything(core: &Arc<Core>) -> Result<Vec<LiveSandbox>, AdoptError> {
    let directories = std::fs::read_dir(core.sandboxes_dir()).map_err(AdoptError::List)?;
    let directories = directories.map(|entry| entry.map(|entry| entry.path()));
    let directories = directories.collect::<std::io::Result<Vec<_>>>().map_err(AdoptError::List)?;
    let found = join_all(directories.into_iter().map(|path| one(core, Records::new(path)))).await;
    let found = found.into_iter().collect::<Result<Vec<_>, _>>().map_err(AdoptError::Foreign)?;
    let live = found.into_iter().flatten().collect();
    release_orphans(core).await;
    end_orphans(core).await;
    Ok(live)
}

async fn one(core: &Arc<Core>, records: Records) -> Result<Option<LiveSandbox>, Foreign> {
    let record = match records.sandbox() {
        Ok(record) => record,
        // Its making had not come to the record: nothing else had begun.
        Err(error) => {
            tracing::warn!(directory = %records.directory().display(), %error, "a sandbox without a record is removed");
            remove(&records);
            return Ok(None);
        }
    };
    if record.boot_id != core.boot_id {
        remove(&records);
        return Ok(None);
    }
    let (sandbox, unfinished) = enter(core, record, records);
    let live = connect(core, &sandbox).await?;
    if unfinished {
        // Nobody has heard of it: its client asks again.
        give_up(core, &sandbox).await;
        return Ok(None);
    }
    Ok(live)
}

fn remove(records: &Records) {
    if let Err(error) = records.remove() {
        tracing::warn!(directory = %records.directory().display(), %error, "a dead sandbox's directory stays");
    }
}

/// Enters a sandbox and its containers as their records have them.
fn enter(core: &Arc<Core>, record: SandboxRecord, records: Records) -> (Arc<Sandbox>, bool) {
    let (group, owns_group) = core.pod_group(&record);
    let progress = record.progress();
    let labels = core.selinux.recorded(record.labels.as_ref());
    let sandbox = Sandbox::new(record, records, labels, group, owns_group);
    {
        let mut live = sandbox.live();
        live.phase = sandbox::Phase::NotReady;
        live.stopped = progress == Progress::Ended;
    }
    core.table.enter_sandbox(sandbox.clone());
    let found = sandbox.records.containers().unwrap_or_default();
    for record in found {
        match record {
            Ok(record) => enter_container(core, &sandbox, record),
            Err((path, error)) => unreadable(&path, &error),
        }
    }
    (sandbox, progress == Progress::Making)
}

fn unreadable(path: &Path, error: &std::io::Error) {
    tracing::warn!(record = %path.display(), %error, "a container's record cannot be read; it is removed with its sandbox");
}

fn enter_container(core: &Arc<Core>, sandbox: &Arc<Sandbox>, record: ContainerRecord) {
    let phase = match record.progress() {
        Progress::Making => Phase::Making,
        Progress::Made => Phase::Created,
        Progress::Ended => Phase::Exited,
    };
    let labels = core.selinux.recorded(record.labels.as_ref());
    let container = Container::new(sandbox, record, phase);
    container.set_labels(labels);
    container.forget_request();
    core.table.enter_container(sandbox, container);
}

/// Finds the sandbox's keeper, or takes note that it is gone.
async fn connect(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Result<Option<LiveSandbox>, Foreign> {
    if sandbox.live().stopped {
        return Ok(None);
    }
    let found = timeout(ANSWER_MAX, async {
        let (client, snapshot) = find(core, sandbox).await?;
        let netns = netns_of(sandbox, &client).await;
        Ok((client, snapshot, netns))
    });
    Ok(match found.await {
        Ok(Ok((client, snapshot, netns))) => {
            accept(core, sandbox, client, &snapshot);
            Some(LiveSandbox { sandbox_id: sandbox.id.clone(), netns })
        }
        Ok(Err(error)) => {
            let error: ClientError = error;
            if let Some(foreign) = Foreign::of(sandbox, &error) {
                return Err(foreign);
            }
            tracing::warn!(sandbox = sandbox.id, %error, "the keeper is gone");
            lose(core, sandbox);
            None
        }
        Err(_) => {
            tracing::warn!(sandbox = sandbox.id, "the keeper does not answer; the sandbox is not ready until it does");
            sandbox.live().unheard = true;
            let (core, sandbox) = (core.clone(), sandbox.clone());
            let sandbox_id = sandbox.id.clone();
            core.tasks.clone().spawn(async move { hear(&core, &sandbox).await });
            Some(LiveSandbox { sandbox_id, netns: None })
        }
    })
}

/// Waits for a keeper that takes its time.
async fn hear(core: &Arc<Core>, sandbox: &Arc<Sandbox>) {
    let found = tokio::select! {
        () = core.stop.cancelled() => return,
        found = find(core, sandbox) => found,
    };
    if !sandbox.live().unheard {
        return; // It was stopped meanwhile.
    }
    match found {
        Ok((client, snapshot)) => {
            accept(core, sandbox, client, &snapshot);
            core.publish(Kind::ContainerStartedEvent, &sandbox.id, sandbox);
        }
        Err(error) => match Foreign::of(sandbox, &error) {
            // What lives stays unheard of.
            Some(Foreign { pod, sandbox, detail }) => {
                tracing::error!(
                    pod,
                    sandbox,
                    detail,
                    "this version does not speak with the sandbox's keeper; drain the node and boot it, or start the version \
                     that made the pod"
                );
            }
            None => {
                tracing::warn!(sandbox = sandbox.id, %error, "the keeper is gone");
                lose(core, sandbox);
            }
        },
    }
}

async fn netns_of(sandbox: &Sandbox, client: &Client) -> Option<std::os::fd::OwnedFd> {
    if sandbox.host_network() {
        return None;
    }
    let get = GetNamespace { kind: NamespaceKind::Net, container: None };
    client.done(Request::GetNamespace(get), Vec::new()).await.ok()?.pop()
}

async fn find(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Result<(Client, Snapshot), ClientError> {
    let directory = File::open(sandbox.records.directory()).map_err(ClientError::Connect)?;
    let client = Client::connect(directory.as_fd(), core.listener(sandbox))?;
    client.hello(Role::Control).await?;
    let snapshot = client.snapshot().await?;
    Ok((client, snapshot))
}

/// Brings the sandbox to what its keeper says.
fn accept(core: &Arc<Core>, sandbox: &Arc<Sandbox>, client: Client, snapshot: &Snapshot) {
    let client = Arc::new(client);
    {
        let mut live = sandbox.live();
        (live.phase, live.unheard) = (sandbox::Phase::Ready, false);
        live.keeper_pid = snapshot.sandbox.pid;
        live.keeper = Some(client.clone());
    }
    for told in &snapshot.containers {
        let container = sandbox.lock_containers().get(&told.id).cloned();
        if let Some(container) = container {
            agree(core, sandbox, &container, told);
        }
    }
    let ids: Vec<&str> = snapshot.containers.iter().map(|told| told.id.as_str()).collect();
    for container in sandbox.containers() {
        // The keeper forgets none that was not removed.
        if container.phase() == Phase::Running && !ids.contains(&container.id.as_str()) {
            let started_at = container.live().started_at;
            exits::ended(core, sandbox, &container, exits::unseen(sandbox, started_at));
        }
    }
    drop_execs(sandbox, &snapshot.execs);
    // The earlier daemon may have been killed before it was done with that.
    drop(run::settle(core, sandbox));
    // Whoever heard of its end before the sandbox was ready did not miss it.
    if !client.is_open() {
        exits::keeper_gone(core, sandbox);
    }
}

fn agree(core: &Arc<Core>, sandbox: &Arc<Sandbox>, container: &Arc<Container>, told: &protocol::Container) {
    if matches!(container.phase(), Phase::Making | Phase::Exited) {
        return;
    }
    let early = {
        let mut live = container.live();
        live.pid = Some(told.process.pid);
        live.started_at = i64::try_from(told.process.at.0).unwrap_or(i64::MAX);
        container.set_phase(Phase::Running);
        live.early_exit.take() // Told since the question.
    };
    if let Some(exit) = told.exit.clone().or(early) {
        exits::exited_with(core, sandbox, container, exit);
    }
}

/// Nobody is left who would read what they write.
fn drop_execs(sandbox: &Sandbox, sessions: &[ExecSession]) {
    let Ok(keeper) = sandbox.keeper() else { return };
    for session in sessions {
        match session.exit {
            None => keeper.tell(Request::Signal(Signal { id: session.id.clone(), signal: KILL })),
            Some(_) => keeper.tell(Request::Forget(protocol::Forget { id: session.id.clone() })),
        }
    }
}

/// The keeper is gone, and with it the containers: what it wrote down last, and what can be said of the rest.
pub(crate) fn lose(core: &Arc<Core>, sandbox: &Arc<Sandbox>) {
    {
        let mut live = sandbox.live();
        (live.phase, live.unheard, live.keeper) = (sandbox::Phase::NotReady, false, None);
    }
    let record = File::open(sandbox.records.directory()).and_then(|directory| keeper::read_record(&directory));
    let told = record.map(|record| record.containers).unwrap_or_default();
    for container in sandbox.containers() {
        let told = told.iter().find(|one| one.id == container.id);
        let ran = matches!(container.phase(), Phase::Starting | Phase::Running) || told.is_some();
        if !ran || container.phase() == Phase::Exited {
            continue;
        }
        let started_at = told.map_or(container.live().started_at, |one| i64::try_from(one.process.at.0).unwrap_or(0));
        let end = match told.and_then(|one| one.exit.as_ref()) {
            Some(exit) => exits::end_of(exit, started_at, container.group.oom_kills()),
            None => exits::unseen(sandbox, started_at),
        };
        exits::ended(core, sandbox, &container, end);
    }
    core.publish(Kind::ContainerStoppedEvent, &sandbox.id, sandbox);
}

/// The connection to a keeper broke: either it has ended, or it has let us go because we did not read.
pub(crate) async fn find_again(core: &Arc<Core>, sandbox: &Arc<Sandbox>) {
    match find(core, sandbox).await {
        Ok((client, snapshot)) if sandbox.phase() == sandbox::Phase::Ready => accept(core, sandbox, client, &snapshot),
        Ok(_) => {}
        Err(error) if sandbox.phase() == sandbox::Phase::Ready => {
            tracing::error!(sandbox = sandbox.id, %error, "the pod's keeper has ended, and with it the pod");
            lose(core, sandbox);
        }
        Err(_) => {}
    }
}

/// Removes a sandbox whose making was cut short, and containers likewise.
async fn give_up(core: &Arc<Core>, sandbox: &Arc<Sandbox>) {
    let removed = crate::stop::remove_sandbox(core, &sandbox.id).await;
    if let Err(error) = removed {
        tracing::warn!(sandbox = sandbox.id, %error, "a sandbox that was never finished cannot be removed");
    }
}

/// Removes containers whose making was cut short: nobody has heard of them.
pub(crate) async fn discard_unfinished(core: &Arc<Core>) {
    for sandbox in core.table.every_sandbox() {
        for container in sandbox.containers() {
            if container.phase() != Phase::Making {
                continue;
            }
            if let Err(error) = exits::discard(core, &sandbox, &container).await {
                tracing::warn!(container = container.id, %error, "a container that was never finished cannot be removed");
            }
        }
    }
}

/// Root file systems of containers that no record names: those of an earlier boot.
async fn release_orphans(core: &Arc<Core>) {
    for container in core.images.rootfs_owners() {
        if core.table.has_container(&container) {
            continue;
        }
        if let Err(error) = core.images.release(&container).await {
            tracing::warn!(container, %error, "the root of a container that is gone cannot be removed");
        }
    }
}

/// Processes of sandboxes that no record names.
async fn end_orphans(core: &Arc<Core>) {
    for orphan in fsck::leaked_groups(core) {
        if let Err(error) = group::end(&orphan).await {
            tracing::warn!(%error, "what is left of a sandbox that is gone cannot be removed");
        }
    }
}
