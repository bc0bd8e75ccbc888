//! The last part of a launch: from the launcher's privileges to the program's, and exec.

use std::borrow::Cow;
use std::convert::Infallible;
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;

use sys::rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Uid, openat2};
use sys::rustix::io::Errno;
use sys::rustix::process::{Signal, fchdir, umask};
use sys::schedule::{self, Inherited};
use sys::{caps, process};

use super::streams::Streams;
use super::{InStep as _, LaunchError, Reporter, Step, report};
use crate::hook::Confinement;
use crate::plan::{CapabilitySets, HooksPlan, ProcessPlan};

/// What the last part of a launch needs.
#[derive(Debug)]
pub(crate) struct Last<'a> {
    pub(crate) plan: &'a ProcessPlan,
    pub(crate) streams: Streams,
    pub(crate) labels: Labels,
    /// Descriptors that the program keeps.
    pub(crate) inherited: &'a Inherited,
    pub(crate) dies_with_parent: bool,
    /// Those of a container's first process, and the host's `/proc`.
    pub(crate) hooks: Option<(&'a HooksPlan, BorrowedFd<'a>)>,
}

/// Turns the calling process, which is in the container already, into the program. Returns only on failure.
pub(crate) fn become_program(last: &Last<'_>, reporter: &Reporter) -> Result<Infallible, LaunchError> {
    let Last { plan, streams, .. } = last;
    if let Some(name) = &plan.keyring {
        last.labels.set_keyring(plan.selinux.as_deref().unwrap_or_default())?;
        join_keyring(name)?;
        last.labels.set_keyring("")?;
    }
    if let Some((hooks, proc)) = last.hooks {
        start_hooks(plan, hooks, proc)?;
    }
    if plan.owns_streams {
        own_streams(streams, plan.uid)?;
    }
    confine(plan, &last.labels, &|listener| reporter.listener(listener))?;
    process::reset_signals().step(Step::Execute, "signals")?;
    process::set_standard_streams(streams.three.each_ref().map(|stream| stream.as_fd())).step(Step::Streams, "")?;
    if last.dies_with_parent {
        process::set_parent_death_signal(Some(Signal::KILL)).step(Step::ParentDeath, "")?;
    }
    let program = find(plan)?;
    let environment = environment(plan)?;
    let keep: Vec<BorrowedFd<'_>> = last.inherited.borrowed().chain([reporter.0.as_fd()]).collect();
    process::keep_only(&keep, || report(execute(plan, &program, &environment, reporter), reporter))
}

/// Their programs are the image's: each takes on what the container's program does before it is executed.
fn start_hooks(plan: &ProcessPlan, hooks: &HooksPlan, proc: BorrowedFd<'_>) -> Result<(), LaunchError> {
    // Nobody answers for a hook: what its filter would report fails.
    let unheard = |_: BorrowedFd<'_>| ();
    let confinement = Confinement {
        enter: &|| confine(plan, &Labels::open(plan, proc)?, &unheard),
        last: &|| if plan.no_new_privileges { set_filter(plan, &unheard) } else { Ok(()) },
    };
    super::run_hooks("startContainer", &hooks.start_container, hooks, "created", Some(&confinement))
}

/// What the plan says of the calling process, down to the program's privileges; `tell` is given where its filter reports.
fn confine(plan: &ProcessPlan, labels: &Labels, tell: Tell<'_>) -> Result<(), LaunchError> {
    let early = enter_directory(&plan.cwd);
    umask(Mode::from_raw_mode(plan.umask));
    for limit in &plan.rlimits {
        process::set_limit(limit.resource, limit.soft, limit.hard).step(Step::Rlimit, limit.resource)?;
    }
    set_scheduling(plan)?;
    labels.set(plan)?;
    // Without no_new_privs the filter needs CAP_SYS_ADMIN, which goes away next.
    if !plan.no_new_privileges {
        set_filter(plan, tell)?;
    }
    become_user(plan)?;
    if early.is_err() {
        enter_directory(&plan.cwd)?;
    }
    if plan.no_new_privileges {
        process::set_no_new_privileges().step(Step::NoNewPrivileges, "")?;
    }
    Ok(())
}

