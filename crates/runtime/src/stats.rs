//! What containers and sandboxes use, as CRI reports it.
//!
//! ```text
//! ContainerTarget, SandboxTarget (whose?) ─► control groups ──┐
//!                                            network ─────────┼─► ContainerStats, PodSandboxStats
//!                 Rates (the last look) ─────────────────────►│
//!                 Writable (measured in the background) ─────►┘
//! ```
//! Nothing is read unless somebody asks.

mod metrics;
mod open;
mod rate;
mod writable;

use std::path::Path;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use cri::{Error, v1};
use image::Images;
use network::Network;
use sys::cgroup::{self, Cgroup};

use self::metrics::{Filesystem, Known, NetworkRow, Row};
pub(crate) use self::metrics::{Subject, descriptors};
use self::open::Open;
use self::rate::Rates;
use self::writable::Writable;

/// A container to be looked at.
#[derive(Debug, Clone, Default)]
pub(crate) struct ContainerTarget {
    /// Its id, name, labels and annotations.
    pub(crate) attributes: v1::ContainerAttributes,
    /// Its control group, while it runs.
    pub(crate) group: Option<Cgroup>,
    /// Who it is in metrics.
    pub(crate) subject: Subject,
    /// When it was started, in nanoseconds since 1970.
    pub(crate) started_at: i64,
    /// The resources that it was given.
    pub(crate) resources: v1::LinuxContainerResources,
}

/// A sandbox to be looked at.
#[derive(Debug, Clone)]
pub(crate) struct SandboxTarget {
    /// Its id, name, labels and annotations.
    pub(crate) attributes: v1::PodSandboxAttributes,
    /// The control group of the whole pod.
    pub(crate) group: Cgroup,
    /// Whether it has a network of its own.
    pub(crate) network: bool,
    /// Its containers.
    pub(crate) containers: Vec<ContainerTarget>,
}

/// The statistics of a node's containers.
#[derive(Debug)]
pub(crate) struct Stats {
    images: Arc<Images>,
    network: Arc<Network>,
    rates: Arc<Rates>,
    writable: Writable,
}

/// A control group as it was at one moment.
struct Look {
    at: SystemTime,
    stats: cgroup::Stats,
    nano_cores: Option<u64>,
}

impl Stats {
    /// Needs a tokio runtime: what containers have written is measured in a task that ends with this value.
    pub(crate) fn new(images: Arc<Images>, network: Arc<Network>) -> Self {
        let store = Arc::clone(&images);
        let measure = move |id: String| -> writable::Measuring {
            let images = Arc::clone(&store);
            Box::pin(async move { images.writable_usage(&id).await })
        };
        Self { images, network, rates: Arc::default(), writable: Writable::new(measure) }
    }

    /// What one container uses.
    pub(crate) async fn container(&self, target: ContainerTarget) -> v1::ContainerStats {
        let id = target.attributes.id.clone();
        self.containers(vec![target]).await.pop().unwrap_or_else(|| v1::ContainerStats {
            attributes: Some(v1::ContainerAttributes { id, ..Default::default() }),
            ..Default::default()
        })
    }

    /// What containers use, in their order.
    pub(crate) async fn containers(&self, targets: Vec<ContainerTarget>) -> Vec<v1::ContainerStats> {
        let ids: Vec<String> = targets.iter().map(|target| target.attributes.id.clone()).collect();
        let written = self.writable.of(&ids).await;
        let groups = targets.iter().map(|target| (target.attributes.id.clone(), target.group.clone())).collect();
        let looks = self.look(groups).await;
        let parts = targets.into_iter().zip(looks).zip(written);
        parts.map(|((target, look), written)| self.container_stats(target, look, written)).collect()
    }

    /// What a sandbox and its containers use.
    ///
    /// # Errors
    /// The kernel does not tell the counters of its network.
    pub(crate) async fn sandbox(&self, target: SandboxTarget) -> Result<v1::PodSandboxStats, Error> {
        let id = target.attributes.id.clone();
        let mut looks = self.look(vec![(id.clone(), Some(target.group))]).await;
        let look = looks.pop().flatten();
        let network = if target.network { Some(self.network_usage(&id).await?) } else { None };
        let groups: Vec<_> = target.containers.iter().map(|one| one.group.clone()).collect();
        let processes = blocking(move || groups.iter().flatten().map(|group| group.stats().pids.count).sum()).await;
        let linux = v1::LinuxPodSandboxStats {
            cpu: look.as_ref().map(cpu),
            memory: look.as_ref().map(memory),
            network,
            process: Some(v1::ProcessUsage {
                timestamp: nanoseconds(SystemTime::now()),
                process_count: some(processes.unwrap_or_default()),
            }),
            containers: self.containers(target.containers).await,
            io: look.as_ref().and_then(io),
        };
        Ok(v1::PodSandboxStats { attributes: Some(target.attributes), linux: Some(linux), windows: None })
    }

