//! What there is to say to logind (org.freedesktop.login1(5)): a lock that delays a shutdown, and the word that one begins.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dbus::{BUS, BUS_PATH, BusError, Method, PROPERTIES};
use sys::rustix::process::{Pid, Signal, kill_process};

use super::bus::Bus;

/// Where the bus and logind are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Places {
    /// The socket of the system's message bus.
    pub bus: PathBuf,
    /// The directory of logind's configuration that is ours to write to.
    pub conf_dir: PathBuf,
}

impl Default for Places {
    fn default() -> Self {
        Self { bus: "/run/dbus/system_bus_socket".into(), conf_dir: "/etc/systemd/logind.conf.d".into() }
    }
}

const SERVICE: &str = "org.freedesktop.login1";
const MANAGER: &str = "org.freedesktop.login1.Manager";
const PATH: &str = "/org/freedesktop/login1";
const PREPARE: &str = "PrepareForShutdown";
/// Upstream's name for it: whoever removes one kubelet's configuration removes the other's.
const CONF: &str = "99-kubelet.conf";
const GET: Method<'_> = Method { destination: SERVICE, path: PATH, interface: PROPERTIES, member: "Get" };
/// How often, and from which pause on, it is looked whether logind has read its configuration.
const LOOKS: u32 = 5;
const LOOK_FIRST: Duration = Duration::from_millis(100);

/// Why shutdowns cannot be delayed.
#[derive(Debug, thiserror::Error)]
pub(super) enum LogindError {
    /// The bus.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A file.
    #[error("cannot write {path}")]
    Configure {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// logind keeps its own limit.
    #[error(
        "logind delays a shutdown by {} s at most, and {} s are wanted; set InhibitDelayMaxSec in logind.conf",
        .allowed.as_secs(), .wanted.as_secs()
    )]
    TooShort {
        /// What it allows.
        allowed: Duration,
        /// What the periods of the configuration add up to.
        wanted: Duration,
    },
}

/// A connection to logind.
pub(super) struct Logind(Bus);

/// While it is there, the machine does not go down, for some time.
pub(super) struct Lock {
    _fd: OwnedFd,
}

impl Logind {
    /// Connects, and hears of shutdowns from now on.
    pub(super) async fn connect(bus: &Path) -> Result<Self, LogindError> {
        let mut bus = Bus::connect(bus).await?;
        let rule = format!("type='signal',sender='{SERVICE}',path='{PATH}',interface='{MANAGER}',member='{PREPARE}'");
        let add = Method { destination: BUS, path: BUS_PATH, interface: BUS, member: "AddMatch" };
        bus.call(add, &[rule.as_str().into()]).await?;
        Ok(Self(bus))
    }

    /// Sees to it that logind waits for so long.
    pub(super) async fn allow(&mut self, wanted: Duration, conf_dir: &Path) -> Result<(), LogindError> {
        if self.delay_max().await? >= wanted {
            return Ok(());
        }
        configure(conf_dir, wanted)?;
        self.reload().await?;
        let mut pause = LOOK_FIRST;
        for _ in 0..LOOKS {
            // It tells nobody when it has read its configuration.
            tokio::time::sleep(pause).await;
            pause *= 2;
            if self.delay_max().await? >= wanted {
                return Ok(());
            }
        }
        Err(LogindError::TooShort { allowed: self.delay_max().await?, wanted })
    }

    async fn delay_max(&mut self) -> Result<Duration, LogindError> {
        let answer = self.0.call(GET, &[MANAGER.into(), "InhibitDelayMaxUSec".into()]).await?;
        Ok(Duration::from_micros(answer.value()?.number()?))
    }

    /// logind reads its configuration when it is sent SIGHUP.
    async fn reload(&mut self) -> Result<(), LogindError> {
        let who = Method { destination: BUS, path: BUS_PATH, interface: BUS, member: "GetConnectionUnixProcessID" };
        let pid = self.0.call(who, &[SERVICE.into()]).await?.value()?.number()?;
        if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
            kill_process(pid, Signal::HUP).map_err(|error| BusError::Io(error.into()))?;
        }
        Ok(())
    }

    /// Delays shutdowns from now on.
    pub(super) async fn inhibit(&mut self) -> Result<Lock, LogindError> {
        let method = Method { destination: SERVICE, path: PATH, interface: MANAGER, member: "Inhibit" };
        let why = "Kubelet needs time to handle node shutdown";
        let mut answer =
            self.0.call(method, &["shutdown".into(), "kubelet".into(), why.into(), "delay".into()]).await?;
        let fd = answer.fds.pop().ok_or(BusError::Malformed("there is no lock in the answer"))?;
        Ok(Lock { _fd: fd })
    }

    /// Waits until a shutdown begins (true), or is called off.
    pub(super) async fn prepares(&mut self) -> Result<bool, LogindError> {
        loop {
            let signal = self.0.signal().await?;
            if signal.interface != MANAGER || signal.member != PREPARE {
                continue;
            }
            let said = signal.value()?.truth()?;
            // Anybody on the bus may send us such a signal; only logind knows.
            if self.is_preparing().await? == said {
                return Ok(said);
            }
            tracing::warn!(said, "somebody else than logind speaks of a shutdown");
        }
    }

    /// Whether a shutdown has begun.
    pub(super) async fn is_preparing(&mut self) -> Result<bool, LogindError> {
        Ok(self.0.call(GET, &[MANAGER.into(), "PreparingForShutdown".into()]).await?.value()?.truth()?)
    }
}

fn configure(conf_dir: &Path, wanted: Duration) -> Result<(), LogindError> {
    let path = conf_dir.join(CONF);
    let text = format!(
        "# Written by the kubelet: it needs so long to end its pods.\n[Login]\nInhibitDelayMaxSec={}\n",
        wanted.as_secs()
    );
    let written = std::fs::create_dir_all(conf_dir).and_then(|()| std::fs::write(&path, text));
    written.map_err(|source| LogindError::Configure { path, source })
}
