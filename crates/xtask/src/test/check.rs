//! `orlop check` in the machine: on a kernel that has everything, and on one that was booted without.

use std::path::Path;

use anyhow::{Context as _, ensure};
use serde::Deserialize;

use super::count::Count;
use super::vm::LIMIT;
use crate::lab::vm::{End, Job, Outcome, Shape, run_jobs};

/// What the second machine is booted without, and what `orlop check` calls it.
const WITHOUT: &[(&str, &str, &str)] = &[
    ("module_blacklist=overlay,nf_tables,bridge", "overlayfs", "missing"),
    ("", "nftables", "missing"),
    ("", "pod links", "missing"),
    ("cgroup_disable=memory", "control groups", "missing"),
    ("sysctl.user.max_user_namespaces=0", "user namespaces", "limited"),
    ("lsm=lockdown", "AppArmor", "limited"),
    ("psi=0", "pressure figures", "limited"),
];

/// A finding as `orlop check --output json` shows it.
#[derive(Debug, Deserialize)]
struct Finding {
    what: String,
    verdict: String,
    detail: String,
    remedy: String,
}

/// Boots both machines and adds to `count`.
///
/// # Errors
/// A finding that is wrong or without remedy.
pub(super) fn run(orlop: &Path, count: &mut Count) -> anyhow::Result<()> {
    whole(orlop)?;
    count.passed += 1;
    println!("vm: orlop check on a whole machine ... ok");
    poor(orlop)?;
    count.passed += 1;
    println!("vm: orlop check on a machine that lacks things ... ok");
    Ok(())
}

fn whole(orlop: &Path) -> anyhow::Result<()> {
    let outcomes = in_machine(orlop, "", &["orlop check --output json"])?;
    let findings = findings(&outcomes[0])?;
    ensure!(outcomes[0].end == End::Code(0), "it finds something missing: {findings:?}");
    check_remedies(&findings)
}

fn poor(orlop: &Path) -> anyhow::Result<()> {
    let append: Vec<&str> = WITHOUT.iter().map(|(parameter, ..)| *parameter).collect();
    let commands = ["orlop check --output json", "orlop runtime --listen unix:///run/cri.sock"];
    let outcomes = in_machine(orlop, &append.join(" "), &commands)?;
    let findings = findings(&outcomes[0])?;
    ensure!(outcomes[0].end == End::Code(1), "it ended with {:?}: {findings:?}", outcomes[0].end);
    check_remedies(&findings)?;
    for (_, what, verdict) in WITHOUT {
        let found = findings.iter().find(|finding| finding.what == *what);
        ensure!(found.is_some_and(|found| found.verdict == *verdict), "{what} should be {verdict}: {found:?}");
    }
    let refusal = outcomes[1].output.join("\n");
    ensure!(outcomes[1].end == End::Code(1), "a runtime was not refused: {refusal}");
    for finding in findings.iter().filter(|finding| finding.verdict == "missing") {
        ensure!(refusal.contains(&finding.remedy), "the refusal does not say {:?}:\n{refusal}", finding.remedy);
    }
    Ok(())
}

fn in_machine(orlop: &Path, append: &str, commands: &[&str]) -> anyhow::Result<Vec<Outcome>> {
    let job = |command: &&str| Job {
        name: (*command).to_owned(),
        programs: vec![orlop.to_owned()],
        command: (*command).to_owned(),
    };
    let jobs: Vec<Job> = commands.iter().map(job).collect();
    run_jobs(&jobs, Shape { append, ..Shape::default() }, LIMIT, |_| {})
}

fn findings(outcome: &Outcome) -> anyhow::Result<Vec<Finding>> {
    let text = outcome.output.join("\n");
    serde_json::from_str(&text).with_context(|| format!("{} printed:\n{text}", outcome.name))
}

fn check_remedies(findings: &[Finding]) -> anyhow::Result<()> {
    ensure!(findings.len() > 10, "it looks at {} things only", findings.len());
    for finding in findings {
        ensure!(!finding.detail.is_empty(), "nothing was seen: {finding:?}");
        ensure!(
            finding.remedy.is_empty() == (finding.verdict == "ok"),
            "a remedy is wanted for faults only: {finding:?}"
        );
    }
    Ok(())
}
