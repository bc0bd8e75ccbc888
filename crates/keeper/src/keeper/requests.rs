//! What the daemon asks for.

use std::fs;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use executor::oci::NamespaceKind as Kind;
use executor::{ExecFds, ExecPlan, Inherited, LaunchFds, LaunchPlan};
use sys::cgroup::Entry;
use sys::{process, pty, rustix};

use super::starts::{Asked, Ours, Parts, Way, What};
use super::{Answer, Keeper, failure, state};
use crate::container::{Client, Container};
use crate::driven::{Driven, Tree};
use crate::log::LogFile;
use crate::protocol::{
    Attach, CgroupEntry, CloseStdin, Drive, DriveExec, Exec, Failure, Forget, GetNamespace, Hello, Join, JoinFrom,
    Launch, Log, NamespaceKind, Reason, ReopenLog, Reply, Request, Resize, Role, Shutdown, Signal, Stdio, VERSION,
    VERSION_OLDEST, WindowSize,
};

/// SIGKILL.
const KILL: u32 = 9;

/// The file descriptors of a request, taken in order.
struct Fds(std::vec::IntoIter<OwnedFd>);

impl Fds {
    fn take(&mut self) -> Result<OwnedFd, Failure> {
        self.0.next().ok_or_else(|| Failure {
            reason: Reason::Invalid,
            step: String::new(),
            errno: 0,
            detail: "a file descriptor is missing".to_owned(),
        })
    }

    fn take_if(&mut self, there: bool) -> Result<Option<OwnedFd>, Failure> {
        there.then(|| self.take()).transpose()
    }

    fn take_some(&mut self, count: u16) -> Result<Vec<OwnedFd>, Failure> {
        (0..count).map(|_| self.take()).collect()
    }
}

fn done() -> Answer {
    Ok((Reply::Done, Vec::new()))
}

fn invalid(error: impl std::fmt::Display) -> Failure {
    Failure { reason: Reason::Invalid, step: String::new(), errno: 0, detail: error.to_string() }
}

pub(super) fn system(step: &'static str) -> impl Fn(io::Error) -> Failure {
    move |error| failure(Reason::System, step, &error, error.to_string())
}

impl Keeper {
    /// Does as asked; what starts a process is answered when that has come to its program.
    pub(super) fn answer(&mut self, asked: Asked, request: Request, fds: Vec<OwnedFd>) -> Option<Answer> {
        let fds = Fds(fds.into_iter());
        let known = self.connection(asked.connection).is_ok_and(|connection| connection.role.is_some());
        Some(match request {
            Request::Hello(hello) => self.hello(asked.connection, &hello),
            _ if !known => Err(state("Hello comes first")),
            Request::Snapshot => Ok((Reply::Snapshot(self.snapshot(VERSION)), Vec::new())),
            Request::Launch(launch) => return self.launch(asked, launch, fds).err().map(Err),
            Request::Exec(exec) => return self.exec(asked, exec, fds).err().map(Err),
            Request::Drive(drive) => return self.drive(asked, drive, fds).err().map(Err),
            Request::DriveExec(exec) => return self.drive_exec(asked, exec, fds).err().map(Err),
            Request::Signal(signal) => self.signal(&signal),
            Request::Resize(resize) => self.resize(&resize),
            Request::ReopenLog(reopen) => self.reopen_log(&reopen, fds),
            Request::Attach(attach) => self.attach(&attach, fds),
            Request::CloseStdin(close) => self.close_stdin(&close),
            Request::GetNamespace(get) => self.get_namespace(&get),
            Request::Forget(forget) => self.forget(&forget),
            Request::Shutdown(shutdown) => self.shut_down(&shutdown),
        })
    }

    fn hello(&mut self, key: u32, hello: &Hello) -> Answer {
        let version = hello.newest.min(VERSION);
        if version < hello.oldest.max(VERSION_OLDEST) {
            return Err(Failure {
                reason: Reason::Version,
                step: String::new(),
                errno: 0,
                detail: format!(
                    "the keeper of orlop {} speaks versions {VERSION_OLDEST} to {VERSION}",
                    env!("CARGO_PKG_VERSION")
                ),
            });
        }
        if hello.role == Role::Control {
            let others =
                self.connections.iter().filter(|(other, one)| *other != key && one.role == Some(Role::Control));
            let others: Vec<u32> = others.map(|(other, _)| *other).collect();
            others.into_iter().for_each(|other| self.disconnect(other));
        }
        self.connection(key).map_err(system("connection"))?.role = Some(hello.role);
        Ok((Reply::Welcome(self.welcome(version)), Vec::new()))
    }

