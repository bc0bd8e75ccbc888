//! Pods that take whatever they can get: processes, memory, disks, the time of those who read them.
//!
//! Whatever forks here does so in a control group with a small limit.

use std::os::fd::AsFd as _;
use std::path::Path;
use std::time::Duration;

use cri::v1::ContainerState;
use cri::{RuntimeService as _, v1};
use sys::cgroup::{Hierarchy, Limits};
use testkit::serial::Test;

use crate::adoption::keeper_of;
use crate::fixture::{Ground, Node, Pod, groups, on_a_node, run, script_config, zygote};
use crate::streams::{Client, exec};

pub(crate) const TESTS: &[Test] = &[
    ("a_fork_bomb_ends_at_its_limit", fork_bomb),
    ("zombies_are_reaped_or_end_with_their_container", zombies),
    ("want_of_memory_in_an_exec_costs_the_exec", memory_of_an_exec),
    ("want_of_memory_in_one_container_costs_no_other", memory_of_a_neighbour),
    ("a_client_that_does_not_read_holds_up_its_own_exec", unread_output),
    ("a_terminal_that_nobody_reads_holds_up_its_own_program", unread_terminal),
    ("a_full_disk_of_logs_costs_lines_and_no_container", full_logs),
    ("a_full_run_directory_refuses_what_is_new", full_run),
];

/// Keepers are copies of this process, and smaller before other tests have run, as those of a node are. Later one of them can
/// be the largest process of its pod, which goes first for want of memory.
pub(crate) const FIRST: &[Test] = &[
    ("half_a_megabyte_is_enough_to_begin", smallest_limit),
    ("want_of_memory_in_a_pod_spares_its_keeper", memory_of_a_pod),
    ("want_of_memory_by_files_in_memory_spares_the_keeper", memory_of_files),
    ("want_of_memory_that_costs_the_keeper_is_told", memory_of_a_keeper),
];

/// How many processes a pod of these tests may have.
const PROCESSES_MAX: i64 = 60;

/// Limits the processes of a sandbox.
fn limit(node: &Node, sandbox: &str) {
    let group = Hierarchy::detect().unwrap().group(format!("{}/{sandbox}", node.places.group));
    assert!(group.exists());
    group.set(&Limits { pids: Some(PROCESSES_MAX), ..Default::default() }).unwrap();
}

/// A pod with a limit of its processes.
async fn limited_pod(node: &Node, name: &str, script: &str) -> Pod {
    let config = node.sandbox_config(name);
    let sandbox = node.run_sandbox(&config).await.unwrap();
    limit(node, &sandbox);
    let container = node.create(&sandbox, &config, script_config("main", script)).await.unwrap();
    node.start_container(&container).await.unwrap();
    Pod { config, sandbox, container }
}

/// What a command says in a container.
async fn say(node: &Node, container: &str, script: &str) -> String {
    let answer = node.exec(container, &["sh", "-c", script], 60).await.unwrap();
    String::from_utf8_lossy(&answer.stdout).trim().to_owned()
}

/// How often a fork was refused in a sandbox's control groups.
fn refused_forks(node: &Node, pod: &Pod) -> u64 {
    let of_sandbox = format!("{}/{}", node.places.group, pod.sandbox);
    let of_container = format!("{of_sandbox}/{}", pod.container);
    let files =
        [of_sandbox, of_container].into_iter().flat_map(|group| groups(&group)).map(|dir| dir.join("pids.events"));
    let texts = files.filter_map(|file| std::fs::read_to_string(file).ok());
    texts.filter_map(|text| text.lines().find_map(|line| line.strip_prefix("max ")?.parse::<u64>().ok())).sum()
}

fn fork_bomb() {
    on_a_node(|node| async {
        let pod = limited_pod(&node, "bomb", "b() { while :; do b & done; }; (b) 2>/dev/null & exec sleep 1000").await;
        let armed = async {
            while refused_forks(&node, &pod) == 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), armed).await.expect("it comes to its limit");
        // Its own pod may have no room for another process; that is told, and the keeper lives.
        for _ in 0..5 {
            if let Err(error) = node.exec(&pod.container, &["true"], 60).await {
                println!("exec in the pod: {error}");
            }
        }
        let other = node.pod("other", "sleep 1000").await;
        assert_eq!(say(&node, &other.container, "echo fine").await, "fine");
        assert_eq!(node.status(&pod.container).await.state(), ContainerState::ContainerRunning);
        node.stop_container(&pod.container, 0).await.unwrap();
        assert_eq!(node.status(&pod.container).await.exit_code, 137);
        node.remove_sandbox(&pod.sandbox).await.unwrap();
        node
    });
}

