//! `conformance`: the suites that others publish, run against orlop; upstream's service proxy beside ours; the runtime under
//! faults and under thousands of pods; and a node with hundreds of them.
//!
//! ```text
//! node ──► private network namespace ─► control plane, registry, node ─► ginkgo ─► e2e.test × procs ─► report.json
//! cri  ──► the same ──────────────────► registry, runtime ─────────────► ginkgo ─► critest × procs ──► report.json
//! ```

pub(crate) mod churn;
mod cluster;
pub(crate) mod contained;
mod cri;
pub(crate) mod faults;
pub(crate) mod left;
mod machine;
mod node;
mod outcome;
pub(crate) mod proxy;
pub(crate) mod served;
mod suite;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail, ensure};
use testkit::{control_plane, go};
use testkit::{groups, host};
use tokio::signal::unix::{SignalKind, signal};

use crate::member::crowd;
use crate::workspace::{build_release, root};
use cluster::{Cluster, Plan, TOOLS};
use machine::Families;
use node::{Kind, Proxy};
use outcome::Outcome;
use suite::{Choice, Run, Suite};

/// Which suite.
#[derive(clap::Subcommand)]
pub(crate) enum Conformance {
    /// Kubernetes' end-to-end tests that are marked [NodeConformance], on one node of orlop under a real control plane
    Node(NodeOptions),
    /// The tests of container runtimes (critest), on orlop's or containerd
    Cri(cri::Options),
    /// Upstream's kube-proxy and ours, before the same objects and the same packets
    Proxy(proxy::ProxyOptions),
    /// The runtime alone, killed at random moments while pods begin, exec, log and end
    Faults(faults::FaultsOptions),
    /// The runtime alone, while thousands of pods come and go: nothing of them may stay
    Churn(churn::ChurnOptions),
    /// A node of a real control plane with hundreds of pods: all Ready, steady, deleted, nothing left
    Crowd(crowd::Options),
}

/// How to run the tests of nodes.
#[derive(clap::Args)]
pub(crate) struct NodeOptions {
    /// Only specs whose names match this regular expression
    #[arg(long, value_name = "REGEX")]
    focus: Option<String>,
    /// No specs whose names match this regular expression
    #[arg(long, value_name = "REGEX")]
    skip: Option<String>,
    /// Which specs, by their labels
    #[arg(long, value_name = "FILTER", default_value = suite::NODE_CONFORMANCE)]
    labels: String,
    /// Only the specs that grade a service proxy, instead of those marked [NodeConformance]; with --dual-stack those that
    /// need it
    #[arg(long, conflicts_with_all = ["focus", "labels"])]
    services: bool,
    /// How many run side by side
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(2..))]
    procs: u16,
    /// Test upstream's kubelet, kube-proxy and containerd instead of orlop
    #[arg(long, conflicts_with_all = ["upstream_kubelet", "upstream_runtime"])]
    upstream: bool,
    /// Test orlop's runtime alone, on whose socket upstream's kubelet runs the pods
    #[arg(long)]
    upstream_kubelet: bool,
    /// Test orlop's kubelet and service proxy alone; containerd, runc and the CNI plugins run the pods
    #[arg(long, conflicts_with = "upstream_kubelet")]
    upstream_runtime: bool,
    /// With --upstream: let `orlop proxy` be its kube-proxy, and the rest upstream's
    #[arg(long, requires = "upstream")]
    orlop_proxy: bool,
    /// The mode of the kube-proxy of --upstream
    #[arg(long, value_name = "MODE", requires = "upstream", default_value = "iptables",
        value_parser = ["iptables", "nftables"])]
    proxy_mode: String,
    /// The directory of a run with --upstream: what passed there and fails here is shown apart
    #[arg(long, value_name = "DIR")]
    against: Option<PathBuf>,
    /// How many nodes; more than one have network namespaces of their own
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=8))]
    nodes: u8,
    /// Let them have addresses of two families; with --upstream and several nodes
    #[arg(long, requires = "upstream")]
    dual_stack: bool,
    /// Where the report and all logs go, emptied before [default: target/conformance/node, …/upstream, …/services,
    /// …/upstream-kubelet or …/upstream-runtime]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// Test this program instead of building one
    #[arg(long, value_name = "PROGRAM")]
    orlop: Option<PathBuf>,
    /// Set by this program for its run inside the namespaces of upstream's node: the directory of the run
    #[arg(long, hide = true)]
    inside: Option<PathBuf>,
}

/// The command.
pub(crate) fn run(conformance: &Conformance) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("a node makes namespaces, control groups and mounts: run its tests as root");
    }
    match conformance {
        Conformance::Node(options) => node(options),
        Conformance::Cri(options) => cri::run(options),
        Conformance::Proxy(options) => proxy::run(options),
        Conformance::Faults(options) => faults::run(options),
        Conformance::Churn(options) => churn::run(options),
        Conformance::Crowd(options) => crowd::run(options),
    }
}

fn node(options: &NodeOptions) -> anyhow::Result<()> {
    let is_pure = options.upstream && !options.orlop_proxy;
    ensure!(!is_pure || options.orlop.is_none(), "--orlop names a program, and with --upstream alone there is none");
    ensure!(
        !is_pure || options.against.is_none(),
        "--against compares orlop with upstream, and --upstream alone is none"
    );
    ensure!(!options.dual_stack || options.nodes > 1, "--dual-stack wants several nodes (--nodes)");
    host::install(TOOLS)?;
    let kind = options.kind()?;
    let programs = control_plane::build_with(&[go::COREDNS])?;
    let suite = Suite { ginkgo: go::build(&go::GINKGO)?, tests: go::build(&go::E2E)? };
    testkit::suite::build(testkit::suite::ALL)?;
    let output = options.output();
    match &options.inside {
        Some(dir) => {
            contained::cover()?;
            return grade(&kind, &suite, &programs, dir, options);
        }
        None => empty(&output, suite::LOG)?,
    }
    if kind.needs_cover() {
        contained::run()?;
    } else {
        let dir = tempfile::Builder::new().prefix("orlop-conformance-").tempdir()?;
        let graded = grade(&kind, &suite, &programs, dir.path(), options);
        groups::remove(dir.path().file_name().context("a directory has a name")?)?;
        graded?;
    }
    report(&output, options.against.as_deref())
}

