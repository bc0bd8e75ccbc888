//! Doing something when the node runs short of memory, disk or process ids, before the kernel or a full disk does it at
//! random.
//!
//! ```text
//! timer, PSI ─► Observations ─► Watcher ─┬─► conditions, and with them admission
//!                                        └─► reclaim (dead containers, unused images) ─► rank ─► evict one pod
//! timer ─► pods with limits (local) ─► evict those that exceed theirs
//! ```
//!
//! Who uses most of a disk is found out by walking, which takes its time; memory is gone in seconds. So the one does not
//! wait for the other: each has a loop of its own.

mod local;
mod message;
mod usage;
mod wake;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use cluster::{EventKind, Key, Source, event_about};
use cri::RuntimeService;
use k8s_openapi::api::core::v1::Pod;
use pod::eviction::{self, Candidate};
use tokio::sync::watch;
use tokio::time::Instant;

use super::disks::{Disks, Files, Places};
use super::pressure::{Observations, Policy, Pressures, Resource, Signal, Threshold, Thresholds, Watcher};
use crate::admission::is_critical;
use crate::context::{name_of, uid_of};
use crate::metrics::Metrics;
use crate::paths::Paths;
use crate::qos::{self, List, Tree};
use crate::{Ending, Kubelet};
use usage::Stored;
use wake::Wake;

/// How often the node is looked at, as upstream does: what is left of a disk, no event tells.
pub const LOOK_EVERY: Duration = Duration::from_secs(10);
/// How often it is while something runs short, or a pod that was evicted is about to end.
const LOOK_SOON: Duration = Duration::from_secs(1);
/// A pod below a hard threshold gets no time, but what SIGTERM needs to be heard.
const GRACE_S: i64 = 1;
/// How long nobody else is evicted after a pod that does not end, as upstream.
const CLEANED_WITHIN: Duration = Duration::from_secs(30);

/// What a pod's status says that was evicted.
const REASON: &str = "Evicted";

/// What eviction works with.
pub struct Parts {
    /// Whose pods are ended.
    pub kubelet: Arc<Kubelet>,
    /// Where events go.
    pub source: Arc<dyn Source>,
    /// What containers have written.
    pub runtime: Arc<dyn RuntimeService>,
    /// What nobody uses.
    pub reclaim: Arc<dyn Reclaim>,
    /// The pods' control groups.
    pub groups: Tree,
    /// The kubelet's files: `nodefs`.
    pub paths: Paths,
    /// Images: `imagefs`.
    pub image_root: PathBuf,
    /// What containers write: `containerfs`.
    pub container_root: PathBuf,
    /// The node's name.
    pub node: String,
    /// Where evictions are counted.
    pub metrics: Arc<Metrics>,
    /// What eviction goes by.
    pub policy: Policy,
    /// How often the node is looked at while nothing runs short, [`LOOK_EVERY`].
    pub look_every: Duration,
    /// Where everybody learns what is short.
    pub pressures: watch::Sender<Pressures>,
}

/// Who can remove what no pod uses.
#[async_trait]
pub trait Reclaim: Send + Sync + 'static {
    /// Removes the images that no container uses.
    async fn unused_images(&self) -> Result<(), String>;
}

/// Keeps thresholds and limits from now on. Never returns.
pub async fn run(parts: Parts) {
    tokio::join!(
        keep_thresholds(&parts, Kind::Fast),
        keep_thresholds(&parts, Kind::Storage),
        local::keep_limits(&parts)
    );
}

/// Signals by how fast what they are about is gone, and how fast it is known who uses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Memory and process ids.
    Fast,
    /// Disks.
    Storage,
}

impl Kind {
    fn of(signal: Signal) -> Self {
        match signal.resource() {
            Resource::Memory | Resource::Pids => Self::Fast,
            Resource::Disk | Resource::Inodes => Self::Storage,
        }
    }

