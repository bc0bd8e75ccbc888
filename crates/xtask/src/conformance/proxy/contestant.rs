//! A service proxy at work on a node of its own.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use serde_json::{Value, json};
use testkit::daemon::Daemon;
use testkit::host;
use testkit::service_lab::{
    Answer, Client, NODE_POD_RANGES, POD_RANGES, Protocol, Question, Side, Times, ask_all, get,
};

use super::world::{Marker, NODE};

/// How long a proxy may take to do what it was told, on a machine that does other things too, or is emulated.
pub(super) const LIMIT: Duration = Duration::from_secs(300);

/// Whose program it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Make {
    Upstream,
    Orlop,
}

/// By what means it leads packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mode {
    Nftables,
    /// By the kind of iptables that the host prefers.
    Iptables,
    /// By the kernel's own tables.
    IptablesLegacy,
    Ipvs,
    Userspace,
}

impl Mode {
    const ALL: [Self; 5] = [Self::Nftables, Self::Iptables, Self::IptablesLegacy, Self::Ipvs, Self::Userspace];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::IptablesLegacy => "iptables-legacy",
            Self::Ipvs => "ipvs",
            Self::Userspace => "userspace",
        }
    }

    /// As a configuration spells it.
    const fn field(self) -> &'static str {
        match self {
            Self::IptablesLegacy => Self::Iptables.name(),
            mode => mode.name(),
        }
    }
}

/// Who takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Contestant {
    pub(super) make: Make,
    pub(super) mode: Mode,
}

impl Make {
    const ALL: [Self; 2] = [Self::Upstream, Self::Orlop];

    const fn name(self) -> &'static str {
        match self {
            Self::Upstream => "kube-proxy",
            Self::Orlop => "orlop",
        }
    }
}

impl fmt::Display for Contestant {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(to, "{}-{}", self.make.name(), self.mode.name())
    }
}

impl FromStr for Contestant {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let all = Make::ALL.into_iter().flat_map(|make| Mode::ALL.map(|mode| Self { make, mode }));
        let mut names = all.clone().map(|who| who.to_string());
        let unknown = || format!("there are {}", names.by_ref().collect::<Vec<_>>().join(", "));
        all.clone().find(|who| who.to_string() == name).ok_or_else(unknown)
    }
}

/// How proxies know pods of the node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Locality {
    ClusterCidr,
    NodeCidr,
    Bridge,
    Prefix,
}

/// What both are told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) locality: Locality,
    pub(super) node_port_addresses: &'static [&'static str],
    pub(super) masquerade_all: bool,
    pub(super) localhost_node_ports: bool,
}

impl Options {
    pub(super) const DEFAULT: Self = Self {
        locality: Locality::ClusterCidr,
        node_port_addresses: &[],
        masquerade_all: false,
        localhost_node_ports: true,
    };

    /// A `KubeProxyConfiguration`; JSON is YAML, too.
    fn config(&self, mode: Mode, kubeconfig: &Path) -> Value {
        let (locality, more) = match self.locality {
            Locality::ClusterCidr => ("ClusterCIDR", json!({})),
            Locality::NodeCidr => ("NodeCIDR", json!({})),
            Locality::Bridge => ("BridgeInterface", json!({ "bridgeInterface": "pod-client" })),
            Locality::Prefix => ("InterfaceNamePrefix", json!({ "interfaceNamePrefix": "pod-" })),
        };
        // Everything at once; and 0 leaves alone what belongs to the whole machine.
        let pace = json!({ "minSyncPeriod": "10ms", "syncPeriod": "30s", "masqueradeAll": self.masquerade_all });
        let mut iptables = pace.clone();
        iptables["localhostNodePorts"] = json!(self.localhost_node_ports);
        json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
            "mode": mode.field(), "hostnameOverride": NODE, "clusterCIDR": POD_RANGES, "oomScoreAdj": 0,
            "clientConnection": { "kubeconfig": kubeconfig, "qps": 100, "burst": 200 },
            "conntrack": { "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s" },
            "detectLocalMode": locality, "detectLocal": more, "nodePortAddresses": self.node_port_addresses,
            "iptables": iptables, "nftables": pace,
        })
    }
}

/// The ranges of pods of the node, as its Node object has them.
pub(super) fn node_object() -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": { "name": NODE, "labels": {
            "topology.kubernetes.io/zone": super::world::ZONE, "kubernetes.io/hostname": NODE,
        } },
        "spec": { "podCIDR": NODE_POD_RANGES[0], "podCIDRs": NODE_POD_RANGES },
        "status": { "addresses": testkit::service_lab::NODE.both()
            .map(|address| json!({ "type": "InternalIP", "address": address })) },
    })
}

/// Where a proxy tells what it counts.
pub(super) const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);

/// Programs of iptables, each of which there is a second time for the kernel's own tables.
const OF_IPTABLES: [&str; 6] =
    ["iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-save", "ip6tables-restore"];

/// What a proxy is started from.
#[derive(Debug, Clone)]
pub(super) struct Programs {
    pub(super) upstream: PathBuf,
    pub(super) orlop: PathBuf,
    pub(super) kubeconfig: PathBuf,
    /// Where configurations and logs go.
    pub(super) dir: PathBuf,
}

