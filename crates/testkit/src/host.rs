//! The machine that the tests and the demo run on: its package manager, and programs run with a clear failure.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};

/// A program that a test or the demo needs, and the package that brings it, by distribution family.
#[derive(Debug, Clone, Copy)]
pub struct Tool {
    /// The program, or an absolute path that the package brings.
    pub program: &'static str,
    /// Debian, Ubuntu.
    pub deb: &'static str,
    /// Fedora, RHEL.
    pub rpm: &'static str,
}

impl Tool {
    /// A tool whose package has one name everywhere.
    pub const fn new(program: &'static str, package: &'static str) -> Self {
        Self { program, deb: package, rpm: package }
    }

    fn is_present(&self) -> bool {
        find(self.program).is_some()
    }
}

/// Where a program lies; an absolute path is looked at as it is.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    dirs.map(|dir| dir.join(program)).find(|file| file.exists())
}

/// Whether the machine is there for the tests alone, as the virtual one is: what cannot be had twice, such as its clock, may be
/// changed.
pub fn is_own_machine() -> bool {
    std::env::var_os("ORLOP_TEST_MACHINE").is_some_and(|whose| whose == "own")
}

/// Installs what is missing of `tools` by the distribution's package manager and says which.
///
/// # Errors
/// No known package manager, or it failed; the message names the packages to install by hand.
pub fn install(tools: &[Tool]) -> anyhow::Result<()> {
    let missing: Vec<&Tool> = tools.iter().filter(|tool| !tool.is_present()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let debian = Path::new("/usr/bin/apt-get").exists();
    let names: Vec<&str> = missing.iter().map(|tool| if debian { tool.deb } else { tool.rpm }).collect();
    eprintln!("installing host packages: {}", names.join(" "));
    let by_hand = || format!("install these packages by hand: {}", names.join(" "));
    if debian {
        run(Command::new("apt-get").args(["update", "-qq"])).with_context(by_hand)?;
        let mut install = Command::new("apt-get");
        install.env("DEBIAN_FRONTEND", "noninteractive").args(["install", "-y", "-qq", "--no-install-recommends"]);
        run(install.args(&names)).with_context(by_hand)
    } else if Path::new("/usr/bin/dnf").exists() {
        run(Command::new("dnf").args(["install", "-y", "-q"]).args(&names)).with_context(by_hand)
    } else {
        bail!("no apt-get and no dnf here; {}", by_hand())
    }
}

/// Runs `command` to its end with its output kept; a failure shows the command and the end of what it printed.
///
/// # Errors
/// The program is missing or exits with another code than 0.
pub fn run(command: &mut Command) -> anyhow::Result<()> {
    output(command).map(drop)
}

/// As [`run`], returning what the command wrote to stdout.
///
/// # Errors
/// As [`run`].
pub fn output(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    let shown = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {shown}"))?;
    if !output.status.success() {
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let tail: Vec<&str> = text.lines().rev().take(20).collect();
        let tail: Vec<&str> = tail.into_iter().rev().collect();
        bail!("{shown}: {}\n{}", output.status, tail.join("\n"));
    }
    Ok(output.stdout)
}
