//! runc's command line: an OCI runtime for containerd, CRI-O, Docker Engine and Podman.
//!
//! ```text
//! create ──► plan, control group, mounts ──launch──► the container's process, waiting at a socket     (creating, created)
//!              └─ state directory <root>/<id>: state.json, start.sock                ▲
//! start ────────────────────────────────── connects: the process executes ───────────╯                        (running)
//! delete ──► control group, state directory
//! ```
//!
//! Each command is a process of its own that ends: what is known of a container is its record in the state directory and
//! what the kernel says of its process and control group. There is one thread, no runtime, and nothing is read that the
//! command does not need.
//!
//! Callers read exit codes, the last line of the log (`--log`), and some words of it; those words are runc's (`error`).

mod args;
mod cgroups;
mod console;
mod container;
mod context;
mod create;
mod delete;
mod error;
mod events;
mod exec;
mod features;
mod foreground;
mod hooks;
mod inspect;
mod kill;
mod log;
mod namespaces;
mod notify;
mod ps;
mod record;
mod rootless;
mod run;
mod seccomp;
mod spec;
mod start;
mod systemd;
mod template;
mod update;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser as _;

use args::{Arguments, Command};
use context::Context;
use error::Error;

/// Exit code of a command that failed.
const FAILED: u8 = 1;
/// Exit code of an `exec` whose process could not be started: lower ones are the process's own.
const EXEC_FAILED: u8 = 255;

/// Runs the command of a command line, which begins with the name that the program was called by.
pub fn main(words: Vec<OsString>) -> ExitCode {
    let sealed = if may_make_a_process(&words) { sys::program::seal() } else { Ok(()) };
    let arguments = match Arguments::try_parse_from(words) {
        Ok(arguments) => arguments,
        Err(error) => return explain(&error),
    };
    let context = match Context::new(&arguments) {
        Ok(context) => context,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(FAILED);
        }
    };
    let failed = if matches!(arguments.command, Some(Command::Exec(_))) { EXEC_FAILED } else { FAILED };
    run(&context, arguments, sealed).unwrap_or_else(|error| {
        context.log.error(&error);
        ExitCode::from(failed)
    })
}

/// Prints what clap has to say: help that was asked for, or what is wrong with the command line, which is a failure as others.
fn explain(error: &clap::Error) -> ExitCode {
    // Nobody is left to be told that nobody listens.
    let _ = error.print();
    if error.use_stderr() { ExitCode::from(FAILED) } else { ExitCode::SUCCESS }
}

/// Whether the command is `create`, `run` or `exec`, for which the program goes on as another: that is found out before anything
/// is made that would be made twice. One that only has such a word among its options goes on as well.
fn may_make_a_process(words: &[OsString]) -> bool {
    words.iter().skip(1).any(|word| ["create", "run", "exec"].iter().any(|command| word == command))
}

fn run(context: &Context, arguments: Arguments, sealed: sys::Result<()>) -> Result<ExitCode, Error> {
    let Some(command) = arguments.command.filter(|_| !arguments.version) else {
        return args::print_version();
    };
    match command {
        Command::Create(options) => {
            sealed?;
            create::run(context, &options).map_err(Error::during("runc create failed"))?;
        }
        Command::Run(options) => {
            sealed?;
            return run::run(context, &options).map_err(Error::during("runc run failed"));
        }
        Command::Exec(options) => {
            sealed?;
            return exec::run(context, &options).map_err(Error::during("exec failed"));
        }
        Command::Start { id } => start::run(context, &id)?,
        Command::State { id } => inspect::state(context, &id)?,
        Command::Kill(options) => kill::run(context, &options)?,
        Command::Delete(options) => delete::run(context, &options)?,
        Command::List(options) => inspect::list(context, &options)?,
        Command::Ps(options) => return ps::run(context, &options),
        Command::Pause { id } => kill::pause(context, &id, true)?,
        Command::Resume { id } => kill::pause(context, &id, false)?,
        Command::Update(options) => update::run(context, &options)?,
        Command::Events(options) => events::run(context, &options)?,
        Command::Spec(options) => template::run(&options)?,
        Command::Features => features::print_all()?,
        Command::Checkpoint(_) | Command::Restore(_) => return Err(Error::NoCheckpoint),
    }
    Ok(ExitCode::SUCCESS)
}
