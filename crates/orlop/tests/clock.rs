//! A whole node under a clock that is set: forward, as when a machine without a battery hears of the time, and back.
//!
//! Needs a machine of its own, since there is one clock for all.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::disallowed_methods, reason = "a test program")]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};
use serde_json::{Value, json};
use testkit::image::Builder;

const DAY_S: i64 = 86_400;

/// A wait that the clock has made too long is looked at again within a minute; the rest is for a machine that is slow.
const SOON: Duration = Duration::from_secs(120);

/// One pod that is well and says so each second, which can be told not to, and one that always ends.
const PODS: &str = "\
apiVersion: v1
kind: Pod
metadata: { name: steady }
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - name: c
    image: busybox
    imagePullPolicy: Never
    command: [sh, -c, 'while :; do date; sleep 1; done']
    readinessProbe: { exec: { command: [test, '!', -e, /tmp/unready] }, periodSeconds: 1, timeoutSeconds: 30, failureThreshold: 1 }
    livenessProbe: { exec: { command: [test, '!', -e, /tmp/dead] }, periodSeconds: 1, timeoutSeconds: 30, failureThreshold: 1 }
---
apiVersion: v1
kind: Pod
metadata: { name: failing }
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - { name: c, image: busybox, imagePullPolicy: Never, command: [sh, -c, 'exit 3'] }
";

const ANOTHER: &str = "\
apiVersion: v1
kind: Pod
metadata: { name: another }
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - { name: c, image: busybox, imagePullPolicy: Never, command: [sleep, infinity] }
";

fn main() -> ExitCode {
    let missing = (!testkit::host::is_own_machine()).then(|| "a machine whose clock nobody else goes by".to_owned());
    testkit::serial::main(&[("a_node_goes_on_when_the_clock_is_set", clock_is_set)], missing)
}

/// A node that runs, and everything that it writes.
struct Node {
    scratch: tempfile::TempDir,
    up: Child,
}

impl Node {
    fn start() -> Self {
        let scratch = tempfile::tempdir_in("/run").unwrap();
        std::fs::create_dir(scratch.path().join("manifests")).unwrap();
        let up = up(scratch.path());
        Self { scratch, up }
    }

    fn manifest(&self, name: &str) -> PathBuf {
        self.scratch.path().join("manifests").join(name)
    }

    fn try_orlop(&self, arguments: &[&str]) -> Result<String, String> {
        let output = orlop(self.scratch.path()).args(arguments).stdin(Stdio::null()).output().unwrap();
        match output.status.success() {
            true => Ok(String::from_utf8(output.stdout).unwrap()),
            false => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        }
    }

    fn orlop(&self, arguments: &[&str]) -> String {
        self.try_orlop(arguments).unwrap_or_else(|error| panic!("orlop {}: {error}", arguments.join(" ")))
    }

    /// The status of a pod; null while there is none.
    fn status(&self, pod: &str) -> Value {
        let Ok(text) = self.try_orlop(&["get", "pods", pod, "-o", "json"]) else { return Value::Null };
        serde_json::from_str::<Value>(&text).unwrap()[0]["status"].clone()
    }

    fn restarts(&self, pod: &str) -> u64 {
        self.status(pod)["containerStatuses"][0]["restartCount"].as_u64().unwrap_or_default()
    }

    fn is_ready(&self, pod: &str) -> bool {
        self.status(pod)["containerStatuses"][0]["ready"] == true
    }

    /// How long it took until it was so.
    fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) -> Duration {
        let begun = Instant::now();
        while !holds(self) {
            if begun.elapsed() > SOON {
                println!("{}", self.try_orlop(&["ps", "-A"]).unwrap_or_else(|error| error));
                println!("{}", self.try_orlop(&["events", "-A"]).unwrap_or_else(|error| error));
                println!("{}", std::fs::read_to_string(self.scratch.path().join("log")).unwrap_or_default());
                panic!("{what}: not within {} s", SOON.as_secs());
            }
            std::thread::sleep(Duration::from_millis(200)); // observed from outside, as an operator would
        }
        begun.elapsed()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if self.up.try_wait().is_ok_and(|ended| ended.is_none()) {
            let _ = self.try_orlop(&["down"]);
            let _ = self.up.wait();
        }
    }
}

