//! Making the process that a plan describes.
//!
//! ```text
//! launcher ──clone3──► child ─(begin: control group, oom score)─► container(): namespaces, names, root, streams ─► exec
//!     │                   └─ where a user or pid namespace is joined: one in between, the child is its sibling
//!     ╰──────── channel: warnings, terminal, error, "executing", end ────────╯
//! ```

mod channel;
mod program;
mod root;
mod starting;
mod step;
mod streams;
mod time;

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use sys::cgroup::Entry;
use sys::process::{self, Child, Clone, namespace};
use sys::rustix::fs::OFlags;
use sys::rustix::io::Errno;
use sys::schedule::Inherited;
use sys::{mount, path};

use crate::hook::{self, Confinement};
use crate::oci::NamespaceKind;
use crate::plan::{HookPlan, HooksPlan, LaunchPlan, ProcessPlan, Warning, mask_of};
use channel::{Message, Opened};

pub use starting::{Outcome, START_MAX, Starting};
pub use step::Step;

pub(crate) use channel::Reporter;
pub(crate) use channel::pair as channel_pair;
pub(crate) use program::{Labels, Last, become_program};
pub(crate) use streams::connect as connect_streams;

/// The descriptors that a launch needs. Nothing else connects it with the file system of the host.
#[derive(Debug, Default)]
pub struct LaunchFds {
    /// The root file system: a detached mount, or the mount point's descriptor. Absent only for a plan without a mount
    /// namespace of its own.
    pub rootfs: Option<OwnedFd>,
    /// Detached mounts, one for each of [`LaunchPlan::sources`], as [`crate::prepare::open_sources`] makes them.
    pub mounts: Vec<OwnedFd>,
    /// The namespaces to join, one for each of [`LaunchPlan::joins`]; the order does not matter.
    pub namespaces: Vec<(NamespaceKind, OwnedFd)>,
    /// The control group; absent leaves the process in the caller's.
    pub cgroup: Option<Entry>,
    /// Where the process waits at its gate: a listening `SOCK_SEQPACKET` socket. Whoever connects opens the gate
    /// ([`Gate::connected`]), and the launcher may end meanwhile. Without it the launcher alone can.
    pub gate: Option<OwnedFd>,
    /// Descriptors that the program keeps.
    pub inherited: Inherited,
}

/// The standard streams of a process.
#[derive(Debug)]
pub enum Stdio {
    /// These three. What is absent is `/dev/null`.
    Streams {
        /// Standard input.
        stdin: Option<OwnedFd>,
        /// Standard output.
        stdout: Option<OwnedFd>,
        /// Standard error.
        stderr: Option<OwnedFd>,
    },
    /// A new pseudo terminal of the container's own `devpts`, controlling; [`Launched::terminal`] is its master.
    Terminal {
        /// Rows, 0 leaves the size unset.
        rows: u16,
        /// Columns.
        columns: u16,
    },
}

/// A process that runs, or waits at its gate.
#[derive(Debug)]
pub struct Launched {
    /// The process, a child of the caller: who launches it reaps it.
    pub child: Child,
    /// The master of its terminal.
    pub terminal: Option<OwnedFd>,
    /// Where its filter reports system calls.
    pub listener: Option<OwnedFd>,
    /// Present when the plan has a gate: everything is set up, the program does not run yet.
    pub gate: Option<Gate>,
    /// What could not be done as asked although the process runs.
    pub warnings: Vec<Warning>,
}

/// A process that is ready and waits before exec: OCI's state *created*. Dropping it ends the process, unless it waits at
/// a socket.
#[derive(Debug)]
pub struct Gate {
    pub(crate) channel: OwnedFd,
}

impl Gate {
    /// The gate of a process that waits at a socket, by a connection to it.
    pub fn connected(channel: OwnedFd) -> Self {
        Self { channel }
    }

