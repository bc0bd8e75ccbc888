//! Stopping and removing containers and sandboxes. Done twice, or for what is not there, all of it succeeds.

use std::sync::Arc;
use std::time::Duration;

use cri::Error;
use cri::v1::ContainerEventType as Kind;
use futures_util::future::join_all;
use keeper::protocol::{Request, Shutdown, Signal};
use nri::api::Event;
use tokio::time::{Instant, sleep_until, timeout};

use crate::container::{Container, Phase};
use crate::core::{Core, failed};
use crate::record::Progress;
use crate::run::end_groups;
use crate::sandbox::{self, Sandbox};
use crate::single::Outcome;
use crate::{adopt, exits, group, plugins};

const KILL: u32 = 9;
/// How long a keeper has to tell the end of a container whose processes are gone, and to end itself when asked. One that
/// takes longer is stuck, in the writing of a log as a rule.
const TELL_MAX: Duration = Duration::from_secs(5);
/// A grace period that nobody lives to see; keeps sums of times in range.
const GRACE_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Stops a container: its stop signal, then SIGKILL after `grace_s` seconds.
pub(crate) async fn container(core: &Arc<Core>, id: &str, grace_s: i64) -> Outcome {
    match core.table.container(id) {
        Ok((sandbox, container)) => {
            let grace = Duration::from_secs(u64::try_from(grace_s).unwrap_or(0)).min(GRACE_MAX);
            stop(core, &sandbox, &container, grace).await
        }
        Err(Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Stops a container. A shorter grace than that of a stop under way counts for both.
async fn stop(core: &Arc<Core>, sandbox: &Arc<Sandbox>, container: &Arc<Container>, grace: Duration) -> Outcome {
    let deadline = Instant::now() + grace;
    container.deadline.send_modify(|earlier| *earlier = Some(earlier.map_or(deadline, |one| one.min(deadline))));
    let (shared, sandbox, stopped) = (core.clone(), sandbox.clone(), container.clone());
    let outcome = container.stop.run(&core.tasks, || async move {
        let outcome = ask_and_kill(&shared, &sandbox, &stopped).await;
        stopped.deadline.send_replace(None);
        outcome
    });
    outcome.await
}

async fn ask_and_kill(core: &Arc<Core>, sandbox: &Arc<Sandbox>, container: &Arc<Container>) -> Outcome {
    if !matches!(container.phase(), Phase::Starting | Phase::Running) {
        return Ok(());
    }
    let asked = async {
        container.reached(Phase::Running).await;
        ask(sandbox, container).await;
        container.reached(Phase::Exited).await;
    };
    let has_grace = container.deadline.borrow().is_some_and(|deadline| deadline > Instant::now());
    if has_grace {
        tokio::select! {
            () = asked => return Ok(()),
            () = deadline_over(container) => {}
        }
    }
    kill(core, sandbox, container).await
}

/// Sends the stop signal, once: an application may take a second one for impatience, and a daemon that was killed since has
/// sent it already.
async fn ask(sandbox: &Sandbox, container: &Container) {
    let (number, asked) = {
        let record = container.record();
        (record.stop_signal, record.asked)
    };
    if asked {
        return;
    }
    if !signal(sandbox, container, number).await {
        return;
    }
    // Afterwards: a signal too much is better than none.
    if let Err(error) = container.update(|record| record.asked = true) {
        tracing::warn!(container = container.id, %error, "that a container was asked to end cannot be recorded");
    }
}

/// Waits for the deadline, which may come closer meanwhile.
async fn deadline_over(container: &Container) {
    let mut deadline = container.deadline.subscribe();
    loop {
        let Some(at) = *deadline.borrow_and_update() else { return };
        tokio::select! {
            () = sleep_until(at) => return,
            changed = deadline.changed() => if changed.is_err() { return },
        }
    }
}

/// Returns whether it was sent.
async fn signal(sandbox: &Sandbox, container: &Container, signal: u32) -> bool {
    if let Some(driver) = &sandbox.driver {
        match driver.kill(&container.id, signal).await {
            Ok(()) => return true,
            // It may have ended; what else there is to do about it, is the same.
            Err(error) => tracing::debug!(container = container.id, %error, "a signal could not be sent"),
        }
    }
    let request = Request::Signal(Signal { id: container.id.clone(), signal });
    let sent = match sandbox.keeper() {
        Ok(keeper) => keeper.done(request, Vec::new()).await.map(drop),
        Err(error) => Err(error),
    };
    if let Err(error) = &sent {
        // Without a keeper the container ends as well, and the kill of its group follows.
        tracing::debug!(container = container.id, %error, "a signal could not be sent");
    }
    sent.is_ok()
}

async fn kill(core: &Arc<Core>, sandbox: &Arc<Sandbox>, container: &Arc<Container>) -> Outcome {
    if let Some(driver) = sandbox.driver.as_ref().filter(|_| container.phase() == Phase::Running)
        && let Err(error) = driver.kill(&container.id, KILL).await
    {
        tracing::debug!(container = container.id, %error, "a runtime did not kill a container; the kernel does");
    }
    if let Ok(keeper) = sandbox.keeper() {
        keeper.tell(Request::Signal(Signal { id: container.id.clone(), signal: KILL }));
    }
    group::kill(&container.group).await.map_err(|error| failed("killing container", &container.id, &error))?;
    if timeout(TELL_MAX, container.reached(Phase::Exited)).await.is_err() {
        tracing::warn!(container = container.id, "the keeper does not tell how a killed container ended");
        let started_at = container.live().started_at;
        exits::ended(core, sandbox, container, exits::unseen(sandbox, started_at));
    }
    Ok(())
}

/// Removes a container; one that runs is killed.
pub(crate) async fn remove_container(core: &Arc<Core>, id: &str) -> Outcome {
    match core.table.container(id) {
        Ok((sandbox, container)) => remove(core, &sandbox, &container).await,
        Err(Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

pub(crate) async fn remove(core: &Arc<Core>, sandbox: &Arc<Sandbox>, container: &Arc<Container>) -> Outcome {
    let (shared, sandbox, removed) = (core.clone(), sandbox.clone(), container.clone());
    let outcome = container.remove.run(&core.tasks, || async move {
        if removed.is_gone() && !shared.table.has_container(&removed.id) {
            return Ok(()); // Somebody else removed it between the look and the call.
        }
        stop(&shared, &sandbox, &removed, Duration::ZERO).await?;
        let _ = removed.clean.outcome().await; // It warns itself, and is tried again below.
        plugins::tell(&shared, Event::RemoveContainer, &sandbox, &removed).await;
        exits::discard(&shared, &sandbox, &removed).await?;
        shared.publish(Kind::ContainerDeletedEvent, &removed.id, &sandbox);
        Ok(())
    });
    outcome.await
}

/// Stops a sandbox with all its containers, and gives its network back.
pub(crate) async fn sandbox(core: &Arc<Core>, id: &str) -> Outcome {
    match core.table.sandbox(id) {
        Ok(sandbox) => stop_sandbox(core, &sandbox).await,
        Err(Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}

pub(crate) async fn stop_sandbox(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Outcome {
    let (shared, stopped) = (core.clone(), sandbox.clone());
    sandbox.stop.run(&core.tasks, || async move { take_down(&shared, &stopped).await }).await
}

/// Has a sandbox's keeper end, and what it still runs. Its group is killed next, but it may not have come into that.
pub(crate) async fn end_keeper(sandbox: &Sandbox) {
    let _ = timeout(TELL_MAX, sandbox.settle.outcome()).await; // It warns itself.
    if let Ok(keeper) = sandbox.keeper() {
        let _ = timeout(TELL_MAX, keeper.done(Request::Shutdown(Shutdown { kill: true }), Vec::new())).await;
    }
}

async fn take_down(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Outcome {
    let before = {
        let mut live = sandbox.live();
        if matches!(live.phase, sandbox::Phase::Gone) || live.stopped {
            return Ok(());
        }
        std::mem::replace(&mut live.phase, sandbox::Phase::Stopping)
    };
    let containers = sandbox.containers();
    let stops = containers.iter().map(|container| async {
        stop(core, sandbox, container, Duration::ZERO).await?;
        container.clean.outcome().await
    });
    let stopped: Outcome = join_all(stops).await.into_iter().collect();
    let detached = core.network.detach(&sandbox.id).await;
    let detached = detached.map_err(|error| failed("disconnecting sandbox", &sandbox.id, &error));
    stopped.and(detached)?;
    end_keeper(sandbox).await;
    end_groups(sandbox).await.map_err(|error| failed("removing the control group of sandbox", &sandbox.id, &error))?;
    let unheard = sandbox.live().unheard;
    if unheard {
        adopt::lose(core, sandbox);
    }
    {
        let mut live = sandbox.live();
        live.keeper = None;
        live.ips.clear();
    }
    let record = sandbox.record(&core.boot_id, Progress::Ended);
    sandbox.records.put_sandbox(&record).map_err(|error| failed("recording sandbox", &sandbox.id, &error))?;
    {
        let mut live = sandbox.live();
        (live.phase, live.stopped) = (sandbox::Phase::NotReady, true);
    }
    plugins::tell_of_sandbox(core, Event::StopPodSandbox, sandbox).await;
    // One that was stopping already was ready before that: an earlier try has failed.
    if matches!(before, sandbox::Phase::Ready | sandbox::Phase::Stopping) {
        core.publish(Kind::ContainerStoppedEvent, &sandbox.id, sandbox);
    }
    Ok(())
}

/// Removes a sandbox; one that is ready is stopped.
pub(crate) async fn remove_sandbox(core: &Arc<Core>, id: &str) -> Outcome {
    let sandbox = match core.table.sandbox(id) {
        Ok(sandbox) => sandbox,
        Err(Error::NotFound { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    let (shared, removed) = (core.clone(), sandbox.clone());
    sandbox.remove.run(&core.tasks, || async move { forget_sandbox(&shared, &removed).await }).await
}

async fn forget_sandbox(core: &Arc<Core>, sandbox: &Arc<Sandbox>) -> Outcome {
    stop_sandbox(core, sandbox).await?;
    let containers = sandbox.containers();
    let removals = containers.iter().map(|container| remove(core, sandbox, container));
    join_all(removals).await.into_iter().collect::<Outcome>()?;
    sandbox.records.remove().map_err(|error| failed("removing the record of sandbox", &sandbox.id, &error))?;
    plugins::tell_of_sandbox(core, Event::RemovePodSandbox, sandbox).await;
    sandbox.live().phase = sandbox::Phase::Gone;
    core.table.remove_sandbox(sandbox);
    core.stats.forget(&sandbox.id);
    core.publish(Kind::ContainerDeletedEvent, &sandbox.id, sandbox);
    Ok(())
}