impl Programs {
    /// What is started, with its arguments.
    fn command(&self, who: Contestant, name: &str, config: &Path) -> anyhow::Result<(PathBuf, Vec<String>)> {
        let config = format!("--config={}", config.display());
        let place = |place: &str| format!("--{place}-dir={}", self.dir.join(format!("{name}-{place}")).display());
        Ok(match (who.make, who.mode) {
            (Make::Orlop, _) => (self.orlop.clone(), vec!["proxy".to_owned(), config, place("state"), place("run")]),
            // It takes the programs by name; which ones these are is the host's to say.
            (Make::Upstream, Mode::IptablesLegacy) => {
                let path = format!("PATH={}:{}", self.legacy()?.display(), std::env::var("PATH")?);
                (PathBuf::from("env"), vec![path, self.upstream.display().to_string(), config])
            }
            (Make::Upstream, _) => (self.upstream.clone(), vec![config]),
        })
    }

    /// A directory in which the programs of iptables are those for the kernel's own tables.
    fn legacy(&self) -> anyhow::Result<PathBuf> {
        let dir = self.dir.join("legacy");
        std::fs::create_dir_all(&dir)?;
        for name in OF_IPTABLES {
            let legacy = name.replacen("tables", "tables-legacy", 1);
            let program = host::find(&legacy).with_context(|| format!("this host has no {legacy}"))?;
            let link = dir.join(name);
            if !link.exists() {
                std::os::unix::fs::symlink(program, link)?;
            }
        }
        Ok(dir)
    }
}

/// Leaves in the calling thread's namespace what a kubelet leaves that uses the kernel's own tables.
fn hint_at_legacy() -> anyhow::Result<()> {
    for program in ["iptables-legacy", "ip6tables-legacy"] {
        host::run(Command::new(program).args(["-w", "-t", "mangle", "-N", "KUBE-KUBELET-CANARY"]))?;
    }
    Ok(())
}

/// A contestant that runs.
pub(super) struct Running {
    pub(super) who: Contestant,
    pub(super) daemon: Daemon,
    pub(super) side: Side,
    options: Options,
    config: PathBuf,
    log: PathBuf,
}

impl Running {
    /// Starts one on a node that is made for it.
    pub(super) fn start(who: Contestant, number: u8, options: &Options, programs: &Programs) -> anyhow::Result<Self> {
        let side = Side::new()?;
        if who.mode == Mode::IptablesLegacy {
            side.node().run(async { hint_at_legacy() })??;
        }
        let name = format!("{number}-{who}");
        let config = programs.dir.join(format!("{name}.json"));
        let log = programs.dir.join(format!("{name}.log"));
        let (program, arguments) = programs.command(who, &name, &config)?;
        let daemon = Daemon::new(&side.node().nursery()?, &program, arguments, log.clone());
        let mut running = Self { who, daemon, side, options: *options, config, log };
        running.lead_by(&programs.kubeconfig)?;
        Ok(running)
    }

    /// Starts it, or starts it anew, with this way to the API server.
    pub(super) fn lead_by(&mut self, kubeconfig: &Path) -> anyhow::Result<()> {
        self.daemon.kill()?;
        std::fs::write(&self.config, self.options.config(self.who.mode, kubeconfig).to_string())?;
        self.daemon.start()
    }

    /// What has been logged so far.
    pub(super) fn log(&self) -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(&std::fs::read(&self.log)?).into_owned())
    }

    /// What it tells on `/metrics` at this address.
    pub(super) fn metrics(&self, address: SocketAddr) -> anyhow::Result<String> {
        let told = self.side.node().run(get(address, "/metrics".to_owned(), LIMIT))?;
        told.with_context(|| format!("metrics at {address}"))
    }

    /// The value of a sample of them, by its name and labels; none if there is no such sample.
    pub(super) fn metric(&self, address: SocketAddr, sample: &str) -> anyhow::Result<Option<f64>> {
        let told = self.metrics(address)?;
        let value = told.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        Ok(value.map(|value| value.trim().parse()).transpose()?)
    }

    /// Waits until it has seen this marker and with it all that was written before.
    pub(super) fn wait_for(&mut self, marker: Marker) -> anyhow::Result<()> {
        let deadline = Instant::now() + LIMIT;
        let question = |address| Question {
            protocol: Protocol::Tcp,
            to: SocketAddr::new(address, marker.port()),
            source: None,
            times: Times::InTurn(1),
            limit: Duration::from_millis(200),
        };
        let is_there = |answer: &Answer| matches!(answer, Answer::Served { by, .. } if by.port() == marker.target());
        loop {
            let answers = self.side.place(Client::Pod).run(ask_all(marker.addresses().map(question).to_vec()))?;
            if answers.iter().all(|answers| answers.iter().all(is_there)) {
                return Ok(());
            }
            self.daemon.check()?;
            if Instant::now() > deadline {
                bail!(
                    "{} shows no sign of what was written {} s ago\n{}",
                    self.who,
                    LIMIT.as_secs(),
                    self.daemon.log_end()
                );
            }
            // Rules have no event for who is outside of the proxy.
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
