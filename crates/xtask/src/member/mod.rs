//! The voyage of a member: orlop as a node of a real control plane, watched with `kubectl` alone.

mod credentials;
pub(crate) mod crowd;
pub(crate) mod foreign;
pub(crate) mod kubeadm;
mod kubectl;
mod manifests;
mod pair;
pub(crate) mod peer;
mod points;
mod proxy;
pub(crate) mod restarts;
mod rollout;
mod second;
pub(crate) mod standalone;
mod top;

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use serde_json::Value;
use testkit::control_plane::{self, ControlPlane, Options, Part};
use testkit::{host, netns};

use crate::conformance::served;
use crate::demo::Stage;
use crate::voyage::{leftovers, wait};

pub(crate) use points::condition;

/// The node's name.
const NODE: &str = "deck";
/// The address of node and API server, inside the private network (RFC 5737).
const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// Something that takes a moment, on a machine that does other things too.
const SOON: Duration = Duration::from_secs(60);

/// What kubeadm grants so that nodes may join with a token and renew their certificates: binding, role, group.
const JOINING: [(&str, &str, &str); 3] = [
    ("bootstrappers", "system:node-bootstrapper", "system:bootstrappers"),
    ("first-certificates", "system:certificates.k8s.io:certificatesigningrequests:nodeclient", "system:bootstrappers"),
    ("next-certificates", "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient", "system:nodes"),
];

/// A control plane with one node.
pub(crate) struct Fleet {
    stage: Stage,
    plane: ControlPlane,
    node: Child,
    setting: Setting,
    bootstrap_kubeconfig: PathBuf,
    proxy_kubeconfig: PathBuf,
}

/// What is special about a node.
#[derive(Default)]
struct Setting {
    flags: Vec<String>,
    /// More lines of its KubeletConfiguration.
    configuration: String,
    /// More flags of the control plane's programs.
    control: Vec<(Part, String)>,
}

