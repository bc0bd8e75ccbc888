//! Control groups that systemd makes: with a real systemd, as the first process of a container of Debian that this program runs
//! as its runtime; and there by its own command line beside runc's, by a user, and by Podman in its defaults, root's and a user's.
//!
//! Version 1 is tested on a host that has it, version 2 in the virtual machine.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]
#![allow(clippy::disallowed_methods, reason = "it starts itself")]

mod debian;

use std::path::Path;
use std::process::ExitCode;

use debian::Lab;

fn main() -> ExitCode {
    let words: Vec<std::ffi::OsString> = std::env::args_os().collect();
    if words.first().map(Path::new).and_then(Path::file_name).is_some_and(|name| name == "runc") {
        return oci::main(words);
    }
    let tests = [("units_are_as_under_runc", units as fn()), ("podman_runs_in_its_defaults", podman)];
    testkit::serial::main(&tests, missing())
}

fn missing() -> Option<String> {
    if !sys::rustix::process::geteuid().is_root() {
        return Some("root".to_owned());
    }
    debian::fetch().err().map(|error| format!("a Debian with systemd: {error:#}"))
}

/// What a container's unit and group are, at the beginning and after an update, for `$R`.
const LOOK: &str = r#"
look() {
    systemctl show orlop-one.scope -p Slice -p Delegate -p MemoryMax -p MemoryLimit -p MemoryLow -p MemorySwapMax \
        -p CPUWeight -p CPUShares -p CPUQuotaPerSecUSec -p CPUQuotaPeriodUSec -p TasksMax -p AllowedCPUs -p AllowedMemoryNodes \
        -p DevicePolicy -p MemoryAccounting -p CPUAccounting -p TasksAccounting -p DefaultDependencies -p KillSignal \
        -p TimeoutStopUSec -p MemoryHigh -p ActiveState | sort
    systemctl show orlop-one.scope -p DeviceAllow | tr ' ' '\n' | sort | tr '\n' ' '
    echo
    for dir in $(find /sys/fs/cgroup -type d -name orlop-one.scope | sort); do
        echo "$dir"
        for file in memory.max memory.low memory.swap.max memory.high memory.limit_in_bytes memory.soft_limit_in_bytes \
            cpu.weight cpu.max cpu.shares cpu.cfs_quota_us pids.max cpuset.cpus cpuset.mems; do
            test -e $dir/$file && echo "$file $(cat $dir/$file)"
        done
        wc -l < $dir/cgroup.procs
    done
}
C="$R --systemd-cgroup --root /run/lab-r"
$C run -d --bundle /lab/one one > /dev/null
look
$C exec one cat /proc/self/cgroup | grep -cE ':/.*orlop-one.scope$|:/$' | sed 's/^[1-9].*/inside/'
$C update --memory 96M --pids-limit 30 --cpu-share 512 one
systemctl daemon-reload
look
$C run --bundle /lab/one one; echo "code $?"
$C pause one; $C state one | grep status; $C resume one
$C kill one KILL; $C delete --force one
systemctl is-active orlop-one.scope; systemctl is-failed orlop-one.scope
find /sys/fs/cgroup -name 'orlop-one.scope'
$C run --bundle /lab/ends ends; echo "code $?"
$C run --bundle /lab/fails fails 2> /dev/null; echo "code $?"
systemctl list-units --all --no-legend 'orlop-*' 'runc-*' | wc -l
"#;

/// A user's containers, in his systemd's units: from outside of its tree.
const USER: &str = r#"
systemctl start user@1000.service
as_user() { setpriv --reuid 1000 --regid 1000 --clear-groups env HOME=/home/lab XDG_RUNTIME_DIR=/run/user/1000 "$@"; }
C="as_user $R --systemd-cgroup"
$C run -d --bundle /home/lab/one one > /home/lab/said
cat /home/lab/said
as_user systemctl --user show orlop-one.scope -p Slice -p MemoryMax -p TasksMax -p ActiveState
find /sys/fs/cgroup -name orlop-one.scope
cat $(find /sys/fs/cgroup -name orlop-one.scope)/pids.max
$C exec one sh -c 'cat /proc/self/cgroup; id -u; exit 5'; echo "code $?"
$C update --pids-limit 30 one
cat $(find /sys/fs/cgroup -name orlop-one.scope)/pids.max
$C delete --force one
find /sys/fs/cgroup -name orlop-one.scope
as_user systemctl --user list-units --all --no-legend 'orlop-*' | wc -l
"#;

