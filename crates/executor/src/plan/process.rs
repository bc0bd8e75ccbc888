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
    refuse_labels(process)?;
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
        capabilities: capabilities(process.capabilities.as_ref(), facts, warnings)?,
        rlimits: process.rlimits.iter().map(rlimit).collect::<Result<_, _>>()?,
        no_new_privileges: process.no_new_privileges,
        oom_score_adj: process.oom_score_adj.map(|score| score.clamp(-1000, 1000)),
        seccomp: filter.map(seccomp::compile).transpose()?.flatten(),
        terminal: process.terminal,
    })
}

/// "No empty means unconfined": a label that would not be applied is refused.
fn refuse_labels(process: &oci::Process) -> Result<(), PlanError> {
    if !matches!(process.apparmor_profile.as_str(), "" | "unconfined") {
        return Err(PlanError::invalid(
            "process.apparmorProfile",
            &process.apparmor_profile,
            "cannot be applied: AppArmor profiles are not supported yet; remove it",
        ));
    }
    if !process.selinux_label.is_empty() {
        return Err(PlanError::invalid(
            "process.selinuxLabel",
            &process.selinux_label,
            "cannot be applied: SELinux labels are not supported yet; remove it",
        ));
    }
    Ok(())
}

fn c_strings(field: &'static str, texts: &[String]) -> Result<Vec<CString>, PlanError> {
    let convert = |text: &String| c_string(field, text.clone());
    texts.iter().map(convert).collect()
}

fn c_string(field: &'static str, text: String) -> Result<CString, PlanError> {
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

fn capabilities(
    sets: Option<&oci::Capabilities>,
    facts: &HostFacts,
    warnings: &mut Vec<Warning>,
) -> Result<CapabilitySets, PlanError> {
    let Some(sets) = sets else { return Ok(CapabilitySets::default()) };
    let wanted = CapabilitySets {
        bounding: bits(&sets.bounding)?,
        effective: bits(&sets.effective)?,
        permitted: bits(&sets.permitted)?,
        inheritable: bits(&sets.inheritable)?,
        ambient: bits(&sets.ambient)?,
    };
    let all = wanted.bounding | wanted.effective | wanted.permitted | wanted.inheritable | wanted.ambient;
    let have = facts.capabilities;
    if all & !have != 0 {
        warnings.push(Warning::Capabilities(all & !have));
    }
    let permitted = wanted.permitted & have;
    let inheritable = wanted.inheritable & have;
    Ok(CapabilitySets {
        bounding: wanted.bounding & have,
        effective: wanted.effective & permitted,
        permitted,
        inheritable,
        // The kernel refuses to raise what is not both permitted and inheritable; the specification says to leave it out.
        ambient: wanted.ambient & permitted & inheritable,
    })
}

fn bits(names: &[String]) -> Result<u64, PlanError> {
    names.iter().try_fold(0, |bits, name| {
        let number = sys::caps::number(name)
            .ok_or_else(|| PlanError::invalid("process.capabilities", name, "is no capability of Linux"))?;
        Ok(bits | 1 << number)
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
