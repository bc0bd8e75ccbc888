//! `conformance crowd`: as many pods as a node is told to take, from an unmodified control plane.
//!
//! ```text
//! Deployment ─► scheduler ─► all Ready ─► one more finds no room ─► kill -9: nobody moves ─► deleted ─► nothing is left
//! ```
//!
//! The daemon starts with the soft limit of open files that systemd gives to services.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use testkit::control_plane::{self, Part};

use super::points::{condition, name};
use super::{Fleet, NODE, SOON, Setting};
use crate::demo::Stage;
use crate::voyage::{keepers_in, leftovers, wait};
use crate::workspace::build_release;

/// How to run it.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// How many pods; a bridge of Linux has no more than 1,023 ports
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u16).range(1..=1000))]
    pods: u16,
    /// Test this program instead of building one
    #[arg(long, value_name = "PROGRAM")]
    orlop: Option<PathBuf>,
}

/// As many as upstream's default lets a node take, for a run of all tests.
const QUICK: usize = 110;
/// The most time for all pods together: a debug build on a machine that does other things.
const LIMIT: Duration = Duration::from_secs(900);
/// `DefaultLimitNOFILESoft` of systemd.
const OPEN_FILES: u64 = 1024;
/// Addresses that are not pods': network, gateway, broadcast, prepared ones, and those that come back late.
const MORE_ADDRESSES: usize = 24;
/// The application's name.
const CROWD: &str = "crowd";

/// The command.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    testkit::host::install(crate::images::TOOLS)?;
    testkit::host::install(&[testkit::registry::TOOL])?;
    let orlop = options.orlop.clone().map_or_else(build_release, |program| Ok(std::path::absolute(program)?))?;
    try_with(&orlop, options.pods.into()).map(drop)
}

/// With so many pods as a node takes by default; how many points there were.
pub(crate) fn quick(orlop: &Path) -> anyhow::Result<usize> {
    try_with(orlop, QUICK)
}

fn try_with(orlop: &Path, count: usize) -> anyhow::Result<usize> {
    let programs = control_plane::build()?;
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(OPEN_FILES), ..before })?;
    let outcome = Crowd::gather(orlop, &programs, count).and_then(Crowd::live);
    setrlimit(Resource::Nofile, before)?;
    outcome
}

/// A node with its pods.
struct Crowd {
    fleet: Fleet,
    count: usize,
    /// What others have left on this machine.
    before: Vec<String>,
}

