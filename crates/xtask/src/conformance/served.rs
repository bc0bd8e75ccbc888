//! `orlop runtime` on a stage, for its own tests: how it is started, asked and ended, and what it may not leave.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context as _, ensure};
use cri::{ImageService as _, v1};
use rustix::process::{Pid, Signal, kill_process};

use crate::demo::Stage;
use crate::voyage::{leftovers, wait};

/// What is about to happen happens within this time.
const SOON: Duration = Duration::from_secs(30);

/// The name of the image in the stage's registry.
pub(super) const IMAGE: &str = "docker.io/library/busybox:latest";

/// A running `orlop runtime`.
pub(super) struct Daemon {
    process: Child,
    pub(super) socket: PathBuf,
}

impl Daemon {
    /// Starts it and waits until it serves.
    pub(super) fn start(stage: &Stage) -> anyhow::Result<Self> {
        let dir = stage.dir.path();
        let socket = dir.join("cri.sock");
        let log = std::fs::OpenOptions::new().create(true).append(true).open(dir.join("orlop.log"))?;
        let mut command = stage.orlop();
        command.env("ORLOP_LOG", "info").arg("runtime").arg("--listen").arg(format!("unix://{}", socket.display()));
        command.arg("--cni-conf-dir").arg(dir.join("no-cni"));
        let mut process =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn().context("start orlop")?;
        let stdout = process.stdout.take().context("stdout is piped")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let daemon = Self { process, socket };
        ensure!(line.contains("CRI on"), "the runtime did not start again: {line:?}");
        Ok(daemon)
    }

    /// Its process id.
    pub(super) fn pid(&self) -> u32 {
        self.process.id()
    }

    pub(super) fn kill(&mut self) -> anyhow::Result<()> {
        self.process.kill()?;
        self.process.wait()?;
        Ok(())
    }

    /// Asks it to end, as a service manager does.
    pub(super) fn end(mut self) -> anyhow::Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.process.id())?).context("a process id")?;
        kill_process(pid, Signal::TERM)?;
        let status = self.process.wait()?;
        ensure!(status.success(), "the runtime ended with {status}");
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It has ended already, unless something failed.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What `orlop fsck` says of pods, of others on this machine too. A daemon that was not to end its pods leaves its bridge, its
/// table and its files to the next one.
pub(crate) fn fsck(stage: &Stage) -> anyhow::Result<Vec<String>> {
    let output = stage.orlop().arg("fsck").output().context("start orlop fsck")?;
    ensure!(output.stderr.is_empty(), "orlop fsck: {}", String::from_utf8_lossy(&output.stderr));
    let of_pods = |line: &&str| !["link ", "table ", "file "].iter().any(|kind| line.starts_with(kind));
    Ok(String::from_utf8_lossy(&output.stdout).lines().filter(of_pods).map(str::to_owned).collect())
}

/// The end of the runtime's log.
pub(super) fn print_log(stage: &Stage) {
    let log = std::fs::read_to_string(stage.dir.path().join("orlop.log")).unwrap_or_default();
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(60)..].iter().for_each(|line| println!("{line}"));
}

/// The bridge and the table stay for the next runtime; what belongs to a pod must be gone.
pub(super) fn nothing_is_left(stage: &Stage, before: &[String]) -> anyhow::Result<()> {
    let of_pods = |line: &String| {
        let of_network = line.starts_with("interface ") || line.starts_with("nft ");
        let of_daemon = line.starts_with("file ");
        !of_network && !of_daemon
    };
    let since =
        || anyhow::Ok(leftovers::since(before, stage.dir.path())?.into_iter().filter(of_pods).collect::<Vec<_>>());
    // The daemon's helper ends by the end of its socket, a moment after the daemon.
    let processes = || Ok((!since()?.iter().any(|line| line.starts_with("process "))).then_some(()));
    let _ = wait("the daemon's helper ends", SOON, processes); // what is still there then is named below
    let mut left = since()?;
    for dir in ["run/sandboxes", "state/images/rootfs"] {
        let entries = std::fs::read_dir(stage.dir.path().join(dir)).into_iter().flatten().flatten();
        left.extend(entries.map(|entry| format!("{dir} {}", entry.file_name().display())));
    }
    // The parent of all is the caller's own, as a kubelet's is.
    let group = group_of(stage);
    let groups = leftovers::control_groups_named(&group)?;
    left.extend(groups.into_iter().filter(|line| !line.ends_with(&group)));
    ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
    testkit::groups::remove(Path::new(&group).as_os_str())
}

/// The control group of the pods of a stage.
pub(super) fn group_of(stage: &Stage) -> String {
    stage.dir.path().file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Has the runtime pull [`IMAGE`].
pub(super) async fn pull(client: &cri::Client) -> anyhow::Result<()> {
    let image = Some(v1::ImageSpec { image: IMAGE.to_owned(), ..Default::default() });
    client.pull_image(v1::PullImageRequest { image, ..Default::default() }).await?;
    Ok(())
}
