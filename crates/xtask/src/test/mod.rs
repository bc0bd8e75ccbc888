//! All tests, each kind once, with a closing line that counts them.

mod check;
mod count;
mod failures;
mod vm;
mod whole;

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use clap::ValueEnum as _;
use testkit::host::{self, Tool};
use testkit::{callers, debian, go, suite};

use count::Count;

use crate::workspace::{build_release, cargo};

/// Programs the tests compare with or set the stage with; the node itself needs none of them.
const TOOLS: &[Tool] = &[
    Tool { program: "ip", deb: "iproute2", rpm: "iproute" },
    Tool::new("nft", "nftables"),
    Tool::new("iptables-legacy-restore", "iptables"),
    Tool { program: "conntrack", deb: "conntrack", rpm: "conntrack-tools" },
    Tool { program: "/usr/include/seccomp.h", deb: "libseccomp-dev", rpm: "libseccomp-devel" },
    testkit::registry::TOOL,
];

/// What to run.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Only the tests of the crates on this kernel: no virtual machine, no voyage through the whole node.
    #[arg(long)]
    quick: bool,
    /// Only one part.
    #[arg(long, conflicts_with = "quick")]
    only: Option<Part>,
    /// Run it in the virtual machine, whose control groups are of version 2: voyage, trials, faults, member, kubeadm,
    /// containerd, restarts, peer
    #[arg(long, requires = "only")]
    vm: bool,
    /// Set by this program for its run in the machine: all that is needed is there
    #[arg(long, hide = true, requires = "orlop", conflicts_with = "vm")]
    aboard: bool,
    /// Sail with this program instead of building one.
    #[arg(long, value_name = "PROGRAM")]
    orlop: Option<PathBuf>,
}

/// A part of the tests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// All crates, on this kernel.
    Crates,
    /// What needs root, in a virtual machine with control groups version 2.
    Vm,
    /// The example on a whole node.
    Voyage,
    /// Bad input and faults on a whole node.
    Trials,
    /// The runtime, killed at random moments, and while hundreds of pods come and go.
    Faults,
    /// A node of a real control plane.
    Member,
    /// A node that kubeadm has join.
    Kubeadm,
    /// The kubelet alone, on containerd.
    Containerd,
    /// A node of a real control plane whose daemon is killed in the middle of everything.
    Restarts,
    /// Upstream's kubelet on the runtime alone.
    Peer,
    /// The service proxy beside upstream's.
    Proxy,
}

impl Part {
    /// As it is called on the command line.
    fn name(self) -> String {
        self.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
    }

    fn run(self, options: &Options, count: &mut Count) -> anyhow::Result<()> {
        if options.vm {
            return whole::run(self, &options.orlop()?, count);
        }
        match self {
            Self::Crates => crates(count),
            Self::Vm => vm::run(count),
            Self::Voyage => voyage(options, count, crate::demo::once),
            Self::Trials => voyage(options, count, crate::demo::try_faults),
            Self::Faults => {
                voyage(options, count, crate::conformance::faults::quick)?;
                voyage(options, count, crate::conformance::churn::quick)
            }
            Self::Member => {
                voyage(options, count, crate::member::standalone::run)?;
                voyage(options, count, crate::member::run)?;
                voyage(options, count, crate::member::crowd::quick)
            }
            Self::Kubeadm => voyage(options, count, crate::member::kubeadm::run),
            Self::Containerd => voyage(options, count, crate::member::foreign::run),
            Self::Restarts => voyage(options, count, crate::member::restarts::run),
            Self::Peer => voyage(options, count, crate::member::peer::run),
            Self::Proxy => voyage(options, count, crate::conformance::proxy::quick),
        }
    }
}

impl Options {
    /// The program to sail with.
    fn orlop(&self) -> anyhow::Result<PathBuf> {
        self.orlop.as_ref().map_or_else(build_release, |program| Ok(std::path::absolute(program)?))
    }

    fn parts(&self) -> Vec<Part> {
        match self.only {
            Some(part) => vec![part],
            None if self.quick => vec![Part::Crates],
            None => Part::value_variants().to_vec(),
        }
    }
}

