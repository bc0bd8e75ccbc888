//! A daemon that dies, and the next one.
//!
//! The first daemon is this program again: it makes pods, says on its standard output what it sees, and is killed.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use cri::v1::{ContainerState, PodSandboxState};
use cri::{RuntimeService as _, v1};
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use testkit::serial::Test;

use crate::fixture::{Ground, Node, Places, Pod, on_a_node, run, script_config, zygote};
use crate::handlers;

pub(crate) const TESTS: &[Test] = &[
    ("pods_outlive_a_killed_daemon", pods_outlive_a_killed_daemon),
    ("pods_of_other_runtimes_outlive_a_killed_daemon", pods_of_other_runtimes_outlive_a_killed_daemon),
    ("a_killed_daemon_leaves_nothing_half_made", a_killed_daemon_leaves_nothing_half_made),
    ("who_was_asked_to_end_is_not_asked_again", who_was_asked_to_end_is_not_asked_again),
    ("a_parent_is_found_where_its_pod_began", a_parent_is_found_where_its_pod_began),
    ("a_killed_keeper_is_told", a_killed_keeper_is_told),
    ("a_keeper_killed_before_its_sandbox_is_ready_is_told", a_keeper_killed_before_its_sandbox_is_ready_is_told),
    ("what_died_with_the_daemon_away_is_told", what_died_with_the_daemon_away_is_told),
    ("a_keeper_that_does_not_answer_costs_its_own_pod_only", a_keeper_that_does_not_answer_costs_its_own_pod_only),
    ("another_boot_leaves_only_garbage", another_boot_leaves_only_garbage),
    ("who_logs_goes_on_while_the_daemon_is_stopped", who_logs_goes_on_while_the_daemon_is_stopped),
];

/// The environment variable that makes this program a daemon.
const ORDER: &str = "RUNTIME_TEST_DAEMON";

#[derive(Serialize, Deserialize)]
struct Order {
    scene: Scene,
    state: PathBuf,
    run: PathBuf,
    logs: PathBuf,
    group: String,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
enum Scene {
    /// One pod of each kind, then silence.
    OfEachKind,
    /// Pods without end, several at once, each named when it runs.
    WithoutEnd,
    /// A pod of each other OCI runtime, then silence.
    OfEachRuntime,
    /// Pods that say more than fits into a pipe as soon as they are allowed to.
    Loud,
    /// A pod that takes its time to end, and was asked to.
    Asked,
}

/// Where this program was started as a daemon, it is one until it is killed.
pub(crate) fn maybe_be_a_daemon() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let Order { scene, state, run: run_dir, logs, group } = serde_json::from_str(&order).unwrap();
    let places = Places { state, run: run_dir, logs, group };
    let zygote = zygote();
    run(async {
        let node = match scene {
            Scene::OfEachRuntime => handlers::start(&places, zygote).await,
            Scene::OfEachKind | Scene::WithoutEnd | Scene::Loud | Scene::Asked => Node::start(&places, zygote).await,
        };
        match scene {
            Scene::OfEachRuntime => of_each_runtime(&node).await,
            Scene::OfEachKind => of_each_kind(&node).await,
            Scene::WithoutEnd => without_end(&node).await,
            Scene::Loud => loud(&node).await,
            Scene::Asked => asked(&node).await,
        }
    });
    unreachable!("it is killed");
}

/// A daemon that runs until it is killed.
struct Daemon {
    process: Child,
    lines: BufReader<std::process::ChildStdout>,
}

impl Daemon {
    #[allow(clippy::disallowed_methods, reason = "a test program starts itself")]
    fn start(scene: Scene, places: &Places) -> Self {
        let Places { state, run, logs, group } = places.clone();
        let order = serde_json::to_string(&Order { scene, state, run, logs, group }).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        let mut process = command.env(ORDER, order).stdout(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap());
        Self { process, lines }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        assert!(!line.is_empty(), "the daemon has ended");
        line.trim().to_owned()
    }

    fn kill(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }
}

