//! Configurations and names that no container is made of: with neither, and nothing of them stays.

use serde_json::{Value, json};

use super::{Change, pair};
use crate::bundle::Bundle;

const CASES: &[(&str, Change)] = &[
    ("no-process", |spec| drop(spec.as_object_mut().unwrap().remove("process"))),
    ("no-arguments", |spec| spec["process"]["args"] = json!([])),
    ("arguments-not-told", |spec| drop(spec["process"].as_object_mut().unwrap().remove("args"))),
    ("no-directory", |spec| spec["process"]["cwd"] = json!("")),
    ("directory-relative", |spec| spec["process"]["cwd"] = json!("bin")),
    ("directory-is-a-file", |spec| spec["process"]["cwd"] = json!("/etc/passwd")),
    ("directory-is-a-link-to-nowhere", |spec| spec["process"]["cwd"] = json!("/nowhere")),
    ("no-root", |spec| drop(spec.as_object_mut().unwrap().remove("root"))),
    ("root-missing", |spec| spec["root"]["path"] = json!("nowhere")),
    ("root-is-a-file", |spec| spec["root"]["path"] = json!("config.json")),
    ("no-linux", |spec| drop(spec.as_object_mut().unwrap().remove("linux"))),
    ("of-another-type", |spec| spec["process"]["args"] = json!("sh")),
    ("namespace-twice", |spec| namespaces(spec).push(json!({ "type": "pid" }))),
    ("namespace-unknown", |spec| namespaces(spec).push(json!({ "type": "sea" }))),
    ("namespace-missing", |spec| namespaces(spec).push(json!({ "type": "cgroup", "path": "/proc/self/ns/none" }))),
    ("namespace-of-another-kind", |spec| {
        namespaces(spec).push(json!({ "type": "cgroup", "path": "/proc/self/ns/mnt" }))
    }),
    ("users-without-a-map", |spec| namespaces(spec).push(json!({ "type": "user" }))),
    ("maps-that-overlap", |spec| {
        namespaces(spec).push(json!({ "type": "user" }));
        let map =
            json!([{ "containerID": 0, "hostID": 1000, "size": 10 }, { "containerID": 5, "hostID": 5000, "size": 9 }]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
    }),
    ("user-outside-the-map", |spec| {
        namespaces(spec).push(json!({ "type": "user" }));
        let map = json!([{ "containerID": 0, "hostID": 1000, "size": 10 }]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
        spec["process"]["user"] = json!({ "uid": 500, "gid": 0 });
    }),
    ("group-outside-the-map", |spec| {
        namespaces(spec).push(json!({ "type": "user" }));
        let map = json!([{ "containerID": 0, "hostID": 1000, "size": 10 }]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
        spec["process"]["user"] = json!({ "uid": 0, "gid": 0, "additionalGids": [500] });
    }),
    ("offsets-without-time", |spec| spec["linux"]["timeOffsets"] = json!({ "boottime": { "secs": 7 } })),
    ("offsets-of-no-clock", |spec| {
        namespaces(spec).push(json!({ "type": "time" }));
        spec["linux"]["timeOffsets"] = json!({ "sundial": { "secs": 7 } });
    }),
    ("name-of-the-host", |spec| namespaces(spec).retain(|one| one["type"] != "uts")),
    ("domain-of-the-host", |spec| {
        namespaces(spec).retain(|one| one["type"] != "uts");
        spec.as_object_mut().unwrap().remove("hostname");
        spec["domainname"] = json!("example.org");
    }),
    ("sysctl-of-the-host", |spec| sysctl(spec, "vm.swappiness", "1")),
    ("sysctl-of-the-hosts-network", |spec| {
        namespaces(spec).retain(|one| one["type"] != "network");
        sysctl(spec, "net.ipv4.ip_forward", "1");
    }),
    ("sysctl-of-the-hosts-network-by-path", |spec| {
        namespaces(spec).retain(|one| one["type"] != "network");
        namespaces(spec).push(json!({ "type": "network", "path": "/proc/self/ns/net" }));
        sysctl(spec, "net.ipv4.ip_forward", "1");
    }),
    ("sysctl-of-the-hosts-messages", |spec| {
        namespaces(spec).retain(|one| one["type"] != "ipc");
        sysctl(spec, "kernel.shmmax", "1");
    }),
    ("sysctl-unknown", |spec| sysctl(spec, "net.no.such", "1")),
    ("sysctl-with-another-value", |spec| sysctl(spec, "net.ipv4.ip_default_ttl", "many")),
    ("sysctl-that-leads-out", |spec| sysctl(spec, "net/../kernel/hostname", "x")),
    ("sysctl-of-the-name", |spec| sysctl(spec, "kernel.hostname", "x")),
    ("masks-of-the-host", |spec| namespaces(spec).retain(|one| one["type"] != "mount")),
    ("limit-unknown", |spec| limits(spec, json!([{ "type": "RLIMIT_DEPTH", "hard": 1, "soft": 1 }]))),
    ("limit-above-its-limit", |spec| limits(spec, json!([{ "type": "RLIMIT_CORE", "hard": 1, "soft": 2 }]))),
    ("limit-twice", |spec| {
        let one = json!({ "type": "RLIMIT_CORE", "hard": 1, "soft": 1 });
        limits(spec, json!([one, one]));
    }),
    ("score-too-high", |spec| spec["process"]["oomScoreAdj"] = json!(1001)),
    ("io-class-unknown", |spec| spec["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_SEA", "priority": 1 })),
    ("io-priority-too-low", |spec| {
        spec["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_BE", "priority": 9 })
    }),
    ("policy-unknown", |spec| spec["process"]["scheduler"] = json!({ "policy": "SCHED_SEA" })),
    ("policy-flag-unknown", |spec| {
        spec["process"]["scheduler"] = json!({ "policy": "SCHED_OTHER", "flags": ["SCHED_FLAG_SEA"] });
    }),
    ("policy-not-nice", |spec| spec["process"]["scheduler"] = json!({ "policy": "SCHED_OTHER", "nice": 30 })),
    ("policy-priority-of-none", |spec| {
        spec["process"]["scheduler"] = json!({ "policy": "SCHED_OTHER", "priority": 3 })
    }),
    ("personality-unknown", |spec| spec["linux"]["personality"] = json!({ "domain": "SEA" })),
    ("propagation-unknown", |spec| spec["linux"]["rootfsPropagation"] = json!("sideways")),
    ("filter-action-unknown", |spec| filter(spec, &json!({ "defaultAction": "SCMP_ACT_SINK" }))),
    ("filter-machine-unknown", |spec| {
        filter(
            spec,
            &json!({ "defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_PDP11"],
            "syscalls": [{ "names": ["mkdir"], "action": "SCMP_ACT_ERRNO" }] }),
        );
    }),
    ("filter-operator-unknown", |spec| {
        let args = json!([{ "index": 0, "value": 1, "op": "SCMP_CMP_ABOUT" }]);
        filter(
            spec,
            &json!({ "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "args": args }] }),
        );
    }),
    ("filter-argument-seven", |spec| {
        let args = json!([{ "index": 6, "value": 1, "op": "SCMP_CMP_EQ" }]);
        filter(
            spec,
            &json!({ "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["mkdir"], "action": "SCMP_ACT_ERRNO", "args": args }] }),
        );
    }),
    ("filter-flag-unknown", |spec| {
        filter(
            spec,
            &json!({ "defaultAction": "SCMP_ACT_ALLOW", "flags": ["SECCOMP_FILTER_FLAG_SEA"],
            "syscalls": [{ "names": ["mkdir"], "action": "SCMP_ACT_ERRNO" }] }),
        );
    }),
    ("filter-that-tells-nobody", |spec| {
        filter(
            spec,
            &json!({ "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["mkdir"], "action": "SCMP_ACT_NOTIFY" }] }),
        );
    }),
    ("filter-that-tells-of-telling", |spec| {
        filter(
            spec,
            &json!({ "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/no/such",
            "syscalls": [{ "names": ["write"], "action": "SCMP_ACT_NOTIFY" }] }),
        );
    }),
    ("device-of-no-kind", |spec| device(spec, json!({ "path": "/dev/x", "type": "x", "major": 1, "minor": 1 }))),
    ("device-without-a-number", |spec| device(spec, json!({ "path": "/dev/x", "type": "c", "major": -1, "minor": 1 }))),
    ("rule-of-no-kind", |spec| {
        spec["linux"]["resources"]["devices"] = json!([{ "allow": true, "type": "x", "access": "rwm" }]);
    }),
    ("mount-without-a-place", |spec| mount(spec, json!({ "type": "tmpfs", "source": "tmpfs" }))),
    ("mount-of-no-kind", |spec| mount(spec, json!({ "destination": "/m", "type": "nofs", "source": "x" }))),
    ("mount-of-nothing", |spec| bound(spec, "/no/such", "/m", &["bind"])),
    ("mount-with-an-unknown-option", |spec| {
        mount(spec, json!({ "destination": "/m", "type": "tmpfs", "source": "x", "options": ["sails=3"] }));
    }),
    ("mount-of-a-directory-on-a-file", |spec| bound(spec, "@BUNDLE/data", "/etc/passwd", &["bind"])),
    ("mount-of-a-file-on-a-directory", |spec| bound(spec, "@BUNDLE/data/file", "/etc", &["bind"])),
    ("mount-mapped-half", |spec| {
        let map = json!([{ "containerID": 0, "hostID": 2000, "size": 10 }]);
        mount(
            spec,
            json!({ "destination": "/m", "type": "bind", "source": "@BUNDLE/data", "options": ["bind"],
            "uidMappings": map }),
        );
    }),
    ("mount-mapped-that-is-none", |spec| {
        let map = json!([{ "containerID": 0, "hostID": 2000, "size": 10 }]);
        mount(
            spec,
            json!({ "destination": "/m", "type": "tmpfs", "source": "x", "options": [],
            "uidMappings": map, "gidMappings": map }),
        );
    }),
    ("copied-up-but-no-memory", |spec| bound(spec, "@BUNDLE/data", "/m", &["bind", "tmpcopyup"])),
    ("hook-by-a-relative-path", |spec| hook(spec, "createRuntime", "sh")),
    ("hook-missing", |spec| hook(spec, "createRuntime", "/no/such")),
    ("hook-missing-inside", |spec| hook(spec, "createContainer", "/no/such")),
    ("hook-that-fails", |spec| hook(spec, "createRuntime", "/bin/false")),
    ("memory-above-memory-and-swap", |spec| {
        resources(spec, json!({ "memory": { "limit": 64 << 20, "swap": 32 << 20 } }))
    }),
    ("memory-too-little", |spec| resources(spec, json!({ "memory": { "limit": -5 } }))),
    ("cpus-not-there", |spec| resources(spec, json!({ "cpu": { "cpus": "700" } }))),
    ("cpus-of-words", |spec| resources(spec, json!({ "cpu": { "cpus": "all" } }))),
    ("period-too-short", |spec| resources(spec, json!({ "cpu": { "quota": 5, "period": 5 } }))),
    ("group-files-unknown", |spec| resources(spec, json!({ "unified": { "no.such": "1" } }))),
    ("group-files-elsewhere", |spec| resources(spec, json!({ "unified": { "../cgroup.procs": "1" } }))),
];

fn namespaces(spec: &mut Value) -> &mut Vec<Value> {
    spec["linux"]["namespaces"].as_array_mut().unwrap()
}

fn sysctl(spec: &mut Value, name: &str, value: &str) {
    spec["linux"]["sysctl"] = json!({ name: value });
}

fn limits(spec: &mut Value, limits: Value) {
    spec["process"]["rlimits"] = limits;
}

fn filter(spec: &mut Value, filter: &Value) {
    spec["linux"]["seccomp"] = filter.clone();
}

fn device(spec: &mut Value, device: Value) {
    spec["linux"]["devices"] = json!([device]);
}

fn mount(spec: &mut Value, mount: Value) {
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

fn bound(spec: &mut Value, source: &str, destination: &str, options: &[&str]) {
    mount(spec, json!({ "destination": destination, "type": "bind", "source": source, "options": options }));
}

fn hook(spec: &mut Value, stage: &str, path: &str) {
    spec["hooks"] = json!({ stage: [{ "path": path }] });
}

fn resources(spec: &mut Value, resources: Value) {
    spec["linux"]["resources"] = resources;
}

/// How `run` ends, whether there is a container afterwards, and whether a control group is left.
fn end(bundle: &Bundle) -> (Option<i32>, bool, bool, String) {
    let (code, text) = bundle.run();
    let exists = bundle.output(&["state", &bundle.id]).status.success();
    let last = text.lines().last().unwrap_or_default().to_owned();
    (code, exists, !bundle.groups().is_empty(), last)
}

pub(super) fn all() {
    let mut all = Vec::new();
    for (name, change) in CASES {
        let pair = pair(&format!("refused-{name}"), "echo it runs; exit 42", change);
        let [ours, theirs] = pair.each_ref().map(end);
        if (ours.0, ours.1, ours.2) != (theirs.0, theirs.1, theirs.2) {
            all.push(format!("{name}: orlop {ours:?}\n{name}:  runc {theirs:?}"));
        }
    }
    assert!(all.is_empty(), "{}", all.join("\n"));
}
