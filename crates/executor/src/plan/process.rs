//! The process of a container or of an exec.

use std::ffi::CString;

use sys::process::namespace;

use super::types::*;
use super::{HostFacts, PlanError};
use crate::oci::{self, NamespaceKind};
use crate::seccomp;

/// The number of a kind of namespace in clone(2).
pub(crate) fn mask_of(kind: NamespaceKind) -> u64 {
    match kind {
        NamespaceKind::User => namespace::USER,
        NamespaceKind::Pid => namespace::PID,
        NamespaceKind::Network => namespace::NETWORK,
        NamespaceKind::Mount => namespace::MOUNT,
        NamespaceKind::Ipc => namespace::IPC,
        NamespaceKind::Uts => namespace::UTS,
        NamespaceKind::Cgroup => namespace::CGROUP,
        NamespaceKind::Time => namespace::TIME,
    }
}

/// Where programs are looked for when the environment has no `PATH`.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Compiles a process.
pub(crate) fn process(
    process: Option<&oci::Process>,
    filter: Option<&oci::Seccomp>,
    facts: &HostFacts,
    warnings: &mut Vec<Warning>,
) -> Result<ProcessPlan, PlanError> {
    let process = process.ok_or(PlanError::Missing("process"))?;
    if !process.cwd.starts_with('/') {
        return Err(PlanError::invalid("process.cwd", &process.cwd, "is not an absolute path"));
    }
    let environment = environment(process)?;
    let (programs, arguments) = command(&process.args, &environment)?;
    Ok(ProcessPlan {
        programs,
        arguments,
        environment,
        cwd: process.cwd.clone(),
        uid: process.user.uid,
        gid: process.user.gid,
        groups: process.user.additional_gids.clone(),
        umask: process.user.umask.unwrap_or(0o022),
        capabilities: capabilities(process.capabilities.as_ref(), facts, warnings),
        rlimits: process.rlimits.iter().map(rlimit).collect::<Result<_, _>>()?,
        no_new_privileges: process.no_new_privileges,
        oom_score_adj: process.oom_score_adj.map(oom_score_adj).transpose()?,
        seccomp: filter.map(seccomp::compile).transpose()?.flatten(),
        scheduler: process.scheduler.as_ref().map(scheduler).transpose()?,
        io_priority: process.io_priority.as_ref().map(io_priority).transpose()?,
        personality: None,
        cpus_first: Vec::new(),
        cpus: Vec::new(),
        apparmor: apparmor(&process.apparmor_profile, facts)?,
        selinux: selinux(&process.selinux_label, facts)?,
        keyring: None,
        finds_home: false,
        owns_streams: false,
        terminal: process.terminal,
    })
}

/// "No empty means unconfined": a profile that would not be applied is refused.
fn apparmor(profile: &str, facts: &HostFacts) -> Result<Option<String>, PlanError> {
    match profile {
        "" => Ok(None),
        "unconfined" if !facts.apparmor => Ok(None),
        _ if facts.apparmor => Ok(Some(profile.to_owned())),
        _ => Err(PlanError::invalid(
            "process.apparmorProfile",
            profile,
            "cannot be applied: the kernel runs without AppArmor; remove it",
        )),
    }
}

fn selinux(label: &str, facts: &HostFacts) -> Result<Option<String>, PlanError> {
    match label {
        "" => Ok(None),
        _ if facts.selinux => Ok(Some(label.to_owned())),
        _ => Err(PlanError::invalid(
            "process.selinuxLabel",
            label,
            "cannot be applied: the kernel runs without SELinux; remove it",
        )),
    }
}

/// Policies by number, and flags by bit, of linux/sched.h.
const POLICIES: [(&str, u32); 7] = [
    ("SCHED_OTHER", 0),
    ("SCHED_FIFO", 1),
    ("SCHED_RR", 2),
    ("SCHED_BATCH", 3),
    ("SCHED_ISO", 4),
    ("SCHED_IDLE", 5),
    ("SCHED_DEADLINE", 6),
];
const SCHEDULER_FLAGS: [(&str, u64); 7] = [
    ("SCHED_FLAG_RESET_ON_FORK", 0x01),
    ("SCHED_FLAG_RECLAIM", 0x02),
    ("SCHED_FLAG_DL_OVERRUN", 0x04),
    ("SCHED_FLAG_KEEP_POLICY", 0x08),
    ("SCHED_FLAG_KEEP_PARAMS", 0x10),
    ("SCHED_FLAG_UTIL_CLAMP_MIN", 0x20),
    ("SCHED_FLAG_UTIL_CLAMP_MAX", 0x40),
];