    /// Lets the process exec its program: OCI's *start*. Where its filter reports system calls, if it does.
    ///
    /// # Errors
    /// The program could not be executed; the process has ended.
    pub fn open(self, limit: Duration) -> Result<Option<OwnedFd>, LaunchError> {
        let failed = |error: io::Error| LaunchError::io(Step::Protocol, &error, "the gate");
        channel::open_gate(self.channel.as_fd()).map_err(failed)?;
        sys::rustix::io::ioctl_fionbio(&self.channel, true).map_err(|errno| failed(errno.into()))?;
        let deadline = Instant::now() + limit;
        let (mut executing, mut listener) = (false, None);
        loop {
            match channel::receive(self.channel.as_fd()) {
                Ok(Some(Message::Executing)) => executing = true,
                Ok(Some(Message::Error(error))) => return Err(error),
                Ok(Some(Message::Listener(found))) => listener = Some(found),
                Ok(Some(_)) => {}
                Ok(None) if executing => return Ok(listener),
                Ok(None) => return Err(LaunchError::new(Step::Protocol, Errno::CHILD, "it ended at its gate")),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Err(LaunchError::new(Step::Waiting, Errno::TIMEDOUT, "it has not left its gate"));
                    }
                    starting::readable(self.channel.as_fd(), left).map_err(|errno| failed(errno.into()))?;
                }
                Err(error) => return Err(failed(error)),
            }
        }
    }
}

/// Why there is no process.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{step}: {detail}{}", reason(*errno))]
pub struct LaunchError {
    /// What was being done.
    pub step: Step,
    /// The kernel's reason; 0 where it was not the kernel.
    pub errno: i32,
    /// The object: a mount's target, a sysctl, the program.
    pub detail: String,
}

fn reason(errno: i32) -> String {
    if errno == 0 { String::new() } else { format!(": {}", io::Error::from_raw_os_error(errno)) }
}

impl LaunchError {
    pub(crate) fn new(step: Step, errno: Errno, detail: impl Into<String>) -> Self {
        Self { step, errno: errno.raw_os_error(), detail: detail.into() }
    }

    pub(crate) fn io(step: Step, error: &io::Error, detail: impl Into<String>) -> Self {
        Self { step, errno: error.raw_os_error().unwrap_or(0), detail: detail.into() }
    }

    pub(crate) fn from_call(step: Step, error: &sys::Error) -> Self {
        Self::new(step, error.errno, format!("{} {}", error.call, error.subject))
    }
}

/// Says in which step, and on what, a call failed.
pub(crate) trait InStep<T> {
    fn step(self, step: Step, object: impl std::fmt::Display) -> Result<T, LaunchError>;
}

impl<T> InStep<T> for sys::Result<T> {
    fn step(self, step: Step, object: impl std::fmt::Display) -> Result<T, LaunchError> {
        self.map_err(|error| {
            LaunchError::new(step, error.errno, format!("{object} ({} {})", error.call, error.subject))
        })
    }
}

/// Makes the process of `plan` and waits until the program has been executed, or stands at its gate.
///
/// The caller has one thread, see the crate's documentation.
///
/// # Errors
/// The first step that failed, or [`START_MAX`] was over.
pub fn launch(plan: &LaunchPlan, fds: LaunchFds, stdio: Stdio) -> Result<Launched, LaunchError> {
    start(plan, fds, stdio)?.wait(START_MAX)
}

/// As [`launch`], for a caller that has other things to do than to wait.
///
/// # Errors
/// There is no process.
pub fn start(plan: &LaunchPlan, fds: LaunchFds, stdio: Stdio) -> Result<Starting, LaunchError> {
    start_in(Place::Inside, plan, fds, stdio)
}

/// As [`start`], for a process that somebody else puts into its control group: it waits for that before it does anything
/// ([`Starting::wait_outside`]).
///
/// # Errors
/// There is no process.
pub fn start_outside(plan: &LaunchPlan, fds: LaunchFds, stdio: Stdio) -> Result<Starting, LaunchError> {
    start_in(Place::Outside, plan, fds, stdio)
}

