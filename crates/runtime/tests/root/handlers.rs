//! Containers by other OCI runtimes: orlop's own command line, which this program has by the name `runc`; runc; Debian's crun.

use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::OnceLock;

use cri::v1::ContainerState;
use cri::{Error, RuntimeService as _, v1};
use keeper::Zygote;
use runtime::HandlerConfig;
use testkit::serial::Test;

use crate::fixture::{Ground, Node, Places, Pod, run, script_config, zygote};

pub(crate) const TESTS: &[Test] = &[
    ("pods_of_other_runtimes_live_and_go", pods_of_other_runtimes_live_and_go),
    ("pods_of_other_runtimes_have_users_of_their_own", users_of_their_own),
    ("other_runtimes_are_told_of", other_runtimes_are_told_of),
    ("hooks_of_cdi_devices_are_run", hooks_of_cdi_devices_are_run),
];

/// By the name of runc this program is an OCI runtime.
pub(crate) fn maybe_be_a_runtime() -> Option<ExitCode> {
    let words: Vec<std::ffi::OsString> = std::env::args_os().collect();
    let is_runtime = words.first().map(Path::new).and_then(Path::file_name).is_some_and(|name| name == "runc");
    is_runtime.then(|| oci::main(words))
}

/// Where the virtual machine has the programs that it took along.
const IN_MACHINE: &str = "/jobs";

fn runc() -> anyhow::Result<PathBuf> {
    let there = Path::new(IN_MACHINE).join("runc");
    if there.exists() { Ok(there) } else { testkit::go::build(&testkit::go::RUNC) }
}

/// The program, and libraries that came with it.
fn crun() -> anyhow::Result<(PathBuf, PathBuf)> {
    let there = Path::new(IN_MACHINE);
    if there.join("crun").exists() {
        return Ok((there.join("crun"), there.join("x86_64-linux-gnu")));
    }
    let files = testkit::debian::crun()?.join("usr");
    Ok((files.join("bin/crun"), files.join("lib/x86_64-linux-gnu")))
}

/// Fetches and builds the others, while there still is a network. Where that is not possible they are left out.
pub(crate) fn fetch() {
    let fetched = [
        ("runc", runc()),
        ("crun", crun().map(|(program, _)| program)),
        ("an NRI plugin", testkit::go::build(&testkit::go::NRI_PLUGIN)),
        ("crictl", testkit::go::build(&testkit::go::CRICTL)),
    ];
    for (name, fetched) in fetched {
        if let Err(error) = fetched {
            println!("skipped: tests with {name} ({error:#})");
        }
    }
}

/// All handlers by name.
fn programs() -> &'static [(&'static str, PathBuf)] {
    static PROGRAMS: OnceLock<Vec<(&'static str, PathBuf)>> = OnceLock::new();
    PROGRAMS.get_or_init(|| {
        let place = tempfile::tempdir().unwrap().keep();
        let link = place.join("runc");
        symlink(std::env::current_exe().unwrap(), &link).unwrap();
        let mut all = vec![("itself", link)];
        if let Ok((crun, libraries)) = crun() {
            if libraries.is_dir() {
                lay_over(&libraries, Path::new("/lib/x86_64-linux-gnu"));
            }
            all.push(("crun", crun));
        }
        if let Ok(runc) = runc() {
            let stray = place.join("stray");
            std::fs::write(&stray, STRAY.replace("RUNC", &runc.to_string_lossy())).unwrap();
            std::fs::set_permissions(&stray, std::fs::Permissions::from_mode(0o755)).unwrap();
            all.extend([("runc", runc), ("stray", stray)]);
        }
        all
    })
}

/// A runtime that has its own mind about control groups.
const STRAY: &str = r#"#!/bin/sh
if test -f config.json; then
    sed -i 's|"cgroupsPath":"[^"]*"|"cgroupsPath":"/orlop-test-stray"|' config.json
fi
exec RUNC "$@"
"#;

/// Those that can have containers on this machine: crun knows no hybrid of both versions of control groups.
pub(crate) fn usable() -> Vec<&'static str> {
    let is_unified = sys::cgroup::Hierarchy::detect().unwrap().is_unified();
    let all = programs().iter().map(|(name, _)| *name);
    all.filter(|name| *name != "stray" && (is_unified || *name != "crun")).collect()
}

