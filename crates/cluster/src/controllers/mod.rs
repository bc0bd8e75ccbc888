//! What a control plane does for the alone mode: pure functions that compare what is desired with what is there and
//! return a [`Plan`]. They read no clock and no table; [`crate::manifests`] calls them and carries out their plans.

pub(crate) mod common;
pub(crate) mod daemon_set;
pub(crate) mod deployment;
pub(crate) mod endpoints;
pub(crate) mod job;
pub(crate) mod replica_set;
pub(crate) mod selector;
pub(crate) mod service;

use k8s_openapi::api::core::v1::Event;
use k8s_openapi::jiff::Timestamp;

use crate::Key;
use crate::manifests::AnyObject;

/// What a controller wants done.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Plan {
    pub(crate) changes: Vec<Change>,
    /// When to ask again even if nothing changes.
    pub(crate) due: Option<Timestamp>,
}

/// One change of the store.
#[derive(Debug, PartialEq)]
pub(crate) enum Change {
    /// A new object; uid, age and, from `generateName`, the name are filled in.
    Create(AnyObject),
    /// A new version of an object that is there; ignored if it has gone.
    Replace(AnyObject),
    /// Removes an object; a pod is asked to end instead.
    Remove(&'static str, Key),
    /// Asks a pod to end, with its own grace period or this one.
    EndPod { key: Key, grace_s: Option<i64> },
    /// Tells the operator.
    Event(Box<Event>),
}

impl Plan {
    pub(crate) fn push(&mut self, change: Change) {
        self.changes.push(change);
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.push(Change::Event(Box::new(event)));
    }

    /// Asks for another look at `time`, unless an earlier one is due.
    pub(crate) fn wake_at(&mut self, time: Timestamp) {
        self.due = Some(self.due.map_or(time, |due| due.min(time)));
    }

    pub(crate) fn merge(&mut self, other: Plan) {
        self.changes.extend(other.changes);
        if let Some(due) = other.due {
            self.wake_at(due);
        }
    }
}
