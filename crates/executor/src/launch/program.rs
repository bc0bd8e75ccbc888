//! The last part of a launch: from the launcher's privileges to the program's, and exec.

use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::os::fd::AsFd as _;
use std::path::Path;

use sys::rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use sys::rustix::io::Errno;
use sys::rustix::process::{Signal, fchdir, umask};
use sys::{caps, process};

use super::streams::Streams;
use super::{InStep as _, LaunchError, Reporter, Step, report};
use crate::plan::{CapabilitySets, ProcessPlan};

/// Turns the calling process, which is in the container already, into the program. Returns only on failure.
pub(crate) fn become_program(
    plan: &ProcessPlan,
    streams: &Streams,
    dies_with_parent: bool,
    reporter: &Reporter,
) -> Result<Infallible, LaunchError> {
    let early = enter_directory(&plan.cwd);
    umask(Mode::from_raw_mode(plan.umask));
    for limit in &plan.rlimits {
        process::set_limit(limit.resource, limit.soft, limit.hard).step(Step::Rlimit, limit.resource)?;
    }
    // Without no_new_privs the filter needs CAP_SYS_ADMIN, which goes away next.
    if !plan.no_new_privileges {
        set_filter(plan)?;
    }
    become_user(plan)?;
    if early.is_err() {
        enter_directory(&plan.cwd)?;
    }
    if plan.no_new_privileges {
        process::set_no_new_privileges().step(Step::NoNewPrivileges, "")?;
    }
    process::reset_signals().step(Step::Execute, "signals")?;
    process::set_standard_streams(streams.three.each_ref().map(|stream| stream.as_fd())).step(Step::Streams, "")?;
    if dies_with_parent {
        process::set_parent_death_signal(Some(Signal::KILL)).step(Step::ParentDeath, "")?;
    }
    let program = find(plan)?;
    process::keep_only(&[reporter.0.as_fd()], || report(execute(plan, &program, reporter), reporter))
}

/// The program by its path, though a descriptor of it was looked at: executed by descriptor, a script would be told a name
/// that it does not have, and before Linux 6.14 every program would be called by a number.
fn execute(plan: &ProcessPlan, program: &CStr, reporter: &Reporter) -> Result<Infallible, LaunchError> {
    if !reporter.executing() {
        process::exit_now(1);
    }
    if plan.no_new_privileges {
        set_filter(plan)?;
    }
    let errno = process::execute(program, &plan.arguments, &plan.environment);
    Err(LaunchError::new(Step::Execute, errno, program.to_string_lossy()))
}

/// No magic link: `/proc/self/fd/…` would lead to what the launcher still holds of the host (CVE-2024-21626).
fn enter_directory(path: &str) -> Result<(), LaunchError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let entered = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS).and_then(fchdir);
    entered.map_err(|errno| LaunchError::new(Step::WorkingDirectory, errno, path))
}

fn set_filter(plan: &ProcessPlan) -> Result<(), LaunchError> {
    match &plan.seccomp {
        Some(filter) => process::set_seccomp_filter(&filter.program.0, filter.flags).step(Step::Seccomp, ""),
        None => Ok(()),
    }
}

/// User, groups and capabilities. They are kept over the change of user and set to exactly what the plan says.
fn become_user(plan: &ProcessPlan) -> Result<(), LaunchError> {
    let CapabilitySets { bounding, effective, permitted, inheritable, ambient } = plan.capabilities;
    caps::bound(bounding).step(Step::Capabilities, "bounding set")?;
    process::set_keep_capabilities(true).step(Step::Capabilities, "keep")?;
    process::set_user(plan.uid, plan.gid, &plan.groups).step(Step::User, plan.uid)?;
    process::set_keep_capabilities(false).step(Step::Capabilities, "keep")?;
    caps::set(&caps::Sets { effective, permitted, inheritable }).step(Step::Capabilities, "")?;
    caps::set_ambient(ambient).step(Step::Capabilities, "ambient set")
}

/// The first candidate that can be executed; no magic link: `/proc/self/exe` is the node's own program.
fn find(plan: &ProcessPlan) -> Result<CString, LaunchError> {
    let mut reason = Errno::NOENT;
    for candidate in &plan.programs {
        match executable(Path::new(&*candidate.to_string_lossy())) {
            Ok(()) => return Ok(candidate.clone()),
            Err(Errno::NOENT | Errno::NOTDIR) => {}
            Err(errno) => reason = errno,
        }
    }
    let name = plan.arguments.first().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let place = if name.contains('/') { "" } else { " in $PATH" };
    Err(LaunchError::new(Step::Execute, reason, format!("{name}: executable file{place}")))
}

fn executable(path: &Path) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let file = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)?;
    let stat = sys::rustix::fs::fstat(&file)?;
    match sys::rustix::fs::FileType::from_raw_mode(stat.st_mode) {
        sys::rustix::fs::FileType::RegularFile if stat.st_mode & 0o111 != 0 => Ok(()),
        _ => Err(Errno::ACCESS),
    }
}
