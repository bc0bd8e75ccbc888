//! `fuzz`: the parsers' fuzz tests for longer than a run of the tests, each time from another place.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};

use crate::workspace::{cargo, root, run as run_program};

/// What to feed, and for how long.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// A target, or `all` [default: print their names]
    target: Option<String>,
    /// For how long each of them
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Where the random numbers begin [default: another one each time]
    #[arg(long)]
    seed: Option<u64>,
}

/// A target is known by its corpus: `crates/<crate>/corpus/<name>`.
struct Target {
    krate: String,
    name: String,
}

/// The command.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    let targets = targets(&root())?;
    let Some(wanted) = &options.target else {
        targets.iter().for_each(|target| println!("{} ({})", target.name, target.krate));
        return Ok(());
    };
    let chosen: Vec<&Target> = targets.iter().filter(|target| wanted == "all" || target.name == *wanted).collect();
    ensure!(!chosen.is_empty(), "there is no target {wanted}; `cargo xtask fuzz` names them");
    for target in chosen {
        feed(target, options)?;
    }
    Ok(())
}

fn feed(target: &Target, options: &Options) -> anyhow::Result<()> {
    let clock = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let seed = options.seed.unwrap_or_else(|| u64::try_from(clock().as_millis()).unwrap_or_default());
    let test = format!("fuzz_{}", target.name);
    let mut command = cargo(&["test", "--package", &target.krate, "--lib", "--", &test, "--nocapture"]);
    command.env(fuzz::SECONDS, options.seconds.to_string()).env(fuzz::SEED, seed.to_string());
    command.env(fuzz::FINDINGS, findings());
    run_program(&mut command).with_context(|| {
        format!("what it did not survive is in {}; it belongs into its corpus once it does", findings().display())
    })
}

fn findings() -> PathBuf {
    root().join("target/fuzz")
}

/// Those of all crates, by crate and name.
fn targets(root: &Path) -> anyhow::Result<Vec<Target>> {
    let mut found = Vec::new();
    for krate in directories(&root.join("crates"))? {
        let corpus = krate.join("corpus");
        // That of the fuzzer itself is for its own tests.
        if !corpus.is_dir() || krate.ends_with("fuzz") {
            continue;
        }
        for target in directories(&corpus)? {
            found.push(Target { krate: name_of(&krate), name: name_of(&target) });
        }
    }
    found.sort_by(|a, b| (&a.krate, &a.name).cmp(&(&b.krate, &b.name)));
    Ok(found)
}

fn directories(dir: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(dir).with_context(|| format!("list {}", dir.display()))?;
    let paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>()?;
    Ok(paths.into_iter().filter(|path| path.is_dir()).collect())
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_corpus_has_its_test() {
        for target in targets(&root()).unwrap() {
            let sources = root().join("crates").join(&target.krate).join("src");
            let test = format!("fn fuzz_{}()", target.name);
            assert!(contains(&sources, &test), "{test} is not in {}", sources.display());
        }
    }

    fn contains(dir: &Path, text: &str) -> bool {
        std::fs::read_dir(dir).unwrap().any(|entry| {
            let path = entry.unwrap().path();
            if path.is_dir() {
                return contains(&path, text);
            }
            std::fs::read_to_string(&path).is_ok_and(|source| source.contains(text))
        })
    }
}
