//! A proxy at work on a node of its own.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::{Value, json};
use testkit::control_plane::ControlPlane;
use testkit::daemon::Daemon;
use testkit::host;
use testkit::service_lab::{POD_RANGES, Side};

use crate::arguments::{Common, ProxyMode, SideName};
use crate::processes::Usage;

use super::world::NODE;

/// How long it may take to end.
const STOP_LIMIT: Duration = Duration::from_secs(60);

/// What a proxy is started from.
pub(super) struct Start<'a> {
    pub(super) name: SideName,
    pub(super) mode: ProxyMode,
    pub(super) common: &'a Common,
    pub(super) plane: &'a ControlPlane,
    /// Everything is written below it.
    pub(super) scratch: &'a Path,
}

/// It runs; the node is of those who start it.
pub(super) struct Contestant {
    daemon: Daemon,
}

impl Start<'_> {
    /// Starts it on `side`.
    pub(super) fn on(&self, side: &Side) -> anyhow::Result<Contestant> {
        if self.mode == ProxyMode::Ipvs {
            ensure!(Path::new("/proc/net/ip_vs").exists(), "this kernel has no IPVS; `modprobe ip_vs` loads it");
        }
        let title = format!("{}-{}", self.name.word(), self.mode.word());
        let config = self.scratch.join(format!("{title}.json"));
        std::fs::write(&config, self.configuration()?.to_string())?;
        let config = format!("--config={}", config.display());
        let (program, arguments) = match self.name {
            SideName::Orlop => {
                let place = |place: &str| {
                    let dir = self.scratch.join(format!("{title}-{place}"));
                    format!("--{place}-dir={}", dir.display())
                };
                (self.common.orlop.clone(), vec!["proxy".to_owned(), config, place("state"), place("run")])
            }
            SideName::Reference => (self.common.reference()?.join("kube-proxy"), vec![config]),
        };
        // Whoever becomes the program keeps its number.
        let mut words = vec![format!("PATH={}", self.search_path(side)?), program.display().to_string()];
        words.extend(arguments);
        let log = self.scratch.join(format!("{title}.log"));
        let mut daemon = Daemon::new(&side.node().nursery()?, Path::new("env"), words, log);
        daemon.start()?;
        Ok(Contestant { daemon })
    }

    /// What both are told; the rest is as it is by default. 0 leaves alone what belongs to the whole machine.
    fn configuration(&self) -> anyhow::Result<Value> {
        Ok(json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
            "mode": self.mode.configured(), "hostnameOverride": NODE, "clusterCIDR": POD_RANGES, "oomScoreAdj": 0,
            "clientConnection": { "kubeconfig": self.plane.proxy_kubeconfig()? },
            "conntrack": { "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s" },
        }))
    }

    /// Where a proxy finds its programs: of two kinds of iptables one is wanted. Ours looks for both and goes by the hint
    /// that a kubelet leaves.
    fn search_path(&self, side: &Side) -> anyhow::Result<String> {
        let path = std::env::var("PATH").unwrap_or_default();
        let kind = match self.mode {
            ProxyMode::IptablesNft => "nft",
            ProxyMode::IptablesLegacy => "legacy",
            _ => return Ok(path),
        };
        let dir = self.scratch.join(format!("iptables-{kind}"));
        std::fs::create_dir_all(&dir)?;
        for family in ["iptables", "ip6tables"] {
            for verb in ["", "-save", "-restore"] {
                let link = dir.join(format!("{family}{verb}"));
                if !link.exists() {
                    symlink(find(&format!("{family}-{kind}{verb}"))?, link)?;
                }
            }
        }
        let iptables = dir.join("iptables");
        side.node().run(async move {
            host::run(Command::new(iptables).args(["-t", "mangle", "-N", "KUBE-IPTABLES-HINT"]))
        })??;
        Ok(format!("{}:{path}", dir.display()))
    }
}

/// A program of administrators.
fn find(name: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    let mut files = dirs.map(|dir| dir.join(name));
    files.find(|file| file.is_file()).with_context(|| format!("{name} is not installed; it comes with iptables 1.8"))
}

impl Contestant {
    /// What it uses.
    pub(super) fn usage(&self) -> anyhow::Result<Usage> {
        self.daemon.pid().map(Usage::of).context("the proxy does not run")
    }

    /// What to say when something has not happened.
    pub(super) fn silent(&mut self, what: &str) -> anyhow::Error {
        match self.daemon.check() {
            Err(error) => error,
            Ok(()) => anyhow::anyhow!("{what}\n{}", self.daemon.log_end()),
        }
    }

    /// Ends it.
    pub(super) fn stop(mut self) -> anyhow::Result<()> {
        self.daemon.stop(STOP_LIMIT)
    }
}
