//! `run`: create and start in one, and the container's end as its own.

use std::process::ExitCode;

use sys::signals::Signals;

use crate::args::RunOptions;
use crate::context::Context;
use crate::create::{self, Begin};
use crate::error::Error;
use crate::foreground::{self, Relay};
use crate::spec::Bundle;
use crate::{delete, seccomp, start};

pub(crate) fn run(context: &Context, options: &RunOptions) -> Result<ExitCode, Error> {
    let bundle = Bundle::open(&options.create.bundle)?;
    if options.detach {
        let created = create::make(context, &options.create, bundle, true, Begin::AtOnce)?;
        begun(&created)?;
        if let Some(readiness) = &created.readiness {
            readiness.wait(&created.launched.child.pidfd, created.container.record.pid)?;
        }
        return Ok(ExitCode::SUCCESS);
    }
    if !options.no_subreaper {
        sys::process::become_subreaper()?;
    }
    // Before there is a process to hand them to: none may end this one meanwhile.
    let signals = Signals::catch().map_err(Error::file("open", "signalfd"))?;
    let mut created = create::make(context, &options.create, bundle, false, Begin::AtOnce)?;
    let relay = create::take_terminal(&mut created.launched).map(Relay::new).transpose()?;
    let begun = begun(&created);
    let exit = foreground::attend(&created.launched.child, signals, relay, created.readiness.take())?;
    if !options.keep {
        delete::destroy(&created.container)?;
    }
    begun?;
    Ok(foreground::exit_code(exit))
}

/// What comes after the program has begun.
fn begun(created: &create::Created) -> Result<(), Error> {
    if let Some(listener) = &created.launched.listener {
        seccomp::hand_over(&created.container, listener)?;
    }
    start::poststart(&created.container)
}