/// Where a process begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// In its control group, or it enters that by itself.
    Inside,
    /// Outside of it: somebody else has to put it there.
    Outside,
}

fn start_in(place: Place, plan: &LaunchPlan, fds: LaunchFds, stdio: Stdio) -> Result<Starting, LaunchError> {
    if fds.mounts.len() != plan.sources.len() || fds.rootfs.is_none() != plan.root.is_none() {
        return Err(LaunchError::new(Step::Descriptors, Errno::INVAL, "the root or a mount is missing"));
    }
    let joined: u64 = fds.namespaces.iter().fold(0, |bits, (kind, _)| bits | mask_of(*kind));
    let made_late = namespace::CGROUP;
    let make = plan.new_namespaces & !made_late;
    // Others have to be owned by the user namespace, and a pid namespace is joined by the children alone.
    let through = joined & (namespace::USER | namespace::PID) != 0;
    let (ours, theirs) = channel::pair().map_err(|error| LaunchError::io(Step::Descriptors, &error, "socketpair"))?;
    let reporter = Reporter(theirs);
    let keep: Vec<BorrowedFd<'_>> = fds.of_child().chain(stdio.descriptors()).chain([reporter.0.as_fd()]).collect();
    let how = Clone {
        namespaces: if through { 0 } else { make },
        cgroup: fds.cgroup.as_ref().and_then(directory_of),
        keep: Some(&keep),
        ..Clone::default()
    };
    let first = process::spawn(&how, || {
        let life = || {
            begin(&plan.process, fds.cgroup.as_ref(), place, &reporter)?;
            if !through {
                return container(plan, &fds, &stdio, &reporter);
            }
            join_some(&fds.namespaces, |kind| matches!(kind, NamespaceKind::User | NamespaceKind::Pid))?;
            if joined & namespace::USER != 0 {
                // What the kernel makes with a namespace belongs to whoever makes it: the root of its message queues.
                process::become_root().step(Step::User, "root of the user namespace")?;
            }
            go_through(make, &reporter, || container(plan, &fds, &stdio, &reporter))
        };
        report(life(), &reporter)
    })
    .map_err(|error| LaunchError::from_call(Step::Clone, &error))?;
    drop(reporter);
    Starting::new(first, through, ours, plan.gate, plan.warnings.clone())
}

impl LaunchFds {
    /// Those that the child uses.
    fn of_child(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let namespaces = self.namespaces.iter().map(|(_, namespace)| namespace);
        let mounts = self.rootfs.iter().chain(&self.mounts).chain(namespaces).chain(&self.gate).map(OwnedFd::as_fd);
        mounts.chain(files_of(self.cgroup.as_ref())).chain(self.inherited.borrowed())
    }
}

impl Stdio {
    /// All of them.
    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let three = match self {
            Self::Streams { stdin, stdout, stderr } => [stdin.as_ref(), stdout.as_ref(), stderr.as_ref()],
            Self::Terminal { .. } => [None; 3],
        };
        three.into_iter().flatten().map(OwnedFd::as_fd)
    }
}

/// The control group that a child begins in.
pub(crate) fn directory_of(entry: &Entry) -> Option<BorrowedFd<'_>> {
    match entry {
        Entry::Directory(directory) => Some(directory.as_fd()),
        Entry::Files(_) => None,
    }
}

/// The files by which a child enters its control group.
pub(crate) fn files_of(entry: Option<&Entry>) -> impl Iterator<Item = BorrowedFd<'_>> {
    let files = match entry {
        Some(Entry::Files(files)) => files.as_slice(),
        Some(Entry::Directory(_)) | None => &[],
    };
    files.iter().map(OwnedFd::as_fd)
}

/// Tells the launcher why the child gives up; its exit code.
pub(crate) fn report(end: Result<Infallible, LaunchError>, reporter: &Reporter) -> i32 {
    let Err(error) = end;
    reporter.error(&error);
    1
}

