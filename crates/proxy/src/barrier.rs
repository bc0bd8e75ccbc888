//! The termination barrier: no signal to a pod before new connections have stopped going to it.

use std::net::IpAddr;

use tokio::sync::{mpsc, oneshot};

use crate::sync::Request;

/// A handle that waits for endpoints to leave the kernel's rules. Clones are equal.
#[derive(Debug, Clone)]
pub struct Barrier {
    pub(crate) requests: mpsc::Sender<Request>,
}

impl Barrier {
    /// Returns when the kernel leads no new connection to this ending pod: at once if no Service does, and as soon as the
    /// rules are written that go with the EndpointSlices which say that the pod ends and packets which older rules have sent on
    /// their way have come. Endpoints that name a pod are
    /// found by its uid, others by their addresses. A pod that still serves while nobody else does goes on to get
    /// connections (KEP-1669), and one of a Service that publishes pods which are not ready does, too; neither is waited
    /// for. Returns also when the proxy has stopped: nothing will change then. The caller bounds the wait.
    pub async fn left(&self, pod_uid: &str, addresses: &[IpAddr]) {
        let (done, wait) = oneshot::channel();
        let request = Request::Left { pod_uid: pod_uid.to_owned(), addresses: addresses.to_vec(), done };
        if self.requests.send(request).await.is_ok() {
            // An error says that the proxy has stopped.
            let _ = wait.await;
        }
    }
}
