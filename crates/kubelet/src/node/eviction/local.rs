//! Limits of what a pod may keep on the node's disks (`ephemeral-storage`, `sizeLimit` of emptyDirs).
//!
//! How much a pod stores is only known by walking its files, and the kernel's project quotas need mount options that few
//! nodes have. So pods without a limit are never looked at, and others when it can matter: the disks have lost half of what
//! the pod was away from its limit, or a minute has passed, or longer where a walk takes long.

use std::collections::{BTreeMap, HashMap};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use k8s_openapi::api::core::v1::Pod;
use tokio::time::Instant;

use super::usage::{self, Stored};
use super::{Disks, Files, GRACE_S, Parts, REASON, message};
use crate::Ending;
use crate::context::uid_of;
use crate::disk::Disk;
use crate::qos::{self, List};

/// How old a measurement may become, in looks, if walking is cheap: a minute. What is written while others delete shows by no
/// number.
const LOOKS_MAX: u32 = 6;
/// What the runtime pays for each file of a container, whose walk nobody here sees.
const ENTRY: Duration = Duration::from_micros(3);
/// Of so many moments one is spent on walking through the files of one pod.
const SPARE: u32 = 200;

/// The limits of one pod.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Limits {
    /// Of emptyDirs on disk: name, limit as written, bytes.
    volumes: Vec<(String, String, u64)>,
    /// Of all containers together, bytes.
    pod: Option<u64>,
    /// Of containers: name, limit as written, bytes.
    containers: Vec<(String, String, u64)>,
}

impl Limits {
    /// Those of a pod; none if it has none.
    fn of(pod: &Pod) -> Option<Self> {
        let volumes = pod::spec::of(pod).volumes.iter().flatten().filter_map(|volume| {
            let source = volume.empty_dir.as_ref()?;
            // What is in memory, the kernel holds.
            let limit =
                source.size_limit.as_ref().filter(|_| source.medium.as_deref().unwrap_or_default().is_empty())?;
            limited(&volume.name, &limit.0)
        });
        let lasting = pod::spec::containers(pod).filter(|(role, _)| *role != pod::spec::Role::Init);
        let containers = lasting.filter_map(|(_, container)| {
            let limit = container.resources.as_ref()?.limits.as_ref()?.get("ephemeral-storage")?;
            limited(&container.name, &limit.0)
        });
        let pod = u64::try_from(qos::of_pod(pod, "ephemeral-storage", List::Limits).units()).ok();
        let limits =
            Self { volumes: volumes.collect(), pod: pod.filter(|bytes| *bytes > 0), containers: containers.collect() };
        (limits != Self::default()).then_some(limits)
    }

    /// What is exceeded, as upstream counts it, and a message; in upstream's order.
    fn exceeded(&self, stored: &Stored, disks: Disks) -> Option<(&'static str, String)> {
        let volume = |(name, written, bytes): &(String, String, u64)| {
            let exceeds = stored.volumes.get(name)?.bytes > *bytes;
            exceeds.then(|| ("emptydirfs.limit", message::volume_exceeds(name, written)))
        };
        let container = |(name, written, bytes): &(String, String, u64)| {
            let exceeds = stored.of_container(name, disks) > *bytes;
            exceeds.then(|| ("ephemeralcontainerfs.limit", message::container_exceeds(name, written)))
        };
        let pod = self.pod.filter(|bytes| stored.bytes() > *bytes);
        let pod = || pod.map(|bytes| ("ephemeralpodfs.limit", message::pod_exceeds(bytes)));
        self.volumes.iter().find_map(volume).or_else(pod).or_else(|| self.containers.iter().find_map(container))
    }

