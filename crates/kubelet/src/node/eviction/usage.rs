//! What pods use of the node's disks: what their containers have written, their logs, their emptyDirs. Found out by walking,
//! so only when somebody needs to know.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use cri::{Error, RuntimeService, v1};
use k8s_openapi::api::core::v1::Pod;
use sys::tree::{Dir, Totals};

use super::super::disks::{Disks, Files};
use super::super::pressure::Signal;
use crate::context::uid_of;
use crate::generate::label;
use crate::paths::Paths;

/// What one pod stores.
#[derive(Debug, Clone, Default)]
pub(super) struct Stored {
    /// What each container has written, and its logs.
    pub(super) containers: BTreeMap<String, (Totals, Totals)>,
    /// What is in each emptyDir on disk.
    pub(super) volumes: BTreeMap<String, Totals>,
    /// When the oldest of what containers have written was measured, nanoseconds since 1970; none if one was not.
    pub(super) measured_at: Option<i64>,
}

impl Stored {
    /// What counts where a signal is short: what is on the disk that it is about.
    pub(super) fn counted(&self, signal: Signal, disks: Disks) -> Totals {
        let [counts_written, counts_others] = [Files::Written, Files::Node].map(|files| disks.hold(signal, files));
        let written = self.containers.values().map(|(written, _)| written).filter(|_| counts_written);
        let logs = self.containers.values().map(|(_, logs)| logs);
        let others = logs.chain(self.volumes.values()).filter(|_| counts_others);
        sum(written.chain(others))
    }

    /// All of it.
    pub(super) fn bytes(&self) -> u64 {
        self.counted(Signal::NodeDisk, Disks::ONE).bytes
    }

    /// How many files the containers have written.
    pub(super) fn inodes_of_containers(&self) -> u64 {
        self.containers.values().map(|(written, _)| written.inodes).sum()
    }

    /// Bytes by container, with the logs.
    pub(super) fn by_container(&self) -> Vec<(String, u64)> {
        let bytes = |(written, logs): &(Totals, Totals)| written.bytes + logs.bytes;
        self.containers.iter().map(|(name, stored)| (name.clone(), bytes(stored))).collect()
    }
}

fn sum<'a>(parts: impl Iterator<Item = &'a Totals>) -> Totals {
    parts
        .fold(Totals::default(), |sum, part| Totals { bytes: sum.bytes + part.bytes, inodes: sum.inodes + part.inodes })
}

/// What each of `pods` stores, by uid. All are given the same time; a runtime that does not answer is asked no more.
pub(super) async fn stored_by(
    runtime: &dyn RuntimeService,
    paths: &Paths,
    pods: &[Arc<Pod>],
) -> BTreeMap<String, Stored> {
    let within = (WALK_ALL / u32::try_from(pods.len()).unwrap_or(u32::MAX).max(1)).max(WALK_LEAST);
    let (mut all, mut hangs) = (BTreeMap::new(), false);
    for pod in pods {
        let stats = if hangs { None } else { stats_of(runtime, uid_of(pod), ANSWERS_WITHIN).await };
        hangs |= stats.is_none();
        all.insert(uid_of(pod).to_owned(), stored_with(stats.unwrap_or_default(), paths, pod, within).await);
    }
    all
}

/// How long it may take to walk through what all pods store, and how long it may for one of them at least: whoever has not
/// been walked through by then stores as much as has been found, which is more than most others have.
const WALK_ALL: Duration = Duration::from_secs(60);
const WALK_LEAST: Duration = Duration::from_secs(1);
/// How long it may take for a pod that is looked at alone.
pub(super) const WALK_ONE: Duration = Duration::from_secs(60);
/// A disk or a runtime that does not answer is not waited for; for what only stands in a message, not for long.
const ANSWERS_WITHIN: Duration = Duration::from_secs(30);
const MESSAGE_WITHIN: Duration = Duration::from_secs(1);

/// More than any disk, and so little that sums stay in range.
const UNMEASURABLE: Totals = Totals { bytes: 1 << 50, inodes: 1 << 50 };

