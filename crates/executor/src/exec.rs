//! A further process in a running container.

use std::convert::Infallible;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;

use sys::cgroup::Entry;
use sys::process::{self, Clone, namespace};
use sys::rustix::fs::{Mode, OFlags};
use sys::rustix::io::Errno;
use sys::schedule::Inherited;
use sys::{path, rustix};

use crate::launch::{
    self, InStep as _, Labels, Last, LaunchError, Launched, Place, Reporter, START_MAX, Starting, Stdio, Step,
};
use crate::oci;
use crate::plan::{self, HostFacts, PlanError, ProcessPlan, mask_of};
use crate::wire::{self, DecodeError};

/// What an exec inherits from its container beside the process itself.
#[derive(Debug, Clone, Copy)]
pub struct ExecOptions<'a> {
    /// The container's configuration: which namespaces it has of its own, its seccomp filter.
    pub container: &'a oci::Spec,
    /// Facts about the host.
    pub facts: &'a HostFacts,
}

/// A process to start in a running container; goes from the daemon to the keeper as bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecPlan {
    /// The process.
    pub process: ProcessPlan,
    /// Namespaces to join, [`sys::process::namespace`].
    pub namespaces: u64,
    /// SIGKILL when the launching process ends.
    pub dies_with_parent: bool,
}

/// The descriptors of an exec.
#[derive(Debug)]
pub struct ExecFds<'a> {
    /// The container's first process; its namespaces are joined.
    pub target: BorrowedFd<'a>,
    /// The control group to enter; absent leaves the process in the caller's.
    pub cgroup: Option<Entry>,
    /// Descriptors that the program keeps.
    pub inherited: Inherited,
}

wire::wire_struct! { ExecPlan { process, namespaces, dies_with_parent } }

impl ExecPlan {
    /// As bytes, see [`crate::LaunchPlan::encode`].
    pub fn encode(&self) -> Vec<u8> {
        wire::encode(self)
    }

    /// The same process with another command, which is looked for in the same `PATH`.
    ///
    /// # Errors
    /// No command, or a zero byte in it.
    pub fn with_args(&self, args: &[String]) -> Result<Self, PlanError> {
        let (programs, arguments) = plan::command(args, &self.process.environment)?;
        let process = ProcessPlan { programs, arguments, ..self.process.clone() };
        Ok(Self { process, ..self.clone() })
    }

    /// From bytes.
    ///
    /// # Errors
    /// Bytes of another version, or cut off.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        wire::decode(bytes)
    }
}

/// Compiles a process to start in a running container.
///
/// # Errors
/// What is wrong with `process`.
pub fn exec_plan(process: &oci::Process, options: ExecOptions<'_>) -> Result<ExecPlan, PlanError> {
    let linux = options.container.linux.clone().unwrap_or_default();
    let namespaces = linux.namespaces.iter().fold(0, |bits, one| bits | mask_of(one.kind));
    let mut plan = plan::process(Some(process), linux.seccomp.as_ref(), options.facts, &mut Vec::new())?;
    if let Some(affinity) = &process.exec_cpu_affinity {
        plan.cpus_first = plan::cpu_words("process.execCPUAffinity.initial", &affinity.initial)?;
        plan.cpus = plan::cpu_words("process.execCPUAffinity.final", &affinity.last)?;
    }
    Ok(ExecPlan { process: plan, namespaces, dies_with_parent: true })
}

/// Starts the process and waits until the program has been executed. It is a child of the caller, which has one thread
/// only.
///
/// # Errors
/// The first step that failed, or [`START_MAX`] was over.
pub fn exec(plan: &ExecPlan, fds: ExecFds<'_>, stdio: Stdio) -> Result<Launched, LaunchError> {
    start_exec(plan, fds, stdio)?.wait(START_MAX)
}

/// As [`exec`], for a caller that has other things to do than to wait.
///
/// # Errors
/// There is no process.
pub fn start_exec(plan: &ExecPlan, fds: ExecFds<'_>, stdio: Stdio) -> Result<Starting, LaunchError> {
    start_in(Place::Inside, plan, fds, stdio)
}

/// As [`start_exec`], for a process that somebody else puts into its control group: it waits for that before it does anything
/// ([`Starting::wait_outside`]).
///
/// # Errors
/// There is no process.
pub fn start_exec_outside(plan: &ExecPlan, fds: ExecFds<'_>, stdio: Stdio) -> Result<Starting, LaunchError> {
    start_in(Place::Outside, plan, fds, stdio)
}

