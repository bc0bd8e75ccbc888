//! The tree of control groups that pods live in, their limits, and whom the kernel kills first.
//!
//! ```text
//! kubepods                         all pods: memory that the node leaves to them
//! ├── pod<uid>                     Guaranteed
//! ├── burstable                    cpu: the sum of its pods' requests
//! │   └── pod<uid>
//! └── besteffort                   cpu: the least there is
//!     └── pod<uid>
//! ```
//!
//! It stands at the root of the hierarchy, or in the group that the operator names (`cgroupRoot`). Where systemd makes the
//! groups, for a runtime that asks systemd for those of its containers, each is a slice: `slices`.

mod memory;
mod slices;

use std::path::{Path, PathBuf};

use k8s_openapi::api::core::v1::{Container, Pod};
use pod::quantity::Quantity;
pub use pod::resources::{List, of_container, of_pod};
use pod::resources::{is_limited, of_containers, of_whole};
use pod::spec::Role;
use pod::{QosClass, spec};
use sys::cgroup::{Cgroup, Hierarchy, Limits};

use crate::node::machine::{self, binary};

pub use memory::MemoryRules;

/// The fewest `cpu.shares` that the kernel takes (`MIN_SHARES`, kernel/sched/sched.h).
pub const SHARES_MIN: u64 = 2;
/// The most (`MAX_SHARES`).
pub const SHARES_MAX: u64 = 262_144;
/// The length of a CPU period unless the operator says otherwise (`cpuCFSQuotaPeriod`).
pub const PERIOD_US: u64 = 100_000;
/// The smallest quota that the kernel takes.
const QUOTA_MIN_US: i64 = 1000;
/// Priority from which on a pod is critical to its node (`system-node-critical`).
const NODE_CRITICAL: i32 = 2_000_001_000;

/// What operator and machine say about the limits of all pods.
#[derive(Debug, Clone, PartialEq)]
pub struct Rules {
    /// Most processes of one pod (`podPidsLimit`).
    pub pids: Option<i64>,
    /// The length of a CPU period in microseconds; limits of CPU are not kept without (`cpuCFSQuota: false`).
    pub cpu_period_us: Option<u64>,
    /// Sizes of huge pages that the machine has, as `2MB`: pods get none of what they did not ask for.
    pub huge_pages: Vec<String>,
    /// What only control groups of version 2 can do.
    pub memory: Option<MemoryRules>,
}

impl Default for Rules {
    fn default() -> Self {
        Self { pids: None, cpu_period_us: Some(PERIOD_US), huge_pages: Vec::new(), memory: None }
    }
}

impl Rules {
    /// Upstream's defaults on this machine.
    pub fn of_machine() -> Self {
        let mut sizes: Vec<u64> = machine::huge_page_sizes(Path::new("/sys/kernel/mm/hugepages")).collect();
        sizes.sort_unstable();
        let is_unified = Hierarchy::detect().is_ok_and(|hierarchy| hierarchy.is_unified());
        Self {
            huge_pages: sizes.into_iter().map(page_size).collect(),
            memory: is_unified.then(MemoryRules::default),
            ..Self::default()
        }
    }

    /// Microseconds of CPU time for each period; `None` without a limit.
    pub(crate) fn quota_us(&self, milli: i64) -> Option<i64> {
        let period = i64::try_from(self.cpu_period_us?).unwrap_or(i64::MAX);
        (milli > 0).then(|| (milli.saturating_mul(period) / 1000).max(QUOTA_MIN_US))
    }

    /// A limit for every size of huge pages, from the bytes that are asked for by the name of the resource
    /// (`hugepages-2Mi`).
    pub(crate) fn huge_page_limits(&self, asked: impl Fn(&str) -> i64) -> Vec<(String, u64)> {
        let limit = |size: &String| {
            let bytes = page_bytes(size).map_or(0, |bytes| asked(&format!("hugepages-{}", binary(bytes))));
            (size.clone(), u64::try_from(bytes).unwrap_or(0))
        };
        self.huge_pages.iter().map(limit).collect()
    }
}

/// As the kernel names a size in hugetlb's files: `2MB`, `1GB`.
fn page_size(bytes: u64) -> String {
    match bytes {
        size if size >= 1 << 30 => format!("{}GB", size >> 30),
        size if size >= 1 << 20 => format!("{}MB", size >> 20),
        size => format!("{}KB", size >> 10),
    }
}

fn page_bytes(size: &str) -> Option<u64> {
    let unit = |(suffix, shift)| Some(size.strip_suffix(suffix)?.parse::<u64>().ok()? << shift);
    [("GB", 30), ("MB", 20), ("KB", 10)].into_iter().find_map(unit)
}

