//! The runtime alone: upstream's kubelet has its pods run by `orlop runtime`, and finds nothing missing.
//!
//! ```text
//! kubectl ─► control plane ─► kubelet ──CRI──► orlop runtime ─► pods
//!                                ╰─ cAdvisor ──► whose is this control group?
//! ```

use std::fs;
use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Instant;

use anyhow::{Context as _, bail, ensure};
use cri::{ImageService as _, v1};
use serde_json::{Value, json};
use testkit::control_plane::{self, ControlPlane, Options, Part};
use testkit::daemon::Daemon;
use testkit::{containerd, go, groups, host, netns, pace, upstream};

use super::points::{condition, forwards};
use super::{ADDRESS, NODE, SOON};
use crate::conformance::{contained, left};
use crate::demo::Stage;
use crate::voyage::{keepers_in, wait};

/// Where cAdvisor looks for a runtime that it can ask.
const KNOWN_SOCKET: &str = "/run/containerd/containerd.sock";
/// Where the kubelet has the logs of pods.
const LOGS: &str = "/var/log/pods";
/// An image that only one pod uses.
const SPARE: &str = "orlop/pause";

/// One of each kind that controllers make pods for; the first has both probes and serves its name.
const WORK: &str = "apiVersion: apps/v1
kind: Deployment
metadata: { name: web }
spec:
  selector: { matchLabels: { app: web } }
  template:
    metadata: { labels: { app: web } }
    spec:
      terminationGracePeriodSeconds: 1
      containers:
      - name: c
        image: busybox
        command: [sh, -c, 'mkdir /w; hostname > /w/index.html; echo listening as $(hostname); exec httpd -f -p 8080 -h /w']
        livenessProbe: { httpGet: { port: 8080 }, periodSeconds: 1, timeoutSeconds: 30 }
        readinessProbe: { exec: { command: [test, -s, /w/index.html] }, periodSeconds: 1, timeoutSeconds: 30 }
        resources: { requests: { cpu: 10m }, limits: { memory: 64Mi } }
---
apiVersion: apps/v1
kind: DaemonSet
metadata: { name: guard }
spec:
  selector: { matchLabels: { app: guard } }
  template:
    metadata: { labels: { app: guard } }
    spec:
      terminationGracePeriodSeconds: 1
      hostNetwork: true
      containers: [{ name: c, image: busybox, command: [sleep, infinity] }]
---
apiVersion: batch/v1
kind: Job
metadata: { name: once }
spec:
  template:
    metadata: { labels: { app: once } }
    spec: { restartPolicy: Never, containers: [{ name: c, image: busybox, command: [echo, done] }] }
";

/// What ends in ways of its own: by a limit, by being spoken to, not at all.
const PODS: &str = "apiVersion: v1
kind: Pod
metadata: { name: greedy, labels: { app: greedy } }
spec:
  restartPolicy: Never
  containers:
  - { name: c, image: busybox, command: [tail, /dev/zero], resources: { limits: { memory: 24Mi } } }
---
apiVersion: v1
kind: Pod
metadata: { name: parrot, labels: { app: parrot } }
spec:
  restartPolicy: Never
  containers:
  - { name: c, image: busybox, stdin: true, stdinOnce: true, command: [sh, -c, 'read line; echo heard $line'] }
---
apiVersion: v1
kind: Pod
metadata: { name: chatty, labels: { app: chatty } }
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: busybox
    command: [sh, -c, 'yes a line of a log that its kubelet rotates | head -n 5000; exec sleep infinity']
---
apiVersion: v1
kind: Pod
metadata: { name: spare, labels: { app: spare } }
spec:
  terminationGracePeriodSeconds: 1
  containers: [{ name: c, image: orlop/pause }]
";

/// The node, and who runs its pods.
struct Peer {
    kubelet: Daemon,
    runtime: Daemon,
    plane: ControlPlane,
    stage: Stage,
    /// The kubelet's program is in it.
    programs: PathBuf,
}

/// What the kubelet's configuration is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    /// A node as any other.
    Anything,
    /// One that asks the runtime alone for figures.
    Cri,
    /// One whose disk is full.
    FullDisk,
}

