//! Who wants the pods: tables that a test writes to, as an API server's would be, and that can be made to fail.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use cluster::{Key, Source, SourceError, Store, Token};
use cri::v1;
use k8s_openapi::api::authentication::v1::TokenRequestSpec;
use k8s_openapi::api::certificates::v1::PodCertificateRequest;
use k8s_openapi::api::core::v1::{Event, NodeStatus, Pod, PodSpec, PodStatus};
use k8s_openapi::api::resource::v1::ResourceClaim;
use k8s_openapi::api::storage::v1::VolumeAttachment;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kubelet::{Credential, Holder, ObjectName};
use serde_json::Value;
use tokio::sync::watch;

use crate::fixture::LIMIT;

/// The source of a test.
pub(crate) struct Desk {
    store: Store,
    told: AtomicU64,
    /// The reason of the event that this source dies of, once.
    deadly: Mutex<Option<&'static str>>,
    /// Dropped with this value.
    alive: watch::Sender<()>,
    /// How many wait for what is not known yet; none when everything is.
    askers: watch::Sender<Option<usize>>,
    /// Whether statuses are taken, and how many were not.
    statuses: watch::Sender<(bool, usize)>,
    /// Claims for devices, by name.
    claims: Mutex<HashMap<String, ResourceClaim>>,
    /// The drivers whose ResourceSlices were removed; none for all.
    slices: watch::Sender<Vec<Option<String>>>,
    /// The last phase of each pod that was deleted, by name.
    last: Mutex<HashMap<String, String>>,
    /// The logins of pods, by name.
    logins: Mutex<HashMap<String, Vec<Credential>>>,
    /// No volume can be attached any more.
    is_full: AtomicBool,
}

impl Desk {
    pub(crate) fn new() -> Self {
        let desk = Self::unknowing();
        desk.store.set_synced();
        desk
    }

    /// A desk that does not know all pods yet.
    pub(crate) fn unknowing() -> Self {
        Self {
            store: Store::new(),
            told: AtomicU64::new(0),
            deadly: Mutex::new(None),
            alive: watch::Sender::new(()),
            askers: watch::Sender::new(None),
            statuses: watch::Sender::new((true, 0)),
            claims: Mutex::default(),
            slices: watch::Sender::default(),
            last: Mutex::default(),
            logins: Mutex::default(),
            is_full: AtomicBool::default(),
        }
    }

    /// From now on no volume can be attached any more.
    pub(crate) fn fill(&self) {
        self.is_full.store(true, Ordering::Relaxed);
    }

    /// From now on nobody knows whether the objects are there that pods refer to.
    pub(crate) fn know_nothing(&self) {
        self.askers.send_replace(Some(0));
    }

    /// Everything is known again.
    pub(crate) fn know_all(&self) {
        self.askers.send_replace(None);
    }

    /// From now on no status is taken, or every one again.
    pub(crate) fn take_statuses(&self, takes: bool) {
        self.statuses.send_replace((takes, 0));
    }

    /// Waits until so many statuses were not taken.
    pub(crate) async fn not_taken(&self, count: usize) {
        let mut statuses = self.statuses.subscribe();
        let refused = statuses.wait_for(|(_, refused)| *refused >= count);
        tokio::time::timeout(LIMIT, refused).await.expect("it is tried again").unwrap();
    }

