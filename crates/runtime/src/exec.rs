//! Further processes in running containers, and clients that join a container's own streams.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use cri::{Error, v1};
use executor::ExecPlan;
use keeper::protocol::{Attach, Blob, DriveExec, Exec, Exit, Request, Signal, WindowSize};
use sys::rustix;
use tokio::io::AsyncReadExt as _;
use tokio::net::unix::pipe;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio::time::Instant;

use crate::client::{Client, ClientError};
use crate::container::{Container, Phase};
use crate::core::{Core, blocking, failed, new_id};
use crate::sandbox::Sandbox;
use crate::spec::{ContainerSpec, exec_process};

/// Most output of one stream that `ExecSync` keeps; the rest is read and dropped, so that the process goes on
/// (containerd's `maxExecSyncOutput`).
const OUTPUT_MAX: usize = 16 << 20;
/// Output of one stream that is kept whatever others have: a kubelet looks at 10 KiB of a probe's.
const OUTPUT_OWN: usize = 16 << 10;
/// What all streams of the node keep beyond that. Pods choose when and how much their probes say.
pub(crate) const OUTPUT_ALL_MAX: usize = 64 << 20;
const CHUNK: usize = 16 << 10;
const KILL: u32 = 9;
/// How long a killed process has to end before its client hears of the timeout anyway.
const END_MAX: Duration = Duration::from_secs(10);

/// A process that runs in a container.
#[derive(Debug)]
pub(crate) struct Running {
    pub(crate) id: String,
    keeper: Arc<Client>,
    exit: oneshot::Receiver<Exit>,
    /// The master of its terminal, if it has one.
    pub(crate) terminal: Option<OwnedFd>,
}

/// The ends of a process's streams that it gets itself.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    pub(crate) stdin: Option<OwnedFd>,
    pub(crate) stdout: Option<OwnedFd>,
    pub(crate) stderr: Option<OwnedFd>,
}

impl Running {
    /// Waits for its end. Cancel-safe.
    pub(crate) async fn exit(&mut self) -> Result<Exit, Error> {
        (&mut self.exit)
            .await
            .map_err(|_| Error::Unavailable("the pod's keeper ended, and the process with it".to_owned()))
    }

    pub(crate) fn kill(&self) {
        self.keeper.tell(kill_request(&self.id));
    }
}

/// The container if it runs.
pub(crate) fn running(core: &Core, id: &str) -> Result<(Arc<Sandbox>, Arc<Container>), Error> {
    let (sandbox, container) = core.table.container(id)?;
    if container.phase() == Phase::Running {
        return Ok((sandbox, container));
    }
    Err(Error::FailedPrecondition(format!("container {} does not run", container.id)))
}

/// The sandbox if it is ready.
pub(crate) fn ready_sandbox(core: &Core, id: &str) -> Result<Arc<Sandbox>, Error> {
    let sandbox = core.table.sandbox(id)?;
    if sandbox.phase() == crate::sandbox::Phase::Ready {
        return Ok(sandbox);
    }
    Err(Error::FailedPrecondition(format!("sandbox {} is not ready", sandbox.id)))
}

/// Starts a process in a running container.
pub(crate) async fn start(
    core: &Core,
    container_id: &str,
    command: &[String],
    tty: Option<WindowSize>,
    streams: Streams,
) -> Result<Running, Error> {
    let (sandbox, container) = running(core, container_id)?;
    let fail = |error| failed("starting a process in container", &container.id, &error);
    let keeper = sandbox.keeper().map_err(fail)?;
    let id = new_id();
    let request = request_of(core, (&sandbox, &container), &id, command, tty, &streams).await?;
    let (sender, exit) = oneshot::channel();
    sandbox.execs().insert(id.clone(), sender);
    let fds = streams.stdin.into_iter().chain(streams.stdout).chain(streams.stderr).collect();
    let unanswered = Unanswered { sandbox: &sandbox, keeper: &keeper, id: &id };
    let answer = keeper.start(request, fds).await;
    unanswered.answered();
    let words = sandbox.driver.as_ref().and_then(|driver| {
        let words = driver.last_words(&container.id, Some(&id));
        driver.forget_exec(&container.id, &id);
        words
    });
    match (answer, words) {
        (Ok((_, fds)), _) => Ok(Running { id, keeper, exit, terminal: fds.into_iter().nth(1) }),
        (Err(error), words) => {
            sandbox.execs().remove(&id);
            match words.filter(|_| matches!(error, ClientError::Refused(_))) {
                Some(words) => {
                    Err(Error::Internal(format!("starting a process in container {}: {words}", container.id)))
                }
                None => Err(fail(error)),
            }
        }
    }
}

