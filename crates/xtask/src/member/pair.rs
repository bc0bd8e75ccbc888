//! A second node, on a machine of its own, with ways between both: pods of each reach those of the other.

use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use anyhow::{Context as _, ensure};
use rustix::process::{Pid, Signal, kill_process};
use testkit::groups;
use testkit::registry::Registry;

use super::proxy::{THAT_SIDE, on_another_machine};
use super::{Fleet, NODE, SOON, condition, wait};
use crate::conformance::left;

/// The second node.
const NAME: &str = "barge";
/// Its pod, and that of the first: each has a Service of its name, and shows its name.
const PODS: [(&str, &str); 2] = [("stern", NODE), ("bow", NAME)];

/// The point.
pub(super) fn reach_each_other(fleet: &mut Fleet) -> anyhow::Result<String> {
    let fleet = &*fleet;
    on_another_machine(fleet.plane.options(), || {
        let mut second = Second::start(fleet)?;
        second.works().and_then(|told| second.end().map(|()| told)).with_context(|| second.log())
    })
}

struct Second<'a> {
    fleet: &'a Fleet,
    dir: PathBuf,
    node: Child,
    /// At the address of the first machine's, and with its images.
    _registry: Registry,
}

impl<'a> Second<'a> {
    fn start(fleet: &'a Fleet) -> anyhow::Result<Self> {
        let stage = fleet.stage.dir.path();
        let registry = Registry::start(fleet.stage.registry_address(), &stage.join("registry"))?;
        let dir = stage.join(NAME);
        std::fs::create_dir(&dir)?;
        // Groups of its own: those of the first node are on this machine, too.
        groups::make(&group(fleet))?;
        let config = fleet.plane.kubelet_configuration()? + &format!("cgroupRoot: /{}\n", group(fleet).display());
        std::fs::write(dir.join("kubelet.yaml"), config)?;
        let log = std::fs::File::create(dir.join("orlop.log"))?;
        let mut node = fleet.stage.orlop();
        node.env("ORLOP_LOG", "info").arg("node").args(left::places(&dir));
        node.arg("--kubeconfig").arg(fleet.plane.node_kubeconfig(NAME)?);
        node.arg("--proxy-kubeconfig").arg(&fleet.proxy_kubeconfig).arg("--config").arg(dir.join("kubelet.yaml"));
        node.arg("--service-cidr").arg(&fleet.plane.options().service_range);
        node.args(["--hostname-override", NAME, "--node-ip"]).arg(THAT_SIDE.to_string());
        let node = node.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn();
        let node = node.context("start the second orlop node")?;
        Ok(Self { fleet, dir, node, _registry: registry })
    }

    fn works(&self) -> anyhow::Result<String> {
        let fleet = self.fleet;
        wait("the second node is Ready", SOON, || {
            let node = fleet.get(&format!("node {NAME}"))?;
            Ok((condition(&node, "Ready") == Some("True")).then_some(()))
        })?;
        for (name, node) in PODS {
            fleet.apply(&format!("{name}.yaml"), &manifest(name, node))?;
        }
        let [stern, bow] = PODS.map(|(name, _)| name);
        let mut reached = Vec::new();
        for (from, to) in [(stern, bow), (bow, stern)] {
            fleet.until_ready(from, 1)?;
            for place in self.places_of(to)? {
                wait(&format!("{from} reaches {to} at {place}"), SOON, || {
                    let page = fleet.kubectl(&format!("exec {from} -- timeout 5 wget -qO- http://{place}/"))?;
                    Ok((page.trim() == to).then_some(()))
                })?;
                reached.push(place);
            }
        }
        Ok(format!("{NODE} and {NAME}: {}", reached.join(", ")))
    }

    /// Where a pod is reached: at its address, and by its Service.
    fn places_of(&self, name: &str) -> anyhow::Result<[String; 2]> {
        let pod = &self.fleet.until_ready(name, 1)?[0];
        let service = self.fleet.get(&format!("service {name}"))?;
        let (own, shared) = (pod["status"]["podIP"].as_str(), service["spec"]["clusterIP"].as_str());
        Ok([format!("{}:8080", own.context("its address")?), format!("{}:80", shared.context("an address")?)])
    }

    /// Its pods go, then the node.
    fn end(&mut self) -> anyhow::Result<()> {
        let names = PODS.map(|(name, _)| name).join(" ");
        self.fleet.kubectl(&format!("delete pod {names} --wait=true"))?;
        self.fleet.kubectl(&format!("delete service {names}"))?;
        left::nothing(&self.fleet.stage.orlop, &self.dir)?;
        let pid = i32::try_from(self.node.id()).ok().and_then(Pid::from_raw).context("a pid")?;
        kill_process(pid, Signal::TERM)?;
        let ended = wait("the second node ends", SOON, || Ok(self.node.try_wait()?))?;
        ensure!(ended.success(), "it ended with {ended}");
        self.fleet.kubectl(&format!("delete node {NAME}")).map(drop)
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("orlop.log")).unwrap_or_default()
    }
}

impl Drop for Second<'_> {
    fn drop(&mut self) {
        // After a failure there is something to end; the failure is what is reported.
        if !self.node.try_wait().is_ok_and(|ended| ended.is_some()) {
            let _ = self.node.kill();
            let _ = self.node.wait();
            let _ = left::remove(&self.fleet.stage.orlop, &self.dir);
        }
        if let Some(Err(error)) = group(self.fleet).file_name().map(groups::remove) {
            println!("the second node's control groups stay: {error:#}");
        }
    }
}

/// The second node's `cgroupRoot`, of a name that nothing else has.
fn group(fleet: &Fleet) -> PathBuf {
    let mut name = fleet.stage.dir.path().file_name().unwrap_or_default().to_owned();
    name.push("-");
    name.push(NAME);
    Path::new(&name).to_owned()
}

fn manifest(name: &str, node: &str) -> String {
    format!(
        "apiVersion: v1
kind: Service
metadata: {{ name: {name} }}
spec: {{ selector: {{ app: {name} }}, ports: [{{ port: 80, targetPort: 8080 }}] }}
---
apiVersion: v1
kind: Pod
metadata: {{ name: {name}, labels: {{ app: {name} }} }}
spec:
  nodeName: {node}
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: busybox
    imagePullPolicy: IfNotPresent
    command: [sh, -c, 'mkdir /w; hostname > /w/index.html; exec httpd -f -p 8080 -h /w']
    readinessProbe: {{ httpGet: {{ path: /, port: 8080 }}, periodSeconds: 1, timeoutSeconds: 30 }}
"
    )
}
