//! `features`: what this runtime can do (features.md of the specification). containerd and Podman decide by it.

use executor::oci;

use crate::error::Error;
use crate::inspect::print;

/// Mount options with a meaning of their own; others are the file system's.
const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "lazytime",
    "loud",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "rexec",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "tmpcopyup",
    "unbindable",
];

const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"];
const HOOKS: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
const ACTIONS: [&str; 9] = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
];
const OPERATORS: [&str; 7] =
    ["SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"];
const FILTER_FLAGS: [&str; 4] = [
    "SECCOMP_FILTER_FLAG_TSYNC",
    "SECCOMP_FILTER_FLAG_LOG",
    "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
    "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
];
const ARCHITECTURES: [&str; 4] = ["SCMP_ARCH_AARCH64", "SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"];

pub(crate) fn print_all() -> Result<(), Error> {
    let text = serde_json::to_string_pretty(&features()).map_err(Error::json("features"))?;
    print(&format!("{text}\n"))
}

fn features() -> serde_json::Value {
    serde_json::json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": oci::VERSION,
        "hooks": HOOKS,
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": NAMESPACES,
            "capabilities": sys::caps::names(sys::caps::ALL),
            "cgroup": { "v1": true, "v2": true, "systemd": true, "systemdUser": true, "rdma": true },
            "seccomp": {
                "enabled": true,
                "actions": ACTIONS,
                "operators": OPERATORS,
                "archs": ARCHITECTURES,
                "knownFlags": FILTER_FLAGS,
                "supportedFlags": FILTER_FLAGS,
            },
            "apparmor": { "enabled": true },
            "selinux": { "enabled": true },
            "intelRdt": { "enabled": false },
            "mountExtensions": { "idmap": { "enabled": true } },
            "netDevices": { "enabled": false },
        },
        "annotations": { "org.opencontainers.runc.checkpoint.enabled": "false" },
        "potentiallyUnsafeConfigAnnotations": ["org.systemd.property."],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is promised is what the executor takes.
    #[test]
    fn listed_options_mean_something() {
        let facts = executor::HostFacts::default();
        for option in MOUNT_OPTIONS {
            let spec = serde_json::json!({
                "process": { "args": ["a"], "cwd": "/" },
                "root": { "path": "rootfs" },
                "mounts": [{ "destination": "/x", "type": "none", "source": "/x", "options": ["bind", option] }],
                "linux": { "namespaces": [{ "type": "mount" }] },
            });
            let plan = executor::plan(&serde_json::from_value(spec).unwrap(), &facts);
            assert!(plan.is_ok(), "{option}: {plan:?}");
        }
        for action in ACTIONS {
            let filter = serde_json::json!({
                "defaultAction": "SCMP_ACT_ALLOW",
                "listenerPath": "/x",
                "architectures": ARCHITECTURES,
                "syscalls": [{ "names": ["getcwd"], "action": action }],
            });
            executor::seccomp::compile(&serde_json::from_value(filter).unwrap()).unwrap();
        }
    }
}