/// A point: its title and its check.
type Point = (&'static str, fn(&mut Crowd) -> anyhow::Result<String>);

const POINTS: &[Point] = &[
    ("all pods are Ready", Crowd::is_ready),
    ("each has an address of its own, and their Service leads to them", Crowd::is_reached),
    ("one more finds no room", Crowd::is_full),
    ("kill -9 of the daemon is not felt", Crowd::is_unmoved),
    ("all are deleted, and nothing is left", Crowd::leaves),
];

impl Crowd {
    fn gather(orlop: &Path, programs: &Path, count: usize) -> anyhow::Result<Self> {
        let stage = Stage::set_up(orlop, false)?;
        let before = leftovers::find(stage.dir.path())?;
        // As large as operators of such nodes choose it.
        let bits = (count + MORE_ADDRESSES).next_power_of_two().ilog2().max(8);
        let controllers = [
            format!("--node-cidr-mask-size={}", 32 - bits),
            "--kube-api-qps=500".to_owned(),
            "--kube-api-burst=1000".to_owned(),
        ];
        let control = controllers.map(|flag| (Part::ControllerManager, flag)).into();
        let configuration = format!("maxPods: {count}\n");
        let fleet = Fleet::start(stage, programs, Setting { configuration, control, ..Setting::default() })?;
        Ok(Self { fleet, count, before })
    }

    fn live(mut self) -> anyhow::Result<usize> {
        for (number, (title, check)) in (1..).zip(POINTS) {
            let begin = Instant::now();
            match check(&mut self) {
                Ok(note) => println!("ok   {number}. {title} ({:.1} s): {note}", begin.elapsed().as_secs_f64()),
                Err(error) => {
                    println!("FAIL {number}. {title}: {error:#}");
                    self.fleet.report();
                    bail!("point {number} of {} pods on a node failed: {title}", self.count);
                }
            }
        }
        Ok(POINTS.len())
    }

    fn is_ready(&mut self) -> anyhow::Result<String> {
        let node = wait("the node is Ready", SOON, || {
            Ok(self.find(&format!("nodes/{NODE}")).filter(|node| condition(node, "Ready") == Some("True")))
        })?;
        let (takes, wanted) = (&node["status"]["allocatable"]["pods"], self.count.to_string());
        ensure!(takes.as_str() == Some(wanted.as_str()), "it takes {takes} pods");
        let begin = Instant::now();
        self.fleet.apply("crowd.json", &objects(self.count).to_string())?;
        wait("all pods are Ready", LIMIT, || {
            let deployment =
                self.fleet.plane.api().get(&format!("/apis/apps/v1/namespaces/default/deployments/{CROWD}"))?;
            Ok((deployment["status"]["readyReplicas"] == self.count).then_some(()))
        })?;
        let took = begin.elapsed();
        let keepers = keepers_in(self.fleet.stage.dir.path())?;
        ensure!(keepers.len() == self.count, "{} keepers stand beside {} pods", keepers.len(), self.count);
        let pods_limit = open_files_of(keepers[0].as_raw_nonzero())?;
        ensure!(pods_limit == OPEN_FILES, "pods may open {pods_limit} files");
        let own_limit = open_files_of(self.fleet.node.id())?;
        ensure!(own_limit > OPEN_FILES, "the daemon may open {own_limit} files");
        let Use { memory_mb, descriptors, threads } = Use::of(self.fleet.node.id())?;
        Ok(format!(
            "{} pods in {:.1} s; the daemon has {memory_mb} MB, {descriptors} descriptors, {threads} threads",
            self.count,
            took.as_secs_f64()
        ))
    }

    fn is_reached(&mut self) -> anyhow::Result<String> {
        let pods = self.fleet.pods(CROWD)?;
        let mut addresses: Vec<&str> = pods.iter().filter_map(|pod| pod["status"]["podIP"].as_str()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        ensure!(addresses.len() == self.count, "{} addresses for {} pods", addresses.len(), self.count);
        // The Deployment may know of a pod before the Service does.
        wait("all pods are endpoints", SOON, || Ok((self.ready_endpoints()? == self.count).then_some(())))
            .with_context(|| format!("{:?} are ready", self.ready_endpoints()))?;
        let first = name(&pods[0]).to_owned();
        // Before the rules are written nobody answers; from then on each does.
        let script = "for i in $(seq 20); do wget -q -O - http://$CROWD_SERVICE_HOST/name || exit 1; done";
        let answers = wait("the Service leads to pods", SOON, || {
            Ok(self.fleet.kubectl_words(&["exec", &first, "--", "sh", "-c", script]).ok())
        })?;
        let mut who: Vec<&str> = answers.lines().collect();
        ensure!(who.len() == 20 && who.iter().all(|one| pods.iter().any(|pod| name(pod) == *one)), "answers: {who:?}");
        who.sort_unstable();
        who.dedup();
        ensure!(who.len() > 1, "all of 20 requests came to one pod of {}", self.count);
        Ok(format!("{} endpoints, {} of them answered 20 requests", self.count, who.len()))
    }

    fn ready_endpoints(&self) -> anyhow::Result<usize> {
        let slices = self.fleet.get(&format!("endpointslices -l kubernetes.io/service-name={CROWD}"))?;
        let slices = slices["items"].as_array().into_iter().flatten();
        let endpoints = slices.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
        Ok(endpoints.filter(|endpoint| endpoint["conditions"]["ready"] == true).count())
    }

    fn is_full(&mut self) -> anyhow::Result<String> {
        let mut late = pod_template();
        late["apiVersion"] = json!("v1");
        late["kind"] = json!("Pod");
        late["metadata"] = json!({ "name": "late" });
        late["spec"]["nodeName"] = json!(NODE);
        self.fleet.apply("late.json", &late.to_string())?;
        let late = wait("it is rejected", SOON, || {
            Ok(self.find("namespaces/default/pods/late").filter(|pod| pod["status"]["phase"] == "Failed"))
        })?;
        ensure!(late["status"]["reason"] == "OutOfpods", "it was rejected for {}", late["status"]["reason"]);
        self.fleet.kubectl("delete pod late --wait=true")?;
        Ok("OutOfpods".to_owned())
    }

    fn is_unmoved(&mut self) -> anyhow::Result<String> {
        let before = self.seen()?;
        let lease = |fleet: &Fleet| -> anyhow::Result<Value> {
            Ok(fleet.get(&format!("lease {NODE} -n kube-node-lease"))?["spec"]["renewTime"].clone())
        };
        self.fleet.node.kill()?;
        self.fleet.node.wait()?;
        let renewed = lease(&self.fleet)?;
        let begin = Instant::now();
        self.fleet.start_again()?;
        wait("the new daemon answers", SOON, || self.fleet.orlop(&["ps"]).map(Some))?;
        let took = begin.elapsed();
        wait("it renews the lease", SOON, || Ok((lease(&self.fleet)? != renewed).then_some(())))?;
        // Each pod has to be known to it again before one can be run in.
        let pods = self.fleet.pods(CROWD)?;
        let last = name(pods.last().context("a pod")?).to_owned();
        wait("it reaches into a pod", SOON, || Ok(self.fleet.kubectl(&format!("exec {last} -- true")).ok()))?;
        let after = self.seen()?;
        let moved: Vec<_> = before.iter().zip(&after).filter(|(before, after)| before != after).take(3).collect();
        ensure!(before.len() == after.len() && moved.is_empty(), "it was felt: {moved:?}");
        Ok(format!("{} pods are as they were; it answers after {:.1} s", self.count, took.as_secs_f64()))
    }

    /// Of each pod what may not change, and the node itself.
    fn seen(&self) -> anyhow::Result<Vec<Value>> {
        let since = |object: &Value| {
            let conditions = object["status"]["conditions"].as_array()?;
            let ready = conditions.iter().find(|one| one["type"] == "Ready")?;
            Some(json!([ready["status"], ready["lastTransitionTime"]]))
        };
        let look = |pod: &Value| {
            let container = &pod["status"]["containerStatuses"][0];
            json!([
                name(pod),
                pod["metadata"]["uid"],
                pod["status"]["podIP"],
                container["containerID"],
                container["restartCount"],
                since(pod)
            ])
        };
        let mut seen: Vec<Value> = self.fleet.pods(CROWD)?.iter().map(look).collect();
        seen.sort_by_key(ToString::to_string);
        seen.push(json!(since(&self.fleet.get(&format!("node {NODE}"))?)));
        Ok(seen)
    }

    fn leaves(&mut self) -> anyhow::Result<String> {
        let begin = Instant::now();
        self.fleet.kubectl("delete deployment,service,configmap crowd --wait=false")?;
        wait("all pods are gone", LIMIT, || {
            let pods = self.fleet.plane.api().get("/api/v1/pods?limit=1")?;
            Ok(pods["items"].as_array().is_some_and(Vec::is_empty).then_some(()))
        })?;
        let took = begin.elapsed();
        let left = self.fleet.orlop(&["fsck"])?;
        ensure!(left.is_empty(), "fsck: {left}");
        let Use { memory_mb, descriptors, threads } = Use::of(self.fleet.node.id())?;
        self.fleet.stop_node()?;
        let dir = self.fleet.stage.dir.path();
        // The kernel frees what a process has held a moment after it has ended.
        let left = || -> anyhow::Result<Vec<String>> {
            let mut left = leftovers::since(&self.before, dir)?;
            left.retain(|line| is_of_pods(line));
            Ok(left)
        };
        let gone = wait("what the daemon held is gone", SOON, || Ok(left()?.is_empty().then_some(())));
        gone.with_context(|| format!("left behind:\n  {}", left().unwrap_or_default().join("\n  ")))?;
        Ok(format!(
            "gone in {:.1} s; the daemon ended with {memory_mb} MB, {descriptors} descriptors, {threads} threads",
            took.as_secs_f64()
        ))
    }

    fn find(&self, path: &str) -> Option<Value> {
        self.fleet.plane.api().get(&format!("/api/v1/{path}")).ok()
    }
}

/// The node's own stay for its next daemon: the bridge, tables of rules, groups of classes, and files of the control plane.
fn is_of_pods(line: &str) -> bool {
    let is_link = line.starts_with("interface ") && line.contains("veth");
    let is_group = line.starts_with("cgroup ") && line.contains("/pod");
    let is_process = line.starts_with("process ") && line.contains("orlop");
    is_link || is_group || is_process || line.starts_with("mount ") || line.contains("/kubelet/pods/")
}

/// The soft limit of a process.
fn open_files_of(pid: impl std::fmt::Display) -> anyhow::Result<u64> {
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).context("a limit of open files")?;
    Ok(line.split_whitespace().next().context("a soft limit")?.parse()?)
}

/// What a process uses.
struct Use {
    memory_mb: u64,
    descriptors: usize,
    threads: u64,
}

impl Use {
    fn of(pid: u32) -> anyhow::Result<Self> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let status = std::fs::read_to_string(process.join("status")).context("the daemon has ended")?;
        let number = |field: &str| -> anyhow::Result<u64> {
            let line =
                status.lines().find_map(|line| line.strip_prefix(field)).with_context(|| format!("no {field}"))?;
            Ok(line.split_whitespace().next().context("a number")?.parse()?)
        };
        let descriptors = process.join("fd").read_dir()?.count();
        Ok(Self { memory_mb: number("VmRSS:")? >> 10, descriptors, threads: number("Threads:")? })
    }
}