    /// A sandbox and its containers as metrics.
    ///
    /// # Errors
    /// The kernel does not tell the counters of its network.
    pub(crate) async fn metrics(&self, target: SandboxTarget) -> Result<v1::PodSandboxMetrics, Error> {
        let id = target.attributes.id.clone();
        let pod = target.attributes.metadata.unwrap_or_default();
        let subject = Subject { pod: pod.name, namespace: pod.namespace, id: id.clone(), ..Subject::default() };
        let timestamp = nanoseconds(SystemTime::now());
        let interfaces = match target.network {
            true => self.network.stats(&id).await.map_err(|error| Error::internal(&error))?,
            false => Vec::new(),
        };
        let ids: Vec<String> = target.containers.iter().map(|one| one.attributes.id.clone()).collect();
        let written = self.writable.of(&ids).await;
        let directory = self.images.state_dir().to_owned();
        let containers = target.containers;
        let container_metrics = blocking(move || {
            let filesystem = filesystem(&directory);
            let parts = containers.iter().zip(written);
            parts.map(|(one, written)| container_metrics(one, written, filesystem, timestamp)).collect()
        });
        Ok(v1::PodSandboxMetrics {
            pod_sandbox_id: id,
            metrics: metrics::of_network(&subject, &interfaces, timestamp),
            container_metrics: container_metrics.await.unwrap_or_default(),
        })
    }

    /// Sandboxes, their containers and other groups as Prometheus reads them.
    pub(crate) async fn text(&self, targets: Vec<SandboxTarget>, groups: Vec<Cgroup>) -> String {
        let (mut networks, mut containers) = (Vec::new(), Vec::new());
        for target in targets {
            let id = target.attributes.id;
            let pod = target.attributes.metadata.unwrap_or_default();
            let subject = Subject { pod: pod.name, namespace: pod.namespace, id: id.clone(), ..Subject::default() };
            // Of one that is just being stopped there is nothing to say.
            if target.network
                && let Ok(interfaces) = self.network.stats(&id).await
            {
                networks.push(NetworkRow { subject, group: path_of(&target.group), interfaces });
            }
            containers.extend(target.containers);
        }
        let ids: Vec<String> = containers.iter().map(|one| one.attributes.id.clone()).collect();
        let written = self.writable.of(&ids).await;
        let directory = self.images.state_dir().to_owned();
        let text = blocking(move || {
            let filesystem = filesystem(&directory);
            let others = groups.iter().map(|group| {
                let known = Known { stats: with_machine(group), io: group.io(), ..Known::default() };
                Row { group: path_of(group), known, ..Row::default() }
            });
            let own = containers.iter().zip(written).filter_map(|(one, written)| {
                let group = path_of(one.group.as_ref()?);
                Some(Row { subject: one.subject.clone(), group, known: known(one, written, filesystem)? })
            });
            metrics::text(&others.chain(own).collect::<Vec<_>>(), &networks)
        });
        text.await.unwrap_or_default()
    }

    /// Forgets what was noted about a container or sandbox that is gone.
    pub(crate) fn forget(&self, id: &str) {
        self.rates.forget(id);
        self.writable.forget(id);
    }

    /// Reads control groups where that holds up nobody: a hundred pods have a thousand files.
    async fn look(&self, groups: Vec<(String, Option<Cgroup>)>) -> Vec<Option<Look>> {
        let (length, rates) = (groups.len(), Arc::clone(&self.rates));
        let looks = blocking(move || {
            groups.iter().map(|(id, group)| Some(look(id, group.as_ref()?, &rates))).collect::<Vec<_>>()
        });
        looks.await.unwrap_or_else(|| (0..length).map(|_| None).collect())
    }

    fn container_stats(
        &self,
        target: ContainerTarget,
        look: Option<Look>,
        written: Option<(image::Usage, SystemTime)>,
    ) -> v1::ContainerStats {
        let filesystem = |(usage, at)| crate::images::filesystem_usage(self.images.state_dir(), usage, at);
        v1::ContainerStats {
            attributes: Some(target.attributes),
            cpu: look.as_ref().map(cpu),
            memory: look.as_ref().map(memory),
            writable_layer: written.map(filesystem),
            swap: look.as_ref().map(swap),
            io: look.as_ref().and_then(io),
        }
    }

