//! Threads that work for the network when they are woken: what they do takes the kernel long, and nobody waits for it.

use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use crate::node::Node;

/// A thread with one kind of work. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Errand {
    name: &'static str,
    wake: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Errand {
    /// Starts the thread; it does `work` whenever [`Errand::wake`] is called.
    pub(crate) fn start(node: &Arc<Node>, name: &'static str, work: fn(&Node)) -> std::io::Result<Self> {
        let (wake, woken) = sync_channel(1);
        let node: Weak<Node> = Arc::downgrade(node);
        let life = move || {
            while woken.recv().is_ok() {
                let Some(node) = node.upgrade() else { return };
                work(&node);
            }
        };
        let thread = std::thread::Builder::new().name(name.into()).spawn(life)?;
        Ok(Self { name, wake: Some(wake), thread: Some(thread) })
    }

    /// Asks it to look what there is to do; returns at once.
    pub(crate) fn wake(&self) {
        if let Some(wake) = &self.wake {
            // A full channel: the thread is going to look anyway.
            let _ = wake.try_send(());
        }
    }
}

impl Drop for Errand {
    fn drop(&mut self) {
        drop(self.wake.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!(thread = self.name, "a thread of the network panicked");
        }
    }
}