    /// How many bytes can be written before anything is exceeded.
    fn headroom(&self, stored: &Stored, disks: Disks) -> u64 {
        let volumes = self
            .volumes
            .iter()
            .map(|(name, _, limit)| limit.saturating_sub(stored.volumes.get(name).map_or(0, |volume| volume.bytes)));
        let containers = self.containers.iter();
        let containers = containers.map(|(name, _, limit)| limit.saturating_sub(stored.of_container(name, disks)));
        let pod = self.pod.map(|limit| limit.saturating_sub(stored.bytes()));
        volumes.chain(containers).chain(pod).min().unwrap_or(u64::MAX)
    }
}

fn limited(name: &str, written: &str) -> Option<(String, String, u64)> {
    let bytes = message::units(written);
    (bytes > 0).then(|| (name.to_owned(), written.to_owned(), bytes))
}

impl Stored {
    /// What a container has written, unless that has a disk of its own, and its logs.
    fn of_container(&self, name: &str, disks: Disks) -> u64 {
        let is_nodes = disks.share(Files::Written, Files::Node);
        self.containers.get(name).map_or(0, |(written, logs)| logs.bytes + if is_nodes { written.bytes } else { 0 })
    }
}

/// Whatever a pod does, it is walked for a tenth of the time at most.
const BUSY: u32 = 9;

/// What is known of one pod.
#[derive(Debug, Clone, Copy)]
struct Looked {
    at: Instant,
    /// How long it took.
    cost: Duration,
    /// Since when a measurement is wanted that there is not yet, nanoseconds since 1970: a runtime may answer with what it
    /// knew before.
    wanted_since: Option<u128>,
    headroom: u64,
    /// What was left of the disks then.
    left: u64,
}

impl Looked {
    /// Whether the pod may exceed a limit by now, with `left` on the disks, of a node that is looked at `every` so often.
    fn is_due(&self, now: Instant, left: u64, every: Duration) -> bool {
        let age = now.saturating_duration_since(self.at);
        let lost = self.left.saturating_sub(left);
        let is_old = age >= (every * LOOKS_MAX).max(self.cost * SPARE);
        let may_matter = self.wanted_since.is_some() || lost >= self.headroom / 2;
        is_old || (may_matter && age >= self.cost * BUSY)
    }
}

/// Evicts pods that exceed a limit. Never returns.
pub(super) async fn keep_limits(parts: &Parts) {
    if !parts.policy.local_storage {
        return std::future::pending().await;
    }
    let mut known: HashMap<String, Looked> = HashMap::new();
    loop {
        tokio::time::sleep(parts.look_every).await;
        let pods = parts.evictable();
        known.retain(|uid, _| pods.iter().any(|pod| uid_of(pod) == uid));
        let disks = parts.places().disks();
        for pod in pods {
            let Some(limits) = Limits::of(&pod) else { continue };
            let left = parts.left(disks);
            let before = known.get(uid_of(&pod));
            if before.is_none_or(|looked| looked.is_due(Instant::now(), left, parts.look_every)) {
                let since = before.and_then(|looked| looked.wanted_since).unwrap_or_else(now_ns);
                let looked = look(parts, &pod, &limits, disks, (left, since)).await;
                known.insert(uid_of(&pod).to_owned(), looked);
            }
        }
    }
}

/// Looks at a pod, with `left` on the disks; measurements from before `since` are too old.
async fn look(parts: &Parts, pod: &Pod, limits: &Limits, disks: Disks, (left, since): (u64, u128)) -> Looked {
    let begun = Instant::now();
    let stored = usage::stored(&*parts.runtime, &parts.paths, pod, usage::WALK_ONE).await;
    if let Some((signal, message)) = limits.exceeded(&stored, disks) {
        let ending = Ending { reason: REASON, message, grace_s: GRACE_S, disrupted: false };
        parts.evict(pod, ending, BTreeMap::new());
        parts.metrics.evicted(signal);
    }
    let is_old = stored.measured_at.is_none_or(|at| i128::from(at).unsigned_abs() < since);
    let wanted_since = is_old.then_some(since);
    let cost = begun.elapsed() + ENTRY * u32::try_from(stored.inodes_of_containers()).unwrap_or(u32::MAX);
    Looked { at: begun, cost, wanted_since, headroom: limits.headroom(&stored, disks), left }
}

