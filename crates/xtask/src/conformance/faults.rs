//! `conformance faults`: the runtime is killed at random moments, again and again, while pods begin, exec, log and end.
//!
//! ```text
//! workers ─► pod: run, create, start, exec, stop, remove ─► orlop runtime ◄─ kill -9, start ◄─ killer
//!              ╰─► its exit code, and its log byte for byte
//! ```
//!
//! A call that a kill has cut off is made again, as a node agent makes it: it joins what it left or finds it done. What each
//! container prints and how it ends is known before; in the end nothing may be left.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use cri::{Error, RuntimeService as _, v1};
use fuzz::Dice;
use testkit::pace;
use tokio::sync::watch;
use tokio::task::{JoinSet, LocalSet};

use super::served::{self, Daemon, IMAGE, fsck, group_of, nothing_is_left, print_log};
use crate::demo::Stage;
use crate::voyage::leftovers;
use crate::workspace::build_release;

/// How to run it.
#[derive(clap::Args)]
pub(crate) struct FaultsOptions {
    /// How often the daemon is killed
    #[arg(long, default_value_t = 300)]
    kills: u64,
    /// How many pods are under way at a time
    #[arg(long, default_value_t = 6)]
    pods: u64,
    /// Where the random moments begin [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
    /// Test this program instead of building one
    #[arg(long, value_name = "PROGRAM")]
    orlop: Option<PathBuf>,
}

/// Kills in a run of all tests.
const QUICK: FaultsOptions = FaultsOptions { kills: 10, pods: 4, seed: None, orlop: None };
/// No call, and no pod, takes longer, however busy the machine is.
const PATIENCE: Duration = Duration::from_secs(120);
/// The longest time between two kills.
const BETWEEN_MAX_MS: u64 = 600;

/// The command.
pub(super) fn run(options: &FaultsOptions) -> anyhow::Result<()> {
    testkit::host::install(crate::images::TOOLS)?;
    testkit::host::install(&[testkit::registry::TOOL])?;
    let orlop = options.orlop.clone().map_or_else(build_release, |program| Ok(std::path::absolute(program)?))?;
    try_with(&orlop, options).map(drop)
}

/// A few kills, for a run of all tests; how many points there were.
pub(crate) fn quick(orlop: &Path) -> anyhow::Result<usize> {
    try_with(orlop, &QUICK)
}

fn try_with(orlop: &Path, options: &FaultsOptions) -> anyhow::Result<usize> {
    let stage = Stage::set_up(orlop, false)?;
    let before = (leftovers::find(stage.dir.path())?, fsck(&stage)?);
    let seed = options.seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | now_ms() & 0xf_ffff);
    println!("faults: {} kills, seed {seed}", options.kills);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(LocalSet::new().run_until(under_fire(&stage, options, seed)));
    if outcome.is_err() {
        print_log(&stage);
    }
    let Tally { pods, cut } = outcome?;
    let unowned: Vec<String> = fsck(&stage)?.into_iter().filter(|line| !before.1.contains(line)).collect();
    ensure!(unowned.is_empty(), "orlop fsck says:\n  {}", unowned.join("\n  "));
    nothing_is_left(&stage, &before.0)?;
    println!(
        "ok   {} kills while {pods} pods lived: each fate, each byte of log; {cut} calls were cut off",
        options.kills
    );
    Ok(1)
}

fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or_default()
}

/// What there was to do.
struct Tally {
    pods: u64,
    cut: u64,
}

/// Starts the runtime, lets pods live under it, and kills it as often as asked.
async fn under_fire(stage: &Stage, options: &FaultsOptions, seed: u64) -> anyhow::Result<Tally> {
    let daemon = Daemon::start(stage)?;
    let (announce, generation) = watch::channel(0);
    let (over, is_over) = watch::channel(false);
    let shared = Shared {
        socket: daemon.socket.clone(),
        logs: stage.dir.path().join("logs"),
        group: format!("/{}", group_of(stage)),
        generation,
        is_over,
        next: Arc::default(),
        cut: Arc::default(),
    };
    shared.pull().await?;
    let mut workers = JoinSet::new();
    for worker in 0..options.pods {
        let (shared, dice) = (shared.clone(), Dice::new(seed.wrapping_add(worker.wrapping_mul(0x1234_5678_9abc_def1))));
        workers.spawn_local(work(shared, dice));
    }
    let killer = kill(daemon, stage, options.kills, Dice::new(seed), announce);
    let daemon = tokio::select! {
        killed = killer => killed?,
        // A worker ends before the last kill only where it fails.
        Some(ended) = workers.join_next() => {
            ended??;
            bail!("a worker ended before it was told to");
        }
    };
    over.send(true).context("the workers have gone")?;
    while let Some(ended) = workers.join_next().await {
        ended??;
    }
    let sandboxes = shared.client()?.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await?.items;
    ensure!(sandboxes.is_empty(), "pods are left: {sandboxes:?}");
    daemon.end()?;
    Ok(Tally { pods: shared.next.load(Ordering::Relaxed), cut: shared.cut.load(Ordering::Relaxed) })
}

