//! Groups of pods that systemd makes: with a real systemd, as the first process of a container of Debian, and with runc, which
//! asks the same systemd for the group of a container in one of them.
//!
//! Version 1 is tested on a host that has it, version 2 in the virtual machine.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test program")]
#![allow(clippy::disallowed_methods, reason = "it starts itself")]

#[path = "../../../oci/tests/systemd/debian.rs"]
#[expect(dead_code, reason = "its other test needs more")]
mod debian;

use std::path::Path;
use std::process::ExitCode;

use debian::Lab;
use k8s_openapi::api::core::v1::Pod;
use kubelet::qos::{Driver, Part, Rules, Tree};
use serde_json::json;
use sys::cgroup::Hierarchy;

fn main() -> ExitCode {
    let words: Vec<std::ffi::OsString> = std::env::args_os().collect();
    match words.first().map(Path::new).and_then(Path::file_name).and_then(|name| name.to_str()) {
        Some("runc") => return oci::main(words),
        Some("tree") => return tree(&words[1].to_string_lossy()),
        _ => {}
    }
    testkit::serial::main(&[("pods_have_slices", pods_have_slices as fn())], missing())
}

fn missing() -> Option<String> {
    if !sys::rustix::process::geteuid().is_root() {
        return Some("root".to_owned());
    }
    debian::fetch().err().map(|error| format!("a Debian with systemd: {error:#}"))
}

/// What the program does inside: one thing to the tree.
fn tree(what: &str) -> ExitCode {
    let pod = |memory: &str| -> Pod {
        let resources = json!({ "requests": { "cpu": "100m" }, "limits": { "cpu": "500m", "memory": memory } });
        let spec = json!({ "containers": [{ "name": "c", "resources": resources }] });
        serde_json::from_value(json!({ "metadata": { "name": "p", "uid": "u-1" }, "spec": spec })).unwrap()
    };
    let hierarchy = Hierarchy::whole(Path::new("/sys/fs/cgroup")).unwrap();
    let tree = Tree::new(hierarchy, Rules { pids: Some(50), ..Rules::of_machine() }).by(Driver::Systemd);
    let done = match what {
        "roots" => tree.ensure_roots(2000, Some(1 << 30)),
        "pod" => tree.ensure_pod(&pod("64Mi"), false).map(drop).and_then(|()| tree.share([pod("64Mi")].iter())),
        "resize" => tree.resize_pod(&pod("96Mi"), Part::Memory),
        _ => tree.remove("u-1"),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{what}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What systemd and the kernel say of the groups.
const SCRIPT: &str = r#"
cp /lab/runc /lab/tree
POD=kubepods-burstable-podu_1.slice
look() {
    for unit in kubepods.slice kubepods-burstable.slice $POD; do
        echo "$unit $(systemctl show $unit -p ActiveState --value) $(ls -d $(find /sys/fs/cgroup -type d -name $unit | head -1))"
    done
    systemctl show $POD -p MemoryMax -p MemoryLimit -p TasksMax -p CPUQuotaPerSecUSec
    for dir in $(find /sys/fs/cgroup -type d -name $POD); do
        for file in memory.max memory.limit_in_bytes cpu.max cpu.cfs_quota_us pids.max; do
            test -e $dir/$file && echo "$file $(cat $dir/$file)"
        done
    done
}
/lab/tree roots && /lab/tree pod && echo made
/lab/tree roots && /lab/tree pod && echo made again
look
/lab/reference --systemd-cgroup run -d --bundle /lab/one one > /dev/null
grep -c "/kubepods.slice/kubepods-burstable.slice/$POD/cri-one.scope$" /proc/$(/lab/reference state one | grep '"pid"' | tr -dc 0-9)/cgroup | sed 's/^[1-9].*/inside/'
systemctl daemon-reload
echo reloaded
look
/lab/tree resize && echo resized
look
/lab/tree remove && echo removed
systemctl is-active $POD
find /sys/fs/cgroup -name $POD -o -name 'cri-one.scope' | wc -l
systemctl is-active kubepods-burstable.slice
"#;

fn pods_have_slices() {
    let lab = Lab::new();
    lab.bundle("one", "/lab/one", |spec| {
        spec["process"]["args"] = json!(["sleep", "1000"]);
        spec["linux"]["cgroupsPath"] = "kubepods-burstable-podu_1.slice:cri:one".into();
    });
    let said = lab.run("slices", SCRIPT);
    let (made, after) = said.split_once("reloaded\n").unwrap_or_else(|| panic!("{said}"));
    let (reloaded, resized) = after.split_once("resized\n").unwrap_or_else(|| panic!("{said}"));
    let has = |text: &str, any_of: &[&str]| {
        assert!(any_of.iter().any(|line| text.lines().any(|found| found.starts_with(line))), "{any_of:?}:\n{said}");
    };
    for part in ["made", "made again", "inside", "kubepods.slice active", "kubepods-burstable-podu_1.slice active"] {
        has(made, &[part]);
    }
    assert!(made.contains("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podu_1.slice\n"), "{said}");
    for text in [made, reloaded] {
        has(text, &["MemoryMax=67108864", "MemoryLimit=67108864"]);
        has(text, &["memory.max 67108864", "memory.limit_in_bytes 67108864"]);
        has(text, &["cpu.max 50000 100000", "cpu.cfs_quota_us 50000"]);
        for line in ["TasksMax=50", "pids.max 50", "CPUQuotaPerSecUSec=500ms"] {
            has(text, &[line]);
        }
    }
    has(resized, &["MemoryMax=100663296", "MemoryLimit=100663296"]);
    has(resized, &["memory.max 100663296", "memory.limit_in_bytes 100663296"]);
    assert!(resized.ends_with("removed\ninactive\n0\nactive\n"), "{said}");
}
