//! The machine goes down while pods run: with the real logind on a real message bus, both of this test alone. What is on that
//! bus instead of systemd refuses to shut anything down, and logind calls it off at the end.

#![expect(clippy::disallowed_methods, reason = "the bus and logind are other programs")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use kubelet::node::shutdown::{self, Parts, Period, Places};
use serde_json::json;
use testkit::serial::Test;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use crate::desk::Desk;
use crate::fixture::{LIMIT, Node, on_a_node};

pub(crate) const TESTS: &[Test] = &[("a_shutdown_waits_for_pods_in_order", a_shutdown_waits_for_pods_in_order)];

const LOGIND: &str = "/lib/systemd/systemd-logind";

/// Message bus and logind; they end with it.
struct Lab {
    dir: PathBuf,
    children: Vec<Child>,
}

impl Drop for Lab {
    fn drop(&mut self) {
        for mut child in self.children.drain(..) {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// None if this machine has no logind to test with.
fn start(dir: &Path) -> Option<Lab> {
    if !Path::new(LOGIND).exists() || !Path::new("/usr/bin/dbus-daemon").exists() {
        println!("skipped: needs dbus-daemon and systemd-logind");
        return None;
    }
    let mut lab = Lab { dir: dir.to_owned(), children: Vec::new() };
    std::fs::create_dir_all(dir).unwrap();
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755)).unwrap();
    let allow = "<allow user=\"*\"/><allow own=\"*\"/><allow send_type=\"method_call\"/><allow send_type=\"signal\"/>\
                 <allow send_requested_reply=\"true\" send_type=\"method_return\"/>\
                 <allow send_requested_reply=\"true\" send_type=\"error\"/><allow receive_type=\"method_call\"/>\
                 <allow receive_type=\"method_return\"/><allow receive_type=\"error\"/><allow receive_type=\"signal\"/>";
    let conf = format!(
        "<busconfig><type>system</type><listen>unix:path={}</listen><auth>EXTERNAL</auth>\
         <policy context=\"default\">{allow}</policy></busconfig>",
        lab.bus().display()
    );
    std::fs::write(dir.join("bus.conf"), conf).unwrap();
    let mut bus = Command::new("/usr/bin/dbus-daemon");
    bus.arg("--nofork").arg("--nopidfile").arg(format!("--config-file={}", dir.join("bus.conf").display()));
    lab.children.push(bus.stderr(Stdio::null()).spawn().unwrap());
    lab.when("the bus answers", || std::os::unix::net::UnixStream::connect(lab.bus()).ok());
    crate::systemd::serve(&lab.bus());
    let log = std::fs::File::create(dir.join("logind.log")).unwrap();
    // A mount namespace of its own, where it finds an empty /run and our configuration.
    let script = format!(
        "mount -t tmpfs run /run && mkdir -p /run/systemd/seats /run/systemd/sessions /run/systemd/users \
         /run/systemd/inhibit /run/systemd/machines /run/udev/data /run/systemd/logind.conf.d && \
         mount --bind {} /run/systemd/logind.conf.d && exec {LOGIND}",
        lab.conf().display()
    );
    std::fs::create_dir_all(lab.conf()).unwrap();
    let mut logind = Command::new("unshare");
    logind.args(["--mount", "--propagation", "private", "sh", "-c", &script]);
    logind.env("DBUS_SYSTEM_BUS_ADDRESS", format!("unix:path={}", lab.bus().display()));
    lab.children.push(logind.stderr(log).spawn().unwrap());
    lab.when("logind answers", || lab.logind(&["get-property"], &["InhibitDelayMaxUSec"]));
    Some(lab)
}

impl Lab {
    fn bus(&self) -> PathBuf {
        self.dir.join("bus.sock")
    }

    fn conf(&self) -> PathBuf {
        self.dir.join("logind.conf.d")
    }