/// A limit of a pod's group that can change while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Of memory.
    Memory,
    /// Of CPU time.
    Quota,
    /// The weight against others when CPU time is short.
    Shares,
}

/// The group of all pods.
pub const ROOT: &str = "kubepods";

/// The group of a class, below the root.
pub fn class_group(class: QosClass) -> String {
    match class {
        QosClass::Guaranteed => ROOT.to_owned(),
        QosClass::Burstable => format!("{ROOT}/burstable"),
        QosClass::BestEffort => format!("{ROOT}/besteffort"),
    }
}

/// The group of a pod, below the root: `kubepods/burstable/pod<uid>`.
pub fn pod_group(pod: &Pod) -> String {
    group_in(QosClass::of(pod), pod.metadata.uid.as_deref().unwrap_or_default())
}

fn group_in(class: QosClass, uid: &str) -> String {
    format!("{}/pod{uid}", class_group(class))
}

/// CPU shares for a number of thousandths of a CPU.
pub fn shares(milli: i64) -> u64 {
    (u64::try_from(milli).unwrap_or(0) * 1024 / 1000).clamp(SHARES_MIN, SHARES_MAX)
}

/// Limits of a pod's group.
pub fn pod_limits(pod: &Pod, rules: &Rules) -> Limits {
    let class = QosClass::of(pod);
    let cpu = of_pod(pod, "cpu", List::Limits).milli();
    let limited = |resource| class == QosClass::Guaranteed || is_limited(pod, resource);
    Limits {
        cpu_shares: Some(match class {
            QosClass::BestEffort => SHARES_MIN,
            _ => shares(of_pod(pod, "cpu", List::Requests).milli()),
        }),
        cpu_quota_us: rules.quota_us(cpu).filter(|_| limited("cpu")),
        cpu_period_us: rules.cpu_period_us.filter(|_| cpu > 0 && limited("cpu")),
        memory_bytes: Some(of_pod(pod, "memory", List::Limits).units()).filter(|bytes| *bytes > 0 && limited("memory")),
        pids: rules.pids,
        hugepages: rules.huge_page_limits(|resource| of_pod(pod, resource, List::Limits).units()),
        unified: rules.memory.map(|memory| memory.of_pod(pod)).unwrap_or_default(),
        ..Limits::default()
    }
}

/// `oom_score_adj` of a container's processes on a machine with this much memory: -997 to 1000, 1000 dies first.
pub fn oom_score_adj(pod: &Pod, role: Role, container: &Container, memory_bytes: u64) -> i64 {
    const GUARANTEED: i64 = -997;
    if spec::of(pod).priority.is_some_and(|priority| priority >= NODE_CRITICAL) {
        return GUARANTEED;
    }
    match QosClass::of(pod) {
        QosClass::Guaranteed => GUARANTEED,
        QosClass::BestEffort => 1000,
        QosClass::Burstable => burstable_score(pod, role, container, memory_bytes),
    }
}

/// The more of the machine's memory a container asked for, the later it dies; a sidecar no sooner than the application.
fn burstable_score(pod: &Pod, role: Role, container: &Container, memory_bytes: u64) -> i64 {
    let capacity = i64::try_from(memory_bytes).unwrap_or(i64::MAX).max(1);
    let request =
        |container: &Container| of_container(container, "memory", List::Requests).map_or(0, |amount| amount.units());
    let score = |bytes: i64| 1000 - 1000i64.saturating_mul(bytes) / capacity;
    let spare = unassigned_memory(pod);
    let own = score(request(container) + spare);
    let adjusted = match role {
        Role::Sidecar => {
            let smallest = spec::of(pod).containers.iter().map(request).min().unwrap_or(0);
            own.min(score(smallest + spare))
        }
        _ => own,
    };
    adjusted.clamp(3, 999)
}

/// Each container's part of the memory that the pod as a whole requests and no container does.
fn unassigned_memory(pod: &Pod) -> i64 {
    let Some(whole) = of_whole(pod, "memory", List::Requests) else { return 0 };
    let count = i64::try_from(spec::containers(pod).count()).unwrap_or(i64::MAX).max(1);
    let assigned = of_containers(pod, "memory", List::Requests).units();
    (whole.units() - assigned).max(0) / count
}

/// Who makes the groups (`cgroupDriver`): whoever makes those of the containers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Driver {
    /// This program, in the file system.
    #[default]
    Cgroupfs,
    /// systemd, which is asked for them.
    Systemd,
}

