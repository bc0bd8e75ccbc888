//! The tests that need root once more, in the machine: another kernel, control groups version 2, every controller.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use cargo_metadata::{Artifact, Message, TargetKind};

use super::count::Count;
use crate::lab::vm::{End, Job, News, Outcome, SELINUX, Security, Shape, run_jobs};
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
    // Those beside runc with more starts of it are run apart (`AGAIN`).
    (
        "oci root",
        &[
            "control_groups_are",
            "states_are",
            "ends_are",
            "statistics_are",
            "want_of_memory_is_told_as",
            "readiness_is",
            "a_container_is_created",
            "what_cannot_be",
            "a_failed_creation",
            "run_ends",
            "hooks_run",
            "a_hook",
            "a_terminal_goes",
            "exec_starts",
            "descriptors_are_handed",
            "of_other_architectures",
            "a_filter_reports",
            "mounts_map",
            "processes_beside",
            "in_a_user_namespace",
            "a_user_without_rights",
            "apparmor",
            "without_a_module",
        ],
    ),
];

/// Programs that are run a second time, with tests that take as long again: their names, what is added to those, and words of the
/// tests.
const AGAIN: &[(&str, &str, &[&str])] = &[("oci root", "beside runc", &["filters_are", "commands_are"])];

/// Tests whose work is the processor's alone, of which the machine has little; and those that read files of the workspace.
const SKIP: &[(&str, &str)] = &[("keeper root", "gigabyte"), ("sys sys", "fuzz")];

/// Files that a program needs there.
type Files = fn() -> anyhow::Result<Vec<PathBuf>>;
const FILES: &[(&str, Files)] = &[
    ("oci root", with_runc),
    ("oci systemd", with_systemd),
    ("kubelet slices", with_systemd),
    ("orlop units", with_systemd),
    ("runtime root", with_runtimes),
];

fn with_runc() -> anyhow::Result<Vec<PathBuf>> {
    Ok(vec![testkit::go::build(&testkit::go::RUNC)?])
}

fn with_runtimes() -> anyhow::Result<Vec<PathBuf>> {
    let crun = testkit::debian::crun()?.join("usr");
    Ok(vec![testkit::go::build(&testkit::go::RUNC)?, crun.join("bin/crun"), crun.join("lib/x86_64-linux-gnu")])
}

fn with_systemd() -> anyhow::Result<Vec<PathBuf>> {
    Ok(vec![testkit::debian::managed_disk()?, testkit::go::build(&testkit::go::RUNC)?])
}

/// Programs that need packages of a distribution, or files of the workspace.
const NEVER: &[&str] = &["oci callers", "orlop past", "kubelet events", "proxy events"];

/// Programs with tests that need SELinux, all of which have its name.
const LABELLED: &[&str] = &["runtime root", "oci root"];

/// Longest run of one program; without acceleration by hardware everything takes about ten times as long.
pub(super) const LIMIT: Duration = Duration::from_secs(600);