/// What the first daemon saw last, by the name of the pod.
#[derive(Serialize, Deserialize)]
struct Seen {
    sandbox: String,
    container: String,
    pid: Option<u32>,
    sandbox_status: String,
    container_status: String,
}

async fn see(node: &Node, pod: &Pod) -> Seen {
    let request = v1::ContainerStatusRequest { container_id: pod.container.clone(), verbose: true };
    let response = node.runtime.container_status(request).await.unwrap();
    let info: serde_json::Value = serde_json::from_str(&response.info["info"]).unwrap();
    Seen {
        sandbox: pod.sandbox.clone(),
        container: pod.container.clone(),
        pid: info["pid"].as_u64().map(|pid| u32::try_from(pid).unwrap()),
        sandbox_status: format!("{:?}", node.sandbox_status(&pod.sandbox).await),
        container_status: format!("{:?}", response.status.unwrap()),
    }
}

async fn of_each_kind(node: &Node) {
    let mut pods = BTreeMap::new();
    pods.insert("stays", node.pod("stays", "i=0; while :; do echo $i; i=$((i+1)); usleep 500; done").await);
    let ends = node.places.run.join("ends");
    std::fs::create_dir_all(&ends).unwrap();
    pods.insert("ends", mounting_pod(node, "ends", &ends).await);
    let ended = node.pod("ended", "exit 5").await;
    node.exited(&ended.container).await;
    pods.insert("ended", ended);
    let config = node.sandbox_config("created");
    let sandbox = node.run_sandbox(&config).await.unwrap();
    let container = node.create(&sandbox, &config, script_config("main", "echo late; exit 4")).await.unwrap();
    pods.insert("created", Pod { config, sandbox, container });
    let stopped = node.pod("stopped", "sleep 1000").await;
    node.stop_sandbox(&stopped.sandbox).await.unwrap();
    pods.insert("stopped", stopped);
    let mut seen = BTreeMap::new();
    for (name, pod) in &pods {
        seen.insert(*name, see(node, pod).await);
    }
    let exec = node.exec(&pods["stays"].container, &["sh", "-c", "echo $$ > /exec; sleep 4242"], 0);
    let shown = async {
        let written = ["sh", "-c", "while ! test -s /exec; do usleep 1000; done"];
        node.exec(&pods["stays"].container, &written, 0).await.unwrap();
        println!("{}", serde_json::to_string(&seen).unwrap());
    };
    let _ = tokio::join!(exec, shown);
}

async fn of_each_runtime(node: &Node) {
    for name in handlers::usable() {
        let pod = handlers::pod(node, name, "i=0; while :; do echo $i; i=$((i+1)); usleep 500; done").await;
        println!("{} {}", pod.sandbox, pod.container);
    }
    std::future::pending::<()>().await;
}

/// The containers of other runtimes are the keeper's, as its own are; the next daemon knows their runtime from the record.
fn pods_of_other_runtimes_outlive_a_killed_daemon() {
    let ground = Ground::new();
    let mut daemon = Daemon::start(Scene::OfEachRuntime, &ground.places);
    let pods: Vec<(&str, String, String)> = handlers::usable()
        .into_iter()
        .map(|name| {
            let line = daemon.line();
            let (sandbox, container) = line.split_once(' ').unwrap();
            (name, sandbox.to_owned(), container.to_owned())
        })
        .collect();
    daemon.kill();
    let zygote = zygote();
    run(async {
        // It has none of the handlers configured.
        let node = Node::start(&ground.places, zygote).await;
        for (name, sandbox, container) in &pods {
            assert_eq!(node.sandbox_status(sandbox).await.runtime_handler, *name);
            assert_eq!(node.status(container).await.state(), ContainerState::ContainerRunning, "{name}");
            assert_eq!(node.exec(container, &["echo", "here"], 0).await.unwrap().stdout, b"here\n", "{name}");
            node.stop_container(container, 0).await.unwrap();
            assert_eq!(node.status(container).await.exit_code, 137, "{name}");
            for (number, line) in node.log(name).iter().enumerate() {
                assert_eq!(*line, format!("stdout F {number}"), "{name}: a line is lost or doubled");
            }
        }
        node.down().await;
    });
}

