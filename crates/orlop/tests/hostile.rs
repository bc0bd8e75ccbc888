//! Images that try to get out, against the daemon as it is installed.
//!
//! A plain program without the usual harness, since it moves itself into namespaces of its own before it has threads.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::disallowed_methods, reason = "a test program")]

use std::io::{BufRead as _, BufReader};
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use cri::{ImageService as _, RuntimeService as _, v1};
use rustix::fs::{Access, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, Signal, kill_process};
use sys::mount::{Change, attribute};
use testkit::image::Builder;
use testkit::registry::Registry;

/// The node's program; on another machine than the one it was built on, the one in the PATH.
fn program() -> PathBuf {
    let built = PathBuf::from(env!("CARGO_BIN_EXE_orlop"));
    if built.exists() { built } else { testkit::host::find("orlop").unwrap() }
}

fn main() -> ExitCode {
    let missing = enter_private().err().map(|error| format!("root for private namespaces ({error})"));
    testkit::serial::main(
        &[
            ("cve_2019_5736_no_pod_can_write_the_nodes_program", own_program),
            ("cve_2019_5736_a_runtimes_command_is_sealed_before_it_begins", oci_command),
            ("cve_2020_15257_no_socket_is_reached_by_its_name_alone", abstract_sockets),
            ("cve_2024_25621_nobody_else_enters_the_nodes_directories", closed_directories),
        ],
        missing,
    )
}

/// Namespaces in which a test can leave nothing behind.
fn enter_private() -> Result<(), String> {
    testkit::netns::enter_private().map_err(|error| format!("{error:#}"))?;
    sys::process::leave(sys::process::namespace::MOUNT).map_err(|error| error.to_string())?;
    sys::mount::set_propagation(Path::new("/"), sys::mount::Propagation::Private, true).map_err(|e| e.to_string())
}

/// A daemon's process, and the scratch directory in which its keepers work. All end with the test, however that ends.
struct Bound(Child, PathBuf);

impl Drop for Bound {
    fn drop(&mut self) {
        let cwd = |exe: &PathBuf| std::fs::read_link(exe.with_file_name("cwd")).unwrap_or_default();
        let keepers: Vec<PathBuf> = own_processes().into_iter().filter(|exe| cwd(exe).starts_with(&self.1)).collect();
        let pid = |exe: &PathBuf| exe.iter().nth(2)?.to_str()?.parse().ok();
        for pid in keepers.iter().filter_map(pid) {
            let _ = kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL); // It may just have ended.
        }
        kill_process(Pid::from_raw(self.0.id().cast_signed()).unwrap(), Signal::TERM).unwrap();
        self.0.wait().unwrap();
    }
}

/// A daemon with everything that it writes in one directory.
struct Daemon {
    _process: Bound,
    client: cri::Client,
}

impl Daemon {
    /// Starts it and waits until it serves.
    async fn start(scratch: &Path) -> Self {
        let socket = scratch.join("cri.sock");
        let mut command = Command::new(program());
        command.arg("runtime").arg("--listen").arg(format!("unix://{}", socket.display()));
        for (flag, name) in [("--state-dir", "state"), ("--run-dir", "run"), ("--cni-conf-dir", "no-cni")] {
            command.arg(flag).arg(scratch.join(name));
        }
        let mut process = Bound(command.stdout(Stdio::piped()).spawn().unwrap(), scratch.to_owned());
        let mut line = String::new();
        BufReader::new(process.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("CRI on"), "{line}");
        Self { _process: process, client: cri::Client::new(&socket).unwrap() }
    }

    async fn pull(&self, image: &str) {
        let image = Some(v1::ImageSpec { image: image.to_owned(), ..Default::default() });
        self.client.pull_image(v1::PullImageRequest { image, ..Default::default() }).await.unwrap();
    }

    /// A pod with one container; the ids of both.
    async fn pod(&self, container: v1::ContainerConfig) -> (String, String) {
        self.pod_in(v1::NamespaceOption::default(), container).await
    }

    /// A pod in these namespaces.
    async fn pod_in(&self, namespaces: v1::NamespaceOption, container: v1::ContainerConfig) -> (String, String) {
        let metadata = v1::PodSandboxMetadata { name: "pod".into(), uid: "uid".into(), ..Default::default() };
        let security_context =
            v1::LinuxSandboxSecurityContext { namespace_options: Some(namespaces), ..Default::default() };
        let linux = v1::LinuxPodSandboxConfig { security_context: Some(security_context), ..Default::default() };
        let sandbox = v1::PodSandboxConfig { metadata: Some(metadata), linux: Some(linux), ..Default::default() };
        let request = v1::RunPodSandboxRequest { config: Some(sandbox.clone()), ..Default::default() };
        let pod_sandbox_id = self.client.run_pod_sandbox(request).await.unwrap().pod_sandbox_id;
        let request = v1::CreateContainerRequest {
            pod_sandbox_id: pod_sandbox_id.clone(),
            config: Some(container),
            sandbox_config: Some(sandbox),
        };
        let container_id = self.client.create_container(request).await.unwrap().container_id;
        let request = v1::StartContainerRequest { container_id: container_id.clone() };
        self.client.start_container(request).await.unwrap();
        (pod_sandbox_id, container_id)
    }

