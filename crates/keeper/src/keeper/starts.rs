//! Processes that were made and have not come to their programs yet. Nothing waits for them: the one who asked is answered
//! when it is known what became of each.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use executor::{LaunchError, Launched, Outcome, Starting};
use sys::cgroup::Entry;
use sys::process::{self, Child};
use sys::rustix::io::Errno;

use super::session::Session;
use super::{Answer, Keeper};
use crate::container::{Container, Input, Output};
use crate::driven::{Driven, Heard};
use crate::log::{LogFile, Stream};
use crate::poll::{Interest, Token};
use crate::protocol::{Failure, Process, Reason, Reply, Started, Stdio};

const KILL: i32 = 9;

/// Who gets the answer to a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) connection: u32,
    pub(super) number: u32,
}

/// A process on its way to its program.
pub(super) struct Start {
    key: u32,
    pub(super) id: String,
    asked: Asked,
    pub(super) deadline: Instant,
    way: Way,
    what: What,
}

/// Who makes it.
pub(super) enum Way {
    /// The keeper itself.
    Own(Starting),
    /// Another OCI runtime.
    Driven(Box<Driven>),
}

impl AsFd for Way {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Own(starting) => starting.as_fd(),
            Self::Driven(driven) => driven.as_fd(),
        }
    }
}

impl Way {
    pub(super) fn driven(driven: Driven) -> Self {
        Self::Driven(Box::new(driven))
    }

    fn give_up(self, errno: Errno) -> Outcome {
        match self {
            Self::Own(starting) => starting.give_up(errno),
            Self::Driven(driven) => driven.give_up(errno),
        }
    }

    fn finish(self) -> Outcome {
        match self {
            Self::Own(starting) => starting.finish(),
            Self::Driven(driven) => driven.finish(),
        }
    }
}

/// What it is going to be.
pub(super) enum What {
    Container(Box<Parts>),
    Exec { container: String },
}

/// What a container has beside its process.
pub(super) struct Parts {
    pub(super) stdio: Stdio,
    pub(super) ours: Ours,
    pub(super) cgroup: Option<Entry>,
    pub(super) log: Option<LogFile>,
}

/// The keeper's ends of a container's pipes.
#[derive(Debug, Default)]
pub(super) struct Ours {
    pub(super) stdin: Option<OwnedFd>,
    pub(super) stdout: Option<OwnedFd>,
    pub(super) stderr: Option<OwnedFd>,
}

/// A process that is of no use any more and has to be reaped.
pub(super) struct Rest {
    key: u32,
    child: Child,
}

impl Rest {
    pub(super) fn pid(&self) -> u32 {
        self.child.pid.as_raw_nonzero().get().unsigned_abs()
    }
}

fn launch_failure(error: &LaunchError) -> Failure {
    Failure { reason: Reason::Launch, step: error.step.to_string(), errno: error.errno, detail: error.detail.clone() }
}

impl Keeper {
    /// Whether a container or session of this id is on its way.
    pub(super) fn starts(&self, id: &str) -> bool {
        self.starts.iter().any(|start| start.id == id)
    }

    /// Watches a new process.
    pub(super) fn follow(
        &mut self,
        asked: Asked,
        id: String,
        what: What,
        started: Result<Way, LaunchError>,
    ) -> Result<(), Failure> {
        let way = started.map_err(|error| launch_failure(&error))?;
        let (key, deadline) = (self.key(), Instant::now() + self.start_max);
        self.poller.add(&way, Token::Start(key), Interest::Read).map_err(super::requests::system("epoll_ctl"))?;
        self.starts.push(Start { key, id, asked, deadline, way, what });
        Ok(())
    }

    /// Gives up what has taken too long.
    pub(super) fn give_up_late(&mut self) {
        let now = Instant::now();
        while let Some(at) = self.starts.iter().position(|start| start.deadline <= now) {
            self.give_up(at, Errno::TIMEDOUT);
        }
    }

    /// Ends a process on its way; whether there is one.
    pub(super) fn cancel(&mut self, id: &str) -> bool {
        let found = self.starts.iter().position(|start| start.id == id);
        if let Some(at) = found {
            self.give_up(at, Errno::CANCELED);
        }
        found.is_some()
    }

    pub(super) fn cancel_all(&mut self) {
        while !self.starts.is_empty() {
            self.give_up(0, Errno::CANCELED);
        }
    }

    fn give_up(&mut self, at: usize, errno: Errno) {
        let start = self.take(at);
        let outcome = start.way.give_up(errno);
        self.ended(start.asked, start.id, start.what, outcome);
    }

    /// A process on its way has said something.
    pub(super) fn progress(&mut self, key: u32) {
        let Some(at) = self.starts.iter().position(|start| start.key == key) else { return };
        let is_over = match &mut self.starts[at].way {
            Way::Own(starting) => starting.hear(),
            Way::Driven(driven) => match driven.hear() {
                Heard::Nothing => false,
                Heard::End => true,
                Heard::Next(before) => {
                    self.poller.remove(&before.pidfd);
                    // One that is not watched is given up when its time is over.
                    let _ = self.poller.add(driven.as_fd(), Token::Start(key), Interest::Read);
                    false
                }
            },
        };
        if is_over {
            let start = self.take(at);
            self.ended(start.asked, start.id, start.what, start.way.finish());
        }
    }