    /// Polls: programs of others tell nobody when they are ready.
    fn when<T>(&self, what: &str, mut look: impl FnMut() -> Option<T>) -> T {
        let begun = std::time::Instant::now();
        loop {
            if let Some(found) = look() {
                return found;
            }
            let log = std::fs::read_to_string(self.dir.join("logind.log")).unwrap_or_default();
            assert!(begun.elapsed() < LIMIT, "waited in vain: {what}\n{log}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What logind answers to busctl.
    fn logind(&self, verb: &[&str], arguments: &[&str]) -> Option<String> {
        let mut busctl = Command::new("busctl");
        busctl.arg(format!("--address=unix:path={}", self.bus().display())).args(verb);
        busctl.args(["org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"]);
        let output = busctl.args(arguments).output().unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    }

    fn inhibitors(&self) -> String {
        self.logind(&["call"], &["ListInhibitors"]).unwrap()
    }
}

fn watch_for_it(node: &Node, lab: &Lab) -> (AbortOnDropHandle<()>, watch::Receiver<bool>) {
    let (shutting_down, heard) = watch::channel(false);
    let parts = Parts {
        kubelet: node.kubelet.clone(),
        source: node.desk.clone(),
        node: "n".to_owned(),
        periods: vec![Period { priority: 0, seconds: 20 }, Period { priority: 2_000_000_000, seconds: 20 }],
        places: Places { bus: lab.bus(), conf_dir: lab.conf() },
        shutting_down,
    };
    (AbortOnDropHandle::new(tokio::spawn(shutdown::run(parts))), heard)
}

/// When a pod's container ended, in nanoseconds.
async fn ended_at(node: &Node, name: &str) -> i64 {
    let id = node.containers(name).await.remove(0).id;
    let request = cri::v1::ContainerStatusRequest { container_id: id, verbose: false };
    cri::RuntimeService::container_status(&*node.runtime, request).await.unwrap().status.unwrap().finished_at
}

async fn terminated(desk: &Desk, name: &str) {
    desk.when(&format!("{name} ends"), |desk| desk.phase(name).as_deref() == Some("Failed")).await;
    let status = desk.pod(name).unwrap().status.clone().unwrap();
    assert_eq!(status.reason.as_deref(), Some("Terminated"));
    assert_eq!(status.message.as_deref(), Some("Pod was terminated in response to imminent node shutdown."));
    let conditions = status.conditions.unwrap();
    let disrupted = conditions.iter().find(|condition| condition.type_ == "DisruptionTarget").unwrap();
    assert_eq!((disrupted.status.as_str(), disrupted.reason.as_deref()), ("True", Some("TerminationByKubelet")));
}

fn a_shutdown_waits_for_pods_in_order() {
    on_a_node(async |node| {
        let Some(lab) = start(&node.path("logind")) else { return node };
        let lab = Arc::new(lab);
        let (_task, mut heard) = watch_for_it(&node, &lab);
        let container = json!({ "name": "c", "image": node.image(),
            "command": ["sh", "-c", "trap 'sleep 0.3; exit 0' TERM; echo heeds; while :; do sleep 0.05; done"] });
        for (name, priority) in [("plain", 0), ("critical", 2_000_001_000)] {
            node.want_spec(
                name,
                json!({ "terminationGracePeriodSeconds": 10, "priority": priority,
                "containers": [container] }),
            );
        }
        for name in ["plain", "critical"] {
            node.desk.running(name).await;
            node.said(name, "heeds").await;
        }
        // logind's own limit of 5 s was too short: it has been told ours.
        let here = lab.clone();
        tokio::task::spawn_blocking(move || {
            here.when("the lock", || here.inhibitors().contains("\"kubelet\"").then_some(()))
        })
        .await
        .unwrap();
        assert_eq!(lab.logind(&["get-property"], &["InhibitDelayMaxUSec"]).unwrap().trim(), "t 40000000");
        assert!(!*heard.borrow());
        lab.logind(&["call"], &["PowerOff", "b", "false"]).expect("logind begins");
        tokio::time::timeout(LIMIT, heard.wait_for(|going| *going)).await.expect("we hear of it").unwrap();
        terminated(&node.desk, "critical").await;
        terminated(&node.desk, "plain").await;
        assert!(ended_at(&node, "plain").await < ended_at(&node, "critical").await, "the lowest priority goes first");
        // The lock is given back; logind fails at what comes then, says that it is off, and we delay the next one.
        tokio::time::timeout(LIMIT, heard.wait_for(|going| !*going)).await.expect("it is called off").unwrap();
        let here = lab.clone();
        tokio::task::spawn_blocking(move || {
            here.when("the next lock", || here.inhibitors().contains("\"kubelet\"").then_some(()))
        })
        .await
        .unwrap();
        node
    });
}
