//! Static pods and their mirrors: what runs by a file of the node, and the object by which an API server shows it.
//!
//! ```text
//!   files ─► StaticPods ─► table of pods ─► kubelet
//!                              │ decide          status
//!   API server ─► mirrors ◄────┴──────────────────┘
//! ```
//!
//! The kubelet runs the static pod and never its mirror, which is made for it, made again when somebody deletes it, and
//! deleted when the pod is gone. Nothing here is on the way of a pod's start.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, PodStatus};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;

use super::status::Statuses;
use crate::api::client::Api;
use crate::api::error::ApiError;
use crate::api::follow::{Backoff, Progress, random};
use crate::api::verbs::Deletion;
use crate::manifests::{StaticPod, StaticPods, is_static};
use crate::{Key, Store, Table};

/// On a mirror: the uid of its static pod.
const MIRROR: &str = "kubernetes.io/config.mirror";
/// Where a pod comes from.
const SOURCE: &str = "kubernetes.io/config.source";

/// The static pod that a pod of the API server mirrors.
pub(super) fn mirrored(pod: &Pod) -> Option<&str> {
    pod.metadata.annotations.as_ref()?.get(MIRROR).map(String::as_str)
}

/// A pod of the API server is none of a file, whatever it says of itself.
pub(super) fn disown(pod: &mut Pod) {
    if is_static(pod) {
        pod.metadata.annotations.get_or_insert_default().insert(SOURCE.to_owned(), "api".to_owned());
    }
}

/// Puts what is declared into the table of pods, and asks what no longer is to end: a pod has to be gone before another one
/// takes its name. `complete` is told when all of them have been read.
pub(super) async fn keep_pods(mut files: StaticPods, pods: Table<Pod>, complete: watch::Sender<bool>) {
    let mut changes = pods.watch();
    let mut told = HashSet::new();
    loop {
        settle(files.declared(), &pods, &mut told);
        complete.send_if_modified(|before| std::mem::replace(before, files.is_complete()) != files.is_complete());
        // The watch is of all pods of the node.
        let concerns_us = |change: &crate::Change<Pod>| change.object.as_deref().is_none_or(is_static);
        tokio::select! {
            () = files.changed() => {}
            () = async { while !concerns_us(&changes.next().await) {} } => {}
        }
    }
}

pub(super) fn settle(declared: &BTreeMap<Key, StaticPod>, pods: &Table<Pod>, told: &mut HashSet<Key>) {
    for pod in pods.list().iter().filter(|pod| is_static(pod) && pod.metadata.deletion_timestamp.is_none()) {
        let key = Key::of(&pod.metadata);
        if declared.get(&key).is_none_or(|declared| declared.pod.metadata.uid != pod.metadata.uid) {
            pods.update(&key, |pod| ask_to_end(pod, None));
        }
    }
    for (key, StaticPod { pod, file }) in declared {
        match pods.get(key) {
            None => drop(pods.put(pod.clone())),
            Some(other) if !is_static(&other) && told.insert(key.clone()) => {
                tracing::error!(pod = %key, file = %file.display(), "a static pod waits for a pod of the cluster with its name");
            }
            Some(_) => {}
        }
    }
}

/// Asks a pod to end within `grace_s` seconds, or its own time; never later than it was asked to before.
pub(super) fn ask_to_end(pod: &mut Pod, grace_s: Option<i64>) {
    let own = pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds).unwrap_or(30);
    let grace_s = grace_s.unwrap_or(own).max(0);
    let now = Timestamp::now();
    let end = now.saturating_add(SignedDuration::from_secs(grace_s)).unwrap_or(now);
    if pod.metadata.deletion_timestamp.as_ref().is_none_or(|known| end < known.0) {
        pod.metadata.deletion_timestamp = Some(Time(end));
        pod.metadata.deletion_grace_period_seconds = Some(grace_s);
    }
}

/// What a mirror needs.
#[derive(Debug, Clone, PartialEq)]
enum Step {
    /// There is none.
    Create(Box<Pod>),
    /// It is of another pod, or is being deleted.
    Delete(Key, String),
    /// It is right, and its pod has a status.
    Tell(Arc<Pod>, Box<PodStatus>),
}

