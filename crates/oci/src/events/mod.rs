//! `events`: what a container uses, now and then, and that it ran out of memory, as soon as it has; one line of JSON each.

mod interval;
mod statistics;

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Instant;

use serde::Serialize;
use sys::cgroup::OomWatch;
use sys::rustix::event::{PollFd, PollFlags, Timespec, poll};
use sys::rustix::io::Errno;

use crate::args::EventsOptions;
use crate::container::{Container, Status};
use crate::context::Context;
use crate::error::Error;
use crate::inspect::print;
use statistics::Statistics;

/// One line.
#[derive(Debug, Serialize)]
struct Event<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Statistics>,
}

impl Event<'_> {
    fn print(&self) -> Result<(), Error> {
        let text = serde_json::to_string(self).map_err(Error::json("the container's event"))?;
        print(&format!("{text}\n"))
    }
}

/// `events`.
pub(crate) fn run(context: &Context, options: &EventsOptions) -> Result<(), Error> {
    let container = Container::load(context, &options.id)?;
    let interval = interval::parse(&options.interval)?;
    if container.status() == Status::Stopped {
        return Err(Error::State(format!("container with id {} is not running", options.id)));
    }
    let none = || Error::Invalid("the container has no control group to ask".to_owned());
    let group = container.group().ok_or_else(none)?;
    let statistics = || Event { kind: "stats", id: &options.id, data: Some(Statistics::of(&group.details())) }.print();
    if options.stats {
        return statistics();
    }
    let mut watch = group.watch_oom()?;
    // The end of the process ends it, too.
    let Some(process) = container.process() else { return Ok(()) };
    let mut due = Instant::now() + interval;
    loop {
        let woken = wait(&process, &watch, due)?;
        match watch.take() {
            Ok(true) => Event { kind: "oom", id: &options.id, data: None }.print()?,
            Ok(false) => {}
            // The group is gone, and so is all that could be told of it.
            Err(_) => return Ok(()),
        }
        match woken {
            Woken::Ended => return Ok(()),
            Woken::Due => {
                statistics()?;
                due += interval;
            }
            Woken::Other => {}
        }
    }
}

/// Why there is something to do.
enum Woken {
    /// The container's process has ended. That the kernel ended it for want of memory is told before.
    Ended,
    Due,
    Other,
}

fn wait(process: &OwnedFd, watch: &OomWatch, due: Instant) -> Result<Woken, Error> {
    let left = due.saturating_duration_since(Instant::now());
    let mut all = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN), watch.ready()];
    match poll(&mut all, Timespec::try_from(left).ok().as_ref()) {
        Err(errno) if errno != Errno::INTR => Err(Error::file("wait for", "the container")(errno.into())),
        Ok(1..) if !all[0].revents().is_empty() => Ok(Woken::Ended),
        _ if due <= Instant::now() => Ok(Woken::Due),
        _ => Ok(Woken::Other),
    }
}
