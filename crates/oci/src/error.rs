//! What can go wrong, in words that callers know.
//!
//! containerd's shim, CRI-O, Docker Engine and Podman look for parts of runc's messages: "container does not exist",
//! "container not running", "executable file not found in $PATH", "no such file or directory", "permission denied". They are
//! an interface, so they are written here as runc writes them, errors of the kernel in lower case as Go prints them.

use std::io;
use std::path::{Path, PathBuf};

use executor::hook::HookError;
use executor::prepare::PrepareError;
use executor::{LaunchError, PlanError, Step};

use crate::systemd::SystemdError;

/// Why a command failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("container does not exist")]
    NotExist,
    #[error("container with given ID already exists")]
    Exists,
    #[error("invalid container ID format: {0:?}")]
    InvalidId(String),
    #[error("container id cannot be empty")]
    EmptyId,
    #[error("container not running")]
    NotRunning,
    #[error("container not paused")]
    NotPaused,
    #[error("container init still running")]
    StillRunning,
    /// What a command cannot do with a container in this state.
    #[error("{0}")]
    State(String),
    #[error("unknown signal {0:?}")]
    Signal(String),
    /// A field of the configuration, or an option.
    #[error("{0}")]
    Invalid(String),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error("{action} {}: {}", path.display(), lower(cause))]
    File {
        /// In the infinitive.
        action: &'static str,
        path: PathBuf,
        cause: io::Error,
    },
    #[error("{}: {cause}", path.display())]
    Json { path: PathBuf, cause: serde_json::Error },
    #[error("{}", system(.0))]
    System(#[from] sys::Error),
    #[error(transparent)]
    Systemd(#[from] SystemdError),
    #[error("error mounting {:?} to rootfs at {:?}: {}", .0.path, .0.target, system(&.0.cause))]
    Source(PrepareError),
    #[error("unable to start container process: error during container init: {}", launch(.error, .program))]
    Launch {
        error: LaunchError,
        /// Its first argument.
        program: String,
    },
    #[error("unable to start container process: {}", launch(.error, .program))]
    Exec { error: LaunchError, program: String },
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error("{context}: {cause}")]
    During { context: &'static str, cause: Box<Error> },
    #[error(
        "checkpoint and restore are not supported: they need CRIU, another program, which this runtime does not start; \
         use runc for containers that have to be checkpointed"
    )]
    NoCheckpoint,
}

impl Error {
    /// For `map_err`: what was done with which file.
    pub(crate) fn file(action: &'static str, path: impl AsRef<Path>) -> impl FnOnce(io::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |cause| Self::File { action, path, cause }
    }

    /// For `map_err`: which file is no JSON, or not what it should be.
    pub(crate) fn json(path: impl AsRef<Path>) -> impl FnOnce(serde_json::Error) -> Self {
        let path = path.as_ref().to_owned();
        move |cause| Self::Json { path, cause }
    }

    /// For `map_err`: as a part of what.
    pub(crate) fn during(context: &'static str) -> impl FnOnce(Self) -> Self {
        move |cause| Self::During { context, cause: Box::new(cause) }
    }
}

/// The kernel's reason as Go has it.
fn lower(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => reason(number),
        None => error.to_string(),
    }
}

fn reason(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_lowercase().chain(letters).collect())
}

fn system(error: &sys::Error) -> String {
    let reason = reason(error.errno.raw_os_error());
    if error.subject.is_empty() {
        format!("{}: {reason}", error.call)
    } else {
        format!("{} {}: {reason}", error.call, error.subject)
    }
}

/// A program that is not there, or is none, in Go's words, by which callers choose the exit codes 126 and 127.
fn launch(error: &LaunchError, program: &str) -> String {
    const NOT_FOUND: i32 = 2;
    let reason = reason(error.errno);
    match (error.step, error.errno) {
        (Step::Execute, NOT_FOUND) if !program.contains('/') => {
            format!("exec: {program:?}: executable file not found in $PATH")
        }
        (Step::Execute, NOT_FOUND) => format!("exec: {program:?}: stat {program}: {reason}"),
        (Step::Execute, _) => format!("exec: {program:?}: {reason}"),
        (step, 0) => format!("{step}: {}", error.detail),
        (step, _) => format!("{step}: {}: {reason}", error.detail),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(step: Step, errno: i32, program: &str) -> String {
        let error = LaunchError { step, errno, detail: "detail".to_owned() };
        Error::Launch { error, program: program.to_owned() }.to_string()
    }

    #[test]
    fn a_missing_program_is_told_in_the_words_that_callers_look_for() {
        let prefix = "unable to start container process: error during container init: ";
        let text = |rest: &str| format!("{prefix}{rest}");
        assert_eq!(of(Step::Execute, 2, "foo"), text("exec: \"foo\": executable file not found in $PATH"));
        assert_eq!(of(Step::Execute, 2, "/foo"), text("exec: \"/foo\": stat /foo: no such file or directory"));
        assert_eq!(of(Step::Execute, 13, "/foo"), text("exec: \"/foo\": permission denied"));
        assert_eq!(of(Step::Execute, 8, "/foo"), text("exec: \"/foo\": exec format error"));
        assert_eq!(of(Step::Mount, 22, "/foo"), text("mounting: detail: invalid argument"));
    }
}
