//! Resizes: what pods that run want to have from now on, granted one by one so that no two get the same room.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use k8s_openapi::api::core::v1::Pod;
use pod::QosClass;
use pod::resize::{self, Allocation, Pending, Resource};

use super::Manager;
use crate::admission::{self, Rejection};
use crate::context::uid_of;
use crate::worker::Event;

/// What is granted, and who waits.
#[derive(Debug, Default)]
pub(super) struct Grants {
    /// What pods were granted of which their workers may not know yet, by uid.
    given: HashMap<String, Allocation>,
    /// Pods that want what the node has no room for at the moment, in the order in which they came.
    waiting: Vec<String>,
}

impl Grants {
    /// A pod has no worker any more.
    pub(super) fn forget(&mut self, uid: &str) {
        self.given.remove(uid);
        self.waiting.retain(|waiting| waiting != uid);
    }
}

impl Manager {
    /// Whether a pod wants other resources than it was granted.
    pub(super) fn consider(&mut self, pod: &Pod) {
        let uid = uid_of(pod);
        let Some((_, granted)) = self.granted_to(uid) else { return };
        if granted.covers(pod) || pod.metadata.deletion_timestamp.is_some() {
            self.grants.waiting.retain(|waiting| waiting != uid);
            return;
        }
        if !self.grants.waiting.iter().any(|waiting| waiting == uid) {
            self.grants.waiting.push(uid.to_owned());
        }
        self.grant();
    }

    /// Grants what there is room for. Who shrinks makes some, so all are asked again as long as somebody gets what it wants.
    pub(super) fn grant(&mut self) {
        while !self.grants.waiting.is_empty() && self.grant_first() {
            self.share_cpu();
        }
    }

    fn grant_first(&mut self) -> bool {
        let waiting = std::mem::take(&mut self.grants.waiting);
        let known = |uid: &String| Some((self.known(uid)?, self.granted_to(uid)?.0));
        let mut waiting: Vec<(Arc<Pod>, Arc<Pod>)> = waiting.iter().filter_map(known).collect();
        self.grants.waiting = waiting.iter().map(|(wanted, _)| uid_of(wanted).to_owned()).collect();
        // Those of one rank stay in the order in which they came.
        waiting.sort_by_cached_key(|(wanted, granted)| resize::rank(wanted, granted));
        waiting.into_iter().any(|(wanted, _)| self.is_granted(&wanted))
    }

    /// Asks whether there is room for what a pod wants, and tells its worker.
    fn is_granted(&mut self, wanted: &Pod) -> bool {
        let (uid, generation) = (uid_of(wanted).to_owned(), wanted.metadata.generation);
        let answer = self.room_for(wanted);
        // What never fits waits for another wish.
        if !matches!(answer, Err((_, false))) {
            self.grants.waiting.retain(|waiting| *waiting != uid);
        }
        let is_granted = answer.is_ok();
        let change = match answer {
            Ok(()) => {
                let allocation = Allocation::of(wanted);
                self.grants.given.insert(uid.clone(), allocation.clone());
                let summary = resize::summary(wanted, generation, None);
                pod::Change::Allocated { allocation, generation, summary }
            }
            Err((Rejection { message, .. }, infeasible)) => {
                let summary = resize::summary(wanted, generation, Some(&message));
                pod::Change::ResizePending { pending: Pending { infeasible, message, generation }, summary }
            }
        };
        if let Some(worker) = self.lock().get(&uid) {
            let _ = worker.events.send(Event::Change(change)); // It may just be ending.
        }
        is_granted
    }

    /// Whether there is room for what a pod wants; if not, whether there never will be.
    fn room_for(&self, wanted: &Pod) -> Result<(), (Rejection, bool)> {
        let granted = self.granted_to(uid_of(wanted)).map(|(_, granted)| granted);
        let changes = |resource| granted.as_ref().is_some_and(|granted| !granted.covers_of(wanted, resource));
        let changing = [Resource::Cpu, Resource::Memory].into_iter().filter(|resource| changes(*resource));
        let pinned = changing.filter_map(|resource| self.context.parts.resources.pinned(resource)).next();
        if let Some(manager) = pinned.filter(|_| QosClass::of(wanted) == QosClass::Guaranteed) {
            let message = format!("Resize is infeasible for Guaranteed Pods alongside {manager}");
            return Err((Rejection { reason: "Infeasible".to_owned(), message }, true));
        }
        let Some(site) = &self.context.parts.site else { return Ok(()) };
        let others = self.taken(Some(uid_of(wanted)));
        admission::resize(wanted, &site.now(), &others.iter().map(|other| &**other).collect::<Vec<_>>())
    }

    /// The pods that take room on the node, as they were granted; without one of them.
    pub(super) fn taken(&self, without: Option<&str>) -> Vec<Arc<Pod>> {
        let uids: Vec<String> = self.lock().keys().filter(|uid| Some(uid.as_str()) != without).cloned().collect();
        uids.iter().filter_map(|uid| self.granted_to(uid)).map(|(pod, _)| pod).collect()
    }

    /// A pod that takes room on the node as it was granted, and what that is. One that was removed by force takes none, as
    /// its cluster has it: others are sent in its place while it still ends. And one takes none that makes room for another.
    fn granted_to(&self, uid: &str) -> Option<(Arc<Pod>, Allocation)> {
        let workers = self.lock();
        let worker = workers.get(uid).filter(|worker| !worker.is_gone && !self.rooms.is_going(uid))?;
        let shown = worker.shown.lock().unwrap_or_else(PoisonError::into_inner);
        if !shown.is_active() {
            return None;
        }
        let on_record = || shown.view.record.allocated.as_deref().cloned();
        // A worker that does not know yet what runs has its pod as it is wanted.
        let granted =
            self.grants.given.get(uid).cloned().or_else(on_record).unwrap_or_else(|| Allocation::of(&shown.pod));
        Some((granted.given(&shown.pod), granted))
    }
}