/// Runs them and adds to `count`.
///
/// # Errors
/// A test failed, a program did not end, or there is no machine to be had.
pub(super) fn run(count: &mut Count) -> anyhow::Result<()> {
    let artifacts = artifacts()?;
    let jobs: Vec<Job> = artifacts.iter().filter_map(job).chain(artifacts.iter().filter_map(again)).collect();
    let labelled: Vec<Job> = artifacts.iter().filter_map(labelled_job).collect();
    println!("running {} test programs in a virtual machine", jobs.len());
    let mut failed: Vec<String> = Vec::new();
    for (jobs, append) in [(&jobs, ""), (&labelled, SELINUX)] {
        run_jobs(jobs, Shape { append, ..Shape::default() }, LIMIT, |news| {
            if let News::Ended(outcome) = news
                && !report(outcome, count)
            {
                failed.push(outcome.name.clone());
            }
        })?;
    }
    let checks = [
        ("the default profile", compare_profile(count)),
        ("orlop check", build_release().and_then(|orlop| super::check::run(&orlop, count))),
    ];
    for (name, outcome) in checks {
        if let Err(error) = outcome {
            count.failed += 1;
            println!("vm: {error:#}");
            failed.push(name.to_owned());
        }
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
    let passed = own.failed == 0;
    println!("vm: {} ... {own} ({:.0} s)", outcome.name, outcome.took.as_secs_f64());
    count.add(own);
    if !passed {
        println!("---- {} in the machine: {:?}", outcome.name, outcome.end);
    }
    for line in outcome.output.iter().filter(|line| !passed || line.starts_with("skipped: ")) {
        println!("{line}");
    }
    passed
}

/// The program that boots with SELinux.
fn labelled_job(artifact: &Artifact) -> Option<Job> {
    let plain = job(artifact).filter(|job| LABELLED.contains(&job.name.as_str()))?;
    let program = artifact.executable.as_ref()?.file_name()?;
    Some(Job {
        name: format!("{} with SELinux", plain.name),
        command: format!("{program} --show-output selinux"),
        ..plain
    })
}

/// The second run of a program.
fn again(artifact: &Artifact) -> Option<Job> {
    let (_, what, words) = AGAIN.iter().find(|(of, ..)| *of == name(artifact))?;
    let plain = job(artifact)?;
    let program = artifact.executable.as_ref()?.file_name()?;
    let command = format!("{program} --show-output {}", words.join(" "));
    Some(Job { name: format!("{} {what}", plain.name), command, ..plain })
}

/// The default profile that the node loads is the one that stands beside it as text.
fn compare_profile(count: &mut Count) -> anyhow::Result<()> {
    let (profile, compiled) = crate::codegen::profile_paths();
    let expect = Security::fetch()?.compile(&profile)?;
    let found = std::fs::read(&compiled).with_context(|| format!("read {}", compiled.display()))?;
    ensure!(expect == found, "{} is not made of {}: run `cargo xtask codegen`", compiled.display(), profile.display());
    println!("vm: the default profile of AppArmor is that of its text ... ok");
    count.passed += 1;
    Ok(())
}

/// The test programs to run, in order.
fn artifacts() -> anyhow::Result<Vec<Artifact>> {
    let mut build = cargo(&["test", "--workspace", "--no-run", "--message-format", "json-render-diagnostics"]);
    let output = build.stderr(std::process::Stdio::inherit()).output().context("start cargo test --no-run")?;
    if !output.status.success() {
        bail!("cargo test --no-run: {}", output.status);
    }
    let mut wanted = Vec::new();
    for message in Message::parse_stream(&output.stdout[..]) {
        if let Message::CompilerArtifact(artifact) = message?
            && is_wanted(&artifact)
        {
            wanted.push(artifact);
        }
    }
    wanted.sort_by_key(name); // cargo names them as they get ready
    Ok(wanted)
}

fn is_wanted(artifact: &Artifact) -> bool {
    let krate = package(artifact);
    let kind = |wanted: TargetKind| artifact.target.kind.contains(&wanted);
    artifact.profile.test
        && !NEVER.contains(&name(artifact).as_str())
        && (ON_THE_KERNEL.contains(&krate) && kind(TargetKind::Test)
            || UNIT_TESTS.contains(&krate) && kind(TargetKind::Lib))
}

/// The crate's name: that of the directory it lies in.
fn package(artifact: &Artifact) -> &str {
    artifact.manifest_path.parent().and_then(|dir| dir.file_name()).unwrap_or_default()
}

fn name(artifact: &Artifact) -> String {
    format!("{} {}", package(artifact), artifact.target.name)
}

/// The job of a test program.
fn job(artifact: &Artifact) -> Option<Job> {
    let program = artifact.executable.as_ref()?;
    let name = name(artifact);
    let only = ONLY.iter().find(|(of, _)| *of == name).map_or(&[][..], |(_, words)| words);
    let skip = SKIP.iter().filter(|(of, _)| *of == name).map(|(_, word)| format!("--skip {word} ")).collect::<String>();
    let command = format!("{} --show-output {skip}{}", program.file_name()?, only.join(" "));
    // Tests of a program start it; cargo puts it above the tests' directory.
    let started = program.ancestors().nth(2)?.join(package(artifact));
    let mut programs: Vec<PathBuf> =
        [program.clone(), started].into_iter().filter(|path| path.exists()).map(Into::into).collect();
    if let Some((_, files)) = FILES.iter().find(|(of, _)| *of == name) {
        match files() {
            Ok(files) => programs.extend(files),
            // The program tells that it needs them.
            Err(error) => println!("vm: {name}: {error:#}"),
        }
    }
    Some(Job { name, command, programs })
}