/// Counts processes by state, with the shell alone: there may be room for no other process.
const ZOMBIES: &str = "n=0; for s in /proc/[0-9]*/stat; do read -r l < $s && case $l in *') Z '*) n=$((n+1));; esac; \
                       done 2>/dev/null; echo $n";
/// The shell looks after what ends before it is another program; what ends later has lost its parent.
const STORM: &str = "i=0; while [ $i -lt 30 ]; do (sleep 1 &); i=$((i+1)); done; echo storm; exec sleep 1000";

async fn until_zombies(node: &Node, container: &str, wanted: usize) {
    let look = async { while say(node, container, ZOMBIES).await != wanted.to_string() {} };
    let seen = tokio::time::timeout(Duration::from_secs(60), look).await;
    assert!(seen.is_ok(), "{} zombies instead of {wanted}", say(node, container, ZOMBIES).await);
}

/// A storm of orphans in a process namespace of this kind.
async fn storm(node: &Node, name: &str, mode: v1::NamespaceMode) -> Pod {
    let options = v1::NamespaceOption { pid: mode.into(), ..Default::default() };
    let mut config = node.sandbox_config(name);
    let security_context =
        v1::LinuxSandboxSecurityContext { namespace_options: Some(options.clone()), ..Default::default() };
    config.linux = Some(v1::LinuxPodSandboxConfig { security_context: Some(security_context), ..Default::default() });
    let sandbox = node.run_sandbox(&config).await.unwrap();
    limit(node, &sandbox);
    let mut request = script_config("main", STORM);
    let security_context = v1::LinuxContainerSecurityContext { namespace_options: Some(options), ..Default::default() };
    request.linux = Some(v1::LinuxContainerConfig { security_context: Some(security_context), ..Default::default() });
    let container = node.create(&sandbox, &config, request).await.unwrap();
    node.start_container(&container).await.unwrap();
    while std::fs::read_to_string(node.places.logs.join(name).join("main/0.log")).is_ok_and(|log| log.is_empty()) {
        tokio::task::yield_now().await;
    }
    Pod { config, sandbox, container }
}

fn zombies() {
    on_a_node(|node| async {
        // The first process of the container never looks after those that it inherits; that of the pod does.
        let careless = storm(&node, "careless", v1::NamespaceMode::Container).await;
        let shared = storm(&node, "shared", v1::NamespaceMode::Pod).await;
        until_zombies(&node, &careless.container, 30).await;
        let running = "grep -l sleep /proc/[0-9]*/comm 2>/dev/null | wc -l";
        let settled = async { while say(&node, &shared.container, running).await != "1" {} };
        tokio::time::timeout(Duration::from_secs(60), settled).await.expect("one that sleeps is left");
        until_zombies(&node, &shared.container, 0).await;
        node.stop_container(&careless.container, 0).await.unwrap();
        node.remove_sandbox(&careless.sandbox).await.unwrap();
        node
    });
}

/// A container's request with a limit of memory.
fn within(bytes: i64, request: v1::ContainerConfig) -> v1::ContainerConfig {
    let resources = v1::LinuxContainerResources {
        memory_limit_in_bytes: bytes,
        memory_swap_limit_in_bytes: bytes,
        ..Default::default()
    };
    v1::ContainerConfig {
        linux: Some(v1::LinuxContainerConfig { resources: Some(resources), ..Default::default() }),
        ..request
    }
}

async fn started(node: &Node, pod: &Pod, request: v1::ContainerConfig) -> String {
    let container = node.create(&pod.sandbox, &pod.config, request).await.unwrap();
    node.start_container(&container).await.unwrap();
    container
}

/// `tail` keeps the last line, and here there is no other.
const GREED: &[&str] = &["tail", "-n", "1", "/dev/zero"];

fn memory_of_an_exec() {
    on_a_node(|node| async {
        let pod = node.pod("memory", "cat /proc/self/oom_score_adj > /own; exec sleep 1000").await;
        // Nothing was said of it, and the keeper's would spare the container at the cost of others.
        let scores = "while ! test -s /own; do usleep 1000; done; cat /own /proc/self/oom_score_adj";
        assert_eq!(say(&node, &pod.container, scores).await, "0\n0");
        let container = started(&node, &pod, within(24 << 20, script_config("second", "sleep 1000"))).await;
        for _ in 0..3 {
            let answer = node.exec(&container, GREED, 0).await.unwrap();
            assert_eq!(answer.exit_code, 137);
        }
        assert_eq!(say(&node, &container, "echo fine").await, "fine");
        assert_eq!(node.status(&container).await.state(), ContainerState::ContainerRunning);
        node
    });
}