/// Adds files to a directory, in this mount namespace alone.
fn lay_over(more: &Path, directory: &Path) {
    use std::os::fd::AsFd as _;
    let lower = format!("{}:{}", directory.display(), more.display());
    let overlay = sys::mount::new_filesystem("overlay", &[("lowerdir", Some(&lower))], 0).unwrap();
    sys::mount::attach_at(overlay.as_fd(), directory).unwrap();
}

pub(crate) async fn start(places: &Places, zygote: Zygote) -> Node {
    let network = network::Config::new(places.run.join("network"));
    let handler = |(name, path): &(&str, PathBuf)| HandlerConfig {
        name: (*name).to_owned(),
        path: path.clone(),
        arguments: Vec::new(),
    };
    let handlers = programs().iter().map(handler).collect();
    Node::start_with(network, places, zygote, |config| config.handlers = handlers).await
}

async fn sandbox(node: &Node, handler: &str) -> Result<(v1::PodSandboxConfig, String), Error> {
    let config = node.sandbox_config(handler);
    let request = v1::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
    let sandbox = node.runtime.run_pod_sandbox(request).await?.pod_sandbox_id;
    Ok((config, sandbox))
}

/// A pod of that handler with one container.
pub(crate) async fn pod(node: &Node, handler: &str, script: &str) -> Pod {
    let (config, sandbox) = sandbox(node, handler).await.unwrap();
    let container = node.create(&sandbox, &config, script_config("main", script)).await.unwrap();
    node.start_container(&container).await.unwrap();
    Pod { config, sandbox, container }
}

fn pods_of_other_runtimes_live_and_go() {
    programs();
    let ground = Ground::new();
    let zygote = zygote();
    run(async {
        let node = start(&ground.places, zygote).await;
        for name in usable() {
            lives_and_goes(&node, name).await;
        }
        if programs().iter().any(|(name, _)| *name == "stray") {
            is_refused(&node, "stray").await;
        }
        node.down().await;
    });
}

async fn lives_and_goes(node: &Node, name: &str) {
    let script =
        "trap 'echo bye; exit 3' TERM; echo secret > /dev/shm/note; echo up; hostname; while :; do sleep 0.05; done";
    let pod = pod(node, name, script).await;
    assert_eq!(node.sandbox_status(&pod.sandbox).await.runtime_handler, name);
    shares(node, name, &pod).await;
    execs(node, name, &pod.container).await;
    is_limited(node, name, &pod.container).await;
    node.stop_container(&pod.container, 30).await.unwrap();
    let status = node.status(&pod.container).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (3, "Error"), "{name}");
    assert_eq!(node.log(name), ["stdout F up".to_owned(), format!("stdout F {name}"), "stdout F bye".to_owned()]);
    fails(node, name, &pod).await;
    has_a_terminal(node, name, &pod).await;
}

/// As with the runtime itself: nobody in the container is root on the host, and the files are the container's.
fn users_of_their_own() {
    if !sys::kernel::maps_owners_on_tmpfs() {
        println!("skipped: needs Linux 6.3 (id-mapped mounts of a tmpfs)");
        return;
    }
    programs();
    let ground = Ground::new();
    let zygote = zygote();
    run(async {
        let node = start(&ground.places, zygote).await;
        for name in usable().into_iter().filter(|name| *name != "crun") {
            has_users_of_its_own(&node, name).await;
        }
        if usable().contains(&"crun") {
            let error = mapped(&node, "crun").await.unwrap_err().to_string();
            assert!(error.contains("unset hostUsers"), "it names no features: {error}");
        }
        node.down().await;
    });
}

fn options() -> v1::NamespaceOption {
    let mapping = || vec![v1::IdMapping { host_id: 1_000_000, container_id: 0, length: 65536 }];
    let users = v1::UserNamespace { mode: v1::NamespaceMode::Pod.into(), uids: mapping(), gids: mapping() };
    v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), userns_options: Some(users), ..Default::default() }
}

async fn mapped(node: &Node, handler: &str) -> Result<(v1::PodSandboxConfig, String), Error> {
    let context = v1::LinuxSandboxSecurityContext { namespace_options: Some(options()), ..Default::default() };
    let linux = v1::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
    let config = v1::PodSandboxConfig { linux: Some(linux), ..node.sandbox_config(handler) };
    let request = v1::RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: handler.to_owned() };
    Ok((config, node.runtime.run_pod_sandbox(request).await?.pod_sandbox_id))
}