/// A point of the voyage: its title and its check.
type Point = (&'static str, fn(&mut Fleet) -> anyhow::Result<String>);

const POINTS: &[Point] = &[
    ("the node registers and is Ready", points::joins),
    ("its certificates come from the cluster", points::certificates),
    ("a second node on its port ends before the cluster hears of it", second::refused),
    ("a Deployment runs with its settings and its token", points::runs),
    ("Services lead to its pods", points::serves),
    ("a rolling update under load fails no request", rollout::updates_unnoticed),
    ("beside another node, orlop proxy leads to Services", proxy::serves_alone),
    ("pods of two nodes reach each other, by address and by Service", pair::reach_each_other),
    ("kubectl logs, exec and cp reach into a pod", points::reaches_in),
    ("kubectl from another machine: terminals, logs -f, drain", kubectl::used),
    ("an edited ConfigMap arrives", points::edits),
    ("a volume of a CSI driver is attached, mounted and taken down", points::volumes),
    ("pods have the devices that they claim", points::claims),
    ("a pod gets a certificate and knows whom to trust", points::certified),
    ("a deleted pod ends in time and is replaced", points::deletes),
    ("a static pod runs by its file and shows itself as a mirror", points::static_pod),
    ("kubectl debug looks into a pod", points::debugs),
    ("a running pod is resized", points::resizes),
    ("Prometheus finds what dashboards show", points::measures),
    ("kubectl top shows what metrics-server has scraped", top::shown),
    ("kill -9 of the daemon is not felt", points::killed_daemon),
    ("its certificates are renewed before they end", credentials::renewed),
    ("with credentials that have ended it says so, and pods go on", credentials::ended),
    ("without the API server pods go on, and it learns of it later", points::api_server_away),
    ("after a boot without the API server the pods start again", points::boots_alone),
    ("a pod of a RuntimeClass runs by the operator's own runc", points::other_runtime),
    ("callers of the kubelet need rights", points::strangers),
    ("a pod that the node cannot run is rejected with the reason", points::rejects),
    ("short of memory, the node ends who uses more than it asked for", points::evicts),
    ("nothing is left", points::leaves),
];

/// Runs every point in order and stops at the first that fails. Returns how many passed.
///
/// # Errors
/// The first point that failed, with what helps to understand it printed before.
pub(crate) fn run(orlop: &Path) -> anyhow::Result<usize> {
    let programs = control_plane::build()?;
    // What points need, built while there is a way out.
    testkit::go::build(&testkit::go::DRA_TEST_DRIVER)?;
    testkit::go::build(&testkit::go::METRICS_SERVER)?;
    let runc = testkit::go::build(&testkit::go::RUNC)?;
    let stage = Stage::set_up(orlop, false)?;
    std::fs::write(runtime_configuration(&stage), manifests::RUNTIMES.replace("RUNC", &runc.display().to_string()))?;
    let flags = vec![format!("--runtime-config={}", runtime_configuration(&stage).display())];
    let mut fleet = Fleet::start(stage, &programs, Setting { flags, ..Setting::default() })?;
    for (number, (title, check)) in (1..).zip(POINTS) {
        let begin = Instant::now();
        match check(&mut fleet) {
            Ok(note) => println!("ok   {number}. {title} ({:.1} s): {note}", begin.elapsed().as_secs_f64()),
            Err(error) => {
                println!("FAIL {number}. {title}: {error:#}");
                fleet.report();
                bail!("point {number} of the member's voyage failed: {title}");
            }
        }
    }
    Ok(POINTS.len())
}

impl Fleet {
    fn start(stage: Stage, programs: &Path, setting: Setting) -> anyhow::Result<Self> {
        netns::add_address(IpAddr::V4(ADDRESS))?;
        let options = Options { address: IpAddr::V4(ADDRESS), extra: setting.control.clone(), ..Options::default() };
        let mut plane = ControlPlane::start(programs, &stage.dir.path().join("plane"), options)?;
        plane.run(Part::ControllerManager)?;
        plane.run(Part::Scheduler)?;
        let bootstrap_kubeconfig = plane.bootstrap_kubeconfig()?;
        for (binding, role, group) in JOINING {
            plane.grant(binding, role, group)?;
        }
        let proxy_kubeconfig = plane.proxy_kubeconfig()?;
        let node = spawn(&stage, &plane, &bootstrap_kubeconfig, &proxy_kubeconfig, &setting, &[])?;
        Ok(Self { stage, plane, node, setting, bootstrap_kubeconfig, proxy_kubeconfig })
    }

    /// Starts the daemon again over what runs.
    fn start_again(&mut self) -> anyhow::Result<()> {
        self.start_again_with(&[])
    }

    /// As [`Fleet::start_again`], with more flags.
    fn start_again_with(&mut self, flags: &[&str]) -> anyhow::Result<()> {
        let (bootstrap, proxy) = (&self.bootstrap_kubeconfig, &self.proxy_kubeconfig);
        self.node = spawn(&self.stage, &self.plane, bootstrap, proxy, &self.setting, flags)?;
        Ok(())
    }

    /// The output of `kubectl LINE`, words parted by spaces.
    fn kubectl(&self, line: &str) -> anyhow::Result<String> {
        self.kubectl_words(&line.split(' ').collect::<Vec<_>>())
    }

    fn kubectl_words(&self, words: &[&str]) -> anyhow::Result<String> {
        let output = host::output(self.plane.kubectl()?.args(words))?;
        Ok(String::from_utf8(output)?)
    }

    /// `kubectl get LINE` as JSON.
    fn get(&self, line: &str) -> anyhow::Result<Value> {
        Ok(serde_json::from_str(&self.kubectl(&format!("get {line} -o json"))?)?)
    }

    /// The pods with this value of label `app`.
    fn pods(&self, app: &str) -> anyhow::Result<Vec<Value>> {
        let list = self.get(&format!("pods -l app={app}"))?;
        Ok(list["items"].as_array().cloned().unwrap_or_default())
    }

    fn apply(&self, name: &str, text: &str) -> anyhow::Result<()> {
        let file = self.stage.dir.path().join(name);
        std::fs::write(&file, text)?;
        self.kubectl_words(&["apply", "-f", &file.display().to_string()]).map(drop)
    }

    /// The output of `orlop ARGUMENTS`, which asks the node itself.
    fn orlop(&self, arguments: &[&str]) -> anyhow::Result<String> {
        Ok(String::from_utf8(host::output(self.stage.orlop().args(arguments))?)?)
    }

    /// Prints what helps to understand a failure.
    fn report(&self) {
        for line in ["get nodes -o wide", "get pods -A -o wide", "get events -A"] {
            println!("$ kubectl {line}");
            match self.kubectl(line) {
                Ok(text) => print!("{text}"),
                Err(error) => println!("{error:#}"),
            }
        }
        println!("$ tail orlop.log");
        let log = std::fs::read_to_string(log_file(&self.stage)).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(60)..].iter().for_each(|line| println!("{line}"));
    }

    /// SIGTERM to the daemon, and its end.
    fn stop_node(&mut self) -> anyhow::Result<()> {
        let pid = i32::try_from(self.node.id()).ok().and_then(rustix::process::Pid::from_raw).context("a pid")?;
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let ended = wait("the daemon ends", SOON, || Ok(self.node.try_wait()?))?;
        ensure!(ended.success(), "the daemon ended with {ended}");
        Ok(())
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // Only after a failed point is there something to end; the failure has been reported already.
        if self.node.try_wait().is_ok_and(|ended| ended.is_some())
            && served::fsck(&self.stage).is_ok_and(|left| left.is_empty())
        {
            return;
        }
        let _ = self.node.kill();
        let _ = self.node.wait();
        // A node alone, with nothing to run, removes the pods that it finds.
        let empty = self.stage.dir.path().join("empty");
        let _ = std::fs::create_dir_all(&empty);
        let up = self
            .stage
            .orlop()
            .arg("up")
            .args(&self.setting.flags)
            .arg("--detach")
            .arg(&empty)
            .stdout(Stdio::null())
            .status();
        if up.is_ok_and(|status| status.success()) {
            let _ = self.orlop(&["down"]);
        }
        leftovers::clear(self.stage.dir.path());
    }
}

