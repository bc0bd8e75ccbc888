//! The user, the kernel, and what it was built and booted with.

use std::path::Path;

use super::{Finding, read};

/// The oldest kernel with everything that the start of a pod needs: mount_setattr(2) is of 5.12.
const OLDEST_KERNEL: (u32, u32) = (5, 12);

/// What a node cannot do without: namespaces, mounts, networks, owners of files, and what containers are given.
const CAPABILITIES: &[&str] = &[
    "SYS_ADMIN",
    "NET_ADMIN",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];

/// What nothing works without.
pub(super) fn basics() -> Vec<Finding> {
    let uid = rustix::process::geteuid().as_raw();
    let effective = sys::caps::get().map(|sets| sets.effective).unwrap_or_default();
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    vec![user(uid, effective), kernel(&release), seccomp(&read("/proc/sys/kernel/seccomp/actions_avail"))]
}

/// What some pods want.
pub(super) fn extras() -> Vec<Finding> {
    let effective = sys::caps::get().map(|sets| sets.effective).unwrap_or_default();
    let user_namespaces = Path::new("/proc/self/ns/user").exists().then(|| read("/proc/sys/user/max_user_namespaces"));
    let modules = read("/sys/kernel/security/lsm");
    vec![
        user_namespace(user_namespaces.as_deref(), sys::kernel::maps_owners_on_tmpfs()),
        security_module("AppArmor", "apparmor", "pods that ask for a profile are refused", &modules),
        security_module("SELinux", "selinux", "labels that pods ask for have no effect", &modules),
        pressure(&read("/proc/pressure/memory")),
        oom_scores(effective),
    ]
}

fn has(effective: u64, name: &str) -> bool {
    sys::caps::number(&format!("CAP_{name}")).is_some_and(|number| effective & (1 << number) != 0)
}

fn user(uid: u32, effective: u64) -> Finding {
    if uid != 0 {
        let remedy = "run as root: a node makes namespaces, mounts and control groups";
        return Finding::missing("user", format!("uid {uid}"), remedy);
    }
    let lacks: Vec<String> =
        CAPABILITIES.iter().filter(|name| !has(effective, name)).map(|name| format!("CAP_{name}")).collect();
    if lacks.is_empty() {
        return Finding::ok("user", "root");
    }
    let remedy = "start it with these capabilities; a container has them when it is privileged";
    Finding::missing("user", format!("root without {}", lacks.join(", ")), remedy)
}

fn kernel(release: &str) -> Finding {
    let version = sys::kernel::parse(release);
    if version >= OLDEST_KERNEL {
        return Finding::ok("kernel", release);
    }
    Finding::missing("kernel", release, format!("boot Linux {}.{} or newer", OLDEST_KERNEL.0, OLDEST_KERNEL.1))
}

fn seccomp(actions: &str) -> Finding {
    if actions.split_whitespace().any(|action| action == "errno") {
        return Finding::ok("seccomp", "filters");
    }
    Finding::missing("seccomp", "no filters in this kernel", "boot a kernel with CONFIG_SECCOMP_FILTER")
}

/// `limit` is what `user.max_user_namespaces` says; `None` without user namespaces.
fn user_namespace(limit: Option<&str>, maps_owners: bool) -> Finding {
    const WHAT: &str = "user namespaces";
    let Some(limit) = limit else {
        let remedy = "boot a kernel with CONFIG_USER_NS; until then pods with `hostUsers: false` are refused";
        return Finding::limited(WHAT, "not in this kernel", remedy);
    };
    match limit.trim().parse::<u64>() {
        Ok(limit) if limit > 0 && maps_owners => Finding::ok(WHAT, format!("up to {limit}")),
        Ok(limit) if limit > 0 => {
            let remedy = "boot Linux 6.3 or newer; until then pods with `hostUsers: false` are refused";
            Finding::limited(WHAT, "without id-mapped mounts of tmpfs", remedy)
        }
        _ => {
            let remedy =
                "raise the sysctl user.max_user_namespaces; until then pods with `hostUsers: false` are refused";
            Finding::limited(WHAT, "the limit is 0", remedy)
        }
    }
}

fn security_module(what: &'static str, name: &str, without: &str, modules: &str) -> Finding {
    if modules.split(',').any(|module| module.trim() == name) {
        return Finding::ok(what, "enabled");
    }
    let remedy = format!("{without}; add {name} to lsm= on the kernel's command line");
    Finding::limited(what, "not enabled", remedy)
}

fn pressure(memory: &str) -> Finding {
    if memory.starts_with("some") {
        return Finding::ok("pressure figures", "measured");
    }
    Finding::limited(
        "pressure figures",
        "not measured",
        "statistics say nothing about pressure; boot with psi=1 (CONFIG_PSI)",
    )
}

fn oom_scores(effective: u64) -> Finding {
    if has(effective, "SYS_RESOURCE") {
        return Finding::ok("OOM scores", "may be lowered");
    }
    let remedy = "critical pods cannot be protected from the OOM killer; give the daemon CAP_SYS_RESOURCE";
    Finding::limited("OOM scores", "CAP_SYS_RESOURCE is missing", remedy)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Verdict::{Limited, Missing, Ok};

    #[test]
    fn root_without_capabilities_is_not_enough() {
        assert_eq!(user(1000, u64::MAX).verdict, Missing);
        assert_eq!(user(0, u64::MAX).verdict, Ok);
        let without = !(1 << sys::caps::number("CAP_SYS_ADMIN").unwrap());
        let found = user(0, without);
        assert_eq!((found.verdict, found.detail.as_str()), (Missing, "root without CAP_SYS_ADMIN"));
    }

    #[test]
    fn versions_are_numbers() {
        for (release, verdict) in
            [("6.1.0-56-cloud-amd64", Ok), ("5.12.3", Ok), ("5.9.0", Missing), ("4.19.0-27", Missing), ("?", Missing)]
        {
            assert_eq!(kernel(release).verdict, verdict, "{release}");
        }
    }

    #[test]
    fn what_is_absent_is_limited_or_missing() {
        assert_eq!(seccomp("kill_process kill_thread trap errno log allow").verdict, Ok);
        assert_eq!(seccomp("").verdict, Missing);
        assert_eq!(user_namespace(Some("3965\n"), true).verdict, Ok);
        for limited in
            [user_namespace(Some("0\n"), true), user_namespace(None, true), user_namespace(Some("9\n"), false)]
        {
            assert_eq!(limited.verdict, Limited, "{limited:?}");
        }
        assert_eq!(security_module("AppArmor", "apparmor", "", "lockdown,capability,apparmor\n").verdict, Ok);
        assert_eq!(security_module("SELinux", "selinux", "", "lockdown,capability,apparmor\n").verdict, Limited);
        assert_eq!(pressure("some avg10=0.00").verdict, Ok);
        assert_eq!(pressure("").verdict, Limited);
    }
}
