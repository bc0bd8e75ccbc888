//! What a daemon's process has: threads, and the signals by which it is asked to end.

use anyhow::Context as _;
use sys::rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::runtime::Runtime;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Threads that run tasks. What may block has threads of its own, made as they are needed.
const WORKERS: usize = 2;
/// Heaps of all threads together: enough that those which run tasks seldom wait for each other.
const HEAPS: i32 = 2;
/// A list of the API server, a file, a body: what is this large lives briefly, and would leave a hole in a heap.
const MAPPED_BYTES: i32 = 32 << 10;
/// A task's frames are small; the default of 2 MiB would count against the node's memory for each blocked path. Frames that
/// are not optimised are several times as large.
const STACK_BYTES: usize = if cfg!(debug_assertions) { 2 << 20 } else { 512 << 10 };

/// Goes on, with the first call, as a copy of this program that no pod can write.
pub(crate) fn seal() -> anyhow::Result<()> {
    sys::program::seal().context("keep the program from being written by pods; run as root on Linux 5.12 or later")
}

/// The daemon's threads.
pub(crate) fn threads() -> anyhow::Result<Runtime> {
    sys::fork::share_heaps(HEAPS);
    sys::fork::map_blocks_from(MAPPED_BYTES);
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .thread_stack_size(STACK_BYTES)
        .enable_all()
        .build()
        .context("start the node's threads")
}

/// Upstream's `maxOpenFiles`, for daemons that have no such field.
pub(crate) const OPEN_FILES: u64 = 1_000_000;

/// Lets this process have so many descriptors, as far as it may: every pod costs some, and systemd gives services 1,024. Pods
/// keep the limit that the daemon was started with: what they come from has been forked before.
pub(crate) fn open_files(most: u64) {
    let limits = wanted_limits(getrlimit(Resource::Nofile), most);
    let set = limits.into_iter().find(|limit| setrlimit(Resource::Nofile, *limit).is_ok());
    let allowed = set.and_then(|limit| limit.current);
    if allowed != Some(most) {
        tracing::info!(allowed, wanted = most, "the limit of open files is lower than it should be");
    }
}

/// The limits to try: the hard one is raised where it has to be and may be, the soft one within it else.
fn wanted_limits(now: Rlimit, most: u64) -> [Rlimit; 2] {
    let raised = Rlimit { current: Some(most), maximum: now.maximum.map(|hard| hard.max(most)) };
    let within = Rlimit { current: now.maximum.map(|hard| hard.min(most)).or(Some(most)), maximum: now.maximum };
    [raised, within]
}

/// SIGINT and SIGTERM.
pub(crate) struct Signals {
    interrupt: Signal,
    terminate: Signal,
}

impl Signals {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
    }

    /// Waits for the next one.
    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hard_limit_is_raised_only_where_it_has_to_be() {
        let limit = |current, maximum| Rlimit { current: Some(current), maximum };
        let systemd = limit(1024, Some(524_288));
        assert_eq!(wanted_limits(systemd, 1000), [limit(1000, Some(524_288)); 2]);
        assert_eq!(
            wanted_limits(systemd, 1_000_000),
            [limit(1_000_000, Some(1_000_000)), limit(524_288, Some(524_288))]
        );
        assert_eq!(wanted_limits(limit(1024, None), 1_000_000), [limit(1_000_000, None); 2]);
    }
}
