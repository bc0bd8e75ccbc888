//! Real processes in real namespaces, on a busybox tree.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]

use std::io::Read as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::process::ExitCode;

use executor::oci::{self, Linux, Mount, Namespace, NamespaceKind, Process, Root, Spec};
use executor::{ExecFds, ExecOptions, HostFacts, LaunchFds, Launched, Stdio, Step};
use sys::process::{self, Exit};
use testkit::serial::Test;

#[path = "root/attacks.rs"]
mod attacks;

fn main() -> ExitCode {
    let missing = (!sys::rustix::process::geteuid().is_root()).then(|| "root".to_owned());
    testkit::serial::main(&[TESTS, attacks::TESTS].concat(), missing)
}

const TESTS: &[Test] = &[
    ("a_process_is_alone_in_its_container", alone),
    ("devices_links_masks_and_sysctls", tree),
    ("the_user_and_its_capabilities", user),
    ("binds_are_read_only_and_follow_no_link_out", binds),
    ("a_filter_of_the_default_profile_holds", filter),
    ("what_fails_is_named", failures),
    ("a_terminal_is_the_containers_own", terminal),
    ("exec_joins_what_the_container_has", exec),
    ("a_user_namespace_maps_root", user_namespace),
    ("a_shared_pid_namespace_is_joined", shared_pid),
    ("a_gate_holds_until_it_is_opened", gate),
    ("who_stops_a_new_process_holds_nobody_up", stopped),
    ("a_control_group_is_entered", control_group),
    ("only_allowed_devices_can_be_used", allowed_devices),
    ("a_volume_of_the_root_stays_writable", own_volume),
];

fn mount(destination: &str, kind: &str, options: &[&str]) -> Mount {
    let options = options.iter().map(|word| (*word).to_owned()).collect();
    Mount { destination: destination.into(), kind: kind.into(), options, ..Mount::default() }
}

fn bind(source: &Path, destination: &str, options: &[&str]) -> Mount {
    Mount { source: source.display().to_string(), ..mount(destination, "bind", &[&["rbind"], options].concat()) }
}

fn namespaces(kinds: &[NamespaceKind]) -> Vec<Namespace> {
    kinds.iter().map(|kind| Namespace { kind: *kind, path: String::new() }).collect()
}

/// A container that runs `script` in a shell.
fn spec(script: &str) -> Spec {
    use NamespaceKind::{Cgroup, Ipc, Mount, Network, Pid, Uts};
    let all = ["CHOWN", "KILL", "SETUID", "SETGID", "SYS_CHROOT", "MKNOD", "DAC_OVERRIDE"];
    let names: Vec<String> = all.iter().map(|name| format!("CAP_{name}")).collect();
    let capabilities = oci::Capabilities {
        bounding: names.clone(),
        effective: names.clone(),
        permitted: names,
        ..oci::Capabilities::default()
    };
    Spec {
        process: Some(Process {
            args: ["sh", "-c", script].map(str::to_owned).to_vec(),
            env: vec!["PATH=/bin".to_owned()],
            cwd: "/".to_owned(),
            capabilities: Some(capabilities),
            no_new_privileges: true,
            ..Process::default()
        }),
        root: Some(Root::default()),
        hostname: "inside".to_owned(),
        mounts: vec![
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        ],
        linux: Some(Linux {
            namespaces: namespaces(&[Mount, Pid, Network, Ipc, Uts, Cgroup]),
            masked_paths: vec!["/proc/keys".to_owned(), "/proc/acpi".to_owned(), "/sys/firmware".to_owned()],
            readonly_paths: vec!["/proc/sys".to_owned(), "/proc/nowhere".to_owned()],
            ..Linux::default()
        }),
        ..Spec::default()
    }
}

struct Tree {
    dir: tempfile::TempDir,
}

impl Tree {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        testkit::image::busybox_root(dir.path()).unwrap();
        Self { dir }
    }

    fn mount(&self) -> OwnedFd {
        sys::mount::copy_tree(self.dir.path(), false).unwrap()
    }
}

