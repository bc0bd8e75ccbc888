//! What requests ask for, as the processes in containers see it.

use std::path::Path;

use cri::v1::security_profile::ProfileType;
use cri::{Error, RuntimeService as _, v1};
use serde_json::json;
use testkit::serial::Test;

use crate::fixture::{Node, on_a_node, script_config};

pub(crate) const TESTS: &[Test] = &[
    ("users_groups_and_environment", users_groups_and_environment),
    ("the_image_says_what_the_request_leaves_out", the_image_says_what_the_request_leaves_out),
    ("volumes_of_an_image_stay_writable", volumes_of_an_image_stay_writable),
    ("an_image_is_a_volume", an_image_is_a_volume),
    ("mounts_of_the_host", mounts_of_the_host),
    ("mounts_travel_as_asked", mounts_travel_as_asked),
    ("read_only_may_mean_all_below", read_only_may_mean_all_below),
    ("the_sandbox_brings_files_and_settings", the_sandbox_brings_files_and_settings),
    ("the_stop_signal_is_the_requests_or_the_images", the_stop_signal_is_the_requests_or_the_images),
    ("a_container_is_confined", a_container_is_confined),
    ("a_privileged_container_is_not", a_privileged_container_is_not),
    ("devices_are_given_one_by_one", devices_are_given_one_by_one),
    ("what_cannot_be_honoured_is_refused", what_cannot_be_honoured_is_refused),
];

/// A container's request with a security context.
pub(crate) fn secured(
    script: &str,
    change: impl FnOnce(&mut v1::LinuxContainerSecurityContext),
) -> v1::ContainerConfig {
    let mut context = v1::LinuxContainerSecurityContext {
        namespace_options: Some(v1::NamespaceOption { pid: v1::NamespaceMode::Container.into(), ..Default::default() }),
        ..Default::default()
    };
    change(&mut context);
    let linux = v1::LinuxContainerConfig { security_context: Some(context), ..Default::default() };
    v1::ContainerConfig { linux: Some(linux), ..script_config("main", script) }
}

/// Runs a container to its end; what it printed.
pub(crate) async fn output(node: &Node, name: &str, request: v1::ContainerConfig) -> Result<Vec<String>, Error> {
    let mut config = node.sandbox_config(name);
    let privileged = request.linux.iter().flat_map(|linux| &linux.security_context).any(|context| context.privileged);
    let context = v1::LinuxSandboxSecurityContext { privileged, ..Default::default() };
    config.linux = Some(v1::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() });
    output_in(node, &config, name, request).await
}

/// As [`output`], in a sandbox of this configuration.
async fn output_in(
    node: &Node,
    config: &v1::PodSandboxConfig,
    name: &str,
    request: v1::ContainerConfig,
) -> Result<Vec<String>, Error> {
    let sandbox = node.run_sandbox(config).await?;
    let container = node.create(&sandbox, config, request).await?;
    node.start_container(&container).await?;
    node.exited(&container).await;
    let lines = node.log(name);
    Ok(lines
        .iter()
        .map(|line| line.trim_start_matches("stdout F ").trim_start_matches("stderr F ").to_owned())
        .collect())
}

/// An image of the usual programs with another configuration, under its name.
pub(crate) async fn image(node: &Node, dir: &Path, name: &str, config: serde_json::Value) -> String {
    let own = [
        ("etc/passwd", "web:x:1000:1001::/srv/web:/bin/sh\n"),
        ("etc/group", "web:x:1001:\ndocs:x:2000:web\n"),
        ("data/file", "from the image\n"),
    ];
    let layer = |tar: &mut testkit::image::Layer<'_>| {
        own.iter().try_for_each(|(path, text)| testkit::image::append_text(tar, path, text))
    };
    image_with(node, dir, name, config, layer).await
}

