//! The kubelet alone: containerd is the runtime, as on a node that was one before; then orlop is its runc, too.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use testkit::control_plane::{self, ControlPlane, Options, Part};
use testkit::daemon::{Daemon, Nursery};
use testkit::{containerd, go, host, netns};

use super::{ADDRESS, NODE, SOON, condition};
use crate::conformance::served;
use crate::demo::Stage;
use crate::voyage::wait;

/// A pod that reads a setting, says so, and can be made to exit.
const POD: &str = "apiVersion: v1
kind: ConfigMap
metadata: { name: settings }
data: { word: ahoy }
---
apiVersion: v1
kind: Pod
metadata: { name: guest }
spec:
  nodeName: deck
  terminationGracePeriodSeconds: 5
  containers:
  - name: c
    image: busybox
    command: [sh, -c, 'trap exit TERM; cat /settings/word; echo; sleep infinity & wait']
    readinessProbe: { exec: { command: [cat, /settings/word] }, periodSeconds: 1 }
    resources: { limits: { memory: 32Mi } }
    volumeMounts: [{ name: settings, mountPath: /settings }]
  volumes: [{ name: settings, configMap: { name: settings } }]
";

/// A node whose runtime is containerd.
struct Guest {
    node: Child,
    containerd: Daemon,
    plane: ControlPlane,
    stage: Stage,
}

/// Runs the four points that there are, and returns 4.
///
/// # Errors
/// Something of it did not work; the node's log is printed before.
pub(crate) fn run(orlop: &Path) -> anyhow::Result<usize> {
    let programs = control_plane::build()?;
    let reference = go::build_all("reference", go::REFERENCE)?;
    let pause = crate::images::pause()?;
    let stage = Stage::set_up(orlop, false)?;
    stage.push(&pause, containerd::PAUSE)?;
    netns::add_address(IpAddr::V4(ADDRESS))?;
    let options = Options { address: IpAddr::V4(ADDRESS), ..Options::default() };
    let mut plane = ControlPlane::start(&programs, &stage.dir.path().join("plane"), options)?;
    plane.run(Part::ControllerManager)?;
    let mut guest = Guest::start(stage, plane, &reference)?;
    let done = guest.points().and_then(|done| {
        println!("ok   containerd as the runtime: {done}");
        guest.forced()?;
        println!("ok   a pod that is deleted by force: no leftover while it ends, nor afterwards");
        guest.hangs()?;
        println!("ok   a containerd that hangs: the node says so, until it answers again");
        guest.replace_runc(&reference)?;
        guest.points()
    });
    if done.is_err() {
        for line in [&["get", "nodes", "-o", "yaml"][..], &["get", "pods", "-o", "yaml"], &["get", "events"]] {
            println!("$ kubectl {}\n{}", line.join(" "), guest.kubectl(line).unwrap_or_default());
        }
        for log in ["orlop.log", "containerd.log"] {
            println!("$ cat {log}\n{}", std::fs::read_to_string(guest.file(log)).unwrap_or_default());
        }
    }
    println!("ok   containerd as the runtime, with orlop as its runc: {}", done?);
    Ok(4)
}

impl Guest {
    fn start(stage: Stage, plane: ControlPlane, reference: &Path) -> anyhow::Result<Self> {
        let dir = stage.dir.path();
        let socket = dir.join("containerd.sock");
        let arguments = containerd::prepare(reference, dir, &socket, &containerd::Network::ALONE)?;
        let log = dir.join("containerd.log");
        let mut runtime =
            Daemon::new(&Arc::new(Nursery::new()), &containerd::program(reference)?, arguments.into(), log);
        runtime.start()?;
        runtime.wait_ready(SOON, || std::os::unix::net::UnixStream::connect(&socket).is_ok())?;
        let node = spawn(&stage, &plane)?;
        Ok(Self { node, containerd: runtime, plane, stage })
    }

    /// Starts containerd again with programs among which orlop is the one that is called runc.
    fn replace_runc(&mut self, reference: &Path) -> anyhow::Result<()> {
        let programs = containerd::replace_runc(reference, &self.stage.orlop, self.file("programs"))?;
        self.containerd.stop(SOON)?;
        let socket = self.file("containerd.sock");
        containerd::prepare(&programs, self.stage.dir.path(), &socket, &containerd::Network::ALONE)?;
        self.containerd.start()?;
        self.containerd.wait_ready(SOON, || std::os::unix::net::UnixStream::connect(&socket).is_ok())
    }

