//! Rules of the workspace as code: which crate may depend on which, that each known attack has its test, and that the map
//! shows what there is.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, bail};
use cargo_metadata::{DependencyKind, MetadataCommand};

/// For each crate the crates of the workspace that it may use. Reading order: what comes first knows least.
const MAY_USE: &[(&str, &[&str])] = &[
    ("sys", &[]),
    ("configfile", &[]),
    ("instruments", &["sys"]),
    ("trust", &[]),
    ("dbus", &["sys"]),
    ("systemd", &["sys", "dbus"]),
    ("service", &[]),
    ("pod", &[]),
    ("cri", &[]),
    ("plugin", &[]),
    ("netfilter", &["sys", "service"]),
    ("executor", &["sys"]),
    ("oci", &["sys", "configfile", "dbus", "systemd", "executor"]),
    ("keeper", &["sys", "executor"]),
    ("nri", &["sys"]),
    ("image", &["sys", "configfile", "trust"]),
    ("network", &["sys", "netfilter"]),
    ("cluster", &["sys", "trust", "instruments"]),
    ("runtime", &["sys", "executor", "keeper", "image", "network", "nri", "cri"]),
    ("proxy", &["sys", "configfile", "instruments", "service", "netfilter", "cluster"]),
    ("kubelet", &["sys", "dbus", "systemd", "configfile", "instruments", "trust", "cri", "plugin", "cluster", "pod"]),
];

/// Crates that pure ones must not use.
const EFFECTS: &[&str] = &["tokio", "rustix", "libc", "sys"];
const PURE: &[&str] = &["pod", "service"];

/// They live in one thread and before any runtime.
const SINGLE_THREADED: &[&str] = &["executor", "keeper", "oci"];

/// Checks the whole workspace.
pub(crate) fn run() -> anyhow::Result<()> {
    let faults = dependency_faults()?;
    if !faults.is_empty() {
        bail!("the dependency direction of docs/ARCHITECTURE.md is broken:\n  {}", faults.join("\n  "))
    }
    let missing = missing_attacks()?;
    if !missing.is_empty() {
        bail!("docs/attacks.md names tests that there are not: {}", missing.join(", "))
    }
    let stale = stale_places()?;
    if !stale.is_empty() {
        bail!("docs/ARCHITECTURE.md names what there is not: {}", stale.join(", "))
    }
    Ok(())
}

/// The places that the map names as `crate::module::item`, and that are not there.
fn stale_places() -> anyhow::Result<Vec<String>> {
    let root = crate::workspace::root();
    let path = root.join("docs/ARCHITECTURE.md");
    let map = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let is_place =
        |text: &&str| text.contains("::") && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':');
    let mut stale = Vec::new();
    for place in map.split('`').skip(1).step_by(2).filter(is_place) {
        if !is_there(&root.join("crates"), place)? {
            stale.push(place.to_owned());
        }
    }
    Ok(stale)
}

/// Follows the names into files as far as there are files, and looks for the others in what is left.
fn is_there(crates: &Path, place: &str) -> anyhow::Result<bool> {
    let mut names = place.split("::").peekable();
    let mut dir = crates.join(names.next().unwrap_or_default()).join("src");
    if !dir.is_dir() {
        return Ok(false);
    }
    while let Some(next) = names.peek().map(|name| dir.join(name)) {
        if !next.is_dir() && !next.with_extension("rs").is_file() {
            break;
        }
        dir = next;
        names.next();
    }
    let mut sources = std::fs::read_to_string(dir.with_extension("rs")).unwrap_or_default();
    if dir.is_dir() {
        add_sources(&dir, &mut sources)?;
    }
    let defines = |name: &str| {
        let kinds = ["fn", "struct", "enum", "trait", "mod", "type", "const", "static"];
        let is_word_end = |rest: &str| !rest.starts_with(|c: char| c.is_alphanumeric() || c == '_');
        let follows = |start: &str| sources.split(start).skip(1).any(is_word_end);
        // A field, or a variant.
        kinds.iter().any(|kind| follows(&format!("{kind} {name}")))
            || follows(&format!("    {name}"))
            || follows(&format!("    pub {name}"))
    };
    Ok(names.all(defines))
}

/// The tests that the tables of attacks and faults name, and that are not in any source.
fn missing_attacks() -> anyhow::Result<Vec<String>> {
    let root = crate::workspace::root();
    let path = root.join("docs/attacks.md");
    let table = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    let followed_by_line = |line: &str| line.starts_with("|---");
    let lines = table.lines().zip(table.lines().skip(1).chain([""]));
    let rows: Vec<&str> =
        lines.filter(|(line, next)| line.starts_with("| ") && !followed_by_line(next)).map(|(line, _)| line).collect();
    let mut sources = String::new();
    add_sources(&root.join("crates"), &mut sources)?;
    let names =
        rows.iter().filter_map(|row| row.rsplit(" | ").next()).flat_map(|cell| cell.split('`').skip(1).step_by(2));
    let is_there = |name: &str| sources.contains(&format!("fn {name}(")) || sources.contains(&format!("(\"{name}\","));
    let mut missing: Vec<String> = names.filter(|name| !is_there(name)).map(str::to_owned).collect();
    let unproved = rows.iter().filter(|row| !row.contains("_")).map(|row| (*row).to_owned());
    missing.extend(unproved);
    Ok(missing)
}

fn add_sources(dir: &Path, sources: &mut String) -> anyhow::Result<()> {
    for entry in std::fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            add_sources(&path, sources)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            sources.push_str(&std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?);
        }
    }
    Ok(())
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

    #[test]
    fn the_map_shows_what_there_is() {
        assert_eq!(super::stale_places().unwrap(), Vec::<String>::new());
        let crates = crate::workspace::root().join("crates");
        for place in ["xtask::nonesuch", "xtask::tidy::Nonesuch", "nonesuch::tidy"] {
            assert!(!super::is_there(&crates, place).unwrap(), "{place}");
        }
        assert!(super::is_there(&crates, "xtask::tidy::is_there").unwrap());
    }

    #[test]
    fn each_attack_has_its_test() {
        assert_eq!(super::missing_attacks().unwrap(), Vec::<String>::new());
    }
}