/// An image of the usual programs and a layer, under its name.
pub(crate) async fn image_with(
    node: &Node,
    dir: &Path,
    name: &str,
    config: serde_json::Value,
    layer: impl FnOnce(&mut testkit::image::Layer<'_>) -> anyhow::Result<()>,
) -> String {
    let layout = dir.join(format!("layout-{name}"));
    let mut builder = testkit::image::Builder::new(&layout).unwrap();
    testkit::image::busybox_layer(&mut builder).unwrap();
    builder.layer(layer).unwrap();
    builder.finish(config).unwrap();
    let loaded = node.images.load(&layout, &image::Silent).await.unwrap();
    let id = loaded[0].id.to_string();
    let name = format!("requests.test/{name}:1");
    node.images.tag(&id, &name.parse().unwrap()).unwrap();
    name
}

pub(crate) fn of_image(name: &str, mut request: v1::ContainerConfig) -> v1::ContainerConfig {
    request.image = Some(v1::ImageSpec { image: name.to_owned(), ..Default::default() });
    request
}

fn users_groups_and_environment() {
    on_a_node(|node| async {
        let script =
            "id -u; id -g; id -G; echo $HOME; echo $HOSTNAME; cat /etc/hostname; env | sed -n s/^RAW=//p | od -An -tx1";
        let mut request = secured(script, |context| {
            context.run_as_user = Some(v1::Int64Value { value: 33 });
            context.run_as_group = Some(v1::Int64Value { value: 44 });
            context.supplemental_groups = vec![55];
        });
        request.envs = vec![v1::KeyValue { key: "RAW".into(), value: vec![0xff, 0x41] }];
        let lines = output(&node, "user", request).await.unwrap();
        assert_eq!(lines, ["33", "44", "44 55", "/var/www", "user", "user", " ff 41 0a"]);
        node
    });
}

fn the_image_says_what_the_request_leaves_out() {
    on_a_node(|node| async {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({
            "User": "web", "Env": ["PATH=/bin", "FROM=image", "OVER=image"], "WorkingDir": "/srv/made",
            "Entrypoint": ["sh", "-c"], "Cmd": ["id -G; pwd; echo $FROM $OVER $HOME"],
        });
        let name = image(&node, dir.path(), "defaults", config).await;
        let mut request = of_image(&name, secured("", |_| {}));
        request.command.clear();
        request.envs = vec![v1::KeyValue { key: "OVER".into(), value: b"request".to_vec() }];
        let lines = output(&node, "defaults", request.clone()).await.unwrap();
        assert_eq!(lines, ["1001 2000", "/srv/made", "image request /srv/web"]);
        request.args = vec!["echo $0 args".into(), "my".into()];
        assert_eq!(output(&node, "args", request).await.unwrap(), ["my args"]);
        node
    });
}

fn volumes_of_an_image_stay_writable() {
    on_a_node(|node| async {
        let dir = tempfile::tempdir().unwrap();
        let config = json!({ "Env": ["PATH=/bin"], "Volumes": { "/data": {}, "/made/here": {} } });
        let name = image(&node, dir.path(), "volumes", config).await;
        let script = "cat /data/file; touch /data/new /made/here/new && echo rw; touch /new 2>/dev/null || echo ro";
        let request = of_image(&name, secured(script, |context| context.readonly_rootfs = true));
        assert_eq!(output(&node, "volumes", request).await.unwrap(), ["from the image", "rw", "ro"]);
        node
    });
}

/// Read-only, with programs that can be run unless the request forbids it, and named in the status by its id.
fn an_image_is_a_volume() {
    on_a_node(|node| async {
        let dir = tempfile::tempdir().unwrap();
        let name = image(&node, dir.path(), "volume", json!({})).await;
        let id = node.images.get(&name).unwrap().id.to_string();
        let volume = |at: &str| v1::Mount {
            container_path: at.into(),
            image: Some(v1::ImageSpec { image: name.clone(), ..Default::default() }),
            readonly: true,
            ..Default::default()
        };
        let script = "cat /all/data/file /part/file; /all/bin/busybox echo ran; touch /all/new 2>/dev/null || echo ro; \
            /noexec/bin/busybox true 2>/dev/null || echo refused; grep -cE ' /(all|part|noexec) .*nosuid,nodev' /proc/self/mountinfo";
        let mut request = secured(script, |_| {});
        request.mounts = vec![
            volume("/all"),
            v1::Mount { image_sub_path: "data".into(), ..volume("/part") },
            v1::Mount { mount_options: vec!["noexec".into()], ..volume("/noexec") },
        ];
        let lines = output(&node, "volume", request.clone()).await.unwrap();
        assert_eq!(lines, ["from the image", "from the image", "ran", "ro", "refused", "3"]);
        let listed = node.runtime.list_containers(v1::ListContainersRequest::default()).await.unwrap().containers;
        for mount in node.status(&listed[0].id).await.mounts {
            assert_eq!(mount.image.unwrap().image_ref, id, "{}", mount.container_path);
        }
        request.mounts[0].readonly = false;
        let error = output(&node, "writable", request).await.unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)) && error.to_string().contains("read-only"), "{error}");
        node
    });
}