    fn file(&self, name: &str) -> PathBuf {
        self.stage.dir.path().join(name)
    }

    fn points(&mut self) -> anyhow::Result<String> {
        let ready = |object: &Value| condition(object, "Ready") == Some("True");
        wait("the node is Ready", SOON, || Ok(self.find("node", NODE).filter(ready)))?;
        wait("its controller makes the account of pods", SOON, || Ok(self.find("serviceaccount", "default")))?;
        std::fs::write(self.file("guest.yaml"), POD)?;
        self.kubectl(&["apply", "-f", &self.file("guest.yaml").display().to_string()])?;
        let pod = wait("the pod is Ready", SOON, || Ok(self.find("pod", "guest").filter(ready)))?;
        let container = pod["status"]["containerStatuses"][0]["containerID"].clone();
        ensure!(container.as_str().is_some_and(|id| id.starts_with("containerd://")), "containerID is {container}");
        let said =
            wait(
                "the log arrives",
                SOON,
                || Ok(Some(self.kubectl(&["logs", "guest"])?).filter(|log| !log.is_empty())),
            )?;
        ensure!(said.trim() == "ahoy", "the log is {said:?}");
        let told = self.kubectl(&["exec", "guest", "--", "cat", "/settings/word"])?;
        ensure!(told == "ahoy", "exec says {told:?}");
        self.told_of()?;
        let uid = pod["metadata"]["uid"].as_str().context("the pod's uid")?;
        let groups = groups_of(uid)?;
        // Where the limits of the pod are, the container is, too.
        let has_container = |group: &PathBuf| {
            let entries = std::fs::read_dir(group).into_iter().flatten().flatten();
            entries.filter(|entry| entry.path().is_dir()).count() > 0
        };
        ensure!(!groups.is_empty() && groups.iter().all(has_container), "the container is not in all of {groups:?}");
        self.node.kill()?;
        self.node.wait()?;
        self.node = spawn(&self.stage, &self.plane)?;
        wait("the next daemon serves", SOON, || Ok(self.kubectl(&["exec", "guest", "--", "true"]).ok()))?;
        let _ = self.kubectl(&["exec", "guest", "--", "sh", "-c", "kill 1"]); // It may be killed with its container.
        let restarted = |pod: &Value| {
            let status = &pod["status"]["containerStatuses"][0];
            status["restartCount"] == 1 && status["lastState"]["terminated"]["containerID"] == container && ready(pod)
        };
        wait("its container is restarted, once", SOON, || Ok(self.find("pod", "guest").filter(restarted)))?;
        self.kubectl(&["delete", "pod", "guest", "--wait=false"])?;
        wait("the pod is gone", SOON, || Ok(self.find("pod", "guest").is_none().then_some(())))?;
        wait("its groups are gone", SOON, || Ok(groups_of(uid)?.is_empty().then_some(())))?;
        self.containerd.check()?;
        Ok("logs, exec, metrics, a restart by the next daemon, deletion".to_owned())
    }

    /// Nobody but the kubelet knows the pod any more, and it cannot end the pod yet.
    fn forced(&self) -> anyhow::Result<()> {
        self.kubectl(&["apply", "-f", &self.file("guest.yaml").display().to_string()])?;
        let ready = |pod: &Value| condition(pod, "Ready") == Some("True");
        let pod = wait("the pod is Ready", SOON, || Ok(self.find("pod", "guest").filter(ready)))?;
        let directory = self.file("state/kubelet/pods").join(pod["metadata"]["uid"].as_str().context("the pod's uid")?);
        self.containerd.pause()?;
        let owned = self.owned_until_it_has_ended();
        self.containerd.resume()?;
        ensure!(owned?, "its directory has no owner while it ends");
        wait("its directory is gone", SOON, || Ok((!directory.exists()).then_some(())))?;
        let left = served::fsck(&self.stage)?;
        ensure!(left.is_empty(), "fsck: {left:?}");
        Ok(())
    }

    /// Whether `fsck` is silent of a pod that the node's source has no more, and whose directory is there.
    fn owned_until_it_has_ended(&self) -> anyhow::Result<bool> {
        self.kubectl(&["delete", "pod", "guest", "--force", "--grace-period=0"])?;
        let named = || {
            let pods = host::output(self.stage.orlop().args(["get", "pods", "-A", "-o", "json"]))?;
            anyhow::Ok(String::from_utf8(pods)?.contains("\"guest\""))
        };
        wait("the node's source has it no more", SOON, || Ok((!named()?).then_some(())))?;
        Ok(served::fsck(&self.stage)?.is_empty())
    }