/// A container on its way.
struct Run {
    launched: Launched,
    output: std::io::PipeReader,
}

impl Run {
    fn end(mut self) -> (String, Exit) {
        let mut text = String::new();
        self.output.read_to_string(&mut text).unwrap();
        (text, process::reap(self.launched.child.pidfd.as_fd()).unwrap())
    }
}

fn start(tree: &Tree, spec: &Spec, mut fds: LaunchFds) -> Result<Run, executor::LaunchError> {
    let plan = executor::plan(spec, &HostFacts::read().unwrap()).unwrap();
    let plan = executor::LaunchPlan::decode(&plan.encode()).unwrap();
    fds.rootfs = Some(tree.mount());
    let user = fds.namespaces.iter().find(|(kind, _)| *kind == NamespaceKind::User).map(|(_, fd)| fd.as_fd());
    fds.mounts = executor::prepare::open_sources(&plan, user).unwrap();
    let (output, input) = std::io::pipe().unwrap();
    let stdio =
        Stdio::Streams { stdin: None, stdout: Some(input.try_clone().unwrap().into()), stderr: Some(input.into()) };
    executor::launch(&plan, fds, stdio).map(|launched| Run { launched, output })
}

/// What the script prints, and how it ends.
fn run(spec: &Spec) -> (String, Exit) {
    start(&Tree::new(), spec, LaunchFds::default()).unwrap().end()
}

fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

fn alone() {
    let (text, exit) =
        run(&spec("echo $$; hostname; ls /proc | grep -c '^[0-9]'; ls -A /; cat /proc/mounts | wc -l; exit 7"));
    let lines = lines(&text);
    assert_eq!(&lines[..2], ["1", "inside"], "{text}");
    assert!(lines.contains(&"bin") && !lines.contains(&"home"), "the root is the image's: {text}");
    assert_eq!(exit, Exit::Code(7));
}

fn tree() {
    let script = "ls -l /dev/null /dev/ptmx /dev/fd | wc -l; echo x > /dev/null && echo written; \
                  (echo 1 > /proc/sys/vm/drop_caches) 2>/dev/null || echo sealed; \
                  head -c 1 /proc/keys 2>/dev/null | wc -c; touch /sys/x 2>/dev/null || echo ro; cat /proc/sys/net/ipv4/ip_default_ttl";
    let mut spec = spec(script);
    spec.linux.as_mut().unwrap().sysctl.insert("net.ipv4.ip_default_ttl".into(), "17".into());
    let (text, exit) = run(&spec);
    assert_eq!(lines(&text), ["3", "written", "sealed", "0", "ro", "17"], "{text}");
    assert_eq!(exit, Exit::Code(0));
}

fn user() {
    let mut spec =
        spec("id -u; id -g; id -G; grep -E 'CapEff|NoNewPrivs' /proc/self/status | tr -d '\\t'; umask; ulimit -n; pwd");
    let process = spec.process.as_mut().unwrap();
    process.user = oci::User { uid: 1000, gid: 2000, additional_gids: vec![3000], umask: Some(0o077) };
    process.rlimits = vec![oci::Rlimit { kind: "RLIMIT_NOFILE".into(), soft: 100, hard: 200 }];
    process.cwd = "/made/by/launch".to_owned();
    process.capabilities.as_mut().unwrap().effective.clear();
    let (text, _) = run(&spec);
    let want =
        ["1000", "2000", "2000 3000", "CapEff:0000000000000000", "NoNewPrivs:1", "0077", "100", "/made/by/launch"];
    assert_eq!(lines(&text), want);
}