    async fn network_usage(&self, sandbox_id: &str) -> Result<v1::NetworkUsage, Error> {
        let interfaces = self.network.stats(sandbox_id).await.map_err(|error| Error::internal(&error))?;
        Ok(network_usage(&interfaces, SystemTime::now()))
    }
}

/// Work on files that never waits long, away from the async threads; `None` only when the runtime is ending.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => Some(done),
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => None,
    }
}

fn container_metrics(
    target: &ContainerTarget,
    written: Option<(image::Usage, SystemTime)>,
    filesystem: Option<Filesystem>,
    timestamp: i64,
) -> v1::ContainerMetrics {
    let known = known(target, written, filesystem);
    let metrics = known.map(|known| metrics::of_container(&target.subject, &known, timestamp));
    v1::ContainerMetrics { container_id: target.attributes.id.clone(), metrics: metrics.unwrap_or_default() }
}

/// What is known of a container that runs.
fn known(
    target: &ContainerTarget,
    written: Option<(image::Usage, SystemTime)>,
    filesystem: Option<Filesystem>,
) -> Option<Known> {
    let group = target.group.as_ref()?;
    let processes = group.processes();
    Some(Known {
        stats: group.stats(),
        io: group.io(),
        processes: u64::try_from(processes.len()).unwrap_or(0),
        open: Open::of(&processes, Path::new("/proc")),
        files_max: open::files_max(&processes, Path::new("/proc")),
        started_at: target.started_at,
        resources: target.resources.clone(),
        written: written.map(|(usage, _)| usage),
        filesystem,
    })
}

/// A group's counters. Version 2 counts the memory of no root: what the machine has in use stands for it.
fn with_machine(group: &Cgroup) -> cgroup::Stats {
    let mut stats = group.stats();
    if group.path().as_os_str().is_empty() && stats.memory.usage_bytes == 0 {
        let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
        let bytes = |name: &str| {
            let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) * 1024
        };
        let total = bytes("MemTotal");
        stats.memory.usage_bytes = total.saturating_sub(bytes("MemFree"));
        stats.memory.working_set_bytes = total.saturating_sub(bytes("MemAvailable"));
        stats.memory.rss_bytes = bytes("AnonPages");
        stats.memory.cache_bytes = bytes("Cached");
    }
    stats
}

/// A group's path as others write it.
fn path_of(group: &Cgroup) -> String {
    format!("/{}", group.path().display())
}

fn filesystem(directory: &Path) -> Option<Filesystem> {
    let found = sys::rustix::fs::statvfs(directory).ok()?;
    Some(Filesystem {
        bytes: found.f_blocks.saturating_mul(found.f_frsize),
        inodes: found.f_files,
        inodes_free: found.f_ffree,
    })
}

fn look(id: &str, group: &Cgroup, rates: &Rates) -> Look {
    let (at, now) = (SystemTime::now(), std::time::Instant::now());
    let stats = group.stats();
    Look { at, nano_cores: rates.note(id, stats.cpu.usage_ns, now), stats }
}

