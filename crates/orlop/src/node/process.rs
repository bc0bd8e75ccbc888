//! What a daemon's process has: threads, and the signals by which it is asked to end.

use anyhow::Context as _;
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