/// A point: its title and its check.
type Point = (&'static str, fn(&mut Peer) -> anyhow::Result<String>);

const POINTS: &[Point] = &[
    ("the node is Ready", Peer::joins),
    ("a Deployment, a DaemonSet and a Job run, with probes", Peer::works),
    ("kubectl logs, exec, cp, attach and port-forward reach into pods", Peer::reaches_in),
    ("a running pod is resized", Peer::resizes),
    ("who takes too much memory ends as OOMKilled", Peer::limits),
    ("the kubelet rotates logs", Peer::rotates),
    ("cAdvisor knows the pods and their networks", Peer::measures),
    ("kill -9 of the runtime is not felt", Peer::killed_runtime),
    ("the same figures come by CRI, behind the kubelet's gate", Peer::measures_by_cri),
    ("a full disk costs unused images, then pods", Peer::evicts),
    ("deleted pods leave nothing that runs", Peer::leaves),
];

/// Runs every point in order and stops at the first that fails. Returns how many passed.
///
/// # Errors
/// The first point that failed, with the ends of all logs printed before.
pub(crate) fn run(orlop: &Path) -> anyhow::Result<usize> {
    let programs = control_plane::build()?;
    let kubelet = go::build(&go::KUBELET)?;
    let mut peer = Peer::start(orlop, &programs, kubelet.parent().context("a program is somewhere")?)?;
    for (number, (title, check)) in (1..).zip(POINTS) {
        let begin = Instant::now();
        match check(&mut peer) {
            Ok(note) => println!("ok   {number}. {title} ({:.1} s): {note}", begin.elapsed().as_secs_f64()),
            Err(error) => {
                println!("FAIL {number}. {title}: {error:#}");
                peer.report();
                bail!("point {number} of upstream's kubelet on orlop's runtime failed: {title}");
            }
        }
    }
    Ok(POINTS.len())
}

impl Peer {
    fn start(orlop: &Path, programs: &Path, kubelet: &Path) -> anyhow::Result<Self> {
        let pause = crate::images::pause()?;
        let stage = Stage::set_up(orlop, false)?;
        stage.push(&pause, SPARE)?;
        netns::add_address(IpAddr::V4(ADDRESS))?;
        // The kubelet writes to places that are in no configuration.
        contained::cover_apart()?;
        let dir = stage.dir.path().to_owned();
        upstream::spare_the_kernel(&dir)?;
        groups::make(Path::new(name_of(&dir)?))?;
        let options = Options { address: IpAddr::V4(ADDRESS), ..Options::default() };
        let mut plane = ControlPlane::start(programs, &dir.join("plane"), options)?;
        plane.run(Part::ControllerManager)?;
        plane.run(Part::Scheduler)?;
        let runtime = Daemon::new(plane.nursery(), orlop, runtime_arguments(&dir), dir.join("runtime.log"));
        let kubelet_config = configuration(&plane, &dir, About::Anything)?;
        let (program, arguments) = node(&dir, kubelet, &plane, &kubelet_config, |node| node.kubelet(&socket(&dir)))?;
        let kubelet_daemon = Daemon::new(plane.nursery(), &program, arguments, dir.join("kubelet.log"));
        let mut peer = Self { kubelet: kubelet_daemon, runtime, plane, stage, programs: kubelet.to_owned() };
        peer.start_runtime()?;
        let known = Path::new(KNOWN_SOCKET);
        fs::create_dir_all(known.parent().context("a socket is in a directory")?)?;
        symlink(socket(&dir), known)?;
        peer.kubelet.start()?;
        Ok(peer)
    }

    fn dir(&self) -> &Path {
        self.stage.dir.path()
    }

    fn start_runtime(&mut self) -> anyhow::Result<()> {
        let socket = socket(self.dir());
        self.runtime.start()?;
        self.runtime.wait_ready(SOON, || UnixStream::connect(&socket).is_ok())
    }

    /// Starts the kubelet again, with another configuration.
    fn restart_kubelet(&mut self, about: About) -> anyhow::Result<()> {
        self.kubelet.stop(SOON)?;
        let dir = self.dir().to_owned();
        let configuration = configuration(&self.plane, &dir, about)?;
        node(&dir, &self.programs, &self.plane, &configuration, |node| node.kubelet(&socket(&dir)))?;
        self.kubelet.start()
    }

    fn kubectl(&self, words: &[&str]) -> anyhow::Result<String> {
        Ok(String::from_utf8(host::output(self.plane.kubectl()?.args(words))?)?)
    }

    /// `kubectl get LINE` as JSON, words parted by spaces.
    fn get(&self, line: &str) -> anyhow::Result<Value> {
        let words: Vec<&str> = ["get"].into_iter().chain(line.split(' ')).chain(["-o", "json"]).collect();
        Ok(serde_json::from_str(&self.kubectl(&words)?)?)
    }

    fn apply(&self, text: &str) -> anyhow::Result<()> {
        let file = self.dir().join("manifest.yaml");
        fs::write(&file, text)?;
        self.kubectl(&["apply", "-f", &file.display().to_string()]).map(drop)
    }

    /// The only pod with this value of label `app`.
    fn pod(&self, app: &str) -> anyhow::Result<Value> {
        let mut list = self.get(&format!("pods -l app={app}"))?;
        let only = list["items"].as_array().is_some_and(|items| items.len() == 1);
        ensure!(only, "of {app} there are {}", list["items"]);
        Ok(list["items"][0].take())
    }

    /// Waits until the only pod of an application is Ready.
    fn ready(&self, app: &str) -> anyhow::Result<Value> {
        wait(&format!("the pod of {app} is Ready"), SOON, || {
            Ok(Some(self.pod(app)?).filter(|pod| condition(pod, "Ready") == Some("True")))
        })
    }

    /// Waits until the container of a pod has ended, and returns how.
    fn ended(&self, app: &str) -> anyhow::Result<Value> {
        wait(&format!("the container of {app} ends"), SOON, || {
            let pod = self.pod(app)?;
            let end = pod["status"]["containerStatuses"][0]["state"]["terminated"].clone();
            Ok(Some(end).filter(|end| !end.is_null()))
        })
    }

    /// What the kubelet says on a path of its own.
    fn ask(&self, path: &str) -> anyhow::Result<String> {
        self.kubectl(&["get", "--raw", &format!("/api/v1/nodes/{NODE}/proxy/{path}")])
    }

    fn joins(&mut self) -> anyhow::Result<String> {
        let node = wait("the node is Ready", SOON, || {
            self.kubelet.check()?;
            let node = self.get(&format!("node {NODE}")).ok();
            Ok(node.filter(|node| condition(node, "Ready") == Some("True")))
        })?;
        let info = &node["status"]["nodeInfo"];
        let runtime = info["containerRuntimeVersion"].as_str().unwrap_or_default();
        ensure!(runtime.starts_with("orlop://"), "the runtime calls itself {runtime:?}");
        wait("its controller makes the account of pods", SOON, || Ok(self.get("serviceaccount default").ok()))?;
        Ok(format!("kubelet {}, {runtime}", info["kubeletVersion"]))
    }

    fn works(&mut self) -> anyhow::Result<String> {
        self.apply(&format!("{WORK}---\n{PODS}"))?;
        let web = self.ready("web")?;
        let guard = self.ready("guard")?;
        ensure!(guard["status"]["podIP"] == ADDRESS.to_string(), "the host's network is {}", guard["status"]["podIP"]);
        let end = self.ended("once")?;
        ensure!(end["reason"] == "Completed" && end["exitCode"] == 0, "the Job ended with {end}");
        ensure!(web["status"]["containerStatuses"][0]["restartCount"] == 0, "the liveness probe failed");
        Ok("Ready, Ready and Completed".to_owned())
    }

    fn reaches_in(&mut self) -> anyhow::Result<String> {
        let web = self.ready("web")?;
        let pod = web["metadata"]["name"].as_str().context("a name")?;
        let log = self.kubectl(&["logs", pod])?;
        ensure!(log == format!("listening as {pod}\n"), "the log is {log:?}");
        let failed = self.kubectl(&["exec", pod, "--", "sh", "-c", "exit 7"]).err().context("exit 7 succeeded")?;
        ensure!(format!("{failed:#}").contains("exit code 7"), "{failed:#}");
        let echoed = self.speak(&["exec", "-i", pod, "--", "cat"], "through and back")?;
        ensure!(echoed == "through and back", "exec gives back {echoed:?}");
        let local = self.dir().join("copied");
        self.kubectl(&["cp", &format!("{pod}:/w/index.html"), &local.display().to_string()])?;
        ensure!(fs::read_to_string(&local)?.trim() == pod, "the copy differs");
        self.ready("parrot")?;
        let heard = self.speak(&["attach", "-i", "parrot"], "ahoy\n")?;
        ensure!(heard == "heard ahoy\n", "attach says {heard:?}");
        forwards(self.plane.kubectl()?, pod)?;
        Ok("exit codes and both directions".to_owned())
    }

    /// What a command of kubectl answers that is told something.
    fn speak(&self, words: &[&str], told: &str) -> anyhow::Result<String> {
        let mut kubectl = self.plane.kubectl()?;
        kubectl.args(words).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = kubectl.spawn().context("start kubectl")?;
        child.stdin.take().context("stdin is piped")?.write_all(told.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(output.status.success(), "kubectl {words:?}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?)
    }

    fn resizes(&mut self) -> anyhow::Result<String> {
        let web = self.ready("web")?;
        let (pod, id) = (web["metadata"]["name"].as_str().context("a name")?, containers(&web));
        let resources = json!({ "requests": { "cpu": "20m" }, "limits": { "memory": "128Mi" } });
        let patch = json!({ "spec": { "containers": [{ "name": "c", "resources": resources }] } }).to_string();
        self.kubectl(&["patch", "pod", pod, "--subresource", "resize", "-p", &patch])?;
        let resized = wait("it has what it wants", SOON, || {
            let pod = self.pod("web")?;
            let has = &pod["status"]["containerStatuses"][0]["resources"];
            let is_done = has["requests"]["cpu"] == "20m" && has["limits"]["memory"] == "128Mi";
            Ok(Some(pod).filter(|_| is_done))
        })?;
        ensure!(containers(&resized) == id, "its container was replaced");
        let limit = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max 2>/dev/null || true";
        let limit = self.kubectl(&["exec", pod, "--", "sh", "-c", limit])?;
        ensure!(limit.trim() == "134217728", "the kernel has {limit:?}");
        Ok("another CPU request, another memory limit, the same container".to_owned())
    }

    fn limits(&mut self) -> anyhow::Result<String> {
        let end = self.ended("greedy")?;
        ensure!(end["reason"] == "OOMKilled" && end["exitCode"] == 137, "it ended with {end}");
        Ok("exit code 137".to_owned())
    }

    fn rotates(&mut self) -> anyhow::Result<String> {
        let chatty = self.ready("chatty")?;
        let uid = chatty["metadata"]["uid"].as_str().context("a uid")?;
        let logs = Path::new(LOGS).join(format!("default_chatty_{uid}/c"));
        let rotated = wait("there are rotated logs", SOON, || {
            let names = fs::read_dir(&logs)?.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned());
            let old: Vec<String> = names.filter(|name| name.starts_with("0.log.")).collect();
            Ok(Some(old).filter(|old| !old.is_empty()))
        })?;
        self.kubectl(&["exec", "chatty", "--", "sh", "-c", "echo in a new file > /proc/1/fd/1"])?;
        wait("what is said now is in the new file", SOON, || {
            let log = self.kubectl(&["logs", "chatty"])?;
            Ok((log == "in a new file\n").then_some(()))
        })?;
        Ok(rotated.join(", "))
    }

    fn measures(&mut self) -> anyhow::Result<String> {
        let text = self.figures()?;
        let of_containers = of_pods(&text, "container_memory_working_set_bytes");
        ensure!(of_containers.iter().any(|line| line.contains("image=\"")), "no images: {of_containers:?}");
        Ok(format!("{} lines, {} with a pod's memory", text.lines().count(), of_containers.len()))
    }

    /// Metrics and summary of the kubelet, once they have figures of a pod, its container and its network. Whoever collects
    /// them looks every ten seconds.
    fn figures(&self) -> anyhow::Result<String> {
        let web = self.ready("web")?;
        let pod = format!("pod=\"{}\"", web["metadata"]["name"].as_str().context("a name")?);
        let text = wait("the figures of a pod, its container and its network are there", SOON, || {
            let text = self.ask("metrics/cadvisor")?;
            let has = |name: &str, labels: &[&str]| {
                let mut rows = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
                rows.any(|line| labels.iter().chain([&pod.as_str()]).all(|label| line.contains(label)))
            };
            let all = has("container_memory_working_set_bytes", &["container=\"c\"", "namespace=\"default\""])
                && has("container_cpu_usage_seconds_total", &["container=\"c\""])
                && has("container_network_receive_bytes_total", &["interface=\"eth0\""]);
            Ok(all.then_some(text))
        })?;
        wait("the summary has them, too", SOON, || {
            let summary: Value = serde_json::from_str(&self.ask("stats/summary")?)?;
            let pods = summary["pods"].as_array().context("a list of pods")?;
            let web_name = &web["metadata"]["name"];
            let shown = pods.iter().find(|shown| shown["podRef"]["name"] == *web_name);
            let has =
                |shown: &&Value| shown["network"]["rxBytes"].is_u64() && shown["memory"]["workingSetBytes"].is_u64();
            Ok(shown.filter(has).map(drop))
        })?;
        Ok(text)
    }

    fn killed_runtime(&mut self) -> anyhow::Result<String> {
        let before = self.pod("web")?;
        let pod = before["metadata"]["name"].as_str().context("a name")?;
        self.runtime.kill()?;
        self.start_runtime()?;
        wait("the next runtime serves", SOON, || Ok(self.kubectl(&["exec", pod, "--", "true"]).ok()))?;
        let log = self.kubectl(&["logs", pod])?;
        ensure!(log == format!("listening as {pod}\n"), "the log is {log:?}");
        let after = self.ready("web")?;
        ensure!(containers(&after) == containers(&before), "its containers were replaced");
        Ok("the same containers, exec by the next one".to_owned())
    }

    fn measures_by_cri(&mut self) -> anyhow::Result<String> {
        self.restart_kubelet(About::Cri)?;
        let text = self.figures()?;
        Ok(format!("{} lines with a pod's memory", of_pods(&text, "container_memory_working_set_bytes").len()))
    }

    fn evicts(&mut self) -> anyhow::Result<String> {
        self.kubectl(&["delete", "pod", "spare"])?;
        ensure!(self.has_image(SPARE)?, "the image of a deleted pod is gone already");
        self.restart_kubelet(About::FullDisk)?;
        wait("the image that nobody uses is removed", SOON, || Ok((!self.has_image(SPARE)?).then_some(())))?;
        wait("a pod is evicted", SOON, || {
            let pods = self.get("pods")?;
            let evicted = |pod: &Value| pod["status"]["reason"] == "Evicted";
            Ok(pods["items"].as_array().is_some_and(|pods| pods.iter().any(evicted)).then_some(()))
        })?;
        let node = self.get(&format!("node {NODE}"))?;
        ensure!(condition(&node, "DiskPressure") == Some("True"), "the node says nothing of it");
        Ok("and the node tells of its disk".to_owned())
    }

    /// Whether the runtime has an image of this repository.
    fn has_image(&self, repository: &str) -> anyhow::Result<bool> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let images = runtime.block_on(async {
            let client = cri::Client::new(&socket(self.dir()))?;
            anyhow::Ok(client.list_images(v1::ListImagesRequest::default()).await?.images)
        })?;
        let mut names = images.iter().flat_map(|image| image.repo_tags.iter().chain(&image.repo_digests));
        Ok(names.any(|name| name.contains(repository)))
    }

    fn leaves(&mut self) -> anyhow::Result<String> {
        let limit = format!("--timeout={}s", pace::stretched(SOON).as_secs());
        self.kubectl(&["delete", "deployment,daemonset,job,pod", "--all", "--wait=true", &limit])?;
        wait("all keepers end", SOON, || Ok(keepers_in(self.dir())?.is_empty().then_some(())))?;
        self.end()?;
        // The machine may have control groups of other kubelets, so `orlop fsck` is not asked.
        let left = left::sandboxes(self.dir());
        ensure!(left.is_empty(), "sandboxes are left: {left:?}");
        Ok("the kubelet removes the records of such pods once a minute, and this has not waited for it".to_owned())
    }

    /// Ends both daemons, and whatever pods are left.
    fn end(&mut self) -> anyhow::Result<()> {
        self.kubelet.stop(SOON)?;
        self.runtime.stop(SOON)?;
        left::remove(&self.stage.orlop, self.dir())?;
        groups::remove(std::ffi::OsStr::new(name_of(self.dir())?))
    }

    /// Prints what helps to understand a failure.
    fn report(&self) {
        for words in [&["get", "nodes", "-o", "yaml"][..], &["get", "pods", "-A", "-o", "wide"], &["get", "events"]] {
            println!("$ kubectl {}\n{}", words.join(" "), self.kubectl(words).unwrap_or_default());
        }
        println!("{}\n{}", self.kubelet.log_end(), self.runtime.log_end());
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // Only after a failed point is there something to end; the failure has been reported already.
        if self.kubelet.pid().is_some() {
            let _ = self.end();
        }
    }
}

/// Ids of a pod's containers.
fn containers(pod: &Value) -> Vec<&Value> {
    let statuses = pod["status"]["containerStatuses"].as_array().into_iter().flatten();
    statuses.map(|status| &status["containerID"]).collect()
}

/// The lines of a metric that tell of containers of pods.
fn of_pods<'a>(text: &'a str, name: &str) -> Vec<&'a str> {
    let rows = text.lines().filter(|line| line.starts_with(&format!("{name}{{")));
    rows.filter(|line| line.contains("pod=\"") && !line.contains("pod=\"\"") && line.contains("container=\"c\""))
        .collect()
}