/// The place of a group of the tree, below the hierarchy: `group` is its path as [`pod_group`] has it, in the operator's `root`.
pub fn place(driver: Driver, root: &Path, group: &str) -> PathBuf {
    let path = root.join(group);
    match driver {
        Driver::Cgroupfs => path,
        Driver::Systemd => slices::place(&path),
    }
}

/// Why a group is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum GroupError {
    /// The kernel's reason.
    #[error(transparent)]
    Kernel(#[from] sys::Error),
    /// systemd's.
    #[error(transparent)]
    Systemd(#[from] systemd::SystemdError),
}

/// The tree on this machine.
#[derive(Debug, Clone)]
pub struct Tree {
    hierarchy: Hierarchy,
    root: PathBuf,
    driver: Driver,
    rules: Rules,
}

impl Tree {
    /// A tree in `hierarchy`, where `rules` hold for each pod.
    pub fn new(hierarchy: Hierarchy, rules: Rules) -> Self {
        Self { hierarchy, root: PathBuf::new(), driver: Driver::Cgroupfs, rules }
    }

    /// The same tree inside another group (`cgroupRoot`).
    #[must_use]
    pub fn below(self, root: &Path) -> Self {
        Self { root: root.to_owned(), ..self }
    }

    /// The same tree, made by another. systemd's is at the root of the hierarchy ([`Hierarchy::whole`]).
    #[must_use]
    pub fn by(self, driver: Driver) -> Self {
        Self { driver, ..self }
    }

    /// The group of all pods.
    pub fn root(&self) -> Cgroup {
        self.group(ROOT)
    }

    /// The group of a pod.
    pub fn pod(&self, pod: &Pod) -> Cgroup {
        self.group(pod_group(pod))
    }

    /// The groups that are no pod's: all of the machine, all pods, and the classes.
    pub fn shared(&self) -> Vec<Cgroup> {
        let classes = [QosClass::Burstable, QosClass::BestEffort].map(|class| self.group(class_group(class)));
        [self.hierarchy.group(""), self.root()].into_iter().chain(classes).collect()
    }

    fn group(&self, group: impl AsRef<str>) -> Cgroup {
        self.hierarchy.group(place(self.driver, &self.root, group.as_ref()))
    }

    /// Makes a group of the tree with limits. Repeating it changes nothing.
    fn ensure(&self, group: &Cgroup, limits: Limits) -> Result<(), GroupError> {
        let limits = self.present(limits);
        if self.driver == Driver::Systemd {
            slices::ensure(&self.hierarchy, group, &limits)?;
        }
        group.create()?;
        Ok(group.set(&limits)?)
    }

    /// Changes limits of a group that is there.
    fn set(&self, group: &Cgroup, limits: Limits) -> Result<(), GroupError> {
        let limits = self.present(limits);
        if limits == Limits::default() {
            return Ok(());
        }
        if self.driver == Driver::Systemd {
            slices::change(&self.hierarchy, group, &limits)?;
        }
        Ok(group.set(&limits)?)
    }

    /// Kills what is left in a group and removes it.
    fn clear(&self, group: &Cgroup) -> Result<(), GroupError> {
        if group.exists() {
            group.kill()?;
            if self.driver == Driver::Systemd {
                slices::end(group)?;
            }
        }
        Ok(group.delete()?)
    }

    /// Makes the groups of all pods and of the classes; `cpu_milli` and `memory_bytes` are what the node leaves to pods.
    ///
    /// # Errors
    /// Who makes them, and the reason.
    pub fn ensure_roots(&self, cpu_milli: i64, memory_bytes: Option<i64>) -> Result<(), GroupError> {
        let all = Limits { cpu_shares: Some(shares(cpu_milli)), memory_bytes, ..Limits::default() };
        self.ensure(&self.root(), all)?;
        for class in [QosClass::Burstable, QosClass::BestEffort] {
            let least = Limits { cpu_shares: Some(SHARES_MIN), ..Limits::default() };
            self.ensure(&self.group(class_group(class)), least)?;
        }
        Ok(())
    }

    /// Gives the Burstable class the CPU share that its pods asked for together, and the groups of many pods what of their
    /// memory is kept from reclaim.
    ///
    /// # Errors
    /// As [`Tree::ensure_roots`].
    pub fn share<'a>(&self, pods: impl Iterator<Item = &'a Pod> + Clone) -> Result<(), GroupError> {
        let [all, of_class] = self.rules.memory.map(|memory| memory.of_classes(pods.clone())).unwrap_or_default();
        self.set(&self.root(), Limits { unified: all, ..Limits::default() })?;
        let burstable = pods.filter(|pod| QosClass::of(pod) == QosClass::Burstable);
        let milli = burstable.map(|pod| of_pod(pod, "cpu", List::Requests)).sum::<Quantity>().milli();
        let limits = Limits { cpu_shares: Some(shares(milli)), unified: of_class, ..Limits::default() };
        self.set(&self.group(class_group(QosClass::Burstable)), limits)
    }

    /// Makes a pod's group with its limits, but for that of CPU time if the pod has CPUs of its own, which it would keep them
    /// from using wholly. Repeating it changes nothing.
    ///
    /// # Errors
    /// As [`Tree::ensure_roots`].
    pub fn ensure_pod(&self, pod: &Pod, has_own_cpus: bool) -> Result<Cgroup, GroupError> {
        let group = self.pod(pod);
        let limits = pod_limits(pod, &self.rules);
        let limits = match has_own_cpus {
            true => Limits { cpu_quota_us: Some(-1), cpu_period_us: Some(PERIOD_US), ..limits },
            false => limits,
        };
        self.ensure(&group, limits)?;
        Ok(group)
    }

    /// Changes one limit of a pod's group, which runs.
    ///
    /// # Errors
    /// As [`Tree::ensure_roots`].
    pub fn resize_pod(&self, pod: &Pod, part: Part) -> Result<(), GroupError> {
        let all = pod_limits(pod, &self.rules);
        let limits = match part {
            Part::Memory => Limits { memory_bytes: all.memory_bytes, unified: all.unified, ..Limits::default() },
            Part::Quota => {
                Limits { cpu_quota_us: all.cpu_quota_us, cpu_period_us: all.cpu_period_us, ..Limits::default() }
            }
            Part::Shares => Limits { cpu_shares: all.cpu_shares, ..Limits::default() },
        };
        self.set(&self.pod(pod), limits)
    }

    /// Kills what is left in a pod's group and removes it.
    ///
    /// # Errors
    /// `EBUSY` while a process does not die, or as [`Tree::ensure_roots`].
    pub fn remove_pod(&self, pod: &Pod) -> Result<(), GroupError> {
        self.clear(&self.pod(pod))
    }

    /// As [`Tree::remove_pod`], of a pod whose class is not known.
    ///
    /// # Errors
    /// As [`Tree::remove_pod`].
    pub fn remove(&self, uid: &str) -> Result<(), GroupError> {
        for class in [QosClass::Guaranteed, QosClass::Burstable, QosClass::BestEffort] {
            self.clear(&self.group(group_in(class, uid)))?;
        }
        Ok(())
    }

    /// The limits whose controllers this machine has: a node without the `pids` controller still runs pods.
    fn present(&self, limits: Limits) -> Limits {
        let has = |name| self.hierarchy.has_controller(name);
        let cpu = has("cpu");
        Limits {
            cpu_shares: limits.cpu_shares.filter(|_| cpu),
            cpu_quota_us: limits.cpu_quota_us.filter(|_| cpu),
            cpu_period_us: limits.cpu_period_us.filter(|_| cpu),
            memory_bytes: limits.memory_bytes.filter(|_| has("memory")),
            pids: limits.pids.filter(|_| has("pids")),
            hugepages: if has("hugetlb") { limits.hugepages } else { Vec::new() },
            // All of them are of memory.
            unified: if has("memory") { limits.unified } else { Vec::new() },
            ..limits
        }
    }
}

