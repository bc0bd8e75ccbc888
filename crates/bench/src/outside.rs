//! All runs, each in fresh namespaces, and what is left of them: control groups, which no namespace ends.

use std::path::Path;
use std::process::{Child, Command};

use anyhow::{Context as _, bail};
use testkit::groups;

use crate::arguments::{Arguments, Common, SideName, Work};
use crate::inside::results_file;
use crate::measure::Outcome;
use crate::report;

/// Runs every side as often as wanted, prints the report, and writes it where asked.
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<()> {
    let Common { side: sides, rounds, reference_name, markdown, .. } = arguments.common();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut orlop, mut reference) = (Outcome::default(), Outcome::default());
    for round in 1..=*rounds {
        for side in sides {
            eprintln!("{}, round {round} of {rounds}", side.word());
            let results = runtime.block_on(turn(*side))?;
            match side {
                SideName::Orlop => orlop.merge(results),
                SideName::Reference => reference.merge(results),
            }
        }
    }
    println!("{}", report::tables(&orlop, &reference, reference_name));
    if let Some(file) = markdown {
        let about = match &arguments.work {
            Work::Runtime(_) => &report::RUNTIME,
            Work::Node(_) => &report::NODE,
            Work::Proxy(_) => &report::PROXY,
            Work::Rollout(_) => &report::ROLLOUT,
        };
        let text = report::document(about, &orlop, &reference, reference_name);
        std::fs::write(file, text).with_context(|| format!("write {}", file.display()))?;
    }
    let faults = [orlop.faults, reference.faults].concat();
    if !faults.is_empty() {
        bail!("some of it was not measured:\n{}", faults.join("\n"));
    }
    Ok(())
}

/// One side's turn; nothing of it is there afterwards.
async fn turn(side: SideName) -> anyhow::Result<Outcome> {
    let scratch = tempfile::Builder::new().prefix("orlop-bench-").tempdir()?;
    let name = scratch.path().file_name().context("a directory has a name")?;
    let ended = contained(side, scratch.path()).await;
    groups::remove(name)?;
    ended?;
    let text = std::fs::read(results_file(scratch.path())).context("the run has left no results")?;
    scratch.close()?;
    Ok(serde_json::from_slice(&text)?)
}

/// Runs this program once more, inside. A shell stands above it, because the first process of a namespace has to reap what
/// its children leave; it ends everything with it.
async fn contained(side: SideName, scratch: &Path) -> anyhow::Result<()> {
    let mut unshare = Command::new("unshare");
    unshare.args(["--net", "--mount", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    unshare.args(["busybox", "sh", "-c", "\"$@\"; exit $?", "sh"]);
    unshare.arg(std::env::current_exe()?).args(arguments_without_sides());
    unshare.args(["--side", side.word(), "--inside"]).arg(scratch);
    let child = unshare.spawn().context("start unshare (util-linux)")?;
    wait(child).await
}

/// What this program was started with, but for `--side`.
fn arguments_without_sides() -> Vec<String> {
    let mut kept = Vec::new();
    let mut all = std::env::args().skip(1);
    while let Some(word) = all.next() {
        if word == "--side" {
            all.next();
        } else {
            kept.push(word);
        }
    }
    kept
}

/// Waits for the run. Ctrl-C reaches it by itself, as it is of the terminal's group; then, and for SIGTERM, all of it ends.
async fn wait(mut child: Child) -> anyhow::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut ended = signal(SignalKind::child())?;
    loop {
        if let Some(status) = child.try_wait()? {
            if status.success() {
                return Ok(());
            }
            bail!("the run failed: {status}");
        }
        tokio::select! {
            _ = ended.recv() => {}
            _ = interrupt.recv() => break,
            _ = terminate.recv() => break,
        }
    }
    // unshare takes the first process of the namespace with it, and the kernel all the others.
    child.kill()?;
    child.wait()?;
    bail!("interrupted");
}