/// Installs what is missing, builds, and runs everything.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("the tests make namespaces, control groups and mounts: run them as root");
    }
    if !options.aboard {
        for tools in [TOOLS, crate::images::TOOLS, crate::lab::vm::TOOLS] {
            host::install(tools)?;
        }
    }
    let mut count = Count::default();
    let mut faults = Vec::new();
    for part in options.parts() {
        let before = count.failed;
        if let Err(error) = part.run(options, &mut count) {
            println!("{error:#}");
            faults.push(error);
            count.failed = count.failed.max(before + 1);
        }
    }
    print!("{}", count.failures);
    faults.iter().for_each(|error| println!("failed: {error:#}"));
    println!("{}{count}", count::TOTAL);
    match faults.into_iter().next() {
        Some(first) => Err(first),
        None => Ok(()),
    }
}

/// The tests of all crates; built outside, run inside a network namespace without a way out.
fn crates(count: &mut Count) -> anyhow::Result<()> {
    crate::workspace::run(&mut cargo(&["test", "--workspace", "--no-run", "--quiet"]))?;
    stock_up()?;
    let binaries = cargo(&["test", "--workspace", "--no-fail-fast", "--", "--show-output"]);
    let ok = counted(in_private_network(binaries), count)?;
    if !ok {
        bail!("tests of the crates failed; the names stand above");
    }
    Ok(())
}

/// Makes what tests take from the cache: they run without a way out.
fn stock_up() -> anyhow::Result<()> {
    testkit::control_plane::build_with(&[go::KUBEADM, go::COREDNS])?;
    suite::build(suite::BASIC)?;
    for program in
        [go::SAMPLE_DEVICE_PLUGIN, go::RUNC, go::NRI_PLUGIN, go::CRICTL, go::BRIDGE, go::HOST_LOCAL, go::PORTMAP]
    {
        go::build(&program)?;
    }
    callers::in_go()?;
    callers::in_python()?;
    let of_debian = [debian::engines(), debian::crun(), debian::managed()];
    for error in of_debian.into_iter().filter_map(Result::err) {
        println!("tests with programs of Debian will be skipped: {error:#}");
    }
    Ok(())
}

fn voyage(options: &Options, count: &mut Count, sail: fn(&Path) -> anyhow::Result<usize>) -> anyhow::Result<()> {
    let orlop = options.orlop()?;
    let points = on_own_thread(|| sail(&orlop))?;
    count.passed += points as u64;
    Ok(())
}

/// A run changes the network namespace of its thread for good: each gets one of its own.
fn on_own_thread<T: Send>(run: impl FnOnce() -> anyhow::Result<T> + Send) -> anyhow::Result<T> {
    std::thread::scope(|scope| scope.spawn(run).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
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
    let mut view = View::default();
    for line in BufReader::new(stdout).lines() {
        let line = line?;
        count.add_line(&line);
        if view.shows(&line) {
            writeln!(std::io::stdout(), "{line}")?;
        }
    }
    Ok(child.wait()?.success())
}

/// Of what tests print that passed, only why they were skipped is worth showing.
#[derive(Default)]
struct View {
    in_successes: bool,
}

impl View {
    fn shows(&mut self, line: &str) -> bool {
        match line {
            "successes:" => self.in_successes = true,
            "failures:" => self.in_successes = false,
            _ if line.starts_with("test result: ") => self.in_successes = false,
            _ => {}
        }
        !self.in_successes || line.starts_with("skipped: ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_successes_only_skips_are_shown() {
        let mut view = View::default();
        let text = "test a ... ok\nsuccesses:\n---- a stdout ----\nskipped: needs b\nfailures:\nc\nsuccesses:\n    a\n\
                    test result: ok. 1 passed";
        let shown: Vec<&str> = text.lines().filter(|line| view.shows(line)).collect();
        assert_eq!(shown, ["test a ... ok", "skipped: needs b", "failures:", "c", "test result: ok. 1 passed"]);
    }
}
