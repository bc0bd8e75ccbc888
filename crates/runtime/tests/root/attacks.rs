//! Published attacks that begin with an image's configuration or files, or with a request. Each test has the number of the
//! first that went this way.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use cri::v1::security_profile::ProfileType;
use cri::{Error, RuntimeService as _, v1};
use serde_json::json;
use testkit::image::{append_dir, append_symlink, append_text};
use testkit::serial::Test;

use crate::fixture::{on_a_node, script_config};
use crate::requests::{image, image_with, of_image, output, secured};
use crate::streams::attach;

pub(crate) const TESTS: &[Test] = &[
    ("cve_2022_23648_a_volume_of_an_image_holds_nothing_of_the_host", volume_path),
    ("cve_2019_16884_a_volume_of_an_image_uncovers_nothing", volume_over_proc),
    ("cve_2022_31030_the_output_of_a_command_is_bounded", endless_output),
    ("cve_2025_64329_attaching_leaves_nothing_behind", attaching),
    ("cve_2024_40635_a_user_that_is_no_number_of_one_is_not_root", users),
    ("cve_2026_53488_a_label_of_an_image_starts_nothing", labels),
    ("cve_2026_53492_there_are_no_checkpoints", checkpoints),
    ("cve_2024_8676_an_image_is_no_checkpoint", checkpoint_image),
    ("cve_2026_47262_files_of_users_have_a_budget", user_files),
    ("cve_2022_0811_a_kernel_parameter_is_one_value", kernel_parameter),
    ("cve_2024_3154_annotations_change_nothing", annotations),
    ("cve_2024_5154_files_of_a_pod_stay_in_it", etc_by_link),
    ("cve_2023_2431_a_profile_without_a_name_is_refused", nameless_profile),
    ("a_log_is_in_the_directory_of_its_pod", log_path),
];

/// A directory of the host with a file of a secret text, and a program that leaves a trace if it is ever run.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("secret"), "the host's\n").unwrap();
        let program = dir.path().join("program");
        fs::write(&program, format!("#!/bin/sh\necho ran > {}/trace\n", dir.path().display())).unwrap();
        fs::set_permissions(program, fs::Permissions::from_mode(0o755)).unwrap();
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn text(&self, name: &str) -> String {
        self.path().join(name).display().to_string()
    }

    fn assert_untouched(&self) {
        let entries = fs::read_dir(self.path()).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| !name.starts_with("layout-"));
        names.sort();
        assert_eq!(names, ["program", "secret"]);
        assert_eq!(fs::read_to_string(self.path().join("secret")).unwrap(), "the host's\n");
    }
}

/// The content of a volume is the image's, also where its path leads up and out of it.
fn volume_path() {
    on_a_node(|node| async {
        let host = Host::new();
        let up = "/..".repeat(20);
        for (number, path) in [format!("{up}{}", host.path().display()), format!("/data{up}{}/", host.path().display())]
            .into_iter()
            .enumerate()
        {
            let config = json!({ "Env": ["PATH=/bin"], "Volumes": { path.as_str(): {} } });
            let name = image(&node, host.path(), &format!("volume{number}"), config).await;
            let script =
                format!("cat {0}/secret || echo nothing; touch {0}/new || echo not here", host.path().display());
            let request = of_image(&name, secured(&script, |_| {}));
            match output(&node, &format!("volume{number}"), request).await {
                Ok(lines) => assert!(lines.iter().any(|line| line == "nothing"), "{path}: {lines:?}"),
                Err(error) => assert!(matches!(error, Error::InvalidArgument(_)), "{path}: {error}"),
            }
            host.assert_untouched();
        }
        node
    });
}

/// A volume in the place of the kernel's file systems would take their masks away.
fn volume_over_proc() {
    on_a_node(|node| async {
        let host = Host::new();
        for (number, path) in ["/proc", "/proc/", "//proc/./", "/proc/self", "/sys", "/dev", "/"].iter().enumerate() {
            let config = json!({ "Env": ["PATH=/bin"], "Volumes": { *path: {} } });
            let name = image(&node, host.path(), &format!("cover{number}"), config).await;
            let script = "wc -c < /proc/version; (echo 1 > /proc/sys/net/ipv4/ip_forward) 2>/dev/null || echo ro; \
                          mkdir /sys/fs/cgroup/pids/x /sys/fs/cgroup/x 2>/dev/null || echo ro; stat -f -c %T /proc";
            let request = of_image(
                &name,
                secured(script, |context| {
                    context.masked_paths = vec!["/proc/version".into()];
                    context.readonly_paths = vec!["/proc/sys".into()];
                }),
            );
            match output(&node, &format!("cover{number}"), request).await {
                Ok(lines) => assert_eq!(lines, ["0", "ro", "ro", "proc"], "{path}"),
                Err(error) => println!("{path} is refused: {error}"),
            }
        }
        node
    });
}

