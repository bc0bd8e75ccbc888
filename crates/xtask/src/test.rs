//! All tests, each kind once, with a closing line that counts them.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use testkit::host::{self, Tool};

use crate::workspace::{build_release, cargo};

/// Programs the tests compare with or set the stage with; the node itself needs none of them.
const TOOLS: &[Tool] = &[
    Tool { program: "ip", deb: "iproute2", rpm: "iproute" },
    Tool::new("nft", "nftables"),
    Tool { program: "conntrack", deb: "conntrack", rpm: "conntrack-tools" },
    Tool { program: "/usr/include/seccomp.h", deb: "libseccomp-dev", rpm: "libseccomp-devel" },
    testkit::registry::TOOL,
];

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only the tests of the crates; not the voyage through the whole node.
    #[arg(long)]
    quick: bool,
}

/// How many tests passed, failed and were skipped.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Count {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Count {
    /// Adds one result line of a test program: `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
    fn add_line(&mut self, line: &str) {
        let Some(rest) = line.strip_prefix("test result: ") else {
            return;
        };
        let number = |word: &str| -> u64 {
            let before = rest.split_once(&format!(" {word}")).map_or("", |(before, _)| before);
            before.rsplit([' ', '.']).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
        };
        self.passed += number("passed");
        self.failed += number("failed");
        self.ignored += number("ignored");
    }
}

/// Installs what is missing, builds, and runs everything.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the tests make namespaces, control groups and mounts: run them as root");
    }
    host::install(TOOLS)?;
    host::install(crate::images::TOOLS)?;
    let mut count = Count::default();
    let result = crates(&mut count).and_then(|()| if options.quick { Ok(()) } else { voyage(&mut count) });
    println!("tests: {} passed, {} failed, {} skipped", count.passed, count.failed, count.ignored);
    result
}

/// The tests of all crates; built outside, run inside a network namespace without a way out.
fn crates(count: &mut Count) -> anyhow::Result<()> {
    crate::workspace::run(&mut cargo(&["test", "--workspace", "--no-run", "--quiet"]))?;
    let binaries = cargo(&["test", "--workspace", "--no-fail-fast"]);
    let ok = counted(in_private_network(binaries), count)?;
    if !ok {
        bail!("tests of the crates failed; the names stand above");
    }
    Ok(())
}

fn voyage(count: &mut Count) -> anyhow::Result<()> {
    let orlop = build_release()?;
    let points = crate::demo::once(&orlop).inspect_err(|_| count.failed += 1)?;
    count.passed += points as u64;
    Ok(())
}

/// `command`, started in a network namespace of its own with loopback up.
fn in_private_network(command: Command) -> Command {
    let mut outer = Command::new("unshare");
    outer.args(["--net", "sh", "-c", "ip link set lo up && exec \"$@\"", "sh"]);
    outer.arg(command.get_program()).args(command.get_args());
    if let Some(dir) = command.get_current_dir() {
        outer.current_dir(dir);
    }
    outer
}

/// Runs `command`, shows its output and counts the result lines in it. Returns whether it exited with 0.
fn counted(mut command: Command, count: &mut Count) -> anyhow::Result<bool> {
    let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("start {command:?}"))?;
    let stdout = child.stdout.take().context("stdout is piped")?;
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        count.add_line(&line);
        writeln!(std::io::stdout(), "{line}")?;
    }
    Ok(child.wait()?.success())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_counted() {
        let mut count = Count::default();
        count
            .add_line("test result: ok. 13 passed; 0 failed; 2 ignored; 0 measured; 0 filtered out; finished in 0.01s");
        count.add_line("test result: FAILED. 1 passed; 4 failed; 0 ignored; 0 measured");
        count.add_line("test foo ... ok");
        assert_eq!(count, Count { passed: 14, failed: 4, ignored: 2 });
    }
}
