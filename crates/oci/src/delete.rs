//! `delete`: nothing is left.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use sys::cgroup::Cgroup;
use sys::process;
use sys::rustix::event::{PollFd, PollFlags, Timespec, poll};
use sys::rustix::io::Errno;

use crate::args::DeleteOptions;
use crate::cgroups::Origin;
use crate::container::{Container, Status};
use crate::context::Context;
use crate::error::Error;
use crate::record::Place;
use crate::systemd::Unit;
use crate::{hooks, kill};

/// How long processes may take to end after SIGKILL.
const END_MAX: Duration = Duration::from_secs(10);

pub(crate) fn run(context: &Context, options: &DeleteOptions) -> Result<(), Error> {
    let container = match Container::load(context, &options.id) {
        Err(Error::NotExist) => {
            // A creation that was killed leaves a directory without a record.
            Place::of(&context.root, &options.id)?.remove()?;
            return if options.force { Ok(()) } else { Err(Error::NotExist) };
        }
        other => other?,
    };
    match container.status() {
        Status::Stopped => {}
        _ if options.force => end(&container)?,
        Status::Created => end(&container)?,
        status => {
            let (id, status) = (&options.id, status.word());
            return Err(Error::State(format!("cannot delete container {id} that is not stopped: {status}")));
        }
    }
    destroy(&container)
}

/// Ends the first process and waits until it has.
fn end(container: &Container) -> Result<(), Error> {
    let Some(pidfd) = container.process() else { return Ok(()) };
    match kill::signal(container, 9) {
        Ok(()) | Err(Error::NotRunning) => {}
        Err(error) => return Err(error),
    }
    if wait(&[pidfd], Instant::now() + END_MAX)? { Ok(()) } else { Err(Error::StillRunning) }
}

/// Removes a container whose first process has ended, and runs its last hooks.
pub(crate) fn destroy(container: &Container) -> Result<(), Error> {
    if let Some(group) = container.group() {
        remove_group(&group, container.group_origin(), container.record.unit.as_ref())?;
    }
    container.place.remove()?;
    let hooks = container.hooks();
    hooks::run("poststop", &hooks.poststop, &container.state(), 0, "stopped")
}

/// Ends what is in a group, and removes it if it was made for the container.
pub(crate) fn remove_group(group: &Cgroup, origin: Origin, unit: Option<&Unit>) -> Result<(), Error> {
    let deadline = Instant::now() + END_MAX;
    loop {
        if origin == Origin::Container && unit.is_none() {
            match group.delete() {
                // Something is left, or begins; or the last has not been counted off yet.
                Err(error) if error.errno == Errno::BUSY && Instant::now() < deadline => {}
                other => return Ok(other?),
            }
        }
        let left = origin.processes(group);
        if !left.is_empty() {
            origin.kill(group)?;
            let pidfds: Vec<OwnedFd> = left.into_iter().filter_map(|pid| process::pidfd_open(pid).ok()).collect();
            if !wait(&pidfds, deadline)? {
                return Err(Error::StillRunning);
            }
        }
        match unit {
            _ if origin == Origin::Other => return Ok(()),
            None => std::thread::yield_now(),
            Some(unit) => {
                // It removes its own directories; others are left for us.
                unit.end()?;
                return Ok(group.delete()?);
            }
        }
    }
}

/// Waits until all of these processes have ended; false when the time is over.
fn wait(pidfds: &[OwnedFd], deadline: Instant) -> Result<bool, Error> {
    for pidfd in pidfds {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let limit = Timespec::try_from(left).ok();
            let mut asked = [PollFd::from_borrowed_fd(pidfd.as_fd(), PollFlags::IN)];
            match poll(&mut asked, limit.as_ref()) {
                Ok(0) => return Ok(false),
                Ok(_) => break,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(Error::file("wait for", "processes")(errno.into())),
            }
        }
    }
    Ok(true)
}