/// What the keeper is asked for: it makes the process, or has another runtime make it.
async fn request_of(
    core: &Core,
    (sandbox, container): (&Arc<Sandbox>, &Arc<Container>),
    id: &str,
    command: &[String],
    tty: Option<WindowSize>,
    streams: &Streams,
) -> Result<Request, Error> {
    let Streams { stdin, stdout, stderr } = streams;
    let (stdin, stdout, stderr) = (stdin.is_some(), stdout.is_some(), stderr.is_some());
    let (id, container_id) = (id.to_owned(), container.id.clone());
    let Some(driver) = &sandbox.driver else {
        let plan = Blob(plan_of(core, sandbox, container, command, tty.is_some()).await?.encode());
        return Ok(Request::Exec(Exec { id, container: container_id, plan, tty, stdin, stdout, stderr }));
    };
    let tty = tty.is_some();
    let process = exec_process(&spec_of(sandbox, container).await?.oci, command, tty);
    let put = driver.put_process(&container.id, &id, &process);
    put.map_err(|error| failed("starting a process in container", &container.id, &error))?;
    let commands = driver.exec(&container.id, &id, tty);
    Ok(Request::DriveExec(DriveExec { id, container: container_id, commands, tty, stdin, stdout, stderr }))
}

/// A process that the keeper was asked to start. If nobody waits for the answer any more it is killed, started or not.
struct Unanswered<'a> {
    sandbox: &'a Sandbox,
    keeper: &'a Client,
    id: &'a str,
}

impl Unanswered<'_> {
    fn answered(self) {
        std::mem::forget(self);
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        self.sandbox.execs().remove(self.id);
        self.keeper.tell(kill_request(self.id));
    }
}

fn kill_request(id: &str) -> Request {
    Request::Signal(Signal { id: id.to_owned(), signal: KILL })
}

/// The plan of a process. Probes come often and without a terminal: for them the plan of the first is kept.
async fn plan_of(
    core: &Core,
    sandbox: &Sandbox,
    container: &Container,
    command: &[String],
    tty: bool,
) -> Result<ExecPlan, Error> {
    let invalid = |error: executor::PlanError| Error::InvalidArgument(error.to_string());
    let kept = container.live().exec.clone().filter(|_| !tty);
    if let Some(kept) = kept {
        return kept.with_args(command).map_err(invalid);
    }
    let spec = spec_of(sandbox, container).await?;
    let plan = spec.exec_plan(command, tty, &core.host.facts).map_err(invalid)?;
    if !tty {
        container.live().exec = Some(Arc::new(plan.clone()));
    }
    Ok(plan)
}

/// The container's configuration, from its record.
pub(crate) async fn spec_of(sandbox: &Sandbox, container: &Container) -> Result<ContainerSpec, Error> {
    let (records, id) = (sandbox.records.clone(), container.id.clone());
    blocking(move || {
        let json = records.spec(&id).map_err(|error| failed("reading the configuration of container", &id, &error))?;
        serde_json::from_slice(&json).map_err(|error| failed("reading the configuration of container", &id, &error))
    })
    .await
}