/// Keeps a group that is not the kubelet's to what is reserved for it (`enforceNodeAllocatable`).
///
/// # Errors
/// There is no such group, or the kernel's reason.
pub fn keep_reserved(
    group: &Cgroup,
    reserved: &std::collections::BTreeMap<String, Quantity>,
    cpu_only: bool,
) -> Result<(), ReserveError> {
    if !group.exists() {
        return Err(ReserveError::Missing(group.path().to_owned()));
    }
    let all = |name: &str| reserved.get(name).filter(|_| !cpu_only).map(|amount| amount.units());
    group.set(&Limits {
        cpu_shares: reserved.get("cpu").map(|amount| shares(amount.milli())),
        memory_bytes: all("memory"),
        pids: all("pid"),
        ..Limits::default()
    })?;
    Ok(())
}

/// Why a group is not kept to what is reserved for it.
#[derive(Debug, thiserror::Error)]
pub enum ReserveError {
    /// Whoever runs in it has to make it.
    #[error("the control group {0:?} does not exist; make it, or name another one")]
    Missing(PathBuf),
    /// The kernel does not.
    #[error(transparent)]
    Kernel(#[from] sys::Error),
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p", "uid": "u"}, "spec": spec})).unwrap()
    }

    #[test]
    fn groups_by_class() {
        let guaranteed = json!({"containers": [{"name": "c", "resources": {"limits": {"cpu": "1", "memory": "1Gi"}}}]});
        let burstable = json!({"containers": [{"name": "c", "resources": {"requests": {"cpu": "1"}}}]});
        for (spec, expect) in [
            (guaranteed, "kubepods/podu"),
            (burstable, "kubepods/burstable/podu"),
            (json!({"containers": [{"name": "c"}]}), "kubepods/besteffort/podu"),
        ] {
            assert_eq!(pod_group(&pod(spec)), expect);
        }
    }