fn memory_of_a_neighbour() {
    on_a_node(|node| async {
        let pod = node.pod("memory", "while :; do echo on; sleep 0.01; done").await;
        for name in ["one", "two", "three"] {
            let mut request = within(16 << 20, script_config(name, ""));
            request.command = GREED.iter().map(|&word| word.to_owned()).collect();
            let container = started(&node, &pod, request).await;
            let status = node.exited(&container).await;
            assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
        }
        let lines = node.log("memory").len();
        while node.log("memory").len() <= lines + 10 {
            tokio::task::yield_now().await;
        }
        node
    });
}

/// A container's request as a kubelet makes it for a pod without requests, which the kernel's OOM killer takes first.
fn best_effort(request: v1::ContainerConfig) -> v1::ContainerConfig {
    let resources = v1::LinuxContainerResources { oom_score_adj: 1000, ..Default::default() };
    v1::ContainerConfig {
        linux: Some(v1::LinuxContainerConfig { resources: Some(resources), ..Default::default() }),
        ..request
    }
}

/// A pod without containers.
async fn empty_pod(node: &Node) -> Pod {
    let config = node.sandbox_config("memory");
    let sandbox = node.run_sandbox(&config).await.unwrap();
    Pod { config, sandbox, container: String::new() }
}

/// Limits the memory of a pod as soon as its keeper is in its group. Returns the keeper.
async fn limit_memory(node: &Node, pod: &Pod) -> u32 {
    const POD_MAX: i64 = 32 << 20;
    let group = Hierarchy::detect().unwrap().group(format!("{}/{}", node.places.group, pod.sandbox));
    let keeper = keeper_of(node, &pod.sandbox).await;
    // With version 1 it moves there a moment later.
    let is_in = |dir: &std::path::PathBuf| {
        let text = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap();
        text.lines().any(|line| line == keeper.to_string())
    };
    let is_there = async {
        while !group.child(&pod.sandbox).directories().iter().all(is_in) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), is_there).await.expect("the keeper is in its pod's group");
    let limits = Limits { memory_bytes: Some(POD_MAX), memory_swap_bytes: Some(POD_MAX), ..Limits::default() };
    group.set(&limits).unwrap();
    keeper
}

/// The limit is that of the whole pod, in whose control group its keeper lives: who takes the most ends, and all is told.
fn memory_of_a_pod() {
    on_a_node(|node| async {
        let mut pod = empty_pod(&node).await;
        let keeper = limit_memory(&node, &pod).await;
        for name in ["one", "two", "three"] {
            let mut request = best_effort(script_config(name, ""));
            request.command = GREED.iter().map(|&word| word.to_owned()).collect();
            let container = started(&node, &pod, request).await;
            let status = node.exited(&container).await;
            assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{name}");
        }
        assert_eq!(node.sandbox_status(&pod.sandbox).await.state(), v1::PodSandboxState::SandboxReady);
        assert_eq!(keeper_of(&node, &pod.sandbox).await, keeper);
        // Not before: who wants a page while the last victim still has its memory can be the next one.
        let talker = best_effort(script_config("main", "while :; do echo on; sleep 0.01; done"));
        pod.container = started(&node, &pod, talker).await;
        let lines = node.log("memory").len();
        while node.log("memory").len() <= lines + 10 {
            tokio::task::yield_now().await;
        }
        node
    });
}

/// As [`best_effort`], of a Guaranteed pod.
fn guaranteed(request: v1::ContainerConfig) -> v1::ContainerConfig {
    let resources = v1::LinuxContainerResources { oom_score_adj: -997, ..Default::default() };
    v1::ContainerConfig {
        linux: Some(v1::LinuxContainerConfig { resources: Some(resources), ..Default::default() }),
        ..request
    }
}

/// What fills the pod's memory is no process's own: its writer is smaller than the keeper, and protected nearly as much.
fn memory_of_files() {
    on_a_node(|node| async {
        let pod = empty_pod(&node).await;
        let keeper = limit_memory(&node, &pod).await;
        let score = std::fs::read_to_string(format!("/proc/{keeper}/oom_score_adj")).unwrap();
        if score.trim() != "-1000" {
            println!("skipped: needs CAP_SYS_RESOURCE");
            return node;
        }
        let writer = "exec dd if=/dev/zero of=/dev/shm/file bs=64k";
        let container = started(&node, &pod, guaranteed(script_config("main", writer))).await;
        let status = node.exited(&container).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
        assert_eq!(node.sandbox_status(&pod.sandbox).await.state(), v1::PodSandboxState::SandboxReady);
        assert_eq!(keeper_of(&node, &pod.sandbox).await, keeper);
        // The file is still there, and nobody whose end would give back anything. What comes next ends, or does not begin; nobody
        // waits for ever.
        for name in ["second", "third"] {
            let next = guaranteed(script_config(name, &writer.replace("file", name)));
            let Ok(next) = node.create(&pod.sandbox, &pod.config, next).await else { continue };
            match node.start_container(&next).await {
                Ok(()) => assert_eq!(node.exited(&next).await.exit_code, 137),
                Err(error) => println!("{name}: {error}"),
            }
        }
        let removed = tokio::time::timeout(Duration::from_secs(60), node.remove_sandbox(&pod.sandbox)).await;
        removed.expect("its keeper goes").unwrap();
        node
    });
}