    /// The last phase of a pod that was deleted.
    pub(crate) fn last_phase(&self, name: &str) -> Option<String> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned()
    }

    /// A pod has a login, from a secret of this name.
    pub(crate) fn log_in(&self, pod: &str, auth: v1::AuthConfig, secret: &str) {
        let [uid, namespace, name] = [secret, "default", secret].map(str::to_owned);
        let credential = Credential { auth, holder: Holder::Secret(ObjectName { uid, namespace, name }) };
        let mut logins = self.logins.lock().unwrap_or_else(PoisonError::into_inner);
        logins.entry(pod.to_owned()).or_default().push(credential);
    }

    pub(crate) fn logins(&self, pod: &str) -> Vec<Credential> {
        self.logins.lock().unwrap_or_else(PoisonError::into_inner).get(pod).cloned().unwrap_or_default()
    }

    /// There is a claim for devices.
    pub(crate) fn claim(&self, claim: ResourceClaim) {
        let name = claim.metadata.name.clone().unwrap_or_default();
        self.claims.lock().unwrap_or_else(PoisonError::into_inner).insert(name, claim);
    }

    /// Waits until ResourceSlices of these drivers, and no others, were removed.
    pub(crate) async fn slices_removed(&self, of: &[Option<&str>]) {
        let mut slices = self.slices.subscribe();
        let removed = slices.wait_for(|slices| slices.iter().map(Option::as_deref).eq(of.iter().copied()));
        tokio::time::timeout(LIMIT, removed).await.expect("they are removed").unwrap();
    }

    /// Waits until somebody wants to know.
    pub(crate) async fn asked(&self) {
        let mut askers = self.askers.subscribe();
        let asked = askers.wait_for(|askers| askers.is_some_and(|askers| askers > 0));
        tokio::time::timeout(LIMIT, asked).await.expect("somebody asks").unwrap();
    }

    /// Fails, `closed`, as soon as nobody has the desk any more.
    pub(crate) fn life(&self) -> watch::Receiver<()> {
        self.alive.subscribe()
    }

    /// The next event with this reason is taken with a panic.
    pub(crate) fn die_of(&self, reason: &'static str) {
        *self.deadly.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason);
    }

    /// Wants a pod, from its spec.
    pub(crate) fn want(&self, name: &str, uid: &str, spec: Value) {
        let metadata = serde_json::json!({ "name": name, "namespace": "default", "uid": uid });
        let mut pod: Pod = serde_json::from_value(serde_json::json!({ "metadata": metadata, "spec": spec })).unwrap();
        pod.metadata.creation_timestamp = Some(Time(Timestamp::now()));
        self.store.pods().put(pod);
    }

    /// Changes the spec of a pod.
    pub(crate) fn change(&self, name: &str, change: impl FnOnce(&mut PodSpec)) {
        self.store.pods().update(&key(name), |pod| change(pod.spec.get_or_insert_default()));
    }

    /// Asks for the end of a pod.
    pub(crate) fn delete(&self, name: &str, grace_s: i64) {
        let end = Timestamp::now() + SignedDuration::from_secs(grace_s);
        self.store.pods().update(&key(name), |pod| {
            pod.metadata.deletion_timestamp = Some(Time(end));
            pod.metadata.deletion_grace_period_seconds = Some(grace_s);
        });
    }

    /// As an API server does it by force: the deletion is written, and nothing waits for the node.
    pub(crate) fn delete_by_force(&self, name: &str) {
        self.delete(name, 0);
        self.store.pods().remove(&key(name));
    }

    pub(crate) fn pod(&self, name: &str) -> Option<std::sync::Arc<Pod>> {
        self.store.pods().get(&key(name))
    }

    /// How often an event with this reason was told of a pod.
    pub(crate) fn told(&self, pod: &str, reason: &str) -> usize {
        self.messages(pod, reason).len()
    }

    /// What the events with this reason say of a pod.
    pub(crate) fn messages(&self, pod: &str, reason: &str) -> Vec<String> {
        let events = self.store.events().list();
        let about = |event: &&std::sync::Arc<Event>| {
            event.involved_object.name.as_deref() == Some(pod) && event.reason.as_deref() == Some(reason)
        };
        events.iter().filter(about).map(|event| event.message.clone().unwrap_or_default()).collect()
    }

    /// Waits until `holds`.
    pub(crate) async fn when(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let mut changes = self.store.changes();
        let waited = tokio::time::timeout(LIMIT, async {
            while !holds(self) {
                changes.changed().await.unwrap();
            }
        });
        if waited.await.is_err() {
            let pods: Vec<_> = self.store.pods().list().iter().map(|pod| pod.status.clone()).collect();
            let said = |event: &std::sync::Arc<Event>| format!("{:?}: {:?}", event.reason, event.message);
            let events: Vec<_> = self.store.events().list().iter().map(said).collect();
            panic!("waited in vain: {what}\n{pods:#?}\n{}", events.join("\n"));
        }
    }

    pub(crate) async fn running(&self, name: &str) {
        self.when(&format!("{name} runs"), |desk| desk.phase(name).as_deref() == Some("Running")).await;
    }

    pub(crate) async fn gone(&self, name: &str) {
        self.when(&format!("{name} is gone"), |desk| desk.pod(name).is_none()).await;
    }

    pub(crate) fn phase(&self, name: &str) -> Option<String> {
        self.pod(name)?.status.clone()?.phase
    }

    /// The status of a pod's first container, as JSON.
    pub(crate) fn container(&self, name: &str) -> Value {
        let status = self.pod(name).and_then(|pod| pod.status.clone()).unwrap_or_default();
        serde_json::to_value(status.container_statuses.unwrap_or_default().first()).unwrap()
    }
}

