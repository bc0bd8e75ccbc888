//! What a keeper does first: enters its control group, makes the pod's namespaces, hides itself.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use executor::namespaces::{self, Request};
use executor::oci::{self, NamespaceKind};
use executor::reaper;
use sys::process::{self, Child};
use sys::{fork, rustix};

use super::failure;
use crate::clock;
use crate::config::{IdMapping, KeeperConfig, Labels, Network};
use crate::protocol::{Failure, Reason, VERSION, Welcome, wire};

/// The pod's own things.
#[derive(Debug)]
pub(super) struct Sandbox {
    pub(super) welcome: Welcome,
    pub(super) namespaces: Vec<(NamespaceKind, OwnedFd)>,
    reaper: Option<Child>,
    /// The OOM killer never takes the keeper.
    is_spared: bool,
}

/// What spares a process whatever happens.
const SPARED: i32 = -1000;
/// The least that the OOM killer can choose, a little more than the most protected container has.
const EXPOSED: &str = "-998";

/// A sandbox with what its keeper needs beside.
pub(super) struct Made {
    pub(super) sandbox: Sandbox,
    /// The daemon's connection.
    pub(super) control: UnixStream,
    /// How long a process may take to its program.
    pub(super) start_max: Duration,
}

/// Why there is no sandbox.
pub(super) struct Failed {
    pub(super) control: Option<UnixStream>,
    pub(super) failure: Failure,
}

impl Sandbox {
    pub(super) fn reaper_pid(&self) -> Option<u32> {
        self.reaper.as_ref().and_then(|reaper| u32::try_from(reaper.pid.as_raw_nonzero().get()).ok())
    }

    /// Makes a process that the OOM killer can choose. One that it must not choose waits for memory for ever where everybody in its
    /// group is such a one; so the keeper can be chosen, too, as long as that takes.
    pub(super) fn exposed<T>(&self, make: impl FnOnce() -> T) -> T {
        if self.is_spared {
            let _ = set_oom_score(EXPOSED); // More is asked for by the process itself, which then tells of it.
        }
        let made = make();
        if self.is_spared {
            let _ = set_oom_score(&SPARED.to_string()); // It was allowed before.
        }
        made
    }

    /// The pod's namespace of a kind; `None` where it has none of its own.
    pub(super) fn namespace(&self, kind: NamespaceKind) -> Option<&OwnedFd> {
        self.namespaces.iter().find(|(known, _)| *known == kind).map(|(_, fd)| fd)
    }
}

/// Makes the sandbox.
pub(super) fn make(config: &[u8], fds: Vec<OwnedFd>) -> Result<Made, Failed> {
    let mut fds = fds.into_iter();
    let Some(control) = fds.next().map(UnixStream::from) else {
        return Err(Failed { control: None, failure: broken("the control connection is missing") });
    };
    match begin(config, fds) {
        Ok((sandbox, start_max)) => Ok(Made { sandbox, control, start_max }),
        Err(failure) => Err(Failed { control: Some(control), failure }),
    }
}

fn broken(detail: &str) -> Failure {
    Failure { reason: Reason::Invalid, step: "configuration".to_owned(), errno: 0, detail: detail.to_owned() }
}