fn scheduler(wanted: &oci::Scheduler) -> Result<SchedulerPlan, PlanError> {
    if let Some(nice) = wanted.nice.filter(|nice| !(-20..=19).contains(nice)) {
        return Err(PlanError::invalid("process.scheduler.nice", nice, "is not from -20 to 19"));
    }
    let unknown = |field, value: &str| PlanError::invalid(field, value, "is not known");
    let policy = named(&POLICIES, &wanted.policy);
    let mut flags = 0;
    for flag in &wanted.flags {
        flags |= named(&SCHEDULER_FLAGS, flag).ok_or_else(|| unknown("process.scheduler.flags", flag))?;
    }
    Ok(SchedulerPlan {
        policy: policy.ok_or_else(|| unknown("process.scheduler.policy", &wanted.policy))?,
        flags,
        nice: wanted.nice.unwrap_or(0),
        priority: wanted.priority.and_then(|priority| u32::try_from(priority).ok()).unwrap_or(0),
        runtime_ns: wanted.runtime.unwrap_or(0),
        deadline_ns: wanted.deadline.unwrap_or(0),
        period_ns: wanted.period.unwrap_or(0),
    })
}

fn oom_score_adj(score: i32) -> Result<i32, PlanError> {
    let is_known = (-1000..=1000).contains(&score);
    is_known
        .then_some(score)
        .ok_or_else(|| PlanError::invalid("process.oomScoreAdj", score, "is not from -1000 to 1000"))
}

fn named<T: Copy>(table: &[(&str, T)], name: &str) -> Option<T> {
    table.iter().find(|(known, _)| *known == name).map(|(_, value)| *value)
}

/// The class's number and the level.
fn io_priority(wanted: &oci::IoPriority) -> Result<(u32, u32), PlanError> {
    const CLASSES: [(&str, u32); 3] = [("IOPRIO_CLASS_RT", 1), ("IOPRIO_CLASS_BE", 2), ("IOPRIO_CLASS_IDLE", 3)];
    let class = named(&CLASSES, &wanted.class);
    let class = class
        .ok_or_else(|| PlanError::invalid("process.ioPriority.class", &wanted.class, "is none of RT, BE, IDLE"))?;
    let level = u32::try_from(wanted.priority).ok().filter(|level| *level < 8);
    let level = level
        .ok_or_else(|| PlanError::invalid("process.ioPriority.priority", wanted.priority, "is not from 0 to 7"))?;
    Ok((class, level))
}

/// The number of an execution domain.
pub(super) fn personality(wanted: &oci::Personality) -> Result<u64, PlanError> {
    if let Some(flag) = wanted.flags.first() {
        return Err(PlanError::invalid("linux.personality.flags", flag, "is not known: the specification has none"));
    }
    named(&[("LINUX", 0), ("LINUX32", 8)], &wanted.domain)
        .ok_or_else(|| PlanError::invalid("linux.personality.domain", &wanted.domain, "is none of LINUX and LINUX32"))
}

/// A list of CPUs as `0-3,7` in words of 64.
pub(crate) fn cpu_words(field: &'static str, list: &str) -> Result<Vec<u64>, PlanError> {
    const CPU_MAX: usize = 8192; // CONFIG_NR_CPUS at its largest
    let wrong = || PlanError::invalid(field, list, "is no list of CPUs as \"0-3,7\"");
    let mut words = Vec::new();
    for range in list.split(',').map(str::trim).filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (usize, usize) =
            (first.trim().parse().map_err(|_| wrong())?, last.trim().parse().map_err(|_| wrong())?);
        if first > last || last >= CPU_MAX {
            return Err(wrong());
        }
        words.resize(words.len().max(last / 64 + 1), 0);
        (first..=last).for_each(|cpu| words[cpu / 64] |= 1 << (cpu % 64));
    }
    Ok(words)
}

pub(super) fn c_strings(field: &'static str, texts: &[String]) -> Result<Vec<CString>, PlanError> {
    let convert = |text: &String| c_string(field, text.clone());
    texts.iter().map(convert).collect()
}

