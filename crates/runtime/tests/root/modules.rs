//! AppArmor and SELinux, as the processes in containers see them: on a kernel that has the one or the other.

use std::fs;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::Command;

use cri::RuntimeService as _;
use cri::v1;
use cri::v1::security_profile::ProfileType;
use testkit::serial::Test;

use crate::fixture::{Ground, Node, Pod, on_a_node, run, script_config, zygote};

pub(crate) const TESTS: &[Test] = &[
    ("apparmor_confines_who_asks_for_nothing", apparmor_default),
    ("apparmor_profiles_of_the_operator_are_enforced", apparmor_profiles),
    ("selinux_labels_pods_apart", selinux_pods),
    ("selinux_labels_the_first_process_of_a_pod", selinux_first_process),
    ("selinux_volumes_belong_to_who_relabels_them", selinux_volumes),
    ("selinux_labels_are_chosen_or_refused", selinux_options),
    ("selinux_labels_outlive_the_daemon", selinux_adoption),
];

/// Whether the test can be run; says why not.
fn possible(has: bool, what: &str) -> bool {
    if !has {
        println!("skipped: needs {what}");
    }
    has
}

/// A container that stays, with a security context.
fn staying(name: &str, change: impl FnOnce(&mut v1::LinuxContainerSecurityContext)) -> v1::ContainerConfig {
    let mut context = v1::LinuxContainerSecurityContext {
        namespace_options: Some(v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() }),
        ..Default::default()
    };
    change(&mut context);
    let linux = v1::LinuxContainerConfig { security_context: Some(context), ..Default::default() };
    v1::ContainerConfig { linux: Some(linux), ..script_config(name, "exec sleep 1000") }
}

/// Starts `request` in a pod of its own.
async fn pod(node: &Node, name: &str, request: v1::ContainerConfig) -> Result<Pod, cri::Error> {
    let mut config = node.sandbox_config(name);
    let privileged = request.linux.iter().flat_map(|linux| &linux.security_context).any(|context| context.privileged);
    let context = v1::LinuxSandboxSecurityContext { privileged, ..Default::default() };
    config.linux = Some(v1::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() });
    let sandbox = node.run_sandbox(&config).await?;
    let container = node.create(&sandbox, &config, request).await?;
    node.start_container(&container).await?;
    Ok(Pod { config, sandbox, container })
}

/// What a script in a container prints, on both streams.
async fn said(node: &Node, container: &str, script: &str) -> String {
    let done = node.exec(container, &["sh", "-c", script], 60).await.unwrap();
    let text = [done.stdout, done.stderr].concat();
    String::from_utf8_lossy(&text).trim_end_matches(['\n', '\0']).to_owned()
}

/// Its own label, as a process that is started in it and its first one see it.
async fn labels(node: &Node, container: &str) -> String {
    let own = said(node, container, "tr -d '\\0' </proc/self/attr/current").await;
    let first = said(node, container, "tr -d '\\0' </proc/1/attr/current").await;
    assert_eq!(own, first);
    own
}

/// The kernel's log from now on.
struct KernelLog(fs::File);

impl KernelLog {
    fn open() -> Self {
        use std::io::Seek as _;
        use std::os::unix::fs::OpenOptionsExt as _;
        let flags = i32::try_from(sys::rustix::fs::OFlags::NONBLOCK.bits()).unwrap();
        let mut log = fs::File::options().read(true).custom_flags(flags).open("/dev/kmsg").unwrap();
        log.seek(std::io::SeekFrom::End(0)).unwrap();
        Self(log)
    }

    /// Waits for a line that has all of `words`.
    fn wait_for(&mut self, words: &[&str]) {
        use std::io::Read as _;
        use sys::rustix::event::{PollFd, PollFlags, Timespec, poll};
        let minute = Timespec { tv_sec: 60, tv_nsec: 0 };
        let (mut seen, mut line) = (String::new(), vec![0; 8192]);
        loop {
            let ready = poll(&mut [PollFd::from_borrowed_fd(self.0.as_fd(), PollFlags::IN)], Some(&minute)).unwrap();
            assert_eq!(ready, 1, "no line has {words:?}: {seen}");
            let length = self.0.read(&mut line).unwrap();
            let text = String::from_utf8_lossy(&line[..length]).into_owned();
            if words.iter().all(|word| text.contains(word)) {
                return;
            }
            seen.push_str(&text);
        }
    }
}