    fn container(&mut self, id: &str) -> Result<&mut Container, Failure> {
        self.containers.iter_mut().find(|one| one.id == id).ok_or_else(|| state(format!("no container {id}")))
    }

    fn running(&mut self, id: &str) -> Result<&mut Container, Failure> {
        let container = self.container(id)?;
        if container.exit.is_some() { Err(state(format!("container {id} has ended"))) } else { Ok(container) }
    }

    fn launch(&mut self, asked: Asked, launch: Launch, mut fds: Fds) -> Result<(), Failure> {
        self.must_be_new(&launch.id)?;
        let plan = LaunchPlan::decode(&launch.plan.0).map_err(invalid)?;
        let log = open_log(launch.log, &mut fds)?;
        let rootfs = fds.take_if(launch.root)?;
        let mounts = fds.take_some(launch.mounts)?;
        let cgroup = cgroup(&launch.cgroup, fds.take_some(launch.cgroups)?);
        let namespaces = self.joined(&launch.joins, &mut fds)?;
        let pipes = Pipes::new(&launch.stdio).map_err(system("pipe"))?;
        let kept = cgroup.as_ref().map(clone_entry).transpose().map_err(system("cgroup"))?;
        let fds = LaunchFds { rootfs, mounts, namespaces, cgroup, ..LaunchFds::default() };
        let started = self.sandbox.exposed(|| executor::start(&plan, fds, pipes.theirs));
        let parts = Parts { stdio: launch.stdio, ours: pipes.ours, cgroup: kept, log };
        self.follow(asked, launch.id, What::Container(Box::new(parts)), started.map(Way::Own))
    }

    fn must_be_new(&self, id: &str) -> Result<(), Failure> {
        if self.starts(id) || self.containers.iter().any(|one| one.id == id) {
            return Err(state(format!("container {id} is there already")));
        }
        Ok(())
    }

    /// The namespaces that a container joins.
    fn joined(&self, joins: &[Join], fds: &mut Fds) -> Result<Vec<(Kind, OwnedFd)>, Failure> {
        let mut namespaces = Vec::with_capacity(joins.len());
        for join in joins {
            let kind = kind_of(&join.kind);
            let fd = match join.from {
                JoinFrom::Fd => fds.take()?,
                JoinFrom::Pod => match self.sandbox.namespace(kind) {
                    Some(fd) => fd.try_clone().map_err(system("namespace"))?,
                    None => return Err(state(format!("the pod has no {kind:?} namespace of its own"))),
                },
            };
            namespaces.push((kind, fd));
        }
        Ok(namespaces)
    }

    fn drive(&mut self, asked: Asked, drive: Drive, mut fds: Fds) -> Result<(), Failure> {
        self.must_be_new(&drive.id)?;
        let log = open_log(drive.log, &mut fds)?;
        let root = Some(fds.take()?);
        let mounts = fds.take_some(drive.mounts)?;
        let cgroup = cgroup(&drive.cgroup, fds.take_some(drive.cgroups)?);
        let namespaces = self.joined(&drive.joins, &mut fds)?;
        let pipes = Pipes::new(&drive.stdio).map_err(system("pipe"))?;
        self.adopt_orphans().map_err(system("subreaper"))?;
        let streams = match pipes.theirs {
            executor::Stdio::Streams { stdin, stdout, stderr } => [stdin, stdout, stderr],
            executor::Stdio::Terminal { .. } => [None, None, None],
        };
        let tree = Tree { root, mounts, cgroup, namespaces, volumes: drive.volumes };
        let tty = drive.stdio.tty.is_some();
        let started = self.sandbox.exposed(|| Driven::start(&drive.commands, tty, streams, &tree));
        let parts = Parts { stdio: drive.stdio, ours: pipes.ours, cgroup: None, log };
        self.follow(asked, drive.id, What::Container(Box::new(parts)), started.map(Way::driven))
    }

    fn drive_exec(&mut self, asked: Asked, exec: DriveExec, mut fds: Fds) -> Result<(), Failure> {
        self.must_be_new_session(&exec.id)?;
        let streams = [fds.take_if(exec.stdin)?, fds.take_if(exec.stdout)?, fds.take_if(exec.stderr)?];
        self.running(&exec.container)?;
        self.adopt_orphans().map_err(system("subreaper"))?;
        let tree = Tree::default();
        let started = self.sandbox.exposed(|| Driven::start(&exec.commands, exec.tty, streams, &tree));
        self.follow(asked, exec.id, What::Exec { container: exec.container }, started.map(Way::driven))
    }