/// The node's program; on another machine than the one it was built on, the one in the PATH.
fn orlop(scratch: &Path) -> Command {
    let built = PathBuf::from(env!("CARGO_BIN_EXE_orlop"));
    let program = if built.exists() { built } else { testkit::host::find("orlop").unwrap() };
    let mut command = Command::new(program);
    command.env("ORLOP_STATE_DIR", scratch.join("state")).env("ORLOP_RUN_DIR", scratch.join("run"));
    command
}

fn up(scratch: &Path) -> Child {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(scratch.join("log")).unwrap();
    let mut command = orlop(scratch);
    command.arg("up").arg(scratch.join("manifests")).args(["--log-level", "info"]);
    command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap()
}

fn set_clock(by_s: i64) {
    let now = clock_gettime(ClockId::Realtime);
    clock_settime(ClockId::Realtime, Timespec { tv_sec: now.tv_sec + by_s, ..now }).unwrap();
}

fn clock_is_set() {
    let mut node = Node::start();
    let image = tempfile::tempdir().unwrap();
    let mut builder = Builder::new(image.path()).unwrap();
    testkit::image::busybox_layer(&mut builder).unwrap();
    builder.tag("docker.io/library/busybox:latest", json!({ "Env": ["PATH=/bin"] })).unwrap();
    let layout = builder.close().unwrap();
    node.until("the node answers", |node| node.try_orlop(&["ps"]).is_ok());
    node.orlop(&["load", &layout.dir().display().to_string()]);
    std::fs::write(node.manifest("pods.yaml"), PODS).unwrap();
    node.until("the steady pod is Ready", |node| node.is_ready("steady"));
    let mut deaths = 0;
    for by_s in [DAY_S, -DAY_S, -DAY_S] {
        node.until("the other waits to be restarted", |node| is_waiting(node) && node.restarts("failing") > 0);
        let restarts = node.restarts("failing");
        let lines = node.orlop(&["logs", "steady"]).lines().count();
        println!("the clock is set by {by_s} s");
        set_clock(by_s);
        let waited = node.until("the failing pod is restarted", |node| node.restarts("failing") > restarts);
        println!("  restarted after {:.0} s", waited.as_secs_f64());
        probes_go_on(&node);
        deaths += 1;
        node.until("the steady pod died once, when it was told to", |node| {
            node.restarts("steady") == deaths && node.is_ready("steady")
        });
        let logged = node.orlop(&["logs", "steady", "--previous"]).lines().count();
        assert!(logged > lines, "{logged} lines after {lines}");
        pods_come_and_go(&node);
    }
    // The next daemon finds containers that were started later than now.
    node.until("the other waits to be restarted", is_waiting);
    let restarts = node.restarts("failing");
    set_clock(-DAY_S);
    kill_process(Pid::from_raw(node.up.id().cast_signed()).unwrap(), Signal::KILL).unwrap();
    node.up.wait().unwrap();
    node.up = up(node.scratch.path());
    node.until("the next daemon has the pod", |node| node.is_ready("steady"));
    assert_eq!(node.restarts("steady"), deaths, "a restart of the daemon was felt");
    node.until("the failing pod is restarted", |node| node.restarts("failing") > restarts);
    probes_go_on(&node);
    kill_process(Pid::from_raw(node.up.id().cast_signed()).unwrap(), Signal::INT).unwrap();
    assert!(node.up.wait().unwrap().success());
    assert_eq!(node.orlop(&["fsck"]), "", "something is left");
}

fn is_waiting(node: &Node) -> bool {
    node.status("failing")["containerStatuses"][0]["state"]["waiting"]["reason"] == "CrashLoopBackOff"
}

/// The pod is not Ready when it does not want to be, and ends when it is ill.
fn probes_go_on(node: &Node) {
    node.orlop(&["exec", "steady", "--", "touch", "/tmp/unready"]);
    node.until("the pod is not Ready", |node| !node.is_ready("steady"));
    node.orlop(&["exec", "steady", "--", "rm", "/tmp/unready"]);
    node.until("the pod is Ready again", |node| node.is_ready("steady"));
    let restarts = node.restarts("steady");
    node.orlop(&["exec", "steady", "--", "touch", "/tmp/dead"]);
    node.until("the pod is restarted", |node| node.restarts("steady") > restarts);
}

fn pods_come_and_go(node: &Node) {
    std::fs::write(node.manifest("another.yaml"), ANOTHER).unwrap();
    node.until("another pod is Ready", |node| node.is_ready("another"));
    std::fs::remove_file(node.manifest("another.yaml")).unwrap();
    node.until("another pod is gone", |node| node.status("another").is_null());
}
