//! `conformance churn`: thousands of pods that come and go, and what the runtime has of them afterwards.
//!
//! ```text
//! workers ─► pod: run, create, start, stop, remove ─► orlop runtime
//!   ╰─ all of them wait ten times ─► what the runtime has: memory, descriptors, threads, mounts, groups, files, …
//! ```
//!
//! After a fifth of the pods it has what it needs; from then on nothing may grow.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use cri::{RuntimeService as _, v1};
use testkit::pace;
use tokio::task::{JoinSet, LocalSet};

use super::served::{self, Daemon, IMAGE, fsck, group_of, nothing_is_left, print_log};
use crate::demo::Stage;
use crate::voyage::leftovers;
use crate::workspace::build_release;

/// How to run it.
#[derive(clap::Args)]
pub(crate) struct ChurnOptions {
    /// How many pods come and go
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(100..))]
    pods: u64,
    /// How many of them are under way at a time
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..))]
    at_once: u64,
    /// Test this program instead of building one
    #[arg(long, value_name = "PROGRAM")]
    orlop: Option<PathBuf>,
}

/// Those in a run of all tests.
const QUICK: ChurnOptions = ChurnOptions { pods: 300, at_once: 8, orlop: None };
/// How often it is looked.
const LOOKS: u64 = 10;
/// With which look the later ones are compared.
const FIRST: usize = 1;
/// No call takes longer, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(120);
/// What is done beside pods (links that are removed, namespaces that are made ahead) has ended when this many looks in a row
/// are the same.
const SAME: usize = 3;
const BETWEEN_LOOKS: Duration = Duration::from_millis(200);

/// The command.
pub(super) fn run(options: &ChurnOptions) -> anyhow::Result<()> {
    testkit::host::install(crate::images::TOOLS)?;
    testkit::host::install(&[testkit::registry::TOOL])?;
    let orlop = options.orlop.clone().map_or_else(build_release, |program| Ok(std::path::absolute(program)?))?;
    try_with(&orlop, options).map(drop)
}

/// A few hundred pods, for a run of all tests; how many points there were.
pub(crate) fn quick(orlop: &Path) -> anyhow::Result<usize> {
    try_with(orlop, &QUICK)
}

fn try_with(orlop: &Path, options: &ChurnOptions) -> anyhow::Result<usize> {
    let stage = Stage::set_up(orlop, false)?;
    let before = (leftovers::find(stage.dir.path())?, fsck(&stage)?);
    println!("churn: {} pods, {} at a time", options.pods, options.at_once);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(LocalSet::new().run_until(churn(&stage, options)));
    if outcome.is_err() {
        print_log(&stage);
    }
    let Churned { looks, took } = outcome?;
    let unowned: Vec<String> = fsck(&stage)?.into_iter().filter(|line| !before.1.contains(line)).collect();
    ensure!(unowned.is_empty(), "orlop fsck says:\n  {}", unowned.join("\n  "));
    nothing_is_left(&stage, &before.0)?;
    let grown = grown(&looks[FIRST], &looks[looks.len() - 1]);
    ensure!(grown.is_empty(), "what {} pods have left:\n  {}", options.pods, grown.join("\n  "));
    let rate = options.pods as f64 / took.as_secs_f64();
    println!("ok   {} pods came and went, {rate:.0} a second, and nothing grew", options.pods);
    Ok(1)
}

/// What there is after so many pods.
#[derive(Debug, Clone, PartialEq)]
struct Look {
    pods: u64,
    /// Of the runtime's process, in KiB.
    memory: u64,
    counts: Counts,
}

/// Things that can be counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Counts {
    /// Of the runtime's process.
    descriptors: usize,
    threads: usize,
    /// Network namespaces that the runtime holds.
    namespaces: usize,
    /// Of its directories, where it sees mounts.
    mounts: usize,
    /// That were started with its directories.
    processes: usize,
    groups: usize,
    /// Network interfaces.
    links: usize,
    /// Entries in all of its directories.
    files: usize,
}

/// Each count with its name and by how much it may differ: threads come and go with the work, and descriptors with them.
fn columns(counts: &Counts) -> [(&'static str, usize, usize); 8] {
    [
        ("descriptors", counts.descriptors, 16),
        ("threads", counts.threads, 16),
        ("namespaces", counts.namespaces, 4),
        ("mounts", counts.mounts, 0),
        ("processes", counts.processes, 0),
        ("groups", counts.groups, 0),
        ("links", counts.links, 4),
        ("files", counts.files, 8),
    ]
}

/// What has grown from one look to a later one by more than it may.
fn grown(first: &Look, last: &Look) -> Vec<String> {
    let counts = columns(&first.counts).into_iter().zip(columns(&last.counts));
    let counts = counts.map(|((name, before, slack), (_, after, _))| (name, before as u64, after as u64, slack as u64));
    // An allocator keeps some of what was needed at the busiest moment.
    let memory = ("KiB of memory", first.memory, last.memory, first.memory / 10 + (4 << 10));
    let of = |from: u64| format!("(after {from} pods)");
    counts
        .chain([memory])
        .filter(|(_, before, after, slack)| *after > before + slack)
        .map(|(name, before, after, _)| format!("{before} {name} {}, {after} {}", of(first.pods), of(last.pods)))
        .collect()
}

impl fmt::Display for Look {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:>6} pods  {:>6.1} MiB", self.pods, self.memory as f64 / 1024.0)?;
        columns(&self.counts).iter().try_for_each(|(name, count, _)| write!(f, "  {count} {name}"))
    }
}