    #[test]
    fn numbers() {
        assert_eq!([shares(0), shares(1000), shares(100), shares(1_000_000)], [2, 1024, 102, SHARES_MAX]);
        let quota_us = |period, milli| Rules { cpu_period_us: period, ..Rules::default() }.quota_us(milli);
        let period = Some(PERIOD_US);
        assert_eq!([0, 500, 1].map(|milli| quota_us(period, milli)), [None, Some(50_000), Some(1000)]);
        assert_eq!([quota_us(Some(5000), 500), quota_us(None, 500)], [Some(2500), None]);
    }

    #[test]
    fn huge_pages_that_nobody_asked_for_are_nobodys() {
        let rules = Rules { huge_pages: vec!["64KB".into(), "2MB".into(), "1GB".into()], ..Rules::default() };
        let limits = |resources: serde_json::Value| {
            let container = |name: &str| json!({"name": name, "resources": {"limits": resources}});
            let pod = pod(json!({"containers": [container("a"), container("b")]}));
            pod_limits(&pod, &rules).hugepages.into_iter().map(|(_, bytes)| bytes).collect::<Vec<_>>()
        };
        assert_eq!(limits(json!({})), [0, 0, 0]);
        assert_eq!(limits(json!({"hugepages-2Mi": "4Mi", "hugepages-64Ki": "64Ki"})), [128 << 10, 8 << 20, 0]);
        assert_eq!(limits(json!({"hugepages-1Gi": "1Gi"})), [0, 0, 2 << 30]);
        assert_eq!([64 << 10, 2 << 20, 1 << 30].map(page_size), ["64KB", "2MB", "1GB"]);
    }

    #[test]
    fn a_pod_has_a_limit_only_if_all_containers_have() {
        let one = json!({"name": "a", "resources": {"requests": {"cpu": "100m"}, "limits": {"cpu": "500m", "memory": "64Mi"}}});
        let limits = pod_limits(&pod(json!({"containers": [one.clone(), {"name": "b"}]})), &Rules::default());
        assert_eq!((limits.cpu_shares, limits.cpu_quota_us, limits.memory_bytes), (Some(102), None, None));
        let rules = Rules { pids: Some(7), ..Rules::default() };
        let limits = pod_limits(&pod(json!({"containers": [one.clone(), one]})), &rules);
        assert_eq!((limits.cpu_shares, limits.cpu_quota_us), (Some(204), Some(100_000)));
        assert_eq!((limits.memory_bytes, limits.pids), (Some(128 << 20), Some(7)));
    }

    #[test]
    fn init_containers_count_by_their_peak() {
        let pod = pod(json!({
            "initContainers": [
                {"name": "s", "restartPolicy": "Always", "resources": {"requests": {"cpu": "100m"}}},
                {"name": "i", "resources": {"requests": {"cpu": "1"}}}],
            "containers": [{"name": "c", "resources": {"requests": {"cpu": "200m"}}}],
            "overhead": {"cpu": "10m"}
        }));
        assert_eq!(of_pod(&pod, "cpu", List::Requests).milli(), 1110);
    }

    #[test]
    fn oom_scores() {
        let score = |spec| {
            let pod = pod(spec);
            let (role, container) = spec::containers(&pod).next().unwrap();
            oom_score_adj(&pod, role, container, 1 << 30)
        };
        let asking =
            |memory: &str| json!({"containers": [{"name": "c", "resources": {"requests": {"memory": memory}}}]});
        assert_eq!(score(asking("512Mi")), 500);
        assert_eq!(score(asking("1Gi")), 3);
        assert_eq!(score(asking("1")), 999);
        assert_eq!(score(json!({"containers": [{"name": "c"}]})), 1000);
        assert_eq!(score(json!({"priority": 2_000_001_000, "containers": [{"name": "c"}]})), -997);
        let sidecar = json!({
            "initContainers": [{"name": "s", "restartPolicy": "Always"}],
            "containers": [{"name": "c", "resources": {"requests": {"memory": "512Mi"}}}]});
        assert_eq!(score(sidecar), 500);
    }
}