fn name_of(dir: &Path) -> anyhow::Result<&str> {
    dir.file_name().and_then(|name| name.to_str()).context("a directory has a name")
}

fn socket(dir: &Path) -> PathBuf {
    dir.join("cri.sock")
}

fn runtime_arguments(dir: &Path) -> Vec<String> {
    let flags = [
        "runtime".to_owned(),
        format!("--listen=unix://{}", socket(dir).display()),
        format!("--registry-config-dir={}", dir.join("certs.d").display()),
        format!("--cni-conf-dir={}", dir.join("cni").display()),
        "--log-level=info".to_owned(),
    ];
    flags.into_iter().chain(left::places(dir)).collect()
}

/// What `make` makes of upstream's node.
fn node<T>(
    dir: &Path,
    programs: &Path,
    plane: &ControlPlane,
    configuration: &str,
    make: impl FnOnce(&upstream::Node<'_>) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    make(&upstream::Node {
        programs,
        scratch: dir,
        name: NODE,
        address: &ADDRESS.to_string(),
        kubeconfig: &plane.node_kubeconfig(NODE)?,
        network: containerd::Network::ALONE,
        configuration,
    })
}

/// The kubelet's configuration.
fn configuration(plane: &ControlPlane, dir: &Path, about: About) -> anyhow::Result<String> {
    let text = format!(
        "{}cgroupRoot: /{}\ncontainerLogMaxSize: 64Ki\ncontainerLogMaxFiles: 3\ncontainerLogMonitorInterval: 3s\n\
         imageMinimumGCAge: 1s\n",
        plane.kubelet_configuration()?,
        name_of(dir)?
    );
    Ok(match about {
        About::Anything => text,
        About::Cri => text + "featureGates: { PodAndContainerStatsFromCRI: true }\n",
        // More than the rest is always in use.
        About::FullDisk => text.replace("imagefs.available: 1%", "imagefs.available: 99%"),
    })
}
