//! A network namespace with a thread of its own that lives in it: sockets which the thread's tasks open are in there, and
//! programs which it starts, too.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;

use anyhow::{Context as _, bail};
use rustix::process::Pid;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::oneshot;

use crate::daemon::Nursery;
use crate::netns;

/// A namespace and whoever is at work in it. It vanishes on drop, with all its links.
#[derive(Debug)]
pub struct Place {
    /// The thread's number, by which the kernel finds the namespace.
    thread_id: Pid,
    tasks: Handle,
    /// Dropped first: the thread ends when nobody holds it.
    end: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// What a task will return.
#[derive(Debug)]
pub struct Pending<T>(Receiver<T>);

impl<T> Pending<T> {
    /// Waits for it.
    ///
    /// # Errors
    /// The task panicked.
    pub fn wait(self) -> anyhow::Result<T> {
        self.0.recv().context("a task of a network namespace panicked; the reason stands above")
    }
}

impl Place {
    /// A fresh namespace with loopback up.
    ///
    /// # Errors
    /// Needs CAP_SYS_ADMIN.
    pub fn new() -> anyhow::Result<Self> {
        let (told, made) = sync_channel(1);
        let (end, ended) = oneshot::channel();
        let thread = std::thread::spawn(move || live(&told, ended));
        let (thread_id, tasks) = made.recv().context("the thread of a network namespace panicked")??;
        Ok(Self { thread_id, tasks, end: Some(end), thread: Some(thread) })
    }

    /// Starts `work` in here and does not wait for it.
    pub fn start<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Pending<T> {
        let (done, result) = sync_channel(1);
        self.tasks.spawn(async move {
            let _ = done.send(work.await); // who gave up waiting needs no result
        });
        Pending(result)
    }

    /// Does `work` in here.
    ///
    /// # Errors
    /// It panicked.
    pub fn run<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> anyhow::Result<T> {
        self.start(work).wait()
    }

    /// The number that `ip` knows this namespace by (`netns NUMBER`).
    pub fn number(&self) -> i32 {
        self.thread_id.as_raw_nonzero().get()
    }

    /// Sets up links, addresses and routes: one line for each call of `ip`, without its name.
    ///
    /// # Errors
    /// A line is refused.
    pub fn ip(&self, lines: String) -> anyhow::Result<()> {
        self.run(async move { ip(&lines) })?
    }

    /// Writes a setting of `/proc/sys/net`.
    ///
    /// # Errors
    /// The kernel does not know it.
    pub fn set(&self, name: &'static str, value: &'static str) -> anyhow::Result<()> {
        let write = move || std::fs::write(format!("/proc/sys/net/{name}"), value);
        self.run(async move { write() })?.with_context(|| format!("set net/{name}"))
    }

    /// Who starts programs in here.
    ///
    /// # Errors
    /// None that are known.
    pub fn nursery(&self) -> anyhow::Result<Arc<Nursery>> {
        self.run(async { Arc::new(Nursery::new()) })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join(); // tasks that panic do not reach the thread
        }
    }
}

fn live(told: &SyncSender<anyhow::Result<(Pid, Handle)>>, ended: oneshot::Receiver<()>) {
    let enter = || -> anyhow::Result<Runtime> {
        // Before: the first runtime of a process opens sockets that stay, and a namespace lives as long as its sockets.
        let runtime = Builder::new_current_thread().enable_all().build()?;
        netns::enter_private()?;
        Ok(runtime)
    };
    let made = enter();
    let describe = |runtime: &Runtime| (rustix::thread::gettid(), runtime.handle().clone());
    match made {
        Err(error) => {
            let _ = told.send(Err(error)); // the caller waits for it
        }
        Ok(runtime) => {
            let _ = told.send(Ok(describe(&runtime)));
            let _ = runtime.block_on(ended); // the sender only ever goes
        }
    }
}

/// Runs `ip` over `lines` in the calling thread's namespace.
pub(super) fn ip(lines: &str) -> anyhow::Result<()> {
    let mut child = Command::new("ip").args(["-batch", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    child.stdin.take().context("stdin is piped")?.write_all(lines.as_bytes())?;
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("ip: {}\n{lines}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
