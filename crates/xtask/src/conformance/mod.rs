//! `conformance`: the suites that others publish, run against orlop.
//!
//! ```text
//! node ──► private network namespace ─► control plane, registry, orlop node ─► ginkgo ─► e2e.test × procs ─► report.json
//! ```

mod cluster;
mod outcome;
mod suite;

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use testkit::host;
use testkit::{control_plane, go};
use tokio::signal::unix::{SignalKind, signal};

use crate::workspace::{build_release, root};
use cluster::{Cluster, TOOLS};
use outcome::Outcome;
use suite::{Run, Suite};

/// Which suite.
#[derive(clap::Subcommand)]
pub(crate) enum Conformance {
    /// Kubernetes' end-to-end tests that are marked [NodeConformance], on one node of orlop under a real control plane
    Node(NodeOptions),
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
    /// How many run side by side
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u16).range(2..))]
    procs: u16,
    /// Where the report and all logs go, emptied before
    #[arg(long, value_name = "DIR", default_value = "target/conformance/node")]
    output: PathBuf,
    /// Test this program instead of building one
    #[arg(long, value_name = "PROGRAM")]
    orlop: Option<PathBuf>,
}

/// The command.
pub(crate) fn run(Conformance::Node(options): &Conformance) -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("a node makes namespaces, control groups and mounts: run its tests as root");
    }
    host::install(TOOLS)?;
    let orlop = options.orlop.clone().map_or_else(build_release, Ok)?;
    let programs = control_plane::build_with(&[go::COREDNS])?;
    let suite = Suite { ginkgo: go::build(&go::GINKGO)?, tests: go::build(&go::E2E)? };
    testkit::suite::build(testkit::suite::ALL)?;
    let output = root().join(&options.output);
    empty(&output)?;
    let mut cluster = Cluster::start(&std::path::absolute(orlop)?, &programs, &output)?;
    let run = suite.start(&cluster, options, &output)?;
    let outcome = until_done(run, &mut cluster);
    cluster.end();
    outcome?;
    let outcome = Outcome::read(&output.join(suite::REPORT))?;
    print!("{outcome}");
    println!("logs: {}", output.display());
    if !outcome.is_passed() {
        bail!("the node does not pass");
    }
    Ok(())
}

/// A directory of an earlier run is taken over, one of something else is not.
fn empty(dir: &Path) -> anyhow::Result<()> {
    let is_ours = dir.join(suite::LOG).exists() || dir.read_dir().is_ok_and(|mut entries| entries.next().is_none());
    if dir.exists() && !is_ours {
        bail!("{} holds something else than a run of this suite; name another directory", dir.display());
    }
    if dir.exists() {
        std::fs::remove_dir_all(dir).with_context(|| format!("remove {}", dir.display()))?;
    }
    std::fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))
}

/// Waits for the end of the suite, or for Ctrl-C, which ends it.
fn until_done(mut run: Run, cluster: &mut Cluster) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut child = signal(SignalKind::child())?;
        while !run.has_ended()? {
            cluster.check()?;
            tokio::select! {
                _ = interrupt.recv() => break,
                _ = terminate.recv() => break,
                _ = child.recv() => {}
            }
        }
        run.end()
    })
}