fn begin(config: &[u8], mut fds: impl Iterator<Item = OwnedFd>) -> Result<(Sandbox, Duration), Failure> {
    let config: KeeperConfig = wire::decode(config).map_err(|error| broken(&error.to_string()))?;
    let system = |step: &'static str| move |error: io::Error| failure(Reason::System, step, &error, "");
    let directory = fds.next().ok_or_else(|| broken("the sandbox's directory is missing"))?;
    let network = match config.network {
        Network::Given => Some(fds.next().ok_or_else(|| broken("the network namespace is missing"))?),
        Network::Host | Network::New => None,
    };
    let mounts = match config.mounts {
        true => Some(fds.next().ok_or_else(|| broken("the mount namespace is missing"))?),
        false => None,
    };
    rustix::process::fchdir(&directory).map_err(io::Error::from).map_err(system("fchdir"))?;
    enter_cgroup(fds).map_err(system("cgroup.procs"))?;
    // More protection needs a capability that the node may not have: then it has what the daemon has.
    let is_spared = set_oom_score(&config.oom_score_adj.to_string()).is_ok() && config.oom_score_adj == SPARED;
    fork::restore_children();
    fork::ignore_broken_pipes();
    let _ = fork::set_process_name("orlop-keeper"); // Cosmetic.
    process::set_dumpable(false).map_err(|error| sandbox_failure(&error))?;
    let mut namespaces = make_namespaces(&config, network.as_ref())?;
    namespaces.extend(network.map(|network| (NamespaceKind::Network, network)));
    if config.enters_network {
        enter_network(&namespaces).map_err(|error| sandbox_failure(&error))?;
    }
    namespaces.extend(mounts.map(|mounts| (NamespaceKind::Mount, mounts)));
    let labels = config.labels.as_ref();
    let reaper = if config.shared_pid { Some(start_reaper(&mut namespaces, labels)?) } else { None };
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").map_err(system("boot_id"))?;
    let welcome = Welcome {
        version: VERSION,
        sandbox: config.sandbox,
        pid: std::process::id(),
        boot_id: boot_id.trim().to_owned(),
        started: clock::now(),
    };
    Ok((Sandbox { welcome, namespaces, reaper, is_spared }, Duration::from_millis(config.start_max_ms.into())))
}

fn set_oom_score(score: &str) -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", score)
}

fn sandbox_failure(error: &sys::Error) -> Failure {
    let errno = io::Error::from(error.errno);
    failure(Reason::Sandbox, error.call, &errno, error.to_string())
}

/// Each of the files is a `cgroup.procs`.
fn enter_cgroup(files: impl Iterator<Item = OwnedFd>) -> io::Result<()> {
    for file in files {
        rustix::io::write(&file, b"0")?;
    }
    Ok(())
}

fn make_namespaces(config: &KeeperConfig, network: Option<&OwnedFd>) -> Result<Vec<(NamespaceKind, OwnedFd)>, Failure> {
    let wanted = [
        (config.own_ipc, NamespaceKind::Ipc),
        (config.own_uts, NamespaceKind::Uts),
        (config.network == Network::New, NamespaceKind::Network),
    ];
    let mapped = |ranges: &[IdMapping]| -> Vec<oci::IdMapping> {
        let one = |range: &IdMapping| oci::IdMapping {
            container_id: range.inside,
            host_id: range.outside,
            size: range.count,
        };
        ranges.iter().map(one).collect()
    };
    let user = config.user.as_ref();
    let request = Request {
        kinds: wanted.into_iter().filter(|(wanted, _)| *wanted).map(|(_, kind)| kind).collect(),
        uids: user.map(|user| mapped(&user.uids)).unwrap_or_default(),
        gids: user.map(|user| mapped(&user.gids)).unwrap_or_default(),
        hostname: config.hostname.clone().filter(|_| config.own_uts),
        sysctls: config.sysctls.clone(),
    };
    if request.kinds.is_empty() && request.uids.is_empty() && request.sysctls.is_empty() {
        return Ok(Vec::new());
    }
    let network = network.map(|fd| fd.as_fd());
    namespaces::create(&request, network).map_err(|error| sandbox_failure(&error))
}

/// A pod in the host's network has none to enter.
fn enter_network(namespaces: &[(NamespaceKind, OwnedFd)]) -> Result<(), sys::Error> {
    let network = namespaces.iter().find(|(kind, _)| *kind == NamespaceKind::Network);
    network.map_or(Ok(()), |(_, network)| process::join(network.as_fd(), process::namespace::NETWORK))
}

/// Starts the pod's first process and adds its pid namespace.
fn start_reaper(namespaces: &mut Vec<(NamespaceKind, OwnedFd)>, labels: Option<&Labels>) -> Result<Child, Failure> {
    let labels = labels.map(|labels| reaper::Labels { process: &labels.process, file: &labels.file });
    let reaper = reaper::start(namespaces, labels).map_err(|error| Failure {
        reason: Reason::Sandbox,
        step: error.step.to_string(),
        errno: error.errno,
        detail: error.detail,
    })?;
    let pid = namespaces::open(&reaper, NamespaceKind::Pid).map_err(|error| sandbox_failure(&error))?;
    namespaces.push((NamespaceKind::Pid, pid));
    Ok(reaper)
}