    fn take(&mut self, at: usize) -> Start {
        let start = self.starts.swap_remove(at);
        self.poller.remove(&start.way);
        start
    }

    fn ended(&mut self, asked: Asked, id: String, what: What, outcome: Outcome) {
        outcome.rest.into_iter().for_each(|child| self.await_end(child));
        let launched = outcome.launched.map_err(|error| launch_failure(&error));
        let answer = launched.and_then(|launched| self.take_in(id, what, launched));
        self.reply(asked, answer);
    }

    /// Reaps a process that is of no use when it has ended.
    fn await_end(&mut self, child: Child) {
        let key = self.key();
        // Without being watched it would stay a zombie as long as the keeper lives, which is all that it could do.
        let _ = self.poller.add(&child.pidfd, Token::Rest(key), Interest::Read);
        self.rest.push(Rest { key, child });
    }

    /// A process that was of no use has ended.
    pub(super) fn reap_rest(&mut self, key: u32) {
        let Some(at) = self.rest.iter().position(|rest| rest.key == key) else { return };
        if matches!(process::try_reap(self.rest[at].child.pidfd.as_fd()), Ok(None)) {
            return;
        }
        let rest = self.rest.swap_remove(at);
        self.poller.remove(&rest.child.pidfd);
    }

    /// Takes a started process in; what it is, a copy of its descriptor, and the master of a session's terminal. One that
    /// cannot be taken in is ended: nobody would hear of it, nor reap it.
    fn take_in(&mut self, id: String, what: What, launched: Launched) -> Answer {
        let pid = launched.child.pid;
        let copy = match launched.child.pidfd.try_clone() {
            Ok(copy) => copy,
            Err(error) => {
                self.discard(launched.child);
                return Err(super::requests::system("pidfd")(error));
            }
        };
        let taken = match what {
            What::Container(parts) => self.keep(id, *parts, launched).map(|started| (started, None)),
            What::Exec { container } => self.open_session(id, container, launched),
        };
        match taken {
            Ok((started, terminal)) => Ok((Reply::Started(started), [copy].into_iter().chain(terminal).collect())),
            Err(failure) => {
                self.discard(Child { pid, pidfd: copy });
                Err(failure)
            }
        }
    }

    fn discard(&mut self, child: Child) {
        let _ = process::send_signal(child.pidfd.as_fd(), KILL); // It may have ended.
        self.await_end(child);
    }

    fn keep(&mut self, id: String, parts: Parts, launched: Launched) -> Result<Started, Failure> {
        let system = super::requests::system;
        let Parts { stdio, ours, cgroup, log } = parts;
        let (process, warnings) = describe(&launched);
        let (stdout, stderr, stdin) = match launched.terminal {
            Some(master) => {
                let input = if stdio.stdin { Some(master.try_clone().map_err(system("terminal"))?) } else { None };
                (Some(master), None, input)
            }
            None => (ours.stdout, ours.stderr, ours.stdin),
        };
        let output = |fd: Option<OwnedFd>, stream| fd.map(|fd| Output::new(fd, stream)).transpose();
        let container = Container {
            key: self.key(),
            id,
            process: process.clone(),
            pidfd: Some(launched.child.pidfd),
            exit: None,
            log,
            cgroup,
            terminal: stdio.tty.is_some(),
            stdin_once: stdio.stdin_once,
            stdout: output(stdout, Stream::Stdout).map_err(system("stdout"))?,
            stderr: output(stderr, Stream::Stderr).map_err(system("stderr"))?,
            stdin: stdin.map(Input::new).transpose().map_err(system("stdin"))?,
            clients: Vec::new(),
        };
        if let Err(error) = container.watch(&self.poller) {
            container.unwatch(&self.poller);
            return Err(system("epoll_ctl")(error));
        }
        self.containers.push(container);
        self.write_record();
        Ok(Started { process, warnings })
    }

    fn open_session(
        &mut self,
        id: String,
        container: String,
        launched: Launched,
    ) -> Result<(Started, Option<OwnedFd>), Failure> {
        let (process, warnings) = describe(&launched);
        let (key, pidfd) = (self.key(), launched.child.pidfd);
        let watched = self.poller.add(&pidfd, Token::Exec(key), Interest::Read);
        watched.map_err(super::requests::system("epoll_ctl"))?;
        self.sessions.push(Session { key, id, container, process: process.clone(), pidfd: Some(pidfd), exit: None });
        Ok((Started { process, warnings }, launched.terminal))
    }
}

fn describe(launched: &Launched) -> (Process, Vec<String>) {
    let pid = launched.child.pid.as_raw_nonzero().get().unsigned_abs();
    let process = Process { pid, start_ticks: start_ticks(pid), at: crate::clock::now() };
    (process, launched.warnings.iter().map(ToString::to_string).collect())
}

/// Field 22 of `/proc/<pid>/stat`; the second field may hold spaces and parentheses. 0 when it has ended already.
fn start_ticks(pid: u32) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name.split_whitespace().nth(19).and_then(|ticks| ticks.parse().ok()).unwrap_or(0)
}