/// A pod that ends with 7 as soon as there is a file called `go` in its directory.
async fn mounting_pod(node: &Node, name: &str, directory: &Path) -> Pod {
    pod_that_waits(node, name, directory, "echo went; exit 7").await
}

/// A pod that says that it is up, and goes on as soon as there is a file called `go` in its directory.
async fn pod_that_waits(node: &Node, name: &str, directory: &Path, then: &str) -> Pod {
    let config = node.sandbox_config(name);
    let sandbox = node.run_sandbox(&config).await.unwrap();
    let script = format!("echo up; while ! test -e /shared/go; do usleep 5000; done; {then}");
    let mut request = script_config("main", &script);
    request.mounts.push(v1::Mount {
        container_path: "/shared".to_owned(),
        host_path: directory.to_string_lossy().into_owned(),
        ..Default::default()
    });
    let container = node.create(&sandbox, &config, request).await.unwrap();
    node.start_container(&container).await.unwrap();
    Pod { config, sandbox, container }
}

async fn asked(node: &Node) {
    let shared = node.places.run.join("asked");
    std::fs::create_dir_all(&shared).unwrap();
    let until_end = "while ! test -e /shared/end; do usleep 5000; done";
    let script = format!("trap 'echo asked' TERM; : > /shared/heeds; {until_end}");
    let pod = pod_that_waits(node, "asked", &shared, &script).await;
    std::fs::write(shared.join("go"), "").unwrap();
    let heeds = ["sh", "-c", "while ! test -e /shared/heeds; do usleep 5000; done"];
    node.exec(&pod.container, &heeds, 0).await.unwrap();
    println!("{} {}", pod.sandbox, pod.container);
    node.stop_container(&pod.container, 1000).await.unwrap();
}

/// An application may take a second signal for impatience, as many that are written in Go do.
fn who_was_asked_to_end_is_not_asked_again() {
    let ground = Ground::new();
    let mut daemon = Daemon::start(Scene::Asked, &ground.places);
    let line = daemon.line();
    let (sandbox, container) = line.split_once(' ').unwrap();
    // A container's record ends with that it was asked: field 14, true.
    let record = ground.places.run.join("sandboxes").join(sandbox).join("containers").join(container);
    while !std::fs::read(&record).unwrap().ends_with(&[14 << 3, 1]) {
        std::thread::yield_now();
    }
    daemon.kill();
    let zygote = zygote();
    run(async {
        let node = Node::start(&ground.places, zygote).await;
        let stopped = node.stop_container(container, 1000);
        let ended = async {
            // What the stop had to say to the container was said before this.
            node.exec(container, &["true"], 0).await.unwrap();
            assert_eq!(node.status(container).await.state(), ContainerState::ContainerRunning);
            std::fs::write(ground.places.run.join("asked/end"), "").unwrap();
        };
        tokio::join!(stopped, ended).0.unwrap();
        assert_eq!(node.status(container).await.exit_code, 0);
        assert_eq!(node.log("asked"), ["stdout F up", "stdout F asked"]);
        node.down().await;
    });
}

/// How many lines each of them says; a pipe holds some ten thousand.
const LOUD: usize = 60_000;

async fn loud(node: &Node) {
    let shared = node.places.run.join("loud");
    std::fs::create_dir_all(&shared).unwrap();
    let mut seen = BTreeMap::new();
    for name in ["one", "two", "three"] {
        let pod = pod_that_waits(node, name, &shared, &format!("seq {LOUD}; exit 7")).await;
        seen.insert(name, see(node, &pod).await);
    }
    println!("{}", serde_json::to_string(&seen).unwrap());
    std::future::pending::<()>().await;
}

