//! Kills for want of memory: whom the kernel chose, and what its memory was. The kernel tells it in its log (`/dev/kmsg`); a
//! runtime knows no more than that there was one.
//!
//! ```text
//! kmsg ─► message ─┬─► watch: events of pods, and of the node where the whole machine had no memory left
//!                  └─► Kills: what the status of a container says that has ended by it
//! ```

mod log;
mod message;

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use cluster::{EventKind, Key, event_about};
use k8s_openapi::api::core::v1::Pod;

use crate::context::Context;
use crate::worker::{Shown, Workers};
use log::{Log, News};
use message::Kill;

/// Kills that nobody has asked about yet; older ones are forgotten.
const KILLS_MAX: usize = 256;

/// The kills that the kernel's log tells of. It is read when somebody asks, from its beginning: containers end while there
/// is no daemon, too.
pub(crate) struct Kills(Option<Mutex<Recent>>);

struct Recent {
    log: Log,
    kills: VecDeque<Kill>,
}

impl Kills {
    /// Where the log cannot be read, there are none.
    pub(crate) fn open() -> Self {
        let log = Log::open();
        if let Err(error) = &log {
            tracing::info!(%error, "the kernel's log cannot be read: who is killed for want of memory is not told by name");
        }
        Self(log.ok().map(|log| Mutex::new(Recent { log, kills: VecDeque::new() })))
    }

    /// How the kernel ended a container: the last kill in its groups.
    pub(crate) fn of(&self, container: &str) -> Option<String> {
        let mut recent = self.0.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner);
        recent.read();
        let at = recent.kills.iter().rposition(|kill| kill.is_in(container))?;
        recent.kills.get(at).map(ToString::to_string)
    }
}

impl Recent {
    fn read(&mut self) {
        loop {
            match self.log.next() {
                Ok(Some(kill)) => {
                    self.kills.push_back(kill);
                    if self.kills.len() > KILLS_MAX {
                        self.kills.pop_front();
                    }
                }
                Ok(None) => return,
                Err(error) => return tracing::debug!(%error, "the kernel's log cannot be read any more"),
            }
        }
    }
}

/// Tells of every kill from now on. Returns when the log cannot be read.
pub(crate) async fn watch(context: Arc<Context>, workers: Arc<Mutex<Workers>>) {
    let Ok(mut news) = News::open() else { return }; // It has been told when the kills were opened.
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
