//! What keepers tell: beginnings and ends of containers, ends of exec'd processes, and the end of a keeper itself.

use std::sync::Arc;

use cri::Error;
use cri::v1::ContainerEventType as Kind;
use keeper::protocol::{Event, Exit, Forget, Request};

use crate::container::{Container, Phase};
use crate::core::{Core, failed, now};
use crate::driver::Driver;
use crate::record::End;
use crate::sandbox::{self, Sandbox};
use crate::single::Outcome;
use crate::{adopt, group, plugins};

/// The exit code of a container that the kernel killed, or that ended unseen.
const KILLED: i32 = 137;

/// Takes what a keeper tells. Must not wait: it is called from the keeper's connection.
pub(crate) fn heard(core: &Arc<Core>, sandbox: &Arc<Sandbox>, event: Event) {
    match event {
        Event::Exited(exited) => {
            let container = sandbox.lock_containers().get(&exited.id).cloned();
            if let Some(container) = container {
                exited_with(core, sandbox, &container, exited.exit);
            }
        }
        Event::ExecExited(exited) => {
            let waiting = sandbox.execs().remove(&exited.id);
            if let Ok(keeper) = sandbox.keeper() {
                keeper.tell(Request::Forget(Forget { id: exited.id }));
            }
            if let Some(waiting) = waiting {
                let _ = waiting.send(exited.exit); // Whoever started it may have gone.
            }
        }
        Event::Detached(detached) => {
            tracing::debug!(container = detached.id, reason = ?detached.reason, "an attached client was let go");
        }
        Event::LogTrouble(trouble) => match trouble.errno {
            0 => tracing::info!(container = trouble.id, lost_bytes = trouble.lost_bytes, "the log takes output again"),
            errno => tracing::warn!(
                container = trouble.id,
                error = %std::io::Error::from_raw_os_error(errno),
                "output is lost: the log cannot be written"
            ),
        },
    }
}

/// The keeper has started a container.
pub(crate) fn started(core: &Arc<Core>, sandbox: &Arc<Sandbox>, container: &Arc<Container>) {
    let early = {
        let mut live = container.live();
        if !container.step(Phase::Starting, Phase::Running) {
            return; // The keeper has ended since.
        }
        live.early_exit.take()
    };
    core.publish(Kind::ContainerStartedEvent, &container.id, sandbox);
    if let Some(exit) = early {
        exited_with(core, sandbox, container, exit);
    }
}

/// A container's first process has ended.
pub(crate) fn exited_with(core: &Arc<Core>, sandbox: &Arc<Sandbox>, container: &Arc<Container>, exit: Exit) {
    let started_at = {
        let mut live = container.live();
        match container.phase() {
            // The answer to the start, or what the keeper knows in all, is on its way to whoever asked: first things first.
            Phase::Created | Phase::Starting => {
                live.early_exit = Some(exit);
                return;
            }
            Phase::Running => live.started_at,
            Phase::Making | Phase::Exited => return,
        }
    };
    ended(core, sandbox, container, end_of(&exit, started_at, container.group.oom_kills()));
}

/// What a client is told of an exit. The kernel's OOM killer sends SIGKILL; a shell reports that of its child as 137.
pub(crate) fn end_of(exit: &Exit, started_at: i64, oom_kills: u64) -> End {
    let exit_code = i32::try_from(exit.code).unwrap_or(i32::MAX);
    let reason = match exit_code {
        0 => "Completed",
        KILLED if oom_kills > 0 => "OOMKilled",
        _ => "Error",
    };
    End {
        started_at,
        finished_at: i64::try_from(exit.at.0).unwrap_or(i64::MAX),
        exit_code,
        reason: reason.to_owned(),
        message: String::new(),
    }
}

/// What is said of a container whose end nobody saw. Its pod's keeper may have been killed for want of the pod's memory where
/// the node may not protect it.
pub(crate) fn unseen(sandbox: &Sandbox, started_at: i64) -> End {
    let (reason, message) = match sandbox.keeper_group().oom_kills() {
        0 => ("ContainerStatusUnknown", "the container ended unseen: its pod's keeper had ended, or did not answer"),
        _ => ("OOMKilled", "the pod's keeper was killed for want of the pod's memory, and with it the container"),
    };
    End { started_at, finished_at: now(), exit_code: KILLED, reason: reason.to_owned(), message: message.to_owned() }
}

/// Notes and tells a container's end, and ends what is left in its control group.
pub(crate) fn ended(core: &Arc<Core>, sandbox: &Arc<Sandbox>, container: &Arc<Container>, end: End) {
    if container.finish(end) {
        // Begun before anybody can see the end: who removes the container waits for it.
        clean(core, sandbox, container);
        container.set_phase(Phase::Exited);
        core.publish(Kind::ContainerStoppedEvent, &container.id, sandbox);
    }
}

/// Begins to end what is left of a container; nobody needs to wait.
fn clean(core: &Arc<Core>, sandbox: &Arc<Sandbox>, container: &Arc<Container>) {
    let (shared, sandbox, ended) = (core.clone(), sandbox.clone(), container.clone());
    drop(container.clean.join_or_begin(&core.tasks, || async move {
        let id = &ended.id;
        ended.reached(Phase::Exited).await;
        delete(sandbox.driver.as_ref(), id).await;
        let removed = group::end(&ended.group).await;
        plugins::stopped(&shared, &sandbox, &ended).await;
        removed.map_err(|error| {
            tracing::warn!(container = id, %error, "what is left of a container cannot be removed");
            failed("removing the control group of container", id, &error)
        })
    }));
}

/// Lets another OCI runtime forget a container. What it leaves undone is done without it.
async fn delete(driver: Option<&Driver>, id: &str) {
    if let Some(driver) = driver
        && let Err(error) = driver.delete(id).await
    {
        tracing::warn!(container = id, %error, "a runtime could not delete a container");
    }
}

/// A keeper's connection is over.
pub(crate) fn keeper_gone(core: &Arc<Core>, sandbox: &Arc<Sandbox>) {
    sandbox.execs().clear(); // Whoever waits for one hears that nobody will tell.
    if sandbox.phase() == sandbox::Phase::Ready {
        let (core, sandbox) = (core.clone(), sandbox.clone());
        core.tasks.clone().spawn(async move { adopt::find_again(&core, &sandbox).await });
    }
}

/// Removes a container with all that it has: processes, control group, root, record, name.
pub(crate) async fn discard(core: &Arc<Core>, sandbox: &Sandbox, container: &Container) -> Outcome {
    let fail = |step: &str, error: &(dyn std::error::Error + 'static)| {
        failed(&format!("{step} container"), &container.id, error)
    };
    container.set_gone();
    container.live().ready = None;
    let mut first: Option<Error> = None;
    delete(sandbox.driver.as_ref(), &container.id).await;
    if let Err(error) = group::end(&container.group).await {
        first.get_or_insert(fail("removing the control group of", &error));
    }
    if let Ok(keeper) = sandbox.keeper() {
        keeper.tell(Request::Forget(Forget { id: container.id.clone() }));
    }
    if let Err(error) = core.images.release(&container.id).await {
        first.get_or_insert(fail("removing the root of", &error));
    }
    if let Some(error) = first {
        return Err(error); // Its record stays, so that a retry finds it.
    }
    sandbox.records.remove_container(&container.id).map_err(|error| fail("removing the record of", &error))?;
    core.table.remove_container(container);
    core.stats.forget(&container.id);
    Ok(())
}