/// The program by its path, though a descriptor of it was looked at: executed by descriptor, a script would be told a name
/// that it does not have, and before Linux 6.14 every program would be called by a number.
fn execute(
    plan: &ProcessPlan,
    program: &CStr,
    environment: &[CString],
    reporter: &Reporter,
) -> Result<Infallible, LaunchError> {
    if !reporter.executing() {
        process::exit_now(1);
    }
    if plan.no_new_privileges {
        set_filter(plan, &|listener| reporter.listener(listener))?;
    }
    let errno = process::execute(program, &plan.arguments, environment);
    Err(LaunchError::new(Step::Execute, errno, program.to_string_lossy()))
}

/// No magic link: `/proc/self/fd/…` would lead to what the launcher still holds of the host (CVE-2024-21626).
fn enter_directory(path: &str) -> Result<(), LaunchError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let entered = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS).and_then(fchdir);
    entered.map_err(|errno| LaunchError::new(Step::WorkingDirectory, errno, path))
}

/// Takes where a filter reports.
type Tell<'a> = &'a dyn Fn(BorrowedFd<'_>);

fn set_filter(plan: &ProcessPlan, tell: Tell<'_>) -> Result<(), LaunchError> {
    match &plan.seccomp {
        Some(filter) if filter.notifies => {
            let listener =
                process::set_notifying_filter(&filter.program.0, filter.flags).step(Step::Seccomp, "a listener")?;
            tell(listener.as_fd());
            Ok(())
        }
        Some(filter) => process::set_seccomp_filter(&filter.program.0, filter.flags).step(Step::Seccomp, ""),
        None => Ok(()),
    }
}

/// Files that take the labels under which the next program is executed. Each process can write its own alone, and a container's
/// `/proc` may be anything: they are opened in the host's.
#[derive(Debug, Default)]
pub(crate) struct Labels {
    apparmor: Option<File>,
    selinux: Option<File>,
    /// That of keys which the process makes.
    keyring: Option<File>,
}

impl Labels {
    /// Those that the plan needs, of the calling process, below `proc`.
    pub(crate) fn open(plan: &ProcessPlan, proc: BorrowedFd<'_>) -> Result<Self, LaunchError> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let open = |wanted: bool, paths: &[&str]| {
            let open = |path: &&str| sys::rustix::fs::openat(proc, *path, flags, Mode::empty()).ok().map(File::from);
            let found = || paths.iter().find_map(open);
            match wanted.then(found) {
                None => Ok(None),
                Some(Some(file)) => Ok(Some(file)),
                Some(None) => Err(LaunchError::new(Step::Label, Errno::NOENT, paths.join(", "))),
            }
        };
        Ok(Self {
            // The place of its own, since Linux 5.8; the common one before.
            apparmor: open(plan.apparmor.is_some(), &["self/attr/apparmor/exec", "self/attr/exec"])?,
            selinux: open(plan.selinux.is_some(), &["self/attr/exec"])?,
            keyring: open(plan.selinux.is_some() && plan.keyring.is_some(), &["self/attr/keycreate"])?,
        })
    }

    /// Labels keyrings that are made from now on as what the program makes later; as usual with no label.
    fn set_keyring(&self, label: &str) -> Result<(), LaunchError> {
        let Some(mut file) = self.keyring.as_ref() else { return Ok(()) };
        // The kernel takes nothing for "as usual" only if it is one byte of it.
        let bytes = if label.is_empty() { b"\0" } else { label.as_bytes() };
        file.write_all(bytes).map_err(|error| LaunchError::io(Step::Keyring, &error, label))
    }

    fn set(&self, plan: &ProcessPlan) -> Result<(), LaunchError> {
        let write = |file: Option<&File>, text: Option<String>| match (file, text) {
            (Some(mut file), Some(text)) => {
                file.write_all(text.as_bytes()).map_err(|error| LaunchError::io(Step::Label, &error, text))
            }
            _ => Ok(()),
        };
        write(self.apparmor.as_ref(), plan.apparmor.as_ref().map(|profile| format!("exec {profile}")))?;
        write(self.selinux.as_ref(), plan.selinux.clone())
    }
}