/// Makes the final process as the launcher's child and ends the one in between.
pub(crate) fn go_through(
    namespaces: u64,
    reporter: &Reporter,
    life: impl FnOnce() -> Result<Infallible, LaunchError>,
) -> Result<Infallible, LaunchError> {
    let how = Clone { namespaces, as_sibling: true, ..Clone::default() };
    let child = process::spawn(&how, || report(life(), reporter))
        .map_err(|error| LaunchError::from_call(Step::Clone, &error))?;
    reporter.child(child.pid.as_raw_nonzero().get(), child.pidfd.as_fd());
    process::exit_now(0)
}

/// The container's process, in its new namespaces and control group, up to exec.
fn container(
    plan: &LaunchPlan,
    fds: &LaunchFds,
    stdio: &Stdio,
    reporter: &Reporter,
) -> Result<Infallible, LaunchError> {
    let proc = path::open_proc().step(Step::Label, "/proc")?;
    let labels = Labels::open(&plan.process, proc.as_fd())?;
    join_some(&fds.namespaces, |kind| !matches!(kind, NamespaceKind::User | NamespaceKind::Pid))?;
    if plan.new_namespaces & namespace::CGROUP != 0 {
        process::leave(namespace::CGROUP).step(Step::NewNamespace, "cgroup")?;
    }
    if plan.new_namespaces & namespace::TIME != 0 {
        time::enter_new(&plan.time_offsets)?;
    }
    if fds.namespaces.iter().any(|(kind, _)| *kind == NamespaceKind::User) {
        process::become_root().step(Step::User, "root of the user namespace")?;
    }
    process::set_dumpable(false).step(Step::Session, "dumpable")?;
    sys::fork::new_session().map_err(|error| LaunchError::io(Step::Session, &error, "setsid"))?;
    names(plan)?;
    sysctls(&plan.sysctls)?;
    let null = streams::null_for(stdio)?;
    let before_entry = || halt_for_hooks(plan, reporter);
    let terminal = match (&plan.root, &fds.rootfs) {
        (Some(root), Some(mount)) => root::enter(root, plan, mount.as_fd(), &fds.mounts, stdio, before_entry)?,
        _ => before_entry().map(|()| None)?,
    };
    if let Some(terminal) = &terminal {
        reporter.terminal(terminal.as_fd());
    }
    let streams = streams::connect(stdio, terminal.as_ref(), null.as_ref())?;
    let last = Last {
        plan: &plan.process,
        streams,
        labels,
        inherited: &fds.inherited,
        dies_with_parent: plan.dies_with_parent,
        hooks: Some((&plan.hooks, proc.as_fd())),
    };
    if !plan.gate {
        return program::become_program(&last, reporter);
    }
    // What is certain to fail does so before, where callers look for it.
    program::look_for(&plan.process)?;
    // Nor does it hold what the launcher speaks to its caller by: who reads that to its end would wait for the start.
    process::set_standard_streams(last.streams.three.each_ref().map(|stream| stream.as_fd()))
        .step(Step::Streams, "")?;
    match reporter.wait_at_gate(fds.gate.as_ref()) {
        Opened::ByLauncher => program::become_program(&last, reporter),
        Opened::By(opener) => process::exit_now(report(program::become_program(&last, &opener), &opener)),
        Opened::Never => process::exit_now(1),
    }
}

/// The hooks of the launcher, then those of the container's namespaces.
fn halt_for_hooks(plan: &LaunchPlan, reporter: &Reporter) -> Result<(), LaunchError> {
    if plan.halts && !reporter.halt() {
        process::exit_now(1);
    }
    run_hooks("createContainer", &plan.hooks.create_container, &plan.hooks, "creating", None)
}