async fn has_users_of_its_own(node: &Node, name: &str) {
    let (config, sandbox) = mapped(node, name).await.unwrap();
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    std::fs::set_permissions(volume.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let context = v1::LinuxContainerSecurityContext { namespace_options: Some(options()), ..Default::default() };
    let script = "id -u; echo mine > /file; stat -c %u:%g /file /bin /etc/hosts /volume; ip addr show eth0 | grep -c 'inet '; \
                  read -r a b c < /proc/self/uid_map; echo $a $b $c; touch /volume/made; hostname; exec sleep 1000";
    let request = v1::ContainerConfig {
        linux: Some(v1::LinuxContainerConfig { security_context: Some(context), ..Default::default() }),
        mounts: vec![v1::Mount {
            container_path: "/volume".to_owned(),
            host_path: volume.path().to_string_lossy().into_owned(),
            uid_mappings: options().userns_options.unwrap().uids,
            gid_mappings: options().userns_options.unwrap().gids,
            ..Default::default()
        }],
        ..script_config("main", script)
    };
    let container = node.create(&sandbox, &config, request).await.unwrap();
    node.start_container(&container).await.unwrap();
    let said = node.exec(
        &container,
        &["sh", "-c", "until test -e /volume/made; do usleep 1000; done; id -u; echo x > /dev/shm/x"],
        60,
    );
    assert_eq!(said.await.unwrap().stdout, b"0\n", "{name}");
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(volume.path().join("made")).unwrap());
    assert_eq!(owner, 0, "{name}: a mapped volume has the files of root");
    node.stop_container(&container, 0).await.unwrap();
    assert_eq!(node.status(&container).await.exit_code, 137, "{name}");
    let expected =
        ["0", "0:0", "0:0", "0:0", "0:0", "1", "0 1000000 65536", name].map(|line| format!("stdout F {line}"));
    assert_eq!(node.log(name), expected);
    let request = v1::StopPodSandboxRequest { pod_sandbox_id: sandbox.clone() };
    node.runtime.stop_pod_sandbox(request).await.unwrap();
    let request = v1::RemovePodSandboxRequest { pod_sandbox_id: sandbox };
    node.runtime.remove_pod_sandbox(request).await.unwrap();
}

/// A container that would be in another control group than this runtime believes is none.
async fn is_refused(node: &Node, name: &str) {
    let (config, sandbox) = sandbox(node, name).await.unwrap();
    let container = node.create(&sandbox, &config, script_config("main", "sleep 1000")).await.unwrap();
    let error = node.start_container(&container).await.unwrap_err().to_string();
    assert!(error.contains("has not put container"), "{name}: {error}");
    let status = node.exited(&container).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"), "{name}");
}

/// A second container of the pod has its network, names and memory, and mounts of its own.
async fn shares(node: &Node, name: &str, pod: &Pod) {
    let volume = tempfile::tempdir_in("/dev/shm").unwrap();
    let place = volume.path();
    tmpfs(place);
    sys::mount::set_propagation(place, sys::mount::Propagation::Shared, false).unwrap();
    std::fs::write(place.join("file"), "content\n").unwrap();
    std::fs::create_dir(place.join("later")).unwrap();
    let mut request = script_config("second", "sleep 1000");
    let mount = |to: &str, readonly| v1::Mount {
        container_path: to.to_owned(),
        host_path: place.to_string_lossy().into_owned(),
        readonly,
        propagation: v1::MountPropagation::PropagationHostToContainer.into(),
        ..Default::default()
    };
    request.mounts = vec![mount("/ro", true), mount("/rw", false)];
    let context = v1::LinuxContainerSecurityContext { readonly_rootfs: true, ..Default::default() };
    request.linux = Some(v1::LinuxContainerConfig { security_context: Some(context), ..Default::default() });
    let second = node.create(&pod.sandbox, &pod.config, request).await.unwrap();
    node.start_container(&second).await.unwrap();
    tmpfs(&place.join("later"));
    std::fs::write(place.join("later/mounted"), "").unwrap();
    let script = "ls /rw/later; until cat /dev/shm/note 2>/dev/null; do usleep 1000; done; hostname; cat /ro/file; touch /rw/made && echo made; \
                  touch /ro/x /x 2>&1 | grep -c Read-only; grep -c $(hostname) /etc/hosts; ip addr show eth0 | grep -c 'inet '";
    let answer = node.exec(&second, &["sh", "-c", script], 60).await.unwrap();
    let told = String::from_utf8_lossy(&answer.stdout).into_owned();
    assert_eq!(told, format!("mounted\nsecret\n{name}\ncontent\nmade\n2\n1\n1\n"), "{name}");
    assert!(place.join("made").exists());
    node.stop_container(&second, 0).await.unwrap();
    assert_eq!(node.status(&second).await.exit_code, 137, "{name}");
    node.remove_container(&second).await.unwrap();
    sys::mount::detach(&place.join("later")).unwrap();
    sys::mount::detach(place).unwrap();
}

