//! What goes wrong, and whom it costs.

use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::time::Duration;

use cri::v1::ContainerState;
use cri::{Error, RuntimeService as _, v1};
use futures_util::StreamExt as _;
use testkit::serial::Test;

use crate::fixture::{Node, Pod, groups, on_a_node, script_config};

pub(crate) const TESTS: &[Test] = &[
    ("want_of_memory_is_told", want_of_memory_is_told),
    ("retries_join_or_find_what_is_there", retries_join_or_find_what_is_there),
    ("a_caller_that_goes_leaves_nothing_half_made", a_caller_that_goes_leaves_nothing_half_made),
    ("what_cannot_be_made_leaves_nothing", what_cannot_be_made_leaves_nothing),
    ("a_stop_ends_at_its_grace_and_sooner_if_asked", a_stop_ends_at_its_grace_and_sooner_if_asked),
    ("a_stop_that_failed_is_told_when_it_succeeds", a_stop_that_failed_is_told_when_it_succeeds),
    ("a_hung_source_costs_its_own_pod_only", a_hung_source_costs_its_own_pod_only),
    ("processes_left_behind_end_with_their_container", processes_left_behind_end_with_their_container),
    ("an_exec_that_does_not_begin_times_out", an_exec_that_does_not_begin_times_out),
];

fn want_of_memory_is_told() {
    on_a_node(|node| async {
        let config = node.sandbox_config("greedy");
        let sandbox = node.run_sandbox(&config).await.unwrap();
        // `tail` keeps the last line, and here there is no other.
        let mut request = script_config("main", "tail -n 1 /dev/zero");
        let resources = v1::LinuxContainerResources {
            memory_limit_in_bytes: 16 << 20,
            memory_swap_limit_in_bytes: 16 << 20,
            ..Default::default()
        };
        request.linux = Some(v1::LinuxContainerConfig { resources: Some(resources), ..Default::default() });
        let container = node.create(&sandbox, &config, request).await.unwrap();
        node.start_container(&container).await.unwrap();
        let status = node.exited(&container).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
        node
    });
}

fn retries_join_or_find_what_is_there() {
    on_a_node(|node| async {
        let config = node.sandbox_config("twice");
        let (first, second) = tokio::join!(node.run_sandbox(&config), node.run_sandbox(&config));
        let (sandbox, again) = (first.unwrap(), second.unwrap());
        assert_eq!((&sandbox, &node.run_sandbox(&config).await.unwrap()), (&again, &again));
        let request = || script_config("main", "sleep 1000");
        let (first, second) =
            tokio::join!(node.create(&sandbox, &config, request()), node.create(&sandbox, &config, request()));
        let container = first.unwrap();
        assert_eq!(container, second.unwrap());
        let (first, second) = tokio::join!(node.start_container(&container), node.start_container(&container));
        first.unwrap();
        second.unwrap();
        let error = node.start_container(&container).await.unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
        let (first, second) = tokio::join!(node.remove_sandbox(&sandbox), node.remove_sandbox(&sandbox));
        first.unwrap();
        second.unwrap();
        let mut next = config.clone();
        next.metadata.as_mut().unwrap().attempt = 1;
        let next_id = node.run_sandbox(&next).await.unwrap();
        node.stop_sandbox(&next_id).await.unwrap();
        let error = node.run_sandbox(&next).await.unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
        node
    });
}

fn a_caller_that_goes_leaves_nothing_half_made() {
    on_a_node(|node| async {
        let config = node.sandbox_config("impatient");
        // Polled once, then dropped.
        let gone = tokio::time::timeout(Duration::ZERO, node.run_sandbox(&config)).await;
        assert!(gone.is_err());
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let create = node.create(&sandbox, &config, script_config("main", "sleep 1000"));
        assert!(tokio::time::timeout(Duration::ZERO, create).await.is_err());
        let container = node.create(&sandbox, &config, script_config("main", "sleep 1000")).await.unwrap();
        assert!(tokio::time::timeout(Duration::ZERO, node.start_container(&container)).await.is_err());
        assert!(tokio::time::timeout(Duration::ZERO, node.remove_sandbox(&sandbox)).await.is_err());
        node.remove_sandbox(&sandbox).await.unwrap();
        let left = node.runtime.list_containers(v1::ListContainersRequest::default()).await.unwrap();
        assert!(left.containers.is_empty());
        node
    });
}

