//! What a run of ginkgo has found, by its own report.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use anyhow::Context as _;
use serde::Deserialize;

/// How the specs that were chosen ended.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    passed: BTreeSet<String>,
    /// Name, and the first line of the reason.
    failed: Vec<(String, String)>,
    /// Those that say themselves why they cannot run here.
    skipped: Vec<(String, String)>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Report {
    #[serde(default)]
    spec_reports: Option<Vec<Spec>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Spec {
    #[serde(default)]
    container_hierarchy_texts: Option<Vec<String>>,
    leaf_node_type: String,
    #[serde(default)]
    leaf_node_text: String,
    state: String,
    #[serde(default)]
    failure: Failure,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct Failure {
    message: String,
}

impl Outcome {
    /// Reads the report of ginkgo in `file`.
    pub(super) fn read(file: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read(file).with_context(|| format!("the suite left no report in {}", file.display()))?;
        Self::parse(&text).with_context(|| format!("read {}", file.display()))
    }

    fn parse(text: &[u8]) -> anyhow::Result<Self> {
        let reports: Vec<Report> = serde_json::from_slice(text)?;
        let mut outcome = Self::default();
        reports.into_iter().filter_map(|report| report.spec_reports).flatten().for_each(|spec| outcome.add(spec));
        outcome.failed.sort();
        outcome.skipped.sort();
        Ok(outcome)
    }

    fn add(&mut self, spec: Spec) {
        let reason = spec.failure.message.lines().next().unwrap_or_default().to_owned();
        let is_test = spec.leaf_node_type == "It";
        match spec.state.as_str() {
            // What prepares and ends the suite counts only when it fails.
            "passed" if is_test => drop(self.passed.insert(spec.name())),
            "passed" => {}
            "pending" => {}
            // Specs that were not chosen are skipped, too, without a reason.
            "skipped" if reason.is_empty() => {}
            "skipped" => self.skipped.push((spec.name(), reason)),
            _ => self.failed.push((spec.name(), reason)),
        }
    }

    /// Whether something ran and nothing failed.
    pub(super) fn is_passed(&self) -> bool {
        !self.passed.is_empty() && self.failed.is_empty()
    }

    /// The names of specs that passed in `other` and fail here, or say that they cannot run here.
    pub(super) fn worse_than(&self, other: &Self) -> Vec<&str> {
        let not_passed = self.failed.iter().chain(&self.skipped);
        not_passed.map(|(name, _)| name.as_str()).filter(|name| other.passed.contains(*name)).collect()
    }

    /// How many of the specs that passed or failed in `other` passed here, and how many failed.
    pub(super) fn of_those_in(&self, other: &Self) -> String {
        let ran = |name: &str| other.passed.contains(name) || other.failed.iter().any(|(failed, _)| failed == name);
        let passed = self.passed.iter().filter(|name| ran(name)).count();
        let failed: Vec<&str> = self.failed.iter().map(|(name, _)| name.as_str()).filter(|name| ran(name)).collect();
        format!("{passed} passed, {} failed", failed.len())
    }
}

impl Spec {
    fn name(&self) -> String {
        let texts = self.container_hierarchy_texts.iter().flatten().chain([&self.leaf_node_text]);
        let words: Vec<&str> = texts.map(String::as_str).filter(|text| !text.is_empty()).collect();
        if words.is_empty() { self.leaf_node_type.clone() } else { words.join(" ") }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (title, specs) in [("skipped", &self.skipped), ("failed", &self.failed)] {
            if specs.is_empty() {
                continue;
            }
            writeln!(to, "\n{title}:")?;
            for (name, reason) in specs {
                writeln!(to, "  {name}\n    {reason}")?;
            }
        }
        let Self { passed, failed, skipped } = self;
        writeln!(to, "\n{} passed, {} failed, {} skipped", passed.len(), failed.len(), skipped.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_specs_that_were_chosen_count() {
        let spec = |name: &str, kind: &str, state: &str, message: &str| {
            serde_json::json!({
                "ContainerHierarchyTexts": ["[sig-node] Pods"], "LeafNodeType": kind, "LeafNodeText": name,
                "State": state, "Failure": { "Message": message, "Location": {} },
            })
        };
        let report = serde_json::json!([{ "SuitePath": "e2e", "SpecReports": [
            { "ContainerHierarchyTexts": null, "LeafNodeType": "SynchronizedBeforeSuite", "State": "passed" },
            spec("should run", "It", "passed", ""),
            spec("should not be chosen", "It", "skipped", ""),
            spec("should have swap", "It", "skipped", "no swap here\nat all"),
            spec("should end", "It", "timedout", "after 5 min"),
            spec("should wait", "It", "pending", ""),
        ]}]);
        let outcome = Outcome::parse(&serde_json::to_vec(&report).unwrap()).unwrap();
        let text = outcome.to_string();
        assert_eq!(outcome.passed.len(), 1);
        assert!(!outcome.is_passed());
        assert!(text.contains("failed:\n  [sig-node] Pods should end\n    after 5 min\n"), "{text}");
        assert!(text.contains("skipped:\n  [sig-node] Pods should have swap\n    no swap here\n"), "{text}");
        assert!(text.ends_with("1 passed, 1 failed, 1 skipped\n"), "{text}");
        assert!(Outcome::parse(b"[{\"SpecReports\": null}]").is_ok_and(|outcome| !outcome.is_passed()));
    }

    #[test]
    fn what_upstream_passes_has_to_pass() {
        let outcome = |passed: &[&str], failed: &[&str], skipped: &[&str]| Outcome {
            passed: passed.iter().map(|name| (*name).to_owned()).collect(),
            failed: failed.iter().map(|name| ((*name).to_owned(), String::new())).collect(),
            skipped: skipped.iter().map(|name| ((*name).to_owned(), "not here".to_owned())).collect(),
        };
        let upstream = outcome(&["runs", "stops", "is elsewhere", "has a feature"], &["fails for all"], &["has swap"]);
        let ours =
            outcome(&["runs", "is better"], &["stops", "fails for all", "is new"], &["has a feature", "has swap"]);
        assert_eq!(ours.worse_than(&upstream), ["stops", "has a feature"]);
        assert_eq!(upstream.of_those_in(&ours), "2 passed, 1 failed");
    }
}
