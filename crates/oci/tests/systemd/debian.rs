//! A Debian whose first process is systemd, in a container of this runtime.

use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use sys::process::namespace;
use sys::rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Where the virtual machine has the files of the root, and runc.
const IN_MACHINE: &str = "/jobs";

/// Longest time for a boot with its script: without acceleration by hardware it takes a hundred times as long.
const LIMIT: Duration = Duration::from_secs(400);

/// Fetches what is needed while there is a network: the root, and runc.
pub(crate) fn fetch() -> anyhow::Result<(PathBuf, PathBuf)> {
    let disk = Path::new(IN_MACHINE).join(testkit::debian::MANAGED_DISK);
    if disk.exists() {
        return Ok((disk, Path::new(IN_MACHINE).join("runc")));
    }
    Ok((testkit::debian::managed()?, testkit::go::build(&testkit::go::RUNC)?))
}

/// A root with systemd, for one test; nothing of it remains.
pub(crate) struct Lab {
    dir: tempfile::TempDir,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let (root, reference) = fetch().unwrap();
        // What is mounted goes with this process.
        sys::process::leave(namespace::MOUNT).unwrap();
        sys::mount::set_propagation(Path::new("/"), sys::mount::Propagation::Private, true).unwrap();
        let dir = tempfile::tempdir().unwrap();
        for name in ["lower", "layers", "rootfs"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let lab = Self { dir };
        let lower = if root.is_dir() { root } else { lab.loop_mounted(&root) };
        lab.overlay(&lower);
        let files = lab.inside("/lab");
        std::fs::create_dir_all(&files).unwrap();
        std::fs::copy(std::env::current_exe().unwrap(), files.join("runc")).unwrap();
        std::fs::copy(reference, files.join("reference")).unwrap();
        lab.add_user();
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A path of the Debian.
    pub(crate) fn inside(&self, path: &str) -> PathBuf {
        self.path("rootfs").join(path.trim_start_matches('/'))
    }

    fn loop_mounted(&self, disk: &Path) -> PathBuf {
        let lower = self.path("lower");
        let mounted = Command::new("mount").args(["-o", "loop,ro"]).arg(disk).arg(&lower).status().unwrap();
        assert!(mounted.success());
        lower
    }

    fn overlay(&self, lower: &Path) {
        let attach = |mount: std::os::fd::OwnedFd, at: &Path| sys::mount::attach_at(mount.as_fd(), at).unwrap();
        let layers = self.path("layers");
        attach(sys::mount::new_filesystem("tmpfs", &[("mode", Some("755"))], 0).unwrap(), &layers);
        let (upper, work) = (layers.join("upper"), layers.join("work"));
        std::fs::create_dir(&upper).unwrap();
        std::fs::create_dir(&work).unwrap();
        let text = |path: &Path| path.to_str().unwrap().to_owned();
        let (lower, upper, work) = (text(lower), text(&upper), text(&work));
        let options = [("lowerdir", Some(lower.as_str())), ("upperdir", Some(&upper)), ("workdir", Some(&work))];
        attach(sys::mount::new_filesystem("overlay", &options, 0).unwrap(), &self.path("rootfs"));
    }

    fn add_user(&self) {
        let append = |file: &str, line: &str| {
            let path = self.inside(file);
            let text = std::fs::read_to_string(&path).unwrap_or_default();
            std::fs::write(path, format!("{text}{line}\n")).unwrap();
        };
        append("/etc/passwd", "lab:x:1000:1000::/home/lab:/bin/sh");
        append("/etc/shadow", "lab:*:19000:0:99999:7:::");
        append("/etc/group", "lab:x:1000:");
        append("/etc/subuid", "lab:100000:65536");
        append("/etc/subgid", "lab:100000:65536");
        std::fs::create_dir_all(self.inside("/home/lab")).unwrap();
        std::os::unix::fs::chown(self.inside("/home/lab"), Some(1000), Some(1000)).unwrap();
    }

    /// A bundle of a busybox in it, with the plain configuration but for what `change` says.
    pub(crate) fn bundle(&self, name: &str, at: &str, change: impl FnOnce(&mut Value)) {
        let dir = self.inside(at);
        std::fs::create_dir_all(dir.join("rootfs")).unwrap();
        testkit::image::busybox_root(&dir.join("rootfs")).unwrap();
        let mut spec = plain(&dir);
        spec["linux"]["cgroupsPath"] = format!("lab.slice:orlop:{name}").into();
        change(&mut spec);
        std::fs::write(dir.join("config.json"), spec.to_string()).unwrap();
        if at.starts_with("/home/lab") {
            let owned = Command::new("chown").args(["-R", "1000:1000"]).arg(&dir).status().unwrap();
            assert!(owned.success());
        }
    }

    /// An archive of a busybox for `podman import`, at `/lab/bb.tar`.
    pub(crate) fn busybox_archive(&self) {
        let root = self.path("busybox");
        std::fs::create_dir(&root).unwrap();
        testkit::image::busybox_root(&root).unwrap();
        let tar = Command::new("tar").arg("-C").arg(&root).arg("-cf").arg(self.inside("/lab/bb.tar")).arg(".").status();
        assert!(tar.unwrap().success());
    }

    /// Boots, runs a script when the system is up, and ends; what the script says.
    pub(crate) fn run(&self, name: &str, script: &str) -> String {
        let unit = "[Unit]\nSuccessAction=exit-force\nFailureAction=exit-force\nAfter=dbus.socket systemd-logind.service\n\
                    Wants=dbus.socket systemd-logind.service\n\
                    [Service]\nType=oneshot\nExecStart=/bin/bash /lab/script\nStandardOutput=file:/lab/out\n\
                    StandardError=file:/lab/errors\nDelegate=yes\n";
        std::fs::write(self.inside("/etc/systemd/system/lab.service"), unit).unwrap();
        std::fs::write(self.inside("/lab/script"), format!("set -x\n{script}")).unwrap();
        for file in ["/lab/out", "/lab/errors"] {
            let _ = std::fs::remove_file(self.inside(file)); // Of the script before.
        }
        let console = self.boot(name);
        let read = |file: &str| std::fs::read_to_string(self.inside(file)).unwrap_or_default();
        let tail = |text: String| {
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(80)..].join("\n")
        };
        println!("{}\n{}", tail(console), tail(read("/lab/errors")));
        read("/lab/out")
    }