pub(crate) fn key(name: &str) -> Key {
    Key::new("default", name)
}

#[async_trait::async_trait]
impl Source for Desk {
    fn store(&self) -> &Store {
        &self.store
    }

    async fn look_up(&self, _: &Pod) -> Result<(), SourceError> {
        self.askers.send_if_modified(|askers| askers.as_mut().map(|askers| *askers += 1).is_some());
        // The sender lives in self.
        let _ = self.askers.subscribe().wait_for(Option::is_none).await;
        Ok(())
    }

    async fn update_pod_status(&self, uid: &str, status: PodStatus) -> Result<(), SourceError> {
        let missing = || SourceError::NotFound { kind: "Pod", name: uid.to_owned() };
        let pod = self.store.pods().find_uid(uid).ok_or_else(missing)?;
        if !self.statuses.borrow().0 {
            self.statuses.send_modify(|(_, refused)| *refused += 1);
            return Err(SourceError::Unavailable {
                action: "take a status".into(),
                source: "as the test wants it".into(),
            });
        }
        self.store.pods().update(&Key::of(&pod.metadata), |pod| pod.status = Some(status));
        Ok(())
    }

    async fn delete_pod(&self, uid: &str) -> Result<(), SourceError> {
        if let Some(pod) = self.store.pods().find_uid(uid) {
            let phase = pod.status.clone().and_then(|status| status.phase).unwrap_or_default();
            let name = pod.metadata.name.clone().unwrap_or_default();
            self.last.lock().unwrap_or_else(PoisonError::into_inner).insert(name, phase);
            self.store.pods().remove(&Key::of(&pod.metadata));
        }
        Ok(())
    }

    async fn request_token(&self, account: &Key, spec: TokenRequestSpec) -> Result<Token, SourceError> {
        let text = format!("{account} for {}", spec.audiences.unwrap_or_default().join(","));
        Ok(Token { text, ends: Timestamp::now() + SignedDuration::from_secs(spec.expiration_seconds.unwrap()) })
    }

    async fn volume_attachment(&self, name: &str) -> Result<VolumeAttachment, SourceError> {
        let status = match self.is_full.load(Ordering::Relaxed) {
            true => serde_json::json!({ "attached": false, "attachError": { "message": "no slot", "errorCode": 8 } }),
            false => serde_json::json!({ "attached": true, "attachmentMetadata": { "device": "/dev/one" } }),
        };
        let found = serde_json::json!({
            "metadata": { "name": name }, "spec": { "attacher": "a", "nodeName": "n", "source": {} }, "status": status });
        Ok(serde_json::from_value(found).unwrap())
    }

    async fn resource_claim(&self, claim: &Key) -> Result<ResourceClaim, SourceError> {
        let claims = self.claims.lock().unwrap_or_else(PoisonError::into_inner);
        let missing = || SourceError::NotFound { kind: "ResourceClaim", name: claim.to_string() };
        claims.get(claim.name()).cloned().ok_or_else(missing)
    }

    async fn request_pod_certificate(
        &self,
        request: &PodCertificateRequest,
    ) -> Result<PodCertificateRequest, SourceError> {
        let (mut made, requests) = (request.clone(), self.store.pod_certificate_requests());
        made.metadata.name = Some(format!("req-{}", requests.len() + 1));
        Ok((*requests.put(made)).clone())
    }

    async fn service_account_uid(&self, account: &Key) -> Result<String, SourceError> {
        Ok(format!("uid of {account}"))
    }

    async fn remove_resource_slices(&self, driver: Option<&str>) -> Result<(), SourceError> {
        self.slices.send_modify(|slices| slices.push(driver.map(str::to_owned)));
        Ok(())
    }

    async fn request_deletion(&self, _: &str, _: Option<i64>) -> Result<(), SourceError> {
        Ok(())
    }

    async fn update_node_status(&self, _: &str, _: NodeStatus) -> Result<(), SourceError> {
        Ok(())
    }

    fn event(&self, mut event: Event) {
        let mut deadly = self.deadly.lock().unwrap_or_else(PoisonError::into_inner);
        if deadly.is_some() && event.reason.as_deref() == *deadly {
            *deadly = None;
            drop(deadly);
            panic!("as the test wants it");
        }
        drop(deadly);
        let number = self.told.fetch_add(1, Ordering::Relaxed);
        event.metadata.name = Some(format!("{number:06}"));
        event.metadata.namespace = Some("default".to_owned());
        self.store.events().put(event);
    }
}