/// Kills the daemon and starts it again. `announce` is odd from before a kill until the next one serves.
async fn kill(
    mut daemon: Daemon,
    stage: &Stage,
    kills: u64,
    mut dice: Dice,
    announce: watch::Sender<u64>,
) -> anyhow::Result<Daemon> {
    for _ in 0..kills {
        // The random moment.
        let moment = pace::stretched(Duration::from_millis(dice.number(BETWEEN_MAX_MS)));
        tokio::time::sleep(moment).await;
        announce.send_modify(|generation| *generation += 1);
        daemon.kill()?;
        daemon = Daemon::start(stage)?; // Nobody has anything to do meanwhile.
        announce.send_modify(|generation| *generation += 1);
    }
    Ok(daemon)
}

/// What all workers know.
#[derive(Clone)]
struct Shared {
    socket: PathBuf,
    logs: PathBuf,
    /// The control group of all pods.
    group: String,
    /// Even while a daemon serves.
    generation: watch::Receiver<u64>,
    is_over: watch::Receiver<bool>,
    /// The number of the next pod.
    next: Arc<AtomicU64>,
    /// How many calls were cut off.
    cut: Arc<AtomicU64>,
}

impl Shared {
    fn client(&self) -> Result<cri::Client, Error> {
        cri::Client::new(&self.socket)
    }

    async fn pull(&self) -> anyhow::Result<()> {
        served::pull(&self.client()?).await
    }

    /// Makes a call until it is answered by a daemon that lived from its beginning to its end; whether it was cut off before.
    async fn call<T>(
        &self,
        what: &str,
        mut call: impl AsyncFnMut(cri::Client) -> Result<T, Error>,
    ) -> anyhow::Result<(Result<T, Error>, bool)> {
        let mut generation = self.generation.clone();
        let mut again = false;
        let made = async {
            loop {
                let begun = *generation.wait_for(|generation| generation % 2 == 0).await?;
                let answer = call(self.client()?).await;
                // An answer of a daemon that was killed since is an answer; an error may come from the kill.
                if answer.is_ok() || *generation.borrow() == begun {
                    return anyhow::Ok((answer, again));
                }
                self.cut.fetch_add(1, Ordering::Relaxed);
                again = true;
            }
        };
        tokio::time::timeout(pace::stretched(PATIENCE), made).await.with_context(|| format!("{what}: no answer"))?
    }

    /// As [`Self::call`], of a call that has to succeed.
    async fn must<T>(&self, what: &str, call: impl AsyncFnMut(cri::Client) -> Result<T, Error>) -> anyhow::Result<T> {
        let (answer, again) = self.call(what, call).await?;
        answer.with_context(|| format!("{what} ({})", if again { "made again" } else { "made once" }))
    }
}

async fn work(shared: Shared, mut dice: Dice) -> anyhow::Result<()> {
    while !*shared.is_over.borrow() {
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        live(&shared, number, &mut dice).await.with_context(|| format!("pod {number}"))?;
    }
    Ok(())
}

/// What a container does, and what must come of it.
struct Fate {
    script: String,
    /// Whether it waits for its stop.
    is_stopped: bool,
    code: i32,
    log: String,
}

impl Fate {
    fn of(number: u64, dice: &mut Dice) -> Self {
        let (lines, code) = (20 + dice.number(200), 1 + dice.number(100));
        let count =
            format!("i=0; while [ $i -lt {lines} ]; do echo \"$i of pod {number}\"; i=$((i+1)); usleep 1000; done");
        let mut log: String = (0..lines).map(|line| format!("{line} of pod {number}\n")).collect();
        let is_stopped = number % 2 == 1;
        let script = if is_stopped {
            log.push_str("asked to end\n");
            format!("trap 'echo asked to end; exit {code}' TERM; {count}; : > /said; while :; do sleep 0.05; done")
        } else {
            // A last piece of a line without its end counts, too.
            log.push_str("last words");
            format!("{count}; printf 'last words'; exit {code}")
        };
        Self { script, is_stopped, code: i32::try_from(code).unwrap_or_default(), log }
    }
}

