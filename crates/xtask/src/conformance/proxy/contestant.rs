//! A service proxy at work on a node of its own.

use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::bail;
use serde_json::{Value, json};
use testkit::daemon::Daemon;
use testkit::service_lab::{Answer, Client, NODE_POD_RANGES, POD_RANGES, Protocol, Question, Side, Times, ask_all};

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
    Iptables,
    Ipvs,
    Userspace,
}

impl Mode {
    const ALL: [Self; 4] = [Self::Nftables, Self::Iptables, Self::Ipvs, Self::Userspace];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
            Self::Userspace => "userspace",
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
            "mode": mode.name(), "hostnameOverride": NODE, "clusterCIDR": POD_RANGES, "oomScoreAdj": 0,
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

/// What a proxy is started from.
#[derive(Debug, Clone)]
pub(super) struct Programs {
    pub(super) upstream: PathBuf,
    pub(super) orlop: PathBuf,
    pub(super) kubeconfig: PathBuf,
    /// Where configurations and logs go.
    pub(super) dir: PathBuf,
}

/// A contestant that runs.
pub(super) struct Running {
    pub(super) who: Contestant,
    pub(super) daemon: Daemon,
    pub(super) side: Side,
}

impl Running {
    /// Starts one on a node that is made for it.
    pub(super) fn start(who: Contestant, number: u8, options: &Options, programs: &Programs) -> anyhow::Result<Self> {
        let side = Side::new()?;
        let name = format!("{number}-{who}");
        let config = programs.dir.join(format!("{name}.json"));
        std::fs::write(&config, options.config(who.mode, &programs.kubeconfig).to_string())?;
        let config = format!("--config={}", config.display());
        let (program, arguments) = match who.make {
            Make::Upstream => (&programs.upstream, vec![config]),
            Make::Orlop => {
                let place =
                    |place: &str| format!("--{place}-dir={}", programs.dir.join(format!("{name}-{place}")).display());
                (&programs.orlop, vec!["proxy".to_owned(), config, place("state"), place("run")])
            }
        };
        let log = programs.dir.join(format!("{name}.log"));
        let mut daemon = Daemon::new(&side.node().nursery()?, program, arguments, log);
        daemon.start()?;
        Ok(Self { who, daemon, side })
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
