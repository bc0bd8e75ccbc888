//! Namespaces made ahead: a pod that starts takes one that is finished, with link, address and routes.
//!
//! One thread refills them, another removes the links of pods that left. A slot belongs to no sandbox: if the daemon dies,
//! the kernel frees its namespace and with it its link.

use std::os::fd::OwnedFd;

use crate::bridge::PodLink;
use crate::node::Node;

/// A namespace without a pod.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) namespace: OwnedFd,
    pub(crate) link: PodLink,
}

/// Makes slots until there are as many as wanted.
pub(crate) fn fill(node: &Node) {
    while node.wants_slot() {
        if let Err(error) = node.add_slot() {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot prepare a network slot");
            return;
        }
    }
}

/// Removes the links of sandboxes that were detached. Apart from [`fill`], for the kernel takes longer to remove a link than
/// to make one.
pub(crate) fn clear(node: &Node) {
    if let Err(error) = node.clear() {
        tracing::warn!(error = &error as &dyn std::error::Error, "cannot remove the link of a sandbox that left");
    }
}