fn tmpfs(at: &Path) {
    use std::os::fd::AsFd as _;
    let made = sys::mount::new_filesystem("tmpfs", &[], 0).unwrap();
    sys::mount::attach_at(made.as_fd(), at).unwrap();
}

async fn execs(node: &Node, name: &str, container: &str) {
    let answer = node.exec(container, &["sh", "-c", "echo out; echo err >&2; exit 3"], 0).await.unwrap();
    let told = (answer.stdout.as_slice(), answer.stderr.as_slice(), answer.exit_code);
    assert_eq!(told, (&b"out\n"[..], &b"err\n"[..], 3), "{name}");
    let error = node.exec(container, &["sleep", "1000"], 1).await.unwrap_err();
    assert!(matches!(error, Error::DeadlineExceeded(_)), "{name}: {error}");
    let error = node.exec(container, &["nothing"], 0).await.unwrap_err().to_string();
    assert!(error.contains("nothing") && !error.contains("exit status"), "{name}: {error}");
}

async fn is_limited(node: &Node, name: &str, container: &str) {
    let linux = v1::LinuxContainerResources { cpu_shares: 333, memory_limit_in_bytes: 64 << 20, ..Default::default() };
    let request = v1::UpdateContainerResourcesRequest {
        container_id: container.to_owned(),
        linux: Some(linux),
        ..Default::default()
    };
    node.runtime.update_container_resources(request).await.unwrap();
    let request = v1::ContainerStatsRequest { container_id: container.to_owned() };
    let stats = node.runtime.container_stats(request).await.unwrap().stats.unwrap();
    let memory = stats.memory.unwrap();
    assert!(memory.usage_bytes.unwrap().value > 0, "{name}");
    let available = memory.available_bytes.map(|bytes| bytes.value);
    assert!(available.is_some_and(|bytes| bytes <= 64 << 20), "{name}: {available:?}");
}

/// The runtime's own words are the error.
async fn fails(node: &Node, name: &str, pod: &Pod) {
    let mut request = script_config("missing", "");
    request.command = vec!["no-such-program".to_owned()];
    let container = node.create(&pod.sandbox, &pod.config, request).await.unwrap();
    let error = node.start_container(&container).await.unwrap_err().to_string();
    assert!(error.contains("no-such-program") && !error.contains("exit status"), "{name}: {error}");
    let status = node.status(&container).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (128, "StartError"), "{name}");
}

async fn has_a_terminal(node: &Node, name: &str, pod: &Pod) {
    let mut request = script_config("terminal", "tty; exit 5");
    request.tty = true;
    request.log_path = "main/1.log".to_owned();
    let container = node.create(&pod.sandbox, &pod.config, request).await.unwrap();
    node.start_container(&container).await.unwrap();
    assert_eq!(node.exited(&container).await.exit_code, 5, "{name}");
    let log = std::fs::read_to_string(node.places.logs.join(name).join("main/1.log")).unwrap();
    assert!(log.contains("/dev/pts/0") || log.contains("/dev/console"), "{name}: {log}");
}

/// One that does not name them among its features is not asked for them.
async fn has_no_recursive_mounts(node: &Node, name: &str) {
    let (config, own) = sandbox(node, name).await.unwrap();
    let asking = |recursive_read_only| {
        let mount = v1::Mount {
            container_path: "/data".to_owned(),
            host_path: "/etc".to_owned(),
            readonly: true,
            recursive_read_only,
            ..Default::default()
        };
        v1::ContainerConfig { mounts: vec![mount], ..script_config("main", "true") }
    };
    let error = node.create(&own, &config, asking(true)).await.unwrap_err().to_string();
    assert!(error.starts_with("RROUnsupported: ") && error.contains("/data"), "{error}");
    node.create(&own, &config, asking(false)).await.unwrap();
    node.stop_sandbox(&own).await.unwrap();
    node.remove_sandbox(&own).await.unwrap();
}