    /// What is short by `all` that the others have found, and by what those of this kind have.
    fn merged(self, all: Pressures, own: Pressures) -> Pressures {
        match self {
            Self::Fast => Pressures { disk: all.disk, ..own },
            Self::Storage => Pressures { disk: own.disk, ..all },
        }
    }
}

async fn keep_thresholds(parts: &Parts, kind: Kind) {
    let Thresholds(thresholds) = parts.places().disks().completed(&parts.policy.thresholds);
    let own: Vec<Threshold> = thresholds.into_iter().filter(|one| Kind::of(one.signal) == kind).collect();
    if own.is_empty() {
        return std::future::pending().await;
    }
    let policy = Policy { thresholds: Thresholds(own), ..parts.policy.clone() };
    let mut wake = if kind == Kind::Fast { Wake::open() } else { Wake::by_timer() };
    let (mut watcher, begun) = (Watcher::new(&policy), Instant::now());
    let mut evicted: Option<Evicted> = None;
    loop {
        let (observed, now) = (parts.measure(), begun.elapsed());
        watcher.look(&observed, now);
        let found = watcher.pressures(now);
        parts.pressures.send_if_modified(|before| {
            let pressures = kind.merged(*before, found);
            std::mem::replace(before, pressures) != pressures
        });
        evicted = evicted.filter(|one| !one.is_over(&parts.kubelet));
        if evicted.is_none()
            && let Some(threshold) = watcher.wanted()
        {
            evicted = parts.relieve(threshold, &watcher, &observed).await;
        }
        let soon = evicted.is_some() || watcher.is_near(&observed);
        wake.within(if soon { LOOK_SOON.min(parts.look_every) } else { parts.look_every }).await;
    }
}

/// A pod that was evicted last: the next one waits for what it gives back.
struct Evicted {
    uid: String,
    until: Instant,
}

impl Evicted {
    fn is_over(&self, kubelet: &Kubelet) -> bool {
        kubelet.is_cleaned(&self.uid) || Instant::now() >= self.until
    }
}

impl Parts {
    fn measure(&self) -> Observations {
        Observations::measure(&self.places(), &self.groups.root())
    }

    fn places(&self) -> Places {
        let (images, containers) = (self.image_root.clone(), self.container_root.clone());
        Places { node: self.paths.root.clone(), images, containers }
    }

    /// Gives back what nobody uses; if that is not enough, ends the pod that goes first.
    async fn relieve(&self, threshold: Threshold, watcher: &Watcher, observed: &Observations) -> Option<Evicted> {
        let resource = threshold.signal.resource();
        tracing::warn!(signal = threshold.signal.name(), resource = resource.name(), "the node runs short");
        if let Some(node) = self.source.store().nodes().get(&Key::cluster(&self.node)) {
            let message = format!("Attempting to reclaim {}", resource.name());
            self.source.event(event_about(&*node, EventKind::Warning, "EvictionThresholdMet", message, "kubelet"));
        }
        let disks = self.places().disks();
        if self.reclaim(threshold.signal, disks).await && watcher.is_relieved(&self.measure()) {
            return None;
        }
        let Some((pod, stored)) = self.first(threshold.signal, disks).await else {
            tracing::warn!(resource = resource.name(), "the node runs short, and there is no pod to evict");
            return None;
        };
        let used = self.used_by_containers(&pod, resource, &stored).await;
        let (message, annotations) = message::low(&pod, threshold, observed, &used);
        let own = pod::spec::grace_s(&pod);
        let grace_s = if threshold.is_hard() { GRACE_S } else { self.policy.pod_grace_max_s.min(own) };
        self.evict(&pod, Ending { reason: REASON, message, grace_s, disrupted: true }, annotations);
        self.metrics.evicted(threshold.signal.name());
        Some(Evicted { uid: uid_of(&pod).to_owned(), until: Instant::now() + CLEANED_WITHIN })
    }

