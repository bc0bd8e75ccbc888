//! What is written into control groups, when a container is made and when its limits change.

use serde_json::{Value, json};

use super::{differences, pair};
use crate::bundle::Bundle;

/// A name, resources of a container, and the words of an `update` afterwards.
type Case = (&'static str, fn() -> Value, &'static [&'static str]);

const CASES: &[Case] = &[
    (
        "all",
        || {
            json!({
                "memory": { "limit": 64 << 20, "reservation": 32 << 20 },
                "cpu": { "shares": 512, "quota": 50000, "period": 100_000 },
                "pids": { "limit": 77 },
                "devices": [
                    { "allow": false, "access": "rwm" },
                    { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm" },
                    { "allow": true, "type": "b", "major": 7, "access": "r" },
                ],
            })
        },
        &["--memory", "80m", "--pids-limit", "33", "--cpu-share", "256", "--cpu-quota", "20000"],
    ),
    ("none", || json!({}), &["--memory", "32m"]),
    ("memory", || json!({ "memory": { "limit": 40 << 20, "swappiness": 60 } }), &["--memory-reservation", "10m"]),
    ("memory-and-swap", || json!({ "memory": { "limit": 40 << 20, "swap": 60 << 20 } }), &["--memory", "50m"]),
    ("memory-below-swap", || json!({ "memory": { "limit": 40 << 20, "swap": 60 << 20 } }), &["--memory-swap", "70m"]),
    (
        "memory-above-swap",
        || json!({ "memory": { "limit": 40 << 20, "swap": 60 << 20 } }),
        &["--memory", "100m", "--memory-swap", "120m"],
    ),
    (
        "memory-endless",
        || json!({ "memory": { "limit": -1, "swap": -1 } }),
        &["--memory", "40m", "--memory-swap", "-1"],
    ),
    ("memory-no-more", || json!({ "memory": { "limit": 40 << 20 } }), &["--memory", "-1"]),
    ("memory-zero", || json!({ "memory": { "limit": 0, "reservation": 0 } }), &["--memory", "0"]),
    (
        "memory-without-kills",
        || json!({ "memory": { "limit": 40 << 20, "disableOOMKiller": true } }),
        &["--memory", "41m"],
    ),
    ("cpu-shares", || json!({ "cpu": { "shares": 2 } }), &["--cpu-share", "262144"]),
    ("cpu-quota-alone", || json!({ "cpu": { "quota": 20000 } }), &["--cpu-period", "50000"]),
    ("cpu-quota-endless", || json!({ "cpu": { "quota": 20000, "period": 50000 } }), &["--cpu-quota", "-1"]),
    ("cpu-period-alone", || json!({ "cpu": { "period": 250_000 } }), &["--cpu-quota", "500000"]),
    (
        "cpu-burst",
        || json!({ "cpu": { "quota": 20000, "period": 50000, "burst": 10000 } }),
        &["--cpu-burst", "0", "--cpu-quota", "30000"],
    ),
    ("cpu-idle", || json!({ "cpu": { "idle": 1 } }), &["--cpu-idle", "0"]),
    ("cpu-set", || json!({ "cpu": { "cpus": "0", "mems": "0" } }), &["--cpuset-cpus", "0-1"]),
    ("processes", || json!({ "pids": { "limit": 1 } }), &["--pids-limit", "-1"]),
    ("processes-endless", || json!({ "pids": { "limit": -1 } }), &["--pids-limit", "5"]),
    ("devices-all", || json!({ "devices": [{ "allow": true, "access": "rwm" }] }), &["--pids-limit", "9"]),
    ("devices-none-told", || json!({ "devices": [] }), &["--pids-limit", "9"]),
    (
        "devices-but-some",
        || {
            json!({ "devices": [
                { "allow": false, "access": "rwm" },
                { "allow": true, "type": "c", "access": "rwm" },
                { "allow": true, "type": "b", "major": 8, "minor": 1, "access": "rw" },
                { "allow": false, "type": "b", "major": 8, "minor": 1, "access": "w" },
            ] })
        },
        &["--pids-limit", "9"],
    ),
    (
        "disks",
        || {
            json!({ "blockIO": { "throttleReadBpsDevice": [{ "major": 254, "minor": 0, "rate": 1 << 20 }],
                "throttleWriteIOPSDevice": [{ "major": 254, "minor": 0, "rate": 100 }] } })
        },
        &["--pids-limit", "9"],
    ),
    ("update-of-all", || json!({ "memory": { "limit": 64 << 20 } }), &["--resources", "@resources"]),
];

/// What the option `--resources` names.
const RESOURCES: &str = r#"{ "memory": { "limit": 83886080, "reservation": 1048576 }, "cpu": { "shares": 300, "quota": 40000,
    "period": 80000, "cpus": "0", "mems": "0" }, "pids": { "limit": 12 } }"#;

/// The files of a container's control group that limits are in.
fn limits(bundle: &Bundle) -> Vec<String> {
    const FILES: &[&str] = &[
        "cpu.shares",
        "cpu.cfs_quota_us",
        "cpu.cfs_period_us",
        "cpu.rt_runtime_us",
        "cpuset.cpus",
        "cpuset.mems",
        "memory.limit_in_bytes",
        "memory.soft_limit_in_bytes",
        "memory.swappiness",
        "memory.memsw.limit_in_bytes",
        "memory.oom_control",
        "memory.kmem.limit_in_bytes",
        "pids.max",
        "devices.list",
        "blkio.weight",
        "blkio.throttle.read_bps_device",
        "blkio.throttle.write_iops_device",
        "cpu.weight",
        "cpu.max",
        "memory.max",
        "memory.low",
        "memory.high",
        "memory.swap.max",
        "memory.oom.group",
        "io.weight",
        "io.max",
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

pub(super) fn all() {
    let mut all = Vec::new();
    for (name, resources, update) in CASES {
        let pair = pair(&format!("groups-{name}"), "sleep 1000", |spec| spec["linux"]["resources"] = resources());
        let [ours, theirs] = pair.each_ref().map(|bundle| changes(bundle, update));
        if theirs.iter().filter(|line| line.starts_with("made")).count() < 5 {
            all.push(format!("{name}: runc itself cannot: {theirs:?}"));
        }
        all.extend(differences(&ours, &theirs).into_iter().map(|line| format!("{name}: {line}")));
    }
    assert!(all.is_empty(), "{}", all.join("\n"));
}

/// What is there when it is made and when it has been changed; or how one or the other was refused.
fn changes(bundle: &Bundle, update: &[&str]) -> Vec<String> {
    let made = bundle.creation(&[]).status().unwrap();
    if !made.success() {
        return vec![format!("not created, {:?}", made.code())];
    }
    let prefixed = |word: &'static str| move |line: String| format!("{word} {line}");
    let before: Vec<String> = limits(bundle).into_iter().map(prefixed("made")).collect();
    let file = bundle.path().join("resources.json");
    std::fs::write(&file, RESOURCES).unwrap();
    let update: Vec<&str> =
        update.iter().map(|word| if *word == "@resources" { file.to_str().unwrap() } else { word }).collect();
    let changed = bundle.output(&[&["update"][..], &update, &[&bundle.id]].concat());
    let code = format!("update ends with {:?}", changed.status.code());
    let after = limits(bundle).into_iter().map(prefixed("changed"));
    before.into_iter().chain([code]).chain(after).collect()
}