/// The keeper writes what they say, so none of them waits for the daemon.
fn who_logs_goes_on_while_the_daemon_is_stopped() {
    let ground = Ground::new();
    let mut daemon = Daemon::start(Scene::Loud, &ground.places);
    let seen: BTreeMap<String, Seen> = serde_json::from_str(&daemon.line()).unwrap();
    let process = open(daemon.process.id());
    sys::process::send_signal(process.as_fd(), signal::STOP).unwrap();
    let loud: Vec<OwnedFd> = seen.values().map(|one| open(one.pid.unwrap())).collect();
    std::fs::write(ground.places.run.join("loud/go"), "").unwrap();
    loud.iter().for_each(wait_for_end);
    daemon.kill();
    let zygote = zygote();
    run(async {
        let node = Node::start(&ground.places, zygote).await;
        for (name, seen) in &seen {
            assert_eq!(node.exited(&seen.container).await.exit_code, 7);
            let said: Vec<String> =
                ["up".to_owned()].into_iter().chain((1..=LOUD).map(|line| line.to_string())).collect();
            let said: Vec<String> = said.iter().map(|line| format!("stdout F {line}")).collect();
            assert!(node.log(name) == said, "{name} has lost or doubled something");
        }
        node.down().await;
    });
}

fn pods_outlive_a_killed_daemon() {
    let ground = Ground::new();
    let mut daemon = Daemon::start(Scene::OfEachKind, &ground.places);
    let seen: BTreeMap<String, Seen> = serde_json::from_str(&daemon.line()).unwrap();
    daemon.kill();
    let process = open(seen["ends"].pid.unwrap());
    std::fs::write(ground.places.run.join("ends/go"), "").unwrap();
    wait_for_end(&process);
    let zygote = zygote();
    run(async {
        let node = Node::start(&ground.places, zygote).await;
        for name in ["stays", "ended", "created", "stopped"] {
            let seen = &seen[name];
            let sandbox = node.sandbox_status(&seen.sandbox).await;
            assert_eq!(format!("{:?}", sandbox), seen.sandbox_status, "{name}");
            assert_eq!(format!("{:?}", node.status(&seen.container).await), seen.container_status, "{name}");
        }
        let status = node.exited(&seen["ends"].container).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (7, "Error"));
        assert_eq!(node.log("ends"), ["stdout F up", "stdout F went"]);
        no_exec_is_left(&node, &seen["stays"].container).await;
        node.start_container(&seen["created"].container).await.unwrap();
        assert_eq!(node.exited(&seen["created"].container).await.exit_code, 4);
        assert_eq!(node.log("created"), ["stdout F late"]);
        counts_without_a_gap(&node, &seen["stays"].container).await;
        let new = node.pod("new", "true").await;
        let (old, new) = (node.sandbox_status(&seen["stays"].sandbox).await, node.sandbox_status(&new.sandbox).await);
        assert_ne!(old.network, new.network);
        node.down().await;
    });
}

/// The first daemon's exec session has nobody left who would read it.
async fn no_exec_is_left(node: &Node, container: &str) {
    let gone = ["sh", "-c", "while kill -0 $(cat /exec); do usleep 1000; done 2>/dev/null"];
    assert_eq!(node.exec(container, &gone, 20).await.unwrap().exit_code, 0);
}

async fn counts_without_a_gap(node: &Node, container: &str) {
    node.stop_container(container, 0).await.unwrap();
    let log = node.log("stays");
    assert!(log.len() > 10, "{log:?}");
    for (number, line) in log.iter().enumerate() {
        assert_eq!(*line, format!("stdout F {number}"), "a line is lost or doubled");
    }
}

fn open(pid: u32) -> OwnedFd {
    let pid = sys::rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    sys::process::pidfd_open(pid).unwrap()
}

fn wait_for_end(process: &OwnedFd) {
    let mut polled = [sys::rustix::event::PollFd::new(process, sys::rustix::event::PollFlags::IN)];
    sys::rustix::event::poll(&mut polled, None).unwrap();
}

async fn without_end(node: &Node) {
    let pods = |worker: usize| async move {
        for number in 0.. {
            let name = format!("pod-{worker}-{number}");
            let pod = node.pod(&name, "sleep 1000").await;
            println!("{name}");
            if number % 2 == 1 {
                node.remove_sandbox(&pod.sandbox).await.unwrap();
            }
        }
    };
    join_all((0..3).map(pods)).await;
}