    /// Its container, from the beginning to the end; what systemd has said.
    fn boot(&self, name: &str) -> String {
        std::fs::write(self.path("config.json"), machine(name).to_string()).unwrap();
        let console = std::fs::File::create(self.path("console")).unwrap();
        let mut run = Command::new(std::env::current_exe().unwrap());
        run.arg0("runc").arg("--root").arg(self.path("state")).args(["run", "--bundle"]).arg(self.dir.path());
        run.arg(id(name)).stdin(Stdio::null()).stdout(console.try_clone().unwrap()).stderr(console);
        let mut run = run.spawn().unwrap();
        let pid = sys::rustix::process::Pid::from_child(&run);
        let ends = sys::process::pidfd_open(pid).unwrap();
        let limit = Timespec::try_from(LIMIT).unwrap();
        let in_time = poll(&mut [PollFd::new(&ends, PollFlags::IN)], Some(&limit)).unwrap() == 1;
        if !in_time {
            self.delete(name);
        }
        run.wait().unwrap();
        let said = std::fs::read_to_string(self.path("console")).unwrap();
        assert!(in_time, "{name} has not ended:\n{said}");
        said
    }

    fn delete(&self, name: &str) {
        let mut delete = Command::new(std::env::current_exe().unwrap());
        delete.arg0("runc").arg("--root").arg(self.path("state")).args(["delete", "--force", &id(name)]);
        assert!(delete.status().unwrap().success());
    }
}

fn id(name: &str) -> String {
    format!("orlop-test-systemd-{name}-{}", std::process::id())
}

/// The runtime's own configuration to begin with.
fn plain(dir: &Path) -> Value {
    let mut spec = Command::new(std::env::current_exe().unwrap());
    assert!(spec.arg0("runc").args(["spec", "--bundle"]).arg(dir).status().unwrap().success());
    let mut spec: Value = serde_json::from_slice(&std::fs::read(dir.join("config.json")).unwrap()).unwrap();
    std::fs::remove_file(dir.join("config.json")).unwrap();
    spec["process"]["terminal"] = false.into();
    spec
}

/// As `spec --rootless` has it.
pub(crate) fn without_root(spec: &mut Value, id: u32) {
    let linux = &mut spec["linux"];
    linux["namespaces"].as_array_mut().unwrap().retain(|one| one["type"] != "network");
    linux["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
    linux["uidMappings"] = json!([{ "containerID": 0, "hostID": id, "size": 1 }]);
    linux["gidMappings"] = json!([{ "containerID": 0, "hostID": id, "size": 1 }]);
    for mount in spec["mounts"].as_array_mut().unwrap() {
        if let Some(options) = mount["options"].as_array_mut() {
            options.retain(|option| option != "gid=5");
        }
        if mount["destination"] == "/sys" {
            *mount = json!({ "destination": "/sys", "type": "none", "source": "/sys",
                "options": ["rbind", "nosuid", "noexec", "nodev", "ro"] });
        }
    }
}

/// A machine of containers: all rights within namespaces of its own, its tree of control groups, nothing covered.
fn machine(name: &str) -> Value {
    let all: Vec<String> = sys::caps::names(sys::caps::bounding()).into_iter().collect();
    let namespaces = ["pid", "mount", "ipc", "uts", "network", "cgroup"].map(|kind| json!({ "type": kind }));
    let mount = |at: &str, kind: &str, options: &[&str]| json!({ "destination": at, "type": kind, "source": kind, "options": options });
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "args": ["/lib/systemd/systemd", "--unit=lab.service", "--log-target=console", "--show-status=no"],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "container=oci"],
            "cwd": "/",
            "user": { "uid": 0, "gid": 0 },
            "capabilities": { "bounding": all, "effective": all, "permitted": all },
        },
        "root": { "path": "rootfs" },
        "hostname": "lab",
        "mounts": [
            mount("/proc", "proc", &[]),
            mount("/dev", "tmpfs", &["mode=755"]),
            mount("/dev/pts", "devpts", &["newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", &["mode=1777"]),
            mount("/dev/mqueue", "mqueue", &[]),
            mount("/sys", "sysfs", &["ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["rw"]),
            mount("/run", "tmpfs", &["mode=755"]),
            mount("/tmp", "tmpfs", &["mode=1777"]),
        ],
        "linux": {
            "cgroupsPath": format!("/{}", id(name)),
            "namespaces": namespaces,
            "resources": { "devices": [{ "allow": true, "access": "rwm" }] },
        },
    })
}