/// What lies below a directory. Only who moves directories about without end, or has far too many, cannot be measured: it
/// must not pay.
fn totals_of(path: &Path, until: Instant) -> Option<Totals> {
    match Dir::open(path).and_then(|dir| dir.totals_while(&|| Instant::now() < until)) {
        Ok(totals) => Some(totals),
        Err(error) if matches!(error.kind(), ErrorKind::ResourceBusy | ErrorKind::QuotaExceeded) => Some(UNMEASURABLE),
        Err(_) => None,
    }
}

/// What a pod stores, as far as it is found `within` a time. What cannot be found out is not in it.
pub(super) async fn stored(runtime: &dyn RuntimeService, paths: &Paths, pod: &Pod, within: Duration) -> Stored {
    let stats = stats_of(runtime, uid_of(pod), ANSWERS_WITHIN).await;
    stored_with(stats.unwrap_or_default(), paths, pod, within).await
}

async fn stored_with(stats: Vec<v1::ContainerStats>, paths: &Paths, pod: &Pod, within: Duration) -> Stored {
    let mut stored = Stored { measured_at: Some(i64::MAX), ..Stored::default() };
    for stats in stats {
        let Some(name) = container_name(&stats) else { continue };
        let layer = stats.writable_layer.as_ref();
        let number = |value: Option<v1::UInt64Value>| value.map_or(0, |value| value.value);
        let written = layer.map(|layer| Totals { bytes: number(layer.used_bytes), inodes: number(layer.inodes_used) });
        stored.measured_at = stored.measured_at.and_then(|at| Some(at.min(layer?.timestamp)));
        stored.containers.insert(name, (written.unwrap_or_default(), Totals::default()));
    }
    let (logs, volumes) = places(paths, pod);
    let walked = tokio::task::spawn_blocking(move || {
        let until = Instant::now() + within;
        let walk = |(name, path): (String, PathBuf)| Some((name, totals_of(&path, until)?));
        (logs.into_iter().filter_map(walk).collect::<Vec<_>>(), volumes.into_iter().filter_map(walk).collect())
    });
    let (logs, volumes) = match tokio::time::timeout(within + ANSWERS_WITHIN, walked).await {
        Ok(Ok(walked)) => walked,
        Ok(Err(_)) => return stored, // The runtime is ending.
        Err(_) => {
            tracing::warn!(uid = uid_of(pod), "the disk does not answer; what a pod stores is not known");
            return stored;
        }
    };
    for (name, totals) in logs {
        stored.containers.entry(name).or_default().1 = totals;
    }
    stored.volumes = volumes;
    stored
}

/// Directories by the names of what they belong to.
type Places = Vec<(String, PathBuf)>;

/// The logs of containers, and emptyDirs on disk.
fn places(paths: &Paths, pod: &Pod) -> (Places, Places) {
    let text = |value: &Option<String>| value.clone().unwrap_or_default();
    let logs = paths.pod_logs(&text(&pod.metadata.namespace), &text(&pod.metadata.name), uid_of(pod));
    let containers = pod::spec::containers(pod).map(|(_, container)| container.name.clone());
    let logs = containers.map(|name| (name.clone(), logs.join(name))).collect();
    let volumes = pod::spec::of(pod).volumes.iter().flatten();
    let on_disk = volumes.filter(|volume| {
        let medium = volume.empty_dir.as_ref().map(|source| source.medium.as_deref().unwrap_or_default());
        medium == Some("")
    });
    let volume = |name: &String| (name.clone(), paths.volume(uid_of(pod), "empty-dir", name));
    (logs, on_disk.map(|one| volume(&one.name)).collect())
}

/// What a pod's containers use, as far as the runtime tells; none if it does not answer within the time.
async fn stats_of(runtime: &dyn RuntimeService, uid: &str, within: Duration) -> Option<Vec<v1::ContainerStats>> {
    let label_selector = HashMap::from([(label::POD_UID.to_owned(), uid.to_owned())]);
    let filter = v1::ContainerStatsFilter { label_selector, ..v1::ContainerStatsFilter::default() };
    let asked = runtime.list_container_stats(v1::ListContainerStatsRequest { filter: Some(filter) });
    match tokio::time::timeout(within, asked).await {
        Ok(Ok(listed)) => Some(listed.stats),
        Ok(Err(error)) => {
            tracing::warn!(uid, %error, "what a pod's containers use is not known");
            Some(Vec::new())
        }
        Err(_) => {
            tracing::warn!(uid, "the runtime does not answer; what a pod's containers use is not known");
            None
        }
    }
}