fn apparmor_default() {
    if !possible(sys::kernel::has_apparmor(), "a kernel with AppArmor") {
        return;
    }
    on_a_node(|node| async {
        let admin = |context: &mut v1::LinuxContainerSecurityContext| {
            let add = vec!["SYS_ADMIN".to_owned()];
            context.capabilities = Some(v1::Capability { add_capabilities: add, ..Default::default() });
        };
        let script = "mkdir -p /mnt; mount -t tmpfs none /mnt && echo mounted; echo x >/tmp/x && echo written; \
            echo 1 >/proc/sys/vm/drop_caches && echo dropped";
        let plain = pod(&node, "plain", staying("main", admin)).await.unwrap().container;
        assert_eq!(labels(&node, &plain).await, "orlop-default (enforce)");
        let text = said(&node, &plain, script).await;
        assert!(text.contains("mount: ") && text.contains("denied") && text.contains("written"), "{text}");
        assert!(!text.contains("mounted") && !text.contains("dropped"), "{text}");
        // Signals among its own processes, and from the host by the keeper.
        assert_eq!(said(&node, &plain, "sleep 1000 & kill $! && wait; echo gone").await, "gone");
        let strict =
            staying("main", |context| (context.no_new_privs, context.apparmor) = (true, profile("RuntimeDefault")));
        let strict = pod(&node, "strict", strict).await.unwrap().container;
        assert_eq!(labels(&node, &strict).await, "orlop-default (enforce)");
        let free = staying("main", |context| {
            admin(context);
            context.apparmor = profile("Unconfined");
        });
        let free = pod(&node, "free", free).await.unwrap().container;
        assert_eq!(labels(&node, &free).await, "unconfined");
        assert!(said(&node, &free, script).await.contains("mounted"));
        let privileged = staying("main", |context| context.privileged = true);
        let privileged = pod(&node, "privileged", privileged).await.unwrap().container;
        assert_eq!(labels(&node, &privileged).await, "unconfined");
        for container in [&plain, &strict] {
            node.stop_container(container, 0).await.unwrap();
            assert_eq!(node.exited(container).await.exit_code, 137);
        }
        node
    });
}

/// By the name of the API; one that it has not is that of a profile.
fn profile(name: &str) -> Option<v1::SecurityProfile> {
    let (kind, localhost_ref) = match name {
        "RuntimeDefault" => (ProfileType::RuntimeDefault, String::new()),
        "Unconfined" => (ProfileType::Unconfined, String::new()),
        name => (ProfileType::Localhost, name.to_owned()),
    };
    Some(v1::SecurityProfile { profile_type: kind.into(), localhost_ref })
}

