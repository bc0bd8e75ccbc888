//! A pod's way through its life.

use cri::v1::{ContainerEventType as Kind, ContainerState, PodSandboxState};
use cri::{Error, RuntimeService as _, v1};
use futures_util::StreamExt as _;
use testkit::serial::Test;

use crate::fixture::{IMAGE, Node, Pod, on_a_node, script_config};

pub(crate) const TESTS: &[Test] = &[
    ("a_pod_lives_and_goes", a_pod_lives_and_goes),
    ("exit_codes_and_reasons", exit_codes_and_reasons),
    ("containers_of_a_pod_share_what_they_should", containers_of_a_pod_share_what_they_should),
    ("a_pod_with_users_of_its_own", a_pod_with_users_of_its_own),
    ("a_pod_in_the_hosts_namespaces", a_pod_in_the_hosts_namespaces),
    ("a_pod_with_one_process_namespace", a_pod_with_one_process_namespace),
    ("exec_sync_answers_and_times_out", exec_sync_answers_and_times_out),
    ("cve_2020_8557_the_files_of_a_pod_have_a_budget", the_files_of_a_pod_have_a_budget),
];

fn a_pod_lives_and_goes() {
    on_a_node(|node| async {
        let mut events = node.events().await;
        let pod =
            node.pod("web", "trap 'echo bye; exit 3' TERM; echo up; hostname; while :; do sleep 0.05; done").await;
        let sandbox = node.sandbox_status(&pod.sandbox).await;
        assert_eq!(sandbox.state(), PodSandboxState::SandboxReady);
        assert!(sandbox.network.unwrap().ip.starts_with("10.85."));
        let status = node.status(&pod.container).await;
        assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerRunning, 0));
        assert!(status.started_at >= status.created_at && status.finished_at == 0);
        assert_eq!(status.image.unwrap().image, IMAGE);
        // The trap is set once the name is in the log.
        while !std::fs::read_to_string(&status.log_path).is_ok_and(|log| log.contains(" web\n")) {
            tokio::task::yield_now().await;
        }
        node.stop_container(&pod.container, 30).await.unwrap();
        let status = node.status(&pod.container).await;
        assert_eq!(
            (status.state(), status.exit_code, status.reason.as_str()),
            (ContainerState::ContainerExited, 3, "Error")
        );
        assert!(status.finished_at > status.started_at);
        assert_eq!(node.log("web"), ["stdout F up", "stdout F web", "stdout F bye"]);
        node.remove_container(&pod.container).await.unwrap();
        node.stop_sandbox(&pod.sandbox).await.unwrap();
        assert_eq!(node.sandbox_status(&pod.sandbox).await.state(), PodSandboxState::SandboxNotready);
        node.remove_sandbox(&pod.sandbox).await.unwrap();
        let gone = v1::PodSandboxStatusRequest { pod_sandbox_id: pod.sandbox.clone(), verbose: false };
        assert!(matches!(node.runtime.pod_sandbox_status(gone).await, Err(Error::NotFound { .. })));
        let mut seen = Vec::new();
        while seen.len() < 8 {
            let event = events.next().await.unwrap().unwrap();
            seen.push((event.container_id == pod.sandbox, event.container_event_type()));
        }
        let (s, c) = (true, false);
        let expected = [
            (s, Kind::ContainerCreatedEvent),
            (s, Kind::ContainerStartedEvent),
            (c, Kind::ContainerCreatedEvent),
            (c, Kind::ContainerStartedEvent),
            (c, Kind::ContainerStoppedEvent),
            (c, Kind::ContainerDeletedEvent),
            (s, Kind::ContainerStoppedEvent),
            (s, Kind::ContainerDeletedEvent),
        ];
        assert_eq!(seen, expected);
        // Twice, and of what is not there, is fine.
        node.remove_container(&pod.container).await.unwrap();
        node.stop_sandbox(&pod.sandbox).await.unwrap();
        node.remove_sandbox(&pod.sandbox).await.unwrap();
        node
    });
}

fn exit_codes_and_reasons() {
    on_a_node(|node| async {
        for (name, script, code, reason) in
            [("zero", "true", 0, "Completed"), ("seven", "exit 7", 7, "Error"), ("killed", "kill -9 $$", 137, "Error")]
        {
            let pod = node.pod(name, script).await;
            let status = node.exited(&pod.container).await;
            assert_eq!((status.exit_code, status.reason.as_str()), (code, reason), "{name}");
        }
        let config = node.sandbox_config("missing");
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let mut request = script_config("main", "");
        request.command = vec!["no-such-program".to_owned()];
        let container = node.create(&sandbox, &config, request).await.unwrap();
        let error = node.start_container(&container).await.unwrap_err();
        assert!(error.to_string().contains("No such file"), "{error}");
        let status = node.status(&container).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"));
        node
    });
}