fn binds() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("file"), "data\n").unwrap();
    let tree = Tree::new();
    let escape = tempfile::tempdir().unwrap();
    std::os::unix::fs::symlink(escape.path(), tree.dir.path().join("link")).unwrap();
    let mut spec = spec("cat /data/file /one; touch /data/new 2>/dev/null || echo ro; ls /link");
    spec.mounts.push(bind(outside.path(), "/data", &["ro"]));
    spec.mounts.push(bind(&outside.path().join("file"), "/one", &["ro"]));
    spec.mounts.push(bind(outside.path(), "/link/deep", &[]));
    let (text, _) = match start(&tree, &spec, LaunchFds::default()) {
        Ok(run) => run.end(),
        // The link's destination is not in the image: nothing is made in its place on the host.
        Err(error) => {
            assert_eq!(error.step, Step::Mount);
            spec.mounts.pop();
            start(&tree, &spec, LaunchFds::default()).unwrap().end()
        }
    };
    assert!(text.starts_with("data\ndata\nro\n"), "{text}");
    assert_eq!(std::fs::read_dir(escape.path()).unwrap().count(), 0, "nothing was made through the link");
}

fn filter() {
    let mut spec = spec("unshare -U true 2>/dev/null || echo refused; mkdir /tmp/a && echo allowed");
    spec.linux.as_mut().unwrap().seccomp = Some(executor::seccomp::default_profile(&[]));
    assert_eq!(lines(&run(&spec).0), ["refused", "allowed"]);
}

fn failures() {
    let failure = |change: fn(&mut Spec)| {
        let mut spec = spec("true");
        change(&mut spec);
        start(&Tree::new(), &spec, LaunchFds::default()).map(|run| run.end()).unwrap_err()
    };
    let error = failure(|spec| spec.process.as_mut().unwrap().args = vec!["nothing".to_owned()]);
    assert_eq!((error.step, error.errno), (Step::Execute, 2), "{error}");
    assert!(error.to_string().contains("nothing: executable file in $PATH"), "{error}");
    let error = failure(|spec| spec.process.as_mut().unwrap().args = vec!["/proc/self/exe".to_owned()]);
    assert_eq!((error.step, error.errno), (Step::Execute, 40), "{error}");
    let error = failure(|spec| {
        spec.linux.as_mut().unwrap().sysctl.insert("net.no.such".into(), "1".into());
    });
    assert_eq!((error.step, error.errno), (Step::Sysctl, 2), "{error}");
    let error = failure(|spec| spec.mounts.push(mount("/x", "nofs", &[])));
    assert_eq!((error.step, error.errno), (Step::Filesystem, 19), "{error}");
}

fn terminal() {
    let tree = Tree::new();
    let mut spec = spec("tty; stty size; test -c /dev/console && echo console");
    spec.process.as_mut().unwrap().terminal = true;
    let plan = executor::plan(&spec, &HostFacts::read().unwrap()).unwrap();
    let fds = LaunchFds { rootfs: Some(tree.mount()), ..LaunchFds::default() };
    let launched = executor::launch(&plan, fds, Stdio::Terminal { rows: 33, columns: 99 }).unwrap();
    let mut master = std::fs::File::from(launched.terminal.unwrap());
    let (mut text, mut buffer) = (String::new(), [0; 256]);
    while let Ok(count @ 1..) = master.read(&mut buffer) {
        text.push_str(&String::from_utf8_lossy(&buffer[..count]));
    }
    assert_eq!(lines(&text), ["/dev/pts/0", "33 99", "console"]);
    process::reap(launched.child.pidfd.as_fd()).unwrap();
}

