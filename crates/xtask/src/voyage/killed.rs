//! The daemon, killed while requests, probes, an exec and a follower of a log are under way, and again while it takes over.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};

use super::observe::{PodView, http};
use super::points::{PORT, failures, ready_replicas, seconds_now};
use super::{Voyage, wait};

const SOON: Duration = Duration::from_secs(30);

/// 6. The daemon is killed in the middle of all this, three times: nobody outside of it feels that.
pub(super) fn killed_daemon(voyage: &mut Voyage) -> anyhow::Result<String> {
    ready_replicas(voyage)?;
    let before = identity(voyage)?;
    let begun = seconds_now();
    let crowd = Crowd::new(voyage.service_address("ai-service")?);
    start_writer(voyage)?;
    std::thread::scope(|scope| {
        let _leave = Leaving(&crowd);
        (0..ASKERS).for_each(|_| drop(scope.spawn(|| crowd.ask())));
        kill_in_the_middle(voyage, &crowd)?;
        kill_while_it_starts(voyage, &crowd, |voyage| Ok(is_locked_by(&voyage.run_dir(), voyage.up.id())))?;
        kill_while_it_starts(voyage, &crowd, |voyage| {
            Ok(UnixStream::connect(voyage.run_dir().join("orlop.sock")).is_ok())
        })?;
        voyage.start_again()?;
        wait("the daemon answers again", SOON, || identity(voyage).map(Some))?;
        crowd.until_more("with the new daemon")
    })?;
    let failed = crowd.failed.into_inner().unwrap_or_default();
    ensure!(failed.is_empty(), "{} of the host's requests failed: {failed:?}", failed.len());
    let lines = written_lines(voyage)?;
    let answers = check_client(voyage, begun)?;
    ready_replicas(voyage)?;
    let after = identity(voyage)?;
    ensure!(after == before, "a container or its probes were touched: {before:#?} became {after:#?}");
    let asked = crowd.asked.into_inner();
    Ok(format!(
        "killed 3 times; {} containers untouched, {asked} requests, {answers} and {lines} log lines without a gap",
        before.len()
    ))
}

/// What of each pod a restart of the daemon may not change: its container, how often that was restarted, what its probes have
/// found, and since when.
fn identity(voyage: &Voyage) -> anyhow::Result<Vec<Value>> {
    let of = |pod: &PodView| {
        let container = pod.container();
        json!({
            "pod": pod.name(),
            "container": container["containerID"],
            "restarts": container["restartCount"],
            "since": container["state"]["running"]["startedAt"],
            "started": container["started"],
            "ready": [pod.ready()["status"], pod.ready()["lastTransitionTime"]],
        })
    };
    Ok(voyage.pods("")?.iter().map(of).collect())
}

/// In the middle of requests and probes, while a command talks through the daemon and a log is followed.
fn kill_in_the_middle(voyage: &mut Voyage, crowd: &Crowd) -> anyhow::Result<()> {
    let dir = voyage.stage.dir.path();
    let (talk, follow) = (dir.join("talk"), dir.join("follow"));
    let talking =
        voyage.beside(&["exec", "neighbour", "--", "sh", "-c", "while echo word; do sleep 0.02; done"], &talk)?;
    let following = voyage.beside(&["logs", "-f", "client"], &follow)?;
    crowd.until_more("with the first daemon")?;
    for file in [&talk, &follow] {
        until_it_grows(file)?;
    }
    kill(voyage, crowd)?;
    check_fsck(voyage)?;
    for (mut child, name) in [(talking, "exec"), (following, "logs -f")] {
        let ended = wait(&format!("`orlop {name}` ends with the daemon"), SOON, || Ok(child.try_wait()?))?;
        ensure!(!ended.success(), "`orlop {name}` says that all is well though its daemon is gone");
    }
    Ok(())
}

/// What a daemon leaves that was killed: `orlop fsck` names each kind of it, with what can be done.
fn check_fsck(voyage: &Voyage) -> anyhow::Result<()> {
    const KINDS: [&str; 9] = [
        "sandbox /",
        "process orlop-keeper ",
        "process orlop-dns ",
        "pod directory /",
        "mount /",
        "link orlop-",
        "table orlop-net-",
        "table orlop-proxy-",
        "file /",
    ];
    let output = voyage.stage.orlop().arg("fsck").output().context("start orlop fsck")?;
    let left = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.code() == Some(1), "orlop fsck ended with {}:\n{left}", output.status);
    for kind in KINDS {
        ensure!(left.lines().any(|line| line.starts_with(kind)), "orlop fsck names no {kind:?}:\n{left}");
    }
    let helpless = left.lines().find(|line| !line.contains("no daemon owns it; `"));
    ensure!(helpless.is_none(), "orlop fsck gives no remedy: {helpless:?}");
    Ok(())
}

