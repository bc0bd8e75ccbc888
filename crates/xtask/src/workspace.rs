//! Where things of the workspace lie, and cargo as it is run from here.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, bail};

/// The workspace's root directory: the one cargo was called in, since clones may share a target directory and with it
/// the program that another of them has built.
pub(crate) fn root() -> PathBuf {
    let here = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    let here = Path::new(&here);
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

/// `cargo` in the workspace's root.
pub(crate) fn cargo(arguments: &[&str]) -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(arguments).current_dir(root());
    cargo
}

/// Runs `command` with its output shown.
pub(crate) fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("start {command:?}"))?;
    if !status.success() {
        bail!("{command:?}: {status}");
    }
    Ok(())
}

/// Builds the release binary and returns its path.
pub(crate) fn build_release() -> anyhow::Result<PathBuf> {
    let mut built = build_release_of(&["orlop"])?;
    built.pop().context("cargo named no executable for orlop")
}

/// Builds programs of the workspace with optimisation and returns their paths, in the order of `names`.
pub(crate) fn build_release_of(names: &[&str]) -> anyhow::Result<Vec<PathBuf>> {
    let mut build = cargo(&["build", "--release", "--message-format", "json-render-diagnostics"]);
    build.args(names.iter().flat_map(|name| ["--package", name]));
    let output = build.stderr(std::process::Stdio::inherit()).output().context("start cargo build")?;
    if !output.status.success() {
        bail!("cargo build --release of {}: {}", names.join(", "), output.status);
    }
    let executables: Vec<(String, PathBuf)> = cargo_metadata::Message::parse_stream(&output.stdout[..])
        .filter_map(Result::ok)
        .filter_map(|message| match message {
            cargo_metadata::Message::CompilerArtifact(artifact) => {
                Some((artifact.target.name, artifact.executable?.into()))
            }
            _ => None,
        })
        .collect();
    let path = |name: &&str| {
        let found = executables.iter().find(|(target, _)| target == name);
        found.map(|(_, path)| path.clone()).with_context(|| format!("cargo named no executable for {name}"))
    };
    names.iter().map(path).collect()
}