/// Nanoseconds since 1970, as CRI has its times.
pub(crate) fn nanoseconds(at: SystemTime) -> i64 {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[expect(clippy::unnecessary_wraps, reason = "CRI wraps every number in an optional message")]
fn some(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

fn cpu(look: &Look) -> v1::CpuUsage {
    v1::CpuUsage {
        timestamp: nanoseconds(look.at),
        usage_core_nano_seconds: some(look.stats.cpu.usage_ns),
        usage_nano_cores: look.nano_cores.and_then(some),
        psi: look.stats.cpu_pressure.as_ref().map(pressure),
    }
}

fn memory(look: &Look) -> v1::MemoryUsage {
    let memory = &look.stats.memory;
    v1::MemoryUsage {
        timestamp: nanoseconds(look.at),
        working_set_bytes: some(memory.working_set_bytes),
        // Without a limit there is no such number.
        available_bytes: memory.limit_bytes.and_then(|limit| some(limit.saturating_sub(memory.working_set_bytes))),
        usage_bytes: some(memory.usage_bytes),
        rss_bytes: some(memory.rss_bytes),
        page_faults: some(memory.page_faults),
        major_page_faults: some(memory.major_page_faults),
        psi: look.stats.memory_pressure.as_ref().map(pressure),
    }
}

fn swap(look: &Look) -> v1::SwapUsage {
    let memory = &look.stats.memory;
    v1::SwapUsage {
        timestamp: nanoseconds(look.at),
        swap_available_bytes: memory.swap_limit_bytes.and_then(|limit| some(limit.saturating_sub(memory.swap_bytes))),
        swap_usage_bytes: some(memory.swap_bytes),
    }
}

fn io(look: &Look) -> Option<v1::IoUsage> {
    let psi = look.stats.io_pressure.as_ref().map(pressure)?;
    Some(v1::IoUsage { timestamp: nanoseconds(look.at), psi: Some(psi) })
}

fn pressure(of: &cgroup::Pressure) -> v1::PsiStats {
    // The kernel counts microseconds, CRI nanoseconds.
    let data = |([avg10, avg60, avg300], total_us): ([f64; 3], u64)| v1::PsiData {
        total: total_us.saturating_mul(1000),
        avg10,
        avg60,
        avg300,
    };
    v1::PsiStats { full: Some(data(of.full)), some: Some(data(of.some)) }
}

/// Name of the interface that counts as the pod's own, as CNI and the built-in bridge call it.
const DEFAULT_INTERFACE: &str = "eth0";

fn network_usage(interfaces: &[network::InterfaceStats], at: SystemTime) -> v1::NetworkUsage {
    let usage = |one: &network::InterfaceStats| v1::NetworkInterfaceUsage {
        name: one.name.clone(),
        rx_bytes: some(one.rx_bytes),
        rx_errors: some(one.rx_errors),
        tx_bytes: some(one.tx_bytes),
        tx_errors: some(one.tx_errors),
    };
    let default = interfaces.iter().find(|one| one.name == DEFAULT_INTERFACE).or(interfaces.first());
    v1::NetworkUsage {
        timestamp: nanoseconds(at),
        default_interface: default.map(usage),
        interfaces: interfaces.iter().map(usage).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn a_look(change: impl FnOnce(&mut cgroup::Stats)) -> Look {
        let mut stats = cgroup::Stats::default();
        change(&mut stats);
        Look { at: UNIX_EPOCH + std::time::Duration::from_nanos(7), stats, nano_cores: None }
    }

    #[test]
    fn memory_has_what_is_available_below_a_limit() {
        let look = a_look(|stats| {
            stats.memory.usage_bytes = 100;
            stats.memory.working_set_bytes = 60;
            stats.memory.limit_bytes = Some(80);
            stats.memory.rss_bytes = 50;
        });
        let found = memory(&look);
        assert_eq!((found.timestamp, found.usage_bytes, found.rss_bytes), (7, some(100), some(50)));
        assert_eq!((found.working_set_bytes, found.available_bytes), (some(60), some(20)));
        let over = memory(&a_look(|stats| {
            stats.memory.working_set_bytes = 60;
            stats.memory.limit_bytes = Some(50);
        }));
        assert_eq!(over.available_bytes, some(0));
        assert_eq!(memory(&a_look(|_| {})).available_bytes, None);
    }

    #[test]
    fn swap_has_what_is_available_below_a_limit() {
        let look = a_look(|stats| {
            stats.memory.swap_bytes = 10;
            stats.memory.swap_limit_bytes = Some(30);
        });
        assert_eq!((swap(&look).swap_usage_bytes, swap(&look).swap_available_bytes), (some(10), some(20)));
        assert_eq!(swap(&a_look(|_| {})).swap_available_bytes, None);
    }

    #[test]
    fn pressure_is_in_nanoseconds_and_absent_where_the_kernel_has_none() {
        let measured = cgroup::Pressure { some: ([1.0, 2.0, 3.0], 5), full: ([0.0; 3], 2) };
        let look = a_look(|stats| (stats.io_pressure, stats.cpu_pressure) = (Some(measured), Some(measured)));
        for psi in [io(&look).unwrap().psi.unwrap(), cpu(&look).psi.unwrap()] {
            let waiting = psi.some.unwrap();
            assert_eq!((waiting.total, waiting.avg10, waiting.avg300), (5000, 1.0, 3.0));
            assert_eq!(psi.full.unwrap().total, 2000);
        }
        assert_eq!((io(&a_look(|_| {})), memory(&look).psi), (None, None));
    }

    #[test]
    fn the_default_interface_is_eth0_or_the_first() {
        let named = |names: &[&str]| {
            let stats =
                |name: &&str| network::InterfaceStats { name: (*name).into(), rx_bytes: 9, ..Default::default() };
            let found = network_usage(&names.iter().map(stats).collect::<Vec<_>>(), UNIX_EPOCH);
            (found.default_interface.map(|one| one.name), found.interfaces.len())
        };
        assert_eq!(named(&["net1", "eth0"]), (Some("eth0".into()), 2));
        assert_eq!(named(&["net1", "net2"]), (Some("net1".into()), 2));
        assert_eq!(named(&[]), (None, 0));
    }
}