fn set_scheduling(plan: &ProcessPlan) -> Result<(), LaunchError> {
    if let Some(wanted) = &plan.scheduler {
        let mut scheduling = schedule::Scheduling::default();
        (scheduling.policy, scheduling.flags, scheduling.nice) = (wanted.policy, wanted.flags, wanted.nice);
        (scheduling.priority, scheduling.runtime_ns) = (wanted.priority, wanted.runtime_ns);
        (scheduling.deadline_ns, scheduling.period_ns) = (wanted.deadline_ns, wanted.period_ns);
        schedule::set_scheduling(&scheduling).step(Step::Scheduling, "process.scheduler")?;
    }
    if let Some((class, level)) = plan.io_priority {
        schedule::set_io_priority(class, level).step(Step::Scheduling, "process.ioPriority")?;
    }
    if let Some(domain) = plan.personality {
        schedule::set_personality(domain).step(Step::Scheduling, "linux.personality")?;
    }
    if plan.cpus.is_empty() {
        return Ok(());
    }
    schedule::set_affinity(&plan.cpus).step(Step::Scheduling, "process.execCPUAffinity")
}

/// A kernel without keyrings has nothing to separate.
fn join_keyring(name: &str) -> Result<(), LaunchError> {
    match schedule::join_session_keyring(name) {
        Err(error) if error.errno == Errno::NOSYS => Ok(()),
        other => other.step(Step::Keyring, name),
    }
}

/// Streams that were made by somebody else can be opened again by their names in `/proc` only by who owns them. What cannot
/// be given away is left: a file on a read-only mount, or of a user that the namespace does not know.
fn own_streams(streams: &Streams, uid: u32) -> Result<(), LaunchError> {
    let failed = |errno| LaunchError::new(Step::Streams, errno, "owner");
    for stream in &streams.three {
        let stat = sys::rustix::fs::fstat(stream).map_err(failed)?;
        let character = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
        let is_null = character && stat.st_rdev == sys::rustix::fs::makedev(1, 3);
        if is_null || stat.st_uid == uid {
            continue;
        }
        match sys::rustix::fs::fchown(stream, Some(Uid::from_raw(uid)), None) {
            Ok(()) | Err(Errno::INVAL | Errno::PERM | Errno::ROFS | Errno::NOSYS) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
    Ok(())
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

/// The environment, with the user's home where that is asked for.
fn environment(plan: &ProcessPlan) -> Result<Cow<'_, [CString]>, LaunchError> {
    if !plan.finds_home || plan.environment.iter().any(|entry| entry.to_bytes().starts_with(b"HOME=")) {
        return Ok(Cow::Borrowed(&plan.environment));
    }
    let home = home_of(plan.uid).unwrap_or_else(|| "/".to_owned());
    let home = CString::new(format!("HOME={home}"))
        .map_err(|_| LaunchError::new(Step::Execute, Errno::INVAL, "/etc/passwd has a zero byte"))?;
    Ok(Cow::Owned(plan.environment.iter().cloned().chain([home]).collect()))
}

/// What `/etc/passwd` says, as far as it is a file of a size that one can have.
fn home_of(uid: u32) -> Option<String> {
    const SIZE_MAX: u64 = 1 << 20;
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = openat2(CWD, "/etc/passwd", flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS).ok()?;
    let stat = sys::rustix::fs::fstat(&file).ok()?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return None;
    }
    let mut text = Vec::new();
    File::from(file).take(SIZE_MAX).read_to_end(&mut text).ok()?;
    String::from_utf8_lossy(&text).lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let home = fields.get(5).filter(|home| home.starts_with('/'))?;
        (fields.get(2)?.parse() == Ok(uid)).then(|| (*home).to_owned())
    })
}

/// Whether there will be a program, as far as it can be seen before hooks have run.
pub(super) fn look_for(plan: &ProcessPlan) -> Result<(), LaunchError> {
    // A directory that only the user may enter is entered later.
    let _ = enter_directory(&plan.cwd);
    find(plan).map(drop)
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
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile if stat.st_mode & 0o111 != 0 => Ok(()),
        FileType::Directory => Err(Errno::ISDIR),
        _ => Err(Errno::ACCESS),
    }
}
