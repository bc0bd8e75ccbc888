//! A process between its making and its program, as its maker sees it.
//!
//! Whoever can signal the process can stop it here: a pod that shares its process namespace, a frozen control group. So
//! nothing waits for it; a maker with other things to do hears it when there is something to hear, and gives it up in the
//! end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use sys::process::{self, Child};
use sys::rustix::event::{PollFd, PollFlags, Timespec, poll};
use sys::rustix::io::{Errno, ioctl_fionbio};
use sys::rustix::process::Pid;

use super::channel::{self, Message};
use super::{Gate, LaunchError, Launched, Step};
use crate::plan::Warning;

/// How long a process may take to its program where nothing else is said. Most take milliseconds; one with hardly any CPU
/// time of its own takes seconds.
pub const START_MAX: Duration = Duration::from_secs(60);

/// A process that has not executed its program yet. Its descriptor can be read when there is something to hear.
#[derive(Debug)]
pub struct Starting {
    channel: OwnedFd,
    /// The process that was made; where it makes the final one, that is its sibling.
    first: Child,
    /// The first process makes a final one.
    through: bool,
    last: Option<Child>,
    terminal: Option<OwnedFd>,
    listener: Option<OwnedFd>,
    /// It waits to be put into its control group.
    outside: bool,
    /// It waits for the launcher's hooks.
    halted: bool,
    /// It stops at its gate.
    gated: bool,
    at_gate: bool,
    executing: bool,
    warnings: Vec<Warning>,
    failure: Option<LaunchError>,
}

/// What became of a [`Starting`].
#[derive(Debug)]
pub struct Outcome {
    /// The process, or why there is none.
    pub launched: Result<Launched, LaunchError>,
    /// Processes that were told to end, or do so by themselves: whoever launched reaps them when they have.
    pub rest: Vec<Child>,
}

impl AsFd for Starting {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

impl Starting {
    pub(crate) fn new(
        first: Child,
        through: bool,
        channel: OwnedFd,
        gated: bool,
        warnings: Vec<Warning>,
    ) -> Result<Self, LaunchError> {
        ioctl_fionbio(&channel, true)
            .map_err(|errno| LaunchError::new(Step::Descriptors, errno, "the channel to the new process"))?;
        Ok(Self {
            channel,
            first,
            through,
            last: None,
            terminal: None,
            listener: None,
            outside: false,
            halted: false,
            gated,
            at_gate: false,
            executing: false,
            warnings,
            failure: None,
        })
    }

    /// Takes what the process has said so far; whether it is known what became of it. Does not wait.
    ///
    /// The final process may speak before the one that made it has said who that is, and nobody else would reap it: an
    /// unreaped process holds up the end of its pid namespace, and with it that of the container.
    pub fn hear(&mut self) -> bool {
        loop {
            match channel::receive(self.channel.as_fd()) {
                Ok(Some(Message::Warning(warning))) => self.warnings.push(warning),
                Ok(Some(Message::Terminal(master))) => self.terminal = Some(master),
                Ok(Some(Message::Child(pid, pidfd))) => self.last = Pid::from_raw(pid).map(|pid| Child { pid, pidfd }),
                Ok(Some(Message::Listener(listener))) => self.listener = Some(listener),
                Ok(Some(Message::Halted)) => self.halted = true,
                Ok(Some(Message::Outside)) => {
                    self.outside = true;
                    // It has made nobody yet.
                    return true;
                }
                Ok(Some(Message::Ready)) => self.at_gate = self.gated,
                Ok(Some(Message::Executing)) => self.executing = true,
                Ok(Some(Message::Error(error))) => self.failure = Some(error),
                Ok(None) => return true,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return false,
                Err(error) => {
                    self.failure = Some(LaunchError::io(Step::Protocol, &error, "the channel to the new process"));
                    return true;
                }
            }
            let all_are_known = !self.through || self.last.is_some();
            if all_are_known && (self.at_gate || self.halted || self.failure.is_some()) {
                return true;
            }
        }
    }

    /// Waits until it is there to be put into its control group, which it is not in ([`super::start_outside`]). None
    /// when it has failed instead, or not come there in time; [`Self::wait`] says why.
    pub fn wait_outside(&mut self, limit: Duration) -> Option<&Child> {
        self.listen(limit);
        self.outside.then_some(&self.first)
    }

    /// Waits until it has halted, as [`crate::LaunchPlan::halts`] asks. False when it has failed instead, or not come there
    /// in time; [`Self::wait`] says why.
    pub fn wait_for_halt(&mut self, limit: Duration) -> bool {
        self.listen(limit);
        self.halted
    }

    /// Waits until there was something to hear that the launcher has to act upon.
    fn listen(&mut self, limit: Duration) {
        let deadline = Instant::now() + limit;
        while !self.hear() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || readable(self.channel.as_fd(), left).is_err() {
                return;
            }
        }
    }

