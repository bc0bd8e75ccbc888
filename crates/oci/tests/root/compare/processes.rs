//! What a process finds itself to be, and where.

use serde_json::{Value, json};

use crate::bundle::Bundle;

use super::{Change, NAMESPACES, Neighbour, comparable, differences, pair, put};

/// All that a process can see of itself and of where it is.
const LOOK: &str = "\
    grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp|Umask|Cpus_allowed_list|SigBlk|Speculation|THP)' /proc/self/status; \
    echo \"cwd $PWD home $HOME\"; env | sort; hostname; cat /proc/self/limits /proc/self/uid_map /proc/self/gid_map \
    /proc/self/setgroups /proc/self/oom_score_adj /proc/self/cgroup /proc/self/timens_offsets \
    /proc/self/coredump_filter /proc/sys/kernel/domainname; \
    awk '/^SigIgn/ {print \"ignored\", substr($2, 9)}' /proc/self/status; tr '\\0' '|' </proc/self/cmdline; echo; \
    awk '{print \"group\", $1 == $5, \"session\", $1 == $6, \"tty\", $7, \"priority\", $18, $19, $40, $41}' /proc/$$/stat; \
    sed 's/^/personality /' /proc/self/personality 2>/dev/null; \
    ls -l /dev | awk '{print \"dev\", $1, $3, $4, $5, $6, $NF}'; readlink /dev/fd /dev/ptmx /dev/stdin /dev/core; \
    ls -ld / /dev/shm /proc/kcore /proc/sys | awk '{print $1, $3, $4, $NF}'; \
    ls /proc/self/fd | wc -l; for n in mnt pid net ipc uts user cgroup time; do test \
    $(readlink /proc/self/ns/$n) = $(readlink /proc/1/ns/$n) || echo $n differs; done; \
    ionice -p 1; cat /proc/sys/net/ipv4/ip_default_ttl /proc/sys/kernel/shmmax /proc/sys/fs/mqueue/msg_max; \
    ls -ln /m /m/* /hold /given 2>/dev/null | awk '{print \"file\", $1, $3, $4, $NF}'; \
    sed 's/^/mount /' /proc/self/mountinfo";