    fn must_be_new_session(&self, id: &str) -> Result<(), Failure> {
        if self.starts(id) || self.sessions.iter().any(|one| one.id == id) {
            return Err(state(format!("exec session {id} is there already")));
        }
        Ok(())
    }

    fn exec(&mut self, asked: Asked, exec: Exec, mut fds: Fds) -> Result<(), Failure> {
        self.must_be_new_session(&exec.id)?;
        let plan = ExecPlan::decode(&exec.plan.0).map_err(invalid)?;
        let stdio = match &exec.tty {
            Some(size) => terminal(size),
            None => executor::Stdio::Streams {
                stdin: fds.take_if(exec.stdin)?,
                stdout: fds.take_if(exec.stdout)?,
                stderr: fds.take_if(exec.stderr)?,
            },
        };
        let container = self.running(&exec.container)?;
        let cgroup = container.cgroup.as_ref().map(clone_entry).transpose().map_err(system("cgroup"))?;
        let Some(pidfd) = &container.pidfd else { return Err(state("the container has ended")) };
        let target = pidfd.try_clone().map_err(system("pidfd"))?;
        let fds = ExecFds { target: target.as_fd(), cgroup, inherited: Inherited::default() };
        let started = self.sandbox.exposed(|| executor::start_exec(&plan, fds, stdio));
        self.follow(asked, exec.id, What::Exec { container: exec.container }, started.map(Way::Own))
    }

    fn signal(&mut self, signal: &Signal) -> Answer {
        if signal.signal == KILL && self.cancel(&signal.id) {
            return done();
        }
        let containers = self.containers.iter().filter(|one| one.id == signal.id).map(|one| &one.pidfd);
        let sessions = self.sessions.iter().filter(|one| one.id == signal.id).map(|one| &one.pidfd);
        let target = containers.chain(sessions).next().ok_or_else(|| state(format!("no process {}", signal.id)))?;
        let Some(pidfd) = target else { return done() };
        let number = i32::try_from(signal.signal).map_err(invalid)?;
        match process::send_signal(pidfd.as_fd(), number) {
            Err(error) if error.errno == rustix::io::Errno::SRCH => done(),
            Err(error) => Err(failure(Reason::System, error.call, &error.errno.into(), signal.id.clone())),
            Ok(()) => done(),
        }
    }

    fn resize(&mut self, resize: &Resize) -> Answer {
        let container = self.running(&resize.id)?;
        let terminal = container.stdout.as_ref().filter(|_| container.terminal);
        let Some(terminal) = terminal else { return Err(state(format!("container {} has no terminal", resize.id))) };
        pty::resize(&terminal.source, resize.size.rows, resize.size.columns).map_err(system("TIOCSWINSZ"))?;
        done()
    }

    fn reopen_log(&mut self, reopen: &ReopenLog, mut fds: Fds) -> Answer {
        let directory = fds.take_if(reopen.directory)?;
        if let Some(log) = &mut self.container(&reopen.id)?.log {
            log.reopen(directory).map_err(system("log file"))?;
        }
        done()
    }

    fn attach(&mut self, attach: &Attach, mut fds: Fds) -> Answer {
        let key = self.key();
        let three = [fds.take_if(attach.stdin)?, fds.take_if(attach.stdout)?, fds.take_if(attach.stderr)?];
        let client = Client::new(key, attach.attach, three).map_err(system("O_NONBLOCK"))?;
        let container = self.containers.iter_mut().find(|one| one.id == attach.id && one.exit.is_none());
        let Some(container) = container else { return Err(state(format!("container {} does not run", attach.id))) };
        container.add_client(client, &self.poller).map_err(system("epoll_ctl"))?;
        done()
    }

    fn close_stdin(&mut self, close: &CloseStdin) -> Answer {
        match self.containers.iter_mut().find(|one| one.id == close.id) {
            Some(container) => {
                container.close_input(&self.poller);
                done()
            }
            None => Err(state(format!("no container {}", close.id))),
        }
    }

