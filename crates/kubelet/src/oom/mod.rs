//! Kills for want of memory: whom the kernel chose, and what its memory was. The kernel tells it in its log (`/dev/kmsg`); a
//! runtime knows no more than that there was one.
//!
//! ```text
//! kmsg ─► message ─┬─► watch: events of pods, and of the node where the whole machine had no memory left
//!                  └─► Kills: what the status of a container says that has ended by it
//! ```
//!
//! Where that device is not, as in some containers, the log is asked for as a whole (syslog(2)) when a container has ended so.
//! The kernel tells nobody then that there is more.

mod log;
mod message;

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cluster::{EventKind, Key, event_about};
use k8s_openapi::api::core::v1::Pod;
use tokio::sync::Notify;

use crate::context::Context;
use crate::worker::{Shown, Workers};
use log::{Log, News};
use message::Kill;

/// Kills that nobody has asked about yet; older ones are forgotten.
const KILLS_MAX: usize = 256;

/// The kills that the kernel's log tells of. It is read when somebody asks, from its beginning: containers end while there
/// is no daemon, too.
pub(crate) struct Kills {
    recent: Option<Mutex<Recent>>,
    /// Told when there are kills that [`watch`] has not heard of.
    found: Notify,
}

struct Recent {
    /// None where it has no device: then it is read as a whole each time.
    log: Option<Log>,
    kills: VecDeque<Kill>,
    /// Of a log without a device, what was found since somebody took them.
    untold: Vec<Kill>,
}

impl Kills {
    /// Where the log cannot be read, there are none.
    pub(crate) fn open() -> Self {
        let recent = Recent::open();
        if let Err(error) = &recent {
            tracing::info!(%error, "the kernel's log cannot be read: who is killed for want of memory is not told by name");
        }
        Self { recent: recent.ok().map(Mutex::new), found: Notify::new() }
    }

    /// How the kernel ended a container: the last kill in its groups.
    pub(crate) fn of(&self, container: &str) -> Option<String> {
        let mut recent = self.lock()?;
        recent.read();
        if !recent.untold.is_empty() {
            self.found.notify_one();
        }
        let at = recent.kills.iter().rposition(|kill| kill.is_in(container))?;
        recent.kills.get(at).map(ToString::to_string)
    }

    fn lock(&self) -> Option<MutexGuard<'_, Recent>> {
        Some(self.recent.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Those of a log without a device that have been found since the last call; waits for some.
    async fn untold(&self) -> Vec<Kill> {
        self.found.notified().await;
        self.lock().map(|mut recent| std::mem::take(&mut recent.untold)).unwrap_or_default()
    }
}

impl Recent {
    fn open() -> io::Result<Self> {
        match Log::open() {
            Ok(log) => Ok(Self { log: Some(log), kills: VecDeque::new(), untold: Vec::new() }),
            // What was before is nobody's news.
            Err(error) => {
                let kills = log::all().map_err(|_| error)?;
                Ok(Self { log: None, kills: kills.into(), untold: Vec::new() })
            }
        }
    }

    fn read(&mut self) {
        if let Err(error) = self.read_more() {
            tracing::debug!(%error, "the kernel's log cannot be read any more");
        }
        self.kills.drain(..self.kills.len().saturating_sub(KILLS_MAX));
    }

    fn read_more(&mut self) -> io::Result<()> {
        let Some(log) = &mut self.log else {
            let new = unknown(log::all()?, self.kills.back());
            self.untold.extend(new.iter().cloned());
            self.kills.extend(new);
            return Ok(());
        };
        while let Some(kill) = log.next()? {
            self.kills.push_back(kill);
        }
        Ok(())
    }
}

/// Those of `all` that come after the `last` one that is known; everything if that is there no more.
fn unknown(mut all: Vec<Kill>, last: Option<&Kill>) -> Vec<Kill> {
    let known = all.iter().rposition(|kill| Some(kill) == last).map_or(0, |at| at + 1);
    all.drain(..known);
    all
}

/// Tells of every kill from now on; where the log has no device, of those that come to light when a container ends by one.
/// Returns when the log cannot be read.
pub(crate) async fn watch(context: Arc<Context>, workers: Arc<Mutex<Workers>>) {
    let Ok(mut news) = News::open() else {
        loop {
            let kills = context.kills.untold().await;
            kills.iter().for_each(|kill| tell(&context, &workers, kill));
        }
    };
    loop {
        match news.next().await {
            Ok(kill) => tell(&context, &workers, &kill),
            Err(error) => return tracing::warn!(%error, "the kernel's log cannot be read any more"),
        }
    }
}

fn tell(context: &Context, workers: &Mutex<Workers>, kill: &Kill) {
    if kill.is_of_machine() {
        tracing::warn!(%kill, "the machine had no memory left");
        let node = Key::cluster(&context.config.generate.node.name);
        if let Some(node) = context.parts.source.store().nodes().get(&node) {
            let message = format!("System OOM encountered, victim process: {}, pid: {}", kill.process, kill.pid);
            context.parts.source.event(event_about(&*node, EventKind::Warning, "SystemOOM", message, "kubelet"));
        }
    }
    if let Some((pod, container)) = kill.pods().find_map(|uid| victim(workers, &uid, kill)) {
        context.warning(&pod, "OOMKilling", kill.to_string(), container.as_deref());
    }
}

/// The pod, and the container of it in which the process was.
fn victim(workers: &Mutex<Workers>, uid: &str, kill: &Kill) -> Option<(Arc<Pod>, Option<String>)> {
    let workers = workers.lock().unwrap_or_else(PoisonError::into_inner);
    let shown = workers.get(uid)?.shown.lock().unwrap_or_else(PoisonError::into_inner);
    let container = container_of(&shown, kill);
    Some((shown.pod.clone(), container))
}

fn container_of(shown: &Shown, kill: &Kill) -> Option<String> {
    let is_it = |id: Option<&String>| id.is_some_and(|id| kill.is_in(id));
    let mut containers = shown.view.containers.iter();
    let found = containers.find(|(_, view)| {
        is_it(view.running.as_ref().map(|run| &run.id)) || is_it(view.ended.as_ref().map(|run| &run.id))
    });
    found.map(|(name, _)| name.clone())
}
