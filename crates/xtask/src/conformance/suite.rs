//! The suite's programs, and one run of them.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

/// Those that every node has to pass, without those that need a feature of its own, or a cluster for themselves.
pub(super) const NODE_CONFORMANCE: &str = "NodeConformance && !Serial && !Flaky && Feature: isEmpty";

/// Those of sig-network that grade a service proxy, without those that need a cloud, an Internet, a cluster for
/// themselves, or a kernel with SCTP.
pub(super) const SERVICES: &str = "\\[sig-network\\] (Services|Networking Granular Checks|Networking should check kube-proxy|\
    Conntrack|Connectivity Pod Lifecycle|HostPort|KubeProxy|NoSNAT|Proxy version|Service endpoints latency|Service CIDRs|\
    Traffic Distribution|Topology Hints)";
pub(super) const SERVICES_LABELS: &str = "!Serial && !Disruptive && !Flaky && Feature: isSubsetOf KubeProxyNFAcct";

/// Those that grade one with two address families.
pub(super) const DUAL_STACK: &str = "\\[sig-network\\] ";
pub(super) const DUAL_STACK_LABELS: &str =
    "!Serial && !Disruptive && !Flaky && Feature: containsAny IPv6DualStack && Feature: isSubsetOf IPv6DualStack";

/// What ginkgo says.
pub(super) const LOG: &str = "ginkgo.log";
/// What it reports.
pub(super) const REPORT: &str = "report.json";

/// Longer than the whole suite takes with one process.
const TIMEOUT: &str = "6h";
/// How long the specs may take to clean up when they are interrupted.
const END_LIMIT: Duration = Duration::from_secs(60);

/// Where its programs are.
pub(super) struct Suite {
    pub(super) ginkgo: PathBuf,
    pub(super) tests: PathBuf,
}

/// A run under way. It ends with the thread that began it.
pub(super) struct Run {
    child: Child,
    reader: Option<JoinHandle<anyhow::Result<()>>>,
}

/// Which specs, and how many of them side by side.
pub(super) struct Choice<'a> {
    /// Regular expressions of names.
    pub(super) focus: Option<&'a str>,
    pub(super) skip: Option<&'a str>,
    /// A filter of labels.
    pub(super) labels: Option<&'a str>,
    pub(super) procs: u16,
}

impl Suite {
    /// Starts the specs of `choice`, whose program takes `arguments`, with everything they say in `output`.
    pub(super) fn start(&self, choice: &Choice<'_>, arguments: &[OsString], output: &Path) -> anyhow::Result<Run> {
        let mut command = Command::new(testkit::daemon::TOOL.program);
        command.args(["--pdeathsig", "SIGKILL"]).arg(&self.ginkgo);
        command.args(["-v", "--no-color", "--timeout", TIMEOUT, "--procs", &choice.procs.to_string()]);
        command.args(["--json-report", REPORT, "--output-dir"]).arg(output);
        for (flag, value) in [("--label-filter", choice.labels), ("--focus", choice.focus), ("--skip", choice.skip)] {
            command.args(value.iter().flat_map(|value| [flag, value]));
        }
        command.arg(&self.tests).arg("--").args(arguments);
        // Not in the terminal's group: Ctrl-C is for the one who started it, who decides in which order things end.
        command.current_dir(output).stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
        let log = File::create(output.join(LOG))?;
        command.stderr(log.try_clone()?);
        let mut child = command.spawn().context("start ginkgo")?;
        let said = child.stdout.take().context("stdout is piped")?;
        let reader = Some(std::thread::spawn(move || listen(said, log)));
        Ok(Run { child, reader })
    }
}

impl Run {
    /// Whether it has ended by itself.
    pub(super) fn has_ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Ends it: the specs that run are interrupted and clean up. Specs that failed are no error.
    pub(super) fn end(mut self) -> anyhow::Result<()> {
        if !self.has_ended()? {
            println!("interrupting the specs, which clean up within {} s", END_LIMIT.as_secs());
            self.signal(Signal::INT)?;
            let process = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty())?;
            poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&Timespec::try_from(END_LIMIT)?))?;
            self.kill()?;
        }
        let reader = self.reader.take().context("it is taken once")?;
        reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// To ginkgo and to the processes that run its specs.
    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        // The child has not been waited for, so its number is its own, and its group's.
        kill_process_group(Pid::from_child(&self.child), signal).context("end ginkgo")
    }

    fn kill(&mut self) -> anyhow::Result<()> {
        if !self.has_ended()? {
            self.signal(Signal::KILL)?;
            self.child.wait()?;
        }
        Ok(())
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        let _ = self.kill(); // fails only when it has ended already
    }
}

/// Keeps all that is said and shows how each spec ends.
fn listen(said: ChildStdout, mut log: File) -> anyhow::Result<()> {
    let mut progress = Progress::default();
    for line in BufReader::new(said).split(b'\n') {
        let line = line?;
        log.write_all(&line)?;
        log.write_all(b"\n")?;
        if let Some(ended) = progress.line(&String::from_utf8_lossy(&line)) {
            println!("{ended}");
        }
    }
    Ok(())
}

/// Finds the ends of specs in what ginkgo says: a line with a mark and the outcome, and then the name.
#[derive(Debug, Default)]
struct Progress {
    mark: Option<(&'static str, String)>,
    ended: usize,
}

impl Progress {
    fn line(&mut self, line: &str) -> Option<String> {
        if let Some((word, time)) = self.mark.take() {
            self.ended += 1;
            return Some(format!("{:>4} {word} {}{time}", self.ended, without_labels(line)));
        }
        let (word, rest) = if let Some(rest) = line.strip_prefix("S [SKIPPED] [") {
            ("skip", rest)
        } else {
            let rest = line.strip_prefix("• [")?;
            // A mark of another kind stands before the time: FAILED, PANICKED, TIMEDOUT, INTERRUPTED.
            rest.split_once("] [").map_or(("ok  ", rest), |(_, rest)| ("FAIL", rest))
        };
        let seconds = rest.strip_suffix(" seconds]")?.parse().ok();
        self.mark = Some((word, seconds.map(|seconds: f64| format!(" ({seconds:.1} s)")).unwrap_or_default()));
        None
    }
}

/// A spec's name without the list of its labels that follows it.
fn without_labels(line: &str) -> &str {
    let labels = line.strip_suffix(']').and_then(|line| line.rsplit_once(" ["));
    labels.filter(|(_, labels)| labels.contains(", ")).map_or(line, |(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_of_a_spec_is_one_line() {
        let mut progress = Progress::default();
        let text = "------------------------------\n• [6.130 seconds]\n[sig-node] Pods should run [NodeConformance] [sig-node, NodeConformance]\n\
                    k8s.io/kubernetes/test/e2e/common/node/pods.go:12\n\n  Timeline >>\n  • no end\n\
                    ------------------------------\n• [FAILED] [300.02 seconds]\n[sig-node] Probing\n\
                    • [INTERRUPTED] [1.5 seconds]\n[sig-node] Probing longer\n\
                    ------------------------------\nS [SKIPPED] [0.2 seconds]\n[sig-node] Sysctls";
        let ends: Vec<String> = text.lines().filter_map(|line| progress.line(line)).collect();
        assert_eq!(
            ends,
            [
                "   1 ok   [sig-node] Pods should run [NodeConformance] (6.1 s)",
                "   2 FAIL [sig-node] Probing (300.0 s)",
                "   3 FAIL [sig-node] Probing longer (1.5 s)",
                "   4 skip [sig-node] Sysctls (0.2 s)",
            ]
        );
    }
}
