//! Programs of others that run beside a test: started in the test's network namespace, stopped on drop, and ended by the
//! kernel should the test die first.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::host::Tool;
use crate::pace;

/// What makes a program end with the one who started it.
pub const TOOL: Tool = Tool::new("setpriv", "util-linux");

/// Lines of a log that a failure shows.
const LOG_LINES: usize = 15;

/// A thread that starts programs. They begin in the network namespace in which the nursery was made, whoever asks for them
/// and from where, and they end when this thread does: the kernel ties a program's life to the *thread* that started it
/// (prctl(2), `PR_SET_PDEATHSIG`), and the threads of tests come and go.
#[derive(Debug)]
pub struct Nursery {
    /// Taken on drop: the thread ends when nobody can ask any more.
    jobs: Option<Sender<Job>>,
    thread: Option<JoinHandle<()>>,
}

type Job = (Command, SyncSender<io::Result<Child>>);

impl Nursery {
    /// A nursery in the calling thread's network namespace.
    pub fn new() -> Self {
        let (jobs, asked) = channel::<Job>();
        let thread = std::thread::spawn(move || serve(&asked));
        Self { jobs: Some(jobs), thread: Some(thread) }
    }

    /// Starts `command`, which [`bound`] has made, in the nursery's network namespace.
    pub(crate) fn spawn(&self, command: Command) -> io::Result<Child> {
        let (answer, child) = sync_channel(1);
        let gone = || io::Error::other("the thread that starts programs has ended");
        self.jobs.as_ref().ok_or_else(gone)?.send((command, answer)).map_err(|_| gone())?;
        child.recv().map_err(|_| gone())?
    }
}

impl Default for Nursery {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Nursery {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // it cannot panic
        }
    }
}

fn serve(asked: &Receiver<Job>) {
    while let Ok((mut command, answer)) = asked.recv() {
        let _ = answer.send(command.spawn()); // the one who asked waits for it
    }
}

/// `program` as a command whose process ends with the thread that starts it.
pub(crate) fn bound(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(TOOL.program);
    command.args(["--pdeathsig", "SIGKILL"]).arg(program).stdin(Stdio::null());
    // A group of its own: Ctrl-C is for the one who started it, who decides in which order things end.
    command.process_group(0);
    command
}

/// A program that can be started, stopped and started again.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    program: PathBuf,
    arguments: Vec<String>,
    log: PathBuf,
    nursery: Arc<Nursery>,
    child: Option<Child>,
}

impl Daemon {
    /// A program that does not run yet. Its output goes to `log`, appended at each start.
    pub fn new(nursery: &Arc<Nursery>, program: &Path, arguments: Vec<String>, log: PathBuf) -> Self {
        let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
        Self { name, program: program.to_owned(), arguments, log, nursery: Arc::clone(nursery), child: None }
    }