fn exec_sync_answers_and_times_out() {
    on_a_node(|node| async {
        let pod = node.pod("execs", "sleep 1000").await;
        let answer = node.exec(&pod.container, &["sh", "-c", "echo out; echo err >&2; exit 3"], 0).await.unwrap();
        assert_eq!(
            (answer.stdout.as_slice(), answer.stderr.as_slice(), answer.exit_code),
            (&b"out\n"[..], &b"err\n"[..], 3)
        );
        let error = node.exec(&pod.container, &["sleep", "1000"], 1).await.unwrap_err();
        assert!(matches!(error, Error::DeadlineExceeded(_)), "{error}");
        let answer = node.exec(&pod.container, &["sh", "-c", "sleep 1000 & echo quick"], 0).await.unwrap();
        assert_eq!(answer.stdout, b"quick\n", "a process left behind is not waited for");
        let answer = node.exec(&pod.container, &["echo", "patient"], i64::MAX).await.unwrap();
        assert_eq!(answer.stdout, b"patient\n", "a pod's author may write any number of seconds");
        let error = node.exec(&pod.container, &["nothing"], 0).await.unwrap_err();
        assert!(error.to_string().contains("No such file"), "{error}");
        node
    });
}

fn containers_of_a_pod_share_what_they_should() {
    on_a_node(|node| async {
        let pod = node.pod("shares", "echo secret > /dev/shm/note; sleep 1000").await;
        let second = node.create(&pod.sandbox, &pod.config, script_config("second", "sleep 1000")).await.unwrap();
        node.start_container(&second).await.unwrap();
        let other = node.pod("other", "sleep 1000").await;
        let text = async |container: &str, script: &str| {
            let answer = node.exec(container, &["sh", "-c", script], 0).await.unwrap();
            String::from_utf8_lossy(&answer.stdout).trim().to_owned()
        };
        while text(&second, "cat /dev/shm/note").await != "secret" {}
        assert_eq!(text(&other.container, "ls /dev/shm").await, "");
        let mounted = "while read -r line; do case $line in *' /dev/shm '*) echo $line; esac; done < /proc/mounts";
        let mounted = text(&second, mounted).await;
        assert!(mounted.contains("size=65536k") && mounted.contains("noexec"), "{mounted}");
        for space in ["net", "uts", "ipc"] {
            let script = format!("readlink /proc/self/ns/{space}");
            let (first, second, other) = (
                text(&pod.container, &script).await,
                text(&second, &script).await,
                text(&other.container, &script).await,
            );
            assert!(first == second && first != other, "{space}: {first} {second} {other}");
        }
        assert_eq!(text(&second, "cat /etc/hostname; hostname").await, "shares\nshares");
        assert!(text(&second, "cat /etc/hosts").await.contains("\tshares"));
        node
    });
}

/// Namespaces for a pod and, the same, for its container.
fn in_namespaces(
    node: &Node,
    name: &str,
    options: v1::NamespaceOption,
    script: &str,
) -> (v1::PodSandboxConfig, v1::ContainerConfig) {
    let namespace_options = Some(options);
    let of_pod = v1::LinuxSandboxSecurityContext { namespace_options: namespace_options.clone(), ..Default::default() };
    let of_container = v1::LinuxContainerSecurityContext { namespace_options, ..Default::default() };
    let mut sandbox = node.sandbox_config(name);
    sandbox.linux = Some(v1::LinuxPodSandboxConfig { security_context: Some(of_pod), ..Default::default() });
    let mut container = script_config("main", script);
    container.linux = Some(v1::LinuxContainerConfig { security_context: Some(of_container), ..Default::default() });
    (sandbox, container)
}

async fn pod_in_namespaces(node: &Node, name: &str, options: v1::NamespaceOption, script: &str) -> Pod {
    let (config, request) = in_namespaces(node, name, options, script);
    let sandbox = node.run_sandbox(&config).await.unwrap();
    let container = node.create(&sandbox, &config, request).await.unwrap();
    node.start_container(&container).await.unwrap();
    Pod { config, sandbox, container }
}

fn a_pod_with_users_of_its_own() {
    on_a_node(|node| async {
        let mapping = || vec![v1::IdMapping { host_id: 1_000_000, container_id: 0, length: 65536 }];
        let users = v1::UserNamespace { mode: v1::NamespaceMode::Pod.into(), uids: mapping(), gids: mapping() };
        let options = v1::NamespaceOption { userns_options: Some(users), ..Default::default() };
        if !sys::kernel::maps_owners_on_tmpfs() {
            let (config, _) = in_namespaces(&node, "users", options, "true");
            let refused = node.run_sandbox(&config).await.unwrap_err().to_string();
            assert!(refused.contains("boot Linux 6.3 or newer"), "{refused}");
            return node;
        }
        let script = "id -u; echo mine > /file; stat -c %u:%g /file /bin /etc/hosts; ip addr show eth0 | grep -c 'inet '; \
                      read -r a b c < /proc/self/uid_map; echo $a $b $c";
        let pod = pod_in_namespaces(&node, "users", options.clone(), script).await;
        let expected = ["0", "0:0", "0:0", "0:0", "1", "0 1000000 65536"].map(|line| format!("stdout F {line}"));
        node.exited(&pod.container).await;
        assert_eq!(node.log("users"), expected);
        let (_, mut request) = in_namespaces(&node, "users", options, "sleep 1000");
        request.metadata.as_mut().unwrap().name = "second".to_owned();
        let second = node.create(&pod.sandbox, &pod.config, request).await.unwrap();
        node.start_container(&second).await.unwrap();
        let answer = node.exec(&second, &["cat", "/proc/self/uid_map"], 0).await.unwrap();
        assert!(String::from_utf8_lossy(&answer.stdout).contains("1000000"));
        assert!(node.sandbox_status(&pod.sandbox).await.network.unwrap().ip.starts_with("10.85."));
        node
    });
}

