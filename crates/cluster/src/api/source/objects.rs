//! Objects that are followed one by one, each while a pod of this node refers to it.
//!
//! A node may read a Secret or ConfigMap only by name, and only while a pod that is bound to it refers to it; it may watch
//! these. Claims and volumes it may only get.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolume, PersistentVolumeClaim, Pod, Secret};
use tokio::sync::watch;

use super::references::{self, Reference, Referred};
use super::start::Cut;
use super::trim;
use crate::api::client::Api;
use crate::api::error::ApiError;
use crate::api::follow::{Following, Progress, Selection, follow_from, poll};
use crate::{Key, Store};

/// A claim is looked at this often until it is bound: its pods wait for that.
const UNBOUND_EVERY: Duration = Duration::from_secs(1);
/// What changes of a bound claim is its size.
const BOUND_EVERY: Duration = Duration::from_secs(60);

/// What is followed, and for whom.
pub(super) struct Objects {
    api: Api,
    store: Store,
    /// Never held over `.await`.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// By pod: its uid, and what it refers to.
    pods: HashMap<Key, (String, BTreeSet<Reference>)>,
    followed: HashMap<Reference, Followed>,
    /// Those that the tables have from what was kept, or that were not there then.
    believed: HashSet<Reference>,
    believes_services: bool,
}

struct Followed {
    /// How many pods refer to it.
    pods: usize,
    following: Following,
}

impl Objects {
    pub(super) fn new(api: Api, store: Store) -> Self {
        Self { api, store, state: Mutex::default() }
    }

    /// Follows what this pod refers to by now, and no longer what only it referred to before. Returns what there is to wait
    /// for; none if the pod has left its table. There is nothing to wait for where the server's word would only confirm what
    /// was kept.
    pub(super) fn set(&self, pod: &Pod) -> Option<Vec<(Reference, watch::Receiver<Progress>)>> {
        let key = Key::of(&pod.metadata);
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let mut state = self.lock();
        // Whoever removes a pod from its table calls forget after that. The table's version is the newest.
        let there = self.store.pods().get(&key).filter(|there| there.metadata.uid == pod.metadata.uid)?;
        let wanted = references::of(&there, &self.store);
        let before = state.pods.insert(key, (uid, wanted.clone())).map(|(_, before)| before).unwrap_or_default();
        for reference in wanted.difference(&before) {
            let followed = state.followed.entry(reference.clone());
            followed.or_insert_with(|| Followed { pods: 0, following: self.follow(reference) }).pods += 1;
        }
        before.difference(&wanted).for_each(|reference| self.release(&mut state, reference));
        let doubtful = wanted.into_iter().filter(|reference| !state.believed.contains(reference));
        let progress = doubtful.filter_map(|reference| {
            let progress = state.followed.get(&reference)?.following.progress();
            Some((reference, progress))
        });
        Some(progress.collect())
    }

    /// A pod of this name is gone.
    pub(super) fn forget(&self, pod: &Key) {
        let mut state = self.lock();
        // Another one may have taken its name.
        let there = self.store.pods().get(pod).and_then(|pod| pod.metadata.uid.clone());
        if there.is_some_and(|uid| state.pods.get(pod).is_some_and(|(known, _)| *known == uid)) {
            return;
        }
        let Some((_, references)) = state.pods.remove(pod) else { return };
        references.iter().for_each(|reference| self.release(&mut state, reference));
    }

    /// From now on these count as known: what the tables have of them was kept.
    pub(super) fn believe(&self, references: BTreeSet<Reference>) {
        self.lock().believed.extend(references);
    }

    /// From now on the Services that the table has are those of pods that were kept.
    pub(super) fn believe_services(&self) {
        self.lock().believes_services = true;
    }

    /// Whether pods can go by the Services that the table has, though the server may know more.
    pub(super) fn believes_services(&self) -> bool {
        self.lock().believes_services
    }

    /// Whether the tables tell of everything that this pod refers to whether it is there.
    pub(super) fn are_known(&self, pod: &Key) -> bool {
        let state = self.lock();
        let is_known = |reference: &Reference| {
            state.believed.contains(reference)
                || state.followed.get(reference).is_some_and(|one| one.following.progress().borrow().is_known)
        };
        state.pods.get(pod).is_some_and(|(_, references)| references.iter().all(is_known))
    }

    /// The pods that refer to this object.
    pub(super) fn pods_of(&self, reference: &Reference) -> Vec<Key> {
        let state = self.lock();
        let pods = state.pods.iter().filter(|(_, (_, references))| references.contains(reference));
        pods.map(|(key, _)| key.clone()).collect()
    }

    fn release(&self, state: &mut State, reference: &Reference) {
        let Some(followed) = state.followed.get_mut(reference) else { return };
        followed.pods -= 1;
        if followed.pods > 0 {
            return;
        }
        state.followed.remove(reference);
        state.believed.remove(reference);
        let (kind, key) = reference;
        // With the lock held: whoever follows it anew comes after this.
        match kind {
            Referred::ConfigMap => drop(self.store.config_maps().remove(key)),
            Referred::Secret => drop(self.store.secrets().remove(key)),
            Referred::Claim => drop(self.store.persistent_volume_claims().remove(key)),
            Referred::Volume => drop(self.store.persistent_volumes().remove(key)),
        }
    }

    fn follow(&self, (kind, key): &Reference) -> Following {
        let selection = Selection::named(key);
        match kind {
            Referred::ConfigMap => {
                let cut = |map: &mut ConfigMap| trim::annotations(&mut map.metadata);
                let sink = Cut { table: self.store.config_maps().clone(), cut };
                follow_from(&self.api, selection, sink, [key.clone()])
            }
            Referred::Secret => {
                let cut = |secret: &mut Secret| trim::annotations(&mut secret.metadata);
                let sink = Cut { table: self.store.secrets().clone(), cut };
                follow_from(&self.api, selection, sink, [key.clone()])
            }
            Referred::Claim => {
                let table = self.store.persistent_volume_claims().clone();
                poll::<PersistentVolumeClaim>(&self.api, key, table, |claim| match claim {
                    Some(claim) if is_bound(claim) => BOUND_EVERY,
                    _ => UNBOUND_EVERY,
                })
            }
            Referred::Volume => {
                let table = self.store.persistent_volumes().clone();
                poll::<PersistentVolume>(&self.api, key, table, |volume| match volume {
                    Some(_) => BOUND_EVERY,
                    None => UNBOUND_EVERY,
                })
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_bound(claim: &PersistentVolumeClaim) -> bool {
    let phase = claim.status.as_ref().and_then(|status| status.phase.as_deref());
    phase == Some("Bound") && claim.spec.as_ref().is_some_and(|spec| spec.volume_name.is_some())
}

/// Waits until all of these are known, but not for ever.
pub(super) async fn wait(
    progress: Vec<(Reference, watch::Receiver<Progress>)>,
    limit: Duration,
) -> Result<(), (Reference, Option<ApiError>)> {
    let deadline = tokio::time::Instant::now() + limit;
    for (reference, mut progress) in progress {
        let known = progress.wait_for(|progress| progress.is_known);
        // It closes when the object is followed no more: then nobody needs the answer.
        let in_time = tokio::time::timeout_at(deadline, known).await.is_ok();
        if !in_time {
            let failure = progress.borrow().failure.clone();
            return Err((reference, failure));
        }
    }
    Ok(())
}