fn a_stop_that_failed_is_told_when_it_succeeds() {
    on_a_node(|node| async {
        let sandbox = node.run_sandbox(&node.sandbox_config("told")).await.unwrap();
        let mut events = node.events().await;
        let directory = node.places.run.join("sandboxes").join(&sandbox);
        let frozen = sys::mount::copy_tree(&directory, true).unwrap();
        let change = sys::mount::Change { set: sys::mount::attribute::READ_ONLY, ..Default::default() };
        sys::mount::set_attributes(frozen.as_fd(), &change).unwrap();
        sys::mount::attach_at(frozen.as_fd(), &directory).unwrap();
        let error = node.stop_sandbox(&sandbox).await.unwrap_err();
        assert!(error.to_string().contains("recording"), "{error}");
        sys::mount::detach(&directory).unwrap();
        node.stop_sandbox(&sandbox).await.unwrap();
        node.remove_sandbox(&sandbox).await.unwrap();
        let mut told = Vec::new();
        while told.last() != Some(&v1::ContainerEventType::ContainerDeletedEvent) {
            let event = events.next().await.unwrap().unwrap();
            assert_eq!(event.container_id, sandbox);
            told.push(event.container_event_type());
        }
        assert_eq!(told[0], v1::ContainerEventType::ContainerStoppedEvent);
        node
    });
}

