//! The tests that need root once more, in the machine: another kernel, control groups version 2, every controller.

use std::time::Duration;

use anyhow::{Context as _, bail};
use cargo_metadata::{Artifact, Message, TargetKind};

use super::count::Count;
use crate::lab::vm::{End, Job, News, Outcome, run_jobs};
use crate::workspace::{build_release, cargo};

/// Crates that talk to the kernel: their programs in `tests/` run in the machine.
const ON_THE_KERNEL: &[&str] =
    &["sys", "netfilter", "executor", "oci", "keeper", "image", "network", "runtime", "proxy", "kubelet", "orlop"];

/// Crates whose unit tests make system calls too.
const UNIT_TESTS: &[&str] = &["sys"];

/// Programs of which only the tests with these words in their names concern the kernel. The others take long here and tell
/// nothing new.
const ONLY: &[(&str, &[&str])] = &[
    ("image root", &["pulls_busybox", "no_link", "whiteouts", "later_entries", "images_mean", "deep_trees"]),
    // Those beside runc need it, which is not static.
    (
        "oci root",
        &[
            "a_container_is_created",
            "what_cannot_be",
            "a_failed_creation",
            "run_ends",
            "hook",
            "a_terminal_goes",
            "exec_starts",
            "descriptors_are",
            "a_filter_reports",
            "mounts_map",
            "processes_beside",
            "in_a_user_namespace",
        ],
    ),
];

/// Programs that need packages of a distribution.
const NEVER: &[&str] = &["oci callers"];

/// Longest run of one program; without acceleration by hardware everything takes about ten times as long.
pub(super) const LIMIT: Duration = Duration::from_secs(600);

/// Runs them and adds to `count`.
///
/// # Errors
/// A test failed, a program did not end, or there is no machine to be had.
pub(super) fn run(count: &mut Count) -> anyhow::Result<()> {
    let jobs = jobs()?;
    println!("running {} test programs in a virtual machine", jobs.len());
    let mut failed: Vec<String> = Vec::new();
    run_jobs(&jobs, "", LIMIT, |news| {
        if let News::Ended(outcome) = news
            && !report(outcome, count)
        {
            failed.push(outcome.name.clone());
        }
    })?;
    if let Err(error) = super::check::run(&build_release()?, count) {
        count.failed += 1;
        println!("vm: {error:#}");
        failed.push("orlop check".to_owned());
    }
    if failed.is_empty() {
        return Ok(());
    }
    bail!("failed in the machine: {}", failed.join(", "))
}

/// Prints how a program ended, with its output when it failed. Returns whether it passed.
fn report(outcome: &Outcome, count: &mut Count) -> bool {
    let mut own = Count::default();
    outcome.output.iter().for_each(|line| own.add_line(line));
    if outcome.end != End::Code(0) && own.failed == 0 {
        own.failed = 1;
    }
    count.add(own);
    let passed = own.failed == 0;
    println!("vm: {} ... {own} ({:.0} s)", outcome.name, outcome.took.as_secs_f64());
    if !passed {
        println!("---- {} in the machine: {:?}", outcome.name, outcome.end);
    }
    for line in outcome.output.iter().filter(|line| !passed || line.starts_with("skipped: ")) {
        println!("{line}");
    }
    passed
}

/// One job for each test program.
fn jobs() -> anyhow::Result<Vec<Job>> {
    let mut build = cargo(&["test", "--workspace", "--no-run", "--message-format", "json-render-diagnostics"]);
    let output = build.stderr(std::process::Stdio::inherit()).output().context("start cargo test --no-run")?;
    if !output.status.success() {
        bail!("cargo test --no-run: {}", output.status);
    }
    let mut jobs = Vec::new();
    for message in Message::parse_stream(&output.stdout[..]) {
        if let Message::CompilerArtifact(artifact) = message?
            && is_wanted(&artifact)
        {
            jobs.extend(job(&artifact).filter(|job| !NEVER.contains(&job.name.as_str())));
        }
    }
    jobs.sort_by(|a, b| a.name.cmp(&b.name)); // cargo names them as they get ready
    Ok(jobs)
}

fn is_wanted(artifact: &Artifact) -> bool {
    let krate = package(artifact);
    let kind = |wanted: TargetKind| artifact.target.kind.contains(&wanted);
    artifact.profile.test
        && (ON_THE_KERNEL.contains(&krate) && kind(TargetKind::Test)
            || UNIT_TESTS.contains(&krate) && kind(TargetKind::Lib))
}

/// The crate's name: that of the directory it lies in.
fn package(artifact: &Artifact) -> &str {
    artifact.manifest_path.parent().and_then(|dir| dir.file_name()).unwrap_or_default()
}

fn job(artifact: &Artifact) -> Option<Job> {
    let program = artifact.executable.as_ref()?;
    let name = format!("{} {}", package(artifact), artifact.target.name);
    let only = ONLY.iter().find(|(of, _)| *of == name).map_or(&[][..], |(_, words)| words);
    let command = format!("{} --show-output {}", program.file_name()?, only.join(" "));
    // Tests of a program start it; cargo puts it above the tests' directory.
    let started = program.ancestors().nth(2)?.join(package(artifact));
    let programs = [program.clone(), started].into_iter().filter(|path| path.exists()).map(Into::into).collect();
    Some(Job { name, command, programs })
}
