//! The specs in the virtual machine, whose kernel has AppArmor or SELinux, and control groups of version 2.
//!
//! ```text
//! registry (here, filled) ─► its directory ─┐
//! orlop, critest, profiles, vm.sh ──────────┴─► jobs' disk ─► machine: registry, orlop runtime, critest ─► report.json
//! ```

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use testkit::daemon::Nursery;
use testkit::netns;
use testkit::registry::Registry;

use super::super::suite;
use super::{Options, REGISTRY};
use crate::lab::vm::{End, Job, News, Outcome, SELINUX, Security, Shape, run_jobs};

const SCRIPT: &str = include_str!("vm.sh");
/// The suite calls programs of the machine by it; there everybody is root.
const SUDO: &str = "#!/bin/sh\nexec \"$@\"\n";
/// Without acceleration by hardware a spec takes about ten times as long.
const LIMIT: Duration = Duration::from_secs(3 * 3600);
/// Prints what the specs have left.
const REPORT: &str = "cat /var/tmp/lab/report.json";

/// Runs the specs; they leave their report in `output`.
pub(super) fn grade(orlop: &Path, critest: &Path, options: &Options, output: &Path) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let programs = [named(orlop, dir.path(), "orlop")?, named(critest, dir.path(), "critest")?];
    let made = [script(dir.path(), "sudo", SUDO)?, script(dir.path(), "specs", SCRIPT)?];
    let registry = dir.path().join("registry");
    publish(&registry)?;
    let certs = dir.path().join("certs.d");
    testkit::suite::write_hosts(&certs, REGISTRY)?;
    let profiles = dir.path().join("apparmor.d");
    copy_tree(&Security::fetch()?.profiles(), &profiles)?;
    let programs: Vec<PathBuf> = programs.into_iter().chain(made).chain([registry, certs, profiles]).collect();
    let command = format!("sh /jobs/specs{}", arguments(options));
    let jobs = [("the specs", command), ("their report", REPORT.to_owned())].map(|(name, command)| Job {
        name: name.to_owned(),
        programs: programs.clone(),
        command,
    });
    let append = if options.selinux { SELINUX } else { "" };
    let mut is_next = false;
    let outcomes = run_jobs(&jobs, Shape { append, ..Shape::default() }, LIMIT, |news| {
        let News::Line(line) = news else { return };
        // One after the other, each begins with a line and its name.
        if is_next && line.starts_with('[') {
            println!("{line}");
        }
        is_next = line.starts_with("----");
    })?;
    keep(&outcomes, output)
}

/// What the suite is told, as words of a shell.
fn arguments(options: &Options) -> String {
    let mut words: Vec<String> = Vec::new();
    for (flag, value) in [("focus", &options.focus), ("skip", &options.skip)] {
        words.extend(value.iter().map(|value| format!("-ginkgo.{flag}={value}")));
    }
    words.extend(options.streams().map(str::to_owned));
    words.extend(options.rest.iter().map(|word| word.to_string_lossy().into_owned()));
    words.iter().map(|word| format!(" '{}'", word.replace('\'', "'\\''"))).collect()
}

/// Writes down what the jobs said.
fn keep(outcomes: &[Outcome], output: &Path) -> anyhow::Result<()> {
    let [specs, report] = outcomes else { bail!("the machine ended before its second job") };
    std::fs::write(output.join(suite::LOG), specs.output.join("\n"))?;
    let end = specs.output[specs.output.len().saturating_sub(30)..].join("\n");
    ensure!(
        report.end == End::Code(0),
        "there is no report; the specs ended with {:?} and said last:\n{end}",
        specs.end
    );
    Ok(std::fs::write(output.join(suite::REPORT), report.output.join("\n"))?)
}

/// A program under the name that it is called by.
fn named(program: &Path, dir: &Path, name: &str) -> anyhow::Result<PathBuf> {
    let to = dir.join(name);
    std::fs::copy(program, &to).with_context(|| format!("copy {}", program.display()))?;
    Ok(to)
}

fn script(dir: &Path, name: &str, text: &str) -> anyhow::Result<PathBuf> {
    let path = dir.join(name);
    std::fs::write(&path, text)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// Fills a registry's directory; its thread alone enters a network without a way out.
fn publish(dir: &Path) -> anyhow::Result<()> {
    let fill = |address: SocketAddr| {
        netns::enter_private()?;
        // The registry ends with it.
        let nursery = Nursery::new();
        let registry = Registry::start_in(&nursery, address, dir)?;
        testkit::suite::publish(testkit::suite::ALL, &registry)
    };
    std::thread::scope(|scope| scope.spawn(|| fill(REGISTRY)).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn copy_tree(from: &Path, to: &Path) -> anyhow::Result<()> {
    testkit::host::run(std::process::Command::new("cp").arg("-r").arg(from).arg(to))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    #[test]
    fn regular_expressions_survive_the_shell() {
        let words = ["cri", "--vm", "--focus", "it's [AppArmor|NRI]", "--websocket", "--", "-x"];
        let line = Line::try_parse_from(words).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(
            arguments(&line.options),
            " '-ginkgo.focus=it'\\''s [AppArmor|NRI]' '-websocket-exec' '-websocket-attach' '-websocket-portforward' '-x'"
        );
    }
}
