//! The two sides: how each daemon is started, and which processes it costs.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use cri::Client;
use rustix::process::{Pid, Signal, kill_process};

use crate::arguments::{Arguments, SideName};
use crate::processes::{self, FileId, Process};
use crate::work::Work;

/// How long a daemon may take until it is ready, and until it has ended.
const PATIENCE: Duration = Duration::from_secs(30);

/// Lines of a daemon's log that are shown when something fails.
const LOG_LINES: usize = 30;

/// A running daemon.
pub(crate) struct Side {
    name: SideName,
    program: FileId,
    daemon: Child,
    socket: PathBuf,
    log: PathBuf,
}

/// What a process is there for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// The same number of them for any number of pods.
    Daemon,
    /// Beside each pod's application.
    PerPod,
}

impl Side {
    /// Starts the daemon with everything that it writes below `scratch`.
    pub(crate) fn start(name: SideName, arguments: &Arguments, scratch: &Path) -> anyhow::Result<Self> {
        let socket = scratch.join("cri.sock");
        let log = scratch.join("daemon.log");
        let (program, mut command) = match name {
            SideName::Orlop => orlop(arguments, scratch, &socket),
            SideName::Reference => containerd(arguments, scratch, &socket)?,
        };
        let file = std::fs::File::create(&log)?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let daemon = command.spawn().with_context(|| format!("start {}", program.display()))?;
        Ok(Self { name, program: FileId::of(&program)?, daemon, socket, log })
    }

    /// Asks for pods over its socket.
    pub(crate) fn client(&self) -> anyhow::Result<Client> {
        Ok(Client::new(&self.socket)?)
    }

    /// Waits until it can start pods.
    pub(crate) async fn wait_ready(&mut self, work: &Work) -> anyhow::Result<()> {
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

    /// Its processes with one of `roles`.
    pub(crate) fn processes(&self, roles: &[Role]) -> Vec<Process> {
        let wanted = |process: &Process| self.role(process).is_some_and(|role| roles.contains(&role));
        processes::all().into_iter().filter(wanted).collect()
    }

    fn role(&self, process: &Process) -> Option<Role> {
        match self.name {
            SideName::Orlop if !process.runs(self.program) => None,
            SideName::Orlop if process.name.contains("keeper") => Some(Role::PerPod),
            SideName::Orlop => Some(Role::Daemon),
            SideName::Reference if process.runs(self.program) => Some(Role::Daemon),
            SideName::Reference if process.name.starts_with("containerd-shim") => Some(Role::PerPod),
            SideName::Reference if process.program == Path::new("/pause") => Some(Role::PerPod),
            SideName::Reference => None,
        }
    }

    /// Ends the daemon.
    pub(crate) fn stop(mut self) -> anyhow::Result<()> {
        let pid = i32::try_from(self.daemon.id()).ok().and_then(Pid::from_raw).context("a process id")?;
        kill_process(pid, Signal::TERM)?;
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
    pub(crate) fn log_tail(&self) -> String {
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

fn orlop(arguments: &Arguments, scratch: &Path, socket: &Path) -> (PathBuf, Command) {
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

fn containerd(arguments: &Arguments, scratch: &Path, socket: &Path) -> anyhow::Result<(PathBuf, Command)> {
    let program = arguments.reference.join("containerd").canonicalize()?;
    let config = scratch.join("containerd.toml");
    std::fs::write(&config, containerd_config(&arguments.reference, scratch, socket))?;
    let network = scratch.join("cni");
    std::fs::create_dir_all(&network)?;
    std::fs::write(network.join("10-bench.conflist"), CNI_CONFIG)?;
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(&program);
    command.arg("--config").arg(config).env("PATH", format!("{}:{path}", arguments.reference.display()));
    Ok((program, command))
}

/// containerd's defaults but for places, the sandbox image, and OOM scores, which not every machine lets it lower.
fn containerd_config(programs: &Path, scratch: &Path, socket: &Path) -> String {
    let (programs, scratch, socket) = (programs.display(), scratch.display(), socket.display());
    format!(
        "version = 4
root = '{scratch}/root'
state = '{scratch}/state'
imports = []
[debug]
level = 'warn'
[plugins.'io.containerd.server.v1.grpc']
address = '{socket}'
[plugins.'io.containerd.server.v1.ttrpc']
address = '{socket}.ttrpc'
[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = 'docker.io/orlop/pause:latest'
[plugins.'io.containerd.cri.v1.images'.registry]
config_path = '{scratch}/certs.d'
[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true
[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = ['{programs}']
conf_dir = '{scratch}/cni'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc]
runtime_type = 'io.containerd.runc.v2'
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = '{programs}/runc'
[plugins.'io.containerd.internal.v1.opt']
path = '{scratch}/opt'
[plugins.'io.containerd.nri.v1.nri']
disable = true
"
    )
}

/// The bridge as clusters without another network have it, host ports included.
const CNI_CONFIG: &str = r#"{
  "cniVersion": "1.0.0",
  "name": "bench",
  "plugins": [
    {
      "type": "bridge",
      "bridge": "cni0",
      "isGateway": true,
      "ipMasq": true,
      "ipMasqBackend": "nftables",
      "hairpinMode": true,
      "ipam": { "type": "host-local", "ranges": [[{ "subnet": "10.88.0.0/16" }]], "routes": [{ "dst": "0.0.0.0/0" }] }
    },
    { "type": "portmap", "backend": "nftables", "capabilities": { "portMappings": true } }
  ]
}
"#;
