//! Published attacks on runtimes that begin with an image, a volume or a specification. Each test has the number of the
//! first that went this way.

use std::fs;
use std::io::Read as _;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use executor::oci::Spec;
use executor::{ExecFds, ExecOptions, HostFacts, LaunchError, LaunchFds, Launched, Stdio, Step};
use sys::process;
use sys::rustix::fs::{CWD, RenameFlags, renameat_with};
use testkit::serial::Test;

use super::{Run, Tree, bind, lines, mount, spec, start};

pub(super) const TESTS: &[Test] = &[
    ("cve_2019_5736_a_script_reaches_no_descriptor_of_the_launcher", inherited),
    ("cve_2024_21626_no_working_directory_is_a_descriptor_of_the_launcher", working_directory),
    ("cve_2025_31133_a_mask_is_not_what_the_image_calls_null", masks),
    ("cve_2025_52565_a_terminal_is_opened_on_a_devpts_only", false_devpts),
    ("cve_2025_52881_a_kernel_parameter_is_written_where_it_is", kernel_parameter),
    ("cve_2019_19921_a_proc_that_is_a_link_is_refused", proc_by_link),
    ("cve_2023_27561_a_proc_that_is_a_link_into_a_volume_is_refused", proc_in_volume),
    ("cve_2023_28642_a_sys_that_is_a_link_is_refused", sys_by_link),
    ("cve_2021_30465_a_volume_that_changes_while_it_is_mounted_on", mounting_race),
    ("cve_2024_45310_a_mount_point_is_made_in_no_other_tree", making_race),
    ("cve_2026_41579_an_image_whose_dev_is_a_link", dev_by_link),
    ("cve_2026_88264_an_image_whose_console_is_a_link", console_by_link),
    ("cve_2026_88265_an_image_whose_null_is_a_link", null_by_link),
    ("cve_2025_24965_nothing_is_written_into_an_image", note_in_image),
    ("cve_2022_29162_nothing_is_inheritable", inheritable),
    ("links_of_an_image_lay_no_volume_over_the_root", volume_over_root),
    ("a_link_in_a_volume_chooses_no_place", link_in_volume),
];

/// How often a race is run.
const TRIES: usize = 30;

/// A container that is started in vain.
fn refused(prepare: impl FnOnce(&Path), change: impl FnOnce(&mut Spec)) -> LaunchError {
    let tree = Tree::new();
    prepare(tree.dir.path());
    let mut spec = spec("true");
    change(&mut spec);
    start(&tree, &spec, LaunchFds::default()).map(Run::end).unwrap_err()
}

/// A directory of the host with a file, in which nothing may change.
struct Host(tempfile::TempDir);

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("victim"), "the host's").unwrap();
        Self(dir)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn victim(&self) -> PathBuf {
        self.path().join("victim")
    }

    fn assert_untouched(&self) {
        let names: Vec<_> = fs::read_dir(self.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["victim"]);
        assert_eq!(fs::read_to_string(self.victim()).unwrap(), "the host's");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(self.path().to_str().unwrap()), "something is mounted there: {mounts}");
    }

    /// A link to `target` in this directory that leads here also from deep inside of another tree.
    fn up_to(target: &Path) -> PathBuf {
        Path::new("../../../../../../../../../..").join(target.strip_prefix("/").unwrap())
    }
}