fn exec() {
    let tree = Tree::new();
    let spec = spec("echo up; sleep 1000");
    let mut run = start(&tree, &spec, LaunchFds::default()).unwrap();
    run.output.read_exact(&mut [0; 3]).unwrap();
    let facts = HostFacts::read().unwrap();
    let mut extra = spec.process.clone().unwrap();
    extra.args = ["sh", "-c", "hostname; ls /proc/1/root/bin/busybox; cat /proc/1/comm; id -u; exit 3"]
        .map(str::to_owned)
        .to_vec();
    extra.user.uid = 5;
    let plan = executor::exec_plan(&extra, ExecOptions { container: &spec, facts: &facts }).unwrap();
    let plan = executor::ExecPlan::decode(&plan.encode()).unwrap();
    let (mut output, input) = std::io::pipe().unwrap();
    let stdio = Stdio::Streams { stdin: None, stdout: Some(input.into()), stderr: None };
    let target = run.launched.child.pidfd.as_fd();
    let launched =
        executor::exec(&plan, ExecFds { target, cgroup: None, inherited: executor::Inherited::default() }, stdio)
            .unwrap();
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(process::reap(launched.child.pidfd.as_fd()).unwrap(), Exit::Code(3));
    assert_eq!(lines(&text), ["inside", "sleep", "5"], "root's links are closed to user 5");
    process::send_signal(target, 9).unwrap();
    assert_eq!(process::reap(target).unwrap(), Exit::Signal(9));
}

fn user_namespace() {
    let ids = vec![oci::IdMapping { container_id: 0, host_id: 100_000, size: 65536 }];
    let request = executor::namespaces::Request {
        kinds: vec![NamespaceKind::Network, NamespaceKind::Ipc, NamespaceKind::Uts],
        uids: ids.clone(),
        gids: ids,
        hostname: Some("mapped".to_owned()),
        sysctls: vec![("net.ipv4.ip_default_ttl".to_owned(), "19".to_owned())],
    };
    let made = executor::namespaces::create(&request, None).unwrap();
    let mut spec = spec(
        "id -u; hostname; cat /proc/self/uid_map | tr -s ' '; echo x > /dev/null && echo null; cat /proc/sys/net/ipv4/ip_default_ttl",
    );
    spec.hostname.clear();
    let linux = spec.linux.as_mut().unwrap();
    linux.namespaces = namespaces(&[NamespaceKind::Mount, NamespaceKind::Pid, NamespaceKind::Cgroup]);
    linux.namespaces.extend(made.iter().map(|(kind, _)| Namespace { kind: *kind, path: "/held".to_owned() }));
    let fds = LaunchFds { namespaces: made, ..LaunchFds::default() };
    let tree = Tree::new();
    let _ = sys::rustix::fs::chmod(tree.dir.path(), sys::rustix::fs::Mode::from_raw_mode(0o755));
    let (text, _) = start(&tree, &spec, fds).unwrap().end();
    assert_eq!(lines(&text), ["0", "mapped", " 0 100000 65536", "null", "19"], "{text}");
}

/// A mount namespace with nothing but an empty directory.
fn empty_mounts() -> OwnedFd {
    let setup = || {
        sys::mount::set_propagation(Path::new("/"), sys::mount::Propagation::Private, true)
            .and_then(|()| sys::mount::new_filesystem("tmpfs", &[], 0))
            .and_then(|tmpfs| {
                sys::mount::attach_at(tmpfs.as_fd(), Path::new("/proc"))?;
                sys::mount::pivot(tmpfs.as_fd())
            })
            .map_err(std::io::Error::other)
    };
    sys::mntns::create(setup).unwrap().0
}