/// Starts a daemon and kills it as soon as it has come so far.
fn kill_while_it_starts(
    voyage: &mut Voyage,
    crowd: &Crowd,
    has_come: impl Fn(&Voyage) -> anyhow::Result<bool>,
) -> anyhow::Result<()> {
    voyage.start_again()?;
    wait("the daemon starts", SOON, || Ok(has_come(voyage)?.then_some(())))?;
    kill(voyage, crowd)
}

/// Kills the daemon and stays without one until more requests have been answered, by the kernel's rules alone.
fn kill(voyage: &mut Voyage, crowd: &Crowd) -> anyhow::Result<()> {
    voyage.up.kill()?;
    voyage.up.wait()?;
    crowd.until_more("without a daemon")
}

fn is_locked_by(run_dir: &Path, pid: u32) -> bool {
    std::fs::read_to_string(run_dir.join("lock")).is_ok_and(|text| text.trim() == pid.to_string())
}

fn until_it_grows(file: &Path) -> anyhow::Result<()> {
    let before = std::fs::metadata(file)?.len();
    wait(&format!("{} grows", file.display()), SOON, || Ok((std::fs::metadata(file)?.len() > before).then_some(())))
}

/// Begins to write numbered lines to the neighbour's log, a hundred a second, until its file `enough` is there.
fn start_writer(voyage: &Voyage) -> anyhow::Result<()> {
    let script = "(i=0; until [ -e /tmp/enough ]; do i=$((i+1)); echo line=$i; sleep 0.01; done; echo last=$i) \
                  > /proc/1/fd/1 2>&1 < /dev/null &";
    voyage.orlop(&["exec", "neighbour", "--", "sh", "-c", script]).map(drop)
}

/// Ends the writer, and returns how many lines it has written if the log has each of them once and in order.
fn written_lines(voyage: &Voyage) -> anyhow::Result<u64> {
    voyage.orlop(&["exec", "neighbour", "--", "touch", "/tmp/enough"])?;
    let (log, last) = wait("the writer ends", SOON, || {
        let log = voyage.orlop(&["logs", "neighbour"])?;
        let last = log.lines().find_map(|line| line.strip_prefix("last=")?.parse::<u64>().ok());
        Ok(last.map(|last| (log, last)))
    })?;
    let numbers = log.lines().filter_map(|line| line.strip_prefix("line="));
    let mut expected = 1..=last;
    for number in numbers {
        let next = expected.next();
        ensure!(
            next.is_some_and(|next| next.to_string() == number),
            "line {next:?} was expected, and {number} is there"
        );
    }
    ensure!(expected.is_empty(), "lines from {expected:?} are lost");
    Ok(last)
}

/// The client's log has each of its lines once, and no request failed since. Returns how many lines there are.
fn check_client(voyage: &Voyage, begun: f64) -> anyhow::Result<usize> {
    let back = seconds_now();
    let answers = wait("the client goes on", SOON, || {
        let answers = voyage.answers()?;
        Ok(answers.last().is_some_and(|last| last.time > back).then_some(answers))
    })?;
    let gap = answers.windows(2).find(|pair| pair[1].number != pair[0].number + 1);
    ensure!(gap.is_none(), "log lines are lost or doubled: {gap:?}");
    let failed = failures(&answers, begun, back);
    ensure!(failed.is_empty(), "requests of the client failed: {failed:?}");
    Ok(answers.len())
}

/// Threads that ask the service without pause.
const ASKERS: usize = 2;

/// Answers that are waited for in each state of the daemon.
const ENOUGH: usize = 100;

/// What those threads see.
struct Crowd {
    service: IpAddr,
    enough: AtomicBool,
    asked: AtomicUsize,
    failed: Mutex<Vec<String>>,
}

/// Ends the threads, whatever happens to who waits for them.
struct Leaving<'a>(&'a Crowd);

impl Drop for Leaving<'_> {
    fn drop(&mut self) {
        self.0.enough.store(true, Ordering::Relaxed);
    }
}

impl Crowd {
    fn new(service: IpAddr) -> Self {
        Self { service, enough: AtomicBool::new(false), asked: AtomicUsize::new(0), failed: Mutex::default() }
    }

    fn ask(&self) {
        while !self.enough.load(Ordering::Relaxed) {
            let fault = match http("GET", SocketAddr::new(self.service, PORT), "/predict") {
                Ok((200, _)) => None,
                Ok((status, _)) => Some(format!("answered {status}")),
                Err(error) => Some(format!("{error:#}")),
            };
            if let (Some(fault), Ok(mut failed)) = (fault, self.failed.lock()) {
                failed.push(fault);
            }
            self.asked.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn until_more(&self, state: &str) -> anyhow::Result<()> {
        let goal = self.asked.load(Ordering::Relaxed) + ENOUGH;
        wait(&format!("{ENOUGH} requests {state}"), SOON, || {
            Ok((self.asked.load(Ordering::Relaxed) >= goal).then_some(()))
        })
    }
}

impl Voyage {
    fn run_dir(&self) -> PathBuf {
        self.stage.dir.path().join("run")
    }
}