    /// A runtime that takes connections and never answers.
    fn hangs(&self) -> anyhow::Result<()> {
        self.containerd.pause()?;
        let is_down = |node: &Value| {
            let conditions = node["status"]["conditions"].as_array().into_iter().flatten();
            let mut messages = conditions.filter_map(|condition| condition["message"].as_str());
            condition(node, "Ready") == Some("False") && messages.any(|said| said.contains("container runtime is down"))
        };
        let down = wait("the node is not Ready", SOON, || Ok(self.find("node", NODE).filter(is_down)));
        self.containerd.resume()?;
        down?;
        let ready = |node: &Value| condition(node, "Ready") == Some("True");
        wait("the node is Ready again", SOON, || Ok(self.find("node", NODE).filter(ready)))?;
        Ok(())
    }

    /// What dashboards show of the container and the node's disks.
    fn told_of(&self) -> anyhow::Result<()> {
        let asked = |path: &str| self.kubectl(&["get", "--raw", &format!("/api/v1/nodes/{NODE}/proxy/{path}")]);
        for family in ["container_cpu_usage_seconds_total", "container_memory_working_set_bytes"] {
            let beginning = format!("{family}{{container=\"c\"");
            wait(&format!("metrics/cadvisor has {beginning}"), SOON, || {
                Ok(asked("metrics/cadvisor")?.lines().any(|line| line.starts_with(&beginning)).then_some(()))
            })?;
        }
        let summary: Value = serde_json::from_str(&asked("stats/summary")?)?;
        for disk in
            [&summary["node"]["fs"], &summary["node"]["runtime"]["imageFs"], &summary["node"]["runtime"]["containerFs"]]
        {
            ensure!(
                disk["capacityBytes"].as_u64() > Some(0),
                "no disk in the summary of the node: {}",
                summary["node"]
            );
        }
        Ok(())
    }

    fn find(&self, kind: &str, name: &str) -> Option<Value> {
        serde_json::from_str(&self.kubectl(&["get", kind, name, "-o", "json"]).ok()?).ok()
    }

    fn kubectl(&self, words: &[&str]) -> anyhow::Result<String> {
        Ok(String::from_utf8(host::output(self.plane.kubectl()?.args(words))?)?)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Shims outlive containerd, and only a kubelet removes pods: after a failed point there may be one left.
        let _ = self.kubectl(&["delete", "pods", "--all", "--grace-period=1", "--timeout=20s"]);
        let _ = self.node.kill();
        let _ = self.node.wait();
    }
}

/// The groups of a pod, one for each controller of version 1 that its node limits, wherever they are.
fn groups_of(uid: &str) -> anyhow::Result<Vec<PathBuf>> {
    let name = format!("pod{uid}");
    let (mut found, mut below) = (Vec::new(), vec![PathBuf::from("/sys/fs/cgroup")]);
    while let Some(dir) = below.pop() {
        // One may go meanwhile.
        for entry in std::fs::read_dir(&dir).into_iter().flatten().flatten() {
            match entry.file_type()?.is_dir() {
                true if entry.file_name() == *name => found.push(entry.path()),
                true => below.push(entry.path()),
                false => {}
            }
        }
    }
    Ok(found)
}

fn spawn(stage: &Stage, plane: &ControlPlane) -> anyhow::Result<Child> {
    let file = |name: &str| stage.dir.path().join(name);
    std::fs::write(file("kubelet.yaml"), plane.kubelet_configuration()?)?;
    let log = std::fs::File::options().create(true).append(true).open(file("orlop.log"))?;
    let mut node: Command = stage.orlop();
    node.env("ORLOP_LOG", "info")
        .arg("kubelet")
        .arg(format!("--container-runtime-endpoint=unix://{}", file("containerd.sock").display()))
        .arg("--kubeconfig")
        .arg(plane.node_kubeconfig(NODE)?)
        .arg("--config")
        .arg(file("kubelet.yaml"));
    node.arg("--cert-dir").arg(file("pki")).args(["--hostname-override", NODE, "--node-ip"]).arg(ADDRESS.to_string());
    node.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn().context("start orlop kubelet")
}
