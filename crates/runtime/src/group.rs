//! Ending everything in a control group.

use std::os::fd::OwnedFd;
use std::time::Duration;

use sys::cgroup::Cgroup;
use sys::rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

/// How long processes have to end after SIGKILL: they may write a core, or wait for a disk.
const END_MAX: Duration = Duration::from_secs(30);
/// Between the end of a group's last process, as a pidfd tells it, and the kernel's leave to remove the group lies a
/// moment that nothing tells of (`cgroup_exit` in kernel/cgroup/cgroup.c).
const LAG: Duration = Duration::from_millis(1);

/// Kills everything in the group and below, waits for its end and removes the group. One that is gone is no error.
///
/// # Errors
/// A process does not end: it waits for a device or a file system that does not answer.
pub(crate) async fn end(group: &Cgroup) -> Result<(), sys::Error> {
    empty(group, || match group.delete() {
        Err(error) if error.errno == Errno::BUSY => Ok(false),
        other => other.map(|()| true),
    })
    .await
}

/// Kills everything in the group and below and waits for its end.
///
/// # Errors
/// As [`end`].
pub(crate) async fn kill(group: &Cgroup) -> Result<(), sys::Error> {
    empty(group, || Ok(!group.is_populated())).await
}

async fn empty(group: &Cgroup, is_done: impl Fn() -> Result<bool, sys::Error>) -> Result<(), sys::Error> {
    let deadline = Instant::now() + END_MAX;
    while !is_done()? {
        group.kill()?;
        let waiting: Vec<OwnedFd> =
            group.processes_below().into_iter().filter_map(|pid| sys::process::pidfd_open(pid).ok()).collect();
        if waiting.is_empty() {
            tokio::time::sleep(LAG).await;
        }
        if timeout_at(deadline, ended(waiting)).await.is_err() || Instant::now() >= deadline {
            return Err(stuck(group));
        }
    }
    Ok(())
}

async fn ended(processes: Vec<OwnedFd>) {
    for pidfd in processes {
        // A descriptor that cannot be watched is of a process that has ended.
        #[expect(deprecated, reason = "the other constructor is unsafe; this value owns its descriptor to its end")]
        let Ok(pidfd) = AsyncFd::with_interest(pidfd, Interest::READABLE) else { continue };
        let _ = pidfd.readable().await;
    }
}

fn stuck(group: &Cgroup) -> sys::Error {
    let who: Vec<String> = group.processes_below().into_iter().map(|pid| pid.as_raw_nonzero().to_string()).collect();
    let subject = format!(
        "{} (processes {} do not end; they wait for a device or file system that does not answer)",
        group.path().display(),
        who.join(", ")
    );
    sys::Error { call: "kill", subject, errno: Errno::BUSY }
}