/// Forbids one directory and says so in the kernel's log.
const FORBIDS: &str = "
abi <abi/3.0>,
profile orlop-test-forbids flags=(attach_disconnected) {
  file,
  capability,
  network,
  ptrace,
  signal,
  audit deny /forbidden/** w,
}
";

fn apparmor_profiles() {
    let parser = testkit::host::find("apparmor_parser").is_some();
    if !possible(sys::kernel::has_apparmor() && parser, "a kernel with AppArmor, and apparmor_parser") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("forbids");
    fs::write(&file, FORBIDS).unwrap();
    #[allow(clippy::disallowed_methods, reason = "as an operator loads a profile")]
    let load = |how: &str| Command::new("apparmor_parser").args(["--skip-cache", how]).arg(&file).status().unwrap();
    assert!(load("--replace").success());
    on_a_node(|node| async {
        let forbidden = staying("main", |context| context.apparmor = profile("orlop-test-forbids"));
        let forbidden = pod(&node, "forbidden", forbidden).await.unwrap().container;
        assert_eq!(labels(&node, &forbidden).await, "orlop-test-forbids (enforce)");
        let mut log = KernelLog::open();
        let script = "mkdir -p /allowed /forbidden; echo x >/allowed/file && echo written; echo x >/forbidden/file";
        let text = said(&node, &forbidden, script).await;
        assert!(text.contains("written") && text.contains("/forbidden/file: Permission denied"), "{text}");
        log.wait_for(&["apparmor=\"DENIED\"", "profile=\"orlop-test-forbids\"", "name=\"/forbidden/file\""]);
        // By the field of older kubelets.
        let old = staying("main", |context| {
            #[expect(deprecated, reason = "older kubelets send it")]
            "localhost/orlop-test-forbids".clone_into(&mut context.apparmor_profile);
        });
        let old = pod(&node, "old", old).await.unwrap().container;
        assert_eq!(labels(&node, &old).await, "orlop-test-forbids (enforce)");
        let missing = staying("main", |context| context.apparmor = profile("orlop-test-missing"));
        let error = pod(&node, "missing", missing).await.err().unwrap();
        assert!(error.to_string().contains("apparmor profile not found orlop-test-missing"), "{error}");
        node
    });
    assert!(load("--remove").success());
}

/// Whether this kernel has SELinux with contexts for containers.
fn selinux() -> bool {
    possible(sys::kernel::has_selinux(), "a kernel with SELinux")
}

/// The part of a label that pods differ in.
fn level(label: &str) -> &str {
    label.splitn(4, ':').nth(3).unwrap()
}

fn selinux_pods() {
    if !selinux() {
        return;
    }
    on_a_node(|node| async {
        let first = pod(&node, "first", staying("main", |_| {})).await.unwrap();
        let beside = node.create(&first.sandbox, &first.config, staying("beside", |_| {})).await.unwrap();
        node.start_container(&beside).await.unwrap();
        let strict = staying("main", |context| context.no_new_privs = true);
        let second = pod(&node, "second", strict).await.unwrap();
        let label = labels(&node, &first.container).await;
        assert!(label.starts_with("system_u:system_r:container_t:s0:c"), "{label}");
        assert_eq!(labels(&node, &beside).await, label);
        let other = labels(&node, &second.container).await;
        assert!(other.starts_with("system_u:system_r:container_t:s0:c") && other != label, "{other} beside {label}");
        let mounts = said(&node, &first.container, "cat /proc/1/mountinfo").await;
        let context = format!("context=\"system_u:object_r:container_file_t:{}\"", level(&label));
        for at in [" / / ", " / /dev ", " / /dev/pts "] {
            let line = mounts.lines().find(|line| line.contains(at)).unwrap();
            assert!(line.contains(&context), "{line}");
        }
        // Everything that a container finds made for it can be used.
        let script = "echo x >/file && echo x >/dev/shm/one && echo '1.2.3.4 five' >>/etc/hosts && cat /etc/resolv.conf \
            >/dev/null && ls /proc/acpi /sys/firmware >/dev/null 2>&1; echo x >/dev/null && cat /dev/shm/one";
        assert_eq!(said(&node, &first.container, script).await, "x");
        assert_eq!(said(&node, &beside, "cat /dev/shm/one && tail -n1 /etc/hosts").await, "x\n1.2.3.4 five");
        let privileged = staying("main", |context| context.privileged = true);
        let privileged = pod(&node, "privileged", privileged).await.unwrap().container;
        assert!(labels(&node, &privileged).await.contains(":spc_t:"));
        node
    });
}

/// Where containers share their processes they see one that is none of theirs: it is the pod's, and nothing of the node.
fn selinux_first_process() {
    if !selinux() {
        return;
    }
    on_a_node(|node| async {
        for (name, privileged) in [("shared", false), ("mighty", true)] {
            let sharing = staying("main", |context| {
                context.privileged = privileged;
                context.namespace_options = Some(v1::NamespaceOption::default());
                let add = vec!["SYS_PTRACE".to_owned()];
                context.capabilities = Some(v1::Capability { add_capabilities: add, ..Default::default() });
            });
            let shared = pod(&node, name, sharing).await.unwrap().container;
            assert_eq!(said(&node, &shared, "cat /proc/1/comm").await, "orlop-pause");
            let label = said(&node, &shared, "tr -d '\\0' </proc/1/attr/current").await;
            assert!(label.starts_with("system_u:system_r:container_t:s0:c"), "{label}");
            let own = said(&node, &shared, "tr -d '\\0' </proc/self/attr/current").await;
            assert!(if privileged { own.contains(":spc_t:") } else { own == label }, "{own} beside {label}");
            let mounts = said(&node, &shared, "cat /proc/1/mountinfo").await;
            let context = format!(",context=\"system_u:object_r:container_file_t:{}\",", level(&label));
            assert!(mounts.lines().count() == 1 && mounts.contains(&context), "{mounts}");
            assert_eq!(
                said(&node, &shared, "ls -A /proc/1/root/ /proc/1/cwd/ /proc/1/fd/ | tr -d '\\n'").await,
                "/proc/1/cwd/:/proc/1/fd/:012/proc/1/root/:"
            );
        }
        if possible(sys::kernel::maps_owners_on_tmpfs(), "Linux 6.3 for a pod with users of its own") {
            let of_users = first_of_pod_with_users(&node).await;
            assert!(of_users.starts_with("system_u:system_r:container_t:s0:c"), "{of_users}");
        }
        node
    });
}

/// The label of the first process of a pod with users of its own, as the host sees it.
async fn first_of_pod_with_users(node: &Node) -> String {
    let mapping = || vec![v1::IdMapping { host_id: 1_000_000, container_id: 0, length: 65536 }];
    let users = v1::UserNamespace { mode: v1::NamespaceMode::Pod.into(), uids: mapping(), gids: mapping() };
    let options = v1::NamespaceOption { userns_options: Some(users), ..Default::default() };
    let context = v1::LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() };
    let linux = v1::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
    let config = v1::PodSandboxConfig { linux: Some(linux), ..node.sandbox_config("users") };
    let pod_sandbox_id = node.run_sandbox(&config).await.unwrap();
    let request = v1::PodSandboxStatusRequest { pod_sandbox_id, verbose: true };
    let info = node.runtime.pod_sandbox_status(request).await.unwrap().info;
    let info: serde_json::Value = serde_json::from_str(&info["info"]).unwrap();
    let (keeper, read) = (&info["pid"], |file: String| fs::read_to_string(file).unwrap());
    let first = read(format!("/proc/{keeper}/task/{keeper}/children"));
    let read_of = |name: &str| read(format!("/proc/{}/{name}", first.trim()));
    assert!(read_of("status").contains("\nUid:\t1000000\t"), "its root is no root here");
    read_of("attr/current").trim_end_matches('\0').to_owned()
}

/// A directory of the host with a file, in which everybody may write.
fn volume(dir: &Path, name: &str) -> String {
    use std::os::unix::fs::PermissionsExt as _;
    let path = dir.join(name);
    fs::create_dir(&path).unwrap();
    fs::write(path.join("file"), "from the host").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", path.join("link")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
    path.to_string_lossy().into_owned()
}

fn mounting(host_path: &str, selinux_relabel: bool) -> v1::ContainerConfig {
    let mount = v1::Mount {
        host_path: host_path.to_owned(),
        container_path: "/volume".to_owned(),
        selinux_relabel,
        ..Default::default()
    };
    v1::ContainerConfig { mounts: vec![mount], ..staying("main", |_| {}) }
}

fn selinux_volumes() {
    if !selinux() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = volume(dir.path(), "volume");
    on_a_node(|node| async {
        let mut log = KernelLog::open();
        let denied = |text: &str| assert!(text.contains("Permission denied"), "{text}");
        let stranger = pod(&node, "stranger", mounting(&path, false)).await.unwrap().container;
        denied(&said(&node, &stranger, "echo x >/volume/new").await);
        log.wait_for(&["avc:  denied", "write", "container_t", "host_file_t"]);
        let owner = pod(&node, "owner", mounting(&path, true)).await.unwrap().container;
        assert_eq!(
            said(&node, &owner, "echo x >/volume/new && cat /volume/new /volume/file").await,
            "x\nfrom the host"
        );
        denied(&said(&node, &stranger, "cat /volume/file").await);
        let label = |path: &str| {
            let place = sys::path::open_place(Path::new(path)).unwrap();
            let label = sys::xattr::get_place(place.as_fd(), c"security.selinux").unwrap().unwrap_or_default();
            String::from_utf8_lossy(&label).trim_end_matches('\0').to_owned()
        };
        let file = format!("system_u:object_r:container_file_t:{}", level(&labels(&node, &owner).await));
        assert_eq!([label(&path), label(&format!("{path}/file"))], [file.clone(), file]);
        assert!(label("/etc/passwd").contains("host_file_t"), "a link was followed");
        let error = pod(&node, "greedy", mounting("/usr", true)).await.err().unwrap();
        assert!(error.to_string().contains("SELinux relabeling of /usr is not allowed"), "{error}");
        let image = Some(v1::ImageSpec { image: crate::fixture::IMAGE.to_owned(), ..Default::default() });
        let mount = v1::Mount { image, readonly: true, container_path: "/image".to_owned(), ..Default::default() };
        let of_image = v1::ContainerConfig { mounts: vec![mount], ..staying("main", |_| {}) };
        let of_image = pod(&node, "image", of_image).await.unwrap().container;
        let mounts = said(&node, &of_image, "ls /image/bin/busybox; grep ' /image ' /proc/1/mountinfo").await;
        assert!(mounts.contains("/image/bin/busybox") && mounts.contains(":container_file_t:"), "{mounts}");
        node
    });
}

fn selinux_options() {
    if !selinux() {
        return;
    }
    on_a_node(|node| async {
        let asking = |kind: &str, level: &str| {
            let options = v1::SeLinuxOption { r#type: kind.into(), level: level.into(), ..Default::default() };
            staying("main", |context| context.selinux_options = Some(options))
        };
        let own = pod(&node, "own", asking("", "s0:c4,c5")).await.unwrap().container;
        assert_eq!(labels(&node, &own).await, "system_u:system_r:container_t:s0:c4,c5");
        let special = pod(&node, "special", asking("spc_t", "")).await.unwrap().container;
        assert!(labels(&node, &special).await.starts_with("system_u:system_r:spc_t:s0:c"));
        for (name, kind, level, part) in [
            ("form", "", "s0,c4,c5", "the format of 'level'"),
            ("unknown", "nosuch_t", "s0:c1,c2", "nosuch_t:s0:c1,c2 is not valid in the loaded policy"),
        ] {
            let error = pod(&node, name, asking(kind, level)).await.err().unwrap();
            assert!(error.to_string().contains(part), "{error}");
        }
        node
    });
}

fn selinux_adoption() {
    if !selinux() {
        return;
    }
    let ground = Ground::new();
    let (first, second) = (zygote(), zygote());
    run(async {
        let node = Node::start(&ground.places, first).await;
        let old = pod(&node, "old", staying("main", |_| {})).await.unwrap();
        let label = labels(&node, &old.container).await;
        let later = node.create(&old.sandbox, &old.config, staying("later", |_| {})).await.unwrap();
        node.runtime.stop().await;
        drop(node);
        let node = Node::start(&ground.places, second).await;
        assert_eq!(labels(&node, &old.container).await, label);
        node.start_container(&later).await.unwrap();
        assert_eq!(labels(&node, &later).await, label);
        let new = node.create(&old.sandbox, &old.config, staying("new", |_| {})).await.unwrap();
        node.start_container(&new).await.unwrap();
        assert_eq!(labels(&node, &new).await, label);
        let file = "echo x >/dev/shm/x; cat /dev/shm/x";
        assert_eq!(said(&node, &new, file).await, "x");
        node.down().await;
    });
}