fn container_name(stats: &v1::ContainerStats) -> Option<String> {
    stats.attributes.as_ref()?.labels.get(label::CONTAINER_NAME).cloned()
}

/// The working set of each container.
pub(super) async fn memory_of_containers(runtime: &dyn RuntimeService, uid: &str) -> Vec<(String, u64)> {
    let used = |stats: &v1::ContainerStats| Some(stats.memory.as_ref()?.working_set_bytes?.value);
    let stats = stats_of(runtime, uid, MESSAGE_WITHIN).await.unwrap_or_default();
    stats.iter().filter_map(|stats| Some((container_name(stats)?, used(stats)?))).collect()
}

/// Removes the containers that have ended of these pods.
pub(super) async fn remove_containers_of(runtime: &dyn RuntimeService, uids: &[String]) -> Result<(), Error> {
    let state = Some(v1::ContainerStateValue { state: v1::ContainerState::ContainerExited.into() });
    let filter = v1::ContainerFilter { state, ..v1::ContainerFilter::default() };
    let dead = runtime.list_containers(v1::ListContainersRequest { filter: Some(filter) }).await?.containers;
    for container in dead.into_iter().filter(|one| one.labels.get(label::POD_UID).is_some_and(|uid| uids.contains(uid)))
    {
        let request = v1::RemoveContainerRequest { container_id: container.id.clone() };
        if let Err(error) = runtime.remove_container(request).await {
            tracing::warn!(container = container.id, %error, "a container that has ended cannot be removed");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::super::disks::tests::{DEDICATED, SPLIT};
    use super::*;

    #[test]
    fn a_walk_that_takes_too_long_counts_as_far_as_it_came() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("f"), [1; 5000]).unwrap();
        let now = Instant::now();
        let whole = totals_of(dir.path(), now + WALK_ONE).unwrap();
        assert!(whole.bytes >= 5000 && whole.inodes == 1, "{whole:?}");
        assert_eq!(totals_of(dir.path(), now), Some(Totals::default()));
        assert_eq!(totals_of(&dir.path().join("none"), now), None);
    }

    /// It never answers.
    struct Hung;

    #[async_trait::async_trait]
    impl RuntimeService for Hung {
        async fn list_container_stats(
            &self,
            _: v1::ListContainerStatsRequest,
        ) -> Result<v1::ListContainerStatsResponse, Error> {
            std::future::pending().await
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_runtime_that_hangs_is_waited_for_once() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths { root: dir.path().join("kubelet"), logs: dir.path().join("logs") };
        let pods = ["a", "b", "c"].map(|uid| {
            let mut pod = Pod::default();
            pod.metadata.uid = Some(uid.to_owned());
            Arc::new(pod)
        });
        let begun = tokio::time::Instant::now();
        assert_eq!(stored_by(&Hung, &paths, &pods).await.len(), pods.len());
        assert_eq!(begun.elapsed(), ANSWERS_WITHIN);
    }

    #[test]
    fn what_counts_is_on_the_disk_that_is_short() {
        let totals = |bytes| Totals { bytes, inodes: 1 };
        let stored = Stored {
            containers: [("a".to_owned(), (totals(1), totals(10))), ("b".to_owned(), (totals(2), totals(20)))].into(),
            volumes: [("v".to_owned(), totals(100))].into(),
            measured_at: None,
        };
        assert_eq!((stored.bytes(), stored.counted(Signal::ImageDisk, Disks::ONE).bytes), (133, 133));
        assert_eq!(stored.counted(Signal::NodeDisk, DEDICATED).bytes, 130);
        assert_eq!(stored.counted(Signal::ImageInodes, DEDICATED), Totals { bytes: 3, inodes: 2 });
        assert_eq!(stored.counted(Signal::ContainerDisk, SPLIT).bytes, 133);
        assert_eq!(stored.counted(Signal::ImageDisk, SPLIT), Totals::default());
        assert_eq!(stored.by_container(), [("a".to_owned(), 11), ("b".to_owned(), 22)]);
    }
}