/// What came of it.
struct Churned {
    looks: Vec<Look>,
    took: Duration,
}

async fn churn(stage: &Stage, options: &ChurnOptions) -> anyhow::Result<Churned> {
    let daemon = Daemon::start(stage)?;
    let shared = Arc::new(Shared {
        client: cri::Client::new(&daemon.socket)?,
        logs: stage.dir.path().join("logs"),
        group: format!("/{}", group_of(stage)),
        next: AtomicU64::new(0),
    });
    served::pull(&shared.client).await?;
    let (mut looks, mut took) = (Vec::new(), Duration::ZERO);
    for look in 1..=LOOKS {
        let end = options.pods * look / LOOKS;
        let begin = Instant::now();
        let mut workers = JoinSet::new();
        for _ in 0..options.at_once {
            workers.spawn_local(work(Arc::clone(&shared), end));
        }
        while let Some(ended) = workers.join_next().await {
            ended??;
        }
        took += begin.elapsed();
        shared.next.store(end, Ordering::Relaxed);
        let look = settled(stage, &daemon, end).await?;
        println!("{look}");
        looks.push(look);
    }
    daemon.end()?;
    Ok(Churned { looks, took })
}

/// Looks until nothing changes any more.
async fn settled(stage: &Stage, daemon: &Daemon, pods: u64) -> anyhow::Result<Look> {
    let deadline = Instant::now() + pace::stretched(PATIENCE);
    let (mut last, mut same) = (look(stage, daemon, pods)?, 1);
    // Threads that have nothing to do end by themselves, some seconds later.
    while same < SAME && Instant::now() < deadline {
        tokio::time::sleep(pace::stretched(BETWEEN_LOOKS)).await; // observed from outside, as an operator would
        let now = look(stage, daemon, pods)?;
        same = if now.counts == last.counts { same + 1 } else { 1 };
        last = now;
    }
    Ok(last)
}

fn look(stage: &Stage, daemon: &Daemon, pods: u64) -> anyhow::Result<Look> {
    let process = PathBuf::from(format!("/proc/{}", daemon.pid()));
    let status = std::fs::read_to_string(process.join("status")).context("the runtime has ended")?;
    let number = |field: &str| -> anyhow::Result<u64> {
        let line = status.lines().find_map(|line| line.strip_prefix(field)).with_context(|| format!("no {field}"))?;
        Ok(line.split_whitespace().next().context("a number")?.parse()?)
    };
    let fds: Vec<PathBuf> = process.join("fd").read_dir()?.flatten().map(|entry| entry.path()).collect();
    let is_network = |fd: &&PathBuf| fd.read_link().is_ok_and(|to| to.to_string_lossy().starts_with("net:["));
    let links = leftovers::interfaces()?.len();
    // Others on this machine have mounts, too.
    let own = stage.dir.path().display().to_string();
    let mounts = std::fs::read_to_string(process.join("mountinfo"))?;
    let dirs = ["state", "run", "logs"].map(|dir| stage.dir.path().join(dir));
    let counts = Counts {
        namespaces: fds.iter().filter(is_network).count(),
        descriptors: fds.len(),
        threads: usize::try_from(number("Threads:")?)?,
        mounts: mounts.lines().filter(|line| line.contains(&own)).count(),
        processes: processes(&own)?,
        groups: leftovers::control_groups_named(&group_of(stage))?.len(),
        links,
        files: dirs.iter().map(|dir| entries(dir)).sum(),
    };
    Ok(Look { pods, memory: number("VmRSS:")?, counts })
}

/// The processes in whose environment `own` stands, but for the registry.
fn processes(own: &str) -> anyhow::Result<usize> {
    let of_own = |process: &Path| {
        // A process may end while it is looked at.
        let read = |name: &str| std::fs::read(process.join(name)).unwrap_or_default();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        text(read("environ")).contains(own) && !text(read("cmdline")).contains("docker-registry")
    };
    Ok(Path::new("/proc").read_dir()?.flatten().filter(|entry| of_own(&entry.path())).count())
}

