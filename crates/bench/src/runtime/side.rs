//! The two sides: how each daemon is started, and which processes it costs.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use cri::Client;
use rustix::process::{Pid, Signal, kill_process};

use crate::arguments::{Common, SideName};
use crate::processes::Crew;
use testkit::containerd;

use super::work::Work;

/// How long a daemon may take until it is ready, and until it has ended.
const PATIENCE: Duration = Duration::from_secs(30);

/// Lines of a daemon's log that are shown when something fails.
const LOG_LINES: usize = 30;

/// A running daemon.
pub(super) struct Side {
    crew: Crew,
    daemon: Child,
    socket: PathBuf,
    log: PathBuf,
}

impl Side {
    /// Starts the daemon with everything that it writes below `scratch`.
    pub(super) fn start(name: SideName, arguments: &Common, scratch: &Path) -> anyhow::Result<Self> {
        let socket = scratch.join("cri.sock");
        let log = scratch.join("daemon.log");
        let (program, mut command) = match name {
            SideName::Orlop => orlop(arguments, scratch, &socket),
            SideName::Reference => reference(arguments, scratch, &socket)?,
        };
        let file = std::fs::File::create(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let daemon = command.spawn().with_context(|| format!("start {}", program.display()))?;
        Ok(Self { crew: Crew::new(&[program])?, daemon, socket, log })
    }

    /// Asks for pods over its socket.
    pub(super) fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::new(&self.socket)?)
    }

    /// Waits until it can start pods.
    pub(super) async fn wait_ready(&mut self, work: &Work) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !work.is_ready().await {
            if let Some(status) = self.daemon.try_wait()? {
                bail!("the daemon ended at once: {status}");
            }
            if Instant::now() > deadline {
                bail!("the daemon is not ready after {} s", PATIENCE.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(50)).await; // the CRI has no event for it
        }
        Ok(())
    }

    /// Stops the daemon where it is, until [`Self::go_on`].
    pub(super) fn freeze(&self) -> anyhow::Result<()> {
        Ok(kill_process(self.pid()?, Signal::STOP)?)
    }

    /// Lets it go on.
    pub(super) fn go_on(&self) -> anyhow::Result<()> {
        Ok(kill_process(self.pid()?, Signal::CONT)?)
    }

    fn pid(&self) -> anyhow::Result<Pid> {
        i32::try_from(self.daemon.id()).ok().and_then(Pid::from_raw).context("a process id")
    }

    /// Its processes.
    pub(super) fn crew(&self) -> &Crew {
        &self.crew
    }

    /// Ends the daemon.
    pub(super) fn stop(mut self) -> anyhow::Result<()> {
        kill_process(self.pid()?, Signal::TERM)?;
        let deadline = Instant::now() + PATIENCE;
        while self.daemon.try_wait()?.is_none() {
            if Instant::now() > deadline {
                bail!("the daemon has not ended after {} s", PATIENCE.as_secs());
            }
            std::thread::sleep(Duration::from_millis(20)); // nothing is measured any more
        }
        Ok(())
    }

    /// The end of the daemon's log.
    pub(super) fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        // Both fail only when it has ended already.
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

fn orlop(arguments: &Common, scratch: &Path, socket: &Path) -> (PathBuf, Command) {
    let mut command = Command::new(&arguments.orlop);
    command.arg("runtime").arg("--listen").arg(format!("unix://{}", socket.display()));
    for (flag, name) in [
        ("--state-dir", "state"),
        ("--run-dir", "run"),
        ("--registry-config-dir", "certs.d"),
        ("--cni-conf-dir", "no-cni"),
    ] {
        command.arg(flag).arg(scratch.join(name));
    }
    (arguments.orlop.clone(), command)
}

fn reference(arguments: &Common, scratch: &Path, socket: &Path) -> anyhow::Result<(PathBuf, Command)> {
    let programs = arguments.reference()?;
    let program = containerd::program(programs)?;
    let mut command = Command::new(&program);
    command.args(containerd::prepare(programs, scratch, socket, &containerd::Network::ALONE)?);
    Ok((program, command))
}