pub(super) fn c_string(field: &'static str, text: String) -> Result<CString, PlanError> {
    CString::new(text).map_err(|error| {
        let text = String::from_utf8_lossy(&error.into_vec()).into_owned();
        PlanError::invalid(field, text, "has a zero byte inside")
    })
}

/// The programs to try, and the arguments: the program itself if it has a slash, else one candidate for each directory of
/// the container's own `PATH`.
pub(crate) fn command(args: &[String], environment: &[CString]) -> Result<(Vec<CString>, Vec<CString>), PlanError> {
    let name = args.first().filter(|name| !name.is_empty()).ok_or(PlanError::Missing("process.args"))?;
    let arguments = c_strings("process.args", args)?;
    if name.contains('/') {
        return Ok((vec![c_string("process.args", name.clone())?], arguments));
    }
    let path = environment.iter().find_map(|entry| entry.to_bytes().strip_prefix(b"PATH="));
    let path = path.map_or(DEFAULT_PATH.into(), String::from_utf8_lossy);
    let directories = path.split(':').filter(|directory| directory.starts_with('/'));
    let candidates =
        directories.map(|directory| c_string("process.args", format!("{}/{name}", directory.trim_end_matches('/'))));
    Ok((candidates.collect::<Result<_, _>>()?, arguments))
}

/// The environment; of entries with the same name the last counts, as a shell would have it.
fn environment(process: &oci::Process) -> Result<Vec<CString>, PlanError> {
    let name = |entry: &str| entry.split_once('=').map(|(name, _)| name.to_owned()).filter(|name| !name.is_empty());
    let mut seen = std::collections::HashSet::new();
    let mut kept = Vec::with_capacity(process.env.len() + 1);
    for entry in process.env.iter().rev() {
        let name =
            name(entry).ok_or_else(|| PlanError::invalid("process.env", entry, "is not of the form NAME=value"))?;
        if seen.insert(name) {
            kept.push(c_string("process.env", entry.clone())?);
        }
    }
    kept.reverse();
    Ok(kept)
}

fn capabilities(sets: Option<&oci::Capabilities>, facts: &HostFacts, warnings: &mut Vec<Warning>) -> CapabilitySets {
    let Some(sets) = sets else { return CapabilitySets::default() };
    let wanted = CapabilitySets {
        bounding: bits(&sets.bounding, warnings),
        effective: bits(&sets.effective, warnings),
        permitted: bits(&sets.permitted, warnings),
        inheritable: bits(&sets.inheritable, warnings),
        ambient: bits(&sets.ambient, warnings),
    };
    let all = wanted.bounding | wanted.effective | wanted.permitted | wanted.inheritable | wanted.ambient;
    let have = facts.capabilities;
    if all & !have != 0 {
        warnings.push(Warning::Capabilities(all & !have));
    }
    let permitted = wanted.permitted & have;
    let inheritable = wanted.inheritable & have;
    CapabilitySets {
        bounding: wanted.bounding & have,
        effective: wanted.effective & permitted,
        permitted,
        inheritable,
        // The kernel refuses to raise what is not both permitted and inheritable; the specification says to leave it out.
        ambient: wanted.ambient & permitted & inheritable,
    }
}

/// What is no capability is left out with a warning, as the specification asks (config.md, "capabilities").
fn bits(names: &[String], warnings: &mut Vec<Warning>) -> u64 {
    names.iter().fold(0, |bits, name| match sys::caps::number(name) {
        Some(number) => bits | 1 << number,
        None => {
            let unknown = Warning::UnknownCapability(name.clone());
            if !warnings.contains(&unknown) {
                warnings.push(unknown);
            }
            bits
        }
    })
}

/// Names by number of setrlimit(2) on x86-64 and arm64.
const RLIMITS: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

fn rlimit(limit: &oci::Rlimit) -> Result<Rlimit, PlanError> {
    let name = limit.kind.strip_prefix("RLIMIT_").unwrap_or(&limit.kind);
    let number = RLIMITS.iter().position(|known| *known == name).and_then(|number| u32::try_from(number).ok());
    let resource = number.ok_or_else(|| PlanError::invalid("process.rlimits", &limit.kind, "is no resource limit"))?;
    if limit.soft > limit.hard {
        return Err(PlanError::invalid("process.rlimits", &limit.kind, "has a soft limit above the hard one"));
    }
    Ok(Rlimit { resource, soft: limit.soft, hard: limit.hard })
}