    fn get_namespace(&mut self, get: &GetNamespace) -> Answer {
        let kind = kind_of(&get.kind);
        let fd = match &get.container {
            Some(id) => {
                let pid = self.running(id)?.process.pid;
                open_namespace(&pid.to_string(), kind)
            }
            None => match self.sandbox.namespace(kind) {
                Some(fd) => fd.try_clone(),
                None => open_namespace("self", kind),
            },
        };
        Ok((Reply::Done, vec![fd.map_err(system("namespace"))?]))
    }

    fn forget(&mut self, forget: &Forget) -> Answer {
        if let Some(at) = self.sessions.iter().position(|one| one.id == forget.id) {
            if self.sessions[at].exit.is_none() {
                return Err(state(format!("exec session {} runs", forget.id)));
            }
            self.sessions.swap_remove(at);
        }
        if let Some(at) = self.containers.iter().position(|one| one.id == forget.id) {
            if self.containers[at].exit.is_none() {
                return Err(state(format!("container {} runs", forget.id)));
            }
            let mut container = self.containers.remove(at);
            container.close(&mut self.buffers, &self.poller);
            self.write_record();
        }
        done()
    }

    fn shut_down(&mut self, shutdown: &Shutdown) -> Answer {
        let running = self.containers.iter().filter_map(|one| one.pidfd.as_ref());
        let running: Vec<&OwnedFd> = running.chain(self.sessions.iter().filter_map(|one| one.pidfd.as_ref())).collect();
        let count = running.len() + self.starts.len();
        if count > 0 && !shutdown.kill {
            return Err(state(format!("{count} processes run")));
        }
        for pidfd in running {
            let _ = process::send_signal(pidfd.as_fd(), 9); // Whoever is gone already needs no signal.
            let _ = process::reap(pidfd.as_fd());
        }
        self.cancel_all();
        let _ = fs::remove_file(crate::protocol::SOCKET); // The daemon removes the whole directory.
        self.over = true;
        done()
    }
}

fn open_log(log: Option<Log>, fds: &mut Fds) -> Result<Option<LogFile>, Failure> {
    let open = |log: Log| LogFile::open(fds.take()?, log.name, log.rotate).map_err(system("log file"));
    log.map(open).transpose()
}

fn open_namespace(process: &str, kind: Kind) -> io::Result<OwnedFd> {
    let path = format!("/proc/{process}/ns/{}", executor::namespaces::file_name(kind));
    fs::File::open(path).map(OwnedFd::from)
}

fn kind_of(kind: &NamespaceKind) -> Kind {
    match kind {
        NamespaceKind::Net => Kind::Network,
        NamespaceKind::Uts => Kind::Uts,
        NamespaceKind::Ipc => Kind::Ipc,
        NamespaceKind::Pid => Kind::Pid,
        NamespaceKind::User => Kind::User,
        NamespaceKind::Mount => Kind::Mount,
        NamespaceKind::Cgroup => Kind::Cgroup,
    }
}

fn cgroup(entry: &CgroupEntry, mut fds: Vec<OwnedFd>) -> Option<Entry> {
    match entry {
        CgroupEntry::Stay => None,
        CgroupEntry::Directory => fds.pop().map(Entry::Directory),
        CgroupEntry::Files => Some(Entry::Files(fds)),
    }
}

fn clone_entry(entry: &Entry) -> io::Result<Entry> {
    Ok(match entry {
        Entry::Directory(fd) => Entry::Directory(fd.try_clone()?),
        Entry::Files(fds) => Entry::Files(fds.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>()?),
    })
}

fn terminal(size: &WindowSize) -> executor::Stdio {
    executor::Stdio::Terminal { rows: size.rows, columns: size.columns }
}

/// Both ends of a container's pipes.
struct Pipes {
    ours: Ours,
    theirs: executor::Stdio,
}

impl Pipes {
    fn new(stdio: &Stdio) -> io::Result<Self> {
        if let Some(size) = &stdio.tty {
            return Ok(Self { ours: Ours::default(), theirs: terminal(size) });
        }
        let (stdout, theirs_out) = io::pipe()?;
        let (stderr, theirs_err) = io::pipe()?;
        let (theirs_in, stdin) = match stdio.stdin {
            true => io::pipe().map(|(theirs, ours)| (Some(theirs.into()), Some(ours.into())))?,
            false => (None, None),
        };
        Ok(Self {
            ours: Ours { stdin, stdout: Some(stdout.into()), stderr: Some(stderr.into()) },
            theirs: executor::Stdio::Streams {
                stdin: theirs_in,
                stdout: Some(theirs_out.into()),
                stderr: Some(theirs_err.into()),
            },
        })
    }
}
