//! `orlop check`: whether this machine can run a node, and what to do if not.

use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;

use crate::args::OutputOptions;
use crate::cli::format::{Table, print, print_machine};

/// The oldest kernel with everything that a pod's start needs (clone3 into a control group, mounts by descriptor).
const OLDEST_KERNEL: (u32, u32) = (5, 10);

/// One thing that was looked at.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Finding {
    what: &'static str,
    verdict: Verdict,
    /// What was seen.
    detail: String,
    /// What to do; empty when nothing is wrong.
    remedy: String,
}

/// How grave a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Verdict {
    Ok,
    /// The node runs; something an operator may want is absent.
    Limited,
    /// The node cannot run.
    Missing,
}

impl Finding {
    fn ok(what: &'static str, detail: impl Into<String>) -> Self {
        Self { what, verdict: Verdict::Ok, detail: detail.into(), remedy: String::new() }
    }

    fn of(what: &'static str, verdict: Verdict, detail: impl Into<String>, remedy: &str) -> Self {
        Self { what, verdict, detail: detail.into(), remedy: remedy.to_owned() }
    }
}

/// Prints the findings; fails when one of them prevents a node.
pub(crate) fn run(options: &OutputOptions) -> anyhow::Result<ExitCode> {
    let findings = find();
    if !print_machine(options.output, &findings)? {
        let mut table = Table::new(&["CHECK", "VERDICT", "FOUND", "REMEDY"]);
        for finding in &findings {
            let verdict = format!("{:?}", finding.verdict).to_lowercase();
            table.push(vec![finding.what.to_owned(), verdict, finding.detail.clone(), finding.remedy.clone()]);
        }
        print(&table.render());
    }
    let fatal = findings.iter().any(|finding| finding.verdict == Verdict::Missing);
    Ok(if fatal { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// Refuses to start a node on a machine that cannot run one, with all that is missing and what to do.
pub(crate) fn require() -> anyhow::Result<()> {
    let missing = find().into_iter().filter(|finding| finding.verdict == Verdict::Missing);
    let lines: Vec<String> = missing.map(|one| format!("{}: {}; {}", one.what, one.detail, one.remedy)).collect();
    anyhow::ensure!(lines.is_empty(), "this machine cannot run a node:\n  {}", lines.join("\n  "));
    Ok(())
}

/// Looks at everything; changes nothing.
pub(crate) fn find() -> Vec<Finding> {
    let mut findings = vec![user(), kernel(), overlay(), nftables(), user_namespaces()];
    findings.extend(control_groups());
    findings.extend(security_modules());
    findings.push(oom_scores());
    findings
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

fn user() -> Finding {
    if rustix::process::geteuid().is_root() {
        return Finding::ok("user", "root");
    }
    let remedy = "run as root: a node makes namespaces, mounts and control groups";
    Finding::of("user", Verdict::Missing, format!("uid {}", rustix::process::geteuid().as_raw()), remedy)
}

fn kernel() -> Finding {
    let release = rustix::system::uname().release().to_string_lossy().into_owned();
    let mut numbers = release.split(['.', '-']).filter_map(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= OLDEST_KERNEL {
        return Finding::ok("kernel", release);
    }
    Finding::of("kernel", Verdict::Missing, release, "boot Linux 5.10 or newer")
}

fn overlay() -> Finding {
    if read("/proc/filesystems").lines().any(|line| line.trim_start_matches("nodev").trim() == "overlay") {
        return Finding::ok("overlayfs", "present");
    }
    Finding::of(
        "overlayfs",
        Verdict::Missing,
        "not in /proc/filesystems",
        "load it (`modprobe overlay`) or boot a kernel with CONFIG_OVERLAY_FS",
    )
}

fn nftables() -> Finding {
    match nftables_socket() {
        Ok(()) => Finding::ok("nftables", "answers"),
        Err(error) => Finding::of(
            "nftables",
            Verdict::Missing,
            error.to_string(),
            "load it (`modprobe nf_tables`) or boot a kernel with CONFIG_NF_TABLES: services and pod networks need it",
        ),
    }
}

/// A netfilter socket can be opened when the kernel carries netfilter.
fn nftables_socket() -> Result<(), rustix::io::Errno> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, netlink, socket_with};
    socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, Some(netlink::NETFILTER)).map(drop)
}

fn user_namespaces() -> Finding {
    let present = Path::new("/proc/self/ns/user").exists();
    let limit: u64 = read("/proc/sys/user/max_user_namespaces").trim().parse().unwrap_or(0);
    if present && limit > 0 {
        return Finding::ok("user namespaces", format!("up to {limit}"));
    }
    let remedy = "pods with hostUsers: false are refused; set sysctl user.max_user_namespaces above 0 (CONFIG_USER_NS)";
    Finding::of("user namespaces", Verdict::Limited, if present { "limit 0" } else { "not in this kernel" }, remedy)
}

fn control_groups() -> Vec<Finding> {
    const WANTED: [&str; 4] = ["cpu", "memory", "pids", "cpuset"];
    let unified = read("/sys/fs/cgroup/cgroup.controllers");
    let (version, present): (_, Vec<String>) = if unified.is_empty() {
        let table = read("/proc/cgroups");
        let enabled =
            table.lines().filter(|line| !line.starts_with('#') && line.split_whitespace().nth(3) == Some("1"));
        let named = enabled.filter_map(|line| line.split_whitespace().next());
        ("v1", named.filter(|name| Path::new("/sys/fs/cgroup").join(name).is_dir()).map(str::to_owned).collect())
    } else {
        ("v2", unified.split_whitespace().map(str::to_owned).collect())
    };
    let absent: Vec<&str> = WANTED.into_iter().filter(|name| !present.iter().any(|other| other == name)).collect();
    let main = if absent.is_empty() {
        Finding::ok("control groups", format!("{version}: {}", present.join(" ")))
    } else {
        let detail = format!("{version}, without {}", absent.join(", "));
        Finding::of(
            "control groups",
            Verdict::Missing,
            detail,
            "mount the hierarchy and enable these controllers (kernel command line cgroup_enable=memory)",
        )
    };
    let mut findings = vec![main];
    if version == "v1" {
        let remedy =
            "boot with systemd.unified_cgroup_hierarchy=1 for memory.high, pressure figures and group OOM kills";
        findings.push(Finding::of("control group version", Verdict::Limited, "v1", remedy));
    }
    findings
}

fn security_modules() -> Vec<Finding> {
    let modules = read("/sys/kernel/security/lsm");
    let has = |name: &str| modules.split(',').any(|module| module.trim() == name);
    let seccomp = read("/proc/self/status").lines().any(|line| line.starts_with("Seccomp:"));
    let mut findings = vec![if seccomp {
        Finding::ok("seccomp", "present")
    } else {
        Finding::of("seccomp", Verdict::Missing, "not in this kernel", "boot a kernel with CONFIG_SECCOMP_FILTER")
    }];
    for (what, module) in [("AppArmor", "apparmor"), ("SELinux", "selinux")] {
        findings.push(if has(module) {
            Finding::ok(what, "enabled")
        } else {
            Finding::of(
                what,
                Verdict::Limited,
                "not enabled",
                "pods that ask for it are refused; enable it on the kernel command line (security=)",
            )
        });
    }
    findings
}

fn oom_scores() -> Finding {
    let allowed = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(rustix::thread::CapabilitySet::SYS_RESOURCE));
    if allowed {
        return Finding::ok("OOM scores", "may be lowered");
    }
    let remedy = "critical pods cannot be protected from the OOM killer; give the daemon CAP_SYS_RESOURCE";
    Finding::of("OOM scores", Verdict::Limited, "CAP_SYS_RESOURCE is missing", remedy)
}