/// Runs hooks in the calling process's namespaces, as confined as they are to be.
pub(crate) fn run_hooks(
    stage: &'static str,
    hooks: &[HookPlan],
    all: &HooksPlan,
    status: &'static str,
    confinement: Option<&Confinement<'_>>,
) -> Result<(), LaunchError> {
    if hooks.is_empty() {
        return Ok(());
    }
    let failed = |detail: String| LaunchError { step: Step::Hook, errno: 0, detail };
    let state = hook::with_status(&all.state, std::process::id(), status).map_err(|error| failed(error.to_string()))?;
    hook::run_confined(stage, hooks, &state, confinement).map_err(|error| failed(error.to_string()))
}

fn names(plan: &LaunchPlan) -> Result<(), LaunchError> {
    if let Some(name) = &plan.hostname {
        process::set_host_name(name).step(Step::Hostname, name)?;
    }
    if let Some(name) = &plan.domainname {
        process::set_domain_name(name).step(Step::Hostname, name)?;
    }
    Ok(())
}

/// Writes sysctls through a procfs of its own, where nothing that the host mounted is in the way; only the owner of the
/// pid namespace can make one, others take the host's. Either shows the caller's namespaces.
pub(crate) fn sysctls(values: &[(String, String)]) -> Result<(), LaunchError> {
    if values.is_empty() {
        return Ok(());
    }
    let proc = match mount::new_filesystem("proc", &[], 0) {
        Err(error) if error.errno == Errno::PERM => path::open_proc(),
        other => other,
    }
    .step(Step::Sysctl, "a proc file system")?;
    for (name, value) in values {
        let path = format!("sys/{}", name.replace('.', "/"));
        let file = path::open_plain(proc.as_fd(), Path::new(&path), OFlags::WRONLY).step(Step::Sysctl, name)?;
        File::from(file)
            .write_all(value.as_bytes())
            .map_err(|error| LaunchError::io(Step::Sysctl, &error, format!("{name}={value}")))?;
    }
    Ok(())
}

/// Joins those of the namespaces that are asked for.
pub(crate) fn join_some(
    namespaces: &[(NamespaceKind, OwnedFd)],
    which: impl Fn(NamespaceKind) -> bool,
) -> Result<(), LaunchError> {
    let mut chosen: Vec<_> = namespaces.iter().filter(|(kind, _)| which(*kind)).collect();
    // The user namespace gives the right to enter the others.
    chosen.sort_by_key(|(kind, _)| *kind);
    for (kind, fd) in chosen {
        process::join(fd.as_fd(), mask_of(*kind)).step(Step::JoinNamespace, format!("{kind:?}"))?;
    }
    Ok(())
}

/// What a child does first, while it still is as privileged as the launcher: enters its control group, raises hard limits, protects
/// itself from the OOM killer as far as it may.
pub(crate) fn begin(
    process: &ProcessPlan,
    cgroup: Option<&Entry>,
    place: Place,
    reporter: &Reporter,
) -> Result<(), LaunchError> {
    if !process.cpus_first.is_empty() {
        sys::schedule::set_affinity(&process.cpus_first).step(Step::Scheduling, "process.execCPUAffinity")?;
    }
    if let Some(Entry::Files(files)) = cgroup {
        for file in files {
            sys::rustix::io::write(file, b"0")
                .map_err(|errno| LaunchError::new(Step::JoinCgroup, errno, "cgroup.procs"))?;
        }
    }
    if place == Place::Outside && !reporter.outside() {
        process::exit_now(1);
    }
    if let Some(wanted) = process.oom_score_adj {
        match std::fs::write("/proc/self/oom_score_adj", wanted.to_string()) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => reporter.oom_score(wanted, oom_score()),
            Err(error) => return Err(LaunchError::io(Step::OomScore, &error, wanted.to_string())),
        }
    }
    Ok(())
}

fn oom_score() -> i32 {
    let text = std::fs::read_to_string("/proc/self/oom_score_adj").unwrap_or_default();
    text.trim().parse().unwrap_or_default()
}