fn units() {
    let lab = Lab::new();
    lab.bundle("one", "/lab/one", |spec| {
        spec["process"]["args"] = serde_json::json!(["sleep", "1000"]);
        spec["linux"]["cgroupsPath"] = "lab-one.slice:orlop:one".into();
        spec["annotations"] = serde_json::json!({
            "org.systemd.property.TimeoutStopSec": "77",
            "org.systemd.property.KillSignal": "10",
        });
        spec["linux"]["resources"]["memory"] = serde_json::json!({ "limit": 64 << 20, "reservation": 32 << 20 });
        spec["linux"]["resources"]["cpu"] =
            serde_json::json!({ "shares": 2048, "quota": 20000, "period": 50000, "cpus": "0", "mems": "0" });
        spec["linux"]["resources"]["pids"] = serde_json::json!({ "limit": 50 });
    });
    lab.bundle("ends", "/lab/ends", |spec| spec["process"]["args"] = serde_json::json!(["sh", "-c", "exit 3"]));
    lab.bundle("fails", "/lab/fails", |spec| spec["process"]["args"] = serde_json::json!(["nothing"]));
    let here = lab.run("ours", &format!("R=/lab/runc\n{LOOK}"));
    for part in ["\nMemoryMax=67108864\n", "\nMemoryLimit=67108864\n"] {
        let count = if here.contains(part) { 1 } else { 0 };
        println!("{part:?}: {count}");
    }
    for part in [
        "Slice=lab-one.slice",
        "Delegate=yes",
        "CPUQuotaPerSecUSec=400ms",
        "TasksMax=50",
        "TasksMax=30",
        "DevicePolicy=strict",
        "TimeoutStopUSec=1min 17s",
        "KillSignal=10",
        "inside",
        "paused",
        "code 3",
        "pids.max 30",
        "inactive",
    ] {
        assert!(here.contains(part), "{part} is not in:\n{here}");
    }
    assert!(here.ends_with("\ncode 1\n0\n"), "{here}");
    let there = lab.run("reference", &format!("R=/lab/reference\n{LOOK}"));
    assert_eq!(differences(&here, &there), Vec::<String>::new());
}

/// Lines that one has and the other has not.
fn differences(ours: &str, theirs: &str) -> Vec<String> {
    let (ours, theirs): (Vec<&str>, Vec<&str>) = (ours.lines().collect(), theirs.lines().collect());
    let only = |mark: &str, some: &[&str], others: &[&str]| -> Vec<String> {
        some.iter().filter(|line| !others.contains(line)).map(|line| format!("{mark} {line}")).collect()
    };
    [only("+", &ours, &theirs), only("-", &theirs, &ours)].concat()
}

/// What Podman is asked for. `$P` is it.
const PODMAN: &str = r#"
$P import /lab/bb.tar bb > /dev/null 2>&1
$P info --format '{{.Host.CgroupManager}} {{.Host.OCIRuntime.Path}}'
$P run --rm --network none --memory 32m --pids-limit 50 bb sh -c 'grep -cE "^0::(/|.*libpod.*)$" /proc/self/cgroup; exit 3'; echo "code $?"
$P run -d --name one --network none --memory 32m --pids-limit 50 bb sleep 1000 > /dev/null
$P exec one sh -c 'echo in; exit 4'; echo "code $?"
scope=$(find /sys/fs/cgroup -type d -name 'libpod-*.scope' ! -name '*conmon*' | grep -v -e freezer | head -1)
echo ${scope##*/} | cut -c1-7
cat $(find /sys/fs/cgroup -path "*${scope##*/}/pids.max" | head -1)
$P stop -t 1 one > /dev/null; $P start one > /dev/null && echo again
$P rm -f -t 0 one > /dev/null
find /sys/fs/cgroup -type d -name 'libpod-*.scope' ! -name '*conmon*' | wc -l
"#;

const SAID: &str = "systemd /lab/runc\n1\ncode 3\nin\ncode 4\nlibpod-\n50\nagain\n0\n";

fn podman() {
    let lab = Lab::new();
    lab.busybox_archive();
    let how = "podman --runtime /lab/runc --storage-driver vfs --events-backend file";
    let said = lab.run("podman", &format!("P='{how}'\n{PODMAN}"));
    assert_eq!(said, SAID);
    if !sys::cgroup::Hierarchy::detect().unwrap().is_unified() {
        println!("skipped: users' control groups need version 2");
        return;
    }
    lab.bundle("one", "/home/lab/one", |spec| {
        debian::without_root(spec, 1000);
        spec["process"]["args"] = serde_json::json!(["sh", "-c", "echo up; sleep 1000"]);
        spec["linux"]["cgroupsPath"] = ":orlop:one".into();
        spec["linux"]["resources"] = serde_json::json!({ "memory": { "limit": 64 << 20 }, "pids": { "limit": 50 } });
    });
    let how = format!("as_user env DBUS_SESSION_BUS_ADDRESS=unix:path=/run/user/1000/bus {how}");
    let said = lab.run("user", &format!("R=/lab/runc\n{USER}\necho by Podman\nP='{how}'\n{PODMAN}"));
    let (said, by_podman) = said.split_once("by Podman\n").unwrap();
    assert_eq!(by_podman, SAID);
    let scope = "/user.slice/user-1000.slice/user@1000.service/user.slice/orlop-one.scope";
    for part in ["up\n", "Slice=user.slice", "MemoryMax=67108864", "TasksMax=50", "\n50\n", "\n0\ncode 5\n30\n", scope]
    {
        assert!(said.contains(part), "{part} is not in:\n{said}");
    }
    assert!(said.ends_with("code 5\n30\n0\n"), "{said}");
}