const CASES: &[(&str, Change)] = &[
    ("plain", |_| {}),
    ("user", |spec| {
        spec["process"]["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [5, 1002], "umask": 63 });
        spec["process"]["cwd"] = json!("/made/for/it");
    }),
    ("user-unknown", |spec| spec["process"]["user"] = json!({ "uid": 4242, "gid": 4343 })),
    ("user-with-home", |spec| {
        spec["process"]["user"] = json!({ "uid": 1000, "gid": 1001 });
        spec["process"]["env"].as_array_mut().unwrap().push(json!("HOME=/elsewhere"));
    }),
    ("groups-twice", |spec| {
        spec["process"]["user"] = json!({ "uid": 0, "gid": 7, "additionalGids": [7, 5, 5, 0] });
    }),
    ("umask", |spec| spec["process"]["user"]["umask"] = json!(0)),
    ("environment", |spec| {
        let variables = json!(["A=1", "B=x=y", "A=2", "EMPTY=", "PATH=/bin:/sbin", "SPACE=a b"]);
        spec["process"]["env"] = variables;
    }),
    ("arguments", |spec| {
        let arguments = spec["process"]["args"].as_array_mut().unwrap();
        arguments.extend([json!("zero"), json!("a b"), json!("")]);
        let look = format!("for word in \"$@\"; do echo \"[$word]\"; done; {}", arguments[2].as_str().unwrap());
        arguments[2] = json!(look);
    }),
    ("capabilities", |spec| {
        let some = json!(["CAP_CHOWN", "CAP_NET_RAW", "CAP_KILL"]);
        spec["process"]["capabilities"] = json!({
            "bounding": some, "effective": some, "permitted": some, "inheritable": some, "ambient": ["CAP_KILL"],
        });
        spec["process"]["user"] = json!({ "uid": 7, "gid": 7 });
    }),
    ("capabilities-of-root", |spec| {
        spec["process"]["capabilities"] = json!({
            "bounding": ["CAP_CHOWN", "CAP_SYS_ADMIN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"],
        });
    }),
    ("capabilities-unknown", |spec| {
        let some = json!(["CAP_KILL", "CAP_NOT_KNOWN"]);
        spec["process"]["capabilities"] = json!({ "bounding": some, "effective": some, "permitted": some });
    }),
    ("no-capabilities", |spec| spec["process"]["capabilities"] = json!({})),
    ("privileges", |spec| {
        spec["process"]["noNewPrivileges"] = json!(false);
        spec["root"]["readonly"] = json!(false);
        spec["process"]["oomScoreAdj"] = json!(500);
    }),
    ("oom-score-highest", |spec| spec["process"]["oomScoreAdj"] = json!(1000)),
    ("limits", |spec| {
        spec["process"]["rlimits"] = json!([
            { "type": "RLIMIT_NOFILE", "hard": 500, "soft": 400 },
            { "type": "RLIMIT_CORE", "hard": 0, "soft": 0 },
            { "type": "RLIMIT_NPROC", "hard": 300, "soft": 300 },
        ]);
    }),
    ("limits-all", |spec| {
        let limit =
            |name: &str, soft: u64, hard: u64| json!({ "type": format!("RLIMIT_{name}"), "hard": hard, "soft": soft });
        let large = ["CPU", "FSIZE", "DATA", "STACK", "RSS", "AS", "LOCKS", "RTTIME"];
        let small = ["NOFILE", "NPROC", "MEMLOCK", "SIGPENDING", "MSGQUEUE"];
        let large = large.iter().map(|name| limit(name, 1 << 32, 1 << 33));
        spec["process"]["rlimits"] = large.chain(small.iter().map(|name| limit(name, 900, 1000))).collect();
    }),
    ("limits-none", |spec| spec["process"]["rlimits"] = json!([])),
    ("limits-endless", |spec| {
        let most = json!(u64::MAX);
        spec["process"]["rlimits"] = json!([{ "type": "RLIMIT_CORE", "hard": most, "soft": most }]);
    }),
    ("names", |spec| {
        spec["hostname"] = json!("a-name.of.several.parts");
        spec["domainname"] = json!("example.org");
    }),
    ("no-name", |spec| drop(spec.as_object_mut().unwrap().remove("hostname"))),
    ("namespaces-of-the-host", |spec| {
        let kinds = json!([{ "type": "mount" }, { "type": "pid" }]);
        spec["linux"]["namespaces"] = kinds;
        spec.as_object_mut().unwrap().remove("hostname");
        // Without a namespace of them runc has all groups of version 2 there.
        spec["mounts"].as_array_mut().unwrap().retain(|mount| mount["type"] != "cgroup");
    }),
    ("network-of-the-host", |spec| without_namespace(spec, "network")),
    ("messages-of-the-host", |spec| without_namespace(spec, "ipc")),
    ("cgroup-namespace", |spec| add_namespace(spec, json!({ "type": "cgroup" }))),
    ("user-namespace", |spec| {
        let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 5000 }]);
        map_users(spec, &map, &map);
    }),
    ("user-namespace-of-parts", |spec| {
        let users = json!([
            { "containerID": 0, "hostID": 100_000, "size": 1000 },
            { "containerID": 1000, "hostID": 1000, "size": 1 },
            { "containerID": 1001, "hostID": 101_001, "size": 64000 },
        ]);
        map_users(spec, &users, &json!([{ "containerID": 0, "hostID": 200_000, "size": 65536 }]));
        spec["process"]["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [1002] });
    }),
    ("user-and-cgroup-namespace", |spec| {
        let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 5000 }]);
        map_users(spec, &map, &map);
        add_namespace(spec, json!({ "type": "cgroup" }));
    }),
    ("time-namespace", |spec| {
        add_namespace(spec, json!({ "type": "time" }));
        spec["linux"]["timeOffsets"] =
            json!({ "monotonic": { "secs": 100, "nanosecs": 5 }, "boottime": { "secs": 7 } });
    }),
    ("time-namespace-of-one-clock", |spec| {
        add_namespace(spec, json!({ "type": "time" }));
        spec["linux"]["timeOffsets"] = json!({ "boottime": { "secs": 86400 } });
    }),
    ("time-namespace-without-offsets", |spec| add_namespace(spec, json!({ "type": "time" }))),
    ("joined-by-path", |spec| {
        for kind in ["ipc", "network"] {
            let file = if kind == "ipc" { "ipc" } else { "net" };
            join(spec, kind, &format!("/proc/self/ns/{file}"));
        }
    }),
    ("joined-a-neighbours", |spec| {
        join(spec, "network", &format!("{NAMESPACES}/net"));
        join(spec, "ipc", &format!("{NAMESPACES}/ipc"));
        join(spec, "uts", &format!("{NAMESPACES}/uts"));
        spec.as_object_mut().unwrap().remove("hostname");
    }),
    ("joined-and-named", |spec| join(spec, "uts", &format!("{NAMESPACES}/uts"))),
    ("joined-processes-of-the-host", |spec| join(spec, "pid", "/proc/self/ns/pid")),
    ("joined-time-of-the-host", |spec| add_namespace(spec, json!({ "type": "time", "path": "/proc/self/ns/time" }))),
    ("mounts", |spec| {
        for (destination, options) in [
            ("/m/plain", &["bind"][..]),
            ("/m/readonly", &["rbind", "ro", "nosuid", "nodev", "noexec"]),
            ("/m/recursive", &["rbind", "rro", "rprivate"]),
            ("/m/noatime", &["bind", "noatime", "private"]),
        ] {
            bind(spec, "/etc", destination, options);
        }
        let tmpfs = json!({ "destination": "/m/tmpfs", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "mode=1777", "size=1m"] });
        add_mount(spec, tmpfs);
        add_mount(spec, json!({ "destination": "/etc", "type": "tmpfs", "source": "tmpfs", "options": ["tmpcopyup"] }));
    }),
    ("mounts-of-flags", |spec| {
        for option in ["relatime", "strictatime", "nodiratime", "sync", "dirsync", "nosymfollow", "exec", "suid", "dev"]
        {
            let options = ["bind", option];
            bind(spec, "@BUNDLE/data", &format!("/m/{option}"), &options);
        }
    }),
    ("mounts-of-recursive-flags", |spec| {
        for option in ["rnosuid", "rnodev", "rnoexec", "rnoatime", "rstrictatime", "rnodiratime", "rnosymfollow", "rro"]
        {
            bind(spec, "@BUNDLE/data", &format!("/m/{option}"), &["rbind", option]);
        }
    }),
    ("mounts-of-flags-cleared-below", |spec| {
        for options in [
            ["rbind", "ro", "rrw"],
            ["rbind", "nosuid", "rsuid"],
            ["rbind", "nodev", "rdev"],
            ["rbind", "noexec", "rexec"],
            ["rbind", "nodiratime", "rdiratime"],
            ["rbind", "nosymfollow", "rsymfollow"],
            ["rbind", "noatime", "ratime"],
            ["rbind", "noatime", "rrelatime"],
            ["rbind", "noatime", "rnorelatime"],
            ["rbind", "strictatime", "rnostrictatime"],
            ["rbind", "rrw", "rro"],
            ["rbind", "rro", "rrw"],
            ["rbind", "rnoatime", "ratime"],
            ["rbind", "rnoatime", "rrelatime"],
        ] {
            bind(spec, "@BUNDLE/data", &format!("/m/{}", options[1..].join("-")), &options);
        }
    }),
    ("mounts-that-propagate", |spec| {
        for option in ["shared", "slave", "private", "unbindable", "rshared", "rslave", "rprivate", "runbindable"] {
            bind(spec, "@BUNDLE/data", &format!("/m/{option}"), &["rbind", option]);
        }
    }),
    ("mounts-of-files", |spec| {
        bind(spec, "@BUNDLE/data/file", "/etc/group", &["bind", "ro"]);
        bind(spec, "@BUNDLE/data/file", "/m/not/there/yet", &["bind"]);
    }),
    ("mounts-by-other-words", |spec| {
        bind(spec, "@BUNDLE/data", "/m//a/../b/.", &["bind"]);
        bind(spec, "@BUNDLE/data", "m/relative", &["bind"]);
        bind(spec, "data", "/m/beside", &["bind"]);
    }),
    ("mounts-by-links", |spec| {
        bind(spec, "@BUNDLE/data", "/link/below", &["bind"]);
        bind(spec, "@BUNDLE/data", "/up/above", &["bind"]);
        bind(spec, "@BUNDLE/data", "/nowhere/below", &["bind"]);
        bind(spec, "@BUNDLE/data/file", "/resolv.conf", &["bind"]);
    }),
    ("mounts-upon-mounts", |spec| {
        add_mount(spec, json!({ "destination": "/m", "type": "tmpfs", "source": "tmpfs", "options": ["size=64k"] }));
        bind(spec, "@BUNDLE/data", "/m/below", &["bind"]);
        add_mount(spec, json!({ "destination": "/m/below/inner", "type": "tmpfs", "source": "tmpfs" }));
    }),
    ("mounts-of-mapped-ids", |spec| {
        let map =
            json!([{ "containerID": 1000, "hostID": 2000, "size": 10 }, { "containerID": 0, "hostID": 0, "size": 1 }]);
        for (destination, option) in [("/m/mapped", "idmap"), ("/m/all", "ridmap")] {
            add_mount(
                spec,
                json!({ "destination": destination, "type": "bind", "source": "@BUNDLE/data",
                "options": ["rbind", option], "uidMappings": map, "gidMappings": map }),
            );
        }
    }),
    ("mounts-of-the-namespaces-ids", |spec| {
        let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 5000 }]);
        map_users(spec, &map, &map);
        add_mount(
            spec,
            json!({ "destination": "/given", "type": "bind", "source": "@BUNDLE/data",
            "options": ["bind", "idmap"] }),
        );
    }),
    ("mounts-of-the-kernels-kinds", |spec| {
        add_mount(
            spec,
            json!({ "destination": "/kernel/proc", "type": "proc", "source": "proc", "options": ["hidepid=2"] }),
        );
        add_mount(
            spec,
            json!({ "destination": "/m/pts", "type": "devpts", "source": "devpts",
            "options": ["newinstance", "ptmxmode=0666", "mode=0600", "gid=5"] }),
        );
        add_mount(spec, json!({ "destination": "/m/queue", "type": "mqueue", "source": "mqueue" }));
        add_mount(spec, json!({ "destination": "/m/ram", "type": "ramfs", "source": "ramfs" }));
        add_mount(spec, json!({ "destination": "/m/sys", "type": "sysfs", "source": "sysfs", "options": ["ro"] }));
    }),
    ("mounts-of-memory", |spec| {
        for (name, options) in [
            ("owned", json!(["uid=1000", "gid=1001", "mode=0750"])),
            ("small", json!(["size=8k", "nr_inodes=20", "noexec"])),
            ("readonly", json!(["ro"])),
        ] {
            add_mount(
                spec,
                json!({ "destination": format!("/m/{name}"), "type": "tmpfs", "source": "x",
                "options": options }),
            );
        }
    }),
    ("mounts-no-groups", |spec| spec["mounts"].as_array_mut().unwrap().retain(|mount| mount["type"] != "cgroup")),
    ("mounts-writable-groups", |spec| {
        spec["mounts"].as_array_mut().unwrap().retain(|mount| mount["type"] != "cgroup");
        add_mount(
            spec,
            json!({ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
            "options": ["nosuid", "noexec", "nodev", "relatime", "rw"] }),
        );
    }),
    ("root-private", |spec| propagate_root(spec, "private")),
    ("root-private-all", |spec| propagate_root(spec, "rprivate")),
    ("root-slave", |spec| propagate_root(spec, "slave")),
    ("root-slave-all", |spec| propagate_root(spec, "rslave")),
    ("root-shared", |spec| propagate_root(spec, "shared")),
    ("root-shared-all", |spec| propagate_root(spec, "rshared")),
    ("root-unbindable", |spec| propagate_root(spec, "unbindable")),
    ("root-by-path", |spec| spec["root"]["path"] = json!("@BUNDLE/rootfs")),
    ("root-by-other-words", |spec| spec["root"]["path"] = json!("./data/../rootfs/")),
    ("masked", |spec| {
        spec["linux"]["maskedPaths"] = json!(["/proc/kcore", "/etc/passwd", "/etc", "/not/there", "/proc/sys/fs"]);
        spec["linux"]["readonlyPaths"] = json!(["/proc/sys", "/bin/busybox", "/proc/not-there", "/tmp"]);
    }),
    ("nothing-masked", |spec| {
        spec["linux"]["maskedPaths"] = json!([]);
        spec["linux"]["readonlyPaths"] = json!([]);
    }),
    ("sysctl-and-filter", |spec| {
        spec["linux"]["sysctl"] = json!({ "net.ipv4.ip_default_ttl": "17" });
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"],
            "syscalls": [{ "names": ["sethostname"], "action": "SCMP_ACT_ERRNO", "errnoRet": 5 }],
        });
    }),
    ("sysctls", |spec| {
        spec["linux"]["sysctl"] = json!({ "net/ipv4/ip_default_ttl": "33", "kernel.shmmax": "12345678",
            "fs.mqueue.msg_max": "7", "kernel.domainname": "of.a.sysctl" });
    }),
    ("devices", |spec| {
        spec["linux"]["devices"] = json!([
            { "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 438, "uid": 3, "gid": 4 },
            { "path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 384 },
        ]);
        spec["linux"]["resources"]["devices"] =
            json!([{ "allow": false, "access": "rwm" }, { "allow": true, "type": "c", "major": 10, "access": "rw" }]);
    }),
    ("devices-of-all-kinds", |spec| {
        spec["linux"]["devices"] = json!([
            { "path": "/dev/disk", "type": "b", "major": 7, "minor": 200, "fileMode": 432, "gid": 6 },
            { "path": "/dev/pipe", "type": "p", "fileMode": 438 },
            { "path": "/dev/raw", "type": "u", "major": 1, "minor": 5 },
        ]);
    }),
    ("devices-in-a-user-namespace", |spec| {
        let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 5000 }]);
        map_users(spec, &map, &map);
        bind(spec, "/dev/zero", "/dev/bound", &["bind"]);
        spec["linux"]["devices"] = json!([{ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229 }]);
    }),
    ("scheduling", |spec| {
        spec["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_BE", "priority": 6 });
        spec["process"]["scheduler"] = json!({ "policy": "SCHED_BATCH", "nice": 3 });
        spec["linux"]["personality"] = json!({ "domain": "LINUX32" });
    }),
    ("scheduling-idle", |spec| {
        spec["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_IDLE", "priority": 0 });
        spec["process"]["scheduler"] = json!({ "policy": "SCHED_IDLE" });
        spec["linux"]["personality"] = json!({ "domain": "LINUX" });
    }),
    ("scheduling-reset", |spec| {
        spec["process"]["scheduler"] =
            json!({ "policy": "SCHED_OTHER", "nice": -5, "flags": ["SCHED_FLAG_RESET_ON_FORK"] });
    }),
    ("no-resources", |spec| drop(spec["linux"].as_object_mut().unwrap().remove("resources"))),
    ("group-by-name", |spec| {
        let path = spec["linux"]["cgroupsPath"].as_str().unwrap().trim_start_matches('/').to_owned();
        spec["linux"]["cgroupsPath"] = json!(path);
    }),
    ("group-by-other-words", |spec| {
        let path = format!("/../.{}/", spec["linux"]["cgroupsPath"].as_str().unwrap());
        spec["linux"]["cgroupsPath"] = json!(path);
    }),
];