    async fn exec(&self, container_id: &str, script: &str) -> String {
        let cmd = ["sh", "-c", script].map(str::to_owned).to_vec();
        let request = v1::ExecSyncRequest { container_id: container_id.to_owned(), cmd, timeout: 0 };
        String::from_utf8(self.client.exec_sync(request).await.unwrap().stdout).unwrap()
    }

    async fn remove(&self, pod_sandbox_id: &str) {
        let pod_sandbox_id = pod_sandbox_id.to_owned();
        self.client
            .stop_pod_sandbox(v1::StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() })
            .await
            .unwrap();
        self.client.remove_pod_sandbox(v1::RemovePodSandboxRequest { pod_sandbox_id }).await.unwrap();
    }
}

/// One of `orlop oci` makes a process as soon as it is there, so it begins as the copy of the program that nobody can write.
fn oci_command() {
    let scratch = tempfile::tempdir().unwrap();
    let bundle = scratch.path().join("bundle");
    testkit::image::busybox_root(&bundle.join("rootfs")).unwrap();
    let oci = || {
        let mut command = Command::new(program());
        command.arg("oci").arg("--root").arg(scratch.path().join("states"));
        command
    };
    assert!(oci().args(["spec", "--bundle"]).arg(&bundle).status().unwrap().success());
    let config = bundle.join("config.json");
    let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&config).unwrap()).unwrap();
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = serde_json::json!(["sh", "-c", "echo up; exec sleep 1000"]);
    std::fs::write(&config, spec.to_string()).unwrap();

    let mut run = oci().args(["run", "--bundle"]).arg(&bundle).arg("sealed").stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(run.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "up\n");
    let own = format!("/proc/{}/exe", run.id());
    assert!(rustix::fs::statvfs(&own).unwrap().f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY));
    if cfg!(all(target_arch = "x86_64", not(debug_assertions))) {
        // `seal` would keep the program's name on its mount; what comes before knows its directory alone.
        let name = Path::new("/").join(program().file_name().unwrap());
        assert_eq!(std::fs::read_link(&own).unwrap(), name);
    }
    assert!(oci().args(["kill", "sealed", "KILL"]).status().unwrap().success());
    assert_eq!(run.wait().unwrap().code(), Some(137));
}

/// A registry with one image: busybox, and as its program a script for the interpreter of `first_line`.
fn registry_with(scratch: &Path, first_line: &str) -> (Registry, String) {
    let mut builder = Builder::new(scratch.join("layout")).unwrap();
    testkit::image::busybox_layer(&mut builder).unwrap();
    let text = format!("{first_line}\n");
    let script = |tar: &mut tar::Builder<&mut dyn std::io::Write>| {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o755);
        header.set_size(text.len() as u64);
        Ok(tar.append_data(&mut header, "entry", text.as_bytes())?)
    };
    builder.layer(script).unwrap();
    let config = serde_json::json!({ "Entrypoint": ["/entry"], "Env": ["PATH=/bin"] });
    let layout = builder.finish(config).unwrap();
    let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port();
    let registry = Registry::start(SocketAddr::from((Ipv4Addr::LOCALHOST, port)), &scratch.join("registry")).unwrap();
    registry.push(&layout, "hostile", "1").unwrap();
    let name = format!("{}/hostile:1", registry.address());
    (registry, name)
}

/// The processes that run the node's program.
fn own_processes() -> Vec<PathBuf> {
    let program = std::fs::metadata(program()).unwrap();
    let is_own = |exe: &PathBuf| {
        let found = std::fs::metadata(exe);
        found.is_ok_and(|found| (found.dev(), found.ino()) == (program.dev(), program.ino()))
    };
    let all = std::fs::read_dir("/proc").unwrap().map(|entry| entry.unwrap().path().join("exe"));
    all.filter(is_own).collect()
}

