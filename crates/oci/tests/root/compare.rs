//! The same bundles by this runtime and by runc: what a process finds itself to be, what `state` says, what control groups
//! hold, how things end.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::bundle::Bundle;

pub(crate) const TESTS: &[testkit::serial::Test] = &[
    ("processes_are_as_under_runc", processes),
    ("control_groups_are_as_under_runc", groups),
    ("states_are_as_under_runc", states),
    ("ends_are_as_under_runc", ends),
];

/// All that a process can see of itself and of where it is.
const LOOK: &str = "\
    grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp:|Umask|Cpus_allowed_list)' /proc/self/status; \
    echo \"cwd $PWD home $HOME\"; env | sort; hostname; cat /proc/self/limits /proc/self/uid_map /proc/self/gid_map \
    /proc/self/setgroups /proc/self/oom_score_adj /proc/self/cgroup /proc/self/timens_offsets; \
    sed 's/^/personality /' /proc/self/personality 2>/dev/null; \
    ls -l /dev | awk '{print \"dev\", $1, $3, $4, $5, $6, $NF}'; readlink /dev/fd /dev/ptmx /dev/stdin /dev/core; \
    ls -ld /dev/shm /proc/kcore /proc/sys | awk '{print $1, $3, $4, $NF}'; \
    ls /proc/self/fd | wc -l; for n in mnt pid net ipc uts user cgroup time; do test \
    $(readlink /proc/self/ns/$n) = $(readlink /proc/1/ns/$n) || echo $n differs; done; \
    ionice -p 1; cat /proc/sys/net/ipv4/ip_default_ttl; \
    sed 's/^/mount /' /proc/self/mountinfo";