/// The process id of a container's first process.
async fn first_process(node: &Node, container: &str) -> u64 {
    let request = v1::ContainerStatusRequest { container_id: container.to_owned(), verbose: true };
    let info = node.runtime.container_status(request).await.unwrap().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    info["pid"].as_u64().unwrap()
}

/// Where the keeper cannot be protected.
fn memory_of_a_keeper() {
    on_a_node(|node| async {
        let pod = empty_pod(&node).await;
        let keeper = limit_memory(&node, &pod).await;
        let wait = "while ! test -e /go; do usleep 1000; done; exec tail -n 1 /dev/zero";
        let container = started(&node, &pod, script_config("main", wait)).await;
        // Not before: a keeper that is spared is so again after each start.
        std::fs::write(format!("/proc/{keeper}/oom_score_adj"), "1000").unwrap();
        std::fs::write(format!("/proc/{}/root/go", first_process(&node, &container).await), "").unwrap();
        let status = node.exited(&container).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
        assert!(status.message.contains("keeper was killed for want of the pod's memory"), "{}", status.message);
        assert_eq!(node.sandbox_status(&pod.sandbox).await.state(), v1::PodSandboxState::SandboxNotready);
        node
    });
}

/// Nothing of the runtime's is in a container's control group, so that its limit is for its program alone.
fn smallest_limit() {
    on_a_node(|node| async {
        let pod = node.pod("small", "sleep 1000").await;
        let mut smallest = None;
        for kibibytes in [512, 384, 256, 192, 128, 96, 64] {
            let mut request = within(kibibytes << 10, script_config(&format!("within-{kibibytes}"), ""));
            request.command = vec!["true".to_owned()];
            let container = node.create(&pod.sandbox, &pod.config, request).await.unwrap();
            let began = node.start_container(&container).await;
            if began.is_err() || node.exited(&container).await.exit_code != 0 {
                break;
            }
            smallest = Some(kibibytes);
        }
        println!("the smallest limit that starts a program: {smallest:?} KiB");
        assert!(smallest.is_some(), "512 KiB are not enough");
        node
    });
}

/// How much a program of the container has written, once it writes no more; it is in a file of its own id.
async fn written_at_last(node: &Node, container: &str, file: &str) -> u64 {
    const ENOUGH: u64 = 16 << 20;
    let script = format!("while ! test -s {file}; do usleep 1000; done; sed -n 's/^wchar: //p' /proc/$(cat {file})/io");
    let (mut last, mut same) = (0, 0);
    while same < 10 && last < ENOUGH {
        let now = say(node, container, &script).await.parse().unwrap();
        same = if now == last { same + 1 } else { 0 };
        last = now;
    }
    last
}

/// A client of a session that asks for output and takes the first of it only.
async fn deaf(node: &Node, request: v1::ExecRequest) -> Client<tokio::net::UnixStream> {
    let url = node.runtime.exec(request).await.unwrap().url;
    let mut client = Client::inside(&url, "v5.channel.k8s.io").await;
    while client.next().await.is_some_and(|(_, bytes)| bytes.is_empty()) {}
    client
}

fn unread_output() {
    on_a_node(|node| async {
        let pod = node.pod("unread", "sleep 1000").await;
        let client = deaf(&node, exec(&pod.container, "echo $$ > /writer; exec yes")).await;
        let written = written_at_last(&node, &pod.container, "/writer").await;
        assert!(written < 4 << 20, "{written} bytes are somewhere");
        drop(client);
        let gone = "while kill -0 $(cat /writer); do usleep 1000; done 2>/dev/null; echo gone";
        assert_eq!(say(&node, &pod.container, gone).await, "gone");
        node
    });
}

