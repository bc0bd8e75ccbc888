//! Control groups as the kernel sees them, on whichever version is mounted.

#![allow(
    clippy::disallowed_methods,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "a test program that puts shells into groups"
)]

use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use sys::cgroup::{Cgroup, DeviceRule, Entry, Hierarchy, Limits};
use sys::rustix::process::Pid;

/// A group of this test's own; its processes and it go with the value.
struct Group(Cgroup);

impl Group {
    /// `None` where no group can be made; says so.
    fn make() -> Option<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("orlop-test-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let made = Hierarchy::detect().and_then(|hierarchy| {
            let group = hierarchy.group(name);
            group.create().map(|()| group)
        });
        match made {
            Ok(group) => Some(Self(group)),
            Err(error) => {
                println!("skipped: needs root and writable control groups ({error})");
                None
            }
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // The test has failed already where these do.
        let _ = self.0.kill();
        while !self.0.processes().is_empty() {
            std::thread::yield_now();
        }
        let _ = self.0.delete();
    }
}

/// A shell that waits for a line before it runs its script, and is in the group by then.
fn shell_in(group: &Cgroup, script: &str) -> Child {
    let mut shell = Command::new("sh");
    shell.args(["-c", &format!("read go; {script}")]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let child = shell.stderr(Stdio::null()).spawn().unwrap();
    group.add(pid(&child)).unwrap();
    child
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap()).unwrap()
}

fn go(child: &mut Child) {
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
}

fn outcome(group: &Cgroup, script: &str) -> ExitStatus {
    let mut child = shell_in(group, script);
    go(&mut child);
    child.wait().unwrap()
}

#[test]
fn limits_are_what_was_set() {
    let Some(Group(group)) = &Group::make() else { return };
    let limits = Limits {
        cpu_shares: Some(512),
        cpu_quota_us: Some(50_000),
        cpu_period_us: Some(100_000),
        memory_bytes: Some(64 << 20),
        pids: Some(7),
        ..Limits::default()
    };
    group.set(&limits).unwrap();
    let stats = group.stats();
    assert_eq!(stats.cpu.limit_milli, Some(500));
    assert_eq!(stats.memory.limit_bytes, Some(64 << 20));
    assert_eq!(stats.pids.limit, Some(7));
    let without = Limits { cpu_quota_us: Some(-1), memory_bytes: Some(-1), pids: Some(-1), ..Limits::default() };
    group.set(&without).unwrap();
    let stats = group.stats();
    assert_eq!((stats.cpu.limit_milli, stats.memory.limit_bytes, stats.pids.limit), (None, None, None));
}

#[test]
fn a_group_below_a_group_has_the_controllers() {
    let Some(Group(group)) = &Group::make() else { return };
    let child = group.child("a").child("b");
    child.create().unwrap();
    child.create().unwrap();
    child
        .set(&Limits { memory_bytes: Some(32 << 20), pids: Some(3), cpu_shares: Some(2), ..Limits::default() })
        .unwrap();
    assert_eq!(child.stats().memory.limit_bytes, Some(32 << 20));
    group.delete().unwrap();
    assert!(!child.exists() && !group.exists());
    group.delete().unwrap();
}

/// Limits that nobody but the kernel knows by name can be for any of its controllers.
#[test]
fn every_controller_that_limits_may_be_for_is_handed_down() {
    let Some(group) = Group::make() else { return };
    if !Hierarchy::detect().unwrap().is_unified() {
        return println!("skipped: needs control groups version 2");
    }
    let dir = group.0.directories().remove(0);
    let has = std::fs::read_to_string(dir.join("cgroup.controllers")).unwrap();
    let all = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap();
    for name in ["cpu", "cpuset", "memory", "pids", "io", "hugetlb", "rdma", "misc"] {
        let is_in = |text: &str| text.split_whitespace().any(|one| one == name);
        assert!(!is_in(&all) || is_in(&has), "{name} is not handed down: {has}");
    }
    let unified = vec![("pids.max".to_owned(), "17".to_owned()), ("memory.high".to_owned(), "8388608".to_owned())];
    group.0.set(&Limits { unified, ..Limits::default() }).unwrap();
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap();
    assert_eq!((read("pids.max").as_str(), read("memory.high").as_str()), ("17\n", "8388608\n"));
    let unknown = vec![("no.such.file".to_owned(), "1".to_owned())];
    assert!(group.0.set(&Limits { unified: unknown, ..Limits::default() }).is_err());
}

#[test]
fn too_much_memory_is_counted_as_an_oom_kill() {
    let Some(Group(group)) = &Group::make() else { return };
    group
        .set(&Limits { memory_bytes: Some(16 << 20), memory_swap_bytes: Some(16 << 20), ..Limits::default() })
        .unwrap();
    assert_eq!(group.oom_kills(), 0);
    let ended = outcome(group, "exec dd if=/dev/zero of=/dev/null bs=256M count=1");
    assert_eq!(ended.signal(), Some(9), "{ended}");
    assert_eq!(group.oom_kills(), 1);
    assert_eq!(group.stats().memory.oom_kills, 1);
}