pub(crate) fn host_mount(at: &str, host: &Path) -> v1::Mount {
    v1::Mount { container_path: at.into(), host_path: host.to_string_lossy().into_owned(), ..Default::default() }
}

fn mounts_of_the_host() {
    on_a_node(|node| async {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("plain")).unwrap();
        std::fs::write(path("plain/file"), "plain\n").unwrap();
        std::fs::write(path("single"), "single\n").unwrap();
        std::os::unix::fs::symlink("plain", path("link")).unwrap();
        std::fs::write(path("run"), "#!/bin/sh\necho ran\n").unwrap();
        std::fs::set_permissions(path("run"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let script = "cat /a/file /a/b/single /link/file; touch /a/new && echo rw; touch /ro/new 2>/dev/null || echo ro; \
            touch /missing/new && echo made; /noexec/run 2>/dev/null || echo refused; cat /etc/hosts";
        let mut request = secured(script, |_| {});
        std::fs::write(path("hosts"), "mine\n").unwrap();
        request.mounts = vec![
            host_mount("/a/b/single", &path("single")),
            host_mount("/a", &path("plain")),
            host_mount("/link", &path("link")),
            v1::Mount { readonly: true, ..host_mount("/ro", &path("plain")) },
            host_mount("/missing", &path("not/there")),
            v1::Mount { mount_options: vec!["noexec".into()], ..host_mount("/noexec", dir.path()) },
            host_mount("/etc/hosts", &path("hosts")),
        ];
        let lines = output(&node, "mounts", request).await.unwrap();
        assert_eq!(lines, ["plain", "single", "plain", "rw", "ro", "made", "refused", "mine"]);
        assert!(path("plain/new").exists() && path("not/there/new").exists());
        node
    });
}

fn tmpfs(at: &Path) {
    let made = sys::mount::new_filesystem("tmpfs", &[], 0).unwrap();
    std::fs::create_dir_all(at).unwrap();
    let target = std::fs::File::open(at).unwrap();
    sys::mount::attach(std::os::fd::AsFd::as_fd(&made), std::os::fd::AsFd::as_fd(&target)).unwrap();
}

fn detach(at: &Path) {
    sys::rustix::mount::unmount(at, sys::rustix::mount::UnmountFlags::DETACH).unwrap();
}

/// A mount of the host made later reaches a container that asked for it; one made in a container reaches the host.
fn mounts_travel_as_asked() {
    on_a_node(|node| async {
        let dir = tempfile::tempdir().unwrap();
        let shared = dir.path().join("shared");
        tmpfs(&shared);
        let spread = |propagation: v1::MountPropagation| v1::Mount {
            propagation: propagation.into(),
            ..host_mount("/spread", &shared)
        };
        let down = v1::MountPropagation::PropagationHostToContainer;
        let mut request = secured("sleep 1000", |_| {});
        request.mounts = vec![spread(down)];
        let refused = output(&node, "unshared", request.clone()).await.unwrap_err();
        assert!(refused.to_string().contains("not a shared or slave mount"), "{refused}");
        sys::mount::set_propagation(&shared, sys::mount::Propagation::Shared, false).unwrap();

        let config = node.sandbox_config("down");
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let container = node.create(&sandbox, &config, request).await.unwrap();
        node.start_container(&container).await.unwrap();
        tmpfs(&shared.join("late"));
        std::fs::write(shared.join("late/file"), "late\n").unwrap();
        let seen = node.exec(&container, &["cat", "/spread/late/file"], 0).await.unwrap();
        assert_eq!(seen.stdout, b"late\n");
        detach(&shared.join("late"));
        node.stop_container(&container, 0).await.unwrap();

        let script = "mkdir /spread/up && mount -t tmpfs none /spread/up && echo up > /spread/up/file";
        let mut request = secured(script, |context| context.privileged = true);
        request.mounts = vec![spread(v1::MountPropagation::PropagationBidirectional)];
        assert_eq!(output(&node, "up", request).await.unwrap(), Vec::<String>::new());
        assert_eq!(std::fs::read_to_string(shared.join("up/file")).unwrap(), "up\n");
        detach(&shared.join("up"));
        detach(&shared);
        node
    });
}

fn read_only_may_mean_all_below() {
    on_a_node(|node| async {
        let dir = tempfile::tempdir().unwrap();
        let outer = dir.path().join("outer");
        tmpfs(&outer);
        tmpfs(&outer.join("inner"));
        let mount = |at: &str| v1::Mount { readonly: true, ..host_mount(at, &outer) };
        let script = "touch /ro/new 2>/dev/null || echo ro; touch /ro/inner/new && echo open below; \
            touch /rro/inner/newer 2>/dev/null || echo ro below";
        let mut request = secured(script, |_| {});
        request.mounts = vec![mount("/ro"), v1::Mount { recursive_read_only: true, ..mount("/rro") }];
        assert_eq!(output(&node, "below", request).await.unwrap(), ["ro", "open below", "ro below"]);
        detach(&outer);
        node
    });
}

fn the_sandbox_brings_files_and_settings() {
    on_a_node(|node| async {
        let mut config = node.sandbox_config("files");
        config.hostname = "named".into();
        config.dns_config = Some(v1::DnsConfig {
            servers: vec!["192.0.2.53".into()],
            searches: vec!["a.test".into(), "b.test".into()],
            options: vec!["ndots:5".into()],
        });
        let sysctls = [("kernel.shm_rmid_forced".to_owned(), "1".to_owned())].into();
        config.linux = Some(v1::LinuxPodSandboxConfig { sysctls, ..Default::default() });
        let script = "hostname; cat /etc/hostname; sort /etc/resolv.conf; tail -n 1 /etc/hosts | cut -f 2; \
            grep ' /dev/shm ' /proc/mounts | grep -o size=65536k; cat /proc/sys/kernel/shm_rmid_forced; \
            cat /proc/sys/net/ipv4/ip_unprivileged_port_start; cut -f 2 /proc/sys/net/ipv4/ping_group_range";
        let expect = [
            "named",
            "named",
            "nameserver 192.0.2.53",
            "options ndots:5",
            "search a.test b.test",
            "named",
            "size=65536k",
            "1",
            "0",
            "2147483647",
        ];
        assert_eq!(output_in(&node, &config, "files", secured(script, |_| {})).await.unwrap(), expect);
        node
    });
}

fn the_stop_signal_is_the_requests_or_the_images() {
    on_a_node(|node| async {
        let dir = tempfile::tempdir().unwrap();
        let name = image(&node, dir.path(), "stops", json!({ "Env": ["PATH=/bin"], "StopSignal": "SIGUSR1" })).await;
        let script = "trap 'exit 1' USR1; trap 'exit 2' USR2; echo up; while :; do sleep 0.05; done";
        for (pod, wanted, code) in [("image", v1::Signal::RuntimeDefault, 1), ("request", v1::Signal::Sigusr2, 2)] {
            let config = node.sandbox_config(pod);
            let sandbox = node.run_sandbox(&config).await.unwrap();
            let mut request = of_image(&name, secured(script, |_| {}));
            request.stop_signal = wanted.into();
            let container = node.create(&sandbox, &config, request).await.unwrap();
            node.start_container(&container).await.unwrap();
            let log = node.status(&container).await.log_path;
            while !std::fs::read_to_string(&log).is_ok_and(|log| log.contains(" up\n")) {
                tokio::task::yield_now().await;
            }
            node.stop_container(&container, 60).await.unwrap();
            assert_eq!(node.status(&container).await.exit_code, code, "{pod}");
        }
        node
    });
}

fn a_container_is_confined() {
    on_a_node(|node| async {
        let script = "grep -E '^(CapBnd|CapEff|CapAmb|NoNewPrivs|Seccomp):' /proc/self/status; \
            cat /proc/sys/net/ipv4/ip_unprivileged_port_start; wc -c < /proc/version; \
            echo 1 2>/dev/null > /proc/sys/net/ipv4/ip_forward || echo ro; ls /sys/fs/cgroup/pids/cgroup.procs \
            /sys/fs/cgroup/cgroup.procs 2>/dev/null | wc -l; mkdir /sys/fs/cgroup/pids/x /sys/fs/cgroup/x 2>/dev/null || echo ro";
        let request = secured(script, |context| {
            context.capabilities = Some(v1::Capability {
                add_capabilities: vec!["NET_BIND_SERVICE".into()],
                drop_capabilities: vec!["ALL".into()],
                ..Default::default()
            });
            context.no_new_privs = true;
            context.seccomp = Some(v1::SecurityProfile::default());
            context.masked_paths = vec!["/proc/version".into()];
            context.readonly_paths = vec!["/proc/sys".into()];
        });
        let lines = output(&node, "confined", request).await.unwrap();
        let expect = [
            "CapEff:\t0000000000000400",
            "CapBnd:\t0000000000000400",
            "CapAmb:\t0000000000000000",
            "NoNewPrivs:\t1",
            "Seccomp:\t2",
            "0",
            "0",
            "ro",
            "1",
            "ro",
        ];
        assert_eq!(lines, expect);
        let ambient = secured("grep CapEff /proc/self/status", |context| {
            context.run_as_user = Some(v1::Int64Value { value: 1000 });
            context.capabilities = Some(v1::Capability {
                drop_capabilities: vec!["ALL".into()],
                add_ambient_capabilities: vec!["NET_BIND_SERVICE".into()],
                ..Default::default()
            });
        });
        assert_eq!(output(&node, "ambient", ambient).await.unwrap(), ["CapEff:\t0000000000000400"]);
        let localhost = tempfile::NamedTempFile::new().unwrap();
        let profile = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 95 }],
        });
        std::fs::write(localhost.path(), profile.to_string()).unwrap();
        let request = secured("mkdir /new 2>&1", |context| {
            context.seccomp = Some(v1::SecurityProfile {
                profile_type: ProfileType::Localhost.into(),
                localhost_ref: localhost.path().to_string_lossy().into_owned(),
            });
        });
        let lines = output(&node, "localhost", request).await.unwrap();
        assert!(lines[0].contains("not supported"), "{lines:?}");
        node
    });
}