fn a_killed_daemon_leaves_nothing_half_made() {
    for pods in [1, 4, 9, 14] {
        let ground = Ground::new();
        let mut daemon = Daemon::start(Scene::WithoutEnd, &ground.places);
        let made: Vec<String> = (0..pods).map(|_| daemon.line()).collect();
        daemon.kill();
        let zygote = zygote();
        run(async {
            let node = Node::start(&ground.places, zygote).await;
            let sandboxes = node.runtime.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap().items;
            for name in made.iter().filter(|name| name.ends_with(['0', '2', '4', '6', '8'])) {
                let sandbox = sandboxes.iter().find(|one| one.metadata.as_ref().unwrap().name == *name).unwrap();
                assert_eq!(sandbox.state(), PodSandboxState::SandboxReady);
            }
            node.down().await;
        });
    }
}

/// The process id of a pod's keeper.
pub(crate) async fn keeper_of(node: &Node, sandbox: &str) -> u32 {
    let request = v1::PodSandboxStatusRequest { pod_sandbox_id: sandbox.to_owned(), verbose: true };
    let info = node.runtime.pod_sandbox_status(request).await.unwrap().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    u32::try_from(info["pid"].as_u64().unwrap()).unwrap()
}

/// A kubelet of somebody else names control groups from their tops, ours from where it is itself.
fn a_parent_is_found_where_its_pod_began() {
    let ground = Ground::new();
    let (first, second) = (zygote(), zygote());
    let parent = format!("/{}-top/pod1", ground.places.group);
    let top = sys::cgroup::Hierarchy::whole(Path::new("/sys/fs/cgroup")).unwrap();
    let pod = run(async {
        let network = network::Config::new(ground.places.run.join("network"));
        let node = Node::start_with(network, &ground.places, first, |config| config.parents_from_top = true).await;
        let mut config = node.sandbox_config("guest");
        config.linux.get_or_insert_default().cgroup_parent.clone_from(&parent);
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let container = node.create(&sandbox, &config, script_config("main", "sleep 1000")).await.unwrap();
        node.start_container(&container).await.unwrap();
        node.runtime.stop().await;
        Pod { config, sandbox, container }
    });
    let group = top.group(&parent).child(&pod.container);
    assert_eq!(group.processes().len(), 1, "in every hierarchy: {:?}", group.directories());
    assert!(group.directories().iter().all(|directory| directory.is_dir()));
    run(async {
        let next = Node::start(&ground.places, second).await;
        assert_eq!(next.status(&pod.container).await.state(), ContainerState::ContainerRunning);
        next.stop_sandbox(&pod.sandbox).await.unwrap();
        next.remove_sandbox(&pod.sandbox).await.unwrap();
        next.down().await;
    });
    assert!(!group.exists());
    [parent, format!("/{}-top", ground.places.group)].iter().for_each(|path| top.group(path).delete().unwrap());
}

fn a_killed_keeper_is_told() {
    on_a_node(|node| async {
        let pod = node.pod("orphan", "setsid sleep 1000 & sleep 1000").await;
        let keeper = open(keeper_of(&node, &pod.sandbox).await);
        sys::process::send_signal(keeper.as_fd(), 9).unwrap();
        assert_unseen(&node.exited(&pod.container).await);
        assert_eq!(node.sandbox_status(&pod.sandbox).await.state(), PodSandboxState::SandboxNotready);
        let new = node.create(&pod.sandbox, &pod.config, script_config("second", "true")).await;
        assert!(new.unwrap_err().to_string().contains("not ready"));
        node
    });
}

