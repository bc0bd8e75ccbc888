//! A pod's way through its life.

use cri::v1::{ContainerEventType as Kind, ContainerState, PodSandboxState};
use cri::{Error, RuntimeService as _, v1};
use futures_util::StreamExt as _;
use testkit::serial::Test;

use crate::fixture::{IMAGE, on_a_node, script_config};

pub(crate) const TESTS: &[Test] = &[
    ("a_pod_lives_and_goes", a_pod_lives_and_goes),
    ("exit_codes_and_reasons", exit_codes_and_reasons),
    ("containers_of_a_pod_share_what_they_should", containers_of_a_pod_share_what_they_should),
    ("exec_sync_answers_and_times_out", exec_sync_answers_and_times_out),
];

fn a_pod_lives_and_goes() {
    on_a_node(|node| async {
        let mut events = node.events().await;
        let pod =
            node.pod("web", "echo up; hostname; trap 'echo bye; exit 3' TERM; while :; do sleep 0.05; done").await;
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