/// Who may look into the first process of the shared namespace finds nothing there that the pod does not have.
fn shared_pid() {
    let request = executor::namespaces::Request { kinds: vec![NamespaceKind::Uts], ..Default::default() };
    let mut pod = executor::namespaces::create(&request, None).unwrap();
    pod.push((NamespaceKind::Mount, empty_mounts()));
    let reaper = executor::reaper::start(&pod, None).unwrap();
    let namespace = || (NamespaceKind::Pid, executor::namespaces::open(&reaper, NamespaceKind::Pid).unwrap());
    let mut spec = spec(
        "cat /proc/1/comm; test $$ -gt 1 && echo second; ls -A /proc/1/root /proc/1/cwd /proc/1/root/../..; ls /proc/1/fd; \
         grep -E '^(Uid|Cap|NoNewPrivs)' /proc/1/status | tr -d '\\t'; cat /proc/1/mountinfo | wc -l",
    );
    let capabilities = spec.process.as_mut().unwrap().capabilities.as_mut().unwrap();
    for set in [&mut capabilities.bounding, &mut capabilities.effective, &mut capabilities.permitted] {
        set.push("CAP_SYS_PTRACE".to_owned());
    }
    let linux = spec.linux.as_mut().unwrap();
    linux.namespaces.iter_mut().filter(|one| one.kind == NamespaceKind::Pid).for_each(|one| one.path = "/held".into());
    let fds = LaunchFds { namespaces: vec![namespace()], ..LaunchFds::default() };
    let (text, exit) = start(&Tree::new(), &spec, fds).unwrap().end();
    let none = "0000000000000000";
    let want = [
        "orlop-pause",
        "second",
        "/proc/1/cwd:",
        "",
        "/proc/1/root:",
        "",
        "/proc/1/root/../..:",
        "0",
        "1",
        "2",
        "Uid:65535655356553565535",
        &format!("CapInh:{none}"),
        &format!("CapPrm:{none}"),
        &format!("CapEff:{none}"),
        &format!("CapBnd:{none}"),
        &format!("CapAmb:{none}"),
        "NoNewPrivs:1",
        "1",
    ];
    assert_eq!(lines(&text), want);
    assert_eq!(exit, Exit::Code(0));
    let end = |reaper: process::Child| {
        process::send_signal(reaper.pidfd.as_fd(), 9).unwrap();
        assert_eq!(process::reap(reaper.pidfd.as_fd()).unwrap(), Exit::Signal(9));
    };
    end(reaper);

    let ids = vec![oci::IdMapping { container_id: 0, host_id: 100_000, size: 1000 }];
    let request = executor::namespaces::Request { uids: ids.clone(), gids: ids, ..request };
    let mut mapped = executor::namespaces::create(&request, None).unwrap();
    mapped.push((NamespaceKind::Mount, empty_mounts()));
    let reaper = executor::reaper::start(&mapped, None).unwrap();
    let status = std::fs::read_to_string(format!("/proc/{}/status", reaper.pid.as_raw_nonzero())).unwrap();
    assert!(status.contains(&format!("CapPrm:\t{none}")) && status.contains("Uid:\t100000\t"), "{status}");
    end(reaper);
    let error = executor::reaper::start(&[], None).unwrap_err();
    assert_eq!(error.step, Step::Descriptors, "{error}");
}

fn gate() {
    let tree = Tree::new();
    let spec = spec("echo opened");
    let mut plan = executor::plan(&spec, &HostFacts::read().unwrap()).unwrap();
    plan.gate = true;
    let (mut output, input) = std::io::pipe().unwrap();
    let stdio = Stdio::Streams { stdin: None, stdout: Some(input.into()), stderr: None };
    let fds = LaunchFds { rootfs: Some(tree.mount()), ..LaunchFds::default() };
    let launched = executor::launch(&plan, fds, stdio).unwrap();
    assert!(process::try_reap(launched.child.pidfd.as_fd()).unwrap().is_none(), "it waits");
    launched.gate.unwrap().open(executor::START_MAX).unwrap();
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    assert_eq!(text, "opened\n");
    process::reap(launched.child.pidfd.as_fd()).unwrap();
}