/// The kernel runs the program of whoever executes the script, which is the node's.
fn own_program() {
    let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
    // Such a program then waits for a node, played by the test.
    let sockets = scratch.path().join("sockets");
    std::fs::create_dir(&sockets).unwrap();
    let node = UnixListener::bind(sockets.join("orlop.sock")).unwrap();
    let (registry, image) = registry_with(scratch.path(), "#!/proc/self/exe pull");
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio.block_on(async {
        let daemon = Daemon::start(scratch.path()).await;
        daemon.pull(&image).await;
        let (pod, container) = daemon
            .pod(v1::ContainerConfig {
                metadata: Some(v1::ContainerMetadata { name: "main".into(), ..Default::default() }),
                image: Some(v1::ImageSpec { image, ..Default::default() }),
                mounts: vec![v1::Mount {
                    container_path: "/run/orlop".into(),
                    host_path: sockets.to_string_lossy().into_owned(),
                    ..Default::default()
                }],
                ..Default::default()
            })
            .await;
        let (caller, _) = node.accept().unwrap();
        let victim = socket_peercred(&caller).unwrap().pid.as_raw_nonzero();
        let exe = PathBuf::from(format!("/proc/{victim}/exe"));
        let all = own_processes();
        assert!(all.contains(&exe), "the image runs the node's program: {all:?}");
        let writable = |exe: &PathBuf| (exe.clone(), rustix::fs::access(exe, Access::WRITE_OK));
        // A worker that unpacked the image may have ended meanwhile.
        let tried = all.iter().map(writable).filter(|(_, outcome)| *outcome != Err(Errno::NOENT));
        let (sealed, open): (Vec<_>, Vec<_>) = tried.partition(|(_, outcome)| *outcome == Err(Errno::ROFS));
        assert!(open.is_empty(), "{open:?}");
        assert!(sealed.len() >= 4, "daemon, zygote, keeper and the victim: {sealed:?}");
        let script = "test -w /proc/self/exe && echo its own; test -w /proc/1/exe && echo the node\\'s";
        assert_eq!(daemon.exec(&container, script).await, "its own\n");
        unsealed_by_nobody(&exe);
        daemon.remove(&pod).await;
    });
    drop(registry);
}

/// Nobody can make the mount writable, as it is in no namespace.
fn unsealed_by_nobody(exe: &Path) {
    let file = rustix::fs::open(exe, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let change = Change { clear: attribute::READ_ONLY, ..Change::default() };
    assert_eq!(sys::mount::set_attributes(file.as_fd(), &change).unwrap_err().errno, Errno::INVAL);
    assert_eq!(sys::mount::copy_tree_at(file.as_fd(), false).unwrap_err().errno, Errno::INVAL);
}

/// A container's request for an image that runs a program of its own.
fn container(image: String, command: &[&str]) -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: "main".into(), ..Default::default() }),
        image: Some(v1::ImageSpec { image, ..Default::default() }),
        command: command.iter().map(|&word| word.to_owned()).collect(),
        ..Default::default()
    }
}

/// A socket without a file is open to whoever shares the network, and a pod may share the host's.
fn abstract_sockets() {
    let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
    let (registry, image) = registry_with(scratch.path(), "#!/bin/sh");
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio.block_on(async {
        let daemon = Daemon::start(scratch.path()).await;
        daemon.pull(&image).await;
        let host = v1::NamespaceOption { network: v1::NamespaceMode::Node.into(), ..Default::default() };
        let (pod, container) = daemon.pod_in(host, container(image, &["sleep", "1000"])).await;
        let seen = daemon.exec(&container, "cat /proc/net/unix").await;
        let own = scratch.path().display().to_string();
        assert!(seen.contains(&own), "the pod is in the node's network: {seen}");
        let nameless: Vec<_> = seen.lines().filter(|line| line.contains('@')).collect();
        assert!(nameless.is_empty(), "{nameless:?}");
        // Those with a file are behind directories that only root enters, or have modes of their own.
        for path in seen.lines().filter_map(|line| line.split_whitespace().nth(7)).filter(|path| path.starts_with(&own))
        {
            let path = Path::new(path);
            let closed = |path: &Path| std::fs::metadata(path).is_ok_and(|found| found.mode() & 0o077 == 0);
            assert!(path.ancestors().take_while(|at| *at != scratch.path()).any(closed), "{}", path.display());
        }
        daemon.remove(&pod).await;
    });
    drop(registry);
}

/// Somebody may have made them before, or opened them since.
fn closed_directories() {
    let scratch = tempfile::tempdir_in("/dev/shm").unwrap();
    let open = |name: &str| {
        let path = scratch.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
        path
    };
    let made = ["state", "state/images", "run"].map(open);
    let tokio = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio.block_on(async {
        let _daemon = Daemon::start(scratch.path()).await;
        let mode = |path: &PathBuf| std::fs::metadata(path).unwrap().mode() & 0o7777;
        assert_eq!(made.each_ref().map(mode), [0o700; 3]);
    });
}