/// How much there is in a directory; what goes meanwhile does not count.
fn entries(dir: &Path) -> usize {
    let entries = dir.read_dir().into_iter().flatten().flatten();
    entries
        .map(|entry| {
            1 + if entry.file_type().is_ok_and(|kind| kind.is_dir()) { self::entries(&entry.path()) } else { 0 }
        })
        .sum()
}

/// What all workers know.
struct Shared {
    client: cri::Client,
    logs: PathBuf,
    /// The control group of all pods.
    group: String,
    /// The number of the next pod.
    next: AtomicU64,
}

/// Lives pods until number `end` is due.
async fn work(shared: Arc<Shared>, end: u64) -> anyhow::Result<()> {
    loop {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        if number >= end {
            return Ok(());
        }
        let lived = tokio::time::timeout(pace::stretched(PATIENCE), live(&shared, number)).await;
        lived
            .unwrap_or_else(|_| Err(anyhow::anyhow!("it takes longer than {PATIENCE:?}")))
            .with_context(|| format!("pod {number}"))?;
    }
}

/// The whole life of a pod: every other one ends by itself, the rest is killed; every fourth one has a command run in it.
async fn live(shared: &Shared, number: u64) -> anyhow::Result<()> {
    let ends_itself = number.is_multiple_of(2);
    let script = if ends_itself { "echo here; exit 3" } else { "echo here; exec sleep 1000" };
    let name = format!("pod-{number}");
    let config = v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata { name: name.clone(), uid: name.clone(), ..Default::default() }),
        hostname: name.clone(),
        log_directory: shared.logs.join(&name).to_string_lossy().into_owned(),
        linux: Some(v1::LinuxPodSandboxConfig { cgroup_parent: shared.group.clone(), ..Default::default() }),
        ..Default::default()
    };
    let request = v1::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
    let client = &shared.client;
    let pod_sandbox_id = client.run_pod_sandbox(request).await.context("RunPodSandbox")?.pod_sandbox_id;
    let request = v1::CreateContainerRequest {
        pod_sandbox_id: pod_sandbox_id.clone(),
        config: Some(v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "main".to_owned(), attempt: 0 }),
            image: Some(v1::ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
            command: ["sh", "-c", script].map(str::to_owned).to_vec(),
            log_path: "main/0.log".to_owned(),
            ..Default::default()
        }),
        sandbox_config: Some(config),
    };
    let container_id = client.create_container(request).await.context("CreateContainer")?.container_id;
    let request = v1::StartContainerRequest { container_id: container_id.clone() };
    client.start_container(request).await.context("StartContainer")?;
    if number % 4 == 1 {
        let cmd = vec!["true".to_owned()];
        let request = v1::ExecSyncRequest { container_id: container_id.clone(), cmd, timeout: 0 };
        let code = client.exec_sync(request).await.context("ExecSync")?.exit_code;
        ensure!(code == 0, "the command ended with {code}");
    }
    if ends_itself {
        until_ended(client, &container_id).await?;
    }
    let request = v1::StopContainerRequest { container_id: container_id.clone(), timeout: 0 };
    client.stop_container(request).await.context("StopContainer")?;
    let code = status(client, &container_id).await?.exit_code;
    ensure!(code == if ends_itself { 3 } else { 137 }, "it ended with {code}");
    let request = v1::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
    client.stop_pod_sandbox(request).await.context("StopPodSandbox")?;
    let request = v1::RemovePodSandboxRequest { pod_sandbox_id };
    client.remove_pod_sandbox(request).await.context("RemovePodSandbox")?;
    // A kubelet removes the logs.
    std::fs::remove_dir_all(shared.logs.join(name)).context("remove its logs")
}

async fn status(client: &cri::Client, container_id: &str) -> anyhow::Result<v1::ContainerStatus> {
    let request = v1::ContainerStatusRequest { container_id: container_id.to_owned(), verbose: false };
    client.container_status(request).await.context("ContainerStatus")?.status.context("a status")
}

async fn until_ended(client: &cri::Client, container_id: &str) -> anyhow::Result<()> {
    while status(client, container_id).await?.state() != v1::ContainerState::ContainerExited {
        tokio::time::sleep(Duration::from_millis(5)).await; // observed from outside, as an operator would
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(pods: u64, memory: u64, descriptors: usize, mounts: usize) -> Look {
        Look { pods, memory, counts: Counts { descriptors, mounts, ..Counts::default() } }
    }

    #[test]
    fn what_grows_is_told_and_what_varies_is_not() {
        let first = look(2_000, 30 << 10, 40, 25);
        assert_eq!(grown(&first, &look(10_000, 36 << 10, 56, 25)), Vec::<String>::new());
        assert_eq!(grown(&first, &look(10_000, 20 << 10, 10, 5)), Vec::<String>::new());
        let all = grown(&first, &look(10_000, 38 << 10, 57, 26));
        assert_eq!(all.len(), 3, "{all:?}");
        assert_eq!(all[0], "40 descriptors (after 2000 pods), 57 (after 10000 pods)");
    }
}