/// The network of a pod with users of its own is made after its keeper: here by a plugin that waits for the test.
fn a_keeper_killed_before_its_sandbox_is_ready_is_told() {
    if !sys::kernel::maps_owners_on_tmpfs() {
        return println!("skipped: needs Linux 6.3 for a pod with users of its own");
    }
    let ground = Ground::new();
    let dir = ground.places.run.parent().unwrap().join("cni");
    std::fs::create_dir(&dir).unwrap();
    for name in ["called", "go"] {
        let fifo = sys::rustix::fs::FileType::Fifo;
        sys::rustix::fs::mknodat(sys::rustix::fs::CWD, dir.join(name), fifo, 0o600.into(), 0).unwrap();
    }
    let script = format!(
        "#!/bin/sh\ncd {}\n[ $CNI_COMMAND = ADD ] || exit 0\n: > was-called; echo > called\ncat go\n\
         echo '{{\"cniVersion\":\"1.0.0\",\"ips\":[{{\"address\":\"10.1.0.2/24\"}}]}}'\n",
        dir.display()
    );
    std::fs::write(dir.join("late"), script).unwrap();
    std::fs::set_permissions(dir.join("late"), std::fs::Permissions::from_mode(0o755)).unwrap();
    let list = serde_json::json!({"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "late"}]});
    std::fs::write(dir.join("late.conflist"), list.to_string()).unwrap();
    let mut network = network::Config::new(ground.places.run.join("network"));
    (network.cni_conf_dir, network.cni_bin_dirs) = (dir.clone(), vec![dir.clone()]);
    network.cni_state_dir = dir.join("state");
    let (place, sandboxes) = (dir.clone(), ground.places.run.join("sandboxes"));
    let killer = move || {
        std::fs::read(place.join("called")).unwrap();
        let made = std::fs::read_dir(sandboxes).unwrap().next().unwrap().unwrap().path();
        let record = keeper::read_record(std::fs::File::open(made).unwrap()).unwrap();
        let keeper = open(record.sandbox.pid);
        sys::process::send_signal(keeper.as_fd(), 9).unwrap();
        wait_for_end(&keeper);
        std::fs::write(place.join("go"), "").unwrap();
    };
    let zygote = zygote();
    run(async {
        let node = Node::start_on(network, &ground.places, zygote).await;
        let mapping = || vec![v1::IdMapping { host_id: 1_000_000, container_id: 0, length: 65536 }];
        let users = v1::UserNamespace { mode: v1::NamespaceMode::Pod.into(), uids: mapping(), gids: mapping() };
        let namespace_options = v1::NamespaceOption { userns_options: Some(users), ..Default::default() };
        let security_context =
            v1::LinuxSandboxSecurityContext { namespace_options: Some(namespace_options), ..Default::default() };
        let mut config = node.sandbox_config("early");
        config.linux =
            Some(v1::LinuxPodSandboxConfig { security_context: Some(security_context), ..Default::default() });
        let mut events = node.events().await;
        let killer = std::thread::spawn(killer);
        let made = node.run_sandbox(&config).await;
        assert!(dir.join("was-called").exists(), "{made:?}");
        killer.join().unwrap();
        match made {
            // Before it was ready, or between that and the answer.
            Err(error) => {
                let told =
                    ["keeper is gone", "is not ready any more"].iter().any(|words| error.to_string().contains(words));
                assert!(told, "{error}");
            }
            // The news of its end came after the sandbox was ready.
            Ok(id) => {
                let told = async {
                    while node.sandbox_status(&id).await.state() == PodSandboxState::SandboxReady {
                        events.next().await.unwrap().unwrap();
                    }
                };
                tokio::time::timeout(Duration::from_secs(20), told).await.expect("a sandbox without a keeper is told");
            }
        }
        node.down().await;
    });
}

fn assert_unseen(status: &v1::ContainerStatus) {
    assert_eq!(status.state(), ContainerState::ContainerExited);
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "ContainerStatusUnknown"));
}

fn what_died_with_the_daemon_away_is_told() {
    let ground = Ground::new();
    let (seen, keepers) = dead_node(&ground);
    keepers.iter().for_each(wait_for_end);
    let zygote = zygote();
    run(async {
        let node = Node::start(&ground.places, zygote).await;
        assert_unseen(&node.status(&seen["stays"].container).await);
        let ended = node.status(&seen["ended"].container).await;
        assert_eq!(format!("{ended:?}"), seen["ended"].container_status);
        let created = node.status(&seen["created"].container).await;
        assert_eq!(created.state(), ContainerState::ContainerCreated);
        let sandbox = node.sandbox_status(&seen["stays"].sandbox).await;
        assert_eq!(sandbox.state(), PodSandboxState::SandboxNotready);
        node.down().await;
    });
}

