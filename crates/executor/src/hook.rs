//! Hooks: programs that the specification lets run around the life of a container.

use std::fmt;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use sys::process::{self, Child, Clone, Exit};
use sys::rustix::event::{PollFd, PollFlags, Timespec, poll};
use sys::rustix::fs::{MemfdFlags, memfd_create};
use sys::rustix::io::Errno;

use crate::launch::LaunchError;
use crate::plan::HookPlan;

/// What is kept of a hook's output for the message about its failure.
const OUTPUT_MAX: u64 = 4096;

/// A hook that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HookError {
    /// Its stage, as the specification names it.
    pub stage: &'static str,
    /// Which of the stage's hooks, from 0.
    pub index: usize,
    /// How.
    pub cause: HookFailure,
    /// What it said, on standard output and error.
    pub output: String,
}

/// How a hook failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HookFailure {
    /// It could not be started.
    Start(Errno),
    /// It ended with another code than 0.
    Exit(Exit),
    /// It was killed after so many seconds.
    TimedOut(u32),
}

impl std::error::Error for HookError {}

impl fmt::Display for HookError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error running {} hook #{}: ", self.stage, self.index)?;
        match &self.cause {
            HookFailure::Start(errno) => write!(f, "it cannot be started: {errno}")?,
            HookFailure::Exit(Exit::Code(code)) => write!(f, "exit status {code}")?,
            HookFailure::Exit(Exit::Signal(signal)) => write!(f, "ended by signal {signal}")?,
            HookFailure::TimedOut(seconds) => write!(f, "not done after {seconds} s")?,
        }
        if self.output.is_empty() { Ok(()) } else { write!(f, ": {}", self.output.trim_end()) }
    }
}

/// A state as JSON with process id and status in it.
///
/// # Errors
/// It is no object of JSON.
pub fn with_status(state: &str, pid: u32, status: &str) -> serde_json::Result<String> {
    let mut state: serde_json::Map<String, serde_json::Value> = serde_json::from_str(state)?;
    state.insert("pid".to_owned(), pid.into());
    state.insert("status".to_owned(), status.into());
    serde_json::to_string(&state)
}

/// Runs the hooks of a stage one after the other, with `state` as JSON on their standard input.
///
/// The caller has one thread, see the crate's documentation.
///
/// # Errors
/// The first that fails; those after it are not run.
pub fn run_all(stage: &'static str, hooks: &[HookPlan], state: &str) -> Result<(), HookError> {
    run_confined(stage, hooks, state, None)
}

/// What the process of a hook does before its program is executed.
pub(crate) struct Confinement<'a> {
    /// While it still has the descriptors of its parent.
    pub(crate) enter: &'a dyn Fn() -> Result<(), LaunchError>,
    /// The last thing, as few calls follow as can.
    pub(crate) last: &'a dyn Fn() -> Result<(), LaunchError>,
}

/// As [`run_all`], for hooks that are to have other privileges than the caller.
pub(crate) fn run_confined(
    stage: &'static str,
    hooks: &[HookPlan],
    state: &str,
    confinement: Option<&Confinement<'_>>,
) -> Result<(), HookError> {
    hooks.iter().enumerate().try_for_each(|(index, hook)| {
        run(hook, state, confinement).map_err(|(cause, output)| HookError { stage, index, cause, output })
    })
}

/// Files instead of pipes: nobody has to read or write while the hook runs, and what it leaves behind holds nobody up.
fn run(hook: &HookPlan, state: &str, confinement: Option<&Confinement<'_>>) -> Result<(), (HookFailure, String)> {
    let failed = |errno| (HookFailure::Start(errno), String::new());
    let stdin = memory(state).map_err(failed)?;
    let output = memory("").map_err(failed)?;
    let child = spawn(hook, &stdin, &output, confinement).map_err(failed)?;
    let end = wait(&child, hook.timeout_s);
    match end {
        Ok(Exit::Code(0)) => Ok(()),
        Ok(exit) => Err((HookFailure::Exit(exit), text_of(output))),
        Err(cause) => Err((cause, text_of(output))),
    }
}

fn memory(text: &str) -> Result<OwnedFd, Errno> {
    let mut file = File::from(memfd_create("hook", MemfdFlags::CLOEXEC)?);
    let written = file.write_all(text.as_bytes()).and_then(|()| file.seek(SeekFrom::Start(0)));
    written.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    Ok(file.into())
}

/// The beginning of what a hook has said.
fn text_of(output: OwnedFd) -> String {
    let mut file = File::from(output);
    let mut bytes = Vec::new();
    // What cannot be read is only the explanation of an error that is told anyway.
    let _ = file.seek(SeekFrom::Start(0)).and_then(|_| file.take(OUTPUT_MAX).read_to_end(&mut bytes));
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Exit code of a hook that could not be executed; shells use the same.
const NOT_EXECUTED: i32 = 127;

fn spawn(
    hook: &HookPlan,
    stdin: &OwnedFd,
    output: &OwnedFd,
    confinement: Option<&Confinement<'_>>,
) -> Result<Child, Errno> {
    let streams = [stdin.as_fd(), output.as_fd()];
    let how = Clone { keep: confinement.is_none().then_some(&streams), ..Clone::default() };
    let child = process::spawn(&how, || {
        let ready = process::reset_signals()
            .and_then(|()| process::set_standard_streams([stdin.as_fd(), output.as_fd(), output.as_fd()]));
        if let Err(error) = ready {
            return error.errno.raw_os_error();
        }
        let say = |error: LaunchError| {
            let _ = write!(io::stderr(), "{error}");
            NOT_EXECUTED
        };
        if let Some(Err(error)) = confinement.map(|confinement| (confinement.enter)()) {
            return say(error);
        }
        process::keep_only(&[], || {
            if let Some(Err(error)) = confinement.map(|confinement| (confinement.last)()) {
                return say(error);
            }
            let errno = process::execute(&hook.program, &hook.arguments, &hook.environment);
            let text = format!("exec {}: {errno}", hook.program.to_string_lossy());
            let _ = io::stderr().write_all(text.as_bytes());
            NOT_EXECUTED
        })
    });
    child.map_err(|error| error.errno)
}

fn wait(child: &Child, timeout_s: Option<u32>) -> Result<Exit, HookFailure> {
    let failed = |error: sys::Error| HookFailure::Start(error.errno);
    let Some(seconds) = timeout_s else { return process::reap(child.pidfd.as_fd()).map_err(failed) };
    let deadline = Instant::now() + Duration::from_secs(seconds.into());
    loop {
        if let Some(exit) = process::try_reap(child.pidfd.as_fd()).map_err(failed)? {
            return Ok(exit);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let _ = process::send_signal(child.pidfd.as_fd(), 9); // It may have ended this moment.
            process::reap(child.pidfd.as_fd()).map_err(failed)?;
            return Err(HookFailure::TimedOut(seconds));
        }
        let limit = Timespec::try_from(left).ok();
        match poll(&mut [PollFd::new(&child.pidfd, PollFlags::IN)], limit.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(HookFailure::Start(errno)),
        }
    }
}