/// Where the node's static pods are; not there at first.
fn static_pods(stage: &Stage) -> PathBuf {
    stage.dir.path().join("static")
}

/// What the node's runtime is told.
fn runtime_configuration(stage: &Stage) -> PathBuf {
    stage.dir.path().join("runtime.yaml")
}

fn log_file(stage: &Stage) -> PathBuf {
    stage.dir.path().join("orlop.log")
}

fn spawn(
    stage: &Stage,
    plane: &ControlPlane,
    bootstrap: &Path,
    proxy: &Path,
    setting: &Setting,
    flags: &[&str],
) -> anyhow::Result<Child> {
    let config = stage.dir.path().join("kubelet.yaml");
    std::fs::write(&config, manifests::joining_configuration(plane, &static_pods(stage))? + &setting.configuration)?;
    let log = std::fs::OpenOptions::new().create(true).append(true).open(log_file(stage))?;
    let mut node: Command = stage.orlop();
    node.env("ORLOP_LOG", "info").arg("node").arg("--kubeconfig").arg(stage.dir.path().join("kubelet.conf"));
    node.arg("--bootstrap-kubeconfig").arg(bootstrap);
    node.arg("--proxy-kubeconfig").arg(proxy).arg("--config").arg(config);
    node.arg("--service-cidr").arg(&plane.options().service_range);
    node.args(["--hostname-override", NODE, "--node-labels", "deck=lower", "--node-ip"])
        .arg(ADDRESS.to_string())
        .args(&setting.flags)
        .args(flags);
    node.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn().context("start orlop node")
}