fn now_ns() -> u128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos()
}

impl Parts {
    /// What is left of the disks that pods write to, together.
    fn left(&self, disks: Disks) -> u64 {
        let written = (!disks.share(Files::Written, Files::Node)).then_some(&self.container_root);
        [Some(&self.paths.root), written]
            .into_iter()
            .flatten()
            .map(|path| Disk::of(path).map_or(0, |disk| disk.free))
            .sum()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use sys::tree::Totals;

    use super::super::super::disks::tests::{DEDICATED, SPLIT};
    use super::*;

    fn limits() -> Limits {
        let limited = |bytes: &str| json!({"limits": {"ephemeral-storage": bytes}});
        let spec = json!({
            "containers": [{"name": "a", "resources": limited("100")}, {"name": "b", "resources": limited("50")}],
            "volumes": [
                {"name": "disk", "emptyDir": {"sizeLimit": "30"}},
                {"name": "memory", "emptyDir": {"medium": "Memory", "sizeLimit": "1"}},
                {"name": "free", "emptyDir": {}},
            ],
        });
        Limits::of(&serde_json::from_value(json!({"spec": spec})).unwrap()).unwrap()
    }

    fn stored(a: (u64, u64), b: u64, disk: u64) -> Stored {
        let totals = |bytes| Totals { bytes, inodes: 0 };
        Stored {
            containers: [("a".into(), (totals(a.0), totals(a.1))), ("b".into(), (totals(b), totals(0)))].into(),
            volumes: [("disk".to_owned(), totals(disk)), ("free".to_owned(), totals(0))].into(),
            measured_at: Some(0),
        }
    }

    #[test]
    fn pods_without_limits_are_none_of_our_business() {
        let pod = json!({"spec": {"containers": [{"name": "a"}], "volumes": [{"name": "v", "emptyDir": {}}]}});
        assert_eq!(Limits::of(&serde_json::from_value(pod).unwrap()), None);
    }

    #[test]
    fn each_limit_is_kept() {
        let check = |stored: Stored, disks: Disks, expect: Option<&str>| {
            let found = limits().exceeded(&stored, disks);
            assert_eq!(found.as_ref().map(|(_, text)| text.split(' ').next().unwrap()), expect, "{found:?}");
        };
        check(stored((60, 40), 20, 30), Disks::ONE, None);
        check(stored((0, 0), 0, 31), Disks::ONE, Some("Usage"));
        check(stored((100, 0), 50, 1), Disks::ONE, Some("Pod"));
        check(stored((60, 41), 0, 0), Disks::ONE, Some("Container"));
        check(stored((60, 41), 0, 0), DEDICATED, None);
        check(stored((60, 41), 0, 0), SPLIT, Some("Container"));
    }

    #[test]
    fn the_nearest_limit_is_what_counts() {
        assert_eq!(limits().headroom(&stored((0, 0), 0, 0), Disks::ONE), 30);
        assert_eq!(limits().headroom(&stored((90, 0), 45, 5), Disks::ONE), 5);
    }

    #[test]
    fn a_pod_is_looked_at_when_it_can_matter() {
        let at = Instant::now();
        let looked = Looked { at, cost: Duration::from_secs(1), wanted_since: None, headroom: 100, left: 1000 };
        let due = |looked: &Looked, seconds, left| {
            looked.is_due(at + Duration::from_secs(seconds), left, super::super::LOOK_EVERY)
        };
        assert!(!due(&looked, 100, 951) && due(&looked, 10, 950));
        assert!(!due(&looked, 8, 950), "at most a tenth of the time");
        assert!(!due(&looked, 199, 2000) && due(&looked, 200, 2000));
        assert!(due(&Looked { wanted_since: Some(1), ..looked }, 9, 1000));
        let cheap = Looked { cost: Duration::ZERO, ..looked };
        assert!(!due(&cheap, 59, 1000) && due(&cheap, 60, 1000));
    }
}