/// A change of the plain configuration.
type Case = (&'static str, fn(&mut Value));

const CASES: &[Case] = &[
    ("plain", |_| {}),
    ("user", |spec| {
        spec["process"]["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [5, 1002], "umask": 63 });
        spec["process"]["cwd"] = json!("/made/for/it");
    }),
    ("capabilities", |spec| {
        let some = json!(["CAP_CHOWN", "CAP_NET_RAW", "CAP_KILL"]);
        spec["process"]["capabilities"] = json!({
            "bounding": some, "effective": some, "permitted": some, "inheritable": some, "ambient": ["CAP_KILL"],
        });
        spec["process"]["user"] = json!({ "uid": 7, "gid": 7 });
    }),
    ("privileges", |spec| {
        spec["process"]["noNewPrivileges"] = json!(false);
        spec["root"]["readonly"] = json!(false);
        spec["process"]["oomScoreAdj"] = json!(500);
    }),
    ("no-capabilities", |spec| {
        spec["process"]["capabilities"] = json!({});
    }),
    ("limits", |spec| {
        spec["process"]["rlimits"] = json!([
            { "type": "RLIMIT_NOFILE", "hard": 500, "soft": 400 },
            { "type": "RLIMIT_CORE", "hard": 0, "soft": 0 },
            { "type": "RLIMIT_NPROC", "hard": 300, "soft": 300 },
        ]);
    }),
    ("namespaces-of-the-host", |spec| {
        let kinds = json!([{ "type": "mount" }, { "type": "pid" }]);
        spec["linux"]["namespaces"] = kinds;
        spec.as_object_mut().unwrap().remove("hostname");
    }),
    ("cgroup-namespace", |spec| {
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "cgroup" }));
    }),
    ("user-namespace", |spec| {
        let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 5000 }]);
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
    }),
    ("time-namespace", |spec| {
        spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "time" }));
        spec["linux"]["timeOffsets"] =
            json!({ "monotonic": { "secs": 100, "nanosecs": 5 }, "boottime": { "secs": 7 } });
    }),
    ("joined-by-path", |spec| {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        for one in namespaces.iter_mut().filter(|one| one["type"] == "ipc" || one["type"] == "network") {
            let file = if one["type"] == "ipc" { "ipc" } else { "net" };
            one["path"] = json!(format!("/proc/self/ns/{file}"));
        }
    }),
    ("mounts", |spec| {
        let mounts = spec["mounts"].as_array_mut().unwrap();
        for (destination, options) in [
            ("/m/plain", &["bind"][..]),
            ("/m/readonly", &["rbind", "ro", "nosuid", "nodev", "noexec"]),
            ("/m/recursive", &["rbind", "rro", "rprivate"]),
            ("/m/noatime", &["bind", "noatime", "private"]),
        ] {
            mounts.push(json!({ "destination": destination, "type": "bind", "source": "/etc", "options": options }));
        }
        let tmpfs = json!({ "destination": "/m/tmpfs", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "mode=1777", "size=1m"] });
        mounts.push(tmpfs);
        mounts.push(json!({ "destination": "/bin", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"] }));
    }),
    ("sysctl-and-filter", |spec| {
        spec["linux"]["sysctl"] = json!({ "net.ipv4.ip_default_ttl": "17" });
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
            "syscalls": [{ "names": ["sethostname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5 }],
        });
    }),
    ("devices", |spec| {
        spec["linux"]["devices"] = json!([
            { "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 3, "gid": 4 },
            { "path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 384 },
        ]);
        spec["linux"]["resources"]["devices"] =
            json!([{ "allow": false, "access": "rwm" }, { "allow": true, "type": "c", "major": 10, "access": "rw" }]);
    }),
    ("scheduling", |spec| {
        spec["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_BE", "priority": 6 });
        spec["process"]["scheduler"] = json!({ "policy": "SCHED_BATCH", "nice": 3 });
        spec["linux"]["personality"] = json!({ "domain": "LINUX32" });
    }),
];

fn runc() -> PathBuf {
    testkit::go::build(&testkit::go::RUNC).unwrap()
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
        bundle.change(&change);
    }
    pair
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
    let lines = text.lines().filter(|line| !hybrid(line) && !no_group(line));
    let (mounts, others): (Vec<&str>, Vec<&str>) = lines.partition(|line| line.starts_with("mount "));
    let mut mounts: Vec<String> = mounts.into_iter().map(mount).collect();
    mounts.sort();
    others.into_iter().map(str::to_owned).chain(mounts).collect()
}

/// Root, place, options, kind and options of the file system of a line of mountinfo.
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
    format!("mount {} {root} {} {} {of_filesystem}", fields[5], sorted(fields[6]), own[0])
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

fn processes() {
    let mut all = Vec::new();
    for (name, change) in CASES {
        let pair = pair(name, LOOK, change);
        let [ours, theirs] = pair.each_ref().map(|bundle| {
            let (code, text) = bundle.run();
            (code, comparable(&text, bundle))
        });
        let mut found = differences(&ours.1, &theirs.1);
        if ours.0 != theirs.0 {
            found.push(format!("exit codes: {:?} and {:?}", ours.0, theirs.0));
        }
        assert!(theirs.1.len() > 40, "runc itself cannot: {theirs:?}");
        all.extend(found.into_iter().map(|line| format!("{name}: {line}")));
    }
    assert!(all.is_empty(), "{}", all.join("\n"));
}

/// The files of a container's control group that limits are in.
fn limits(bundle: &Bundle) -> Vec<String> {
    const FILES: &[&str] = &[
        "cpu.shares",
        "cpu.cfs_quota_us",
        "cpu.cfs_period_us",
        "cpuset.cpus",
        "cpuset.mems",
        "memory.limit_in_bytes",
        "memory.soft_limit_in_bytes",
        "memory.swappiness",
        "memory.memsw.limit_in_bytes",
        "pids.max",
        "devices.list",
        "blkio.weight",
        "cpu.weight",
        "cpu.max",
        "memory.max",
        "memory.low",
        "memory.swap.max",
        "io.weight",
        "cpu.idle",
        "cpu.cfs_burst_us",
        "cpu.max.burst",
    ];
    let mut found = Vec::new();
    for dir in bundle.groups() {
        for name in FILES {
            let Ok(text) = std::fs::read_to_string(dir.join(name)) else { continue };
            // The order of the rules is the kernel's.
            let mut lines: Vec<&str> = text.lines().collect();
            lines.sort_unstable();
            found.push(format!("{name} {}", lines.join(", ")));
        }
    }
    found
}

fn groups() {
    let resources = json!({
        "memory": { "limit": 64 << 20, "reservation": 32 << 20 },
        "cpu": { "shares": 512, "quota": 50000, "period": 100_000 },
        "pids": { "limit": 77 },
        "devices": [
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm" },
            { "allow": true, "type": "b", "major": 7, "access": "r" },
        ],
    });
    let pair = pair("groups", "sleep 1000", |spec| spec["linux"]["resources"] = resources.clone());
    let [ours, theirs] = pair.each_ref().map(|bundle| {
        bundle.create(&[]);
        let made = limits(bundle);
        let change = ["update", "--memory", "80m", "--pids-limit", "33", "--cpu-share", "256", "--cpu-quota", "20000"];
        bundle.done(&[&change[..], &[&bundle.id]].concat());
        [made, limits(bundle)].concat()
    });
    assert!(theirs.len() > 10, "{theirs:?}");
    assert_eq!(differences(&ours, &theirs), Vec::<String>::new());
}

/// The fields of `state` and what is in them, but for what differs from one container to the next.
fn state(bundle: &Bundle) -> String {
    let text = bundle.done(&["state", &bundle.id]);
    let mut state: Value = serde_json::from_str(&text).unwrap();
    assert!(state["created"].as_str().unwrap().ends_with('Z'), "{text}");
    state["created"] = json!("now");
    state["pid"] = json!(state["pid"].as_i64().unwrap() > 0);
    // In the order in which they are written.
    let names: Vec<&str> = text.lines().filter_map(|line| line.trim().split('"').nth(1)).collect();
    plain(&format!("{state} {names:?}"), bundle)
}

fn states() {
    let annotate = |spec: &mut Value| spec["annotations"] = json!({ "org.example": "x" });
    let pair = pair("states", "exec sleep 1000", annotate);
    let [ours, theirs] = pair.each_ref().map(|bundle| {
        bundle.create(&[]);
        let mut states = vec![state(bundle)];
        bundle.done(&["start", &bundle.id]);
        states.push(state(bundle));
        bundle.done(&["pause", &bundle.id]);
        states.push(state(bundle));
        bundle.done(&["resume", &bundle.id]);
        let pid = bundle.pid();
        bundle.done(&["kill", &bundle.id, "SIGKILL"]);
        bundle.wait(pid);
        states.push(state(bundle));
        states
    });
    assert_eq!(ours, theirs);
}

/// How commands end: the code, and the last words.
fn ends() {
    let mut all = Vec::new();
    let cases: [(&str, &[&str]); 6] = [
        ("code", &["sh", "-c", "exit 42"]),
        ("signal", &["sh", "-c", "kill -TERM 1; ulimit -c 0; kill -SEGV $$; exit 9"]),
        ("missing", &["nothing"]),
        ("missing-path", &["/no/thing"]),
        ("not-executable", &["/etc/passwd"]),
        ("directory", &["/bin"]),
    ];
    for (name, args) in cases {
        let pair = pair(&format!("end-{name}"), "", |spec| spec["process"]["args"] = json!(args));
        let [ours, theirs] = pair.each_ref().map(|bundle| {
            std::fs::create_dir_all(bundle.path().join("rootfs/etc")).unwrap();
            std::fs::write(bundle.path().join("rootfs/etc/passwd"), "root:x:0:0::/root:/bin/sh\n").unwrap();
            let (code, text) = bundle.run();
            let last = text.lines().last().unwrap_or_default();
            format!("{code:?} {}", plain(last, bundle))
        });
        if ours != theirs {
            all.push(format!("{name}: orlop {ours}\n{name}:  runc {theirs}"));
        }
    }
    assert!(all.is_empty(), "{}", all.join("\n"));
}