    /// Removes what nobody uses of what is short; whether there was anything to look for.
    async fn reclaim(&self, signal: Signal, disks: Disks) -> bool {
        let [written, images] = [Files::Written, Files::Images].map(|files| disks.hold(signal, files));
        let mut outcomes = Vec::new();
        // Containers first: images that nobody else uses go with them.
        if written {
            outcomes.push(self.remove_dead_containers().await);
        }
        if images {
            outcomes.push(self.reclaim.unused_images().await);
        }
        for message in outcomes.into_iter().filter_map(Result::err) {
            tracing::warn!(message, "not everything that nobody uses could be removed");
        }
        written || images
    }

    /// Containers of pods that have ended, which are kept for their logs.
    async fn remove_dead_containers(&self) -> Result<(), String> {
        let finished = self.kubelet.finished_pods();
        if finished.is_empty() {
            return Ok(());
        }
        usage::remove_containers_of(&*self.runtime, &finished).await.map_err(|error| error.to_string())
    }

    /// Who may be evicted. A pod that is being deleted may use most, for as long as its grace period is.
    fn evictable(&self) -> Vec<Arc<Pod>> {
        let mut pods = self.kubelet.active_pods();
        pods.retain(|pod| !is_critical(pod));
        pods
    }

    /// The pod that goes first, with what it stores if that is what is short.
    async fn first(&self, signal: Signal, disks: Disks) -> Option<(Arc<Pod>, Stored)> {
        let pods = self.evictable();
        let stored = match signal.resource() {
            Resource::Disk | Resource::Inodes => usage::stored_by(&*self.runtime, &self.paths, &pods).await,
            Resource::Memory | Resource::Pids => BTreeMap::new(),
        };
        let of = |pod: &Pod| stored.get(uid_of(pod)).cloned().unwrap_or_default();
        let candidates: Vec<Candidate> = pods.iter().map(|pod| self.candidate(pod, signal, disks, &of(pod))).collect();
        let pod = pods.get(eviction::first(&candidates)?)?.clone();
        let stored = of(&pod);
        Some((pod, stored))
    }

    fn candidate(&self, pod: &Pod, signal: Signal, disks: Disks, stored: &Stored) -> Candidate {
        let group = || self.groups.pod(pod).stats();
        let asked = |name| u64::try_from(qos::of_pod(pod, name, List::Requests).units()).unwrap_or(0);
        let (usage, request) = match signal.resource() {
            Resource::Memory => (group().memory.working_set_bytes, Some(asked("memory"))),
            Resource::Disk => (stored.counted(signal, disks).bytes, Some(asked("ephemeral-storage"))),
            // No pod can ask for these.
            Resource::Inodes => (stored.counted(signal, disks).inodes, Some(0)),
            Resource::Pids => (group().pids.count, None),
        };
        Candidate { priority: pod::spec::of(pod).priority.unwrap_or(0), usage, request }
    }

    /// What each container uses of what is short, where upstream's message says it.
    async fn used_by_containers(&self, pod: &Pod, resource: Resource, stored: &Stored) -> Vec<(String, u64)> {
        match resource {
            Resource::Memory => usage::memory_of_containers(&*self.runtime, uid_of(pod)).await,
            Resource::Disk => stored.by_container(),
            Resource::Inodes | Resource::Pids => Vec::new(),
        }
    }

    fn evict(&self, pod: &Pod, ending: Ending, annotations: BTreeMap<String, String>) {
        tracing::warn!(pod = %name_of(pod), message = ending.message, "evicting a pod");
        let mut event = event_about(pod, EventKind::Warning, REASON, ending.message.clone(), "kubelet");
        event.metadata.annotations = (!annotations.is_empty()).then_some(annotations);
        self.source.event(event);
        self.kubelet.end(uid_of(pod), ending);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_kind_tells_of_its_own() {
        let (all, none) = (Pressures { memory: true, disk: true, pids: true }, Pressures::default());
        assert_eq!(Kind::Fast.merged(all, none), Pressures { disk: true, ..none });
        assert_eq!(Kind::Storage.merged(all, none), Pressures { disk: false, ..all });
        assert_eq!(Kind::Fast.merged(none, all), Pressures { disk: false, ..all });
    }
}