    /// Lets it go on from where it has halted, or from outside.
    ///
    /// # Errors
    /// It has ended.
    pub fn go_on(&mut self) -> Result<(), LaunchError> {
        (self.halted, self.outside) = (false, false);
        channel::open_gate(self.channel.as_fd())
            .map_err(|error| LaunchError::io(Step::Protocol, &error, "it has halted"))
    }

    /// The process that becomes the program.
    pub fn child(&self) -> &Child {
        self.last.as_ref().unwrap_or(&self.first)
    }

    /// Ends it, whatever it does.
    pub fn give_up(mut self, errno: Errno) -> Outcome {
        self.hear(); // Who else has to be ended.
        let detail = format!("its state is {}", state_of(self.child()));
        self.failure = Some(LaunchError::new(Step::Waiting, errno, detail));
        self.finish()
    }

    /// What became of it; one of which that is not known yet is ended.
    pub fn finish(self) -> Outcome {
        let Self { channel, first, last, terminal, listener, at_gate, executing, warnings, failure, .. } = self;
        if failure.is_none() && (executing || at_gate) {
            let (child, rest) = match last {
                None => (first, Vec::new()),
                Some(last) if at_gate => (last, vec![first]),
                // The channel has ended, so the one in between is on its way out, where nobody stops it any more.
                Some(last) => {
                    let _ = process::reap(first.pidfd.as_fd());
                    (last, Vec::new())
                }
            };
            let gate = at_gate.then_some(Gate { channel });
            return Outcome { launched: Ok(Launched { child, terminal, listener, gate, warnings }), rest };
        }
        let failure = failure.unwrap_or_else(|| LaunchError::new(Step::Protocol, Errno::CHILD, state_of(&first)));
        let rest: Vec<Child> = [first].into_iter().chain(last).collect();
        for child in &rest {
            let _ = process::send_signal(child.pidfd.as_fd(), 9); // It has ended by itself as a rule.
        }
        Outcome { launched: Err(failure), rest }
    }

    /// Waits for it, at most as long as `limit`, for a caller that has nothing else to do.
    ///
    /// # Errors
    /// Why there is no process.
    pub fn wait(mut self, limit: Duration) -> Result<Launched, LaunchError> {
        let deadline = Instant::now() + limit;
        let outcome = loop {
            if self.hear() {
                break self.finish();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break self.give_up(Errno::TIMEDOUT);
            }
            if let Err(errno) = readable(self.channel.as_fd(), left) {
                break self.give_up(errno);
            }
        };
        for child in &outcome.rest {
            let _ = process::reap(child.pidfd.as_fd());
        }
        outcome.launched
    }
}

/// Waits until there is something to read, or the time is over.
pub(super) fn readable(channel: BorrowedFd<'_>, limit: Duration) -> Result<(), Errno> {
    let limit = Timespec::try_from(limit).map_err(|_| Errno::INVAL)?;
    match poll(&mut [PollFd::from_borrowed_fd(channel, PollFlags::IN)], Some(&limit)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// In the kernel's words, as `T (stopped)` or `D (disk sleep)`.
fn state_of(child: &Child) -> String {
    let path = format!("/proc/{}/status", child.pid.as_raw_nonzero());
    let status = std::fs::read_to_string(path).unwrap_or_default();
    let state = status.lines().find_map(|line| line.strip_prefix("State:"));
    state.map_or_else(|| "X (dead)".to_owned(), |state| state.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::super::channel::{Reporter, pair};
    use super::*;

    #[test]
    fn nobody_is_forgotten_who_speaks_early() {
        let own = || {
            let pid = sys::rustix::process::getpid();
            Child { pid, pidfd: process::pidfd_open(pid).unwrap() }
        };
        let (channel, theirs) = pair().unwrap();
        let (first, last) = (Reporter(theirs.try_clone().unwrap()), Reporter(theirs));
        let mut starting = Starting::new(own(), true, channel, false, Vec::new()).unwrap();
        last.error(&LaunchError { step: Step::Execute, errno: 2, detail: "none".to_owned() });
        assert!(!starting.hear(), "who it was is not known");
        first.child(own().pid.as_raw_nonzero().get(), own().pidfd.as_fd());
        assert!(starting.hear() && starting.last.is_some() && starting.failure.is_some());

        let (channel, theirs) = pair().unwrap();
        let mut starting = Starting::new(own(), true, channel, false, Vec::new()).unwrap();
        Reporter(theirs).error(&LaunchError { step: Step::JoinNamespace, errno: 1, detail: "user".to_owned() });
        assert!(starting.hear() && starting.last.is_none(), "it came to make none");
    }
}
