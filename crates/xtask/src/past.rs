//! `past`: writes down what this version leaves on disk and says to its keepers, for the tests of later versions.
//!
//! ```text
//! orlop up ─► two pods ─► kill -9 ─► records, without images' content ─┐
//! tests of keeper, cluster and oci, told where to write ─► their bytes ─────┴─► crates/testkit/past/<version>
//! ```
//! A release is written down once, when it is made; what is committed is never written again.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;
use testkit::host;

use crate::demo::Stage;
use crate::workspace::{build_release, cargo, root};

/// How to run it.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Where to write [default: crates/testkit/past/VERSION, which must not be there]
    #[arg(long, value_name = "DIR")]
    output: Option<PathBuf>,
    /// The program of the version, instead of building one
    #[arg(long, value_name = "PROGRAM")]
    orlop: Option<PathBuf>,
}

/// Two pods that live, in the host's network and on the bridge, and one that has ended.
const PODS: &str = r#"apiVersion: v1
kind: Pod
metadata: { name: stays, labels: { app: past } }
spec:
  hostNetwork: true
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: docker.io/library/busybox:latest
    command: [sh, -c, "echo up; exec sleep 100000"]
    env: [{ name: WHO, value: past }]
---
apiVersion: v1
kind: Pod
metadata: { name: bridged }
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: main
    image: docker.io/library/busybox:latest
    command: [sleep, "100000"]
    ports: [{ containerPort: 8080, hostPort: 18080 }]
---
apiVersion: v1
kind: Pod
metadata: { name: ended }
spec:
  restartPolicy: Never
  containers:
  - name: main
    image: docker.io/library/busybox:latest
    command: [sh, -c, "echo over; exit 7"]
"#;
/// What is kept of a node's directories.
const KEPT: &[&str] = &["run/format", "run/sandboxes", "run/network", "state/format", "state/pods", "state/images"];
/// Of these not: the content of images, and what is held by a daemon that runs.
const NOT_KEPT: &[&str] = &["fs", "work", "tmp", "lock"];
/// No record is longer.
const RECORD_MAX: u64 = 64 << 10;
/// How long the pods may take.
const PATIENCE: Duration = Duration::from_secs(120);

/// The command.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "a node makes namespaces, control groups and mounts: run it as root");
    host::install(crate::images::TOOLS)?;
    host::install(&[testkit::registry::TOOL])?;
    let output = match &options.output {
        Some(dir) => std::path::absolute(dir)?,
        None => root().join("crates/testkit/past").join(env!("CARGO_PKG_VERSION")),
    };
    let is_empty = output.read_dir().map_or(true, |mut entries| entries.next().is_none());
    ensure!(is_empty, "{} is written down already; a release is written down once", output.display());
    let orlop = options.orlop.clone().map_or_else(build_release, |program| Ok(std::path::absolute(program)?))?;
    std::fs::create_dir_all(&output)?;
    // They are built outside of the private network.
    for (package, program, test) in [
        ("keeper", &["--lib"][..], "protocol::past"),
        ("cluster", &["--lib"], "sealed::past"),
        ("oci", &["--test", "root"], "a_container_of"),
    ] {
        let mut cargo = cargo(&[&["test", "--quiet", "--package", package], program, &[test]].concat());
        crate::workspace::run(cargo.env(testkit::past::WANTED, &output))?;
    }
    let stage = Stage::set_up(&orlop, false)?;
    let written = leave(&stage).and_then(|()| keep(stage.dir.path(), &output));
    // The next node takes the pods over and ends them.
    let pods = stage.dir.path().join("pods.yaml");
    host::run(stage.orlop().args(["up", "--detach"]).arg(pods))?;
    host::run(stage.orlop().arg("down"))?;
    println!("{} files in {}", written?, output.display());
    Ok(())
}

/// Runs the pods, and kills the daemon.
fn leave(stage: &Stage) -> anyhow::Result<()> {
    let pods = stage.dir.path().join("pods.yaml");
    std::fs::write(&pods, PODS)?;
    host::run(stage.orlop().args(["up", "--detach"]).arg(pods))?;
    let deadline = Instant::now() + PATIENCE;
    while phases(stage)? != ["Failed", "Running", "Running"] {
        ensure!(Instant::now() < deadline, "the pods are {:?}", phases(stage)?);
        std::thread::sleep(Duration::from_millis(100)); // observed from outside, as an operator would
    }
    let pid = std::fs::read_to_string(stage.dir.path().join("run/lock"))?;
    let pid = Pid::from_raw(pid.trim().parse()?).context("a process id")?;
    let daemon = pidfd_open(pid, PidfdFlags::empty())?;
    pidfd_send_signal(&daemon, Signal::KILL)?;
    poll(&mut [PollFd::new(&daemon, PollFlags::IN)], None)?;
    Ok(())
}

/// The phases of the pods, sorted.
fn phases(stage: &Stage) -> anyhow::Result<Vec<String>> {
    let text = host::output(stage.orlop().args(["ps", "-o", "json"]))?;
    let pods: Vec<Value> = serde_json::from_slice(&text)?;
    let phase = |pod: &Value| pod["status"]["phase"].as_str().unwrap_or_default().to_owned();
    let mut phases: Vec<String> = pods.iter().map(phase).collect();
    phases.sort();
    Ok(phases)
}

/// Copies the records; how many there are.
fn keep(stage: &Path, output: &Path) -> anyhow::Result<usize> {
    let mut kept = 0;
    let mut open: Vec<PathBuf> = KEPT.iter().map(PathBuf::from).collect();
    while let Some(path) = open.pop() {
        let from = stage.join(&path);
        let metadata = from.symlink_metadata().with_context(|| format!("look at {}", from.display()))?;
        if metadata.is_dir() {
            for entry in from.read_dir()? {
                let name = entry?.file_name();
                if !NOT_KEPT.iter().any(|other| name == *other) {
                    open.push(path.join(name));
                }
            }
        } else if metadata.is_file() {
            if metadata.len() > RECORD_MAX {
                bail!("{} is no record: it has {} bytes", from.display(), metadata.len());
            }
            let to = output.join(&path);
            std::fs::create_dir_all(to.parent().context("below the output")?)?;
            std::fs::copy(&from, &to).with_context(|| format!("copy {}", from.display()))?;
            kept += 1;
        }
    }
    Ok(kept)
}