/// A process that somebody has stopped before it came to its program: here all of its control group.
fn stopped() {
    let hierarchy = sys::cgroup::Hierarchy::detect().unwrap();
    let group = hierarchy.group(format!("orlop-test-stopped-{}", std::process::id()));
    group.create().unwrap();
    let set = |frozen: bool| {
        let words = [
            ("freezer.state", if frozen { "FROZEN" } else { "THAWED" }),
            ("cgroup.freeze", if frozen { "1" } else { "0" }),
        ];
        let files = group.directories().into_iter().flat_map(|dir| words.map(|(file, word)| (dir.join(file), word)));
        let written = files.filter(|(file, _)| file.exists()).map(|(file, word)| std::fs::write(file, word).unwrap());
        assert_eq!(written.count(), 1, "there is one freezer");
    };
    set(true);
    let tree = Tree::new();
    let plan = executor::plan(&spec("true"), &HostFacts::read().unwrap()).unwrap();
    let fds = LaunchFds { rootfs: Some(tree.mount()), cgroup: Some(group.entry().unwrap()), ..LaunchFds::default() };
    let none = Stdio::Streams { stdin: None, stdout: None, stderr: None };
    let mut starting = executor::start(&plan, fds, none).unwrap();
    assert!(!starting.hear(), "it does not wait");
    let outcome = starting.give_up(sys::rustix::io::Errno::TIMEDOUT);
    let error = outcome.launched.unwrap_err();
    assert_eq!((error.step, error.errno), (Step::Waiting, 110), "{error}");
    set(false);
    let ends: Vec<Exit> = outcome.rest.iter().map(|child| process::reap(child.pidfd.as_fd()).unwrap()).collect();
    assert_eq!(ends, [Exit::Signal(9)]);
    group.delete().unwrap();
}

fn control_group() {
    let hierarchy = sys::cgroup::Hierarchy::detect().unwrap();
    let group = hierarchy.group(format!("orlop-test-executor-{}", std::process::id()));
    group.create().unwrap();
    group.set(&sys::cgroup::Limits { pids: Some(50), memory_bytes: Some(64 << 20), ..Default::default() }).unwrap();
    let mut spec = spec(
        "cat /proc/self/cgroup | grep -c ':/$'; cat /sys/fs/cgroup/pids/pids.max /sys/fs/cgroup/pids.max 2>/dev/null",
    );
    spec.mounts.push(mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]));
    let fds = LaunchFds { cgroup: Some(group.entry().unwrap()), ..LaunchFds::default() };
    let ended = start(&Tree::new(), &spec, fds).map(Run::end);
    group.delete().unwrap();
    let (text, _) = ended.unwrap();
    assert!(text.lines().any(|line| line == "50"), "{text}");
}

fn allowed_devices() {
    let hierarchy = sys::cgroup::Hierarchy::detect().unwrap();
    let group = hierarchy.group(format!("orlop-test-devices-{}", std::process::id()));
    group.create().unwrap();
    let denied = oci::DeviceRule { allow: false, access: "rwm".into(), ..oci::DeviceRule::default() };
    let resources = oci::Resources { devices: vec![denied], ..oci::Resources::default() };
    let rules = executor::device_rules(&resources).unwrap();
    let ended = group.allow_devices(&rules).map(|()| {
        // The kernel's log (1:11) is nobody's default device; zero (1:5) is everybody's.
        let script = "mknod /dev/log c 1 11; head -c1 /dev/zero | wc -c; head -c1 /dev/log 2>&1 | grep -c permitted";
        let fds = LaunchFds { cgroup: Some(group.entry().unwrap()), ..LaunchFds::default() };
        start(&Tree::new(), &spec(script), fds).map(Run::end)
    });
    group.delete().unwrap();
    let (text, _) = ended.unwrap().unwrap();
    assert_eq!(lines(&text), ["1", "1"], "{text}");
}

fn own_volume() {
    let tree = Tree::new();
    std::fs::create_dir(tree.dir.path().join("data")).unwrap();
    std::fs::write(tree.dir.path().join("data/file"), "image\n").unwrap();
    let mut spec = spec("cat /data/file; touch /data/new /fresh/new && echo rw; touch /new 2>/dev/null || echo ro");
    spec.root = Some(Root { readonly: true, ..Root::default() });
    spec.mounts.extend([mount("/data", "bind", &["rbind"]), mount("/fresh", "bind", &["rbind"])]);
    let (text, _) = start(&tree, &spec, LaunchFds::default()).unwrap().end();
    assert_eq!(lines(&text), ["image", "rw", "ro"]);
    assert!(tree.dir.path().join("data/new").exists(), "it is the root's own directory");
}
