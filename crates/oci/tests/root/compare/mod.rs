//! The same bundles by this runtime and by runc: what a process finds itself to be, what control groups hold, what commands
//! say and how they end, what is refused.

mod attacks;
mod commands;
mod events;
mod flags;
mod foreign;
mod groups;
mod handed;
mod processes;
mod races;
mod readiness;
mod refusals;

use std::collections::BTreeMap;
use std::io::BufRead as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::bundle::Bundle;

pub(crate) use readiness::notify;

pub(crate) const TESTS: &[testkit::serial::Test] = &[
    ("processes_are_as_under_runc", processes::all),
    ("filters_are_as_under_runc", processes::filters),
    ("programs_of_other_architectures_are_as_under_runc", foreign::programs_work),
    ("calls_of_other_architectures_are_filtered_as_under_runc", foreign::all),
    ("control_groups_are_as_under_runc", groups::all),
    ("states_are_as_under_runc", commands::states),
    ("commands_are_as_under_runc", commands::all),
    ("ends_are_as_under_runc", commands::ends),
    ("statistics_are_as_under_runc", events::statistics),
    ("want_of_memory_is_told_as_under_runc", events::want_of_memory),
    ("refusals_are_as_under_runc", refusals::all),
    ("attacks_come_to_nothing_as_under_runc", attacks::all),
    ("races_come_to_nothing_as_under_runc", races::all),
    ("a_race_leads_astray_who_is_led_by_names", races::led_by_names),
    ("the_runtimes_own_program_stays_as_under_runc", races::own_program),
    ("flags_are_as_under_runc", flags::all),
    ("features_are_as_under_runc", flags::features),
    ("hooks_are_as_under_runc", handed::hooks),
    ("descriptors_are_as_under_runc", handed::descriptors),
    ("terminals_are_as_under_runc", handed::terminals),
    ("readiness_is_told_as_under_runc", readiness::all),
];

/// A change of the plain configuration. In its strings [`BUNDLE`] and [`NAMESPACES`] stand for paths.
type Change = fn(&mut Value);

/// The bundle's directory, in which `data` belongs to user 1000 and has the file `file`.
const BUNDLE: &str = "@BUNDLE";
/// A directory of a process' namespaces, which has a network, a UTS, an IPC and a cgroup namespace of its own.
const NAMESPACES: &str = "@NAMESPACES";

/// Where the virtual machine has the programs that it took along.
const IN_MACHINE: &str = "/jobs/runc";

fn runc() -> PathBuf {
    let there = PathBuf::from(IN_MACHINE);
    if there.exists() { there } else { testkit::go::build(&testkit::go::RUNC).unwrap() }
}

/// A process whose namespaces are joined by path.
struct Neighbour(Child);

impl Neighbour {
    fn start() -> Self {
        let mut unshare = Command::new("unshare");
        unshare.args(["--net", "--uts", "--ipc", "sh", "-c", "hostname neighbour; echo there; exec sleep 1000"]);
        let mut child = unshare.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        std::io::BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "there\n");
        Self(child)
    }

    fn namespaces(&self) -> String {
        format!("/proc/{}/ns", self.0.id())
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = self.0.kill(); // It runs.
        let _ = self.0.wait();
    }
}

/// The bundle of this runtime, and the same for runc.
fn pair(name: &str, script: &str, change: impl Fn(&mut Value)) -> [Bundle; 2] {
    let ours = Bundle::new(name, script);
    let theirs = Bundle::of(runc(), "runc", &format!("{name}-runc"), script);
    let same = std::fs::read(ours.path().join("config.json")).unwrap();
    let id = theirs.id.clone();
    std::fs::write(theirs.path().join("config.json"), same).unwrap();
    theirs.change(|spec| spec["linux"]["cgroupsPath"] = json!(format!("/{id}")));
    let pair = [ours, theirs];
    for bundle in &pair {
        // Users of a user namespace have to get there.
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(bundle.path(), open).unwrap();
        furnish(bundle.path());
        bundle.change(&change);
        put(bundle, BUNDLE, bundle.path().to_str().unwrap());
    }
    pair
}

/// What cases refer to: users, links of the image that lead here and there, somebody's data.
fn furnish(dir: &Path) {
    let etc = dir.join("rootfs/etc");
    std::fs::create_dir_all(&etc).unwrap();
    let users = "root:x:0:0::/root:/bin/sh\nsailor:x:1000:1001::/home/sailor:/bin/sh\n";
    std::fs::write(etc.join("passwd"), users).unwrap();
    std::fs::write(etc.join("group"), "root:x:0:\nsailor:x:1001:\ncrew:x:1002:sailor\n").unwrap();
    symlink("/hold", dir.join("rootfs/link")).unwrap();
    symlink("/not/there", dir.join("rootfs/nowhere")).unwrap();
    symlink("run/resolve/stub.conf", dir.join("rootfs/resolv.conf")).unwrap();
    symlink("../../../../../hold", dir.join("rootfs/up")).unwrap();
    for place in ["hold", "given"] {
        std::fs::create_dir(dir.join("rootfs").join(place)).unwrap();
    }
    let data = dir.join("data");
    std::fs::create_dir_all(data.join("inner")).unwrap();
    std::fs::write(data.join("file"), "data\n").unwrap();
    std::os::unix::fs::chown(data.join("file"), Some(1000), Some(1000)).unwrap();
}