fn a_keeper_that_does_not_answer_costs_its_own_pod_only() {
    let ground = Ground::new();
    let mut daemon = Daemon::start(Scene::OfEachKind, &ground.places);
    let seen: BTreeMap<String, Seen> = serde_json::from_str(&daemon.line()).unwrap();
    daemon.kill();
    let stuck = keeper_on_record(&ground, &seen["ends"].sandbox).unwrap();
    sys::process::send_signal(stuck.as_fd(), signal::STOP).unwrap();
    let zygote = zygote();
    run(async {
        let node = Node::start(&ground.places, zygote).await;
        assert_eq!(node.sandbox_status(&seen["stays"].sandbox).await.state(), PodSandboxState::SandboxReady);
        assert_eq!(node.sandbox_status(&seen["ends"].sandbox).await.state(), PodSandboxState::SandboxNotready);
        assert_eq!(node.status(&seen["ends"].container).await.state(), ContainerState::ContainerUnknown);
        let mut events = node.events().await;
        sys::process::send_signal(stuck.as_fd(), signal::CONT).unwrap();
        while node.sandbox_status(&seen["ends"].sandbox).await.state() != PodSandboxState::SandboxReady {
            events.next().await.unwrap().unwrap();
        }
        assert_eq!(node.status(&seen["ends"].container).await.state(), ContainerState::ContainerRunning);
        // Stuck again, it does not keep its pod from being removed.
        sys::process::send_signal(stuck.as_fd(), signal::STOP).unwrap();
        node.remove_sandbox(&seen["ends"].sandbox).await.unwrap();
        node.down().await;
    });
}

/// Numbers of signal(7).
mod signal {
    pub(super) const CONT: i32 = 18;
    pub(super) const STOP: i32 = 19;
}

/// The keeper that a sandbox's record names, if it lives.
fn keeper_on_record(ground: &Ground, sandbox: &str) -> Option<OwnedFd> {
    let directory = ground.places.run.join("sandboxes").join(sandbox);
    let record = keeper::read_record(std::fs::File::open(directory).unwrap()).unwrap();
    let pid = sys::rustix::process::Pid::from_raw(i32::try_from(record.sandbox.pid).unwrap())?;
    sys::process::pidfd_open(pid).ok()
}

/// A daemon that was killed, and its keepers with it.
fn dead_node(ground: &Ground) -> (BTreeMap<String, Seen>, Vec<OwnedFd>) {
    let mut daemon = Daemon::start(Scene::OfEachKind, &ground.places);
    let seen: BTreeMap<String, Seen> = serde_json::from_str(&daemon.line()).unwrap();
    daemon.kill();
    // That of the pod that was stopped is gone already.
    let keepers: Vec<OwnedFd> = seen.values().filter_map(|one| keeper_on_record(ground, &one.sandbox)).collect();
    keepers.iter().for_each(|keeper| sys::process::send_signal(keeper.as_fd(), 9).unwrap());
    (seen, keepers)
}

fn another_boot_leaves_only_garbage() {
    let ground = Ground::new();
    let (_, keepers) = dead_node(&ground);
    keepers.iter().for_each(wait_for_end);
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    for entry in std::fs::read_dir(ground.places.run.join("sandboxes")).unwrap() {
        let record = entry.unwrap().path().join("sandbox");
        let bytes = std::fs::read(&record).unwrap();
        std::fs::write(&record, replaced(&bytes, boot.trim().as_bytes())).unwrap();
    }
    let zygote = zygote();
    run(async {
        let node = Node::start(&ground.places, zygote).await;
        assert!(node.runtime.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap().items.is_empty());
        node.down().await;
    });
}

/// The same bytes with another boot's id.
fn replaced(bytes: &[u8], boot: &[u8]) -> Vec<u8> {
    let at = bytes.windows(boot.len()).position(|window| window == boot).unwrap();
    let mut other = bytes.to_vec();
    other[at..at + boot.len()].fill(b'0');
    other
}