fn start_in(place: Place, plan: &ExecPlan, fds: ExecFds<'_>, stdio: Stdio) -> Result<Starting, LaunchError> {
    let (ours, theirs) =
        launch::channel_pair().map_err(|error| LaunchError::io(Step::Descriptors, &error, "socketpair"))?;
    let reporter = Reporter(theirs);
    let own = [fds.target, reporter.0.as_fd()].into_iter().chain(launch::files_of(fds.cgroup.as_ref()));
    let keep: Vec<BorrowedFd<'_>> = own.chain(stdio.descriptors()).chain(fds.inherited.borrowed()).collect();
    let life = || {
        let life = || {
            launch::begin(&plan.process, fds.cgroup.as_ref(), place, &reporter)?;
            let proc = path::open_proc().step(Step::Label, "/proc")?;
            // Before it is in the container nobody there can see it; from then on nobody may look into it.
            process::set_dumpable(false).step(Step::Session, "dumpable")?;
            let null = Keep::open(&stdio)?;
            process::join(fds.target, plan.namespaces).step(Step::JoinNamespace, "the container's")?;
            launch::go_through(0, &reporter, || inside(plan, null, &proc, &fds.inherited, &reporter))
        };
        launch::report(life(), &reporter)
    };
    let spawn = |cgroup: Option<&Entry>| {
        let cgroup = cgroup.and_then(launch::directory_of);
        process::spawn(&Clone { cgroup, keep: Some(&keep), ..Clone::default() }, life)
    };
    let first = spawn(fds.cgroup.as_ref()).or_else(|error| match place_below(&error, &fds) {
        Some(below) => spawn(Some(&below)),
        None => Err(error),
    });
    let first = first.map_err(|error| LaunchError::from_call(Step::Clone, &error))?;
    drop(reporter);
    Starting::new(first, true, ours, false, Vec::new())
}

/// Where the container's first process is, if it has left the container's own group for one below: the kernel takes no process
/// into a group that hands controllers down (EBUSY), or lies beside threaded ones (EOPNOTSUPP). Containers whose first process
/// is a service manager are like that.
fn place_below(error: &sys::Error, fds: &ExecFds<'_>) -> Option<Entry> {
    let is_divided = matches!(error.errno, Errno::BUSY | Errno::OPNOTSUPP);
    // The first error says more than that of the search.
    fds.cgroup.as_ref().filter(|_| is_divided)?.below(fds.target).ok().flatten()
}

/// Streams that are opened before the container's files are all there is.
struct Keep {
    stdio: Stdio,
}

impl Keep {
    fn open(stdio: &Stdio) -> Result<Self, LaunchError> {
        let Stdio::Streams { stdin, stdout, stderr } = stdio else {
            let Stdio::Terminal { rows, columns } = *stdio else { unreachable!("there are two kinds") };
            return Ok(Self { stdio: Stdio::Terminal { rows, columns } });
        };
        let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null").map(OwnedFd::from);
        let null = null.map_err(|error| LaunchError::io(Step::Streams, &error, "/dev/null"))?;
        let open = |stream: &Option<OwnedFd>| {
            let stream = stream.as_ref().unwrap_or(&null).try_clone();
            stream.map(Some).map_err(|error| LaunchError::io(Step::Streams, &error, ""))
        };
        Ok(Self { stdio: Stdio::Streams { stdin: open(stdin)?, stdout: open(stdout)?, stderr: open(stderr)? } })
    }
}

/// The process in the container's namespaces, up to exec.
fn inside(
    plan: &ExecPlan,
    keep: Keep,
    proc: &OwnedFd,
    inherited: &Inherited,
    reporter: &Reporter,
) -> Result<Infallible, LaunchError> {
    let labels = Labels::open(&plan.process, proc.as_fd())?;
    if plan.namespaces & namespace::USER != 0 {
        process::become_root().step(Step::User, "root of the user namespace")?;
    }
    sys::fork::new_session().map_err(|error| LaunchError::io(Step::Session, &error, "setsid"))?;
    let terminal = match keep.stdio {
        Stdio::Terminal { .. } => Some(terminal()?),
        Stdio::Streams { .. } => None,
    };
    if let Some(master) = &terminal {
        reporter.terminal(master.as_fd());
    }
    let streams = launch::connect_streams(&keep.stdio, terminal.as_ref(), None)?;
    let dies_with_parent = plan.dies_with_parent;
    let last = Last { plan: &plan.process, streams, labels, inherited, dies_with_parent, hooks: None };
    launch::become_program(&last, reporter)
}

fn terminal() -> Result<OwnedFd, LaunchError> {
    let root = rustix::fs::open("/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| LaunchError::new(Step::Terminal, errno, "/"))?;
    let devpts = path::open_in_root(root.as_fd(), Path::new("/dev/pts"), OFlags::RDONLY | OFlags::DIRECTORY)
        .step(Step::Terminal, "/dev/pts")?;
    sys::pty::open_in(devpts.as_fd()).map_err(|error| LaunchError::io(Step::Terminal, &error, "/dev/pts/ptmx"))
}
