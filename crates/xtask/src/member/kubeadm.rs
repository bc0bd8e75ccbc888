//! `kubeadm join`, unmodified, on a machine whose kubelet is orlop.

use std::io::{BufRead as _, BufReader};
use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, ensure};
use testkit::control_plane::{self, ControlPlane, Options, Part};
use testkit::{go, host, netns};

use super::points::condition;
use super::{ADDRESS, SOON, wait};

const NAME: &str = "mate";

/// What kubeadm finds in a cluster that it has made.
fn configuration(plane: &ControlPlane) -> String {
    format!(
        "apiVersion: kubeadm.k8s.io/v1beta4
kind: ClusterConfiguration
kubernetesVersion: v1.37.2
controlPlaneEndpoint: {}
networking: {{ podSubnet: {}, serviceSubnet: {} }}
---
apiVersion: kubeadm.k8s.io/v1beta4
kind: InitConfiguration
bootstrapTokens:
- token: abcdef.0123456789abcdef
  usages: [signing, authentication]
  groups: ['system:bootstrappers:kubeadm:default-node-token']
nodeRegistration: {{ criSocket: 'unix:///run/orlop/cri.sock' }}
localAPIEndpoint: {{ advertiseAddress: {ADDRESS} }}
---
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
cgroupDriver: cgroupfs
",
        plane.address(),
        plane.options().pod_range,
        plane.options().service_range,
    )
}

/// Joins, and returns 1: the one point that there is.
///
/// # Errors
/// The node does not join, or is not Ready; the logs of both programs are printed before.
pub(crate) fn run(orlop: &Path) -> anyhow::Result<usize> {
    let programs = control_plane::build()?;
    let kubeadm = go::build_all("kubeadm", &[go::KUBEADM])?.join(go::KUBEADM.name);
    netns::enter_private()?;
    netns::add_address(IpAddr::V4(ADDRESS))?;
    let dir = tempfile::Builder::new().prefix("orlop-kubeadm-").tempdir()?;
    let options = Options { address: IpAddr::V4(ADDRESS), ..Options::default() };
    let mut plane = ControlPlane::start(&programs, &dir.path().join("plane"), options)?;
    plane.run(Part::ControllerManager)?;
    let config = dir.path().join("kubeadm.yaml");
    std::fs::write(&config, configuration(&plane))?;
    for phase in [&["upload-config", "all"][..], &["bootstrap-token"]] {
        let mut init = Command::new(&kubeadm);
        init.args(["init", "phase"]).args(phase).arg("--config").arg(&config);
        host::output(init.arg("--kubeconfig").arg(plane.admin_kubeconfig()?))?;
    }
    let joined = join(orlop, &kubeadm, dir.path(), &plane);
    if joined.is_err() {
        for log in ["join.log", "kubelet.log"] {
            println!("$ cat {log}\n{}", std::fs::read_to_string(dir.path().join(log)).unwrap_or_default());
        }
    }
    println!("ok   kubeadm join: {}", joined?);
    Ok(1)
}

fn join(orlop: &Path, kubeadm: &Path, scratch: &Path, plane: &ControlPlane) -> anyhow::Result<String> {
    let log = std::fs::File::create(scratch.join("join.log"))?;
    let mut machine = Command::new("unshare");
    machine.args(["--mount", "sh", "-c", include_str!("kubeadm.sh"), "kubeadm.sh"]);
    machine.arg(orlop).arg(kubeadm).arg(scratch).arg(plane.address().to_string()).args([&ADDRESS.to_string(), NAME]);
    let mut machine = machine.stdin(Stdio::piped()).stdout(log.try_clone()?).stderr(log).spawn()?;
    let seen = wait("the node is Ready", SOON, || {
        let kubectl = host::output(plane.kubectl()?.args(["get", "node", NAME, "-o", "json"]))?;
        let node: serde_json::Value = serde_json::from_slice(&kubectl)?;
        Ok((condition(&node, "Ready") == Some("True")).then_some(()))
    });
    let told = wait("kubeadm says that it has joined", SOON, || {
        let log = BufReader::new(std::fs::File::open(scratch.join("join.log"))?);
        let mut lines = log.lines().map_while(Result::ok);
        Ok(lines.find(|line| line.contains("This node has joined the cluster")))
    });
    drop(machine.stdin.take()); // The script ends, and the kubelet with it.
    let ended = machine.wait().context("wait for the machine")?;
    seen?;
    told?;
    ensure!(ended.success(), "kubeadm join ended with {ended}");
    Ok("a bootstrap token became a certificate, and the node is Ready".to_owned())
}