/// The kernel opens the interpreter of a script before it closes descriptors that are closed on exec: one of a directory of
/// the host's would lead to the host's programs, and by `/proc/<pid>/exe` to their files.
fn inherited() {
    let tree = Tree::new();
    let host = fs::File::open(tree.dir.path()).unwrap();
    let interpreter = format!("/proc/self/fd/{}/bin/sh", host.as_raw_fd());
    let script = |name: &str, first: &str| {
        let path = tree.dir.path().join(name);
        fs::write(&path, format!("#!{first}\necho reached\n")).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    script("plain", "/bin/sh");
    script("hostile", &interpreter);
    let mut spec = spec("");
    let mut of = |program: &str| {
        spec.process.as_mut().unwrap().args = vec![program.to_owned()];
        start(&tree, &spec, LaunchFds::default())
    };
    assert_eq!(of("/plain").unwrap().end().0, "reached\n");
    let error = of("/hostile").map(Run::end).unwrap_err();
    assert_eq!((error.step, error.errno), (Step::Execute, 2), "{error}");

    spec.process.as_mut().unwrap().args = ["sleep", "1000"].map(str::to_owned).to_vec();
    let run = start(&tree, &spec, LaunchFds::default()).unwrap();
    let error = exec(&run, &spec, |process| process.args = vec!["/hostile".to_owned()]).unwrap_err();
    assert_eq!((error.step, error.errno), (Step::Execute, 2), "{error}");
    end(run);
}

/// Runs another process in a container.
fn exec(
    run: &Run,
    spec: &Spec,
    change: impl FnOnce(&mut executor::oci::Process),
) -> Result<Launched, executor::LaunchError> {
    let mut process = spec.process.clone().unwrap();
    change(&mut process);
    let facts = HostFacts::read().unwrap();
    let plan = executor::exec_plan(&process, ExecOptions { container: spec, facts: &facts }).unwrap();
    let target = run.launched.child.pidfd.as_fd();
    let stdio = match process.terminal {
        true => Stdio::Terminal { rows: 0, columns: 0 },
        false => Stdio::Streams { stdin: None, stdout: None, stderr: None },
    };
    executor::exec(&plan, ExecFds { target, cgroup: None, inherited: executor::Inherited::default() }, stdio)
}

fn end(run: Run) {
    process::send_signal(run.launched.child.pidfd.as_fd(), 9).unwrap();
    run.end();
}

/// A descriptor of the host's that the launcher may hold would be a working directory outside of the container.
fn working_directory() {
    let tree = Tree::new();
    let link = |number| symlink(format!("/proc/self/fd/{number}"), tree.dir.path().join(format!("to{number}")));
    (0..20).try_for_each(link).unwrap();
    let mut spec = spec("echo up; sleep 1000");
    let mut run = start(&tree, &spec, LaunchFds::default()).unwrap();
    run.output.read_exact(&mut [0; 3]).unwrap();
    for number in 0..20 {
        for cwd in [format!("/proc/self/fd/{number}"), format!("/to{number}"), format!("/proc/1/fd/{number}/..")] {
            let error = exec(&run, &spec, |process| process.cwd.clone_from(&cwd)).unwrap_err();
            assert_eq!(error.step, Step::WorkingDirectory, "{cwd}: {error}");
            spec.process.as_mut().unwrap().cwd.clone_from(&cwd);
            let error = start(&tree, &spec, LaunchFds::default()).map(Run::end).unwrap_err();
            assert_eq!(error.step, Step::WorkingDirectory, "{cwd}: {error}");
        }
    }
    end(run);
}

/// What covers a masked file is the host's `/dev/null`, whatever the image has at this name.
fn masks() {
    let tree = Tree::new();
    fs::write(tree.dir.path().join("secret"), "to be masked").unwrap();
    fs::create_dir_all(tree.dir.path().join("dev")).unwrap();
    symlink("/secret", tree.dir.path().join("dev/null")).unwrap();
    let mut spec = spec("stat -c %t:%T /secret; stat -c %t:%T /proc/keys");
    spec.mounts.retain(|one| one.destination != "/dev");
    spec.linux.as_mut().unwrap().masked_paths.push("/secret".to_owned());
    let (text, _) = start(&tree, &spec, LaunchFds::default()).unwrap().end();
    assert_eq!(lines(&text), ["1:3", "1:3"]);
}

/// A container may put anything in the place of its terminals.
fn false_devpts() {
    let tree = Tree::new();
    let mut spec = spec("mkdir /dev/pts; echo > /dev/pts/ptmx; echo up; sleep 1000");
    spec.mounts.retain(|one| one.kind != "devpts");
    let mut run = start(&tree, &spec, LaunchFds::default()).unwrap();
    run.output.read_exact(&mut [0; 3]).unwrap();
    let error = exec(&run, &spec, |process| process.terminal = true).unwrap_err();
    assert_eq!((error.step, error.errno), (Step::Terminal, 19), "{error}");
    end(run);
}

/// Mounts of the specification cover the parameter's file with one of the host's; it is not written.
fn kernel_parameter() {
    let host = Host::new();
    let mut spec = spec("cat /again/sys/net/ipv4/ip_default_ttl /proc/sys/net/ipv4/ip_default_ttl");
    spec.linux.as_mut().unwrap().sysctl.insert("net.ipv4.ip_default_ttl".into(), "17".into());
    spec.linux.as_mut().unwrap().readonly_paths.clear();
    spec.mounts.push(mount("/again", "proc", &[]));
    spec.mounts.push(bind(&host.victim(), "/proc/sys/net/ipv4/ip_default_ttl", &[]));
    let (text, _) = start(&Tree::new(), &spec, LaunchFds::default()).unwrap().end();
    assert_eq!(text, "17\nthe host's");
    host.assert_untouched();
}

fn assert_is_link(error: &LaunchError) {
    assert_eq!((error.step, error.errno), (Step::Mount, 40), "{error}");
    assert!(error.to_string().contains("symbolic link"), "{error}");
}

/// Replaces a directory of an image by a link.
fn link_instead(root: &Path, name: &str, target: &Path) {
    let _ = fs::remove_dir(root.join(name)); // It need not be there.
    symlink(target, root.join(name)).unwrap();
}

/// The masks would lie elsewhere than what they are to protect from.
fn proc_by_link() {
    for target in ["/real", "real", "../real"] {
        let prepare = |root: &Path| {
            fs::create_dir(root.join("real")).unwrap();
            link_instead(root, "proc", Path::new(target));
        };
        assert_is_link(&refused(prepare, |_| {}));
    }
}

fn proc_in_volume() {
    let volume = tempfile::tempdir().unwrap();
    fs::create_dir_all(volume.path().join("proc/self")).unwrap();
    let prepare = |root: &Path| link_instead(root, "proc", Path::new("/vol/proc"));
    assert_is_link(&refused(prepare, |spec| spec.mounts.insert(0, bind(volume.path(), "/vol", &[]))));
    let left: Vec<_> = fs::read_dir(volume.path().join("proc")).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
}

fn sys_by_link() {
    let prepare = |root: &Path| {
        fs::create_dir(root.join("real")).unwrap();
        link_instead(root, "sys", Path::new("/real"));
    };
    assert_is_link(&refused(prepare, |_| {}));
}

/// Starts a container again and again with a mount at `at` in a volume, in which somebody exchanges a directory and a link
/// to the host all the time.
fn race(host: &Host, target: &Path, at: &str) {
    let volume = tempfile::tempdir().unwrap();
    let (directory, link) = (volume.path().join("sub"), volume.path().join("link"));
    fs::create_dir(&directory).unwrap();
    symlink(target, &link).unwrap();
    let mut spec = spec("cat /proc/self/mountinfo");
    spec.mounts.push(bind(volume.path(), "/vol", &[]));
    spec.mounts.push(mount(at, "tmpfs", &[]));
    let tree = Tree::new();
    // The launcher has one thread; the attacker is another process, as it would be.
    let attacker = process::spawn(&process::Clone::default(), || {
        process::set_parent_death_signal(Some(sys::rustix::process::Signal::KILL)).unwrap();
        loop {
            let _ = renameat_with(CWD, &directory, CWD, &link, RenameFlags::EXCHANGE);
        }
    })
    .unwrap();
    // The directory was found, and the link was, which leads elsewhere in the container: else nobody was in the race.
    let (mut there, mut elsewhere, mut refusals) = (0, 0, 0);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    while there + elsewhere + refusals < TRIES || there == 0 || elsewhere == 0 {
        match start(&tree, &spec, LaunchFds::default()) {
            Ok(run) => match run.end().0.lines().any(|line| line.split(' ').nth(4) == Some(at)) {
                true => there += 1,
                false => elsewhere += 1,
            },
            Err(error) => {
                assert_eq!(error.step, Step::Mount, "{error}");
                refusals += 1;
            }
        }
        let outcomes = format!("{there} times in the volume, {elsewhere} elsewhere, {refusals} refusals");
        assert!(std::time::Instant::now() < deadline, "{outcomes}");
    }
    process::send_signal(attacker.pidfd.as_fd(), 9).unwrap();
    process::reap(attacker.pidfd.as_fd()).unwrap();
    host.assert_untouched();
}

fn mounting_race() {
    let host = Host::new();
    race(&host, host.path(), "/vol/sub");
    race(&host, &Host::up_to(host.path()), "/vol/sub");
}

fn making_race() {
    let host = Host::new();
    race(&host, host.path(), "/vol/sub/new/deep");
    race(&host, &Host::up_to(host.path()), "/vol/sub/new/deep");
}

/// Starts a container whose image has links at names where something is made; refused or not, it stays inside.
fn harmless(host: &Host, links: &[(&str, PathBuf)], change: impl Fn(&mut Spec)) {
    let tree = Tree::new();
    for (name, target) in links {
        let at = tree.dir.path().join(name);
        fs::create_dir_all(at.parent().unwrap()).unwrap();
        link_instead(tree.dir.path(), name, target);
    }
    let mut spec = spec("true");
    change(&mut spec);
    match start(&tree, &spec, LaunchFds::default()) {
        Ok(run) => drop(run.end()),
        Err(error) => assert!(matches!(error.step, Step::Mount | Step::Device), "{error}"),
    }
    host.assert_untouched();
}

/// Nodes and links of `/dev` would be made, and what is in their way removed, in a directory of the host.
fn dev_by_link() {
    let host = Host::new();
    for target in [host.path().to_owned(), Host::up_to(host.path())] {
        harmless(&host, &[("dev", target.clone())], |_| {});
        harmless(&host, &[("dev", target)], |spec| spec.mounts.retain(|one| !one.destination.starts_with("/dev")));
    }
}

fn console_by_link() {
    let host = Host::new();
    for target in [host.victim(), Host::up_to(&host.victim())] {
        harmless(&host, &[("dev/console", target)], |spec| spec.mounts.retain(|one| one.destination != "/dev"));
    }
    // A terminal needs a `/dev` without an image's links in it.
    let mut spec = spec("true");
    spec.process.as_mut().unwrap().terminal = true;
    spec.mounts.retain(|one| one.destination != "/dev");
    let error = executor::plan(&spec, &HostFacts::read().unwrap()).unwrap_err();
    assert!(error.to_string().contains("needs a tmpfs"), "{error}");
}

fn null_by_link() {
    let host = Host::new();
    for target in [host.victim(), Host::up_to(&host.victim())] {
        let links: Vec<_> = ["null", "zero", "ptmx", "fd"].map(|name| format!("dev/{name}")).into_iter().collect();
        let links: Vec<_> = links.iter().map(|name| (name.as_str(), target.clone())).collect();
        harmless(&host, &links, |spec| spec.mounts.retain(|one| one.destination != "/dev"));
        harmless(&host, &links, |_| {});
    }
    // Nor is it what a container without streams of its own gets as its input.
    for number in 0..20 {
        let tree = Tree::new();
        fs::create_dir_all(tree.dir.path().join("dev")).unwrap();
        symlink(format!("/proc/self/fd/{number}"), tree.dir.path().join("dev/null")).unwrap();
        let mut spec = spec("stat -L -c %t:%T /proc/self/fd/0");
        spec.mounts.retain(|one| one.destination != "/dev");
        let (text, _) = start(&tree, &spec, LaunchFds::default()).unwrap().end();
        assert_eq!(text, "1:3\n", "descriptor {number}");
    }
}

/// Runtimes have left notes for their helpers in the root of a container, through links of the image.
fn note_in_image() {
    let host = Host::new();
    let names =
        [".krun_config.json", ".dockerenv", "run/.containerenv", "etc/hostname", "etc/hosts", "etc/resolv.conf"];
    let links: Vec<_> = names.iter().map(|name| (*name, host.victim())).collect();
    harmless(&host, &links, |_| {});
}

/// Capabilities that programs with file capabilities would get beyond what the container was given.
fn inheritable() {
    let tree = Tree::new();
    let spec = spec("grep CapInh /proc/self/status; echo up; sleep 1000");
    let mut run = start(&tree, &spec, LaunchFds::default()).unwrap();
    let mut text = [0; "CapInh:\t0000000000000000\nup\n".len()];
    run.output.read_exact(&mut text).unwrap();
    assert_eq!(text.escape_ascii().to_string(), "CapInh:\\t0000000000000000\\nup\\n");
    let script = ["sh", "-c", "grep -q '^CapInh:.0000000000000000$' /proc/self/status"].map(str::to_owned).to_vec();
    let launched = exec(&run, &spec, |process| process.args = script).unwrap();
    assert_eq!(process::reap(launched.child.pidfd.as_fd()).unwrap(), process::Exit::Code(0));
    end(run);
}

/// It would come to lie, unmasked, over everything that protects the root.
fn volume_over_root() {
    let linked_root = |root: &Path| symlink("/", root.join("all")).unwrap();
    let error = refused(linked_root, |spec| spec.mounts.push(mount("/all", "bind", &["rbind", "rprivate"])));
    assert_eq!((error.step, error.errno), (Step::Mount, 16), "{error}");
}

/// Another container of the pod, which has the same volume, has put it there.
fn link_in_volume() {
    let (volume, other, tree) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap(), Tree::new());
    symlink("/chosen", volume.path().join("sub")).unwrap();
    let mut spec = spec("true");
    spec.mounts.push(bind(volume.path(), "/data", &[]));
    spec.mounts.push(bind(other.path(), "/data/sub/deep", &[]));
    let error = start(&tree, &spec, LaunchFds::default()).map(Run::end).unwrap_err();
    assert_eq!((error.step, error.errno), (Step::Mount, 40), "{error}");
    assert!(!tree.dir.path().join("chosen").exists());
}
