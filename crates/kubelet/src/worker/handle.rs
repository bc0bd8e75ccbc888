//! A worker, seen from outside: how it begins, what it hears, what it shows, how it tells that it ends.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use cluster::Key;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use pod::{Action, Change, View};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;
use tokio_util::task::AbortOnDropHandle;

use crate::admission::Rejection;
use crate::adopt::Found;
use crate::timeline::Timeline;

/// What a worker hears.
#[derive(Debug)]
pub(crate) enum Event {
    /// Another version of the pod.
    Pod(Arc<Pod>),
    /// The source does not have the pod any more; the last version that it had, if that is known.
    Gone { last: Option<Arc<Pod>> },
    /// The runtime told of one of the pod's containers or its sandbox.
    Runtime(Box<cri::v1::ContainerEventResponse>),
    /// Something happened.
    Change(Change),
    /// An action is over.
    Ended(Action),
    /// What others say in the pod's status is not as it was.
    Look,
}

/// What others may look at.
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) pod: Arc<Pod>,
    pub(crate) view: Arc<View>,
    pub(crate) timeline: Timeline,
    pub(crate) status: Option<Arc<PodStatus>>,
}

impl Shown {
    /// Whether the pod takes room on the node: it has not ended, and will not just now.
    pub(crate) fn is_active(&self) -> bool {
        let phase = self.status.as_ref().and_then(|status| status.phase.as_deref());
        self.view.record.failed.is_none() && !matches!(phase, Some("Succeeded" | "Failed"))
    }

    /// Whether the pod needs what it was given: one that fails does until its last container has ended.
    pub(crate) fn is_holding(&self) -> bool {
        self.is_active() || self.view.containers.values().any(|container| container.running.is_some())
    }
}

/// A worker, seen from outside. It ends with this value.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) key: Key,
    /// It was told that its pod is gone.
    pub(crate) is_gone: bool,
    pub(crate) events: UnboundedSender<Event>,
    pub(crate) shown: Arc<Mutex<Shown>>,
    pub(crate) task: AbortOnDropHandle<()>,
}

/// With what a worker begins.
pub(crate) enum Begin {
    /// With what is known to run of its pod.
    With(Found),
    /// With nothing: the node does not take the pod.
    Rejected(Rejection),
    /// With nothing, as soon as there is room, where others make it, and the pod has got what is given out whole.
    Giving { room: Option<oneshot::Receiver<()>> },
    /// With what the runtime says after a while: another worker has gone before.
    Asking { after: Duration },
}

/// Tells that a worker ends, when it is dropped: also by a panic.
pub(super) struct Announcement {
    pub(super) uid: String,
    pub(super) ending: UnboundedSender<String>,
}

impl Drop for Announcement {
    fn drop(&mut self) {
        let _ = self.ending.send(std::mem::take(&mut self.uid)); // Nobody hears it when the kubelet stops.
    }
}

/// Workers by the uid of their pods.
pub(crate) type Workers = HashMap<String, Handle>;