/// CRI `ExecSync`.
pub(crate) async fn sync(core: &Core, request: v1::ExecSyncRequest) -> Result<v1::ExecSyncResponse, Error> {
    let pipes = (|| Ok((std::io::pipe()?, std::io::pipe()?)))();
    let ((stdout, theirs_out), (stderr, theirs_err)) =
        pipes.map_err(|error: std::io::Error| Error::ResourceExhausted(format!("making pipes: {error}")))?;
    let streams = Streams { stdin: None, stdout: Some(theirs_out.into()), stderr: Some(theirs_err.into()) };
    let timeout = u64::try_from(request.timeout).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs);
    // A time beyond what the clock can say is none: tenants choose it.
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let starting = start(core, &request.container_id, &request.cmd, None, streams);
    let Some(running) = until(deadline, starting).await else { return Err(timed_out(&request)) };
    let mut watched = Watched(running?);
    let capture = |pipe: std::io::PipeReader| Capture::new(pipe.into(), core.exec_output.clone());
    let (mut stdout, mut stderr) = (capture(stdout)?, capture(stderr)?);
    let outcome = until(deadline, finish(&mut watched.0, &mut stdout, &mut stderr)).await;
    let Some(exit) = outcome else {
        watched.0.kill();
        let _ = tokio::time::timeout(END_MAX, watched.0.exit()).await; // It may wait for a disk.
        return Err(timed_out(&request));
    };
    Ok(v1::ExecSyncResponse {
        exit_code: i32::try_from(exit?.code).unwrap_or(i32::MAX),
        stdout: stdout.take(),
        stderr: stderr.take(),
    })
}

/// What comes of `work` until the deadline, if there is one.
async fn until<T>(deadline: Option<Instant>, work: impl Future<Output = T>) -> Option<T> {
    match deadline {
        Some(deadline) => tokio::time::timeout_at(deadline, work).await.ok(),
        None => Some(work.await),
    }
}

/// Reads until the process has ended.
async fn finish(running: &mut Running, stdout: &mut Capture, stderr: &mut Capture) -> Result<Exit, Error> {
    loop {
        tokio::select! {
            exit = running.exit() => {
                let exit = exit?;
                // What it wrote is in the pipes by now. Others that hold them open are not waited for.
                stdout.drain();
                stderr.drain();
                return Ok(exit);
            }
            () = stdout.read(), if stdout.open => {}
            () = stderr.read(), if stderr.open => {}
        }
    }
}

fn timed_out(request: &v1::ExecSyncRequest) -> Error {
    Error::DeadlineExceeded(format!("command {:?} timed out after {} s and was killed", request.cmd, request.timeout))
}

/// A process that is killed when nobody waits for it any more.
struct Watched(Running);

impl Drop for Watched {
    fn drop(&mut self) {
        if !self.0.exit.is_terminated() {
            self.0.kill();
        }
    }
}

/// One stream of output.
struct Capture {
    pipe: pipe::Receiver,
    bytes: Vec<u8>,
    chunk: Vec<u8>,
    open: bool,
    /// Something was dropped, and so is all that comes after it.
    is_full: bool,
    budget: Arc<Semaphore>,
    /// What is held of it.
    held: Option<OwnedSemaphorePermit>,
}

impl Capture {
    fn new(fd: OwnedFd, budget: Arc<Semaphore>) -> Result<Self, Error> {
        let pipe = pipe::Receiver::from_owned_fd(fd);
        let pipe = pipe.map_err(|error| Error::Internal(format!("reading the output of a process: {error}")))?;
        Ok(Self { pipe, bytes: Vec::new(), chunk: vec![0; CHUNK], open: true, is_full: false, budget, held: None })
    }

    /// Takes some of what is written. Cancel-safe.
    async fn read(&mut self) {
        match self.pipe.read(&mut self.chunk).await {
            Ok(0) | Err(_) => self.open = false,
            Ok(count) => self.keep(count),
        }
    }