/// The peak of this process's memory since the last call, in bytes.
fn peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    let kibibytes: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    fs::write("/proc/self/clear_refs", "5").unwrap();
    kibibytes << 10
}

/// CVE-2022-1708 too: what is beyond the bound is thrown away, and the command goes on.
fn endless_output() {
    on_a_node(|node| async {
        let pod = node.pod("talks", "sleep 1000").await;
        peak();
        let before = peak();
        let script = "dd if=/dev/zero bs=64k count=2000 2>/dev/null; echo over >&2; exit 3";
        let answer = node.exec(&pod.container, &["sh", "-c", script], 0).await.unwrap();
        assert_eq!((answer.exit_code, answer.stderr.as_slice()), (3, &b"over\n"[..]), "it came to its end");
        assert_eq!(answer.stdout.len(), 16 << 20);
        drop(answer);
        let error = node.exec(&pod.container, &["sh", "-c", "yes & exec yes >&2"], 1).await.unwrap_err();
        assert!(matches!(error, Error::DeadlineExceeded(_)), "{error}");
        let grown = peak().saturating_sub(before);
        assert!(grown < 96 << 20, "{} MiB for two streams of 16", grown >> 20);
        node
    });
}

/// How many tasks and descriptors this process has.
fn held() -> (usize, usize) {
    let tasks = tokio::runtime::Handle::current().metrics().num_alive_tasks();
    (tasks, fs::read_dir("/proc/self/fd").unwrap().count())
}

fn attaching() {
    on_a_node(|node| async {
        let pod = node.pod("attached", "sleep 1000").await;
        drop(attach(&node, &pod.container, (true, true, true)).await);
        // What is still ending of the first ones does not hide a leak of fifty.
        let begun = held();
        for _ in 0..50 {
            drop(attach(&node, &pod.container, (true, true, true)).await);
        }
        let settle = async {
            while held().0 > begun.0 + 5 || held().1 > begun.1 + 10 {
                tokio::task::yield_now().await;
            }
        };
        let settled = tokio::time::timeout(Duration::from_secs(60), settle).await;
        assert!(settled.is_ok(), "{:?} tasks and descriptors instead of {begun:?}", held());
        node
    });
}

fn users() {
    on_a_node(|node| async {
        let host = Host::new();
        let beyond = ["2147483648", "4294967295", "4294967296", "18446744073709551616", "-1", "0:4294967296", "1:-1"];
        for (number, user) in beyond.iter().enumerate() {
            let config = json!({ "Env": ["PATH=/bin"], "User": user });
            let name = image(&node, host.path(), &format!("user{number}"), config).await;
            let error =
                output(&node, &format!("user{number}"), of_image(&name, secured("id", |_| {}))).await.unwrap_err();
            assert!(error.to_string().contains("is not between 0 and 2147483647"), "{user}: {error}");
        }
        for (number, value) in [i64::from(i32::MAX) + 1, 1 << 32, -1].into_iter().enumerate() {
            let request = secured("id", |context| context.run_as_user = Some(v1::Int64Value { value }));
            let error = output(&node, &format!("number{number}"), request).await.unwrap_err();
            assert!(error.to_string().contains("is not between"), "{value}: {error}");
        }
        node
    });
}

/// Labels have become annotations, and annotations of a kind the URL of a program that writes the log.
fn labels() {
    on_a_node(|node| async {
        let host = Host::new();
        let url = format!("binary://{}", host.text("program"));
        let keys =
            ["io.containerd.runc.v2.log", "containerd.io/logger", "io.kubernetes.cri.log-path", "log_uri", "binary"];
        let labels: HashMap<&str, &str> = keys.into_iter().map(|key| (key, url.as_str())).collect();
        let config = json!({ "Env": ["PATH=/bin"], "Labels": labels });
        let name = image(&node, host.path(), "labels", config).await;
        let mut request = of_image(&name, secured("echo said", |_| {}));
        request.annotations = keys.into_iter().map(|key| (key.to_owned(), url.clone())).collect();
        assert_eq!(output(&node, "labels", request).await.unwrap(), ["said"]);
        host.assert_untouched();
        node
    });
}

/// CVE-2026-53489 and CVE-2026-50195 too: what a checkpoint says of mounts, devices and names is never read.
fn checkpoints() {
    on_a_node(|node| async {
        let pod = node.pod("fixed", "sleep 1000").await;
        let location = node.places.run.join("checkpoint.tar").display().to_string();
        let request = v1::CheckpointContainerRequest {
            container_id: pod.container.clone(),
            location: location.clone(),
            timeout: 0,
        };
        let error = node.runtime.checkpoint_container(request).await.unwrap_err();
        assert!(matches!(error, Error::Unimplemented { .. }), "{error}");
        assert!(!Path::new(&location).exists());
        let host = Host::new();
        let archive = host.text("secret");
        for name in [archive.clone(), format!("file://{archive}"), format!("checkpoint:{archive}")] {
            let error = output(&node, "restored", of_image(&name, secured("true", |_| {}))).await.unwrap_err();
            assert!(matches!(error, Error::NotFound { .. } | Error::InvalidArgument(_)), "{name}: {error}");
        }
        host.assert_untouched();
        node
    });
}