/// Of a kind that may be there already, as one of control groups of version 2 is.
fn add_namespace(spec: &mut Value, namespace: Value) {
    let all = spec["linux"]["namespaces"].as_array_mut().unwrap();
    all.retain(|one| one["type"] != namespace["type"]);
    all.push(namespace);
}

fn without_namespace(spec: &mut Value, kind: &str) {
    spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|one| one["type"] != kind);
}

fn join(spec: &mut Value, kind: &str, path: &str) {
    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
    let namespace = namespaces.iter_mut().find(|one| one["type"] == kind).unwrap();
    namespace["path"] = json!(path);
}

fn map_users(spec: &mut Value, users: &Value, groups: &Value) {
    add_namespace(spec, json!({ "type": "user" }));
    spec["linux"]["uidMappings"] = users.clone();
    spec["linux"]["gidMappings"] = groups.clone();
}

fn add_mount(spec: &mut Value, mount: Value) {
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

fn bind(spec: &mut Value, source: &str, destination: &str, options: &[&str]) {
    add_mount(spec, json!({ "destination": destination, "type": "bind", "source": source, "options": options }));
}

fn propagate_root(spec: &mut Value, how: &str) {
    spec["linux"]["rootfsPropagation"] = json!(how);
    bind(spec, "@BUNDLE/data", "/m/data", &["bind"]);
}

/// Mounts that are shared with the host's are told as such by both, though not all in the same way: here none are.
fn keep_mounts_apart() {
    sys::process::leave(sys::process::namespace::MOUNT).unwrap();
    sys::mount::set_propagation(std::path::Path::new("/"), sys::mount::Propagation::Private, true).unwrap();
}

/// Runs each case with both.
fn compare(cases: &[(&str, &str, Change)], lines_min: usize) {
    keep_mounts_apart();
    let neighbour = Neighbour::start();
    let mut all = Vec::new();
    for (name, script, change) in cases {
        let pair = pair(name, script, change);
        let [ours, theirs] = pair.each_ref().map(|bundle| {
            put(bundle, NAMESPACES, &neighbour.namespaces());
            let (code, text) = bundle.run();
            (code, comparable(&text, bundle))
        });
        let mut found = differences(&ours.1, &theirs.1);
        if ours.0 != theirs.0 {
            found.push(format!("exit codes: {:?} and {:?}", ours.0, theirs.0));
        }
        if theirs.1.len() <= lines_min {
            found.push(format!("runc itself cannot: {theirs:?}"));
        }
        all.extend(found.into_iter().map(|line| format!("{name}: {line}")));
    }
    assert!(all.is_empty(), "{}", all.join("\n"));
}

pub(super) fn all() {
    let cases: Vec<_> = CASES.iter().map(|(name, change)| (*name, LOOK, *change)).collect();
    compare(&cases, 40);
}

/// Calls that a filter may be about, and how each ends.
const CALLS: &str = "\
    try() { \"$@\" >/dev/null 2>/tmp/said; echo \"$1 $? $(sed 's/.*: //' /tmp/said | head -n 1)\"; }; \
    try mkdir /tmp/a; try rmdir /tmp/a; try sh -c 'trap : USR1 USR2; kill -USR1 $$; kill -USR2 $$ || exit 9'; \
    try sh -c 'trap : USR2; kill -USR2 $$'; try unshare -i true; try unshare -u true; try unshare -iu true; \
    try hostname new; try hostname; grep Seccomp /proc/self/status; echo done";

/// A name, and the rules of a filter.
type Filter = (&'static str, fn() -> Value);

const FILTERS: &[Filter] = &[
    ("refused", || json!([{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO" }])),
    (
        "refused-as-told",
        || json!([{ "names": ["mkdir", "rmdir", "unlinkat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 }]),
    ),
    ("ends-the-process", || json!([{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL_PROCESS" }])),
    ("ends-the-thread", || json!([{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL_THREAD" }])),
    ("ends-it", || json!([{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_KILL" }])),
    ("signals", || json!([{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_TRAP" }])),
    ("logs", || json!([{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_LOG" }])),
    ("traces", || json!([{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_TRACE", "errnoRet": 7 }])),
    ("unknown-call", || json!([{ "names": ["no_such_call", "mkdir"], "action": "SCMP_ACT_ERRNO" }])),
    ("equal", || argument("kill", 1, 10, "SCMP_CMP_EQ")),
    ("not-equal", || argument("kill", 1, 10, "SCMP_CMP_NE")),
    ("less", || argument("kill", 1, 12, "SCMP_CMP_LT")),
    ("at-most", || argument("kill", 1, 10, "SCMP_CMP_LE")),
    ("at-least", || argument("kill", 1, 12, "SCMP_CMP_GE")),
    ("more", || argument("kill", 1, 10, "SCMP_CMP_GT")),
    ("masked", || {
        let both = 0x0c00_0000u64; // CLONE_NEWIPC, CLONE_NEWUTS
        let args = json!([{ "index": 0, "value": both, "valueTwo": 0x0800_0000u64, "op": "SCMP_CMP_MASKED_EQ" }]);
        json!([{ "names": ["unshare"], "action": "SCMP_ACT_ERRNO", "args": args }])
    }),
    ("two-of-one", || {
        let args = json!([
            { "index": 1, "value": 10, "op": "SCMP_CMP_EQ" },
            { "index": 1, "value": 12, "op": "SCMP_CMP_EQ" },
        ]);
        json!([{ "names": ["kill"], "action": "SCMP_ACT_ERRNO", "args": args }])
    }),
    ("two-of-two", || {
        let args = json!([
            { "index": 1, "value": 10, "op": "SCMP_CMP_EQ" },
            { "index": 0, "value": 0, "op": "SCMP_CMP_LT" },
        ]);
        json!([{ "names": ["kill"], "action": "SCMP_ACT_ERRNO", "args": args }])
    }),
    ("two-rules", || {
        let rule = |value: u64, errno: u32| {
            let args = json!([{ "index": 1, "value": value, "op": "SCMP_CMP_EQ" }]);
            json!({ "names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno, "args": args })
        };
        json!([rule(10, 5), rule(12, 7)])
    }),
];

fn argument(call: &str, index: u32, value: u64, op: &str) -> Value {
    let args = json!([{ "index": index, "value": value, "op": op }]);
    json!([{ "names": [call], "action": "SCMP_ACT_ERRNO", "errnoRet": 11, "args": args }])
}

pub(super) fn filters() {
    let mut all = Vec::new();
    let forms: &[(&str, Change)] = &[
        ("plain", |_| {}),
        ("architectures", |filter| {
            filter["architectures"] = json!(["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"])
        }),
        ("flags", |filter| filter["flags"] = json!(["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW"])),
        ("no-flags", |filter| filter["flags"] = json!([])),
    ];
    for (name, rules) in FILTERS {
        let chosen = if *name == "equal" { forms } else { &forms[..1] };
        for (form, shape) in chosen {
            let pair = pair(&format!("filter-{name}"), CALLS, |spec| {
                let mut filter = json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules() });
                shape(&mut filter);
                spec["linux"]["seccomp"] = filter;
                spec["root"]["readonly"] = json!(false);
            });
            let [ours, theirs] = pair.each_ref().map(Bundle::run);
            assert!(theirs.1.ends_with("done\n"), "runc itself cannot: {theirs:?}");
            if ours != theirs {
                all.push(format!("{name}, {form}: orlop {ours:?}\n{name}, {form}:  runc {theirs:?}"));
            }
        }
    }
    assert!(all.is_empty(), "{}", all.join("\n"));
}