/// A Deployment behind a Service, with a ConfigMap that all of its pods have.
fn objects(count: usize) -> Value {
    let labels = json!({ "app": CROWD });
    let of = |version: &str, kind: &str| json!({ "apiVersion": version, "kind": kind, "metadata": { "name": CROWD } });
    let (mut words, mut service, mut deployment) =
        (of("v1", "ConfigMap"), of("v1", "Service"), of("apps/v1", "Deployment"));
    words["data"] = json!({ "word": "ahoy" });
    service["spec"] = json!({ "selector": labels, "ports": [{ "port": 80, "targetPort": 8080 }] });
    let mut template = pod_template();
    template["metadata"] = json!({ "labels": labels });
    deployment["spec"] = json!({ "replicas": count, "selector": { "matchLabels": labels }, "template": template });
    json!({ "apiVersion": "v1", "kind": "List", "items": [words, service, deployment] })
}

/// A pod that serves its own name and is Ready when it does.
fn pod_template() -> Value {
    let script = "mkdir /w && hostname > /w/name && trap exit TERM && { httpd -f -p 8080 -h /w & wait; }";
    json!({ "spec": {
        "terminationGracePeriodSeconds": 5,
        "containers": [{
            "name": "c", "image": "busybox", "imagePullPolicy": "IfNotPresent", "command": ["sh", "-c", script],
            "readinessProbe": { "httpGet": { "path": "/name", "port": 8080 } },
            "resources": { "requests": { "cpu": "1m", "memory": "1Mi" } },
            "volumeMounts": [{ "name": "words", "mountPath": "/words" }],
        }],
        "volumes": [{ "name": "words", "configMap": { "name": CROWD } }],
    } })
}