/// An image that says it is one is an image: what is run, and what is mounted, is in the request alone.
fn checkpoint_image() {
    on_a_node(|node| async {
        let host = Host::new();
        let mount = json!({ "destination": "/stolen", "type": "bind", "source": host.path(), "options": ["rbind"] });
        let dumped =
            json!({ "ociVersion": "1.2.0", "mounts": [mount], "process": { "args": ["cat", "/stolen/secret"] } });
        let labels = json!({ "org.criu.checkpoint.container.name": "main", "io.kubernetes.cri-o.annotations.checkpoint.name": "main" });
        let config = json!({ "Env": ["PATH=/bin"], "Labels": labels });
        let layer = |tar: &mut testkit::image::Layer<'_>| {
            append_text(tar, "spec.dump", &dumped.to_string())?;
            append_text(tar, "config.dump", r#"{"id":"x","rootfsImageName":"other"}"#)?;
            append_dir(tar, "checkpoint", 0o755)?;
            append_text(tar, "checkpoint/inventory.img", "")
        };
        let name = image_with(&node, host.path(), "checkpoint", config, layer).await;
        let request = of_image(&name, secured("test -e /stolen || echo mine alone", |_| {}));
        assert_eq!(output(&node, "checkpoint", request).await.unwrap(), ["mine alone"]);
        host.assert_untouched();
        node
    });
}

/// The files in which users and groups are looked up are the image's: they are neither endless nor anything but files.
fn user_files() {
    on_a_node(|node| async {
        let dir = tempfile::tempdir().unwrap();
        let long = "many:x:5:".to_owned() + &"web,".repeat(3 << 20);
        let special = |kind: tar::EntryType, path: &'static str| {
            move |tar: &mut testkit::image::Layer<'_>| {
                let mut header = tar::Header::new_gnu();
                header.set_entry_type(kind);
                header.set_mode(0o644);
                header.set_size(0);
                header.set_device_major(1)?;
                header.set_device_minor(5)?;
                Ok(tar.append_data(&mut header, path, std::io::empty())?)
            }
        };
        type Fill = Box<dyn FnOnce(&mut testkit::image::Layer<'_>) -> anyhow::Result<()>>;
        let cases: [(&str, Fill, &str); 6] = [
            ("long", Box::new(move |tar| append_text(tar, "etc/group", &long)), "is longer than"),
            ("zero", Box::new(special(tar::EntryType::Char, "etc/group")), "is not a regular file"),
            ("pipe", Box::new(special(tar::EntryType::Fifo, "etc/passwd")), "is not a regular file"),
            ("self", Box::new(|tar| append_symlink(tar, "etc/group", "group")), "symbolic links"),
            ("host", Box::new(|tar| append_symlink(tar, "etc/passwd", "/proc/self/root/etc/passwd")), "find user root"),
            ("up", Box::new(|tar| append_symlink(tar, "etc/passwd", "../../../../../../etc/shadow")), "find user root"),
        ];
        for (name, fill, words) in cases {
            let config = json!({ "Env": ["PATH=/bin"], "User": "root" });
            let image = image_with(&node, dir.path(), name, config, fill).await;
            let error = output(&node, name, of_image(&image, secured("id", |_| {}))).await.unwrap_err();
            assert!(error.to_string().contains(words), "{name}: {error}");
        }
        node
    });
}

/// A helper took what follows a "+" for the next parameter, one of the host's.
fn kernel_parameter() {
    on_a_node(|node| async {
        let pattern = || fs::read_to_string("/proc/sys/kernel/core_pattern").unwrap();
        let before = pattern();
        let host = Host::new();
        let value = format!("1+kernel.core_pattern=|{} #", host.text("program"));
        let cases = [
            ("kernel.shm_rmid_forced", value.as_str()),
            ("kernel.shm_rmid_forced+kernel.core_pattern", "|/bin/true"),
            ("net/../kernel/core_pattern", "|/bin/true"),
            ("net.core.somaxconn\nkernel.core_pattern", "|/bin/true"),
            ("kernel.core_pattern", "|/bin/true"),
        ];
        for (number, (name, value)) in cases.into_iter().enumerate() {
            let mut config = node.sandbox_config(&format!("parameter{number}"));
            let sysctls = HashMap::from([(name.to_owned(), value.to_owned())]);
            config.linux = Some(v1::LinuxPodSandboxConfig { sysctls, ..Default::default() });
            let made = node.run_sandbox(&config).await;
            assert!(made.is_err(), "{name}={value} was taken");
            assert_eq!(pattern(), before);
        }
        host.assert_untouched();
        node
    });
}

