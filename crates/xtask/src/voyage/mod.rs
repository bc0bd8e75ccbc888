//! The voyage through the whole node: the lesson's example on real processes, point by point.
//!
//! Each point asserts what an operator would see. Nothing here knows how orlop works inside: it reads the command line,
//! the service's answers, the client's numbered log, and the kernel's own lists.

mod burn;
mod commands;
mod killed;
pub(crate) mod leftovers;
mod observe;
mod points;
pub(crate) mod terminal;
mod trials;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use testkit::pace;

use crate::demo::Stage;

pub(crate) use observe::http_text;

/// A node under way, with the example's manifests in a directory that may be edited.
pub(crate) struct Voyage {
    stage: Stage,
    manifests: PathBuf,
    /// What others left behind on this machine.
    before: Vec<String>,
    up: Child,
}

/// A point of the voyage: its title and its check.
type Point = (&'static str, fn(&mut Voyage) -> anyhow::Result<String>);

const POINTS: &[Point] = &[
    ("pods wait while the model loads, then become Ready", points::loading),
    ("service, DNS, settings and an edited ConfigMap arrive", points::reachable),
    ("a deadlock leaves the service and is restarted", points::deadlock),
    ("a leak ends as OOMKilled, then CrashLoopBackOff", points::leak),
    ("a busy container is throttled, its neighbour keeps its share", burn::burn),
    ("kill -9 of the daemon is not felt", killed::killed_daemon),
    ("Ctrl-C ends everything and leaves nothing", points::interrupt),
];

/// Runs every point in order and stops at the first that fails. Returns how many passed.
///
/// # Errors
/// The first point that failed, with the node's log and the state of its pods printed before.
pub(crate) fn run(stage: Stage) -> anyhow::Result<usize> {
    let manifests = stage.dir.path().join("manifests");
    copy_manifests(&crate::workspace::root().join("examples/ai-service"), &manifests)?;
    sail(Voyage::start(stage, manifests)?, POINTS)
}

/// Runs the trials on a node of their own, as [`run`] runs the points.
///
/// # Errors
/// As [`run`].
pub(crate) fn try_faults(stage: Stage) -> anyhow::Result<usize> {
    let manifests = stage.dir.path().join("manifests");
    std::fs::create_dir_all(&manifests)?;
    sail(Voyage::start(stage, manifests)?, trials::TRIALS)
}

fn sail(mut voyage: Voyage, points: &[Point]) -> anyhow::Result<usize> {
    for (number, (title, check)) in (1..).zip(points) {
        let begin = Instant::now();
        match check(&mut voyage) {
            Ok(note) => println!("ok   {number}. {title} ({:.0} s): {note}", begin.elapsed().as_secs_f64()),
            Err(error) => {
                println!("FAIL {number}. {title}: {error:#}");
                voyage.report();
                bail!("point {number} of the voyage failed: {title}");
            }
        }
    }
    Ok(points.len())
}

impl Voyage {
    fn start(stage: Stage, manifests: PathBuf) -> anyhow::Result<Self> {
        let before = leftovers::find(stage.dir.path())?;
        let up = spawn_up(&stage, &manifests)?;
        Ok(Self { stage, manifests, before, up })
    }

    /// Starts the daemon again over what runs.
    fn start_again(&mut self) -> anyhow::Result<()> {
        self.up = spawn_up(&self.stage, &self.manifests)?;
        Ok(())
    }

    /// The output of `orlop ARGUMENTS`.
    fn orlop(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let output = testkit::host::output(self.stage.orlop().args(arguments))?;
        Ok(String::from_utf8(output)?)
    }

    /// `orlop ARGUMENTS` running beside the voyage, its output in `file`.
    fn beside(&self, arguments: &[&str], file: &Path) -> anyhow::Result<Child> {
        let output = std::fs::File::create(file)?;
        self.stage.orlop().args(arguments).stdin(Stdio::null()).stdout(output).spawn().context("start orlop")
    }

    /// Prints what helps to understand a failure.
    fn report(&self) {
        for arguments in [&["ps", "-A"][..], &["events", "-A"], &["fsck"]] {
            println!("$ orlop {}", arguments.join(" "));
            match self.orlop(arguments) {
                Ok(text) => print!("{text}"),
                Err(error) => println!("{error:#}"),
            }
        }
        println!("$ tail orlop.log");
        let log = std::fs::read_to_string(self.stage.dir.path().join("orlop.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].iter().for_each(|line| println!("{line}"));
    }
}

impl Drop for Voyage {
    fn drop(&mut self) {
        // Only after a failed point is there something to end; the failure has been reported already.
        if self.up.try_wait().is_ok_and(|ended| ended.is_none()) {
            let _ = self.orlop(&["down"]);
            let _ = self.up.kill();
            let _ = self.up.wait();
            leftovers::clear(self.stage.dir.path());
        }
    }
}

fn spawn_up(stage: &Stage, manifests: &Path) -> anyhow::Result<Child> {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(stage.dir.path().join("orlop.log"))?;
    let mut up: Command = stage.orlop();
    up.env("ORLOP_LOG", "info").arg("up").arg(manifests).stdin(Stdio::null());
    up.stdout(log.try_clone()?).stderr(log).spawn().context("start orlop up")
}

/// The keepers whose sandboxes are below `dir`: each works in the directory of its own.
pub(crate) fn keepers_in(dir: &Path) -> anyhow::Result<Vec<rustix::process::Pid>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let entry = entry?;
        let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
        // It may end while it is looked at.
        let comm = std::fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
        let place = std::fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        if comm.trim() == "orlop-keeper" && place.starts_with(dir) {
            found.extend(rustix::process::Pid::from_raw(pid));
        }
    }
    Ok(found)
}

fn copy_manifests(from: &Path, to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let path = entry?.path();
        if let (true, Some(name)) = (path.is_file(), path.file_name()) {
            std::fs::copy(&path, to.join(name))?;
        }
    }
    if pace::is_slow() { slow_down(to) } else { Ok(()) }
}

/// What the example is told on a slow machine, where Python alone is long under way until it serves, and an answer costs
/// what ten cost elsewhere: file, line, and what follows it.
const SLOW: [(&str, &str, &str); 2] = [
    ("ai-service.yaml", "        env:\n", "        - { name: MODEL_LOAD_SECONDS, value: '5' }\n"),
    ("client.yaml", "\"/app/client.py\"]\n", "    env: [{ name: PAUSE_SECONDS, value: '1' }]\n"),
];

fn slow_down(manifests: &Path) -> anyhow::Result<()> {
    for (name, line, more) in SLOW {
        let text = std::fs::read_to_string(manifests.join(name))?;
        ensure!(text.matches(line).count() == 1, "the example's {name} has changed");
        std::fs::write(manifests.join(name), text.replace(line, &format!("{line}{more}")))?;
    }
    Ok(())
}

/// Waits until `check` returns a value, asking again every 50 ms; both times stretched on a slow machine ([`pace`]).
///
/// # Errors
/// `limit` has passed; the message says what was waited for.
pub(crate) fn wait<T>(
    what: &str,
    limit: Duration,
    mut check: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let (begin, limit) = (Instant::now(), pace::stretched(limit));
    loop {
        let last = match check() {
            Ok(Some(value)) => return Ok(value),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if begin.elapsed() > limit {
            return Err(last.unwrap_or_else(|| anyhow::anyhow!("it did not happen")))
                .with_context(|| format!("waited {} s: {what}", limit.as_secs()));
        }
        std::thread::sleep(pace::stretched(Duration::from_millis(50))); // observed from outside, as an operator would
    }
}