impl NodeOptions {
    fn output(&self) -> PathBuf {
        let default = match (self.upstream, self.upstream_kubelet, self.upstream_runtime) {
            (true, ..) if self.orlop_proxy => "target/conformance/services",
            (true, ..) => "target/conformance/upstream",
            (_, true, _) => "target/conformance/upstream-kubelet",
            (.., true) => "target/conformance/upstream-runtime",
            (false, false, false) => "target/conformance/node",
        };
        root().join(self.output.as_deref().unwrap_or(Path::new(default)))
    }

    /// Whose node it is, with its programs built.
    fn kind(&self) -> anyhow::Result<Kind> {
        let orlop = || self.orlop.as_ref().map_or_else(build_release, |program| Ok(std::path::absolute(program)?));
        Ok(match (self.upstream, self.upstream_kubelet, self.upstream_runtime) {
            (true, ..) => Kind::Upstream {
                programs: go::build_all("reference-node", &[go::REFERENCE, go::REFERENCE_NODE].concat())?,
                proxy: Proxy { program: self.orlop_proxy.then(orlop).transpose()?, mode: self.proxy_mode.clone() },
            },
            (_, true, _) => Kind::UpstreamKubelet {
                programs: go::build_all("upstream-kubelet", go::REFERENCE_NODE)?,
                orlop: orlop()?,
            },
            (.., true) => {
                Kind::UpstreamRuntime { programs: go::build_all("reference", go::REFERENCE)?, orlop: orlop()? }
            }
            (false, false, false) => Kind::Orlop(orlop()?),
        })
    }

    fn choice(&self) -> Choice<'_> {
        let Self { focus, skip, labels, services, dual_stack, procs, .. } = self;
        let (focus, labels) = match (services, dual_stack) {
            (true, false) => (Some(suite::SERVICES), suite::SERVICES_LABELS),
            (true, true) => (Some(suite::DUAL_STACK), suite::DUAL_STACK_LABELS),
            (false, _) => (focus.as_deref(), labels.as_str()),
        };
        Choice { focus, skip: skip.as_deref(), labels: Some(labels), procs: *procs }
    }
}

/// Runs the suite against a fresh cluster; it leaves its report.
fn grade(kind: &Kind, suite: &Suite, programs: &Path, dir: &Path, options: &NodeOptions) -> anyhow::Result<()> {
    let output = options.output();
    let families = if options.dual_stack { Families::Dual } else { Families::Ipv4 };
    let plan = Plan { kind, nodes: options.nodes, families, programs, dir, output: &output };
    let mut cluster = Cluster::start(&plan)?;
    let run = suite.start(&options.choice(), &cluster.suite_arguments(&output)?, &output)?;
    let outcome = until_done(run, || cluster.check());
    cluster.end();
    outcome
}

/// Tells what the report in `output` says.
fn report(output: &Path, against: Option<&Path>) -> anyhow::Result<()> {
    let outcome = Outcome::read(&output.join(suite::REPORT))?;
    print!("{outcome}");
    println!("logs: {}", output.display());
    let Some(against) = against else {
        ensure!(outcome.is_passed(), "not all of it passes");
        return Ok(());
    };
    let upstream = Outcome::read(&root().join(against).join(suite::REPORT))?;
    let worse = outcome.worse_than(&upstream);
    println!("upstream's, of the specs that ran here: {}", upstream.of_those_in(&outcome));
    ensure!(worse.is_empty(), "upstream's passes these, this one does not:\n  {}", worse.join("\n  "));
    println!("nothing that upstream's passes fails here");
    Ok(())
}

/// A directory of an earlier run, which has a `mark`, is taken over; one of something else is not.
fn empty(dir: &Path, mark: &str) -> anyhow::Result<()> {
    let is_ours = dir.join(mark).exists() || dir.read_dir().is_ok_and(|mut entries| entries.next().is_none());
    if dir.exists() && !is_ours {
        bail!("{} holds something else than a run of this suite; name another directory", dir.display());
    }
    if dir.exists() {
        std::fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
    // At once: a run that fails before its suite begins has left logs, too.
    let mark = dir.join(mark);
    std::fs::write(&mark, "").with_context(|| format!("write {}", mark.display()))
}

/// Waits for the end of the suite, or for Ctrl-C, which ends it.
/// `check` tells whether what it runs against is still there.
fn until_done(mut run: Run, mut check: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut child = signal(SignalKind::child())?;
        while !run.has_ended()? {
            check()?;
            tokio::select! {
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
                _ = child.recv() => {}
            }
        }
        run.end()
    })
}

#[cfg(test)]
mod tests {
    use super::empty;

    #[test]
    fn a_run_takes_over_the_directory_of_one_that_has_failed_early() {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("run");
        empty(&output, "mark").unwrap();
        std::fs::write(output.join("node-1.some-name.log"), "it did not start").unwrap();
        empty(&output, "mark").unwrap();
        assert!(!output.join("node-1.some-name.log").exists());
        std::fs::write(dir.path().join("letter"), "dear").unwrap();
        assert!(empty(dir.path(), "mark").unwrap_err().to_string().contains("name another directory"));
    }
}
