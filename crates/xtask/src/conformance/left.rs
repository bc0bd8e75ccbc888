//! What a node of orlop leaves behind, and its end.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::ensure;
use testkit::host;

/// Where orlop keeps its things.
pub(crate) fn places(dir: &Path) -> [String; 2] {
    ["state", "run"].map(|place| format!("--{place}-dir={}", dir.join(place).display()))
}

/// Whether everything in `dir` has an owner; asked while the node serves.
pub(crate) fn nothing(orlop: &Path, dir: &Path) -> anyhow::Result<()> {
    let left = host::output(&mut command(orlop, dir, &["fsck"]))?;
    let left = String::from_utf8_lossy(&left);
    ensure!(left.is_empty(), "this is left:\n{left}");
    Ok(())
}

/// The sandboxes of a node that does not run.
pub(crate) fn sandboxes(dir: &Path) -> Vec<String> {
    let entries = dir.join("run/sandboxes").read_dir().into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

/// A node alone, with nothing to run, removes the pods that it finds.
pub(crate) fn remove(orlop: &Path, dir: &Path) -> anyhow::Result<()> {
    let nothing = dir.join("nothing");
    std::fs::create_dir_all(&nothing)?;
    host::run(command(orlop, dir, &["up", "--detach"]).arg(nothing))?;
    host::run(&mut command(orlop, dir, &["down"]))
}

fn command(orlop: &Path, dir: &Path, words: &[&str]) -> Command {
    let mut command = Command::new(orlop);
    command.args(words).args(places(dir)).stdin(Stdio::null());
    command
}