/// The whole life of a pod.
async fn live(shared: &Shared, number: u64, dice: &mut Dice) -> anyhow::Result<()> {
    let fate = Fate::of(number, dice);
    let name = format!("pod-{number}");
    let config = v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata { name: name.clone(), uid: name.clone(), ..Default::default() }),
        hostname: name.clone(),
        log_directory: shared.logs.join(&name).to_string_lossy().into_owned(),
        linux: Some(v1::LinuxPodSandboxConfig { cgroup_parent: shared.group.clone(), ..Default::default() }),
        ..Default::default()
    };
    let request = v1::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
    let sandbox = shared
        .must("RunPodSandbox", async |client| client.run_pod_sandbox(request.clone()).await)
        .await?
        .pod_sandbox_id;
    let request = v1::CreateContainerRequest {
        pod_sandbox_id: sandbox.clone(),
        config: Some(v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "main".to_owned(), attempt: 0 }),
            image: Some(v1::ImageSpec { image: IMAGE.to_owned(), ..Default::default() }),
            command: ["sh", "-c", &fate.script].map(str::to_owned).to_vec(),
            log_path: "main/0.log".to_owned(),
            ..Default::default()
        }),
        sandbox_config: Some(config),
    };
    let container = shared
        .must("CreateContainer", async |client| client.create_container(request.clone()).await)
        .await?
        .container_id;
    start(shared, &container).await?;
    if fate.is_stopped {
        exec(shared, &container, number).await?;
        // The trap is set once something has been said; all is said before it is asked to end.
        until_said(shared, &container).await?;
        let request = v1::StopContainerRequest { container_id: container.clone(), timeout: 60 };
        shared.must("StopContainer", async |client| client.stop_container(request.clone()).await).await?;
    }
    let status = ended(shared, &container).await?;
    ensure!(status.exit_code == fate.code, "it ended with {status:?} instead of {}", fate.code);
    let said = said(&shared.logs.join(&name).join("main/0.log"))?;
    ensure!(said == fate.log, "its log is {said:?} instead of {:?}", fate.log);
    let request = v1::StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() };
    shared.must("StopPodSandbox", async |client| client.stop_pod_sandbox(request.clone()).await).await?;
    let request = v1::RemovePodSandboxRequest { pod_sandbox_id: sandbox };
    shared.must("RemovePodSandbox", async |client| client.remove_pod_sandbox(request.clone()).await).await?;
    Ok(())
}

/// A start that was cut off may have been one: then it is refused the second time, and the container runs or has run.
async fn start(shared: &Shared, container: &str) -> anyhow::Result<()> {
    let request = v1::StartContainerRequest { container_id: container.to_owned() };
    let (answer, again) =
        shared.call("StartContainer", async |client| client.start_container(request.clone()).await).await?;
    match answer {
        Ok(_) => Ok(()),
        Err(Error::FailedPrecondition(_)) if again => {
            let status = status(shared, container).await?;
            let has_begun = status.started_at > 0 && status.state() != v1::ContainerState::ContainerCreated;
            ensure!(has_begun, "it was not started, nor could it be: {status:?}");
            Ok(())
        }
        Err(error) => Err(error).context("StartContainer"),
    }
}

async fn exec(shared: &Shared, container: &str, number: u64) -> anyhow::Result<()> {
    let word = format!("exec {number}");
    let cmd = ["sh", "-c", "echo $0; exit 7", &word].map(str::to_owned).to_vec();
    let request = v1::ExecSyncRequest { container_id: container.to_owned(), cmd, timeout: 0 };
    let answer = shared.must("ExecSync", async |client| client.exec_sync(request.clone()).await).await?;
    let said = String::from_utf8_lossy(&answer.stdout);
    ensure!((said.trim(), answer.exit_code) == (word.as_str(), 7), "exec came to {} {said:?}", answer.exit_code);
    Ok(())
}

async fn until_said(shared: &Shared, container: &str) -> anyhow::Result<()> {
    let cmd = ["sh", "-c", "while ! test -e /said; do usleep 1000; done"].map(str::to_owned).to_vec();
    let request = v1::ExecSyncRequest { container_id: container.to_owned(), cmd, timeout: 0 };
    let answer = shared.must("ExecSync", async |client| client.exec_sync(request.clone()).await).await?;
    ensure!(answer.exit_code == 0, "waiting in the container came to {}", answer.exit_code);
    Ok(())
}

async fn status(shared: &Shared, container: &str) -> anyhow::Result<v1::ContainerStatus> {
    let request = v1::ContainerStatusRequest { container_id: container.to_owned(), verbose: false };
    let answer = shared.must("ContainerStatus", async |client| client.container_status(request.clone()).await).await?;
    answer.status.context("a status")
}

/// Its status when it has ended.
async fn ended(shared: &Shared, container: &str) -> anyhow::Result<v1::ContainerStatus> {
    let observe = async {
        loop {
            let status = status(shared, container).await?;
            if status.state() == v1::ContainerState::ContainerExited {
                return Ok(status);
            }
            tokio::time::sleep(Duration::from_millis(20)).await; // observed from outside, as an operator would
        }
    };
    tokio::time::timeout(pace::stretched(PATIENCE), observe).await.context("the container does not end")?
}

/// What a log says, without what the runtime adds to each record.
fn said(path: &Path) -> anyhow::Result<String> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    let mut said = String::new();
    for record in text.lines() {
        let fields: Vec<&str> = record.splitn(4, ' ').collect();
        let [time, "stdout", tag @ ("F" | "P"), content] = fields[..] else { bail!("{record:?} is no record") };
        ensure!(time.ends_with('Z'), "{record:?} has no time");
        said.push_str(content);
        if tag == "F" {
            said.push('\n');
        }
    }
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_what_was_said() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "1Z stdout F a b\n1Z stdout P c\n1Z stdout F d\n1Z stdout P e\n").unwrap();
        assert_eq!(said(file.path()).unwrap(), "a b\ncd\ne");
        std::fs::write(file.path(), "1Z stderr F a\n").unwrap();
        assert!(said(file.path()).is_err());
    }
}