fn a_pod_in_the_hosts_namespaces() {
    on_a_node(|node| async {
        let mode = v1::NamespaceMode::Node.into();
        let options = v1::NamespaceOption { network: mode, pid: mode, ipc: mode, ..Default::default() };
        let pod = pod_in_namespaces(&node, "host", options, "sleep 1000").await;
        for space in ["net", "pid", "ipc", "uts"] {
            let path = format!("/proc/self/ns/{space}");
            let answer = node.exec(&pod.container, &["readlink", &path], 0).await.unwrap();
            // The test's own thread stands for the host.
            let host = std::fs::read_link(format!("/proc/thread-self/ns/{space}")).unwrap();
            assert_eq!(String::from_utf8_lossy(&answer.stdout).trim(), host.to_string_lossy(), "{space}");
        }
        assert_eq!(node.sandbox_status(&pod.sandbox).await.network.unwrap().ip, "");
        node
    });
}

/// Waits until a container sees this process, which is a shell before.
async fn until_it_runs(node: &Node, container: &str, process: &str) {
    let sees = async {
        loop {
            let answer = node.exec(container, &["ps", "-o", "pid,args"], 0).await.unwrap();
            if String::from_utf8_lossy(&answer.stdout).lines().any(|line| line.ends_with(process)) {
                return;
            }
        }
    };
    let seen = tokio::time::timeout(std::time::Duration::from_secs(60), sees).await;
    seen.unwrap_or_else(|_| panic!("{container} does not see {process:?}"));
}

fn a_pod_with_one_process_namespace() {
    on_a_node(|node| async {
        let options = v1::NamespaceOption { pid: v1::NamespaceMode::Pod.into(), ..Default::default() };
        let first = pod_in_namespaces(&node, "one", options.clone(), "exec sleep 4243").await;
        let (_, mut request) = in_namespaces(&node, "one", options, "exec sleep 4244");
        request.metadata.as_mut().unwrap().name = "second".to_owned();
        let second = node.create(&first.sandbox, &first.config, request).await.unwrap();
        node.start_container(&second).await.unwrap();
        until_it_runs(&node, &second, "sleep 4243").await;
        until_it_runs(&node, &second, "sleep 4244").await;
        node.stop_container(&first.container, 0).await.unwrap();
        assert_eq!(node.status(&second).await.state(), ContainerState::ContainerRunning);
        // Another container of the pod, which has a namespace of its own, can be joined as well.
        let own = v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() };
        let target = pod_in_namespaces(&node, "target", own, "exec sleep 4245").await;
        let options = v1::NamespaceOption {
            pid: v1::NamespaceMode::Target.into(),
            target_id: target.container.clone(),
            ..Default::default()
        };
        let (_, mut request) = in_namespaces(&node, "target", options, "exec sleep 4246");
        request.metadata.as_mut().unwrap().name = "debugger".to_owned();
        let debugger = node.create(&target.sandbox, &target.config, request).await.unwrap();
        node.start_container(&debugger).await.unwrap();
        until_it_runs(&node, &debugger, "    1 sleep 4245").await;
        node
    });
}

/// They are the node's memory: a container may write to them, but not without end.
fn the_files_of_a_pod_have_a_budget() {
    on_a_node(|node| async {
        let script = "hostname; echo 192.0.2.1 mine >> /etc/hosts && grep -c mine /etc/hosts; \
                      for file in hosts hostname resolv.conf; do \
                      dd if=/dev/zero of=/etc/$file bs=64k count=64 2>/dev/null || echo full; done; \
                      cat /etc/hosts /etc/hostname /etc/resolv.conf | wc -c";
        let pod = node.pod("greedy", script).await;
        node.exited(&pod.container).await;
        let log = node.log("greedy");
        assert_eq!(log[..5], ["greedy", "1", "full", "full", "full"].map(|line| format!("stdout F {line}")));
        let bytes: u64 = log[5].rsplit(' ').next().unwrap().parse().unwrap();
        assert!((512 << 10..=2 << 20).contains(&bytes), "{bytes}");
        node
    });
}