fn unread_terminal() {
    on_a_node(|node| async {
        let pod = node.pod("terminal", "sleep 1000").await;
        let request =
            v1::ExecRequest { stderr: false, tty: true, ..exec(&pod.container, "echo $$ > /writer; exec yes") };
        let client = deaf(&node, request).await;
        let written = written_at_last(&node, &pod.container, "/writer").await;
        assert!(written < 4 << 20, "{written} bytes are somewhere");
        drop(client);
        let gone = "while kill -0 $(cat /writer); do usleep 1000; done 2>/dev/null; echo gone";
        assert_eq!(say(&node, &pod.container, gone).await, "gone");
        // A container's own terminal is read for its log, whether anybody is attached or not.
        let request = v1::ContainerConfig { tty: true, ..script_config("second", "yes | head -c 3000000; exit 5") };
        let container = started(&node, &pod, request).await;
        assert_eq!(node.exited(&container).await.exit_code, 5);
        node
    });
}

/// A small file system at `at`, and a file that leaves so much room in it.
fn small_disk(at: &Path, bytes: u64, room: u64) -> std::path::PathBuf {
    std::fs::create_dir_all(at).unwrap();
    let size = bytes.to_string();
    let disk = sys::mount::new_filesystem("tmpfs", &[("size", Some(size.as_str()))], 0).unwrap();
    sys::mount::attach_at(disk.as_fd(), at).unwrap();
    let filler = at.join("filler");
    std::fs::write(&filler, vec![0; usize::try_from(bytes - room).unwrap()]).unwrap();
    filler
}

fn full_logs() {
    on_a_node(|node| async {
        let logs = node.places.logs.join("full");
        let filler = small_disk(&logs, 1 << 20, 64 << 10);
        let go = node.places.run.join("go");
        std::fs::create_dir(&go).unwrap();
        let config = node.sandbox_config("full");
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let script = "head -c 500000 /dev/zero | tr '\\0' x; echo; echo before > /go/before; \
                      while ! test -e /go/after; do usleep 1000; done; echo after; exit 3";
        let mut request = script_config("main", script);
        request.mounts.push(v1::Mount {
            container_path: "/go".to_owned(),
            host_path: go.to_string_lossy().into_owned(),
            ..Default::default()
        });
        let container = node.create(&sandbox, &config, request).await.unwrap();
        node.start_container(&container).await.unwrap();
        while !go.join("before").exists() {
            tokio::task::yield_now().await;
        }
        let other = node.pod("other", "echo elsewhere").await;
        node.exited(&other.container).await;
        assert_eq!(node.log("other"), ["stdout F elsewhere"]);
        std::fs::remove_file(filler).unwrap();
        std::fs::write(go.join("after"), "").unwrap();
        assert_eq!(node.exited(&container).await.exit_code, 3);
        let log = node.log("full");
        assert!(
            log.iter().any(|line| line.contains("of this log were lost: No space left on device")),
            "{}",
            log.len()
        );
        assert_eq!(log.last().unwrap(), "stdout F after");
        assert!(log.iter().all(|line| line.starts_with("stdout ") || line.starts_with("stderr ")), "no torn record");
        node.remove_sandbox(&sandbox).await.unwrap();
        sys::mount::detach(&logs).unwrap();
        node
    });
}

fn full_run() {
    let ground = Ground::new();
    let disk = ground.places.run.parent().unwrap().to_owned();
    let filler = small_disk(&disk, 4 << 20, 3 << 20);
    let zygote = zygote();
    run(async {
        let node = Node::start(&ground.places, zygote).await;
        let pod = node.pod("lives", "while ! test -e /end; do usleep 1000; done; exit 9").await;
        let mut stuffing = std::fs::OpenOptions::new().append(true).open(&filler).unwrap();
        while std::io::Write::write_all(&mut stuffing, &[0; 4096]).is_ok() {}
        let config = node.sandbox_config("refused");
        let error = node.run_sandbox(&config).await.unwrap_err();
        assert!(error.to_string().contains("No space left on device"), "{error}");
        let created = node.create(&pod.sandbox, &pod.config, script_config("second", "true")).await;
        assert!(created.unwrap_err().to_string().contains("No space left on device"));
        // What runs is not touched, and its end, which is that of the command, is told although it can be written down nowhere.
        assert_eq!(say(&node, &pod.container, "echo told; touch /end").await, "told");
        assert_eq!(node.exited(&pod.container).await.exit_code, 9);
        std::fs::remove_file(&filler).unwrap();
        drop(stuffing);
        let sandbox = tokio::time::timeout(Duration::from_secs(60), node.run_sandbox(&config)).await.unwrap().unwrap();
        node.remove_sandbox(&sandbox).await.unwrap();
        node.down().await;
    });
    sys::mount::detach(&disk).unwrap();
}