#[test]
fn too_many_processes_are_refused() {
    let Some(Group(group)) = &Group::make() else { return };
    group.set(&Limits { pids: Some(1), ..Limits::default() }).unwrap();
    assert!(!outcome(group, "true | true").success());
    group.set(&Limits { pids: Some(-1), ..Limits::default() }).unwrap();
    assert!(outcome(group, "true | true").success());
}

#[test]
fn kill_reaches_groups_below() {
    let Some(Group(group)) = &Group::make() else { return };
    let below = group.child("below");
    below.create().unwrap();
    // Version 2 allows no processes beside groups that have controllers.
    let beside = group.child("beside");
    beside.create().unwrap();
    let mut children = [shell_in(&below, "true"), shell_in(&below, "true"), shell_in(&beside, "true")];
    assert_eq!((below.processes().len(), beside.processes().len()), (2, 1));
    assert!(group.delete().is_err(), "a group with processes cannot be removed");
    group.kill().unwrap();
    for child in &mut children {
        assert_eq!(child.wait().unwrap().signal(), Some(9));
    }
    group.delete().unwrap();
}

#[test]
fn what_others_have_left_beside_a_group_goes_with_it() {
    let beside = std::path::Path::new("/sys/fs/cgroup/unified");
    let whole = Hierarchy::whole(beside.parent().unwrap()).unwrap();
    if whole.is_unified() || !beside.join("cgroup.controllers").exists() {
        println!("skipped: needs version 2's tree beside those of version 1");
        return;
    }
    let name = format!("orlop-test-{}-beside", std::process::id());
    let group = Group(whole.group(&name));
    group.0.create().unwrap();
    let below = beside.join(&name).join("below");
    std::fs::create_dir_all(&below).unwrap();
    let mut child = Command::new("sh").args(["-c", "read go"]).stdin(Stdio::piped()).spawn().unwrap();
    std::fs::write(below.join("cgroup.procs"), child.id().to_string()).unwrap();
    group.0.delete().unwrap();
    assert!(below.exists(), "a process is in it");
    go(&mut child);
    child.wait().unwrap();
    group.0.create().unwrap();
    group.0.delete().unwrap();
    assert!(!beside.join(&name).exists());
}

#[test]
fn what_is_frozen_does_not_run() {
    let Some(Group(group)) = &Group::make() else { return };
    let mut child = shell_in(group, "echo went on");
    group.freeze(true).unwrap();
    go(&mut child);
    // It would have answered: nothing else keeps it.
    let mut output = child.stdout.take().unwrap();
    let mut poll = [sys::rustix::event::PollFd::new(&output, sys::rustix::event::PollFlags::IN)];
    let patience = sys::rustix::event::Timespec { tv_sec: 0, tv_nsec: 300_000_000 };
    assert_eq!(sys::rustix::event::poll(&mut poll, Some(&patience)).unwrap(), 0);
    group.freeze(false).unwrap();
    let mut text = String::new();
    std::io::Read::read_to_string(&mut output, &mut text).unwrap();
    assert_eq!(text, "went on\n");
    assert!(child.wait().unwrap().success());
}

#[test]
fn devices_are_those_of_the_last_rules() {
    let Some(Group(group)) = &Group::make() else { return };
    let device =
        |minor| DeviceRule { allow: true, kind: 'c', major: Some(1), minor: Some(minor), access: "rwm".into() };
    let (null, zero) = (device(3), device(5));
    let reads = |path: &str| outcome(group, &format!("exec dd if={path} of=/dev/null bs=1 count=1")).success();
    let all = |allow| DeviceRule { allow, kind: 'a', major: None, minor: None, access: "rwm".into() };
    group.allow_devices(&[all(true), all(false), null.clone()]).unwrap();
    assert!(!reads("/dev/zero"), "all are denied but one");
    assert!(outcome(group, ": </dev/null").success());
    group.allow_devices(&[null, zero]).unwrap();
    assert!(reads("/dev/zero"), "rules that are set again replace the earlier ones");
}

#[test]
fn a_process_enters_by_descriptor() {
    let Some(Group(group)) = &Group::make() else { return };
    let unified = Hierarchy::detect().unwrap().is_unified();
    match group.entry().unwrap() {
        Entry::Directory(_) => assert!(unified),
        Entry::Files(files) => {
            assert!(!unified);
            let mut child = Command::new("sh").args(["-c", "read go"]).stdin(Stdio::piped()).spawn().unwrap();
            for file in &files {
                sys::rustix::io::write(file, child.id().to_string().as_bytes()).unwrap();
            }
            assert_eq!(group.processes(), [pid(&child)]);
            go(&mut child);
            child.wait().unwrap();
        }
    }
}
