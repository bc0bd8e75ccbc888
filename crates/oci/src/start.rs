//! `start`: the program begins.

use executor::{Gate, LaunchError};

use crate::container::{Container, Status};
use crate::context::Context;
use crate::create::PATIENCE;
use crate::error::Error;
use crate::notify::Readiness;
use crate::{hooks, kill, seccomp};

pub(crate) fn run(context: &Context, id: &str) -> Result<(), Error> {
    let container = Container::load(context, id)?;
    let refused = |text: &str| Err(Error::State(text.to_owned()));
    match container.status() {
        Status::Created => {}
        Status::Running => return refused("cannot start an already running container"),
        Status::Stopped => return refused("cannot start a container that has stopped"),
        Status::Paused => return refused("cannot start a container in the paused state"),
    }
    let Some(channel) = container.place.connect()? else {
        return refused("cannot start a container that has stopped");
    };
    let readiness = Readiness::listen(&container.place)?;
    let listener = Gate::connected(channel).open(PATIENCE).map_err(|error| launch_error(error, &container))?;
    container.place.forget_socket();
    if let Some(listener) = listener {
        seccomp::hand_over(&container, &listener)?;
    }
    poststart(&container)?;
    match (readiness, container.process()) {
        (Some(readiness), Some(process)) => readiness.wait(&process, container.record.pid),
        _ => Ok(()),
    }
}

/// The hooks of a container whose program runs. One that fails ends it.
pub(crate) fn poststart(container: &Container) -> Result<(), Error> {
    let (hooks, pid) = (container.hooks(), container.record.pid);
    hooks::run("poststart", &hooks.poststart, &container.state(), pid, "running").inspect_err(|_| {
        let _ = kill::signal(container, 9); // The hook's error is the one to tell.
    })
}

fn launch_error(error: LaunchError, container: &Container) -> Error {
    let process = container.record.spec.process.as_ref();
    Error::Launch { error, program: process.and_then(|process| process.args.first()).cloned().unwrap_or_default() }
}
