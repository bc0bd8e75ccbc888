//! Namespaces made ahead: a pod that starts takes one that is finished, with link, address and routes.
//!
//! A thread refills them, and removes the links of pods that left. A slot belongs to no sandbox: if the daemon dies, the kernel frees its namespace and with it
//! its link.

use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use crate::bridge::PodLink;
use crate::node::Node;

/// A namespace without a pod.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) namespace: OwnedFd,
    pub(crate) link: PodLink,
}

/// The thread that keeps slots ready and clears away. It ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Filler {
    wake: Option<SyncSender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Filler {
    /// Starts the thread; it makes the first slots when [`Filler::wake`] is called.
    pub(crate) fn start(node: &Arc<Node>) -> std::io::Result<Filler> {
        let (wake, woken) = sync_channel(1);
        let node = Arc::downgrade(node);
        let thread = std::thread::Builder::new().name("network-slots".into()).spawn(move || fill(&node, &woken))?;
        Ok(Filler { wake: Some(wake), thread: Some(thread) })
    }

    /// Asks it to look what there is to do; returns at once.
    pub(crate) fn wake(&self) {
        if let Some(wake) = &self.wake {
            // A full channel: the thread is going to look anyway.
            let _ = wake.try_send(());
        }
    }
}

impl Drop for Filler {
    fn drop(&mut self) {
        drop(self.wake.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that prepares network slots panicked");
        }
    }
}

fn fill(node: &Weak<Node>, woken: &Receiver<()>) {
    while woken.recv().is_ok() {
        let Some(node) = node.upgrade() else { return };
        while node.wants_slot() {
            if let Err(error) = node.add_slot() {
                tracing::warn!(error = &error as &dyn std::error::Error, "cannot prepare a network slot");
                break;
            }
        }
        if let Err(error) = node.clear() {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot remove the link of a sandbox that left");
        }
    }
}