/// From the static pods and the mirrors that there are to what is to be done. Without a Node there can be no mirrors; one of
/// no pod goes when the pods are all that there are.
fn decide((pods, are_all): (&[Arc<Pod>], bool), mirrors: &[Arc<Pod>], node: Option<&Node>) -> Vec<Step> {
    let mut mirrors: BTreeMap<Key, &Arc<Pod>> =
        mirrors.iter().map(|mirror| (Key::of(&mirror.metadata), mirror)).collect();
    let mut steps = Vec::new();
    for pod in pods.iter().filter(|pod| is_static(pod)) {
        let ends = pod.metadata.deletion_timestamp.is_some();
        match mirrors.remove(&Key::of(&pod.metadata)) {
            None if ends => {}
            None => steps.extend(node.and_then(|node| mirror_of(pod, node)).map(Box::new).map(Step::Create)),
            // It shows the end of its pod, and goes after it.
            Some(mirror) if is_of(mirror, pod) => {
                let status = pod.status.clone().map(Box::new);
                steps.extend(status.map(|status| Step::Tell(mirror.clone(), status)));
            }
            Some(mirror) => steps.push(delete(mirror)),
        }
    }
    steps.extend(mirrors.into_values().filter(|_| are_all).map(|mirror| delete(mirror)));
    steps
}

fn is_of(mirror: &Pod, pod: &Pod) -> bool {
    mirror.metadata.deletion_timestamp.is_none() && mirrored(mirror) == pod.metadata.uid.as_deref()
}

fn delete(mirror: &Pod) -> Step {
    Step::Delete(Key::of(&mirror.metadata), mirror.metadata.uid.clone().unwrap_or_default())
}

/// The mirror of a pod: it belongs to the Node, with which it goes (NodeRestriction wants to see that).
fn mirror_of(pod: &Pod, node: &Node) -> Option<Pod> {
    let owner = OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: node.metadata.name.clone()?,
        uid: node.metadata.uid.clone()?,
        controller: Some(true),
        block_owner_deletion: None,
    };
    let mut mirror = pod.clone();
    let uid = mirror.metadata.uid.take()?;
    mirror.metadata.resource_version = None;
    mirror.metadata.annotations.get_or_insert_default().insert(MIRROR.to_owned(), uid);
    mirror.metadata.owner_references = Some(vec![owner]);
    mirror.status = None;
    Some(mirror)
}

/// Keeps the mirrors.
pub(super) struct Mirrors {
    pub(super) api: Api,
    pub(super) store: Store,
    /// The Node.
    pub(super) node: Key,
    /// What the API server has.
    pub(super) mirrors: Table<Pod>,
    /// Of the mirrors.
    pub(super) statuses: Statuses,
    /// Whether all static pods have been read.
    pub(super) complete: watch::Receiver<bool>,
}