    /// Takes what is there, without waiting and whatever tokio knows of it. That is as much as the pipe holds: what comes
    /// meanwhile is of others, who may write without end.
    fn drain(&mut self) {
        let mut left = rustix::pipe::fcntl_getpipe_size(&self.pipe).unwrap_or(0);
        while self.open && left > 0 {
            let room = left.min(CHUNK);
            match rustix::io::read(self.pipe.as_fd(), &mut self.chunk[..room]) {
                Ok(0) => self.open = false,
                Ok(count) => {
                    left -= count;
                    self.keep(count);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    fn keep(&mut self, count: usize) {
        if self.is_full {
            return;
        }
        let wanted = count.min(OUTPUT_MAX - self.bytes.len());
        let own = wanted.min(OUTPUT_OWN.saturating_sub(self.bytes.len()));
        let kept = if self.reserve(wanted - own) { wanted } else { own };
        self.bytes.extend_from_slice(&self.chunk[..kept]);
        self.is_full = kept < count;
    }

    /// Whether the node has room for so many more.
    fn reserve(&mut self, bytes: usize) -> bool {
        let count = u32::try_from(bytes).unwrap_or(u32::MAX);
        let Ok(permit) = self.budget.clone().try_acquire_many_owned(count) else { return false };
        match &mut self.held {
            Some(held) => held.merge(permit),
            None => self.held = Some(permit),
        }
        true
    }

    fn take(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.bytes)
    }
}

/// Joins the streams of a running container.
pub(crate) async fn attach(core: &Core, container_id: &str, streams: Streams) -> Result<Arc<Container>, Error> {
    let (sandbox, container) = running(core, container_id)?;
    let request = Request::Attach(Attach {
        attach: u32::from_le_bytes(sys::random::bytes()),
        id: container.id.clone(),
        stdin: streams.stdin.is_some(),
        stdout: streams.stdout.is_some(),
        stderr: streams.stderr.is_some(),
    });
    let fds = streams.stdin.into_iter().chain(streams.stdout).chain(streams.stderr).collect();
    let asked = match sandbox.keeper() {
        Ok(keeper) => keeper.done(request, fds).await,
        Err(error) => Err(error),
    };
    asked.map_err(|error| failed("attaching to container", &container.id, &error))?;
    Ok(container)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    #[tokio::test]
    async fn others_that_go_on_to_write_are_not_drained() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let size = rustix::pipe::fcntl_getpipe_size(&writer).unwrap();
        writer.write_all(&vec![7; size]).unwrap();
        let writers: Vec<_> = (0..4)
            .map(|_| {
                let mut writer = writer.try_clone().unwrap();
                std::thread::spawn(move || while writer.write_all(&[8; 4096]).is_ok() {})
            })
            .collect();
        let mut capture = Capture::new(reader.into(), Arc::new(Semaphore::new(OUTPUT_MAX))).unwrap();
        capture.drain();
        assert_eq!(capture.take(), vec![7; size]);
        drop(capture); // Nobody reads: the writers end.
        writers.into_iter().for_each(|writer| writer.join().unwrap());
    }

    #[tokio::test]
    async fn all_output_of_a_node_has_one_budget() {
        let budget = Arc::new(Semaphore::new(10));
        let capture = |length: usize| {
            let (reader, mut writer) = std::io::pipe().unwrap();
            writer.write_all(&vec![7; length]).unwrap();
            let mut capture = Capture::new(reader.into(), budget.clone()).unwrap();
            capture.drain();
            capture
        };
        let mut first = capture(OUTPUT_OWN + 8);
        let mut second = capture(OUTPUT_OWN + 8);
        assert_eq!([first.take().len(), second.take().len()], [OUTPUT_OWN + 8, OUTPUT_OWN]);
        second.chunk[0] = 8;
        second.keep(1);
        assert!(second.take().is_empty(), "nothing follows what was dropped");
        drop(first);
        assert_eq!(capture(OUTPUT_OWN + 10).take().len(), OUTPUT_OWN + 10);
        assert_eq!(budget.available_permits(), 10);
    }
}