/// They have become properties of a systemd unit, hooks, mounts and devices.
fn annotations() {
    on_a_node(|node| async {
        let host = Host::new();
        let program = host.text("program");
        let hostile = HashMap::from(
            [
                ("org.systemd.property.ExecStartPre", format!("['{program}']")),
                ("org.systemd.property.DevicePolicy", "'auto'".to_owned()),
                ("run.oci.hooks.stderr", program.clone()),
                ("run.oci.handler", "krun".to_owned()),
                ("io.kubernetes.cri-o.userns-mode", "auto".to_owned()),
                ("io.kubernetes.cri-o.Devices", "/dev/kmsg".to_owned()),
                ("io.kubernetes.cri-o.seccompNotifierAction", "stop".to_owned()),
                ("seccomp.security.alpha.kubernetes.io/pod", "unconfined".to_owned()),
                ("container.apparmor.security.beta.kubernetes.io/main", "unconfined".to_owned()),
            ]
            .map(|(key, value)| (key.to_owned(), value)),
        );
        let script = "grep -E '^Seccomp:' /proc/self/status; test -e /dev/kmsg || echo no kmsg; cat /proc/self/uid_map | tr -s ' '";
        let request = secured(script, |context| context.seccomp = Some(v1::SecurityProfile::default()));
        let plain = output(&node, "plain", request.clone()).await.unwrap();
        let mut config = node.sandbox_config("annotated");
        config.annotations = hostile.clone();
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let request = v1::ContainerConfig { annotations: hostile, ..request };
        let container = node.create(&sandbox, &config, request).await.unwrap();
        node.start_container(&container).await.unwrap();
        node.exited(&container).await;
        let lines: Vec<_> = node.log("annotated").iter().map(|line| line.replace("stdout F ", "")).collect();
        assert_eq!(lines, plain);
        assert_eq!(lines[0], "Seccomp:\t2");
        host.assert_untouched();
        node
    });
}

/// `/etc/hosts`, `/etc/hostname`, `/etc/resolv.conf` and `/etc/mtab` by an `/etc` that leads to the host.
fn etc_by_link() {
    on_a_node(|node| async {
        let host = Host::new();
        for (number, target) in [host.path().display().to_string(), format!("../../../../..{}", host.path().display())]
            .into_iter()
            .enumerate()
        {
            let name = format!("etc{number}");
            let layer = |tar: &mut testkit::image::Layer<'_>| append_symlink(tar, "etc", &target);
            let image = image_with(&node, host.path(), &name, json!({ "Env": ["PATH=/bin"] }), layer).await;
            let started = output(&node, &name, of_image(&image, secured("true", |_| {}))).await;
            println!("{target}: {started:?}");
            host.assert_untouched();
        }
        node
    });
}

/// An empty name has meant no profile at all.
fn nameless_profile() {
    on_a_node(|node| async {
        let nameless =
            || Some(v1::SecurityProfile { profile_type: ProfileType::Localhost.into(), ..Default::default() });
        let seccomp = secured("true", |context| context.seccomp = nameless());
        let apparmor = secured("true", |context| context.apparmor = nameless());
        #[expect(deprecated, reason = "older kubelets send it")]
        let old = secured("true", |context| context.seccomp_profile_path = "localhost/".to_owned());
        let absent = secured("true", |context| {
            context.seccomp = Some(v1::SecurityProfile {
                profile_type: ProfileType::Localhost.into(),
                localhost_ref: "/nowhere/profile.json".into(),
            });
        });
        for (name, request) in [("seccomp", seccomp), ("apparmor", apparmor), ("old", old), ("absent", absent)] {
            let error = output(&node, name, request).await.expect_err(name);
            println!("{name}: {error}");
        }
        node
    });
}

/// The path of a container's log is below the directory of its pod, as the kubelet has it.
fn log_path() {
    on_a_node(|node| async {
        let host = Host::new();
        let config = node.sandbox_config("logs");
        let sandbox = node.run_sandbox(&config).await.unwrap();
        let up = "../".repeat(20);
        for path in [host.text("secret"), format!("{up}{}", host.text("secret")), "main/..".to_owned(), "..".to_owned()]
        {
            let request = v1::ContainerConfig { log_path: path.clone(), ..script_config("main", "true") };
            let error = node.create(&sandbox, &config, request).await.unwrap_err();
            assert!(error.to_string().contains("log_path"), "{path}: {error}");
        }
        host.assert_untouched();
        node
    });
}