    /// Starts it; nothing happens when it runs.
    ///
    /// # Errors
    /// The program or `setpriv` is missing, or its log cannot be written.
    pub fn start(&mut self) -> anyhow::Result<()> {
        if self.child.is_some() && self.ended()?.is_none() {
            return Ok(());
        }
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("open {}", self.log.display()))?;
        let mut command = bound(&self.program);
        command.args(&self.arguments).stdout(log.try_clone()?).stderr(log);
        self.child = Some(self.nursery.spawn(command).with_context(|| format!("start {}", self.name))?);
        Ok(())
    }

    /// Waits until `ready` holds.
    ///
    /// # Errors
    /// The program ends before, or `limit` passes; the end of its log is in the message.
    pub fn wait_ready(&mut self, limit: Duration, mut ready: impl FnMut() -> bool) -> anyhow::Result<()> {
        let limit = pace::stretched(limit);
        let deadline = Instant::now() + limit;
        while !ready() {
            self.check()?;
            if Instant::now() > deadline {
                bail!("{} is not ready after {} s\n{}", self.name, limit.as_secs(), self.log_end());
            }
            // A foreign program has no event for being ready; its end is one.
            self.wait_end(pace::stretched(Duration::from_millis(20)))?;
        }
        Ok(())
    }

    /// Whether it still runs, if it was started.
    ///
    /// # Errors
    /// It has ended by itself; the end of its log is in the message.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.ended()? {
            Some(status) => bail!("{} has ended: {status}\n{}", self.name, self.log_end()),
            None => Ok(()),
        }
    }

    /// Its process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// How it ended, if it has ended by itself.
    fn ended(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.as_mut().map_or(Ok(None), Child::try_wait)
    }

    /// Asks it to end (SIGTERM) and waits; after `limit` it is killed. Nothing happens when it does not run.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn stop(&mut self, limit: Duration) -> anyhow::Result<()> {
        self.signal(Signal::TERM)?;
        self.wait_end(pace::stretched(limit))?;
        self.kill()
    }

    /// Kills it (SIGKILL) and waits for its end. Nothing happens when it does not run.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().with_context(|| format!("kill {}", self.name))?;
            child.wait().with_context(|| format!("wait for {}", self.name))?;
        }
        Ok(())
    }

    /// Stops it where it is (SIGSTOP): it holds its connections and answers nothing.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn pause(&self) -> anyhow::Result<()> {
        self.signal(Signal::STOP)
    }

    /// Lets it go on after [`Daemon::pause`].
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn resume(&self) -> anyhow::Result<()> {
        self.signal(Signal::CONT)
    }

    fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        let Some(child) = &self.child else { return Ok(()) };
        // The child has not been waited for while it is here, so its number is its own.
        kill_process(Pid::from_child(child), signal).with_context(|| format!("send {signal:?} to {}", self.name))
    }

    /// Waits at most `limit` for its end, and leaves it to be reaped.
    fn wait_end(&self, limit: Duration) -> anyhow::Result<()> {
        let Some(child) = &self.child else { return Ok(()) };
        let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
        let limit = Timespec::try_from(limit)?;
        poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&limit))?;
        Ok(())
    }

    /// The last lines of its log, for a failure.
    pub fn log_end(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
        format!("{} ends with:\n{end}", self.log.display())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.kill(); // fails only when it has ended already
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn daemon(dir: &Path, script: &str) -> Daemon {
        let arguments = vec!["-c".to_owned(), script.to_owned()];
        Daemon::new(&Arc::new(Nursery::new()), Path::new("/bin/sh"), arguments, dir.join("log"))
    }

    #[test]
    fn a_daemon_starts_stops_and_starts_again() {
        let dir = tempfile::tempdir().unwrap();
        let mut daemon = daemon(dir.path(), "echo begun; exec sleep 1000");
        let limit = Duration::from_secs(10);
        for runs in 1..=2 {
            daemon.start().unwrap();
            let log = || std::fs::read_to_string(dir.path().join("log")).unwrap_or_default();
            daemon.wait_ready(limit, || log().matches("begun").count() == runs).unwrap();
            let begun = Instant::now();
            daemon.stop(limit).unwrap();
            assert!(daemon.pid().is_none() && begun.elapsed() < limit);
        }
    }

    #[test]
    fn one_that_ends_at_once_is_told_with_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let mut daemon = daemon(dir.path(), "echo no such flag; exit 3");
        daemon.start().unwrap();
        let error = daemon.wait_ready(Duration::from_secs(10), || false).unwrap_err().to_string();
        assert!(error.contains("exit status: 3") && error.ends_with("no such flag"), "{error}");
    }

    #[test]
    fn one_outlives_the_thread_that_asked_for_it_and_ends_with_its_nursery() {
        let dir = tempfile::tempdir().unwrap();
        let nursery = Arc::new(Nursery::new());
        let asked = Arc::clone(&nursery);
        let log = dir.path().join("log");
        let mut daemon = std::thread::spawn(move || {
            let mut daemon = Daemon::new(&asked, Path::new("/bin/sleep"), vec!["1000".to_owned()], log);
            daemon.start().unwrap();
            daemon
        })
        .join()
        .unwrap();
        daemon.wait_end(Duration::from_millis(100)).unwrap();
        assert_eq!(daemon.ended().unwrap(), None);
        daemon.nursery = Arc::new(Nursery::new());
        drop(nursery);
        daemon.wait_end(Duration::from_secs(10)).unwrap();
        assert_eq!(daemon.ended().unwrap().map(|status| status.success()), Some(false));
    }
}
