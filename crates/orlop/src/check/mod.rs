//! `orlop check`: whether this machine can run a node, and what to do if not.
//!
//! What can be tried without a trace is tried (in a network namespace that ends with the try), because a kernel loads
//! most of its modules only when they are asked for. The modules read facts, and judge them in functions of their own.

mod files;
mod groups;
mod machine;
mod network;

use std::process::ExitCode;

use serde::Serialize;

use crate::args::{OutputOptions, Places};
use crate::cli::format::{Table, print, print_machine};

/// One thing that was looked at.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Finding {
    what: &'static str,
    verdict: Verdict,
    /// What was seen.
    detail: String,
    /// What to do; empty when nothing is wrong.
    remedy: String,
}

/// How grave a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Verdict {
    Ok,
    /// The node runs; something an operator may want is absent.
    Limited,
    /// The node cannot run.
    Missing,
}

impl Finding {
    fn ok(what: &'static str, detail: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Ok, detail: detail.into(), remedy: String::new() }
    }

    fn limited(what: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Limited, detail: detail.into(), remedy: remedy.into() }
    }

    fn missing(what: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Missing, detail: detail.into(), remedy: remedy.into() }
    }

    /// Of something that only root can look at. The finding about the user says the rest.
    fn unknown(what: &'static str) -> Self {
        Self::limited(what, "only root can tell", "run `orlop check` as root")
    }
}

/// Prints the findings; fails when one of them prevents a node.
pub(crate) fn run(places: &Places, options: &OutputOptions) -> anyhow::Result<ExitCode> {
    let findings = find(places);
    if !print_machine(options.output, &findings)? {
        let mut table = Table::new(&["CHECK", "VERDICT", "FOUND", "REMEDY"]);
        for finding in &findings {
            let verdict = format!("{:?}", finding.verdict).to_lowercase();
            table.push(vec![finding.what.to_owned(), verdict, finding.detail.clone(), finding.remedy.clone()]);
        }
        print(&table.render());
    }
    let fatal = findings.iter().any(|finding| finding.verdict == Verdict::Missing);
    Ok(if fatal { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Refuses to start a node on a machine that cannot run one, with all that is missing and what to do.
pub(crate) fn require(places: &Places) -> anyhow::Result<()> {
    let missing = find(places).into_iter().filter(|finding| finding.verdict == Verdict::Missing);
    let lines: Vec<String> = missing.map(|one| format!("{}: {}; {}", one.what, one.detail, one.remedy)).collect();
    anyhow::ensure!(lines.is_empty(), "this machine cannot run a node:\n  {}", lines.join("\n  "));
    Ok(())
}

/// Looks at everything; leaves nothing behind.
fn find(places: &Places) -> Vec<Finding> {
    let mut findings = machine::basics();
    findings.extend(files::findings(&places.state_dir));
    findings.extend(groups::findings());
    findings.extend(network::findings());
    findings.extend(machine::extras());
    findings
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;

    #[test]
    fn whatever_is_wrong_has_a_remedy() {
        let places = Places { state_dir: PathBuf::from("/proc/nowhere"), run_dir: PathBuf::from("/run/orlop") };
        for finding in find(&places) {
            assert_eq!(finding.remedy.is_empty(), finding.verdict == Verdict::Ok, "{finding:?}");
            assert!(!finding.detail.is_empty(), "{finding:?}");
        }
    }
}