impl Mirrors {
    /// Works from when the server has named its pods.
    pub(super) async fn run(mut self, mut known: watch::Receiver<Progress>) {
        if known.wait_for(|progress| progress.is_known).await.is_err() {
            return; // The source ends.
        }
        let (mut pods, mut mirrors) = (self.store.pods().watch(), self.mirrors.watch());
        let (mut nodes, mut returns) = (self.store.nodes().watch(), self.api.returns());
        let (mut told, mut backoff, mut said) = (HashMap::new(), Backoff::new(), String::new());
        loop {
            returns.mark_unchanged();
            let wait = match self.reconcile(&mut told).await {
                Ok(()) => {
                    backoff.reset();
                    said.clear();
                    None
                }
                Err(error) => {
                    let text = error.to_string();
                    if text != said {
                        tracing::warn!(%error, "the mirror of a static pod is not as it should be; trying again");
                    }
                    said = text;
                    Some(backoff.wait(random()))
                }
            };
            let rest = async {
                match wait {
                    Some(wait) => tokio::time::sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // Who reads them may have ended.
                Ok(()) = self.complete.changed() => {}
                () = pods.changed(), if wait.is_none() => {}
                () = mirrors.changed() => {}
                () = nodes.changed(), if wait.is_none() => {}
                () = rest => {}
                // The sender lives in the client.
                _ = returns.changed(), if wait.is_some() => {}
            }
        }
    }

    /// Does all steps; the last failure.
    async fn reconcile(&mut self, told: &mut HashMap<String, PodStatus>) -> Result<(), ApiError> {
        // Before the pods are looked at: what is said of them then holds.
        let are_all = *self.complete.borrow_and_update();
        let (pods, mirrors) = (self.store.pods().list(), self.mirrors.list());
        let uids: HashSet<&str> = mirrors.iter().filter_map(|mirror| mirror.metadata.uid.as_deref()).collect();
        told.retain(|uid, _| uids.contains(uid.as_str()));
        mirrors.iter().for_each(|mirror| self.statuses.keep_only(&Key::of(&mirror.metadata), Some(mirror)));
        let mut outcome = Ok(());
        for step in decide((&pods, are_all), &mirrors, self.store.nodes().get(&self.node).as_deref()) {
            match step {
                Step::Tell(mirror, status) => {
                    let uid = mirror.metadata.uid.clone().unwrap_or_default();
                    if told.get(&uid) != Some(&*status) {
                        self.statuses.put(&mirror, (*status).clone());
                        told.insert(uid, *status);
                    }
                }
                Step::Create(mirror) => match self.api.create(&*mirror).await {
                    Ok(mirror) => drop(self.mirrors.mirror(mirror)),
                    Err(error) => outcome = Err(error),
                },
                Step::Delete(key, uid) => outcome = self.delete(&key, uid).await.and(outcome),
            }
        }
        outcome
    }

    async fn delete(&self, key: &Key, uid: String) -> Result<(), ApiError> {
        let how = Deletion { grace_period_s: Some(0), uid: Some(uid) };
        match self.api.delete::<Pod>(key, &how).await {
            Ok(()) | Err(ApiError::NotFound { .. } | ApiError::Conflict { .. }) => {
                self.mirrors.remove(key);
                self.statuses.keep_only(key, None);
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(uid: &str, annotations: serde_json::Value) -> Arc<Pod> {
        let metadata = json!({"name": "etcd-n", "namespace": "kube-system", "uid": uid, "annotations": annotations});
        Arc::new(serde_json::from_value(json!({"metadata": metadata, "spec": {"containers": []}})).unwrap())
    }

    fn static_pod(uid: &str) -> Arc<Pod> {
        pod(uid, json!({SOURCE: "file"}))
    }

    fn mirror(uid: &str, of: &str) -> Arc<Pod> {
        pod(uid, json!({SOURCE: "file", MIRROR: of}))
    }

    fn node() -> Node {
        serde_json::from_value(json!({"metadata": {"name": "n", "uid": "node-uid"}})).unwrap()
    }

    fn key() -> Key {
        Key::new("kube-system", "etcd-n")
    }

    #[test]
    fn a_mirror_is_made_and_belongs_to_the_node() {
        assert_eq!(decide((&[static_pod("a")], true), &[], None), [], "not before there is a Node");
        let steps = decide((&[static_pod("a"), pod("b", json!({}))], true), &[], Some(&node()));
        let [Step::Create(made)] = steps.as_slice() else { panic!("{steps:?}") };
        assert_eq!((mirrored(made), made.metadata.uid.as_ref()), (Some("a"), None));
        let owner = &made.metadata.owner_references.as_ref().unwrap()[0];
        assert_eq!((owner.uid.as_str(), owner.controller), ("node-uid", Some(true)));
    }

    #[test]
    fn what_is_no_mirror_any_more_goes() {
        let gone = |uid: &str| vec![Step::Delete(key(), uid.to_owned())];
        assert_eq!(decide((&[static_pod("a")], false), &[mirror("m", "old")], Some(&node())), gone("m"));
        assert_eq!(decide((&[], true), &[mirror("m", "a")], Some(&node())), gone("m"));
        assert_eq!(decide((&[], false), &[mirror("m", "a")], Some(&node())), [], "its pod may be about to come");
        let mut ends = (*mirror("m", "a")).clone();
        ask_to_end(&mut ends, Some(5));
        assert_eq!(decide((&[static_pod("a")], true), &[Arc::new(ends)], Some(&node())), gone("m"));
    }

    #[test]
    fn a_pod_that_ends_keeps_its_mirror_and_gets_no_other() {
        let mut ends = (*static_pod("a")).clone();
        ask_to_end(&mut ends, None);
        ends.status = Some(PodStatus::default());
        let (ends, mirror) = (Arc::new(ends), mirror("m", "a"));
        let told = Step::Tell(mirror.clone(), Box::default());
        assert_eq!(decide((std::slice::from_ref(&ends), true), &[mirror], Some(&node())), [told]);
        assert_eq!(decide((&[ends], true), &[], Some(&node())), []);
    }

    #[test]
    fn another_version_waits_for_the_end_of_the_one_before() {
        let (store, mut told) = (Store::new(), HashSet::new());
        let declare = |uid: &str| -> BTreeMap<Key, StaticPod> {
            [(key(), StaticPod { pod: (*static_pod(uid)).clone(), file: "f".into() })].into()
        };
        let uid = || store.pods().get(&key()).and_then(|pod| pod.metadata.uid.clone());
        settle(&declare("a"), store.pods(), &mut told);
        assert_eq!(uid().as_deref(), Some("a"));
        settle(&declare("b"), store.pods(), &mut told);
        assert_eq!(uid().as_deref(), Some("a"));
        assert!(store.pods().get(&key()).unwrap().metadata.deletion_timestamp.is_some());
        store.pods().remove(&key());
        settle(&declare("b"), store.pods(), &mut told);
        assert_eq!(uid().as_deref(), Some("b"));
        settle(&BTreeMap::new(), store.pods(), &mut told);
        assert!(store.pods().get(&key()).unwrap().metadata.deletion_timestamp.is_some());
    }

    #[test]
    fn nobody_makes_a_static_pod_by_saying_so() {
        let mut pod = (*static_pod("a")).clone();
        disown(&mut pod);
        assert!(!is_static(&pod));
    }
}
