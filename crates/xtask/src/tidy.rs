//! Rules of the workspace as code: which crate may depend on which, and where `unsafe` may stand.

use std::collections::BTreeMap;

use anyhow::{Context as _, bail};
use cargo_metadata::{DependencyKind, MetadataCommand};

/// For each crate the crates of the workspace that it may use. Reading order: what comes first knows least.
const MAY_USE: &[(&str, &[&str])] = &[
    ("sys", &[]),
    ("configfile", &[]),
    ("instruments", &["sys"]),
    ("trust", &[]),
    ("service", &[]),
    ("pod", &[]),
    ("cri", &[]),
    ("plugin", &[]),
    ("netfilter", &["sys", "service"]),
    ("executor", &["sys"]),
    ("oci", &["sys", "executor"]),
    ("keeper", &["sys", "executor"]),
    ("image", &["sys", "trust"]),
    ("network", &["sys", "netfilter"]),
    ("cluster", &["sys", "trust"]),
    ("runtime", &["sys", "executor", "keeper", "image", "network", "cri"]),
    ("proxy", &["sys", "configfile", "instruments", "service", "netfilter", "cluster"]),
    ("kubelet", &["sys", "configfile", "instruments", "trust", "cri", "plugin", "cluster", "pod"]),
];

/// Crates that pure ones must not use.
const EFFECTS: &[&str] = &["tokio", "rustix", "libc", "sys"];
const PURE: &[&str] = &["pod", "service"];

/// They live in one thread and before any runtime.
const SINGLE_THREADED: &[&str] = &["executor", "keeper", "oci"];

/// Checks the whole workspace.
pub(crate) fn run() -> anyhow::Result<()> {
    let faults = dependency_faults()?;
    if faults.is_empty() {
        return Ok(());
    }
    bail!("the dependency direction of docs/ARCHITECTURE.md is broken:\n  {}", faults.join("\n  "))
}

fn dependency_faults() -> anyhow::Result<Vec<String>> {
    let manifest = crate::workspace::root().join("Cargo.toml");
    let metadata = MetadataCommand::new().manifest_path(manifest).no_deps().exec().context("cargo metadata")?;
    let rules: BTreeMap<&str, &[&str]> = MAY_USE.iter().copied().collect();
    let members: Vec<String> = metadata.packages.iter().map(|package| package.name.to_string()).collect();
    let mut faults = Vec::new();
    for package in &metadata.packages {
        let uses = package.dependencies.iter().filter(|used| used.kind != DependencyKind::Development);
        for used in uses.map(|used| used.name.as_str()) {
            let name = package.name.as_str();
            let inside = members.iter().any(|member| member == used);
            if inside && rules.get(name).is_some_and(|allowed| !allowed.contains(&used)) {
                faults.push(format!("{name} may not use {used}"));
            }
            if PURE.contains(&name) && EFFECTS.contains(&used) {
                faults.push(format!("{name} is pure and may not use {used}"));
            }
            if SINGLE_THREADED.contains(&name) && used == "tokio" {
                faults.push(format!("{name} is single-threaded and may not use tokio"));
            }
        }
    }
    Ok(faults)
}

#[cfg(test)]
mod tests {
    #[test]
    fn dependencies_point_one_way() {
        assert_eq!(super::dependency_faults().unwrap(), Vec::<String>::new());
    }
}