fn what_cannot_be_made_leaves_nothing() {
    on_a_node(|node| async {
        let mut config = node.sandbox_config("bad");
        config.linux = Some(v1::LinuxPodSandboxConfig {
            sysctls: [("net.ipv4.no_such_thing".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        });
        let error = node.run_sandbox(&config).await.unwrap_err();
        assert!(error.to_string().contains("no_such_thing"), "{error}");
        let config = node.sandbox_config("good");
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let mut request = script_config("main", "true");
        request.image = Some(v1::ImageSpec { image: "busybox.test/absent:1".to_owned(), ..Default::default() });
        let error = node.create(&sandbox, &config, request).await.unwrap_err();
        assert!(matches!(error, Error::NotFound { kind: "image", .. }), "{error}");
        let mut request = script_config("main", "true");
        let security_context = Some(v1::LinuxContainerSecurityContext {
            run_as_username: "nobody-knows".to_owned(),
            ..Default::default()
        });
        request.linux = Some(v1::LinuxContainerConfig { security_context, ..Default::default() });
        let error = node.create(&sandbox, &config, request).await.unwrap_err();
        assert!(error.to_string().contains("nobody-knows"), "{error}");
        assert_eq!(node.images.rootfs_owners(), Vec::<String>::new());
        // The name is free again.
        node.create(&sandbox, &config, script_config("main", "true")).await.unwrap();
        node
    });
}

/// A pod that ignores SIGTERM. It does so from when it has spoken.
async fn deaf(node: &Node, name: &str) -> Pod {
    let pod = node.pod(name, "trap '' TERM; echo deaf; while :; do sleep 1000; done").await;
    while node.log(name).is_empty() {
        tokio::task::yield_now().await;
    }
    pod
}

fn a_stop_ends_at_its_grace_and_sooner_if_asked() {
    on_a_node(|node| async {
        let pod = deaf(&node, "deaf").await;
        let patient = node.stop_container(&pod.container, 1000);
        let impatient = async {
            tokio::task::yield_now().await;
            node.stop_container(&pod.container, 0).await
        };
        let (patient, impatient) = tokio::join!(patient, impatient);
        patient.unwrap();
        impatient.unwrap();
        assert_eq!(node.status(&pod.container).await.exit_code, 137);
        let pod = deaf(&node, "slow").await;
        node.stop_container(&pod.container, 1).await.unwrap();
        let status = node.status(&pod.container).await;
        assert!(status.finished_at - status.started_at >= 1_000_000_000, "it had its grace");
        node
    });
}

fn an_exec_that_does_not_begin_times_out() {
    on_a_node(|node| async {
        let pod = node.pod("frozen", "sleep 1000").await;
        let freeze = |frozen: bool| {
            let group = format!("{}/{}/{}", node.places.group, pod.sandbox, pod.container);
            let words = [
                ("freezer.state", if frozen { "FROZEN" } else { "THAWED" }),
                ("cgroup.freeze", if frozen { "1" } else { "0" }),
            ];
            for directory in groups(&group) {
                let files = words.iter().map(|(file, word)| (directory.join(file), word));
                files.filter(|(file, _)| file.exists()).for_each(|(file, word)| std::fs::write(file, word).unwrap());
            }
        };
        freeze(true);
        // It comes into the group and is stopped there, before it is the command.
        let error = node.exec(&pod.container, &["true"], 1).await.unwrap_err();
        assert!(matches!(error, Error::DeadlineExceeded(_)), "{error}");
        let gone = node.exec(&pod.container, &["true"], 0);
        assert!(tokio::time::timeout(Duration::from_millis(100), gone).await.is_err());
        let other = node.pod("other", "sleep 1000").await;
        node.exec(&other.container, &["true"], 1).await.unwrap();
        freeze(false);
        node.exec(&pod.container, &["sh", "-c", "while pgrep true; do :; done"], 0).await.unwrap();
        node
    });
}

fn processes_left_behind_end_with_their_container() {
    on_a_node(|node| async {
        let mut config = node.sandbox_config("host-pid");
        let namespace_options = Some(v1::NamespaceOption { pid: v1::NamespaceMode::Node.into(), ..Default::default() });
        let security_context = Some(v1::LinuxSandboxSecurityContext {
            namespace_options: namespace_options.clone(),
            ..Default::default()
        });
        config.linux = Some(v1::LinuxPodSandboxConfig { security_context, ..Default::default() });
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let mut request = script_config("main", "setsid sleep 1000 & echo $!; sleep 1000");
        let security_context = Some(v1::LinuxContainerSecurityContext { namespace_options, ..Default::default() });
        request.linux = Some(v1::LinuxContainerConfig { security_context, ..Default::default() });
        let container = node.create(&sandbox, &config, request).await.unwrap();
        node.start_container(&container).await.unwrap();
        let left = left_behind(&node).await;
        node.stop_container(&container, 0).await.unwrap();
        let mut polled =
            [sys::rustix::event::PollFd::from_borrowed_fd(left.as_fd(), sys::rustix::event::PollFlags::IN)];
        sys::rustix::event::poll(&mut polled, None).unwrap();
        assert_eq!(node.status(&container).await.state(), ContainerState::ContainerExited);
        node
    });
}

/// The process whose id the container has logged.
async fn left_behind(node: &Node) -> std::os::fd::OwnedFd {
    let path = node.places.logs.join("host-pid/main/0.log");
    loop {
        let log = std::fs::read_to_string(&path).unwrap_or_default();
        if let Some(pid) = log.lines().next().and_then(|line| line.rsplit(' ').next()?.parse::<i32>().ok()) {
            return sys::process::pidfd_open(sys::rustix::process::Pid::from_raw(pid).unwrap()).unwrap();
        }
        tokio::task::yield_now().await;
    }
}

/// A file system whose server never answers; it fails as soon as the server is dropped.
fn hang(at: &Path) -> Option<std::fs::File> {
    let server = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").ok()?;
    let fd = server.as_raw_fd().to_string();
    let options = [("fd", fd.as_str()), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")];
    let mount = sys::mount::new_filesystem("fuse", &options.map(|(key, value)| (key, Some(value))), 0).ok()?;
    sys::mount::attach_at(mount.as_fd(), at).ok()?;
    Some(server)
}

fn a_hung_source_costs_its_own_pod_only() {
    on_a_node(|node| async {
        let hung = node.places.logs.join("hung");
        std::fs::create_dir_all(&hung).unwrap();
        let Some(server) = hang(&hung) else {
            println!("skipped: needs /dev/fuse");
            return node;
        };
        let config = node.sandbox_config("hung");
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let mut request = script_config("main", "true");
        let host_path = hung.join("x").to_string_lossy().into_owned();
        request.mounts.push(v1::Mount { container_path: "/x".to_owned(), host_path, ..Default::default() });
        let stuck = node.create(&sandbox, &config, request.clone());
        let others = async {
            let pod = node.pod("other", "sleep 1000").await;
            node.stop_container(&pod.container, 0).await.unwrap();
            node.remove_sandbox(&pod.sandbox).await.unwrap();
            // Its own pod can be removed too; what the mount answers comes too late for it.
            node.remove_sandbox(&sandbox).await.unwrap();
            drop(server);
        };
        let (stuck, ()) = tokio::join!(stuck, others);
        stuck.unwrap_err();
        sys::mount::detach(&hung).unwrap();
        node
    });
}
