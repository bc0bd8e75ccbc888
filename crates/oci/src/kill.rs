//! `kill`, `pause`, `resume`.

use std::os::fd::AsFd as _;

use sys::process;
use sys::rustix::io::Errno;

use crate::args::KillOptions;
use crate::container::{Container, Status};
use crate::context::Context;
use crate::error::Error;

const KILL: i32 = 9;

pub(crate) fn run(context: &Context, options: &KillOptions) -> Result<(), Error> {
    let container = Container::load(context, &options.id)?;
    let number = sys::signals::number(&options.signal).ok_or_else(|| Error::Signal(options.signal.clone()))?;
    match signal(&container, number) {
        Err(Error::NotRunning) if options.all => Ok(()),
        other => other,
    }
}

/// Sends a signal to the first process; SIGKILL to all where the kernel does not end them with it.
pub(crate) fn signal(container: &Container, number: i32) -> Result<(), Error> {
    let group = container.group();
    if number == KILL
        && !container.has_own_pids()
        && let Some(group) = &group
    {
        return container.group_origin().kill(group);
    }
    let pidfd = container.process().ok_or(Error::NotRunning)?;
    match process::send_signal(pidfd.as_fd(), number) {
        Err(error) if error.errno == Errno::SRCH => return Err(Error::NotRunning),
        other => other?,
    }
    // In a frozen group of version 1 it ends only when that goes on.
    match group.filter(|group| number == KILL && group.is_frozen()) {
        Some(group) => Ok(group.freeze(false)?),
        None => Ok(()),
    }
}

/// Stops all processes of a container, or lets them go on.
pub(crate) fn pause(context: &Context, id: &str, pause: bool) -> Result<(), Error> {
    let container = Container::load(context, id)?;
    match (pause, container.status()) {
        (true, Status::Running | Status::Created) | (false, Status::Paused) => {}
        (true, Status::Paused) => return Err(Error::State("container already paused".to_owned())),
        (true, Status::Stopped) => return Err(Error::NotRunning),
        (false, _) => return Err(Error::NotPaused),
    }
    let group = container.group();
    let group = group.ok_or_else(|| Error::Invalid("the container has no control group to freeze".to_owned()))?;
    group.freeze(pause)?;
    Ok(group.wait_until_frozen(pause)?)
}