fn other_runtimes_are_told_of() {
    programs();
    let ground = Ground::new();
    let zygote = zygote();
    run(async {
        let node = start(&ground.places, zygote).await;
        let status = node.runtime.status(v1::StatusRequest::default()).await.unwrap();
        let told: Vec<(String, bool)> = status
            .runtime_handlers
            .into_iter()
            .map(|handler| (handler.name, handler.features.unwrap().recursive_read_only_mounts))
            .collect();
        // Debian's crun is older than the command `features`.
        let expected =
            [("", true), ("orlop", true), ("crun", false), ("itself", true), ("runc", true), ("stray", true)];
        let is_there = |name: &str| programs().iter().any(|(known, _)| *known == name);
        let expected = expected.into_iter().filter(|(name, _)| ["", "orlop"].contains(name) || is_there(name));
        assert_eq!(told, expected.map(|(name, rro)| (name.to_owned(), rro)).collect::<Vec<_>>());
        let error = sandbox(&node, "nothing").await.unwrap_err().to_string();
        assert_eq!(error, "failed to get sandbox runtime: no runtime for \"nothing\" is configured");
        if is_there("crun") {
            has_no_recursive_mounts(&node, "crun").await;
        }
        let (config, own) = sandbox(&node, "orlop").await.unwrap();
        let container = node.create(&own, &config, script_config("main", "exit 6")).await.unwrap();
        node.start_container(&container).await.unwrap();
        let status = node.exited(&container).await;
        assert_eq!((status.state(), status.exit_code), (ContainerState::ContainerExited, 6));
        node.down().await;
    });
}

/// A device whose hook keeps what it was told and leaves something in the root.
const HOOKED: &str = "cdiVersion: 0.6.0
kind: test.example/thing
devices:
- name: hooked
  containerEdits:
    env: [THING=1]
    hooks:
    - hookName: createContainer
      path: /bin/sh
      args: [sh, -c, 'state=$(cat); echo \"$state\" > PLACE/state; bundle=$(echo \"$state\" | sed -n \"s/.*\\\"bundle\\\":\\\"\\([^\\\"]*\\)\\\".*/\\1/p\"); touch $bundle/rootfs/hooked']
";

/// What vendors' hooks rely on: the state on standard input, its bundle, and the root below that.
fn hooks_of_cdi_devices_are_run() {
    programs();
    let place = tempfile::tempdir().unwrap();
    let files = place.path().join("etc/cdi");
    std::fs::create_dir_all(&files).unwrap();
    std::fs::write(files.join("thing.yaml"), HOOKED.replace("PLACE", &place.path().to_string_lossy())).unwrap();
    lay_over(&place.path().join("etc"), Path::new("/etc"));
    let ground = Ground::new();
    let zygote = zygote();
    run(async {
        let node = start(&ground.places, zygote).await;
        for name in ["orlop"].into_iter().chain(usable()) {
            is_hooked(&node, name, place.path()).await;
        }
        node.down().await;
    });
    sys::mount::detach(Path::new("/etc")).unwrap();
}

async fn is_hooked(node: &Node, name: &str, place: &Path) {
    let (config, sandbox) = sandbox(node, name).await.unwrap();
    let mut request = script_config("main", "test -e /hooked && exit $((THING + 8))");
    request.cdi_devices = vec![v1::CdiDevice { name: "test.example/thing=hooked".to_owned() }];
    let container = node.create(&sandbox, &config, request).await.unwrap();
    node.start_container(&container).await.unwrap();
    assert_eq!(node.exited(&container).await.exit_code, 9, "{name}");
    let state = std::fs::read_to_string(place.join("state")).unwrap();
    let state: serde_json::Value = serde_json::from_str(&state).unwrap();
    // The specification's word for it, which crun does not use.
    let status = if name == "crun" { "created" } else { "creating" };
    assert_eq!((&state["id"], &state["status"]), (&container.into(), &status.into()), "{name}: {state}");
    assert_eq!(state["annotations"]["io.kubernetes.cri.container-name"], "main", "{name}: {state}");
    std::fs::remove_file(place.join("state")).unwrap();
}