fn a_privileged_container_is_not() {
    on_a_node(|node| async {
        let script = "grep -E '^(CapEff|Seccomp):' /proc/self/status; test $(wc -c < /proc/version) -gt 0 && echo unmasked; \
            ls /sys/fs/cgroup | wc -l; test -c /dev/kmsg && echo kmsg; mount -t tmpfs none /tmp && echo mounted";
        let request = secured(script, |context| {
            context.privileged = true;
            context.masked_paths = vec!["/proc/version".into()];
            context.seccomp = Some(v1::SecurityProfile::default());
        });
        let lines = output(&node, "privileged", request).await.unwrap();
        let host = sys::caps::bounding() & sys::caps::get().unwrap().permitted;
        assert_eq!(lines[0], format!("CapEff:\t{host:016x}"));
        let groups = std::fs::read_dir("/sys/fs/cgroup").unwrap().count().to_string();
        let mut expect = vec!["Seccomp:\t0", "unmasked", groups.as_str()];
        expect.extend(Path::new("/dev/kmsg").exists().then_some("kmsg"));
        expect.push("mounted");
        assert_eq!(lines[1..], expect);
        node
    });
}

fn devices_are_given_one_by_one() {
    on_a_node(|node| async {
        let script = "head -c1 /dev/mine | wc -c; ls -l /dev/mine | cut -c1; mknod /dev/log c 1 11; \
            head -c1 /dev/log 2>&1 | grep -c permitted";
        let mut request = secured(script, |_| {});
        let device = |host: &str| v1::Device {
            host_path: host.into(),
            container_path: "/dev/mine".into(),
            permissions: "rwm".into(),
        };
        request.devices = vec![device("/dev/zero")];
        assert_eq!(output(&node, "device", request.clone()).await.unwrap(), ["1", "c", "1"]);
        request.devices = vec![device("/dev/nothing")];
        let error = output(&node, "missing", request).await.unwrap_err();
        assert!(error.to_string().contains("/dev/nothing"), "{error}");
        node
    });
}