/// Writes `text` for `name` wherever its configuration has that.
fn put(bundle: &Bundle, name: &str, text: &str) {
    let config = bundle.path().join("config.json");
    let changed = std::fs::read_to_string(&config).unwrap().replace(name, text);
    std::fs::write(config, changed).unwrap();
}

/// Mounts a directory or file of the host.
fn add_bind(spec: &mut Value, source: &str, destination: &str) {
    let mount = json!({ "destination": destination, "type": "bind", "source": source, "options": ["bind"] });
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

/// What does not depend on which bundle it is.
fn plain(text: &str, bundle: &Bundle) -> String {
    text.replace(&bundle.id, "ID").replace(bundle.path().to_str().unwrap(), "BUNDLE")
}

/// Lines in the order in which they mean something: mounts by their place, without numbers of the kernel's.
fn comparable(text: &str, bundle: &Bundle) -> Vec<String> {
    let text = plain(text, bundle);
    // runc makes a group in version 2's tree, too, where that has no controllers.
    let hybrid = |line: &&str| line.starts_with("0::") && std::path::Path::new("/sys/fs/cgroup/unified").exists();
    // Its message queues belong to no group of a user namespace.
    let no_group = |line: &&str| line.starts_with("dev ") && line.ends_with(" mqueue");
    // It has a link to the kernel's memory, which is masked.
    let core = |line: &&str| line.starts_with("dev l") && line.ends_with(" /proc/kcore");
    let lines = text.lines().filter(|line| !hybrid(line) && !no_group(line) && !core(line));
    let (mounts, others): (Vec<&str>, Vec<&str>) = lines.partition(|line| line.starts_with("mount "));
    let mut mounts: Vec<String> = mounts.into_iter().map(mount).collect();
    mounts.sort();
    let inherited = ignored_here();
    others.into_iter().map(|line| without_inherited(line, inherited)).chain(mounts).collect()
}

/// Signals that this process ignores, as one that was started in the background does, by bits of the first 32.
fn ignored_here() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:")).unwrap();
    u64::from_str_radix(ignored.trim(), 16).unwrap() & 0xffff_ffff
}

/// Of ignored signals those that do not come from here: runc lets some of these through, now and then.
fn without_inherited(line: &str, inherited: u64) -> String {
    match line.strip_prefix("ignored ").map(|bits| u64::from_str_radix(bits, 16)) {
        Some(Ok(bits)) => format!("ignored {:08x}", bits & !inherited),
        _ => line.to_owned(),
    }
}

/// Root, place, options, propagation, kind and options of the file system of a line of mountinfo.
fn mount(line: &str) -> String {
    let (one, filesystem) = line.split_once(" - ").unwrap();
    let fields: Vec<&str> = one.split(' ').collect();
    let mut own: Vec<&str> = filesystem.split(' ').collect();
    own.remove(1); // A name that says nothing.
    let sorted = |options: &str| {
        let mut words: Vec<&str> = options.split(',').filter(|word| !word.starts_with("inode")).collect();
        words.sort_unstable();
        words.join(",")
    };
    // Files are masked by the host's null device here, by the container's there.
    if fields[4] == "/null" {
        return format!("mount {} masked", fields[5]);
    }
    // What is read-only is so by its mount; runc tells the file system, too, which is shared in part.
    let of_filesystem = sorted(own[1]).replace("rw", "ro");
    let root = if own[0] == "tmpfs" { "/" } else { fields[4] };
    let propagation: Vec<&str> = fields[7..].iter().filter_map(|tag| tag.split(':').next()).collect();
    let propagation = propagation.join(",");
    format!("mount {} {root} {} [{propagation}] {} {of_filesystem}", fields[5], sorted(fields[6]), own[0])
}

fn differences(ours: &[String], theirs: &[String]) -> Vec<String> {
    let count = |lines: &[String]| {
        let mut counts: BTreeMap<String, i32> = BTreeMap::new();
        lines.iter().for_each(|line| *counts.entry(line.clone()).or_default() += 1);
        counts
    };
    let (ours, theirs) = (count(ours), count(theirs));
    let only = |these: &BTreeMap<String, i32>, those: &BTreeMap<String, i32>, who: &str| -> Vec<String> {
        let fewer = |(line, count): &(&String, &i32)| those.get(*line).unwrap_or(&0) < count;
        these.iter().filter(fewer).map(|(line, _)| format!("{who}: {line}")).collect()
    };
    [only(&ours, &theirs, "orlop"), only(&theirs, &ours, "runc")].concat()
}