fn what_cannot_be_honoured_is_refused() {
    on_a_node(|node| async {
        let check = async |name: &str, request: v1::ContainerConfig, part: &str| {
            let error = output(&node, name, request).await.unwrap_err();
            assert!(error.to_string().contains(part), "{error}");
        };
        let apparmor = secured("true", |context| {
            context.apparmor =
                Some(v1::SecurityProfile { profile_type: ProfileType::Localhost.into(), localhost_ref: "mine".into() });
        });
        let reason =
            if sys::kernel::has_apparmor() { "apparmor profile not found mine" } else { "apparmor is not enabled" };
        check("apparmor", apparmor, reason).await;
        let user = secured("true", |context| context.run_as_username = "nosuch".into());
        check("user", user, "unable to find user nosuch").await;
        let mut cdi = secured("true", |_| {});
        cdi.cdi_devices = vec![v1::CdiDevice { name: "vendor.com/gpu=0".into() }];
        check("cdi", cdi, "vendor.com/gpu=0").await;
        let mut volume = secured("true", |_| {});
        let image = Some(v1::ImageSpec { image: "nowhere.test/none:1".into(), ..Default::default() });
        volume.mounts = vec![v1::Mount { container_path: "/v".into(), image, readonly: true, ..Default::default() }];
        check("volume", volume, "ImageVolumeMountFailed").await;
        node
    });
}
